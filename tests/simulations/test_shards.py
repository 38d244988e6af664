"""Shards: Ray actors that give what local workers give."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_engines import (
    charges,
    make_office,
    outcomes,
    plans_for,
)
from tiny_runs import LOCAL, make_federation, make_home, make_plan, make_users, some_vector

from homefire.client.home import Home
from homefire.client.personalize.recipe import PRIVATE, SHARED
from homefire.common.config import PrivacyConfig, RoundsConfig
from homefire.common.errors import ConfigError
from homefire.common.records import UserFile
from homefire.server.federation import run_federation
from homefire.server.run_state import Federation
from homefire.simulations.cohort_worker import CohortWorker
from homefire.simulations.engine import CohortEngine
from homefire.simulations.engine_config import AvailabilityConfig
from homefire.simulations.experiment import EvaluationConfig

ray = pytest.importorskip("ray")

USERS = 5
CORES = 6
"""Of Ray's: engines that are not stopped yet keep theirs."""

SGD = LOCAL.model_copy(update={"optimizer": "sgd", "learning_rate": 0.02, "steps": 3})
SHARDS: dict[str, Any] = {"shards": 2, "workers": None, "micro_cohort": 2}
LOCAL_WORKERS: dict[str, Any] = {"workers": 2, "micro_cohort": 2}
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(300),
    pytest.mark.filterwarnings("ignore"),  # of Ray's
]


@pytest.fixture(scope="module", autouse=True)
def _one_ray() -> Iterator[None]:
    """Started once; what shards find running they use."""
    ray.init(num_cpus=CORES, log_to_driver=False, include_dashboard=False)
    yield
    ray.shutdown()


@pytest.fixture
def homes(tmp_path: Path, tiny_llama: Path) -> Callable[[str], Home]:
    """Homes with the same users, of whom nobody has taken part in anything."""
    return lambda name: make_home(tmp_path / name, tiny_llama, make_users(USERS, records=8))


def federation_of(folder: Path, model: Path, home: Home) -> Federation:
    return make_federation(
        folder,
        model,
        users=USERS,
        home=home,
        local=SGD,
        federation=RoundsConfig(rounds=2, cohort=USERS, deadline=120.0),
        privacy=PrivacyConfig(mechanism="none", clip_norm=1.0),
    )


@pytest.fixture(scope="module")
def carried_out(
    tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path
) -> Iterator[dict[str, tuple[CohortEngine, Home, Federation]]]:
    """Two rounds and everybody's private adapter, on shards and on local workers."""
    found = {}
    for name, config in (("local", LOCAL_WORKERS), ("shards", SHARDS)):
        folder = tmp_path_factory.mktemp(name)
        home = make_home(folder / "home", tiny_llama, make_users(USERS, records=8))
        federation = federation_of(folder / "out", tiny_llama, home)
        engine = CohortEngine(make_office(home, **config), 2)
        controls = engine.office.controls
        make_home(controls, tiny_llama, make_users(USERS, records=8))
        run_federation(engine.grid(USERS, SGD), federation)
        training = home.config.private.training
        release = federation.store.latest().vector
        tokens = list(engine.personalize(range(USERS), release, training, seed=3))
        assert len(tokens) == USERS and min(tokens) > 0
        found[name] = (engine, home, federation)
    yield found
    stop(found["shards"][0])


def stop(engine: CohortEngine) -> None:
    """End the actors of this engine."""
    for worker in engine.crew.workers:
        ray.kill(vars(worker)["_actor"])


Carried = dict[str, tuple[CohortEngine, Home, Federation]]


def test_every_shard_is_an_actor_and_no_worker_is_local(carried_out: Carried) -> None:
    assert [len(engine.crew.workers) for engine, *_ in carried_out.values()] == [2, 2]
    actors = [vars(worker).get("_actor") for worker in carried_out["shards"][0].crew.workers]
    assert None not in actors and len({str(actor) for actor in actors}) == 2
    assert not any("_actor" in vars(worker) for worker in carried_out["local"][0].crew.workers)
    assert isinstance(carried_out["shards"][0].crew.workers[0], CohortWorker)


def test_releases_are_those_of_local_workers(carried_out: Carried) -> None:
    ours, theirs = (carried_out[name][2].store for name in ("shards", "local"))
    assert ours.rounds() == theirs.rounds() == [0, 1, 2]
    start = theirs.read(0).vector
    for number in (1, 2):
        moved = np.linalg.norm(theirs.read(number).vector - start)
        far = np.linalg.norm(ours.read(number).vector - theirs.read(number).vector)
        assert moved > 1e-4 and far < 1e-4 * moved


def test_everybody_is_charged_once_a_round(carried_out: Carried) -> None:
    for _, home, _ in carried_out.values():
        assert [charges(home, user) for user in range(USERS)] == [[1, 2]] * USERS


@pytest.mark.parametrize("which", ["home", "controls"])
def test_private_adapters_are_those_of_local_workers(carried_out: Carried, which: str) -> None:
    for number in range(USERS):
        vectors = []
        for engine, home, _ in carried_out.values():
            folder = getattr(engine.office, which)
            user = home.user(number).user_id
            vectors.append(Home(folder).load_private(user).vector)
        # AdamW: a coordinate whose gradient is next to nothing may go either way.
        assert np.linalg.norm(vectors[1] - vectors[0]) < 1e-2 * np.linalg.norm(vectors[0])
        assert vectors[0].any()


def test_scores_are_those_of_local_workers(carried_out: Carried) -> None:
    config = EvaluationConfig(generated=0)
    pairs = [(user, (user + 1) % USERS) for user in range(USERS)]
    scores, losses = [], []
    for engine, home, _ in carried_out.values():
        held_out = home.users.path

        def score(
            worker: CohortWorker, some: Sequence[tuple[int, int]], path: Path = held_out
        ) -> Sequence[dict[str, float]]:
            return [found.loss for found in worker.score(path, some, config)]

        training = home.config.private.training
        size = engine.size(PRIVATE, training)
        scores.append(list(engine.crew.map(pairs, score, size, total=USERS)))
        users = UserFile(held_out)
        losses.append(list(engine.base_and_shared(users, range(USERS), config, training)))
    for one, other in zip(*scores, strict=True):
        assert one == pytest.approx(other, rel=1e-3)
        assert len(set(one.values())) == 5
    for pair, expected in zip(*losses, strict=True):
        assert pair == pytest.approx(expected, rel=1e-4)
        assert pair[0] != pair[1]


def test_sizes_are_measured_where_they_are_computed(homes: Callable[[str], Home]) -> None:
    home = homes("home")
    engine = CohortEngine(make_office(home, **SHARDS | {"micro_cohort": 3}), 2)
    try:
        engine.warm_up(SGD, home.config.private.training)
        assert engine.size(SHARED, SGD).users == 3
        assert vars(engine.crew.workers[0])["_banks"].model is None  # no model lies here
    finally:
        stop(engine)


def test_refusals_and_missing_devices_come_back_as_replies(
    homes: Callable[[str], Home], tmp_path: Path, tiny_llama: Path
) -> None:
    """Drawn alike, in whatever process."""
    found = []
    chances = AvailabilityConfig(dropout=0.3, late=0.2)
    for name, config in (("local", LOCAL_WORKERS), ("shards", SHARDS)):
        home = homes(name)
        federation = federation_of(tmp_path / f"{name}-out", tiny_llama, home)
        plan = make_plan(federation, some_vector(federation.spec))
        wrong = make_plan(federation, some_vector(federation.spec), base_model="0" * 64)
        office = make_office(home, availability=chances, seed=1, **config)
        engine = CohortEngine(office, 2)
        grid = engine.grid(USERS, SGD)
        replies = list(
            grid.send_and_receive([*plans_for(range(1, USERS), plan), *plans_for([USERS], wrong)])
        )
        said = [reply.error.code if reply.has_error() else outcomes([reply]) for reply in replies]
        found.append((said, [charges(home, user) for user in range(USERS)]))
        if name == "shards":
            stop(engine)
    assert found[0] == found[1]
    assert ["contribution"] in found[0][0] and any(isinstance(s, int) for s in found[0][0])


def test_more_shards_than_cores_are_an_error(homes: Callable[[str], Home]) -> None:
    """They would wait for cores for ever."""
    office = make_office(homes("home"), shards=CORES + 1, workers=None)
    with pytest.raises(
        ConfigError, match=rf"engine\.shards = {CORES + 1}, but Ray has {CORES} cores"
    ):
        CohortEngine(office, 2)
