"""Flower's executor for the ServerApp, ended with the process that started it.

It runs as a program: `python -m homefire.server.executor --parent PID FLOWER'S OPTIONS`.
"""

import argparse
import sys

from flwr.supercore.cli.flower_superexec import flower_superexec

from homefire.common.parent import end_with


def main(arguments: list[str]) -> None:
    """Run it until it, or the process that started it, ends."""
    parser = argparse.ArgumentParser(prog="homefire.server.executor")
    parser.add_argument("--parent", required=True, type=int, help="ends with this process")
    given, rest = parser.parse_known_args(arguments)
    end_with(given.parent)
    sys.argv = ["flower-superexec", *rest]
    flower_superexec()


if __name__ == "__main__":
    main(sys.argv[1:])
