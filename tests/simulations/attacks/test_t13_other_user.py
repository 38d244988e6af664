"""T13: several users of one home folder: what is one's own stays apart from the others'."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny_runs import (
    POLICY,
    SERVER,
    make_federation,
    make_grid,
    make_home,
    make_plan,
    make_users,
    some_vector,
)

from homefire.client.device import Device, adapted_model
from homefire.client.home import Home, PrivateAdapter, file_name
from homefire.client.participation import open_participations
from homefire.common.adapter import AdapterSpec
from homefire.common.errors import AdapterError, LedgerError
from homefire.common.plan import RoundPlan
from homefire.common.privacy.clipping import Clipped
from homefire.common.records import User
from homefire.common.signatures import public_key
from homefire.common.vector_file import read_vector
from homefire.server.federation import run_federation
from homefire.server.run_state import Federation
from homefire.simulations.attacks.hostile_server import insist
from homefire.simulations.attacks.other_user import (
    Shapes,
    files_of,
    footprint,
    foreign_tensors,
    holds_part_of,
    pass_off,
)

ANN, BOB = "user-0", "user-1"
LEDGER, ANCHOR, ADAPTER = range(3)


@pytest.fixture
def home(tmp_path: Path, tiny_llama: Path) -> Home:
    return make_home(tmp_path / "home", tiny_llama, make_users(2))


@pytest.fixture
def federation(home: Home, tmp_path: Path, tiny_llama: Path) -> Federation:
    return make_federation(tmp_path / "out", tiny_llama, users=2, home=home)


@pytest.fixture
def plan(federation: Federation) -> RoundPlan:
    return make_plan(federation, some_vector(federation.spec))


def personalize(home: Home, federation: Federation, user: int) -> None:
    model = adapted_model(home.config, federation.config.shared)
    Device(home, home.user(user)).personalize(model, some_vector(federation.spec), seed=1)


def take_part(home: Home, plan: RoundPlan, user: int) -> Clipped:
    answer = Device(home, home.user(user)).answer(plan)
    assert isinstance(answer, Clipped)
    return answer


def charges(home: Home, user_id: str) -> int:
    with open_participations(home, user_id) as ledger:
        return len(ledger.history)


# What is exported


def shared_shapes(spec: AdapterSpec) -> Shapes:
    """The allow-list: every tensor of the shared adapter, under its name in a PEFT folder."""
    return {
        f"base_model.model.{module.name}.lora_{factor}.weight": shape
        for module in spec.modules
        for factor, shape in (
            ("A", (spec.config.rank, module.in_features)),
            ("B", (module.out_features, spec.config.rank)),
        )
    }


def test_the_exported_folder_holds_the_shared_adapter_and_nothing_else(
    home: Home, federation: Federation, tmp_path: Path
) -> None:
    personalize(home, federation, 0)
    run_federation(make_grid(home, 2)[0], federation)
    federation.store.export(federation.spec, tmp_path / "peft", base_model="tiny")
    files = {path.name for path in (tmp_path / "peft").iterdir()}
    assert files == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    weights = tmp_path / "peft" / "adapter_model.safetensors"
    allowed = shared_shapes(federation.spec)
    assert foreign_tensors(weights, allowed) == []
    found, release = load_file(weights), federation.store.latest().vector
    assert set(found) == set(allowed)
    for (module, factor), tensor in federation.spec.tensors(release).items():
        assert np.array_equal(found[f"base_model.model.{module}.lora_{factor}.weight"], tensor)
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert not config["modules_to_save"]


def test_exporting_all_that_the_model_holds_would_be_noticed(
    home: Home, federation: Federation, tmp_path: Path
) -> None:
    """The allow-list at work: the device's network has both adapters in it."""
    model = adapted_model(home.config, federation.config.shared)
    everything = {
        f"{name}.weight": tensor.detach().numpy().copy()
        for name, tensor in model.network.named_parameters()
        if "private" in name or "shared" in name
    }
    assert everything
    save_file(everything, tmp_path / "all.safetensors")
    assert foreign_tensors(tmp_path / "all.safetensors", shared_shapes(federation.spec))


def test_nothing_that_the_server_has_holds_a_part_of_a_private_adapter(
    home: Home, federation: Federation, tmp_path: Path
) -> None:
    for user in (0, 1):
        personalize(home, federation, user)
    run_federation(make_grid(home, 2)[0], federation)
    federation.store.export(federation.spec, tmp_path / "out" / "peft", base_model="tiny")
    private = [home.load_private(user_id).vector for user_id in (ANN, BOB)]
    release = federation.store.latest().vector
    has = footprint(tmp_path / "out", federation.keystore.folder)
    assert len(has) > 6
    for payload in has.values():
        assert not any(holds_part_of(payload, vector) for vector in private)
    # The search finds what is there: the release in its own file, the adapters at home.
    assert any(holds_part_of(payload, release) for payload in has.values())
    assert all(
        holds_part_of(files_of(home, user_id)[ADAPTER].read_bytes(), vector)
        for user_id, vector in zip((ANN, BOB), private, strict=True)
    )


def test_releases_hold_one_vector_as_long_as_the_shared_adapter(
    home: Home, federation: Federation
) -> None:
    personalize(home, federation, 0)
    run_federation(make_grid(home, 2)[0], federation)
    for path in sorted(federation.store.folder.iterdir()):
        assert foreign_tensors(path, {"vector": (federation.spec.size,)}) == []
    about = federation.store.latest().about
    assert set(about) == {
        "run",
        "base_model",
        "adapter_digest",
        "start",
        "privacy",
        "deployment",
        "ledger",
        "round",
        "digest",
        "server_key",
        "signature",
    }


def test_a_contribution_does_not_depend_on_private_adapters(
    home: Home, federation: Federation, plan: RoundPlan, tmp_path: Path, tiny_llama: Path
) -> None:
    twin = make_home(tmp_path / "twin", tiny_llama, make_users(2))
    alone = take_part(twin, plan, 1)
    for user in (0, 1):
        personalize(home, federation, user)
    assert take_part(home, plan, 1).payload == alone.payload


# Whose files change


def of_user(home: Home, user_id: str) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in files_of(home, user_id) if path.exists()}


def test_training_and_taking_part_change_no_file_of_another_user(
    home: Home, federation: Federation, plan: RoundPlan
) -> None:
    personalize(home, federation, 1)
    take_part(home, plan, 1)
    before, all_before = of_user(home, BOB), footprint(home.folder, home.keystore.folder)
    assert len(before) == 3
    personalize(home, federation, 0)
    take_part(home, plan, 0)
    after = footprint(home.folder, home.keystore.folder)
    assert of_user(home, BOB) == before
    assert {path: after[path] for path in all_before} == all_before
    assert set(after) - set(all_before) == set(files_of(home, ANN))


def test_one_users_participation_does_not_charge_another(home: Home, plan: RoundPlan) -> None:
    take_part(home, plan, 0)
    assert (charges(home, ANN), charges(home, BOB)) == (1, 0)
    take_part(home, plan, 1)  # the same plan, for which Bob was not asked before
    assert (charges(home, ANN), charges(home, BOB)) == (1, 1)


def test_one_user_who_has_spent_everything_leaves_the_other_all(
    tmp_path: Path, tiny_llama: Path, plan: RoundPlan
) -> None:
    policy = POLICY.model_copy(update={"participations": 1})
    home = make_home(tmp_path / "few", tiny_llama, make_users(2), policy=policy)
    grid = make_grid(home, 2)[0]
    later = RoundPlan(plan.header.model_copy(update={"round": 2}), plan.release)
    assert insist(grid, [plan, later], SERVER, 1) == ["contribution", "too often"]
    assert insist(grid, [later], SERVER, 2) == ["contribution"]


def test_users_sign_with_keys_of_their_own(home: Home) -> None:
    assert public_key(home.identity(ANN)) != public_key(home.identity(BOB))


# In somebody else's place


def test_anothers_private_adapter_in_ones_place_is_refused(
    home: Home, federation: Federation
) -> None:
    for user in (0, 1):
        personalize(home, federation, user)
    path = pass_off(home, ANN, BOB, number=ADAPTER)
    # The file itself is whole: only the name in it tells whose it is.
    read_vector(path, kind="private adapter")
    with pytest.raises(AdapterError, match="another user's private adapter"):
        home.load_private(BOB)
    assert np.any(home.load_private(ANN).vector)


def test_anothers_ledger_in_ones_place_is_refused(home: Home, plan: RoundPlan) -> None:
    """Also where nothing was anchored yet, so that the other's charges would be taken over."""
    take_part(home, plan, 0)
    pass_off(home, ANN, BOB, number=LEDGER)
    with pytest.raises(LedgerError, match="of another kind"):
        charges(home, BOB)
    grid = make_grid(home, 2)[0]
    assert insist(grid, [plan], SERVER, 2) == ["error: DeviceError"]


def test_anothers_ledger_and_anchor_in_ones_place_are_refused(home: Home, plan: RoundPlan) -> None:
    for user in (0, 1):
        take_part(home, plan, user)
    pass_off(home, ANN, BOB, number=LEDGER)
    with pytest.raises(LedgerError, match="of another kind"):
        charges(home, BOB)
    pass_off(home, ANN, BOB, number=ANCHOR)
    with pytest.raises(LedgerError, match="anchor is damaged"):
        charges(home, BOB)
    assert charges(home, ANN) == 1


# Ids that are no names

HOSTILE = [
    "../user-1",
    "..",
    "/etc/passwd",
    "user-1/../user-0",
    "user-1\0",
    "USER-1",
    "user-1 ",
    "user\u20111",
    file_name("user-1"),
    "participations",
]


@pytest.mark.parametrize("user_id", HOSTILE)
def test_no_id_reaches_another_users_files(
    tmp_path: Path, tiny_llama: Path, plan: RoundPlan, user_id: str
) -> None:
    hostile = User(user_id, make_users(1)[0].records)
    home = make_home(tmp_path / "inner" / "home", tiny_llama, [hostile, make_users(2)[1]])
    take_part(home, plan, 1)
    before = of_user(home, BOB)
    all_before = footprint(tmp_path / "inner")
    take_part(home, plan, 0)
    home.save_private(user_id, PrivateAdapter(np.ones(3, np.float32), {}))
    assert of_user(home, BOB) == before
    assert set(footprint(tmp_path / "inner")) - set(all_before) == set(files_of(home, user_id))
    assert (charges(home, user_id), charges(home, BOB)) == (1, 1)
