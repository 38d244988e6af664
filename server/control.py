"""The operator's own calls to the SuperLink: start a run, stop it, see how it is.

They go to the private listener, with the operator's secret; see `homefire.server.superlink`.
"""

import json
import ssl
from dataclasses import dataclass
from typing import Any

import httpx
from flwr.cli.build import build_fab_from_files
from flwr.common.serde import user_config_to_proto
from flwr.proto.control_pb2 import (
    ListNodesRequest,
    ListRunsRequest,
    StartRunRequest,
    StopRunRequest,
)
from flwr.proto.fab_pb2 import Fab
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.protobuf.client import ProtobufCall, ProtobufRequestContext

from homefire import __version__
from homefire.common.errors import FederationError
from homefire.common.loopback import LOOPBACK
from homefire.server.operator_home import OPERATOR_SECRET, OperatorHome

FINISHED, FAILED, UNKNOWN = "finished", "failed", "unknown"
BUNDLE = {
    "pyproject.toml": f"""
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "homefire-operated"
version = "{__version__}"
description = "Runs the homefire that is installed on the server."
license = "Apache-2.0"
dependencies = []

[tool.flwr.app]
publisher = "homefire"

[tool.flwr.app.components]
serverapp = "homefire_operated:app"
clientapp = "homefire_operated:nothing"

[tool.flwr.app.config]
federation = ""
""".encode(),
    "homefire_operated.py": b'''"""The ServerApp of the homefire that is installed here."""

from flwr.clientapp import ClientApp

from homefire.server.app import app

nothing = ClientApp()
''',
}
"""What Flower wants to be given for a run. It holds no code of ours: what runs is what is
installed."""


@dataclass(frozen=True, slots=True)
class _Bearer:
    """Adds the operator's secret to a call."""

    secret: str

    def intercept(self, context: ProtobufRequestContext, call_next: ProtobufCall) -> httpx.Response:
        """Send it with the secret."""
        context.request.headers["authorization"] = f"Bearer {self.secret}"
        return call_next(context)


@dataclass(frozen=True, slots=True)
class Control:
    """Calls to one server's SuperLink.

    Every method raises FederationError where it does not answer, and ConfigError where the server's
    authority or the operator's secret cannot be read.

    Attributes:
        home: Of the server.
    """

    home: OperatorHome

    def start(self) -> int:
        """Start a run of the installed ServerApp; returns Flower's number of it."""
        content, _ = build_fab_from_files(BUNDLE)
        settings = user_config_to_proto({"federation": str(self.home.folder.absolute())})
        request = StartRunRequest(fab=Fab(content=content), override_config=settings)
        run = int(self._call("StartRun", request).run_id)
        if run == 0:
            raise FederationError("Flower did not start the run; its log says why")
        return run

    def status(self, run: int) -> tuple[str, str]:
        """A run's state and how it ended, such as ("finished", "completed"); "unknown" of none."""
        # All of them: for one that it does not know, Flower answers with an error.
        found = self._call("ListRuns", ListRunsRequest()).run_dict.get(run)
        if found is None:
            return UNKNOWN, ""
        return str(found.status.status), str(found.status.sub_status)

    def unfinished(self) -> list[int]:
        """Runs that have not ended, as Flower sees it: also those whose processes were killed."""
        found = self._call("ListRuns", ListRunsRequest()).run_dict
        return [run for run, each in found.items() if each.status.status != FINISHED]

    def stop(self, run: int) -> None:
        """End a run; the round that it is in is burnt."""
        self._call("StopRun", StopRunRequest(run_id=run))

    def nodes(self) -> dict[str, int]:
        """How many nodes there are by state, such as {"online": 3}."""
        found = self._call("ListNodes", ListNodesRequest()).nodes_info
        counts: dict[str, int] = {}
        for node in found:
            counts[str(node.status)] = counts.get(str(node.status), 0) + 1
        return counts

    def door(self) -> dict[str, Any]:
        """What the public listener let in and refused."""
        try:
            answer = httpx.get(
                f"https://{self._address}/homefire/v1/door",
                verify=ssl.create_default_context(cadata=self.home.certificates.read_authority()),
                timeout=5,
                trust_env=False,  # no proxy stands before this machine
            )
            return _told_by_door(answer.raise_for_status().content)
        except (httpx.HTTPError, ValueError, RecursionError) as error:
            raise _silent(error) from error

    def is_up(self) -> bool:
        """Whether the SuperLink answers."""
        try:
            self.door()
        except FederationError:
            return False
        return True

    @property
    def _address(self) -> str:
        return f"{LOOPBACK}:{self.home.config.private}"

    def _call(self, name: str, request: Any) -> Any:
        secret = self.home.read_secret(OPERATOR_SECRET)
        client = ControlHttpClient.from_server_address(
            self._address,
            insecure=False,
            root_certificates=self.home.certificates.read_authority().encode(),
            interceptors=[_Bearer(secret)],
        )
        try:
            return getattr(client, name)(request)
        except (httpx.HTTPError, ValueError) as error:
            raise _silent(error) from error
        finally:
            client.close()


def _told_by_door(content: bytes) -> dict[str, Any]:
    """How many requests were served, and how many refused by reason.

    Raises:
        ValueError: Something else stands there; or RecursionError.
    """
    found = json.loads(content)
    if not isinstance(found, dict) or not isinstance(refused := found.get("refused"), dict):
        raise ValueError("no counts")
    counts = [found.get("served"), *refused.values()]
    if any(type(count) is not int or count < 0 for count in counts):
        raise ValueError("no counts")
    return {"served": found["served"], "refused": refused}


def _silent(error: Exception) -> FederationError:
    return FederationError(
        f"the SuperLink does not answer ({type(error).__name__})",
        hint="See logs/superlink.log in the server's folder.",
    )
