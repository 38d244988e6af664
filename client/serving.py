"""Serving the endpoint over HTTP, on this machine unless a person says otherwise."""

import socket
from collections.abc import Callable

import uvicorn

from homefire.client.encoder import load_encoder
from homefire.client.endpoint import make_app, token_of
from homefire.client.joining import is_this_machine
from homefire.client.personalizer import Personalizer
from homefire.client.vault_home import VaultHome
from homefire.common.errors import ConfigError

LOCAL = frozenset({"127.0.0.1", "localhost", "[::1]"})


def serve(
    me: Personalizer,
    *,
    host: str = "127.0.0.1",
    port: int = 8765,
    expose: bool = False,
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
        learn: Remember what the person says in conversations.
        new_token: Draw another token.
        say: Called with address and token once it listens.

    Raises:
        ConfigError: Another machine could ask and nobody said so, or the port is taken.
    """
    if not is_this_machine(host) and not expose:
        raise ConfigError(
            f"{host} lets other machines ask, without TLS",
            hint="Leave --host out; or say --expose, with TLS and a firewall in front of it.",
        )
    encoder = VaultHome(me.vault).config.encoder
    token = token_of(me, new=new_token)
    shown = f"[{host}]" if ":" in host else host
    app = make_app(
        me,
        token,
        hosts=LOCAL | {shown},
        learn=learn,
        encoder=None if encoder is None else load_encoder(encoder),
    )
    with _listen(host, port) as listener:
        say(f"http://{shown}:{listener.getsockname()[1]}", token)
        settings = uvicorn.Config(
            app, log_level="warning", access_log=False, server_header=False, ws="none"
        )
        uvicorn.Server(settings).run(sockets=[listener])


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except OSError as error:
        raise ConfigError(
            f"{host}:{port} cannot be listened on ({error.strerror})",
            hint="Choose another --port; 0 takes a free one.",
        ) from error
