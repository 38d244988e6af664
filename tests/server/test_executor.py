"""Flower's executor for the ServerApp: one kind of task, one at a time."""

import os
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from flwr.supercore.constant import TaskType
from flwr.supercore.superexec.executor.types import ExecutionSpec, LaunchResultStatus

from homefire.common.files import hold, is_held
from homefire.server import executor as executor_module
from homefire.server.executor import OneServerApp

TOKEN = "a task's token"
SCRIPT = """#!/bin/sh
read -r token
echo "$token" > {folder}/token
echo "$@" > {folder}/arguments
{body}
"""


def spec(task: TaskType = TaskType.SERVER_APP, authority: str | None = None) -> ExecutionSpec:
    return ExecutionSpec(
        task_type=task,
        runtime_api_address="127.0.0.1:9",
        token=TOKEN,
        insecure=authority is None,
        root_certificates_path=authority,
        runtime_dependency_install=False,
        parent_pid=None,
        suppress_output=False,
        task_id=1,
    )


def python_is(folder: Path, patch: pytest.MonkeyPatch, body: str) -> None:
    """What runs in the place of Python."""
    path = folder / "python"
    path.write_text(SCRIPT.format(folder=folder, body=body))
    path.chmod(0o700)
    patch.setattr(executor_module, "sys", SimpleNamespace(executable=str(path)))


@pytest.fixture
def executor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[OneServerApp]:
    monkeypatch.setattr(executor_module, "PATIENCE", 0.1)
    monkeypatch.setattr(executor_module, "END_SECONDS", 0.3)
    python_is(tmp_path, monkeypatch, "exec sleep 60")
    executor = OneServerApp(tmp_path / "serverapp.lock")
    yield executor
    executor.close()


def wait_for(path: Path) -> str:
    deadline = time.monotonic() + 20
    while not path.exists() or not (text := path.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return text


@pytest.mark.parametrize("task", [each for each in TaskType if each != TaskType.SERVER_APP])
def test_one_kind_tasks_that_are_no_serverapps_are_refused(
    executor: OneServerApp, task: TaskType
) -> None:
    result = executor.launch(spec(task))
    assert result.status is LaunchResultStatus.FAILED
    assert not executor.lock.exists()
    assert executor.get_eligible_capacity([task]) == (set(), set())
    both = executor.get_eligible_capacity([task, TaskType.SERVER_APP])
    assert both == ({TaskType.SERVER_APP}, set())


def test_one_at_a_time_the_second_is_refused_until_the_first_has_ended(
    executor: OneServerApp,
) -> None:
    assert executor.launch(spec()).status is LaunchResultStatus.ACCEPTED
    assert is_held(executor.lock)
    assert executor.launch(spec()).status is LaunchResultStatus.FAILED
    first = executor._process
    assert first is not None
    first.kill()
    first.wait()
    assert not is_held(executor.lock)
    executor.reconcile()
    assert executor.launch(spec()).status is LaunchResultStatus.ACCEPTED


def test_one_at_a_time_also_where_an_executor_before_started_it(executor: OneServerApp) -> None:
    descriptor = hold(executor.lock)
    assert descriptor is not None
    assert executor.launch(spec()).status is LaunchResultStatus.FAILED
    os.close(descriptor)
    assert executor.launch(spec()).status is LaunchResultStatus.ACCEPTED


def test_one_at_a_time_the_lock_says_when_it_was_started(executor: OneServerApp) -> None:
    executor.lock.touch()
    os.utime(executor.lock, ns=(5, 5))
    os.close(hold(executor.lock) or -1)
    assert executor.lock.stat().st_mtime_ns == 5, "to look is no start"
    executor.launch(spec())
    assert executor.lock.stat().st_mtime_ns > 5


def test_the_token_is_in_no_argument(executor: OneServerApp, tmp_path: Path) -> None:
    executor.launch(spec(authority="/tls/ca.crt"))
    assert wait_for(tmp_path / "token") == f"{TOKEN}\n"
    arguments = wait_for(tmp_path / "arguments").split()
    assert arguments[:2] == ["-m", "homefire.server.serverapp"]
    assert TOKEN.split()[0] not in arguments
    given = dict(zip(arguments[2::2], arguments[3::2], strict=True))
    assert given == {
        "--runtime": "127.0.0.1:9",
        "--parent": str(os.getpid()),
        "--log": str(tmp_path / "logs" / "serverapp.log"),
        "--root-certificates": "/tls/ca.crt",
    }


def test_the_serverapp_ends_with_it(executor: OneServerApp) -> None:
    executor.launch(spec())
    process = executor._process
    assert process is not None
    executor.close()
    assert process.returncode is not None
    assert not is_held(executor.lock)
    executor.close()


def test_a_serverapp_that_does_not_end_when_asked_is_killed(
    executor: OneServerApp, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    busy = f'trap "" TERM; touch {tmp_path}/busy; while :; do sleep 0.05; done'
    python_is(tmp_path, monkeypatch, busy)
    monkeypatch.setattr(executor_module, "PATIENCE", 2.0)
    executor.launch(spec())
    process = executor._process
    assert process is not None
    deadline = time.monotonic() + 20
    while not (tmp_path / "busy").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    executor.close()
    assert process.returncode == -9
