"""pfl does the work that homefire's devices do; what differs would spoil the comparison."""

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from tiny_simulations import NO_PRIVACY, prepare_small

from homefire.client.device import Device, adapted_model, local_update
from homefire.client.personalize.recipe import SHARED
from homefire.common.adapter import Vector
from homefire.common.errors import HomefireError
from homefire.simulations.benchmarks import peer_pfl
from homefire.simulations.benchmarks.peer_pfl import cohorts, run_on_pfl
from homefire.simulations.preparation import Run

USERS = 4
needs_pfl = pytest.mark.skipif(find_spec("pfl") is None, reason="pfl is not installed")


CUT = ('local.optimizer="sgd"', "local.learning_rate=1.0", "local.max_gradient_norm=0.01")
"""AdamW does not mind how long a gradient is; here each is cut, to a step of 0.01."""


@pytest.fixture
def run(tiny_llama: Path, tmp_path: Path) -> Run:
    return prepare_small(tmp_path / "run", tiny_llama, NO_PRIVACY)


def averages(run: Run) -> Iterator[Vector]:
    """The releases that plain averages of the devices' own updates give."""
    experiment = run.experiment
    model = adapted_model(experiment.for_devices(), experiment.shared)
    release = model.specs[SHARED].initial()
    for number, users in list(cohorts(run))[1:]:
        yield release
        updates = []
        for user in users:
            device = Device(run.home, run.home.user(user))
            examples = device.examples(model, run.home.config, experiment.local.max_tokens)
            order = (device.user.user_id, number)
            updates.append(
                local_update(model, release, examples.training, experiment.local, order=order)[0]
            )
        release = (release + np.mean(updates, axis=0)).astype(np.float32)
    yield release


@needs_pfl
@pytest.mark.slow
@pytest.mark.parametrize(("workers", "overrides"), [(1, CUT), (2, ())])
def test_the_average_is_that_of_the_devices_own_updates(
    tiny_llama: Path, tmp_path: Path, workers: int, overrides: tuple[str, ...]
) -> None:
    """Two rounds of three users out of four: also for a cohort that workers share unevenly."""
    run = prepare_small(tmp_path / "run", tiny_llama, NO_PRIVACY, *overrides)
    found = run_on_pfl(run, workers=workers)
    expected = list(averages(run))
    assert len(found.releases) == len(expected) == 3
    np.testing.assert_array_equal(found.releases[0], expected[0])
    for number in (1, 2):
        ours, theirs = expected[number] - expected[0], found.releases[number] - expected[0]
        assert np.linalg.norm(ours) > 1e-3
        assert np.linalg.norm(theirs - ours) < 1e-4 * np.linalg.norm(ours)
    assert (found.workers, found.private_seconds) == (workers, 0.0)
    assert 0 < found.compute_seconds < found.seconds


def test_the_first_round_comes_twice_and_cohorts_follow_from_the_seed(run: Run) -> None:
    drawn = list(cohorts(run))
    assert [number for number, _ in drawn] == [1, 1, 2]
    assert all(len(set(users)) == 3 and set(users) < set(range(USERS)) for _, users in drawn)
    assert drawn == list(cohorts(run))


def test_a_cohort_of_everybody_holds_everybody(tiny_llama: Path, tmp_path: Path) -> None:
    run = prepare_small(tmp_path / "run", tiny_llama, NO_PRIVACY, f"federation.cohort={USERS}")
    assert all(sorted(users) == list(range(USERS)) for _, users in cohorts(run))


def test_where_pfl_is_missing_the_error_says_how_to_get_it(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peer_pfl, "find_spec", lambda _: None)
    with pytest.raises(HomefireError, match="not installed") as caught:
        run_on_pfl(run)
    assert "pip install --no-deps" in str(caught.value.hint)


def test_a_worker_that_fails_is_an_error_with_its_last_words(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peer_pfl, "find_spec", lambda _: object())
    monkeypatch.setattr(peer_pfl, "WORKER", "homefire.nothing_of_this_name")
    with pytest.raises(RuntimeError, match="nothing_of_this_name"):
        run_on_pfl(run, workers=2)
