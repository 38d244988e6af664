"""How much memory a device needs for what it does, with one base model.

Each verb is a process of its own, so that its peak is its own; all share one vault of made-up
records, and settings as a new vault has them but for the number of steps.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from homefire.client import Personalizer
from homefire.common.parent import ending

PASSPHRASE = "made for a measurement"  # noqa: S105 - of a vault that is thrown away
RECORDS = 200
VERBS = ("remember", "ask", "personalize", "personalize within the limit")
SETTINGS = """
[private.training]
steps = 4
batch_size = 4
max_tokens = {max_tokens}
"""


def measure(
    model: str, *, max_tokens: int, limit_mib: int, say: Callable[[str], None]
) -> dict[str, Any]:
    """Measure all verbs.

    Args:
        model: A base model.
        max_tokens: Of a record in training, and of the reply.
        limit_mib: What training may take besides the model, where it is limited.
        say: Told what begins.

    Raises:
        ModelError: There is no such model.
    """
    # Not above: a process that measures must load no more than its verb needs.
    from homefire.common.model_cache import locate
    from homefire.simulations.benchmarks.vault import made_up

    locate(model)
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder) / "home"
        with Personalizer.open(home, base_model=model, passphrase=PASSPHRASE) as me:
            me.vault.records.add(list(made_up(RECORDS)), "made up")
        with (home / "device.toml").open("a", encoding="utf-8") as settings:
            settings.write(SETTINGS.format(max_tokens=max_tokens))
        peaks = {}
        for verb in VERBS:
            say(verb)
            peaks[verb] = _in_process(verb, str(home), str(max_tokens), str(limit_mib))
    return {
        "model": Path(model).name,
        "cores": len(os.sched_getaffinity(0)),
        "max_tokens": max_tokens,
        "limit_mib": limit_mib,
        "peak_mib": peaks,
    }


def _in_process(*arguments: str) -> float:
    command = ending(__name__, *arguments)
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
    if done.returncode:
        raise RuntimeError(f"{arguments[0]} failed: {done.stderr[-2000:]}")
    return float(json.loads(done.stdout.splitlines()[-1]))


def peak_mib() -> float:
    """Of this process since it began."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM:"))


def main(verb: str, home: str, max_tokens: str, limit: str) -> None:
    """Do one thing; prints the peak of this process in MiB last."""
    with Personalizer.open(home, passphrase=PASSPHRASE) as me:
        if verb == "remember":
            me.remember("The train to Porto takes three hours")
        elif verb == "ask":
            str(me.ask("Where does the train go?", max_tokens=int(max_tokens)))
        else:
            limited = verb.endswith("limit")
            me.personalize(memory_limit=int(limit) if limited else None)
    print(json.dumps(peak_mib()))


if __name__ == "__main__":
    main(*sys.argv[1:])
