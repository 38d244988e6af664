"""A run's report: JSON for machines, one self-contained HTML page for people.

The report of a run is `report.json` in the run's folder, and `report.html`, which is made from it
alone. The page needs no network and no other file: Plotly's JavaScript lies inside, and a content
security policy forbids every request.
"""

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from homefire.common.errors import DataError, HomefireError
from homefire.common.files import write_atomically
from homefire.simulations.report_html import Markup, join, tag
from homefire.simulations.report_style import DRAW, POLICY, STYLE

FORMAT = 1
_SECTIONS = frozenset(
    "format name created_at homefire_version seed experiment base_model population adapters privacy"
    " deployment rounds utility efficiency".split()
)


def load_report(run: Path) -> dict[str, Any]:
    """Read the report of a run.

    Args:
        run: The run's folder.

    Raises:
        DataError: There is no report, it is damaged, or it has another format number.
    """
    path = run / "report.json"
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise DataError(
            f"{path}: no such file", hint="Give the folder of a run that has ended."
        ) from error
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise DataError(f"{path}: damaged ({error})", hint="Repeat the run.") from error
    if not isinstance(report, dict):
        raise DataError(f"{path}: a report must be an object, not {type(report).__name__}")
    if report.get("format") != FORMAT:
        raise DataError(
            f"{path}: report format {report.get('format')!r}, not {FORMAT}",
            hint="Read it with the version of homefire that wrote it, or repeat the run.",
        )
    if missing := sorted(_SECTIONS - set(report)):
        raise DataError(f"{path}: damaged, {missing[0]!r} is missing", hint="Repeat the run.")
    return report


def write_report(run: Path, report: Mapping[str, Any]) -> None:
    """Write `report.json`, then `report.html`; each is complete or absent, whatever happens.

    Args:
        run: The run's folder; made when absent.
        report: The report, in the shape of format 1.

    Raises:
        DataError: A number is not finite, which JSON cannot hold; nothing was written.
        HomefireError: Plotly is missing; the JSON was written.
    """
    for name, value in _not_finite(report):
        raise DataError(f"report value {name} is {value}", hint="Report an unknown number as null.")
    text = json.dumps(report, sort_keys=True, indent=1, allow_nan=False, ensure_ascii=False)
    write_atomically(run / "report.json", f"{text}\n".encode())
    write_atomically(run / "report.html", render(json.loads(text)).encode())


def render(report: Mapping[str, Any]) -> str:
    """Make the page.

    Args:
        report: The report, in the shape of format 1.

    Returns:
        One HTML document that needs no network and no other file.

    Raises:
        HomefireError: Plotly is missing.
    """
    try:
        from plotly.offline import get_plotlyjs

        from homefire.simulations import report_headline, report_plots, report_sections
    except ModuleNotFoundError as error:
        raise HomefireError(
            f"the report's page needs the package plotly ({error})",
            hint="Install homefire[simulation].",
        ) from error
    rounds = report_plots.loss_by_round(report["rounds"])
    forest = report_plots.gains_forest(report["utility"])
    gains = report_plots.sorted_gains(report["utility"])
    body = join(
        report_headline.off_banner(report["privacy"]),
        _header(report),
        tag(
            "main",
            tag("section", report_headline.headline(report), aria_label="In short"),
            report_headline.privacy_box(report["privacy"]),
            report_headline.deployment_box(report["deployment"]),
            report_sections.utility(report, forest, gains),
            report_sections.training(report["rounds"], rounds),
            report_sections.audit(report.get("audit")),
            report_sections.efficiency(report["efficiency"]),
            report_sections.settings(report),
        ),
    )
    drawn = [plot for plot in (forest, *gains.values(), rounds) if plot]
    figures = ",".join(f"{json.dumps(plot.name)}:{plot.figure.to_json()}" for plot in drawn)
    draw = DRAW.replace("FIGURES", "{" + figures.replace("<", "\\u003c") + "}")
    return _page(report["name"], body, (get_plotlyjs(), draw) if drawn else ())


def _header(report: Mapping[str, Any]) -> Markup:
    made = f"{report['created_at']} · homefire {report['homefire_version']} · seed {report['seed']}"
    return tag(
        "header",
        tag("p", "homefire simulation", class_="kicker"),
        tag("h1", report["name"]),
        tag("p", made, class_="note"),
    )


def _page(name: str, body: Markup, scripts: tuple[str, ...]) -> str:
    return "\n".join(
        [
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
            tag("title", name, " · homefire"),
            f"<style>{STYLE}</style>\n</head>\n<body>",
            body,
            *(f"<script>{script}</script>" for script in scripts),
            "</body>\n</html>\n",
        ]
    )


def _not_finite(value: object, name: str = "") -> Iterator[tuple[str, float]]:
    if isinstance(value, float) and not math.isfinite(value):
        yield name, value
    elif isinstance(value, Mapping):
        for key, entry in value.items():
            yield from _not_finite(entry, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list | tuple):
        for index, entry in enumerate(value):
            yield from _not_finite(entry, f"{name}[{index}]")
