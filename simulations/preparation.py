"""A run's folder before anything runs: devices with their older records, the server's settings.

::

    runs/NAME/
        experiment.toml     the experiment with every default filled in; written last
        population.json     how many users take part, how many do not, what was left out
        devices/            the home folder of all simulated devices: the older 80 % of histories
        devices.keys/       their identities and the anchors of their ledgers
        held_out.jsonl      the newest records, which no device and no server ever reads
        server/             federation.toml, roster.txt; later ledger.jsonl, releases/, rounds.jsonl
        server.keys/        the server's keys and the anchor of its ledger
"""

import json
import math
import re
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from homefire.client.home import Home
from homefire.common.config import NAME_PATTERN, FederationConfig, load_config
from homefire.common.errors import ConfigError, DataError, HomefireError
from homefire.common.files import write_atomically
from homefire.common.keystore import Keystore
from homefire.common.model_cache import locate
from homefire.common.policy import DevicePolicy
from homefire.common.privacy.mechanism import participation_charge
from homefire.common.privacy.statement import known_participations
from homefire.common.records import User, UserFile, split_newest, user_writer
from homefire.common.signatures import public_key
from homefire.server.planning import PrivacyPlan, plan_privacy
from homefire.server.roster import roster_writer
from homefire.server.run_state import SIGNING_KEY
from homefire.simulations.experiment import Experiment
from homefire.simulations.populations import Population, load_population

ROUNDING = 1e-9
"""Relative room of a simulated device's limits, for what the run announces is computed twice."""


@dataclass(frozen=True, slots=True)
class Run:
    """A prepared run.

    Attributes:
        folder: Everything lies below it.
        experiment: What it is about.
        training: How many users take part in the shared training: the first ones.
        unseen: How many do not: the last ones.
        skipped: What was left out while reading the population, by reason.
    """

    folder: Path
    experiment: Experiment
    training: int
    unseen: int
    skipped: dict[str, int]

    @property
    def home(self) -> Home:
        """The simulated devices."""
        return Home(self.folder / "devices")

    @property
    def held_out(self) -> UserFile:
        """The newest records of the same users, in the same order."""
        return UserFile(self.folder / "held_out.jsonl")

    @property
    def federation_file(self) -> Path:
        """What the server reads."""
        return self.folder / "server" / "federation.toml"


def prepare(
    experiment: Experiment, folder: Path, *, advance: Callable[[], None] = lambda: None
) -> Run:
    """Load the population, split every history in time, and write the folder.

    Users are written as they come: of a synthetic population none is kept in memory.

    Args:
        experiment: The settings.
        folder: Made here; must not exist.
        advance: Called after each user, for progress bars.

    Guarantees:
        Held out: no record of `held_out.jsonl` is in `devices/`.
        Whole: `reopen` takes no folder whose preparation did not end well. Where it raised, the
            folder is gone; where the process was killed, it lacks `experiment.toml`.

    Raises:
        ModelError: The base model is not there.
        PrivacyError: The privacy that was asked for cannot be stated.
        DataError: The population is wrong, or a history is too short to be split twice.
        HomefireError: The folder exists.
    """
    locate(experiment.base_model.name)
    server = experiment.for_server(folder.resolve() / "server")
    privacy = plan_privacy(server)
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise HomefireError(
            f"{folder}: cannot be made ({error.strerror})", hint="Choose another name or folder."
        ) from error
    with ExitStack() as undo:
        undo.callback(shutil.rmtree, folder, ignore_errors=True)
        population = load_population(experiment.population, seed=experiment.seed, scratch=folder)
        run = Run(
            folder,
            experiment,
            population.training,
            population.unseen,
            dict(population.skipped.reasons),
        )
        (folder / "devices").mkdir()
        _write_users(run, population, server.roster, advance)
        _write_settings(run, server, privacy)
        counts = {"training": run.training, "unseen": run.unseen, "skipped": run.skipped}
        write_atomically(folder / "population.json", json.dumps(counts).encode())
        write_toml(folder / "experiment.toml", experiment)
        undo.pop_all()
    return run


def reopen(folder: Path) -> Run:
    """A run that was prepared before.

    Raises:
        ConfigError: The folder holds no whole preparation.
    """
    experiment = load_config(Experiment, folder / "experiment.toml")
    try:
        counts = json.loads((folder / "population.json").read_bytes())
        return Run(folder, experiment, counts["training"], counts["unseen"], counts["skipped"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{folder}: not a prepared run ({error})") from error


def free_folder(parent: Path, name: str) -> Path:
    """The first of `name`, `name-2`, `name-3`, … that does not exist.

    Raises:
        ConfigError: The name could lead out of the folder.
    """
    if not re.fullmatch(NAME_PATTERN, name):
        raise ConfigError(
            f"run name {name!r} is not a plain name", hint="Use letters, digits, dot, _ and -."
        )
    candidate, number = parent / name, 1
    while candidate.exists():
        number += 1
        candidate = parent / f"{name}-{number}"
    return candidate


def write_toml(path: Path, settings: BaseModel) -> None:
    """Write settings so that reading them back gives the same ones."""
    import tomli_w

    tables: dict[str, Any] = settings.model_dump(mode="json", exclude_none=True)
    write_atomically(path, tomli_w.dumps(tables).encode())


def accepting_policy(privacy: PrivacyPlan, server: FederationConfig) -> DevicePolicy:
    """The policy that accepts what a run announces, and nothing weaker.

    Args:
        privacy: What the run announces.
        server: The run's settings.
    """
    mechanism, statement, rounds = privacy.mechanism, privacy.statement, server.federation
    noise = 1 / math.sqrt(participation_charge(mechanism))
    clip = server.privacy.adaptive_clip
    return DevicePolicy(
        mechanisms=(statement.mechanism,),
        smallest_noise_multiplier=noise * (1 - ROUNDING),
        largest_clip_norm=clip.largest if clip else server.privacy.clip_norm,
        smallest_cohort=rounds.cohort,
        participations=known_participations(mechanism, rounds.rounds),
        separation=statement.separation or 1,
        # What a device charges is never amplified.
        lifetime_epsilon=(statement.epsilon_known_cohort or 1.0) * (1 + ROUNDING),
        delta=statement.delta or 1e-6,
    )


def _write_users(
    run: Run, population: Population, roster: Path, advance: Callable[[], None]
) -> None:
    """Histories, held-out records and the roster, one user after the other."""
    identity, share = run.home.identities(), run.experiment.evaluation.held_out
    with (
        user_writer(run.home.folder / "users.jsonl") as write_older,
        user_writer(run.held_out.path) as write_newest,
        roster_writer(roster) as enrol,
    ):
        for number, user in enumerate(population):
            older, newest = split_newest(user.records, share)
            _check_length(user, len(older), share)
            write_older(User(user.user_id, older))
            write_newest(User(user.user_id, newest))
            if number < run.training:
                enrol(public_key(identity(user.user_id)))
            advance()


def _check_length(user: User, older: int, share: float) -> None:
    """A device splits what it gets once more, for the validation slice."""
    if older < 2:
        raise DataError(
            f"user {user.user_id!r} has {len(user.records)} records: fewer than two are left "
            f"to train on when {share:.0%} are held out",
            hint="Raise population.min_records, or lower evaluation.held_out.",
        )


def _write_settings(run: Run, server: FederationConfig, privacy: PrivacyPlan) -> None:
    """What the server reads, what the devices read, and whom and what they accept."""
    write_toml(run.federation_file, server)
    write_toml(run.home.folder / "device.toml", run.experiment.for_devices())
    key = public_key(Keystore.beside(run.folder / "server").signing_key(SIGNING_KEY))
    policy = run.experiment.policy or accepting_policy(privacy, server)
    trusted = policy.server_keys or (key,)
    write_toml(run.home.folder / "policy.toml", policy.model_copy(update={"server_keys": trusted}))
