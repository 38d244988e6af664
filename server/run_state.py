"""What a run must not forget: its ledger, its secrets, the newest release, the optimizer's state.

::

    OUTPUT/
        ledger.jsonl            what was opened, summed, burnt
        nodes.json              the nodes in the order of the rota
        releases/               NNNNNN.safetensors, signed; a round's release is its commit
        checkpoints/            the optimizer's state and the clip norm after the newest releases
        rounds.jsonl            the operator's log
    OUTPUT.keys/                signing key, run key, anchor of the ledger
"""

import logging
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from homefire.common.adapter import AdapterSpec, Vector
from homefire.common.config import FederationConfig
from homefire.common.encoding import digest_list
from homefire.common.errors import FederationError, LedgerError, SignatureError
from homefire.common.keystore import Keystore
from homefire.common.plan import release_digest
from homefire.common.privacy.ledger import Anchor, Ledger
from homefire.common.privacy.mechanism import Mechanism, NoPrivacy, Past, advance
from homefire.common.privacy.randomness import derive_key, new_key
from homefire.common.protocol import STATISTICS
from homefire.common.signatures import public_key
from homefire.server import optimizers
from homefire.server.aggregator import RunSecrets, noise_stream
from homefire.server.checkpoints import (
    Checkpoint,
    forget_older,
    read_checkpoint,
    write_checkpoint,
)
from homefire.server.line import Line
from homefire.server.nodes import Nodes, read_nodes, write_nodes
from homefire.server.optimizers import OptimizerState
from homefire.server.planning import PrivacyPlan
from homefire.server.releases import SIGNING_KEY as SIGNING_KEY
from homefire.server.releases import ReleaseStore
from homefire.server.roster import roster_digest
from homefire.server.run_ledger import KIND, RunLedger

LOG = logging.getLogger(__name__)
RUN_KEY = "run-key"
LEDGER = "ledger.jsonl"
ANOTHER_RUN = (
    "start another run: name another output folder; at a server, homefire server next --give-up"
)


@dataclass(frozen=True, slots=True)
class Start:
    """The release of an earlier run that a run starts from.

    Attributes:
        vector: float32, shape (adapter parameters,).
        run: The earlier run's id.
        round: Of that release.
    """

    vector: Vector
    run: str
    round: int

    def to_json(self) -> dict[str, Any]:
        """What ledger and releases say of it."""
        return {"run": self.run, "round": self.round, "digest": release_digest(self.vector)}


@dataclass(frozen=True, slots=True)
class Federation:
    """What a run is about.

    Attributes:
        config: The settings.
        spec: The shared adapter's shape.
        base_model: The base model's fingerprint.
        privacy: The mechanism and what it may claim.
        roster: Public keys of the enrolled devices.
        enrolled: Their nodes, in ascending order, here or not; None takes all that are here, who
            must then be as many as there are users.
        gone: How many of them were removed since, and so can never be here.
        start: The release that it starts from; None: at what has no effect on the base model.
    """

    config: FederationConfig
    spec: AdapterSpec
    base_model: str
    privacy: PrivacyPlan
    roster: Collection[str]
    enrolled: "Nodes | None" = None
    gone: Callable[[], int] = lambda: 0
    start: Start | None = None
    line: Line | None = None

    @staticmethod
    def store_of(output: Path) -> ReleaseStore:
        """Where the releases of a run's folder lie."""
        return ReleaseStore(output / "releases")

    @property
    def store(self) -> ReleaseStore:
        """Where the releases go."""
        return self.store_of(self.config.output)

    @property
    def initial(self) -> Vector:
        """What round 1 starts from, shape (adapter parameters,)."""
        return self.spec.initial() if self.start is None else self.start.vector

    @property
    def keystore(self) -> Keystore:
        """Secrets and anchors, outside of the output folder."""
        return Keystore.beside(self.config.output)

    @property
    def vector_size(self) -> int:
        """Coordinates of a contribution, statistics included."""
        return self.spec.contribution_size + STATISTICS


@dataclass(slots=True)
class RunState:
    """Where a run stands between two rounds.

    Attributes:
        run: 16 random bytes in hex.
        key: Signs plans and releases.
        secrets: Ledger, run key and the noise of the rounds before.
        nodes: In the order of the rota.
        release: The newest one, shape (adapter parameters,).
        optimizer: The optimizer's state after it.
        clip_norm: Of the next round.
    """

    run: str
    key: Ed25519PrivateKey
    secrets: RunSecrets
    nodes: Nodes
    release: Vector
    optimizer: OptimizerState
    clip_norm: float

    @property
    def ledger(self) -> RunLedger:
        """The run's ledger."""
        return self.secrets.ledger

    @property
    def next_round(self) -> int:
        """The number of the next round: burnt ones are not used again."""
        return self.ledger.opened + 1


def open_ledger(federation: Federation) -> RunLedger:
    """The run's ledger, checked against the keystore's anchor and the newest release's.

    Raises:
        LedgerError: Damaged, rolled back, in use, or gone, as the keystore may be too.
        FederationError: The run is over.
    """
    output = federation.config.output
    if federation.store.rounds():
        _check_release_anchor(federation)
    ledger = RunLedger.open(output / LEDGER, federation.keystore)
    if ledger.ended:
        ledger.ledger.close()
        raise FederationError(
            f"{output} holds a run that is over", hint="Name another output folder."
        )
    if _key_destroyed(ledger):
        # Killed between the run's last two acts, or within the first of them.
        federation.keystore.destroy(RUN_KEY)
        ledger.end()
    return ledger


def rounds_spent(output: Path, *, wait: float = 0.0) -> tuple[int, bool]:
    """How many rounds of an output folder's run are spent, and whether the run is over.

    Args:
        output: Of the run.
        wait: Seconds for which another process may still use the ledger; a server looks at it at
            times.

    Raises:
        LedgerError: The ledger is damaged, rolled back or in use.
    """
    if not (output / LEDGER).exists():
        return 0, False
    ledger = RunLedger.open(output / LEDGER, Keystore.beside(output), wait=wait)
    ledger.ledger.close()
    return ledger.opened, ledger.ended or _key_destroyed(ledger)


def begin(federation: Federation, ledger: RunLedger, nodes: Nodes, run: str) -> RunState:
    """Start a run: key, ledger, first release.

    Args:
        federation: What the run is about.
        ledger: An empty one.
        nodes: In ascending order.
        run: 16 bytes in hex.

    Guarantees:
        Key first: the run key is on the disk before the ledger says that there is a run.
    """
    config, keystore, first = federation.config, federation.keystore, _first(federation)
    write_nodes(config.output / "nodes.json", nodes)
    run_key = _new_run_key(federation)
    keystore.put(RUN_KEY, run_key)
    ledger.start({"run": run, "rounds": config.federation.rounds, **_facts(federation, nodes)})
    state = RunState(
        run,
        keystore.signing_key(SIGNING_KEY),
        RunSecrets(ledger, run_key),
        nodes,
        first.release,
        first.optimizer,
        first.clip_norm,
    )
    commit(federation, state, 0)
    return state


def resume(federation: Federation, ledger: RunLedger, nodes: Nodes) -> RunState:
    """Take up a run that was interrupted; a round that has no release yet is burnt.

    Args:
        federation: What the run is about.
        ledger: The run's.
        nodes: In ascending order.

    Guarantees:
        Never again: the number of a round that was opened is not used again.
        Same noise: correlated noise goes on from what the rounds before drew, burnt ones included.

    Raises:
        FederationError: Privacy, base model, adapter or nodes are not those of the run.
        LedgerError: The run key is gone, or all releases, or the checkpoint of the newest one.
    """
    _check_same(federation, ledger, nodes)
    keystore, run = federation.keystore, str(ledger.facts["run"])
    if (run_key := keystore.get(RUN_KEY)) is None:
        raise LedgerError(f"{keystore.folder}: the run key is gone; the run cannot go on")
    if begun := bool(federation.store.rounds()):
        newest = federation.store.latest()
        folder = federation.config.output / "checkpoints"
        last = read_checkpoint(folder, newest.round, newest.vector)
        _burn_interrupted(ledger, newest.round)
    elif ledger.opened:
        raise LedgerError(f"{federation.store.folder}: the releases of this run are gone")
    else:  # killed before the first release: round 0 releases nothing of anybody
        last = _first(federation)
    past = _rebuild_past(federation, ledger, run, run_key)
    state = RunState(
        run,
        keystore.signing_key(SIGNING_KEY),
        RunSecrets(ledger, run_key, past),
        nodes,
        last.release,
        last.optimizer,
        last.clip_norm,
    )
    if not begun:
        commit(federation, state, 0)
    return state


def commit(federation: Federation, state: RunState, number: int) -> None:
    """Write checkpoint, then release: the release file is what commits the round."""
    checkpoint = Checkpoint(state.release, state.optimizer, state.clip_norm)
    checkpoints = federation.config.output / "checkpoints"
    write_checkpoint(checkpoints, number, checkpoint)
    privacy = federation.privacy
    if state.ledger.unamplified:
        privacy = privacy.without_amplification()
    about = {
        "run": state.run,
        "base_model": federation.base_model,
        "adapter_digest": federation.spec.digest,
        "start": state.ledger.facts.get("start"),
        **privacy.to_json(),
        "ledger": {"length": state.ledger.anchor.length, "head": state.ledger.anchor.head},
    }
    federation.store.write(number, state.release, about, state.key)
    forget_older(checkpoints)


def costs_too_much(ledger: RunLedger) -> bool:
    """Whether a run lost its amplification and costs, without it, more than was asked for.

    A deployment's noise is asked for by the deployment's epsilon, which this says nothing about.
    """
    if not ledger.unamplified:
        return False
    asked, stated = ledger.facts.get("target"), ledger.facts["statement"]
    if asked is None or stated["deployment"] is not None:
        return False
    return bool(stated["privacy"]["epsilon_known_cohort"] > asked)


def finish(federation: Federation, state: RunState) -> None:
    """End a run.

    Guarantees:
        Key destroyed: afterwards nobody can draw this run's noise again.
    """
    federation.keystore.destroy(RUN_KEY)
    state.ledger.end()
    state.ledger.ledger.close()


def _key_destroyed(ledger: RunLedger) -> bool:
    """Whether the process died between the run's last two acts."""
    if not ledger.facts or ledger.ended:
        return False
    has_no_more = ledger.opened == ledger.facts["rounds"] or costs_too_much(ledger)
    return has_no_more and ledger.keystore.get(RUN_KEY) is None


def _check_release_anchor(federation: Federation) -> None:
    """The newest release's anchor too: releases newer than their ledger show a rollback."""
    newest, keystore = federation.store.latest(), federation.keystore
    try:
        # Only looked for: making a key here would stand in the way of the one to be put back.
        if keystore.get(SIGNING_KEY) is None:
            raise SignatureError("there is no signing key")
        newest.verify(public_key(keystore.signing_key(SIGNING_KEY)))
    except SignatureError as error:
        raise LedgerError(
            f"{federation.store.folder}: {error}",
            hint=f"Put {federation.keystore.folder} in place, which belongs to these releases, or "
            f"{ANOTHER_RUN}.",
        ) from error
    known = Anchor(newest.about["ledger"]["length"], newest.about["ledger"]["head"])
    Ledger.open(federation.config.output / LEDGER, kind=KIND, anchor=known).close()


def _check_same(federation: Federation, ledger: RunLedger, nodes: Nodes) -> None:
    config = federation.config
    if read_nodes(config.output / "nodes.json") != nodes:
        raise FederationError(
            "the devices that are here are not those of the interrupted run",
            hint="The rota and the privacy statement count on them; start those that are missing.",
        )
    expected = _facts(federation, nodes)
    if federation.store.rounds():
        del expected["start"]  # its release 0 holds it
    differing = sorted(name for name, value in expected.items() if ledger.facts.get(name) != value)
    if differing or ledger.facts["rounds"] != config.federation.rounds:
        raise FederationError(
            f"the interrupted run had other settings: {', '.join(differing) or 'rounds'}",
            hint=f"What its privacy stands on cannot change: put it back, or {ANOTHER_RUN}.",
        )


def _first(federation: Federation) -> Checkpoint:
    """What round 1 starts from."""
    moments = optimizers.init(federation.spec.size)
    return Checkpoint(federation.initial, moments, federation.config.privacy.clip_norm)


def _facts(federation: Federation, nodes: Nodes) -> dict[str, Any]:
    """What the privacy statement stands on, and what the releases are of."""
    config = federation.config
    return {
        "users": config.users,
        "cohort": config.federation.cohort,
        "statement": federation.privacy.to_json(),
        "target": config.privacy.epsilon,
        "adaptive_clip": config.privacy.model_dump(mode="json")["adaptive_clip"],
        "base_model": federation.base_model,
        "adapter_digest": federation.spec.digest,
        "start": federation.start and federation.start.to_json(),
        "nodes": digest_list("homefire/nodes/v1", nodes),
        "roster": roster_digest(federation.roster),
    }


def _new_run_key(federation: Federation) -> bytes:
    """The run's secret; without privacy, and only then, it follows from the experiment's seed."""
    if isinstance(federation.privacy.mechanism, NoPrivacy):
        seed = federation.config.seed.to_bytes(32, "little")
        return derive_key(seed, "homefire/reproducible-run/v1")
    return new_key()


def _burn_interrupted(ledger: RunLedger, released: int) -> None:
    if ledger.opened > released and ledger.opened not in ledger.burnt:
        LOG.warning("round %d was interrupted: it is spent, and not repeated", ledger.opened)
        ledger.burn(ledger.opened)


def _rebuild_past(federation: Federation, ledger: RunLedger, run: str, run_key: bytes) -> Past:
    mechanism: Mechanism = federation.privacy.mechanism
    past: Past = ()
    for number in range(1, ledger.opened + 1):
        stream = noise_stream(run_key, run, number, ledger.sums.get(number, ""))
        past = advance(mechanism, federation.vector_size, stream, past)
    return past
