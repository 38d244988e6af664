"""The report's file and page, on made-up figures that belong to no run."""

import copy
import json
import math
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from made_up_report import AUDIT, DEPLOYMENT, MADE_UP, Page, made_up_group

from homefire.common.claims import contradicts
from homefire.common.errors import DataError, HomefireError
from homefire.simulations.report import load_report, render, write_report
from homefire.simulations.report_html import flatten


@pytest.fixture
def report() -> dict[str, Any]:
    return copy.deepcopy(MADE_UP)


def minus(text: str) -> str:
    return text.replace("-", "−")


def test_every_number_of_the_utility_tables_appears(report: dict[str, Any]) -> None:
    text = Page(render(report)).text
    for group in report["utility"].values():
        assert f"{group['users']:,} users, {group['tokens']:,} tokens" in text
        for figures in group["variants"].values():
            perplexity = f"{figures['perplexity']:.{1 if figures['perplexity'] >= 100 else 2}f}"
            assert f" {figures['loss']:.3f} {perplexity} {figures['rouge_l']:.3f} " in text
        for figures in group["comparisons"].values():
            low, high = figures["interval"]
            counts = f"{figures['wins']} / {figures['ties']} / {figures['losses']}"
            for expected in (
                minus(f"{figures['mean_gain']:+.3f}"),
                minus(f"{low:+.3f} to {high:+.3f}"),
                counts,
                minus(f"{figures['worst_decile']:+.3f}"),
            ):
                assert f" {expected} " in text


def test_privacy_box_states_the_three_epsilons_and_their_premises(report: dict[str, Any]) -> None:
    text = Page(render(report)).text
    for expected in (
        "ε release 7.93 against whoever receives the releases: reasonable",
        "ε known cohort 17.45 against a recipient who also knows who took part when: weak",
        "ε server ∞ — trusted aggregator",
        "mechanism gaussian",
        "δ 10⁻⁵",
        "noise multiplier 1.125",
        "clip norm 0.7",
        "unit one user's whole history",
        "adjacency zero-out",
        "participation each round drawn independently with probability q",
        "expected cohort 12",
        "sampling rate 0.1",
        "compared with a run in which that user contributed nothing, it can shift the odds",
        "They were enrolled for the training of the shared adapter.",
    ):
        assert expected in text
    assert "OFF" not in text
    assert "Noise of a deployment" not in text


def test_efficiency_rounds_and_settings_appear(report: dict[str, Any]) -> None:
    text = Page(render(report)).text
    for expected in (
        "80.2 KiB (82,176 bytes)",
        "82.0 KiB (83,968 bytes)",
        "Device time, per contribution 457 ms",
        "Private adapter, per user 2.3 s",
        "12,346 tokens/s",
        "1,843 MiB",
        "12 min 34 s (754.300 s)",
        "private adapters 5 min 40 s 45 %",
        "training.learning_rate 0.002",
        "training.targets q_proj, v_proj",
        "privacy.noise_cohort –",
        "12,345,678",
        "20,480",
        "exists in this test only",
        "skipped: empty text 3",
        "seed 4711",
    ):
        assert expected in text
    for entry in report["rounds"]:
        dropped = ("norm too large: 1", "too often: 2", "–", "–")[entry["round"] % 4]
        assert (
            f" {entry['cohort']} {entry['accepted']} {dropped} {entry['train_loss']:.3f} " in text
        )


def test_an_interrupted_round_is_a_row_and_no_point(report: dict[str, Any]) -> None:
    nothing = dict.fromkeys(report["rounds"][3]) | {"dropped": {}, "refused": {}}
    report["rounds"][3] = nothing | {"round": 3, "interrupted": True}
    page = Page(render(report))
    assert "3 – – interrupted: charged, not released – – – –" in page.text
    train = figures_of(page)["plot-rounds"]["data"][0]
    assert 3 not in train["x"]
    assert len(train["x"]) == len(report["rounds"]) - 1


def test_what_was_not_measured_is_a_dash(report: dict[str, Any]) -> None:
    """A run that was resumed after its rounds sent nothing."""
    names = ("bytes_up", "bytes_down", "device_seconds")
    report["efficiency"] |= {f"{name}_per_contribution": None for name in names}
    text = Page(render(report)).text
    for expected in (
        "Upload – per contribution",
        "Sent up, per contribution –",
        "Sent down, per contribution –",
        "Device time, per contribution –",
    ):
        assert expected in text


def audit_of(page: Page) -> str:
    """The text of the audit's section, up to the next one."""
    start = page.text.index("What attacks and statistics show")
    return page.text[start : page.text.index("Cost, measured on this machine")]


def test_the_audits_figures_appear(report: dict[str, Any]) -> None:
    text = audit_of(Page(render(report | {"audit": AUDIT})))
    for expected in (
        "lower bound at 99% 4,096 in, as many out, d = 8,192 14.250 holds must not exceed "
        "ε_known_cohort, 17.442",
        "point estimate 16.125 no bound",
        "announced 0.999 holds p = 0.42 over scale, shape and independence",
        "AUC 120 training against 40 unseen users 0.613 99% interval 0.438 to 0.787",
        "ε, lower bound at 99% 0.375 holds must not exceed ε_release, 7.924",
    ):
        assert expected in text
    assert "FAILS" not in text


def test_a_report_without_an_audit_has_no_such_section(report: dict[str, Any]) -> None:
    page = Page(render(report))
    assert "What attacks and statistics show" not in page.text
    assert not [section for section in page.all("section") if section.get("id") == "audit"]


def test_an_audit_that_contradicts_the_claim_says_so(report: dict[str, Any]) -> None:
    failed = copy.deepcopy(AUDIT)
    failed["canary"] |= {"epsilon_lower": 18.5, "claim_holds": False}
    failed["noise"] |= {"scale": 0.5, "p_value": 0.0, "passed": False}
    text = audit_of(Page(render(report | {"audit": failed})))
    assert (
        "18.500 FAILS must not exceed ε_known_cohort, 17.442. Chance alone does this once in a "
        "hundred audits. Repeat it: if it fails again, the noise or the accounting is wrong."
        in text
    )
    assert (
        "0.500 FAILS p = 0 over scale, shape and independence. Chance alone does this once in a "
        "thousand audits." in text
    )


@pytest.mark.parametrize(
    ("claim", "words"),
    [
        (0.374, "FAILS must not exceed ε_release, 0.374. Chance alone does this to one run in a"),
        (0.375, "holds must not exceed ε_release, 0.375"),
        (None, "holds must not exceed ε_release, which is unbounded"),
    ],
)
def test_the_membership_bound_stands_beside_the_runs_claim(
    report: dict[str, Any], claim: float | None, words: str
) -> None:
    found = copy.deepcopy(AUDIT)
    holds = not contradicts(found["membership"]["epsilon_lower"], claim)
    found["membership"] |= {"epsilon_claimed": claim, "claim_holds": holds}
    text = audit_of(Page(render(report | {"audit": found})))
    assert f"The same: ε, lower bound at 99% 0.375 {words}" in text


def test_an_audit_of_a_run_without_noise(report: dict[str, Any]) -> None:
    bare = {"canary": AUDIT["canary"] | {"epsilon": None, "epsilon_claimed": None}}
    text = audit_of(Page(render(report | {"audit": bare | {"noise": None, "membership": None}})))
    assert "must not exceed ε_known_cohort, which is unbounded" in text
    assert "point estimate – no bound" in text
    assert "Noise" not in text
    assert "AUC" not in text


def test_headline_says_in_words_what_was_gained(report: dict[str, Any]) -> None:
    text = Page(render(report)).text
    for name in ("training_users", "unseen_users"):
        group = report["utility"][name]
        shared = group["comparisons"]["shared_vs_base"]
        both = group["comparisons"]["shared_private_vs_base"]
        assert f"For {group['users']} {name.replace('_', ' ')}, the shared adapter" in text
        assert f"lowered the loss by {shared['mean_gain']:.3f} nats per token" in text
        assert f"better for {both['wins']} of {both['users']}" in text
    assert "that part of the gain is personal" in text
    assert "ε = 7.93 at δ = 10⁻⁵ against whoever receives the releases" in text


@pytest.mark.parametrize(
    ("gain", "interval", "words"),
    [
        (-0.25, [-0.375, -0.125], "raised the loss by 0.250 nats per token"),
        (0.01, [-0.02, 0.04], "made no clear difference (+0.010 nats per token; −0.020 to +0.040)"),
    ],
)
def test_headline_does_not_sell_a_loss_as_a_gain(
    report: dict[str, Any], gain: float, interval: list[float], words: str
) -> None:
    change = {"mean_gain": gain, "interval": interval}
    group = report["utility"]["unseen_users"]
    for name in ("shared_vs_base", "shared_private_vs_other_private"):
        group["comparisons"][name] |= change
    text = Page(render(report)).text
    assert f"For 40 unseen users, the shared adapter {words}" in text
    assert "that part of the gain is personal" not in text
    if gain < 0:
        assert "(95 % interval 0.125 to 0.375)" in text


def test_no_mechanism_raises_a_red_banner(report: dict[str, Any]) -> None:
    report["privacy"] |= {
        "mechanism": "none",
        "noise_multiplier": None,
        "delta": None,
        "epsilon_release": None,
        "epsilon_known_cohort": None,
    }
    page = Page(render(report))
    assert {"class": "banner off", "role": "alert"} in page.all("div")
    assert "Differential privacy was OFF in this run" in page.text
    assert "ε release ∞ against whoever receives the releases: no differential privacy" in page.text
    assert "Privacy: none . Differential privacy was off." in page.text


@pytest.mark.parametrize(
    ("epsilon", "shown"),
    [
        (10_000.0, "10,000"),
        (20.5, "20.50"),
        (math.inf, "∞"),
    ],
)
def test_a_huge_epsilon_is_called_no_protection(
    report: dict[str, Any], epsilon: float, shown: str
) -> None:
    report["privacy"]["epsilon_release"] = epsilon
    text = Page(render(report)).text
    card = f"ε release {shown} against whoever receives the releases: no meaningful protection"
    assert card in text
    assert f"ε = {shown} (no meaningful protection) at δ" in text


def test_an_epsilon_without_bound_is_infinite(report: dict[str, Any]) -> None:
    report["privacy"]["epsilon_known_cohort"] = None
    report["deployment"] = DEPLOYMENT | {"epsilon_release": None}
    text = Page(render(report)).text
    assert "took part when: no meaningful protection" in text
    assert "ε release there ∞ (no meaningful protection)" in text


def test_deployment_figures_stand_apart(report: dict[str, Any]) -> None:
    report["deployment"] = DEPLOYMENT
    text = Page(render(report)).text
    title = text.index("Noise of a deployment of 100,000 users")
    section = text[title : text.index(" Utility ", title)]
    assert "speak for that deployment, not for this run" in section
    for expected in ("1.99", "9.13", "10⁻⁶", "0.9876", "5,000", "∞ — trusted aggregator"):
        assert expected in section
    assert "7.93" not in section
    assert "ε release 7.93" in text


@pytest.mark.parametrize("absent", ["training_users", "unseen_users"])
def test_a_group_may_be_absent(report: dict[str, Any], absent: str) -> None:
    report["utility"][absent] = None
    page = Page(render(report))
    name = absent.replace("_", " ")
    assert f"{name.capitalize()}: loss" not in page.text
    assert f"Gain of each user: {name}" not in page.text
    assert page.text.count("paired gains") == 1


def test_a_run_without_rounds_and_evaluation(report: dict[str, Any]) -> None:
    report |= {"rounds": [], "utility": {"training_users": None, "unseen_users": None}}
    page = Page(render(report))
    assert "Nothing was evaluated" in page.text
    assert "No round was run" in page.text
    assert page.scripts == []


def test_missing_figures_are_dashes(report: dict[str, Any]) -> None:
    report["utility"]["unseen_users"] = made_up_group(1, seed=3, rouge=False)
    report["utility"]["training_users"] = None
    for entry in report["rounds"]:
        entry |= {"train_loss": None, "clipped_share": None, "validation_loss": None}
    page = Page(render(report))
    loss = report["utility"]["unseen_users"]["variants"]["base"]
    assert f"base model no adapter {loss['loss']:.3f} {loss['perplexity']:.1f} –" in page.text
    assert "plot-rounds" not in "".join(page.scripts)
    assert "None" not in page.text
    assert "nan" not in page.text


def test_text_is_escaped_wherever_it_stands(report: dict[str, Any]) -> None:
    hostile = "</script></title><img src=x onerror=alert(1)>\"'&amp;<!--"

    def poison(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: poison(entry) for key, entry in value.items()}
        if isinstance(value, list):
            return [poison(entry) for entry in value]
        return value + hostile if isinstance(value, str) else value

    mechanism = report["privacy"]["mechanism"]
    report = poison(report)
    report["privacy"]["mechanism"] = mechanism
    report["population"]["skipped"] = {hostile: 1}
    report["rounds"][0]["dropped"] = {hostile: 1}
    report["efficiency"]["phases"] = {hostile: 1.0}
    report["experiment"][hostile] = {hostile: hostile}
    for group in report["utility"].values():
        group["variants"][hostile] = group["variants"]["base"]
        group["comparisons"][hostile] = group["comparisons"]["shared_vs_base"]
    page = Page(render(report))
    assert page.all("img") == []
    assert len(page.scripts) == len(page.all("script")) == 2
    assert not any(key.startswith("on") for _, attributes in page.elements for key in attributes)
    assert page.text.count(hostile) > 30
    assert "<img" not in page.scripts[1]


def test_the_page_asks_nobody_for_anything(report: dict[str, Any]) -> None:
    text = render(report)
    page = Page(text)
    for _, attributes in page.elements:
        assert not {"src", "href", "srcset", "action", "data"} & set(attributes)
    assert page.all("link") == page.all("iframe") == page.all("object") == []
    style = text[text.index("<style>") : text.index("</style>")]
    assert "url(" not in style
    assert "@import" not in style
    policy = next(m for m in page.all("meta") if m.get("http-equiv") == "Content-Security-Policy")
    assert (policy["content"] or "").startswith("default-src 'none';")
    assert "http" not in (policy["content"] or "")
    ours = text.replace(page.scripts[0], "")
    assert "Plotly.newPlot" in ours
    assert not re.search(r"https?:", ours)


def test_plotly_lies_inside_once(report: dict[str, Any]) -> None:
    page = Page(render(report))
    assert len(page.scripts[0]) > 1_000_000 > len(page.scripts[1])


def test_nobody_can_be_picked_out(report: dict[str, Any]) -> None:
    """The page takes losses from a user's entry, whatever else stands there."""
    for group in report["utility"].values():
        for number, user in enumerate(group["per_user"]):
            user |= {"user_id": f"somebody-{number}", "text": "something private"}
    text = render(report)
    assert "somebody-" not in text
    assert "something private" not in text


def test_structure_serves_those_who_cannot_see_it(report: dict[str, Any]) -> None:
    page = Page(render(report))
    names = [name for name, _ in page.elements]
    assert names.count("h1") == names.count("main") == names.count("header") == 1
    assert names.count("table") == names.count("caption") > 5
    assert {"lang": "en"} in page.all("html")
    assert all(cell.get("scope") in {"row", "col"} for cell in page.all("th"))
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    for attributes in page.all("section"):
        assert attributes.get("aria-label") or attributes["aria-labelledby"] in ids
    plots = [div for div in page.all("div") if div.get("class") == "plot"]
    assert len(plots) == 4
    for plot in plots:
        assert plot["role"] == "img"
        assert re.search(r"\d", plot["aria-label"] or "")
        assert f'"{plot["id"]}":' in page.scripts[1]


def figures_of(page: Page) -> dict[str, Any]:
    start = page.scripts[1].index("const figures = ") + len("const figures = ")
    decoded, _ = json.JSONDecoder().raw_decode(page.scripts[1][start:])
    assert isinstance(decoded, dict)
    return decoded


def test_plots_show_the_report(report: dict[str, Any]) -> None:
    figures = figures_of(Page(render(report)))
    train, validation = figures["plot-rounds"]["data"]
    assert train["y"] == [entry["train_loss"] for entry in report["rounds"]]
    assert validation["x"] == [entry["round"] for entry in report["rounds"]][::2]
    for name in ("training", "unseen"):
        losses = [user["loss"] for user in report["utility"][f"{name}_users"]["per_user"]]
        over_base, over_other = figures[f"plot-gains-{name}-users"]["data"]
        for curve, rival in ((over_base, "base"), (over_other, "other_private")):
            expected = sorted(loss[rival] - loss["shared_private"] for loss in losses)
            assert curve["y"] == pytest.approx(expected, abs=1e-4)
    traces = figures["plot-comparisons"]["data"]
    for trace, group in zip(traces, report["utility"].values(), strict=True):
        assert trace["customdata"] == [list(c["interval"]) for c in group["comparisons"].values()]


def test_a_crowd_does_not_swell_the_page(report: dict[str, Any]) -> None:
    report["utility"]["unseen_users"]["per_user"] *= 500
    curve = figures_of(Page(render(report)))["plot-gains-unseen-users"]["data"][0]
    assert len(curve["y"]) == 1000
    assert curve["y"] == sorted(curve["y"])


def test_what_is_written_can_be_read(report: dict[str, Any], tmp_path: Path) -> None:
    run = tmp_path / "runs" / "made-up"
    write_report(run, report)
    assert load_report(run) == json.loads(json.dumps(report))
    assert sorted(path.name for path in run.iterdir()) == ["report.html", "report.json"]
    text = (run / "report.json").read_text(encoding="utf-8")
    assert list(json.loads(text)) == sorted(report)
    assert '\n "adapters": {\n' in text
    assert (run / "report.html").read_text(encoding="utf-8") == render(load_report(run))


def test_writing_replaces_an_older_report(report: dict[str, Any], tmp_path: Path) -> None:
    write_report(tmp_path, report)
    write_report(tmp_path, report | {"name": "second"})
    assert load_report(tmp_path)["name"] == "second"
    assert "<h1>second</h1>" in (tmp_path / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_number_that_json_cannot_hold_writes_nothing(
    report: dict[str, Any], tmp_path: Path, bad: float
) -> None:
    report["rounds"][3]["train_loss"] = bad
    with pytest.raises(DataError, match=rf"rounds\[3\]\.train_loss is {bad}"):
        write_report(tmp_path, report)
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_write_leaves_the_older_report(
    report: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_report(tmp_path, report)

    def fails(_: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.fsync", fails)
    with pytest.raises(OSError, match="disk full"):
        write_report(tmp_path, report | {"name": "second"})
    assert load_report(tmp_path)["name"] == "made-up figures"
    assert "<h1>made-up figures</h1>" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_without_plotly_the_figures_are_kept(
    report: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    with pytest.raises(HomefireError, match="plotly") as caught:
        write_report(tmp_path, report)
    assert "homefire[simulation]" in caught.value.hint
    assert load_report(tmp_path)["name"] == "made-up figures"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"format": 1, "na', "damaged"),
        (b"\xff\xfe", "damaged"),
        (b"[" * 100_000, "damaged"),
        (b"[]", "must be an object, not list"),
        (b'{"format": 2}', "report format 2, not 1"),
        (b'{"name": "made-up"}', "report format None, not 1"),
        (b'{"format": 1}', "damaged, 'adapters' is missing"),
    ],
)
def test_a_damaged_report_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "report.json").write_bytes(content)
    with pytest.raises(DataError, match=re.escape(message)) as caught:
        load_report(tmp_path)
    assert str(tmp_path / "report.json") in str(caught.value)


def test_a_missing_report_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file") as caught:
        load_report(tmp_path / "nowhere")
    assert caught.value.hint


def test_flatten_keeps_every_leaf() -> None:
    nested = {"a": {"b": 1, "c": {"d": None}}, "e": [], "f": False, "g": {}}
    assert list(flatten(nested)) == [
        ("a.b", "1"),
        ("a.c.d", "–"),
        ("e", "–"),
        ("f", "no"),
        ("g", "–"),
    ]
