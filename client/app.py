"""The Flower ClientApp: decode, call the device, encode.

A device takes nothing from the server's run configuration. Its home folder is named by the node's
own configuration (`--node-config 'home="…"'`) or by the environment variable `HOMEFIRE_HOME`. It is
a person's vault, opened by the system's keystore or by `HOMEFIRE_PASSPHRASE`; or the folder of a
simulation, which may hold many users: then the node's `partition-id` says which one this is.
"""

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from traceback import format_tb

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from homefire.client.device import Device, Task
from homefire.client.home import Home
from homefire.client.vault import Vault, open_vault
from homefire.client.vault_files import KEYS
from homefire.client.vault_home import VaultHome
from homefire.client.vault_opening import KnownKeys
from homefire.common.errors import (
    ConfigError,
    DataError,
    DeviceError,
    HomefireError,
    ProtocolError,
    SignatureError,
)
from homefire.common.plan import RoundPlan
from homefire.common.privacy.clipping import Clipped
from homefire.common.protocol import (
    ACTION,
    Refusal,
    decode_plan,
    encode_contribution,
    encode_refusal,
)

app = ClientApp()
LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Admitted:
    """A message whose plan was admitted and charged, and what is left to do for it."""

    message: Message
    node: int
    device: Device
    task: Task

    def answer(self, clipped: Clipped) -> Message:
        """The signed contribution.

        Raises:
            DeviceError: As `contribute`.
        """
        with constant_error():
            return _contribution(self.message, self.node, self.device, self.task.plan, clipped)


@app.train(ACTION)
def contribute(message: Message, context: Context) -> Message:
    """Answer a round plan with a contribution or a refusal.

    Guarantees:
        No words: whatever goes wrong here, the server gets the same constant error, and not even
            the device's log quotes the user.

    Raises:
        DeviceError: Always with the same text.
    """
    answer = _handle(message, context, Device.answer)
    return answer if isinstance(answer, Message) else answer.answer(answer.task.train())


def admit(message: Message, context: Context) -> Message | Admitted:
    """All that comes before training: what is admitted is charged.

    Returns:
        The answer, where nothing is left to be trained: a refusal, or zeros.

    Raises:
        DeviceError: As `contribute`.
    """
    return _handle(message, context, Device.admit)


def _handle(
    message: Message, context: Context, ask: Callable[[Device, RoundPlan], Task | Clipped | Refusal]
) -> Message | Admitted:
    try:
        plan = decode_plan(message.content)
    except SignatureError as error:
        refusal = Refusal(reason="bad signature", detail=str(error)[:500])
        return Message(encode_refusal(refusal), reply_to=message)
    except ProtocolError as error:
        refusal = Refusal(reason="malformed plan", detail=str(error)[:500])
        return Message(encode_refusal(refusal), reply_to=message)
    with constant_error():
        device = open_device(context)
        found = ask(device, plan)
        if isinstance(found, Task):
            return Admitted(message, context.node_id, device, found)
        if isinstance(found, Clipped):
            return _contribution(message, context.node_id, device, plan, found)
        return Message(encode_refusal(found), reply_to=message)


def _contribution(
    message: Message, node: int, device: Device, plan: RoundPlan, clipped: Clipped
) -> Message:
    """Signed for this device's own node: the envelope of a message may name another one."""
    key = device.home.identity(device.user.user_id)
    return Message(encode_contribution(plan, clipped, node=node, key=key), reply_to=message)


@contextmanager
def constant_error(but: Callable[[Exception], bool] = lambda error: False) -> Iterator[None]:
    """Whatever it was that went wrong, the server gets the same words.

    Args:
        but: What is passed on as it is, for it is no device's.

    Raises:
        DeviceError: Always with the same text.
    """
    try:
        yield
    except Exception as error:
        if but(error):
            raise
        # Flower would send the error's own words to the server, and log those of its causes.
        _log_failure(error)
        raise DeviceError("the device could not answer; its own log says why") from None


def _log_failure(error: Exception) -> None:
    """Say why and where in the device's log; without words that may quote a history."""
    why = type(error).__name__
    if isinstance(error, DataError):
        why += f" ({error.reason})"
    elif isinstance(error, HomefireError):
        why += f": {error}"
    LOG.error("this device could not answer: %s\n%s", why, "".join(format_tb(error.__traceback__)))


def open_device(context: Context) -> Device:
    """The device that this node is.

    Raises:
        ConfigError: No home folder is named, or it holds no such user, or one who stays out.
    """
    folder = context.node_config.get("home") or os.environ.get("HOMEFIRE_HOME")
    if not folder:
        raise ConfigError(
            "this device has no home folder",
            hint="Start the node with --node-config 'home=\"/path\"', or set HOMEFIRE_HOME.",
        )
    place = Path(str(folder)).expanduser()
    if (place / KEYS).exists():
        vault_home = VaultHome(_vault(place))
        forgettings = vault_home.forgettings  # before the history is read
        return Device(vault_home, vault_home.user, forgettings)
    home = Home(place)
    number, participants = int(context.node_config.get("partition-id", 0)), home.config.participants
    if participants is not None and number >= participants:
        raise ConfigError(f"{home.folder}: user {number} does not take part in the federation")
    return Device(home, home.user(number))


@lru_cache(maxsize=1)
def _vault(folder: Path) -> Vault:
    """A person's vault, opened once and kept open for the messages that follow."""
    phrase = os.environ.get("HOMEFIRE_PASSPHRASE")
    return open_vault(folder, passphrase=phrase, known=known_keys(folder))


@lru_cache(maxsize=1)
def known_keys(folder: Path) -> KnownKeys | None:
    """A vault's keys, kept for those that are forked from this process; None where none fit."""
    try:
        return KnownKeys.of(folder, os.environ.get("HOMEFIRE_PASSPHRASE"))
    except HomefireError:
        return None  # opening the vault says why, or mends it
