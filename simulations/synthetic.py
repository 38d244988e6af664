"""Synthetic users: people with habits, made from a seed, each one on its own.

Every user has hidden traits: how they open and close, their favourite words, their punctuation and
casing, how much they write, what they talk about and what they think of it. Heterogeneity `h` says
how strongly these show: for each record and each trait the user's own value is used with
probability h, and a value drawn from the population otherwise.

Guarantees:
    no influence: at h = 0 a record does not depend on the traits; the records of all users are
        independent draws from one distribution. Personalization cannot help there: it is the
        negative control of every experiment.
    own traits: at h = 1 no habit but the user's own is used.
    same margins: the distribution of a trait over the whole population is the same for every h.
    own generator: a user depends on number, seed, heterogeneity and count alone, and a longer
        history begins with the shorter one.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date, timedelta
from typing import TypeVar

from homefire.common.records import Record, User

T = TypeVar("T")

_FIRST_DAY = date(2024, 1, 1)
_INTERESTS = 8

_WORDS: Mapping[str, tuple[str, ...]] = {
    "opener": (
        "Honestly,",
        "Right then,",
        "Well now,",
        "Hmm,",
        "Look,",
        "Hey hey,",
        "Oh dear,",
        "Oh well,",
    ),
    "sign-off": (
        "Cheers",
        "Just my two cents",
        "Stay curious",
        "Over and out",
        "Food for thought",
        "There you go",
        "Warm regards",
        "End of story",
    ),
    "mark": (".", "!", "...", "!!!", ". :)", " ~"),
    "casing": ("sentence", "lower", "shout", "title"),
    "think": (
        "I reckon",
        "I think",
        "I feel that",
        "in my view",
        "I would say",
        "my gut says",
        "to my mind",
        "you know,",
    ),
    "degree": ("really", "awfully", "super", "terribly", "quite", "remarkably", "rather", "mighty"),
    "praise": (
        "splendid",
        "awesome",
        "lovely",
        "brilliant",
        "neat",
        "wonderful",
        "delightful",
        "fantastic",
    ),
    "blame": (
        "dull",
        "dreadful",
        "tedious",
        "silly",
        "tiresome",
        "overrated",
        "pointless",
        "annoying",
    ),
    "filler": (
        "basically",
        "actually",
        "sort of",
        "simply",
        "happily",
        "finally",
        "kind of",
        "literally",
    ),
    "joint": ("because", "since", "as", "for"),
    "people": (
        "folks",
        "mates",
        "pals",
        "colleagues",
        "cousins",
        "neighbours",
        "housemates",
        "relatives",
    ),
}
_LENGTHS = (1, 2, 3)
_QUESTIONS = (
    "What do you think about {}?",
    "How do you feel about {}?",
    "Would you recommend {} to a friend?",
    "Any thoughts on {}?",
    "Is {} worth the time?",
    "What is your opinion of {}?",
    "Someone asked me about {} today. What should I say?",
    "Tell me about {}.",
)
_WHEN = ("this morning", "last night", "on Sunday", "after work", "yesterday", "last week")
_AGREEMENT = ("see it the same way", "see it differently", "keep asking me about it")


@dataclass(frozen=True, slots=True)
class Topic:
    """Something to have an opinion on: reasons for and against, and things that one did."""

    name: str
    pros: tuple[str, str, str]
    cons: tuple[str, str, str]
    deeds: tuple[str, str, str]
    verb: str = "is"


_TOPICS = (
    Topic(
        "gardening",
        ("it keeps my hands busy", "the tomatoes taste of summer", "every spring feels new again"),
        ("the weeds always win", "my back hurts for days", "the slugs eat all of it"),
        ("planted a row of beans", "pruned the old roses", "watered the herbs twice"),
    ),
    Topic(
        "chess",
        ("every game tells a story", "it sharpens the mind", "a good trap is pure joy"),
        ("one slip ruins the evening", "the openings need endless study", "nobody ever talks"),
        ("lost to a ten year old", "solved a long endgame", "played six quick games"),
    ),
    Topic(
        "tea",
        ("it warms me right through", "each pot tastes different", "it makes a quiet break"),
        ("it goes cold too fast", "it tastes of wet leaves", "the rules about it tire me"),
        ("brewed a smoky blend", "broke my favourite teapot", "tried a green one"),
    ),
    Topic(
        "cycling",
        ("the wind clears my head", "it beats sitting in traffic", "the hills make me stronger"),
        ("the saddle is pure pain", "the cars come far too close", "it always rains halfway"),
        ("rode along the river", "fixed a flat tyre", "climbed the long hill"),
    ),
    Topic(
        "jazz",
        ("no two nights sound alike", "the drummers are magicians", "it suits a slow evening"),
        ("the solos go on forever", "I never find the tune", "it makes me nervous"),
        ("heard a trio downtown", "bought an old record", "practised a blues scale"),
    ),
    Topic(
        "baking bread",
        ("the whole house smells great", "kneading calms me down", "fresh crust beats any cake"),
        ("the dough sticks to everything", "it takes the whole day", "mine comes out like stone"),
        ("fed the sourdough starter", "burnt two loaves", "tried a rye recipe"),
    ),
    Topic(
        "hiking",
        ("the views are worth it", "the forest makes me calm", "lunch tastes better up there"),
        ("my boots give me blisters", "the mosquitoes love me", "the way down never ends"),
        ("walked the ridge trail", "got lost near the lake", "packed far too much food"),
    ),
    Topic(
        "camping",
        ("the stars are so bright", "a fire makes good company", "mornings smell of pine"),
        ("the ground is rock hard", "the tent always leaks", "I miss a hot shower"),
        ("pitched the tent alone", "cooked beans on the fire", "slept under the trees"),
    ),
    Topic(
        "painting",
        ("the colours lift my mood", "mistakes turn into ideas", "hours pass like minutes"),
        ("my trees look like brooms", "the brushes cost too much", "it never dries in time"),
        ("mixed a perfect blue", "sketched the harbour", "ruined a good canvas"),
    ),
    Topic(
        "swimming",
        ("the water makes me weightless", "it wakes up every muscle", "I sleep so well after"),
        ("the pool is always crowded", "chlorine stings my eyes", "the water is freezing"),
        ("swam forty slow lengths", "forgot my towel again", "learned a new stroke"),
    ),
    Topic(
        "poetry",
        ("a few words say it all", "it slows the day down", "good lines stay for years"),
        ("I rarely get the point", "it sounds too solemn", "plain prose says it better"),
        ("read a sonnet aloud", "wrote four clumsy lines", "borrowed a thin book"),
    ),
    Topic(
        "board games",
        ("the whole table laughs", "the rules are a puzzle", "they bring us together"),
        ("someone always sulks", "the rules take an hour", "the pieces get lost"),
        ("won by a single point", "taught the game to Grandpa", "lost a very long match"),
        verb="are",
    ),
    Topic(
        "coffee",
        ("it starts the day right", "the smell alone helps", "a good roast tastes of fruit"),
        ("it keeps me up at night", "it tastes burnt to me", "the queue is never short"),
        ("ground some fresh beans", "spilled a full cup", "tried the new cafe"),
    ),
    Topic(
        "astronomy",
        ("it makes worries look small", "Saturn looks unreal", "the sky is free for all"),
        ("clouds cover every good night", "my neck gets stiff", "the city lights hide it"),
        ("found Jupiter over the roof", "waited for a comet", "cleaned the old telescope"),
    ),
    Topic(
        "running",
        ("it empties my head", "small steps add up", "the park is lovely at dawn"),
        ("my knees complain for days", "it bores me to tears", "I lose my breath at once"),
        ("ran around the lake", "bought some new shoes", "skipped the last mile"),
    ),
    Topic(
        "old films",
        ("the dialogue sparkles", "shadows did all the work", "the faces tell so much"),
        ("the pace puts me to sleep", "the sound is so thin", "the plots are so thin"),
        ("watched a silent comedy", "found a western on disc", "saw a noir double bill"),
        verb="are",
    ),
    Topic(
        "knitting",
        ("the rhythm settles me", "gifts made by hand last", "wool feels good in winter"),
        ("I drop every other stitch", "one scarf takes a year", "the wool makes me itch"),
        ("finished a striped hat", "unravelled a whole sleeve", "bought some soft yarn"),
    ),
    Topic(
        "fishing",
        ("the lake is so still", "patience pays in the end", "the morning light is gold"),
        ("nothing ever bites", "it is cold and wet", "I feel sorry for them"),
        ("caught one small perch", "tangled the line badly", "rowed out before sunrise"),
    ),
    Topic(
        "photography",
        ("it teaches me to look", "light changes everything", "a good shot stops time"),
        ("the gear weighs a ton", "everyone hates to pose", "I never sort the pictures"),
        ("shot a roll of film", "photographed the old bridge", "lost a lens cap"),
    ),
    Topic(
        "cooking",
        ("sharing a meal is joy", "spices turn dinner into travel", "it beats any takeaway"),
        ("the dishes pile up", "I burn the onions", "it is eaten in minutes"),
        ("made a spicy lentil soup", "grilled some fresh corn", "oversalted the pasta"),
    ),
    Topic(
        "trains",
        ("the window is my cinema", "I get to read for hours", "no airport comes close"),
        ("they never run on time", "the seats hurt my back", "someone always shouts on phones"),
        ("took the night express", "missed the last connection", "rode along the coast"),
        verb="are",
    ),
    Topic(
        "museums",
        ("old things feel alive there", "one room fills my day", "the quiet does me good"),
        ("my feet hurt so soon", "the labels are too small", "the shop is the best part"),
        ("saw the dinosaur hall", "drew a marble head", "joined a guided tour"),
        verb="are",
    ),
    Topic(
        "birdwatching",
        ("dawn sounds like a concert", "patience brings rare guests", "the hedge is full of life"),
        ("they fly off at once", "all brown ones look alike", "it starts far too early"),
        ("spotted a kingfisher", "filled the feeder", "followed a noisy woodpecker"),
    ),
    Topic(
        "dancing",
        ("it shakes the week off", "good music moves my feet", "everybody smiles on the floor"),
        ("I have two left feet", "the music is too loud", "my partner counts out loud"),
        ("learned a tango step", "danced in the kitchen", "stepped on many toes"),
    ),
)


@dataclass(frozen=True, slots=True)
class Traits:
    """What sets one user apart; hidden from everybody but the generator.

    Args:
        words: One choice for each habit of speech: opener, sign-off, mark, casing, think, degree,
            praise, blame, filler, joint, people.
        length: 1 (about 15 words a record) to 3 (about 30).
        interests: What the user talks about.
        likes: Names of the topics that the user likes; all others are disliked.
    """

    words: Mapping[str, str]
    length: int
    interests: tuple[Topic, ...]
    likes: frozenset[str]


def synthetic_traits(number: int, seed: int) -> Traits:
    """The hidden traits of one user."""
    rng = _generator(seed, number, "traits")
    return Traits(
        words={name: rng.choice(options) for name, options in _WORDS.items()},
        length=rng.choice(_LENGTHS),
        interests=tuple(rng.sample(_TOPICS, _INTERESTS)),
        likes=frozenset(topic.name for topic in _TOPICS if rng.random() < 0.5),
    )


def synthetic_id(number: int) -> str:
    """The name of one user."""
    return f"synthetic-{number:07d}"


def synthetic_user(number: int, *, seed: int, heterogeneity: float, records: int) -> User:
    """One user with a dated history; see the module for the guarantees.

    Args:
        number: Which user, from 0.
        seed: The population's seed.
        heterogeneity: From 0 (all users alike) to 1 (every record in the user's own manner).
        records: How many, one a day.
    """
    traits = synthetic_traits(number, seed)
    rng = _generator(seed, number, "records")
    days = (_FIRST_DAY + timedelta(days=day) for day in range(records))
    return User(
        synthetic_id(number),
        tuple(_record(traits, rng, heterogeneity, day.isoformat()) for day in days),
    )


def _record(traits: Traits, rng: random.Random, heterogeneity: float, day: str) -> Record:
    """One record; draws the same numbers from `rng` whatever the traits are."""

    def mix(own: T, population: Sequence[T]) -> T:
        drawn = rng.choice(population)
        return own if rng.random() < heterogeneity else drawn

    words = {name: mix(traits.words[name], options) for name, options in _WORDS.items()}
    length = mix(traits.length, _LENGTHS)
    topic = mix(rng.choice(traits.interests), _TOPICS)
    liked = mix(topic.name in traits.likes, (False, True))
    reason = rng.choice(topic.pros if liked else topic.cons)
    adjective = f"{words['degree']} {words['praise' if liked else 'blame']}"
    adjective = adjective.upper() if words["casing"] == "shout" else adjective
    deed = f"I {words['filler']} {rng.choice(topic.deeds)} {rng.choice(_WHEN)}"
    verdict = f"{words['think']} {topic.name} {topic.verb} {adjective} {words['joint']} {reason}"
    others = f"most of my {words['people']} {rng.choice(_AGREEMENT)}"
    question = rng.choice(_QUESTIONS).format(topic.name)
    if asked := rng.random() < 0.5:
        sentences = (verdict, deed, others)[:length]
    else:
        sentences = (deed, adjective if length == 1 else verdict, others)[: max(length, 2)]
    return Record(
        text=_write(
            (f"{words['opener']} {sentences[0]}", *sentences[1:], words["sign-off"]), words
        ),
        prompt=question if asked else None,
        created_at=day,
    )


def _write(sentences: Sequence[str], words: Mapping[str, str]) -> str:
    """Put the user's marks after the sentences and apply the user's casing."""
    text = " ".join(f"{sentence[0].upper()}{sentence[1:]}{words['mark']}" for sentence in sentences)
    match words["casing"]:
        case "lower":
            return text.lower()
        case "title":
            return " ".join(word[0].upper() + word[1:] for word in text.split(" "))
        case _:
            return text


def _generator(seed: int, number: int, purpose: str) -> random.Random:
    return random.Random(f"homefire/synthetic/{seed}/{number}/{purpose}")  # noqa: S311 - no secret
