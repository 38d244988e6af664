"""The operator's page in a real browser, and the metrics by Prometheus' own reader."""

import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from playwright.sync_api import Browser, Page, Route, expect, sync_playwright
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient
from tiny_vaults import served_on_a_port

from homefire.server import registry_counts
from homefire.server.door import REASONS
from homefire.server.operator_page import make_app, metrics
from homefire.server.spending import Budget
from homefire.server.status import DROPPED, OTHER, PROCESSES, REFUSED, Status

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome") or ""
in_a_browser = pytest.mark.skipif(not CHROMIUM, reason="no chromium on this machine")
CANARY = "ann.example"


def round_log(number: int, **changes: Any) -> dict[str, Any]:
    """What the run logs of a round."""
    wave = number * 7 % 13
    told = {
        "round": number,
        "cohort": 75,
        "accepted": 70 - wave,
        "dropped": {"no answer": wave // 2, "late": 1},
        "refused": {"too often": wave // 3, "lifetime epsilon spent": 1},
        "train_loss": 4.2 - 1.4 * number / (number + 20) + wave / 200,
        "clipped_share": 0.4,
        "seconds": 41.0 + wave,
    }
    return {**told, **changes}


def release(number: int, **changes: Any) -> dict[str, Any]:
    """What is told of a release: one every hour, good for a year."""
    issued = 1_795_000_000 + 3600 * number
    told = {
        "number": number,
        "run": "0123abcd",
        "round": number,
        "epsilon": 8.0,
        "issued_at": issued,
        "expires_at": issued + 365 * 86_400,
    }
    return {**told, **changes}


BUDGET = Budget("banded-sqrt", 1e-6, 2.31, 8.0, 2.31, 8.0, 27)
BEFORE = Status(
    state="waiting: 412 devices are enrolled, and the run needs 1500",
    names=("fed.example.org", "203.0.113.7"),
    processes={name: {"runs": True, "starts": 1} for name in sorted(PROCESSES)},
    enrolled=412,
    needed=1500,
    tickets=1088,
    online=397,
    planned_rounds=40,
    budget=replace(BUDGET, epsilon_now=0.0, epsilon_known_cohort_now=0.0, rounds_left=40),
    door={"served": 8123, "refused": {"no such path": 41}},
    releases=[],
)
RUNNING = replace(
    BEFORE,
    state="running",
    enrolled=1500,
    online=1391,
    tickets=0,
    rounds=[round_log(number) for number in range(1, 13)],
    dropped={"no answer": 37, "late": 12, "malformed": 1},
    refused={"too often": 21, "lifetime epsilon spent": 12},
    bytes_up=12 * 68 * 82_000,
    bytes_down=12 * 75 * 82_000,
    budget=BUDGET,
    door={"served": 912_345, "refused": {"no such path": 1204, "too often": 77, "no key": 3}},
    registry={
        "answered": {"latest": 48_211, "download": 1502, "health": 7},
        "refused": {"too many calls": 31},
        "bytes_sent": 123_200_000,
    },
    releases=[0, *range(1, 7), *range(8, 14)],
    burnt=1,
    certificate_days=300,
    published=[release(number) for number in range(1, 13)],
)
NEARLY = replace(
    RUNNING,
    rounds=[round_log(number) for number in range(1, 381)],
    planned_rounds=400,
    releases=list(range(381)),
    burnt=0,
    published=[release(number, run="fedc9876") for number in range(1361, 1381)],
    budget=replace(BUDGET, mechanism="gaussian", epsilon_now=7.71, rounds_left=20),
)
DOWN = replace(
    RUNNING,
    state="waiting for the SuperLink",
    online=None,
    door={},
    processes={
        "superlink": {"runs": False, "starts": 9},
        "registry": {"runs": True, "starts": 1},
        "executor": {"runs": True, "starts": 2},
    },
    trouble=[
        "superlink does not run: see logs/superlink.log",
        "the disk of /srv/homefire has 112 MB left",
        "the certificate is good for 11 days more: homefire server renew",
    ],
)
NONE = replace(
    RUNNING,
    state="the run is over: releases are served",
    rounds=[round_log(1, train_loss=None)],
    releases=[0, 1],
    published=[release(1, epsilon=None, expires_at=1_795_100_000)],
    planned_rounds=1,
    budget=Budget("none", None, None, None, None, None, 0),
)
SEEN = {"before": BEFORE, "running": RUNNING, "nearly": NEARLY, "down": DOWN, "none": NONE}


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


Opened = Callable[..., Page]


@pytest.fixture
def opened(browser: Browser) -> Iterator[Opened]:
    """Opens the page of a status; a request to anywhere else, or an error, fails the test."""
    wrong: list[str] = []
    closing: list[Any] = []

    def open_page(status: Callable[[], Status], *, dark: bool = False, width: int = 1200) -> Page:
        served = served_on_a_port(make_app(status))
        url = served.__enter__()
        closing.append(lambda: served.__exit__(None, None, None))
        scheme: Any = "dark" if dark else "light"
        page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        closing.append(page.close)

        def only_here(route: Route) -> None:
            if route.request.url.startswith((url, "data:")):
                route.continue_()
            else:
                wrong.append(route.request.url)
                route.abort()

        page.route("**/*", only_here)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("console", lambda said: wrong.append(said.text) if said.type == "error" else None)
        page.goto(url)
        return page

    yield open_page
    for close in reversed(closing):
        close()
    assert [each for each in wrong if "ERR_CONNECTION_REFUSED" not in each] == []


def look(page: Page, name: str) -> None:
    """Keep a picture where HOMEFIRE_SCREENSHOTS says so."""
    if folder := os.environ.get("HOMEFIRE_SCREENSHOTS"):
        page.screenshot(path=Path(folder) / f"{name}.png", full_page=True)


@in_a_browser
@pytest.mark.slow
@pytest.mark.parametrize("width", [1200, 380])
@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("name", SEEN)
def test_every_state_is_shown(opened: Opened, name: str, dark: bool, width: int) -> None:
    page = opened(lambda: SEEN[name], dark=dark, width=width)
    expect(page.locator("#state")).to_have_text(SEEN[name].state)
    look(page, f"{name}-{'dark' if dark else 'light'}-{width}")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert background == ("rgb(27, 25, 23)" if dark else "rgb(251, 249, 246)")


@in_a_browser
@pytest.mark.slow
def test_before_the_first_round(opened: Opened) -> None:
    page = opened(lambda: BEFORE)
    expect(page.locator("#online")).to_have_text("397 of 412")
    expect(page.locator("#enrolled")).to_have_text("the run takes 1,500; 1,088 tickets open")
    expect(page.locator("#rounds")).to_have_text("0 of 40")
    expect(page.locator("#epsilon")).to_have_text("ε = 0.00 of 8.00")
    expect(page.locator("#no-rounds")).to_be_visible()
    expect(page.locator("#charts")).to_be_hidden()
    expect(page.locator("#notice")).to_be_hidden()
    expect(page.locator("#releases-section")).to_be_hidden()
    expect(page.locator("#dropped")).to_have_text("none")


@in_a_browser
@pytest.mark.slow
def test_many_rounds_with_drop_outs(opened: Opened) -> None:
    page = opened(lambda: RUNNING)
    expect(page.locator("#table tbody tr")).to_have_count(12)
    first = page.locator("#table tbody tr").first.locator("td")
    expect(first).to_have_text(["12", "75", "64", "3", "4", "47.0", "3.705"])
    expect(page.locator("#asked rect.accepted")).to_have_count(12)
    expect(page.locator("#dropped tr")).to_have_text(["no answer37", "late12", "malformed1"])
    expect(page.locator("#refused tr").first).to_have_text("too often21")
    expect(page.locator("#door tr").first).to_have_text("no such path1,204")
    expect(page.locator("#registry tr")).to_have_text(["too many calls31"])
    told = "Since the registry started: asked for 48,211 times, downloaded 1,502 times, 123.2 MB"
    expect(page.locator("#asked-for")).to_have_text(told)
    expect(page.locator("#budget")).to_have_attribute("aria-valuenow", "29")
    expect(page.locator("#rounds")).to_have_text("12 of 40")
    expect(page.locator("#rounds-left")).to_have_text("1 burnt; 27 left")
    assert page.title() == "12/40 · homefire server"


@in_a_browser
@pytest.mark.slow
def test_the_newest_releases_are_listed(opened: Opened) -> None:
    page = opened(lambda: NEARLY)
    expect(page.locator("#releases tbody tr")).to_have_count(12)
    first = page.locator("#releases tbody tr").first.locator("td")
    told = ["1,380", "fedc9876", "1,380", "8.00", "2027-01-14 23:06", "2028-01-14"]
    expect(first).to_have_text(told)


@in_a_browser
@pytest.mark.slow
def test_a_release_that_is_no_longer_good_is_marked(opened: Opened) -> None:
    page = opened(lambda: NONE)
    page.clock.set_fixed_time(1_795_000_000)
    expect(page.locator("#releases td.bad")).to_have_count(0)
    page.clock.set_fixed_time(1_795_200_000)
    expect(page.locator("#releases td.bad")).to_have_text("2026-11-19")
    expect(page.locator("#releases tbody td").nth(3)).to_have_text("∞")


@in_a_browser
@pytest.mark.slow
def test_a_budget_that_is_nearly_spent_is_marked(opened: Opened) -> None:
    page = opened(lambda: NEARLY)
    expect(page.locator("#rounds-left")).to_have_text("20 left")
    expect(page.locator("#budget")).to_have_class("meter full")
    expect(page.locator("#asked rect.accepted")).to_have_count(380)
    about = "δ = 1e-6, gaussian; ε = 2.31 for who knows the cohorts"
    expect(page.locator("#epsilon-end")).to_have_text(about)
    expect(page.locator("#asked + .first, .chart .first").first).to_have_text("round 1")


@in_a_browser
@pytest.mark.slow
def test_trouble_is_in_front(opened: Opened) -> None:
    page = opened(lambda: DOWN)
    expect(page.locator("#notice li")).to_have_count(3)
    expect(page.locator("#state")).to_have_class("state bad")
    expect(page.locator("#processes td.bad")).to_have_text("is down")
    expect(page.locator("#online")).to_have_text("– of 1,500")


@in_a_browser
@pytest.mark.slow
def test_it_is_live_and_says_when_it_is_not(opened: Opened) -> None:
    now = [BEFORE]

    def status() -> Status:
        if not now:
            raise RuntimeError("the server is gone")
        return now[0]

    page = opened(status)
    expect(page.locator("#rounds")).to_have_text("0 of 40")
    now[0] = RUNNING
    expect(page.locator("#rounds")).to_have_text("12 of 40")
    page.route("**/status.json", lambda route: route.abort("connectionrefused"))
    expect(page.locator("#state")).to_contain_text("no answer since")
    expect(page.locator("main")).to_have_class("stale")
    expect(page.locator("#rounds")).to_have_text("12 of 40")


@in_a_browser
@pytest.mark.slow
def test_text_is_text(opened: Opened) -> None:
    page = opened(lambda: replace(RUNNING, trouble=["<img src=x onerror=document.title=1>"]))
    expect(page.locator("#notice li")).to_have_text("<img src=x onerror=document.title=1>")
    assert page.locator("img").count() == 0


# What is served


def test_nothing_from_elsewhere_and_for_this_machine_alone() -> None:
    with TestClient(make_app(lambda: RUNNING), base_url="http://127.0.0.1:9096") as client:
        for path in ("/", "/page.js", "/page.css", "/status.json", "/metrics"):
            answer = client.get(path)
            assert answer.status_code == 200
            assert "default-src 'none'" in answer.headers["content-security-policy"]
            assert answer.headers["cache-control"] == "no-store"
            assert client.get(path, headers={"host": "evil.example"}).status_code == 400
            assert client.post(path).status_code == 405
            assert client.options(path, headers={"origin": "https://evil.example"}).is_error
        for path in ("/..%2fstatus.py", "/docs", "/openapi.json", "/page"):
            assert client.get(path).status_code == 404
    for name in ("index.html", "page.js", "page.css"):
        text = (Path(make_app.__code__.co_filename).parent / "page" / name).read_text()
        elsewhere = text.replace("http://www.w3.org/2000/svg", "")
        assert "http:" not in elsewhere
        assert "https:" not in elsewhere


# Metrics


def read(status: Status) -> dict[str, dict[str, float]]:
    """All samples, by name and by label's value."""
    found: dict[str, dict[str, float]] = {}
    for family in text_string_to_metric_families(metrics(status).decode()):
        assert family.name.startswith("homefire_")
        assert family.documentation
        for sample in family.samples:
            (value,) = sample.labels.values() or [""]
            found.setdefault(sample.name, {})[value] = sample.value
    return found


def test_metrics_are_what_prometheus_reads() -> None:
    found = read(RUNNING)
    assert found["homefire_devices_online"] == {"": 1391}
    assert found["homefire_rounds_released"] == {"": 12}
    assert found["homefire_epsilon_now"] == {"": 2.31}
    assert found["homefire_contributions_dropped_total"]["no answer"] == 37
    assert found["homefire_requests_refused_total"]["too often"] == 77
    assert found["homefire_registry_answered_total"]["download"] == 1502
    assert found["homefire_registry_refused_total"] == {"too many calls": 31}
    assert found["homefire_registry_bytes_total"] == {"": 123_200_000}
    assert found["homefire_process_starts_total"] == dict.fromkeys(PROCESSES, 1)
    assert found["homefire_round_accepted"] == {"": 64}
    assert found["homefire_releases_published"] == {"": 12}
    assert "homefire_releases_published" not in read(BEFORE)
    assert "homefire_devices_online" not in read(DOWN)
    assert read(NONE)["homefire_rounds_released"] == {"": 1}
    assert found["homefire_rounds_burnt"] == {"": 1}
    assert found["homefire_certificate_days"] == {"": 300}
    assert "homefire_certificate_days" not in read(BEFORE)


@pytest.mark.parametrize(
    ("status", "trouble", "halted"),
    [
        (BEFORE, 0, 0),
        (RUNNING, 0, 0),
        (DOWN, 3, 1),
        (replace(RUNNING, state="halted: 5 rounds in a row were spent"), 0, 1),
        (replace(RUNNING, state="running: 3 of 5 devices are here, 4 are needed"), 0, 0),
        (replace(RUNNING, state="waiting: the disk is full", trouble=["a", "b"]), 2, 1),
        (replace(BEFORE, state="waiting: the disk is full", enrolled=1500), 0, 1),
        (replace(BEFORE, state="waiting: federation.toml is wrong", needed=None), 0, 1),
        (replace(RUNNING, state="waiting: a ledger", enrolled=1499), 0, 1),
        (NONE, 0, 0),
    ],
)
def test_metrics_tell_of_trouble(status: Status, trouble: int, halted: int) -> None:
    found = read(status)
    assert found["homefire_trouble"] == {"": trouble}
    assert found["homefire_halted"] == {"": halted}
    assert asdict(status)["halted"] == bool(halted)


COUNTS = st.dictionaries(
    st.sampled_from([*sorted(DROPPED), *sorted(REFUSED), *sorted(REASONS)]) | st.text(),
    st.integers(min_value=0, max_value=10**6),
)


@given(COUNTS, COUNTS, COUNTS, st.text(), st.text())
def test_fixed_names_whatever_a_status_was_made_of(
    dropped: dict[str, int], refused: dict[str, int], door: dict[str, int], name: str, key: str
) -> None:
    status = replace(
        RUNNING,
        dropped=dropped,
        refused=refused,
        door={"served": 1, "refused": door, key: name},
        registry={"answered": dropped, "refused": door, "bytes_sent": 1, key: name},
        processes={name: {"runs": True, "starts": 1}},
        rounds=[round_log(1, dropped=dropped, refused=refused, **{f"x{key}": name})],
        published=[release(1, run=name, **{f"x{key}": name})],
    )
    found = read(status)
    for metric, allowed in (
        ("homefire_contributions_dropped_total", DROPPED),
        ("homefire_plans_refused_total", REFUSED),
        ("homefire_requests_refused_total", REASONS),
        ("homefire_registry_answered_total", registry_counts.ANSWERED),
        ("homefire_registry_refused_total", registry_counts.REFUSED),
    ):
        assert set(found.get(metric, {})) <= allowed | {OTHER}
    assert sum(found.get("homefire_contributions_dropped_total", {}).values()) == sum(
        dropped.values()
    )
    assert set(found.get("homefire_process_starts_total", {})) <= PROCESSES
    (told,) = asdict(status)["rounds"]
    assert set(told["dropped"]) <= DROPPED | {OTHER}
    assert set(told) == set(round_log(1))
    (shown,) = asdict(status)["published"]
    assert set(shown) == set(release(1))
    assert shown["run"] in (OTHER, name)
    assert shown["run"] == OTHER or re.fullmatch("[0-9a-f]{8}", name)


def test_allow_list_of_the_whole_text() -> None:
    strange = {CANARY: 3}
    status = replace(
        RUNNING,
        names=(CANARY,),
        state=CANARY,
        trouble=[CANARY],
        dropped=strange,
        refused=strange,
        door={"served": 1, "refused": strange},
        registry={"answered": strange, "refused": strange, "bytes_sent": 1},
        processes={CANARY: {"runs": True, "starts": 1}},
        rounds=[round_log(1, dropped=strange, refused=strange, device=CANARY)],
        published=[release(1, run=CANARY, device=CANARY)],
        server_key=CANARY,
    )
    assert CANARY.encode() not in metrics(status)
    found = read(status)
    assert found["homefire_requests_refused_total"] == {OTHER: 3}
    assert (found["homefire_trouble"], found["homefire_halted"]) == ({"": 1}, {"": 0})
    assert found["homefire_registry_refused_total"] == {OTHER: 3}
