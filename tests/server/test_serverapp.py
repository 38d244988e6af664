"""One run of the ServerApp, as a process."""

import io
from pathlib import Path
from typing import Any

import pytest

from homefire.server import serverapp


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What was done, in order."""
    done: list[Any] = []
    monkeypatch.setattr(serverapp, "end_with", lambda parent: done.append(("parent", parent)))
    monkeypatch.setattr(serverapp, "begin", lambda path, name: done.append(("log", path, name)))
    monkeypatch.setattr(serverapp, "run_serverapp", lambda **given: done.append(("run", given)))
    monkeypatch.setattr("sys.stdin", io.StringIO("the token\nand no more\n"))
    return done


def test_it_runs_with_the_token_of_its_input_and_ends_with_its_executor(
    ran: list[Any], tmp_path: Path
) -> None:
    (tmp_path / "ca.crt").write_bytes(b"an authority")
    options = ["--runtime", "127.0.0.1:9", "--parent", "7", "--log", str(tmp_path / "log")]
    serverapp.main([*options, "--root-certificates", str(tmp_path / "ca.crt")])
    (_, parent), (_, log, name), (_, given) = ran
    assert (parent, log, name) == (7, tmp_path / "log", "serverapp")
    del given["log_queue"]
    assert given == {
        "runtime_api_address": "127.0.0.1:9",
        "token": "the token",
        "insecure": False,
        "certificates": b"an authority",
        "runtime_dependency_install": False,
    }


def test_nothing_runs_without_a_parent_to_end_with(ran: list[Any]) -> None:
    with pytest.raises(SystemExit):
        serverapp.main(["--runtime", "127.0.0.1:9", "--log", "log"])
    assert not ran


def test_nothing_is_installed_whatever_the_run_asks_for(ran: list[Any], tmp_path: Path) -> None:
    serverapp.main(["--runtime", "x:1", "--parent", "7", "--log", str(tmp_path / "log")])
    given = ran[-1][1]
    assert given["runtime_dependency_install"] is False
    assert (given["insecure"], given["certificates"]) == (True, None)
