"""What is shown of anybody's text."""

import unicodedata

from hypothesis import given
from hypothesis import strategies as st

from homefire.common.printable import JOINERS, printable

MOVES = "\x1b[2J\x1b]0;title\x07\r\x08\x9b5A"  # clears a screen, names a window, goes back and up
TURNS = "\u202e\u2066\u200f"


def test_nothing_is_left_that_a_terminal_acts_on() -> None:
    assert printable(f"a{MOVES}b{TURNS}c") == "a [2J ]0;title    5Ab   c"
    assert printable(f"a{MOVES}b", instead="") == "a[2J]0;title5Ab"


def test_lines_stay_where_they_may() -> None:
    assert printable("one\n\ttwo\r\nthree\u2028four", lines=True) == "one\n\ttwo \nthree four"
    assert printable("one\n\ttwo") == "one  two"


def test_words_and_emoji_stay_whole() -> None:
    for text in ("Ångström für Zoë", "क्\u200dष", "👩\u200d👩\u200d👧", "नमस्ते", "日本語"):
        assert printable(text) == text


@given(st.text(), st.booleans())
def test_what_is_shown_is_of_no_other_kind(text: str, lines: bool) -> None:
    shown = printable(text, lines=lines)
    kinds = {unicodedata.category(c) for c in shown if c not in JOINERS + "\n\t"}
    assert kinds.isdisjoint({"Cc", "Cf", "Cs", "Zl", "Zp"})
    assert lines or len(shown.splitlines()) <= 1
    assert printable(shown, lines=lines) == shown
