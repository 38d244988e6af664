"""One ServerApp, one ClientApp, three runtimes: in-process, Flower's Ray simulation, SuperLink.

And a person's vault that takes part through its own executor.
"""

import itertools
import json
from pathlib import Path
from threading import Event, Thread

import numpy as np
import pytest
from flwr.app import Context, RecordDict
from tiny_flower import ROUNDS, SETTINGS, USERS, Flower, Tap
from tiny_vaults import CANARY, PASSPHRASE

from homefire.client.joining import Link
from homefire.client.personalizer import Personalizer
from homefire.common.adapter import Vector
from homefire.common.loopback import free_port
from homefire.common.records import Record
from homefire.common.signatures import public_key
from homefire.server.app import app as server_app
from homefire.server.releases import ReleaseStore
from homefire.simulations.experiment import Experiment, load_experiment
from homefire.simulations.preparation import Run, prepare
from homefire.simulations.rounds import cohort_engine

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

WEAKER = {"privacy.clip_norm": 1000.0, "clip_norm": 1000.0, "policy.smallest_cohort": 1}
"""Settings that a run configuration might try to change."""


@pytest.fixture(scope="module")
def experiment(tiny_llama: Path) -> Experiment:
    return load_experiment(None, [*SETTINGS, f"base_model.name={tiny_llama}"])


@pytest.fixture
def run(experiment: Experiment, tmp_path: Path) -> Run:
    """Two devices and the settings of a server, none of which was carried out."""
    return prepare(experiment, tmp_path / "run")


def releases(run: Run) -> list[Vector]:
    store = ReleaseStore(run.folder / "server" / "releases")
    return [store.read(number).vector for number in store.rounds()]


def logs(run: Run) -> list[tuple[int, int]]:
    """How many devices were asked and how many contributed, round by round."""
    lines = (run.folder / "server" / "rounds.jsonl").read_text().splitlines()
    return [(log["cohort"], log["accepted"]) for log in map(json.loads, lines)]


def carry_out(run: Run, **settings: float) -> list[Vector]:
    """The releases of the in-process runtime: the cohort engine."""
    grid = cohort_engine(run).grid(USERS, run.experiment.local)
    config: dict[str, bool | float | int | str] = {
        "federation": str(run.federation_file),
        **settings,
    }
    server_app(grid, Context(grid.run.run_id, 0, {}, RecordDict(), config))
    assert logs(run) == [(USERS, USERS)] * ROUNDS
    return releases(run)


@pytest.fixture(scope="module")
def in_process(experiment: Experiment, tmp_path_factory: pytest.TempPathFactory) -> list[Vector]:
    """What the other two must give."""
    return carry_out(prepare(experiment, tmp_path_factory.mktemp("in-process") / "run"))


def assert_same(run: Run, expected: list[Vector]) -> None:
    found = releases(run)
    assert logs(run) == [(USERS, USERS)] * ROUNDS
    assert len(found) == len(expected) == ROUNDS + 1
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-6)
    # The first round's averaged update, for the server optimizer adds it as it is.
    ours, theirs = expected[1] - expected[0], found[1] - found[0]
    assert np.linalg.norm(ours - theirs) <= 1e-5 * np.linalg.norm(theirs)
    assert np.abs(found[-1] - found[-2]).max() > 1e-4


def test_rays_simulation_gives_the_same_releases(
    run: Run, in_process: list[Vector], flower: Flower
) -> None:
    flower.superlink("--simulation", HOMEFIRE_HOME=str(run.home.folder))
    size = f"num-supernodes={USERS} client-resources-num-cpus=1 init-args-num-cpus={USERS}"
    flower.run(run.federation_file, "--federation-config", f"{size} init-args-log-to-driver=false")
    assert_same(run, in_process)


def test_a_superlink_with_supernodes_gives_the_same_releases(
    run: Run, in_process: list[Vector], flower: Flower
) -> None:
    link = flower.superlink()
    for user in range(USERS):
        own = f'home="{run.home.folder}" partition-id={user}'
        node = ["flower-supernode", "--insecure", "--superlink", f"127.0.0.1:{link}"]
        address = ["--host", "127.0.0.1", "--port", str(free_port())]
        flower.start(f"node-{user}", *node, *address, "--node-config", own)
    flower.run(run.federation_file)
    assert_same(run, in_process)


def test_a_run_configuration_cannot_weaken_privacy(run: Run, in_process: list[Vector]) -> None:
    """Flower refuses keys that the bundle does not declare; were they let in, nobody reads them."""
    carry_out(run, **WEAKER)
    assert_same(run, in_process)
    step = max(float(np.linalg.norm(b - a)) for a, b in itertools.pairwise(releases(run)))
    assert 0.01 < step <= 0.02


@pytest.mark.usefixtures("quick_passphrases", "no_model_is_kept")
def test_a_vault_takes_part_and_nothing_of_it_leaves(
    run: Run, flower: Flower, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through a SuperNode and an executor of its own; what is sent is charged and signed."""
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    base_model = run.home.config.base_model.name
    link = flower.superlink()
    folder = tmp_path / "vault"
    with Personalizer.open(folder, base_model=base_model, passphrase=PASSPHRASE) as me:
        records = [Record(f"{CANARY} number {n}", None, f"2025-01-0{n + 1}") for n in range(6)]
        me.vault.records.add(records, "test")
        (folder / "policy.toml").write_bytes((run.home.folder / "policy.toml").read_bytes())
        enrol_in_place_of_the_first(run, public_key(me.vault.identity))
        own = f'home="{run.home.folder}" partition-id=1'
        node = ["flower-supernode", "--insecure", "--superlink", f"127.0.0.1:{link}"]
        address = ["--host", "127.0.0.1", "--port", str(free_port())]
        flower.start("node-1", *node, *address, "--node-config", own)
        stop, joined, tap = Event(), list[int](), Tap(link)
        where = Link(f"127.0.0.1:{tap.port}", insecure=True)
        thread = Thread(target=lambda: joined.append(len(me.join(where, stop=stop))))
        thread.start()
        try:
            flower.run(run.federation_file)
        finally:
            stop.set()
            thread.join(60)
            tap.close()
        assert logs(run) == [(USERS, USERS)] * ROUNDS, (folder / "join.log").read_text()
        assert joined == [ROUNDS]
        found, shown = me.status(), me.preview()
        assert found.participations == ROUNDS
        assert found.shared is not None
        assert found.shared.about["round"] == ROUNDS
    assert len(tap.captured) > ROUNDS * shown.bytes_up  # it did go through here
    assert CANARY.encode() not in tap.captured
    for place in (folder, folder.with_name("vault.keys"), temporary, flower.folder):
        for path in place.rglob("*"):
            if path.is_file():
                assert CANARY.encode() not in path.read_bytes(), path
                assert PASSPHRASE.encode() not in path.read_bytes(), path


def enrol_in_place_of_the_first(run: Run, key: str) -> None:
    """Put a device's key on the roster."""
    roster = run.folder / "server" / "roster.txt"
    lines = roster.read_text().splitlines()
    first = public_key(run.home.identity(run.home.user(0).user_id))
    assert first in lines
    roster.write_text("\n".join(key if line == first else line for line in lines) + "\n")
