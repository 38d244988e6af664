"""A process that ends with the one that started it, in whatever way that ended."""

import os
import signal
import time
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


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(LOOK_SECONDS)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE_SECONDS)
    os._exit(1)
