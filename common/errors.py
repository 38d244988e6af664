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
├── UpdateError            a release was not taken; the shared adapter stays as it was
│   ├── UnreachableRegistryError  the registry does not answer, or not as who it should be
│   ├── RegistryAnswerError     what the registry answers is none of its answers
│   ├── ForgedReleaseError      the trusted key did not sign it
│   ├── FrozenRegistryError     the newest that the registry shows is no longer vouched for
│   ├── WrongClockError         the clocks of device and server are too far apart to tell
│   ├── OlderReleaseError       another release was newer, or had the same number
│   ├── UnfitReleaseError       it was made for another base model or adapter
│   └── DamagedReleaseError     its file is not the one that was signed
├── RegistryError          a registry of releases is damaged, rolled back or was asked for nonsense
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

    @property
    def in_full(self) -> str:
        """What is wrong and what to do about it, for a place that has one line."""
        return f"{self}. {self.hint}" if self.hint else str(self)


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


class UpdateError(HomefireError):
    """A release was not taken; the shared adapter stays as it was."""


class UnreachableRegistryError(UpdateError):
    """The registry does not answer, or not as who it should be."""


class RegistryAnswerError(UpdateError):
    """What the registry answers is none of its answers."""


class ForgedReleaseError(UpdateError):
    """The trusted key did not sign it."""


class FrozenRegistryError(UpdateError):
    """The newest that the registry shows is no longer vouched for."""


class WrongClockError(UpdateError):
    """The clocks of device and server are too far apart to tell what is new."""


class OlderReleaseError(UpdateError):
    """Another release was newer, or had the same number."""


class UnfitReleaseError(UpdateError):
    """It was made for another base model or adapter."""


class DamagedReleaseError(UpdateError):
    """Its file is not the one that was signed."""


class RegistryError(HomefireError):
    """A registry of releases is damaged, rolled back, or was asked for nonsense."""


class FederationError(HomefireError):
    """A run cannot go on."""
