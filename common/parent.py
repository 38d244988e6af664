"""A process that ends with the one that started it, in whatever way that ended.

As a program, `python -m homefire.common.parent PARENT WHAT ARGUMENTS`, it runs a module, or a file
of Python, that ends so.
"""

import os
import runpy
import signal
import sys
import time
from pathlib import Path
from threading import Thread

LOOK_SECONDS = 0.5
GRACE_SECONDS = 5.0


def end_with(parent: int) -> None:
    """End this process as soon as it is no longer the child of `parent`.

    It is asked to end, and ends by force if it has not after a few seconds.

    Args:
        parent: The id of the process that started this one.

    Guarantees:
        No orphan: also where the parent was killed, or had ended before this was called; one that
            nobody has waited for counts as ended.
    """
    Thread(target=_watch, args=(parent,), daemon=True).start()


def ending(what: str | Path, *arguments: str) -> list[str]:
    """The command of a program in Python that ends with this process.

    Args:
        what: A module's name, or the path of a file.
        arguments: The program's.
    """
    return [sys.executable, "-m", __name__, str(os.getpid()), str(what), *arguments]


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(LOOK_SECONDS)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE_SECONDS)
    os._exit(1)


def main(parent: str, what: str, *arguments: str) -> None:
    """Be another program, and end with `parent`."""
    end_with(int(parent))
    sys.argv = [what, *arguments]
    if Path(what).is_file():
        runpy.run_path(what, run_name="__main__")
    else:
        runpy.run_module(what, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
