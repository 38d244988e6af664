"""T6: answers that are no contributions, from devices that are enrolled and sign them well."""

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from homefire.common.encoding import canonical_json, digest
from homefire.common.plan import RoundPlan
from homefire.common.protocol import STATISTICS, VERSION, ContributionHeader
from homefire.common.signatures import public_key, sign

Values = npt.NDArray[np.generic]
INFLATED = 1 << 22
"""Bytes of a payload that is far too long."""


@dataclass(frozen=True, slots=True)
class HostileDevice:
    """An enrolled device under an attacker's control.

    Attributes:
        plan: What it was asked.
        node: Its Flower node.
        key: Its enrolled key.
    """

    plan: RoundPlan
    node: int
    key: Ed25519PrivateKey

    @property
    def length(self) -> int:
        """The number of values that a right contribution has."""
        return len(self.plan.release) + STATISTICS

    def entries(self, payload: bytes) -> dict[str, int | bytes]:
        """The entries of a contribution, right and signed, whatever its payload."""
        header = ContributionHeader(
            run=self.plan.header.run,
            round=self.plan.header.round,
            node=self.node,
            device_key=public_key(self.key),
            plan_digest=self.plan.digest,
            payload_digest=digest("homefire/contribution/v1", payload),
        )
        text = canonical_json(header.model_dump(mode="json"))
        signature = sign(self.key, "homefire/signed-contribution/v1", text)
        return {"version": VERSION, "header": text, "signature": signature, "payload": payload}

    def send(self, payload: bytes) -> RecordDict:
        """Any bytes as a contribution."""
        return RecordDict({"contribution": ConfigRecord({**self.entries(payload)})})

    @property
    def zeros(self) -> RecordDict:
        """A right contribution that says nothing."""
        return self.send(bytes(4 * self.length))


def wrong_numbers(device: HostileDevice) -> dict[str, RecordDict]:
    """Numbers that float arithmetic would choke on, in the wrong type or of the wrong length."""
    n = device.length
    ones = np.ones(n)
    payloads: dict[str, Values] = {
        "nan": np.full(n, np.nan, "<f4"),
        "infinity": np.full(n, -np.inf, "<f4"),
        "huge float": np.full(n, 3e38, "<f4"),
        "huge integer": np.full(n, 2**31 - 1, "<i4"),
        "smallest integer": np.full(n, -(2**31), "<i4"),
        "other byte order": np.full(n, 4097, ">i4"),
        "float32": ones.astype("<f4"),
        "float64": ones.astype("<f8"),
        "int64": ones.astype("<i8"),
        "int16": ones.astype("<i2"),
        "one too many": np.ones(n + 1, "<i4"),
        "one too few": np.ones(n - 1, "<i4"),
        "none": np.ones(0, "<i4"),
    }
    return {name: device.send(values.tobytes()) for name, values in payloads.items()}


def wrong_files(device: HostileDevice, trap: Path) -> dict[str, RecordDict]:
    """File formats that unpack to more than they are, or that run code."""
    packed = io.BytesIO()
    np.savez_compressed(packed, np.zeros(INFLATED, np.int8))
    pickled = pickled_array(trap)
    objects = Array(dtype="object", shape=(1,), stype="numpy.ndarray", data=pickled)
    return {
        "npz": device.send(packed.getvalue()),
        "npz of the right length": device.send(packed.getvalue()[: 4 * device.length]),
        "pickle": device.send(pickled),
        "object array": RecordDict({"contribution": ArrayRecord({"values": objects})}),
        "inflated": device.send(bytes(INFLATED)),
    }


def wrong_records(device: HostileDevice) -> dict[str, RecordDict]:
    """Records of another kind, with other keys, or beside what was asked."""
    good = device.entries(bytes(4 * device.length))
    arrays = [np.zeros(device.length - STATISTICS, np.float32), np.full(STATISTICS, 50, "<f4")]
    names = ["update", "statistics"]
    swapped = dict(zip(reversed(names), map(Array, arrays), strict=True))
    metrics = MetricRecord({"num-examples": 10**9, "loss": 0.1})
    deep = b"[" * 60_000 + b"]" * 5_000
    return {
        "swapped arrays": RecordDict({"contribution": ArrayRecord(swapped)}),
        "swapped entries": _record({**good, "header": good["payload"], "payload": good["header"]}),
        "extra entry": _record({**good, "num-examples": 10**9}),
        "extra record": RecordDict({"contribution": ConfigRecord({**good}), "metrics": metrics}),
        "two contributions": RecordDict({n: ConfigRecord({**good}) for n in ("contribution", "b")}),
        "another name": RecordDict({"arrays": ConfigRecord({**good})}),
        "metrics alone": RecordDict({"contribution": metrics}),
        "nothing": RecordDict(),
        "list for bytes": RecordDict(
            {"contribution": ConfigRecord({**good, "payload": [b"", b""]})}
        ),
        "truth for version": _record({**good, "version": True}),
        "deep header": _record({**good, "header": deep}),
        "long header": _record({**good, "header": b" " * (1 << 20)}),
        "header of no text": _record({**good, "header": b"\xff\xfe"}),
    }


def pickled_array(trap: Path) -> bytes:
    """A numpy file that makes the file `trap` where it is loaded with pickles allowed."""
    file = io.BytesIO()
    values = np.empty(1, object)
    values[0] = _Trap(trap)
    np.save(file, values, allow_pickle=True)
    return file.getvalue()


class _Trap:
    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return Path.touch, (self._path,)


def _record(entries: dict[str, int | bytes]) -> RecordDict:
    return RecordDict({"contribution": ConfigRecord({**entries})})
