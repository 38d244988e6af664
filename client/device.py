"""One device: what it answers to a plan, and how it trains its private adapter."""

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from threading import Lock

import numpy as np

from homefire.client.example_dp import example_epsilon, example_statement, train_private_steps
from homefire.client.example_gradients import import_opacus
from homefire.client.example_statement import ExampleDPStatement
from homefire.client.home import DeviceHome, PrivateAdapter
from homefire.client.participation import ParticipationLedger, open_participations
from homefire.client.personalize.private import PrivateResult, train_private
from homefire.client.personalize.recipe import PRIVATE, SHARED
from homefire.common.adapted_model import AdaptedModel
from homefire.common.adapter import AdapterConfig, AdapterSpec, Vector
from homefire.common.base_model import load_base_model
from homefire.common.config import BaseModelConfig, DeviceConfig, ExampleDPConfig
from homefire.common.errors import AdapterError, DivergedError
from homefire.common.local_training import LocalTraining
from homefire.common.peft_adapter import resolve_spec
from homefire.common.plan import RoundPlan, release_digest
from homefire.common.policy import check_plan
from homefire.common.privacy.clipping import Clipped, clip_to_grid, is_clipped
from homefire.common.protocol import LOSS_SCALE, STATISTICS, Refusal
from homefire.common.records import User, split_newest
from homefire.common.training import (
    Encoded,
    Example,
    batch_seed,
    cycle_batches,
    train,
)

LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Device:
    """One user's device.

    Attributes:
        home: Settings and private adapters.
        user: The history.
        forgettings: How often something had been forgotten when the history was read.
    """

    home: DeviceHome
    user: User
    forgettings: int = 0

    def answer(self, plan: RoundPlan) -> Clipped | Refusal:
        """Check a plan against policy and ledger, charge, train on this user's records, clip.

        What `admit` guarantees and raises holds here. The ledger stays locked while the device
        trains, so a second plan that comes meanwhile is not answered.

        Guarantees:
            Forgotten meanwhile: where the person forgets something during the training, zeros are
                the answer.
        """
        with open_participations(self.home, self.user.user_id) as ledger:
            admitted = self._admit(ledger, plan)
            if not isinstance(admitted, Task):
                return admitted
            contribution = admitted.train()
            if self.home.forgettings != self.forgettings:
                return nothing(plan)
            return contribution

    def admit(self, plan: RoundPlan) -> "Task | Clipped | Refusal":
        """Check a plan against policy and ledger, and charge: all that comes before training.

        Args:
            plan: Its signature is verified already.

        Guarantees:
            Refused before work: a plan that the policy or the ledger forbids, or that does not fit
                base model or adapter, trains nothing and charges nothing.
            Charged first: before anything is computed from the texts the participation is in the
                ledger, on the disk. Whatever happens then, the round is not answered again: a
                server that makes training fail learns from that once, not as often as it likes.
            Nothing instead of an error: a history too short to train on, steps that would cost a
                record too much, or training that diverges give a vector of zeros, within the same
                bound as any other and charged like it. A refusal would be a free answer about the
                history, and could be asked for again and again.
            Own settings: nothing but the plan's local training and privacy block comes from the
                server; policy, base model and history are this device's own.

        Returns:
            What is left to train, or the answer where nothing is.

        Raises:
            LedgerError: The ledger is damaged, rolled back or in use.
        """
        with open_participations(self.home, self.user.user_id) as ledger:
            return self._admit(ledger, plan)

    def _admit(self, ledger: ParticipationLedger, plan: RoundPlan) -> "Task | Clipped | Refusal":
        config = self.home.config
        refusal = check_plan(self.home.policy, plan.header, ledger.history)
        if refusal is not None:
            return refusal
        model = _fitting_model(config, plan)
        if isinstance(model, Refusal):
            return model
        cost = self._example_cost(config, plan)
        if cost is not None and _passes(config.example_dp, [*ledger.example_costs, cost]):
            ledger.charge(plan)
            LOG.warning("round %d would cost a record too much: zeros", plan.header.round)
            return nothing(plan)
        ledger.charge(plan, example_dp=cost)
        self.home.keep_release(plan)
        return self.task(model, plan)

    def task(self, model: AdaptedModel, plan: RoundPlan) -> "Task | Clipped":
        """What a plan that was charged leaves to be trained; zeros where the history is too short.

        Args:
            model: This device's, made for the plan.
            plan: Admitted.
        """
        if len(self.user.records) < 2:
            return nothing(plan)
        config = self.home.config
        examples = self.examples(model, config, plan.header.training.max_tokens).training
        return Task(model, plan, examples, self.user.user_id, config.example_dp)

    def _example_cost(self, config: DeviceConfig, plan: RoundPlan) -> ExampleDPStatement | None:
        """What the contribution will cost each record, where the device protects those too."""
        if config.example_dp is None:
            return None
        import_opacus()  # where it is missing, nothing is spent
        if len(self.user.records) < 2:
            return None
        count = len(split_newest(self.user.records, config.private.validation_share)[0])
        return example_statement(config.example_dp, plan.header.training, examples=count)

    def personalize(
        self, model: AdaptedModel, release: Vector, *, seed: int, on_shared: bool = True
    ) -> PrivateResult:
        """Train this user's private adapter on top of a release and keep it.

        Args:
            model: This device's model.
            release: The shared adapter, shape (adapter parameters,).
            seed: Of the batch order.
            on_shared: False trains on the bare base model instead: a control for experiments.
        """
        config = self.home.config
        model.load(SHARED, release)
        examples = self.examples(model, config, config.private.training.max_tokens)
        result = train_private(
            model,
            examples.training,
            examples.validation,
            config.private,
            seed=self.private_seed(seed),
            on=(SHARED,) if on_shared else (),
        )
        self.keep_private(model, result, release=release if on_shared else None)
        return result

    def private_seed(self, seed: int) -> int:
        """Of the batch order of this user's private training."""
        return batch_seed("private", self.user.user_id, seed)

    def keep_private(
        self, model: AdaptedModel, result: PrivateResult, *, release: Vector | None
    ) -> None:
        """Store a private adapter that was trained on top of a release, or of the base model."""
        about = {
            "base_model": model.base.fingerprint,
            "adapter_digest": model.specs[PRIVATE].digest,
            "release_digest": None if release is None else release_digest(release),
            "best_step": result.best_step,
            "validation_before": result.validation_before,
            "validation_after": result.validation_after,
        }
        self.home.save_private(self.user.user_id, PrivateAdapter(result.vector, about))

    def examples(self, model: AdaptedModel, config: DeviceConfig, max_tokens: int) -> "Examples":
        """This user's records as token ids; the validation slice is the newest part."""
        older, newest = split_newest(self.user.records, config.private.validation_share)
        tokenizer = model.base.tokenizer
        return Examples(
            Encoded(tokenizer, older, max_tokens), Encoded(tokenizer, newest, max_tokens)
        )


def _passes(own: ExampleDPConfig | None, costs: Sequence[ExampleDPStatement]) -> bool:
    """Whether contributions cost each record more, all together, than the device allows."""
    return own is not None and example_epsilon(costs, delta=own.delta) > own.largest_epsilon


def _fitting_model(config: DeviceConfig, plan: RoundPlan) -> AdaptedModel | Refusal:
    """This device's model for a plan, or why the plan cannot be carried out on it."""
    try:
        model = adapted_model(config, plan.header.adapter)
    except AdapterError as error:
        return Refusal(reason="wrong adapter spec", detail=str(error)[:500])
    refusal = _unfit(plan, model)
    return model if refusal is None else refusal


def _unfit(plan: RoundPlan, model: AdaptedModel) -> Refusal | None:
    """Why a plan cannot be carried out on this device's model."""
    header, base, spec = plan.header, model.base, model.specs[SHARED]
    if header.base_model != base.fingerprint:
        return Refusal(
            reason="wrong base model",
            detail=f"this device has {base.fingerprint}, the plan is for {header.base_model}",
        )
    if header.adapter_digest != spec.digest or plan.release.shape != (spec.size,):
        return Refusal(
            reason="wrong adapter spec",
            detail=f"this device makes {spec.digest} of the plan's adapter",
        )
    if not np.isfinite(plan.release).all():
        return Refusal(
            reason="malformed plan", detail="the release holds a value that is not finite"
        )
    if header.training.max_tokens > base.context_length:
        return Refusal(
            reason="malformed plan",
            detail=f"{header.training.max_tokens} tokens are more than the "
            f"{base.context_length} that the base model reads",
        )
    return None


@dataclass(frozen=True, slots=True)
class Examples:
    """A history as token ids: what is trained on, and the slice that choices are made on."""

    training: Sequence[Example]
    validation: Sequence[Example]


@dataclass(frozen=True, slots=True)
class Task:
    """A plan that was admitted and charged, and what it is carried out on.

    Attributes:
        model: This device's, made for the plan.
        plan: What the server asked.
        examples: What this user's device trains on.
        user_id: Enters only the order of the batches.
        example_dp: How single records are protected too, if they are.
    """

    model: AdaptedModel
    plan: RoundPlan
    examples: Sequence[Example]
    user_id: str
    example_dp: ExampleDPConfig | None = None

    def train(self) -> Clipped:
        """Train and clip; see `contribute` and `contribute_privately`."""
        if self.example_dp is not None:
            return contribute_privately(
                self.model, self.plan, tuple(self.examples), self.example_dp
            )
        return contribute(self.model, self.plan, self.examples, user_id=self.user_id)

    def batches(self) -> Iterator[list[Example]]:
        """The batches of the plan's K steps."""
        header = self.plan.header
        return local_batches(self.examples, header.training, order=(self.user_id, header.round))


def nothing(plan: RoundPlan) -> Clipped:
    """What a device contributes that has nothing to contribute: zeros, statistics included."""
    zeros = np.zeros(plan.release.shape, np.float32)
    return clip_to_grid(zeros, np.zeros(STATISTICS), clip_norm=plan.header.privacy.clip_norm)


def contribute(
    model: AdaptedModel, plan: RoundPlan, examples: Sequence[Example], *, user_id: str
) -> Clipped:
    """Train from the release for exactly K steps and clip the difference.

    Args:
        model: With an adapter named "shared"; private ones take no part.
        plan: What the server asked.
        examples: This user's records.
        user_id: Enters only the order of the batches.

    Guarantees:
        Joint clip: update and statistics together have a norm of at most C.
        Nothing else: no count, loss or time leaves but inside the clipped vector.
        Nothing instead of an error: training that diverges gives zeros.
    """
    header = plan.header
    update, mean_loss = local_update(
        model, plan.release, examples, header.training, order=(user_id, header.round)
    )
    return bounded(plan, update, mean_loss)


def bounded(plan: RoundPlan, update: Vector, mean_loss: float) -> Clipped:
    """What may leave of an update: clipped with its statistics, zeros where training diverged.

    Args:
        plan: What the server asked.
        update: Unclipped, shape (adapter parameters,).
        mean_loss: Over the steps, in nats.
    """
    header = plan.header
    if not (math.isfinite(mean_loss) and np.isfinite(update).all()):
        LOG.warning("training diverged under the plan of round %d: zeros are sent", header.round)
        return nothing(plan)
    loss = min(max(mean_loss, 0.0), LOSS_SCALE) / LOSS_SCALE
    return _with_statistics(update, loss, header.privacy.clip_norm)


def contribute_privately(
    model: AdaptedModel, plan: RoundPlan, examples: Sequence[Example], config: ExampleDPConfig
) -> Clipped:
    """As `contribute`, with example-level DP-SGD on the device.

    Guarantees:
        Noisy throughout: whatever leaves follows from noisy steps alone, also whether they
            diverged; the slot of the training loss, which no noise covers, stays empty.
        Nothing instead of an error: training that diverges gives zeros.

    Raises:
        PrivacyError: Per-example gradients are wrong; nothing may be sent.
        HomefireError: Opacus is not installed.
    """
    model.load(SHARED, plan.release)
    parameters = model.activate(SHARED, train=SHARED)
    try:
        train_private_steps(model.network, parameters, examples, plan.header.training, config)
    except DivergedError as error:
        LOG.warning("%s under the plan of round %d: zeros are sent", error, plan.header.round)
        return nothing(plan)
    update = model.vector(SHARED) - plan.release
    return _with_statistics(update, 0.0, plan.header.privacy.clip_norm)


def _with_statistics(update: Vector, loss: float, clip_norm: float) -> Clipped:
    clipped = is_clipped(update, clip_norm=clip_norm, statistics=STATISTICS)
    statistics = np.array([1.0, loss, -1.0 if clipped else 1.0])
    return clip_to_grid(update, statistics, clip_norm=clip_norm)


def local_update(
    model: AdaptedModel,
    release: Vector,
    examples: Sequence[Example],
    settings: LocalTraining,
    *,
    order: tuple[str, int],
) -> tuple[Vector, float]:
    """Train from a release for exactly K steps.

    Args:
        model: With an adapter named "shared"; private ones take no part.
        release: Shape (adapter parameters,).
        examples: One user's records.
        settings: K, batch, learning rate.
        order: User and round, of which the order of the batches follows.

    Returns:
        The difference to the release, unclipped, and the mean training loss in nats.
    """
    model.load(SHARED, release)
    parameters = model.activate(SHARED, train=SHARED)
    log = train(model.network, parameters, local_batches(examples, settings, order=order), settings)
    return model.vector(SHARED) - release, log.mean_loss


def local_batches(
    examples: Sequence[Example], settings: LocalTraining, *, order: tuple[str, int]
) -> Iterator[list[Example]]:
    """The batches of K steps; their order follows from user, round and the plan's seed."""
    seed = batch_seed("shared", *order, settings.seed)
    batches = cycle_batches(examples, batch_size=settings.batch_size, seed=seed)
    return islice(batches, settings.steps)


_ONE_AT_A_TIME = Lock()


def adapted_model(config: DeviceConfig, shared: AdapterConfig) -> AdaptedModel:
    """This device's base model with a shared and a private adapter, kept for the next call.

    All threads get the same one.
    """
    with _ONE_AT_A_TIME:
        return _adapted_model(config.base_model, shared, config.private.adapter)


@lru_cache(maxsize=1)
def _adapted_model(
    base_model: BaseModelConfig, shared: AdapterConfig, private: AdapterConfig
) -> AdaptedModel:
    base = load_base_model(base_model.name, dtype=base_model.dtype, fetch=False)
    specs: dict[str, AdapterSpec] = {
        SHARED: resolve_spec(shared, base.model.config),
        PRIVATE: resolve_spec(private, base.model.config),
    }
    return AdaptedModel(base, specs)
