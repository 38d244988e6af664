"""What the endpoint does when somebody leaves: a client, or who serves it."""

import ipaddress
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from tiny_models import byte_alphabet
from tiny_vaults import PASSPHRASE, TWO_STEPS, served_on_a_port

from homefire.client import Personalizer
from homefire.client.endpoint import make_app, token_of
from homefire.client.personalize import decoding
from homefire.client.serving import SECONDS_TO_END, make_server, own_address, serve
from homefire.common.errors import AdapterError, ConfigError, LedgerError

pytestmark = pytest.mark.usefixtures("quick_passphrases", "no_model_is_kept")
QUESTION = [{"role": "user", "content": "a secret that only a question holds"}]
ASKED = {"model": "homefire/plain", "messages": QUESTION, "max_tokens": 100}
STEP = 0.05
FORTY_STEPS = TWO_STEPS.replace("steps = 2", "steps = 40")
Picked = list[int]


@pytest.fixture
def me(tmp_path: Path, tiny_llama: Path) -> Iterator[Personalizer]:
    home = tmp_path / "home"
    home.mkdir()
    (home / "device.toml").write_text(f'[base_model]\nname = "{tiny_llama}"\n{FORTY_STEPS}')
    with Personalizer.open(home, passphrase=PASSPHRASE) as opened:
        for n in range(6):
            opened.remember(f"line {n} of what I wrote")
        yield opened


@pytest.fixture
def picked(monkeypatch: pytest.MonkeyPatch, tiny_llama: Path) -> Picked:
    """Tokens as they are made, each a letter that takes its time."""
    made: Picked = []

    def slowly(row: Any, sampling: Any, stream: Any) -> int:
        time.sleep(STEP)
        made.append(byte_alphabet().index("a"))
        return made[-1]

    monkeypatch.setattr(decoding, "_pick", slowly)
    return made


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def comes_to_rest(picked: Picked) -> int:
    """How many tokens there are when no more are made."""
    before = -1
    while before != len(picked):
        before = len(picked)
        time.sleep(6 * STEP)
    return before


def headers(me: Personalizer) -> dict[str, str]:
    return {"Authorization": f"Bearer {token_of(me)}"}


# A client that leaves


@pytest.mark.parametrize("stream", [False, True])
def test_nothing_is_computed_for_who_has_left(
    me: Personalizer, picked: Picked, stream: bool
) -> None:
    """Nor is remembered what was not answered."""
    with served_on_a_port(make_app(me, token_of(me), learn=True)) as url:
        body = json.dumps({**ASKED, "stream": stream}).encode()
        host, port = url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as connection:
            lines = [
                "POST /v1/chat/completions HTTP/1.1",
                f"Host: {host}:{port}",
                f"Authorization: Bearer {token_of(me)}",
                f"Content-Length: {len(body)}",
                "",
                "",
            ]
            connection.sendall("\r\n".join(lines).encode() + body)
            wait_for(lambda: len(picked) > 3)
        assert comes_to_rest(picked) < 60
    assert len(me.vault.records) == 6


def test_openais_client_leaves_a_stream(me: Personalizer, picked: Picked) -> None:
    with (
        served_on_a_port(make_app(me, token_of(me), learn=True)) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key=token_of(me), max_retries=0) as client,
    ):
        with client.chat.completions.create(
            model="homefire/plain",
            messages=[{"role": "user", "content": "the quick"}],
            max_tokens=100,
            stream=True,
        ) as stream:
            pieces = (chunk.choices[0].delta.content for chunk in stream)
            assert next(piece for piece in pieces if piece)
        assert comes_to_rest(picked) < 60
        assert len(me.vault.records) == 6
        assert client.models.list().data  # and goes on
        answer = client.chat.completions.create(
            model="homefire/plain",
            messages=[{"role": "user", "content": "the quick"}],
            max_tokens=3,
        )
        assert answer.choices[0].finish_reason == "length"
    assert len(me.vault.records) == 7


# Serving that ends


@pytest.mark.parametrize("stream", [False, True])
def test_serving_ends_while_a_reply_is_made(me: Personalizer, picked: Picked, stream: bool) -> None:
    asked = {**ASKED, "stream": stream}
    took, told = end_while(me, "/v1/chat/completions", asked, lambda: picked)
    assert took < SECONDS_TO_END
    assert "serving ends" in told
    assert comes_to_rest(picked) < 60
    assert len(me.vault.records) == 6


def test_serving_does_not_wait_for_a_piece_that_takes_long(
    me: Personalizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("homefire.client.serving.SECONDS_TO_END", 0.2)
    began, go_on = threading.Event(), threading.Event()

    def stuck(row: Any, sampling: Any, stream: Any) -> int:
        began.set()
        go_on.wait(60)
        return byte_alphabet().index("a")

    monkeypatch.setattr(decoding, "_pick", stuck)
    took, told = end_while(me, "/v1/chat/completions", ASKED, began.is_set)
    go_on.set()
    assert took < 20
    assert "serving ends" not in told


def test_serving_ends_while_something_is_learned(
    me: Personalizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The training stops at its next step, and is not taken for done."""
    taken: list[int] = []
    personalize = me.personalize

    def slowly(*, progress: Any) -> Any:
        def step(done: int, steps: int) -> None:
            taken.append(done)
            time.sleep(0.2)
            progress(done, steps)

        return personalize(progress=step)

    monkeypatch.setattr(me, "personalize", slowly)
    _, told = end_while(me, "/api/personalize", {}, lambda: taken)
    assert "serving ends" in told
    assert me.assistant.lock.acquire(timeout=20)
    me.assistant.lock.release()
    assert len(taken) < 20
    assert me.status().private == ()


def end_while(
    me: Personalizer, path: str, body: Any, condition: Callable[[], Any]
) -> tuple[float, str]:
    """Tell a server to end while it answers; how long it takes, and what the client was told."""
    told: list[str] = []

    def ask() -> None:
        try:
            told.append(httpx.post(url + path, json=body, headers=headers(me), timeout=60).text)
        except httpx.HTTPError as error:
            told.append(str(error))

    server = make_server(make_app(me, token_of(me), learn=True))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        serving = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        serving.start()
        wait_for(lambda: server.started)
        asking = threading.Thread(target=ask)
        asking.start()
        wait_for(lambda: bool(condition()))
        server.should_exit = True
        start = time.monotonic()
        serving.join(60)
        took = time.monotonic() - start
        asking.join(60)
    assert not serving.is_alive()
    return took, "".join(told)


def test_there_is_little_time_to_end() -> None:
    assert 1 <= SECONDS_TO_END <= 10


# What goes wrong while a reply is made


def test_an_error_within_a_stream_is_said(
    me: Personalizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    letters = iter("abc")

    def diverging(row: Any, sampling: Any, stream: Any) -> int:
        if (letter := next(letters, None)) is None:
            raise AdapterError("the logits are not finite", hint="Weaken the adapters.")
        return byte_alphabet().index(letter)

    monkeypatch.setattr(decoding, "_pick", diverging)
    with (
        served_on_a_port(make_app(me, token_of(me), learn=True)) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key=token_of(me), max_retries=0) as client,
    ):
        stream = client.chat.completions.create(
            model="homefire/plain",
            messages=[{"role": "user", "content": "the quick"}],
            stream=True,
        )
        text = ""
        with pytest.raises(openai.APIError, match=r"not finite\. Weaken the adapters\."):
            for chunk in stream:
                text += chunk.choices[0].delta.content or ""
        assert text == "abc"
        with pytest.raises(openai.InternalServerError, match="Weaken the adapters"):
            client.chat.completions.create(
                model="homefire/plain", messages=[{"role": "user", "content": "the quick"}]
            )
    assert len(me.vault.records) == 6


@pytest.mark.parametrize("stream", [False, True])
def test_a_reply_does_not_depend_on_its_being_remembered(
    me: Personalizer,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    stream: bool,
) -> None:
    def full(*args: Any, **more: Any) -> int:
        raise LedgerError("a secret that only a question holds does not fit on the disk")

    monkeypatch.setattr(me, "remember", full)
    with served_on_a_port(make_app(me, token_of(me), learn=True)) as url:
        body = {**ASKED, "max_tokens": 4, "stream": stream}
        answer = httpx.post(
            f"{url}/v1/chat/completions", json=body, headers=headers(me), timeout=60
        )
    assert answer.status_code == 200
    assert "finish_reason" in answer.text
    assert ("[DONE]" in answer.text) is stream
    assert "LedgerError" in caplog.text
    assert "secret" not in caplog.text


def test_nothing_said_is_nothing_to_remember(
    me: Personalizer, caplog: pytest.LogCaptureFixture
) -> None:
    with served_on_a_port(make_app(me, token_of(me), learn=True)) as url:
        for content in ("", " \n"):
            body = {**ASKED, "max_tokens": 4, "messages": [{"role": "user", "content": content}]}
            answer = httpx.post(
                f"{url}/v1/chat/completions", json=body, headers=headers(me), timeout=60
            )
            assert answer.status_code == 200
    assert len(me.vault.records) == 6
    assert caplog.text == ""


# Where it is found


def test_a_page_is_found_at_an_address_of_this_machine() -> None:
    assert own_address("127.0.0.1") == "127.0.0.1"
    assert own_address("localhost") == "localhost"
    assert own_address("::1") == own_address("[::1]") == "[::1]"
    for anywhere in ("0.0.0.0", "::"):  # noqa: S104 - nothing listens
        found = own_address(anywhere)
        if found != "localhost":
            assert not ipaddress.ip_address(found.strip("[]")).is_unspecified


@pytest.mark.parametrize("name", ["box.example:80", "https://box.example", "", "a/b"])
def test_a_name_that_is_none_is_refused(me: Personalizer, name: str) -> None:
    with pytest.raises(ConfigError, match="is no host's name"):
        serve(me, port=0, names=[name])
