"""Amplification by sampling is claimed only while every drawn device could take part."""

from pathlib import Path

import pytest
from flwr.app import Message
from tiny_runs import POLICY, make_federation, make_grid, make_home, make_users
from tiny_servers import KilledError, SmallGrid, kill_at, kinds, read_ledger, small_federation

from homefire.common import keystore as keystore_module
from homefire.common.config import PrivacyConfig, RoundsConfig
from homefire.common.errors import BudgetExhaustedError, FederationError
from homefire.common.keystore import Keystore
from homefire.common.policy import DevicePolicy
from homefire.common.protocol import Refusal, encode_refusal
from homefire.server.federation import run_federation
from homefire.server.releases import ReleaseStore
from homefire.server.run_ledger import RunLedger
from homefire.server.run_state import RUN_KEY, Federation, rounds_spent

NOISE = PrivacyConfig(mechanism="gaussian", clip_norm=1.0, noise_multiplier=1.0, delta=1e-3)


def run(
    folder: Path, model: Path, policy: DevicePolicy, privacy: PrivacyConfig = NOISE
) -> Federation:
    home = make_home(folder / "home", model, make_users(3), policy=policy)
    federation = make_federation(
        folder / "server",
        model,
        users=3,
        home=home,
        privacy=privacy,
        federation=RoundsConfig(rounds=4, cohort=2, deadline=60.0),
    )
    run_federation(make_grid(home, 3)[0], federation)
    return federation


def epsilons(federation: Federation, number: int) -> tuple[float, float]:
    privacy = federation.store.read(number).about["privacy"]
    return privacy["epsilon_release"], privacy["epsilon_known_cohort"]


def test_no_false_amplification_after_a_refusal_because_of_earlier_rounds(
    tmp_path: Path, tiny_llama: Path
) -> None:
    limited = POLICY.model_copy(update={"participations": 1})
    federation = run(tmp_path, tiny_llama, limited)
    first, known = epsilons(federation, 0)
    assert first < known
    # Three devices, two expected in each of four rounds: somebody is drawn twice.
    last, known_at_last = epsilons(federation, 4)
    assert last == known_at_last == known
    words = federation.store.read(4).about["privacy"]["participation"]
    assert "no amplification" in words


def test_amplification_is_claimed_while_nobody_refuses(tmp_path: Path, tiny_llama: Path) -> None:
    federation = run(tmp_path, tiny_llama, POLICY)
    assert epsilons(federation, 4) == epsilons(federation, 0)
    assert epsilons(federation, 4)[0] < epsilons(federation, 4)[1]


def test_other_refusals_do_not_depend_on_earlier_rounds(tmp_path: Path, tiny_llama: Path) -> None:
    strict = POLICY.model_copy(update={"largest_clip_norm": 0.5})
    federation = run(tmp_path, tiny_llama, strict)
    assert epsilons(federation, 4) == epsilons(federation, 0)


def test_an_epsilon_that_was_asked_for_is_not_passed(tmp_path: Path, tiny_llama: Path) -> None:
    limited = POLICY.model_copy(update={"participations": 1})
    asked = PrivacyConfig(mechanism="gaussian", clip_norm=1.0, epsilon=4.0, delta=1e-3)
    with pytest.raises(BudgetExhaustedError, match="amplification"):
        run(tmp_path, tiny_llama, limited, asked)
    store = ReleaseStore(tmp_path / "server" / "releases")
    stated = [store.read(number).about["privacy"]["epsilon_release"] for number in store.rounds()]
    assert len(stated) < 5 and max(stated) <= 4.0
    assert Keystore.beside(tmp_path / "server").get(RUN_KEY) is None


ASKED = PrivacyConfig(mechanism="gaussian", clip_norm=1.0, epsilon=4.0, delta=1e-3)
STEPS_OF_AN_EARLY_END = {
    "before the loss is recorded": (RunLedger, "lose_amplification", False),
    "loss recorded": (RunLedger, "lose_amplification", True),
    "before the key is destroyed": (Keystore, "destroy", False),
    "the key is renamed and not wiped": (keystore_module, "wipe", False),
    "key destroyed": (Keystore, "destroy", True),
    "before the end": (RunLedger, "end", False),
    "ended": (RunLedger, "end", True),
}


def too_often(message: Message) -> Message:
    return Message(encode_refusal(Refusal(reason="too often", detail="")), reply_to=message)


def refusing(federation: Federation) -> SmallGrid:
    return SmallGrid(answers=dict.fromkeys(range(1, 7), too_often), watched=federation)


@pytest.mark.parametrize("name", STEPS_OF_AN_EARLY_END)
def test_an_epsilon_that_was_asked_for_is_not_passed_whichever_step_was_the_last(
    tmp_path: Path, name: str
) -> None:
    rounds = RoundsConfig(rounds=4, cohort=5, deadline=60.0)
    federation = small_federation(tmp_path / "out", privacy=ASKED, federation=rounds)
    first, second = refusing(federation), refusing(federation)
    owner, function, after = STEPS_OF_AN_EARLY_END[name]
    with pytest.MonkeyPatch.context() as patch:
        kill_at(patch, owner, function, after=after)
        with pytest.raises(KilledError):
            run_federation(first, federation)
    try:
        assert run_federation(second, federation) == []  # only the end had to be written
    except (BudgetExhaustedError, FederationError) as error:
        assert "without amplification" in str(error) or "is over" in str(error)
    # A burnt round, and another refusal.
    assert bool(second.plans) == (name == "before the loss is recorded")
    ledger = read_ledger(federation)
    assert ledger.ended and kinds(ledger)[-1] == ("end", None)
    assert rounds_spent(federation.config.output) == (ledger.opened, True)
    assert max(federation.store.rounds()) < ledger.opened
    assert epsilons(federation, max(federation.store.rounds()))[0] <= 4.0
    (secret,) = {key for key in first.run_keys if key is not None}
    stored = [path.read_bytes() for path in federation.keystore.folder.iterdir()]
    assert not any(secret in content for content in stored)


def test_a_run_with_a_limit_has_no_amplification_to_lose(tmp_path: Path) -> None:
    limited = ASKED.model_copy(update={"participations": 2})
    federation = small_federation(tmp_path / "out", privacy=limited)
    run_federation(refusing(federation), federation)
    assert not read_ledger(federation).unamplified
    assert max(federation.store.rounds()) == 4
    words = federation.store.latest().about["privacy"]["participation"]
    assert "limits of their own" not in words
