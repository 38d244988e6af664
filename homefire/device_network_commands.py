"""The verbs of `homefire device` that talk to others: join, trust, update, serve."""

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from homefire.device_session import (
    HOME,
    HomeFolder,
    device_app,
    open_vault,
    say_epsilon,
    say_spent,
    show,
)
from homefire.options import AsJson

if TYPE_CHECKING:
    from homefire.client.joining_changes import Change
    from homefire.client.updates import Updated


SEEN = (
    "A ticket on a command line can be read by others of this machine, and stays in the shell's "
    "history; next time: homefire device enroll -"
)


@device_app.command()
def join(
    superlink: Annotated[
        str | None,
        typer.Argument(metavar="HOST:PORT", help="By default the server you are enrolled with."),
    ] = None,
    root_certificates: Annotated[
        Path | None, typer.Option(help="The authority behind its certificate.")
    ] = None,
    node_key: Annotated[
        Path | None, typer.Option(help="The key that the operator registered, if it is asked for.")
    ] = None,
    insecure: Annotated[bool, typer.Option(help="Without TLS, on this machine alone.")] = False,
    on_mains: Annotated[bool, typer.Option(help="Only while not on the battery.")] = False,
    off_mobile: Annotated[bool, typer.Option(help="Only while not on a mobile network.")] = False,
    when_idle: Annotated[bool, typer.Option(help="Only while there is little to do.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    home: HomeFolder = HOME,
    as_json: AsJson = False,
) -> None:
    """Take part in a federation until you stop it (Ctrl-C).

    Shows beforehand what would be sent, and afterwards what was. The code that
    trains is the one installed here, whatever the server sends. Where the
    connection is lost, it is tried again. --json prints a line for the preview,
    each change, each round and the whole; it asks nothing, so it needs --yes.
    """
    from homefire.client.conditions import (
        BetweenRounds,
        Condition,
        Idle,
        off_mobile_network,
        on_mains_power,
    )
    from homefire.client.joining import Link, contributed
    from homefire.client.personalize.recipe import SHARED

    if as_json and not yes:
        raise typer.BadParameter("it asks nothing, so give --yes too", param_hint="--json")
    given = root_certificates or node_key or insecure
    if superlink is None and given:
        raise typer.BadParameter("name the SuperLink that they are for", param_hint="HOST:PORT")
    link = None if superlink is None else Link(superlink, root_certificates, insecure, node_key)
    conditions: list[Condition] = [on_mains_power] * on_mains + [off_mobile_network] * off_mobile
    if when_idle:
        conditions.append(BetweenRounds(Idle()))
    with open_vault(home) as me:
        shown = me.preview()
        show(
            as_json,
            {"preview": asdict(shown)},
            f"Each contribution: {shown.parameters} numbers, {shown.bytes_up / 1e3:.1f} kB up, "
            f"{shown.bytes_down / 1e3:.1f} kB down; at most "
            f"ε = {say_epsilon(shown.largest_epsilon)} each.\nε spent so far: "
            f"{say_spent(shown.spent_epsilon, shown.lifetime_epsilon, shown.delta)}. "
            "Your texts stay here.",
        )
        if not yes and not typer.confirm(f"Take part{f' at {superlink}' if superlink else ''}?"):
            raise typer.Exit(1)
        stop = Event()
        signal.signal(signal.SIGINT, lambda *_: stop.set())
        signal.signal(signal.SIGTERM, lambda *_: stop.set())
        taken = me.join(link, conditions=conditions, stop=stop, on_change=_tell_changes(as_json))
        for each in contributed(me.vault, me.assistant.model.specs[SHARED], taken):
            sent = "another adapter's size" if each.bytes_up is None else f"{each.bytes_up} bytes"
            show(
                as_json,
                {"contributed": asdict(each)},
                f"Run {each.run[:8]}, round {each.round}: ε = {say_epsilon(each.epsilon)}, {sent}.",
            )
        after = me.status()
        spent = say_spent(after.epsilon, after.lifetime_epsilon, after.delta)
        whole = {
            "rounds": len(taken),
            "epsilon": after.epsilon,
            "lifetime_epsilon": after.lifetime_epsilon,
            "delta": after.delta,
        }
        show(as_json, whole, f"Took part in {len(taken)} rounds; ε spent: {spent}.")


@device_app.command("enroll")
def enroll_(
    ticket: Annotated[
        str, typer.Argument(metavar="-", help="Reads the operator's ticket from standard input.")
    ],
    home: HomeFolder = HOME,
    as_json: AsJson = False,
) -> None:
    """Enrol with a server by a ticket; nothing is contributed before `join`.

    The server's key goes into policy.toml, and its registry is trusted for
    updates.

    Paste the ticket, then Enter and Ctrl-D. It is taken as an argument too, but
    there it is no secret: other accounts see it (ps), and shells keep it.

    Example:
      homefire device enroll - < ticket.txt
    """
    if ticket == "-":
        words = sys.stdin.read()
    else:
        words = ticket
        typer.echo(SEEN, err=True)
    from homefire.common.signatures import public_key

    with open_vault(home) as me:
        server, key = me.enroll(words), public_key(me.vault.identity)
    show(
        as_json,
        {"superlink": server, "public_key": key},
        f"Enrolled with {server}, which knows this device as {key}.\n"
        "Note that elsewhere too: by it the operator lets a lost or stolen device in no more.\n"
        "Next: homefire device join",
    )


def _tell_changes(as_json: bool) -> Callable[["Change"], None]:
    """One line for each; a hint where something new is wrong."""
    known: set[str] = set()

    def tell(change: "Change") -> None:
        hint = change.trouble.hint if change.trouble else None
        about = {"change": change.state, "trouble": change.trouble, "hint": hint}
        said = str(change)
        if hint and change.trouble and change.trouble not in known:
            known.add(change.trouble)
            said += f" {hint}"
        show(as_json, {**about, "seconds": change.seconds}, said)

    return tell


@device_app.command("trust")
def trust_(
    key: Annotated[str, typer.Argument(metavar="KEY", help="The server's: 64 hex digits.")],
    registry: Annotated[str, typer.Option(metavar="HOST:PORT", help="Where its releases are.")],
    root_certificates: Annotated[
        Path | None, typer.Option(help="The authority behind its certificate.")
    ] = None,
    replace_key: Annotated[
        bool, typer.Option(help="Take this key instead of the one that is trusted.")
    ] = False,
    home: HomeFolder = HOME,
    as_json: AsJson = False,
) -> None:
    """Say whose releases `update` takes, and from where.

    Get the key from the server's operator, not from the server, and ca.crt with
    it: a server of homefire has an authority of its own. Whoever holds the key
    decides which shared adapter you wear, and nothing else.

    Example:
      homefire device trust KEY --registry HOST:9093 --root-certificates ca.crt
    """
    with open_vault(home) as me:
        found = me.trust(
            key, registry, root_certificates=root_certificates, replace_key=replace_key
        )
    said = f"Releases of key {found.key[:16]}… are taken from {found.registry}."
    show(as_json, {"key": found.key, "registry": found.registry}, said)


@device_app.command()
def update(home: HomeFolder = HOME, as_json: AsJson = False) -> None:
    """Fetch the newest shared adapter; nothing is contributed, nothing charged.

    It is taken if the trusted key signed it for your base model and it is not
    older than what you had. Your private adapter stays on top only where it
    still helps on your newest records.
    """
    from homefire.common.privacy.words import deployment_in_words, in_words

    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # what it has to say, the errors say better
    with open_vault(home) as me, _download(as_json) as advance:
        found = me.update(progress=advance)
    statement = found.statement
    if as_json:
        more = {"first_of_run": found.first_of_run, "private_helps": found.helps}
        release = statement.model_dump(mode="json")
        show(True, {"changed": found.changed, **more, "release": release}, "")
        return
    if found.first_of_run:
        typer.echo(f"Run {statement.run[:8]}, whose releases you had not taken before:")
        for line in in_words(statement.privacy):
            typer.echo(f"- {line}")
        if statement.deployment is not None:
            typer.echo("Deployment:")
            for line in deployment_in_words(statement.deployment):
                typer.echo(f"- {line}")
    typer.echo(_updated(found))


@device_app.command()
def serve(
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8765,
    host: Annotated[
        str, typer.Option(help="Another than this machine needs --expose.")
    ] = "127.0.0.1",
    expose: Annotated[
        bool, typer.Option(help="Let other machines ask; put TLS in front of it yourself.")
    ] = False,
    names: Annotated[
        list[str] | None,
        typer.Option(
            "--name", metavar="HOST", help="Also answer to this name, as of a proxy. Repeatable."
        ),
    ] = None,
    learn: Annotated[bool, typer.Option(help="Remember what you say in conversations.")] = False,
    new_token: Annotated[bool, typer.Option(help="Draw another token; old ones end.")] = False,
    home: HomeFolder = HOME,
    as_json: AsJson = False,
) -> None:
    """Serve any app on this machine, OpenAI-compatible, and a page for you.

    Models: homefire (what works best for you), homefire/plain, homefire/shared,
    homefire/private, homefire/retrieval, homefire/both.

    Example:
      OPENAI_BASE_URL=http://127.0.0.1:8765/v1 OPENAI_API_KEY=<token> some-app
    """
    from homefire.client.serving import serve as serve_vault

    with open_vault(home) as me:
        serve_vault(
            me,
            host=host,
            port=port,
            expose=expose,
            names=names or (),
            learn=learn,
            new_token=new_token,
            say=lambda url, token: show(
                as_json,
                {"url": url, "token": token},
                f"Page: {url}/#token={token}\nFor apps: base URL {url}/v1, API key {token}",
            ),
        )


@contextmanager
def _download(as_json: bool) -> Iterator[Callable[[int, int], None]]:
    """A bar for a download; none where a machine reads."""
    if as_json:
        yield lambda done, of: None
        return
    from homefire.client.progress import byte_bar

    with byte_bar(Console(stderr=True), "Shared adapter") as advance:
        yield advance


def _updated(found: "Updated") -> str:
    statement = found.statement
    said = f"release {statement.number}: round {statement.round} of run {statement.run[:8]}"
    if not found.changed:
        return f"Nothing newer than what is here ({said})."
    more = {
        None: "",
        True: " Your private adapter helps on top of it.",
        False: " Your private adapter does not help on top of it and is left off; train it again "
        "with `homefire device personalize`.",
    }
    return f"In place: {said}.{more[found.helps]}"
