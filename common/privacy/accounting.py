"""From noise to epsilon and back.

Two accountants, each where it is right: the exact Gaussian for correlated noise and wherever the
cohort is known, privacy loss distributions (PLD) for Poisson-sampled cohorts. What a run claims is
put together in `statement.py`.
"""

import math
from functools import lru_cache, partial

from homefire.common.errors import HomefireError, PrivacyError

SMALLEST_PLD_NOISE = 0.2
"""Below this noise multiplier the unamplified value is stated: an upper bound, far from private."""

MANY_USERS = 10**10
"""More people than there are."""

LARGEST_MU = 1e150
"""Epsilon is about mu^2 / 2; beyond this it leaves float64."""


def gaussian_delta(epsilon: float, mu: float) -> float:
    """The exact delta of a Gaussian mechanism with sensitivity / noise = mu.

    Source: Balle and Wang 2018, theorem 8; Dong et al. 2019, corollary 2.13.
    """
    near, far = epsilon / mu - mu / 2, epsilon / mu + mu / 2
    # e^epsilon Phi(-far), where epsilon = far^2 / 2 - near^2 / 2 would drown the rest.
    second = _log_mills(far) - near * near / 2
    return max(0.0, math.exp(_log_ndtr(-near)) - math.exp(second))


def gaussian_epsilon(mu: float, delta: float) -> float:
    """The exact epsilon of a Gaussian mechanism, or of a composition that is one.

    Args:
        mu: Sensitivity divided by the noise's standard deviation; sqrt(k) / z for k releases.
        delta: In (0, 1).

    Guarantees:
        Never below the truth: the upper end of the last bracket of the bisection is returned.

    Raises:
        PrivacyError: mu or delta out of range.
    """
    check_delta(delta)
    if not 0 < mu < LARGEST_MU:
        raise PrivacyError(f"mu {mu} is not a positive number whose epsilon can be written")
    if gaussian_delta(0.0, mu) <= delta:
        return 0.0
    low, high = 0.0, 1.0
    while gaussian_delta(high, mu) > delta:
        low, high = high, 2 * high
    while high - low > 1e-9 * max(1.0, high):
        middle = (low + high) / 2
        low, high = (middle, high) if gaussian_delta(middle, mu) > delta else (low, middle)
    return high


def gaussian_mu(epsilon: float, delta: float) -> float:
    """The largest mu (to 1e-9) whose `gaussian_epsilon` is at most `epsilon`: its inverse.

    Guarantees:
        Never above: the epsilon of the returned mu does not exceed the target.

    Raises:
        PrivacyError: The target is not positive, or delta is out of range.
    """
    check_delta(delta)
    check_epsilon(epsilon)
    low, high = 0.0, 1.0
    while gaussian_epsilon(high, delta) <= epsilon:
        low, high = high, 2 * high
    while high - low > 1e-9 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if gaussian_epsilon(middle, delta) <= epsilon else (low, middle)
    return low


@lru_cache(maxsize=64)
def poisson_epsilon(
    noise_multiplier: float,
    *,
    sampling_rate: float,
    rounds: int,
    delta: float,
    step: float | None = None,
) -> float:
    """Epsilon of Poisson-sampled Gaussian rounds, by privacy loss distributions (PLD).

    Args:
        noise_multiplier: z.
        sampling_rate: q.
        rounds: T.
        delta: In (0, 1).
        step: Discretization of the privacy loss; pessimistic at any value. By default 1e-4, or
            1e-3 where losses are so large that finer steps take gigabytes.

    Guarantees:
        Upper bound: losses are rounded up; the value never exceeds the unamplified one.

    Assumes:
        Every enrolled user is drawn independently with probability q, the draw is secret, there is
        no top-up, and drop-outs do not depend on data.

    Raises:
        PrivacyError: A parameter is out of range.
        HomefireError: dp-accounting is not installed.

    Source: Doroshenko et al. 2022, as implemented in dp-accounting.
    """
    if not (noise_multiplier > 0 and 0 < sampling_rate <= 1 and rounds >= 1):
        raise PrivacyError(
            f"noise multiplier {noise_multiplier}, sampling rate {sampling_rate} and "
            f"{rounds} rounds are not a run"
        )
    unamplified = gaussian_epsilon(math.sqrt(rounds) / noise_multiplier, delta)
    if sampling_rate >= 1 or noise_multiplier < SMALLEST_PLD_NOISE or unamplified == 0:
        return unamplified
    try:
        import dp_accounting
        from dp_accounting.pld import PLDAccountant
    except ImportError as error:
        raise HomefireError(
            "accounting for sampled cohorts needs the package dp-accounting",
            hint="Install homefire[server].",
        ) from error
    if step is None:
        step = 1e-4 if noise_multiplier >= 0.5 else 1e-3
    relation = dp_accounting.NeighboringRelation.REPLACE_SPECIAL
    event = dp_accounting.PoissonSampledDpEvent(
        sampling_rate, dp_accounting.GaussianDpEvent(noise_multiplier)
    )
    accountant = PLDAccountant(relation, value_discretization_interval=step)
    accountant.compose(event, rounds)
    return min(float(accountant.get_epsilon(delta)), unamplified)


@lru_cache(maxsize=64)
def calibrate_poisson(epsilon: float, *, sampling_rate: float, rounds: int, delta: float) -> float:
    """The smallest noise multiplier (to 0.1 %) whose `poisson_epsilon` is at most `epsilon`.

    It is never below `SMALLEST_PLD_NOISE`: where that is enough, the run has less than `epsilon`.

    Guarantees:
        Meets its target: the `poisson_epsilon` of the result does not exceed it.

    Raises:
        PrivacyError: The target is not positive or needs more noise than makes sense.
    """
    check_epsilon(epsilon)
    measure = partial(
        poisson_epsilon, sampling_rate=sampling_rate, rounds=rounds, delta=delta, step=1e-3
    )
    low, high = SMALLEST_PLD_NOISE, 1.0
    if measure(low) <= epsilon:
        return low
    while measure(high) > epsilon:
        low, high = high, 2 * high
        if high > 2.0**12:
            raise PrivacyError(
                f"epsilon {epsilon} needs a noise multiplier above {low:g}",
                hint="Ask for a larger epsilon, fewer rounds or a smaller cohort.",
            )
    while high / low > 1.001:
        middle = math.sqrt(low * high)
        low, high = (middle, high) if measure(middle) > epsilon else (low, middle)
    return high


def check_delta(delta: float) -> None:
    """Refuse a delta that promises nothing.

    Raises:
        PrivacyError: Not in (0, 1).
    """
    if not 0 < delta < 1:
        raise PrivacyError(f"delta {delta} is not between 0 and 1")


def check_small_delta(delta: float | None, users: int) -> None:
    """Refuse a delta that would let somebody's whole history be published.

    Raises:
        PrivacyError: Not below one over the number of users.
    """
    if delta is not None and delta * users >= 1:
        raise PrivacyError(
            f"delta {delta:g} is not below 1 / {users:,} users: it would allow publishing "
            "somebody's whole history",
            hint=f"Use at most {default_delta(users):g}.",
        )


def default_delta(users: int) -> float:
    """The smaller of 1e-5 and users^-1.1, rounded down to one digit: below 1 / users.

    >>> [default_delta(users) for users in (1, 1000, 1_000_000)]
    [1e-05, 1e-05, 2e-07]
    """
    digits, exponent = f"{min(1e-5, min(users, MANY_USERS) ** -1.1):.15e}".split("e")
    return float(f"{digits[0]}e{exponent}")


def check_epsilon(epsilon: float) -> None:
    """Refuse a target that cannot be met, or that asks for nothing.

    Raises:
        PrivacyError: Not a positive finite number.
    """
    if not (math.isfinite(epsilon) and epsilon > 0):
        raise PrivacyError(f"epsilon {epsilon} is not a positive number")


def _log_ndtr(x: float) -> float:
    """Log of the standard normal distribution function, accurate in the far left tail."""
    if x > -30:
        return math.log(0.5 * math.erfc(-x / math.sqrt(2)))
    return _log_mills(-x) - x * x / 2


def _log_mills(x: float) -> float:
    """log(e^(x^2 / 2) Phi(-x)) for x >= 0: the normal tail without its exponential factor."""
    if x < 30:
        return math.log(0.5 * math.erfc(x / math.sqrt(2))) + x * x / 2
    inverse = 1 / (x * x)
    series = 1 - inverse * (1 - inverse * (3 - inverse * (15 - inverse * 105)))
    return math.log(series / x) - 0.5 * math.log(2 * math.pi)
