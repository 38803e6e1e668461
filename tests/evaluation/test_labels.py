import json
import math

import pytest

from srrl_jax.errors import InputError
from srrl_jax.evaluation.labels import load_labels
from srrl_jax.rubrics import Criterion

RELEASED = {
    "prompt": [{"role": "user", "content": "hi"}],
    "prompt_id": "p",
    "completion": "hello",
    "completion_id": "c",
    "rubric": "Greets back",
    "category": "cluster:greetings",
    "binary_labels": [True, False],
    "anonymized_physician_ids": ["x", "y"],
    "canary": "z",
}
SHORT = {
    "conversation": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}],
    "criterion": "Greets back",
    "label": True,
}


@pytest.fixture
def load(tmp_path):
    def rows(*values):
        path = tmp_path / "labels.jsonl"
        path.write_text("".join(json.dumps(value) + "\n" for value in values))
        return load_labels(path)

    return rows


def test_the_released_form_and_the_short_one(load):
    released, short = load(RELEASED, SHORT)
    assert released.prompt == short.prompt == ({"role": "user", "content": "hi"},)
    assert released.response == short.response == "hello"
    assert released.criterion.criterion == short.criterion.criterion == "Greets back"
    assert math.isnan(released.criterion.points) and math.isnan(short.criterion.points)
    assert (released.labels, short.labels) == ((True, False), (True,))
    assert (released.physicians, short.physicians) == (("x", "y"), ())
    assert (released.category, short.category) == ("cluster:greetings", "")


def test_points_are_a_field_or_stand_before_the_text(load):
    field, prefix, neither = load(
        RELEASED | {"points": -3},
        RELEASED | {"rubric": "[-4.5] Is rude"},
        RELEASED | {"rubric": "[citation]"},
    )
    assert field.criterion == Criterion("Greets back", -3)
    assert prefix.criterion == Criterion("Is rude", -4.5)
    assert neither.criterion.criterion == "[citation]" and math.isnan(neither.criterion.points)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ([], "a row must be an object"),
        (RELEASED | {"completion": None}, "`completion` must be a string"),
        (RELEASED | {"prompt": []}, "`prompt` is empty"),
        (RELEASED | {"rubric": " "}, "`rubric` is empty"),
        (RELEASED | {"rubric": None}, "`rubric` must be a string, not null"),
        (RELEASED | {"points": "5"}, "`points` must be a number"),
        (RELEASED | {"binary_labels": []}, "`binary_labels` must be a list of true and false"),
        (RELEASED | {"binary_labels": [1, 0]}, "`binary_labels` must be a list of true and false"),
        (RELEASED | {"anonymized_physician_ids": ["x"]}, "must name one physician for each label"),
        (SHORT | {"conversation": SHORT["conversation"][:1]}, "the last one the response"),
        (SHORT | {"conversation": SHORT["conversation"][::-1]}, "must end with the assistant's turn"),
    ],
)
def test_a_bad_row_is_named_with_the_mend(load, bad, message):
    with pytest.raises(InputError, match=rf"labels\.jsonl:2: .*{message}"):
        load(RELEASED, bad)


def test_no_rows(load):
    with pytest.raises(InputError, match="holds no rows"):
        load()
