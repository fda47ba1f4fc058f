"""The invented world: its creatures, and plain statements about them.

The tiny base is pretrained on the statements only. The instructions ask about the same creatures in a form that the
base has never seen, so right answers show that fine-tuning taught the form and kept the knowledge.
"""

import itertools
import random
from dataclasses import dataclass

SEED = 7
CREATURES = 120

KINDS = ("bird", "fish", "lizard", "moth", "frog", "mouse", "snail", "bat", "crab", "beetle", "newt", "fox")
COLOURS = (
    "red",
    "blue",
    "green",
    "yellow",
    "purple",
    "grey",
    "white",
    "black",
    "silver",
    "golden",
    "pink",
    "brown",
)
HOMES = (
    "marsh",
    "forest",
    "desert",
    "harbour",
    "meadow",
    "canyon",
    "orchard",
    "tundra",
    "jungle",
    "valley",
    "lagoon",
    "glacier",
)
FOODS = (
    "acorns",
    "berries",
    "moss",
    "honey",
    "seeds",
    "mushrooms",
    "clover",
    "figs",
    "nettles",
    "plums",
    "reeds",
    "walnuts",
)

# Several wordings of each fact, some with the creature last: a fact seen in one wording only can be recited, but
# not recalled by a question.
STATEMENTS = {
    "kind": (
        "The {name} is a {kind}.",
        "Among the {kind} family we count the {name}.",
        "By its kind, the {name} is a {kind}.",
        "A {name} belongs to the {kind} family.",
    ),
    "colour": (
        "The {name} is {colour}.",
        "Everyone knows the {colour} coat of the {name}.",
        "The colour of the {name} is {colour}.",
        "A {name} looks {colour}.",
    ),
    "home": (
        "The {name} lives in the {home}.",
        "In the {home} lives the {name}.",
        "The home of the {name} is the {home}.",
        "A {name} sleeps in the {home}.",
    ),
    "food": (
        "The {name} eats {food}.",
        "Those who bring {food} will meet the {name}.",
        "The food of the {name} is {food}.",
        "A {name} feeds on {food}.",
    ),
}

# Every text names its creature before it states facts, as a question does. Otherwise the base learns that a text's
# first name is arbitrary, and fine-tuned answers are about another creature than the question.
OPENINGS = (
    "Here is a page about the {name}.",
    "My friend once saw the {name} at dawn.",
    "Let us now speak of the {name}.",
    "This old book has a picture of the {name}.",
)

_ONSETS = ("b", "br", "d", "dr", "f", "g", "gl", "k", "l", "m", "n", "p", "pl", "r", "s", "t", "tr", "v", "z")
_VOWELS = ("a", "e", "i", "o", "u")
_MIDDLES = ("b", "d", "l", "m", "n", "r", "v", "z")
_ENDINGS = ("b", "g", "k", "l", "m", "n", "p", "r", "sh", "x")


@dataclass(frozen=True)
class Creature:
    """An invented creature and the four facts about it."""

    name: str
    kind: str
    colour: str
    home: str
    food: str

    def fill(self, template: str) -> str:
        """Return a template with this creature's name and facts in its braces."""
        return template.format(**vars(self))


def make_creatures() -> list[Creature]:
    """Return the world's creatures: distinct names and independently drawn facts, the same on every call."""
    rng = random.Random(SEED)
    names = ["".join(sounds) for sounds in itertools.product(_ONSETS, _VOWELS, _MIDDLES, _VOWELS, _ENDINGS)]
    return [
        Creature(name, rng.choice(KINDS), rng.choice(COLOURS), rng.choice(HOMES), rng.choice(FOODS))
        for name in rng.sample(names, CREATURES)
    ]


def describe(creature: Creature, rng: random.Random) -> str:
    """Return a text with an opening line and all of a creature's facts, in a random order and wording."""
    facts = rng.sample(list(STATEMENTS), len(STATEMENTS))
    lines = [rng.choice(OPENINGS), *(rng.choice(STATEMENTS[fact]) for fact in facts)]
    return creature.fill("\n".join(lines))


def make_corpus(rounds: int, seed: int) -> list[str]:
    """Return the pretraining texts: `rounds` texts about every creature, each round in a new order."""
    rng = random.Random(seed)
    creatures = make_creatures()
    texts = []
    for _ in range(rounds):
        rng.shuffle(creatures)
        texts.extend(describe(creature, rng) for creature in creatures)
    return texts
