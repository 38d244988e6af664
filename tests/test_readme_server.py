"""The README's federation, as it is printed, on a tiny model and on free ports."""

import os
import re
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from tiny_flower import ENVIRONMENT

from homefire.common.keystore import Keystore
from homefire.common.loopback import free_ports
from homefire.server.operator_home import OperatorHome
from homefire.server.registry import open_home
from homefire.server.round_log import read_rounds
from homefire.server.run_ledger import RunLedger
from homefire.server.run_state import LEDGER

ROOT = Path(__file__).resolve().parent.parent
MOST_SECONDS = 400  # on busy cores

pytestmark = pytest.mark.slow


def script() -> str:
    """The README's only bash block."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^```bash\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return str(block)


def shortened(model: Path) -> str:
    """The script with a tiny model and ports that are free; nothing else is changed."""
    fleet, registry, private, operator = free_ports(4)
    found = script().replace("smollm2-135m", str(model))
    own = f"--private {private} --operator {operator}"
    found = found.replace("homefire server init", f"homefire server init {own}")
    return found.replace("9092", str(fleet)).replace("9093", str(registry))


def test_the_readmes_federation_runs_from_nothing_to_a_verified_release(
    tmp_path: Path, tiny_llama: Path
) -> None:
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "homefire").write_text(f'#!/bin/sh\nexec {sys.executable} -m homefire "$@"\n')
    (programs / "homefire").chmod(0o755)
    state = tmp_path / "state"
    environment = {
        **os.environ,
        **ENVIRONMENT,
        "PATH": f"{programs}{os.pathsep}{ENVIRONMENT['PATH']}",
        "XDG_STATE_HOME": str(state),
        "COLUMNS": "120",
    }
    process = subprocess.Popen(  # noqa: S603 - the README's own
        ["/bin/bash", "-c", shortened(tiny_llama)],
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        said, _ = process.communicate(timeout=MOST_SECONDS)
    except subprocess.TimeoutExpired:
        said = "it took too long"
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        process.wait()
    demo = tmp_path / "demo"
    logs = "\n".join(f"{p.name}:\n{p.read_text()[-1500:]}" for p in sorted(demo.glob("*.log")))
    assert process.returncode == 0, f"{said[-3000:]}\n{logs}"
    assert "In place: release 3: round 3" in said
    assert "ε = 4.00 at δ = 1e-06" in said

    home = OperatorHome(demo / "server")
    rounds = read_rounds(home.output / "rounds.jsonl")
    assert [(each["accepted"], each["dropped"], each["refused"]) for each in rounds] == [
        (1, {}, {})
    ] * 3, logs
    ledger = RunLedger.open(home.output / LEDGER, Keystore.beside(home.output))
    ledger.ledger.close()
    assert (ledger.opened, ledger.burnt, ledger.ended) == (3, [], True)
    published = [each.statement.round for each in open_home(home.folder).releases]
    assert published == [1, 2, 3]
    assert (demo / "shared-adapter" / "adapter_model.safetensors").exists()
