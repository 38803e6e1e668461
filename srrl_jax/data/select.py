"""Which rows, and which of their criteria: by tags, and by leaving out the rows of another set."""

import dataclasses
import difflib
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence

from srrl_jax.errors import InputError
from srrl_jax.rubrics import Example

# HealthBench Consensus keeps the criteria that physicians agreed on, which are those of a cluster.
_SHORT = {"consensus": "level:cluster"}


def select(examples: Sequence[Example], tags: Iterable[str]) -> list[Example]:
    """The examples and criteria that carry `tags`, such as "theme:hedging" or "axis:accuracy".

    The kind of a tag is what stands before its colon. Tags of one kind are alternatives, kinds are
    all asked for. A kind found among `example_tags` chooses examples; any other chooses criteria,
    and an example left without positive points is dropped. "consensus" is short for "level:cluster".

    Raises InputError for a tag that nothing carries, and when no example is left.
    """
    wanted = defaultdict(set)
    for tag in tags:
        tag = _SHORT.get(tag, tag)
        wanted[_kind(tag)].add(tag)
    examples, given = list(examples), examples
    for kind, names in wanted.items():
        of_examples = {tag for e in given for tag in e.example_tags if _kind(tag) == kind}
        of_criteria = {tag for e in given for c in e.rubrics for tag in c.tags if _kind(tag) == kind}
        for name in names - of_examples - of_criteria:
            raise InputError(f"no row carries the tag {name!r}{_hint(name, given)}")
        if of_examples:
            examples = [e for e in examples if names & set(e.example_tags)]
        else:
            kept = [(e, tuple(c for c in e.rubrics if names & set(c.tags))) for e in examples]
            examples = [
                dataclasses.replace(e, rubrics=rubrics)
                for e, rubrics in kept
                if any(c.points > 0 for c in rubrics)
            ]
    if not examples:
        raise InputError(f"no row is left of {len(given)} by the tags {', '.join(tags)}: ask for fewer kinds")
    return examples


def subtract(examples: Sequence[Example], others: Sequence[Example]) -> list[Example]:
    """`examples` without those whose `prompt_id` is among `others`: HealthBench Easy = main minus Hard.

    A conversation of theirs that goes by another id is left out too: it would not be held out either.
    Raises InputError when the two share no row (then they are not of one data set) or nothing is left.
    """
    among = _among(others)
    left = [e for e in examples if not among(e)]
    if len(left) == len(examples):
        raise InputError(
            f"none of the {len(others)} rows to leave out is among the {len(examples)} rows: "
            "give the set that they are to be taken from, e.g. main minus hard"
        )
    if not left:
        raise InputError(f"all {len(examples)} rows are among those to leave out: were the two sets swapped?")
    return left


def check_disjoint(train: Sequence[Example], evaluation: Sequence[Example]) -> None:
    """Raise InputError when training and evaluation rows share a `prompt_id` or a whole conversation."""
    shared = sorted({e.prompt_id for e in filter(_among(evaluation), train)})
    if shared:
        names = ", ".join(shared[:3]) + (", ..." if len(shared) > 3 else "")
        raise InputError(
            f"{len(shared)} row(s) are in both data.train and data.eval, by prompt_id or word for word, so "
            f"the evaluation would not be held out: {names}; take them out of one of the two (data.minus)"
        )


def _among(others: Sequence[Example]) -> Callable[[Example], bool]:
    """Whether an example is one of others, by its id or word for word."""
    ids, prompts = {e.prompt_id for e in others}, {e.prompt_hash for e in others}
    return lambda e: e.prompt_id in ids or e.prompt_hash in prompts


def _kind(tag: str) -> str:
    return tag.partition(":")[0]


def _hint(name: str, examples: Sequence[Example]) -> str:
    known = {tag for e in examples for tag in (*e.example_tags, *(t for c in e.rubrics for t in c.tags))}
    near = difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.5)
    kinds = ", ".join(sorted({_kind(tag) for tag in known})) or "none"
    return f"; did you mean {near[0]!r}?" if near else f"; the kinds of tags there are: {kinds}"
