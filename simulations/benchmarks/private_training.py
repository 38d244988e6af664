"""A device's private training against `transformers.Trainer` with PEFT: same model, rows and steps.

Each contender is a process of its own, so that its peak memory is its own; both train the same LoRA
with AdamW on the same batches, on all cores.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, cast

import torch
from torch.utils.data import Dataset, SequentialSampler
from transformers import Trainer, TrainerCallback, TrainingArguments

from homefire.client.personalize.quick import quick_loss
from homefire.client.personalize.recipe import PRIVATE
from homefire.common.adapted_model import AdaptedModel
from homefire.common.base_model import load_base_model
from homefire.common.config import PrivateConfig
from homefire.common.local_training import LocalTraining
from homefire.common.model_cache import locate
from homefire.common.optimizer import make_optimizer
from homefire.common.parent import ending
from homefire.common.peft_adapter import resolve_spec
from homefire.common.training import (
    Example,
    collate,
    cycle_batches,
    encode,
    take_step,
)
from homefire.simulations.benchmarks.device_memory import peak_mib
from homefire.simulations.benchmarks.tiny_model import make_model
from homefire.simulations.benchmarks.vault import made_up

WARM_UP = 2
CONTENDERS = ("homefire", "trainer")


@dataclass(frozen=True, slots=True)
class Trained:
    """One contender.

    Attributes:
        seconds: Of the steps after the warm-up.
        tokens_per_second: Predicted tokens.
        peak_mib: Of the process.
        model_mib: Of it before training: libraries and weights.
        loss: Of the last step, before its update.
    """

    seconds: float
    tokens_per_second: float
    peak_mib: float
    model_mib: float
    loss: float


def measure(
    model: str | None, *, steps: int, batch_size: int, max_tokens: int, say: Callable[[str], None]
) -> dict[str, Any]:
    """Measure both.

    Args:
        model: A base model; a tiny random one if None.
        steps: After the warm-up.
        batch_size: Rows of a step.
        max_tokens: Of a row.
        say: Told what begins.

    Raises:
        ModelError: There is no such model.
    """
    if model is not None:
        locate(model)
    with tempfile.TemporaryDirectory() as folder:
        place = model or str(make_model(Path(folder) / "model"))
        found = {}
        for name in CONTENDERS:
            say(name)
            sizes = map(str, (steps, batch_size, max_tokens))
            found[name] = _in_process(name, place, *sizes)
    ours, theirs = (Trained(**found[name]) for name in CONTENDERS)
    return {
        "model": Path(place).name if model else "tiny",
        "cores": len(os.sched_getaffinity(0)),
        "steps": steps,
        "batch_size": batch_size,
        "max_tokens": max_tokens,
        "contenders": {"homefire": asdict(ours), "trainer": asdict(theirs)},
        "ratio_throughput": ours.tokens_per_second / theirs.tokens_per_second,
        "ratio_peak": ours.peak_mib / theirs.peak_mib,
        "ratio_training_memory": (ours.peak_mib - ours.model_mib)
        / max(1.0, theirs.peak_mib - theirs.model_mib),
        "loss_difference": abs(ours.loss - theirs.loss),
    }


def _in_process(name: str, *arguments: str) -> dict[str, float]:
    command = ending(__name__, name, *arguments)
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
    if done.returncode:
        raise RuntimeError(f"{name} failed: {done.stderr[-2000:]}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def _batches(tokenizer: Any, training: LocalTraining) -> Iterator[list[Example]]:
    rows = [encode(tokenizer, record, training.max_tokens) for record in made_up(256)]
    return cycle_batches(rows, batch_size=training.batch_size, seed=0)


def train_ours(place: str, training: LocalTraining) -> Trained:
    """As a device does."""
    base = load_base_model(place)
    model = AdaptedModel(base, {PRIVATE: resolve_spec(PrivateConfig().adapter, base.model.config)})
    loss_of = quick_loss(model)
    parameters = model.activate(PRIVATE, train=PRIVATE)
    optimizer = make_optimizer(parameters, training)
    batches = list(islice(_batches(base.tokenizer, training), training.steps))
    before, started, loss = peak_mib(), 0.0, 0.0
    for number, batch in enumerate(batches):
        if number == WARM_UP:
            started = time.perf_counter()
        loss = take_step(model.network, optimizer, batch, training, loss_of=loss_of)
    seconds = time.perf_counter() - started
    return _result(seconds, batches, before, loss)


def train_theirs(place: str, training: LocalTraining) -> Trained:
    """As `transformers.Trainer` does, with the same adapter, rows and optimizer."""
    base = load_base_model(place)
    # The same start: PEFT would draw another A.
    model = AdaptedModel(base, {PRIVATE: resolve_spec(PrivateConfig().adapter, base.model.config)})
    model.activate(PRIVATE, train=PRIVATE)
    batches = list(islice(_batches(base.tokenizer, training), training.steps))
    listed = [row for batch in batches for row in batch]
    clock = _Clock()
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=training.batch_size,
            max_steps=training.steps,
            learning_rate=training.learning_rate,
            lr_scheduler_type="constant",
            weight_decay=0.0,
            max_grad_norm=training.max_gradient_norm,
            optim="adamw_torch",
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            logging_steps=1,
            use_cpu=True,
            remove_unused_columns=False,
        )
        trainer = _InOrder(
            model=model.network,
            args=arguments,
            train_dataset=_Rows(listed),
            data_collator=_collate_rows,
            callbacks=[clock],
        )
        before = peak_mib()
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return _result(clock.seconds, batches, before, float(losses[-1]))


class _Rows(Dataset[Example]):
    """Rows in the order of the batches."""

    def __init__(self, rows: Sequence[Example]) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, place: int) -> Example:
        return self._rows[place]


class _InOrder(Trainer):
    """Takes rows as they come."""

    def _get_train_sampler(self, *_: object) -> SequentialSampler:
        return SequentialSampler(cast(_Rows, self.train_dataset))


class _Clock(TrainerCallback):
    """Times the steps after the warm-up."""

    def __init__(self) -> None:
        self.seconds, self._started = 0.0, 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: object) -> None:
        if state.global_step == WARM_UP:
            self._started = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: object) -> None:
        self.seconds = time.perf_counter() - self._started


def _collate_rows(rows: list[Example]) -> dict[str, torch.Tensor]:
    tokens, labels = collate(rows)
    return {"input_ids": tokens, "labels": labels}


def _result(
    seconds: float, batches: Sequence[Sequence[Example]], before: float, loss: float
) -> Trained:
    tokens = sum(row.targets for batch in batches[WARM_UP:] for row in batch)
    return Trained(seconds, tokens / seconds, peak_mib(), before, loss)


def main(arguments: Sequence[str]) -> None:
    """One contender; prints one line of JSON last."""
    name, place, *sizes = arguments
    steps, batch_size, max_tokens = map(int, sizes)
    training = LocalTraining(
        steps=WARM_UP + steps, batch_size=batch_size, max_tokens=max_tokens, learning_rate=1e-3
    )
    train = {"homefire": train_ours, "trainer": train_theirs}[name]
    print(json.dumps(asdict(train(place, training))))


if __name__ == "__main__":
    main(sys.argv[1:])
