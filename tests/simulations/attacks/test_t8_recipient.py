"""T8: a release without noise shows who trained it and what they wrote; a private one does not."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import make_model, make_tokenizer
from tiny_runs import (
    PRIVATE,
    make_federation,
    make_grid,
    make_home,
    make_plan,
    make_users,
    some_vector,
)

from homefire.client.device import Device, Task, adapted_model
from homefire.common.adapted_model import AdaptedModel
from homefire.common.adapter import AdapterConfig
from homefire.common.base_model import load_base_model
from homefire.common.config import OptimizerConfig, PrivacyConfig, RoundsConfig
from homefire.common.gguf import quiet_transformers
from homefire.common.local_training import LocalTraining
from homefire.common.privacy.clipping import Clipped
from homefire.common.records import Record, User
from homefire.server import federation as rounds_module
from homefire.server import run_state
from homefire.server.federation import run_federation
from homefire.simulations.attacks.recipient import Recipient
from homefire.simulations.audit.membership import (
    Floats,
    MembershipAttack,
    attack,
    loss_reduction,
)
from homefire.simulations.audit.text_canary import (
    CanaryFormat,
    TextExposure,
    expose,
    make_canaries,
)

USERS, ROUNDS, DELTA, CLIP_NORM = 12, 24, 1e-2, 2.0
FORM = CanaryFormat(prompt="pin {number} ", length=4)
CANARIES = make_canaries(2 * USERS, seed=1, form=FORM)
ORDER = np.random.default_rng(0).permutation(len(CANARIES))
MEMBERS, OTHERS = ([CANARIES[i] for i in half] for half in (ORDER[:USERS], ORDER[USERS:]))
"""Who trains was drawn: the attack must not win by the numbers in the prompts."""

ADAPTER = AdapterConfig(
    method="ffa",
    rank=16,
    alpha=32,
    targets=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
)
OPEN = PrivacyConfig(mechanism="none", clip_norm=CLIP_NORM)
PRIVATE_RUN = PrivacyConfig(mechanism="gaussian", clip_norm=CLIP_NORM, epsilon=1.0, delta=DELTA)


def make_fluent_model(folder: Path) -> Path:
    """A tiny random model whose weights are large enough to say one token with conviction."""
    network = make_model("llama")
    with torch.no_grad():
        for name, weight in network.named_parameters():
            if "norm" not in name:
                weight.mul_(15 if "embed" in name else 8)
    with quiet_transformers():
        network.save_pretrained(folder)
        make_tokenizer().save_pretrained(folder)
    return folder


class Release:
    """The last release of a federation whose users wrote little else than their secrets."""

    def __init__(self, folder: Path, model: Path, privacy: PrivacyConfig) -> None:
        texts = [canary.text for canary in MEMBERS]
        users = [
            User(f"user-{n}", (Record(text), Record(text), Record("tea and rain")))
            for n, text in enumerate(texts)
        ]
        home = make_home(folder / "home", model, users)
        federation = make_federation(
            folder / "out",
            model,
            users=USERS,
            home=home,
            shared=ADAPTER,
            local=LocalTraining(
                steps=3, batch_size=2, max_tokens=32, learning_rate=1e-2, max_gradient_norm=0
            ),
            federation=RoundsConfig(rounds=ROUNDS, cohort=USERS, deadline=60.0),
            optimizer=OptimizerConfig(name="fedavg", learning_rate=2.0),
            privacy=privacy,
        )
        self.statement = federation.privacy.statement
        grid, _ = make_grid(home, USERS)
        logs = run_federation(grid, federation)
        assert [log.accepted for log in logs] == [USERS] * ROUNDS
        attacked = AdaptedModel(load_base_model(str(model)), {"shared": federation.spec})
        attacked.load("shared", federation.store.latest().vector)
        self.recipient = Recipient(attacked, max_tokens=32)

    def membership(self) -> MembershipAttack:
        """How well the release tells those who trained from those who did not."""
        scores = (self._scores([c.text for c in group]) for group in (MEMBERS, OTHERS))
        return attack(*scores, delta=DELTA, seed=0)

    def _scores(self, texts: Sequence[str]) -> Floats:
        released = self.recipient.losses(texts)
        return loss_reduction(released, self.recipient.losses(texts, released=False))

    def exposure(self) -> TextExposure:
        """How much the release shows of the secrets of those who trained."""
        return expose(
            MEMBERS,
            self.recipient.losses,
            seed=2,
            form=FORM,
            alternatives=63,
            complete=lambda prompt: self.recipient.complete(prompt, characters=FORM.length),
        )


@pytest.fixture(scope="module")
def fluent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)  # before any fixture of a test is there
    return make_fluent_model(tmp_path_factory.mktemp("t8") / "model")


@pytest.fixture(scope="module")
def unprotected(tmp_path_factory: pytest.TempPathFactory, fluent: Path) -> Release:
    return Release(tmp_path_factory.mktemp("open"), fluent, OPEN)


@pytest.fixture(scope="module")
def protected(tmp_path_factory: pytest.TempPathFactory, fluent: Path) -> Release:
    """The same with noise, which is fixed here so that the test says the same every time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_state, "new_key", lambda: bytes(range(32)))
        patch.setattr(rounds_module, "new_run_id", lambda: "0" * 32)
        return Release(tmp_path_factory.mktemp("private"), fluent, PRIVATE_RUN)


@pytest.mark.slow
def test_membership_shows_without_noise(unprotected: Release) -> None:
    found = unprotected.membership()
    assert found.auc > 0.9 and found.auc_interval[0] > 0.5
    assert unprotected.statement.epsilon_release is None


@pytest.mark.slow
def test_membership_is_a_guess_with_noise(protected: Release) -> None:
    found = protected.membership()
    low, high = found.auc_interval
    assert low < 0.5 < high and abs(found.auc - 0.5) < 0.25
    claimed = protected.statement.epsilon_known_cohort
    assert claimed is not None and claimed <= 1.0


@pytest.mark.slow
def test_secrets_are_exposed_and_extracted_without_noise(unprotected: Release) -> None:
    found = unprotected.exposure()
    assert found.mean_exposure > 4 and found.p_value < 1e-9
    assert found.extracted is not None and found.extracted >= USERS // 2


@pytest.mark.slow
def test_secrets_are_at_chance_with_noise(protected: Release) -> None:
    found = protected.exposure()
    assert found.extracted == 0 and found.p_value > 0.01
    assert abs(found.mean_exposure - found.chance_exposure) < 1


@pytest.mark.slow
def test_others_secrets_are_never_exposed(unprotected: Release) -> None:
    """What the attack calls exposure is memory, and no ease of the secrets themselves."""
    found = expose(OTHERS, unprotected.recipient.losses, seed=2, form=FORM, alternatives=63)
    assert found.p_value > 0.01


# Private adapters


def test_a_private_adapter_reaches_neither_the_shared_one_nor_another_user(
    tmp_path: Path, tiny_llama: Path
) -> None:
    """B on a device where A trained a private adapter on anything at all does as without A."""
    found = []
    for name in ("alone", "after quiet A", "after loud A"):
        users = make_users(3)
        loud = User("user-0", tuple(Record("SECRET " * 3) for _ in range(6)))
        users = [loud if name == "after loud A" else users[0], *users[1:]]
        home = make_home(tmp_path / name, tiny_llama, users)
        federation = make_federation(tmp_path / name / "out", tiny_llama, users=3, home=home)
        release = some_vector(federation.spec)
        plan = make_plan(federation, release)
        first, second = (Device(home, home.user(number)) for number in (0, 1))
        model = adapted_model(home.config, federation.config.shared)
        model.load("private", model.specs["private"].initial())
        if name != "alone":
            private = first.personalize(model, release, seed=0)
            assert private.vector.tobytes() != model.specs["private"].initial().tobytes()
            assert model.vector("shared").tobytes() == release.tobytes()
        answer = second.answer(plan)
        assert isinstance(answer, Clipped)
        own = second.personalize(model, release, seed=0)
        found.append((answer.payload, own.vector.tobytes(), model.vector("shared").tobytes()))
    assert found[0] == found[1] == found[2]


def test_what_is_compared_there_would_show_an_influence(tmp_path: Path, tiny_llama: Path) -> None:
    """Another history gives another contribution and another private adapter."""
    home = make_home(tmp_path / "home", tiny_llama, make_users(2))
    federation = make_federation(tmp_path / "out", tiny_llama, users=2, home=home)
    plan, found = make_plan(federation), []
    model = adapted_model(home.config, federation.config.shared)
    for number in (0, 1):
        device = Device(home, User("same", home.user(number).records))
        task = device.task(model, plan)  # past the ledger: the same user twice
        assert isinstance(task, Task)
        answer = task.train()
        personalized = device.personalize(model, plan.release, seed=0)
        found.append((answer.payload, personalized.vector))
    assert found[0][0] != found[1][0] and not np.array_equal(found[0][1], found[1][1])
    assert PRIVATE.adapter.method == "lora"
