"""Every error that homefire raises on purpose.

HomefireError
├── ConfigError            an experiment, federation or device file is wrong
├── DataError              a record, a user or a population file is wrong
├── ModelError             a base model is missing, damaged or unsuitable
├── AdapterError           an adapter does not fit its specification or its base model
├── ProtocolError          a message between server and device is malformed
│   ├── SignatureError   a message is not from the holder of the key that it names
│   └── RejectedContributionError   one contribution failed the server's gate
├── VaultError             a vault cannot be used; nothing in it was changed
│   ├── WrongKeyError           the passphrase, or the secret in the keystore, is another vault's
│   ├── DamagedVaultError       bytes of a vault have changed
│   ├── ForeignVaultError       a file of another vault stands in the place of this one's
│   ├── OldVaultError           a vault, or a part of it, is older than it was
│   ├── VaultVersionError       this version of homefire does not know the format
│   └── BusyVaultError          another process uses the vault
├── DeviceError            a device could not answer; says nothing else, for it leaves the device
├── PrivacyError           a privacy parameter or claim is invalid; nothing was released
│   ├── DivergedError           training gave values that say nothing; a device then sends zeros
│   ├── LedgerError             a ledger is damaged, rolled back or in use; nothing may be spent
│   └── BudgetExhaustedError    the privacy that was planned is spent; nothing was released
├── EnrolmentError         a device cannot be enrolled
└── FederationError        a run cannot go on
"""


class HomefireError(Exception):
    """An error with a remedy.

    Args:
        message: What is wrong, naming the value.
        hint: What to do about it; the command line prints it on a line of its own.
    """

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


class ConfigError(HomefireError):
    """An experiment, federation or device file is wrong."""


class DataError(HomefireError):
    """A record, a user or a population file is wrong.

    Args:
        message: What is wrong, naming file and line.
        hint: The remedy.
        reason: The kind of the problem without place or values: what may be counted and shown.
    """

    def __init__(self, message: str, *, hint: str = "", reason: str = "wrong shape") -> None:
        super().__init__(message, hint=hint)
        self.reason = reason


class ModelError(HomefireError):
    """A base model is missing, damaged or unsuitable."""


class AdapterError(HomefireError):
    """An adapter does not fit its specification or its base model."""


class ProtocolError(HomefireError):
    """A message between server and device is malformed."""


class SignatureError(ProtocolError):
    """A message is not from the holder of the key that it names."""


class RejectedContributionError(ProtocolError):
    """One contribution failed the server's gate; the run goes on without it.

    Args:
        reason: A short machine-readable word, counted in the operator's log.
        message: What is wrong with the contribution.
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class VaultError(HomefireError):
    """A vault cannot be used; nothing in it was changed."""


class WrongKeyError(VaultError):
    """The passphrase, or the secret in the keystore, is another vault's."""


class DamagedVaultError(VaultError):
    """Bytes of a vault have changed."""


class ForeignVaultError(VaultError):
    """A file of another vault stands in the place of this one's."""


class OldVaultError(VaultError):
    """A vault, or a part of it, is older than it was."""


class VaultVersionError(VaultError):
    """This version of homefire does not know the format."""


class BusyVaultError(VaultError):
    """Another process uses the vault."""


class DeviceError(HomefireError):
    """A device could not answer; says nothing else, for it leaves the device."""


class PrivacyError(HomefireError):
    """A privacy parameter or claim is invalid; nothing was released."""


class DivergedError(PrivacyError):
    """Training gave values that say nothing; a device then sends zeros."""


class LedgerError(PrivacyError):
    """A ledger is damaged, rolled back or in use; nothing may be spent."""


class BudgetExhaustedError(PrivacyError):
    """The privacy that was planned is spent; nothing was released."""


class EnrolmentError(HomefireError):
    """A device cannot be enrolled; no ticket was used up."""


class FederationError(HomefireError):
    """A run cannot go on."""
