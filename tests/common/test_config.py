"""Settings files: what is refused, and that the error names the key."""

import math
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from homefire.common.config import (
    DeploymentConfig,
    DeviceConfig,
    FederationConfig,
    PrivacyConfig,
    load_config,
    validate,
)
from homefire.common.errors import ConfigError
from homefire.common.policy import DevicePolicy
from homefire.common.privacy.mechanism import LARGEST_SEPARATION
from homefire.common.privacy.statement import WRONG_PATHS
from homefire.simulations.experiment import Experiment
from homefire.simulations.preparation import write_toml

FEDERATION: dict[str, Any] = {
    "users": 10,
    "output": "out",
    "roster": "roster.txt",
    "base_model": {"name": "model"},
    "shared": {"targets": ["q_proj"], "seed": 4},
    "local": {"steps": 3},
    "federation": {"cohort": 5},
    "optimizer": {"name": "momentum"},
    "privacy": {"mechanism": "gaussian", "clip_norm": 0.5, "epsilon": 2.0, "delta": 1e-6},
}


def with_change(key: str, value: object) -> dict[str, object]:
    """The settings with one dotted key changed, or left out where the value is None."""
    table, _, name = key.rpartition(".")
    tables: dict[str, Any] = {
        k: dict(v) if isinstance(v, dict) else v for k, v in FEDERATION.items()
    }
    inner = tables[table] if table else tables
    if value is None:
        del inner[name]
    else:
        inner[name] = value
    return tables


def test_settings_survive_the_file(tmp_path: Path) -> None:
    config = validate(FederationConfig, FEDERATION, where="here")
    write_toml(tmp_path / "federation.toml", config)
    assert load_config(FederationConfig, tmp_path / "federation.toml") == config


def test_a_device_needs_no_settings_but_a_file(tmp_path: Path) -> None:
    (tmp_path / "device.toml").write_text("")
    assert load_config(DeviceConfig, tmp_path / "device.toml") == DeviceConfig()


def test_settings_cannot_be_changed_afterwards() -> None:
    config = validate(FederationConfig, FEDERATION, where="here")
    with pytest.raises(ValidationError):
        config.users = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("users", 0),
        ("users", None),
        ("users", "many"),
        ("roster", None),
        ("roster", 3),
        ("name", "../elsewhere"),
        ("name", ".hidden"),
        ("seed", -1),
        ("seed", 2**63),
        ("privacy", None),
        ("privacy.mechanism", "laplace"),
        ("privacy.clip_norm", 0),
        ("privacy.clip_norm", math.inf),
        ("privacy.clip_norm", math.nan),
        ("privacy.delta", 0),
        ("privacy.delta", 1),
        ("privacy.epsilon", 0),
        *((f"privacy.{name}", 0) for name in ("participations", "separation")),
        ("privacy.separation", LARGEST_SEPARATION + 1),
        ("privacy.participations", 1.5),
        ("local.steps", 0),
        ("local.batch_size", 0),
        ("local.max_tokens", 3),
        ("local.learning_rate", 0),
        ("local.learning_rate", math.inf),
        ("local.max_gradient_norm", -1),
        ("shared.rank", 0),
        ("shared.method", "full"),
        ("federation.cohort", 0),
        ("federation.rounds", 0),
        ("federation.deadline", 0),
        ("optimizer.name", "sgd"),
        ("optimizer.momentum", 1),
        ("optimizer.learning_rate", 0),
        ("base_model.name", ""),
        ("base_model.dtype", "float16"),
    ],
)
def test_a_wrong_value_is_refused_by_name(key: str, value: object) -> None:
    with pytest.raises(ConfigError) as error:
        validate(FederationConfig, with_change(key, value), where="some.toml")
    assert f"some.toml: {key}: " in str(error.value)


@pytest.mark.parametrize(
    ("key", "known"),
    [
        ("privat", "privacy"),
        ("privacy.epsilom", "epsilon"),
        ("local.step", "steps"),
        ("federation.chort", "cohort"),
        ("base_model.dtyp", "dtype"),
    ],
)
def test_an_unknown_key_is_refused_and_the_known_ones_are_named(key: str, known: str) -> None:
    with pytest.raises(ConfigError, match=f"here: {key}: unknown key") as error:
        validate(FederationConfig, with_change(key, 1), where="here")
    assert known in error.value.hint


@pytest.mark.parametrize(
    ("tables", "key", "known"),
    [
        ({"population": {"kind": "jsonl", "columns": 1}}, "columns", "path"),
        ({"population": {"kind": "synthetic", "pat": 1}}, "pat", "heterogeneity"),
        ({"private": {"training": {"step": 1}}}, "step", "steps"),
        ({"privacy": {"deployment": {"user": 1}}}, "user", "users"),
    ],
)
def test_known_keys_are_those_of_the_same_table(
    tables: dict[str, Any], key: str, known: str
) -> None:
    spoilt = {"privacy": {"mechanism": "none", "clip_norm": 1.0}} | tables
    if "deployment" in (privacy := spoilt["privacy"]):
        privacy |= {"mechanism": "gaussian", "clip_norm": 1, "delta": 0.1, "epsilon": 1}
        privacy["deployment"] |= {"users": 3, "cohort": 2}
    population = spoilt.get("population", {})
    if population.get("kind") == "jsonl":
        population |= {"users": 1, "unseen": 0, "path": "file"}
    with pytest.raises(ConfigError, match=rf"\.{key}: unknown key") as error:
        validate(Experiment, spoilt, where="here")
    assert known in error.value.hint.removeprefix("Known here: ").rstrip(".").split(", ")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("privacy.clip_norm", -1.0, "Input should be greater than 0, not -1.0"),
        ("privacy.clip_norm", math.inf, "Input should be a finite number, not inf"),
        (
            "privacy.mechanism",
            "laplace",
            "Input should be 'banded-sqrt', 'gaussian' or 'none', not 'laplace'",
        ),
        ("users", "many", "Input should be a valid integer, not 'many'"),
        ("privacy.participations", 1.5, "Input should be a valid integer, not 1.5"),
        ("shared.rank", [4], "Input should be a valid integer"),
    ],
)
def test_the_error_names_a_plain_value(key: str, value: object, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        validate(FederationConfig, with_change(key, value), where="some.toml")
    assert str(error.value) == f"some.toml: {key}: {message}"


def test_the_error_cuts_a_long_value() -> None:
    with pytest.raises(ConfigError) as error:
        validate(FederationConfig, with_change("name", "-" * 10_000), where="some.toml")
    assert len(str(error.value)) < 200


@pytest.mark.parametrize(
    ("tables", "error", "hint"),
    [
        ({}, "privacy: Field required", "Add a table [privacy]."),
        (
            {"privacy": {"mechanism": "none"}},
            "privacy.clip_norm: Field required",
            "Add clip_norm to the table [privacy].",
        ),
        (
            {"population": {"kind": "hf", "path": "data", "users": 2, "unseen": 0}},
            "population.hf.columns: Field required",
            "Add a table [population.columns].",
        ),
        (
            {"privacy": {"mechanism": "banded-sqrt", "clip_norm": 1.0, "epsilon": 8.0}},
            'privacy: "banded-sqrt" needs delta',
            "Add delta, such as 1e-5.",
        ),
        (
            {"privacy": {"mechanism": "gaussian", "clip_norm": 1.0, "delta": 1e-6}},
            'privacy: "gaussian" needs one of noise_multiplier and epsilon',
            "Add epsilon, such as 8.0.",
        ),
        (
            {"privacy": {"mechanism": "rdp", "clip_norm": 1.0}},
            "privacy.mechanism: rdp is refused",
            "Use gaussian or banded-sqrt.",
        ),
    ],
)
def test_the_error_says_what_to_do(tables: dict[str, Any], error: str, hint: str) -> None:
    known = {"privacy": {"mechanism": "none", "clip_norm": 1.0}} if tables else {}
    with pytest.raises(ConfigError) as caught:
        validate(Experiment, known | tables, where="some.toml")
    assert str(caught.value).startswith(f"some.toml: {error}")
    assert caught.value.hint == hint


def test_what_a_file_without_tables_lacks_is_named() -> None:
    with pytest.raises(ConfigError, match="here: users: Field required") as error:
        validate(FederationConfig, with_change("users", None), where="here")
    assert error.value.hint == "Add users."


def test_the_error_counts_the_other_ones() -> None:
    tables = with_change("users", 0) | {"seed": -1, "more": 1}
    with pytest.raises(ConfigError, match=r"\(and 2 more\)"):
        validate(FederationConfig, tables, where="here")


def test_a_deployment_of_fewer_rounds_cannot_speak_for_the_run() -> None:
    privacy = {"deployment": {"users": 1000, "cohort": 100, "rounds": 2}} | FEDERATION["privacy"]
    tables = with_change("federation.rounds", 3) | {"privacy": privacy}
    with pytest.raises(ConfigError, match="a deployment of 2 rounds cannot speak for 3"):
        validate(FederationConfig, tables, where="here")


def test_a_cohort_cannot_exceed_the_users() -> None:
    with pytest.raises(ConfigError, match="cohort 11 is larger than the 10 enrolled users"):
        validate(FederationConfig, with_change("federation.cohort", 11), where="here")


LARGE = {"users": 1000, "cohort": 100}
DELTA = {"delta": 1e-6}
ROTA = {"mechanism": "banded-sqrt", "epsilon": 8, **DELTA}
POISSON = {"mechanism": "gaussian", "epsilon": 1, **DELTA}
NONE = {"mechanism": "none"}
FOLLOWING = {"adaptive_clip": {"largest": 2.0}}


@pytest.mark.parametrize(
    "privacy",
    [
        NONE,
        {**NONE, **FOLLOWING},
        POISSON,
        {"mechanism": "gaussian", "noise_multiplier": 1, **DELTA},
        {**POISSON, "deployment": LARGE},
        {**POISSON, "deployment": {**LARGE, "participations": 3, "rounds": 9}},
        {**POISSON, "participations": 5},
        {**POISSON, "adaptive_clip": {"quantile": 0.3, "rate": 10, "largest": 1.0}},
        ROTA,
        {"mechanism": "banded-sqrt", "noise_multiplier": 1, **DELTA},
        {**ROTA, "participations": 5, "separation": 20},
        {**ROTA, "separation": LARGEST_SEPARATION},
        {**ROTA, "participations": 5, "separation": 20, "deployment": LARGE},
    ],
)
def test_a_privacy_table_that_says_all_is_taken(privacy: dict[str, Any]) -> None:
    assert PrivacyConfig(clip_norm=1.0, **privacy).mechanism == privacy["mechanism"]


@pytest.mark.parametrize(
    ("privacy", "message"),
    [
        ({}, "Field required"),
        ({"mechanism": "laplace"}, "Input should be"),
        ({"mechanism": "gaussian"}, "needs one of"),
        ({"mechanism": "gaussian", "delta": 1e-6}, "needs one of"),
        ({"mechanism": "banded-sqrt", "delta": 1e-6}, "needs one of"),
        ({**POISSON, "noise_multiplier": 1}, "needs one of"),
        ({**ROTA, "noise_multiplier": 1}, "needs one of"),
        ({**POISSON, "delta": None}, "needs delta"),
        ({**ROTA, "delta": None}, "needs delta"),
        ({**POISSON, "epsilon": -1}, "greater than 0"),
        ({**POISSON, "separation": 2}, "keeps no separation"),
        ({**ROTA, **FOLLOWING}, "its clip norm is fixed"),
        ({**POISSON, "adaptive_clip": {"largest": 0.9}}, "larger than adaptive_clip.largest"),
        ({**POISSON, "adaptive_clip": {}}, "adaptive_clip.largest: Field required"),
        ({**POISSON, "adaptive_clip": {"largest": 2, "quantile": 1}}, "less than 1"),
        ({**POISSON, "adaptive_clip": {"largest": 2, "rate": 0}}, "greater than 0"),
        ({**POISSON, "adaptive_clip": {"largest": 2, "rate": 11}}, "less than or equal to 10"),
        ({**POISSON, "adaptive_clip": {"largest": math.inf}}, "finite number"),
        ({**NONE, "epsilon": 1}, "takes no"),
        ({**NONE, "noise_multiplier": 1}, "takes no"),
        ({**NONE, "delta": 1e-6}, "takes no"),
        ({**NONE, "deployment": LARGE}, "takes no"),
        ({**NONE, "participations": 3}, "takes no"),
        ({**NONE, "separation": 3}, "takes no"),
        ({**POISSON, "deployment": {"users": 1}}, "deployment.cohort: Field required"),
        ({**POISSON, "deployment": {"users": 10, "cohort": 11}}, "11 is larger than users 10"),
        ({**POISSON, "deployment": {**LARGE, "participations": 0}}, "greater than or equal to 1"),
    ],
)
def test_a_privacy_table_that_says_too_little_or_too_much_is_refused(
    privacy: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match="^privacy: .*" + message):
        validate(PrivacyConfig, {"clip_norm": 1.0, **privacy}, where="privacy")


@pytest.mark.parametrize("name", WRONG_PATHS)
def test_accountings_that_mislead_are_refused_with_the_reason(name: str) -> None:
    with pytest.raises(ConfigError, match=f"mechanism: {name} is refused: ") as error:
        validate(PrivacyConfig, {"clip_norm": 1.0, **POISSON, "mechanism": name}, where="here")
    assert WRONG_PATHS[name] in str(error.value)


def test_a_deployment_may_leave_its_rule_to_the_run() -> None:
    large = DeploymentConfig(users=1000, cohort=100)
    assert (large.rounds, large.participations) == (None, None)


def test_privacy_has_no_default() -> None:
    with pytest.raises(ConfigError, match="privacy: Field required"):
        validate(Experiment, {}, where="here")


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "no such file"), (b"users = ", "not TOML"), (b"\xff", "not TOML")],
)
def test_an_unreadable_file_is_refused_by_name(
    tmp_path: Path, content: bytes | None, message: str
) -> None:
    path = tmp_path / "federation.toml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=message) as error:
        load_config(FederationConfig, path)
    assert str(path) in str(error.value)


# The device's policy


def test_policy_file_that_is_empty_trusts_nobody(tmp_path: Path) -> None:
    (tmp_path / "policy.toml").write_text("")
    policy = load_config(DevicePolicy, tmp_path / "policy.toml")
    assert policy == DevicePolicy()
    assert policy.server_keys == () and "none" not in policy.mechanisms


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("server_keys", ["A" * 64]),
        ("server_keys", ["a" * 63]),
        ("mechanisms", ["gaussian", "laplace"]),
        *(("smallest_noise_multiplier", value) for value in (-0.1, math.nan, math.inf)),
        *(("largest_clip_norm", value) for value in (0, math.nan, math.inf)),
        *((name, 0) for name in ("smallest_cohort", "participations", "separation")),
        *(("lifetime_epsilon", value) for value in (0, -1, math.nan, math.inf)),
        *(("delta", value) for value in (0, 1, math.nan)),
        ("require_secure_aggregation", "perhaps"),
    ],
)
def test_policy_file_that_bounds_nothing_is_refused(key: str, value: object) -> None:
    name = f"{key}.{len(value) - 1}" if isinstance(value, list) else key
    with pytest.raises(ConfigError, match=f"policy.toml: {name}: "):
        validate(DevicePolicy, {key: value}, where="policy.toml")


def test_policy_file_with_an_unknown_key_is_refused() -> None:
    with pytest.raises(ConfigError, match="unknown key") as caught:
        validate(DevicePolicy, {"lifetime_epsilom": 1}, where="policy.toml")
    assert "lifetime_epsilon" in caught.value.hint


@pytest.mark.parametrize("mode", ["hooks", "ghost"])
def test_ghost_goes_with_float32_alone(mode: str) -> None:
    protected = {"noise_multiplier": 1.0, "grad_sample_mode": mode}
    tables: dict[str, Any] = {"base_model": {"dtype": "bfloat16"}, "example_dp": protected}
    if mode == "hooks":
        validate(DeviceConfig, tables, where="device.toml")
        return
    with pytest.raises(ConfigError, match="ghost cannot bound examples in bfloat16") as error:
        validate(DeviceConfig, tables, where="device.toml")
    assert "hooks" in error.value.hint
    tables["base_model"]["dtype"] = "float32"
    validate(DeviceConfig, tables, where="device.toml")
