"""What a run must not forget: older, foreign and missing state is refused, and so are new rules."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Message
from tiny_runs import device_key, trust_server
from tiny_servers import (
    BANDED,
    GAUSSIAN,
    NONE,
    ROUNDS,
    USERS,
    KilledError,
    SmallGrid,
    kill_at,
    kinds,
    read_ledger,
    released,
    small_federation,
)

from homefire.common.adapter import AdapterConfig
from homefire.common.config import OptimizerConfig, PrivacyConfig, RoundsConfig
from homefire.common.errors import AdapterError, ConfigError, FederationError, LedgerError
from homefire.common.local_training import LocalTraining
from homefire.common.signatures import public_key
from homefire.server import federation as federation_module
from homefire.server.federation import run_federation
from homefire.server.run_ledger import RunLedger
from homefire.server.run_state import RUN_KEY, SIGNING_KEY, Federation, rounds_spent

ROUNDS_OF = RoundsConfig(rounds=ROUNDS, cohort=2, deadline=60.0)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[PrivacyConfig], Path]:
    """Makes a run that was interrupted after the release of round 3; gives a folder of copies.

    `out-N` is the output folder as it was after the release of round N, `out-N.keys` its keystore.
    """
    folders: dict[str, Path] = {}

    def make(privacy: PrivacyConfig) -> Path:
        if (name := privacy.mechanism) not in folders:
            folder = folders[name] = tmp_path_factory.mktemp(name)
            federation = small_federation(folder / "out", privacy=privacy)
            for number in (1, 2, 3):
                die_after_a_commit(federation, SmallGrid())
                for copied in (federation.config.output, federation.keystore.folder):
                    shutil.copytree(copied, folder / copied.name.replace("out", f"out-{number}"))
        return folders[name]

    return make


Made = Callable[[PrivacyConfig], Path]


@pytest.fixture
def run(tmp_path: Path, made: Made) -> Federation:
    """A run that was interrupted after the release of round 3, with its copies beside it."""
    return interrupted(tmp_path, made, BANDED)


def interrupted(folder: Path, made: Made, privacy: PrivacyConfig) -> Federation:
    shutil.copytree(made(privacy), folder, dirs_exist_ok=True)
    return small_federation(folder / "out", privacy=privacy)


def die_after_a_commit(federation: Federation, grid: SmallGrid) -> None:
    with pytest.MonkeyPatch.context() as patch:
        kill_at(patch, federation_module, "commit", after=True)
        with pytest.raises(KilledError):
            run_federation(grid, federation)


def restore(federation: Federation, number: int, part: str = "") -> None:
    """Put an older copy of the output folder, or of a part of it, in place of the newest."""
    output = federation.config.output
    old, new = output.with_name(f"out-{number}") / part, output / part
    if old.is_dir():
        shutil.rmtree(new)
        shutil.copytree(old, new)
    else:
        shutil.copy(old, new)


def refused(federation: Federation, match: str, kind: type[Exception] = LedgerError) -> Exception:
    """The federation does not run, no plan leaves, and what is on the disk stays."""
    grid = SmallGrid(users=federation.config.users)
    output = federation.config.output
    before = {p: p.read_bytes() for p in output.rglob("*") if p.is_file()}
    with pytest.raises(kind, match=match) as caught:
        run_federation(grid, federation)
    assert not grid.plans
    after = {p: p.read_bytes() for p in output.rglob("*") if p.is_file()}
    assert after == before
    return caught.value


def test_interrupted_run_goes_on(run: Federation) -> None:
    """What the tests of refusals begin with could go on."""
    grid = SmallGrid()
    logs = run_federation(grid, run)
    assert [log.round for log in logs] == [4]
    assert run.store.rounds() == [0, 1, 2, 3, 4]


# Older state


@pytest.mark.parametrize("number", [1, 2])
def test_restored_older_state_folder_is_refused(run: Federation, number: int) -> None:
    restore(run, number)
    error = refused(run, "rolled back or replaced")
    assert "spent twice" in getattr(error, "hint", "")


def test_restored_state_folder_of_an_ended_run_is_refused(run: Federation) -> None:
    run_federation(SmallGrid(), run)
    restore(run, 3)
    refused(run, "rolled back or replaced")


@pytest.mark.parametrize("number", [1, 2])
def test_restored_ledger_alone_is_refused(run: Federation, number: int) -> None:
    restore(run, number, "ledger.jsonl")
    refused(run, "rolled back or replaced")


@pytest.mark.parametrize("number", [1, 2])
def test_restored_older_keystore_does_not_hide_a_restored_ledger(
    run: Federation, number: int
) -> None:
    """The anchor in the newest release does not lie in the keystore."""
    output = run.config.output
    shutil.rmtree(run.keystore.folder)
    shutil.copytree(output.with_name(f"out-{number}.keys"), run.keystore.folder)
    restore(run, number, "ledger.jsonl")
    refused(run, "rolled back or replaced")


def test_restored_releases_do_not_bring_round_numbers_back(run: Federation) -> None:
    restore(run, 2, "releases")
    grid = SmallGrid()
    logs = run_federation(grid, run)
    assert [log.round for log in logs] == [4]
    assert set(grid.rounds) == {4}
    assert run.store.rounds() == [0, 1, 2, 4]
    assert read_ledger(run).burnt == [3]
    ledger = kinds(read_ledger(run))
    assert [number for kind, number in ledger if kind == "open"] == [1, 2, 3, 4]


def test_restored_releases_without_their_checkpoint_are_refused(run: Federation) -> None:
    restore(run, 1, "releases")
    refused(run, "cannot go on from release 1")


def test_restored_checkpoints_alone_are_refused(run: Federation) -> None:
    restore(run, 1, "checkpoints")
    refused(run, "cannot go on from release 3")


# Missing and foreign state


def test_deleted_ledger_is_refused(run: Federation) -> None:
    (run.config.output / "ledger.jsonl").unlink()
    refused(run, "rolled back or replaced")


def test_deleted_ledger_and_releases_are_refused(run: Federation) -> None:
    """The keystore alone remembers that there was a run."""
    shutil.rmtree(run.config.output)
    refused(run, "rolled back or replaced")


def test_emptied_ledger_is_refused(run: Federation) -> None:
    (run.config.output / "ledger.jsonl").write_bytes(b"")
    refused(run, "holds 0 of the [0-9]+ entries")


def test_deleted_keystore_is_refused(run: Federation) -> None:
    shutil.rmtree(run.keystore.folder)
    error = refused(run, "there is no signing key")
    assert str(run.keystore.folder) in getattr(error, "hint", "")
    assert not run.keystore.folder.exists()  # nothing is made that a copy could not replace


def test_deleted_keystore_and_releases_are_refused(run: Federation) -> None:
    shutil.rmtree(run.keystore.folder)
    shutil.rmtree(run.config.output / "releases")
    refused(run, "the keystore was lost, or put back from a backup")


def test_restored_older_keystore_alone_is_refused(run: Federation) -> None:
    shutil.rmtree(run.keystore.folder)
    shutil.copytree(run.config.output.with_name("out-2.keys"), run.keystore.folder)
    refused(run, "entries ahead of its anchor")


def test_deleted_run_key_is_refused(run: Federation) -> None:
    run.keystore.destroy(RUN_KEY)
    refused(run, "the run key is gone")
    assert run.keystore.get(RUN_KEY) is None


def test_deleted_releases_are_refused(run: Federation) -> None:
    shutil.rmtree(run.config.output / "releases")
    refused(run, "the releases of this run are gone")


def another_run(output: Path) -> Federation:
    federation = small_federation(output, privacy=BANDED)
    for _ in range(3):
        die_after_a_commit(federation, SmallGrid())
    return federation


def test_another_runs_ledger_is_refused(run: Federation, tmp_path: Path) -> None:
    other = another_run(tmp_path / "other")
    shutil.copy(other.config.output / "ledger.jsonl", run.config.output)
    refused(run, "rolled back or replaced")


def test_another_runs_output_folder_is_refused(run: Federation, tmp_path: Path) -> None:
    other = another_run(tmp_path / "other")
    shutil.rmtree(run.config.output)
    shutil.copytree(other.config.output, run.config.output)
    refused(run, "rolled back or replaced")


def test_another_servers_output_folder_is_refused(run: Federation, tmp_path: Path) -> None:
    output = tmp_path / "copy"
    shutil.copytree(run.config.output, output)
    stolen = small_federation(output, privacy=BANDED)
    stolen.keystore.put(SIGNING_KEY, bytes(32))
    refused(stolen, "signature is not that of key")


def test_forged_newest_release_is_refused(run: Federation) -> None:
    """Whoever can write files cannot make the run go on from a release of his own."""
    newest = run.store.latest()
    about = {name: value for name, value in newest.about.items() if name != "signature"}
    run.store.write(3, newest.vector * 2, about, device_key(1))
    refused(run, "signature is not that of key")


def test_release_with_anothers_anchor_is_refused(run: Federation) -> None:
    newest = run.store.latest()
    about = {name: value for name, value in newest.about.items() if name != "signature"}
    about["ledger"] = {"length": 3, "head": "0" * 64}
    run.store.write(3, newest.vector, about, run.keystore.signing_key(SIGNING_KEY))
    refused(run, "rolled back or replaced")


def test_damaged_newest_release_is_refused(run: Federation) -> None:
    path = run.config.output / "releases" / "000003.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    refused(run, "damaged release", AdapterError)


@pytest.mark.parametrize("content", [b"", b"{", b"7", b'["x"]', b"[1,2,3,4,5]", b"[6,5,4,3,2,1]"])
def test_another_order_of_the_rota_is_refused(run: Federation, content: bytes) -> None:
    (run.config.output / "nodes.json").write_bytes(content)
    refused(run, "rota|not those|other settings", Exception)


def test_a_run_in_use_is_left_alone(run: Federation, monkeypatch: pytest.MonkeyPatch) -> None:
    grid, tried = SmallGrid(), list[Exception]()

    def meanwhile(_: object) -> list[Message]:
        with pytest.raises(LedgerError, match="in use") as caught:
            run_federation(SmallGrid(), run)
        tried.append(caught.value)
        return []

    monkeypatch.setattr(grid, "pull_messages", meanwhile)
    impatient = ROUNDS_OF.model_copy(update={"deadline": 0.2})
    (log,) = run_federation(
        grid, small_federation(run.config.output, privacy=BANDED, federation=impatient)
    )
    assert tried and log.dropped == {"no answer": 2}


def test_ended_run_is_not_run_again(run: Federation) -> None:
    run_federation(SmallGrid(), run)
    before = {n: v.tobytes() for n, v in released(run).items()}
    error = refused(run, "holds a run that is over", FederationError)
    assert "another output folder" in getattr(error, "hint", "")
    assert {n: v.tobytes() for n, v in released(run).items()} == before


def test_spent_rounds_are_told_without_running(run: Federation) -> None:
    output = run.config.output
    assert rounds_spent(output.with_name("nowhere")) == (0, False)
    assert not output.with_name("nowhere").exists()
    assert rounds_spent(output) == (3, False)
    with pytest.MonkeyPatch.context() as patch:
        kill_at(patch, RunLedger, "end")
        with pytest.raises(KilledError):
            run_federation(SmallGrid(), run)
    assert rounds_spent(output) == (ROUNDS, True)
    assert run_federation(SmallGrid(), run) == []
    assert rounds_spent(output) == (ROUNDS, True)
    restore(run, 1, "ledger.jsonl")
    with pytest.raises(LedgerError, match="rolled back"):
        rounds_spent(output)


def test_keystore_that_others_can_read_is_refused(run: Federation) -> None:
    run.keystore.folder.chmod(0o755)
    refused(run, "others can read", ConfigError)
    run.keystore.folder.chmod(0o700)


def test_secrets_are_no_words() -> None:
    """Neither a log nor a traceback of the run's state shows what the noise comes from."""
    from homefire.server.aggregator import RunSecrets

    secret = bytes(range(32))
    assert repr(secret) not in repr(RunSecrets(None, secret))  # type: ignore[arg-type]


# Other settings

CLIP = {"quantile": 0.5, "rate": 0.2, "largest": 2.0}
CHANGED: dict[str, tuple[PrivacyConfig, dict[str, Any], str]] = {
    "more noise": (BANDED, {"privacy": BANDED.model_copy(update={"noise_multiplier": 3.0})}, "s"),
    "no noise": (BANDED, {"privacy": NONE}, "statement"),
    "noise": (NONE, {"privacy": BANDED}, "statement"),
    "another mechanism": (BANDED, {"privacy": GAUSSIAN}, "statement"),
    "clip norm": (BANDED, {"privacy": BANDED.model_copy(update={"clip_norm": 2.0})}, "statement"),
    "delta": (GAUSSIAN, {"privacy": GAUSSIAN.model_copy(update={"delta": 1e-4})}, "statement"),
    "separation": (BANDED, {"privacy": BANDED.model_copy(update={"separation": 1})}, "statement"),
    "cohort": (BANDED, {"federation": ROUNDS_OF.model_copy(update={"cohort": 3})}, "cohort"),
    "more rounds": (NONE, {"federation": ROUNDS_OF.model_copy(update={"rounds": 5})}, "statement"),
    "fewer rounds": (
        BANDED,
        {"federation": ROUNDS_OF.model_copy(update={"rounds": 3})},
        "statement",
    ),
    "adapter": (BANDED, {"shared": AdapterConfig(rank=1, seed=1)}, "adapter_digest"),
    "adaptive clip": (
        GAUSSIAN,
        {"privacy": PrivacyConfig.model_validate({**GAUSSIAN.model_dump(), "adaptive_clip": CLIP})},
        "adaptive_clip",
    ),
}


@pytest.mark.parametrize("name", CHANGED)
def test_changed_settings_are_refused(tmp_path: Path, made: Made, name: str) -> None:
    before, changes, named = CHANGED[name]
    interrupted(tmp_path, made, before)
    changed = small_federation(tmp_path / "out", **{"privacy": before, **changes})
    error = refused(changed, f"other settings: .*{named}", FederationError)
    assert "another output folder" in getattr(error, "hint", "")
    # And the settings that it began with still do.
    same = small_federation(tmp_path / "out", privacy=before)
    assert [log.round for log in run_federation(SmallGrid(), same)] == [4]


def test_an_epsilon_that_was_asked_for_cannot_be_forgotten(tmp_path: Path) -> None:
    """Also where the noise is the same: the run ends where that epsilon would be passed."""
    asked = GAUSSIAN.model_copy(update={"noise_multiplier": None, "epsilon": 4.0})
    federation = small_federation(tmp_path / "out", privacy=asked)
    die_after_a_commit(federation, SmallGrid())
    noise = federation.privacy.statement.noise_multiplier
    same = GAUSSIAN.model_copy(update={"noise_multiplier": noise})
    changed = small_federation(tmp_path / "out", privacy=same)
    assert changed.privacy.statement == federation.privacy.statement
    refused(changed, "other settings: target", FederationError)


@pytest.mark.parametrize("users", [USERS - 1, USERS + 1])
def test_changed_users_are_refused(run: Federation, users: int) -> None:
    changed = small_federation(run.config.output, users=users, privacy=BANDED)
    refused(changed, "not those of the interrupted run", FederationError)


def test_changed_base_model_or_roster_is_refused(run: Federation) -> None:
    roster = frozenset([*sorted(run.roster)[1:], public_key(device_key(99))])
    parts = (run.config, run.spec)
    for changed, named in (
        (Federation(*parts, "b" * 64, run.privacy, run.roster), "base_model"),
        (Federation(*parts, run.base_model, run.privacy, roster), "roster"),
    ):
        refused(changed, f"other settings: {named}", FederationError)


def test_other_nodes_are_refused(run: Federation, monkeypatch: pytest.MonkeyPatch) -> None:
    others = [*range(2, USERS + 2)]
    monkeypatch.setattr(SmallGrid, "get_node_ids", lambda grid: others)
    refused(run, "not those of the interrupted run", FederationError)


def test_order_in_which_nodes_are_named_does_not_matter(
    run: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SmallGrid, "get_node_ids", lambda grid: range(USERS, 0, -1))
    assert [log.round for log in run_federation(SmallGrid(), run)] == [4]


@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer": OptimizerConfig(learning_rate=0.1)},
        {"optimizer": OptimizerConfig(name="momentum")},
        {"local": LocalTraining(learning_rate=0.5)},
        {"federation": ROUNDS_OF.model_copy(update={"deadline": 5.0})},
    ],
)
def test_what_no_claim_stands_on_may_change(run: Federation, changes: dict[str, Any]) -> None:
    changed = small_federation(run.config.output, **{"privacy": BANDED, **changes})
    grid = SmallGrid()
    assert [log.round for log in run_federation(grid, changed)] == [4]
    (plan,) = {id(plan): plan for _, plan in grid.plans[:1]}.values()
    assert plan.header.training == changed.config.local


def test_signing_key_is_kept(tmp_path: Path) -> None:
    """Devices trust it from run to run; only a new keystore has a new one."""
    federation = small_federation(tmp_path / "out")
    trust_server(tmp_path / "out")
    run_federation(SmallGrid(), federation)
    assert federation.keystore.get(SIGNING_KEY) is not None
