"""`homefire bench`: one JSON object each, tables, pages, and how the commands refuse."""

import importlib.util
import json
import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from tiny_benchmarks import CEILING, DEPLOYMENT, ENGINE, LOAD, SCALING
from typer.testing import CliRunner

from homefire.bench_commands import bench_app
from homefire.client.progress import Reporter
from homefire.common.errors import ConfigError, HomefireError
from homefire.simulations.benchmarks import ceiling as ceiling_module
from homefire.simulations.benchmarks import engine as engine_module
from homefire.simulations.benchmarks import overhead as overhead_module
from homefire.simulations.benchmarks import scaling as scaling_module
from homefire.simulations.load import bench as load_module
from homefire.simulations.load import deployment as deployment_module
from homefire.simulations.load.bench import Load
from homefire.simulations.load.deployment import Deployments

COMMANDS = {"engine": ENGINE, "scaling": SCALING, "ceiling": CEILING}
every = pytest.mark.parametrize(("command", "result"), COMMANDS.items())


def bench(*arguments: str) -> Result:
    """Runs `homefire bench`."""
    return CliRunner().invoke(bench_app, arguments, env={"COLUMNS": "120", "NO_COLOR": "1"})


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What the measurements were asked for; each says that it begins, and gives made-up numbers."""
    found: list[dict[str, Any]] = []

    def engine(**asked: Any) -> dict[str, Any]:
        asked.pop("say")("one [step]")
        found.append(asked)
        return ENGINE

    def scaling(cohorts: Sequence[int], populations: Sequence[int], say: Any) -> dict[str, Any]:
        say("one [step]")
        found.append({"cohorts": cohorts, "populations": populations})
        return SCALING

    def ceiling(shape: str, cohorts: Sequence[int], steps: Any, **rest: Any) -> dict[str, Any]:
        rest.pop("say")("one [step]")
        found.append({"shape": shape, "cohorts": cohorts, "steps": steps, **rest})
        return CEILING

    monkeypatch.setattr(engine_module, "bench", engine)
    monkeypatch.setattr(scaling_module, "measure", scaling)
    monkeypatch.setattr(ceiling_module, "measure", ceiling)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return found


# Output


@every
def test_json_is_one_object_and_nothing_else(
    asked: list[dict[str, Any]], command: str, result: dict[str, Any]
) -> None:
    done = bench(command, "--json")
    assert done.exit_code == 0, done.output
    assert done.stdout.count("\n") == 1
    assert json.loads(done.stdout) == result
    assert done.stderr == ""


def test_the_engines_json_has_its_ratios(asked: list[dict[str, Any]]) -> None:
    found = json.loads(bench("engine", "--json").stdout)
    assert {name: found[name] for name in found if name.startswith("ratio")} == {
        "ratio_one_by_one": 10.0,
        "ratio_ray": 20.0,
        "ratio_pfl": 5.0,
        "ratio_ray_overhead": 100.0,
    }


@every
def test_a_table_is_for_people(
    asked: list[dict[str, Any]], command: str, result: dict[str, Any]
) -> None:
    done = bench(command)
    assert done.exit_code == 0, done.output
    words = {"engine": "ratio to one by one 10.00", "scaling": "1,000,000", "ceiling": "300 TFLOP"}
    assert words[command] in done.stdout
    assert "one [step] …" in done.stderr and "step" not in done.stdout


@every
@pytest.mark.parametrize("as_json", [True, False])
def test_a_page_is_written_besides(
    asked: list[dict[str, Any]],
    tmp_path: Path,
    command: str,
    result: dict[str, Any],
    as_json: bool,
) -> None:
    page = tmp_path / "a [b] page.html"
    done = bench(command, "--html", str(page), *["--json"] * as_json)
    assert done.exit_code == 0, done.output
    text = page.read_text(encoding="utf-8")
    assert text.startswith("<!doctype html>") and "Plotly.newPlot(" in text
    if as_json:
        assert json.loads(done.stdout) == result
    else:
        assert f"Page: {page.resolve()}" in done.stdout


@every
def test_a_page_that_cannot_be_written_loses_no_measurement(
    asked: list[dict[str, Any]], tmp_path: Path, command: str, result: dict[str, Any]
) -> None:
    done = bench(command, "--html", str(tmp_path), "--json")  # a folder
    assert isinstance(done.exception, ConfigError)
    assert str(done.exception).startswith(f"{tmp_path}: cannot be written")
    assert json.loads(done.stdout) == result


# What is measured


def test_the_engine_is_measured_on_what_was_asked_for(asked: list[dict[str, Any]]) -> None:
    bench("engine", "--json")
    bench("engine", "--json", "--quick")
    bench("engine", "--json", "--quick", "--users", "5", "--rounds", "1")
    arguments = ("--model", "m", "--population", "p.jsonl", "--users", "9", "--rounds", "4")
    bench("engine", "--json", *arguments)
    plain = {"model": None, "population": None}
    assert asked == [
        {**plain, "users": 64, "rounds": 3},
        {**plain, "users": 12, "rounds": 2},
        {**plain, "users": 5, "rounds": 1},
        {"model": "m", "population": Path("p.jsonl"), "users": 9, "rounds": 4},
    ]


def test_scaling_stops_early_when_it_shall_be_quick(asked: list[dict[str, Any]]) -> None:
    bench("scaling", "--json")
    bench("scaling", "--json", "--quick")
    assert asked == [
        {"cohorts": (8, 100, 1_000, 10_000), "populations": tuple(10**n for n in range(2, 7))},
        {"cohorts": (8, 64, 256), "populations": (100, 1_000, 5_000)},
    ]


def test_the_ceilings_shape_depends_on_the_machine(
    asked: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    for gpu in (False, True):
        monkeypatch.setattr(torch.cuda, "is_available", lambda gpu=gpu: gpu)
        for arguments in ((), ("--quick",), ("--shape", "1.2b")):
            bench("ceiling", "--json", *arguments)
    assert [(each["shape"], each["compiled"]) for each in asked] == [
        ("tiny", True),
        ("tiny", False),
        ("1.2b", True),
        ("135m", True),
        ("tiny", False),
        ("1.2b", True),
    ]
    assert {each["cohorts"] for each in asked[:3]} == {(2, 8, 16)}
    assert {each["cohorts"] for each in asked[3:]} == {(8, 32, 128, 256)}
    assert all(each["steps"] == ceiling_module.Steps() for each in asked)


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What servers were asked to be measured on; each shows a bar."""
    found: list[Any] = []

    def load(asked: Load, reporter: Reporter) -> dict[str, Any]:
        with reporter.phase("Enrolling", asked.light):
            found.append(asked)
        return LOAD

    def deployment(*, devices: int, rounds: int, reporter: Reporter) -> Deployments:
        with reporter.phase("Rounds, homefire", rounds):
            found.append((devices, rounds))
        return Deployments(**DEPLOYMENT)

    monkeypatch.setattr(load_module, "measure", load)
    monkeypatch.setattr(deployment_module, "measure", deployment)
    return found


@pytest.mark.parametrize(
    ("command", "result", "words", "bar"),
    [
        ("load", LOAD, "1,000 light and 12 real devices", "Enrolling: 1000 to do"),
        ("deployment", DEPLOYMENT, "ratio besides training 0.100", "Rounds, homefire: 4 to do"),
    ],
)
def test_a_servers_measurement_is_json_or_a_table_and_says_how_far_it_is(
    served: list[Any], command: str, result: dict[str, Any], words: str, bar: str
) -> None:
    done = bench(command, "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout) == json.loads(json.dumps(result))
    assert done.stderr == ""
    done = bench(command)
    assert words in done.stdout
    assert bar in done.stderr and bar not in done.stdout


def test_a_server_is_measured_on_what_was_asked_for(served: list[Any]) -> None:
    bench("load", "--json")
    bench("load", "--json", "--quick")
    bench("load", "--light", "300", "--real", "2", "--cohort", "9", "--cohort", "99", "--soak", "5")
    bench("deployment", "--devices", "5", "--rounds", "2")
    assert served == [
        Load(1000, 12, (50, 400), 3, 0.0),
        Load(40, 1, (8, 32), 2, 0.0),
        Load(300, 2, (9, 99), 3, 5.0),
        (5, 2),
    ]


# Refusals and help


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("ceiling", "--shape", "70b"), "'70b' is none of tiny, 135m, 1.2b"),
        (("engine", "--users", "1"), "--users"),
        (("engine", "--rounds", "0"), "--rounds"),
        (("overhead", "--rounds", "1"), "--rounds"),
        (("load", "--light", "30", "--real", "0", "--cohort", "31"), "31 among 30 devices"),
        (("load", "--soak", "-1"), "--soak"),
        (("deployment", "--devices", "1"), "--devices"),
        (("engine", "--fast"), "--fast"),
        (("nonsense",), "nonsense"),
    ],
)
def test_wrong_usage_is_an_error(
    asked: list[dict[str, Any]], served: list[Any], arguments: tuple[str, ...], words: str
) -> None:
    done = bench(*arguments)
    assert done.exit_code == 2
    assert words in done.stderr and done.stdout == ""
    assert asked == served == []


@pytest.mark.parametrize("command", [*COMMANDS, "overhead", "load", "deployment"])
def test_a_missing_package_is_named_before_anything_is_measured(
    asked: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    done = bench(command)
    assert isinstance(done.exception, HomefireError)
    assert "this command needs the package" in str(done.exception)
    assert done.exception.hint == "Install homefire[simulation]."
    assert asked == []


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("engine", ("pfl-research", "--population", "--users", "--rounds", "--html", "--json")),
        ("scaling", ("peak memory", "--quick", "--html", "--json")),
        ("ceiling", ("matrix products", "tiny, 135m or 1.2b", "--shape", "--html", "--json")),
        ("overhead", ("in-process", "--users", "--rounds", "--json")),
        ("load", ("Light devices", "--light", "--real", "--cohort", "--soak", "--json")),
        ("deployment", ("flower-supernode", "--devices", "--rounds", "--json")),
    ],
)
def test_help_says_what_a_command_does(command: str, words: tuple[str, ...]) -> None:
    done = bench(command, "--help")
    assert done.exit_code == 0
    for word in words:
        assert word in done.stdout
    assert command in bench("--help").stdout


def test_overhead_shows_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    def measured(*, users: int, rounds: int) -> overhead_module.Overhead:
        return overhead_module.Overhead(users, rounds - 1, 512, 0.25, 2.5, 10.0)

    monkeypatch.setattr(overhead_module, "measure_overhead", measured)
    found = json.loads(bench("overhead", "--users", "7", "--rounds", "4", "--json").stdout)
    assert (found["users"], found["rounds"], found["ratio"]) == (7, 3, 10.0)


def test_sigterm_ends_a_measurement_as_an_error_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second one does not break off what tidies up; afterwards all is as before."""
    tidied, before = [], signal.getsignal(signal.SIGTERM)

    def measured(**_: Any) -> Any:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)
            tidied.append(True)

    monkeypatch.setattr(overhead_module, "measure_overhead", measured)
    assert bench("overhead").exit_code == 128 + signal.SIGTERM
    assert tidied == [True]
    assert signal.getsignal(signal.SIGTERM) is before
