"""Whether a server can be started: asked before anything is."""

from homefire.common.errors import HomefireError, LedgerError
from homefire.common.model_cache import check_here
from homefire.server.operator_home import EXECUTOR_SECRET, OPERATOR_SECRET, OperatorHome
from homefire.server.planning import plan_privacy
from homefire.server.ports import check_ports
from homefire.server.runs import has_begun


def check_ready(home: OperatorHome) -> HomefireError | None:
    """Look at all that a server needs.

    Guarantees:
        Refused before the first round: a run whose settings make no sense is not begun.
        Served on: where a run has begun, what was released can be served whatever its settings are
            now; no round is opened by settings that make no sense.

    Returns:
        What is wrong with the settings of a run that has begun, or with who is enrolled, if
        anything.

    Raises:
        ConfigError: A file is missing or wrong.
        PrivacyError: What the settings promise cannot be kept.
        ModelError: The base model is not on this machine.
        FederationError: A port cannot be had.
    """
    _ = home.server_key
    for name in (EXECUTOR_SECRET, OPERATOR_SECRET):
        home.read_secret(name)
    home.certificates.read_authority()
    home.certificates.expires()
    check_ports(home.config)
    try:
        federation = home.federation()
        plan_privacy(federation)
        check_here(federation.base_model.name)
    except HomefireError as error:
        if not has_begun(home.output):
            raise
        return error
    try:
        home.enrolment.check()
    except LedgerError as error:
        return error
    return None
