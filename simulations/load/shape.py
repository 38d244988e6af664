"""What a federation under load is like."""

import json
from dataclasses import dataclass
from pathlib import Path

FEDERATION = """name = "load"
users = {users}

[base_model]
name = {model}

[shared]
method = "ffa"
rank = {rank}
alpha = {rank}
targets = "all-linear"

[local]
steps = {steps}
batch_size = 1
max_tokens = 32
learning_rate = 0.01

[federation]
rounds = {rounds}
cohort = {cohort}
deadline = {deadline}
quorum = 0.95

[optimizer]
name = "momentum"
learning_rate = 1.0
momentum = 0.9

[privacy]
mechanism = "gaussian"
clip_norm = 1.0
noise_multiplier = 1.0
delta = 1e-6
"""


@dataclass(frozen=True, slots=True)
class Shape:
    """What a federation is like.

    Attributes:
        users: Devices, all of them.
        cohort: Expected in a round; each device is drawn by itself.
        rounds: At most.
        model: A base model's folder.
        rank: Of the shared adapter.
        steps: Of local training.
        deadline: Seconds of a round.
    """

    users: int
    cohort: int
    rounds: int
    model: Path
    rank: int = 35
    steps: int = 1
    deadline: float = 600.0

    @property
    def federation(self) -> str:
        """The server's `federation.toml`."""
        return FEDERATION.format(
            users=self.users,
            cohort=self.cohort,
            rounds=self.rounds,
            model=json.dumps(str(self.model)),
            rank=self.rank,
            steps=self.steps,
            deadline=self.deadline,
        )
