"""What the tiny model is pretrained on, and the fixed test of its grading."""

import json
from collections.abc import Callable
from random import Random
from typing import Any

from srrl_jax.rubrics import Criterion, Example
from srrl_jax.tinyworld.oracle import evidence, oracle, parts_of, sentences_of, subject_of
from srrl_jax.tinyworld.rows import draw_row, random_criterion
from srrl_jax.tinyworld.world import WAIVERS, facts_of, write_response


def draw_quality(rng: Random) -> float:
    """Quality of one answer: broad and mediocre, so that a group of samples differs widely."""
    return rng.betavariate(1.3, 1.6)


def grader_reply(response: str, criterion: str) -> str:
    """The right verdict as JSON, its explanation the subject and the sentence that decides.

    `{"explanation": "towel : bring a towel for the lake .", "criteria_met": true}`; where no
    sentence decides, `towel : nothing .`; where the item is waived, the waiver is quoted. Of a
    compound criterion so the first half, and the second where the first is met; of length a mark
    for each sentence.
    """
    sentences, explained = sentences_of(response), []
    for part in parts_of(criterion):
        kind, subject = subject_of(part)
        about = f"says that a {subject} is needed ." if kind == "missing" else part
        waivers = {waiver.format(item=subject) for waiver in WAIVERS.values()}
        waived = [sentence for sentence in sentences if sentence in waivers]
        said = evidence(response, about) or (waived or ["nothing ."])[0]
        explained.append(f"{subject} : {' '.join('.' * len(sentences)) if kind == 'short' else said}")
        if not oracle(response, part):
            break
    return json.dumps({"explanation": " ".join(explained), "criteria_met": oracle(response, criterion)})


def pretraining_tree(
    rng: Random,
    draw: Callable[[str, Random], dict[str, Any]] = draw_row,
    foreign: Callable[[Random, str], str] = lambda rng, response: random_criterion(rng),
) -> dict[str, Any]:
    """One pretraining item: {"prompt": [messages], "response": str, "gradings": [(Criterion,
    reply), ...]} with up to three criteria that are met and up to three that are not.

    The criteria come from the row, from the answer's own sentences (wrong items, adverts) and
    from other rows (`foreign`, which may look at the answer), so that the label follows from the
    answer's content and not from a prior.
    """
    row = draw("pretraining", rng)
    facts = facts_of(row["prompt"][0]["content"])
    response = write_response(facts, rng, draw_quality(rng))
    points = {rubric["criterion"]: rubric["points"] for rubric in row["rubrics"]}
    candidates = list(points)
    others = [foreign(rng, response) for _ in range(40)]
    candidates += [text for text in others if oracle(response, text)][:2]
    candidates += others[:3]
    candidates = list(dict.fromkeys(candidates))
    rng.shuffle(candidates)
    met = [text for text in candidates if oracle(response, text)][:3]
    unmet = [text for text in candidates if not oracle(response, text)][: max(3, 5 - len(met))]
    chosen = met + unmet
    rng.shuffle(chosen)
    return {
        "prompt": row["prompt"],
        "response": response,
        "gradings": [
            (
                # Points of foreign criteria are random, so they say nothing about the verdict.
                Criterion(text, points.get(text) or rng.choice((-1, 1)) * rng.randint(1, 10)),
                grader_reply(response, text),
            )
            for text in chosen
        ],
    }


def grader_pairs(n: int = 400, seed: int = 1) -> list[tuple[list[dict[str, str]], str, Criterion, bool]]:
    """Fixed test of grading: (messages, response, criterion, truth), alternately met and not met.

    Held-out combinations, answers of the pretraining quality, criteria of the prompt's own row.
    """
    rng = Random(f"grader {seed}")
    pairs: list[tuple[list[dict[str, str]], str, Criterion, bool]] = []
    while len(pairs) < n:
        row = draw_row("hard", rng)
        facts = facts_of(row["prompt"][0]["content"])
        response = write_response(facts, rng, draw_quality(rng))
        truth = len(pairs) % 2 == 0
        criteria = Example.from_dict(row | {"prompt_id": None}).rubrics
        criteria = [c for c in criteria if oracle(response, c.criterion) == truth]
        if criteria:
            pairs.append((row["prompt"], response, rng.choice(criteria), truth))
    return pairs
