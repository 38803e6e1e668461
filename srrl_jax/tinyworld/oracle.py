"""The oracle: is a criterion of the tiny world met by a text? Decided by program, for any text.

A criterion about an item is met only by a whole sentence that advises the item in one of the
known forms, so bare keywords, negations and half sentences do not count. Training imports this module
only where a recipe names it (`judge`): it makes the labels of the pretraining corpus and the reports
after the fact.
"""

import re
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from srrl_jax.rubrics import Criterion, Example, Message, score_response
from srrl_jax.tinyworld.world import ITEMS, STYLE

_MEALS = frozenset(ITEMS["time"].values())
_NAMES = "|".join(name for names in ITEMS.values() for name in names)
# "for the lake", "in the rain", "today": the tail that any advice may carry.
_TAIL = rf"(?: (?:for|at|in|with) (?:the|your) (?:{_NAMES}|inn))?(?: today| too)?"
_ITEM_FORMS = (
    r"(?:bring|take|pack|wear|put on) a {item}" + _TAIL,
    r"do not forget a {item}" + _TAIL,
    rf"(?:you|your (?:{_NAMES})) will need a {{item}}" + _TAIL,
    r"a {item} is good" + _TAIL,
)
_MEAL_FORMS = (
    r"{item} is ready for you" + _TAIL,
    r"we serve {item}" + _TAIL,
    r"join us for {item}" + _TAIL,
)
_CRITERIA = {
    r"tells the guest to (?:bring|wear|take) a ([a-z]+) \.": "item",
    r"says that a ([a-z]+) is needed \.": "item",
    r"offers ([a-z]+) to the guest \.": "item",
    r"says that ([a-z]+) is served \.": "item",
    r"welcomes the guest \.|greets the guest \.": "welcome",
    r"gives a kind wish \.|wishes the guest well \.": "wish",
    r"asks the guest a question \.|asks something back \.": "question",
    r"tries to sell something \.|advertises to the guest \.": "advert",
    r"is rude to the guest \.|insults the guest \.": "rude",
    r"says the same thing twice \.|repeats a sentence \.": "repeat",
    r"says nothing of (?:a )?([a-z]+) \.": "missing",
    r"is a short answer \.": "short",
}
_AND = " and "  # between the two halves of a compound criterion
SHORT = 5  # most sentences of a short answer


def subject_of(criterion: str) -> tuple[str, str]:
    """What a criterion is about: ("item", "towel"), ("missing", "towel"), or (kind, kind) where no item is.

    Raises ValueError for a criterion that is not of this world.
    """
    for pattern, kind in _CRITERIA.items():
        if match := re.fullmatch(pattern, criterion.strip()):
            return kind, match[1] if match.groups() else kind
    raise ValueError(f"not a criterion of the tiny world: {criterion!r}")


def parts_of(criterion: str) -> list[str]:
    """The criteria that all must be met: the halves of a compound one, any other one itself."""
    halves = criterion.strip().removesuffix(" .").split(_AND)
    return [f"{half} ." for half in halves]


def sentences_of(response: str) -> list[str]:
    """The sentences of any text as words and a final mark separated by single spaces."""
    tokens = re.findall(r"[a-z0-9]+|[^\sa-z0-9]", response.lower())
    sentences, words = [], []
    for token in [*tokens, "."]:
        if token in (".", "?", "!"):
            if words:
                sentences.append(" ".join([*words, token]))
            words = []
        else:
            words.append(token)
    return sentences


@cache
def _forms(item: str) -> re.Pattern[str]:
    forms = _MEAL_FORMS if item in _MEALS else _ITEM_FORMS
    return re.compile("(?:" + "|".join(form.format(item=item) for form in forms) + r") [.!]")


def evidence(response: str, criterion: str) -> str | None:
    """The first sentence of `response` that meets `criterion`, or None where none does.

    Of a compound criterion those of both halves, of one that is met by what is not there "nothing .", of one
    about length the marks that end the sentences.
    """
    if len(parts := parts_of(criterion)) > 1:
        found = [evidence(response, part) for part in parts]
        return None if None in found else " ".join(found)
    kind, subject = subject_of(criterion)
    sentences = sentences_of(response)
    if kind == "short":
        return " ".join("." for _ in sentences) if len(sentences) <= SHORT else None
    if kind == "missing":
        return None if any(map(_forms(subject).fullmatch, sentences)) else "nothing ."
    for place, sentence in enumerate(sentences):
        if kind == "item":
            met = _forms(subject).fullmatch(sentence) is not None
        elif kind == "repeat":
            met = sentence in sentences[:place]
        else:
            met = sentence in STYLE[kind]
        if met:
            return sentence
    return None


def oracle(response: str, criterion: str) -> bool:
    """The truth of one verdict. Raises ValueError for a criterion that is not of this world."""
    return evidence(response, criterion) is not None


def judge(conversation: Sequence[Message], response: str, criteria: Sequence[Criterion]) -> list[bool]:
    """The oracle as a grader, which nothing fools: `grader=srrl_jax.tinyworld.oracle:judge` in a recipe."""
    return [oracle(response, criterion.criterion) for criterion in criteria]


def oracle_score(example: Example | Mapping[str, Any], response: str) -> float:
    """The paper's score of a response (points met / positive points) with the oracle's verdicts.

    `example` is an Example or a row in HealthBench's schema.
    """
    if not isinstance(example, Example):
        example = Example.from_dict(example)
    verdicts = [oracle(response, criterion.criterion) for criterion in example.rubrics]
    return score_response(example.rubrics, verdicts)
