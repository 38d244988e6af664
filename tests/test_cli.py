"""The command line: exit codes, errors with hints, and one whole run."""

import importlib.util
import inspect
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import click
import pytest
import typer.main

import homefire
from homefire import __main__ as command_line
from homefire.common import claims, model_cache
from homefire.common.loopback import VARIABLES

ROOT = Path(__file__).resolve().parent.parent
SMALL = (
    "population.kind=synthetic",
    "population.users=2",
    "population.unseen=1",
    "population.records=6",
    "federation.rounds=1",
    "federation.cohort=2",
    "local.steps=1",
    "private.training.steps=2",
    "evaluation.generated=0",
    "threads=1",
    'privacy={mechanism="none", clip_norm=1.0}',
)

Cli = Callable[..., tuple[int, str, str]]


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Cli:
    """Runs a command in an empty folder; gives exit code, output and errors."""
    for name, value in command_line._ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    for name in VARIABLES:
        monkeypatch.setenv(name, "models.example")
    monkeypatch.setenv("HOMEFIRE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["homefire", *arguments])
        with pytest.raises(SystemExit) as ended:
            command_line.main()
        output = capsys.readouterr()
        return int(ended.value.code or 0), output.out, output.err

    return run


def small(model: Path) -> list[str]:
    settings = (*SMALL, f"base_model.name={model}")
    return [part for setting in settings for part in ("--set", setting)]


# Whole runs


def test_simulate_ends_with_a_table_and_a_report(
    cli: Cli, tiny_llama: Path, tmp_path: Path
) -> None:
    code, output, errors = cli("simulate", *small(tiny_llama), "--name", "mine")
    assert (code, errors) == (0, "")
    folder = tmp_path / "runs" / "mine"
    assert f"Report: {folder / 'report.html'}" in output.splitlines()
    assert "Differential privacy was OFF" in output
    assert "shared + private" in output
    assert json.loads((folder / "report.json").read_text())["name"] == "mine"
    (folder / "report.html").unlink()
    code, output, _ = cli("report", str(folder))
    assert code == 0
    assert f"Report: {folder / 'report.html'}" in output.splitlines()
    assert (folder / "report.html").stat().st_size > 10_000


def test_a_second_run_gets_a_folder_of_its_own(cli: Cli, tiny_llama: Path, tmp_path: Path) -> None:
    for _ in range(2):
        assert cli("prepare", *small(tiny_llama), "--runs", "here")[0] == 0
    assert sorted(path.name for path in (tmp_path / "here").iterdir()) == ["default", "default-2"]


def test_prepare_says_how_to_go_on(cli: Cli, tiny_llama: Path, tmp_path: Path) -> None:
    code, output, _ = cli("prepare", *small(tiny_llama))
    folder = tmp_path / "runs" / "default"
    assert code == 0
    assert f"HOMEFIRE_HOME={folder / 'devices'}" in output
    assert f'federation="{folder / "server" / "federation.toml"}"' in output
    assert "num-supernodes=2" in output
    assert not (folder / "server" / "releases").exists()


def test_an_experiment_file_is_read(cli: Cli, tiny_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text('[privacy]\nmechanism = "none"\nclip_norm = 1.0\n')
    assert cli("prepare", "mine.toml", *small(tiny_llama))[0] == 0
    assert (tmp_path / "runs" / "mine" / "experiment.toml").is_file()


def test_a_run_that_is_over_is_evaluated_again(cli: Cli, tiny_llama: Path, tmp_path: Path) -> None:
    assert cli("simulate", *small(tiny_llama))[0] == 0
    folder = tmp_path / "runs" / "default"
    last = folder / "server" / "releases" / "000001.safetensors"
    before = last.read_bytes()
    (folder / "report.json").unlink()
    code, output, _ = cli("simulate", "--resume", str(folder))
    assert code == 0
    assert "Shared adapter: 0 to do" in output
    assert f"Report: {folder / 'report.html'}" in output.splitlines()
    assert last.read_bytes() == before
    assert json.loads((folder / "report.json").read_text())["rounds"][1]["accepted"] == 2
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["default"]


@pytest.mark.parametrize(
    "more", [["mine.toml"], ["--set", "federation.rounds=9"], ["--name", "other"]]
)
def test_a_resumed_run_takes_no_other_settings(cli: Cli, tmp_path: Path, more: list[str]) -> None:
    code, _, errors = cli("simulate", *more, "--resume", str(tmp_path))
    assert code == 1
    assert "--resume takes the settings of the interrupted run, and no others" in errors
    assert list(tmp_path.iterdir()) == []


def test_compare_shows_a_table_and_keeps_the_figures(
    cli: Cli, tiny_llama: Path, tmp_path: Path
) -> None:
    banded = 'privacy={mechanism="banded-sqrt", clip_norm=1.0, epsilon=8.0, delta=1e-5}'
    code, output, _ = cli("privacy", "compare", *small(tiny_llama), "--set", banded)
    assert code == 0
    written = tmp_path / "runs" / "default" / "comparison.json"
    assert str(written) in output.splitlines()
    rows = json.loads(written.read_text())
    assert len(rows) == 4
    (shown,) = [words for words in map(str.split, output.splitlines()) if words[:1] == ["none"]]
    assert shown[1:4] == ["–", "∞", "∞"]
    assert shown[4:] == [f"{gain['mean_gain']:+.3f}" for gain in rows[0]["gain"]]
    for row in rows[1:]:
        said = row["privacy"]
        epsilons = (said["epsilon_release"], said["epsilon_known_cohort"])
        expected = (f"{said['noise_multiplier']:.3g}", *map(claims.shown, epsilons))
        assert " ".join(expected) in " ".join(output.split())


def test_compare_leaves_nothing_where_it_cannot_start(cli: Cli, tmp_path: Path) -> None:
    code, _, errors = cli("privacy", "compare")
    assert code == 1
    assert "starts from banded-sqrt" in errors
    assert list(tmp_path.iterdir()) == []


def test_clip_gives_the_quantile_as_text_and_as_json(cli: Cli, tiny_llama: Path) -> None:
    arguments = ("privacy", "clip", *small(tiny_llama), "--quantile", "0.75", "--users", "3")
    code, output, _ = cli(*arguments, "--json")
    found = json.loads(output)
    assert code == 0
    assert (found["quantile"], found["users"], len(found["norms"])) == (0.75, 3, 3)
    assert found["norms"][1] < found["clip_norm"]
    code, output, _ = cli(*arguments)
    assert code == 0
    assert output.startswith(f"clip_norm = {found['clip_norm']:.4g} ")
    assert "75% of 3 public updates fit" in output


# Errors


def test_an_unknown_key_is_two_lines_and_exit_code_1(cli: Cli, tmp_path: Path) -> None:
    code, output, errors = cli("simulate", "--set", "federation.round=5")
    assert (code, output) == (1, "")
    error, hint = errors.splitlines()
    assert error == "Error: default experiment: federation.round: unknown key"
    assert hint.startswith("Hint: ")
    assert "rounds" in hint
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("arguments", "message", "hint"),
    [
        (["simulate", "absent.toml"], "absent.toml: no such file", ""),
        (["simulate", "--set", "federation.rounds"], "expected key=value", ""),
        (["prepare", "--set", "federation.rounds=0"], "federation.rounds", ""),
        (["prepare", "--name", "../elsewhere"], "'../elsewhere' is not a plain name", "letters"),
        (["report", "absent"], "report.json: no such file", "Give the folder of a run"),
        (["simulate", "--resume", "absent"], "absent/experiment.toml: no such file", ""),
        (["audit", "absent"], "report.json: no such file", "Give the folder of a run"),
        (["models", "get", "no-such-model"], "no-such-model", "smollm2-135m"),
        (["simulate"], "not fetched yet", "homefire models get smollm2-135m"),
    ],
)
def test_an_error_names_what_is_wrong(
    cli: Cli, arguments: list[str], message: str, hint: str
) -> None:
    code, _, errors = cli(*arguments)
    assert code == 1
    assert errors.startswith("Error: ")
    assert message in errors
    assert hint in errors
    assert "Traceback" not in errors


@pytest.mark.parametrize("arguments", [["nonsense"], ["simulate", "--nonsense"], ["report"]])
def test_wrong_usage_is_exit_code_2(cli: Cli, arguments: list[str]) -> None:
    assert cli(*arguments)[0] == 2


def test_a_missing_package_is_named_with_its_extra(
    cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for command in (
        ["simulate"],
        ["prepare"],
        ["report", "x"],
        ["audit", "x"],
        ["privacy", "clip"],
        ["privacy", "compare"],
        ["bench", "overhead"],
    ):
        code, _, errors = cli(*command)
        assert code == 1
        assert "this command needs the package" in errors
        assert "Install homefire[simulation]." in errors


# The rest


def test_every_command_reaches_this_machine_past_proxies(cli: Cli) -> None:
    assert cli("--version")[0] == 0
    assert {os.environ[name] for name in VARIABLES} == {"models.example,127.0.0.1,localhost,::1"}


def test_version(cli: Cli) -> None:
    assert cli("--version")[:2] == (0, f"homefire {homefire.__version__}\n")


def test_help_explains_arguments(cli: Cli) -> None:
    assert "A run's folder" in cli("report", "--help")[1]


def commands(group: click.Command, *path: str) -> Iterator[tuple[tuple[str, ...], str]]:
    """Every command with what its function says of it."""
    if isinstance(group, click.Group):
        for name, command in group.commands.items():
            yield from commands(command, *path, name)
    else:
        yield path, inspect.cleandoc(group.callback.__doc__ or "")


@pytest.mark.parametrize(
    ("path", "text"),
    list(commands(typer.main.get_command(command_line.app))),
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_help_breaks_where_its_lines_end(cli: Cli, path: tuple[str, ...], text: str) -> None:
    """In a terminal of 80 columns; a command that is broken cannot be copied."""
    code, output, _ = cli(*path, "--help")
    assert code == 0
    shown = [line.rstrip() for line in output.splitlines()]
    assert text
    assert [line for line in text.splitlines() if line and f" {line}" not in shown] == []


def test_help_names_the_commands(cli: Cli) -> None:
    code, output, _ = cli("--help")
    assert code == 0
    for command in ("simulate", "prepare", "report", "audit", "privacy", "models", "bench"):
        assert command in output


def test_models_list_names_every_alias(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    code, output, _ = cli("models", "list")
    assert code == 0
    for alias, source in model_cache.ALIASES.items():
        assert alias in output
        assert source.license in output
    assert "not fetched" in output


def test_python_m_homefire_starts_without_torch(tmp_path: Path) -> None:
    code = (
        "import runpy, sys\n"
        "sys.argv = ['homefire', '--version']\n"
        "try:\n"
        "    runpy.run_module('homefire', run_name='__main__', alter_sys=True)\n"
        "except SystemExit as ended:\n"
        "    assert not ended.code\n"
        "print(sorted({'torch', 'flwr', 'ray', 'transformers'} & set(sys.modules)))"
    )
    result = subprocess.run(  # noqa: S603 - our own command
        [sys.executable, "-c", code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout == f"homefire {homefire.__version__}\n[]\n"


def test_commands_tell_nobody_that_they_run(tmp_path: Path) -> None:
    """What Flower and Ray read, set before either is imported."""
    code = (
        "import os, sys\n"
        "from homefire.__main__ import main\n"
        "sys.argv = ['homefire', '--version']\n"
        "try:\n"
        "    main()\n"
        "except SystemExit:\n"
        "    names = 'FLWR_TELEMETRY_ENABLED', 'RAY_USAGE_STATS_ENABLED'\n"
        "    print([os.environ[name] for name in names])"
    )
    environment = {"PATH": "", "PYTHONPATH": str(ROOT)}
    result = subprocess.run(  # noqa: S603 - our own command
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert result.stdout.splitlines()[-1] == "['0', '0']"
