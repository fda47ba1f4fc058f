"""Write the quickstart's instructions: questions about the invented world, split by creature.

No creature in heldout.jsonl is in train.jsonl, so a correct held-out answer can't be copied from the training
rows: its fact comes from the base, and only its form from fine-tuning.
"""

import argparse
import json
import random
from collections.abc import Iterable
from pathlib import Path

from world import Creature, make_creatures

SEED = 11
HELD_OUT_CREATURES = 20
HELD_OUT_ROWS = 100

# For each question: its wordings as an instruction, its input, and its answer. The form of the last answer is new
# to the base, which has seen each fact in a separate sentence.
TEMPLATES = (
    (("What kind of animal is the {name}?", "Which family is the {name} in?"), "", "The {name} is a {kind}."),
    (("What colour is the {name}?", "Tell me the colour of the {name}."), "", "The {name} is {colour}."),
    (("Where does the {name} live?", "Where can I find the {name}?"), "", "The {name} lives in the {home}."),
    (("What does the {name} eat?", "What should I feed the {name}?"), "", "The {name} eats {food}."),
    (
        ("Describe this creature.", "Write a short note on this creature."),
        "the {name}",
        "The {name} is a {colour} {kind}. It lives in the {home} and eats {food}.",
    ),
)

Row = dict[str, str]


def ask_about(creature: Creature) -> list[Row]:
    """Return a row for every question about a creature, in every wording."""
    return [
        {
            "instruction": creature.fill(wording),
            "input": creature.fill(given),
            "output": creature.fill(answer),
        }
        for wordings, given, answer in TEMPLATES
        for wording in wordings
    ]


def make_rows() -> tuple[list[Row], list[Row]]:
    """Return the training rows and the held-out rows; creatures are split first, so none is in both."""
    rng = random.Random(SEED)
    creatures = make_creatures()
    rng.shuffle(creatures)
    held_out = [row for creature in creatures[:HELD_OUT_CREATURES] for row in ask_about(creature)]
    train = [row for creature in creatures[HELD_OUT_CREATURES:] for row in ask_about(creature)]
    rng.shuffle(train)
    return train, rng.sample(held_out, HELD_OUT_ROWS)


def write_jsonl(path: Path, rows: Iterable[Row]) -> None:
    """Write one JSON object per line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def main() -> None:
    """Write train.jsonl and heldout.jsonl under --out."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for train.jsonl and heldout.jsonl")
    out = parser.parse_args().out
    train_rows, held_out_rows = make_rows()
    out.mkdir(parents=True, exist_ok=True)
    write_jsonl(out / "train.jsonl", train_rows)
    write_jsonl(out / "heldout.jsonl", held_out_rows)
    print(f"{out}: {len(train_rows)} training rows, {len(held_out_rows)} held-out rows")


if __name__ == "__main__":
    main()
