"""The report in a terminal: what people want to know first."""

from collections.abc import Iterator
from typing import Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from homefire.common import claims
from homefire.simulations.metrics import TIE

NAMES = {
    "base": "base model",
    "shared": "shared adapter",
    "private_only": "private adapter alone",
    "shared_private": "shared + private",
    "other_private": "shared + another user's private (control)",
}


def summary_tables(report: dict[str, Any]) -> Iterator[RenderableType]:
    """The privacy statement, then one table for each group of users."""
    yield from _privacy(report["privacy"], report["deployment"])
    for key, title in (("training_users", "Training users"), ("unseen_users", "Unseen users")):
        if (group := report["utility"][key]) is not None:
            yield _group(title, group)


def _privacy(privacy: dict[str, Any], deployment: dict[str, Any] | None) -> Iterator[Text]:
    if privacy["mechanism"] == "none":
        yield Text("\nDifferential privacy was OFF in this run.", style="bold red")
        return
    yield Text(
        f"\nPrivacy of this run: ε_release {claims.shown(privacy['epsilon_release'])}, "
        f"ε_known_cohort {claims.shown(privacy['epsilon_known_cohort'])}, "
        f"ε_server ∞ ({privacy['trust']}); δ = {privacy['delta']:g}, {privacy['mechanism']}, "
        f"{privacy['adjacency']}; {privacy['participation']}."
    )
    if deployment is not None:
        yield Text(
            f"The noise is that of a deployment of {deployment['users']:,} users "
            f"(cohort {deployment['cohort']:,}, {deployment['rounds']} rounds), for which "
            f"ε_release would be {claims.shown(deployment['epsilon_release'])} and ε_known_cohort "
            f"{claims.shown(deployment['epsilon_known_cohort'])} at δ = {deployment['delta']:g}. "
            "That is not this run's privacy."
        )


def audit_table(found: dict[str, Any]) -> Table:
    """What `homefire audit` found."""
    canary, noise, attack = found["canary"], found["noise"], found["membership"]
    table = Table("", "found", "to compare with", title="Audit", title_justify="left")
    table.add_row(
        f"canaries: ε, {canary['confidence']:.0%} lower bound",
        _measured(canary["epsilon_lower"]),
        _against("ε_known_cohort", canary),
    )
    if not canary["conclusive"]:
        ceiling = f"so many canaries cannot show more than {_measured(canary['epsilon_ceiling'])}"
        table.add_row("", "cannot tell", ceiling)
    table.add_row("canaries: ε, point estimate", _measured(canary["epsilon"]), "no bound")
    if noise is not None:
        table.add_row("noise: scale", f"{noise['scale']:.4f}", f"1; p = {noise['p_value']:.2g}")
    if attack is not None:
        low, high = attack["auc_interval"]
        table.add_row("membership: AUC", f"{attack['auc']:.3f}", f"0.5; {low:.3f} … {high:.3f}")
        table.add_row(
            f"membership: ε, {attack['confidence']:.0%} lower bound",
            _measured(attack["epsilon_lower"]),
            _against("ε_release", attack),
        )
    return table


def _against(name: str, found: dict[str, Any]) -> str:
    """A claim beside the bound that must not exceed it."""
    verdict = "not exceeded" if found["claim_holds"] else "EXCEEDED"
    return f"{name} {claims.shown(found['epsilon_claimed'])}: {verdict}"


def _measured(epsilon: float | None) -> str:
    """What an attack found; a lower bound is not rounded up."""
    return "∞" if epsilon is None else f"{epsilon:,.2f}"


def _group(title: str, group: dict[str, Any]) -> Table:
    table = Table(
        "",
        "loss",
        "perplexity",
        "ROUGE-L",
        "users better than base",
        title=f"\n{title} ({group['users']}), newest records",
        title_justify="left",
    )
    losses = [user["loss"] for user in group["per_user"]]
    for variant, name in NAMES.items():
        row = group["variants"][variant]
        wins = sum(loss["base"] - loss[variant] > TIE for loss in losses)
        table.add_row(
            name,
            f"{row['loss']:.3f}",
            f"{row['perplexity']:.1f}",
            "–" if row["rouge_l"] is None else f"{row['rouge_l']:.3f}",
            "–" if variant == "base" else f"{wins} of {len(losses)}",
        )
    low, high = group["comparisons"]["shared_private_vs_other_private"]["interval"]
    table.caption = (
        f"own against another user's private adapter: 95 % interval {low:+.3f} … {high:+.3f} nats"
    )
    table.caption_justify = "left"
    return table
