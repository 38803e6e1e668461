"""The same guests under rubrics that are harder to grade: compound criteria, of what is missing, of length.

What is due counts only together with something else: on Hard all of it does, so that an answer must
combine what it does right. A likely mistake is a criterion about what is not said. The committed rows, which
the demo trains on, have none of these.
"""

from random import Random
from typing import Any

from srrl_jax.rubrics import Criterion
from srrl_jax.tinyworld.corpus import draw_quality
from srrl_jax.tinyworld.oracle import oracle, parts_of, subject_of
from srrl_jax.tinyworld.rows import draw_row, random_criterion
from srrl_jax.tinyworld.world import ITEMS, facts_of, write_response

KINDS = ("compound", "missing", "short")
SHORT_CRITERION = "is a short answer ."
_ITEMS = [item for items in ITEMS.values() for item in items.values()]


def compound(first: str, second: str) -> str:
    """The criterion that is met where both are."""
    return f"{first.removesuffix(' .')} and {second}"


def missing(item: str) -> str:
    """The criterion that is met where an item is not advised."""
    return f"says nothing of {'' if item in ITEMS['time'].values() else 'a '}{item} ."


def draw_harder_row(split: str, rng: Random, prompt_id: str = "") -> dict[str, Any]:
    """As `draw_row`. On "hard" all criteria with positive points are joined in pairs, else about half."""
    row = draw_row(split, rng, prompt_id)
    good = [rubric for rubric in row["rubrics"] if rubric["points"] > 0]
    length = {"criterion": SHORT_CRITERION, "points": rng.randint(2, 5)}
    rubrics = [length | {"tags": ["axis:instruction_following", "level:example"]}]
    for rubric in row["rubrics"]:
        if rubric["points"] < 0:
            kind, item = subject_of(rubric["criterion"])
            turned = {"criterion": missing(item), "points": -rubric["points"]} if kind == "item" else {}
            rubrics.append(rubric | turned)
    while good:
        rubric = good.pop()
        if good and (split == "hard" or rng.random() < 0.5):
            other = good.pop()
            joined = compound(rubric["criterion"], other["criterion"])
            rubric = rubric | {"criterion": joined, "points": min(rubric["points"] + other["points"], 10)}
        rubrics.append(rubric)
    rng.shuffle(rubrics)
    return row | {"rubrics": rubrics}


def random_harder_criterion(rng: Random, response: str) -> str:
    """A criterion of a kind that is new here; about half of each are met by `response`, where any can be."""
    kind = rng.choice(KINDS)
    if kind == "short":
        return SHORT_CRITERION
    drawn = [random_criterion(rng) for _ in range(40)]
    good = [criterion for criterion in drawn if oracle(response, criterion)]
    if kind == "missing":
        said = [subject for form, subject in map(subject_of, good) if form == "item"]
        return missing(rng.choice(said if said and rng.random() < 0.5 else _ITEMS))
    first = rng.choice(good or drawn)
    return compound(
        first, rng.choice([c for c in (good if rng.random() < 0.5 else drawn) if c != first] or drawn)
    )


def harder_pairs(n: int = 396, seed: int = 1) -> list[tuple[list[dict[str, str]], str, Criterion, bool]]:
    """Fixed test of grading as `grader_pairs`, as many met as not of each of `KINDS` in turn."""
    rng = Random(f"harder grader {seed}")
    pairs: list[tuple[list[dict[str, str]], str, Criterion, bool]] = []
    while len(pairs) < n:
        prompt = draw_row("hard", rng)["prompt"]
        response = write_response(facts_of(prompt[0]["content"]), rng, draw_quality(rng))
        criterion, truth = random_harder_criterion(rng, response), len(pairs) % 2 == 0
        if kind_of(criterion) == KINDS[len(pairs) // 2 % len(KINDS)] and oracle(response, criterion) == truth:
            pairs.append((prompt, response, Criterion(criterion, 5), truth))
    return pairs


def kind_of(criterion: str) -> str:
    """One of `KINDS`, or what `subject_of` says of a plain criterion."""
    return "compound" if len(parts_of(criterion)) > 1 else subject_of(criterion)[0]
