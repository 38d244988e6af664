"""The audit of one finished run: what its mechanism and its release really show."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from homefire.client.progress import Advance, Reporter
from homefire.common.claims import contradicts
from homefire.common.config import FederationConfig, load_config
from homefire.common.privacy.mechanism import NoPrivacy
from homefire.server.planning import plan_privacy, schedule_of
from homefire.simulations.audit import canary, membership, statistics
from homefire.simulations.engine import CohortEngine
from homefire.simulations.experiment import EvaluationConfig
from homefire.simulations.preparation import Run, reopen
from homefire.simulations.report import load_report, write_report
from homefire.simulations.rounds import cohort_engine, releases

CANARIES, NOISE, MEMBERSHIP = "Canaries", "Noise", "Membership inference"
DELTA_WITHOUT_NOISE = 1e-5
FEWEST_USERS = 4


def audit_run(folder: Path, reporter: Reporter, *, users: int) -> dict[str, Any]:
    """Audit a run and put the figures into its report.

    Args:
        folder: The run's folder.
        reporter: Shows progress.
        users: How many training and how many unseen users the membership attack scores at most.

    Returns:
        Three entries: `canary`, the one-shot audit of the run's mechanism over its rounds, at
        worst-case participation; `noise`, goodness of fit, null where there is none or next to
        none; `membership`, an attack on the last release by the loss on the users' older records,
        null with too few users, with the ε_release that its bound must not exceed.

    Raises:
        DataError: The run has no report yet.
        ConfigError: The folder is no run.
    """
    report, run = load_report(folder), reopen(folder)
    config = load_config(FederationConfig, run.federation_file)
    mechanism, schedule = plan_privacy(config).mechanism, schedule_of(config)
    delta = config.privacy.delta or DELTA_WITHOUT_NOISE
    with reporter.phase(CANARIES, 1) as advance:
        canaries = canary.audit(mechanism, schedule, delta=delta)
        advance()
    fit = None
    noise = 0.0 if isinstance(mechanism, NoPrivacy) else mechanism.noise_multiplier
    if noise >= statistics.LEAST_NOISE:
        with reporter.phase(NOISE, 1) as advance:
            fit = statistics.fit_noise(mechanism).to_json()
            advance()
    found = {
        "canary": canaries.to_json(),
        "noise": fit,
        "membership": _membership(
            run, reporter, users=users, delta=delta, claim=report["privacy"]["epsilon_release"]
        ),
    }
    write_report(folder, {**report, "audit": found})
    return found


def _membership(
    run: Run, reporter: Reporter, *, users: int, delta: float, claim: float | None
) -> dict[str, Any] | None:
    members = range(min(users, run.training))
    others = range(run.training, run.training + min(users, run.unseen))
    if min(len(members), len(others)) < FEWEST_USERS:
        return None
    engine = cohort_engine(run)
    engine.hold(releases(run).latest().vector)
    with reporter.phase(MEMBERSHIP, len(members) + len(others)) as advance:
        inside = _gains(run, engine, members, advance)
        outside = _gains(run, engine, others, advance)
    found = membership.attack(inside, outside, delta=delta, seed=run.experiment.seed)
    holds = not contradicts(found.epsilon_lower, claim)
    return {**found.to_json(), "epsilon_claimed": claim, "claim_holds": holds}


def _gains(run: Run, engine: CohortEngine, numbers: Sequence[int], advance: Advance) -> list[float]:
    """By how much the release lowers the loss on what each device may have trained on."""
    config = EvaluationConfig(max_tokens=run.experiment.local.max_tokens)
    training, gains = run.experiment.private.training, []
    for base, loss in engine.base_and_shared(run.home.users, numbers, config, training):
        gains.append(float(membership.loss_reduction([loss], [base])[0]))
        advance()
    return gains
