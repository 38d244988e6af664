"""Replies on the device: from a question to text, by one recipe."""

from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from threading import RLock

from homefire.client.device import adapted_model
from homefire.client.learning import fits, is_proven
from homefire.client.personalize.decoding import (
    FinishReason,
    Pass,
    generate,
    stream_text,
)
from homefire.client.personalize.prompt import Note, assemble, check_conversation
from homefire.client.personalize.recipe import AUTO, PRIVATE, SHARED, Recipe, named
from homefire.client.personalize.sampling import Sampling
from homefire.client.vault import Vault
from homefire.client.vault_home import VaultHome
from homefire.client.vault_records import StoredRecord
from homefire.common.adapted_model import AdaptedModel
from homefire.common.adapter import AdapterConfig
from homefire.common.chat import Message
from homefire.common.errors import AdapterError, ConfigError

NOTES = 4
"""Records that are looked at for a reply; the first carries most of what they are good for."""

NEXT_TURN = "\nuser:"
"""Where a model without a chat template begins to speak for the person."""

LONGEST_NOTE = 600
"""Characters of a record that go into a prompt."""

LEFT_FOR_REPLY = 4
"""A prompt takes what it needs, but for this part of the context, or all that a reply may take."""

Pieces = Generator[str, None, FinishReason]


@dataclass(slots=True)
class Reply:
    """A reply under way: iterate over it to get pieces of text as they are made.

    Attributes:
        recipe: What it is made from.
        records: The ids of the records in its prompt.
        prompt_tokens: How long the prompt is.
        finish_reason: Why it ended; None before that.
        text: What was made so far.
    """

    recipe: Recipe
    records: tuple[int, ...]
    prompt_tokens: int
    _pieces: Pieces
    _counted: list[int]
    finish_reason: FinishReason | None = None
    text: str = ""

    def __iter__(self) -> Generator[str, None, None]:
        while self.finish_reason is None:
            try:
                piece = next(self._pieces)
            except StopIteration as ended:
                self.finish_reason = ended.value
                return
            self.text += piece
            yield piece

    def __str__(self) -> str:
        """The whole text; what is still missing is made now."""
        for _ in self:
            pass
        return self.text

    @property
    def reply_tokens(self) -> int:
        """Tokens that were made so far."""
        return self._counted[0]

    def close(self) -> None:
        """Stop: nothing more is computed."""
        self._pieces.close()
        self.finish_reason = self.finish_reason or "stop"


@dataclass(slots=True)
class Assistant:
    """The model of an open vault, with the adapters that the vault says.

    All its methods may be called from several threads; they take turns.
    """

    vault: Vault
    lock: RLock = field(default_factory=RLock)
    _model: AdaptedModel | None = None
    _loaded: dict[str, int | None] = field(default_factory=dict)
    _generation: int = 0

    @property
    def model(self) -> AdaptedModel:
        """The model, with shared and private adapter in place; loaded when first asked for.

        Raises:
            ModelError: The base model is missing or damaged.
        """
        with self.lock:
            shared = self.vault.adapters.worn(SHARED)
            asked = AdapterConfig() if shared is None else AdapterConfig(**shared.about["adapter"])
            model = adapted_model(VaultHome(self.vault).config, asked)
            if model is not self._model:
                self._model, self._loaded = model, {}
            self._load(model, SHARED, None if shared is None else shared.version)
            private = self.vault.adapters.worn(PRIVATE)
            usable = private is not None and fits(model, private.about)
            self._load(model, PRIVATE, private.version if private and usable else None)
            return model

    def _load(self, model: AdaptedModel, name: str, version: int | None) -> None:
        if self._loaded.get(name, -1) == version:
            return
        vector = model.specs[name].initial()
        if version is not None:
            vector = self.vault.adapters.vector(name, version)
        model.load(name, vector)
        self._loaded[name] = version

    def forget_loaded(self) -> None:
        """Lay the adapters down, and load them anew at the next call: somebody changed them.

        Replies that are under way end with an error.
        """
        with self.lock:
            self._generation += 1
            self._loaded = {}
            if self._model is not None:
                for name, spec in self._model.specs.items():
                    self._model.load(name, spec.initial())

    def recipe(self, name: str = AUTO) -> Recipe:
        """A recipe by name.

        "auto" looks into the records where there are any, and wears the private adapter where that
        was found to help, on the person's newest records, on top of this very shared adapter.

        Raises:
            ConfigError: There is no such recipe, or it needs a private adapter that is not there.
        """
        with self.lock:
            _ = self.model  # which loads what there is
            private = self._loaded.get(PRIVATE) is not None
            proven = private and name == AUTO and is_proven(self.vault, self.model)
        if name == AUTO:
            private = proven
            chosen = named("both" if private else "retrieval")
            return chosen if len(self.vault.records) else named("private" if private else "shared")
        recipe = named(name)
        if PRIVATE in recipe.weights and not private:
            raise ConfigError(
                f"recipe {name!r} needs a private adapter, and there is none that fits",
                hint="Train one with `homefire device personalize`.",
            )
        return recipe

    def reply(self, messages: Sequence[Message], recipe: Recipe, sampling: Sampling) -> Reply:
        """Begin a reply.

        Args:
            messages: A conversation that ends with a question.
            recipe: From what it is made.
            sampling: How tokens are picked, and how many at most. The prompt comes first: where
                both do not fit, a reply gets what the prompt leaves of the context, at least a
                quarter.

        Raises:
            DataError: There is no question, or no room for it.
        """
        with self.lock:
            model = self.model
            check_conversation(messages)
            found = self._retrieve(messages) if recipe.context == "retrieval" else []
            context = model.base.context_length
            room = context - min(sampling.max_tokens, max(1, context // LEFT_FOR_REPLY))
            notes = [note_of(stored) for stored in found]
            prompt = assemble(model.base.tokenizer, messages, notes, room=room)
            strengths = {str(name): strength for name, strength in recipe.weights.items()}
            passes = [Pass(prompt.tokens, strengths)]
            counted = [0]
            tokens = _count(generate(model, passes, recipe.decoding.combine, sampling), counted)
            stop = sampling.stop
            if len(messages) > 1 and model.base.tokenizer.chat_template is None:
                stop = (*stop, NEXT_TURN)
            pieces = stream_text(model.base.tokenizer, tokens, stop)
        used = tuple(found[place].id for place in prompt.used)
        return Reply(recipe, used, len(prompt.tokens), self._in_turns(pieces), counted)

    def _retrieve(self, messages: Sequence[Message]) -> list[StoredRecord]:
        return self.vault.records.search(messages[-1]["content"], NOTES)

    def _in_turns(self, pieces: Pieces) -> Pieces:
        """Each piece is made while nobody else uses the model, by the adapters of the first."""
        generation = self._generation
        try:
            while True:
                with self.lock:
                    if self._generation != generation:
                        raise AdapterError(
                            "the adapters were changed while this reply was made", hint="Ask again."
                        )
                    try:
                        piece = next(pieces)
                    except StopIteration as ended:
                        reason: FinishReason = ended.value
                        return reason
                yield piece
        finally:
            pieces.close()


def _count(
    tokens: Generator[int, None, FinishReason], counted: list[int]
) -> Generator[int, None, FinishReason]:
    with closing(tokens):
        while True:
            try:
                token = next(tokens)
            except StopIteration as ended:
                reason: FinishReason = ended.value
                return reason
            counted[0] += 1
            yield token


def note_of(stored: StoredRecord) -> Note:
    """A record as a short text for a prompt."""
    record = stored.record
    text = record.text if record.prompt is None else f"{record.prompt} → {record.text}"
    return Note(text[:LONGEST_NOTE], record.created_at)
