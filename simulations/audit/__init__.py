"""Attacks on our own releases that give a number: what they can show must not exceed the claim."""

CHANCE = (
    "Chance alone does this once in {} audits. Repeat it: if it fails again, the noise or the "
    "accounting is wrong."
)
"""What to think of an audit that fails; says how often right code does."""
