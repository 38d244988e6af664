"""The Flower ServerApp: reads the operator's federation file and runs the rounds.

The run configuration holds one key, `federation`: the path of a TOML file on the server.
"""

from dataclasses import replace
from functools import partial
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from homefire.common.base_model import load_base_model
from homefire.common.config import FederationConfig, load_config
from homefire.common.errors import ConfigError, HomefireError
from homefire.common.files import DISK_HINT
from homefire.common.peft_adapter import resolve_spec
from homefire.server.federation import run_federation
from homefire.server.line import HttpLine
from homefire.server.nodes import ascending
from homefire.server.operator_home import OPERATOR_SECRET, OperatorHome
from homefire.server.planning import plan_privacy
from homefire.server.registry import open_home
from homefire.server.registry_folder import RegistryFolder
from homefire.server.roster import read_roster
from homefire.server.run_state import Federation
from homefire.server.runs import start_of

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run a federation from first round to last."""
    path = str(context.run_config.get("federation", ""))
    if not path:
        raise ConfigError(
            "the run configuration names no federation file",
            hint="flwr run . --run-config 'federation=\"/path/to/federation.toml\"'",
        )
    if Path(path).is_dir():
        run_operated(grid, OperatorHome(Path(path)))
    else:
        run_federation(grid, open_federation(load_config(FederationConfig, Path(path))))


def run_operated(grid: Grid, home: OperatorHome) -> None:
    """Run, or go on with, the federation of an operator's folder.

    Who takes part is whoever was enrolled when it started.

    Guarantees:
        No lost release: no round is opened, and the run does not end, before every release of the
            rounds before is published.
        Said why: what ends it lies in the folder, in words, until it goes on.

    Raises:
        HomefireError: It cannot go on.
        OSError: Likewise, as of a disk that is full.
    """
    try:
        _run_operated(grid, home)
    except HomefireError as error:
        home.keep_trouble(error.in_full)
        raise
    except OSError as error:
        home.keep_trouble(f"{error}. {DISK_HINT}")
        raise


def _run_operated(grid: Grid, home: OperatorHome) -> None:
    taking_part = home.participants()
    nodes = ascending(device.node for device in taking_part)
    home.certificates.read_authority()  # which names what is wrong with it
    line = HttpLine(
        home.config.private,
        authority=home.certificates.authority,
        secret=home.read_secret(OPERATOR_SECRET),
    )
    # What was here when the server was started; nothing is fetched in the middle of a run.
    found = open_federation(home.federation(), fetch=False)
    gone = partial(home.enrolment.gone, taking_part)
    federation = replace(found, enrolled=nodes, line=line, gone=gone)
    if not federation.store.rounds():
        federation = replace(federation, start=start_of(home.folder, federation, home.server_key))
    registry = open_home(home.folder)

    def publish(_: int = 0) -> None:
        publish_all(registry, federation)
        home.keep_trouble("")

    publish()
    run_federation(grid, federation, drained=home.is_draining, released=publish)


def publish_all(registry: RegistryFolder, federation: Federation) -> None:
    """Publish every release of the run that is not published, oldest first; the start is none.

    Raises:
        RegistryError: The registry is damaged, or cannot take one.
        OSError: One could not be written.
    """
    store = federation.store
    if not (numbers := [number for number in store.rounds() if number]):
        return
    run = store.read(numbers[-1]).about.get("run")
    newest = max((each.round for each in registry.releases if each.run == run), default=0)
    for number in numbers:
        if number >= newest:  # the newest itself may be past its time
            registry.publish(store, number, federation.spec)


def open_federation(config: FederationConfig, *, fetch: bool = True) -> Federation:
    """Everything a run needs, checked before any device is asked.

    Args:
        config: The settings.
        fetch: Whether a hub may be asked for the base model.
    """
    privacy = plan_privacy(config)
    roster = read_roster(config.roster, users=config.users)
    base = load_base_model(config.base_model.name, dtype=config.base_model.dtype, fetch=fetch)
    if config.local.max_tokens > base.context_length:
        raise ConfigError(
            f"local.max_tokens {config.local.max_tokens} is more than the {base.context_length} "
            f"tokens that {base.name} reads"
        )
    spec = resolve_spec(config.shared, base.model.config)
    return Federation(config, spec, base.fingerprint, privacy, roster)
