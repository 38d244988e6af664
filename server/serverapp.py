"""One run of the ServerApp, as a process that ends with its executor.

It runs as a program: `python -m homefire.server.serverapp --runtime HOST:PORT --parent PID`; the
task's token is the first line of its standard input. What it prints goes to nobody; what it logs is
bounded by `homefire.server.logs`.

It uses inner parts of flwr 1.41, which is therefore pinned in `pyproject.toml`.
"""

import argparse
import sys
from pathlib import Path
from queue import Queue

from flwr.superlink.runtime import run_serverapp

from homefire.common.parent import end_with
from homefire.server.logs import begin


def main(arguments: list[str]) -> None:
    """Run it from start to end."""
    parser = argparse.ArgumentParser(prog="homefire.server.serverapp")
    parser.add_argument("--runtime", required=True, help="the SuperLink's private address")
    parser.add_argument("--root-certificates", type=Path, help="the authority behind it")
    parser.add_argument("--parent", required=True, type=int, help="ends with this process")
    parser.add_argument("--log", required=True, type=Path, help="the file to log into")
    given = parser.parse_args(arguments)
    end_with(given.parent)
    token = sys.stdin.readline().strip()
    begin(given.log, "serverapp")
    authority = given.root_certificates
    run_serverapp(
        runtime_api_address=given.runtime,
        log_queue=Queue(),
        token=token,
        insecure=authority is None,
        certificates=None if authority is None else authority.read_bytes(),
        runtime_dependency_install=False,
    )


if __name__ == "__main__":
    main(sys.argv[1:])
