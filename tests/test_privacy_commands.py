"""`homefire privacy plan`: what it prints, in which width, and how it refuses."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from homefire import __main__ as command_line
from homefire.common.privacy.accounting import calibrate_poisson, poisson_epsilon
from homefire.privacy_commands import text_chart
from homefire.server.budget import Point

SMALL = ("--users", "1000", "--cohort", "50", "--rounds", "100")
GAUSSIAN = (*SMALL, "--mechanism", "gaussian")
CHAT = "--users 1500 --cohort 75 --rounds 40 --participations 2 --separation 20".split()

Plan = Callable[..., tuple[int, str, str]]


@pytest.fixture
def plan(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Plan:
    """Runs `homefire privacy plan`; gives exit code, output and errors."""
    for name, value in command_line._ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("COLUMNS", "80")

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["homefire", "privacy", "plan", *arguments])
        with pytest.raises(SystemExit) as ended:
            command_line.main()
        output = capsys.readouterr()
        return int(ended.value.code or 0), output.out, output.err

    return run


# JSON


def test_json_is_one_object(plan: Plan) -> None:
    code, output, errors = plan(*GAUSSIAN, "--noise-multiplier", "1", "--json")
    assert (code, errors) == (0, "")
    found = json.loads(output)
    assert found["noise_multiplier"] == 1.0
    assert found["epsilon_release"] == pytest.approx(3.50, abs=0.02)
    assert found["epsilon_known_cohort"] == pytest.approx(91.8, abs=0.1)
    assert found["epsilon_server"] is None
    assert found["trust"] == "trusted aggregator"
    assert found["delta"] == 1e-5
    assert found["charge_per_participation"] == 1.0
    assert found["noise_on_average"] == 0.02


def test_json_of_a_rota_fills_in_what_was_not_given(plan: Plan) -> None:
    code, output, _ = plan(*SMALL, "--epsilon", "8", "--json")
    found = json.loads(output)
    assert code == 0
    assert (found["mechanism"], found["participations"], found["separation"]) == (
        "banded-sqrt",
        5,
        20,
    )
    assert found["noise_multiplier"] == pytest.approx(1.906, abs=0.001)
    assert found["prefix_sum_rmse"] <= 3.5
    assert found["epsilon_release"] == found["epsilon_known_cohort"] <= 8.0


def test_options_reach_the_answer(plan: Plan) -> None:
    options = ("--participations", "6", "--separation", "15", "--delta", "1e-6")
    found = json.loads(plan(*SMALL, *options, "--noise-multiplier", "3", "--json")[1])
    assert (found["participations"], found["separation"], found["delta"]) == (6, 15, 1e-6)
    assert (found["users"], found["cohort"], found["rounds"]) == (1000, 50, 100)


def test_default_delta_follows_the_users(plan: Plan) -> None:
    large = ("--users", "1000000", "--cohort", "1000", "--rounds", "10")
    found = json.loads(plan(*large, "--epsilon", "8", "--json")[1])
    assert found["delta"] == 2e-7


def test_no_privacy_is_null(plan: Plan) -> None:
    code, output, _ = plan(*SMALL, "--mechanism", "none", "--json")
    found = json.loads(output)
    assert code == 0
    assert found["epsilon_release"] is found["epsilon_known_cohort"] is None
    assert found["noise_multiplier"] is None


# Text


@pytest.mark.parametrize("columns", [80, 120])
def test_text_fits_and_cuts_nothing(
    plan: Plan, monkeypatch: pytest.MonkeyPatch, columns: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    code, output, errors = plan(*CHAT, "--epsilon", "8")
    assert (code, errors) == (0, "")
    assert "\x1b" not in output
    assert "…" not in output
    assert max(map(len, output.splitlines())) <= columns
    assert "1,500 users, cohort 75, 40 rounds, k = 2, b = 20" in output
    for row in (
        r"noise multiplier z +1\.20522",
        r"ε_release +8\.00",
        r"ε_known_cohort +8\.00",
        r"ε_server +∞",
        r"δ +1e-05",
        r"charge μ² +1\.38783",
        r"banded-sqrt +1\.205 +8\.00 +8\.00 +0\.0235",
        r"gaussian, no limit: equal .*0\.6086 +7\.99 +97\.50 +0\.0367",
        r"gaussian, at most 2 times .*0\.8489 +8\.00 +8\.00 +0\.0512",
    ):
        assert re.search(row, output), row
    plain = " ".join(output.split())
    assert "trusted aggregator" in plain
    assert "Least noise: banded-sqrt; the next has 1.57 times as much." in plain
    assert "at least 20 rounds apart" in plain
    assert "devices refuse about 26% of the turns" in plain


def test_a_smaller_error_that_rests_on_secrecy_says_so(plan: Plan) -> None:
    plain = " ".join(plan(*SMALL, "--epsilon", "1.5")[1].split())
    assert "Least noise: gaussian, no limit: equal ε_release" in plain
    assert "That holds while nobody learns who took part when; then it is ε = 45." in plain


def test_an_alternative_that_is_impossible_is_explained(plan: Plan) -> None:
    _, output, _ = plan(*GAUSSIAN, "--participations", "2", "--epsilon", "8")
    assert "Not possible: banded-sqrt: 100 rounds of 50 ask each" in output


def test_a_device_without_an_accountant_plans_a_rota(
    plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "dp_accounting", None)
    poisson_epsilon.cache_clear()
    calibrate_poisson.cache_clear()
    code, output, errors = plan(*SMALL, "--epsilon", "8")
    assert (code, errors) == (0, "")
    plain = " ".join(output.split())
    assert "Not possible: gaussian, no limit: equal ε_release: accounting for sampled" in plain
    assert "Least noise: banded-sqrt" in plain


def test_noise_alone_needs_no_comparison(plan: Plan) -> None:
    code, output, _ = plan(*GAUSSIAN, "--noise-multiplier", "1")
    assert code == 0
    assert "Other ways" not in output
    assert re.search(r"ε_release +3\.51", output)  # rounded up: a bound
    assert re.search(r"ε_known_cohort +91\.82", output)


def test_no_privacy_is_said_in_red(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    code, output, _ = plan(*SMALL, "--mechanism", "none")
    assert code == 0
    assert re.search("\x1b\\[1;31mNo privacy", output)
    assert "Promised for" not in output


def test_few_users_are_warned(plan: Plan) -> None:
    few = ("--users", "200", "--cohort", "20", "--rounds", "20")
    assert "Caution: utility will be poor" in plan(*few, "--noise-multiplier", "5")[1]
    assert "Caution" not in plan(*few, "--noise-multiplier", "1")[1]


def test_help_teaches(plan: Plan) -> None:
    code, output, _ = plan("--help")
    assert code == 0
    for words in (
        "homefire privacy plan --users 1500 --cohort 75 --rounds 40 --epsilon 8",
        "epsilon_release       against whoever receives the releases",
        "epsilon_known_cohort  against a recipient who also knows who took part",
        "epsilon_server        against the server itself",
        "k: the most rounds of one user",
        "b: the fewest rounds between two turns",
    ):
        assert words in output


def test_planning_starts_without_torch(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from homefire.__main__ import main\n"
        "sys.argv = 'homefire privacy plan --users 1500 --cohort 75 --rounds 40 --epsilon 8 --json'"
        ".split()\n"
        "try:\n"
        "    main()\n"
        "except SystemExit as ended:\n"
        "    assert not ended.code\n"
        "print(sorted({'torch', 'flwr', 'plotly', 'transformers'} & set(sys.modules)))"
    )
    result = subprocess.run(  # noqa: S603 - our own command
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert result.stdout.splitlines()[-1] == "[]"


# Chart


def chart(*points: tuple[float, float, float], width: int = 80) -> list[str]:
    return text_chart([Point(*point) for point in points], width)


def test_marks_stand_where_the_axis_says() -> None:
    lines = chart((1.0, 1.0, 100.0), (2.0, 10.0, 10.0))
    first, second, axis, labels = lines[1:]
    left = axis.index("└") + 1
    assert first.index("●") == left
    assert first.index("○") == len(axis) - 1
    middle = left + (len(axis) - 1 - left) / 2
    assert abs(second.index("◆") - middle) <= 1
    assert axis[labels.index("10")] == "┬"
    assert labels.index("10") == second.index("◆")
    assert first.split()[:3] == ["1", "1.00", "100.00"]


@pytest.mark.parametrize("width", [10, 80, 100])
def test_a_chart_is_as_wide_as_asked(width: int) -> None:
    lines = chart((0.5, 3.0, 6552.7), (1.0, 1.0, 500.0), width=width)
    assert len(lines[-2]) <= max(width, 60)
    assert len(lines[-2]) >= max(width, 60) - 2


def test_a_chart_of_one_value_or_none() -> None:
    assert "◆" in chart((1.0, 2.0, 2.0))[1]
    assert chart((1.0, 0.0, 0.0)) == []
    assert "●" in chart((1.0, 0.0, 2.0), (2.0, 0.5, 1.0))[1]


# Page


def test_the_page_needs_no_network(plan: Plan, tmp_path: Path) -> None:
    page = tmp_path / "plans" / "plan.html"
    code, output, _ = plan(*GAUSSIAN, "--noise-multiplier", "1", "--json", "--html", str(page))
    assert code == 0
    json.loads(output)
    text = page.read_text(encoding="utf-8")
    assert "default-src 'none'" in text
    assert not re.search(r"<(script|link|img)[^>]+(src|href)=", text)
    assert "gaussian: 1,000 users, cohort 50, 100 rounds" in text
    drawn = text[text.rindex("Plotly.newPlot") :]
    assert '"name":"ε_release"' in drawn.replace("\\u03b5", "ε")
    assert '"name":"ε_known_cohort"' in drawn.replace("\\u03b5", "ε")
    assert '"3.51"' in drawn and '"91.82"' in drawn  # shown rounded up, as everywhere


def test_a_missing_plotly_is_named_with_its_extra(
    plan: Plan, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "plotly.graph_objects", None)
    code, _, errors = plan(*SMALL, "--epsilon", "8", "--html", str(tmp_path / "plan.html"))
    assert code == 1
    assert errors == (
        "Error: --html needs the package plotly\nHint: Install homefire[simulation].\n"
    )
    assert list(tmp_path.iterdir()) == []


def test_a_page_that_cannot_be_written_is_an_error(plan: Plan, tmp_path: Path) -> None:
    code, output, errors = plan(*SMALL, "--epsilon", "8", "--html", str(tmp_path))
    assert (code, output) == (1, "")
    assert errors.startswith(f"Error: {tmp_path}: cannot be written")
    assert len(errors.splitlines()) == 2


# Errors


@pytest.mark.parametrize(
    ("arguments", "message", "hint"),
    [
        ("", "neither of --epsilon and --noise-multiplier", "exactly one"),
        ("--epsilon 8 --noise-multiplier 1", "both of --epsilon and --noise", "exactly one"),
        ("--epsilon 8 --mechanism fixed-size", "about a fifth of", "banded-sqrt"),
        ("--epsilon 8 --accountant gdp", "not an upper bound", "Leave --accountant out"),
        ("--epsilon 8 --accountant rdp", "looser bound", "Leave --accountant out"),
        ("--epsilon 8 --accountant fixed-size", "fixed-size is refused", "Leave --acc"),
        ("--epsilon 8 --accountant pld", "pld does not fit", "Leave --accountant out"),
        ("--epsilon 8 --mechanism gaussian --accountant exact", "PLD serves here", "Leave"),
        ("--epsilon 8 --delta 0.001", "delta 0.001 is not below 1 / 1,000 users", "1e-05"),
        ("--epsilon 8 --separation 21", "50 x 21 is more than 1,000", "at most 20"),
        ("--epsilon 8 --participations 4", "more than 4", "5 participations"),
        ("--epsilon 8 --mechanism gaussian --separation 5", "at random", "banded-sqrt"),
        ("--epsilon 1 --mechanism none", "neither an epsilon nor a noise", "Leave --epsilon"),
        ("--epsilon -1", "epsilon -1.0 is not a positive", "--help"),
        ("--epsilon 1e-9", "epsilon 1e-09 needs a noise multiplier above 4096", "larger epsilon"),
        ("--noise-multiplier nan", "noise multiplier nan", "--help"),
        ("--noise-multiplier 1e-200", "no noise at all", "--mechanism none"),
        ("--mechanism none --html here.html", "no epsilon to plot", "Leave --html out"),
        ("--epsilon 8 --users 0", "0 users", "--help"),
        ("--epsilon 8 --cohort 2000", "cohort 2000 is larger", "--help"),
        ("--epsilon 8 --users 1" + "0" * 400, "more than can be planned", "Use at most"),
    ],
)
def test_an_error_is_two_lines(plan: Plan, arguments: str, message: str, hint: str) -> None:
    code, output, errors = plan(*SMALL, *arguments.split())
    assert (code, output) == (1, "")
    first, second = errors.splitlines()
    assert first.startswith("Error: ")
    assert message in first
    assert second.startswith("Hint: ")
    assert hint in second
