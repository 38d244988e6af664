"""A server's own authority: what devices that trust it accept, and what they refuse."""

import ssl
import stat
import threading
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from socket import create_connection, create_server

import pytest

from homefire.common.errors import ConfigError
from homefire.server.certificates import Certificates

NAMES = ("fed.example", "127.0.0.1", "localhost", "::1")


@pytest.fixture
def certificates(tmp_path: Path) -> Certificates:
    made = Certificates(tmp_path)
    made.make(NAMES)
    return made


def shake_hands(server: Certificates, trusted: Path, name: str) -> str:
    """What a client that trusts an authority says of a server under a name."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(server.server)
    with create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            connection, _ = listener.accept()
            with connection:
                try:
                    context.wrap_socket(connection, server_side=True).close()
                except (ssl.SSLError, OSError):
                    return

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            client = ssl.create_default_context(cafile=str(trusted))
            with create_connection(listener.getsockname()[:2]) as plain:
                client.wrap_socket(plain, server_hostname=name).close()
            return "accepted"
        except ssl.SSLCertVerificationError as error:
            return str(error.verify_message)
        finally:
            thread.join()


@pytest.mark.parametrize("name", NAMES)
def test_devices_that_trust_the_authority_accept_the_server(
    certificates: Certificates, name: str
) -> None:
    assert shake_hands(certificates, certificates.authority, name) == "accepted"


def test_another_name_and_another_authority_are_refused(
    certificates: Certificates, tmp_path: Path
) -> None:
    assert "Hostname mismatch" in shake_hands(certificates, certificates.authority, "evil.example")
    (tmp_path / "other").mkdir()
    other = Certificates(tmp_path / "other")
    other.make(NAMES)
    assert "signature" in shake_hands(other, certificates.authority, "localhost") or (
        "unable to get" in shake_hands(other, certificates.authority, "localhost")
    )


def test_a_new_certificate_is_accepted_by_who_trusts_the_authority(
    certificates: Certificates,
) -> None:
    before = certificates.server.read_bytes()
    certificates.renew(["new.example"])
    assert certificates.server.read_bytes() != before
    assert shake_hands(certificates, certificates.authority, "new.example") == "accepted"
    assert "mismatch" in shake_hands(certificates, certificates.authority, "fed.example")
    left = certificates.expires() - datetime.now(UTC)
    assert timedelta(days=390) < left < timedelta(days=398)


def test_keys_are_their_owners_only(certificates: Certificates) -> None:
    for path in certificates.folder.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path


@pytest.mark.parametrize(
    "act",
    [
        lambda made: made.make(NAMES),
        lambda made: made.renew([]),
        lambda made: made.renew(["a b"]),
        lambda made: made.renew(["https://fed.example"]),
        lambda made: made.renew(["x" * 254]),
        lambda made: made.renew([""]),
    ],
)
def test_what_cannot_be_certified_changes_nothing(
    certificates: Certificates, act: Callable[[Certificates], None]
) -> None:
    before = {path: path.read_bytes() for path in certificates.folder.iterdir()}
    with pytest.raises(ConfigError):
        act(certificates)
    assert {path: path.read_bytes() for path in certificates.folder.iterdir()} == before


def test_a_certificate_that_is_gone_can_be_made_anew_while_the_authority_is_there(
    certificates: Certificates,
) -> None:
    certificates.server.unlink()
    with pytest.raises(ConfigError, match=r"no certificate \(No such file") as caught:
        certificates.expires()
    assert caught.value.hint.endswith("homefire server renew.")
    certificates.renew(["a.example"])
    assert certificates.expires() > datetime.now(UTC)
    certificates.server.unlink()
    (certificates.folder / "ca.key").unlink()
    for act in (certificates.expires, lambda: certificates.renew(["a.example"])):
        with pytest.raises(ConfigError) as caught:
            act()
        assert "Put its copy in place" in caught.value.hint


@pytest.mark.parametrize("content", [None, b"", b"garbage", b"\xff\x00", b"CUT"])
def test_an_authority_that_cannot_be_read_is_named_with_its_remedy(
    certificates: Certificates, content: bytes | None
) -> None:
    path = certificates.authority
    assert certificates.read_authority() == path.read_text()
    if content is None:
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:200] if content == b"CUT" else content)
    for read in (certificates.read_authority, lambda: certificates.renew(NAMES)):
        with pytest.raises(ConfigError, match=f"{path}: no certificate") as caught:
            read()
        assert "Put its copy in place, from the backup" in caught.value.hint
        assert "new server" in caught.value.hint


def test_without_an_authority_nothing_is_signed(tmp_path: Path) -> None:
    made = Certificates(tmp_path)
    for act in (lambda: made.renew(["a.example"]), made.expires):
        with pytest.raises(ConfigError, match="no certificate"):
            act()
    made.make(["a.example"])
    (tmp_path / "ca.key").write_bytes(b"no key")
    with pytest.raises(ConfigError, match="no private key"):
        made.renew(["a.example"])
