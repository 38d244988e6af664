"""A server's folder is for the account alone that it belongs to."""

import os
import pwd
from pathlib import Path

import pytest
from tiny_disks import run_in_child

from homefire.common.errors import ConfigError
from homefire.server.owner import check_owner


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "above" / "server"
    made.mkdir(parents=True)
    return made


def test_its_owners_alone_another_account_is_told_whose_it_is(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where root made a lock or a certificate, the server's own account could use it no more."""
    check_owner(folder)
    owner, name = os.geteuid(), pwd.getpwuid(os.geteuid()).pw_name
    for other in (owner + 54321, owner + 1):
        monkeypatch.setattr(os, "geteuid", lambda other=other: other)
        with pytest.raises(ConfigError, match=f"{folder} belongs to the account {name}") as e:
            check_owner(folder)
        assert f"sudo -u {name} homefire server" in e.value.hint


def test_its_owners_alone_an_account_without_a_name_is_told_by_number(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nameless(number: int) -> None:
        raise KeyError(number)

    monkeypatch.setattr(pwd, "getpwuid", nameless)
    owner = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    with pytest.raises(ConfigError, match=f"belongs to the account #{owner}, not to #") as caught:
        check_owner(folder)
    assert f"sudo -u '#{owner}' homefire server" in caught.value.hint


def test_its_owners_alone_an_account_that_may_not_look_is_told_so(folder: Path) -> None:
    def look() -> None:
        if os.geteuid() == 0:  # which may look everywhere
            os.seteuid(65534)
        with pytest.raises(ConfigError, match="may not look at it") as caught:
            check_owner(folder)
        assert "sudo -u ACCOUNT homefire server" in caught.value.hint

    folder.parent.chmod(0)
    try:
        assert run_in_child(look) == 0
    finally:
        folder.parent.chmod(0o700)


def test_a_folder_that_is_not_there_is_nobodys(tmp_path: Path) -> None:
    for folder in (tmp_path / "none", tmp_path / "file" / "below"):
        (tmp_path / "file").touch()
        check_owner(folder)
