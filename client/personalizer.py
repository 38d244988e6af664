"""The SDK: a person's language model on the person's device.

>>> from homefire.client import Personalizer                      # doctest: +SKIP
>>> me = Personalizer.open("~/.homefire")                         # doctest: +SKIP
>>> me.remember("I prefer concise, technical explanations.")      # doctest: +SKIP
>>> print(me.ask("What is overfitting?"))                         # doctest: +SKIP
"""

import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any

from homefire.client.conditions import Condition
from homefire.client.enrolment import Enrolled, enroll, enrolled_with, link_to
from homefire.client.erasure import Receipt, erase
from homefire.client.forgetting import change_record, forget_records
from homefire.client.importers import Format, format_of, read_history
from homefire.client.joining import Link, Membership, Preview, preview
from homefire.client.joining_changes import Change
from homefire.client.keys import Protection
from homefire.client.outcomes import Forgotten, Imported, Learned, Progress
from homefire.client.overview import Status, overview
from homefire.client.personalize.recipe import AUTO, PRIVATE, SHARED, Recipe
from homefire.client.personalize.sampling import Sampling
from homefire.client.profile import Profile, describe
from homefire.client.takeout import write_takeout
from homefire.client.trust import Trust, trust
from homefire.client.vault import Vault, create, open_vault
from homefire.client.vault_files import KEYS
from homefire.client.vault_home import VaultHome, write_settings
from homefire.client.vault_records import StoredRecord
from homefire.client.verdict import is_open
from homefire.common.adapter import AdapterConfig
from homefire.common.chat import Message
from homefire.common.config import BaseModelConfig, validate
from homefire.common.errors import ConfigError, HomefireError
from homefire.common.policy import Participation
from homefire.common.records import Record, Skipped, check_text

if TYPE_CHECKING:
    from homefire.client.assistant import Assistant, Reply
    from homefire.client.updates import Updated

FACTS = "facts"


@dataclass
class Personalizer:
    """One person's vault and language model; made by `Personalizer.open`.

    Guarantees:
        Nothing leaves: but for `join` and `update`, nothing here uses the network; `update` sends
            nothing but what it asks for.

    Attributes:
        vault: Where all of it is kept.
        passphrase: What opened it, for the process that takes part in federations.
    """

    vault: Vault
    passphrase: str | None = field(repr=False, default=None)

    @classmethod
    def open(
        cls,
        folder: str | os.PathLike[str] = "~/.homefire",
        *,
        base_model: str | None = None,
        passphrase: str | None = None,
        protection: Protection | None = None,
        accept_backup: bool = False,
    ) -> "Personalizer":
        """Open a vault, or make one where there is none.

        Args:
            folder: Where it lies.
            base_model: An alias, a folder, a GGUF file or a hub id; kept in `device.toml` when the
                vault is made.
            passphrase: What opens it; by default the environment variable HOMEFIRE_PASSPHRASE, or
                else the system's keystore.
            protection: "passphrase", "keystore" or "both", when it is made.
            accept_backup: Take a vault that was put back from a backup; see `open_vault`.

        Raises:
            ConfigError: Another base model than the vault's; or neither keystore nor passphrase.
            VaultError: It cannot be opened; its subclasses say why.
        """
        place = Path(folder).expanduser()
        phrase = passphrase if passphrase is not None else os.environ.get("HOMEFIRE_PASSPHRASE")
        if (place / KEYS).exists():
            vault = open_vault(place, passphrase=phrase, accept_backup=accept_backup)
        else:
            name = base_model or BaseModelConfig().name
            prepare = partial(write_settings, place, name)
            vault = create(place, passphrase=phrase, protection=protection, prepare=prepare)
        with ExitStack() as undo:
            undo.callback(vault.close)
            me = cls(vault, phrase)
            kept = me._home.config.base_model.name
            if base_model is not None and base_model != kept:
                raise ConfigError(
                    f"this vault's base model is {kept!r}, not {base_model!r}",
                    hint=f"Change it in {place / 'device.toml'}, and personalize again.",
                )
            undo.pop_all()
        return me

    # What it knows

    def remember(
        self, text: str, *, prompt: str | None = None, created_at: str | None = None
    ) -> int:
        """Keep something the person says or wrote; returns the record's id.

        Args:
            text: The person's own words.
            prompt: What they answer, if anything.
            created_at: ISO 8601; now if absent.

        Raises:
            DataError: No text, or no date.
        """
        return self.vault.records.remember(Record(text, prompt, created_at))

    def import_records(
        self,
        path: str | os.PathLike[str],
        *,
        format: Format | None = None,
        me: str | None = None,
        on_bad: str = "error",
    ) -> Imported:
        """Read a history from what people have; what was imported before is left out.

        Args:
            path: A file or folder; see `homefire.client.importers.read_history`.
            format: Found out if absent.
            me: The person's e-mail addresses, for mailboxes.
            on_bad: "error" stops at the first bad record, and nothing is imported; "skip" leaves
                bad ones out and counts them.

        Raises:
            DataError: It cannot be read, or a record is bad.
        """
        if on_bad not in ("error", "skip"):
            raise ConfigError(f"on_bad is {on_bad!r}", hint='Use "error" or "skip".')
        skipped = Skipped() if on_bad == "skip" else None
        place = Path(path).expanduser()
        records = list(read_history(place, format=format, me=me, skipped=skipped))
        dated = (format or format_of(place)) != "text"
        added = self.vault.records.add(records, place.name, dated=dated)
        return Imported(added, len(records) - added, dict(skipped.reasons) if skipped else {})

    def change(self, number: int, text: str) -> int:
        """Put another text in place of a record's; the old one is forgotten.

        With it goes every version of the private adapter that has seen it.

        Returns:
            The record's new id.

        Raises:
            DataError: No such record, or no text.
        """
        try:
            return change_record(self.vault, number, text)
        finally:
            self._adapters_changed()

    def records(self, count: int = 50, *, before: int | None = None) -> list[StoredRecord]:
        """The records that came last, the last one first; `before` an id, for the next page."""
        return self.vault.records.newest(count, **({} if before is None else {"before": before}))

    def search(self, question: str, count: int = 10) -> list[StoredRecord]:
        """The records that fit a question best, best first."""
        return self.vault.records.search(question, count)

    def participations(self) -> tuple[Participation, ...]:
        """The rounds that were taken part in, and what each cost, oldest first."""
        return self._home.history

    def profile(self) -> Profile:
        """What the person said to be true, and what the history shows."""
        facts: dict[str, str] = self.vault.setting(FACTS, {})
        return describe(facts, self.vault.records.history())

    def set_fact(self, name: str, value: str | None) -> None:
        """Say something about oneself, such as `set_fact("name", "Ann")`; None takes it back.

        Raises:
            DataError: One of them is no text.
        """
        for part, text in (("name", name), ("value", value or "")):
            check_text(part, text, where="a fact")
        with self.vault.database.transaction():
            facts: dict[str, str] = self.vault.setting(FACTS, {})
            facts.pop(name, None)
            self.vault.set(FACTS, facts if value is None else {**facts, name: value})

    # What it does

    def personalize(
        self, *, progress: Progress | None = None, memory_limit: int | None = None, seed: int = 0
    ) -> Learned:
        """Train the private adapter; the better of the old and the new one is used.

        Args:
            progress: Called with the steps taken and the steps there are.
            memory_limit: MiB that training may take besides the model.
            seed: Of the batch order.

        Raises:
            DataError: Too few records.
            AdapterError: Training diverged; what was in use stays.
        """
        from homefire.client.learning import learn

        with self.assistant.lock:
            try:
                return learn(
                    self.vault,
                    self.assistant.model,
                    self._home.config.private,
                    seed=seed,
                    memory_limit=memory_limit,
                    progress=progress or (lambda step, steps: None),
                )
            finally:
                self._adapters_changed()

    def recheck(self) -> bool:
        """Compare the private adapter with the shared one, on the person's newest records.

        Until then, "auto" does not wear it on top of a shared adapter that it was not trained on.

        Returns:
            Whether it helps.

        Raises:
            ModelError: The base model is missing.
        """
        from homefire.client.learning import recheck

        with self.assistant.lock:
            try:
                return recheck(self.vault, self.assistant.model, self._home.config.private)
            finally:
                self._adapters_changed()

    def ask(
        self,
        question: str,
        *,
        recipe: str | Recipe = AUTO,
        max_tokens: int = 256,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> "Reply":
        """Ask one question; `print` the reply, or iterate over it as it is made.

        Args:
            question: Anything.
            recipe: A name ("auto", "plain", "shared", "private", "retrieval", "both") or a recipe.
            max_tokens: Of the reply.
            temperature: 0 takes the likeliest token.
            seed: Of the draws.

        Raises:
            ConfigError: No such recipe, or no private adapter for it.
            ModelError: The base model is missing.
        """
        messages: list[Message] = [{"role": "user", "content": question}]
        asked = {"max_tokens": max_tokens, "temperature": temperature, "seed": seed}
        sampling = validate(Sampling, asked, where="what was asked for")
        return self.chat(messages, recipe=recipe, sampling=sampling)

    def chat(
        self,
        messages: Sequence[Message],
        *,
        recipe: str | Recipe = AUTO,
        sampling: Sampling | None = None,
    ) -> "Reply":
        """Go on with a conversation.

        Args:
            messages: With `role` and `content`, the last one the person's.
            recipe: As in `ask`.
            sampling: How tokens are picked.

        Raises:
            DataError: There is no question at its end.
            ConfigError: As `ask`.
        """
        chosen = recipe if isinstance(recipe, Recipe) else self.assistant.recipe(recipe)
        return self.assistant.reply(messages, chosen, sampling or Sampling())

    def status(self) -> Status:
        """What is stored, and what was shared."""
        return overview(self.vault)

    def enroll(self, ticket: str) -> str:
        """Enrol with a server: its ticket is redeemed, and its key put into `policy.toml`.

        Nothing is contributed before `join`.

        Args:
            ticket: One line, from the server's operator.

        Returns:
            The server, host:port.

        Raises:
            ConfigError: No ticket; or the policy names another server already.
            EnrolmentError: The server refuses it, or cannot be reached.
        """
        return enroll(self.vault, ticket).superlink

    def _enrolled(self) -> Enrolled:
        if (found := enrolled_with(self.vault)) is None:
            raise ConfigError(
                "this device is not enrolled with a server",
                hint="homefire device enroll - reads its ticket; or name the SuperLink.",
            )
        return found

    def preview(self) -> Preview:
        """What taking part in a federation would send, before anything is."""
        return preview(self.vault, self.assistant.model.specs[SHARED])

    def join(
        self,
        link: Link | str | None = None,
        *,
        conditions: Sequence[Condition] = (),
        stop: Event | None = None,
        on_change: Callable[[Change], None] = lambda change: None,
    ) -> tuple[Participation, ...]:
        """Take part in a federation, until `stop` is set.

        What `policy.toml` and the ledger in the vault allow is answered, nothing else. Afterwards
        the private adapter is compared with the shared one that came meanwhile; see `recheck`.

        Args:
            link: The SuperLink; host:port alone means TLS with the system's authorities. By default
                the server that this device is enrolled with.
            conditions: All must hold while the device takes part, such as those of
                `homefire.client.conditions`.
            stop: Set by another thread, or by a signal's handler.
            on_change: Called with whatever changes between the device and the federation.

        Returns:
            What was taken part in meanwhile.

        Raises:
            ConfigError: The policy trusts no server, there is no TLS to another machine, or a file
                of the link cannot be read.
        """
        with ExitStack() as until:
            until.callback(self._adapters_changed)
            if link is None:
                link = until.enter_context(link_to(self._enrolled()))
            where = Link(link) if isinstance(link, str) else link
            member = Membership(self.vault, where, self.passphrase, conditions, on_change)
            taken = member.run(stop or Event())
        if is_open(self.vault):
            self.recheck()
        return taken

    def trust(
        self,
        key: str,
        registry: str,
        *,
        root_certificates: str | os.PathLike[str] | None = None,
        replace_key: bool = False,
    ) -> Trust:
        """Say whose releases `update` takes, and from where.

        Args:
            key: The server's public key, 64 hex digits, from somebody who is believed.
            registry: host:port.
            root_certificates: A PEM file of the authority behind its certificate; by default the
                system's.
            replace_key: Take another key than the one that is trusted.

        Raises:
            ConfigError: No key, address or certificate; or another key is trusted already.
        """
        path = None if root_certificates is None else Path(root_certificates).expanduser()
        return trust(self.vault, key, registry, root_certificates=path, replace_key=replace_key)

    def update(self, *, progress: Progress | None = None) -> "Updated":
        """Fetch the newest release of the shared adapter, without contributing anything.

        What the trusted key signed for this base model is put in place; then the private adapter is
        compared with it on the person's newest records, and "auto" wears both only where that
        helps.

        Args:
            progress: Called with the bytes that are there and those that there will be.

        Raises:
            ConfigError: Nobody is trusted yet.
            ModelError: The base model is missing.
            UpdateError: Nothing was put in place; its subclasses say why.
        """
        from homefire.client.updates import Fit, update

        def fit(adapter: AdapterConfig) -> Fit:
            from homefire.common.peft_adapter import resolve_spec  # brings torch

            with self.assistant.lock:
                base = self.assistant.model.base
                return Fit(base.fingerprint, resolve_spec(adapter, base.model.config))

        found = update(self.vault, fit, progress=progress or (lambda done, of: None))
        self._adapters_changed()
        # Also where nothing changed: a kill may have come between a release and this look.
        return replace(found, helps=self.recheck()) if is_open(self.vault) else found

    def restore(self, version: int) -> None:
        """Use an earlier version of the private adapter.

        Raises:
            AdapterError: There is no such version.
        """
        self.vault.adapters.wear(PRIVATE, version)

    # What it forgets

    def forget(
        self,
        *,
        ids: Sequence[int] = (),
        query: str | None = None,
        before: str | None = None,
        retrain: bool = True,
        progress: Progress | None = None,
    ) -> Forgotten:
        """Forget records: text, index and every version of the private adapter that saw them.

        Args:
            ids: These records.
            query: Those that hold all of these words.
            before: Those that are older than this date.
            retrain: Train the private adapter again without them, if one of them was in use.
            progress: Of that training.

        Guarantees:
            Forgotten is gone: neither vault nor adapters hold it afterwards; what was contributed
                before stays in the shared adapter, within its epsilon.

        Raises:
            ConfigError: Nothing says what to forget.
            DataError: A date that is none.
        """
        try:
            gone = forget_records(self.vault, ids=ids, query=query, before=before)
        finally:
            self._adapters_changed()
        learned, failure = None, None
        if retrain and gone.worn:
            try:
                learned = self.personalize(progress=progress)
            except HomefireError as error:  # such as too few records: the adapter stays dropped
                failure = str(error)
        return Forgotten(
            records=gone.records,
            adapters=gone.adapters,
            learned=learned,
            failure=failure,
            swept=gone.swept,
            shared=len(self._home.history),
        )

    def protect(
        self, *, passphrase: str | None = None, protection: Protection | None = None
    ) -> None:
        """Open the vault by another passphrase, or by other means, from now on.

        Args:
            passphrase: The new one, where one is needed.
            protection: "passphrase", "keystore" or "both"; by default what it was.

        Raises:
            ConfigError: No passphrase where one is needed, a guessable one, or no keystore.
            BusyVaultError: Another process has it open.
        """
        self.vault.change_protection(passphrase=passphrase, protection=protection)
        self.passphrase = passphrase

    def rotate(self) -> None:
        """Encrypt everything under new keys; who has old ones can read only old copies.

        Raises:
            BusyVaultError: Another process has it open.
        """
        self.vault.rotate(passphrase=self.passphrase)

    def export(self, path: str | os.PathLike[str]) -> Path:
        """Write everything that is kept about the person into one ZIP file, in the clear.

        Returns:
            The file.

        Raises:
            ConfigError: It cannot be written, or is there already.
        """
        return write_takeout(self.vault, self.profile(), Path(path).expanduser())

    def erase(self) -> Receipt:
        """Destroy the vault and its keys; there is no way back.

        Raises:
            BusyVaultError: Another process has it open.
        """
        return erase(self.vault.folder, vault=self.vault)

    def close(self) -> None:
        """Let go of the vault."""
        self.vault.close()

    def __enter__(self) -> "Personalizer":
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()

    @cached_property
    def assistant(self) -> "Assistant":
        """What replies; made when first asked for, for it brings torch."""
        from homefire.client.assistant import Assistant

        return Assistant(self.vault)

    def _adapters_changed(self) -> None:
        if "assistant" in self.__dict__:
            self.assistant.forget_loaded()

    @property
    def _home(self) -> VaultHome:
        return VaultHome(self.vault)
