"""Text from elsewhere, before it is shown: terminals act on some of it, and some ends a line."""

JOINERS = "\u200c\u200d"  # within words of some scripts, and within emoji
LAYOUT = "\n\t"


def printable(text: str, *, instead: str = " ", lines: bool = False) -> str:
    """A text without what has no form of its own: nothing that moves a cursor, or turns writing.

    Args:
        text: Anybody's.
        instead: What stands in the place of each such letter.
        lines: Whether the ends of lines, and tabulators, stay.
    """
    kept = JOINERS + LAYOUT if lines else JOINERS
    return "".join(c if c.isprintable() or c in kept else instead for c in text)
