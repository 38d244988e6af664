"""Everything that a vault holds, as files that other programs read."""

import json
import os
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from homefire.client.personalize.recipe import PRIVATE
from homefire.client.profile import Profile
from homefire.client.vault import Vault
from homefire.common.errors import ConfigError
from homefire.common.files import locked, make_folder, replacing
from homefire.common.vector_file import pack_vector

TEMPORARY = ".homefire-export.tmp"
README = """Exported by homefire, in the clear.

history.jsonl       records, one a line: text, prompt, created_at, kind; `homefire device import`
                    reads it
origins.jsonl       where each of them came from, in the same order: id, source, added_at
profile.json        what was said to be true, and what the history shows
participations.json rounds of federations that were taken part in, and what each cost (mu squared)
adapters/*.safetensors
                    versions of the private adapter: one flat vector each; what it stands on is in
                    the header of the file
"""


def write_takeout(vault: Vault, profile: Profile, path: Path) -> Path:
    """Write one ZIP file, readable by its owner only.

    What is written lies in the clear in `.homefire-export.tmp` beside it until it is whole; where a
    kill leaves that file, the next export into the same folder deletes it.

    Raises:
        ConfigError: It is there already, or cannot be written.
    """
    if path.exists():
        raise ConfigError(f"{path}: there is a file already", hint="Name another one.")
    try:
        make_folder(path.parent)
        with (
            locked(path.parent, os.O_RDONLY),  # one at a time: they share the temporary file
            replacing(path, mode=0o600, temporary=path.with_name(TEMPORARY)) as file,
            zipfile.ZipFile(file, "w") as archive,
        ):
            for name, content in _files(vault, profile).items():
                archive.writestr(name, content, zipfile.ZIP_DEFLATED)
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot be written ({error.strerror})", hint="Name a file on a disk with room."
        ) from error
    return path


def _files(vault: Vault, profile: Profile) -> dict[str, bytes]:
    history = vault.records.history()
    origins = [
        {"id": each.id, "source": each.source, "added_at": each.added_at} for each in history
    ]
    files = {
        "README.txt": README.encode(),
        "history.jsonl": _lines([each.record.to_json() for each in history]),
        "origins.jsonl": _lines(origins),
        "profile.json": json.dumps(asdict(profile), indent=2, ensure_ascii=False).encode(),
        "participations.json": json.dumps(vault.log.participations, indent=2).encode(),
    }
    for each in vault.adapters.versions(PRIVATE):
        vector = vault.adapters.vector(PRIVATE, each.version)
        name = f"adapters/private-{each.version}.safetensors"
        files[name] = pack_vector(vector, each.about, kind=PRIVATE)
    return files


def _lines(objects: Sequence[Mapping[str, object]]) -> bytes:
    return "".join(json.dumps(each, ensure_ascii=False) + "\n" for each in objects).encode()
