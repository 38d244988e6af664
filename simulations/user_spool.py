"""Users set aside on the disk, to be read in another order than they came in."""

import json
import tempfile
import weakref
from array import array
from pathlib import Path

from homefire.common.records import Record, User


class UserSpool:
    """A file without a name that holds users by number; it is gone when the object is.

    Args:
        users: How many there is room for.
        folder: On which disk; by default the system's temporary folder.
    """

    def __init__(self, users: int, folder: Path | None) -> None:
        self._file = tempfile.TemporaryFile(dir=folder)
        self._offsets = array("Q", bytes(8 * users))
        weakref.finalize(self, self._file.close)

    def put(self, number: int, user: User) -> None:
        """Set a user aside under a number, from 0."""
        self._offsets[number] = self._file.seek(0, 2)
        self._file.write(json.dumps(user.to_json()).encode() + b"\n")

    def read(self, number: int) -> User:
        """The user that was put under this number, with the records in the order they had."""
        self._file.seek(self._offsets[number])
        value = json.loads(self._file.readline())
        return User(value["user_id"], tuple(Record(**record) for record in value["records"]))
