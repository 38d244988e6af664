"""The card that goes with an exported release: what it is, how to load it, what privacy it has."""

import json
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from homefire.common.adapter import AdapterConfig
from homefire.common.claims import shown
from homefire.common.errors import AdapterError
from homefire.common.printable import printable
from homefire.common.privacy.words import deployment_in_words, in_words
from homefire.common.release_statement import DeploymentClaim, PrivacyClaim

TAGS = ("lora", "federated-learning", "differential-privacy", "homefire")


def model_card(about: Mapping[str, Any], adapter: AdapterConfig, *, base_model: str) -> str:
    """The card of a release, Markdown with the front matter that model hubs read.

    Args:
        about: What the release says about itself.
        adapter: How it is made.
        base_model: The base model's name.

    Raises:
        AdapterError: The release does not state its privacy.
    """
    try:
        claim = PrivacyClaim.model_validate(about["privacy"])
        large = about["deployment"] and DeploymentClaim.model_validate(about["deployment"])
    except (KeyError, ValidationError) as error:
        raise AdapterError(
            f"release {about.get('round')} does not state its privacy",
            hint="It was made by another version; export it with that one.",
        ) from error
    parts = [_front_matter(base_model), _introduction(about, adapter, base_model), _use(base_model)]
    parts.append(
        _section("Privacy", [*in_words(claim), *_start(about), _limits(claim)]) + _numbers(claim)
    )
    if large:
        parts.append(_section("Deployment", deployment_in_words(large)) + _numbers(large))
    parts.append(_provenance(about))
    return "\n".join(parts)


def _front_matter(base_model: str) -> str:
    tags = "".join(f"- {tag}\n" for tag in TAGS)
    # A JSON text of printable characters is a YAML text: no name adds lines of its own.
    name = json.dumps(printable(base_model, instead="?"), ensure_ascii=False)
    return f"---\nlibrary_name: peft\nbase_model: {name}\ntags:\n{tags}---\n"


def _introduction(about: Mapping[str, Any], adapter: AdapterConfig, base_model: str) -> str:
    targets = adapter.targets if isinstance(adapter.targets, str) else ", ".join(adapter.targets)
    trained = "B alone, A is public" if adapter.method == "ffa" else "A and B"
    return (
        f"# Shared adapter, round {about['round']}\n\n"
        f"A LoRA for `{_plain(base_model)}` that many people trained together with homefire: each "
        "on their own device, from texts that never left it.\n\n"
        f"Rank {adapter.rank}, alpha {adapter.alpha}, layers {_plain(targets)}; trained: "
        f"{trained}.\n"
    )


def _use(base_model: str) -> str:
    name = json.dumps(base_model)
    return (
        "## Use\n\n```python\n"
        "from peft import PeftModel\n"
        "from transformers import AutoModelForCausalLM\n\n"
        f"base = AutoModelForCausalLM.from_pretrained({name})\n"
        'model = PeftModel.from_pretrained(base, "path/of/this/folder")\n```\n'
    )


def _section(title: str, sentences: list[str]) -> str:
    return f"## {title}\n\n" + "".join(f"- {_plain(sentence)}\n" for sentence in sentences)


def _limits(claim: PrivacyClaim) -> str:
    if claim.mechanism == "none":
        return "Share it with nobody who may not read the texts themselves."
    return (
        "An ε bounds how much one person's whole history can change what anybody learns from the "
        "releases; it does not say that nothing can be learned, nor is it checked by devices that "
        "the server added this noise."
    )


def _numbers(claim: PrivacyClaim) -> str:
    rows = {
        "ε, recipients of the releases": shown(claim.epsilon_release),
        "ε, recipients who know the cohorts": shown(claim.epsilon_known_cohort),
        "ε, the server": shown(claim.epsilon_server),
        "δ": _number(claim.delta),
        "mechanism": claim.mechanism,
        "noise multiplier": _number(claim.noise_multiplier),
        "clip norm": _number(claim.clip_norm),
        "rounds": str(claim.rounds),
        "expected cohort": str(claim.expected_cohort),
        "sampling rate": _number(claim.sampling_rate),
        "participations at most": _number(claim.participations),
        "rounds apart at least": _number(claim.separation),
        "unit": claim.unit,
        "adjacency": claim.adjacency,
    }
    lines = "".join(f"| {name} | {_plain(value)} |\n" for name, value in rows.items())
    return f"\n| | |\n| --- | --- |\n{lines}"


def _start(about: Mapping[str, Any]) -> list[str]:
    if (start := about.get("start")) is None:
        return []
    return [
        f"It starts from round {start['round']} of the earlier run {start['run']}. The numbers "
        "here are of this run alone: what that one cost those who took part in it comes on top."
    ]


def _provenance(about: Mapping[str, Any]) -> str:
    rows = {
        "run": about["run"],
        "round": about["round"],
        "digest of the vector": about["digest"],
        "base model's fingerprint": about.get("base_model", ""),
        "adapter's digest": about.get("adapter_digest", ""),
        "ledger, entries": about["ledger"]["length"],
        "ledger, head": about["ledger"]["head"],
        "signed by": about["server_key"],
    }
    lines = "".join(f"| {name} | `{_plain(str(value))}` |\n" for name, value in rows.items())
    return f"## Where it comes from\n\n| | |\n| --- | --- |\n{lines}"


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:g}"


def _plain(text: str) -> str:
    """Text that cannot break out of its line, its cell or its code marks."""
    return " ".join(text.split()).replace("|", "\\|").replace("`", "'").replace("<", "&lt;")
