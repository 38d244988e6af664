"""What the wheel holds, and which folder may import which."""

import ast
import json
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("client", "common", "server", "simulations")
MAY_IMPORT = {
    "client": {"client", "common"},
    "common": {"common"},
    "server": {"server", "common"},
    "simulations": set(FOLDERS),
}
PICKLES = {"cloudpickle", "dill", "joblib", "marshal", "pickle", "shelve"}
NOT_FOR_DEVICES = (
    "datasets",
    "dp_accounting",
    "gguf",
    "opacus",
    "plotly",
    "ray",
    "rouge_score",
    "tomli_w",
)


def sources(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def imports(tree: ast.AST) -> Iterator[str]:
    """Dotted names of everything that a module imports, wherever the statement stands."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            origin = "." * node.level + (node.module or "")
            yield from (f"{origin}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(
            ("import_module", "__import__")
        ):
            yield ast.unparse(node)


def forbidden(tree: ast.AST, *, allowed: set[str]) -> list[str]:
    """Imports that cross the arrows: relative, dynamic, bare, or of another folder."""
    wrong = []
    for name in imports(tree):
        top, _, rest = name.partition(".")
        crosses = top == "homefire" and rest.partition(".")[0] in set(FOLDERS) - allowed
        if crosses or top in FOLDERS or name.startswith(".") or "(" in name:
            wrong.append(name)
    return wrong


def pickling(tree: ast.AST) -> list[str]:
    """Imports of pickle and its kin, `torch.load`, `torch.save`, `allow_pickle`."""
    found = [name for name in imports(tree) if name.partition(".")[0] in PICKLES]
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and ast.unparse(node) in ("torch.load", "torch.save"):
            found.append(ast.unparse(node))
        if isinstance(node, ast.keyword) and node.arg == "allow_pickle":
            found.append("allow_pickle")
    return [*found, *(name for name in imports(tree) if name in ("torch.load", "torch.save"))]


def test_every_package_is_listed() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    found = {"homefire"} | {
        "homefire." + ".".join(init.parent.relative_to(ROOT).parts)
        for folder in FOLDERS
        for init in (ROOT / folder).rglob("__init__.py")
    }
    assert len(listed) == len(set(listed))
    assert set(listed) == found


def test_every_module_lies_in_a_package() -> None:
    assert [p for p in sources(*FOLDERS) if not (p.parent / "__init__.py").is_file()] == []


@pytest.mark.parametrize("folder", FOLDERS)
def test_imports_follow_the_arrows(folder: str) -> None:
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in sources(folder)}
    assert trees
    wrong = {p.name: forbidden(tree, allowed=MAY_IMPORT[folder]) for p, tree in trees.items()}
    assert {name: found for name, found in wrong.items() if found} == {}


def test_nothing_but_the_command_line_stands_above_the_folders() -> None:
    names = {path.name for path in sources("homefire")}
    commands = {
        "options.py",
        "bench_commands.py",
        "device_commands.py",
        "device_network_commands.py",
        "device_session.py",
        "server_commands.py",
        "server_report_commands.py",
        "server_session.py",
    }
    commands |= {"privacy_commands.py", "privacy_experiments.py"}
    assert names == {"__init__.py", "__main__.py"} | commands
    tree = ast.parse((ROOT / "homefire" / "__init__.py").read_text(encoding="utf-8"))
    assert forbidden(tree, allowed=set()) == []


@pytest.mark.parametrize(
    "source",
    [
        "from homefire.server import planning",
        "from homefire import simulations",
        "import homefire.simulations.grid as grid",
        "def f():\n    from homefire.server.app import app",
        "import server",
        "from common import errors",
        "from . import errors",
        "import importlib\nimportlib.import_module('homefire.server')",
    ],
)
def test_a_wrong_import_is_seen(source: str) -> None:
    assert forbidden(ast.parse(source), allowed=MAY_IMPORT["client"])


@pytest.mark.parametrize("source", ["from homefire.common import files", "import homefire.client"])
def test_a_right_import_is_let_through(source: str) -> None:
    assert forbidden(ast.parse(source), allowed=MAY_IMPORT["client"]) == []


def test_nothing_is_pickled() -> None:
    found = {p: pickling(ast.parse(p.read_text("utf-8"))) for p in sources("homefire", *FOLDERS)}
    # An adversary writes a pickle, to see that nobody loads it.
    hostile = {"malformed.py": ["allow_pickle"]}
    assert {path.name: names for path, names in found.items() if names} == hostile


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from joblib import load",
        "import torch\ntorch.load('f')",
        "from torch import load",
        "import numpy as np\nnp.load('f', allow_pickle=True)",
    ],
)
def test_pickling_is_seen(source: str) -> None:
    assert pickling(ast.parse(source))


def test_no_folder_is_imported_under_its_bare_name() -> None:
    assert not set(FOLDERS) & set(sys.modules)


def test_a_device_needs_neither_ray_nor_plots_nor_an_accountant() -> None:
    code = (
        "import json, pkgutil, sys, importlib, homefire.client.app, homefire.common\n"
        "for package in (homefire.client, homefire.common):\n"
        "    for module in pkgutil.walk_packages(package.__path__, package.__name__ + '.'):\n"
        "        importlib.import_module(module.name)\n"
        "print(json.dumps(sorted(sys.modules)))"
    )
    result = subprocess.run(  # noqa: S603 - our own command
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    loaded = set(json.loads(result.stdout.splitlines()[-1]))
    assert "homefire.common.privacy.mechanism" in loaded
    loaded -= {"tomli_w"}  # Flower's own executor imports it
    assert loaded & {*NOT_FOR_DEVICES, *FOLDERS} == set()
    assert not any(name.startswith(("homefire.server", "homefire.simulations")) for name in loaded)


def test_a_run_configuration_names_the_federation_file_and_nothing_else() -> None:
    """`flwr run --run-config` can change what is declared here; nothing of it weakens privacy."""
    flower = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["flwr"]["app"]
    assert flower["config"] == {"federation": ""}


def test_extras_bring_what_their_commands_need_and_a_device_needs_none() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = {
        extra: {re.split(r"[\[<>=]", requirement)[0] for requirement in requirements}
        for extra, requirements in project["optional-dependencies"].items()
    }
    assert names["server"] == {"dp-accounting", "grpcio-health-checking", "prometheus-client"}
    assert names["example-dp"] == {"opacus"}
    assert names["gguf"] == {"gguf"}
    device = {re.split(r"[\[<>=]", requirement)[0] for requirement in project["dependencies"]}
    assert device & {name.replace("_", "-") for name in NOT_FOR_DEVICES} == set()
    for extra in ("server", "example-dp", "gguf"):
        assert device & names[extra] == set()


def test_a_simulation_brings_everything_that_the_other_extras_bring() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (whole,) = (
        requirement
        for requirement in extras["optional-dependencies"]["simulation"]
        if requirement.startswith("homefire[")
    )
    others = set(extras["optional-dependencies"]) - {"bench", "dev", "simulation"}
    assert set(whole.removeprefix("homefire[").removesuffix("]").split(",")) == others


@pytest.mark.slow
def test_flowers_bundle_holds_code_and_nothing_else(tmp_path: Path) -> None:
    """What `flwr run` sends to the SuperLink and to every device."""
    program = Path(sys.executable).with_name("flwr")
    environment = {
        **os.environ,
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_HOME": str(tmp_path / "flwr"),
    }
    subprocess.run(  # noqa: S603 - our own command
        [program, "build", "--app", ROOT], cwd=tmp_path, env=environment, check=True
    )
    (bundle,) = tmp_path.glob("*.fab")
    with zipfile.ZipFile(bundle) as archive:
        names = set(archive.namelist())
    code = {str(p.relative_to(ROOT)) for p in sources("homefire", "client", "common", "server")}
    assert names == code | {"pyproject.toml", "LICENSE", ".info/CONTENT"}
