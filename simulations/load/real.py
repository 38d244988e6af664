"""Makes the vaults of real devices, and enrols them: `python -m homefire.simulations.load.real`.

Standard input: one JSON object with `folder`, `model` and `tickets`. In the folder are then
`device0`, `device1`, … with a few made-up records each, which accept what is measured. Standard
output: a line for each that is made.
"""

import json
import os
import sys
from pathlib import Path

from homefire.client import Personalizer
from homefire.client.enrolment import enroll
from homefire.client.vault_files import POLICY

RECORDS = 6
POLICY_LINES = """
smallest_noise_multiplier = 0.1
smallest_cohort = 1
participations = 1000000
lifetime_epsilon = 1000000
"""
"""No person's: here rounds are repeated over and over."""


def make(folder: Path, model: str, ticket: str) -> None:
    """One device."""
    passphrase = os.environ["HOMEFIRE_PASSPHRASE"]
    with Personalizer.open(
        folder, base_model=model, passphrase=passphrase, protection="passphrase"
    ) as me:
        for number in range(RECORDS):
            me.remember(f"{folder.name} writes line {number} about tea and the weather")
        enroll(me.vault, ticket)
    policy = folder / POLICY
    text = policy.read_text(encoding="utf-8") if policy.exists() else ""
    policy.write_text(text + POLICY_LINES, encoding="utf-8")


def main() -> None:
    """Make as many as there are tickets."""
    asked = json.load(sys.stdin)
    for number, ticket in enumerate(asked["tickets"]):
        make(Path(asked["folder"]) / f"device{number}", asked["model"], ticket)
        print(number, flush=True)


if __name__ == "__main__":
    main()
