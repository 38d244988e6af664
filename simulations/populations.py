"""Where a simulation's users come from, and who of them is trained on.

Four kinds of population, one function: `load_population`. Paths may hold `${NAME}`, which stands
for an environment variable, so that an experiment's file need not know the machine it runs on.
"""

import random
from array import array
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal, Self, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, model_validator

from homefire.common.errors import DataError
from homefire.common.files import expand
from homefire.common.records import Skipped, User, read_users
from homefire.simulations.hf_datasets import Columns, read_dataset
from homefire.simulations.lamp import read_lamp
from homefire.simulations.synthetic import synthetic_user
from homefire.simulations.user_spool import UserSpool

__all__ = [
    "Columns",
    "HuggingFace",
    "Jsonl",
    "Lamp",
    "Population",
    "PopulationConfig",
    "Synthetic",
    "load_population",
]

OnBad: TypeAlias = Literal["error", "skip"]


class _Config(BaseModel):
    """What every kind of population has.

    Args:
        users: How many are trained on.
        unseen: How many more are kept out of all training, to be evaluated only.
        min_records: A user with fewer is a bad one.
        max_records: Of longer histories only the newest records are kept.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    users: PositiveInt
    unseen: NonNegativeInt
    min_records: int = Field(default=5, ge=2)  # a history must be divisible in time
    max_records: PositiveInt | None = None

    @model_validator(mode="after")
    def _enough_records(self) -> Self:
        if self.max_records is not None and self.max_records < self.min_records:
            raise ValueError(
                f"max_records = {self.max_records} is less than min_records = {self.min_records}"
            )
        return self


class _Stored(_Config):
    """A population that lies in files.

    Args:
        on_bad: Whether bad records and users end the run ("error") or are left out and counted.
    """

    on_bad: OnBad = "error"


class Synthetic(_Config):
    """Made users with hidden traits; see `homefire.simulations.synthetic`.

    Args:
        records: For each user.
        heterogeneity: 0: all users are alike (the negative control); 1: each has a manner.
    """

    kind: Literal["synthetic"] = "synthetic"
    users: PositiveInt = 12
    unseen: NonNegativeInt = 4
    records: PositiveInt = 24
    heterogeneity: float = Field(default=1.0, ge=0, le=1)

    @model_validator(mode="after")
    def _long_enough(self) -> Self:
        if self.records < self.min_records:
            raise ValueError(
                f"records = {self.records} is less than min_records = {self.min_records}"
            )
        return self


class Jsonl(_Stored):
    """A population file: one user a line; see `homefire.common.records`.

    Args:
        path: A `.jsonl` or `.jsonl.gz` file.
    """

    kind: Literal["jsonl"] = "jsonl"
    path: Path


class Lamp(_Stored):
    """A folder in the shape of the LaMP benchmark; see `homefire.simulations.lamp`.

    Args:
        path: Holds `{split}_questions.json` and `{split}_outputs.json`.
        split: "train", "dev" or "test".
    """

    kind: Literal["lamp"] = "lamp"
    path: Path
    split: str = Field(default="dev", pattern=r"^[\w-]+$")


class HuggingFace(_Stored):
    """A dataset of the `datasets` library; see `homefire.simulations.hf_datasets`.

    Args:
        path: A folder written by `save_to_disk`, a folder of data files, or a hub id.
        split: The split's name.
        columns: Which column holds what.
    """

    kind: Literal["hf"] = "hf"
    path: str = Field(min_length=1)
    split: str = Field(default="train", min_length=1)
    columns: Columns


Stored: TypeAlias = Jsonl | Lamp | HuggingFace
PopulationConfig: TypeAlias = Annotated[Synthetic | Stored, Field(discriminator="kind")]


@dataclass(frozen=True, slots=True)
class Population:
    """The chosen users; each is made or read when its turn comes.

    Attributes:
        training: How many take part in the federation: the first ones.
        unseen: How many take no part in any training of shared weights: the last ones.
        skipped: What was left out of the source, by reason.
        user: Gives a user by number, from 0.
    """

    training: int
    unseen: int
    skipped: Skipped
    user: Callable[[int], User]

    def __len__(self) -> int:
        return self.training + self.unseen

    def __iter__(self) -> Iterator[User]:
        return map(self.user, range(len(self)))


def load_population(
    config: PopulationConfig, *, seed: int, scratch: Path | None = None
) -> Population:
    """Choose users at random.

    Synthetic users are made one at a time and cost 4 bytes of memory each. Stored populations are
    read twice: once for the names of all good users, which are held in memory, once for the chosen
    users' records, which are not.

    Guarantees:
        by user: nobody is both trained on and unseen.
        by name: the choice depends on the set of user ids and the seed, not on the order of the
            source; of a stored population, asking for more training users keeps the unseen ones
            and adds to the others.

    Args:
        config: The population.
        seed: Of the choice, and of synthetic users.
        scratch: The folder on whose disk the chosen users of a stored population lie until the
            population is forgotten, in a file without a name; by default the temporary one.

    Raises:
        ConfigError: A path names an environment variable that is not set, or a dataset, split or
            column that does not exist.
        DataError: The source is damaged or changes meanwhile, a user is bad and `on_bad` is
            "error", or there are fewer good users than asked for.
    """
    if isinstance(config, Synthetic):
        return _made(config, seed)
    skipped = Skipped()
    ids = sorted(_user_ids(config, skipped))
    wanted = config.users + config.unseen
    if len(ids) < wanted:
        raise DataError(
            f"the population has {len(ids)} users with at least {config.min_records} records; "
            f"{wanted} were asked for ({config.users} to train on, {config.unseen} unseen)",
            hint="Ask for fewer users, or lower min_records.",
        )
    chosen = _choice(config, len(ids), seed)
    spool = _set_aside(config, {ids[chosen(place)]: place for place in range(wanted)}, scratch)
    return Population(config.users, config.unseen, skipped, spool.read)


def _choice(config: PopulationConfig, people: int, seed: int) -> Callable[[int], int]:
    """Tells the number of the n-th of the chosen among all people, sorted by their ids.

    The unseen come first from the shuffled people and last among the chosen, so that their choice
    does not depend on how many are trained on.
    """
    order = array("I", range(people))
    random.Random(seed).shuffle(order)  # noqa: S311 - no secret
    wanted = config.users + config.unseen
    return lambda place: order[(place + config.unseen) % wanted]


def _made(config: Synthetic, seed: int) -> Population:
    chosen = _choice(config, config.users + config.unseen, seed)

    def make(place: int) -> User:
        user = synthetic_user(
            chosen(place),
            seed=seed,
            heterogeneity=config.heterogeneity,
            records=config.records,
        )
        return _newest(user, config)

    return Population(config.users, config.unseen, Skipped(), make)


def _user_ids(config: Stored, skipped: Skipped) -> Iterator[str]:
    """The names of all users that can be chosen."""
    for user in _read(config, skipped if config.on_bad == "skip" else None):
        if len(user.records) >= config.min_records:
            yield user.user_id
        elif config.on_bad == "skip":
            skipped.count("too few records")
        else:
            raise DataError(
                f"user {user.user_id!r} has {len(user.records)} record(s); "
                f"at least {config.min_records} are needed",
                hint='Lower min_records, or set on_bad = "skip".',
                reason="too few records",
            )


def _set_aside(config: Stored, places: Mapping[str, int], scratch: Path | None) -> UserSpool:
    """Read the chosen users, and only them, to be asked for in the order of their places."""
    spool, missing = UserSpool(len(places), scratch), len(places)
    for user in _read(config, Skipped() if config.on_bad == "skip" else None):
        if (place := places.get(user.user_id)) is not None:
            spool.put(place, _newest(user, config))
            missing -= 1
            if not missing:
                return spool
    raise DataError(
        f"{config.path}: {missing} of the chosen users were gone when it was read again",
        hint="Leave the source alone while a run is prepared.",
    )


def _newest(user: User, config: PopulationConfig) -> User:
    most = config.max_records or len(user.records)
    return replace(user, records=user.records[-most:])


def _read(config: Stored, skipped: Skipped | None) -> Iterator[User]:
    path = expand(str(config.path))
    match config:
        case Jsonl():
            return read_users(Path(path), skipped=skipped)
        case Lamp():
            return read_lamp(Path(path), split=config.split, skipped=skipped)
        case HuggingFace():
            return read_dataset(path, split=config.split, columns=config.columns, skipped=skipped)
