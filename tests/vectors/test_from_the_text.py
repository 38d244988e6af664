"""A second reader, from docs/PROTOCOL.md alone: nothing of homefire is imported here.

What the text says is enough to read and to write the golden vectors, byte for byte.
"""

import hashlib
import hmac
import json
import math
import re
import struct
from base64 import urlsafe_b64encode
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parent.parent
VECTORS: dict[str, Any] = json.loads((FOLDER / "protocol_v1.json").read_text(encoding="utf-8"))
PUBLIC_A: dict[str, Any] = json.loads((FOLDER / "public_a_v1.json").read_text(encoding="utf-8"))
TEXT = (ROOT / "docs" / "PROTOCOL.md").read_text(encoding="utf-8")

Floats = npt.NDArray[np.float64]
Check = Callable[[Any], bool]


def section(title: str) -> str:
    """The text under a heading."""
    (found,) = re.findall(rf"^## {title}\n(.*?)(?=^## |\Z)", TEXT, re.MULTILINE | re.DOTALL)
    return str(found)


def first_cells(title: str) -> set[str]:
    """What stands in code marks in the first column of a section's tables."""
    rows = re.findall(r"^\| ([^|]*) \|", section(title), re.MULTILINE)
    return {name for row in rows for name in re.findall(r"`([^`]+)`", row)}


# Canonical JSON, digests, keys, words


def canonical(value: object) -> bytes:
    match value:
        case None | bool():
            return {None: b"null", True: b"true", False: b"false"}[value]
        case int():
            return str(value).encode()
        case float():
            return canonical_number(value).encode()
        case str():
            return ('"' + "".join(map(escaped, value)) + '"').encode("ascii")
        case list():
            return b"[" + b",".join(map(canonical, value)) + b"]"
        case dict():
            pairs = sorted(value.items(), key=lambda pair: [ord(letter) for letter in pair[0]])
            return b"{" + b",".join(canonical(k) + b":" + canonical(v) for k, v in pairs) + b"}"
        case _:
            raise TypeError(type(value).__name__)


def canonical_number(value: float) -> str:
    if not math.isfinite(value):
        raise ValueError("neither NaN nor infinity")
    if value == 0 or 1e-4 <= abs(value) < 1e16:
        return np.format_float_positional(value, unique=True, trim="0")
    return np.format_float_scientific(value, unique=True, trim="-", exp_digits=2)


def escaped(letter: str) -> str:
    if letter in (short := {'"': '"', "\\": "\\"} | dict(zip("\b\f\n\r\t", "bfnrt", strict=True))):
        return "\\" + short[letter]
    if " " <= letter <= "~":
        return letter
    units = letter.encode("utf-16-be")
    return "".join(f"\\u{high:02x}{low:02x}" for high, low in zip(*[iter(units)] * 2, strict=True))


def framed(label: str, parts: tuple[bytes, ...]) -> bytes:
    return label.encode() + b"\0" + b"".join(struct.pack("<Q", len(p)) + p for p in parts)


def digest(label: str, *parts: bytes) -> str:
    return hashlib.sha256(framed(label, parts)).hexdigest()


def key(secret: bytes, purpose: str, *parts: bytes) -> bytes:
    extracted = hmac.digest(bytes(32), secret, "sha256")
    return hmac.digest(extracted, framed(purpose, parts) + b"\x01", "sha256")


def words(secret: bytes, count: int) -> list[int]:
    """The first words of a key's stream."""
    stream = Cipher(algorithms.ChaCha20(secret, bytes(16)), mode=None).encryptor()
    return list(struct.unpack(f"<{count}Q", stream.update(bytes(8 * count))))


def bernoulli(secret: bytes, count: int, rate: float) -> list[bool]:
    return [word < math.floor(rate * 2**64) for word in words(secret, count)]


def normal(secret: bytes, count: int) -> Floats:
    half = math.ceil(count / 2)
    uniform = uniform_of(words(secret, 2 * half))
    return polar(uniform[:half], uniform[half:])[:count]


def uniform_of(drawn: list[int]) -> Floats:
    return (np.array(drawn, np.uint64).astype(np.float64) + 0.5) / 2.0**64


def polar(for_radii: Floats, for_angles: Floats) -> Floats:
    radii, angles = np.sqrt(-2 * np.log(for_radii)), 2 * np.pi * for_angles
    return np.concatenate([radii * np.cos(angles), radii * np.sin(angles)])


def test_canonical_text_is_written_by_its_rules() -> None:
    for case in VECTORS["canonical"]:
        assert canonical(case["value"]) == case["text"].encode()
        assert json.dumps(case["value"], sort_keys=True, separators=(",", ":")) == case["text"]


def test_derived_keys() -> None:
    keys = VECTORS["derived_keys"]
    plain, device = keys["run without privacy"], keys["device"]
    seed = plain["seed"].to_bytes(32, "little")
    assert key(seed, "homefire/reproducible-run/v1").hex() == plain["key"]
    seed = key(bytes.fromhex(device["secret"]), "homefire/device-identity/v1", "ann ü".encode())
    assert device["user"] == "ann ü"
    assert public_half(Ed25519PrivateKey.from_private_bytes(seed)) == device["public"]
    single = keys["example-level privacy"]
    for purpose in ("homefire/example-dp/draws/v1", "homefire/example-dp/noise/v1"):
        assert key(bytes.fromhex(single["secret"]), purpose).hex() == single[purpose]


def test_labels_of_the_code_are_in_the_text() -> None:
    files = [
        path for name in ("client", "common", "server") for path in (ROOT / name).rglob("*.py")
    ]
    source = "".join(path.read_text(encoding="utf-8") for path in files)
    labels = set(re.findall(r"homefire/[a-z/-]+/v\d+", source)) - {"homefire/example/v1"}
    assert len(labels) > 20
    assert labels == set(re.findall(r"`(homefire/[a-z/-]+/v\d+)`", TEXT))


# Signatures


def public_half(secret: Ed25519PrivateKey) -> str:
    return secret.public_key().public_bytes_raw().hex()


def secret_of(name: str) -> Ed25519PrivateKey:
    return Ed25519PrivateKey.from_private_bytes(bytes.fromhex(VECTORS["keys"][name]["secret"]))


def sign(secret: Ed25519PrivateKey, label: str, part: bytes) -> bytes:
    return secret.sign(bytes.fromhex(digest(label, part)))


def is_signed(signer: str, signature: bytes, label: str, part: bytes) -> bool:
    raw = bytes.fromhex(signer)
    if has_small_order(raw):
        return False
    try:
        Ed25519PublicKey.from_public_bytes(raw).verify(
            signature, bytes.fromhex(digest(label, part))
        )
    except InvalidSignature:
        return False
    return True


def has_small_order(raw: bytes) -> bool:
    """Whether doubling a point of edwards25519 three times gives the neutral one."""
    field = 2**255 - 19
    d = -121665 * pow(121666, -1, field)
    y = int.from_bytes(raw, "little") % 2**255
    for _ in range(3):
        x_squared = (y * y - 1) * pow(d * y * y + 1, -1, field)
        y = (y * y + x_squared) * pow(2 - y * y + x_squared, -1, field) % field
    return y == 1


def test_keys_are_those_of_their_secrets_and_of_no_small_order() -> None:
    for name, pair in VECTORS["keys"].items():
        assert public_half(secret_of(name)) == pair["public"]
        assert not has_small_order(bytes.fromhex(pair["public"]))
    assert all(has_small_order(bytes([y]) + bytes(31)) for y in (0, 1))


# Headers


def integer(low: int, high: int | None = None) -> Check:
    return lambda value: type(value) is int and low <= value and (high is None or value <= high)


def number(low: float, high: float = math.inf, *, above: bool = False) -> Check:
    return lambda v: type(v) is float and low <= v <= high and not (above and v == low)


def digits(count: int) -> Check:
    return lambda value: (
        isinstance(value, str) and bool(re.fullmatch(f"[0-9a-f]{{{count}}}", value))
    )


def one_of(*values: object) -> Check:
    return lambda value: any(type(value) is type(v) and value == v for v in values)


def is_targets(value: Any) -> bool:
    names = isinstance(value, list) and all(isinstance(name, str) for name in value)
    return value in ("auto", "all-linear") or names


NULL = one_of(None)
POSITIVE = number(0, above=True)
ROUND = integer(1, 2**63 - 1)
RATE = number(0, 1, above=True)
ADAPTER: dict[str, Check] = {
    "method": one_of("ffa", "lora"),
    "rank": integer(1, 256),
    "alpha": integer(1, 65_536),
    "targets": is_targets,
    "seed": integer(0),
}
TRAINING: dict[str, Check] = {
    "steps": integer(1, 10_000),
    "batch_size": integer(1, 1024),
    "max_tokens": integer(4, 65_536),
    "learning_rate": POSITIVE,
    "optimizer": one_of("sgd", "adamw"),
    "max_gradient_norm": number(0),
    "seed": integer(0),
}
MECHANISMS: dict[str, dict[str, Check]] = {
    "gaussian": {
        "noise_multiplier": number(2**-40, 2**20),
        "sampling_rate": RATE,
        "participations": lambda value: value is None or integer(1)(value),
        "separation": NULL,
    },
    "banded-sqrt": {
        "noise_multiplier": number(2**-40, 2**12),
        "sampling_rate": NULL,
        "participations": integer(1),
        "separation": integer(1, 65_536),
    },
    "none": {
        "noise_multiplier": NULL,
        "sampling_rate": RATE,
        "participations": NULL,
        "separation": NULL,
    },
}
CONTRIBUTION: dict[str, Check] = {
    "run": digits(32),
    "round": ROUND,
    "node": integer(0, 2**64 - 1),
    "device_key": digits(64),
    "plan_digest": digits(64),
    "payload_digest": digits(64),
}


def fits(value: Any, keys: Mapping[str, Check]) -> bool:
    whole = isinstance(value, dict) and set(value) == set(keys)
    return whole and all(check(value[name]) for name, check in keys.items())


def is_privacy(value: Any) -> bool:
    if not isinstance(value, dict) or value.get("mechanism") not in [*MECHANISMS]:
        return False
    common = {
        "mechanism": one_of(*MECHANISMS),
        "clip_norm": POSITIVE,
        "expected_cohort": integer(1),
    }
    return fits(value, common | MECHANISMS[value["mechanism"]])


PLAN: dict[str, Check] = {
    "run": digits(32),
    "round": ROUND,
    "server_key": digits(64),
    "base_model": digits(64),
    "adapter": lambda value: fits(value, ADAPTER),
    "adapter_digest": digits(64),
    "training": lambda value: fits(value, TRAINING),
    "privacy": is_privacy,
    "release_digest": digits(64),
}
REFUSAL: dict[str, Check] = {
    "reason": one_of(*first_cells("Refusal")),
    "detail": lambda value: isinstance(value, str) and len(value) <= 500,
}


def header_of(text: bytes, keys: Mapping[str, Check]) -> dict[str, Any] | None:
    """A header, or None where it is none."""
    try:
        header = json.loads(text) if len(text) <= 65_536 else None
        return header if fits(header, keys) and canonical(header) == text else None
    except ValueError:
        return None


def unhex(value: Any) -> bytes:
    pieces = [(value, 1)] if isinstance(value, str) else value
    return b"".join(bytes.fromhex(piece) * times for piece, times in pieces)


def test_keys_of_a_plan_are_in_the_text() -> None:
    header = json.loads(unhex(VECTORS["plans"][0]["header"]))
    nested = [name for name, value in header.items() if isinstance(value, dict)]
    assert nested == ["adapter", "privacy", "training"]
    assert set(header).union(*(header[name] for name in nested)) <= first_cells("Plan")


# Messages


def outcome_of_plan(case: dict[str, Any]) -> str:
    signature, release = unhex(case["signature"]), unhex(case["release"])
    header = header_of(unhex(case["header"]), PLAN)
    if type(case["version"]) is not int or case["version"] != 1 or len(signature) != 64:
        return "malformed"
    if header is None:
        return "malformed"
    if not is_signed(
        header["server_key"], signature, "homefire/signed-plan/v1", unhex(case["header"])
    ):
        return "signature"
    whole = len(release) % 4 == 0
    named = digest("homefire/release/v1", release) == header["release_digest"]
    return "accepted" if whole and named else "malformed"


def outcome_of_contribution(case: dict[str, Any], plan: dict[str, Any], named: str) -> str:
    payload, signature = unhex(case["payload"]), unhex(case["signature"])
    if type(case["version"]) is not int or case["version"] != 1:
        return "malformed"
    if len(payload) != 4 * (VECTORS["update_size"] + 3):
        return "length"
    header = header_of(unhex(case["header"]), CONTRIBUTION)
    if len(signature) != 64 or header is None:
        return "malformed"
    values = struct.unpack(f"<{len(payload) // 4}i", payload)
    signed = is_signed(
        header["device_key"], signature, "homefire/signed-contribution/v1", unhex(case["header"])
    )
    checks = {
        "round": (header["run"], header["round"]) == (plan["run"], plan["round"]),
        "plan": header["plan_digest"] == named,
        "node": header["node"] == VECTORS["sender"],
        "not enrolled": header["device_key"] in VECTORS["roster"],
        "signature": signed,
        "digest": header["payload_digest"] == digest("homefire/contribution/v1", payload),
        "coordinate": max(map(abs, values)) <= 2**16,
        "statistic": max(map(abs, values[-3:])) <= 4096,
        "norm": sum(value * value for value in values) <= 2**32,
    }
    return next((reason for reason, passed in checks.items() if not passed), "accepted")


@pytest.mark.parametrize("case", VECTORS["plans"], ids=lambda case: str(case["name"]))
def test_plans_have_their_outcomes(case: dict[str, Any]) -> None:
    assert outcome_of_plan(case) == case["outcome"]


@pytest.mark.parametrize("case", VECTORS["contributions"], ids=lambda case: str(case["name"]))
def test_contributions_have_their_outcomes(case: dict[str, Any]) -> None:
    text = unhex(VECTORS["plans"][0]["header"])
    named = digest("homefire/plan/v1", text)
    assert named == VECTORS["plan_digest"]
    assert outcome_of_contribution(case, json.loads(text), named) == case["outcome"]
    assert case["outcome"] in first_cells("Contribution") | {"accepted"}


def test_refusals_are_read_and_written() -> None:
    for case in VECTORS["refusals"]:
        expected = {name: case[name] for name in ("reason", "detail")}
        assert header_of(unhex(case["header"]), REFUSAL) == expected
        assert canonical(expected) == unhex(case["header"])
    assert {case["reason"] for case in VECTORS["refusals"]} == first_cells("Refusal")


def test_a_plan_is_written_byte_for_byte() -> None:
    case = VECTORS["plans"][0]
    written = canonical(json.loads(unhex(case["header"])))
    signature = sign(secret_of("server"), "homefire/signed-plan/v1", written)
    assert (written.hex(), signature.hex()) == (case["header"], case["signature"])


def test_a_contribution_is_written_byte_for_byte() -> None:
    case, plan = VECTORS["contributions"][0], json.loads(unhex(VECTORS["plans"][0]["header"]))
    payload = struct.pack("<7i", *VECTORS["contribution_values"])
    header = canonical(
        {
            "run": plan["run"],
            "round": plan["round"],
            "node": VECTORS["sender"],
            "device_key": public_half(secret_of("device")),
            "plan_digest": VECTORS["plan_digest"],
            "payload_digest": digest("homefire/contribution/v1", payload),
        }
    )
    signature = sign(secret_of("device"), "homefire/signed-contribution/v1", header)
    expected = [case[name] for name in ("payload", "header", "signature")]
    assert [payload.hex(), header.hex(), signature.hex()] == expected


def test_rules_and_charges_follow_from_the_privacy_block() -> None:
    for block in VECTORS["rules"]:
        fixed = {name: v for name, v in block.items() if name not in ("clip_norm", "rule")}
        assert digest("homefire/privacy-rule/v1", canonical(fixed)) == block["rule"]
    charges = [
        sum(c * c for c in coefficients(block["separation"] or 1)) / block["noise_multiplier"] ** 2
        for block in VECTORS["rules"][:2]
    ]
    assert charges == pytest.approx(VECTORS["charges"], rel=1e-15)


# What a device makes of an update


def payload_of(update: Floats, mean_loss: float, clip_norm: float) -> bytes:
    bound, norm = math.sqrt(1 - 3 / 256), math.hypot(*(update / clip_norm))
    shares = update / clip_norm
    if norm > bound:
        shares = shares * (bound * (1 - 2**-32) / norm)
    loss = min(max(mean_loss / 12, 0), 1)
    statistics = [4096, math.trunc(4096 * loss), 4096 if norm <= bound else -4096]
    values = [math.trunc(2**16 * share) for share in shares] + statistics
    return struct.pack(f"<{len(values)}i", *values)


def test_updates_become_their_payloads() -> None:
    *trained, short = VECTORS["clipping"]
    for case in trained:
        update = np.frombuffer(bytes.fromhex(case["update"]), "<f4").astype(np.float64)
        payload = payload_of(update, case["mean_loss"], VECTORS["clip_norm"])
        assert payload.hex() == case["payload"], case["name"]
        assert struct.pack(f"<{len(case['values'])}i", *case["values"]) == payload
        assert sum(value * value for value in case["values"]) <= 2**32
    assert short["name"] == "too few records"
    assert bytes.fromhex(short["payload"]) == bytes(4 * (VECTORS["update_size"] + 3))


# Adapter


def test_adapters_have_their_digest_and_their_order() -> None:
    for case in VECTORS["adapters"]:
        spec = {"config": case["config"], "modules": case["modules"]}
        assert fits(case["config"], ADAPTER)
        assert digest("homefire/adapter-spec/v1", canonical(spec)) == case["digest"]
        rank, slots, start = case["config"]["rank"], [], 0
        for name, inputs, outputs in sorted(case["modules"]):
            shapes = {"A": (rank, inputs), "B": (outputs, rank)}
            for factor in ("B",) if case["config"]["method"] == "ffa" else ("A", "B"):
                rows, columns = shapes[factor]
                slots.append([name, factor, rows, columns, start])
                start += rows * columns
        assert slots == case["slots"]


def public_a(seed: int, name: str, rows: int, columns: int) -> list[Floats]:
    count = 2 * math.ceil(rows * columns / 2)
    label = b"homefire/public-a/v1\0" + str(seed).encode() + b"\0" + name.encode()
    uniform = uniform_of(
        list(struct.unpack(f"<{count}Q", hashlib.shake_256(label).digest(8 * count)))
    )
    drawn = polar(uniform[0::2], uniform[1::2])[: rows * columns].reshape(rows, columns)
    basis: list[Floats] = []
    for row in drawn:
        for other in basis:
            row = row - (row @ other) * other
        basis.append(row / np.linalg.norm(row))
    return basis


def test_public_matrices_follow_from_the_seed() -> None:
    for case in PUBLIC_A["cases"]:
        found = public_a(case["seed"], case["name"], case["rows"], case["columns"])
        np.testing.assert_allclose(found, case["values"], atol=1e-6)


# The server's secrets


def coefficients(bands: int) -> list[float]:
    c = [1.0]
    for j in range(1, bands):
        c.append(c[-1] * (2 * j - 1) / (2 * j))
    return c


def round_key(entry: dict[str, Any]) -> bytes:
    noise, number = VECTORS["noise"], struct.pack("<Q", entry["round"])
    run_key, run = bytes.fromhex(noise["run_key"]), bytes.fromhex(noise["run"])
    values = digest("homefire/sum/v1", struct.pack(f"<{len(entry['sum'])}q", *entry["sum"]))
    name = key(run_key, "homefire/sum-name/v1", run, number, bytes.fromhex(values))
    assert (values, name.hex()) == (entry["sum_digest"], entry["sum_name"])
    return key(run_key, "homefire/round-noise/v1", run, number, name)


def test_independent_noise_is_drawn_from_the_run_key() -> None:
    for entry in VECTORS["noise"]["gaussian"]:
        assert round_key(entry).hex() == entry["key"]
        fresh = normal(round_key(entry), len(entry["sum"]))
        noise = np.rint(VECTORS["noise"]["noise_multiplier"] * 2**16 * fresh).astype(int)
        assert (np.array(entry["sum"]) + noise).tolist() == entry["noisy"]


def test_correlated_noise_is_drawn_from_the_run_key() -> None:
    c = coefficients(VECTORS["noise"]["separation"])
    xi: list[Floats] = []
    for entry in VECTORS["noise"]["banded-sqrt"]:
        fresh = normal(round_key(entry), len(entry["sum"]))
        noise = np.rint(VECTORS["noise"]["noise_multiplier"] * 2**36 * fresh)
        assert noise.tolist() == entry["z"]
        for j in range(1, min(len(c), len(xi) + 1)):
            noise = noise - c[j] * xi[-j]
        xi.append(noise)
        assert (16 * noise).tolist() == entry["xi"]
        rounded = np.rint(noise / 2**20).astype(int)
        assert (np.array(entry["sum"]) + rounded).tolist() == entry["noisy"]


def test_coefficients() -> None:
    assert coefficients(20) == VECTORS["coefficients"]


def test_cohorts_are_drawn_and_take_turns() -> None:
    given = VECTORS["cohorts"]
    order, n = sorted(given["nodes"]), given["cohort"]
    assert digest("homefire/nodes/v1", canonical(order)) == given["nodes_digest"]
    roster = canonical(sorted(VECTORS["roster"]))
    assert digest("homefire/roster/v1", roster) == given["roster_digest"]
    for t in range(1, 6):
        secret = key(bytes.fromhex(given["run_key"]), "homefire/cohort/v1", struct.pack("<Q", t))
        drawn = bernoulli(secret, len(order), given["sampling_rate"])
        turns = [order[i % len(order)] for i in range((t - 1) * n, t * n)]
        taken = [node for node, taken in zip(order, drawn, strict=True) if taken]
        expected = {"gaussian": taken, "none, everybody": order, "banded-sqrt": turns}
        assert {name: rounds[t - 1] for name, rounds in given["asked"].items()} == expected


# Ledgers


def entries_of(stored: dict[str, Any]) -> list[dict[str, Any]]:
    """The entries of a ledger whose chain and anchor are right."""
    head = digest("homefire/ledger/v1", stored["kind"].encode())
    assert head == stored["start"]
    entries: list[dict[str, Any]] = []
    for number, line in enumerate(stored["lines"], 1):
        entry = json.loads(line)["entry"]
        parts = bytes.fromhex(head), struct.pack("<Q", number), canonical(entry)
        content = {"previous": head, "number": number, "entry": entry}
        head = digest("homefire/ledger-entry/v1", *parts)
        assert canonical(content | {"digest": head}).decode() == line
        entries.append(entry)
    length = struct.pack("<Q", len(entries))
    name = stored["kind"].encode()
    check = digest("homefire/anchor/v1", name, length, bytes.fromhex(head))
    anchor = {"digest": check, "head": head, "length": len(entries)}
    assert canonical(anchor).decode() == stored["anchor"]
    assert head == stored["head"]
    return entries


def can_follow(entry: dict[str, Any], before: list[dict[str, Any]]) -> bool:
    """Whether a server may write an entry after others."""
    if not before:
        return bool(entry["kind"] == "start")
    seen = {(other["kind"], other.get("round")) for other in before}
    newest = sum(other["kind"] == "open" for other in before)  # they count from 1
    settled = newest == 0 or bool({("sum", newest), ("burnt", newest)} & seen)
    current = entry.get("round") == newest > 0
    allowed = {
        "open": entry.get("round") == newest + 1 <= before[0]["rounds"] and settled,
        "sum": current and not settled,
        "burnt": current and ("burnt", newest) not in seen,
        "unamplified": current and "unamplified" not in {kind for kind, _ in seen},
        "end": True,
    }
    return bool(allowed.get(entry["kind"], False)) and ("end", None) not in seen


def test_a_device_ledger_is_chained_and_anchored() -> None:
    entries = entries_of(VECTORS["ledger"])
    assert entries == VECTORS["ledger"]["entries"]
    keys = {"run", "round", "plan_digest", "adapter_digest", "rule", "example_dp", "charge"}
    assert all(set(entry) == keys for entry in entries[:2])
    assert keys <= first_cells("Ledgers")


def test_a_server_ledger_is_chained_anchored_and_in_order() -> None:
    entries = entries_of(VECTORS["run_ledger"])
    for at, entry in enumerate(entries):
        assert can_follow(entry, entries[:at])
        assert not can_follow(entry, entries)
    kinds = {entry["kind"] for entry in entries}
    assert kinds == {"start", "open", "sum", "unamplified", "burnt", "end"}
    assert kinds <= first_cells("Ledgers")
    assert not can_follow({"kind": "open", "round": 4}, entries[:-1])
    assert not can_follow({"kind": "open", "round": 3}, entries[:5])


# Release


def test_a_release_is_verified_from_its_file() -> None:
    stored = VECTORS["release"]
    file = bytes.fromhex(stored["file"])
    (size,) = struct.unpack_from("<Q", file)
    header = json.loads(file[8 : 8 + size])
    start, stop = header["vector"]["data_offsets"]
    vector = file[8 + size :][start:stop]
    assert set(header) == {"__metadata__", "vector"} and header["vector"]["dtype"] == "F32"
    assert vector.hex() == stored["vector"] and header["vector"]["shape"] == [len(vector) / 4]
    named, _, text = header["__metadata__"]["homefire"].partition(" ")
    assert named == digest("homefire/vector-file/v1", b"release", text.encode(), vector)
    about = json.loads(text)
    assert about == stored["about"] and set(about) <= first_cells("Release")
    assert about["digest"] == digest("homefire/release/v1", vector)
    signature = about.pop("signature")
    label, trusted = "homefire/signed-release/v1", VECTORS["keys"]["server"]["public"]
    assert about["server_key"] == trusted
    assert is_signed(trusted, bytes.fromhex(signature), label, canonical(about))
    assert sign(secret_of("server"), label, canonical(about)).hex() == signature
    assert not is_signed(trusted, bytes.fromhex(signature), label, canonical(about | {"round": 8}))


def test_what_a_release_states_is_in_the_text() -> None:
    stated = set(VECTORS["release"]["about"]["privacy"])
    assert stated <= set(re.findall(r"`([a-z_]+)`", section("Release")))


# Registry

PUBLISHED: dict[str, Any] = json.loads((FOLDER / "releases_v1.json").read_text(encoding="utf-8"))


def text_of(case: dict[str, Any]) -> bytes:
    text = case["text"]
    whole = text if isinstance(text, str) else "".join(piece * times for piece, times in text)
    return whole.encode("ascii")


def keys_of(kind: str) -> set[str]:
    """The keys that a statement of the registry has, by the text's tables."""
    title = {"release": "release statement", "latest": "statement of the newest release"}[kind]
    _, _, rest = section("Registry").partition(f"| {title} | value |\n| --- | --- |\n")
    rows = re.findall(r"^\| ([^|]*) \|", rest.partition("\n\n")[0], re.MULTILINE)
    return {name for row in rows for name in re.findall(r"`([^`]+)`", row)}


def is_statement(case: dict[str, Any]) -> bool:
    """Whether a text that is signed is what it must be."""
    text = text_of(case)
    if len(text) > 32_768:
        return False
    try:
        read = json.loads(text)
    except ValueError:
        return False
    if not isinstance(read, dict) or canonical(read) != text or set(read) != keys_of(case["kind"]):
        return False
    if type(read["number"]) is not int or read["number"] < 1:
        return False
    if read["expires_at"] <= read["issued_at"]:
        return False
    return case["kind"] == "latest" or states_its_privacy(read["privacy"])


def states_its_privacy(privacy: dict[str, Any]) -> bool:
    epsilons = [privacy["epsilon_release"], privacy["epsilon_known_cohort"]]
    if privacy["mechanism"] == "none":
        return epsilons == [None, None]
    said = [privacy["noise_multiplier"], privacy["delta"], *epsilons]
    return all(type(value) is float for value in said)


@pytest.mark.parametrize("case", PUBLISHED["cases"], ids=lambda case: str(case["name"]))
def test_statements_of_a_registry_have_their_outcomes(case: dict[str, Any]) -> None:
    trusted, signature = PUBLISHED["key"]["public"], bytes.fromhex(case["signature"])
    labels = {
        "release": "homefire/signed-release-statement/v1",
        "latest": "homefire/signed-latest/v1",
    }
    text, outcome = text_of(case), "signature"
    if len(signature) == 64 and is_signed(trusted, signature, labels[case["kind"]], text):
        outcome = "malformed"
        if is_statement(case):
            named = json.loads(text)["server_key"] == trusted
            outcome = "accepted" if named else "signature"
    assert outcome == case["outcome"]


def test_a_statement_names_its_file_its_vector_and_itself() -> None:
    statement, file = PUBLISHED["statement"], bytes.fromhex(PUBLISHED["file"])
    assert set(statement) == keys_of("release")
    assert statement["file_digest"] == hashlib.sha256(file).hexdigest()
    assert statement["file_size"] == len(file)
    (size,) = struct.unpack_from("<Q", file)
    start, stop = json.loads(file[8 : 8 + size])["vector"]["data_offsets"]
    vector = file[8 + size :][start:stop]
    assert statement["release_digest"] == digest("homefire/release/v1", vector)
    assert PUBLISHED["digest"] == digest("homefire/release-statement/v1", canonical(statement))
    first, newest = (json.loads(text_of(case)) for case in PUBLISHED["cases"][:2])
    assert first == statement
    assert newest["statement_digest"] == PUBLISHED["digest"]
    assert newest["expires_at"] - newest["issued_at"] == 86_400


# Enrolment

ENROLMENTS: dict[str, Any] = json.loads((FOLDER / "enrolments_v1.json").read_text(encoding="utf-8"))


def keys_of_enrolment(what: str) -> set[str]:
    """The keys of a ticket or a request, by the text's tables."""
    _, _, rest = section("Enrolment").partition(f"| {what} | value |\n| --- | --- |\n")
    rows = re.findall(r"^\| ([^|]*) \|", rest.partition("\n\n")[0], re.MULTILINE)
    return {name for row in rows for name in re.findall(r"`([^`]+)`", row)}


def test_a_ticket_is_written_byte_for_byte() -> None:
    fields = ENROLMENTS["fields"]
    assert set(fields) == keys_of_enrolment("ticket")
    assert ENROLMENTS["ticket"] == f"homefire1.{urlsafe_b64encode(canonical(fields)).decode()}"
    assert ENROLMENTS["digest"] == digest("homefire/ticket/v1", bytes.fromhex(fields["secret"]))


FORMS_OF_A_REQUEST = {
    "secret": "[0-9a-f]{64}",
    "identity": "[0-9a-f]{64}",
    "node_key": "-----BEGIN PUBLIC KEY-----\\n[^-]*-----END PUBLIC KEY-----\\n",
    "signature": "[0-9a-f]{128}",
}


def outcome_of_request(wanted: dict[str, Any]) -> str:
    if type(wanted.get("version")) is not int or wanted["version"] != 1:
        return "version"
    for name, form in FORMS_OF_A_REQUEST.items():
        if not isinstance(wanted.get(name), str) or not re.fullmatch(form, wanted[name]):
            return "malformed"
    secret = bytes.fromhex(digest("homefire/ticket/v1", bytes.fromhex(wanted["secret"])))
    said = framed("homefire/enrolment/v1", (secret, wanted["node_key"].encode()))
    try:
        Ed25519PublicKey.from_public_bytes(bytes.fromhex(wanted["identity"])).verify(
            bytes.fromhex(wanted["signature"]), hashlib.sha256(said).digest()
        )
    except InvalidSignature:
        return "signature"
    return "enrolled" if wanted["secret"] == ENROLMENTS["issued"][0] else "ticket"


@pytest.mark.parametrize("case", ENROLMENTS["cases"], ids=lambda case: str(case["name"]))
def test_requests_have_their_outcomes(case: dict[str, Any]) -> None:
    assert outcome_of_request(case["request"]) == case["outcome"]
    assert set(ENROLMENTS["cases"][0]["request"]) == keys_of_enrolment("request")
