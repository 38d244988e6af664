"""The round loop's own line to the SuperLink, beside Flower's API."""

import logging
import ssl
import time
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Protocol

import httpx

from homefire.common.loopback import LOOPBACK

LOG = logging.getLogger(__name__)
RING_PATH = "/homefire/v1/ring"
ANSWERED_PATH = "/homefire/v1/answered"
WITHDRAW_PATH = "/homefire/v1/withdraw"
SECONDS = 10.0
LONGEST_PAUSE, LONGEST_PAUSE_WITH_LINE = 1.0, 0.3  # seconds
SWEEP_SECONDS = 15.0
SWEEP_SHARE = 10.0
"""Times as long as a sweep took, nothing is swept after it."""


class Line(Protocol):
    """What a SuperLink of ours can do besides Flower's API."""

    def ring(self, nodes: Iterable[int]) -> None:
        """Say that there are messages for nodes; those that wait for one get it at once."""

    def answered(self) -> frozenset[str] | None:
        """The messages whose answers wait, whole, to be fetched; None where that is not known."""

    def withdraw(self, messages: Collection[str]) -> int:
        """Take messages back that are not awaited any more; how many were answered, unfetched."""


class HttpLine:
    """The line to a SuperLink's private listener.

    It only saves time: where it is dead, devices and round loop find out in the slower way, and
    the SuperLink keeps what is not awaited any more until the run ends.

    Args:
        port: Of the listener, on this machine.
        authority: The file of the certificate that signs the SuperLink's.
        secret: The operator's.
    """

    def __init__(self, port: int, *, authority: Path, secret: str) -> None:
        self._client = httpx.Client(
            base_url=f"https://{LOOPBACK}:{port}",
            verify=ssl.create_default_context(cafile=str(authority)),
            headers={"authorization": f"Bearer {secret}"},
            timeout=SECONDS,
            trust_env=False,  # no proxy stands before this machine
        )

    def ring(self, nodes: Iterable[int]) -> None:
        """Say that there are messages for nodes."""
        try:
            self._client.post(RING_PATH, json={"nodes": list(nodes)}).raise_for_status()
        except httpx.HTTPError as error:
            LOG.warning("devices could not be woken: %s", error)

    def answered(self) -> frozenset[str] | None:
        """The messages whose answers wait, whole, to be fetched; None where that is not known."""
        try:
            answer = self._client.get(ANSWERED_PATH).raise_for_status()
            return frozenset(answer.json()["answered"])
        except (httpx.HTTPError, ValueError, KeyError) as error:
            LOG.warning("what is answered is not known: %s", error)
            return None

    def withdraw(self, messages: Collection[str]) -> int:
        """Take messages back that are not awaited any more; how many were answered, unfetched."""
        try:
            answer = self._client.post(WITHDRAW_PATH, json={"messages": list(messages)})
            return int(answer.raise_for_status().json()["late"])
        except (httpx.HTTPError, ValueError, KeyError) as error:
            LOG.warning("messages could not be taken back: %s", error)
            return 0


class Asking:
    """Which messages to ask a SuperLink about.

    Without a line each is asked about each time. With one, those that are answered are; all of them
    only now and then, for what the SuperLink says in a device's place: that it has gone.

    Args:
        line: None where there is none.
    """

    def __init__(self, line: Line | None) -> None:
        self._line = line
        self._swept = time.monotonic()
        self._sweeping = False

    @property
    def longest_pause(self) -> float:
        """Seconds between two looks where nothing has come for some time."""
        return LONGEST_PAUSE if self._line is None else LONGEST_PAUSE_WITH_LINE

    def worthwhile(self, waiting: Collection[str], begun: Collection[str]) -> list[str]:
        """Those of the messages to ask about now.

        Args:
            waiting: Not answered yet.
            begun: Whose answers are here in part.
        """
        now = time.monotonic()
        if self._sweeping:  # the sweep is over: it may cost a small share of the time
            self._sweeping = False
            self._swept = now + SWEEP_SHARE * (now - self._swept)
        if self._line is None or (known := self._line.answered()) is None:
            return list(waiting)
        if now - self._swept >= SWEEP_SECONDS:
            self._swept, self._sweeping = now, True
            return list(waiting)
        return [each for each in waiting if each in known or each in begun]
