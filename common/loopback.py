"""This machine's own addresses, which no proxy stands before.

Where HTTPS_PROXY or HTTP_PROXY is set, what libraries send to this machine would go to the proxy,
which cannot reach it.
"""

from collections.abc import Mapping

NAMES = ("127.0.0.1", "localhost", "::1")
VARIABLES = ("no_proxy", "NO_PROXY")
EVERYWHERE = "*"


def past_proxies(environment: Mapping[str, str]) -> dict[str, str]:
    """What to add to an environment so that this machine is reached without a proxy.

    Hosts that are named already stay named. Both spellings are set alike, for libraries differ in
    which of them they read.
    """
    given = ",".join(environment.get(name, "") for name in VARIABLES).split(",")
    named = [name for part in given if (name := part.strip())]
    hosts = [EVERYWHERE] if EVERYWHERE in named else list(dict.fromkeys([*named, *NAMES]))
    return dict.fromkeys(VARIABLES, ",".join(hosts))
