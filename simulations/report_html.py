"""Small pieces of HTML: elements that escape what they hold, tables, and numbers for people."""

import html
import math
from collections.abc import Iterable, Mapping, Sequence

NOTHING = "–"
UNIT = "nats per token"
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


class Markup(str):
    """Text that is HTML already; every other text is escaped on its way into an element."""

    __slots__ = ()


def join(*parts: object) -> Markup:
    """Put pieces one after another; what is not `Markup` is escaped.

    >>> join("a < b", Markup("<br>"))
    'a &lt; b<br>'
    """
    return Markup(
        "".join(part if isinstance(part, Markup) else html.escape(str(part)) for part in parts)
    )


def tag(name: str, /, *children: object, **attributes: str) -> Markup:
    """One element; `class_` means `class`, `aria_label` means `aria-label`.

    >>> tag("p", "<b>", class_="lead")
    '<p class="lead">&lt;b&gt;</p>'
    """
    words = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(value)}"'
        for key, value in attributes.items()
    )
    return Markup(f"<{name}{words}>{join(*children)}</{name}>")


def section(title: str, *children: object, id_: str) -> Markup:
    """A section under its own second-level heading."""
    heading = tag("h2", title, id=f"{id_}-title")
    return tag("section", heading, *children, id=id_, aria_labelledby=f"{id_}-title")


def table(caption: str, head: Sequence[object], rows: Iterable[Sequence[object]]) -> Markup:
    """A table whose first column names the row; wide ones scroll inside their own box."""
    body = [
        tag("tr", tag("th", row[0], scope="row"), *(tag("td", cell) for cell in row[1:]))
        for row in rows
    ]
    columns = tag("tr", *(tag("th", cell, scope="col") for cell in head))
    whole = tag("table", tag("caption", caption), tag("thead", columns), tag("tbody", *body))
    return tag("div", whole, class_="scroll", tabindex="0", role="region", aria_label=caption)


def facts(pairs: Iterable[tuple[str, object]]) -> Markup:
    """A description list of short facts; a long one gets a line of its own."""
    rows = [
        tag("div", tag("dt", name), tag("dd", value), class_="long" if len(str(value)) > 30 else "")
        for name, value in pairs
    ]
    return tag("dl", *rows, class_="facts")


def flatten(value: object, *, prefix: str = "") -> Iterable[tuple[str, str]]:
    """Every leaf of a nested mapping, under its dotted name.

    >>> list(flatten({"a": {"b": 1, "c": [2, 3]}, "d": None}))
    [('a.b', '1'), ('a.c', '2, 3'), ('d', '–')]
    """
    if isinstance(value, Mapping) and value:
        for key, entry in value.items():
            yield from flatten(entry, prefix=f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, plain(value)


def plain(value: object) -> str:
    """Any JSON value as short text.

    >>> [plain(value) for value in (None, True, 12345, 0.5, ["a", "b"], [], {"c": 2})]
    ['–', 'yes', '12,345', '0.5', 'a, b', '–', 'c: 2']
    """
    match value:
        case None:
            return NOTHING
        case bool():
            return "yes" if value else "no"
        case int():
            return f"{value:,}"
        case float():
            return f"{value:.6g}" if math.isfinite(value) else number(value)
        case list() | tuple():
            return ", ".join(plain(entry) for entry in value) or NOTHING
        case Mapping():
            return ", ".join(f"{key}: {plain(entry)}" for key, entry in value.items()) or NOTHING
    return str(value)


def number(value: float | None, *, digits: int = 3) -> str:
    """A measured number; nothing and infinity have signs of their own.

    >>> [number(value) for value in (4.19426, -1.0, None, float("inf"))]
    ['4.194', '−1.000', '–', '∞']
    """
    if value is None or math.isnan(value):
        return NOTHING
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    return f"{value:,.{digits}f}".replace("-", "−")


def signed(value: float) -> str:
    """A gain with its sign.

    >>> [signed(value) for value in (0.25, -0.25, 0.0)]
    ['+0.250', '−0.250', '0.000']
    """
    return ("+" if round(value, 3) > 0 else "") + number(round(value, 3) + 0.0)


def perplexity(value: float | None) -> str:
    """A perplexity with about four digits.

    >>> [perplexity(value) for value in (66.284, 252.3, None)]
    ['66.28', '252.3', '–']
    """
    return number(value, digits=1 if value is not None and value >= 100 else 2)


def power(value: float | None) -> str:
    """A very small number, such as a δ.

    >>> [power(value) for value in (1e-5, 2.5e-6, None)]
    ['10⁻⁵', '2.5·10⁻⁶', '–']
    """
    if value is None or value <= 0 or not math.isfinite(value):
        return number(value, digits=0)
    digits, exponent = f"{value:.3e}".split("e")
    mantissa = f"{float(digits):g}"
    tens = "10" + str(int(exponent)).translate(_SUPERSCRIPTS)
    return tens if mantissa == "1" else f"{mantissa}·{tens}"


def size(count: float) -> str:
    """Bytes in the unit that suits them.

    >>> [size(value) for value in (512, 81_920, 5_000_000)]
    ['512 B', '80.0 KiB', '4.8 MiB']
    """
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            break
        count /= 1024
    return f"{count:,.0f} B" if unit == "B" else f"{count:,.1f} {unit}"


def duration(seconds: float) -> str:
    """Seconds in the unit that suits them.

    >>> [duration(value) for value in (0.0421, 12.3, 754.2, 7322)]
    ['42 ms', '12.3 s', '12 min 34 s', '2 h 2 min']
    """
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"
