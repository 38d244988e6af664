"""The runs of one server, one after another: each in a folder of its own, with keys of its own.

::

    HOME/keys/                  what stays: signing key, anchor of the registry
    HOME/runs/NNNN/             one run; see `homefire.server.run_state`
    HOME/runs/NNNN.keys/        its run key, the anchor of its ledger, a copy of the signing key
"""

import re
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from homefire.common.errors import ConfigError, FederationError
from homefire.common.files import make_folder, sync_folder
from homefire.common.keystore import Keystore
from homefire.server.releases import SERVER_KEYS, SIGNING_KEY
from homefire.server.run_state import LEDGER, RUN_KEY, Federation, Start, rounds_spent

RUNS = "runs"
WAIT_SECONDS = 3.0
"""For a ledger that a server looks at now and then, for a moment."""


def keystore(home: Path) -> Keystore:
    """Where a server keeps what outlasts its runs."""
    return Keystore(home / SERVER_KEYS)


def all_runs(home: Path) -> list[Path]:
    """The folders of a server's runs, oldest first."""
    found = (path for path in (home / RUNS).glob("[0-9]*") if re.fullmatch("[0-9]{4}", path.name))
    return sorted(found)


def has_begun(output: Path) -> bool:
    """Whether a run's ledger says that there is one."""
    path = output / LEDGER
    return path.exists() and path.stat().st_size > 0


def make_run(home: Path) -> Path:
    """Make the folder of another run.

    Guarantees:
        One signer: every run signs with the server's key, that devices have pinned.
        Keys first: a run's folder is there only after its keys are.

    Raises:
        ConfigError: The server's key is gone.
    """
    key = signing_key(home).private_bytes_raw()
    earlier = all_runs(home)
    number = int(earlier[-1].name) + 1 if earlier else 1
    output = home / RUNS / f"{number:04d}"
    make_folder(output.parent)
    Keystore.beside(output).put(SIGNING_KEY, key)
    output.mkdir(mode=0o700)
    sync_folder(output.parent)
    return output


def signing_key(home: Path) -> Ed25519PrivateKey:
    """The server's key, which is drawn when the server is made and never again.

    Raises:
        ConfigError: It is gone.
    """
    keys = keystore(home)
    if keys.get(SIGNING_KEY) is None:
        raise ConfigError(
            f"{home / SERVER_KEYS}: there is no signing key",
            hint="Put its copy in place: devices trust no other key.",
        )
    return keys.signing_key(SIGNING_KEY)


def follow(home: Path, *, give_up: bool = False) -> Path:
    """Make the folder of the run that follows one which is over, or of the first.

    Args:
        home: The server's folder.
        give_up: Leave the newest run, over or not, damaged or not.

    Guarantees:
        Given up for good: nobody can draw the noise of a run that was given up again, and so no
            round of it can be repeated.

    Raises:
        FederationError: The newest run is not over, or did not begin.
        LedgerError: Its ledger is damaged, rolled back or in use.
    """
    if not (runs := all_runs(home)):
        return make_run(home)
    newest = runs[-1]
    if give_up:
        signing_key(home)  # before anything is lost
        Keystore.beside(newest).destroy(RUN_KEY)
        return make_run(home)
    if not has_begun(newest):
        raise FederationError(
            f"run {newest.name} has not begun yet",
            hint="Change its settings in federation.toml.",
        )
    spent, over = rounds_spent(newest, wait=WAIT_SECONDS)
    if not over:
        raise FederationError(
            f"run {newest.name} is not over: {spent} of its rounds are spent",
            hint="Let it end first, or leave it for good: homefire server next --give-up",
        )
    return make_run(home)


def start_of(home: Path, federation: Federation, server_key: str) -> Start | None:
    """Where the newest run starts: at the newest release of the runs before, if that fits.

    Args:
        home: The server's folder.
        federation: What the run is about.
        server_key: The server's public key, in hex.

    Returns:
        None where none before has a release, or where it is of another base model or adapter.

    Raises:
        SignatureError: The release of the run before was changed.
        AdapterError: It is damaged.
    """
    wanted = {"base_model": federation.base_model, "adapter_digest": federation.spec.digest}
    before = (run for run in reversed(all_runs(home)) if run != federation.config.output)
    stores = (Federation.store_of(run) for run in before)
    if (store := next((each for each in stores if each.rounds()), None)) is None:
        return None
    newest = store.latest()
    newest.verify(server_key)
    if any(newest.about[name] != value for name, value in wanted.items()):
        return None
    return Start(newest.vector, newest.about["run"], newest.round)
