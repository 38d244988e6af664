"""The plots of a report, as Plotly figures that hold numbers and nothing about single people."""

import html
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import plotly.graph_objects as go

GROUPS = {"training_users": "training users", "unseen_users": "unseen users"}
VARIANTS = {
    "base": "base model",
    "shared": "shared",
    "private_only": "private only",
    "shared_private": "shared + private",
    "other_private": "shared + other's private",
}
_COMPARISONS = (
    "shared_vs_base",
    "shared_private_vs_base",
    "shared_private_vs_shared",
    "shared_private_vs_other_private",
    "shared_private_vs_private_only",
)
_COLOURS = {
    "training_users": "#3b8fd4",
    "unseen_users": "#d9691e",
    "train": "#8a8f98",
    "validation": "#d9691e",
    "base": "#3b8fd4",
    "other_private": "#d9691e",
}
_POINTS = 1000  # of one curve: a million users need no larger page


@dataclass(frozen=True, slots=True)
class Plot:
    """One figure.

    Attributes:
        name: Its element's id in the page.
        title: What it shows.
        description: The same for those who cannot see it, with its main numbers.
        note: How to read it.
        figure: The Plotly figure.
    """

    name: str
    title: str
    description: str
    note: str
    figure: go.Figure


def variant_label(variant: str) -> str:
    """How a variant is called in the page."""
    return VARIANTS.get(variant, variant)


def ordered_comparisons(group: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """A group's comparisons in the order of the argument; unknown ones last, by name."""
    entries: Mapping[str, Mapping[str, Any]] = group["comparisons"]
    known = [name for name in _COMPARISONS if name in entries]
    return {name: entries[name] for name in known + sorted(set(entries) - set(known))}


def loss_by_round(rounds: Sequence[Mapping[str, Any]]) -> Plot | None:
    """Training statistic and validation loss against the round; nothing without a single loss."""
    figure = go.Figure()
    said = []
    for key, name, symbol in (
        ("train", "training cohort", "circle"),
        ("validation", "validation", "diamond"),
    ):
        points = [(r["round"], r[f"{key}_loss"]) for r in rounds if r[f"{key}_loss"] is not None]
        if not points:
            continue
        xs, ys = zip(*points, strict=True)
        said.append(f"{name}: from {ys[0]:.3f} to {ys[-1]:.3f}")
        figure.add_scatter(
            x=xs,
            y=ys,
            name=name,
            mode="lines+markers" if len(xs) <= 60 else "lines",
            line={"color": _COLOURS[key], "width": 2.5},
            marker={"size": 8, "symbol": symbol},
            hovertemplate="round %{x}: %{y:.3f}<extra></extra>",
        )
    if not said:
        return None
    _style(figure, x_title="round", y_title="loss (nats per token)")
    figure.update_xaxes(zeroline=False)
    return Plot(
        "plot-rounds",
        "Loss by round",
        f"Line chart of the loss by round; {'; '.join(said)}.",
        "The cohort's statistic reaches the server inside the contributions, under the same noise,"
        " and is left out where that hides it. The validation loss is that of a slice of the older"
        " records that no training sees; only a simulator can measure it.",
        figure,
    )


def gains_forest(utility: Mapping[str, Any]) -> Plot | None:
    """Mean gain of every comparison with its interval, both groups side by side."""
    groups = [(key, ordered_comparisons(utility[key])) for key in GROUPS if utility.get(key)]
    groups = [(key, group) for key, group in groups if group]
    names = list(dict.fromkeys(name for _, group in groups for name in group))
    if not names:
        return None
    figure = go.Figure()
    for index, (key, group) in enumerate(groups):
        shift = (index - (len(groups) - 1) / 2) * 0.26
        places = [names.index(name) + shift for name in group]
        figure.add_scatter(**_dots(key, list(group.values())), y=places)
    said = [
        f"{_pair(c)}, {GROUPS[key]}: {c['mean_gain']:+.3f}"
        for key, group in groups
        for c in group.values()
    ]
    pairs = {name: c for _, group in groups for name, c in group.items()}
    labels = [_tick(pairs[name]) for name in names]
    _style(figure, x_title="mean gain (nats per token)", y_title="")
    figure.update_yaxes(
        tickvals=list(range(len(names))),
        ticktext=labels,
        range=[len(names) - 0.5, -0.5],
        showgrid=False,
        zeroline=False,
    )
    ends = [0.0, *(bound for _, group in groups for c in group.values() for bound in c["interval"])]
    margin = 0.05 * (max(ends) - min(ends)) or 1.0
    figure.update_xaxes(range=[min(ends) - margin, max(ends) + margin])
    figure.update_layout(height=110 + 62 * len(names))
    return Plot(
        "plot-comparisons",
        "What each part gains",
        f"Dot chart of mean gains with intervals. {'; '.join(said)}.",
        "Right of 0 is better. Dots: mean over users of the loss saved; bars: 95 % bootstrap"
        " interval over users. Each pair is measured on the same users and tokens.",
        figure,
    )


def _dots(key: str, comparisons: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One group's dots with their intervals: a scatter trace without its places."""
    means = np.array([c["mean_gain"] for c in comparisons])
    low, high = np.array([c["interval"] for c in comparisons]).T
    symbol = {"training_users": "circle", "unseen_users": "diamond"}[key]
    return {
        "x": means,
        "error_x": {"array": high - means, "arrayminus": means - low, "thickness": 2, "width": 5},
        "customdata": np.stack([low, high], axis=1).tolist(),
        "name": GROUPS[key],
        "mode": "markers",
        "marker": {"color": _COLOURS[key], "size": 11, "symbol": symbol},
        "hovertemplate": "%{x:+.3f} (%{customdata[0]:+.3f} to %{customdata[1]:+.3f})",
    }


def sorted_gains(utility: Mapping[str, Any]) -> dict[str, Plot]:
    """One plot a group: every user's gain, worst to best; all plots share one scale."""
    curves = {
        key: {
            rival: gains
            for rival in ("base", "other_private")
            if len(gains := _gains(utility[key]["per_user"], rival))
        }
        for key in GROUPS
        if utility.get(key)
    }
    values = [gains for group in curves.values() for gains in group.values()]
    if not values:
        return {}
    low, high = min(0.0, *(float(g[0]) for g in values)), max(0.0, *(float(g[-1]) for g in values))
    margin = 0.06 * (high - low) or 1.0
    scale = (low - margin, high + margin)
    return {key: _sorted_gains(key, group, scale) for key, group in curves.items() if group}


def _sorted_gains(
    key: str, curves: Mapping[str, npt.NDArray[np.float64]], scale: tuple[float, float]
) -> Plot:
    figure = go.Figure()
    said = []
    for rival, gains in curves.items():
        name = {"base": "over the base model", "other_private": "over another user's adapter"}[
            rival
        ]
        said.append(f"{name}: {100 * np.mean(gains > 0):.0f} % of {len(gains)} users above 0")
        places = np.unique(np.linspace(0, len(gains) - 1, _POINTS).round().astype(int))
        figure.add_scatter(
            x=((places + 0.5) / len(gains) * 100).round(2).tolist(),
            y=gains[places].round(4).tolist(),
            name=name,
            mode="lines+markers" if len(gains) <= 80 else "lines",
            line={"color": _COLOURS[rival], "width": 2},
            marker={"size": 6, "symbol": {"base": "circle", "other_private": "diamond"}[rival]},
            hovertemplate="%{y:+.3f} nats per token<extra></extra>",
        )
    _style(figure, x_title="users, worst to best (%)", y_title="gain (nats per token)")
    figure.update_xaxes(range=[-2, 103], dtick=25, ticksuffix=" %", showgrid=False)
    figure.update_yaxes(range=list(scale))
    return Plot(
        f"plot-gains-{key.replace('_', '-')}",
        f"Gain of each user: {GROUPS[key]}",
        f"Line chart of the sorted gains of shared + private. {'; '.join(said)}.",
        "Shared + private against the base model, and against the same shared adapter with"
        " somebody else's private one. Each curve is sorted on its own.",
        figure,
    )


def _gains(per_user: Sequence[Mapping[str, Any]], rival: str) -> npt.NDArray[np.float64]:
    losses = [user["loss"] for user in per_user]
    both = [loss for loss in losses if rival in loss and "shared_private" in loss]
    return np.sort(np.array([loss[rival] - loss["shared_private"] for loss in both], dtype=float))


def _pair(comparison: Mapping[str, Any]) -> str:
    return f"{variant_label(comparison['better'])} over {variant_label(comparison['worse'])}"


def _tick(comparison: Mapping[str, Any]) -> str:
    """The pair in short lines; Plotly reads a little HTML in labels, so names are escaped."""
    better, worse = (variant_label(comparison[side]) for side in ("better", "worse"))
    lines = [*textwrap.wrap(better, 18), *textwrap.wrap(f"over {worse}", 18)]
    return "<br>".join(html.escape(line, quote=False) for line in lines)


def _style(figure: go.Figure, *, x_title: str, y_title: str) -> None:
    """Transparent, without a template: the page's style sheet colours text and grid."""
    figure.update_layout(
        template={},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"family": "system-ui, sans-serif", "size": 13},
        margin={"l": 8, "r": 12, "t": 8, "b": 8},
        height=340,
        hovermode="closest",
        showlegend=True,
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
    )
    for axis, title in ((figure.layout.xaxis, x_title), (figure.layout.yaxis, y_title)):
        axis.update(title={"text": title, "font": {"size": 13}}, automargin=True, zeroline=True)
