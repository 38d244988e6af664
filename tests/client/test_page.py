"""The person's page in a real browser: everything on it works, and nothing leaves the machine."""

import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Dialog, Page, Route, expect, sync_playwright
from tiny_models import byte_alphabet
from tiny_vaults import PASSPHRASE, served_on_a_port

from homefire.client import Personalizer
from homefire.client.endpoint import make_app, token_of
from homefire.client.personalize import decoding
from homefire.common.errors import AdapterError

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome") or ""
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not CHROMIUM, reason="no chromium on this machine"),
    pytest.mark.usefixtures("quick_passphrases", "no_model_is_kept"),
]
SETTINGS = """
[private]
validate_every = 2

[private.training]
steps = 4
batch_size = 2
max_tokens = 32
learning_rate = 0.02
"""


@pytest.fixture
def me(tmp_path: Path, tiny_llama: Path) -> Iterator[Personalizer]:
    home = tmp_path / "home"
    home.mkdir()
    (home / "device.toml").write_text(f'[base_model]\nname = "{tiny_llama}"\n{SETTINGS}')
    with Personalizer.open(home, passphrase=PASSPHRASE) as opened:
        for n in range(8):
            opened.remember(f"I wrote this one, number {n}", created_at=f"2025-01-0{n + 1}")
        opened.remember("my cat is called Mauzi", prompt="Who is it?")
        opened.remember('<img src=x onerror="document.title=1">')
        yield opened


@pytest.fixture
def url(me: Personalizer) -> Iterator[str]:
    with served_on_a_port(make_app(me, token_of(me))) as address:
        yield address


@pytest.fixture
def asked() -> list[str]:
    """What the page asked before it did it; it was told to go on."""
    return []


@pytest.fixture
def page(url: str, me: Personalizer, asked: list[str]) -> Iterator[Page]:
    """Opened at the address that the command prints; a request to anywhere else fails the test."""
    elsewhere: list[str] = []
    errors: list[str] = []

    def only_here(route: Route) -> None:
        if route.request.url.startswith((url, "data:")):
            route.continue_()
        else:
            elsewhere.append(route.request.url)
            route.abort()

    def accept(dialog: Dialog) -> None:
        asked.append(dialog.message)
        dialog.accept()

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        opened = browser.new_page(viewport={"width": 900, "height": 760})
        opened.route("**/*", only_here)
        opened.on("pageerror", lambda error: errors.append(str(error)))
        opened.on("dialog", accept)
        opened.goto(f"{url}/#token={token_of(me)}")
        yield opened
        browser.close()
    assert elsewhere == []
    assert errors == []


def look(page: Page, name: str) -> None:
    """Keep a picture where HOMEFIRE_SCREENSHOTS says so."""
    if folder := os.environ.get("HOMEFIRE_SCREENSHOTS"):
        page.screenshot(path=Path(folder) / f"{name}.png", full_page=True)


def test_the_token_leaves_the_address(page: Page, url: str, me: Personalizer) -> None:
    expect(page.locator("#where")).to_contain_text(str(me.vault.folder))
    assert token_of(me) not in page.url
    page.reload()
    expect(page.locator("#where")).to_contain_text(str(me.vault.folder))


def test_without_the_token_nothing_is_shown(page: Page, url: str) -> None:
    other = page.context.browser.new_page()  # type: ignore[union-attr]
    other.goto(f"{url}/#memory")
    expect(other.locator("#notice")).to_contain_text("homefire device serve")
    assert "Mauzi" not in other.content()
    other.close()


def test_talk(page: Page) -> None:
    page.select_option("#recipe", "homefire/plain")
    page.fill("#question", "the quick")
    page.press("#question", "Enter")
    expect(page.locator("#talk .person")).to_have_text("the quick")
    expect(page.locator("#stop")).to_be_hidden(timeout=30_000)
    expect(page.locator("#talk .model")).not_to_have_text("…")
    look(page, "chat")
    page.fill("#question", "and more?")
    page.click("#send")
    expect(page.locator("#talk .model")).to_have_count(2)
    expect(page.locator("#stop")).to_be_hidden(timeout=30_000)


def test_who_asks_at_once_gets_what_works_best(page: Page, url: str) -> None:
    """Before the page has heard which recipes there are."""
    page.route(f"{url}/v1/models", lambda route: None)  # never answered
    page.reload()
    page.fill("#question", "the quick")
    page.click("#send")
    expect(page.locator("#stop")).to_be_hidden(timeout=30_000)
    expect(page.locator("#talk .model")).not_to_have_text("(no reply)")
    expect(page.locator("#notice")).to_be_empty()


def test_a_reply_can_be_stopped(page: Page, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that would take half a minute, letter by letter."""

    def slowly(*_: Any) -> int:
        time.sleep(0.1)
        return byte_alphabet().index("a")

    monkeypatch.setattr(decoding, "_pick", slowly)
    page.fill("#question", "the quick")
    page.click("#send")
    page.click("#stop")
    expect(page.locator("#stop")).to_be_hidden()
    expect(page.locator("#send")).to_be_enabled()


def test_what_goes_wrong_within_a_reply_is_said(
    page: Page, monkeypatch: pytest.MonkeyPatch
) -> None:
    letters = iter("abc")

    def diverging(row: Any, sampling: Any, stream: Any) -> int:
        if (letter := next(letters, None)) is None:
            raise AdapterError("the logits are not finite", hint="Weaken the adapters.")
        return byte_alphabet().index(letter)

    monkeypatch.setattr(decoding, "_pick", diverging)
    page.fill("#question", "the quick")
    page.click("#send")
    expect(page.locator("#notice")).to_have_text("the logits are not finite. Weaken the adapters.")
    expect(page.locator("#talk .model")).to_have_text("abc")
    expect(page.locator("#send")).to_be_enabled()
    look(page, "chat-error")


def test_see_search_edit_and_forget(page: Page, me: Personalizer, asked: list[str]) -> None:
    page.click("nav a[data-view=memory]")
    expect(page.locator("#records li")).to_have_count(10)
    expect(page.locator("#forgotten")).to_have_text("Forgotten or changed so far: nothing.")
    expect(page.locator("#shown")).to_contain_text("Your newest 10 records")
    look(page, "memory")
    page.fill("#words", "where is my cat")
    page.click("#search button")
    expect(page.locator("#records .text").first).to_have_text("my cat is called Mauzi")
    item = page.locator("#records li").first
    item.get_by_role("button", name="Edit").click()
    item.get_by_label("Text of the record").fill("my cat is called Minka")
    item.get_by_role("button", name="Save").click()
    expect(page.locator("#records .text").first).to_have_text("my cat is called Minka")
    assert me.search("Minka")
    assert asked == ["Forget the old text, and the private adapters that have seen it?"]
    expect(page.locator("#forgotten")).to_contain_text("so far: 1 records")
    page.locator("#records li").first.get_by_role("button", name="Forget").click()
    expect(page.locator("#count")).to_contain_text("1 forgotten")
    expect(page.locator("#forgotten")).to_contain_text("so far: 2 records")
    assert asked[1:] == ["Forget this, and the private adapters that have seen it?"]
    assert me.search("Minka") == []
    page.fill("#words", "")
    page.fill("#new-text", "something new")
    page.click("#remember button")
    expect(page.locator("#records .text").first).to_have_text("something new")
    page.fill("#fact-name", "name")
    page.fill("#fact-value", "Ann")
    page.click("#fact button")
    expect(page.locator("#facts dd")).to_have_text("Ann")
    page.click("summary")
    page.fill("#date", "2025-01-05")
    page.click("#forget-before button")
    expect(page.locator("#count")).to_contain_text("4 forgotten")
    expect(page.locator("#shown")).to_contain_text("Your newest 6 records")
    look(page, "memory-after")
    page.click("nav a[data-view=vault]")
    expect(page.locator("#about")).to_contain_text("6 records, and 0 private")
    look(page, "vault-after")


def test_leaving_a_text_as_it_is_forgets_nothing(
    page: Page, me: Personalizer, asked: list[str]
) -> None:
    page.click("nav a[data-view=memory]")
    page.locator("#records li").nth(1).get_by_role("button", name="Edit").click()
    page.get_by_role("button", name="Save").click()
    expect(page.get_by_role("button", name="Edit")).to_have_count(10)
    assert asked == []
    assert me.status().forgotten == 0


def test_text_is_text(page: Page) -> None:
    """What somebody wrote is never run."""
    page.click("nav a[data-view=memory]")
    expect(page.locator("#records li")).to_have_count(10)
    assert page.locator("#records img").count() == 0
    assert page.title() == "homefire"


def test_what_was_shared(page: Page, me: Personalizer) -> None:
    page.click("nav a[data-view=shared]")
    expect(page.locator("#never")).to_be_visible()
    for number in (1, 2):
        me.vault.log.append(
            "participation",
            run="a" * 32,
            round=number,
            adapter_digest="b" * 64,
            rule="banded-sqrt, z = 1.2",
            charge=0.5,
            plan_digest="c" * 64,
        )
    page.click("nav a[data-view=chat]")
    page.click("nav a[data-view=shared]")
    expect(page.locator("#participations tr")).to_have_count(2)
    expect(page.locator("#spent")).to_contain_text("of 10 allowed")
    look(page, "shared")


def test_learn_and_erase(page: Page, me: Personalizer) -> None:
    page.click("nav a[data-view=vault]")
    expect(page.locator("#adapter")).to_have_text("None is in use.")
    page.click("#personalize")
    expect(page.locator("#learning")).to_contain_text("Done", timeout=60_000)
    look(page, "vault")
    page.fill("#word", "erase")
    page.click("#erase button")
    expect(page.locator("main")).to_contain_text("can no longer be read")
    assert not (me.vault.folder / "keys.json").exists()


def test_a_narrow_screen_has_no_sideways_scrolling(page: Page) -> None:
    page.set_viewport_size({"width": 360, "height": 700})
    for view in ("chat", "memory", "shared", "vault"):
        page.click(f"nav a[data-view={view}]")
        page.wait_for_timeout(200)
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        if view == "memory":
            item = page.locator("#records li").last
            tops = [item.get_by_role("button", name=n).bounding_box() for n in ("Edit", "Forget")]
            assert tops[0] and tops[1] and tops[0]["y"] == tops[1]["y"]
        look(page, f"narrow-{view}")
