"""The generated code of the registry's calls is what its description gives."""

from pathlib import Path

import pytest
from generate_registry import ROOT, generate

from homefire.common import registry_pb2 as wire
from homefire.common.registry_calls import (
    CHUNK_BYTES,
    DOWNLOAD,
    LARGEST_ANSWER,
    LATEST,
    LIST,
    PAGE_RELEASES,
    SERVICE,
)
from homefire.common.release_statement import LARGEST_STATEMENT


def test_generated_code_is_current(tmp_path: Path) -> None:
    for name, text in generate(tmp_path).items():
        written = (ROOT / "common" / name).read_text(encoding="utf-8")
        assert written == text, f"{name} is old: make proto"


def test_a_description_that_is_none_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("generate_registry.PROTO", "homefire/common/absent.proto")
    with pytest.raises(RuntimeError, match="protoc"):
        generate(tmp_path)


def test_names_of_the_calls() -> None:
    assert SERVICE == "homefire.registry.v1.Registry"
    assert [LATEST, LIST, DOWNLOAD] == [f"/{SERVICE}/{n}" for n in ("Latest", "List", "Download")]


def test_the_largest_answers_fit_into_their_limit() -> None:
    chunk = wire.Chunk(offset=2**63, data=b"\0" * CHUNK_BYTES)
    signed = wire.Signed(text=b"\0" * LARGEST_STATEMENT, signature=b"\0" * 64)
    page = wire.ListReply(releases=[signed] * PAGE_RELEASES, more=True)
    latest = wire.LatestReply(latest=signed, release=signed, now=2**62)
    assert max(message.ByteSize() for message in (chunk, page, latest)) <= LARGEST_ANSWER
