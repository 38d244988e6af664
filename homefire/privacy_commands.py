"""`homefire privacy`: what a federation would promise, asked before anything is trained."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from homefire.common import claims
from homefire.common.errors import HomefireError
from homefire.options import AsJson, write_page

if TYPE_CHECKING:
    from homefire.server.budget import Alternative, Budget, Point, Question

privacy_app = typer.Typer(
    help="Plan, calibrate and compare what a run may promise.", no_args_is_help=True
)

_MEANINGS = {
    "release": "against whoever receives the releases",
    "known": "against a recipient who also knows who took part when",
    "server": "against the server itself, which sees every contribution before the noise: "
    "trusted aggregator",
}
_NAMES = ("ε_release", "ε_known_cohort")

Users = Annotated[int, typer.Option(help="N: all enrolled users.")]
Cohort = Annotated[int, typer.Option(help="n: users expected in a round; the fixed denominator.")]
Rounds = Annotated[int, typer.Option(help="T: rounds, each of which is released.")]
Participations = Annotated[
    int | None,
    typer.Option(
        help="k: the most rounds of one user. Default: what a rota needs; gaussian: no limit."
    ),
]
Separation = Annotated[
    int | None,
    typer.Option(
        help="b: the fewest rounds between two turns of one user (banded-sqrt alone). "
        "Default: the most that a rota can keep."
    ),
]
Delta = Annotated[
    float | None,
    typer.Option(
        help="The probability bound of every epsilon, below 1 / users. "
        "Default: min(1e-5, users^-1.1), rounded down."
    ),
]
MechanismOption = Annotated[str, typer.Option(help="banded-sqrt, gaussian or none.")]
Epsilon = Annotated[
    float | None, typer.Option(help="Target for epsilon_release: the noise is the answer.")
]
Noise = Annotated[
    float | None, typer.Option(help="Noise multiplier z: the epsilons are the answer.")
]
AccountantOption = Annotated[
    str, typer.Option(help="auto: exact Gaussian, or PLD for random cohorts. exact, pld: insist.")
]
Html = Annotated[
    Path | None, typer.Option(help="Also write an interactive plot: one page, no network.")
]


@privacy_app.command()
def plan(
    *,
    users: Users,
    cohort: Cohort,
    rounds: Rounds,
    participations: Participations = None,
    separation: Separation = None,
    delta: Delta = None,
    mechanism: MechanismOption = "banded-sqrt",
    epsilon: Epsilon = None,
    noise_multiplier: Noise = None,
    accountant: AccountantOption = "auto",
    as_json: AsJson = False,
    html: Html = None,
) -> None:
    r"""How much noise, and what may be promised, before anything is trained.

    Give --epsilon to get the noise, or --noise-multiplier to get the epsilons.

    Examples:
      homefire privacy plan --users 1500 --cohort 75 --rounds 40 --epsilon 8
      homefire privacy plan --users 2000 --cohort 100 --rounds 100 \
        --participations 5 --separation 20 --epsilon 8 --html plan.html
      homefire privacy plan --users 1000 --cohort 50 --rounds 100 \
        --mechanism gaussian --noise-multiplier 1 --json

    Mechanisms:
      banded-sqrt  correlated noise; users take turns on a fixed rota. Each
                   takes part at most k times, at least b rounds apart.
      gaussian     independent noise; every round draws its cohort at random,
                   in secret. A limit of k turns ends the gain from that.
      none         no noise and no privacy.

    Every run has three epsilons; smaller is more private:
      epsilon_release       against whoever receives the releases.
      epsilon_known_cohort  against a recipient who also knows who took part
                            when. Under banded-sqrt it equals epsilon_release.
      epsilon_server        against the server itself: none can be stated, for
                            it sees every contribution before the noise. It is
                            a trusted aggregator.
    """
    from homefire.common.privacy.accounting import default_delta
    from homefire.common.privacy.schedule import Schedule
    from homefire.server import budget

    try:
        schedule = Schedule(users, cohort, rounds, participations, separation)
        question = budget.Question(
            schedule=schedule,
            mechanism=mechanism,
            delta=default_delta(users) if delta is None else delta,
            epsilon=epsilon,
            noise_multiplier=noise_multiplier,
            accountant=accountant,
        )
        answer = budget.answer(question)
    except HomefireError as error:
        error.hint = error.hint or "`homefire privacy plan --help` explains every number."
        raise
    points = [] if as_json and html is None else list(budget.curve(answer))
    if html is not None:
        _write_page(html, answer, points)
    if as_json:
        typer.echo(json.dumps(answer.to_json(), indent=1, allow_nan=False, ensure_ascii=False))
    else:
        _show(Console(highlight=False), question, answer, points)


def _show(
    console: Console, question: "Question", answer: "Budget", points: Sequence["Point"]
) -> None:
    from homefire.server.budget import alternatives

    if answer.charge is None:
        console.print(Text("No privacy: mechanism none adds no noise.", style="bold red"))
    console.print(_answer_table(answer))
    said = answer.statement
    console.print(f"Who takes part: {said.participation}.", markup=False)
    if answer.charge is not None:
        console.print(f"Promised for {said.unit} ({said.adjacency} adjacency).", markup=False)
    for caution in answer.cautions:
        console.print(Text(f"Caution: {caution}.", style="yellow"))
    if question.epsilon is None:
        for line in _refusals(answer):
            console.print(line, markup=False)
    else:
        others = alternatives(question)
        console.print(_comparison(others, question.epsilon))
        for line in _notes(others):
            console.print(line, markup=False)
    if points:
        console.print("\nε against the noise multiplier z, on a logarithmic scale", style="italic")
        for line in text_chart(points, min(console.width, 100)):
            console.print(line, markup=False, no_wrap=True, overflow="ignore", crop=False)


def _answer_rows(answer: "Budget") -> tuple[tuple[str, str, str], ...]:
    """Name, value and meaning of every number."""
    said, z = answer.statement, answer.statement.noise_multiplier
    return (
        ("noise multiplier z", _short(z), "fresh noise on the sum of a round, in clip norms"),
        (_NAMES[0], claims.shown(said.epsilon_release), _MEANINGS["release"]),
        (_NAMES[1], claims.shown(said.epsilon_known_cohort), _MEANINGS["known"]),
        ("ε_server", "∞", _MEANINGS["server"]),
        ("δ", _short(said.delta), "probability bound of each ε above"),
        ("charge μ²", _short(answer.charge), "what each participation adds to a device's ledger"),
        ("noise on the average", _short(answer.noise_on_average), "z / cohort, in clip norms"),
        (
            "RMSE of prefix sums",
            _short(answer.prefix_rmse),
            f"noise on the sum of the rounds so far, over {answer.schedule.rounds:,} rounds at "
            "clip norm 1",
        ),
    )


def _answer_table(answer: "Budget") -> Table:
    table = Table(title=_title(answer), title_justify="left", box=None, show_header=False)
    table.add_column(overflow="fold")
    table.add_column(justify="right", style="bold", overflow="fold")
    table.add_column(overflow="fold")
    for row in _answer_rows(answer):
        table.add_row(*row)
    return table


def _title(answer: "Budget") -> str:
    schedule, said = answer.schedule, answer.statement
    k = "no limit" if said.participations is None else f"k = {said.participations}"
    b = "" if said.separation is None else f", b = {said.separation}"
    return (
        f"{said.mechanism}: {schedule.users:,} users, cohort {schedule.cohort:,}, "
        f"{schedule.rounds:,} rounds, {k}{b}"
    )


def _comparison(others: Sequence["Alternative"], epsilon: float) -> Table:
    table = Table(
        title=f"\nOther ways to ε = {epsilon:g}", title_justify="left", box=None, pad_edge=False
    )
    table.add_column("mechanism", overflow="fold")
    for name in ("z", *_NAMES, "RMSE / cohort"):
        table.add_column(name, justify="right", overflow="fold")
    for other in others:
        if (found := other.budget) is None:
            table.add_row(other.name, *["–"] * 4)
            continue
        table.add_row(
            other.name,
            _short(found.statement.noise_multiplier, digits=4),
            claims.shown(found.statement.epsilon_release),
            claims.shown(found.statement.epsilon_known_cohort),
            _short(found.prefix_rmse / found.schedule.cohort, digits=3),
        )
    return table


def _notes(others: Sequence["Alternative"]) -> list[str]:
    """Which alternative is best, why others are missing, and what the error does not show."""
    lines = [f"Not possible: {other.name}: {other.reason}." for other in others if other.reason]
    found = sorted(
        ((other.budget.prefix_rmse, other) for other in others if other.budget),
        key=lambda pair: pair[0],
    )
    if len(found) > 1:
        (best, first), (second, _) = found[:2]
        lines.append(f"Least noise: {first.name}; the next has {second / best:.2f} times as much.")
        said = first.budget.statement if first.budget else None
        if said and said.epsilon_release != said.epsilon_known_cohort:
            lines.append(
                f"That holds while nobody learns who took part when; then it is ε = "
                f"{claims.shown(said.epsilon_known_cohort)}."
            )
    return lines + [line for other in others if other.budget for line in _refusals(other.budget)]


def _refusals(answer: "Budget") -> list[str]:
    """What a limit costs where cohorts are random; the error of the noise does not show it."""
    from homefire.server.budget import refused_share

    said = answer.statement
    if said.mechanism != "gaussian" or (share := refused_share(answer.schedule)) < 0.005:
        return []
    return [
        f"gaussian with at most {said.participations} participations each: devices refuse about "
        f"{share:.0%} of the turns that are drawn, so cohorts are smaller under the same noise."
    ]


def text_chart(points: Sequence["Point"], width: int) -> list[str]:
    """Both epsilons as marks on a logarithmic axis, one line a noise multiplier.

    Args:
        points: One line each.
        width: Columns of the widest line; 60 are used where there are fewer.

    Returns:
        Plain lines: heads and legend, values and marks, the axis and its labels. None where no
        epsilon is above 0.
    """
    rows = [(p.noise_multiplier, p.epsilon_release, p.epsilon_known_cohort) for p in points]
    positive = [math.log(e) for row in rows for e in row[1:] if e > 0]
    if not positive:
        return []
    cells = [(f"{z:.4g}", claims.shown(release), claims.shown(known)) for z, release, known in rows]
    heads = ("z", *_NAMES)
    widths = [max(len(row[i]) for row in (heads, *cells)) for i in range(3)]
    columns = max(width, 60) - sum(widths) - 8
    low, high = min(positive), max(positive)
    scale = (columns - 1) / ((high - low) or 1.0)

    def place(epsilon: float) -> int:
        return round(((math.log(epsilon) if epsilon > 0 else low) - low) * scale)

    def line(row: Sequence[str], rest: str) -> str:
        left = "  ".join(f"{cell:>{size}}" for cell, size in zip(row, widths, strict=True))
        return f"{left}  {rest}".rstrip()

    lines = [line(heads, "● release  ○ known cohort  ◆ both")]
    for row, (_, release, known) in zip(cells, rows, strict=True):
        marks = [" "] * columns
        marks[place(known)] = "○"
        marks[place(release)] = "◆" if place(known) == place(release) else "●"
        lines.append(line(row, "│" + "".join(marks)))
    ticks = {place(e): f"{e:g}" for e in _ticks(math.exp(low), math.exp(high))}
    axis = "".join("┬" if column in ticks else "─" for column in range(columns))
    labels = ""
    for column, label in sorted(ticks.items()):
        if not labels or column > len(labels):
            labels = f"{labels:<{column}}{label}"
    blank = ("", "", "")
    return [*lines, line(blank, f"└{axis}"), line(blank, f" {labels}")]


def _ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 in every decade between two positive numbers."""
    decades = range(math.floor(math.log10(low)), math.floor(math.log10(high)) + 1)
    ticks = [float(f"{digit}e{decade}") for decade in decades for digit in (1, 2, 5)]
    return [tick for tick in ticks if low <= tick <= high]


def _write_page(path: Path, answer: "Budget", points: Sequence["Point"]) -> None:
    """Write the plot as one page that needs no network.

    Raises:
        HomefireError: Plotly is missing, or there is nothing to plot.
        ConfigError: The file cannot be written.
    """
    if not points:
        raise HomefireError("without noise there is no epsilon to plot", hint="Leave --html out.")
    write_page(path, render_page(answer, points))


def render_page(answer: "Budget", points: Sequence["Point"]) -> str:
    """The plot and the answer as one HTML document; nothing is fetched from anywhere.

    Raises:
        HomefireError: Plotly is missing.
    """
    from homefire.simulations.report_html import Markup, facts, join, tag
    from homefire.simulations.report_style import POLICY, STYLE

    said, title = answer.statement, _title(answer)
    body = join(
        tag("header", tag("p", "homefire privacy plan", class_="kicker"), tag("h1", title)),
        tag(
            "main",
            facts((name, value) for name, value, _ in _answer_rows(answer)),
            tag("p", f"{said.participation}; {said.unit} ({said.adjacency}).", class_="note"),
            tag("div", Markup(_plot(answer, points)), class_="plot"),
        ),
    )
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        f"{tag('title', title)}\n<style>{STYLE}</style>\n</head>\n"
        f"<body>\n{body}\n</body>\n</html>\n"
    )


def _plot(answer: "Budget", points: Sequence["Point"]) -> str:
    """The plot as HTML that brings its own script."""
    try:
        import plotly.graph_objects as go
    except ImportError as error:
        raise HomefireError(
            "--html needs the package plotly", hint="Install homefire[simulation]."
        ) from error
    figure = go.Figure()
    series = (
        (_NAMES[0], [p.epsilon_release for p in points], "circle", "solid", "#d9691e"),
        (_NAMES[1], [p.epsilon_known_cohort for p in points], "diamond-open", "dash", "#3b8fd4"),
    )
    for name, epsilons, symbol, dash, colour in series:
        figure.add_scatter(
            x=[point.noise_multiplier for point in points],
            y=epsilons,
            name=name,
            mode="lines+markers",
            line={"color": colour, "dash": dash},
            marker={"symbol": symbol, "size": 9},
            customdata=[claims.shown(epsilon) for epsilon in epsilons],
            hovertemplate="z %{x:.4g}: ε %{customdata}",
        )
    answered = answer.statement.noise_multiplier
    figure.add_vline(x=answered, line={"color": "#8a8f98", "dash": "dot"})
    # Transparent, without a template: the page's style sheet colours text and grid.
    figure.update_layout(
        template="none", paper_bgcolor="rgba(0,0,0,0)", plot_bgcolor="rgba(0,0,0,0)", height=460
    )
    figure.update_xaxes(title="noise multiplier z", type="log")
    figure.update_yaxes(title="ε", type="log")
    settings = {"displayModeBar": False, "responsive": True}
    return str(figure.to_html(full_html=False, include_plotlyjs=True, config=settings))


def _short(value: float | None, *, digits: int = 6) -> str:
    return "–" if value is None else f"{value:.{digits}g}"
