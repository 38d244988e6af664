"""The operator's own calls, at a SuperLink that says what a test wants."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from flwr.proto.control_pb2 import (
    ListNodesResponse,
    ListRunsResponse,
    StartRunResponse,
    StopRunResponse,
)
from tiny_operators import made_home

from homefire.common.errors import ConfigError, FederationError
from homefire.server import control as control_module
from homefire.server.control import FINISHED, UNKNOWN, Control
from homefire.server.operator_home import OPERATOR_SECRET, OperatorHome


@dataclass
class SuperLink:
    """Stands for Flower's client of the control API.

    Attributes:
        answers: What it gives for each call; an error is raised.
        calls: Which came, with what.
        asked: How each client was made.
        closed: How many clients were closed.
    """

    answers: dict[str, Any] = field(default_factory=dict)
    calls: list[tuple[str, Any]] = field(default_factory=list)
    asked: list[dict[str, Any]] = field(default_factory=list)
    closed: int = 0

    def from_server_address(self, address: str, **how: Any) -> Any:
        """A client."""
        self.asked.append({"address": address, **how})
        return self

    def close(self) -> None:
        """End a client."""
        self.closed += 1

    def __getattr__(self, name: str) -> Callable[[Any], Any]:
        def call(request: Any) -> Any:
            self.calls.append((name, request))
            answer = self.answers[name]
            if isinstance(answer, Exception):
                raise answer
            return answer

        return call


@pytest.fixture
def superlink(monkeypatch: pytest.MonkeyPatch) -> SuperLink:
    superlink = SuperLink()
    monkeypatch.setattr(control_module, "ControlHttpClient", superlink)
    return superlink


@pytest.fixture
def home(tmp_path: Path) -> OperatorHome:
    return made_home(tmp_path / "server")


@pytest.fixture
def control(home: OperatorHome) -> Control:
    return Control(home)


def runs(**states: tuple[str, str]) -> ListRunsResponse:
    answer = ListRunsResponse()
    for name, (status, how) in states.items():
        run = answer.run_dict[int(name.removeprefix("run"))]
        run.status.status, run.status.sub_status = status, how
    return answer


def test_a_run_is_of_this_folder_and_brings_no_code_of_ours(
    control: Control, superlink: SuperLink, home: OperatorHome
) -> None:
    superlink.answers["StartRun"] = StartRunResponse(run_id=7)
    assert control.start() == 7
    ((_, request),) = superlink.calls
    assert request.override_config["federation"].string == str(home.folder.absolute())
    assert b"run_federation" not in request.fab.content
    assert len(request.fab.content) < 4096


def test_a_run_that_flower_did_not_start_is_none(control: Control, superlink: SuperLink) -> None:
    superlink.answers["StartRun"] = StartRunResponse()
    with pytest.raises(FederationError, match="did not start"):
        control.start()


def test_every_call_goes_to_this_machine_by_tls_with_the_secret(
    control: Control, superlink: SuperLink, home: OperatorHome
) -> None:
    superlink.answers["StopRun"] = StopRunResponse()
    control.stop(3)
    (asked,) = superlink.asked
    assert asked["address"] == f"127.0.0.1:{home.config.private}"
    assert asked["insecure"] is False
    assert asked["root_certificates"] == home.certificates.authority.read_bytes()
    context: Any = SimpleNamespace(request=SimpleNamespace(headers={}))
    sent = asked["interceptors"][0].intercept(context, lambda each: each.request.headers)
    assert sent == {"authorization": f"Bearer {home.secret(OPERATOR_SECRET).read_text()}"}
    assert superlink.calls[0][1].run_id == 3
    assert superlink.closed == 1


def test_how_a_run_is(control: Control, superlink: SuperLink) -> None:
    superlink.answers["ListRuns"] = runs(
        run1=(FINISHED, "failed"), run2=("running", ""), run3=("pending", "")
    )
    assert control.status(1) == (FINISHED, "failed")
    assert control.status(2) == ("running", "")
    assert control.status(4) == (UNKNOWN, "")
    assert sorted(control.unfinished()) == [2, 3]


def test_nodes_are_counted_by_state(control: Control, superlink: SuperLink) -> None:
    answer = ListNodesResponse()
    for state in ("online", "offline", "online"):
        answer.nodes_info.add().status = state
    superlink.answers["ListNodes"] = answer
    assert control.nodes() == {"online": 2, "offline": 1}


@pytest.mark.parametrize("error", [httpx.ConnectError("to 10.0.0.7"), ValueError("no protobuf")])
@pytest.mark.parametrize("call", ["StartRun", "ListRuns", "StopRun", "ListNodes"])
def test_a_superlink_that_does_not_answer_is_one_error_in_constant_words(
    control: Control, superlink: SuperLink, call: str, error: Exception
) -> None:
    superlink.answers[call] = error
    asks: dict[str, Callable[[], object]] = {
        "StartRun": control.start,
        "ListRuns": control.unfinished,
        "StopRun": lambda: control.stop(1),
        "ListNodes": control.nodes,
    }
    with pytest.raises(FederationError, match="does not answer") as caught:
        asks[call]()
    assert "10.0.0.7" not in str(caught.value)
    assert "superlink.log" in caught.value.hint
    assert superlink.closed == 1


def test_where_nobody_listens_it_is_not_up(control: Control) -> None:
    assert not control.is_up()
    with pytest.raises(FederationError, match="does not answer"):
        control.door()


@pytest.mark.parametrize("call", [Control.is_up, Control.door, Control.nodes, Control.start])
def test_an_authority_that_is_gone_is_named(
    home: OperatorHome, call: Callable[[Control], Any]
) -> None:
    path = home.certificates.authority
    path.unlink()
    with pytest.raises(ConfigError, match=f"{path}: no certificate"):
        call(Control(home))
