"""A simulation that was interrupted goes on where it stopped, and spends nothing twice."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from flwr.app import Context, Message
from made_up_report import AUDIT, Page
from pydantic import BaseModel
from rich.console import Console
from tiny_simulations import NO_PRIVACY, SMALL, lasting, prepare_small, quiet, store

from homefire.client.app import Admitted, admit
from homefire.client.participation import open_participations
from homefire.client.progress import Reporter
from homefire.common.errors import ConfigError, FederationError
from homefire.common.keystore import Keystore
from homefire.server.run_ledger import RunLedger
from homefire.server.run_state import RUN_KEY, rounds_spent
from homefire.simulations import cohort_worker, preparation
from homefire.simulations import rounds as rounds_module
from homefire.simulations import simulate as simulate_module
from homefire.simulations.preparation import Run, prepare, reopen, write_toml
from homefire.simulations.report import load_report, write_report
from homefire.simulations.simulate import simulate

BANDED = (
    'privacy={mechanism="banded-sqrt", clip_norm=1.0, noise_multiplier=2.0, delta=1e-6}',
    "federation.rounds=4",
    "federation.cohort=2",
)
Prepare = Callable[..., Run]


@pytest.fixture
def make(tmp_path: Path, tiny_llama: Path) -> Prepare:
    def prepared(*overrides: str) -> Run:
        return prepare_small(tmp_path / "run", tiny_llama, *overrides)

    return prepared


class Dies:
    """Honest devices, but the process is interrupted when the nth plan comes."""

    def __init__(self, plans: int) -> None:
        self.left = plans

    def __call__(self, message: Message, context: Context) -> Message | Admitted:
        """Admit, or end everything."""
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt
        return admit(message, context)


def interrupt(run: Run, monkeypatch: pytest.MonkeyPatch, *, at_plan: int) -> None:
    """Simulate until the nth plan."""
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(cohort_worker, "admit", Dies(at_plan))
        simulate(run, quiet())


def dies(*_: object) -> None:
    raise KeyboardInterrupt


def run_ledger(run: Run) -> RunLedger:
    output = run.folder / "server"
    ledger = RunLedger.open(output / "ledger.jsonl", Keystore.beside(output))
    ledger.ledger.close()
    return ledger


def participations(run: Run) -> list[list[int]]:
    """The rounds that each device was charged for."""
    found = []
    for user in run.home.users:
        with open_participations(run.home, user.user_id) as ledger:
            found.append([participation.round for participation in ledger.history])
    return found[: run.training]


def bytes_of(run: Run) -> dict[int, bytes]:
    return {number: store(run).read(number).vector.tobytes() for number in store(run).rounds()}


@pytest.mark.slow
def test_an_interrupted_run_goes_on(make: Prepare, monkeypatch: pytest.MonkeyPatch) -> None:
    """The round that it was in is spent; those before stand; those after follow."""
    run = make(*BANDED)
    interrupt(run, monkeypatch, at_plan=4)  # the second device of round 2
    before = bytes_of(run)
    assert list(before) == [0, 1]
    assert rounds_spent(run.folder / "server") == (2, False)
    report = simulate(reopen(run.folder), quiet())
    after = bytes_of(run)
    assert {number: after[number] for number in before} == before
    assert list(after) == [0, 1, 3, 4]
    assert [entry["round"] for entry in report["rounds"]] == [0, 1, 2, 3, 4]
    assert [entry["round"] for entry in report["rounds"] if entry["interrupted"]] == [2]
    assert report["rounds"][2]["validation_loss"] is None
    page = Page((run.folder / "report.html").read_text(encoding="utf-8")).text
    assert page.count("2 – – interrupted: charged, not released – – – –") == 1
    ledger = run_ledger(run)
    assert (ledger.opened, ledger.burnt, ledger.ended) == (4, [2], True)
    assert sorted(ledger.sums) == [1, 3, 4]
    # One of round 2 never answered; which of the two is asked first is chance.
    assert sorted(participations(run)) == [[1, 3], [1, 3], [2, 4], [4]]
    assert report["privacy"] == store(run).read(0).about["privacy"]
    assert report["privacy"]["rounds"] == 4


def test_what_a_run_without_noise_gives_depends_on_its_releases_alone(
    make: Prepare, tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted in the second of two rounds, it gives what a run of one round gives."""
    settings = (NO_PRIVACY, "federation.cohort=4", "evaluation.generated=0")
    run = make(*settings)
    interrupt(run, monkeypatch, at_plan=5)
    report = simulate(reopen(run.folder), quiet())
    whole = prepare_small(tmp_path / "whole", tiny_llama, *settings, "federation.rounds=1")
    assert simulate(whole, quiet())["utility"] == report["utility"]
    assert bytes_of(whole) == bytes_of(run)


def test_a_run_that_was_over_is_evaluated(make: Prepare, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make(NO_PRIVACY, "evaluation.generated=0")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(simulate_module, "_train_private_adapters", dies)
        simulate(run, quiet())
    assert not (run.folder / "report.json").exists()
    before = bytes_of(run)
    monkeypatch.setattr(rounds_module, "server_app", None)  # nobody is asked for anything
    report = simulate(reopen(run.folder), quiet())
    assert [entry["round"] for entry in report["rounds"]] == [0, 1, 2]
    assert report["utility"]["training_users"]["users"] == 4
    assert bytes_of(run) == before


def test_a_run_killed_between_its_last_two_acts_is_over(
    make: Prepare, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The key is destroyed, the ledger does not say yet that the run is over."""
    run = make(NO_PRIVACY, "evaluation.generated=0")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(RunLedger, "end", dies)
        simulate(run, quiet())
    assert Keystore.beside(run.folder / "server").get(RUN_KEY) is None
    assert rounds_spent(run.folder / "server") == (2, True)
    report = simulate(reopen(run.folder), quiet())
    assert [entry["round"] for entry in report["rounds"]] == [0, 1, 2]


def test_a_run_whose_only_round_was_interrupted(
    make: Prepare, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is nothing left to spend: the adapter stays as it began, and the report says so."""
    run = make(NO_PRIVACY, "federation.rounds=1", "federation.cohort=4", "evaluation.generated=0")
    interrupt(run, monkeypatch, at_plan=1)
    report = simulate(reopen(run.folder), quiet())
    assert [entry["interrupted"] for entry in report["rounds"]] == [False, True]
    assert run_ledger(run).burnt == [1]
    assert store(run).rounds() == [0]


def test_a_round_killed_between_its_release_and_its_line_was_not_interrupted(
    make: Prepare,
) -> None:
    """It is scored; what the operator's log would have said of it is unknown."""
    run = make(NO_PRIVACY, "evaluation.generated=0")
    whole = simulate(run, quiet())
    log = run.folder / "server" / "rounds.jsonl"
    log.write_text(log.read_text().splitlines(keepends=True)[0])
    last = simulate(reopen(run.folder), quiet())["rounds"][2]
    assert last["validation_loss"] == whole["rounds"][2]["validation_loss"]
    assert not last["interrupted"]
    assert last["accepted"] is last["train_loss"] is last["seconds"] is None
    page = Page((run.folder / "report.html").read_text(encoding="utf-8")).text
    assert f"2 – – – – – {last['validation_loss']:.3f} –" in page


def test_a_second_evaluation_keeps_what_only_the_first_could_know(make: Prepare) -> None:
    """The audit, and the traffic of rounds that are not repeated."""
    run = make(NO_PRIVACY, "evaluation.generated=0")
    first = simulate(run, quiet())
    names = [f"{name}_per_contribution" for name in ("bytes_up", "bytes_down", "device_seconds")]
    assert all(first["efficiency"][name] for name in names)
    audit = {"canary": AUDIT["canary"], "noise": None, "membership": None}
    write_report(run.folder, first | {"audit": audit})
    said = io.StringIO()
    second = simulate(reopen(run.folder), Reporter(Console(file=said, width=200)))
    assert "This run is over: it is evaluated again, and its report is replaced." in said.getvalue()
    assert second["audit"] == audit
    assert load_report(run.folder)["audit"] == audit
    for name in names:
        assert second["efficiency"][name] == first["efficiency"][name]
    assert lasting(second | {"audit": None}) == lasting(first | {"audit": None})


def test_a_damaged_report_is_replaced(make: Prepare) -> None:
    run = make(NO_PRIVACY, "evaluation.generated=0")
    simulate(run, quiet())
    (run.folder / "report.json").write_text("{")
    second = simulate(reopen(run.folder), quiet())
    assert second["efficiency"]["bytes_up_per_contribution"] is None
    assert load_report(run.folder)["created_at"] == second["created_at"]


# Refused


def test_other_settings_are_refused(make: Prepare, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make(*BANDED)
    interrupt(run, monkeypatch, at_plan=4)
    settings = run.federation_file.read_text()
    assert "noise_multiplier = 2.0" in settings
    run.federation_file.write_text(
        settings.replace("noise_multiplier = 2.0", "noise_multiplier = 1.0")
    )
    before = bytes_of(run)
    with pytest.raises(FederationError, match="had other settings: statement"):
        simulate(reopen(run.folder), quiet())
    assert bytes_of(run) == before


@pytest.mark.parametrize(
    "content",
    [None, b"", b"[]", b"3", b'{"training": 4, "unseen": 2}', b'{"training": 4'],
)
def test_a_folder_that_is_no_run_is_refused(make: Prepare, content: bytes | None) -> None:
    run = make(NO_PRIVACY)
    assert reopen(run.folder) == run
    path = run.folder / "population.json"
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match="not a prepared run"):
        reopen(run.folder)


def test_a_preparation_that_was_interrupted_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_llama: Path
) -> None:
    """`experiment.toml` is written last; a process that is killed cannot clean up."""
    run = prepare_small(tmp_path / "whole", tiny_llama, NO_PRIVACY)

    def write(path: Path, settings: BaseModel) -> None:
        if path.name == "experiment.toml":
            raise KeyboardInterrupt
        write_toml(path, settings)

    monkeypatch.setattr(preparation, "write_toml", write)
    monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)
    with pytest.raises(KeyboardInterrupt):
        prepare(run.experiment, tmp_path / "broken")
    assert (tmp_path / "broken" / "population.json").exists()
    with pytest.raises(ConfigError, match=r"experiment\.toml: no such file"):
        reopen(tmp_path / "broken")


# Killed


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "homefire", "simulate", *arguments]


@pytest.mark.slow
@pytest.mark.timeout(170)
def test_a_killed_process_goes_on(tmp_path: Path, tiny_llama: Path) -> None:
    """SIGKILL in the middle of the rounds, then `homefire simulate --resume`."""
    settings = (*SMALL, f"base_model.name={tiny_llama}", *BANDED)
    changes = ("federation.rounds=12", "evaluation.generated=0", "private.training.steps=2")
    options = [part for setting in (*settings, *changes) for part in ("--set", setting)]
    process = subprocess.Popen(  # noqa: S603 - our own command
        command(*options, "--name", "killed"),
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    folder = tmp_path / "runs" / "killed"
    second = folder / "server" / "releases" / "000002.safetensors"
    while not second.exists():
        assert process.poll() is None
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    run = reopen(folder)
    before, (spent, is_over) = bytes_of(run), rounds_spent(folder / "server")
    assert 2 <= spent < 12
    assert not is_over
    resumed = subprocess.run(  # noqa: S603 - our own command
        command("--resume", str(folder)), cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert resumed.returncode == 0, resumed.stderr
    assert f"Report: {folder / 'report.html'}" in resumed.stdout
    after = bytes_of(run)
    assert {number: after[number] for number in before} == before
    ledger = run_ledger(run)
    assert ledger.ended
    assert ledger.opened == 12
    assert len(ledger.burnt) <= 1
    assert sorted([*after, *ledger.burnt]) == list(range(13))
    report = json.loads((folder / "report.json").read_text())
    assert report["privacy"]["rounds"] == 12
    assert all(len(rounds) <= 6 for rounds in participations(run))
