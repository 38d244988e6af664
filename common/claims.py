"""How a claim on the privacy loss is shown, and when a measurement contradicts it."""

import math
from decimal import ROUND_CEILING, Decimal


def shown(epsilon: float | None, *, digits: int = 2) -> str:
    """An upper bound on the privacy loss for people, rounded up.

    Args:
        epsilon: The bound; None where there is none.
        digits: Behind the point; from 1,000 on there are none.

    Guarantees:
        Never smaller: what is shown does not promise more than the bound.

    >>> [shown(value) for value in (3.501, 1.1, 8.0, 10_000.2, float("inf"), None)]
    ['3.51', '1.10', '8.00', '10,001', '∞', '∞']
    """
    if epsilon is None or not math.isfinite(epsilon):
        return "∞"
    if epsilon >= 1000:
        return f"{math.ceil(epsilon):,}"
    # The shortest decimal that is this float: 1.1 is not shown as 1.11.
    exact = Decimal(repr(float(epsilon)))
    return f"{exact.quantize(Decimal(1).scaleb(-digits), ROUND_CEILING):,}"


def contradicts(lower_bound: float, claim: float | None) -> bool:
    """Whether a measured lower bound on the privacy loss exceeds a claim; None claims nothing.

    >>> [contradicts(3.0, claim) for claim in (2.9, 3.0, None)]
    [True, False, False]
    """
    return claim is not None and lower_bound > claim
