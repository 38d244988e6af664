"""Who is asked how often: the public facts that a privacy claim stands on."""

import math
from dataclasses import dataclass

from homefire.common.errors import PrivacyError


@dataclass(frozen=True, slots=True)
class Schedule:
    """Who is asked how often: the public facts that a claim stands on.

    Attributes:
        users: N, all enrolled users.
        cohort: n, the expected cohort: the fixed denominator.
        rounds: T.
        participations: k, the most rounds of one user; None means no limit (`gaussian` alone).
        separation: b, the fewest rounds between two participations (`banded-sqrt` alone).
    """

    users: int
    cohort: int
    rounds: int
    participations: int | None = None
    separation: int | None = None

    def __post_init__(self) -> None:
        if min(self.users, self.cohort, self.rounds) < 1:
            raise PrivacyError(
                f"{self.users} users, cohort {self.cohort} and {self.rounds} rounds are not a run"
            )
        if self.cohort > self.users:
            raise PrivacyError(f"cohort {self.cohort} is larger than the {self.users:,} users")

    @property
    def sampling_rate(self) -> float:
        """The share of all users in a cohort."""
        return self.cohort / self.users

    def rota(self) -> tuple[int, int]:
        """The participations k and the separation b of a fixed rota, filled in where not given.

        A rota asks the next n of N users in each round, in a fixed order, again and again.

        Guarantees:
            Keeps the rule: it asks nobody more than k times, nor twice within b rounds.

        Raises:
            PrivacyError: n b > N, or n T > k N.
        """
        turns = math.ceil(self.cohort * self.rounds / self.users)
        widest = self.users // self.cohort
        k = turns if self.participations is None else self.participations
        b = min(widest, self.rounds) if self.separation is None else self.separation
        if b < 1 or k < 1:
            raise PrivacyError(f"separation {b} and participations {k} must be positive")
        if self.cohort * b > self.users:
            raise PrivacyError(
                f"a rota cannot keep {b} rounds between two turns of a user: "
                f"{self.cohort} x {b} is more than {self.users:,} users",
                hint=f"Use a separation of at most {widest}, a smaller cohort, or more users.",
            )
        if k < turns:
            raise PrivacyError(
                f"{self.rounds} rounds of {self.cohort} ask each of {self.users:,} users up to "
                f"{turns} times, more than {k}",
                hint=f"Use at most {k * self.users // self.cohort} rounds, or {turns} "
                "participations.",
            )
        return k, b
