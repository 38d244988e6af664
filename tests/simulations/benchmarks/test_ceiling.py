"""The ceiling: real steps of a tiny model against real products, with next to nothing installed."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from homefire.simulations.bank import LoraBank
from homefire.simulations.benchmarks import ceiling
from homefire.simulations.benchmarks.ceiling import SHAPES, Steps, main, measure

FEW = Steps(steps=1, rows=1, tokens=16)
MODULE = "homefire.simulations.benchmarks.ceiling"
NOT_NEEDED = (
    *("pydantic", "flwr", "rich", "typer", "cryptography", "opacus"),
    *("ray", "plotly", "grpc", "dp_accounting", "datasets", "scipy", "tomli_w"),
)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The smallest shape, smaller still, and a ceiling that takes no second."""
    tiny = {**SHAPES["tiny"], "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    monkeypatch.setitem(SHAPES, "tiny", {**tiny, "vocab_size": 1000})
    monkeypatch.setattr(ceiling, "matrix_products", lambda _: {"torch": 4.0, "oneDNN": 10.0})


# A measurement


def test_a_measurement_is_shares_of_the_ceiling() -> None:
    said: list[str] = []
    steps = Steps(steps=1, rows=2, tokens=64)
    found = measure("tiny", [2, 4], steps, compiled=False, say=said.append)
    assert [said[0], *said[1::2]] == ["matrix product", "one by one, 1", "cohort, 2", "cohort, 4"]
    assert (found["shape"], found["torch"]) == ("tiny", torch.__version__)
    assert found["steps"] == asdict(steps)
    top: Any = found["ceiling_tflops"]
    weights: Any = found["parameters"]
    assert top > 0
    # Embeddings, which are the head as well, and the layers.
    assert weights == 2048 * 128 + 128 + 4 * (3 * 128 * 384 + 3 * 128 * 128 + 2 * 128)
    points: Any = found["points"]
    assert [(point["name"], point["users"]) for point in points] == [
        ("one by one", 1),
        ("cohort", 2),
        ("cohort", 4),
    ]
    for point in points:
        flops = 4 * weights * 1 * 2 * 64
        assert point["milliseconds"] > 0 and point["first_seconds"] > 0
        assert point["tflops"] == pytest.approx(flops / point["milliseconds"] * 1e3 / 1e12)
        assert point["share"] == pytest.approx(point["tflops"] / top)
        assert 0 < point["share"] <= 1.05
        assert point["ratio"] == pytest.approx(points[0]["milliseconds"] / point["milliseconds"])
    assert [words.partition(" ms")[0] for words in said[2::2]] == [
        f"{point['milliseconds']:.1f}" for point in points
    ]
    assert points[0]["ratio"] == 1
    assert json.loads(json.dumps(found)) == found


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_on_a_cpu_there_is_no_memory_to_state(small: None) -> None:
    found = measure("tiny", [2], FEW, compiled=False, say=lambda _: None)
    assert (found["device"], found["type"]) == ("CPU", "float32")
    points: Any = found["points"]
    assert [point["peak_gib"] for point in points] == [None, None]


def test_what_does_not_fit_is_left_out_and_the_largest_that_does_is_compiled(
    small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, bool]] = []

    def cohort(bank: Any, users: int, steps: Steps) -> None:
        asked.append((users, bank._passes._compiled))
        if users > 4:
            raise torch.OutOfMemoryError

    class Bank:
        def __init__(self, *_: object, compiled: bool = False) -> None:
            self._passes = type("Passes", (), {"_compiled": compiled})

    monkeypatch.setattr(ceiling, "LoraBank", Bank)
    monkeypatch.setattr(ceiling, "_cohort", cohort)
    found = measure("tiny", [2, 4, 8, 16], FEW, compiled=True, say=lambda _: None)
    points: Any = found["points"]
    assert [(point["name"], point["users"]) for point in points] == [
        ("one by one", 1),
        ("cohort", 2),
        ("cohort", 4),
        ("compiled", 4),
    ]
    assert {users for users, _ in asked} == {2, 4, 8}  # the next one would fail as well
    assert {users for users, compiled in asked if compiled} == {4}


def test_other_errors_are_not_taken_for_a_lack_of_memory(
    small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: object) -> None:
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(ceiling, "_cohort", failing)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        measure("tiny", [2], FEW, compiled=False, say=lambda _: None)


def test_the_fastest_of_three_counts_and_the_first_stands_alone() -> None:
    clock = iter([0.0, 9.0, 10.0, 13.0, 20.0, 22.0, 30.0, 35.0])
    calls: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(time, "perf_counter", lambda: next(clock))
        found = ceiling._timed(lambda: calls.append(1), torch.device("cpu"))
    assert found == (9.0, 2.0, None)
    assert len(calls) == 4


def test_the_ceiling_is_the_faster_of_two_products(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter([4.0, 2.0])

    def timed(work: Callable[[], None], device: torch.device) -> tuple[float, float, None]:
        work()
        return 0.0, next(seconds), None

    monkeypatch.setattr(ceiling, "_timed", timed)
    monkeypatch.setattr(ceiling, "_again", lambda *_: None)
    found = ceiling.matrix_products(torch.device("cpu"))
    assert found["torch"] == pytest.approx(10 * 2 * 1024**3 / 4.0 / 1e12)
    assert found["oneDNN"] == pytest.approx(10 * 2 * 1024**3 / 2.0 / 1e12)


def test_a_cohort_does_as_many_steps_on_as_many_tokens_as_one_user_alone(
    small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the ratio would compare two things."""
    steps, device = Steps(steps=3, rows=2, tokens=16), torch.device("cpu")
    network = ceiling._model("tiny", device)
    bank = LoraBank(network, ceiling.ADAPTER)
    seen: list[list[list[int]]] = []
    network.register_forward_pre_hook(
        lambda _, __, inputs: seen.append(inputs["input_ids"].tolist()), with_kwargs=True
    )
    adapter = {n: p for n, p in network.named_parameters() if f".{ceiling.ADAPTER}." in n}
    assert adapter and all(".q_proj." in name or ".v_proj." in name for name in adapter)
    start = {name: parameter.detach().clone() for name, parameter in adapter.items()}
    ceiling._one_by_one(network, steps, device)
    assert all((adapter[name] - start[name]).abs().max() > 1e-4 for name in adapter)
    assert len(seen) == 3

    def noted(bank: Any, batches: Any, settings: Any) -> None:
        assert settings is steps
        for cohort, alone in zip(batches, seen, strict=True):
            assert len(cohort) == bank.users == 5
            assert all([list(row.tokens) for row in rows] == alone for rows in cohort)

    monkeypatch.setattr(ceiling, "train_cohort", noted)
    ceiling._cohort(bank, 5, steps)
    assert [len(leaf) for leaf in bank.parameters] == [5] * len(adapter)


def test_rows_differ_and_are_of_full_length() -> None:
    rows = ceiling._rows(Steps(rows=3, tokens=50))
    assert len({row.tokens for row in rows}) == 3
    assert {len(row.tokens) for row in rows} == {50}
    assert max(max(row.tokens) for row in rows) < min(s["vocab_size"] for s in SHAPES.values())


@pytest.mark.parametrize(("shape", "millions"), [("tiny", 1.05), ("135m", 134.5), ("1.2b", 1235.8)])
def test_shapes_are_those_of_the_models_that_they_are_named_for(
    shape: str, millions: float
) -> None:
    with torch.device("meta"):
        network = ceiling._model(shape, torch.device("meta"))
    weights = sum(p.numel() for n, p in network.named_parameters() if "lora_" not in n)
    assert weights / 1e6 == pytest.approx(millions, rel=0.001)


# The command line


@pytest.mark.parametrize("as_json", [True, False])
def test_the_command_prints_one_json_object(
    small: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    as_json: bool,
) -> None:
    monkeypatch.setattr(ceiling, "Steps", lambda: FEW)
    arguments = ["ceiling", "--shape", "tiny", "--cohorts", "2", "--no-compile"]
    monkeypatch.setattr(sys, "argv", [*arguments, *["--json"] * as_json])
    main()
    output = capsys.readouterr().out
    if as_json:
        assert output.count("\n") == 1
    else:
        assert output.startswith("matrix product\none by one, 1\n")
        output = output[output.index("{") :]
    assert [point["name"] for point in json.loads(output)["points"]] == ["one by one", "cohort"]


def test_the_command_compiles_unless_it_is_told_not_to(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[dict[str, Any]] = []

    def noted(shape: str, cohorts: list[int], steps: Steps, **rest: Any) -> dict[str, str]:
        asked.append({"shape": shape, "cohorts": cohorts, "compiled": rest["compiled"]})
        return {}

    monkeypatch.setattr(ceiling, "measure", noted)
    for arguments in (["--json"], ["--json", "--no-compile", "--shape", "1.2b", "--cohorts", "4"]):
        monkeypatch.setattr(sys, "argv", ["ceiling", *arguments])
        main()
    assert asked == [
        {"shape": "135m", "cohorts": [8, 32, 128, 256], "compiled": True},
        {"shape": "1.2b", "cohorts": [4], "compiled": False},
    ]
    assert capsys.readouterr().out == "{}\n{}\n"


def test_an_unknown_shape_is_an_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["ceiling", "--shape", "70b"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert "70b" in capsys.readouterr().err


def python(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(  # noqa: S603 - our own command
        [sys.executable, *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )


@pytest.mark.slow
@pytest.mark.timeout(170)
def test_torch_transformers_and_peft_are_enough(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        f"for name in {NOT_NEEDED!r}: sys.modules[name] = None\n"
        f"import {MODULE} as ceiling\n"
        "steps = ceiling.Steps(steps=1, rows=1, tokens=8)\n"
        "said = []\n"
        "found = ceiling.measure('tiny', [2], steps, compiled=False, say=said.append)\n"
        "print(said[-2])\n"
    )
    result = python("-c", code, folder=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == "cohort, 2"


@pytest.mark.slow
@pytest.mark.timeout(170)
def test_the_module_can_be_run(tmp_path: Path) -> None:
    result = python("-m", MODULE, "--help", folder=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "--shape" in result.stdout and "--no-compile" in result.stdout
    assert "How near the cohort engine comes" in result.stdout
