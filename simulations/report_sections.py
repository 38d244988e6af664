"""The sections of a report's page that hold its tables and plots."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from homefire.common import claims
from homefire.simulations import report_html as h
from homefire.simulations.audit import CHANCE
from homefire.simulations.report_html import UNIT, Markup, join, section, tag
from homefire.simulations.report_plots import (
    GROUPS,
    VARIANTS,
    Plot,
    ordered_comparisons,
    variant_label,
)

_VARIANT_NOTES = {
    "base": "no adapter",
    "shared": "what all users trained together",
    "private_only": "the user's own adapter alone",
    "shared_private": "both together",
    "other_private": "control: a different user's private adapter",
}
_GROUP_NOTES = {
    "training_users": "They were enrolled for the training of the shared adapter. Measured on their"
    " newest records, which no training saw.",
    "unseen_users": "They had no part in training the shared adapter: this is what it is worth to"
    " somebody new. Measured on their newest records, which no training saw.",
}


def utility(report: Mapping[str, Any], forest: Plot | None, gains: Mapping[str, Plot]) -> Markup:
    """What each part gains, then each group with its tables and its users' gains."""
    groups = [(key, report["utility"][key]) for key in GROUPS if report["utility"].get(key)]
    if not groups:
        return section("Utility", tag("p", "Nothing was evaluated in this run."), id_="utility")
    return section(
        "Utility",
        _figure(forest),
        *(_group(key, group, gains.get(key)) for key, group in groups),
        id_="utility",
    )


def training(rounds: Sequence[Mapping[str, Any]], plot: Plot | None) -> Markup:
    """Loss by round, and the table behind it."""
    if not rounds:
        return section("Training", tag("p", "No round was run."), id_="training")
    head = [
        "Round",
        "Cohort",
        "Accepted",
        "Dropped or refused",
        "Train loss",
        "Clipped",
        "Validation loss",
        "Time",
    ]
    return section(
        "Training of the shared adapter",
        _figure(plot),
        tag(
            "details",
            tag("summary", "Every round as a table"),
            h.table("Rounds", head, (_round(entry) for entry in rounds)),
            tag(
                "p",
                "Exact counts are shown because the users are simulated; a real federation keeps"
                " them to its operator.",
                class_="note",
            ),
        ),
        id_="training",
    )


def audit(found: Mapping[str, Any] | None) -> Markup:
    """What `homefire audit` found, against what the run claims; nothing where it was not run."""
    if found is None:
        return Markup()
    canary, noise, attack = found["canary"], found["noise"], found["membership"]
    rows: list[tuple[object, ...]] = [
        (
            _noted(
                f"One-shot canaries: ε, lower bound at {canary['confidence']:.0%}",
                f"{canary['canaries']:,} in, as many out, d = {canary['dimension']:,}",
            ),
            h.number(canary["epsilon_lower"]),
            _canary_verdict(canary),
            _limit("ε_known_cohort", canary["epsilon_claimed"])
            + ("" if canary["claim_holds"] else ". " + CHANCE.format("a hundred")),
        ),
        ("The same: point estimate", h.number(canary["epsilon"]), "", "no bound"),
    ]
    if noise is not None:
        rows.append(
            (
                _noted("Noise: standard deviation", "as a share of what was announced"),
                h.number(noise["scale"]),
                _verdict(noise["passed"]),
                f"p = {noise['p_value']:.2g} over scale, shape and independence"
                + ("" if noise["passed"] else ". " + CHANCE.format("a thousand")),
            )
        )
    if attack is not None:
        low, high = attack["auc_interval"]
        holds = attack["claim_holds"]
        rows += [
            (
                _noted(
                    "Membership inference: AUC",
                    f"{attack['members']:,} training against {attack['others']:,} unseen users",
                ),
                h.number(attack["auc"]),
                "",
                f"{attack['confidence']:.0%} interval {low:.3f} to {high:.3f}; a guess has 0.5",
            ),
            (
                f"The same: ε, lower bound at {attack['confidence']:.0%}",
                h.number(attack["epsilon_lower"]),
                _verdict(holds),
                _limit("ε_release", attack["epsilon_claimed"])
                + ("" if holds else ". Chance alone does this to one run in a hundred."),
            ),
        ]
    return section(
        "Audit",
        h.table("What attacks and statistics show", ["What", "Found", "Claim", "Reading"], rows),
        tag(
            "p",
            "The canaries audit the mechanism over the run's rounds at the worst participation that"
            " its rule allows; the membership attack looks at the last release alone.",
            class_="note",
        ),
        id_="audit",
    )


def _canary_verdict(canary: Mapping[str, Any]) -> str:
    if canary["claim_holds"] and not canary["conclusive"]:
        return f"cannot tell above {canary['epsilon_ceiling']:.1f}"
    return _verdict(canary["claim_holds"])


def _limit(name: str, claim: float | None) -> str:
    bound = "which is unbounded" if claim is None else claims.shown(claim, digits=3)
    return f"must not exceed {name}, {bound}"


def _verdict(holds: bool) -> Markup:
    return tag("b", "holds" if holds else "FAILS")


def _noted(title: str, note: str) -> Markup:
    return join(title, tag("small", note))


def efficiency(figures: Mapping[str, Any]) -> Markup:
    """Traffic, time and memory."""
    rows: list[tuple[object, ...]] = [
        ("Sent up, per contribution", _bytes(figures["bytes_up_per_contribution"])),
        ("Sent down, per contribution", _bytes(figures["bytes_down_per_contribution"])),
        _seconds("Device time, per contribution", figures["device_seconds_per_contribution"]),
        _seconds("Private adapter, per user", figures["private_seconds_per_user"]),
        ("Training speed", f"{figures['training_tokens_per_second']:,.0f} tokens/s"),
        ("Peak memory of the whole simulation", f"{figures['peak_memory_mib']:,.0f} MiB"),
        _seconds("Whole run", figures["total_seconds"]),
    ]
    total = sum(figures["phases"].values())
    phases = [
        (name, h.duration(spent), _share(spent / total if total else 0.0))
        for name, spent in sorted(figures["phases"].items(), key=lambda phase: -phase[1])
    ]
    return section(
        "Efficiency",
        tag(
            "div",
            h.table("Cost, measured on this machine", ["What", "Cost"], rows),
            h.table("Where the time went", ["Phase", "Time", "Share"], phases) if phases else "",
            class_="columns",
        ),
        id_="efficiency",
    )


def settings(report: Mapping[str, Any]) -> Markup:
    """What was run: model, users and adapters in the open, the whole experiment folded."""
    parts = [
        ("Base model", report["base_model"]),
        ("Users", report["population"]),
        ("Shared adapter", report["adapters"]["shared"]),
        ("Private adapters", report["adapters"]["private"]),
    ]
    boxes = [
        tag("div", tag("h3", title), h.facts(_named(h.flatten(part))), class_="box")
        for title, part in parts
    ]
    experiment = h.table("Resolved settings", ["Setting", "Value"], h.flatten(report["experiment"]))
    return section(
        "What was run",
        tag("div", *boxes, class_="columns"),
        tag("details", tag("summary", "All settings of the experiment"), experiment),
        id_="settings",
    )


def _group(key: str, group: Mapping[str, Any], gains: Plot | None) -> Markup:
    title = GROUPS[key].capitalize()
    lowest = min((v["loss"] for v in group["variants"].values()), default=math.nan)
    known = [name for name in VARIANTS if name in group["variants"]]
    order = known + sorted(set(group["variants"]) - set(known))
    rows = [_variant(name, group["variants"][name], lowest=lowest) for name in order]
    comparisons = [_comparison(entry) for entry in ordered_comparisons(group).values()]
    paired = ["Variant over variant", "Mean gain", "95 % interval", "Wins / ties / losses"]
    return tag(
        "div",
        tag("h3", title),
        tag("p", f"{group['users']:,} users, {group['tokens']:,} tokens. {_GROUP_NOTES[key]}"),
        tag(
            "div",
            h.table(
                f"{title}: loss ({UNIT}), perplexity, ROUGE-L",
                ["Variant", "Loss", "Perplexity", "ROUGE-L"],
                rows,
            ),
            _figure(gains),
            class_="columns",
        ),
        h.table(
            f"{title}: paired gains in {UNIT}, positive is better",
            [*paired, "Worst tenth", "Users"],
            comparisons,
        ),
        class_="group",
    )


def _variant(name: str, figures: Mapping[str, Any], *, lowest: float) -> tuple[object, ...]:
    loss: object = h.number(figures["loss"])
    if figures["loss"] == lowest:
        loss = tag("b", loss, title="lowest")
    return (
        join(variant_label(name), tag("small", _VARIANT_NOTES.get(name, ""))),
        loss,
        h.perplexity(figures["perplexity"]),
        h.number(figures["rouge_l"]),
    )


def _comparison(entry: Mapping[str, Any]) -> tuple[object, ...]:
    low, high = entry["interval"]
    return (
        join(
            variant_label(entry["better"]),
            tag("span", " over ", class_="note"),
            variant_label(entry["worse"]),
        ),
        tag("b", h.signed(entry["mean_gain"])),
        f"{h.signed(low)} to {h.signed(high)}",
        _record(entry["wins"], entry["ties"], entry["losses"]),
        h.signed(entry["worst_decile"]),
        f"{entry['users']:,}",
    )


def _record(wins: int, ties: int, losses: int) -> Markup:
    counts = (("win", wins), ("tie", ties), ("loss", losses))
    bar = [tag("i", class_=kind, style=f"flex:{count}") for kind, count in counts if count]
    return join(
        f"{wins:,} / {ties:,} / {losses:,}",
        tag("span", *bar, class_="record", aria_hidden="true"),
    )


def _round(entry: Mapping[str, Any]) -> tuple[object, ...]:
    if entry.get("interrupted"):
        words = "interrupted: charged, not released"
        return (entry["round"], h.NOTHING, h.NOTHING, words, *[h.NOTHING] * 4)
    clipped, seconds = entry["clipped_share"], entry["seconds"]
    return (
        entry["round"],
        h.plain(entry["cohort"]),
        h.plain(entry["accepted"]),
        h.plain({**entry["dropped"], **entry.get("refused", {})}),
        h.number(entry["train_loss"]),
        h.NOTHING if clipped is None else f"{100 * clipped:.0f} %",
        h.number(entry["validation_loss"]),
        h.NOTHING if seconds is None else h.duration(seconds),
    )


def _bytes(count: int | None) -> str:
    return h.NOTHING if count is None else f"{h.size(count)} ({count:,} bytes)"


def _seconds(name: str, seconds: float | None) -> tuple[object, ...]:
    if seconds is None:
        return name, h.NOTHING
    return (
        name,
        f"{h.duration(seconds)} ({seconds:,.3f} s)" if seconds > 60 else h.duration(seconds),
    )


def _share(share: float) -> Markup:
    bar = tag("i", class_="tie", style=f"flex:0 0 {100 * share:.1f}%")
    return join(f"{100 * share:.0f} %", tag("span", bar, class_="record wide", aria_hidden="true"))


def _named(pairs: Iterable[tuple[str, str]]) -> Iterable[tuple[str, object]]:
    for name, value in pairs:
        yield name.replace("_", " ").replace(".", ": "), value


def _figure(plot: Plot | None) -> Markup:
    if plot is None:
        return Markup()
    height = f"height:{plot.figure.layout.height}px"
    return tag(
        "figure",
        tag("h3", plot.title),
        tag(
            "div",
            tag("noscript", "This plot needs JavaScript."),
            id=plot.name,
            class_="plot",
            style=height,
            role="img",
            aria_label=plot.description,
        ),
        tag("figcaption", plot.note),
    )
