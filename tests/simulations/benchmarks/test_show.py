"""Tables and pages of made-up results: every number is there, and nothing is fetched."""

import io
import re
from collections.abc import Callable, Sequence
from html.parser import HTMLParser
from typing import Any

import pytest
from rich.console import Console, RenderableType
from tiny_benchmarks import CEILING, DEPLOYMENT, ENGINE, LOAD, SCALING

from homefire.simulations.benchmarks.show import (
    ceiling_page,
    ceiling_table,
    deployment_table,
    engine_page,
    engine_table,
    load_table,
    scaling_page,
    scaling_table,
)

Page = Callable[[dict[str, Any]], str]
PAGES = pytest.mark.parametrize(
    ("page", "found", "plots"),
    [(engine_page, ENGINE, 1), (scaling_page, SCALING, 4), (ceiling_page, CEILING, 1)],
)


def printed(parts: Sequence[RenderableType]) -> str:
    console = Console(file=io.StringIO(), width=120)
    for part in parts:
        console.print(part)
    file = console.file
    assert isinstance(file, io.StringIO)
    return file.getvalue()


def row(text: str, beginning: str) -> list[str]:
    (line,) = (line for line in text.splitlines() if line.strip().startswith(beginning))
    return line.strip()[len(beginning) :].split()


class Links(HTMLParser):
    """What a page refers to, and what it says."""

    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []
        self.scripts = 0
        self.words: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note links."""
        self.scripts += tag == "script"
        self.links += [f"{tag} {n}={v}" for n, v in attrs if n in ("src", "href", "srcset", "data")]

    def handle_data(self, data: str) -> None:
        """Note words."""
        self.words.append(data)


def parsed(text: str) -> Links:
    links = Links()
    links.feed(text)
    return links


# Tables


def test_loads_table_has_every_cohort_and_whether_memory_grows() -> None:
    text = printed(load_table(LOAD))
    assert "1,000 light and 12 real devices, 2 cores" in text
    assert row(text, "50 ") == ["12.5", "49", "50", "200", "400"]
    assert row(text, "400 ") == ["12.5", "399", "50", "220", "400"]
    assert "cohort 400: 150 requests a second at the door; refused there: too often 3" in text
    assert "no contribution: no answer 1" in text
    assert "last over first cohort: superlink 1.10, serverapp 1.00" in text
    assert "30 minutes, 77 rounds, 30000 accepted" in text
    assert row(text, "superlink") == ["+0.5", "-1.5", "…", "+2.5", "219", "221"]


def test_a_load_without_a_soak_has_no_table_of_it() -> None:
    text = printed(load_table({**LOAD, "stages": LOAD["stages"][:1]}))
    assert "minutes" not in text


def test_deployments_table_has_both_servers_and_their_ratio() -> None:
    text = printed(deployment_table(DEPLOYMENT))
    assert row(text, "homefire server, homefire device join") == ["1.25", "1.00"]
    assert row(text, "Flower's programs as documented") == ["10.25", "10.00"]
    assert "ratio besides training 0.100" in text


def test_the_engines_table_has_every_runtime_and_all_ratios() -> None:
    text = printed(engine_table(ENGINE))
    assert "some-model, 12 users, 2 rounds + private adapters" in text
    assert row(text, "cohort engine") == ["3.21", "1.11", "2.10", "0.31"]
    assert row(text, "one by one (PEFT)") == ["32.10", "11.10", "21.00", "0.50"]
    assert row(text, "Flower's Ray simulation") == ["64.20", "22.20", "42.00", "31.00"]
    assert row(text, "pfl-research (rounds only)") == ["5.55", "5.55", "0.00", "0.55"]
    assert "ratio to one by one 10.00, to Ray 20.00 (overhead alone 100.0), to pfl 5.00" in text
    assert "largest difference between releases: 3.2e-06" in text


def test_without_pfl_the_table_says_so() -> None:
    runtimes = {name: times for name, times in ENGINE["runtimes"].items() if name != "pfl"}
    text = printed(engine_table(ENGINE | {"ratio_pfl": None, "runtimes": runtimes}))
    assert "to pfl not installed" in text
    assert "pfl-research" not in text


def test_scalings_table_has_every_size() -> None:
    text = printed(scaling_table(SCALING))
    one, other = text.split("By population")
    assert row(one, "1,000") == ["8", "1.5", "210", "0.25", "310"]
    assert row(one, "20,000") == ["10,000", "9.0", "230", "123.46", "345"]
    assert row(other, "1,000,000") == ["8", "600.1", "240", "0.50", "320"]
    assert "× 1.032 by population, × 1.113 by cohort; of preparing: × 1.143" in text


def test_the_ceilings_table_has_every_way_to_train() -> None:
    text = printed(ceiling_table(CEILING))
    assert "Some GPU, 135m, bfloat16 autocast" in text
    assert row(text, "one by one, 1") == ["400.0", "3.5", "1%", "1.0", "1.2", "5.0"]
    assert row(text, "compiled, 64") == ["8.0", "175", "58%", "50.0", "–", "90.0"]
    assert "ceiling: 300 TFLOP/s" in text


# Pages


@PAGES
def test_a_page_fetches_nothing(page: Page, found: dict[str, Any], plots: int) -> None:
    text = page(found)
    links = parsed(text)
    assert links.links == []
    assert links.scripts >= plots
    assert text.startswith("<!doctype html>") and text.rstrip().endswith("</html>")
    assert not re.search(r"@import|url\(\s*['\"]?https?:", text)
    assert "cdn.plot.ly" not in "".join(re.findall(r"<script[^>]*>", text))
    assert text.count("Plotly.newPlot(") >= plots


@PAGES
def test_plots_have_their_library_once(page: Page, found: dict[str, Any], plots: int) -> None:
    text = page(found)
    assert len(re.findall(r'class="plotly-graph-div"', text)) == plots
    assert 3_000_000 < len(text) < 8_000_000


@pytest.mark.parametrize(
    ("page", "found", "words"),
    [
        (engine_page, ENGINE, ["ratio to one by one 10.00", "3.2e-06", "cohort engine"]),
        (scaling_page, SCALING, ["× 1.113 by cohort", "users in a round", "123.456"]),
        (ceiling_page, CEILING, ["ceiling: 300 TFLOP/s", "compiled, 64", "175.0"]),
    ],
)
def test_pages_have_their_numbers(page: Page, found: dict[str, Any], words: list[str]) -> None:
    text = "".join(parsed(page(found)).words)
    for word in words:
        assert word in text


def test_names_are_no_markup_of_a_page() -> None:
    hostile = CEILING["points"][0] | {"name": "<img src=x onerror=alert(1)>"}
    page = ceiling_page(CEILING | {"points": [hostile]})
    assert parsed(page).links == []
    assert "<img src=x" not in page


def test_names_are_no_markup_of_a_terminal() -> None:
    """A model's folder may have any name; the measurement before took an hour."""
    name = "a [red]x[/b] model"
    assert name in printed(engine_table(ENGINE | {"model": name}))
    assert name in printed(ceiling_table(CEILING | {"device": name}))
