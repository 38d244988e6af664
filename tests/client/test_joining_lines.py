"""What a SuperNode says on its output, whatever it is, ends nothing of the device."""

import io
from types import SimpleNamespace
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from homefire.client.joining_changes import Trouble
from homefire.client.joining_processes import Processes

LINES_OF_A_NODE = st.lists(
    st.sampled_from(
        [
            b'{"event": "retrying", "trouble": "no such", "seconds": "soon"}',
            b'{"event": "retrying", "trouble": [], "seconds": 1e400}',
            b'{"event": "refused", "trouble": {"a": 1}}',
            b'{"event": "retrying"}',
            b'{"event": ["connected"]}',
            b"[1]",
            b"[" * 100_000,
        ]
    )
    | st.binary(max_size=60),
    max_size=6,
)


@given(LINES_OF_A_NODE)
def test_whatever_a_supernode_says_what_comes_after_it_is_heard(said: list[bytes]) -> None:
    lines = [*(line.replace(b"\n", b" ") for line in said), b'{"event": "working"}', b""]
    node: Any = SimpleNamespace(stdout=io.BytesIO(b"\n".join(lines)))
    processes = Processes(node, node)
    processes._thread.join(10)
    for change in processes.changes():
        assert change.state in ("connected", "disconnected")
        assert change.trouble is None or isinstance(change.trouble, Trouble)
    assert processes.working
