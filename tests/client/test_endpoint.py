"""The endpoint: OpenAI's client against it, and the person's desk."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from starlette.testclient import TestClient
from tiny_vaults import PASSPHRASE, served_on_a_port

from homefire.client import Personalizer
from homefire.client.completions import read_request
from homefire.client.endpoint import make_app, token_of
from homefire.client.personalize.recipe import RECIPES
from homefire.common.errors import ConfigError, DataError

pytestmark = pytest.mark.usefixtures("quick_passphrases", "no_model_is_kept")
QUESTION = [{"role": "user", "content": "the quick"}]


@pytest.fixture
def me(tmp_path: Path, tiny_llama: Path) -> Iterator[Personalizer]:
    home = tmp_path / "home"
    with Personalizer.open(home, base_model=str(tiny_llama), passphrase=PASSPHRASE) as opened:
        opened.remember("my cat is called Mauzi")
        yield opened


@pytest.fixture
def client(me: Personalizer) -> TestClient:
    """Asks with the token, in this process."""
    app = make_app(me, token_of(me))
    headers = {"Authorization": f"Bearer {token_of(me)}"}
    return TestClient(app, base_url="http://127.0.0.1:8765", headers=headers)


def ask(client: TestClient, **fields: Any) -> dict[str, Any]:
    asked = {"model": "homefire/plain", "messages": QUESTION, "max_tokens": 4, **fields}
    answer = client.post("/v1/chat/completions", json=asked)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


# OpenAI's own client, over a real socket


@pytest.fixture
def served(me: Personalizer) -> Iterator[openai.OpenAI]:
    with served_on_a_port(make_app(me, token_of(me))) as url:
        base, key = f"{url}/v1", token_of(me)
        with openai.OpenAI(base_url=base, api_key=key, max_retries=0) as client:
            yield client


def test_openais_client_gets_completions(served: openai.OpenAI, me: Personalizer) -> None:
    expected = str(me.ask("the quick", recipe="plain", max_tokens=6))
    answer = served.chat.completions.create(
        model="homefire/plain",
        messages=[{"role": "user", "content": "the quick"}],
        max_completion_tokens=6,
    )
    assert answer.choices[0].message.content == expected
    assert answer.choices[0].finish_reason in ("stop", "length")
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert 0 < answer.usage.completion_tokens <= 6


def test_openais_client_gets_streams(served: openai.OpenAI, me: Personalizer) -> None:
    expected = str(me.ask("the quick", recipe="plain", max_tokens=6))
    stream = served.chat.completions.create(
        model="homefire/plain",
        messages=[{"role": "user", "content": "the quick"}],
        max_tokens=6,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == expected
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].usage is not None
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] in ("stop", "length")


def test_openais_client_lists_the_recipes(served: openai.OpenAI) -> None:
    names = [model.id for model in served.models.list()]
    assert names == ["homefire", *(f"homefire/{recipe}" for recipe in RECIPES)]


def test_openais_client_retrieves_a_model(served: openai.OpenAI) -> None:
    for name in ("homefire", "homefire/plain"):
        assert served.models.retrieve(name).id == name
    with pytest.raises(openai.NotFoundError, match="no model 'homefire/none'"):
        served.models.retrieve("homefire/none")


def test_openais_client_gets_raw_answers(served: openai.OpenAI) -> None:
    raw = served.chat.completions.with_raw_response.create(
        model="homefire/plain",
        messages=[{"role": "user", "content": "the quick"}],
        max_tokens=4,
    )
    assert raw.status_code == 200
    assert raw.headers["content-type"] == "application/json"
    assert raw.parse().choices[0].message.role == "assistant"
    with served.chat.completions.with_streaming_response.create(
        model="homefire/plain",
        messages=[{"role": "user", "content": "the quick"}],
        max_tokens=4,
        stream=True,
    ) as streamed:
        assert streamed.headers["content-type"].startswith("text/event-stream")
        assert list(streamed.iter_lines())[-2:] == ["data: [DONE]", ""]


def test_openais_client_sees_errors_as_its_own(served: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="no model 'gpt-9'"):
        served.chat.completions.create(
            model="gpt-9", messages=[{"role": "user", "content": "the quick"}]
        )
    with pytest.raises(openai.AuthenticationError):
        served.with_options(api_key="wrong").models.list()


# What may be asked


def test_drawn_replies_follow_the_seed(client: TestClient) -> None:
    drawn = [ask(client, temperature=1.0, seed=s, max_tokens=12) for s in (1, 1, 2)]
    texts = [each["choices"][0]["message"]["content"] for each in drawn]
    assert texts[0] == texts[1] != texts[2]


def test_a_long_reply_leaves_the_prompt_its_room(client: TestClient, me: Personalizer) -> None:
    """Whatever is asked for: the reply gets the rest, and says that it ended there."""
    context = me.assistant.model.base.context_length
    short = ask(client, max_tokens=4)
    for most in (context, context + 1, 10 * context, None):
        long = ask(client, max_tokens=most)
        used = long["usage"]
        assert used["prompt_tokens"] == short["usage"]["prompt_tokens"]
        text = long["choices"][0]["message"]["content"]
        assert text.startswith(short["choices"][0]["message"]["content"])
        if long["choices"][0]["finish_reason"] == "length":
            assert used["total_tokens"] == context


@pytest.mark.parametrize("most", [4, 20, 400])
def test_a_long_conversation_keeps_its_newest_turns(
    client: TestClient, me: Personalizer, most: int
) -> None:
    context = me.assistant.model.base.context_length
    turns = [{"role": "user", "content": "old " * 20}, {"role": "assistant", "content": "yes"}]
    alone = ask(client, max_tokens=most)["usage"]["prompt_tokens"]
    assert ask(client, messages=[*turns * 3, *QUESTION], max_tokens=most)["usage"][
        "prompt_tokens"
    ] in range(alone, context - min(most, context // 4) + 1)
    longest = ask(client, messages=[{"role": "user", "content": "x" * 500}], max_tokens=most)
    assert longest["usage"]["prompt_tokens"] == context - min(most, context // 4)


def test_what_is_not_done_here_is_an_error(client: TestClient) -> None:
    refused: list[dict[str, Any]] = [
        {"n": 2},
        {"tools": [{"type": "function", "function": {"name": "weather"}}]},
        {"tool_choice": "required"},
        {"logprobs": True},
        {"frequency_penalty": 0.5},
        {"response_format": {"type": "json_object"}},
        {"nonsense": 1},
        {"messages": [{"role": "assistant", "content": "", "tool_calls": [{}]}, *QUESTION]},
        {"messages": []},
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
        {"messages": [{"role": "assistant", "content": "no question"}]},
        {"temperature": -1},
        {"max_tokens": 0},
    ]
    for wrong in refused:
        asked = {"model": "homefire", "messages": QUESTION, **wrong}
        answer = client.post("/v1/chat/completions", json=asked)
        assert answer.status_code == 400, wrong
        message = answer.json()["error"]["message"]
        assert message.startswith((*wrong, "a conversation must end with a question")), message
    for raw in (b"", b"[]", b"{", b"\xff"):
        assert client.post("/v1/chat/completions", content=raw).status_code == 400


def test_what_changes_nothing_is_read_past(client: TestClient) -> None:
    """What clients send by default, and what says nothing about a reply."""
    for field in (
        {"user": "me", "metadata": {}, "store": False, "service_tier": "auto"},
        {"stop": None, "temperature": None, "tools": None},
        {"frequency_penalty": 0, "presence_penalty": 0.0, "n": 1, "logit_bias": {}},
        {"response_format": {"type": "text"}, "logprobs": False, "modalities": ["text"]},
        {"tools": [], "tool_choice": "auto", "parallel_tool_calls": True},
        {"messages": [{"role": "assistant", "content": "Hi", "tool_calls": []}, *QUESTION]},
    ):
        assert ask(client, **field)["choices"]


def test_text_in_parts_is_text() -> None:
    parts = [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]
    asked = read_request({"model": "homefire", "messages": [{"role": "user", "content": parts}]})
    assert asked.messages == [{"role": "user", "content": "one two"}]
    assert asked.recipe == "auto"


@pytest.mark.parametrize("model", ["homefire/", "homefire/auto", "gpt-4", ""])
def test_a_model_that_is_none_is_named(model: str) -> None:
    with pytest.raises(ConfigError, match="there is no model"):
        read_request({"model": model, "messages": QUESTION})


def test_without_an_encoder_there_are_no_embeddings(client: TestClient) -> None:
    answer = client.post("/v1/embeddings", json={"model": "homefire/encoder", "input": "a"})
    assert answer.status_code == 400
    assert "encoder" in answer.json()["error"]["message"]


def test_learning_is_asked_for(me: Personalizer) -> None:
    headers = {"Authorization": f"Bearer {token_of(me)}"}
    turns = [
        {"role": "assistant", "content": "Who is it?"},
        {"role": "user", "content": "It is Ann"},
    ]
    for learn, expected in ((False, 1), (True, 2)):
        app = make_app(me, token_of(me), learn=learn)
        client = TestClient(app, base_url="http://localhost", headers=headers)
        ask(client, messages=turns)
        assert len(me.vault.records) == expected
    newest = me.vault.records.newest(1)[0].record
    assert (newest.text, newest.prompt) == ("It is Ann", "Who is it?")


# The person's desk


def test_what_is_stored_can_be_seen_changed_and_forgotten(
    client: TestClient, me: Personalizer
) -> None:
    number = client.post("/api/records", json={"text": "I moved to Porto"}).json()["id"]
    shown = client.get("/api/records").json()
    assert [each["text"] for each in shown["records"]] == [
        "I moved to Porto",
        "my cat is called Mauzi",
    ]
    found = client.get("/api/records", params={"q": "where is my cat"}).json()["records"]
    assert found[0]["text"] == "my cat is called Mauzi"
    changed = client.patch(f"/api/records?id={number}", json={"text": "I moved to Lisbon"})
    assert changed.status_code == 200
    number, old = changed.json()["id"], number
    assert number != old
    assert me.vault.records[number].record.text == "I moved to Lisbon"
    gone = client.post("/api/forget", json={"ids": [number]}).json()
    assert gone["records"] == 1
    assert len(me.vault.records) == 1


def test_pages_of_records_follow_each_other(client: TestClient, me: Personalizer) -> None:
    for n in range(60):
        me.remember(f"number {n}")
    first = client.get("/api/records").json()
    second = client.get("/api/records", params={"before": first["next"]}).json()
    assert len(first["records"]) == 50
    assert len(second["records"]) == 11
    assert second["next"] is None


HALF = '"\\ud800"'
"""A text in JSON that is none."""


@pytest.mark.parametrize(
    ("method", "path", "body", "what"),
    [
        ("POST", "/api/records", '{"text": " "}', "text"),
        ("POST", "/api/records", '{"text": 5}', "text"),
        ("POST", "/api/records", f'{{"text": {HALF}}}', "half of a character"),
        ("POST", "/api/records", "{}", "text"),
        ("PATCH", "/api/records?id=999", '{"text": "a"}', "no record 999"),
        ("PATCH", "/api/records?id=x", '{"text": "a"}', "id"),
        ("PATCH", "/api/records?id=-1", '{"text": "a"}', "id"),
        ("PATCH", "/api/records", '{"text": "a", "id": true}', "id"),
        ("PATCH", "/api/records", '{"text": "a"}', "id"),
        ("POST", "/api/forget", "{}", "nothing says what to forget"),
        ("POST", "/api/forget", '{"ids": "1"}', "ids"),
        ("POST", "/api/forget", '{"ids": [true]}', "ids.0"),
        ("POST", "/api/forget", f'{{"ids": [{10**30}]}}', "ids.0"),
        ("POST", "/api/forget", '{"query": 5}', "query"),
        ("POST", "/api/forget", '{"query": ""}', "query"),
        ("POST", "/api/forget", '{"before": 5}', "before"),
        ("POST", "/api/forget", '{"before": "soon"}', "soon"),
        ("POST", "/api/forget", '{"everything": true}', "everything"),
        ("POST", "/api/profile", f'{{"name": "name", "value": {HALF}}}', "half of a character"),
        ("POST", "/api/profile", '{"name": "name", "value": 5}', "value"),
        ("POST", "/api/profile", '{"name": " ", "value": "a"}', "name"),
        ("POST", "/api/profile", f'{{"name": "{"n" * 201}", "value": "a"}}', "name"),
        ("POST", "/api/erase", '{"word": "yes"}', "word"),
        ("POST", "/api/erase", '{"word": NaN}', "not JSON"),
        ("POST", "/api/personalize", '{"steps": 1}', "steps"),
        ("GET", "/api/records?before=x", "", "before"),
        ("GET", "/api/records?before=0", "", "before"),
        ("GET", "/api/records?before=99999999999999999999999", "", "before"),
        ("GET", f"/api/records?q={'x' * 2001}", "", "q"),
        ("GET", "/api/status", "[1]", "no JSON object"),
        ("GET", "/api/status", "[" * 100_000, "not JSON"),
    ],
)
def test_what_is_wrong_is_said(
    client: TestClient, me: Personalizer, method: str, path: str, body: str, what: str
) -> None:
    answer = client.request(method, path, content=body)
    assert answer.status_code == 400
    assert what in answer.json()["error"]["message"]
    assert len(me.vault.records) == 1


def test_half_a_character_is_no_message(client: TestClient) -> None:
    body = f'{{"model": "homefire", "messages": [{{"role": "user", "content": {HALF}}}]}}'
    assert client.post("/v1/chat/completions", content=body).status_code == 400


def test_a_profile_is_counted_on_the_newest_records(
    client: TestClient, me: Personalizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many there are, the page shows it at once."""
    monkeypatch.setattr("homefire.client.desk.COUNTED", 3)
    for _ in range(3):
        me.remember("umbrellas everywhere")
    shown = client.get("/api/profile").json()
    assert shown["records"] == 3
    assert shown["words"] == [["everywhere", 3], ["umbrellas", 3]]


def test_facts_status_and_what_was_shared(client: TestClient, me: Personalizer) -> None:
    client.post("/api/profile", json={"name": "name", "value": "Ann"})
    assert client.get("/api/profile").json()["facts"] == {"name": "Ann"}
    assert client.get("/api/status").json()["records"] == 1
    assert client.get("/api/shared").json() == {"participations": []}
    me.vault.log.append(
        "participation",
        run="a" * 32,
        round=1,
        adapter_digest="b" * 64,
        rule="gaussian",
        charge=0.25,
        plan_digest="c" * 64,
    )
    (entry,) = client.get("/api/shared").json()["participations"]
    assert entry == {"run": "a" * 32, "round": 1, "rule": "gaussian", "charge": 0.25}


def test_the_word_erases(client: TestClient, me: Personalizer) -> None:
    receipt = client.post("/api/erase", json={"word": "erase"}).json()
    assert receipt["records"] == 1
    assert not (me.vault.folder / "keys.json").exists()
    answer = client.get("/api/status")
    assert answer.status_code == 503
    assert json.loads(answer.text)["error"]["message"]


def test_reading_a_request_names_the_field() -> None:
    with pytest.raises(DataError, match="tools is not done here"):
        read_request({"model": "homefire", "messages": QUESTION, "tools": [{}]})
    with pytest.raises(DataError, match=r"messages\.0\.role"):
        read_request({"model": "homefire", "messages": [{"role": "tool", "content": ""}]})
