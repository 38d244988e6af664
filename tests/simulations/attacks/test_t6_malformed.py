"""T6: malformed and huge answers are counted; everybody else's contributions are in.

What comes over a real SuperLink (inflated chunks, objects without end) is in
`tests/server/test_inbox_superlink.py`.
"""

import io
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from flwr.app import ArrayRecord, Message, RecordDict
from tiny_runs import Answer, make_federation, make_grid, make_home, make_users

from homefire.client.home import Home
from homefire.common.adapter import Vector
from homefire.common.config import RoundsConfig
from homefire.common.errors import DeviceError
from homefire.common.protocol import decode_plan
from homefire.server.federation import RoundLog, run_federation
from homefire.simulations.attacks.malformed import (
    HostileDevice,
    pickled_array,
    wrong_files,
    wrong_numbers,
    wrong_records,
)

HONEST = 3
REASONS = {
    "nan": "coordinate",
    "infinity": "coordinate",
    "huge float": "coordinate",
    "huge integer": "coordinate",
    "smallest integer": "coordinate",
    "other byte order": "coordinate",
    "float32": "coordinate",
    "float64": "length",
    "int64": "length",
    "int16": "length",
    "one too many": "length",
    "one too few": "length",
    "none": "length",
    "npz": "length",
    "npz of the right length": "coordinate",
    "pickle": "length",
    "object array": "malformed",
    "inflated": "length",
    "swapped arrays": "malformed",
    "swapped entries": "length",
    "extra entry": "malformed",
    "extra record": "malformed",
    "two contributions": "malformed",
    "another name": "malformed",
    "metrics alone": "malformed",
    "nothing": "malformed",
    "list for bytes": "malformed",
    "truth for version": "malformed",
    "deep header": "malformed",
    "long header": "malformed",
    "header of no text": "malformed",
}
USERS = HONEST + len(REASONS) + 1  # the last one sends zeros


class Scene:
    """Three honest devices with a model, and one hostile one for each kind of answer."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder, self.model, self.trap = folder, model, folder / "trap"
        self.home: Home = make_home(folder / "home", model, make_users(USERS))

    def malformed(self, name: str) -> Answer:
        """A device that sends one kind of malformed answers."""

        def answer(message: Message) -> Message:
            device = self.device(message)
            every = {
                **wrong_numbers(device),
                **wrong_files(device, self.trap),
                **wrong_records(device),
            }
            assert set(every) == set(REASONS)
            return Message(every[name], reply_to=message)

        return answer

    def zeros(self, message: Message) -> Message:
        """What a device sends that has nothing to say."""
        return Message(self.device(message).zeros, reply_to=message)

    def device(self, message: Message) -> HostileDevice:
        """The device that a message is for, in an attacker's hands."""
        node = message.metadata.dst_node_id
        key = self.home.identity(self.home.user(node - 1).user_id)
        return HostileDevice(decode_plan(message.content), node, key)

    def run(self, output: str, answers: dict[int, Answer]) -> tuple[RoundLog, Vector]:
        """One round that asks everybody; the log, and the release."""
        rounds = RoundsConfig(rounds=1, cohort=USERS, deadline=60.0)
        federation = make_federation(
            self.folder / output, self.model, users=USERS, home=self.home, federation=rounds
        )
        grid, called = make_grid(self.home, USERS, answers)
        (log,) = run_federation(grid, federation)
        assert sorted(called) == [*range(1, USERS + 1)]
        return log, federation.store.latest().vector


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Scene:
    return Scene(tmp_path_factory.mktemp("t6"), tiny_llama)


def failing(message: Message) -> Message:
    raise DeviceError("x")


def test_the_run_survives_counts_each_and_keeps_everybody_elses_contribution(scene: Scene) -> None:
    nodes = range(HONEST + 1, USERS)
    answers: dict[int, Answer] = {
        **{node: scene.malformed(name) for node, name in zip(nodes, REASONS, strict=True)},
        USERS: scene.zeros,
    }
    log, release = scene.run("hostile", answers)
    assert log.accepted == HONEST + 1  # a contribution of zeros is one
    assert log.dropped == Counter(REASONS.values()) and not log.refused
    quiet, alone = scene.run("alone", dict.fromkeys([*nodes, USERS], failing))
    assert quiet.accepted == HONEST and quiet.dropped == {"device error": USERS - HONEST}
    assert np.array_equal(release, alone)
    assert np.abs(
        release - scene.run("nobody", dict.fromkeys(range(1, USERS + 1), failing))[1]
    ).any()
    assert not scene.trap.exists()


def test_without_strict_decoding_the_pickle_would_run(tmp_path: Path) -> None:
    trap = tmp_path / "trap"
    np.load(io.BytesIO(pickled_array(trap)), allow_pickle=True)
    assert trap.exists()


def test_without_the_gate_a_huge_contribution_is_in_the_sum(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("homefire.common.protocol.check_grid", lambda values, statistics: None)
    nodes: dict[int, Answer] = dict.fromkeys(range(1, USERS + 1), failing)
    log, release = scene.run("open", {**nodes, 1: scene.malformed("huge integer")})
    _, start = scene.run("closed", nodes)
    assert log.accepted == 1
    # 2^15 clip norms in every coordinate, over the cohort.
    assert np.abs(release - start).max() > 2**14 / USERS


def test_a_plain_average_of_arrays_is_nan_for_everybody() -> None:
    """What one such answer does where arrays are decoded first and averaged then."""
    records = [RecordDict({"a": ArrayRecord([np.full(3, v)])}) for v in (1.0, np.nan)]
    sums = [next(iter(r.array_records.values())).to_numpy_ndarrays()[0] for r in records]
    assert np.isnan(np.mean(sums, axis=0)).all()
