"""Golden vectors: regenerated bit for bit, and right by a second computation."""

import json
import math
import struct
from fractions import Fraction
from itertools import pairwise
from typing import Any, get_args

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from flwr.app import ConfigRecord, RecordDict
from vectors.generate import FILE, UPDATE_SIZE, XI_DENOMINATOR, example_plan, render

from homefire.common.encoding import canonical_json, digest
from homefire.common.errors import ProtocolError, RejectedContributionError, SignatureError
from homefire.common.plan import RoundPlan
from homefire.common.privacy.factorization import coefficients
from homefire.common.privacy.randomness import derive_key
from homefire.common.protocol import (
    LARGEST_HEADER,
    RefusalReason,
    decode_contribution,
    decode_plan,
    decode_refusal,
)
from homefire.server.aggregator import noise_stream
from homefire.server.releases import Release

mpmath = pytest.importorskip("mpmath")
VECTORS: dict[str, Any] = json.loads(FILE.read_text(encoding="utf-8"))
NOISE = VECTORS["noise"]
SIGNED = Ed25519PublicKey.from_public_bytes(bytes.fromhex(VECTORS["keys"]["server"]["public"]))
GRID = 1 << 16
FINER = 1 << 20
ENTRIES = {"version", "header", "signature", "release", "payload"}


def record(name: str, case: dict[str, Any]) -> RecordDict:
    """A case as the message that it describes."""
    pieces = {key: case[key] for key in case.keys() & ENTRIES}
    return RecordDict({name: ConfigRecord({k: unhex(v) for k, v in pieces.items()})})


def unhex(value: Any) -> Any:
    match value:
        case str():
            return bytes.fromhex(value)
        case list():
            return b"".join(bytes.fromhex(piece) * times for piece, times in value)
        case _:
            return value


def outcome_of_plan(case: dict[str, Any]) -> str:
    try:
        decode_plan(record("plan", case))
    except SignatureError:
        return "signature"
    except ProtocolError:
        return "malformed"
    return "accepted"


def outcome_of_contribution(case: dict[str, Any], plan: RoundPlan) -> str:
    try:
        decode_contribution(
            record("contribution", case),
            plan,
            size=VECTORS["update_size"],
            sender=VECTORS["sender"],
            roster=set(VECTORS["roster"]),
        )
    except RejectedContributionError as error:
        return error.reason
    return "accepted"


def test_golden_vectors_are_what_the_generator_makes() -> None:
    assert FILE.read_text(encoding="utf-8") == f"{render()}\n"


# Messages


@pytest.mark.parametrize("case", VECTORS["plans"], ids=lambda case: str(case["name"]))
def test_golden_plans_have_their_outcomes(case: dict[str, Any]) -> None:
    assert outcome_of_plan(case) == case["outcome"]


def test_golden_plan_is_read() -> None:
    case = VECTORS["plans"][0]
    plan = decode_plan(record("plan", case))
    assert plan.digest == VECTORS["plan_digest"] and plan.header == example_plan().header
    assert struct.pack("<4f", *plan.release).hex() == case["release"]
    assert plan.header.privacy.clip_norm == VECTORS["clip_norm"]


def test_golden_plan_is_signed_as_the_protocol_says() -> None:
    case = VECTORS["plans"][0]
    named = bytes.fromhex(digest("homefire/signed-plan/v1", bytes.fromhex(case["header"])))
    SIGNED.verify(bytes.fromhex(case["signature"]), named)


def test_golden_rules_leave_out_the_clip_norm_alone() -> None:
    for block in VECTORS["rules"]:
        fixed = {key: value for key, value in block.items() if key not in ("clip_norm", "rule")}
        assert block["rule"] == digest("homefire/privacy-rule/v1", canonical_json(fixed))
    assert len({block["rule"] for block in VECTORS["rules"]}) == 3


def test_golden_long_header_has_nothing_wrong_but_its_length(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (case,) = (case for case in VECTORS["plans"] if isinstance(case["header"], list))
    assert len(unhex(case["header"])) == LARGEST_HEADER + 1
    monkeypatch.setattr("homefire.common.protocol.LARGEST_HEADER", LARGEST_HEADER + 1)
    assert outcome_of_plan(case) == "accepted"


def test_golden_contributions_have_their_outcomes() -> None:
    plan = decode_plan(record("plan", VECTORS["plans"][0]))
    cases = VECTORS["contributions"]
    outcomes = {case["name"]: outcome_of_contribution(case, plan) for case in cases}
    assert outcomes == {case["name"]: case["outcome"] for case in cases}
    assert len(outcomes) == len(cases)
    gate = {"malformed", "length", "round", "plan", "node", "not enrolled", "signature", "digest"}
    assert set(outcomes.values()) == {"accepted", "coordinate", "statistic", "norm"} | gate


def test_golden_contribution_is_read() -> None:
    plan = decode_plan(record("plan", VECTORS["plans"][0]))
    content = record("contribution", VECTORS["contributions"][0])
    roster, sender = set(VECTORS["roster"]), VECTORS["sender"]
    read = decode_contribution(content, plan, size=UPDATE_SIZE, sender=sender, roster=roster)
    assert read.clipped.values.tolist() == VECTORS["contribution_values"]
    assert read.clipped.clip_norm == VECTORS["clip_norm"]
    assert read.device_key == VECTORS["keys"]["device"]["public"]


def test_golden_refusals_are_read_one_for_each_reason() -> None:
    for case in VECTORS["refusals"]:
        refusal = decode_refusal(record("refusal", case))
        assert refusal is not None
        assert (refusal.reason, refusal.detail) == (case["reason"], case["detail"])
    assert [case["reason"] for case in VECTORS["refusals"]] == list(get_args(RefusalReason))


# Noise


def words(key: str, count: int) -> list[int]:
    stream = Cipher(algorithms.ChaCha20(bytes.fromhex(key), bytes(16)), mode=None).encryptor()
    return list(struct.unpack(f"<{count}Q", stream.update(bytes(8 * count))))


def exact_gaussian(key: str, count: int) -> list[Any]:
    """Box-Muller in forty digits, on the uniform numbers that float64 makes of the words."""
    uniform = [mpmath.mpf((float(word) + 0.5) / 2.0**64) for word in words(key, count)]
    first, second = uniform[: count // 2], uniform[count // 2 :]
    radius = [mpmath.sqrt(-2 * mpmath.log(u)) for u in first]
    pairs = list(zip(radius, second, strict=True))
    return [r * mpmath.cos(2 * mpmath.pi * u) for r, u in pairs] + [
        r * mpmath.sin(2 * mpmath.pi * u) for r, u in pairs
    ]


@pytest.mark.parametrize(("name", "unit"), [("banded-sqrt", GRID * FINER), ("gaussian", GRID)])
def test_golden_fresh_noise_is_the_same_whatever_the_last_bits(name: str, unit: int) -> None:
    # Processors may differ in the last bit of a logarithm; these numbers are far enough from where
    # they are rounded that it does not show.
    with mpmath.workdps(40):
        for entry in NOISE[name]:
            fresh = entry.get("z") or np.subtract(entry["noisy"], entry["sum"]).tolist()
            exact = exact_gaussian(entry["key"], len(fresh))
            for value, number in zip(fresh, exact, strict=True):
                scaled = number * (NOISE["noise_multiplier"] * unit)
                assert abs(scaled - value) < 0.5 - 2.0**-10


def test_golden_correlated_noise_takes_back_what_it_should() -> None:
    c = [Fraction(math.comb(2 * j, j), 4**j) for j in range(NOISE["separation"])]
    rounds = NOISE["banded-sqrt"]
    xi = [[Fraction(x, XI_DENOMINATOR) for x in entry["xi"]] for entry in rounds]
    for t, entry in enumerate(rounds):
        for i, z in enumerate(entry["z"]):
            assert sum(c[j] * xi[t - j][i] for j in range(min(t + 1, len(c)))) == z
            rounded = round(xi[t][i] / FINER)
            assert entry["noisy"][i] == entry["sum"][i] + rounded
    assert len(rounds) == len(c) + 1  # once, something has left the bands


def test_golden_noise_comes_from_the_run_key_and_the_sum() -> None:
    run_key = bytes.fromhex(NOISE["run_key"])
    for name in ("banded-sqrt", "gaussian"):
        for entry in NOISE[name]:
            packed = struct.pack(f"<{len(entry['sum'])}q", *entry["sum"])
            assert entry["sum_digest"] == digest("homefire/sum/v1", packed)
            parts = NOISE["run"], entry["round"].to_bytes(8, "little").hex(), entry["sum_digest"]
            context = [bytes.fromhex(part) for part in parts]
            named = derive_key(run_key, "homefire/sum-name/v1", *context)
            assert entry["sum_name"] == named.hex()
            stream = noise_stream(run_key, NOISE["run"], entry["round"], named.hex())
            assert stream.words(9).tolist() == words(entry["key"], 9)


def test_golden_coefficients_are_those_of_the_square_root() -> None:
    stored = VECTORS["coefficients"]
    assert stored == list(coefficients(len(stored)))
    for j, value in enumerate(stored):
        assert value == pytest.approx(math.comb(2 * j, j) / 4**j, rel=1e-15)


# Ledger and release


def test_golden_ledger_is_chained_as_its_description_says() -> None:
    ledger = VECTORS["ledger"]
    heads = [digest("homefire/ledger/v1", ledger["kind"].encode())]
    for number, (entry, line) in enumerate(zip(ledger["entries"], ledger["lines"], strict=True), 1):
        parts = bytes.fromhex(heads[-1]), number.to_bytes(8, "little"), canonical_json(entry)
        heads.append(digest("homefire/ledger-entry/v1", *parts))
        content = {"digest": heads[-1], "entry": entry, "number": number, "previous": heads[-2]}
        assert line == canonical_json(content).decode()
    assert (heads[0], heads[-1]) == (ledger["start"], ledger["head"])
    assert all(one != other for one, other in pairwise(heads))


def test_golden_release_is_signed() -> None:
    about = dict(VECTORS["release"]["about"])
    vector = np.frombuffer(bytes.fromhex(VECTORS["release"]["vector"]), "<f4").astype(np.float32)
    Release(about["round"], vector, about).verify(VECTORS["keys"]["server"]["public"])
    assert about["digest"] == digest("homefire/release/v1", vector.tobytes())
    signature = bytes.fromhex(about.pop("signature"))
    named = bytes.fromhex(digest("homefire/signed-release/v1", canonical_json(about)))
    SIGNED.verify(signature, named)
