"""`homefire audit` on a finished run: the figures, the report, the verdict."""

import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from made_up_report import MADE_UP, Page
from tiny_simulations import NO_PRIVACY, prepare_small, quiet

from homefire import __main__ as command_line
from homefire.common.claims import shown
from homefire.common.errors import ConfigError, DataError
from homefire.common.privacy import mechanism as mechanism_module
from homefire.common.privacy.accounting import gaussian_epsilon
from homefire.common.privacy.mechanism import ClippedSum, Gaussian, Mechanism, Past, Sum
from homefire.common.privacy.randomness import KeyStream
from homefire.simulations.audit import CHANCE, canary, membership, statistics
from homefire.simulations.audit import path as path_module
from homefire.simulations.audit.membership import MembershipAttack
from homefire.simulations.audit.of_run import audit_run
from homefire.simulations.preparation import Run
from homefire.simulations.report import load_report
from homefire.simulations.simulate import simulate

Z = 1.0
NOISY = f'privacy={{mechanism="gaussian", clip_norm=1.0, noise_multiplier={Z}, delta=1e-6}}'
SETTINGS = ("population.unseen=4", "evaluation.generated=0", "private.training.steps=2")
RUNS = {
    "none": NO_PRIVACY,
    "gaussian": NOISY,
    "little noise": 'privacy={mechanism="gaussian", clip_norm=1.0, noise_multiplier=0.8, '
    "delta=1e-6, deployment={users=100000, cohort=5000}}",
}

Cli = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Callable[[str], Run]:
    """Finished runs of four training and four unseen users."""
    folder, finished = tmp_path_factory.mktemp("runs"), dict[str, Run]()

    def run_of(name: str) -> Run:
        if name not in finished:
            run = prepare_small(folder / name, tiny_llama, *SETTINGS, RUNS[name])
            simulate(run, quiet())
            finished[name] = run
        return finished[name]

    return run_of


@pytest.fixture(autouse=True)
def _known_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test's first audit is always the same one: chance fails one in a hundred."""
    keys = itertools.count()
    for module in (canary, statistics):
        monkeypatch.setattr(module, "new_key", lambda: next(keys).to_bytes(32, "little"))


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["homefire", *arguments])
        monkeypatch.setenv("COLUMNS", "120")
        with pytest.raises(SystemExit) as ended:
            command_line.main()
        output = capsys.readouterr()
        return int(ended.value.code or 0), output.out, output.err

    return run


def halve_the_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """`privatize` announces z and adds half of it."""

    def halved(
        total: ClippedSum, mechanism: Mechanism, stream: KeyStream, past: Past = ()
    ) -> tuple[Sum, Past]:
        assert isinstance(mechanism, Gaussian)
        weaker = Gaussian(mechanism.noise_multiplier / 2, mechanism.sampling_rate)
        return mechanism_module.privatize(total, weaker, stream, past)

    monkeypatch.setattr(path_module, "privatize", halved)


def audit_section(run: Run) -> str:
    text = Page((run.folder / "report.html").read_text(encoding="utf-8")).text
    start = text.index("What attacks and statistics show")
    return text[start : text.index("Cost, measured on this machine")]


@pytest.mark.slow
def test_figures_go_into_the_report(runs: Callable[[str], Run]) -> None:
    run = runs("gaussian")
    before = load_report(run.folder)
    found = audit_run(run.folder, quiet(), users=200)
    after = load_report(run.folder)
    assert after["audit"] == json.loads(json.dumps(found))
    assert {name: value for name, value in after.items() if name != "audit"} == {
        name: value for name, value in before.items() if name != "audit"
    }
    canaries, noise, attack = found["canary"], found["noise"], found["membership"]
    assert canaries["rounds"] == 2
    assert canaries["epsilon_claimed"] == before["privacy"]["epsilon_known_cohort"]
    assert canaries["epsilon_claimed"] == pytest.approx(gaussian_epsilon(2**0.5 / Z, 1e-6))
    assert canaries["claim_holds"]
    assert 0 < canaries["epsilon_lower"] < canaries["epsilon_claimed"]
    assert canaries["epsilon"] == pytest.approx(canaries["epsilon_claimed"], rel=0.2)
    assert noise["passed"]
    assert noise["scale"] == pytest.approx(1.0, abs=0.02)
    assert (attack["members"], attack["others"]) == (4, 4)
    assert attack["epsilon_claimed"] == before["privacy"]["epsilon_release"]
    assert attack["claim_holds"]
    text = audit_section(run)
    assert f"{canaries['epsilon_lower']:.3f}" in text
    assert f"{noise['scale']:.3f}" in text
    assert "4 training against 4 unseen users" in text
    assert text.count("holds") == 3
    assert "Chance alone" not in text


@pytest.mark.slow
def test_a_second_audit_replaces_the_first(runs: Callable[[str], Run]) -> None:
    run = runs("gaussian")
    first = audit_run(run.folder, quiet(), users=4)
    second = audit_run(run.folder, quiet(), users=4)
    assert first["canary"]["mu"] != second["canary"]["mu"]
    assert load_report(run.folder)["audit"] == json.loads(json.dumps(second))


@pytest.mark.slow
def test_without_noise_nothing_is_claimed(runs: Callable[[str], Run], cli: Cli) -> None:
    run = runs("none")
    code, output, _ = cli("audit", str(run.folder), "--json")
    found = json.loads(output)
    assert code == 0
    assert found["canary"]["mechanism"] == "none"
    assert found["canary"]["epsilon_claimed"] is None
    assert found["canary"]["wins"] == found["canary"]["canaries"]
    assert found["canary"]["epsilon_lower"] > 10
    assert found["noise"] is None
    assert found["membership"]["members"] == 4
    assert found["membership"]["epsilon_claimed"] is None
    assert found["membership"]["claim_holds"]
    text = audit_section(run)
    for name in ("ε_known_cohort", "ε_release"):
        assert f"must not exceed {name}, which is unbounded" in text


@pytest.mark.slow
def test_noise_of_a_few_grid_steps_is_not_tested(runs: Callable[[str], Run], cli: Cli) -> None:
    """A small run with the noise of a large deployment: its own claim protects nobody."""
    run = runs("little noise")
    code, output, _ = cli("audit", str(run.folder), "--json")
    found = json.loads(output)
    assert code == 0
    assert found["noise"] is None
    assert found["canary"]["claim_holds"]


@pytest.mark.slow
def test_the_command_prints_a_table(runs: Callable[[str], Run], cli: Cli) -> None:
    run = runs("gaussian")
    code, output, _ = cli("audit", str(run.folder))
    assert code == 0
    for word in ("lower bound", "point estimate", "noise: scale", "membership: AUC"):
        assert word in output
    said = load_report(run.folder)["privacy"]
    for name in ("release", "known_cohort"):
        assert f"ε_{name} {shown(said[f'epsilon_{name}'])}: not exceeded" in output
    assert f"Report: {run.folder / 'report.html'}" in output


@pytest.mark.slow
def test_halved_noise_is_exit_code_1(
    runs: Callable[[str], Run], cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both see it: the canaries and the goodness of fit; the report keeps what was found."""
    run = runs("gaussian")
    halve_the_noise(monkeypatch)
    code, output, errors = cli("audit", str(run.folder), "--json")
    found = json.loads(output)
    assert code == 1
    assert "Error: the audit contradicts what is claimed with these settings" in errors
    assert f"Hint: {CHANCE.format('a hundred')}" in errors
    assert not found["canary"]["claim_holds"]
    assert not found["noise"]["passed"]
    assert found["noise"]["scale"] == pytest.approx(0.5, abs=0.01)
    text = audit_section(run)
    assert text.count("FAILS") == 2
    assert text.count("Repeat it: if it fails again, the noise or the accounting is wrong.") == 2


@pytest.mark.slow
def test_a_membership_bound_above_the_runs_claim_is_exit_code_1(
    runs: Callable[[str], Run], cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = runs("gaussian")
    claim = load_report(run.folder)["privacy"]["epsilon_release"]
    honest = membership.attack

    def luckier(*scores: Sequence[float], delta: float, seed: int) -> MembershipAttack:
        return replace(honest(*scores, delta=delta, seed=seed), epsilon_lower=claim + 0.5)

    monkeypatch.setattr(membership, "attack", luckier)
    code, output, errors = cli("audit", str(run.folder))
    assert code == 1
    assert f"ε_release {shown(claim)}: EXCEEDED" in output
    assert "Error: membership inference shows more than the run's ε_release" in errors
    assert "Hint: Chance alone does this to one run in a hundred. Repeat run and audit" in errors
    text = audit_section(run)
    assert f"{claim + 0.5:.3f} FAILS must not exceed ε_release, {shown(claim, digits=3)}" in text
    assert text.count("FAILS") == 1


def test_too_few_users_are_not_attacked(tmp_path: Path, tiny_llama: Path) -> None:
    settings = ("population.unseen=1", "evaluation.generated=0", "private.training.steps=2")
    run = prepare_small(tmp_path / "run", tiny_llama, *settings, NO_PRIVACY)
    simulate(run, quiet())
    assert audit_run(run.folder, quiet(), users=200)["membership"] is None


def test_a_run_without_report_is_refused(tmp_path: Path, tiny_llama: Path) -> None:
    run = prepare_small(tmp_path / "run", tiny_llama, NO_PRIVACY)
    with pytest.raises(DataError, match=r"report\.json: no such file"):
        audit_run(run.folder, quiet(), users=4)


def test_a_report_without_its_run_is_refused(tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text(json.dumps(MADE_UP))
    with pytest.raises(ConfigError, match=r"experiment\.toml: no such file"):
        audit_run(tmp_path, quiet(), users=4)
