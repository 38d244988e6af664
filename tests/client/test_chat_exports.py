"""Exports of chat services: what a person asked, after which message, on the branch shown last."""

import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from homefire.client import chat_exports
from homefire.client.chat_exports import MOST_PROMPT, Service, detect_service, read_chats
from homefire.common.errors import DataError
from homefire.common.records import Record, Skipped

WRITTEN = "mellon"  # stands for what a person wrote; no error may hold it
NOON = 1735732800  # 2025-01-01T12:00:00Z
ROOT = "00000000-0000-4000-8000-000000000000"

Object = dict[str, Any]


def gpt_message(role: str, *parts: object, **fields: object) -> Object:
    content = {"content_type": "text", "parts": list(parts)}
    return {"author": {"role": role}, "content": content, **fields}


def gpt(*messages: Object | None, parents: dict[int, int] | None = None) -> Object:
    """A conversation; each message follows the one before it, unless `parents` says otherwise."""
    mapping: Object = {"root": {"id": "root", "parent": None, "message": None, "children": []}}
    for number, message in enumerate(messages):
        before = (parents or {}).get(number, number - 1)
        parent = "root" if before < 0 else f"n{before}"
        mapping[f"n{number}"] = {"parent": parent, "message": message, "children": []}
    newest = f"n{len(messages) - 1}" if messages else "root"
    return {"title": "x", "mapping": mapping, "current_node": newest}


def claude_message(sender: str, text: str, **fields: object) -> Object:
    content = [{"type": "text", "text": text}]
    return {"sender": sender, "text": "", "content": content, **fields}


def claude(*messages: Object, parents: dict[int, int] | None = None) -> Object:
    listed = []
    for number, message in enumerate(messages):
        before = (parents or {}).get(number, number - 1)
        parent = ROOT if before < 0 else f"n{before}"
        listed.append({"uuid": f"n{number}", "parent_message_uuid": parent, **message})
    return {"uuid": "x", "name": "x", "chat_messages": listed}


def talk(service: Service, *turns: tuple[bool, str]) -> Object:
    """A conversation in either layout, from (by the person, text)."""
    if service == "chatgpt":
        return gpt(*(gpt_message("user" if mine else "assistant", text) for mine, text in turns))
    return claude(*(claude_message("human" if mine else "assistant", text) for mine, text in turns))


def save(path: Path, *conversations: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(conversations), encoding="utf-8")
    return path


def pack(path: Path, members: dict[str, list[object]], method: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, conversations in members.items():
            archive.writestr(name, json.dumps(conversations))
    return path


def chats(path: Path, service: Service, skipped: Skipped | None = None) -> list[Record]:
    return list(read_chats(path, service, skipped=skipped))


def said(path: Path, service: Service) -> list[tuple[str | None, str]]:
    return [(record.prompt, record.text) for record in chats(path, service)]


both = pytest.mark.parametrize("service", ["chatgpt", "claude"])


@both
def test_the_prompt_is_the_assistants_message_before(tmp_path: Path, service: Service) -> None:
    first = talk(service, (True, "a"), (False, "b"), (True, "c"), (True, "d"), (False, "e"))
    second = talk(service, (False, "f"), (False, "g"), (True, "h"))
    path = save(tmp_path / "export.json", first, talk(service, (False, "nobody's")), second)
    assert said(path, service) == [(None, "a"), ("b", "c"), ("b", "d"), ("g", "h")]
    assert {record.kind for record in chats(path, service)} == {"chat"}


@both
def test_a_long_prompt_keeps_its_end(tmp_path: Path, service: Service) -> None:
    long = "x" * MOST_PROMPT + "the end"
    path = save(tmp_path / "export.json", talk(service, (False, long), (True, "a")))
    assert said(path, service) == [(long[-MOST_PROMPT:], "a")]


@both
def test_an_empty_conversation_has_no_records(tmp_path: Path, service: Service) -> None:
    empty: Object = {"mapping": {}, "current_node": None, "chat_messages": []}
    path = save(tmp_path / "export.json", empty, talk(service))
    assert chats(path, service) == []


@both
def test_blank_messages_are_nobodys(tmp_path: Path, service: Service) -> None:
    turns = ((True, " "), (False, "a"), (False, "\n"), (True, "b"))
    path = save(tmp_path / "export.json", talk(service, *turns))
    assert said(path, service) == [("a", "b")]


@pytest.mark.parametrize(
    ("seconds", "date"),
    [
        (NOON, "2025-01-01T12:00:00+00:00"),
        (NOON + 0.75, "2025-01-01T12:00:00+00:00"),
        (None, None),
        (0, None),
    ],
)
def test_dates_of_openai_are_seconds(tmp_path: Path, seconds: object, date: str | None) -> None:
    path = save(tmp_path / "export.json", gpt(gpt_message("user", "a", create_time=seconds)))
    assert chats(path, "chatgpt") == [Record("a", created_at=date, kind="chat")]


@pytest.mark.parametrize("date", ["2025-01-01T12:00:00.123456Z", None])
def test_dates_of_anthropic_stay_as_they_are(tmp_path: Path, date: str | None) -> None:
    path = save(tmp_path / "export.json", claude(claude_message("human", "a", created_at=date)))
    assert chats(path, "claude") == [Record("a", created_at=date, kind="chat")]


hidden = {"is_visually_hidden_from_conversation": True}
NOT_SHOWN = {
    "a system message": gpt_message("system", "no"),
    "a tool's answer": gpt_message("tool", "no"),
    "a call of a tool": gpt_message("assistant", "no", recipient="browser"),
    "a hidden answer": gpt_message("assistant", "no", metadata=hidden),
    "a hidden question": gpt_message("user", "no", metadata=hidden),
    "instructions": {
        "author": {"role": "user"},
        "content": {"content_type": "user_editable_context", "user_profile": "no"},
    },
    "thoughts": {
        "author": {"role": "assistant"},
        "content": {"content_type": "thoughts", "thoughts": [{"content": "no"}]},
    },
    "only a picture": gpt_message("user", {"content_type": "image_asset_pointer"}),
    "no message": None,
}


@pytest.mark.parametrize("message", NOT_SHOWN.values(), ids=NOT_SHOWN.keys())
def test_what_is_no_text_for_the_person_is_left_out(tmp_path: Path, message: Object | None) -> None:
    answer = gpt_message("assistant", "a", recipient="all", metadata={})
    path = save(tmp_path / "export.json", gpt(answer, message, gpt_message("user", "b")))
    skipped = Skipped()
    assert [(one.prompt, one.text) for one in chats(path, "chatgpt", skipped)] == [("a", "b")]
    assert not skipped.reasons


def test_pictures_beside_words_are_left_out(tmp_path: Path) -> None:
    picture = {"content_type": "image_asset_pointer", "asset_pointer": "x"}
    message = gpt_message("user", picture, "what is", "this?")
    message["content"]["content_type"] = "multimodal_text"
    assert said(save(tmp_path / "export.json", gpt(message)), "chatgpt") == [
        (None, "what is\nthis?")
    ]


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}, "a\nb"),
        ({"content": [{"type": "thinking", "thinking": "no"}, {"type": "text", "text": "a"}]}, "a"),
        ({"content": [{"type": "text", "text": "a"}], "text": "a, and what a tool said"}, "a"),
        ({"content": [], "text": "a"}, "a"),
        ({"text": "a"}, "a"),
        ({"content": [{"type": "tool_use", "text": "no"}], "text": "not supported"}, None),
    ],
)
def test_words_of_anthropic_are_blocks_or_a_text(
    tmp_path: Path, fields: Object, text: str | None
) -> None:
    conversation = claude({"sender": "human", **fields}, {"sender": "system", "text": "no"})
    path = save(tmp_path / "export.json", conversation)
    assert said(path, "claude") == ([(None, text)] if text else [])


def test_older_exports_of_anthropic_are_read_in_order(tmp_path: Path) -> None:
    messages = [{"sender": who, "text": who} for who in ("human", "assistant", "human")]
    path = save(tmp_path / "export.json", {"chat_messages": messages})
    assert said(path, "claude") == [(None, "human"), ("assistant", "human")]


def test_the_newest_message_may_be_named(tmp_path: Path) -> None:
    conversation = claude(
        claude_message("human", "first"), claude_message("human", "edited"), parents={1: -1}
    )
    path = save(tmp_path / "export.json", conversation)
    assert said(path, "claude") == [(None, "edited")]
    save(path, {**conversation, "current_leaf_message_uuid": "n0"})
    assert said(path, "claude") == [(None, "first")]


@st.composite
def trees(draw: st.DrawFn) -> dict[int, int]:
    """For each message, the number of the one that it follows; -1 for none."""
    size = draw(st.integers(1, 12))
    return {number: draw(st.integers(-1, number - 1)) for number in range(size)}


@settings(max_examples=50)
@given(trees())
def test_one_branch_is_read_whatever_was_edited(
    tmp_path_factory: pytest.TempPathFactory, parents: dict[int, int]
) -> None:
    shown = [len(parents) - 1]
    while (before := parents[shown[-1]]) >= 0:
        shown.append(before)
    texts = [(None, f"{number}") for number in reversed(shown)]
    folder = tmp_path_factory.mktemp("tree")
    one = gpt(*(gpt_message("user", f"{number}") for number in parents), parents=parents)
    other = claude(*(claude_message("human", f"{number}") for number in parents), parents=parents)
    assert said(save(folder / "one.json", one), "chatgpt") == texts
    assert said(save(folder / "other.json", other), "claude") == texts


def as_file(folder: Path, *exports: object) -> Path:
    return save(folder / "some name", *exports)


def as_folder(folder: Path, *exports: object) -> Path:
    save(folder / "chat" / "conversations.json", *exports)
    save(folder / "chat" / "user.json", "no")
    return folder / "chat"


def as_numbered_files(folder: Path, *exports: object) -> Path:
    for number, export in enumerate(exports):
        save(folder / "chat" / f"conversations-{number:03}.json", export)
    return folder / "chat"


def as_archive(folder: Path, *exports: object) -> Path:
    members = {"user.json": [], "conversations.json": list(exports), "chat.html": []}
    return pack(folder / "some name", members)


def as_archive_of_a_folder(folder: Path, *exports: object) -> Path:
    members = {f"chat/conversations-{n:03}.json": [export] for n, export in enumerate(exports)}
    return pack(folder / "a.zip", {**members, "__MACOSX/chat/._conversations-000.json": ["no"]})


@both
@pytest.mark.parametrize(
    "store", [as_file, as_folder, as_numbered_files, as_archive, as_archive_of_a_folder]
)
def test_exports_are_read_as_they_come(
    tmp_path: Path, service: Service, store: Callable[..., Path]
) -> None:
    path = store(tmp_path, talk(service, (True, "a")), talk(service, (True, "b")))
    assert detect_service(path) == service
    assert said(path, service) == [(None, "a"), (None, "b")]


def test_links_in_a_folder_are_not_followed(tmp_path: Path) -> None:
    elsewhere = save(tmp_path / "elsewhere.json", talk("claude", (True, WRITTEN)))
    folder = tmp_path / "chat"
    folder.mkdir()
    (folder / "conversations.json").symlink_to(elsewhere)
    assert detect_service(folder) is None
    with pytest.raises(DataError, match=r"no conversations\.json in it") as error:
        chats(folder, "claude")
    assert "as it came" in error.value.hint


def test_an_archive_without_an_export_is_an_error(tmp_path: Path) -> None:
    path = pack(tmp_path / "a.zip", {"chat.html": []})
    assert detect_service(path) is None
    with pytest.raises(DataError, match=r"no conversations\.json in it"):
        chats(path, "chatgpt")


def test_a_large_member_is_refused_before_it_is_unpacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chat_exports, "MOST_BYTES", 1000)
    path = pack(tmp_path / "a.zip", {"conversations.json": ["x" * 100_000]})
    for read in (detect_service, lambda path: chats(path, "claude")):
        with pytest.raises(DataError, match=r"a\.zip, conversations\.json: 100004 bytes, more"):
            read(path)


def test_a_member_that_hides_its_size_is_damaged(tmp_path: Path) -> None:
    path = pack(tmp_path / "a.zip", {"conversations.json": ["x" * 100_000]})
    size = (100_004).to_bytes(4, "little")
    path.write_bytes(path.read_bytes().replace(size, (10).to_bytes(4, "little")))
    with pytest.raises(DataError, match=r"a\.zip: a damaged archive"):
        chats(path, "claude")


def test_unusual_packing_is_refused(tmp_path: Path) -> None:
    path = pack(tmp_path / "a.zip", {"conversations.json": []}, zipfile.ZIP_BZIP2)
    with pytest.raises(DataError, match="packed in an unusual way") as error:
        chats(path, "claude")
    assert "give the folder" in error.value.hint


def test_a_locked_archive_is_an_error(tmp_path: Path) -> None:
    path = pack(tmp_path / "a.zip", {"conversations.json": [talk("claude", (True, WRITTEN))]})
    content = bytearray(path.read_bytes())
    content[6] |= 1  # in the member's own header, and in the table of contents
    content[content.index(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"a\.zip: .* with a password"):
        chats(path, "claude")


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_every_damage_of_an_archive_is_a_data_error(tmp_path: Path, method: int) -> None:
    export = talk("claude", (True, WRITTEN))
    path = pack(tmp_path / "a.zip", {"conversations.json": [export]}, method)
    whole, records = path.read_bytes(), chats(path, "claude")
    for place in range(len(whole)):
        for changed in (
            whole[:place],
            whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :],
        ):
            path.write_bytes(changed)
            try:
                assert chats(path, "claude") == records
            except DataError as error:
                assert WRITTEN not in str(error)


user, human = gpt_message("user", WRITTEN), claude_message("human", WRITTEN)
place = "conversation 2"

# What an export can have wrong: (service, the second conversation, place and message, reason).
BAD: dict[str, tuple[Service, object, str, str]] = {
    "list": ("chatgpt", [WRITTEN], f"{place}: must be an object, not list", "wrong shape"),
    "another's": ("claude", gpt(user), f"{place}: 'chat_messages' must be a list", "wrong shape"),
    "no mapping": (
        "chatgpt",
        claude(human),
        f"{place}: 'mapping' must be an object",
        "wrong shape",
    ),
    "no newest": (
        "chatgpt",
        {**gpt(user), "current_node": None},
        f"{place}: its newest message is missing",
        "wrong shape",
    ),
    "newest elsewhere": (
        "claude",
        {**claude(human), "current_leaf_message_uuid": [WRITTEN]},
        f"{place}: its newest message is missing",
        "wrong shape",
    ),
    "circle": (
        "chatgpt",
        gpt(user, parents={0: 0}),
        f"{place}: its messages run in",
        "wrong shape",
    ),
    "no id": ("claude", claude({**human, "uuid": 7}), f"{place}: 'uuid' must be a", "wrong shape"),
    "node": (
        "chatgpt",
        {"mapping": {"a": WRITTEN}, "current_node": "a"},
        f"{place}: must be an object, not str",
        "wrong shape",
    ),
    "message": (
        "claude",
        {"chat_messages": [WRITTEN]},
        f"{place}, message 1: must be an object, not str",
        "wrong shape",
    ),
    "no author": (
        "chatgpt",
        gpt({**user, "author": None}),
        f"{place}, message 2: 'author' must be an object, not NoneType",
        "wrong shape",
    ),
    "no sender": (
        "claude",
        claude({**human, "sender": None}),
        f"{place}, message 1: 'sender' must be a string, not NoneType",
        "wrong shape",
    ),
    "no parts": (
        "chatgpt",
        gpt({**user, "content": {"content_type": "text", "parts": WRITTEN}}),
        f"{place}, message 2: 'parts' must be a list, not str",
        "wrong shape",
    ),
    "content": (
        "claude",
        claude({**human, "content": {"text": WRITTEN}}),
        f"{place}, message 1: 'content' must be a list, not dict",
        "wrong shape",
    ),
    "no text": (
        "claude",
        claude({**human, "content": [], "text": None}),
        f"{place}, message 1: 'text' must be a string, not NoneType",
        "wrong shape",
    ),
    "half a character": (
        "chatgpt",
        gpt(gpt_message("user", WRITTEN + "\ud800")),
        f"{place}, message 2: 'text' is not Unicode text",
        "not Unicode text",
    ),
    "no such time": (
        "chatgpt",
        gpt({**user, "create_time": 1e300}),
        f"{place}, message 2: its time is not in seconds",
        "bad date",
    ),
    "words for a time": (
        "chatgpt",
        gpt({**user, "create_time": WRITTEN}),
        f"{place}, message 2: its time is not in seconds",
        "bad date",
    ),
    "no such date": (
        "claude",
        claude({**human, "created_at": "soon"}),
        f"{place}, message 1: created_at 'soon' is not",
        "bad date",
    ),
}


@pytest.mark.parametrize(("service", "bad", "message", "reason"), BAD.values(), ids=BAD.keys())
def test_what_is_bad_is_an_error_or_counted(
    tmp_path: Path, service: Service, bad: object, message: str, reason: str
) -> None:
    first, last = (talk(service, (True, text)) for text in ("first", "last"))
    path = save(tmp_path / "export.json", first, bad, last)
    with pytest.raises(DataError) as error:
        chats(path, service)
    assert str(error.value).startswith(f"{path}, {message}")
    assert error.value.reason == reason and error.value.hint
    assert WRITTEN not in str(error.value)
    skipped = Skipped()
    assert [record.text for record in chats(path, service, skipped)] == ["first", "last"]
    assert skipped.reasons == {reason: 1}


def test_a_bad_answer_is_not_replaced_by_an_older_one(tmp_path: Path) -> None:
    answers = (gpt_message("assistant", "a"), gpt_message("assistant", "b", create_time="x"))
    path = save(tmp_path / "export.json", gpt(*answers, gpt_message("user", "c")))
    assert [(one.prompt, one.text) for one in chats(path, "chatgpt", Skipped())] == [(None, "c")]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{}", "must be a list of conversations"),
        (b'["mellon', "not JSON"),
        ('["mellön"]'.encode("latin-1"), "not UTF-8"),
        (b"[" * 100_000, "not JSON"),
        (b"", "not JSON"),
    ],
)
@pytest.mark.parametrize("skipped", [None, Skipped()])
def test_a_file_that_is_no_export_is_an_error(
    tmp_path: Path, content: bytes, message: str, skipped: Skipped | None
) -> None:
    path = tmp_path / "conversations.json"
    path.write_bytes(content)
    with pytest.raises(DataError, match=f"^{path}: {message}") as error:
        chats(path, "claude", skipped)
    assert "mell" not in str(error.value)
