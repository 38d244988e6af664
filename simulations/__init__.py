"""Many users on one machine: populations, runtimes, evaluation, reports, experiments."""
