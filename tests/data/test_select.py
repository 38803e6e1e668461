import dataclasses
from collections import Counter

import pytest

from srrl_jax.data import check_disjoint, load_examples, select, subtract
from srrl_jax.errors import InputError
from srrl_jax.rubrics import Criterion, Example


def example(name: str, theme: str, *rubrics: tuple[float, str]) -> Example:
    criteria = tuple(
        Criterion(f"c{i}", points, tuple(tags.split())) for i, (points, tags) in enumerate(rubrics)
    )
    return Example(({"role": "user", "content": name},), criteria, name, (f"theme:{theme}",))


A = example("a", "hedging", (3, "axis:accuracy level:cluster"), (5, "axis:completeness level:example"))
B = example("b", "hedging", (2, "axis:accuracy level:example"), (-4, "axis:completeness level:cluster"))
C = example("c", "global_health", (7, "axis:completeness level:cluster"))


def chosen(*tags: str) -> dict[str, list[str]]:
    return {e.prompt_id: [c.criterion for c in e.rubrics] for e in select([A, B, C], tags)}


def test_no_tags_keep_everything():
    assert select([A, B, C], ()) == [A, B, C]


def test_a_theme_chooses_examples_and_two_of_them_are_alternatives():
    assert chosen("theme:hedging") == {"a": ["c0", "c1"], "b": ["c0", "c1"]}
    assert list(chosen("theme:hedging", "theme:global_health")) == ["a", "b", "c"]


def test_an_axis_or_level_chooses_criteria_and_drops_what_could_not_be_scored():
    assert chosen("axis:accuracy") == {"a": ["c0"], "b": ["c0"]}
    assert chosen("level:cluster") == {"a": ["c0"], "c": ["c0"]}  # b is left with a negative one
    assert chosen("consensus") == chosen("level:cluster")


def test_kinds_are_all_asked_for():
    assert chosen("axis:completeness", "level:example", "theme:hedging") == {"a": ["c1"]}
    with pytest.raises(InputError, match="no row is left of 3 by the tags theme:global"):
        chosen("theme:global_health", "axis:accuracy")


def test_a_tag_that_nothing_carries_is_named_with_the_nearest():
    with pytest.raises(InputError, match="'theme:hedgin'; did you mean 'theme:hedging'"):
        chosen("theme:hedgin")
    with pytest.raises(InputError, match="the kinds of tags there are: axis, level, theme"):
        chosen("zzz")


def test_subtract():
    assert subtract([A, B, C], [C]) == [A, B]
    assert subtract([A, B, C], [dataclasses.replace(C, prompt_id="another id")]) == [A, B]
    with pytest.raises(InputError, match="none of the 1 rows"):
        subtract([A, B], [C])
    with pytest.raises(InputError, match="were the two sets swapped"):
        subtract([C], [A, B, C])


def test_easy_is_main_minus_hard(shared_data):
    main = load_examples(shared_data / "healthbench" / "main.jsonl")
    hard = load_examples(shared_data / "healthbench" / "hard.jsonl")
    easy = subtract(main, hard)
    assert len(easy) == 327
    check_disjoint(easy, hard)


def test_real_rows_by_tag(shared_data):
    main = load_examples(shared_data / "healthbench" / "main.jsonl")
    consensus = select(main, ["consensus"])
    # As in the released consensus file: two or three criteria of 5 points, nothing negative.
    assert len(consensus) == 314
    assert {len(e.rubrics) for e in consensus} == {2, 3}
    assert {c.points for e in consensus for c in e.rubrics} == {5}
    hedging = select(main, ["theme:hedging", "axis:accuracy"])
    assert Counter(t for e in hedging for t in e.example_tags if t.startswith("theme:")) == {
        "theme:hedging": len(hedging)
    }
    assert all("axis:accuracy" in c.tags for e in hedging for c in e.rubrics)
