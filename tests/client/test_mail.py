"""Mailboxes: what the person sent, in the person's own words."""

import mailbox
from email.message import EmailMessage
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from homefire.client.mail import own_words, read_sent
from homefire.common.errors import DataError
from homefire.common.records import Record, Skipped

ME, BO = "ann@example.org", "bo@example.org"
WRITTEN = "mellon"  # stands for what a person wrote; no error may hold it


def letter(text: str = WRITTEN, sender: str = ME, **headers: str) -> EmailMessage:
    message = EmailMessage()
    message["From"] = sender
    for name, value in headers.items():
        message[name] = value
    message.set_content(text)
    return message


def raw(*headers: str, body: str = WRITTEN, encoding: str = "utf-8") -> bytes:
    return "\n".join((f"From: {ME}", *headers, "", body)).encode(encoding)


def post(path: Path, *messages: EmailMessage | bytes) -> Path:
    box = mailbox.mbox(path / "sent.mbox")
    for message in messages:
        box.add(message)
    box.close()
    return path / "sent.mbox"


def only(path: Path, message: EmailMessage | bytes) -> Record:
    (record,) = read_sent(post(path, message), ME)
    return record


def test_what_the_person_sent_is_read_in_order(tmp_path: Path) -> None:
    letters = (letter("one"), letter("two", BO), letter("three"), letter("four", f"Bo <{BO}>"))
    assert [record.text for record in read_sent(post(tmp_path, *letters), ME)] == ["one", "three"]


def test_a_record_has_subject_date_and_kind(tmp_path: Path) -> None:
    message = letter("Yes.", Subject="Tea  at\tfive?", Date="Wed, 1 Jan 2025 13:00:00 +0100")
    assert only(tmp_path, message) == Record(
        "Yes.",
        "Write an e-mail with the subject: Tea at five?",
        "2025-01-01T12:00:00+00:00",
        "email",
    )


@pytest.mark.parametrize("me", [ME, "ANN@EXAMPLE.ORG", f"x@example.org, Ann <{ME}>", f"{ME},"])
@pytest.mark.parametrize(
    "sender", [ME, f'"Blue, Ann" <{ME.upper()}>', f"=?utf-8?q?=C3=84?= <{ME}>"]
)
def test_addresses_are_the_same_however_they_are_written(
    tmp_path: Path, me: str, sender: str
) -> None:
    message = f"From: {sender}\n\n{WRITTEN}".encode()
    assert [record.text for record in read_sent(post(tmp_path, message), me)] == [WRITTEN]


@pytest.mark.parametrize(
    ("header", "subject"),
    [
        ("Subject: =?utf-8?q?Gr=C3=BC=C3=9Fe?= =?iso-8859-1?b?5A==?= x", "Grüßeä x"),
        ("Subject: Grüße", "Grüße"),
        ("Subject: =?no-such?q?Gr=C3=BC=C3=9Fe?=", "Grüße"),
        ("Subject: =?utf-8?q?=FF?=", "\ufffd"),
        ("Subject: =?utf-8?b?a?=", "=?utf-8?b?a?="),
        ("Subject: one\n two", "one two"),
        ("Subject:  ", None),
        ("X-Other: x", None),
    ],
)
def test_subjects_are_decoded(tmp_path: Path, header: str, subject: str | None) -> None:
    prompt = subject and f"Write an e-mail with the subject: {subject}"
    assert only(tmp_path, raw(header)).prompt == prompt


@pytest.mark.parametrize(
    ("date", "iso"),
    [
        ("Wed, 1 Jan 2025 00:30:00 +0100", "2024-12-31T23:30:00+00:00"),
        ("1 Jan 2025 12:00:00 -0000", "2025-01-01T12:00:00+00:00"),
        ("Wed, 1 Jan 2025 12:00:00 GMT (noon)", "2025-01-01T12:00:00+00:00"),
        ("Wed, 32 Jan 2025 12:00:00 +0000", None),
        ("Fri, 31 Dec 9999 23:30:00 -0100", None),
        ("Wed, 1 Jan 2025 12:00:00 +9999999", None),
        ("yesterday", None),
        ("", None),
    ],
)
def test_a_date_is_in_utc_or_absent(tmp_path: Path, date: str, iso: str | None) -> None:
    assert only(tmp_path, raw(f"Date: {date}")).created_at == iso


def test_a_message_without_a_date_is_read(tmp_path: Path) -> None:
    assert only(tmp_path, raw()).created_at is None


@pytest.mark.parametrize(
    ("charset", "encoding", "text"),
    [
        ("utf-8", "utf-8", "mellön"),
        ("iso-8859-1", "latin-1", "mellön"),
        ("koi8-r", "koi8-r", "друг"),
        ("no-such", "utf-8", "mellön"),
        ("idna", "utf-8", "mellön"),
        ("hex", "utf-8", "mellön"),
    ],
)
def test_texts_are_decoded(tmp_path: Path, charset: str, encoding: str, text: str) -> None:
    message = raw(f"Content-Type: text/plain; charset={charset}", body=text, encoding=encoding)
    assert only(tmp_path, message).text == text


def test_bytes_that_are_no_text_are_replaced(tmp_path: Path) -> None:
    message = raw("Content-Type: text/plain; charset=utf-8", body="mellön", encoding="latin-1")
    assert only(tmp_path, message).text == "mell\ufffdn"


def test_the_plain_alternative_is_read_and_no_attachment(tmp_path: Path) -> None:
    message = letter("own")
    message.add_alternative("<p>own</p>", subtype="html")
    message.add_attachment("of somebody", filename="a.txt")
    message.add_attachment("of somebody", filename="b.txt", disposition="inline")
    message.add_attachment(b"\x89PNG", maintype="image", subtype="png", filename="c.png")
    message.add_attachment(letter("of somebody", BO))
    assert only(tmp_path, message).text == "own"


def test_a_text_around_a_picture_is_one(tmp_path: Path) -> None:
    message = EmailMessage()
    message["From"] = ME
    message.make_mixed()
    for text in ("before", "after"):
        part = EmailMessage()
        part.set_content(text)
        message.attach(part)
    assert only(tmp_path, message).text.split() == ["before", "after"]


def test_a_line_that_the_mailbox_had_to_mark_is_no_quotation(tmp_path: Path) -> None:
    text = "Dear Bo,\nFrom here it is far."
    assert b"\n>From here" in post(tmp_path, raw(body=text)).read_bytes()
    assert [record.text for record in read_sent(tmp_path / "sent.mbox", ME)] == [text]


OWN = {
    "nothing else": ("Yes.\nNo.", "Yes.\nNo."),
    "blank lines around": ("\n\nYes.\n\n", "Yes."),
    "a quotation": ("Yes.\n> Is it?\n>> Was it?\nNo.", "Yes.\nNo."),
    "an introduction": ("Yes.\n\nOn 1 Jan, Bo <bo@x> wrote:\n> Is it?", "Yes."),
    "an introduction and a blank line": ("On 1 Jan, Bo wrote: \n\n> Is it?\nYes.", "Yes."),
    "an introduction in two lines": ("Yes.\nOn 1 Jan 2025 at 12:00 Bo\n<bo@x> wrote:\n> x", "Yes."),
    "an introduction that ends in a line": ("Yes.\nOn 1 Jan 2025, Bo\nwrote:\n> x", "Yes."),
    "an introduction to nothing": ("On Monday Bo wrote:\nYes.", "On Monday Bo wrote:\nYes."),
    "answers between": ("On Monday, Bo wrote:\n> a\nYes.\n> b\nNo.", "Yes.\nNo."),
    "a signature": ("Yes.\n-- \nAnn\n-- \nx", "Yes."),
    "a dash": ("Yes\n--\nNo\n- x", "Yes\n--\nNo\n- x"),
    "an original": ("Yes.\n\n-----Original Message-----\nFrom: Bo\n\nIs it?", "Yes."),
    "a forwarded one": ("See.\n---------- Forwarded message ---------\nFrom: Bo\nIs it?", "See."),
    "lines of Windows": ("Yes.\r\n> x\r\nNo.\r\n-- \r\nAnn", "Yes.\nNo."),
    "a marked line": (">From here it is far.", "From here it is far."),
    "only others' words": ("On Monday, Bo wrote:\n> Is it?", ""),
}


@pytest.mark.parametrize(("body", "own"), OWN.values(), ids=OWN.keys())
def test_own_words(body: str, own: str) -> None:
    assert own_words(body) == own


@given(st.text(st.sampled_from("ab >-\nO")), st.text(st.sampled_from("ab >-\nO")))
def test_quoted_and_signed_words_are_nobodys(own: str, others: str) -> None:
    quoted = "\n".join(f"> {line}" for line in others.split("\n"))
    assert own_words(f"{own}\n\nOn Monday, Bo wrote:\n{quoted}\n-- \n{others}") == own_words(own)
    assert own_words(f"{quoted}\n{own}") == own_words(own)


def test_a_message_without_plain_text_is_an_error_or_counted(tmp_path: Path) -> None:
    page = EmailMessage()
    page["From"] = ME
    page.set_content(f"<p>{WRITTEN}</p>", subtype="html")
    path = post(tmp_path, letter(), page)
    with pytest.raises(DataError, match=r"sent\.mbox, message 2: no plain text") as error:
        list(read_sent(path, ME))
    assert WRITTEN not in str(error.value) and error.value.hint
    skipped = Skipped()
    assert [record.text for record in read_sent(path, ME, skipped=skipped)] == [WRITTEN]
    assert skipped.reasons == {"no plain text": 1}


def test_a_message_with_nothing_of_the_persons_is_an_error_or_counted(tmp_path: Path) -> None:
    path = post(tmp_path, letter(f"> {WRITTEN}\n"), letter())
    with pytest.raises(DataError, match="message 1: a record needs a non-empty 'text'") as error:
        list(read_sent(path, ME))
    assert WRITTEN not in str(error.value)
    skipped = Skipped()
    assert [record.text for record in read_sent(path, ME, skipped=skipped)] == [WRITTEN]
    assert skipped.reasons == {"empty text": 1}


def endless(sender: str) -> bytes:
    """A message of parts within parts, more than Python can follow."""
    parts = "".join(
        f'Content-Type: multipart/mixed; boundary="{n}"\n\n--{n}\n' for n in range(1200)
    )
    return f"From: {sender}\n{parts}".encode()


@pytest.mark.parametrize(
    "message",
    [
        endless(ME),
        raw(
            "Content-Type: multipart/mixed; boundary=a; x*1=1; x*=2",
            body=f"--a\n\n{WRITTEN}\n--a--",
        ),
    ],
    ids=["parts without end", "parameters"],
)
def test_a_broken_message_is_an_error_or_counted(tmp_path: Path, message: bytes) -> None:
    path = post(tmp_path, letter(), message)
    with pytest.raises(DataError, match="message 2: broken headers or parts") as error:
        list(read_sent(path, ME))
    assert WRITTEN not in str(error.value)
    skipped = Skipped()
    assert [record.text for record in read_sent(path, ME, skipped=skipped)] == [WRITTEN]
    assert skipped.reasons == {"broken message": 1}


def test_broken_messages_of_others_do_not_matter(tmp_path: Path) -> None:
    path = post(tmp_path, endless(BO), letter(), b"\xff\xfe\n\n\xff", letter(f"{WRITTEN}", ""))
    assert [record.text for record in read_sent(path, ME)] == [WRITTEN]


@pytest.mark.parametrize("me", [None, "", "Ann", ","])
def test_without_an_address_nobodys_messages_are_read(tmp_path: Path, me: str | None) -> None:
    with pytest.raises(DataError, match=r"sent\.mbox: which messages are yours") as error:
        list(read_sent(post(tmp_path, letter()), me))
    assert "Give your e-mail address" in error.value.hint


@pytest.mark.parametrize("skipped", [None, Skipped()])
def test_an_address_that_sent_nothing_is_an_error(tmp_path: Path, skipped: Skipped | None) -> None:
    path = post(tmp_path, letter(), letter())
    with pytest.raises(DataError, match=f"none of its 2 messages is from {BO}, x@x") as error:
        list(read_sent(path, f"x@x, {BO}", skipped=skipped))
    assert "every address" in error.value.hint


def test_another_file_is_an_error_but_an_empty_one_is_not(tmp_path: Path) -> None:
    path = tmp_path / "sent.mbox"
    path.write_bytes(b"")
    assert list(read_sent(path, ME)) == []
    path.write_bytes(WRITTEN.encode())
    with pytest.raises(DataError, match=r"sent\.mbox: not an mbox file"):
        list(read_sent(path, ME, skipped=Skipped()))


def test_the_mailbox_stays_as_it_was(tmp_path: Path) -> None:
    path = post(tmp_path, letter(), letter())
    before = path.read_bytes(), path.stat().st_mtime_ns
    path.chmod(0o400)
    assert len(list(read_sent(path, ME))) == 2
    assert (path.read_bytes(), path.stat().st_mtime_ns) == before
    assert list(tmp_path.iterdir()) == [path]


names = st.sampled_from(
    ["Subject", "Date", "From", "Content-Type", "Content-Disposition", "Content-Transfer-Encoding"]
)
values = st.lists(
    st.sampled_from(
        [
            *("multipart/mixed", "text/plain", "attachment", "; ", "boundary=a", "charset=", "*"),
            *("utf-7", "undefined", "idna", "filename*0*=", "''", '"', "=?utf-8?b?a?=", "=?", "?="),
            *(
                "base64",
                "quoted-printable",
                "uuencode",
                "1 Jan 2025",
                "99:99",
                "+0100",
                ME,
                "<",
                "\n ",
            ),
        ]
    )
    | st.text(st.characters(max_codepoint=0x17F), max_size=4),
    max_size=6,
).map("".join)


@settings(max_examples=150)
@given(st.lists(st.tuples(names, values), max_size=5), st.text(max_size=20))
def test_any_message_is_a_record_or_an_error(
    tmp_path_factory: pytest.TempPathFactory, headers: list[tuple[str, str]], body: str
) -> None:
    path = tmp_path_factory.mktemp("mail") / "sent.mbox"
    head = "".join(f"{name}: {value}\n" for name, value in headers)
    message = f"From x\nFrom: {ME}\n{head}\n--a\n{WRITTEN}\n{body}"
    path.write_bytes(message.encode("utf-8", "replace"))
    for skipped in (None, Skipped()):
        try:
            list(read_sent(path, ME, skipped=skipped))
        except DataError as error:
            assert WRITTEN not in str(error)
