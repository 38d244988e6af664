"""The main job: federated training, private adapters, evaluation, report."""

import resource
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from homefire import __version__
from homefire.client.personalize.recipe import SHARED
from homefire.client.progress import Reporter
from homefire.common.adapted_model import AdaptedModel
from homefire.common.errors import DataError
from homefire.simulations.cohort_worker import CohortWorker
from homefire.simulations.engine import CohortEngine
from homefire.simulations.evaluation import UserScores, summarize
from homefire.simulations.grid import Traffic
from homefire.simulations.preparation import Run, write_toml
from homefire.simulations.report import load_report, write_report
from homefire.simulations.rounds import releases, train_shared

PRIVATE_PHASE, EVALUATION = "Private adapters", "Evaluation"
TRAFFIC = tuple(f"{name}_per_contribution" for name in ("bytes_up", "bytes_down", "device_seconds"))


@dataclass(slots=True)
class Measured:
    """What the phases gave, on the way to the report."""

    traffic: Traffic
    rounds: list[dict[str, Any]]
    private_tokens: int = 0
    seconds: float = 0.0
    scores: list[UserScores] = field(default_factory=list)


def simulate(run: Run, reporter: Reporter) -> dict[str, Any]:
    """Carry out a prepared run.

    Args:
        run: From `prepare`.
        reporter: Shows progress, keeps times.

    Returns:
        The report; `report.json`, `report.html` and the exported shared adapter lie in the run's
        folder. A run that was over is evaluated again; what only its first report can know, the
        audit and the traffic, is kept.
    """
    experiment, started = run.experiment, time.monotonic()
    earlier = _earlier_report(run, reporter)
    shared = train_shared(run, reporter)
    model, measured = shared.model, Measured(shared.traffic, shared.rounds)
    releases(run).export(
        model.specs[SHARED], run.folder / "shared_adapter", base_model=experiment.base_model.name
    )
    _train_private_adapters(run, shared.engine, reporter, measured)
    _evaluate(run, shared.engine, reporter, measured)
    measured.seconds = time.monotonic() - started
    report = _report(run, model, reporter, measured)
    if earlier is not None and not measured.traffic.messages:
        _carry_over(earlier, report)
    write_report(run.folder, report)
    return report


def _earlier_report(run: Run, reporter: Reporter) -> dict[str, Any] | None:
    """The report that a finished run has already; nobody needs a damaged one."""
    if not (run.folder / "report.json").exists():
        return None
    reporter.console.print("This run is over: it is evaluated again, and its report is replaced.")
    try:
        return load_report(run.folder)
    except DataError:
        return None


def _carry_over(earlier: dict[str, Any], report: dict[str, Any]) -> None:
    """Keep what is about the run's rounds and releases, which are the same."""
    if "audit" in earlier:
        report["audit"] = earlier["audit"]
    report["efficiency"] |= {name: earlier["efficiency"].get(name) for name in TRAFFIC}


def _train_private_adapters(
    run: Run, engine: CohortEngine, reporter: Reporter, measured: Measured
) -> None:
    """Each user's adapter on top of the shared adapter, and the control on the bare base model."""
    users, seed = range(run.training + run.unseen), run.experiment.seed
    release = releases(run).latest().vector
    write_toml(engine.office.controls / "device.toml", run.experiment.for_devices())

    training = run.experiment.private.training
    with reporter.phase(PRIVATE_PHASE, len(users)) as advance:
        for tokens in engine.personalize(users, release, training, seed=seed):
            measured.private_tokens += tokens
            advance()


def _evaluate(run: Run, engine: CohortEngine, reporter: Reporter, measured: Measured) -> None:
    users, config = range(run.training + run.unseen), run.experiment.evaluation

    def score(worker: CohortWorker, numbers: Sequence[int]) -> Sequence[UserScores]:
        pairs = [(number, _other(number, run.training, run.unseen)) for number in numbers]
        return worker.score(run.held_out.path, pairs, config)

    with reporter.phase(EVALUATION, len(users)) as advance:
        for found in engine.over_users(score, users, run.experiment.private.training):
            measured.scores.append(found)
            advance()


def _other(number: int, training: int, unseen: int) -> int:
    """The next user of the same group, for the control; of both groups where there is only one."""
    group = range(training) if number < training else range(training, training + unseen)
    others = group if len(group) > 1 else range(training + unseen)
    return others[(others.index(number) + 1) % len(others)]


def _report(
    run: Run, model: AdaptedModel, reporter: Reporter, measured: Measured
) -> dict[str, Any]:
    experiment, base, about = run.experiment, model.base, releases(run).latest().about
    seen, unseen = measured.scores[: run.training], measured.scores[run.training :]
    return {
        "format": 1,
        "name": run.folder.name,
        "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "homefire_version": __version__,
        "seed": experiment.seed,
        "experiment": experiment.model_dump(mode="json"),
        "base_model": {
            "name": base.name,
            "fingerprint": base.fingerprint,
            "dtype": base.dtype,
            "parameters": base.parameters,
            "note": base.note,
        },
        "population": {
            "kind": experiment.population.kind,
            "training_users": run.training,
            "unseen_users": run.unseen,
            "records": sum(len(user.records) for user in run.home.users)
            + sum(len(user.records) for user in run.held_out),
            "skipped": run.skipped,
        },
        "adapters": {
            name: {
                "method": spec.config.method,
                "rank": spec.config.rank,
                "parameters": spec.size,
                "targets": list(spec.targets),
            }
            for name, spec in model.specs.items()
        },
        "privacy": about["privacy"],
        "deployment": about["deployment"],
        "rounds": measured.rounds,
        "utility": {
            "training_users": summarize(seen, seed=experiment.seed),
            "unseen_users": summarize(unseen, seed=experiment.seed),
        },
        "efficiency": _efficiency(run, reporter, measured),
    }


def _efficiency(run: Run, reporter: Reporter, measured: Measured) -> dict[str, Any]:
    traffic, seconds = measured.traffic, reporter.seconds
    trained = 2 * (run.training + run.unseen)
    return {
        # Null where nothing travelled: the rounds were over when the run was resumed.
        "bytes_up_per_contribution": _each(traffic.up, traffic, round),
        "bytes_down_per_contribution": _each(traffic.down, traffic, round),
        "device_seconds_per_contribution": _each(traffic.device_seconds, traffic, float),
        "private_seconds_per_user": seconds[PRIVATE_PHASE] / trained,
        "training_tokens_per_second": measured.private_tokens / seconds[PRIVATE_PHASE],
        "peak_memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "total_seconds": measured.seconds,
        "phases": dict(seconds),
    }


def _each(total: float, traffic: Traffic, kind: Callable[[float], float]) -> float | None:
    return kind(total / traffic.messages) if traffic.messages else None
