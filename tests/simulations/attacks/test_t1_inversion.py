"""T1: a curious server reads the words of one contribution, but not those of a release."""

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from tiny_runs import make_federation, make_home, make_plan

from homefire.client.device import Device, contribute
from homefire.common.adapted_model import AdaptedModel
from homefire.common.adapter import AdapterConfig
from homefire.common.base_model import load_base_model
from homefire.common.local_training import LocalTraining
from homefire.common.peft_adapter import resolve_spec
from homefire.common.plan import PrivacyBlock, RoundPlan
from homefire.common.policy import DevicePolicy, check_plan
from homefire.common.privacy.clipping import STEPS, Clipped
from homefire.common.privacy.mechanism import BandedSqrt, ClippedSum, Gaussian, privatize
from homefire.common.privacy.randomness import KeyStream
from homefire.common.protocol import STATISTICS
from homefire.common.records import Record, User
from homefire.common.training import encode
from homefire.simulations.attacks.inversion import first_layer_inputs, reconstruct

SENTENCE = "iris has asthma"
Values = npt.NDArray[np.integer]
RANK, VOCABULARY, COHORT = 16, 259, 30


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> "Scene":
    return Scene(tmp_path_factory.mktemp("t1"), tiny_llama)


class Scene:
    """A server that asks for one plain gradient step, and users who answer."""

    def __init__(self, folder: Path, model: Path) -> None:
        config = AdapterConfig(method="ffa", rank=RANK, alpha=RANK, targets=["q_proj"])
        base = load_base_model(str(model))
        self.spec = resolve_spec(config, base.model.config)
        self.model = AdaptedModel(base, {"shared": self.spec})
        training = LocalTraining(
            steps=1, batch_size=1, max_tokens=64, optimizer="sgd", learning_rate=1.0
        )
        federation = make_federation(
            folder / "server", model, users=COHORT, shared=config, local=training
        )
        self.plan = make_plan(federation)
        self.inputs = first_layer_inputs(self.model, self.spec.slots[0].module, VOCABULARY)

    def contribution(self, text: str, user: str) -> Values:
        """What a user's device sends."""
        examples = (encode(self.model.base.tokenizer, Record(text), 64),)
        return contribute(self.model, self.plan, examples, user_id=user).values

    def words(self, text: str) -> set[int]:
        """The bytes that leave a trace: the first sees only itself, the last predicts nothing."""
        return set(encode(self.model.base.tokenizer, Record(text), 64).tokens[1:-1])

    def recall(self, vector: Values) -> float:
        """How many of the sentence's bytes the attack names."""
        update = vector[:-STATISTICS].astype(np.float64)
        found = reconstruct(update, self.spec, self.inputs, noise_floor=0.5)
        return found.recall(self.words(SENTENCE))


def test_the_attack_succeeds_on_a_single_contribution(scene: Scene) -> None:
    assert len(scene.words(SENTENCE)) < RANK
    assert scene.recall(scene.contribution(SENTENCE, "iris")) == 1.0


def test_the_attack_succeeds_on_a_device_with_the_default_policy(
    scene: Scene, tmp_path: Path, tiny_llama: Path
) -> None:
    """Nothing that the policy compares says how much a contribution shows."""
    policy = DevicePolicy(server_keys=(scene.plan.header.server_key,))
    user = User("iris", (Record(SENTENCE), Record("something newer")))
    home = make_home(tmp_path / "home", tiny_llama, [user], policy=policy)
    block = PrivacyBlock.announce(BandedSqrt(4.0, 20, 2), clip_norm=1.0, cohort=75)
    header = scene.plan.header.model_copy(update={"privacy": block})
    answer = Device(home, user).answer(RoundPlan(header, scene.plan.release))
    assert isinstance(answer, Clipped)
    assert scene.recall(answer.values) == 1.0
    insisting = policy.model_copy(update={"require_secure_aggregation": True})
    refusal = check_plan(insisting, header, [])
    assert refusal is not None and refusal.reason == "no secure aggregation"


def test_the_attack_fails_on_what_is_released(scene: Scene) -> None:
    rng = np.random.default_rng(0)
    total = ClippedSum.empty(len(scene.contribution(SENTENCE, "iris")), 1.0)
    total.values += scene.contribution(SENTENCE, "iris")
    for other in range(COHORT - 1):
        text = "".join(chr(c) for c in rng.integers(97, 123, 20))
        total.values += scene.contribution(text, str(other))
    found = []
    for key in range(20):
        stream = KeyStream(key.to_bytes(32, "little"))
        noisy, _ = privatize(total, Gaussian(1.0, 0.5), stream)
        found.append(scene.recall(noisy))
    chance = len(scene.words(SENTENCE)) / VOCABULARY
    assert np.mean(found) < 3 * chance + 0.05


def test_noise_alone_without_a_cohort_already_hides_the_words(scene: Scene) -> None:
    """What the server would have to be kept from: it is the one who sees the sum before this."""
    alone = scene.contribution(SENTENCE, "iris").astype(np.int64)
    noise = np.rint(KeyStream(bytes(32)).gaussian(len(alone)) * STEPS).astype(np.int64)
    assert scene.recall(alone) == 1.0
    assert scene.recall(alone + noise) < 0.5
