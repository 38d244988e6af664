"""Makes protocol_v1.json: messages, keys, cohorts, noise, ledgers and a release, byte for byte.

Another implementation is right when it writes these bytes from these keys and values, and answers
every case with the outcome that stands beside it. Run this file after a change of the protocol that
is meant, together with a new version.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, get_args

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from flwr.app import ConfigRecord

from homefire.client.home import Home
from homefire.common.adapter import AdapterConfig, AdapterSpec, TargetModule
from homefire.common.encoding import canonical_json, digest
from homefire.common.keystore import Keystore
from homefire.common.local_training import LocalTraining
from homefire.common.plan import PlanHeader, PrivacyBlock, RoundPlan, release_digest
from homefire.common.privacy.clipping import STEPS, Clipped, clip_to_grid, is_clipped
from homefire.common.privacy.factorization import coefficients
from homefire.common.privacy.mechanism import (
    BandedSqrt,
    ClippedSum,
    Gaussian,
    Mechanism,
    NoPrivacy,
    Past,
    advance,
    participation_charge,
    privatize,
)
from homefire.common.privacy.randomness import KeyStream, derive_key
from homefire.common.privacy.statement import PrivacyStatement
from homefire.common.protocol import (
    LARGEST_HEADER,
    LOSS_SCALE,
    STATISTICS,
    VERSION,
    ContributionHeader,
    Refusal,
    RefusalReason,
    encode_contribution,
    encode_plan,
    encode_refusal,
)
from homefire.common.signatures import public_key, sign
from homefire.server.aggregator import sum_name
from homefire.server.cohorts import cohort_of
from homefire.server.releases import ReleaseStore
from homefire.server.run_ledger import KIND, RunLedger

FILE = Path(__file__).with_name("protocol_v1.json")
SERVER, DEVICE, OTHER, STRANGER = (
    Ed25519PrivateKey.from_private_bytes(bytes([number]) * 32) for number in range(1, 5)
)
ROSTER = frozenset({public_key(DEVICE), public_key(OTHER)})
NEUTRAL = b"\x01" + bytes(31)
"""The neutral point of the curve: as a key and as a signature's point it fits every message."""
NODE = 2**64 - 1
RUN = "0123456789abcdef" * 2
RUN_KEY = bytes(range(32))
RELEASE = np.array([0.0, -0.5, 1.25, 3e-39], np.float32)
UPDATE_SIZE = 4
CONTRIBUTION = (1, -2, 30_000, -45_000, 4096, 2048, 0)
BANDED = BandedSqrt(1.5, separation=3, participations=2)
MECHANISMS: tuple[Mechanism, ...] = (BANDED, Gaussian(1.5, 0.05, 2), NoPrivacy(0.05))
NOISE_ROUNDS, NOISE_SIZE = 4, 8
XI_DENOMINATOR = 16
"""Makes whole numbers of the correlated noise of four rounds in three bands."""

CANONICAL: tuple[object, ...] = (
    [True, False, None, [], {}, ""],
    [0, -1, 2**64, 1.0, -0.0, 0.1, 100.0],
    [0.0001, 0.00001, 1.5e-5, 1e-10, 5e-324, 2.0**-40],
    [1e15, 9999999999999998.0, 1e16, 1.5e22, 123456789012345680.0, 1.7976931348623157e308],
    ["/", '"\\', "\b\f\n\r\t", "\0\x1f\x7f", "ü“€", "\U0001f525"],
    {"b": 1, "B": 2, "a": {"z": 1, "": 2}, "\U0001f525": 3, "\uffff": 4, "é": 5},
)
"""Values whose canonical text shows a rule of it."""

MODULES = (TargetModule("layers.0.k_proj", 6, 4), TargetModule("layers.0.q_proj", 6, 8))
UPDATES: dict[str, tuple[tuple[float, ...], float]] = {
    "an update that fits": ((0.0625, -0.03125, 1e-6, -0.1), 2.5),
    "an update that is clipped": ((3.0, -4.0, 0.5, 1e-3), 11.999),
    "an update whose squares leave float64": ((3e38, -1e38, 0.0, 1e30), 50.0),
    "no change at all": ((0.0, -0.0, 0.0, 0.0), -1.0),
}
"""Updates with mean training losses."""

NODES = (2**64 - 1, 17, 5, 2**63, 1000, 3, 42)

PAYLOADS: dict[str, tuple[str, tuple[int, ...]]] = {
    "an update and its statistics": ("accepted", CONTRIBUTION),
    "zero": ("accepted", (0,) * 7),
    "a norm of exactly the clip norm": ("accepted", (STEPS, 0, 0, 0, 0, 0, 0)),
    "a norm one step over the clip norm": ("norm", (STEPS, 1, 0, 0, 0, 0, 0)),
    "statistics that do not fit beside the update": ("norm", (0, STEPS, 0, 0, 4096, 0, 0)),
    "a coordinate outside the grid": ("coordinate", (0, 0, -STEPS - 1, 0, 0, 0, 0)),
    "the smallest int32": ("coordinate", (-(2**31), 0, 0, 0, 0, 0, 0)),
    "the bits of a float32 NaN": ("coordinate", (0x7FC00000, 0, 0, 0, 0, 0, 0)),
    "a statistic at its bound": ("accepted", (0, 0, 0, 0, 0, 0, -4096)),
    "a statistic over its bound": ("statistic", (0, 0, 0, 0, 0, 0, -4097)),
    "a coordinate too few": ("length", (0,) * 6),
    "a coordinate too many": ("length", (0,) * 8),
    "nothing": ("length", ()),
}
HEADER_CHANGES: dict[str, tuple[str, dict[str, object]]] = {
    "another round": ("round", {"round": 8}),
    "another run": ("round", {"run": "fedcba9876543210" * 2}),
    "another plan": ("plan", {"plan_digest": "5" * 64}),
    "another payload digest": ("digest", {"payload_digest": "5" * 64}),
    "another node": ("node", {"node": 5}),
    "a key that is not enrolled": ("not enrolled", {"device_key": public_key(STRANGER)}),
    "the key of another enrolled device": ("signature", {"device_key": public_key(OTHER)}),
}


def example_plan(mechanism: Mechanism = BANDED, **changes: Any) -> RoundPlan:
    """A plan for four parameters; `changes` go to its header."""
    fields: dict[str, Any] = {
        "run": RUN,
        "round": 7,
        "server_key": public_key(SERVER),
        "base_model": "a" * 64,
        "adapter": AdapterConfig(rank=2, targets=("q_proj", "v_proj")),
        "adapter_digest": "b" * 64,
        "training": LocalTraining(),
        "privacy": PrivacyBlock.announce(mechanism, clip_norm=0.25, cohort=10),
        "release_digest": release_digest(RELEASE),
    }
    return RoundPlan(PlanHeader(**{**fields, **changes}), RELEASE)


def contribution(plan: RoundPlan, values: tuple[int, ...] = CONTRIBUTION) -> dict[str, Any]:
    """The entries of a signed contribution's record, whether or not it would pass the gate."""
    clipped = Clipped(np.array(values, np.int32), plan.header.privacy.clip_norm, STATISTICS)
    return entries(encode_contribution(plan, clipped, node=NODE, key=DEVICE)["contribution"])


def entries(record: object) -> dict[str, Any]:
    """A record's entries, to read or to change."""
    if not isinstance(record, ConfigRecord):
        raise TypeError(f"{type(record).__name__} is no ConfigRecord")
    return dict(record.items())


def signed_contribution(
    good: dict[str, Any], header: bytes, key: Ed25519PrivateKey = DEVICE
) -> dict[str, Any]:
    """A contribution's record with another header, signed like an honest one."""
    signature = sign(key, "homefire/signed-contribution/v1", header)
    return {**good, "header": header, "signature": signature}


def signed_plan(
    good: dict[str, Any], header: bytes, key: Ed25519PrivateKey = SERVER
) -> dict[str, Any]:
    """A plan's record with another header, signed like an honest one."""
    return {**good, "header": header, "signature": sign(key, "homefire/signed-plan/v1", header)}


def flipped(text: bytes) -> bytes:
    """With its very last bit changed."""
    return text[:-1] + bytes([text[-1] ^ 1])


def contribution_cases(plan: RoundPlan) -> Iterator[dict[str, object]]:
    """Contributions with the outcome that each must have at the gate."""
    for name, (outcome, values) in PAYLOADS.items():
        yield _case(name, outcome, contribution(plan, values))
    good = contribution(plan)
    header = ContributionHeader.model_validate_json(good["header"])
    for name, (outcome, changes) in HEADER_CHANGES.items():
        other = canonical_json(header.model_copy(update=changes).model_dump(mode="json"))
        key = STRANGER if outcome == "not enrolled" else DEVICE
        yield _case(name, outcome, signed_contribution(good, other, key))
    text, signature, payload = good["header"], good["signature"], good["payload"]
    for name, odd in {
        "a header that is not canonical": text + b" ",
        "a header with an entry twice": b'{"round":7,' + text[1:],
        "a header with a number as text": text.replace(b":7,", b':"7",'),
        "a header with an unknown field": text[:-1] + b',"weight":2}',
        "a header that is not JSON": b"{",
    }.items():
        yield _case(name, "malformed", signed_contribution(good, odd))
    moved = sign(DEVICE, "homefire/signed-plan/v1", text)
    for name, outcome, changed in (
        ("a signature with another bit", "signature", {"signature": flipped(signature)}),
        ("a signature made for plans", "signature", {"signature": moved}),
        ("a signature that is too short", "malformed", {"signature": signature[:-1]}),
        ("a payload with another bit", "digest", {"payload": flipped(payload)}),
        ("another version", "malformed", {"version": VERSION + 1}),
    ):
        yield _case(name, outcome, {**good, **changed})


def plan_cases(plan: RoundPlan) -> Iterator[dict[str, object]]:
    """Plans with the outcome that each must have on a device, before its policy is asked."""
    for mechanism in MECHANISMS:
        name = f"a plan with {type(mechanism).__name__}"
        yield _case(name, "accepted", entries(encode_plan(example_plan(mechanism), SERVER)))
    good = entries(encode_plan(plan, SERVER))
    text, signature, release = good["header"], good["signature"], good["release"]
    for name, odd in {
        "a header that is not canonical": text + b"\n",
        "a header with an entry twice": b'{"round":9,' + text[1:],
        "a header with an unknown field": text.replace(b'"run":', b'"rum":1,"run":'),
        "a number that has no canonical form": text.replace(b":1.5,", b":1e400,"),
        "noise without its multiplier": text.replace(b":1.5,", b":null,"),
        "a rota with a sampling rate": text.replace(b'rate":null', b'rate":0.5'),
        "the name of another mechanism": text.replace(b"banded-sqrt", b"laplace"),
    }.items():
        yield _case(name, "malformed", signed_plan(good, odd))
    unsigned = text.replace(public_key(SERVER).encode(), NEUTRAL.hex().encode())
    for name, outcome, changed in (
        ("the key of nobody", "signature", {"header": unsigned, "signature": NEUTRAL + bytes(32)}),
        ("signed by another key than the one it names", "signature", signed_plan({}, text, OTHER)),
        ("a signature made for contributions", "signature", signed_contribution({}, text, SERVER)),
        ("a signature with another bit", "signature", {"signature": flipped(signature)}),
        ("a header with another bit", "signature", {"header": text.replace(b":7,", b":6,")}),
        ("a signature that is too long", "malformed", {"signature": signature + b"\0"}),
        ("another release", "malformed", {"release": flipped(release)}),
        ("a release that is cut", "malformed", {"release": release[:-4]}),
        ("another version", "malformed", {"version": VERSION + 1}),
    ):
        yield _case(name, outcome, {**good, **changed})
    yield _long_header(good)


def _long_header(good: dict[str, Any]) -> dict[str, object]:
    """In canonical form, signed, and one byte longer than what is parsed."""
    before, after = good["header"].split(b"q_proj")
    times = LARGEST_HEADER + 1 - len(before) - len(after)
    record = signed_plan(good, before + b"q" * times + after)
    case = _case("a header that is too long", "malformed", record)
    return case | {"header": [[before.hex(), 1], [b"q".hex(), times], [after.hex(), 1]]}


def refusals() -> Iterator[dict[str, object]]:
    """A refusal for each reason."""
    for reason in get_args(RefusalReason):
        refusal = Refusal(reason=reason, detail=f"“{reason}”: ü")
        record = entries(encode_refusal(refusal)["refusal"])
        yield {"reason": reason, "detail": refusal.detail} | _written(record)


def noise(mechanism: Mechanism) -> Iterator[dict[str, object]]:
    """Four rounds of noise on known sums, from the run key to what is released."""
    past: Past = ()
    for number in range(1, NOISE_ROUNDS + 1):
        values = np.arange(NOISE_SIZE, dtype=np.int64) * 1000 * number - 3500
        total = ClippedSum(values, 0.25)
        named = sum_name(total, RUN_KEY, RUN, number)
        parts = bytes.fromhex(RUN), number.to_bytes(8, "little"), bytes.fromhex(named)
        key = derive_key(RUN_KEY, "homefire/round-noise/v1", *parts)
        # Without a past nothing is taken back: the fresh noise alone.
        fresh = advance(mechanism, NOISE_SIZE, KeyStream(key), ())
        noisy, past = privatize(total, mechanism, KeyStream(key), past)
        secret = {
            "z": [int(value) for vector in fresh for value in vector],
            "xi": [int(value * XI_DENOMINATOR) for vector in past[:1] for value in vector],
        }
        yield {
            "round": number,
            "sum": values.tolist(),
            "sum_digest": digest("homefire/sum/v1", values.astype("<i8").tobytes()),
            "sum_name": named,
            "key": key.hex(),
            **(secret if fresh else {}),
            "noisy": noisy.tolist(),
        }


def ledger(folder: Path) -> dict[str, object]:
    """A device's ledger: its lines and its anchor."""
    kind, keystore = "participations-" + "0123456789abcdef" * 2, Keystore(folder / "device.keys")
    took_part = {"run": RUN, "adapter_digest": "b" * 64, "rule": "c" * 64, "plan_digest": "d" * 64}
    entries: list[dict[str, Any]] = [
        {**took_part, "round": 7, "charge": 0.25, "example_dp": None},
        {**took_part, "round": 9, "charge": None, "example_dp": None},
        {"note": "ü “quoted”", "numbers": [1e-300, -0.0, 2**63]},
    ]
    path = folder / "participations.jsonl"
    with keystore.open_ledger(path, kind) as opened:
        start = opened.anchor.head
        for entry in entries:
            keystore.keep_anchor(kind, opened.append(entry))
    return {"entries": entries} | _stored_ledger(path, keystore, kind, start)


def run_ledger(folder: Path) -> dict[str, object]:
    """A server's ledger: a round that was released, two that were burnt, the end."""
    keystore, path = Keystore(folder / "server.keys"), folder / "ledger.jsonl"
    run = RunLedger.open(path, keystore)
    start = run.anchor.head
    run.start({"run": RUN, "rounds": 3, "users": 7, "cohort": 2})
    run.open_round(1)
    run.lose_amplification(1)
    run.record_sum(1, "1" * 64)
    run.open_round(2)
    run.burn(2)
    run.open_round(3)
    run.record_sum(3, "3" * 64)
    run.burn(3)
    run.end()
    run.ledger.close()
    return _stored_ledger(path, keystore, KIND, start)


def _stored_ledger(path: Path, keystore: Keystore, name: str, start: str) -> dict[str, object]:
    lines = path.read_text(encoding="ascii").splitlines()
    anchor = keystore.anchor(name)
    stored = keystore.get(name)
    if anchor is None or stored is None:
        raise ValueError(f"{name} has no anchor")
    files = {"lines": lines, "anchor": stored.decode("ascii")}
    return {"kind": name, "start": start, **files, "head": anchor.head}


def release(folder: Path) -> dict[str, object]:
    """A signed release: what is said about it, its vector, and the file that holds both."""
    statement = PrivacyStatement(
        mechanism="banded-sqrt",
        noise_multiplier=1.5,
        clip_norm=0.25,
        delta=1e-5,
        rounds=14,
        expected_cohort=10,
        sampling_rate=None,
        participations=2,
        separation=3,
        participation="an example",
        epsilon_release=3.5,
        epsilon_known_cohort=3.5,
    )
    about = {
        "run": RUN,
        "base_model": "a" * 64,
        "adapter_digest": "b" * 64,
        "start": {"run": "fedcba9876543210" * 2, "round": 9, "digest": "d" * 64},
        "privacy": statement.to_json(),
        "deployment": None,
        "ledger": {"length": 3, "head": "e" * 64},
    }
    written = ReleaseStore(folder).write(7, RELEASE, about, SERVER)
    return {
        "about": written.about,
        "vector": RELEASE.astype("<f4").tobytes().hex(),
        "file": (folder / "000007.safetensors").read_bytes().hex(),
    }


def clipping() -> Iterator[dict[str, object]]:
    """What a device makes of an update and a loss; the last one has too few records."""
    for name, (values, mean_loss) in UPDATES.items():
        update = np.array(values, np.float32)
        loss = min(max(mean_loss, 0.0), LOSS_SCALE) / LOSS_SCALE
        long = is_clipped(update, clip_norm=0.25, statistics=STATISTICS)
        shares = np.array([1.0, loss, -1.0 if long else 1.0])
        clipped = clip_to_grid(update, shares, clip_norm=0.25)
        stored = update.astype("<f4").tobytes().hex()
        yield {"name": name, "update": stored, "mean_loss": mean_loss} | _grid(clipped)
    zeros = clip_to_grid(np.zeros(UPDATE_SIZE), np.zeros(STATISTICS), clip_norm=0.25)
    yield {"name": "too few records", "update": None, "mean_loss": None} | _grid(zeros)


def _grid(clipped: Clipped) -> dict[str, object]:
    return {"values": clipped.values.tolist(), "payload": clipped.payload.hex()}


def adapters() -> Iterator[dict[str, object]]:
    """Adapters of two layers: the digest, and the tensors in the order of the vector."""
    for config in (
        AdapterConfig(rank=2, targets=("q_proj", "k_proj"), seed=2**63),
        AdapterConfig(method="lora", rank=3, alpha=16, targets="all-linear"),
    ):
        spec = AdapterSpec(config, MODULES, ("k_proj", "q_proj"))
        yield {
            "config": config.model_dump(mode="json"),
            "modules": [[m.name, m.in_features, m.out_features] for m in MODULES],
            "digest": spec.digest,
            "slots": [[slot.module, slot.factor, *slot.shape, slot.start] for slot in spec.slots],
        }


def cohorts() -> dict[str, object]:
    """Who is asked in five rounds, by draw and by rota."""
    order = sorted(NODES)
    mechanisms: dict[str, Mechanism] = {
        "gaussian": Gaussian(1.5, 0.4),
        "none, everybody": NoPrivacy(1.0),
        "banded-sqrt": BANDED,
    }
    asked: dict[str, object] = {}
    for name, mechanism in mechanisms.items():
        asked[name] = [
            cohort_of(number, order, mechanism, cohort=3, run_key=RUN_KEY) for number in range(1, 6)
        ]
    return {
        "run_key": RUN_KEY.hex(),
        "nodes": NODES,
        "nodes_digest": digest("homefire/nodes/v1", canonical_json(order)),
        "roster_digest": digest("homefire/roster/v1", canonical_json(sorted(ROSTER))),
        "sampling_rate": 0.4,
        "cohort": 3,
        "asked": asked,
    }


def derived_keys(folder: Path) -> dict[str, object]:
    """Keys that no other example needs."""
    root, seed = bytes([9]) * 32, 2**63 - 1
    home = Home(folder / "home")
    home.keystore.put("devices", root)
    purposes = ("homefire/example-dp/draws/v1", "homefire/example-dp/noise/v1")
    run_key = derive_key(seed.to_bytes(32, "little"), "homefire/reproducible-run/v1")
    return {
        "run without privacy": {"seed": seed, "key": run_key.hex()},
        "device": {
            "secret": root.hex(),
            "user": "ann ü",
            "public": public_key(home.identity("ann ü")),
        },
        "example-level privacy": {
            "secret": root.hex(),
            **{purpose: derive_key(root, purpose).hex() for purpose in purposes},
        },
    }


def _case(name: str, outcome: str, record: dict[str, Any]) -> dict[str, object]:
    return {"name": name, "outcome": outcome} | _written(record)


def _written(record: dict[str, Any]) -> dict[str, object]:
    return {key: v.hex() if isinstance(v, bytes) else v for key, v in record.items()}


def render() -> str:
    """The text of protocol_v1.json."""
    plan = example_plan()
    keys = {"server": SERVER, "device": DEVICE, "other device": OTHER, "stranger": STRANGER}
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        stored = {
            "ledger": ledger(folder),
            "run_ledger": run_ledger(folder),
            "release": release(folder / "releases"),
            "derived_keys": derived_keys(folder),
        }
    content = {
        "about": {
            "bytes": "in hex; or a list of pieces, each with how many times it stands there",
            "outcomes": "the reasons of the gate; of plans: accepted, signature, malformed",
            "z": "fresh noise in 2^-20 grid steps",
            "xi": f"correlated noise in 2^-20 / {XI_DENOMINATOR} grid steps",
            "noisy": "in grid steps",
        },
        "keys": {
            name: {"secret": key.private_bytes_raw().hex(), "public": public_key(key)}
            for name, key in keys.items()
        },
        "roster": sorted(ROSTER),
        "sender": NODE,
        "update_size": UPDATE_SIZE,
        "clip_norm": plan.header.privacy.clip_norm,
        "canonical": [
            {"value": value, "text": canonical_json(value).decode("ascii")} for value in CANONICAL
        ],
        "adapters": list(adapters()),
        "plan_digest": plan.digest,
        "rules": [
            block.model_dump(mode="json") | {"rule": block.rule}
            for block in (example_plan(mechanism).header.privacy for mechanism in MECHANISMS)
        ],
        "charges": [participation_charge(mechanism) for mechanism in MECHANISMS[:2]],
        "contribution_values": CONTRIBUTION,
        "clipping": list(clipping()),
        "plans": list(plan_cases(plan)),
        "contributions": list(contribution_cases(plan)),
        "refusals": list(refusals()),
        "cohorts": cohorts(),
        "coefficients": coefficients(20),
        "noise": {
            "run": RUN,
            "run_key": RUN_KEY.hex(),
            "noise_multiplier": 1.5,
            "separation": 3,
            "banded-sqrt": list(noise(BANDED)),
            "gaussian": list(noise(Gaussian(1.5, 0.05))),
        },
        **stored,
    }
    return json.dumps(content, indent=1)


if __name__ == "__main__":
    FILE.write_text(f"{render()}\n", encoding="utf-8")
