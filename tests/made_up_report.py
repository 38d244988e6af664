"""Made-up figures that belong to no run, and what a browser makes of a report's page."""

import math
import re
from dataclasses import asdict
from html.parser import HTMLParser
from typing import Any

import numpy as np

from homefire.simulations.metrics import compare

VARIANTS = ("base", "shared", "private_only", "shared_private", "other_private")
COMPARISONS = {
    "shared_vs_base": ("shared", "base"),
    "shared_private_vs_base": ("shared_private", "base"),
    "shared_private_vs_shared": ("shared_private", "shared"),
    "shared_private_vs_other_private": ("shared_private", "other_private"),
    "shared_private_vs_private_only": ("shared_private", "private_only"),
}


def made_up_group(users: int, *, seed: int, rouge: bool = True) -> dict[str, Any]:
    """A group whose tables follow from made-up losses of made-up users."""
    rng = np.random.default_rng(seed)
    base = rng.normal(5.5, 0.5, users)
    gains = {"base": 0.0, "shared": 0.7, "private_only": 0.8, "shared_private": 0.95}
    losses = {
        name: base - gains.get(name, 0.6) + rng.normal(0, 0.12, users) * (name != "base")
        for name in VARIANTS
    }
    scores = {name: 0.1 + 0.02 * place for place, name in enumerate(VARIANTS)}
    return {
        "users": users,
        "tokens": users * 311,
        "variants": {
            name: {
                "loss": float(loss.mean()),
                "perplexity": math.exp(loss.mean()),
                "rouge_l": scores[name] if rouge else None,
            }
            for name, loss in losses.items()
        },
        "comparisons": {
            name: {"better": better, "worse": worse}
            | asdict(compare((losses[worse] - losses[better]).tolist(), seed=seed))
            for name, (better, worse) in COMPARISONS.items()
        },
        "per_user": [
            {
                "loss": {name: float(loss[user]) for name, loss in losses.items()},
                "rouge_l": {name: scores[name] if rouge else None for name in VARIANTS},
            }
            for user in range(users)
        ],
    }


def made_up_rounds(count: int) -> list[dict[str, Any]]:
    """Rounds with a falling loss, validation every other round, one drop reason."""
    return [
        {
            "round": number,
            "cohort": 12 + number % 3,
            "accepted": 11 + number % 3,
            "dropped": {"norm too large": 1} if number % 4 == 0 else {},
            "refused": {"too often": 2} if number % 4 == 1 else {},
            "train_loss": 5.4 - 0.8 * number / count + 0.05 * math.sin(5 * number),
            "clipped_share": 0.4 + 0.01 * number,
            "validation_loss": 5.45 - 0.75 * number / count if number % 2 == 0 else None,
            "seconds": 1.25,
        }
        for number in range(count)
    ]


MADE_UP: dict[str, Any] = {
    "format": 1,
    "name": "made-up figures",
    "created_at": "2000-01-02T03:04:05+00:00",
    "homefire_version": "0.0.0-test",
    "seed": 4711,
    "experiment": {
        "name": "made-up figures",
        "training": {"rounds": 20, "learning_rate": 0.002, "targets": ["q_proj", "v_proj"]},
        "privacy": {"mechanism": "gaussian", "noise_cohort": None},
    },
    "base_model": {
        "name": "made-up-12m",
        "fingerprint": "0123456789abcdef" * 4,
        "dtype": "float32",
        "parameters": 12_345_678,
        "note": "exists in this test only",
    },
    "population": {
        "kind": "synthetic",
        "training_users": 120,
        "unseen_users": 40,
        "records": 9_876,
        "skipped": {"empty text": 3},
    },
    "adapters": {
        "shared": {"method": "ffa", "rank": 4, "parameters": 20_480, "targets": ["q_proj"]},
        "private": {"method": "lora", "rank": 8, "parameters": 81_920, "targets": ["q_proj"]},
    },
    "privacy": {
        "mechanism": "gaussian",
        "noise_multiplier": 1.125,
        "clip_norm": 0.7,
        "delta": 1e-5,
        "adjacency": "zero-out",
        "unit": "one user's whole history",
        "participation": "each round drawn independently with probability q",
        "expected_cohort": 12,
        "sampling_rate": 0.1,
        "rounds": 20,
        "epsilon_release": 7.9231,
        "epsilon_known_cohort": 17.4412,
        "epsilon_server": None,
        "trust": "trusted aggregator",
    },
    "deployment": None,
    "rounds": made_up_rounds(20),
    "utility": {
        "training_users": made_up_group(60, seed=1),
        "unseen_users": made_up_group(40, seed=2),
    },
    "efficiency": {
        "bytes_up_per_contribution": 82_176,
        "bytes_down_per_contribution": 83_968,
        "device_seconds_per_contribution": 0.4567,
        "private_seconds_per_user": 2.3456,
        "training_tokens_per_second": 12_345.6,
        "peak_memory_mib": 1_843.2,
        "total_seconds": 754.3,
        "phases": {"load": 12.5, "rounds": 301.25, "private adapters": 340.0, "evaluation": 100.55},
    },
}
DEPLOYMENT = {
    "users": 100_000,
    "cohort": 5_000,
    "rounds": 20,
    "noise_multiplier": 0.9876,
    "delta": 1e-6,
    "epsilon_release": 1.9876,
    "epsilon_known_cohort": 9.1234,
    "epsilon_server": None,
    "trust": "trusted aggregator",
}

AUDIT: dict[str, Any] = {
    "canary": {
        "canaries": 4096,
        "dimension": 8192,
        "confidence": 0.99,
        "epsilon": 16.125,
        "epsilon_lower": 14.25,
        "epsilon_claimed": 17.4412,
        "claim_holds": True,
        "conclusive": True,
        "epsilon_ceiling": 27.07,
    },
    "noise": {"scale": 0.9987, "p_value": 0.42, "passed": True},
    "membership": {
        "members": 120,
        "others": 40,
        "auc": 0.6125,
        "auc_interval": [0.4375, 0.7875],
        "confidence": 0.99,
        "epsilon_lower": 0.375,
        "epsilon_claimed": 7.9231,
        "claim_holds": True,
    },
}


class Page(HTMLParser):
    """What a browser makes of a page: elements with attributes, scripts, the text to be read."""

    VOID = frozenset({"meta", "br", "img", "input", "link", "hr"})

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.scripts: list[str] = []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Keep the element."""
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        """Elements must nest."""
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        """Tell scripts, style and text apart."""
        if self.open and self.open[-1] == "script":
            self.scripts.append(data)
        elif self.open and self.open[-1] != "style":
            self.texts.append(data)

    @property
    def text(self) -> str:
        """All of the text, with single spaces."""
        return re.sub(r"\s+", " ", "".join(f" {text}" for text in self.texts))

    def all(self, tag: str) -> list[dict[str, str | None]]:
        """The attributes of every element of that name."""
        return [attributes for name, attributes in self.elements if name == tag]
