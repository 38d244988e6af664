"""`homefire device`: one person's vault and language model, on the person's machine."""

import json
import os
import resource
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from homefire.common.errors import (
    BusyVaultError,
    ConfigError,
    DamagedVaultError,
    ForeignVaultError,
    HomefireError,
    OldVaultError,
    VaultVersionError,
    WrongKeyError,
)
from homefire.options import AsJson

if TYPE_CHECKING:
    from homefire.client.assistant import Reply
    from homefire.client.joining_changes import Change
    from homefire.client.outcomes import Learned
    from homefire.client.personalizer import Personalizer
    from homefire.client.updates import Updated

device_app = typer.Typer(
    help="""Your own language model, on this machine.

    Everything lies in one encrypted vault (--home, or HOMEFIRE_HOME). It is
    opened by the system's keystore, or by a passphrase: you are asked for it,
    or it is taken from HOMEFIRE_PASSPHRASE.

    Exit codes: 0 done, 1 refused or failed (why is on stderr), 2 wrong use,
    3 wrong passphrase or no key, 4 damaged, older or another's vault, 5 in use
    by another process.
    """,
    no_args_is_help=True,
)

HomeFolder = Annotated[
    Path, typer.Option("--home", envvar="HOMEFIRE_HOME", help="Folder of the vault.")
]
HOME = Path("~/.homefire")
LONGEST_LINE = 60
RecipeName = Annotated[str, typer.Option(help="auto, plain, shared, private, retrieval or both.")]
MostTokens = Annotated[int, typer.Option(min=1, help="Tokens of a reply at most.")]
Temperature = Annotated[float, typer.Option(min=0, help="0 takes the likeliest token.")]
Seed = Annotated[int, typer.Option(min=0, help="Of the draws.")]


@device_app.command()
def init(
    home: HomeFolder = HOME,
    base_model: Annotated[
        str | None, typer.Option(help="Alias, folder, GGUF file or hub id.")
    ] = None,
    protection: Annotated[
        Literal["passphrase", "keystore", "both"] | None,
        typer.Option(help="What opens the vault; by default the keystore if there is one."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Make a vault.

    Your history, what is learned from it and what you share lie in it, encrypted.

    Example:
      homefire device init --base-model smollm2-135m
    """
    from homefire.client.os_keystore import secure_backend
    from homefire.client.personalizer import Personalizer
    from homefire.client.vault_files import KEYS

    place = home.expanduser()
    if (place / KEYS).exists():
        raise ConfigError(f"{place}: there is a vault already", hint="Name another --home.")
    _no_core_dumps()
    phrase = os.environ.get("HOMEFIRE_PASSPHRASE")
    needed = protection in ("passphrase", "both") or (protection is None and not secure_backend())
    if phrase is None and needed:
        phrase = _ask_passphrase(confirm=True)
    with Personalizer.open(
        place, base_model=base_model, passphrase=phrase, protection=protection
    ) as me:
        status = me.status()
        _show(as_json, status, f"A vault in {place}, opened by {_opener(status.protection)}.")


@device_app.command()
def remember(
    text: Annotated[str, typer.Argument(help="Your own words; - reads standard input.")],
    prompt: Annotated[str | None, typer.Option(help="What they answer, if anything.")] = None,
    home: HomeFolder = HOME,
    as_json: AsJson = False,
) -> None:
    """Keep something you say."""
    words = sys.stdin.read() if text == "-" else text
    with _vault(home) as me:
        number = me.remember(words, prompt=prompt)
        _show(as_json, {"id": number}, f"Record {number}.")


@device_app.command()
def records(
    search: Annotated[str | None, typer.Option(help="Those that fit these words best.")] = None,
    count: Annotated[int, typer.Option(min=1, help="At most so many.")] = 20,
    before: Annotated[int | None, typer.Option(help="Older than this one: the next page.")] = None,
    change: Annotated[int | None, typer.Option(metavar="ID", help="Give it another text.")] = None,
    text: Annotated[str | None, typer.Option(help="The other text.")] = None,
    home: HomeFolder = HOME,
    as_json: AsJson = False,
) -> None:
    """What is kept of what you wrote, the newest first; change one.

    With another text a record gets another id, and private adapters that have
    seen the old one are deleted.

    Examples:
      homefire device records --search "train to Porto"
      homefire device records --change 12 --text "I live in Porto now"
    """
    if (change is None) != (text is None):
        raise ConfigError("--change and --text go together")
    with _vault(home) as me:
        if change is not None and text is not None:
            number = me.change(change, text)
            _show(as_json, {"id": number}, f"Record {number}.")
            return
        found = me.search(search, count) if search else me.records(count, before=before)
    if as_json:
        _show(True, [asdict(each) for each in found], "")
        return
    table = Table("id", "date", "text", "source", box=None)
    for each in found:
        date, shown = (each.record.created_at or "")[:10], escape(_one_line(each.record.text))
        table.add_row(str(each.id), date, shown, escape(each.source))
    Console().print(table)


@device_app.command("import")
def import_(
    path: Annotated[Path, typer.Argument(help="A file or a folder.")],
    format: Annotated[
        Literal["jsonl", "text", "mbox", "chatgpt", "claude"] | None,
        typer.Option(help="Found out if absent."),
    ] = None,
    me: Annotated[str | None, typer.Option(help="Your e-mail addresses, for mailboxes.")] = None,
    on_bad: Annotated[
        Literal["error", "skip"], typer.Option(help="What to do about a bad record.")
    ] = "error",
    home: HomeFolder = HOME,
    as_json: AsJson = False,
) -> None:
    """Read your history.

    JSON Lines, text files, a mailbox, an export of ChatGPT or of Claude. What
    was imported before is left out; what you forgot comes back if it is still
    in the file.
    """
    with _vault(home) as own:
        found = own.import_records(path, format=format, me=me, on_bad=on_bad)
        left = sum(found.skipped.values())
        more = f", {left} left out" if left else ""
        _show(as_json, found, f"{found.added} new records, {found.known} known{more}.")


@device_app.command()
def personalize(
    memory_limit: Annotated[
        int | None, typer.Option(min=1, help="MiB that training may take besides the model.")
    ] = None,
    seed: Seed = 0,
    restore: Annotated[
        int | None, typer.Option(help="Use this earlier version instead of training.")
    ] = None,
    home: HomeFolder = HOME,
    as_json: AsJson = False,
) -> None:
    """Train your private adapter from your history.

    The better of the old one and the new one is used, by your newest records.
    A training that was interrupted goes on where it was.
    """
    with _vault(home) as me:
        if restore is not None:
            me.restore(restore)
            _show(as_json, {"version": restore}, f"Version {restore} is in use.")
            return
        with _progress(as_json) as advance:
            found = me.personalize(memory_limit=memory_limit, seed=seed, progress=advance)
        _show(as_json, found, _learned(found))


@device_app.command()
def ask(
    question: Annotated[str, typer.Argument(help="Anything; - reads standard input.")],
    recipe: RecipeName = "auto",
    max_tokens: MostTokens = 256,
    temperature: Temperature = 0.0,
    seed: Seed = 0,
    home: HomeFolder = HOME,
    as_json: AsJson = False,
) -> None:
    """Ask one question."""
    words = sys.stdin.read() if question == "-" else question
    with _vault(home) as me:
        reply = me.ask(
            words, recipe=recipe, max_tokens=max_tokens, temperature=temperature, seed=seed
        )
        if as_json:
            typer.echo(_reply(reply))
            return
        for piece in reply:
            typer.echo(piece, nl=False)
        typer.echo()


@device_app.command()
def chat(
    recipe: RecipeName = "auto",
    max_tokens: MostTokens = 256,
    temperature: Temperature = 0.0,
    seed: Seed = 0,
    learn: Annotated[bool, typer.Option(help="Remember what you say.")] = False,
    home: HomeFolder = HOME,
    as_json: AsJson = False,
) -> None:
    """Talk; an empty line or end of input ends it. With --json, a line a reply."""
    from homefire.client.personalize.sampling import Sampling
    from homefire.common.config import validate

    asked = {
        "max_tokens": max_tokens,
        "temperature": temperature,
        "seed": seed,
    }
    sampling = validate(Sampling, asked, where="the options")
    messages: list[Any] = []
    with _vault(home) as me:
        while question := _line("" if as_json else "> "):
            messages.append({"role": "user", "content": question})
            reply = me.chat(messages, recipe=recipe, sampling=sampling)
            if as_json:
                typer.echo(_reply(reply))
            else:
                for piece in reply:
                    typer.echo(piece, nl=False)
                typer.echo()
            messages.append({"role": "assistant", "content": reply.text})
            if learn:
                me.remember(question)


@device_app.command()
def status(home: HomeFolder = HOME, as_json: AsJson = False) -> None:
    """What is stored, and what was shared."""
    with _vault(home) as me:
        found = me.status()
    if as_json:
        _show(True, found, "")
        return
    table = Table(box=None, show_header=False)
    worn = next((each for each in found.private if each.worn), None)
    size, dates = f"{found.bytes / 1e6:.1f} MB", f", {found.oldest} to {found.newest}"
    rows = {
        "vault": f"{found.folder}, {size}, opened by {_opener(found.protection)}",
        "base model": found.base_model,
        "records": str(found.records) + (dates if found.oldest else ""),
        "private adapter": "none in use"
        if worn is None
        else f"version {worn.version}, {worn.created_at}",
        "versions": ", ".join(str(each.version) for each in reversed(found.private)) or "none",
        "shared adapter": "none"
        if found.shared is None
        else f"round {found.shared.about['round']} of run {found.shared.about['run'][:8]}",
        "forgotten": f"{found.forgotten} records, and {found.forgotten_adapters} private adapters "
        "that had seen them",
        "taken part in": f"{found.participations} rounds",
        "ε spent": _spent(found.epsilon, found.lifetime_epsilon, found.delta),
    }
    for name, value in rows.items():
        table.add_row(name, escape(value))
    Console().print(table)


@device_app.command()
def profile(
    fact: Annotated[
        str | None, typer.Option("--set", metavar="NAME=VALUE", help="Say something; NAME= unsays.")
    ] = None,
    home: HomeFolder = HOME,
    as_json: AsJson = False,
) -> None:
    """What you said about yourself, and what your history shows by counting."""
    with _vault(home) as me:
        if fact is not None:
            name, mark, value = fact.partition("=")
            if not mark or not name.strip():
                raise ConfigError(f"{fact!r} is no fact", hint="Write --set name=Ann.")
            me.set_fact(name.strip(), value.strip() or None)
        found = me.profile()
    if as_json:
        _show(True, found, "")
        return
    for name, value in found.facts.items():
        typer.echo(f"{name}: {value}")
    typer.echo(
        f"{found.records} records of {found.mean_words:.0f} words on average; "
        f"{found.questions:.0%} ask something, {found.lower_case:.0%} begin in lower case."
    )
    if found.words:
        typer.echo("Frequent: " + ", ".join(word for word, _ in found.words))


@device_app.command()
def forget(
    ids: Annotated[list[int] | None, typer.Option("--id", help="This record. Repeatable.")] = None,
    query: Annotated[str | None, typer.Option(help="Records that hold all these words.")] = None,
    before: Annotated[
        str | None,
        typer.Option(help="Records older than this date; without one, that came before it."),
    ] = None,
    retrain: Annotated[bool, typer.Option(help="Train again without them.")] = True,
    home: HomeFolder = HOME,
    as_json: AsJson = False,
) -> None:
    """Forget records, and every private adapter that has seen them.

    What was contributed to a shared adapter before stays in it, within the
    epsilon that its releases state.
    """
    with _vault(home) as me, _progress(as_json) as advance:
        found = me.forget(
            ids=ids or (), query=query, before=before, retrain=retrain, progress=advance
        )
    said = f"{found.records} records forgotten, {len(found.adapters)} private adapters deleted."
    if found.learned is not None:
        said += " " + _learned(found.learned)
    if found.failure is not None:
        said += f" None was trained again: {found.failure}."
    if found.shared:
        said += (
            f" {found.shared} rounds were taken part in before: what they contributed stays in "
            "the shared adapter, within its epsilon."
        )
    _show(as_json, found, said)


@device_app.command()
def export(
    path: Annotated[Path, typer.Argument(help="A ZIP file that is made.")],
    home: HomeFolder = HOME,
    as_json: AsJson = False,
) -> None:
    """Write all that is kept about you into one file, in the clear."""
    with _vault(home) as me:
        made = me.export(path)
    _show(as_json, {"path": str(made)}, f"{made}: not encrypted; keep it where you keep letters.")


@device_app.command()
def erase(
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    home: HomeFolder = HOME,
    as_json: AsJson = False,
) -> None:
    """Destroy the vault and its keys; copies of it become unreadable too.

    Works without the passphrase, and whatever is damaged. What privacy was spent
    is remembered, so that joining again does not spend it twice.
    """
    from homefire.client import erasure
    from homefire.client.vault import open_vault
    from homefire.client.vault_files import RECEIPT

    place = home.expanduser()
    if not yes and not typer.confirm(f"Destroy everything in {place}? There is no way back."):
        raise typer.Exit(1)
    _no_core_dumps()
    phrase = os.environ.get("HOMEFIRE_PASSPHRASE")
    try:
        # For the receipt's signature, and for what only the vault's log may know.
        with open_vault(place, passphrase=phrase, accept_backup=True) as vault:
            receipt = erasure.erase(place, vault=vault)
    except BusyVaultError:
        raise
    except HomefireError:
        receipt = erasure.erase(place)
    _show(as_json, receipt, f"{receipt.statement}\nReceipt: {place / RECEIPT}")


@device_app.command()
def join(
    superlink: Annotated[str, typer.Argument(metavar="HOST:PORT", help="Of the federation.")],
    root_certificates: Annotated[
        Path | None, typer.Option(help="The authority behind its certificate.")
    ] = None,
    node_key: Annotated[
        Path | None, typer.Option(help="The key that the operator registered, if it is asked for.")
    ] = None,
    insecure: Annotated[bool, typer.Option(help="Without TLS, on this machine alone.")] = False,
    on_mains: Annotated[bool, typer.Option(help="Only while not on the battery.")] = False,
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
    from homefire.client.conditions import BetweenRounds, Condition, Idle, on_mains_power
    from homefire.client.joining import Link, contributed
    from homefire.client.personalize.recipe import SHARED

    if as_json and not yes:
        raise typer.BadParameter("it asks nothing, so give --yes too", param_hint="--json")
    link = Link(superlink, root_certificates, insecure, node_key)
    conditions: list[Condition] = [on_mains_power] * on_mains
    if when_idle:
        conditions.append(BetweenRounds(Idle()))
    with _vault(home) as me:
        shown = me.preview()
        _show(
            as_json,
            {"preview": asdict(shown)},
            f"Each contribution: {shown.parameters} numbers, {shown.bytes_up / 1e3:.1f} kB up, "
            f"{shown.bytes_down / 1e3:.1f} kB down; at most ε = {_epsilon(shown.largest_epsilon)} "
            "each.\nε spent so far: "
            f"{_spent(shown.spent_epsilon, shown.lifetime_epsilon, shown.delta)}. "
            "Your texts stay here.",
        )
        if not yes and not typer.confirm(f"Take part at {superlink}?"):
            raise typer.Exit(1)
        stop = Event()
        signal.signal(signal.SIGINT, lambda *_: stop.set())
        signal.signal(signal.SIGTERM, lambda *_: stop.set())
        taken = me.join(link, conditions=conditions, stop=stop, on_change=_tell_changes(as_json))
        for each in contributed(me.vault, me.assistant.model.specs[SHARED], taken):
            sent = "another adapter's size" if each.bytes_up is None else f"{each.bytes_up} bytes"
            _show(
                as_json,
                {"contributed": asdict(each)},
                f"Run {each.run[:8]}, round {each.round}: ε = {_epsilon(each.epsilon)}, {sent}.",
            )
        after = me.status()
        spent = _spent(after.epsilon, after.lifetime_epsilon, after.delta)
        whole = {
            "rounds": len(taken),
            "epsilon": after.epsilon,
            "lifetime_epsilon": after.lifetime_epsilon,
            "delta": after.delta,
        }
        _show(as_json, whole, f"Took part in {len(taken)} rounds; ε spent: {spent}.")


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
        _show(as_json, {**about, "seconds": change.seconds}, said)

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

    Get the key from the server's operator, not from the server. Whoever holds it
    decides which shared adapter you wear, and nothing else.

    Example:
      homefire device trust KEY --registry models.example:9093
    """
    with _vault(home) as me:
        found = me.trust(
            key, registry, root_certificates=root_certificates, replace_key=replace_key
        )
    said = f"Releases of key {found.key[:16]}… are taken from {found.registry}."
    _show(as_json, {"key": found.key, "registry": found.registry}, said)


@device_app.command()
def update(home: HomeFolder = HOME, as_json: AsJson = False) -> None:
    """Fetch the newest shared adapter; nothing is contributed, nothing charged.

    It is taken if the trusted key signed it for your base model and it is not
    older than what you had. Your private adapter stays on top only where it
    still helps on your newest records.
    """
    from homefire.common.privacy.words import deployment_in_words, in_words

    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # what it has to say, the errors say better
    with _vault(home) as me, _download(as_json) as advance:
        found = me.update(progress=advance)
    statement = found.statement
    if as_json:
        more = {"first_of_run": found.first_of_run, "private_helps": found.helps}
        release = statement.model_dump(mode="json")
        _show(True, {"changed": found.changed, **more, "release": release}, "")
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

    with _vault(home) as me:
        serve_vault(
            me,
            host=host,
            port=port,
            expose=expose,
            names=names or (),
            learn=learn,
            new_token=new_token,
            say=lambda url, token: _show(
                as_json,
                {"url": url, "token": token},
                f"Page: {url}/#token={token}\nFor apps: base URL {url}/v1, API key {token}",
            ),
        )


@device_app.command()
def doctor(
    accept_backup: Annotated[
        bool,
        typer.Option(
            help="Go on with a vault from a backup: what was forgotten since is there again; what "
            "privacy was spent since stays spent."
        ),
    ] = False,
    rotate: Annotated[bool, typer.Option(help="Encrypt everything under new keys.")] = False,
    change_passphrase: Annotated[bool, typer.Option(help="Ask for a new passphrase.")] = False,
    home: HomeFolder = HOME,
    as_json: AsJson = False,
) -> None:
    """Look at every page of the vault, and mend what can be mended."""
    from homefire.client.personalizer import Personalizer
    from homefire.client.vault import examine

    _no_core_dumps()
    place, phrase = home.expanduser(), _present_passphrase(home)
    problems = examine(place, passphrase=phrase)
    if not problems:
        with Personalizer.open(place, passphrase=phrase, accept_backup=accept_backup) as me:
            if change_passphrase:
                me.vault.change_protection(passphrase=_ask_passphrase(confirm=True))
            if rotate:
                me.vault.rotate(passphrase=me.passphrase)
            problems = me.vault.database.problems()
    _show(as_json, {"problems": problems}, "\n".join(problems) or "The vault is whole.")
    if problems:
        raise typer.Exit(4)


def _present_passphrase(home: Path) -> str | None:
    """What opens a vault; asked for where it is needed and somebody can answer."""
    from homefire.client.keys import KeyFile
    from homefire.client.vault_files import KEYS

    phrase = os.environ.get("HOMEFIRE_PASSPHRASE")
    protection = KeyFile.read(home.expanduser() / KEYS).header.protection
    if phrase is None and protection != "keystore" and sys.stdin.isatty():
        return _ask_passphrase(confirm=False)
    return phrase


@contextmanager
def _vault(
    home: Path, *, ask: bool = True, accept_backup: bool = False
) -> Iterator["Personalizer"]:
    """An existing vault, open; asks for the passphrase where one is needed."""
    from homefire.client.keys import KeyFile
    from homefire.client.personalizer import Personalizer
    from homefire.client.vault_files import KEYS

    _no_core_dumps()
    place = home.expanduser()
    phrase = os.environ.get("HOMEFIRE_PASSPHRASE")
    protection = KeyFile.read(place / KEYS).header.protection
    if phrase is None and protection != "keystore" and ask and sys.stdin.isatty():
        phrase = _ask_passphrase(confirm=False)
    with Personalizer.open(place, passphrase=phrase, accept_backup=accept_backup) as me:
        yield me


def _ask_passphrase(*, confirm: bool) -> str:
    if not sys.stdin.isatty():
        raise ConfigError("a passphrase is needed", hint="Set HOMEFIRE_PASSPHRASE.")
    return str(typer.prompt("Passphrase", hide_input=True, confirmation_prompt=confirm))


def _reply(reply: "Reply") -> str:
    text = str(reply)
    about = {"records": reply.records, "finish_reason": reply.finish_reason}
    return json.dumps({"text": text, "recipe": reply.recipe.model_dump(), **about})


def _one_line(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= LONGEST_LINE else f"{line[: LONGEST_LINE - 1]}…"


def _line(mark: str) -> str:
    try:
        return input(mark).strip()
    except EOFError:
        return ""


def _no_core_dumps() -> None:
    """A crash must not write keys and texts to the disk."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


@contextmanager
def _progress(as_json: bool) -> Iterator[Callable[[int, int], None]]:
    """A bar for a training; none where a machine reads."""
    if as_json:
        yield lambda step, steps: None
        return
    from homefire.client.progress import step_bar

    with step_bar(Console(stderr=True), "Private adapter") as advance:
        yield advance


@contextmanager
def _download(as_json: bool) -> Iterator[Callable[[int, int], None]]:
    """A bar for a download; none where a machine reads."""
    if as_json:
        yield lambda done, of: None
        return
    from homefire.client.progress import byte_bar

    with byte_bar(Console(stderr=True), "Shared adapter") as advance:
        yield advance


def _show(as_json: bool, found: Any, said: str) -> None:
    if as_json:
        plain = asdict(found) if is_dataclass(found) and not isinstance(found, type) else found
        typer.echo(json.dumps(plain, default=str, ensure_ascii=False))
    else:
        typer.echo(said)


def _learned(found: "Learned") -> str:
    numbers = f"{found.loss_without:.3f} without, {found.loss_trained:.3f} with the new one"
    if found.loss_before is not None:
        numbers += f", {found.loss_before:.3f} with the one before"
    outcome = f"Version {found.version} is in use" if found.version else "None is in use"
    if not found.kept:
        outcome += ": the new one is not better"
    return f"{outcome} (loss on your newest records: {numbers})."


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


def _opener(protection: str) -> str:
    return {
        "passphrase": "a passphrase",
        "keystore": "the system's keystore",
        "both": "a passphrase and the system's keystore",
    }[protection]


def _spent(epsilon: float | None, allowed: float, delta: float) -> str:
    return f"{_epsilon(epsilon)} of {allowed:g} at δ = {delta:g}"


def _epsilon(value: float | None) -> str:
    return "∞" if value is None else f"{value:.2f}"


def exit_code(error: HomefireError) -> int:
    """What a command ends with."""
    if isinstance(error, WrongKeyError):
        return 3
    if isinstance(error, DamagedVaultError | ForeignVaultError | OldVaultError | VaultVersionError):
        return 4
    return 5 if isinstance(error, BusyVaultError) else 1
