"""What example-level privacy costs each record of a user: kept on the device."""

from dataclasses import dataclass

UNIT = "one record of this user's history"
ADJACENCY = "zero-out"
"""A record is there or gives a zero gradient: add or remove one, the number of records public."""


@dataclass(frozen=True, slots=True)
class ExampleDPStatement:
    """What one contribution costs each record; it tells the number of examples: keep it here.

    What several cost together is `example_epsilon` of all their statements.

    Attributes:
        noise_multiplier: z, of each step.
        delta: The probability bound that goes with epsilon.
        epsilon: Against whoever sees the trained tensors, of this one contribution.
        steps: Noisy steps, K.
        sampling_rate: The chance q of each example to be in a step's batch.
        examples: The number of examples, which the adjacency takes as public.
    """

    noise_multiplier: float
    delta: float
    epsilon: float
    steps: int
    sampling_rate: float
    examples: int
    unit: str = UNIT
    adjacency: str = ADJACENCY
