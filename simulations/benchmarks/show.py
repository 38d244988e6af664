"""Tables and pages of the benchmarks: one self-contained HTML file with plots each."""

from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

import plotly.graph_objects as go
from rich import markup
from rich.console import RenderableType
from rich.table import Table

NAMES = {
    "engine": "cohort engine",
    "one_by_one": "one by one (PEFT)",
    "ray": "Flower's Ray simulation",
    "pfl": "pfl-research (rounds only)",
}
Found = dict[str, Any]


def engine_table(found: Found) -> Sequence[RenderableType]:
    """What every runtime took, and the ratios."""
    title = f"{found['model']}, {found['users']} users, {found['rounds']} rounds + private adapters"
    rows = [
        (
            NAMES[name],
            *(f"{t[f'{part}seconds']:.2f}" for part in ("", "shared_", "private_", "overhead_")),
        )
        for name, t in found["runtimes"].items()
    ]
    table = _table(title, ("runtime", "seconds", "rounds", "private", "overhead"), rows)
    pfl = found["ratio_pfl"]
    ratios = (
        f"ratio to one by one {found['ratio_one_by_one']:.2f}, to Ray {found['ratio_ray']:.2f} "
        f"(overhead alone {found['ratio_ray_overhead']:.1f}), to pfl "
        + ("not installed" if pfl is None else f"{pfl:.2f}")
    )
    same = f"largest difference between releases: {found['largest_difference']:.1e}"
    return [table, ratios, same]


def engine_page(found: Found) -> str:
    """Stacked bars: training and overhead of every runtime."""
    names = [NAMES[name] for name in found["runtimes"]]
    times = list(found["runtimes"].values())
    bars = [
        go.Bar(name=label, y=names, x=[t[key] for t in times], orientation="h")
        for label, key in (("training", "compute_seconds"), ("overhead", "overhead_seconds"))
    ]
    figure = go.Figure(bars, layout={"barmode": "stack", "xaxis_title": "seconds, warm"})
    figure.update_yaxes(autorange="reversed")
    return _page("Cohort engine and peers", engine_table(found)[1:], [figure])


def scaling_table(found: Found) -> Sequence[RenderableType]:
    """Time and memory by cohort and by population."""
    head = ("population", "cohort", "prepare s", "prepare MiB", "round s", "run MiB")

    def rows(points: Sequence[Found]) -> Iterable[Sequence[str]]:
        for p in points:
            times = (f"{p['prepare_seconds']:.1f}", f"{p['prepare_mib']:.0f}")
            rest = (f"{p['round_seconds']:.2f}", f"{p['run_mib']:.0f}")
            yield f"{p['population']:,}", f"{p['cohort']:,}", *times, *rest

    grown = (
        f"peak memory of the run: × {found['memory_ratio_population']:.3f} by population, "
        f"× {found['memory_ratio_cohort']:.3f} by cohort; of preparing: "
        f"× {found['memory_ratio_population_prepare']:.3f}"
    )
    return [
        _table("By cohort", head, rows(found["by_cohort"])),
        _table("By population", head, rows(found["by_population"])),
        grown,
    ]


def scaling_page(found: Found) -> str:
    """Lines over cohort and population, on logarithmic axes."""
    figures = []
    for by, label in (("cohort", "users in a round"), ("population", "enrolled users")):
        points = found[f"by_{by}"]
        sizes = [p[by] for p in points]
        for key, unit in (("round_seconds", "seconds a round"), ("run_mib", "peak MiB")):
            line = go.Scatter(x=sizes, y=[p[key] for p in points], mode="lines+markers")
            figure = go.Figure([line], layout={"xaxis_title": label, "yaxis_title": unit})
            figure.update_xaxes(type="log")
            figure.update_yaxes(
                type="log" if key == "round_seconds" and by == "cohort" else "linear",
                rangemode="tozero",
            )
            figures.append(figure)
    return _page("What many users cost", scaling_table(found)[-1:], figures)


def ceiling_table(found: Found) -> Sequence[RenderableType]:
    """Every way to train, and its share of the ceiling."""
    rows = [
        (
            f"{p['name']}, {p['users']}",
            f"{p['milliseconds']:.1f}",
            f"{p['tflops']:.3g}",
            f"{p['share']:.0%}",
            f"{p['ratio']:.1f}",
            "–" if p["peak_gib"] is None else f"{p['peak_gib']:.1f}",
            f"{p['first_seconds']:.1f}",
        )
        for p in found["points"]
    ]
    title = f"{found['device']}, {found['shape']}, {found['type']}"
    head = ("users at once", "ms a user", "TFLOP/s", "of ceiling", "ratio", "peak GiB", "first s")
    products = ", ".join(f"{n} {speed:.3g}" for n, speed in found["products_tflops"].items())
    ceiling = f"ceiling: {found['ceiling_tflops']:.3g} TFLOP/s, the fastest of: {products}"
    return [_table(title, head, rows), ceiling]


def ceiling_page(found: Found) -> str:
    """Bars against the ceiling."""
    names = [f"{p['name']}, {p['users']}" for p in found["points"]]
    bars = go.Bar(x=names, y=[p["tflops"] for p in found["points"]])
    figure = go.Figure([bars], layout={"yaxis_title": "TFLOP/s"})
    figure.add_hline(y=found["ceiling_tflops"], line_dash="dash", annotation_text="ceiling")
    return _page("Share of the ceiling", ceiling_table(found)[1:], [figure])


def vault_table(found: Found) -> Sequence[RenderableType]:
    """Encrypted against plain, and the whole vault."""
    rows = [
        (
            name,
            f"{store['import_seconds']:.2f}",
            f"{store['search_ms']:.1f}",
            f"{store['search_p95_ms']:.1f}",
            f"{store['mib']:.0f}",
        )
        for name, store in found["stores"].items()
    ]
    head = ("store", "import s", "search ms", "slowest 5 %", "MiB")
    ratios = (
        f"encrypted over plain: import {found['ratio_import']:.2f}, "
        f"search {found['ratio_search']:.2f}"
    )
    vault = (
        f"from a question to a prompt: {found['prompt_ms']:.1f} ms (slowest 5 %: "
        f"{found['prompt_p95_ms']:.1f}); opening: {found['open_seconds']:.2f} s"
    )
    return [_table(f"{found['records']:,} records", head, rows), ratios, vault]


def training_table(found: Found) -> Sequence[RenderableType]:
    """A device against Trainer."""
    rows = [
        (
            name,
            f"{each['tokens_per_second']:.0f}",
            f"{each['peak_mib']:.0f}",
            f"{each['peak_mib'] - each['model_mib']:.0f}",
            f"{each['loss']:.4f}",
        )
        for name, each in found["contenders"].items()
    ]
    title = (
        f"{found['model']}, {found['steps']} steps of {found['batch_size']} × {found['max_tokens']}"
    )
    head = ("private training", "tokens/s", "peak MiB", "beyond the model", "last loss")
    ratios = (
        f"throughput {found['ratio_throughput']:.2f} of Trainer's, peak memory "
        f"{found['ratio_peak']:.2f}, beyond the model {found['ratio_training_memory']:.2f}"
    )
    return [_table(title, head, rows), ratios]


def memory_table(found: Found) -> Sequence[RenderableType]:
    """What a device's verbs take."""
    rows = [(verb, f"{peak:.0f}") for verb, peak in found["peak_mib"].items()]
    title = f"{found['model']}, records and replies of {found['max_tokens']} tokens at most"
    return [_table(title, ("homefire device", "peak MiB"), rows)]


def load_table(found: Found) -> Sequence[RenderableType]:
    """What a server did and cost, by cohort; and whether its memory grows."""
    title = f"{found['light']:,} light and {found['real']} real devices, {found['cores']} cores"
    head = ("cohort", "round s", "accepted", "CPU ms each", "superlink MiB", "serverapp MiB")
    rows = [
        (
            str(stage["cohort"]),
            f"{stage['round_seconds']:.1f}",
            str(stage["accepted"]),
            f"{1000 * sum(stage['cpu_per_contribution'].values()):.0f}",
            f"{stage['own_mib']['superlink']:.0f}",
            f"{stage['own_mib']['serverapp']:.0f}",
        )
        for stage in found["stages"]
    ]
    door = [
        f"cohort {stage['cohort']}: {stage['requests_per_second']:.0f} requests a second at the "
        f"door; refused there: {_counts(stage['refused_at_the_door'])}; no contribution: "
        f"{_counts({**stage['dropped'], **stage['refused']})}"
        for stage in found["stages"]
    ]
    ratios = ", ".join(f"{name} {ratio:.2f}" for name, ratio in found["memory_ratio"].items())
    own = f"memory of its own, the most, last over first cohort: {ratios}"
    soaks = [_soak_table(stage["soak"]) for stage in found["stages"] if "soak" in stage]
    return [_table(title, head, rows), *door, own, *soaks]


def _soak_table(soak: Found) -> Table:
    title = f"{soak['minutes']:g} minutes, {soak['rounds']} rounds, {soak['accepted']} accepted"
    head = ("process", "MiB an hour", "95 %", "first MiB", "last MiB")
    rows = [
        (
            name,
            f"{each['per_hour']:+.1f}",
            f"{each['low']:+.1f} … {each['high']:+.1f}",
            f"{each['first']:.0f}",
            f"{each['last']:.0f}",
        )
        for name, each in soak["growth_mib_per_hour"].items()
    ]
    return _table(title, head, rows)


def _counts(counts: Found) -> str:
    return ", ".join(f"{reason} {count}" for reason, count in counts.items()) or "none"


def deployment_table(found: Found) -> Sequence[RenderableType]:
    """A round on real devices."""
    title = f"{found['devices']} devices, {found['rounds']} rounds, {found['cores']} cores"
    rows = [
        (name, f"{found[key]:.2f}", f"{found[key] - found['training_seconds']:.2f}")
        for name, key in (
            ("homefire server, homefire device join", "homefire_seconds"),
            ("Flower's programs as documented", "flower_seconds"),
        )
    ]
    head = ("", "seconds a round", "besides training")
    return [_table(title, head, rows), f"ratio besides training {found['ratio']:.3f}"]


def _table(title: str, head: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    table = Table(title=markup.escape(title), box=None, title_justify="left")
    for number, name in enumerate(head):
        table.add_column(name, justify="right" if number else "left")
    for row in rows:
        table.add_row(*map(markup.escape, row))
    return table


def _page(title: str, notes: Sequence[object], figures: Sequence[go.Figure]) -> str:
    settings = {"displayModeBar": False, "plotlyServerURL": ""}
    plots = [
        figure.to_html(full_html=False, include_plotlyjs=not number, config=settings)
        for number, figure in enumerate(figures)
    ]
    words = "".join(f"<p>{escape(str(note))}</p>" for note in notes)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f"<title>{escape(title)}</title></head>"
        '<body style="font-family: system-ui; max-width: 60rem; margin: 2rem auto">'
        f"<h1>{escape(title)}</h1>{words}{''.join(plots)}</body></html>\n"
    )
