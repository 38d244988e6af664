"""Registries that lie: whatever they answer, a device keeps what it has or takes what was signed.

The registry of these tests holds the certificate that the device trusts, but not the server's key;
what the key signed it can only have collected.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path

import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from tiny_registries import (
    CONFIG,
    IMPATIENT,
    KEY,
    SPEC,
    STRANGER,
    TRUSTED,
    Hostile,
    chunks_of,
    fit,
    hostile,
    make_certificates,
    open_registry,
    run_of,
    vector,
)
from tiny_vaults import make_vault

from homefire.client import keys
from homefire.client.personalize.recipe import SHARED
from homefire.client.registry_link import Patience
from homefire.client.trust import trust
from homefire.client.updates import update
from homefire.client.vault import Vault
from homefire.common import registry_pb2 as wire
from homefire.common.encoding import canonical_json
from homefire.common.errors import (
    DamagedReleaseError,
    ForgedReleaseError,
    OlderReleaseError,
    RegistryAnswerError,
    UnfitReleaseError,
    UnreachableRegistryError,
    UpdateError,
)
from homefire.common.registry_calls import LARGEST_ANSWER
from homefire.common.release_statement import (
    LATEST_LABEL,
    RELEASE_LABEL,
    LatestStatement,
    ReleaseStatement,
    Signed,
    sign_statement,
)
from homefire.common.signatures import public_key, sign
from homefire.server.registry_folder import DAY
from homefire.server.registry_service import Tls

QUICK = Patience(call_seconds=20, download_seconds=60, attempts=1, pause_seconds=0.01)
Answer = Callable[[], wire.LatestReply | bytes]
Chunks = Callable[[wire.DownloadRequest], Iterator[wire.Chunk]]


@dataclass(frozen=True)
class Loot:
    """What was collected from an honest registry: statements, words of the newest, files."""

    latest: tuple[Signed, ...]
    statements: tuple[Signed, ...]
    parsed: tuple[ReleaseStatement, ...]
    files: tuple[bytes, ...]

    def reply(self, latest: int, release: int) -> wire.LatestReply:
        """An answer put together from these."""
        return reply(self.latest[latest], self.statements[release])

    def honest(self, number: int) -> Answer:
        """What an honest registry answered when this release was its newest."""
        return lambda: self.reply(number - 1, number - 1)

    def sent(self, number: int) -> Chunks:
        """What an honest registry sends."""
        return lambda request: chunks_of(self.files[number - 1], start=request.offset)


def reply(latest: Signed, release: Signed) -> wire.LatestReply:
    return wire.LatestReply(latest=wired(latest), release=wired(release), now=int(time.time()))


def wired(signed: Signed) -> wire.Signed:
    return wire.Signed(text=signed.text, signature=signed.signature)


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tls]:
    return make_certificates(tmp_path_factory.mktemp("tls"))


@pytest.fixture(scope="module")
def loot(tmp_path_factory: pytest.TempPathFactory) -> Loot:
    """Of three releases, each of which was the newest for a while."""
    home = tmp_path_factory.mktemp("server")
    folder, store = open_registry(home), run_of(home / "run")
    words, published = [], []
    for number in (1, 2, 3):
        published.append(folder.publish(store, number, SPEC))
        latest = folder.latest()
        assert latest is not None
        words.append(latest[0])
    return Loot(
        tuple(words),
        tuple(each.signed for each in published),
        tuple(each.statement for each in published),
        tuple(each.file.read_bytes() for each in published),
    )


@pytest.fixture(scope="module")
def vault(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Vault]:
    """One that was never updated; nothing in this file changes that but where it says so."""
    with pytest.MonkeyPatch.context() as patch:
        slow = keys._new_argon2
        cheap = {"iterations": 1, "lanes": 1, "memory_kib": 8192}

        def quick(protection: keys.Protection) -> keys.Argon2 | None:
            made = slow(protection)
            return made and made.model_copy(update=cheap)

        patch.setattr(keys, "_new_argon2", quick)
        with make_vault(tmp_path_factory.mktemp("device") / "vault") as opened:
            yield opened


def asked(
    vault: Vault, tls: tuple[Path, Tls], latest: Answer, chunks: Chunks, *, patience: Patience
) -> Hostile:
    """Let the device update from a hostile registry."""
    registry = Hostile(latest, chunks)
    with hostile(registry, tls[1]) as address:
        trust(vault, TRUSTED, address, root_certificates=tls[0])
        update(vault, fit, patience=patience)
    return registry


def refused(
    vault: Vault,
    tls: tuple[Path, Tls],
    error: type[UpdateError],
    *,
    latest: Answer,
    chunks: Chunks,
    match: str | None = None,
    patience: Patience = QUICK,
) -> UpdateError:
    """The error of an update that changed nothing."""
    before = state(vault)
    with pytest.raises(error, match=match) as raised:
        asked(vault, tls, latest, chunks, patience=patience)
    assert state(vault) == before
    assert raised.value.hint
    return raised.value


def state(vault: Vault) -> tuple[bytes | None, int]:
    """The shared adapter in place, and how often one was accepted."""
    worn = vault.adapters.worn(SHARED)
    kept = None if worn is None else vault.adapters.vector(SHARED, worn.version).tobytes()
    return kept, len(vault.log.entries("updated"))


# Statements


def never(request: wire.DownloadRequest) -> Iterator[wire.Chunk]:
    yield pytest.fail("nothing of this may be downloaded")


def changed(signed: Signed, old: bytes, new: bytes) -> Signed:
    assert old in signed.text
    return replace(signed, text=signed.text.replace(old, new))


def test_unsigned_or_wrongly_signed_statements_are_refused(
    vault: Vault, tls: tuple[Path, Tls], loot: Loot
) -> None:
    word, statement = loot.latest[2], loot.statements[2]
    strange = sign(STRANGER, RELEASE_LABEL, statement.text)
    crossed = sign(KEY, LATEST_LABEL, statement.text)
    for latest, release in (
        (replace(word, signature=b""), statement),
        (word, replace(statement, signature=b"")),
        (word, replace(statement, signature=bytes(64))),
        (word, replace(statement, signature=strange)),
        (word, replace(statement, signature=crossed)),
        (changed(word, b'"number":3', b'"number":4'), statement),
        (word, changed(statement, b'"round":3', b'"round":4')),
        (word, changed(statement, b'"epsilon_release":3.5', b'"epsilon_release":0.5')),
        (word, Signed(statement.text + b" ", statement.signature)),
        (statement, word),
    ):
        refused(
            vault,
            tls,
            ForgedReleaseError,
            latest=lambda latest=latest, release=release: reply(latest, release),  # type: ignore[misc]
            chunks=never,
        )


def test_another_registrys_own_statements_are_refused(
    vault: Vault, tls: tuple[Path, Tls], loot: Loot
) -> None:
    """All of it in order, under a key that the device does not trust."""
    own = loot.parsed[2].model_copy(update={"server_key": public_key(STRANGER)})
    word = LatestStatement(
        number=3,
        statement_digest=own.digest,
        server_key=public_key(STRANGER),
        issued_at=int(time.time()),
        expires_at=int(time.time()) + DAY,
    )
    signed = sign_statement(word, STRANGER), sign_statement(own, STRANGER)
    refused(vault, tls, ForgedReleaseError, latest=lambda: reply(*signed), chunks=never)
    # A statement that names a key which did not sign it, though the trusted one did.
    named = word.model_copy(update={"server_key": public_key(STRANGER)})
    text = canonical_json(named.model_dump(mode="json"))
    mixed = Signed(text, sign(KEY, LATEST_LABEL, text))
    answer = reply(mixed, loot.statements[2])
    refused(vault, tls, ForgedReleaseError, latest=lambda: answer, chunks=never)


@pytest.mark.parametrize(("latest", "release"), [(2, 0), (2, 1), (0, 2)])
def test_statements_that_do_not_belong_together_are_refused(
    vault: Vault, tls: tuple[Path, Tls], loot: Loot, latest: int, release: int
) -> None:
    answer = loot.reply(latest, release)
    refused(vault, tls, RegistryAnswerError, latest=lambda: answer, chunks=never, match="newest")


def test_a_swapped_adapter_or_base_model_is_refused(
    vault: Vault, tls: tuple[Path, Tls], loot: Loot
) -> None:
    """Even where the trusted key signed it."""
    other = CONFIG.model_copy(update={"rank": 3})
    size = loot.parsed[2].file_size
    for swap in (
        {"base_model": "b" * 64},
        {"adapter_digest": "b" * 64},
        {"adapter": other},
        {"file_size": size + (1 << 20)},
        {"file_size": 1},
    ):
        statement = loot.parsed[2].model_copy(update=swap)
        word = LatestStatement(
            number=3,
            statement_digest=statement.digest,
            server_key=TRUSTED,
            issued_at=int(time.time()),
            expires_at=int(time.time()) + DAY,
        )
        answer = reply(sign_statement(word, KEY), sign_statement(statement, KEY))
        refused(
            vault,
            tls,
            UnfitReleaseError,
            latest=lambda answer=answer: answer,  # type: ignore[misc]
            chunks=never,
        )


def test_a_signed_statement_of_another_version_says_so(
    vault: Vault, tls: tuple[Path, Tls], loot: Loot
) -> None:
    text = loot.statements[2].text.replace(b'"number":3', b'"novelty":1,"number":3')
    signed = Signed(text, sign(KEY, RELEASE_LABEL, text))
    answer = reply(loot.latest[2], signed)
    error = refused(vault, tls, RegistryAnswerError, latest=lambda: answer, chunks=never)
    assert "Update homefire" in error.hint


@pytest.mark.parametrize("garbage", [b"\xff" * 40, b"\x0a\x7f", b"<html>no</html>"])
def test_what_is_no_message_is_refused(vault: Vault, tls: tuple[Path, Tls], garbage: bytes) -> None:
    refused(vault, tls, RegistryAnswerError, latest=lambda: garbage, chunks=never)


def test_an_empty_answer_is_refused(vault: Vault, tls: tuple[Path, Tls]) -> None:
    refused(vault, tls, ForgedReleaseError, latest=lambda: b"", chunks=never)


def test_oversized_messages_are_refused(vault: Vault, tls: tuple[Path, Tls], loot: Loot) -> None:
    huge = Signed(b" " * (LARGEST_ANSWER + 1), bytes(64))
    answer = reply(loot.latest[2], huge)
    refused(
        vault, tls, RegistryAnswerError, latest=lambda: answer, chunks=never, match="larger than"
    )
    long = reply(loot.latest[2], Signed(b" " * (LARGEST_ANSWER // 2), bytes(64)))
    refused(vault, tls, ForgedReleaseError, latest=lambda: long, chunks=never)


def test_an_answer_that_never_comes_is_given_up(
    vault: Vault, tls: tuple[Path, Tls], loot: Loot
) -> None:
    def slow() -> wire.LatestReply:
        time.sleep(4)
        return loot.reply(2, 2)

    patience = replace(QUICK, call_seconds=0.3)
    with pytest.raises(UnreachableRegistryError, match="too long"):
        asked(vault, tls, slow, never, patience=patience)


def test_plain_text_against_tls_is_refused(vault: Vault, tls: tuple[Path, Tls], loot: Loot) -> None:
    registry = Hostile(loot.honest(3), loot.sent(3))
    with hostile(registry, None) as address:
        trust(vault, TRUSTED, address, root_certificates=tls[0])
        with pytest.raises(UnreachableRegistryError, match="TLS failed"):
            update(vault, fit, patience=QUICK)
    assert state(vault) == (None, 0)


# Downloads


def cut(content: bytes, stop: int) -> Chunks:
    return lambda request: chunks_of(content[:stop], start=request.offset)


def test_a_truncated_stream_is_refused(vault: Vault, tls: tuple[Path, Tls], loot: Loot) -> None:
    """After as many attempts as there are, and not because the time is up."""
    content, patience = loot.files[2], replace(QUICK, download_seconds=600)
    for stop in (0, 1, 16, len(content) - 1):
        refused(
            vault,
            tls,
            DamagedReleaseError,
            latest=loot.honest(3),
            chunks=cut(content, stop),
            match=rf"ends after {stop} of",
            patience=patience,
        )


def test_a_lengthened_stream_is_refused(vault: Vault, tls: tuple[Path, Tls], loot: Loot) -> None:
    longer = loot.files[2] + b"\0"
    refused(
        vault,
        tls,
        DamagedReleaseError,
        latest=loot.honest(3),
        chunks=lambda request: chunks_of(longer, len(longer), start=request.offset),
        match="more than",
    )


def test_chunks_that_never_end_are_refused(vault: Vault, tls: tuple[Path, Tls], loot: Loot) -> None:
    def endless(request: wire.DownloadRequest) -> Iterator[wire.Chunk]:
        return (wire.Chunk(offset=place, data=b"\0" * 7) for place in count(0, 7))

    refused(
        vault, tls, DamagedReleaseError, latest=loot.honest(3), chunks=endless, match="more than"
    )


def test_messages_without_bytes_are_refused(
    vault: Vault, tls: tuple[Path, Tls], loot: Loot
) -> None:
    def empty(request: wire.DownloadRequest) -> Iterator[wire.Chunk]:
        while True:
            yield wire.Chunk(offset=0, data=b"")

    refused(
        vault, tls, DamagedReleaseError, latest=loot.honest(3), chunks=empty, match="without bytes"
    )


def test_a_trickle_is_given_up(vault: Vault, tls: tuple[Path, Tls], loot: Loot) -> None:
    def trickle(request: wire.DownloadRequest) -> Iterator[wire.Chunk]:
        for place in range(request.offset, len(loot.files[2])):
            time.sleep(0.5)
            yield wire.Chunk(offset=place, data=loot.files[2][place : place + 1])

    before = time.monotonic()
    refused(
        vault,
        tls,
        UnreachableRegistryError,
        latest=loot.honest(3),
        chunks=trickle,
        match="too long",
        patience=replace(QUICK, download_seconds=2),
    )
    assert time.monotonic() - before < 30  # it would trickle for longer


def test_a_resume_at_a_wrong_offset_is_refused(
    vault: Vault, tls: tuple[Path, Tls], loot: Loot
) -> None:
    content = loot.files[2]

    def restarted(request: wire.DownloadRequest) -> Iterator[wire.Chunk]:
        yield from chunks_of(content[:64])  # from the start again, whatever was asked for

    refused(
        vault,
        tls,
        DamagedReleaseError,
        latest=loot.honest(3),
        chunks=restarted,
        match="from 0 on where those from 64 on are due",
    )


@pytest.mark.parametrize("place", [0, 8, 200, -1])
def test_a_changed_bit_is_refused(
    vault: Vault, tls: tuple[Path, Tls], loot: Loot, place: int
) -> None:
    content = bytearray(loot.files[2])
    content[place] ^= 1
    refused(
        vault,
        tls,
        DamagedReleaseError,
        latest=loot.honest(3),
        chunks=lambda request: chunks_of(bytes(content), start=request.offset),
        match="digest that is signed",
    )


def test_another_releases_file_is_refused(vault: Vault, tls: tuple[Path, Tls], loot: Loot) -> None:
    refused(vault, tls, DamagedReleaseError, latest=loot.honest(3), chunks=loot.sent(2))


def test_a_download_goes_on_where_it_ended(
    tmp_path: Path, quick_passphrases: None, tls: tuple[Path, Tls], loot: Loot
) -> None:
    content = loot.files[2]

    def breaking(request: wire.DownloadRequest) -> Iterator[wire.Chunk]:
        yield from chunks_of(content[: request.offset + 150], start=request.offset)
        raise RuntimeError("the line breaks")

    with make_vault(tmp_path / "vault") as vault:
        registry = asked(vault, tls, loot.honest(3), breaking, patience=IMPATIENT)
        assert state(vault) == (vector(3).tobytes(), 1)
    assert registry.offsets == list(range(0, len(content), 150))


def test_no_rollback_old_statements_that_were_signed_are_refused(
    tmp_path: Path, quick_passphrases: None, tls: tuple[Path, Tls], loot: Loot
) -> None:
    with make_vault(tmp_path / "vault") as own:
        asked(own, tls, loot.honest(3), loot.sent(3), patience=IMPATIENT)
        for number in (1, 2):
            refused(own, tls, OlderReleaseError, latest=loot.honest(number), chunks=never)
        assert state(own) == (vector(3).tobytes(), 1)


# Whatever


def mostly(usual: int, others: st.SearchStrategy[int]) -> st.SearchStrategy[int]:
    return st.integers(0, 7).flatmap(lambda n: others if n == 0 else st.just(usual))


@st.composite
def answers(draw: st.DrawFn) -> tuple[str, object]:
    """What a registry without the key may say of the newest: loot, mixed, bent or invented."""
    kind = draw(st.sampled_from(["loot"] * 5 + ["mixed", "bent", "bytes"]))
    if kind == "loot":
        return kind, draw(mostly(3, st.integers(1, 2)))
    if kind == "mixed":
        return kind, (draw(st.integers(0, 2)), draw(st.integers(0, 2)))
    if kind == "bent":
        return kind, (draw(st.booleans()), draw(st.integers(0, 5000)), draw(st.integers(1, 255)))
    return kind, draw(st.binary(max_size=200))


def answered(loot: Loot, kind: str, detail: object) -> wire.LatestReply | bytes:
    match kind, detail:
        case "loot", int(number):
            return loot.reply(number - 1, number - 1)
        case "mixed", (int(latest), int(release)):
            return loot.reply(latest, release)
        case "bent", (bool(word), int(place), int(mask)):
            whole = loot.reply(2, 2)
            part = whole.latest if word else whole.release
            text = bytearray(part.text)
            text[place % len(text)] ^= mask
            part.text = bytes(text)
            return whole
        case _, bytes(garbage):
            return garbage
        case _:
            raise AssertionError(kind)


MOVES = st.lists(
    st.tuples(
        mostly(0, st.integers(-60, 60)),  # where a chunk says it stands, beside where it is due
        mostly(0, st.integers(1, 2)),  # of which other release
        st.integers(0, 400) | st.just(150),  # how many bytes
        st.booleans(),  # whether the stream ends afterwards
        mostly(0, st.integers(1, 255)),  # what is flipped in its first byte
    ),
    max_size=8,
)


@pytest.fixture(scope="module")
def stage(
    tmp_path_factory: pytest.TempPathFactory, tls: tuple[Path, Tls], vault: Vault
) -> Iterator[tuple[Hostile, Vault]]:
    """One hostile registry whose answers are exchanged, and a device that trusts it."""
    registry = Hostile(lambda: b"", never)
    with hostile(registry, tls[1]) as address:
        trust(vault, TRUSTED, address, root_certificates=tls[0])
        yield registry, vault


@settings(max_examples=250, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(answers(), MOVES, st.booleans(), st.booleans())
def test_all_or_nothing_whatever_a_registry_answers(
    stage: tuple[Hostile, Vault],
    loot: Loot,
    said: tuple[str, object],
    moves: list[tuple[int, int, int, bool, int]],
    honest: bool,
    bare: bool,
) -> None:
    """The shared adapter stays, or is a release that the key signed and that is not older."""
    registry, vault = stage
    queue, asked_for = list(moves), said[1] - 1 if isinstance(said[1], int) else 2

    def chunks(request: wire.DownloadRequest) -> Iterator[wire.Chunk]:
        place = request.offset
        while queue:
            shift, other, size, ends, flip = queue.pop(0)
            data = bytearray(loot.files[(asked_for + other) % 3][place : place + size])
            if data:
                data[0] ^= flip
            yield wire.Chunk(offset=max(0, place + shift), data=bytes(data))
            place += len(data)
            if ends:
                return
        if honest:  # then it thinks better of it
            yield from chunks_of(loot.files[asked_for], 64, start=place)

    registry.latest, registry.chunks = lambda: answered(loot, *said), chunks
    if bare:  # what was accepted is remembered all the same
        with vault.database.transaction():
            vault.adapters.drop([each.version for each in vault.adapters.versions(SHARED)])
    before, entries = state(vault)
    accepted = [entry["number"] for entry in vault.log.entries("updated")]
    try:
        found = update(vault, fit, patience=replace(QUICK, pause_seconds=0.001))
    except UpdateError as error:
        event(type(error).__name__)
        assert state(vault) == (before, entries)
        return
    event(f"changed: {found.changed}")
    number = found.statement.number
    assert number >= max(accepted, default=0)
    assert state(vault)[0] == vector(number).tobytes()
    assert found.statement == loot.parsed[number - 1]
