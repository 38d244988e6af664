"""Enrolling this device with a server: a ticket is redeemed, and kept in the vault is what it says.

Afterwards `join` needs no address, and the server's key stands in the policy: nothing is
contributed before, and nothing to anybody else.
"""

import http.client
import json
import os
import re
import ssl
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from homefire.client.joining import Link
from homefire.client.trust import may_trust, trust
from homefire.client.tunnel import connection_to
from homefire.client.vault import Vault
from homefire.client.vault_files import POLICY
from homefire.common.address import split_address
from homefire.common.config import load_config
from homefire.common.errors import ConfigError, EnrolmentError
from homefire.common.files import write_atomically
from homefire.common.policy import DevicePolicy
from homefire.common.printable import printable
from homefire.common.protocol import VERSION
from homefire.common.signatures import check_public_key, public_key, sign
from homefire.common.ticket import ENROL_PATH, ENROLMENT, Ticket, signed_parts

SETTING, NODE_KEYS = "enrolment", "node_keys"
TIMEOUT_SECONDS = 30.0
LARGEST_ANSWER = 1 << 16
_NO_KEYS = re.compile(r"^server_keys[ \t]*=[ \t]*\[\s*\]", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Enrolled:
    """What a vault knows of the server that its device is enrolled with.

    Attributes:
        superlink: host:port.
        registry: host:port; None where there is none.
        authority: The certificate that signs the server's, PEM.
        server_key: 64 hex digits.
        node_key: The private key of this device's node, OpenSSH.
    """

    superlink: str
    registry: str | None
    authority: str
    server_key: str
    node_key: str


def enroll(vault: Vault, text: str) -> Enrolled:
    """Redeem a ticket.

    Args:
        vault: Of the person.
        text: The ticket.

    Guarantees:
        Its server alone: the ticket's secret goes to nobody but the server that the ticket's
            authority vouches for.
        Again is the same: a ticket whose answer was lost on the way can be redeemed again, whatever
            other servers were asked meanwhile; and a device that is enrolled gets the server's new
            address by another ticket of it.
        Nothing lost: where a ticket is refused, the enrolment before stays.

    Raises:
        ConfigError: No ticket, no proxy that can be used, or the policy file has keys already, or
            is none, and is left alone; the ticket stays good then.
        EnrolmentError: The server refuses it, cannot be reached, or is another one.
    """
    ticket = Ticket.read(text)
    check_public_key(ticket.server_key)
    if ticket.registry is not None:
        may_trust(vault, ticket.server_key)  # before anything is changed or asked
    policy = vault.folder / POLICY
    _allowing(policy, ticket.server_key)  # likewise
    wanted = _wanted(ticket, _node_key(vault, ticket.server_key))
    key = serialization.load_ssh_private_key(wanted.node_key.encode(), None)
    node = key.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    signed = signed_parts(ticket.secret, node.decode())
    answer = _ask(
        ticket,
        {
            "version": VERSION,
            "secret": ticket.secret,
            "identity": public_key(vault.identity),
            "node_key": node.decode(),
            "signature": sign(vault.identity, ENROLMENT, *signed).hex(),
        },
    )
    if answer.get("version") != VERSION:
        raise EnrolmentError(
            f"the server speaks another version of the protocol than this device ({VERSION})",
            hint="Update the older side.",
        )
    if answer.get("server_key") != ticket.server_key:
        raise EnrolmentError(
            "the server signs with another key than the ticket says", hint="Ask the operator."
        )
    write_atomically(policy, _allowing(policy, ticket.server_key).encode(), mode=0o600)
    if ticket.registry is not None:
        authority = ticket.authority.encode()
        trust(vault, ticket.server_key, ticket.registry, root_certificates=authority)
    vault.set(SETTING, asdict(wanted))
    return wanted


def enrolled_with(vault: Vault) -> Enrolled | None:
    """The server that this device is enrolled with; None before."""
    found = vault.setting(SETTING)
    return Enrolled(**found) if found else None


def _wanted(ticket: Ticket, node_key: str) -> Enrolled:
    where = (ticket.superlink, ticket.registry, ticket.authority, ticket.server_key)
    return Enrolled(*where, node_key)


def _node_key(vault: Vault, server_key: str) -> str:
    """What this device's node shows to a server, the same each time; another one to each."""
    keys: dict[str, str] = vault.setting(NODE_KEYS, {})
    if server_key not in keys:
        key = ec.generate_private_key(ec.SECP384R1())
        private = key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.OpenSSH,
            serialization.NoEncryption(),
        )
        keys[server_key] = private.decode()
        vault.set(NODE_KEYS, keys)  # before it is shown: the answer may be lost
    return keys[server_key]


def _ask(ticket: Ticket, wanted: dict[str, str | int]) -> dict[str, Any]:
    host, port = split_address(ticket.superlink)
    context = ssl.create_default_context(cadata=ticket.authority)
    connection = connection_to(host, port, context=context, seconds=TIMEOUT_SECONDS)
    try:
        body = json.dumps(wanted)
        connection.request("POST", ENROL_PATH, body, {"content-type": "application/json"})
        with connection.getresponse() as answer:
            found = json.loads(answer.read(LARGEST_ANSWER))
        if not isinstance(found, dict):
            raise ValueError("no object")
    except ssl.SSLCertVerificationError as error:
        raise EnrolmentError(
            f"{ticket.superlink} is not the server that the ticket is for ({error.verify_message})",
            hint="Check this machine's clock and network; ask the operator.",
        ) from error
    except (OSError, http.client.HTTPException, ValueError, RecursionError) as error:
        raise EnrolmentError(
            f"{ticket.superlink} cannot be reached ({error})",
            hint="Check the network; the ticket can be redeemed later.",
        ) from error
    finally:
        connection.close()
    if answer.status != http.client.OK:
        raise EnrolmentError(
            f"the server refuses: {_said(found.get('error'))}",
            hint=_said(found.get("hint", "")),
        )
    return found


def _said(said: object) -> str:
    return printable(str(said)[:200], instead="")


def _allowing(path: Path, server_key: str) -> str:
    """The text of a policy that trusts this server, of one that does or trusts nobody.

    Raises:
        ConfigError: It is no policy, trusts others alone, or is written so that it takes a person.
    """
    if not path.exists():
        return f'server_keys = ["{server_key}"]\n'
    trusted = load_config(DevicePolicy, path).server_keys
    text = path.read_text(encoding="utf-8")
    if server_key in trusted:
        return text
    hint = f'Add "{server_key}" to server_keys yourself, and enrol again.'
    if trusted:
        raise ConfigError(f"{path} trusts another server already", hint=hint)
    line = f'server_keys = ["{server_key}"]'
    changed, count = _NO_KEYS.subn(line, text, count=1)
    if not count:
        changed = f"{line}\n{text}"
    try:
        right = tomllib.loads(changed) == {**tomllib.loads(text), "server_keys": [server_key]}
    except tomllib.TOMLDecodeError:
        right = False
    if not right:
        raise ConfigError(f"{path}: it is not clear where its server_keys stand", hint=hint)
    return changed


@contextmanager
def link_to(enrolled: Enrolled) -> Iterator[Link]:
    """How the server is reached, while the block lasts; key and certificate lie in memory alone."""
    with _in_memory(enrolled.authority) as authority, _in_memory(enrolled.node_key) as node_key:
        yield Link(enrolled.superlink, authority, node_key=node_key)


@contextmanager
def _in_memory(text: str) -> Iterator[Path]:
    """A file that is on no disk, and gone with this process; its children read it by this path."""
    descriptor = os.memfd_create("homefire")
    try:
        os.write(descriptor, text.encode())
        yield Path(f"/proc/{os.getpid()}/fd/{descriptor}")
    finally:
        os.close(descriptor)
