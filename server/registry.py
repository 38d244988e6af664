"""The registry of releases as a program: serves a server's folder until it is told to stop.

    python -m homefire.server.registry --home DIR --listen 0.0.0.0:9093

It needs neither torch nor transformers, and no Flower.
"""

import argparse
import asyncio
import logging
import os
import sys
from pathlib import Path

from homefire.common.errors import ConfigError, HomefireError
from homefire.common.keystore import Keystore
from homefire.common.parent import end_with
from homefire.server.admission import Limits
from homefire.server.logs import begin
from homefire.server.registry_counts import counts_file
from homefire.server.registry_folder import RegistryFolder
from homefire.server.releases import SERVER_KEYS, SIGNING_KEY

REGISTRY = "registry"
LOG = logging.getLogger("homefire.server.registry")  # also where it runs as a program


def open_home(home: Path) -> RegistryFolder:
    """The registry in a server's folder, with the key of its runs.

    Raises:
        ConfigError: The folder has no signing key.
        RegistryError: As `RegistryFolder.open`.
        LedgerError: As there.
    """
    keys = Keystore(home / SERVER_KEYS)
    if keys.get(SIGNING_KEY) is None:
        raise ConfigError(
            f"{keys.place}: there is no signing key", hint="Name the server's folder by --home."
        )
    return RegistryFolder.open(home / REGISTRY, keys.signing_key(SIGNING_KEY), keys)


def main(arguments: list[str]) -> int:
    """Serve a folder; returns the exit code."""
    parser = argparse.ArgumentParser(prog="homefire.server.registry")
    parser.add_argument("--home", required=True, type=Path, help="the server's folder")
    parser.add_argument("--listen", required=True, metavar="HOST:PORT", help="port 0: a free one")
    parser.add_argument("--certificate", type=Path, help="PEM; by default HOME/tls/server.pem")
    parser.add_argument("--private-key", type=Path, help="PEM; by default the certificate's file")
    parser.add_argument("--parent", type=int, help="ends with this process")
    given = parser.parse_args(arguments)
    if given.parent is not None:
        end_with(given.parent)
    # Before it is imported: gRPC's own words are about whoever connects.
    os.environ["GRPC_VERBOSITY"] = "NONE"
    from homefire.server.registry_service import Tls, serve

    if given.parent is None:
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    else:
        begin(given.home / "logs" / "registry.log", "registry")
    certificate = given.certificate or given.home / "tls" / "server.pem"
    tls = Tls(certificate, given.private_key or certificate)
    counted = None if given.parent is None else counts_file(given.home)
    try:
        folder = open_home(given.home)
        asyncio.run(serve(folder, given.listen, tls, Limits(), counted=counted))
    except HomefireError as error:
        LOG.error("it does not start: %s", error)
        print(f"Error: {error.in_full}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
