"""Serving the endpoint over HTTP, on this machine unless a person says otherwise."""

import ipaddress
import socket
from collections.abc import Callable, Sequence

import uvicorn
from starlette.applications import Starlette

from homefire.client.encoder import load_encoder
from homefire.client.endpoint import make_app, token_of
from homefire.client.guard import LOCAL, host_name
from homefire.client.joining import is_this_machine
from homefire.client.personalizer import Personalizer
from homefire.client.vault_home import VaultHome
from homefire.common.errors import ConfigError

SECONDS_TO_END = 3
"""For what is under way when serving ends, to come to the next piece or step where it stops."""

_NOBODYS = {socket.AF_INET: "192.0.2.1", socket.AF_INET6: "2001:db8::1"}
"""Addresses for documentation: which way to them a machine would take, it knows without asking."""


def serve(
    me: Personalizer,
    *,
    host: str = "127.0.0.1",
    port: int = 8765,
    expose: bool = False,
    names: Sequence[str] = (),
    learn: bool = False,
    new_token: bool = False,
    say: Callable[[str, str], None] = lambda url, token: None,
) -> None:
    """Serve until the process is told to end.

    Args:
        me: Whose vault it is.
        host: Where to listen.
        port: 0 takes a free one.
        expose: Other machines may ask.
        names: Under which it may be asked besides its address, such as that of a proxy with TLS.
        learn: Remember what the person says in conversations.
        new_token: Draw another token.
        say: Called with address and token once it listens.

    Raises:
        ConfigError: Another machine could ask and nobody said so, a name is none, or the port is
            taken.
    """
    if not is_this_machine(host) and not expose:
        raise ConfigError(
            f"{host} lets other machines ask, without TLS",
            hint="Leave --host out; or say --expose, with TLS and a firewall in front of it.",
        )
    encoder = VaultHome(me.vault).config.encoder
    token = token_of(me, new=new_token)
    app = make_app(
        me,
        token,
        hosts=LOCAL | {_checked(name) for name in (host, *names)},
        learn=learn,
        encoder=None if encoder is None else load_encoder(encoder),
    )
    with _listen(host, port) as listener:
        say(f"http://{own_address(host)}:{listener.getsockname()[1]}", token)
        make_server(app).run(sockets=[listener])


class _Server(uvicorn.Server):
    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.config.app.state.ending.set()  # type: ignore[union-attr] # it is `make_app`'s
        await super().shutdown(sockets)


def make_server(app: Starlette) -> uvicorn.Server:
    """A server that ends within seconds, whatever is under way."""
    settings = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        server_header=False,
        ws="none",
        timeout_graceful_shutdown=SECONDS_TO_END,
    )
    return _Server(settings)


def own_address(host: str) -> str:
    """Where a browser finds what listens at `host`: of all addresses, one of this machine's."""
    try:
        address = ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        return host
    if not address.is_unspecified:
        return f"[{address}]" if address.version == 6 else str(address)
    family = socket.AF_INET6 if address.version == 6 else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((_NOBODYS[family], 9))  # chooses a way, and sends nothing
        except OSError:
            return "localhost"
        return own_address(probe.getsockname()[0])


def _checked(name: str) -> str:
    shown = host_name(name)
    if shown is None:
        raise ConfigError(
            f"{name!r} is no host's name", hint="Give it alone, without scheme, port or path."
        )
    return shown


def _listen(host: str, port: int) -> socket.socket:
    address = host.strip("[]")
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        return socket.create_server((address, port), family=family)
    except OSError as error:
        raise ConfigError(
            f"{host}:{port} cannot be listened on ({error.strerror})",
            hint="Choose another --port; 0 takes a free one.",
        ) from error
