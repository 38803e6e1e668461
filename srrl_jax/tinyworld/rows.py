"""Rows in HealthBench's schema: a guest's prompt with four to eight signed criteria."""

import json
from random import Random
from typing import Any

from srrl_jax.tinyworld.world import (
    ITEMS,
    Facts,
    draw_facts,
    due_item,
    mistaken_item,
    write_prompt,
)

STYLE_CRITERIA = {
    "welcome": ("welcomes the guest .", "greets the guest ."),
    "wish": ("gives a kind wish .", "wishes the guest well ."),
    "question": ("asks the guest a question .", "asks something back ."),
    "advert": ("tries to sell something .", "advertises to the guest ."),
    "rude": ("is rude to the guest .", "insults the guest ."),
    "repeat": ("says the same thing twice .", "repeats a sentence ."),
}
ITEM_CRITERIA = {
    "place": ("tells the guest to bring a {item} .", "says that a {item} is needed ."),
    "weather": ("tells the guest to wear a {item} .", "says that a {item} is needed ."),
    "companion": ("tells the guest to take a {item} .", "says that a {item} is needed ."),
    "time": ("offers {item} to the guest .", "says that {item} is served ."),
}
# kind -> (probability of being in a rubric, fewest points, most points, axis)
STYLE_POINTS = {
    "welcome": (0.3, 1, 3, "communication_quality"),
    "wish": (0.7, 2, 5, "communication_quality"),
    "question": (0.6, 2, 5, "context_awareness"),
    "advert": (0.4, -8, -3, "instruction_following"),
    "rude": (0.4, -10, -4, "communication_quality"),
    "repeat": (0.3, -5, -2, "communication_quality"),
}


def item_criterion(slot: str, item: str, rng: Random) -> str:
    """A criterion that is met by advising `item`."""
    return rng.choice(ITEM_CRITERIA[slot]).format(item=item)


def random_criterion(rng: Random) -> str:
    """A criterion of some row or other: three in four about an item, else about style."""
    if rng.random() < 0.25:
        return rng.choice(STYLE_CRITERIA[rng.choice(list(STYLE_CRITERIA))])
    slot = rng.choice(list(ITEMS))
    return item_criterion(slot, rng.choice(list(ITEMS[slot].values())), rng)


def _rubric(text: str, points: int, axis: str) -> dict[str, Any]:
    return {"criterion": text, "points": points, "tags": [f"axis:{axis}", "level:example"]}


def draw_rubrics(facts: Facts, rng: Random) -> list[dict[str, Any]]:
    """Signed criteria for a request: due items, one or two likely mistakes, and manners."""
    named = facts.named()
    rubrics = [
        _rubric(item_criterion(slot, due_item(slot, name), rng), rng.randint(4, 10), "completeness")
        for slot, name in named.items()
    ]
    for slot in rng.sample(list(named), 2 if len(named) > 2 and rng.random() < 0.4 else 1):
        text = item_criterion(slot, mistaken_item(slot, named[slot]), rng)
        rubrics.append(_rubric(text, rng.randint(-8, -3), "accuracy"))
    for kind, (chance, low, high, axis) in STYLE_POINTS.items():
        if rng.random() < chance:
            text = rng.choice(STYLE_CRITERIA[kind])
            rubrics.append(_rubric(text, rng.randint(low, high), axis))
    if not 4 <= len(rubrics) <= 8:
        return draw_rubrics(facts, rng)
    rng.shuffle(rubrics)
    return rubrics


def draw_row(split: str, rng: Random, prompt_id: str = "") -> dict[str, Any]:
    """One random row of a split ("easy", "hard" or "pretraining") in HealthBench's schema."""
    facts = draw_facts(split, rng)
    return {
        "prompt": [{"role": "user", "content": write_prompt(facts, rng)}],
        "prompt_id": prompt_id,
        "rubrics": draw_rubrics(facts, rng),
        "example_tags": [f"theme:{len(facts.named())}_facts"],
    }


def easy_rows(n: int = 400, seed: int = 1) -> list[dict[str, Any]]:
    """Training rows: one to three facts; the defaults give the committed `easy.jsonl`."""
    rng = Random(f"easy {seed}")
    return [draw_row("easy", rng, f"easy-{index:04d}") for index in range(n)]


def hard_rows(n: int = 100, seed: int = 1) -> list[dict[str, Any]]:
    """Held-out rows: three and four facts; the defaults give the committed `hard.jsonl`."""
    rng = Random(f"hard {seed}")
    return [draw_row("hard", rng, f"hard-{index:04d}") for index in range(n)]


def dump_rows(rows: list[dict[str, Any]]) -> str:
    """The rows as JSON lines."""
    return "".join(json.dumps(row) + "\n" for row in rows)
