"""The names of the registry's calls, and the sizes that both sides keep to."""

from homefire.common.registry_pb2 import DESCRIPTOR

SERVICE: str = DESCRIPTOR.services_by_name["Registry"].full_name
LATEST, LIST, DOWNLOAD = (f"/{SERVICE}/{name}" for name in ("Latest", "List", "Download"))

CHUNK_BYTES = 1 << 17
"""Bytes of a file in one message."""

PAGE_RELEASES = 16
"""Releases in one page of a list, at most."""

LARGEST_REQUEST = 1 << 12
"""Bytes of a message to the registry."""

LARGEST_ANSWER = 1 << 20
"""Bytes of a message from the registry."""
