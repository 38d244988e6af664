"""A privacy statement in words, for people who decide by it."""

from homefire.common.claims import shown
from homefire.common.release_statement import DeploymentClaim, PrivacyClaim

NO_PRIVACY = (
    "No privacy is promised: the adapter was trained without noise, and what people wrote can be "
    "read out of it."
)


def in_words(claim: PrivacyClaim) -> list[str]:
    """What a statement promises, and what it does not; one sentence or two an item.

    Guarantees:
        Never smaller: an epsilon in words does not promise more than the statement does.
    """
    if claim.mechanism == "none":
        return [NO_PRIVACY]
    return [
        f"ε = {shown(claim.epsilon_release)} at δ = {claim.delta:g} against whoever receives "
        f"the releases, all {claim.rounds} of them together.",
        f"ε = {shown(claim.epsilon_known_cohort)} against a recipient who also knows who took "
        "part when.",
        _server(claim),
        f"What is protected is {claim.unit} ({claim.adjacency} adjacency).",
        f"Mechanism: {claim.mechanism}, noise multiplier {claim.noise_multiplier:g}, clip norm "
        f"{claim.clip_norm:g}, expected cohort {claim.expected_cohort}.",
        f"Participation: {claim.participation}.",
    ]


def deployment_in_words(claim: DeploymentClaim) -> list[str]:
    """What the noise of a small run would be worth in the deployment that it stands for."""
    return [
        f"These numbers speak for a deployment of {claim.users:,} users with a cohort of "
        f"{claim.cohort:,}, whose noise this run used. They promise nothing to those who took "
        "part in this run.",
        *in_words(claim),
    ]


def _server(claim: PrivacyClaim) -> str:
    said = f"ε = {shown(claim.epsilon_server)} against the server itself"
    if claim.epsilon_server is None:
        return f"{said}: it sees each contribution before the noise ({claim.trust})."
    return f"{said}."
