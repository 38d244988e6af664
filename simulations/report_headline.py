"""The top of a report's page: what was gained, and at which privacy."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from homefire.common import claims
from homefire.simulations import report_html as h
from homefire.simulations.report_html import UNIT, Markup, join, section, tag
from homefire.simulations.report_plots import GROUPS

_NO_PROTECTION = "no meaningful protection"


def headline(report: Mapping[str, Any]) -> Markup:
    """What was gained, for how many, at which privacy, in a few sentences and cards."""
    groups = [(key, report["utility"][key]) for key in GROUPS if report["utility"].get(key)]
    sentences = [_gained(key, group) for key, group in groups]
    sentences += [_control(group) for _, group in groups[-1:]]
    sentences.append(_protected(report["privacy"], report["deployment"]))
    return join(
        *(tag("p", sentence, class_="lead") for sentence in sentences if sentence),
        _cards(report, groups),
    )


def off_banner(privacy: Mapping[str, Any]) -> Markup:
    """The red banner of a run without differential privacy; nothing for any other run."""
    if privacy["mechanism"] != "none":
        return Markup()
    title = tag("strong", "Differential privacy was OFF in this run.")
    text = " Its shared adapter may reveal what single users wrote: ε is ∞ against everybody."
    return tag("div", title, text, class_="banner off", role="alert")


def privacy_box(privacy: Mapping[str, Any]) -> Markup:
    """The three epsilons, and what they stand on."""
    off = privacy["mechanism"] == "none"
    return section(
        "Privacy",
        tag(
            "div",
            _release_card(privacy),
            _epsilon_card(
                "ε known cohort",
                privacy["epsilon_known_cohort"],
                "a recipient who also knows who took part when",
                off=off,
            ),
            _server_card(privacy),
            class_="cards",
        ),
        h.facts(_premises(privacy)),
        tag(
            "p",
            "ε covers the releases alone. This report holds exact measurements of users, which a"
            " release never does: treat it like their data. ε bounds what an observer can learn"
            " about one user's history: compared with a run in which that user contributed nothing,"
            " it can shift the odds by a factor of e",
            tag("sup", "ε"),
            " at most, except with a probability of about δ. In words, after Ponomareva et al."
            " (2023): up to 1 strong, up to 10 reasonable, above that weak; above 20 the odds may"
            f" move nearly anywhere, which is {_NO_PROTECTION}.",
            class_="note",
        ),
        id_="privacy",
    )


def _premises(privacy: Mapping[str, Any]) -> list[tuple[str, object]]:
    return [
        ("mechanism", privacy["mechanism"]),
        ("δ", h.power(privacy["delta"])),
        ("noise multiplier", h.plain(privacy["noise_multiplier"])),
        ("clip norm", h.plain(privacy["clip_norm"])),
        ("unit", privacy["unit"]),
        ("adjacency", privacy["adjacency"]),
        ("participation", privacy["participation"]),
        ("expected cohort", h.plain(privacy["expected_cohort"])),
        ("sampling rate", h.plain(privacy["sampling_rate"])),
        ("rounds", h.plain(privacy["rounds"])),
    ]


def deployment_box(deployment: Mapping[str, Any] | None) -> Markup:
    """The figures of the deployment whose noise the run borrowed; nothing for any other run."""
    if deployment is None:
        return Markup()
    users = f"{deployment['users']:,}"
    return section(
        f"Noise of a deployment of {users} users",
        tag(
            "p",
            f"The noise of this run was scaled to that of a deployment with {users} users. The"
            " figures of this section ",
            tag("strong", "speak for that deployment, not for this run"),
            ", whose own ε stands in the box above.",
        ),
        h.facts(
            [
                ("users", users),
                ("cohort", h.plain(deployment["cohort"])),
                ("rounds", h.plain(deployment["rounds"])),
                ("noise multiplier", h.plain(deployment["noise_multiplier"])),
                ("δ there", h.power(deployment["delta"])),
                ("ε release there", _graded(deployment["epsilon_release"])),
                ("ε known cohort there", _graded(deployment["epsilon_known_cohort"])),
                ("ε server there", f"∞ — {deployment['trust']}"),
            ]
        ),
        id_="deployment",
    )


def protection(epsilon: float) -> str:
    """How much an ε protects, in words.

    The steps at 1 and 10 are the tiers of Ponomareva et al., "How to DP-fy ML" (2023), section 5.

    >>> [protection(value) for value in (0.5, 8.0, 15.0, 1e4)]
    ['strong', 'reasonable', 'weak', 'no meaningful protection']
    """
    steps = ((1.0, "strong"), (10.0, "reasonable"), (20.0, "weak"))
    return next((word for most, word in steps if epsilon <= most), _NO_PROTECTION)


def _gained(key: str, group: Mapping[str, Any]) -> Markup:
    shared = group["comparisons"].get("shared_vs_base")
    both = group["comparisons"].get("shared_private_vs_base")
    said = []
    if shared:
        said.append(join("the shared adapter ", _verdict(shared)))
    if both:
        before, after = (
            h.perplexity(group["variants"][name]["perplexity"])
            for name in ("base", "shared_private")
        )
        said.append(
            join(
                "shared and private adapters together ",
                _verdict(both, what=""),
                f": perplexity {before} → {after}, better for {both['wins']:,} of"
                f" {both['users']:,}",
            )
        )
    if not said:
        return Markup()
    users = f"For {group['users']:,} {GROUPS[key]}, "
    return join(users, said[0], *(join("; ", more) for more in said[1:]), ".")


def _verdict(comparison: Mapping[str, Any], *, what: str = "95\u00a0% interval ") -> Markup:
    """A gain, a loss, or no clear difference; negative figures are said as a loss."""
    mean, (low, high) = comparison["mean_gain"], comparison["interval"]
    if low > 0 or high < 0:
        word, sign = ("lowered", 1) if low > 0 else ("raised", -1)
        low, high = sorted((sign * low, sign * high))
        amount = tag("strong", h.number(sign * mean))
        bounds = f"({what}{h.number(low)} to {h.number(high)})"
        return join(f"{word} the loss by ", amount, f" {UNIT} {bounds}")
    nothing = tag("strong", "made no clear difference")
    return join(nothing, f" ({h.signed(mean)} {UNIT}; {h.signed(low)} to {h.signed(high)})")


def _control(group: Mapping[str, Any]) -> Markup:
    control = group["comparisons"].get("shared_private_vs_other_private")
    if not control:
        return Markup()
    low, high = control["interval"]
    if low > 0:
        return join(
            "Control: another user's private adapter in place of one's own loses"
            f" {h.number(control['mean_gain'])} {UNIT} ({h.number(low)} to {h.number(high)}):"
            " that part of the gain is personal."
        )
    word = "no better than" if high >= 0 else "worse than"
    return join("Control: one's own private adapter is ", tag("strong", word), " another user's.")


def _protected(privacy: Mapping[str, Any], deployment: Mapping[str, Any] | None) -> Markup:
    if privacy["mechanism"] == "none":
        return join("Privacy: ", tag("strong", "none"), ". Differential privacy was off.")
    said = join(
        f"Privacy ({privacy['unit']}): ",
        tag("strong", "ε = ", _graded(privacy["epsilon_release"])),
        f" at δ = {h.power(privacy['delta'])} against whoever receives the releases;"
        f" the server is a {privacy['trust']}.",
    )
    if deployment is None:
        return said
    there = _graded(deployment["epsilon_release"])
    return join(
        said,
        f" The noise is that of a deployment of {deployment['users']:,} users, where ε would be"
        f" {there}.",
    )


def _cards(report: Mapping[str, Any], groups: Sequence[tuple[str, Mapping[str, Any]]]) -> Markup:
    cards = []
    key, group = groups[-1] if groups else ("", {"comparisons": {}})
    for name, title in (
        ("shared_vs_base", "Shared adapter"),
        ("shared_private_vs_base", "Shared + private adapter"),
    ):
        if comparison := group["comparisons"].get(name):
            low, high = (h.signed(bound) for bound in comparison["interval"])
            note = f"{UNIT} gained by {GROUPS[key]} ({low} to {high})"
            cards.append(_card(title, h.signed(comparison["mean_gain"]), note))
    cards.append(_release_card(report["privacy"]))
    up = report["efficiency"]["bytes_up_per_contribution"]
    whole = h.duration(report["efficiency"]["total_seconds"]).replace(" ", "\u00a0")
    upload = h.NOTHING if up is None else h.size(up)
    cards.append(_card("Upload", upload, f"per contribution; whole run: {whole}"))
    return tag("div", *cards, class_="cards")


def _card(title: str, value: str, note: object, *, kind: str = "") -> Markup:
    return tag(
        "div",
        tag("p", title, class_="card-title"),
        tag("p", value, class_="card-value"),
        tag("p", note, class_="card-note"),
        class_=f"card {kind}".strip(),
    )


def _epsilon_card(title: str, value: float | None, against: str, *, off: bool) -> Markup:
    """An ε with what it protects against; none means that there is no bound."""
    if off:
        return _card(title, "∞", f"against {against}: no differential privacy", kind="bad")
    value = math.inf if value is None else value
    words = protection(value)
    kind = {"strong": "good", "reasonable": "good", "weak": "fair"}.get(words, "bad")
    return _card(
        title, claims.shown(value), join(f"against {against}: ", tag("b", words)), kind=kind
    )


def _release_card(privacy: Mapping[str, Any]) -> Markup:
    against, off = "whoever receives the releases", privacy["mechanism"] == "none"
    return _epsilon_card("ε release", privacy["epsilon_release"], against, off=off)


def _server_card(privacy: Mapping[str, Any]) -> Markup:
    if privacy["epsilon_server"] is not None:
        value = privacy["epsilon_server"]
        return _epsilon_card("ε server", value, "the server itself", off=False)
    note = "against the server itself: it sees every contribution before the noise"
    return _card("ε server", f"∞ — {privacy['trust']}", note, kind="trust")


def _graded(value: float | None) -> str:
    """An ε in one line; none means that there is no bound."""
    value = math.inf if value is None else value
    words = protection(value)
    return f"{claims.shown(value)} ({words})" if words == _NO_PROTECTION else claims.shown(value)
