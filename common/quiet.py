"""What keeps Flower to itself: it tells nobody that it runs, and installs nothing."""

QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
}
"""For the environment of a process that runs Flower; set before Flower is imported."""
