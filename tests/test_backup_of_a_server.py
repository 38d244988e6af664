"""The commands of OPERATING's section on backups, as they are printed."""

import shutil
import subprocess
from pathlib import Path

import pytest
from test_documents import OPERATING, blocks
from tiny_operators import enrol_made_up, made_home
from tiny_registries import SPEC, about, vector

from homefire.common.errors import LedgerError
from homefire.common.keystore import Keystore
from homefire.server.operator_home import OperatorHome
from homefire.server.registry import open_home
from homefire.server.releases import SERVER_KEYS, SIGNING_KEY, ReleaseStore

BACKUP, RESTORE = (block for block in blocks(OPERATING) if block.startswith("umask 077\ntar "))


def publish(home: OperatorHome, numbers: range) -> None:
    """Publish releases of one run."""
    key = Keystore(home.folder / SERVER_KEYS).signing_key(SIGNING_KEY)
    store, registry = ReleaseStore(home.folder.with_name("releases")), open_home(home.folder)
    for number in numbers:
        store.write(number, vector(number), about(), key)
        registry.publish(store, number, SPEC)


def published(home: OperatorHome) -> list[int]:
    return [each.statement.number for each in open_home(home.folder).releases]


def type_in(commands: str, folder: Path) -> None:
    subprocess.run(["/bin/bash", "-ec", commands], cwd=folder, check=True)  # noqa: S603 - printed


@pytest.mark.parametrize("releases", [0, 1, 3])
@pytest.mark.parametrize("devices", [0, 2])
def test_a_backup_of_any_moment_makes_the_same_server(
    tmp_path: Path, devices: int, releases: int
) -> None:
    lost, found = made_home(tmp_path / "lost"), OperatorHome(tmp_path / "found")
    for number in range(devices):
        enrol_made_up(lost.enrolment, number)
    publish(lost, range(1, releases + 1))
    type_in(BACKUP, lost.folder)
    found.folder.mkdir(mode=0o700)
    for name in ("once.tar", "often.tar"):
        assert (lost.folder / name).stat().st_mode & 0o077 == 0
        (lost.folder / name).rename(found.folder / name)
    key, authority = lost.server_key, lost.certificates.authority.read_bytes()
    enrolled = lost.enrolment.devices()
    shutil.rmtree(lost.folder)

    type_in(RESTORE, found.folder)
    secret = [
        path for part in ("keys", "secrets", "tls") for path in (found.folder / part).iterdir()
    ]
    assert len(secret) >= 6
    assert not [path for path in secret if path.stat().st_mode & 0o077]
    assert found.server_key == key
    assert found.certificates.authority.read_bytes() == authority
    assert published(found) == list(range(1, releases + 1))
    found.enrolment.confirm()
    assert found.enrolment.devices() == enrolled
    assert found.begin_next() == "0001"


def test_where_the_anchor_of_the_registry_is_lost(tmp_path: Path) -> None:
    home = made_home(tmp_path / "server")
    anchor, registry = home.folder / "keys" / "registry", home.folder / "registry"
    assert not anchor.exists()
    publish(home, range(1, 2))
    anchor.unlink()
    assert published(home) == [1]
    one_before = anchor.read_bytes()
    copy = shutil.copytree(registry, tmp_path / "copy")
    publish(home, range(2, 3))
    newest = anchor.read_bytes()
    anchor.write_bytes(one_before)
    assert published(home) == [1, 2]
    publish(home, range(3, 4))
    for spoilt in (None, one_before):
        anchor.unlink(missing_ok=True)
        if spoilt is not None:
            anchor.write_bytes(spoilt)
            anchor.chmod(0o600)
        with pytest.raises(LedgerError) as caught:
            open_home(home.folder)
        assert "Put the newest keystore in place" in caught.value.hint
    anchor.write_bytes(newest)
    assert published(home) == [1, 2, 3]
    shutil.rmtree(registry)
    shutil.copytree(copy, registry)
    anchor.write_bytes(one_before)
    assert published(home) == [1]
