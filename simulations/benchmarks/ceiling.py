"""How near the cohort engine comes to what the device's matrix products can do at all.

Random weights in the shape of known models, made-up rows of full length, LoRA on the query and
value projections, AdamW: the time of one user after another with plain PEFT, of cohorts of several
sizes, and of the same compiled; as a share of the fastest large matrix product that is measured in
the same run. This module needs torch, transformers, peft and numpy, and nothing else:
`python -m homefire.simulations.benchmarks.ceiling --json`.
"""

import argparse
import gc
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from homefire.common.frozen_linear import is_fast, product
from homefire.common.optimizer import make_optimizer
from homefire.simulations.bank import LoraBank
from homefire.simulations.cohort import train_cohort
from homefire.simulations.micro_cohorts import is_out_of_memory, release_memory

ADAPTER = "private"
SHAPES: dict[str, dict[str, int]] = {
    "tiny": {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4}
    | {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 2048},
    "135m": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30}
    | {"num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49_152},
    "1.2b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16}
    | {"num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128_256},
}
"""Shapes of Llama models: a tiny one, SmolLM2-135M, Llama-3.2-1B."""


@dataclass(frozen=True, slots=True)
class Steps:
    """The local training of every user."""

    steps: int = 10
    rows: int = 2
    tokens: int = 128
    optimizer: str = "adamw"
    learning_rate: float = 1e-3
    max_gradient_norm: float = 1.0


@dataclass(frozen=True, slots=True)
class Row:
    """A made-up record."""

    tokens: tuple[int, ...]
    first_target: int = 1


@dataclass(frozen=True, slots=True)
class Point:
    """One way to train.

    Attributes:
        name: "one by one", "cohort", "compiled".
        users: At once.
        milliseconds: For one user's whole local training.
        tflops: Counting 4 N for a token: the weights once forward, once backward.
        share: Of the ceiling.
        ratio: Of one by one's time to this one's.
        peak_gib: Of the device's memory; None on a CPU.
        first_seconds: Of the first pass, compilation included.
    """

    name: str
    users: int
    milliseconds: float
    tflops: float
    share: float
    ratio: float
    peak_gib: float | None
    first_seconds: float


def measure(
    shape: str, cohorts: Sequence[int], steps: Steps, *, compiled: bool, say: Callable[[str], None]
) -> dict[str, object]:
    """Measure one model shape on this machine's GPU, or else its CPU.

    Args:
        shape: A key of `SHAPES`.
        cohorts: Numbers of users at once; what does not fit into memory is left out.
        steps: The local training.
        compiled: Also with torch.compile, for 64 users and the largest cohort that fits.
        say: Told what begins, and what it took.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    say("matrix product")
    products = matrix_products(device)
    ceiling = max(products.values())
    network = _model(shape, device)
    weights = sum(p.numel() for n, p in network.named_parameters() if "lora_" not in n)
    flops = 4 * weights * steps.steps * steps.rows * steps.tokens
    points: list[Point] = []

    def add(name: str, users: int, train: Callable[[], None]) -> bool:
        say(f"{name}, {users}")
        try:
            first, seconds, peak = _timed(train, device)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            release_memory()
            return False
        speed = users * flops / seconds / 1e12
        base = points[0].milliseconds if points else 1e3 * seconds
        each = 1e3 * seconds / users
        points.append(Point(name, users, each, speed, speed / ceiling, base / each, peak, first))
        say(f"{each:.1f} ms a user, {speed / ceiling:.1%} of the ceiling")
        return True

    add("one by one", 1, lambda: _one_by_one(network, steps, device))
    largest = 0
    for users in cohorts:
        bank = LoraBank(network, ADAPTER)
        if not add("cohort", users, lambda bank=bank, users=users: _cohort(bank, users, steps)):  # type: ignore[misc]
            break
        largest = users
        del bank
        gc.collect()
    if compiled and largest:
        bank = LoraBank(network, ADAPTER, compiled=True)
        for users in sorted({min(64, largest), largest}):
            add("compiled", users, lambda users=users: _cohort(bank, users, steps))  # type: ignore[misc]
    return {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "CPU",
        "torch": torch.__version__,
        "shape": shape,
        "parameters": weights,
        "type": "bfloat16 autocast" if device.type == "cuda" else "float32",
        "steps": asdict(steps),
        "ceiling_tflops": ceiling,
        "products_tflops": products,
        "points": [asdict(point) for point in points],
    }


def matrix_products(device: torch.device) -> dict[str, float]:
    """The speed of a large square matrix product in TFLOP/s, by who multiplies.

    In bfloat16 on a GPU, in float32 on a CPU, with as many threads as torch has.
    """
    size, kind = (8192, torch.bfloat16) if device.type == "cuda" else (1024, torch.float32)
    a = torch.randn((size, size), device=device, dtype=kind)
    b = torch.randn((size, size), device=device, dtype=kind)
    ways = {"torch": torch.matmul} | ({"oneDNN": product} if is_fast(a) else {})
    seconds = {
        name: _timed(lambda way=way: _again(way, a, b), device)[1]  # type: ignore[misc]
        for name, way in ways.items()
    }
    return {name: 10 * 2 * size**3 / taken / 1e12 for name, taken in seconds.items()}


def _again(multiply: Callable[..., torch.Tensor], a: torch.Tensor, b: torch.Tensor) -> None:
    for _ in range(10):
        multiply(a, b)


def _timed(work: Callable[[], None], device: torch.device) -> tuple[float, float, float | None]:
    """Seconds of the first run, of the fastest of three more, and the peak memory of those."""

    def once() -> float:
        started = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started

    first = once()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    best = min(once() for _ in range(3))
    peak = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None
    return first, best, peak


def _model(shape: str, device: torch.device) -> nn.Module:
    given: dict[str, Any] = {**SHAPES[shape]}
    config = LlamaConfig(tie_word_embeddings=True, max_position_embeddings=2048, **given)
    torch.manual_seed(0)
    with device:
        model = LlamaForCausalLM(config)
    if device.type == "cuda":
        model.to(dtype=torch.bfloat16)  # type: ignore[call-arg]
    model.requires_grad_(False).train(False)
    targets = ["q_proj", "v_proj"]
    lora = LoraConfig(r=8, lora_alpha=16, target_modules=targets, task_type="CAUSAL_LM")
    network: nn.Module = get_peft_model(model, lora, adapter_name=ADAPTER).get_base_model()
    return network


def _rows(steps: Steps) -> list[Row]:
    return [
        Row(tuple((17 * i + 31 * row) % 997 for i in range(steps.tokens)))
        for row in range(steps.rows)
    ]


def _cohort(bank: LoraBank, users: int, steps: Steps) -> None:
    bank.open(users)
    with torch.no_grad():
        for leaf in bank.parameters:
            leaf.normal_(std=0.02)
    batch = [_rows(steps)] * users
    with torch.autocast(bank.device.type, torch.bfloat16, enabled=bank.device.type == "cuda"):
        train_cohort(bank, [batch] * steps.steps, steps)


def _one_by_one(network: nn.Module, steps: Steps, device: torch.device) -> None:
    """One user with plain PEFT, as any simulator does it that trains its clients in turn."""
    trained = [p for name, p in network.named_parameters() if f".{ADAPTER}." in name]
    for parameter in trained:
        parameter.requires_grad_(True)
    optimizer = make_optimizer(trained, steps)
    tokens = torch.tensor([row.tokens for row in _rows(steps)], device=device)
    for _ in range(steps.steps):
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            logits = network(input_ids=tokens, use_cache=False).logits[:, :-1].float()
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(trained, steps.max_gradient_norm)
        optimizer.step()


def main() -> None:
    """The command line of a machine that has nothing else of homefire's."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--shape", choices=sorted(SHAPES), default="135m")
    parser.add_argument("--cohorts", type=int, nargs="+", default=[8, 32, 128, 256])
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--json", action="store_true", help="only the result, as one JSON object")
    given = parser.parse_args()
    say = (lambda step: None) if given.json else print
    found = measure(given.shape, given.cohorts, Steps(), compiled=not given.no_compile, say=say)
    print(json.dumps(found, indent=None if given.json else 1))


if __name__ == "__main__":
    main()
