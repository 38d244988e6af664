"""The shared training of a simulation: the real ServerApp and ClientApp on the in-process Grid."""

import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from flwr.app import Context, RecordDict

from homefire.client.device import adapted_model
from homefire.client.progress import Reporter
from homefire.common.adapted_model import AdaptedModel
from homefire.common.errors import ConfigError, FederationError
from homefire.server.app import app as server_app
from homefire.server.releases import ReleaseStore
from homefire.server.run_state import rounds_spent
from homefire.simulations.cohort_worker import Office
from homefire.simulations.engine import CohortEngine
from homefire.simulations.grid import Traffic
from homefire.simulations.preparation import Run

ROUNDS = "Shared adapter"
"""The name of this phase."""


@dataclass(frozen=True, slots=True)
class SharedTraining:
    """What the rounds gave.

    Attributes:
        model: The devices' model; its shared adapter holds the last release.
        engine: What computed; it holds that release too.
        rounds: One entry a round, round 0 first: the operator's log and the validation loss. Of a
            round that was interrupted it says so; nothing else of that round is known.
        traffic: Messages and bytes.
    """

    model: AdaptedModel
    engine: CohortEngine
    rounds: list[dict[str, Any]]
    traffic: Traffic


def train_shared(run: Run, reporter: Reporter) -> SharedTraining:
    """Carry out the rounds of a prepared run and score every release.

    Args:
        run: From `prepare`.
        reporter: Shows progress.

    Raises:
        ConfigError: Records longer than the base model reads; nothing was trained.
    """
    experiment = run.experiment
    model = adapted_model(experiment.for_devices(), experiment.shared)
    _check_lengths(run, model)
    engine = cohort_engine(run)
    traffic = _run_rounds(run, engine, reporter)
    rounds = _score_releases(run, engine)
    contributed = any(entry["accepted"] for entry in rounds)
    if any(entry["cohort"] for entry in rounds) and not contributed:
        raise FederationError(
            "no device contributed anything in any round",
            hint=f"Reasons by count: {_reasons(rounds)}. The warnings above say more.",
        )
    if contributed and run.experiment.privacy.mechanism == "none" and _has_not_moved(run):
        raise FederationError(
            "every device sent zeros in every round: the shared adapter is what it was",
            hint="Training diverged, or histories are too short; the warnings above say which.",
        )
    return SharedTraining(model, engine, rounds, traffic)


def cohort_engine(run: Run) -> CohortEngine:
    """What computes for a run's users; torch's own threads are set to what its device needs."""
    experiment = run.experiment
    threads = experiment.threads or len(os.sched_getaffinity(0))
    torch.set_num_threads(threads)
    if experiment.engine.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what torch asks for
    torch.use_deterministic_algorithms(experiment.engine.deterministic)
    office = Office(
        home=run.home.folder,
        controls=run.folder / "controls",
        shared=experiment.shared,
        config=experiment.engine,
        availability=experiment.devices,
        seed=experiment.seed,
    )
    return CohortEngine(office, threads)


def _has_not_moved(run: Run) -> bool:
    """Whether rounds were released and the last release is the first one still."""
    store = releases(run)
    numbers = store.rounds()
    return len(numbers) > 1 and store.read(0).vector.tobytes() == store.latest().vector.tobytes()


def _reasons(rounds: Sequence[dict[str, Any]]) -> dict[str, int]:
    """Why contributions are missing, over all rounds."""
    counts: Counter[str] = Counter()
    for entry in rounds:
        counts.update(entry["dropped"])
        counts.update(entry["refused"])
    return dict(counts)


def _run_rounds(run: Run, engine: CohortEngine, reporter: Reporter) -> Traffic:
    """All rounds, or those that an interrupted run has left."""
    settings, output = run.experiment.federation, run.folder / "server"
    spent, is_over = rounds_spent(output)
    left = 0 if is_over else settings.rounds - spent
    with reporter.phase(ROUNDS, left * settings.cohort) as advance:
        grid = engine.grid(run.training, run.experiment.local, advance)
        context = Context(
            run_id=grid.run.run_id,
            node_id=0,
            node_config={},
            state=RecordDict(),
            run_config={"federation": str(run.federation_file)},
        )
        if not is_over:
            server_app(grid, context)
    return grid.traffic


def releases(run: Run) -> ReleaseStore:
    """Where the server put its releases."""
    return ReleaseStore(run.folder / "server" / "releases")


def _check_lengths(run: Run, model: AdaptedModel) -> None:
    experiment = run.experiment
    longest = max(
        experiment.local.max_tokens,
        experiment.private.training.max_tokens,
        experiment.evaluation.max_tokens,
    )
    if longest > model.base.context_length:
        raise ConfigError(
            f"max_tokens {longest} is more than the {model.base.context_length} tokens that "
            f"{model.base.name} reads"
        )


def _score_releases(run: Run, engine: CohortEngine) -> list[dict[str, Any]]:
    """The operator's log with the loss on a few users' validation slices: a simulator's privilege.

    The engine ends with the last release.
    """
    users = range(min(run.experiment.evaluation.curve_users, run.training))
    rounds, worker = _rounds(run), engine.crew.workers[0]
    for entry in rounds:
        entry["validation_loss"] = None
        if users and not entry["interrupted"]:
            worker.hold(releases(run).read(entry["round"]).vector)
            entry["validation_loss"] = worker.validation_loss(users)
    engine.hold(releases(run).latest().vector)
    return rounds


def _rounds(run: Run) -> list[dict[str, Any]]:
    """Round 0 and every round that was charged, from the operator's log.

    A round that was interrupted has no line, nor has one whose process was killed between the
    release and its line.
    """
    log = run.folder / "server" / "rounds.jsonl"
    # A run whose rounds were all interrupted has none.
    lines = log.read_text(encoding="utf-8").splitlines() if log.exists() else []
    logged = {entry["round"]: entry for entry in map(json.loads, lines)}
    logged[0] = {"round": 0, "cohort": 0, "accepted": 0, "seconds": 0.0}
    unknown: dict[str, Any] = dict.fromkeys(
        ("cohort", "accepted", "train_loss", "clipped_share", "seconds")
    )
    unknown |= {"dropped": {}, "refused": {}}
    known = {*logged, *releases(run).rounds()}
    spent, _ = rounds_spent(run.folder / "server")
    return [
        {**unknown, "round": number, "interrupted": number not in known, **logged.get(number, {})}
        for number in range(spent + 1)
    ]
