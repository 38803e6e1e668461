import copy

import pytest

from srrl_jax.rubrics import Criterion, Example


def row(**changes):
    base = {
        "prompt": [{"role": "user", "content": "hi"}],
        "rubrics": [{"criterion": "Says hello", "points": 3}],
    }
    return {**base, **changes}


def test_only_prompt_and_rubrics_are_required():
    example = Example.from_dict(row())
    assert example.prompt == ({"role": "user", "content": "hi"},)
    assert example.rubrics == (Criterion("Says hello", 3, ()),)
    assert example.example_tags == ()
    assert example.prompt_id


def test_default_prompt_id_is_stable_and_tells_prompts_apart():
    first = Example.from_dict(row()).prompt_id
    same_prompt = row(rubrics=[{"criterion": "Waves", "points": 1}], prompt_id=None)
    other = row(prompt=[{"role": "user", "content": "hi!"}])
    assert first == "5aced9397fc4a6ba78e47d642ce4949b"  # must not change between runs or releases
    assert Example.from_dict(same_prompt).prompt_id == first
    assert Example.from_dict(other).prompt_id != first


def test_full_row_of_several_turns_keeps_everything_and_ignores_extra_keys():
    full = row(
        prompt=[
            {"role": "system", "content": ""},
            {"role": "user", "content": "{a}"},
            {"role": "assistant", "content": "b", "name": "x"},
            {"role": "user", "content": "c"},
        ],
        rubrics=[
            {"criterion": "A", "points": 2.5, "tags": ["axis:accuracy"], "note": 1},
            {"criterion": "B", "points": -4, "tags": None},
        ],
        prompt_id="id-1",
        example_tags=["theme:hedging"],
        canary="c",
        ideal_completions_data=None,
    )
    before = copy.deepcopy(full)
    example = Example.from_dict(full)
    assert full == before
    assert [turn["role"] for turn in example.prompt] == ["system", "user", "assistant", "user"]
    assert example.rubrics[0] == Criterion("A", 2.5, ("axis:accuracy",))
    assert example.rubrics[1].points == -4
    assert (example.prompt_id, example.example_tags) == ("id-1", ("theme:hedging",))
    assert Example.from_dict(example.to_dict()) == example


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ([], "a row must be an object"),
        (None, "a row must be an object .* not null"),
        ({"prompt": row()["prompt"]}, "no `rubrics`: add a list"),
        ({"rubrics": row()["rubrics"]}, "no `prompt`: add a list"),
        (row(prompt="hi"), "`prompt` must be a list of {role, content}, not a str"),
        (row(prompt=[]), "`prompt` is empty"),
        (row(rubrics=[]), "`rubrics` is empty"),
        (row(rubrics={"criterion": "A"}), "`rubrics` must be a list"),
        (row(prompt=["hi"]), r"`prompt\[0\]` must be an object"),
        (row(prompt=[{"role": "user"}]), r"`prompt\[0\]\.content` is missing"),
        (row(prompt=[{"role": " ", "content": "x"}]), r"`prompt\[0\]\.role` is empty"),
        (row(prompt=[{"role": "user", "content": None}]), r"content` must be a string, not null"),
        (
            row(prompt=[{"role": "assistant", "content": "x"}]),
            "`prompt` ends with the assistant's turn: leave",
        ),
        (row(rubrics=[{"criterion": "A"}]), r"`rubrics\[0\]\.points` is missing"),
        (row(prompt=[{"role": "user", "content": "a \ud800"}]), "content` holds half of a surrogate pair"),
        (row(rubrics=[{"criterion": "", "points": 1}]), r"`rubrics\[0\]\.criterion` is empty"),
        (row(rubrics=[{"criterion": 7, "points": 1}]), r"criterion` must be a string, not a int"),
        (row(rubrics=[{"criterion": "A", "points": "5"}]), "points` must be a number, not a str"),
        (row(rubrics=[{"criterion": "A", "points": True}]), "points` must be a number, not a bool"),
        (row(rubrics=[{"criterion": "A", "points": float("nan")}]), "points` is nan"),
        (row(rubrics=[{"criterion": "A", "points": 10**400}]), "points` is 1000"),
        (row(rubrics=[{"criterion": "A", "points": -1}]), "no criterion with positive points"),
        (row(rubrics=[{"criterion": "A", "points": 0}]), "no criterion with positive points"),
        (
            row(rubrics=[{"criterion": "A", "points": 1, "tags": "x"}]),
            r"`rubrics\[0\]\.tags` must be a list of strings",
        ),
        (row(example_tags=[1]), "`example_tags` must be a list of strings"),
        (row(prompt_id=3), "`prompt_id` must be a string"),
    ],
)
def test_bad_rows_name_the_field(bad, message):
    with pytest.raises(ValueError, match=message):
        Example.from_dict(bad)
