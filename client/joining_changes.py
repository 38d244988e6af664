"""What becomes of a connection to a federation, in constant words.

Flower's log quotes addresses, certificates and exceptions. Of it, only these words go on.
"""

from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

from homefire.common.ticket import CLOCK_SIGN

State = Literal["waiting", "connecting", "connected", "disconnected", "ended"]


class Trouble(StrEnum):
    """Why a device is not connected."""

    NO_ANSWER = "nobody answers there"
    NO_HOST = "there is no host of that name"
    NO_WAY = "no network leads there"
    BROKEN_OFF = "the connection breaks off"
    NO_TLS = "what answers there does not speak TLS"
    CERTIFICATE = "the certificate there is not trusted"
    OTHER_NAME = "the certificate there is for another name"
    KEY_NEEDED = "only registered devices are let in there"
    NOT_ADMITTED = "the device is not registered there, or counts as connected already"
    FORGOTTEN = "the device is not known there any more"
    CLOCK = "the clocks of this device and of the server differ"
    NO_KEY = "the device's key is not one that Flower reads"
    OTHER_VERSION = "another version of homefire or of Flower answers there"
    EXECUTOR = "the process that trains has ended"
    OTHER = "the process that is connected has ended"

    @property
    def hint(self) -> str:
        """What can be done about it."""
        return _HINTS[self]


_HINTS = {
    Trouble.NO_ANSWER: "Check host and port, and whether the SuperLink runs.",
    Trouble.NO_HOST: "Check the spelling, and the network.",
    Trouble.NO_WAY: "Check the network.",
    Trouble.BROKEN_OFF: "If TLS is spoken there, leave --insecure out.",
    Trouble.NO_TLS: "Check the port.",
    Trouble.CERTIFICATE: "Get the authority's file from the operator for --root-certificates.",
    Trouble.OTHER_NAME: "Use the host's name as it stands in the certificate.",
    Trouble.KEY_NEEDED: "Let the operator register a key, and give it with --node-key.",
    Trouble.NOT_ADMITTED: "After two minutes it is the former: let the operator register its key.",
    Trouble.FORGOTTEN: "If it goes on, ask the operator: it may have been removed.",
    Trouble.CLOCK: "Set this device's clock; it may be 5 s ahead, or 5 minutes behind, at most.",
    Trouble.NO_KEY: "It takes an elliptic-curve key of OpenSSH: ssh-keygen -t ecdsa.",
    Trouble.OTHER_VERSION: "Ask the operator which version of homefire fits.",
    Trouble.EXECUTOR: "join.log in the vault's folder says more; it may lack memory.",
    Trouble.OTHER: "join.log in the vault's folder says more.",
}

_SIGNS = (
    (CLOCK_SIGN, Trouble.CLOCK),
    ("[code: 2001]", Trouble.KEY_NEEDED),
    ("[code: 2004]", Trouble.NOT_ADMITTED),
    ("exit code: 302", Trouble.NO_KEY),
    ("exit code: 606", Trouble.OTHER_VERSION),
    ("426 upgrade required", Trouble.OTHER_VERSION),
    ("hostname mismatch", Trouble.OTHER_NAME),
    ("ip address mismatch", Trouble.OTHER_NAME),
    ("certificate", Trouble.CERTIFICATE),
    ("wrong_version_number", Trouble.NO_TLS),
    ("record layer failure", Trouble.NO_TLS),
    ("name or service not known", Trouble.NO_HOST),
    ("name resolution", Trouble.NO_HOST),
    ("no address associated", Trouble.NO_HOST),
    ("nodename nor servname", Trouble.NO_HOST),
    ("refused", Trouble.NO_ANSWER),
    ("timed out", Trouble.NO_ANSWER),
    ("unreachable", Trouble.NO_WAY),
    ("no route", Trouble.NO_WAY),
    ("disconnected", Trouble.BROKEN_OFF),
    ("reset by peer", Trouble.BROKEN_OFF),
)


def trouble_of(said: str) -> Trouble:
    """What is wrong, by the words of Flower or of an exception."""
    lower = said.lower()
    return next((trouble for sign, trouble in _SIGNS if sign in lower), Trouble.OTHER)


@dataclass(frozen=True, slots=True)
class Change:
    """Something that has changed between a device and a federation.

    Attributes:
        state: "waiting" for its conditions, "connecting", "connected", "disconnected" and trying
            again, or "ended": nothing of it runs any more.
        trouble: Why, where something is wrong.
        seconds: After which it is tried again.
    """

    state: State
    trouble: Trouble | None = None
    seconds: float | None = None

    def __str__(self) -> str:
        """One line for the person."""
        line = _LINES[self.state]
        if self.trouble is not None:
            line += f": {self.trouble}"
        if self.seconds is not None:
            line += f"; trying again in {max(self.seconds, 1):.0f} s"
        return f"{line}."


_LINES: dict[State, str] = {
    "waiting": "Waiting until the conditions hold",
    "connecting": "Connecting",
    "connected": "Connected: this device takes part",
    "disconnected": "Not connected",
    "ended": "Not taking part any more",
}
