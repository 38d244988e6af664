"""The settings that a server's folder begins with, for somebody to look at and change."""

from homefire.common.policy import DevicePolicy
from homefire.common.privacy.accounting import default_delta

USERS = 1500
DELTA = 1e-6
TURNS, WIDEST = 2, 20
"""How often each user takes part, and at most how many rounds apart."""


def federation_toml(users: int = USERS) -> str:
    """A run of so many users, in cohorts that a rota can make of them.

    Guarantees:
        Valid: whatever the number of users, these settings make a plan, and the claim is for them
            all.
    """
    cohort = max(1, users // WIDEST)
    separation = users // cohort if users < WIDEST else WIDEST
    floor = DevicePolicy.model_fields["smallest_cohort"].default
    return FEDERATION.format(
        users=users,
        cohort=cohort,
        rounds=TURNS * separation,
        small=SMALL.format(floor=floor, cohort=cohort) if cohort < floor else "",
        delta=f"{min(DELTA, default_delta(users)):.0e}".replace("e-0", "e-"),
        turns=TURNS,
        separation=separation,
    )


def policy_toml(server_key: str) -> str:
    """What a device accepts from this server."""
    return f"""# What a device accepts from this server: for policy.toml in a vault.
server_keys = ["{server_key}"]
"""


FEDERATION = """# The run. It starts when so many devices are enrolled, and takes those.
name = "federation"
users = {users}

[base_model]
name = "smollm2-135m"

[shared]
method = "ffa"
rank = 4
alpha = 8
targets = ["q_proj", "v_proj"]

[local]
steps = 4
batch_size = 4
max_tokens = 96
learning_rate = 0.01

[federation]
rounds = {rounds}
cohort = {cohort}
{small}deadline = 3600.0
quorum = 0.5

[optimizer]
name = "momentum"
learning_rate = 1.0
momentum = 0.9

# `homefire privacy plan` says what these cost before anything is run.
[privacy]
mechanism = "banded-sqrt"
clip_norm = 1.0
epsilon = 8.0
delta = {delta}
participations = {turns}
separation = {separation}
"""

SMALL = """\
# Devices refuse cohorts below {floor}, but for smallest_cohort = {cohort} in their policy.toml.
"""
