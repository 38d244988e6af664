"""What a vault costs, against the same store without encryption."""

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from transformers import AutoTokenizer

from homefire.client import vault_records
from homefire.client.assistant import NOTES, note_of
from homefire.client.database import Database
from homefire.client.personalize.prompt import assemble
from homefire.client.vault import create, open_vault
from homefire.client.vault_records import Records
from homefire.common.privacy.randomness import new_key
from homefire.common.records import Record
from homefire.simulations.benchmarks.tiny_model import make_model

RECORDS, QUICK_RECORDS = 100_000, 5_000
QUESTIONS = 200
WORDS, ZIPF = 30_000, 1.1
PASSPHRASE = "only for the measurement"  # noqa: S105
ROOM = 512


class _PlainDatabase(Database):
    """The same without encryption."""

    def _unlock(self, connection: object, key: bytes) -> None:
        """No key: SQLCipher is then SQLite."""


@dataclass(frozen=True, slots=True)
class Store:
    """One kind of store.

    Attributes:
        import_seconds: Of all records, in one transaction.
        search_ms: Median of one search.
        search_p95_ms: The slowest twentieth is slower.
        mib: On the disk.
    """

    import_seconds: float
    search_ms: float
    search_p95_ms: float
    mib: float


def measure(count: int, say: Callable[[str], None]) -> dict[str, Any]:
    """Measure both stores on the same records and questions, and a whole vault.

    Args:
        count: Records.
        say: Told what begins.
    """
    records = list(made_up(count))
    questions = [record.text for record in made_up(QUESTIONS, seed=1)]
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        stores = {}
        for name, kind in (("plain", _PlainDatabase), ("encrypted", Database)):
            say(f"{count:,} records, {name}")
            stores[name] = _measure_store(kind, work / f"{name}.db", records, questions)
        say("a vault")
        vault = _measure_vault(work, records, questions)
    plain, encrypted = stores["plain"], stores["encrypted"]
    return {
        "records": count,
        "stores": {name: asdict(store) for name, store in stores.items()},
        "ratio_import": encrypted.import_seconds / plain.import_seconds,
        "ratio_search": encrypted.search_ms / plain.search_ms,
        **vault,
    }


def made_up(count: int, *, seed: int = 0) -> Iterator[Record]:
    """Records of words whose frequencies fall as those of a language do (Zipf)."""
    draw = np.random.default_rng(seed)
    odds = 1 / np.arange(1, WORDS + 1) ** ZIPF
    odds /= odds.sum()
    for number in range(count):
        words = draw.choice(WORDS, size=int(draw.integers(5, 40)), p=odds)
        text = " ".join(f"w{word}" for word in words)
        yield Record(text, None, f"{2000 + number % 25}-01-01")


def _measure_store(
    kind: type[Database], path: Path, records: Sequence[Record], questions: Sequence[str]
) -> Store:
    database = kind(path, new_key(), bytes(16), make=True)
    database.migrate((vault_records.SCHEMA,))
    kept = Records(database)
    started = time.perf_counter()
    kept.add(records, "measured")
    imported = time.perf_counter() - started
    times = sorted(_timed(partial(kept.search, each, NOTES)) for each in questions)
    database.compact_log()
    size = path.stat().st_size / 2**20
    database.close()
    slow = times[int(0.95 * len(times))]
    return Store(imported, 1e3 * median(times), 1e3 * slow, size)


def _measure_vault(
    work: Path, records: Sequence[Record], questions: Sequence[str]
) -> dict[str, float]:
    """Opening by a passphrase, and from a question to a prompt."""
    tokenizer = AutoTokenizer.from_pretrained(make_model(work / "model"))
    folder = work / "home"
    with create(folder, passphrase=PASSPHRASE) as vault:
        vault.records.add(records, "measured")
    opened = []
    for _ in range(3):
        started = time.perf_counter()
        vault = open_vault(folder, passphrase=PASSPHRASE)
        opened.append(time.perf_counter() - started)
        vault.close()
    with open_vault(folder, passphrase=PASSPHRASE) as vault:

        def to_prompt(question: str) -> None:
            found = [note_of(stored) for stored in vault.records.search(question, NOTES)]
            messages = [{"role": "user", "content": question}]
            assemble(tokenizer, messages, found, room=ROOM)  # type: ignore[arg-type]

        times = sorted(_timed(partial(to_prompt, each)) for each in questions)
    return {
        "open_seconds": median(opened),
        "prompt_ms": 1e3 * median(times),
        "prompt_p95_ms": 1e3 * times[int(0.95 * len(times))],
    }


def _timed(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started
