"""The in-process Grid: what devices get, when they run, what the server gets back."""

import time
from collections.abc import Callable
from pathlib import Path

import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.supercore.run import Run

from homefire.common.errors import DeviceError
from homefire.simulations.grid import InProcessGrid

Handler = Callable[[Message, Context], Message]


def device_app(handler: Handler) -> ClientApp:
    app = ClientApp()
    app.train()(handler)
    return app


def echo(message: Message, context: Context) -> Message:
    """Answers with what it was asked, and with its own number."""
    record = ConfigRecord({"data": b"12", "user": int(context.node_config["partition-id"])})
    return Message(RecordDict({"answer": record}), reply_to=message)


def messages(*nodes: int) -> list[Message]:
    record = ConfigRecord({"payload": b"1234567", "number": 1})
    return [
        Message(RecordDict({"plan": record}), dst_node_id=n, message_type="train", group_id="1")
        for n in nodes
    ]


def users_of(replies: list[Message]) -> list[object]:
    return [dict(reply.content["answer"].items())["user"] for reply in replies]


def test_node_i_is_user_i_minus_one_of_the_home(tmp_path: Path) -> None:
    contexts: list[Context] = []

    def remember(message: Message, context: Context) -> Message:
        contexts.append(context)
        return echo(message, context)

    grid = InProcessGrid(device_app(remember), tmp_path, 3)
    assert list(grid.get_node_ids()) == [1, 2, 3]
    replies = list(grid.send_and_receive(messages(1, 2, 3)))
    assert users_of(replies) == [0, 1, 2]
    for number, context in enumerate(contexts):
        assert context.node_id == number + 1
        assert context.node_config == {"partition-id": number, "home": str(tmp_path)}
        assert context.run_config == {}
        assert context.run_id == grid.run.run_id


def test_a_device_keeps_nothing_between_messages(tmp_path: Path) -> None:
    def remember(message: Message, context: Context) -> Message:
        assert dict(context.state) == {}
        context.state["seen"] = ConfigRecord({"yes": True})
        return echo(message, context)

    grid = InProcessGrid(device_app(remember), tmp_path, 1)
    for _ in range(2):
        assert not [r for r in grid.send_and_receive(messages(1)) if r.has_error()]


def test_devices_run_when_their_reply_is_pulled_and_one_at_a_time(tmp_path: Path) -> None:
    called: list[int] = []
    done: list[int] = []

    def remember(message: Message, context: Context) -> Message:
        called.append(context.node_id)
        return echo(message, context)

    grid = InProcessGrid(device_app(remember), tmp_path, 3, lambda: done.append(len(called)))
    identifiers = list(grid.push_messages(messages(1, 2, 3)))
    assert called == []
    assert len(set(identifiers)) == 3
    for count in (1, 2, 3):
        (reply,) = grid.pull_messages(identifiers)
        assert called == [1, 2, 3][:count]
        assert done == [1, 2, 3][:count]
        assert reply.metadata.src_node_id == count
        assert reply.metadata.reply_to_message_id == identifiers[count - 1]
    assert list(grid.pull_messages(identifiers)) == []
    assert list(grid.pull_messages(["unknown"])) == []


def test_replies_are_those_of_the_asked_messages(tmp_path: Path) -> None:
    grid = InProcessGrid(device_app(echo), tmp_path, 3)
    first, second, third = grid.push_messages(messages(1, 2, 3))
    assert users_of(list(grid.pull_messages([third]))) == [2]
    assert users_of(list(grid.pull_messages([first, third]))) == [0]
    assert users_of(list(grid.pull_messages([second]))) == [1]


@pytest.mark.parametrize("node", [0, 4, -1])
def test_a_node_that_does_not_exist_gives_an_error_reply(tmp_path: Path, node: int) -> None:
    grid = InProcessGrid(device_app(echo), tmp_path, 3)
    (reply,) = grid.send_and_receive(messages(node))
    assert reply.has_error()


@pytest.mark.parametrize(
    "error",
    [
        DeviceError("secret"),
        ValueError("secret"),
        IndexError("secret"),
        OverflowError("secret"),
        RuntimeError("secret"),
        OSError("secret"),
    ],
)
def test_a_device_that_fails_gives_an_error_reply_without_the_message(
    tmp_path: Path, error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(message: Message, context: Context) -> Message:
        if context.node_id == 2:
            raise error
        return echo(message, context)

    grid = InProcessGrid(device_app(fail), tmp_path, 3)
    one, two, three = grid.send_and_receive(messages(1, 2, 3))
    assert two.has_error()
    assert two.error.reason == type(error).__name__
    assert users_of([one, three]) == [0, 2]
    assert "device 2 failed" in caplog.text


@pytest.mark.parametrize("error", [TypeError("a bug"), AttributeError("a bug")])
def test_a_mistake_in_the_program_is_not_hidden(tmp_path: Path, error: Exception) -> None:
    def mistaken(message: Message, context: Context) -> Message:
        raise error

    grid = InProcessGrid(device_app(mistaken), tmp_path, 1)
    with pytest.raises(type(error), match="a bug"):
        grid.send_and_receive(messages(1))


def test_traffic_counts_the_bytes_that_would_travel(tmp_path: Path) -> None:
    def slow(message: Message, context: Context) -> Message:
        time.sleep(0.02)
        return echo(message, context)

    grid = InProcessGrid(device_app(slow), tmp_path, 2)
    grid.send_and_receive(messages(1, 2, 9))
    traffic = grid.traffic
    assert (traffic.messages, traffic.down, traffic.up) == (3, 3 * 7, 2 * 2)
    assert 0.04 <= traffic.device_seconds < 5


def test_the_run_can_be_taken_over_from_flower(tmp_path: Path) -> None:
    grid = InProcessGrid(device_app(echo), tmp_path, 1)
    run = Run.create_empty(run_id=77)
    grid.set_run(run)
    assert grid.run.run_id == 77


def test_messages_of_the_older_kind_are_answered_as_well(tmp_path: Path) -> None:
    grid = InProcessGrid(device_app(echo), tmp_path, 2)
    message = grid.create_message(RecordDict(), "train", 2, "1", ttl=5.0)
    assert users_of(list(grid.send_and_receive([message]))) == [1]
