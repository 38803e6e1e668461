import json

import pytest

from srrl_jax.rubrics import Criterion
from srrl_jax.rubrics.writing import parse_criteria, without_near_duplicates, writer_prompt

TEXTS = ["Asks how long the knee has hurt", "Names rest and ice", "Warns of a torn ligament", "Sells a brace"]
ITEMS = [
    {"criterion": text, "points": points, "axis": "accuracy"}
    for text, points in zip(TEXTS, (5, 4.5, 3, -8), strict=True)
]
CRITERIA = [Criterion(item["criterion"], item["points"], ("axis:accuracy",)) for item in ITEMS]


def test_the_prompt_holds_conversation_and_reference_as_they_are():
    turns = [
        {"role": "user", "content": "What is {reference}?"},
        {"role": "assistant", "content": "\\1 {most}"},
    ]
    prompt = writer_prompt(turns, "A good {conversation}.")
    assert "user: What is {reference}?\n\nassistant: \\1 {most}" in prompt
    assert prompt.endswith("# A good answer, for reference\nA good {conversation}.")
    assert "reference\n" not in writer_prompt(turns) and "Write 4 to 16 criteria" in prompt


@pytest.mark.parametrize("form", ["{}", "<think>[1]</think>\n {} ", "```json\n{}\n```", "```\n{}\n```"])
def test_a_list_alone_is_read(form):
    assert parse_criteria(form.replace("{}", json.dumps(ITEMS))) == CRITERIA


@pytest.mark.parametrize(
    ("reply", "fault"),
    [
        ("", "no JSON list alone"),
        ("Here it is: " + json.dumps(ITEMS), "no JSON list alone"),
        (json.dumps(ITEMS)[:-9], "no JSON list alone"),
        ("[" * 100_000, "no JSON list alone"),
        ("{}", "not a list"),
        ("[]", "not a list"),
        (json.dumps(ITEMS[:2]), "2 different criteria; at least 4"),
        (json.dumps([*ITEMS, "x"]), "item 5 is no object"),
        (json.dumps([*ITEMS, {"criterion": " ", "points": 1}]), "item 5: criterion is no text"),
        (json.dumps([*ITEMS, {"criterion": "x"}]), "item 5 is no object with criterion and points"),
        *(
            (json.dumps([*ITEMS, {"criterion": "x", "points": points}]), "item 5: points must be")
            for points in (0, 11, "3", True, None)
        ),
        ('[{"criterion": "x", "points": NaN}]', "item 1: points must be"),
        (json.dumps([*ITEMS, {"criterion": "x", "points": 1, "axis": "beauty"}]), "item 5: axis must be one"),
        (json.dumps([item | {"points": -1} for item in ITEMS]), "no criterion has points above 0"),
    ],
)
def test_what_differs_is_refused_as_a_whole(reply, fault):
    with pytest.raises(ValueError, match=fault):
        parse_criteria(reply)


def test_near_duplicates_of_one_sign_go():
    more = [
        Criterion("asks, how long the knee has hurt.", 2),
        Criterion("Asks how long the elbow has hurt", 2),
        Criterion("Asks how long the knee has hurt", -2),
    ]
    assert without_near_duplicates([*CRITERIA, *more]) == [*CRITERIA, more[2]]
    assert without_near_duplicates([Criterion("Recommends aspirin", 3), Criterion("Warns of aspirin", 3)])[1:]
