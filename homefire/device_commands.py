"""`homefire device`: one person's vault and language model, on the person's machine."""

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from homefire.common.errors import (
    BusyVaultError,
    ConfigError,
    HomefireError,
)
from homefire.common.printable import printable
from homefire.device_session import (
    HOME,
    NEW_PASSPHRASE,
    PASSPHRASE,
    HomeFolder,
    ask_passphrase,
    device_app,
    no_core_dumps,
    open_vault,
    present_passphrase,
    say_spent,
    show,
)
from homefire.options import AsJson

if TYPE_CHECKING:
    from homefire.client.assistant import Reply
    from homefire.client.outcomes import Learned

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
    no_core_dumps()
    phrase = os.environ.get("HOMEFIRE_PASSPHRASE")
    needed = protection in ("passphrase", "both") or (protection is None and not secure_backend())
    if phrase is None and needed:
        phrase = ask_passphrase(confirm=True)
    with Personalizer.open(
        place, base_model=base_model, passphrase=phrase, protection=protection
    ) as me:
        status = me.status()
        show(as_json, status, f"A vault in {place}, opened by {_opener(status.protection)}.")


@device_app.command()
def remember(
    text: Annotated[str, typer.Argument(help="Your own words; - reads standard input.")],
    prompt: Annotated[str | None, typer.Option(help="What they answer, if anything.")] = None,
    home: HomeFolder = HOME,
    as_json: AsJson = False,
) -> None:
    """Keep something you say."""
    words = sys.stdin.read() if text == "-" else text
    with open_vault(home) as me:
        number = me.remember(words, prompt=prompt)
        show(as_json, {"id": number}, f"Record {number}.")


@device_app.command()
def records(
    search: Annotated[str | None, typer.Option(help="Those that fit these words best.")] = None,
    count: Annotated[int, typer.Option(min=1, help="At most so many.")] = 20,
    before: Annotated[int | None, typer.Option(help="Ids below this one: the next page.")] = None,
    change: Annotated[int | None, typer.Option(metavar="ID", help="Give it another text.")] = None,
    text: Annotated[str | None, typer.Option(help="The other text.")] = None,
    home: HomeFolder = HOME,
    as_json: AsJson = False,
) -> None:
    """What is kept of what you wrote, what came last first; change one.

    With another text a record gets another id, and private adapters that have
    seen the old one are deleted.

    Examples:
      homefire device records --search "train to Porto"
      homefire device records --change 12 --text "I live in Porto now"
    """
    if (change is None) != (text is None):
        raise ConfigError("--change and --text go together")
    if search is not None and before is not None:
        raise ConfigError("--before pages through all records, not through a search")
    with open_vault(home) as me:
        if change is not None and text is not None:
            number = me.change(change, text)
            show(as_json, {"id": number}, f"Record {number}.")
            return
        found = me.search(search, count) if search else me.records(count, before=before)
    if as_json:
        show(True, [asdict(each) for each in found], "")
        return
    table = Table("id", "date", "text", "source", box=None)
    for each in found:
        date, shown = (each.record.created_at or "")[:10], escape(_one_line(each.record.text))
        table.add_row(str(each.id), date, shown, escape(printable(each.source)))
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
    was imported before is left out; what you forgot or changed comes back if it
    is still in the file.
    """
    with open_vault(home) as own:
        found = own.import_records(path, format=format, me=me, on_bad=on_bad)
        left = sum(found.skipped.values())
        more = f", {left} left out" if left else ""
        show(as_json, found, f"{found.added} new records, {found.known} known{more}.")


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
    with open_vault(home) as me:
        if restore is not None:
            me.restore(restore)
            show(as_json, {"version": restore}, f"Version {restore} is in use.")
            return
        with _progress(as_json) as advance:
            found = me.personalize(memory_limit=memory_limit, seed=seed, progress=advance)
        show(as_json, found, _learned(found))


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
    with open_vault(home) as me:
        reply = me.ask(
            words, recipe=recipe, max_tokens=max_tokens, temperature=temperature, seed=seed
        )
        if as_json:
            typer.echo(_reply(reply))
            return
        _write(reply)


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
    with open_vault(home) as me:
        while question := _line("" if as_json else "> "):
            messages.append({"role": "user", "content": question})
            reply = me.chat(messages, recipe=recipe, sampling=sampling)
            if as_json:
                typer.echo(_reply(reply))
            else:
                _write(reply)
            messages.append({"role": "assistant", "content": reply.text})
            if learn:
                me.remember(question)


@device_app.command()
def status(home: HomeFolder = HOME, as_json: AsJson = False) -> None:
    """What is stored, and what was shared."""
    with open_vault(home) as me:
        found = me.status()
    if as_json:
        show(True, found, "")
        return
    table = Table(box=None, show_header=False)
    worn = next((each for each in found.private if each.worn), None)
    size, dates = f"{found.bytes / 1e6:.1f} MB", f", {found.oldest} to {found.newest}"
    rows = {
        "vault": f"{found.folder}, {size}, opened by {_opener(found.protection)}",
        "key": found.public_key,
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
        "ε spent": say_spent(found.epsilon, found.lifetime_epsilon, found.delta),
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
    with open_vault(home) as me:
        if fact is not None:
            name, mark, value = fact.partition("=")
            if not mark or not name.strip():
                raise ConfigError(f"{fact!r} is no fact", hint="Write --set name=Ann.")
            me.set_fact(name.strip(), value.strip() or None)
        found = me.profile()
    if as_json:
        show(True, found, "")
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
    with open_vault(home) as me, _progress(as_json) as advance:
        found = me.forget(
            ids=ids or (), query=query, before=before, retrain=retrain, progress=advance
        )
    said = f"{found.records} records forgotten, {len(found.adapters)} private adapters deleted."
    if found.learned is not None:
        said += " " + _learned(found.learned)
    if not found.swept:
        said += " They leave the disk when the vault is closed: another process was reading."
    if found.failure is not None:
        said += f" None was trained again: {found.failure}."
    if found.shared:
        said += (
            f" {found.shared} rounds were taken part in before: what they contributed stays in "
            "the shared adapter, within its epsilon."
        )
    show(as_json, found, said)


@device_app.command()
def export(
    path: Annotated[Path, typer.Argument(help="A ZIP file that is made.")],
    home: HomeFolder = HOME,
    as_json: AsJson = False,
) -> None:
    """Write all that is kept about you into one file, in the clear."""
    with open_vault(home) as me:
        made = me.export(path)
    show(as_json, {"path": str(made)}, f"{made}: not encrypted; keep it where you keep letters.")


@device_app.command()
def erase(
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    home: HomeFolder = HOME,
    as_json: AsJson = False,
) -> None:
    """Destroy the vault and its keys.

    Copies of a vault that needs the system's keystore become unreadable too; of
    one that a passphrase opens, they need that. Works without the passphrase,
    and whatever is damaged. What privacy was spent is remembered, so that
    joining again does not spend it twice.
    """
    from homefire.client import erasure
    from homefire.client.vault import open_vault
    from homefire.client.vault_files import RECEIPT

    place = home.expanduser()
    if not yes and not typer.confirm(f"Destroy everything in {place}? There is no way back."):
        raise typer.Exit(1)
    no_core_dumps()
    phrase = _passphrase_if_known(place)
    try:
        # For the receipt's signature, and for what only the vault's log may know.
        with open_vault(place, passphrase=phrase, accept_backup=True) as vault:
            receipt = erasure.erase(place, vault=vault)
    except BusyVaultError:
        raise
    except HomefireError:
        receipt = erasure.erase(place)
    show(as_json, receipt, f"{receipt.statement}\nReceipt: {place / RECEIPT}")


def _passphrase_if_known(home: Path) -> str | None:
    """A person may have lost it, which must not keep the vault alive."""
    if PASSPHRASE in os.environ or not sys.stdin.isatty():
        return os.environ.get(PASSPHRASE)
    asked = "Passphrase, for a signed receipt; empty if it is lost"
    return str(typer.prompt(asked, default="", hide_input=True, show_default=False)) or None


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
    protection: Annotated[
        Literal["passphrase", "keystore", "both"] | None,
        typer.Option(help="What opens the vault from now on."),
    ] = None,
    home: HomeFolder = HOME,
    as_json: AsJson = False,
) -> None:
    """Look at every page of the vault, and mend what can be mended.

    A new passphrase is asked for, or taken from HOMEFIRE_NEW_PASSPHRASE.
    """
    from homefire.client.personalizer import Personalizer
    from homefire.client.vault import examine

    no_core_dumps()
    place, phrase = home.expanduser(), present_passphrase(home)
    problems = examine(place, passphrase=phrase)
    if not problems:
        with Personalizer.open(place, passphrase=phrase, accept_backup=accept_backup) as me:
            means = protection or me.vault.header.protection
            if change_passphrase and means == "keystore":
                raise ConfigError(
                    "this vault is opened by the system's keystore, not by a passphrase",
                    hint="Give --protection both, or --protection passphrase, too.",
                )
            if change_passphrase or protection is not None:
                asked = change_passphrase or protection in ("passphrase", "both")
                new = ask_passphrase(confirm=True, variable=NEW_PASSPHRASE) if asked else None
                me.protect(passphrase=new, protection=protection)
            if rotate:
                me.rotate()
            problems = me.vault.database.problems()
    show(as_json, {"problems": problems}, "\n".join(problems) or "The vault is whole.")
    if problems:
        raise typer.Exit(4)


def _reply(reply: "Reply") -> str:
    text = str(reply)
    about = {"records": reply.records, "finish_reason": reply.finish_reason}
    return json.dumps({"text": text, "recipe": reply.recipe.model_dump(), **about})


def _write(reply: "Reply") -> None:
    """Write an answer as it comes; with --json it is as the model made it."""
    for piece in reply:
        typer.echo(printable(piece, instead="", lines=True), nl=False)
    typer.echo()


def _one_line(text: str) -> str:
    line = printable(" ".join(text.split()))
    return line if len(line) <= LONGEST_LINE else f"{line[: LONGEST_LINE - 1]}…"


def _line(mark: str) -> str:
    try:
        return input(mark).strip()
    except EOFError:
        return ""


@contextmanager
def _progress(as_json: bool) -> Iterator[Callable[[int, int], None]]:
    """A bar for a training; none where a machine reads."""
    if as_json:
        yield lambda step, steps: None
        return
    from homefire.client.progress import step_bar

    with step_bar(Console(stderr=True), "Private adapter") as advance:
        yield advance


def _learned(found: "Learned") -> str:
    numbers = f"{found.loss_without:.3f} without, {found.loss_trained:.3f} with the new one"
    if found.loss_before is not None:
        numbers += f", {found.loss_before:.3f} with the one before"
    outcome = f"Version {found.version} is in use" if found.version else "None is in use"
    if not found.kept:
        outcome += ": the new one is not better"
    return f"{outcome} (loss on your newest records: {numbers})."


def _opener(protection: str) -> str:
    return {
        "passphrase": "a passphrase",
        "keystore": "the system's keystore",
        "both": "a passphrase and the system's keystore",
    }[protection]
