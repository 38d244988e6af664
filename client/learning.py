"""Learning on the device: a private adapter is trained from the vault, and used if it helps."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace

from homefire.client.outcomes import Learned, Progress
from homefire.client.personalize.draft import Draft
from homefire.client.personalize.private import Conduct, PrivateResult, train_private
from homefire.client.personalize.quick import fit_memory, quick_loss, recomputing
from homefire.client.personalize.recipe import PRIVATE, SHARED
from homefire.client.vault import Vault
from homefire.client.vault_records import StoredRecord
from homefire.client.verdict import judge, verdict
from homefire.common.adapted_model import AdaptedModel
from homefire.common.config import PrivateConfig
from homefire.common.encoding import canonical_json, digest
from homefire.common.errors import AdapterError, DataError
from homefire.common.plan import release_digest
from homefire.common.records import split_newest
from homefire.common.training import Encoded, LossSum, batch_seed, mean_loss

FEWEST_RECORDS = 4
LOOKED_AT = 64
"""Records of the validation slice at most: else looks at a long history outlast its training."""


def learn(
    vault: Vault,
    model: AdaptedModel,
    config: PrivateConfig,
    *,
    seed: int = 0,
    memory_limit: int | None = None,
    progress: Progress = lambda step, steps: None,
) -> Learned:
    """Train the private adapter on top of the shared one that the model wears.

    The newest part of the history is not trained on; by its loss the best step is chosen, and
    whether the new adapter takes the place of the old one.

    Args:
        vault: Whose history is learned from.
        model: Its shared adapter is in place.
        config: Steps, learning rate, how often to look.
        seed: Of the batch order.
        memory_limit: MiB that training may take besides the model.
        progress: Called after each step.

    Guarantees:
        Never worse: the adapter in use afterwards does at least as well on the newest records as
            the one before, and better than the shared adapter alone; else none is used.
        Taken up again: a training that was killed goes on from its last look.
        Forgotten meanwhile: an adapter is not stored if a record that it has seen is gone; the
            training begins anew without it.

    Raises:
        DataError: Too few records.
        AdapterError: Training diverged; what was in use stays.
        ConfigError: The limit is too low for a single record.
    """
    while True:
        try:
            return _learn(vault, model, config, seed, memory_limit, progress)
        except _ForgottenError:
            continue


class _ForgottenError(Exception):
    """A record that a training has seen is gone."""


def _learn(
    vault: Vault,
    model: AdaptedModel,
    config: PrivateConfig,
    seed: int,
    memory_limit: int | None,
    progress: Progress,
) -> Learned:
    history = vault.records.history()
    if len(history) < FEWEST_RECORDS:
        raise DataError(
            f"{len(history)} records are too few to learn from",
            hint=f"At least {FEWEST_RECORDS}: `homefire device import` or `remember` some.",
        )
    older, newest = split_newest(tuple(history), config.validation_share, most=LOOKED_AT)
    longest, tokenizer = config.training.max_tokens, model.base.tokenizer
    training = Encoded(tokenizer, [stored.record for stored in older], longest)
    validation = Encoded(tokenizer, [stored.record for stored in newest], longest)
    seen = [stored.id for stored in history]
    loss_of = quick_loss(model)
    model.activate(SHARED, PRIVATE, train=PRIVATE)
    rows, again = fit_memory(model.network, training, loss_of, limit_mib=memory_limit)
    of = _training_of(vault, model, config, history, seed)
    draft = _draft(vault, of)
    progress(draft.step if draft else 0, config.training.steps)
    conduct = Conduct(
        loss_of=loss_of,
        rows=rows,
        of=of,
        draft=draft,
        keep=lambda draft: _keep_draft(vault, draft, seen),
        on_step=lambda step: progress(step, config.training.steps),
    )
    order = batch_seed("private", vault.header.vault, seed)
    with recomputing(model.network) if again else nullcontext():
        result = train_private(model, training, validation, config, seed=order, conduct=conduct)
    before = _loss_in_use(vault, model, validation, loss_of)
    visited = min(len(training), config.training.steps * config.training.batch_size)
    return replace(_settle(vault, model, result, before, seen), visited=visited)


@contextmanager
def _all_there(vault: Vault, seen: Sequence[int]) -> Iterator[None]:
    """A transaction in which all records that were learned from still exist."""
    with vault.database.transaction():
        if vault.records.missing(seen):
            raise _ForgottenError
        yield


def _keep_draft(vault: Vault, draft: Draft, seen: Sequence[int]) -> None:
    with _all_there(vault, seen):
        vault.adapters.keep_draft(PRIVATE, draft.pack(), seen)


def _settle(
    vault: Vault,
    model: AdaptedModel,
    result: PrivateResult,
    before: float | None,
    seen: Sequence[int],
) -> Learned:
    """Use the better of the new and the old adapter, and neither if none helps."""
    kept = result.helps and (before is None or result.validation_after < before)
    release = release_digest(model.vector(SHARED))
    if kept:
        about = {
            "base_model": model.base.fingerprint,
            "adapter_digest": model.specs[PRIVATE].digest,
            "release_digest": release,
            "best_step": result.best_step,
            "validation_before": result.validation_before,
            "validation_after": result.validation_after,
        }
        with _all_there(vault, seen):
            vault.adapters.keep(PRIVATE, result.vector, about, seen)
    else:
        with vault.database.transaction():
            vault.adapters.drop_draft(PRIVATE)
            worn = vault.adapters.worn(PRIVATE)
            if worn is not None and before is not None:
                helps = before < result.validation_before
                judge(vault, worn.version, release, helps=helps)
                if not helps:
                    vault.adapters.take_off(PRIVATE)
    worn = vault.adapters.worn(PRIVATE)
    return Learned(
        version=None if worn is None else worn.version,
        kept=kept,
        loss_without=result.validation_before,
        loss_before=before,
        loss_trained=result.validation_after,
        records=len(seen),
        visited=0,
        tokens=result.tokens,
    )


def recheck(vault: Vault, model: AdaptedModel, config: PrivateConfig) -> bool:
    """Compare the private adapter in use with the shared one in place, on the newest records.

    What comes of it is kept, for `is_proven`; to be called when the shared adapter is another one.

    Returns:
        Whether it helps; False where there is none that fits, or nothing to compare it on.
    """
    worn, history = vault.adapters.worn(PRIVATE), tuple(vault.records.history())
    if worn is None or not fits(model, worn.about) or len(history) < 2:
        return False
    newest = split_newest(history, config.validation_share, most=LOOKED_AT)[1]
    longest, tokenizer = config.training.max_tokens, model.base.tokenizer
    validation = Encoded(tokenizer, [stored.record for stored in newest], longest)
    loss_of = quick_loss(model)
    model.activate(SHARED)
    without, _ = mean_loss(model.network, validation, loss_of=loss_of)
    within = _loss_in_use(vault, model, validation, loss_of)
    model.activate()
    helps = within is not None and within < without
    judge(vault, worn.version, release_digest(model.vector(SHARED)), helps=helps)
    return helps


def is_proven(vault: Vault, model: AdaptedModel) -> bool:
    """Whether the private adapter in use was found to help on top of this very shared adapter."""
    worn = vault.adapters.worn(PRIVATE)
    usable = worn is not None and fits(model, worn.about)
    return usable and verdict(vault, release_digest(model.vector(SHARED))) is True


def _loss_in_use(
    vault: Vault, model: AdaptedModel, validation: Encoded, loss_of: LossSum
) -> float | None:
    worn = vault.adapters.worn(PRIVATE)
    if worn is None or not fits(model, worn.about):
        return None
    model.load(PRIVATE, vault.adapters.vector(PRIVATE, worn.version))
    model.activate(SHARED, PRIVATE)
    loss, _ = mean_loss(model.network, validation, loss_of=loss_of)
    return loss


def fits(model: AdaptedModel, about: dict[str, object]) -> bool:
    """Whether a private adapter was made for this base model and adapter."""
    return (
        about.get("base_model") == model.base.fingerprint
        and about.get("adapter_digest") == model.specs[PRIVATE].digest
    )


def _draft(vault: Vault, of: str) -> Draft | None:
    packed = vault.adapters.draft(PRIVATE)
    if packed is None:
        return None
    try:
        draft = Draft.unpack(packed)
    except AdapterError:
        return None  # of another version; training begins anew
    return draft if draft.of == of else None


def _training_of(
    vault: Vault,
    model: AdaptedModel,
    config: PrivateConfig,
    history: Sequence[StoredRecord],
    seed: int,
) -> str:
    """Names all that the result of a training depends on."""
    records = [asdict(stored) for stored in history]
    parts = (
        canonical_json(records),
        config.model_dump_json().encode(),
        model.base.fingerprint.encode(),
        model.vector(SHARED).tobytes(),
        str(seed).encode(),
    )
    return digest("homefire/private-training/v1", vault.header.vault.encode(), *parts)
