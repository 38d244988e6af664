"""What a device does without its model is done without the libraries that models need."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_vaults import PASSPHRASE

HEAVY = {"torch", "transformers", "peft", "ray", "plotly", "dp_accounting", "opacus"}

MEMORY_ALONE = """
import json, sys
from homefire.client import Personalizer
with Personalizer.open(sys.argv[1]) as me:
    number = me.remember("The train to Porto takes three hours")
    me.set_fact("name", "Ann")
    found = [me.search("Porto")[0].id == number, me.profile().facts, me.status().records]
    me.export(sys.argv[1] + "/takeout.zip")
    me.forget(ids=[number])
    print(json.dumps([found, len(me.vault.records), sorted(sys.modules)]))
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("light") / "home"
    run("-m", "homefire", "device", "init", "--protection", "passphrase", home=folder)
    return folder


def run(*command: str, home: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(  # noqa: S603 - our own command
        [sys.executable, *command],
        env={**os.environ, "HOMEFIRE_PASSPHRASE": PASSPHRASE, "HOMEFIRE_HOME": str(home)},
        capture_output=True,
        text=True,
        check=True,
    )


def test_memory_alone_needs_no_torch(tmp_path: Path) -> None:
    home = tmp_path / "home"
    told = run("-c", MEMORY_ALONE, str(home), home=home)
    found, left, loaded = json.loads(told.stdout)
    assert found == [True, {"name": "Ann"}, 1]
    assert left == 0
    assert HEAVY & set(loaded) == set()


@pytest.mark.parametrize("verb", [["remember", "hello"], ["status"], ["forget", "--id", "1"]])
def test_these_verbs_need_no_torch(home: Path, verb: list[str]) -> None:
    told = run("-X", "importtime", "-m", "homefire", "device", *verb, home=home)
    loaded = {line.split("|")[-1].strip() for line in told.stderr.splitlines()}
    assert "homefire.client.vault" in loaded
    assert HEAVY & loaded == set()
