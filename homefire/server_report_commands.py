"""`homefire server status | releases`: how a server is, and what it has published."""

import json
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from homefire.common.printable import printable
from homefire.options import AsJson
from homefire.server_session import HOME, ServerFolder, need_server, open_server, server_app, show

if TYPE_CHECKING:
    from collections.abc import Sequence

    from homefire.server.operator_home import OperatorHome
    from homefire.server.registry_folder import Published

SILENT = "running, but its page does not answer"


@server_app.command()
def status(
    check: Annotated[
        bool, typer.Option("--check", help="Exit with 1 unless all its processes run.")
    ] = False,
    home: ServerFolder = HOME,
    as_json: AsJson = False,
) -> None:
    """How the server is: rounds, devices, what was refused, what was spent.

    --check is about processes alone. What else may be wrong is under trouble,
    and in the metrics homefire_trouble (how many things), homefire_halted (no
    further round is opened) and homefire_certificate_days: set an alarm there.
    """
    need_server()
    found = _status(open_server(home))
    if as_json:
        typer.echo(json.dumps(found))
    else:
        table = Table(box=None, show_header=False)
        for name, value in _lines(found).items():
            table.add_row(name, escape(printable(value)))
        Console().print(table)
    processes = found["processes"].values()
    if check and not (processes and all(each["runs"] for each in processes)):
        raise typer.Exit(1)


def _status(home: "OperatorHome") -> dict[str, Any]:
    """From the server that runs here, or else from its files and whether its lock is held.

    Who answers at its port may be another server.
    """
    import httpx

    from homefire.common.errors import ConfigError
    from homefire.server.status import look

    try:
        url = f"http://127.0.0.1:{home.config.operator}/status.json"
        answer = httpx.get(url, timeout=30, trust_env=False)
        found: dict[str, Any] = answer.raise_for_status().json()
        is_ours = found["server_key"] == home.server_key
    except (httpx.HTTPError, ValueError, LookupError, TypeError, ConfigError):
        is_ours = False
    if is_ours:
        return found
    return asdict(look(home, state=SILENT if home.is_served() else "stopped"))


def _lines(found: dict[str, Any]) -> dict[str, str]:
    def counted(counts: dict[str, int]) -> str:
        return ", ".join(f"{name} {n}" for name, n in sorted(counts.items())) or "none"

    def epsilon(value: float | None) -> str:
        return "∞" if value is None else f"{value:.2f}"

    burnt = found.get("burnt", 0)  # a server that was started before an upgrade tells none
    lines = {
        "state": found["state"],
        "devices": f"{found['enrolled']} enrolled, {found['needed'] or '?'} needed, "
        f"{'?' if found['online'] is None else found['online']} here, "
        f"{found['tickets']} tickets open",
        "rounds": f"{sum(number > 0 for number in found['releases'])} of "
        f"{found['planned_rounds'] or '?'} released"
        f"{', ' + str(burnt) + ' burnt' if burnt else ''}"
        f"{'' if found['run'] == 1 else ', run ' + str(found['run'])}",
    }
    if (budget := found["budget"]) is not None:
        lines["ε"] = (
            f"{epsilon(budget['epsilon_now'])} so far, {epsilon(budget['epsilon_end'])} at the "
            f"end (δ = {budget['delta']}, {budget['mechanism']}); "
            f"{budget['rounds_left']} rounds left"
        )
    lines["dropped"] = counted(found["dropped"])
    lines["refused by devices"] = counted(found["refused"])
    lines["refused at the door"] = counted(found["door"].get("refused", {}))
    registry = found["registry"]
    lines["asked of the registry"] = counted(registry.get("answered", {}))
    lines["refused by the registry"] = counted(registry.get("refused", {}))
    lines["processes"] = ", ".join(
        f"{name} {'runs' if each['runs'] else 'is down'} (started {each['starts']}×)"
        for name, each in found["processes"].items()
    )
    if found["trouble"]:
        lines["trouble"] = "; ".join(found["trouble"])
    return lines


@server_app.command()
def releases(
    export: Annotated[
        Path | None, typer.Option(help="Write one as a PEFT folder with a model card.")
    ] = None,
    number: Annotated[
        int | None,
        typer.Option(min=1, help="Which, by the list; else all are shown, or the newest written."),
    ] = None,
    base_model: Annotated[
        str | None,
        typer.Option(help="Of the release to write, where federation.toml names another now."),
    ] = None,
    home: ServerFolder = HOME,
    as_json: AsJson = False,
) -> None:
    """What was published; export a release.

    Numbers go on from one run to the next.

    Example:
      homefire server releases --export shared-adapter
    """
    need_server()
    from homefire.server.registry import open_home

    server = open_server(home)
    if export is not None:
        _export(server, export, number, base_model)
        show(as_json, {"folder": str(export)}, f"{export}: load it with PEFT; see its README.md.")
        return
    published = open_home(server.folder).releases
    if number is not None:
        published = [_numbered(published, number)]
    found = [each.statement for each in published]
    if as_json:
        typer.echo(json.dumps([each.model_dump(mode="json") for each in found]))
        return
    table = Table("number", "run", "round", "ε", "issued", "good until", box=None)
    for each in found:
        epsilon = each.privacy.epsilon_release
        table.add_row(
            str(each.number),
            each.run[:8],
            str(each.round),
            "∞" if epsilon is None else f"{epsilon:.2f}",
            f"{datetime.fromtimestamp(each.issued_at, UTC):%Y-%m-%d %H:%M}Z",
            f"{datetime.fromtimestamp(each.expires_at, UTC):%Y-%m-%d}",
        )
    Console().print(table)


def _numbered(published: "Sequence[Published]", number: int | None) -> "Published":
    """One of them; the newest without a number."""
    from homefire.common.errors import ConfigError

    if not published:
        raise ConfigError(
            "nothing is published yet",
            hint="The first round that ends brings a release; see: homefire server status",
        )
    if (number or 0) > len(published):
        raise ConfigError(
            f"there is no release {number}",
            hint=f"The newest is {len(published)}; see: homefire server releases",
        )
    return published[(number or len(published)) - 1]


def _export(
    server: "OperatorHome", folder: Path, number: int | None, base_model: str | None
) -> None:
    from homefire.common.base_model import load_base_model
    from homefire.common.errors import ConfigError
    from homefire.common.peft_adapter import resolve_spec
    from homefire.server.registry import open_home

    chosen = _numbered(open_home(server.folder).releases, number)
    name = base_model or server.federation().base_model.name
    base = load_base_model(name, fetch=False)
    if base.fingerprint != chosen.statement.base_model:
        raise ConfigError(
            f"release {chosen.number} is of another base model than {name}",
            hint="Name its own: --base-model",
        )
    spec = resolve_spec(chosen.statement.adapter, base.model.config)
    chosen.release().export(spec, folder, base_model=name)
