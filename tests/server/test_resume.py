"""Interrupted runs: each step may be the last, and nothing is spent or drawn twice afterwards."""

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_servers import (
    BANDED,
    GAUSSIAN,
    ROUNDS,
    KilledError,
    SmallGrid,
    kill_at,
    kinds,
    numbers,
    read_ledger,
    released,
    silent,
    small_federation,
)

from homefire.common.config import OptimizerConfig, PrivacyConfig, RoundsConfig
from homefire.common.errors import FederationError
from homefire.common.keystore import Keystore
from homefire.common.privacy.clipping import STEPS
from homefire.common.privacy.factorization import coefficients
from homefire.common.privacy.mechanism import BandedSqrt, Past
from homefire.common.privacy.randomness import KeyStream
from homefire.common.signatures import public_key
from homefire.server import aggregator, optimizers, run_state
from homefire.server import federation as federation_module
from homefire.server.aggregator import noise_stream
from homefire.server.federation import RoundLog, run_federation
from homefire.server.releases import ReleaseStore
from homefire.server.run_ledger import RunLedger
from homefire.server.run_state import RUN_KEY, SIGNING_KEY, Federation, RunState

Step = tuple[object, str, int, bool]
"""What is interrupted: owner, name, which call counts as that of round 2, before or after."""

STEPS_OF_A_ROUND: dict[str, Step] = {
    "before it is charged": (RunLedger, "open_round", 2, False),
    "charged": (RunLedger, "open_round", 2, True),
    "cohort drawn": (federation_module, "cohort_of", 2, True),
    "plans sent": (SmallGrid, "push_messages", 2, True),
    "one device has answered": (SmallGrid, "pull_messages", 3, True),
    "before the sum is recorded": (RunLedger, "record_sum", 2, False),
    "sum recorded": (RunLedger, "record_sum", 2, True),
    "noise drawn": (aggregator, "privatize", 2, True),
    "optimizer stepped": (optimizers, "apply", 2, True),
    "before the commit": (federation_module, "commit", 2, False),
    "before the checkpoint": (run_state, "write_checkpoint", 3, False),
    "checkpoint written": (run_state, "write_checkpoint", 3, True),
    "before the release": (ReleaseStore, "write", 3, False),
    "release written": (ReleaseStore, "write", 3, True),
    "older checkpoints forgotten": (run_state, "forget_older", 3, True),
    "committed": (federation_module, "commit", 2, True),
    "logged": (federation_module, "append_line", 2, True),
}
COMMITTED = ("release written", "older checkpoints forgotten", "committed", "logged")
PRIVACY = {"banded-sqrt": BANDED, "gaussian": GAUSSIAN}


def interrupt(step: Step, federation: Federation, grid: SmallGrid) -> None:
    """Run until the process dies at this step."""
    owner, name, call, after = step
    with pytest.MonkeyPatch.context() as patch:
        kill_at(patch, owner, name, call=call, after=after)
        with pytest.raises(KilledError):
            run_federation(grid, federation)


def check_books(federation: Federation, sent: list[int]) -> None:
    """What holds for every run that has ended, however often it was interrupted."""
    ledger = read_ledger(federation)
    written = kinds(ledger)
    rounds = federation.config.federation.rounds
    assert numbers(written, "open") == [*range(1, rounds + 1)]
    assert written[-1] == ("end", None) and ledger.ended
    # Spent is at least what was released, and every round has a release or is burnt.
    made = set(federation.store.rounds()) - {0}
    assert made | set(ledger.burnt) == set(range(1, rounds + 1))
    assert not made & set(ledger.burnt)
    assert made <= set(ledger.sums)
    assert set(sent) <= set(numbers(written, "open"))
    key = public_key(federation.keystore.signing_key(SIGNING_KEY))
    for number in federation.store.rounds():
        release = federation.store.read(number)
        release.verify(key)
        assert release.about["run"] == ledger.facts["run"]
    assert federation.keystore.get(RUN_KEY) is None


@pytest.mark.parametrize("mechanism", PRIVACY)
@pytest.mark.parametrize("name", STEPS_OF_A_ROUND)
def test_never_again_whichever_step_was_the_last(tmp_path: Path, name: str, mechanism: str) -> None:
    users = 4 if mechanism == "banded-sqrt" else 2  # two bands; elsewhere everybody is asked
    federation = small_federation(tmp_path / "out", users=users, privacy=PRIVACY[mechanism])
    first, second = SmallGrid(users=users), SmallGrid(users=users)
    interrupt(STEPS_OF_A_ROUND[name], federation, first)
    before = released(federation)
    logs = run_federation(second, federation)
    # No plan of one round leaves twice.
    assert not set(first.rounds) & set(second.rounds)
    assert first.rounds + second.rounds == sorted(first.rounds + second.rounds)
    check_books(federation, first.rounds + second.rounds)
    ledger = read_ledger(federation)
    kept = name in COMMITTED or name == "before it is charged"
    assert ledger.burnt == ([] if kept else [2])
    assert [log.round for log in logs] == ([2, 3, 4] if name == "before it is charged" else [3, 4])
    for number, vector in before.items():
        assert released(federation)[number].tobytes() == vector.tobytes()


BEFORE_THE_FIRST_ROUND: dict[str, Step] = {
    "nodes written": (Keystore, "put", 1, False),
    "run key written": (Keystore, "put", 1, True),
    "before the start": (RunLedger, "start", 1, False),
    "started": (RunLedger, "start", 1, True),
    "checkpoint 0": (run_state, "write_checkpoint", 1, True),
    "release 0": (ReleaseStore, "write", 1, True),
    "begun": (federation_module, "begin", 1, True),
}


@pytest.mark.parametrize("name", BEFORE_THE_FIRST_ROUND)
def test_a_run_that_died_before_its_first_round_begins(tmp_path: Path, name: str) -> None:
    federation = small_federation(tmp_path / "out", privacy=BANDED)
    first, second = SmallGrid(), SmallGrid()
    interrupt(BEFORE_THE_FIRST_ROUND[name], federation, first)
    assert not first.plans
    logs = run_federation(second, federation)
    assert [log.round for log in logs] == [*range(1, ROUNDS + 1)]
    check_books(federation, second.rounds)
    assert not read_ledger(federation).burnt


@pytest.mark.parametrize("after", [False, True])
def test_key_first_before_the_ledger_says_that_there_is_a_run(tmp_path: Path, after: bool) -> None:
    federation = small_federation(tmp_path / "out", privacy=GAUSSIAN)
    interrupt((RunLedger, "start", 1, after), federation, SmallGrid())
    key = federation.keystore.get(RUN_KEY)
    assert key is not None and len(key) == 32
    assert bool(read_ledger(federation).facts) == after


def test_interrupted_again_and_again(tmp_path: Path) -> None:
    """Also while it is taken up, and after each checkpoint: the one that counts is kept."""
    federation = small_federation(tmp_path / "out", privacy=BANDED)
    sent: list[int] = []
    for step in (
        (ReleaseStore, "write", 2, False),
        (ReleaseStore, "write", 1, False),
        (RunLedger, "burn", 1, True),
        (run_state, "_rebuild_past", 1, False),
        (ReleaseStore, "write", 1, False),
    ):
        grid = SmallGrid()
        interrupt(step, federation, grid)
        sent += grid.rounds
    last = SmallGrid()
    run_federation(last, federation)
    check_books(federation, sent + last.rounds)
    assert read_ledger(federation).burnt == [1, 2, 3]
    assert federation.store.rounds() == [0, 4]
    assert len(sent + last.rounds) == 2 * ROUNDS


@given(st.data())
@settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_never_again_wherever_and_however_often(tmp_path: Path, data: st.DataObject) -> None:
    folder = tmp_path / str(len(list(tmp_path.iterdir())) // 2)
    mechanism = data.draw(st.sampled_from(sorted(PRIVACY)))
    federation = small_federation(folder, users=2, privacy=PRIVACY[mechanism])
    sent: list[int] = []
    for name in data.draw(st.lists(st.sampled_from(sorted(STEPS_OF_A_ROUND)), max_size=3)):
        grid = SmallGrid(users=2)
        owner, function, _, after = STEPS_OF_A_ROUND[name]
        with pytest.MonkeyPatch.context() as patch:
            kill_at(patch, owner, function, call=data.draw(st.integers(1, 2)), after=after)
            try:
                run_federation(grid, federation)
            except KilledError:
                pass
            except FederationError as error:
                assert "is over" in str(error)
        assert not set(sent) & set(grid.rounds)
        sent += grid.rounds
    try:
        grid = SmallGrid(users=2)
        run_federation(grid, federation)
        assert not set(sent) & set(grid.rounds)
    except FederationError as error:
        assert "is over" in str(error)
    check_books(federation, sent + grid.rounds)


# The end


def test_key_destroyed_at_the_end(tmp_path: Path) -> None:
    federation = small_federation(tmp_path / "out", privacy=GAUSSIAN)
    grid = SmallGrid(watched=federation)
    run_federation(grid, federation)
    (secret,) = set(grid.run_keys)
    assert secret is not None
    assert federation.keystore.get(RUN_KEY) is None
    for folder in (federation.config.output, federation.keystore.folder):
        stored = [path.read_bytes() for path in folder.rglob("*") if path.is_file()]
        assert stored
        for form in (secret, secret.hex().encode()):
            assert not any(form in content for content in stored)


@pytest.mark.parametrize("after", [False, True])
def test_key_destroyed_though_the_process_died_before_the_end_was_written(
    tmp_path: Path, after: bool
) -> None:
    federation = small_federation(tmp_path / "out", privacy=GAUSSIAN)
    interrupt((RunLedger, "end", 1, after), federation, SmallGrid())
    assert federation.keystore.get(RUN_KEY) is None
    assert read_ledger(federation).ended == after
    if not after:
        grid = SmallGrid()
        assert run_federation(grid, federation) == [] and not grid.plans
    for _ in range(2):
        grid = SmallGrid()
        with pytest.raises(FederationError, match="a run that is over"):
            run_federation(grid, federation)
        assert not grid.plans
        assert read_ledger(federation).ended
    check_books(federation, [])


def test_run_that_died_after_its_last_release_is_ended(tmp_path: Path) -> None:
    federation, grid = small_federation(tmp_path / "out", privacy=GAUSSIAN), SmallGrid()
    interrupt((federation_module, "finish", 1, False), federation, SmallGrid())
    before = released(federation)
    assert run_federation(grid, federation) == []
    assert not grid.plans
    assert {n: v.tobytes() for n, v in released(federation).items()} == {
        n: v.tobytes() for n, v in before.items()
    }
    check_books(federation, [])


# The same training


OPTIMIZERS = {
    "fedavg": OptimizerConfig(),
    "momentum": OptimizerConfig(name="momentum", momentum=0.9, learning_rate=0.7),
    "adam": OptimizerConfig(name="adam", learning_rate=0.1),
}


CLIP = {"adaptive_clip": {"quantile": 0.5, "rate": 0.4, "largest": 2.0}}


def seeded(output: Path, optimizer: str) -> Federation:
    privacy = PrivacyConfig.model_validate({"mechanism": "none", "clip_norm": 0.3, **CLIP})
    return small_federation(output, optimizer=OPTIMIZERS[optimizer], privacy=privacy, seed=5)


def asked(*grids: SmallGrid) -> list[tuple[int, int, float]]:
    """Node, round and clip norm of every plan."""
    plans = [(node, plan.header) for grid in grids for node, plan in grid.plans]
    return [(node, header.round, header.privacy.clip_norm) for node, header in plans]


@pytest.fixture(scope="module", params=OPTIMIZERS)
def whole(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Federation, SmallGrid]:
    """An optimizer and a run with it that nobody interrupted."""
    federation, grid = seeded(tmp_path_factory.mktemp("whole") / "out", request.param), SmallGrid()
    run_federation(grid, federation)
    return request.param, federation, grid


@pytest.mark.parametrize("number", [0, 1, 3])
def test_an_interruption_between_rounds_changes_nothing(
    whole: tuple[str, Federation, SmallGrid], tmp_path: Path, number: int
) -> None:
    optimizer, straight, plans = whole
    parted, first, second = seeded(tmp_path / "out", optimizer), SmallGrid(), SmallGrid()
    after = (federation_module, "commit", number) if number else (run_state, "commit", 1)
    interrupt((*after, True), parted, first)
    run_federation(second, parted)
    one, two = released(straight), released(parted)
    assert len(one) == len({v.tobytes() for v in one.values()}) == ROUNDS + 1
    assert {n: v.tobytes() for n, v in one.items()} == {n: v.tobytes() for n, v in two.items()}
    # Cohorts and clip norms too.
    assert asked(plans) == asked(first, second)
    assert len({clip_norm for _, _, clip_norm in asked(plans)}) == ROUNDS


# The same noise


@pytest.fixture
def pasts(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, Past]]]:
    """The secret noise of the rounds before, as each round of this process found it."""
    seen: list[tuple[int, Past]] = []
    original: Callable[..., RoundLog] = federation_module._round

    def watch(grid: Any, federation: Federation, state: RunState) -> RoundLog:
        seen.append((state.next_round, state.secrets.past))
        return original(grid, federation, state)

    monkeypatch.setattr(federation_module, "_round", watch)
    yield seen


@pytest.mark.parametrize("number", [1, 2, 3])
def test_same_noise_the_past_is_rebuilt(
    tmp_path: Path, pasts: list[tuple[int, Past]], number: int
) -> None:
    federation = small_federation(tmp_path / "out", users=8, privacy=BANDED)
    interrupt((federation_module, "append_line", number, False), federation, SmallGrid(users=8))
    first = dict(pasts)
    with pytest.MonkeyPatch.context() as patch:  # what the process that died would have used
        kept: list[Past] = []
        original = run_state.resume

        def resumed(*arguments: Any) -> RunState:
            state = original(*arguments)
            kept.append(state.secrets.past)
            return state

        patch.setattr(federation_module, "resume", resumed)
        interrupt((RunLedger, "open_round", 1, False), federation, SmallGrid(users=8))
    (rebuilt,) = kept
    assert len(rebuilt) == min(number, 3)  # four bands
    for one, two in zip(rebuilt[1:], first[number], strict=False):
        assert np.array_equal(one, two)
    assert len(first[number]) == min(number - 1, 3)


def recovered(federation: Federation) -> dict[int, npt.NDArray[np.float64]]:
    """The noise on each sum, in grid steps, from what everybody may see.

    The devices sent zeros and the optimizer is plain, so the differences of releases are noise; a
    burnt round has none, and the next release follows on the one before.
    """
    privacy = federation.config.privacy
    unit = privacy.clip_norm / STEPS / federation.config.federation.cohort
    found, last = {}, np.zeros(federation.spec.size)
    for number, vector in sorted(released(federation).items()):
        if number:
            found[number] = np.rint((vector.astype(np.float64) - last) / unit)
        last = vector.astype(np.float64)
    return found


def fresh_noise(federation: Federation, run_key: bytes) -> npt.NDArray[np.float64]:
    """All z_t in grid steps, shape (rounds, d), drawn again from the run key."""
    ledger, size = read_ledger(federation), federation.vector_size
    mechanism = federation.privacy.mechanism
    assert isinstance(mechanism, BandedSqrt)
    run, scale = str(ledger.facts["run"]), mechanism.noise_multiplier * STEPS
    streams: list[KeyStream] = [
        noise_stream(run_key, run, number, ledger.sums.get(number, ""))
        for number in range(1, ledger.opened + 1)
    ]
    drawn = np.array([stream.gaussian(size) for stream in streams])
    kept: npt.NDArray[np.float64] = drawn[:, : federation.spec.size] * scale
    return kept


INTERRUPTED: dict[str, tuple[Step, ...]] = {
    "never": (),
    "before a sum": ((RunLedger, "record_sum", 3, False),),
    "after a sum": ((RunLedger, "record_sum", 3, True),),
    "after the noise": ((aggregator, "privatize", 2, True),),
    "after a commit": ((federation_module, "commit", 3, True),),
    "the first round": ((RunLedger, "open_round", 1, True),),
    "again and again": (
        (RunLedger, "record_sum", 2, True),
        (ReleaseStore, "write", 2, False),
        (SmallGrid, "push_messages", 1, True),
        (federation_module, "commit", 1, True),
    ),
}


@pytest.mark.parametrize("bands", [3, 8])
@pytest.mark.parametrize("name", INTERRUPTED)
def test_same_noise_stays_correlated_as_planned(tmp_path: Path, name: str, bands: int) -> None:
    rounds = 8
    federation = small_federation(
        tmp_path / "out",
        users=24,
        size=50,
        federation=RoundsConfig(rounds=rounds, cohort=3, deadline=60.0),
        privacy=BANDED.model_copy(update={"separation": bands}),
    )
    keys: set[bytes | None] = set()
    for step in INTERRUPTED[name]:
        grid = SmallGrid(silent, users=24, watched=federation)
        interrupt(step, federation, grid)
        keys |= set(grid.run_keys)
    grid = SmallGrid(silent, users=24, watched=federation)
    run_federation(grid, federation)
    (run_key,) = keys | set(grid.run_keys)
    assert run_key is not None
    burnt = read_ledger(federation).burnt
    assert bool(burnt) == (name not in ("never", "after a commit"))
    fresh, seen, c = fresh_noise(federation, run_key), recovered(federation), coefficients(bands)
    # xi by its definition; of burnt rounds nobody ever sees it, yet it counts.
    xi = np.zeros_like(fresh)
    for t in range(rounds):
        past = sum((c[j] * xi[t - j] for j in range(1, min(t + 1, bands))), np.zeros(50))
        xi[t] = seen.get(t + 1, fresh[t] - past)
        off = np.abs(xi[t] + past - fresh[t])
        assert off.max() <= 0.51 * math.fsum(c)  # each xi was rounded once, to a step
    assert set(seen) == set(range(1, rounds + 1)) - set(burnt)
    assert np.std(fresh) == pytest.approx(2.0 * STEPS, rel=0.15)
