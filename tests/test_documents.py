"""What the documents tell people to type is understood; what they link to exists."""

import re
import shlex
from dataclasses import replace
from pathlib import Path

import click
import pytest
import typer.main

from homefire.__main__ import app
from homefire.common.config import FederationConfig, load_config, read_toml, validate
from homefire.common.policy import DevicePolicy
from homefire.server.logs import FIELDS
from homefire.server.operator_page import metrics
from homefire.server.spending import Budget
from homefire.server.status import Status
from homefire.simulations.experiment import Experiment

ROOT = Path(__file__).resolve().parent.parent
OPERATING = ROOT / "docs" / "OPERATING.md"
DOCUMENTS = sorted(
    [
        *ROOT.glob("*.md"),
        *(ROOT / "docs").rglob("*.md"),
        *(ROOT / "deploy").rglob("*.md"),
        *(ROOT / "simulations").rglob("*.md"),
    ]
)


def blocks(document: Path, language: str = "") -> list[str]:
    text = document.read_text(encoding="utf-8")
    found = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [block for name, block in found if name == language]


def commands() -> list[str]:
    lines = [line for path in DOCUMENTS for block in blocks(path) for line in block.splitlines()]
    return sorted({line for line in lines if line.startswith("homefire ")})


def parse(group: click.Command, arguments: list[str]) -> None:
    """Let the command line read its arguments; nothing is run."""
    if isinstance(group, click.Group):
        context = click.Context(group, info_name="homefire")
        _, command, rest = group.resolve_command(context, arguments)
        assert command is not None
        parse(command, rest)
    else:
        group.make_context("homefire", arguments)


@pytest.mark.parametrize("line", commands())
def test_commands_are_understood(line: str) -> None:
    parse(typer.main.get_command(app), shlex.split(line, comments=True)[1:])


def test_a_command_that_does_not_exist_is_noticed() -> None:
    with pytest.raises(click.UsageError):
        parse(typer.main.get_command(app), ["simulate", "--no-such-option"])


def test_targets_of_the_makefile_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = {line.split(":")[0] for line in makefile.splitlines() if "## " in line}
    named = {
        name
        for path in DOCUMENTS
        for name in re.findall(r"\bmake ([a-z-]+)$", "\n".join(blocks(path)), re.MULTILINE)
    }
    assert {"simulate", "test"} <= named <= targets


def test_the_example_experiment_is_valid(tmp_path: Path) -> None:
    example, _ = blocks(ROOT / "README.md", "toml")
    path = tmp_path / "mine.toml"
    path.write_text(example, encoding="utf-8")
    assert validate(Experiment, read_toml(path), where="README").federation.cohort == 16


def test_the_example_policy_is_valid(tmp_path: Path) -> None:
    _, example = blocks(ROOT / "README.md", "toml")
    path = tmp_path / "policy.toml"
    path.write_text(example.replace("…", "0" * 64, 1), encoding="utf-8")
    assert load_config(DevicePolicy, path).participations == 5


def test_the_federation_of_three_is_valid(tmp_path: Path) -> None:
    (example,) = blocks(OPERATING, "toml")
    path = tmp_path / "federation.toml"
    path.write_text(example, encoding="utf-8")
    tables = {**read_toml(path), "output": tmp_path, "roster": tmp_path / "roster.txt"}
    assert validate(FederationConfig, tables, where="OPERATING").users == 3


def test_every_metric_and_no_other_is_told() -> None:
    budget = Budget("banded-sqrt", 1e-6, 1.0, 2.0, 1.0, 2.0, 1)
    last = {"round": 1, "cohort": 1, "accepted": 1, "seconds": 1.0}
    few = Status("running", ("x",), online=1, planned_rounds=2, rounds=[last], budget=budget)
    full = replace(few, published=[{"number": 1}], certificate_days=300)
    told = re.findall(r"`(homefire_[a-z_]+)`", OPERATING.read_text(encoding="utf-8"))
    made = re.findall(r"^# TYPE (\S+) ", metrics(full).decode(), re.MULTILINE)
    assert set(told) == set(made)


def test_every_field_of_a_log_is_told() -> None:
    text = " ".join(OPERATING.read_text(encoding="utf-8").split())
    assert (
        f"one JSON object of {', '.join(f'`{name}`' for name in FIELDS)} and nothing else" in text
    )


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(document: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", document.read_text(encoding="utf-8"))
    for link in links:
        if not link.startswith("https://"):
            assert (document.parent / link).exists(), link
