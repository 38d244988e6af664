"""Micro-cohorts: order, memory, and what happens when that runs out."""

import threading
from collections.abc import Iterator, Sequence

import pytest
import torch

from homefire.common.errors import HomefireError
from homefire.simulations import micro_cohorts
from homefire.simulations.micro_cohorts import (
    MARGIN,
    MOST_TOKENS,
    Crew,
    Kept,
    MicroCohort,
    fitting_users,
    is_out_of_memory,
)

CPU = torch.device("cpu")


def double(worker: str, items: Sequence[int]) -> list[int]:
    return [2 * item for item in items]


# Order and streaming


@pytest.mark.parametrize("workers", [1, 2, 3])
@pytest.mark.parametrize("users", [1, 2, 5, 100])
@pytest.mark.parametrize("total", [0, 1, 7, 23])
def test_results_are_in_the_order_of_the_items(workers: int, users: int, total: int) -> None:
    """Also where earlier items take longer."""
    crew = Crew([f"worker {n}" for n in range(workers)])
    seen: list[int] = []

    def work(worker: str, items: Sequence[int]) -> list[int]:
        assert 1 <= len(items) <= users
        if 0 in items and workers > 1:
            threading.Event().wait(0.02)
        seen.extend(items)
        return double(worker, items)

    found = list(crew.map(range(total), work, MicroCohort(users), total=total))
    assert found == [2 * n for n in range(total)]
    assert sorted(seen) == list(range(total))


@pytest.mark.parametrize("total", [1, 50])
def test_a_wrong_total_loses_nobody(total: int) -> None:
    crew = Crew(["one", "two"])
    assert list(crew.map(range(20), double, MicroCohort(4), total=total)) == [
        2 * n for n in range(20)
    ]


@pytest.mark.parametrize("workers", [1, 2])
def test_items_are_taken_when_they_are_needed(workers: int) -> None:
    """No more users are held than are computed or wait for the next free worker."""
    users, taken, given = 3, [0], 0

    def items() -> Iterator[int]:
        for number in range(60):
            taken[0] += 1
            yield number

    crew = Crew([f"worker {n}" for n in range(workers)])
    ahead = []
    for _ in crew.map(items(), double, MicroCohort(users), total=60):
        given += 1
        ahead.append(taken[0] - given)
    assert given == 60
    assert max(ahead) <= (2 * workers + 1) * users


def test_who_stops_listening_ends_the_work() -> None:
    computed: list[int] = []

    def work(worker: str, items: Sequence[int]) -> list[int]:
        computed.extend(items)
        return double(worker, items)

    results = Crew(["one", "two"]).map(range(1000), work, MicroCohort(2), total=1000)
    next(results)
    results.close()  # type: ignore[attr-defined]
    assert len(computed) < 50


def test_all_workers_work_and_each_on_one_thing_at_a_time() -> None:
    """Each waits until the other works too."""
    both, used, busy = threading.Barrier(2, timeout=30), set(), set()

    def work(worker: str, items: Sequence[int]) -> list[int]:
        assert worker not in busy
        busy.add(worker)
        used.add(worker)
        if items[0] in (0, 1):
            both.wait()
        busy.discard(worker)
        return double(worker, items)

    found = list(Crew(["one", "two"]).map(range(10), work, MicroCohort(1), total=10))
    assert found == [2 * n for n in range(10)]
    assert used == {"one", "two"}


def test_small_streams_are_shared_among_the_workers() -> None:
    """Else one of them would have everybody, and the others nothing to do."""
    sizes: list[int] = []

    def work(worker: str, items: Sequence[int]) -> list[int]:
        sizes.append(len(items))
        return double(worker, items)

    list(Crew(["one", "two"]).map(range(8), work, MicroCohort(100), total=8))
    assert max(sizes) <= 4


@pytest.mark.parametrize("workers", [1, 2])
def test_the_same_cut_every_time(workers: int) -> None:
    """Which users go through the model together depends on no clock."""
    cuts = []
    for _ in range(3):
        parts: set[tuple[int, ...]] = set()

        def work(
            worker: str, items: Sequence[int], parts: set[tuple[int, ...]] = parts
        ) -> list[int]:
            parts.add(tuple(items))
            return double(worker, items)

        crew = Crew([f"worker {n}" for n in range(workers)])
        list(crew.map(range(30), work, MicroCohort(4), total=30))
        cuts.append(parts)
    assert cuts[0] == cuts[1] == cuts[2]


@pytest.mark.parametrize("workers", [1, 2])
def test_an_error_of_the_work_arrives_and_the_crew_goes_on_afterwards(workers: int) -> None:
    crew = Crew([f"worker {n}" for n in range(workers)])

    def work(worker: str, items: Sequence[int]) -> list[int]:
        if 5 in items:
            raise ValueError("a bug")
        return double(worker, items)

    with pytest.raises(ValueError, match="a bug"):
        list(crew.map(range(20), work, MicroCohort(2), total=20))
    assert list(crew.map(range(6), double, MicroCohort(2), total=6)) == [0, 2, 4, 6, 8, 10]


# Memory


def limited(most: int, error: BaseException, sizes: list[int]) -> object:
    """Work for which memory suffices up to so many users."""

    def work(worker: str, items: Sequence[int]) -> list[int]:
        sizes.append(len(items))
        if len(items) > most:
            raise error
        return double(worker, items)

    return work


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        MemoryError(),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
    ],
)
@pytest.mark.parametrize(
    ("most", "workers"),
    [(3, 2), *[pytest.param(*p, marks=pytest.mark.slow) for p in ((1, 1), (1, 2), (3, 1), (5, 2))]],
)
def test_where_memory_runs_out_micro_cohorts_are_halved(
    error: Exception, workers: int, most: int, caplog: pytest.LogCaptureFixture
) -> None:
    size, sizes = MicroCohort(16), list[int]()
    crew = Crew([f"worker {n}" for n in range(workers)])
    work = limited(most, error, sizes)
    found: list[int] = list(crew.map(range(100), work, size, total=100))  # type: ignore[arg-type]
    assert found == [2 * n for n in range(100)]
    assert most / 2 < size.users <= most
    assert sum(n > most for n in sizes) <= 4 * workers  # learnt once, not for every part
    assert "memory ran out" in caplog.text


def test_the_next_stream_begins_with_what_memory_has_taught() -> None:
    size, sizes = MicroCohort(16), list[int]()
    work = limited(3, MemoryError(), sizes)
    list(Crew(["one"]).map(range(20), work, size, total=20))  # type: ignore[arg-type]
    sizes.clear()
    list(Crew(["one"]).map(range(20), work, size, total=20))  # type: ignore[arg-type]
    assert max(sizes) <= 3


def test_one_user_who_does_not_fit_is_an_error() -> None:
    work = limited(0, torch.OutOfMemoryError("CUDA out of memory"), [])
    with pytest.raises(HomefireError, match="one user needs does not fit") as error:
        list(Crew(["one"]).map(range(4), work, MicroCohort(4), total=4))  # type: ignore[arg-type]
    assert "batch_size" in (error.value.hint or "")


def test_other_errors_of_the_runtime_are_not_taken_for_memory() -> None:
    sizes: list[int] = []
    work = limited(1, RuntimeError("shapes do not fit"), sizes)
    with pytest.raises(RuntimeError, match="shapes"):
        list(Crew(["one"]).map(range(4), work, MicroCohort(4), total=4))  # type: ignore[arg-type]
    assert sizes in ([1], [1, 3])  # the second may have begun; neither was tried again
    assert not is_out_of_memory(RuntimeError("shapes do not fit"))


def test_the_failed_pass_is_forgotten_before_the_next() -> None:
    """Its error holds all that was computed until then."""
    alive: list[int] = []

    class Big:
        def __init__(self) -> None:
            alive.append(1)

        def __del__(self) -> None:
            alive.pop()

    def work(worker: str, items: Sequence[int]) -> list[int]:
        assert not alive
        big = Big()
        if len(items) > 1:
            raise MemoryError(big)
        return double(worker, items)

    assert list(Crew(["one"]).map(range(4), work, MicroCohort(4), total=4)) == [0, 2, 4, 6]


def test_fitting_users(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(micro_cohorts, "free_memory", lambda _: 1000)
    fit = fitting_users(user_bytes=10 / MARGIN, user_tokens=1, device=CPU, share=0.5, workers=1)
    assert fit == 50
    shared = fitting_users(user_bytes=10 / MARGIN, user_tokens=1, device=CPU, share=0.5, workers=5)
    assert shared == 10
    many = MOST_TOKENS["cpu"] // 4
    assert fitting_users(user_bytes=1, user_tokens=many, device=CPU, share=1.0, workers=1) == 4
    assert fitting_users(user_bytes=1e9, user_tokens=1, device=CPU, share=0.5, workers=2) == 1
    assert fitting_users(user_bytes=1, user_tokens=10**9, device=CPU, share=0.5, workers=2) == 1


def test_free_memory_is_a_number_of_bytes() -> None:
    assert 2**20 < micro_cohorts.free_memory(CPU) < 2**50


# What a pass keeps


def test_kept_counts_each_storage_once_and_no_frozen_one() -> None:
    weight = torch.randn(8, 8)
    x = torch.randn(4, 8, requires_grad=True)
    with Kept([weight]) as kept:
        hidden = x @ weight  # keeps the weight, which is frozen
        y = torch.exp(hidden)  # keeps its result
        (y * y).sum()  # keeps it twice more
    assert kept.bytes == 4 * 8 * 4
    with Kept([]) as whole:
        torch.exp(x @ weight).sum()
    assert whole.bytes == kept.bytes + 8 * 8 * 4


def test_kept_changes_no_gradient_and_counts_nothing_outside() -> None:
    x = torch.ones(3, requires_grad=True)
    with Kept([]) as kept:
        y = torch.exp(x).sum()
    before = kept.bytes
    torch.exp(x)
    assert kept.bytes == before > 0
    y.backward()  # type: ignore[no-untyped-call]
    assert x.grad is not None
    assert torch.equal(x.grad, torch.exp(torch.ones(3)))
