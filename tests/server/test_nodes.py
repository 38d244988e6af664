"""The order of the rota: ascending, 64-bit, and one canonical JSON list on the disk."""

import tracemalloc
from array import array
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from homefire.common.encoding import canonical_json
from homefire.common.errors import LedgerError
from homefire.server.nodes import ascending, read_nodes, write_nodes

ids = st.sets(st.integers(0, 2**64 - 1), min_size=1, max_size=20)


@given(ids.flatmap(lambda found: st.permutations(sorted(found))))
def test_nodes_are_put_in_order(nodes: list[int]) -> None:
    assert ascending(nodes).tolist() == sorted(nodes)


@pytest.mark.parametrize("node", [-1, 2**64])
def test_what_is_no_node_id_is_an_error(node: int) -> None:
    with pytest.raises(OverflowError):
        ascending([1, node])


@given(ids)
def test_the_file_is_canonical_json(
    tmp_path_factory: pytest.TempPathFactory, nodes: set[int]
) -> None:
    path = tmp_path_factory.mktemp("nodes") / "nodes.json"
    write_nodes(path, ascending(nodes))
    assert path.read_bytes() == canonical_json(sorted(nodes))
    assert read_nodes(path) == ascending(nodes)


def test_a_file_of_many_blocks_is_read_whole(tmp_path: Path) -> None:
    order = array("Q", (number**5 for number in range(7000)))
    write_nodes(tmp_path / "nodes.json", order)
    assert (tmp_path / "nodes.json").stat().st_size > 1 << 16
    assert read_nodes(tmp_path / "nodes.json") == order


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"[", b"[]", b"7", b"{}", b"1,2]", b"[1,2", b"[1,,2]", b'["x"]', b"[-1]", b"[1.5]"),
        *(b"[18446744073709551616]", b"[1]]", b"[1,2]3", b"[[1]]", b"\xff"),
        b"[" + b"9" * 5000 + b"]",
    ],
)
def test_a_damaged_file_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "nodes.json"
    path.write_bytes(content)
    with pytest.raises(LedgerError, match=r"nodes\.json: the order of the rota cannot be read"):
        read_nodes(path)


def test_an_absent_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LedgerError, match="cannot be read"):
        read_nodes(tmp_path / "nodes.json")


def test_memory_is_some_bytes_a_node(tmp_path: Path) -> None:
    count, path = 50_000, tmp_path / "nodes.json"
    tracemalloc.start()
    write_nodes(path, ascending(range(1, count + 1)))
    assert len(read_nodes(path)) == count
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20 * count + 2**20
