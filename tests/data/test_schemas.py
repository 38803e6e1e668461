import csv
import gzip
import json

import pyarrow as pa
import pytest

from srrl_jax.data import load_examples
from srrl_jax.data.check import check_rows, counts
from srrl_jax.data.sources import read_rows
from srrl_jax.errors import InputError

TURN = {"role": "user", "content": "why?"}
PARTS = {"role": "user", "content": [{"type": "text", "text": "wh"}, {"type": "text", "text": "y?"}]}
ITEM = {"criterion": "says why", "points": 2}


@pytest.mark.parametrize(
    ("schema", "row", "fields"),
    [
        ("HealthBench", {"prompt": [TURN], "rubrics": [ITEM]}, {}),
        ("HealthBench", {"prompt": "why?", "rubrics": [ITEM | {"points": "2"}]}, {}),
        ("HealthBench", {"prompt": [PARTS], "rubrics": [ITEM | {"points": "2.0"}]}, {}),
        ("chat messages", {"messages": [PARTS], "rubrics": [ITEM]}, {}),
        (
            "HealthBench Professional",
            {
                "id": "seven",
                "conversation": {"messages": [TURN]},
                "rubric_items": [{"criterion_text": "says why", "points": 2}],
                "use_case": "consult",
            },
            {},
        ),
        (
            "Rubrics as Rewards",
            {"question": "why?", "rubric": [{"title": "W", "description": "says why", "weight": 2}]},
            {},
        ),
        (
            "data.fields",
            {"q": "why?", "checks": [{"text": "says why", "value": "2"}]},
            {"prompt": "q", "rubrics": "checks", "criterion": "text", "points": "value"},
        ),
    ],
)
def test_each_schema_gives_the_same_example(tmp_path, schema, row, fields):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([row]))
    checked = check_rows(path, fields=fields)
    assert (checked.faults, dict(checked.schemas)) == ([], {schema: 1})
    assert f"schema: {schema} 1" in counts(checked)
    (example,) = load_examples(path, fields)
    assert example.prompt == (TURN,)
    assert [(c.criterion, c.points) for c in example.rubrics] == [("says why", 2)]
    assert "id" not in row or example.prompt_id == "seven"
    assert example.example_tags == (("use_case:consult",) if "use_case" in row else ())


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz", "rows.jsonl.zst", "rows.json", "rows.csv"])
def test_each_form_of_file_holds_the_same_rows(tmp_path, name):
    rows = [{"prompt": [TURN], "rubrics": [ITEM], "prompt_id": str(i)} for i in range(2)]
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path = tmp_path / name
    if name.endswith("csv"):
        with path.open("w", newline="") as file:
            table = csv.DictWriter(file, list(rows[0]))
            table.writeheader()
            table.writerows({k: v if k == "prompt_id" else json.dumps(v) for k, v in r.items()} for r in rows)
    elif name.endswith("json"):
        path.write_text(json.dumps(rows))
    elif name.endswith("zst"):
        with pa.output_stream(str(path), compression="zstd") as file:
            file.write(lines)
    else:
        path.write_bytes(gzip.compress(lines) if name.endswith("gz") else lines)
    examples = load_examples(path)
    assert [e.prompt_id for e in examples] == ["0", "1"]
    assert examples[0].prompt == (TURN,) and examples[0].rubrics[0].points == 2


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "why?", "checklist": []}, "no `rubrics`: add it, or name the fields by data.fields"),
        ({"question": "why?", "rubric": [{"description": "d"}]}, r"`rubric\[0\].weight` is missing"),
        ({"prompt": "why?", "rubrics": [ITEM | {"points": "two"}]}, "must be a number, not a str"),
        ({"prompt": "why?", "rubrics": [ITEM | {"points": "nan"}]}, "at most a million"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}], "rubrics": [ITEM]},
            r"`messages\[0\].content` has parts that are no text",
        ),
    ],
)
def test_what_cannot_be_read_is_named_in_the_words_of_the_file(tmp_path, row, message):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n")
    with pytest.raises(InputError, match=f"rows.jsonl:1: .*{message}"):
        load_examples(path)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("rows.json", b'{"prompt": 1}', "must hold a list"),
        ("rows.jsonl.gz", b"no gzip", "cannot be unpacked as gz"),
        ("rows.csv", b"prompt,rubrics\na\n", "rows.csv:2: has not as many columns"),
        ("rows.tsv", b"", "is none of .jsonl"),
    ],
)
def test_files_that_cannot_be_read_are_named(tmp_path, name, text, message):
    (tmp_path / name).write_bytes(text)
    with pytest.raises(InputError, match=message):
        load_examples(tmp_path / name)


def test_a_hub_data_set_is_read_with_its_config_and_split(monkeypatch):
    import datasets

    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: asked.append((a, k)) or [])
    for source in ("owner/name", "owner/name:test", "owner/name:2024.b:test"):
        list(read_rows(source))
    assert asked == [
        (("owner/name",), {"split": "train"}),
        (("owner/name",), {"split": "test"}),
        (("owner/name", "2024.b"), {"split": "test"}),
    ]
