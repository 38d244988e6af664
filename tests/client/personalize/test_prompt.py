"""Prompts: what is in them, in which order, and what there is no room for."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import BOS, BOS_ID, CHAT_TEMPLATE, EOS, EOS_ID, make_tokenizer

from homefire.client.personalize.prompt import HEADING, Note, Prompt, assemble
from homefire.common.chat import Message, Role, chat_tokens
from homefire.common.errors import DataError, ModelError
from homefire.common.training import prompt_tokens

PLAIN = make_tokenizer()
CHAT = make_tokenizer(chat_template=CHAT_TEMPLATE)
NO_SYSTEM = make_tokenizer(
    chat_template="{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}"
    "{% endif %}" + CHAT_TEMPLATE
)
TOKENIZERS = [PLAIN, CHAT, NO_SYSTEM]
HUGE = 10_000

words = st.text(st.characters(codec="utf-8"), max_size=15)
hostile = st.lists(st.one_of(words, st.sampled_from([BOS, EOS])), max_size=4).map("".join)
notes_ = st.lists(st.builds(Note, hostile, st.sampled_from([None, "2024-05-01"])), max_size=4)


def message(role: Role, content: str) -> Message:
    return {"role": role, "content": content}


def user(content: str) -> list[Message]:
    return [message("user", content)]


@st.composite
def conversations(draw: st.DrawFn) -> list[Message]:
    roles: list[Role] = draw(st.lists(st.sampled_from(["system", "user", "assistant"]), max_size=4))
    return [message(role, draw(hostile)) for role in [*roles, "user"]]


def text_of(tokenizer: Any, prompt: Prompt) -> str:
    text: str = tokenizer.decode(prompt.tokens)
    return text


TALK = [
    message("user", "one"),
    message("assistant", "ONE"),
    message("user", "two"),
    message("assistant", "TWO"),
    message("user", "three"),
]
NOTES = [Note("I keep bees."), Note("I live\n in  Ghent.", "2024-05-01T10:00:00"), Note("Tea!")]


# What is in it


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_a_question_alone_is_what_training_puts_before_its_answer(tokenizer: Any) -> None:
    @given(question=hostile, room=st.integers(1, 60))
    def check(question: str, room: int) -> None:
        expected = prompt_tokens(tokenizer, question, 2 * room)
        assert assemble(tokenizer, user(question), room=room) == Prompt(expected, ())

    check()


def test_notes_stand_in_a_system_message() -> None:
    block = f"{HEADING}\n- I keep bees.\n- 2024-05-01: I live in Ghent.\n- Tea!"
    expected = chat_tokens(CHAT, [message("system", block), *TALK])
    assert assemble(CHAT, TALK, NOTES, room=HUGE) == Prompt(expected, (0, 1, 2))


def test_system_messages_come_first_and_notes_are_below_them() -> None:
    talk = [message("system", "Be short."), *TALK, message("system", "Be kind."), *user("four")]
    block = f"Be short.\n\nBe kind.\n\n{HEADING}\n- Tea!"
    expected = chat_tokens(CHAT, [message("system", block), *TALK, *user("four")])
    assert assemble(CHAT, talk, NOTES[2:], room=HUGE).tokens == expected


def test_a_template_without_system_messages_gets_them_in_the_first_turn() -> None:
    first = f"{HEADING}\n- Tea!\n\none"
    expected = chat_tokens(NO_SYSTEM, [message("user", first), *TALK[1:]])
    assert assemble(NO_SYSTEM, TALK, NOTES[2:], room=HUGE).tokens == expected


def test_without_a_template_a_question_is_a_line_and_turns_are_named() -> None:
    question = assemble(PLAIN, user("three"), NOTES[2:], room=HUGE)
    assert text_of(PLAIN, question) == f"{BOS}{HEADING}\n- Tea!\n\nthree\n"
    talk = assemble(PLAIN, TALK[2:], NOTES[2:], room=HUGE)
    assert text_of(PLAIN, talk) == (
        f"{BOS}system: {HEADING}\n- Tea!\nuser: two\nassistant: TWO\nuser: three\nassistant:"
    )


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_words_hold_no_control_tokens(tokenizer: Any) -> None:
    @given(talk=conversations(), notes=notes_)
    def check(talk: list[Message], notes: list[Note]) -> None:
        prompt = assemble(tokenizer, talk, notes, room=HUGE)
        harmless = [message(m["role"], "?" * bool(m["content"])) for m in talk]
        marks = [Note("?" * bool(note.text.strip())) for note in notes]
        expected = assemble(tokenizer, harmless, marks, room=HUGE)
        assert prompt.used == expected.used
        for control in (BOS_ID, EOS_ID):
            assert prompt.tokens.count(control) == expected.tokens.count(control)

    check()


# What there is no room for


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_the_room_is_never_passed(tokenizer: Any) -> None:
    @given(talk=conversations(), notes=notes_, room=st.integers(1, 150))
    def check(talk: list[Message], notes: list[Note], room: int) -> None:
        prompt = assemble(tokenizer, talk, notes, room=room)
        whole = assemble(tokenizer, talk, notes, room=HUGE).tokens
        assert len(prompt.tokens) <= room
        assert notes or len(whole) > room or prompt.tokens == whole
        assert list(prompt.used) == sorted(set(prompt.used))
        text = text_of(tokenizer, prompt)
        assert all(notes[place].line in text for place in prompt.used)

    check()


def length(talk: list[Message], notes: list[Note]) -> int:
    return len(assemble(CHAT, talk, notes, room=HUGE).tokens)


def test_notes_are_whole_and_the_best_come_first() -> None:
    question = user("three")
    bare, long = length(question, []), Note("b" * 100)
    for rest in ([], [NOTES[0]], [NOTES[0], NOTES[2]]):
        room = max(length(question, rest), 2 * (length(question, rest) - bare))
        fits = assemble(CHAT, question, [NOTES[0], long, NOTES[2]], room=room)
        assert [(NOTES[0], long, NOTES[2])[place] for place in fits.used] == rest
        assert "bb" not in text_of(CHAT, fits)


def test_notes_get_half_of_the_room_and_never_that_of_the_question() -> None:
    question, notes = user("q" * 90), [Note("a" * 30)]
    with_, bare = length(question, notes), length(question, [])
    assert 2 * (with_ - bare) < with_
    assert assemble(CHAT, question, notes, room=with_).used == (0,)
    assert assemble(CHAT, question, notes, room=with_ - 1).used == ()
    short = user("q")
    more = length(short, notes) - length(short, [])
    assert assemble(CHAT, short, notes, room=2 * more).used == (0,)
    assert assemble(CHAT, short, notes, room=2 * more - 1).used == ()


@pytest.mark.parametrize("notes", [[], NOTES[2:]])
@pytest.mark.parametrize("start", [0, 2, 4])
def test_the_oldest_turns_make_way_first(notes: list[Note], start: int) -> None:
    old, kept = [message("user", "x" * 200), message("assistant", "X")], TALK[start:]
    whole = assemble(CHAT, kept, notes, room=HUGE)
    room = max(len(whole.tokens), 150 * bool(notes))
    assert assemble(CHAT, [*old, *kept], notes, room=room) == whole


def test_an_answer_is_not_kept_without_its_question() -> None:
    room = length(TALK[1:], [])
    assert assemble(CHAT, TALK, room=room).tokens == chat_tokens(CHAT, TALK[2:])


def test_a_question_that_is_too_long_is_cut_at_its_beginning() -> None:
    question = user("a" * 50 + "b" * 50)
    prompt = assemble(CHAT, [*TALK[:4], *question], NOTES, room=60)
    assert prompt == Prompt(chat_tokens(CHAT, question)[-60:], ())
    assert text_of(CHAT, prompt).endswith("b" * 20 + f"{EOS}\n{BOS}assistant\n")


def test_empty_notes_are_left_out() -> None:
    assert assemble(CHAT, TALK, [Note(" \n"), NOTES[2]], room=HUGE).used == (1,)


# What is refused


@pytest.mark.parametrize("room", [0, -3])
def test_a_prompt_without_room_is_refused(room: int) -> None:
    with pytest.raises(DataError, match="no room"):
        assemble(CHAT, TALK, room=room)


@pytest.mark.parametrize("talk", [[], TALK[:2], [message("system", "Be short.")]])
def test_a_conversation_without_a_question_at_its_end_is_refused(talk: list[Message]) -> None:
    with pytest.raises(DataError, match="must end with a question"):
        assemble(CHAT, talk, room=HUGE)


def test_unknown_roles_and_halves_of_characters_are_refused() -> None:
    tool: Any = {"role": "tool", "content": "4"}
    with pytest.raises(DataError, match="message 1: unknown role 'tool'"):
        assemble(CHAT, [tool, *TALK], room=HUGE)
    with pytest.raises(DataError, match="message 6: 'content' is not Unicode"):
        assemble(CHAT, [*TALK, *user("a\ud800")], room=HUGE)
    with pytest.raises(DataError, match="note 2: 'text' is not Unicode"):
        assemble(CHAT, TALK, [NOTES[0], Note("\udfff")], room=HUGE)


def test_a_template_that_refuses_everything_is_an_error() -> None:
    refusing = make_tokenizer(chat_template="{{ raise_exception('not today') }}")
    with pytest.raises(ModelError, match="not today"):
        assemble(refusing, TALK, NOTES, room=HUGE)
