"""The Flower ServerApp: reads the operator's federation file and runs the rounds.

The run configuration holds one key, `federation`: the path of a TOML file on the server.
"""

import logging
from dataclasses import replace
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from homefire.common.base_model import load_base_model
from homefire.common.config import FederationConfig, load_config
from homefire.common.errors import ConfigError, HomefireError
from homefire.common.peft_adapter import resolve_spec
from homefire.server.federation import run_federation
from homefire.server.nodes import ascending
from homefire.server.operator_home import OperatorHome
from homefire.server.planning import plan_privacy
from homefire.server.registry import open_home
from homefire.server.roster import read_roster
from homefire.server.run_state import Federation

LOG = logging.getLogger(__name__)
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

    Raises:
        FederationError: Fewer devices are enrolled than the run needs.
    """
    devices = home.participants()
    nodes = ascending(device.node for device in devices)
    config = home.federation()
    federation = replace(open_federation(config), enrolled=nodes)
    registry = open_home(home.folder)

    def publish(number: int) -> None:
        try:
            registry.publish(federation.store, number, federation.spec)
        except (HomefireError, OSError) as error:
            # The run goes on; the next round, or the next start, publishes again.
            LOG.warning("round %d could not be published: %s", number, error)

    if published := [number for number in federation.store.rounds()[-1:] if number]:
        publish(published[0])
    run_federation(grid, federation, drained=home.is_draining, released=publish)


def open_federation(config: FederationConfig) -> Federation:
    """Everything a run needs, checked before any device is asked."""
    privacy = plan_privacy(config)
    roster = read_roster(config.roster, users=config.users)
    base = load_base_model(config.base_model.name, dtype=config.base_model.dtype)
    if config.local.max_tokens > base.context_length:
        raise ConfigError(
            f"local.max_tokens {config.local.max_tokens} is more than the {base.context_length} "
            f"tokens that {base.name} reads"
        )
    spec = resolve_spec(config.shared, base.model.config)
    return Federation(config, spec, base.fingerprint, privacy, roster)
