"""What is exported: whole or absent, and nothing of it stays in the clear beside it."""

import json
import os
import zipfile
from pathlib import Path

import pytest
from tiny_disks import run_in_child
from tiny_vaults import CANARY, PASSPHRASE, RECORDS, make_vault

from homefire.client.profile import describe
from homefire.client.takeout import write_takeout
from homefire.client.vault import open_vault

pytestmark = pytest.mark.usefixtures("quick_passphrases")


def export(folder: Path, path: Path) -> None:
    with open_vault(folder, passphrase=PASSPHRASE) as vault:
        write_takeout(vault, describe({}, vault.records.history()), path)


def test_what_a_killed_export_left_is_deleted_by_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_vault(tmp_path / "vault").close()
    out = tmp_path / "out"

    def export_and_die() -> None:
        monkeypatch.setattr(zipfile.ZipFile, "close", lambda _: os._exit(0))
        export(tmp_path / "vault", out / "first.zip")

    assert run_in_child(export_and_die) == 0
    (left,) = out.iterdir()
    assert left.stat().st_size > 100 and left.stat().st_mode & 0o777 == 0o600
    export(tmp_path / "vault", out / "second.zip")
    assert [path.name for path in out.iterdir()] == ["second.zip"]
    with zipfile.ZipFile(out / "second.zip") as archive:
        lines = archive.read("history.jsonl").decode().splitlines()
    assert len(lines) == len(RECORDS) and any(CANARY in json.loads(line)["text"] for line in lines)
