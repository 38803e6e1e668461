import dataclasses
import json
from collections import Counter

import pytest

from srrl_jax.data import check_disjoint, load_examples, write_tfds
from srrl_jax.data.convert import convert
from srrl_jax.errors import InputError
from srrl_jax.rubrics import Example


def row(number, **changes):
    base = {
        "prompt": [{"role": "user", "content": f"question {number} é {{}}"}],
        "prompt_id": f"id-{number}",
        "rubrics": [
            {"criterion": "Answers", "points": 3, "tags": ["axis:accuracy"]},
            {"criterion": "Rambles", "points": -2, "tags": []},
        ],
        "example_tags": ["theme:hedging"],
    }
    return {**base, **changes}


ROWS = [row(0), row(1), row(2, ideal_completions_data=None)]
EXAMPLES = [Example.from_dict(r) for r in ROWS]


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return path


def test_jsonl_in_order_with_blank_lines_and_a_byte_order_mark(tmp_path):
    path = tmp_path / "rows.jsonl"
    text = "\ufeff" + "\n\n".join(json.dumps(r, ensure_ascii=False) for r in ROWS)
    path.write_text(text, encoding="utf-8")
    assert load_examples(path) == EXAMPLES
    assert load_examples(str(path)) == EXAMPLES


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (b'{"prompt": ', r":2: not valid JSON .*write one object a line"),
        (b'{"prompt": "\xff"}', r":2: not valid JSON"),
        (b"[" * 100_000, r":2: not valid JSON"),
        (b"null", r":2: a row must be an object"),
        (b'{"prompt": [{"role": "user", "content": "x"}]}', r":2: no `rubrics`: add"),
        (json.dumps(row(1, rubrics=[{"criterion": "A", "points": -1}])), r":2: .*positive points"),
        (json.dumps(row(0)), r":2: prompt_id 'id-0' is already used at .*rows\.jsonl:1: remove"),
    ],
)
def test_bad_line_is_named_with_its_file_and_number(tmp_path, bad, message):
    path = tmp_path / "rows.jsonl"
    bad = bad if isinstance(bad, bytes) else bad.encode()
    path.write_bytes(json.dumps(row(0)).encode() + b"\n" + bad + b"\n")
    with pytest.raises(InputError, match=r"rows\.jsonl" + message):
        load_examples(path)


@pytest.mark.parametrize("text", ["", "\n \n"])
def test_empty_file(tmp_path, text):
    path = tmp_path / "rows.jsonl"
    path.write_text(text)
    with pytest.raises(InputError, match=r"rows\.jsonl holds no rows"):
        load_examples(path)


@pytest.mark.parametrize(
    "source",
    ["nowhere", "nowhere/rows.jsonl", "./nowhere/rows", "/nowhere/rows", "a/b/c", "../x", ""],
)
def test_missing_path(source, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="no such file or directory|is a directory"):
        load_examples(source)


def test_sources_of_no_known_kind(tmp_path):
    (tmp_path / "rows.tsv").write_text("a,b\n")
    with pytest.raises(InputError, match="none of .jsonl"):
        load_examples(tmp_path / "rows.tsv")
    with pytest.raises(InputError, match="give a .jsonl or .parquet file in it"):
        load_examples(tmp_path)
    with pytest.raises(InputError, match="is a URL: give a path"):
        load_examples("https://example.com/rows.jsonl")


def test_tfds_round_trip(tmp_path):
    write_tfds(ROWS, tmp_path / "rows")
    assert load_examples(tmp_path / "rows") == EXAMPLES
    write_tfds(EXAMPLES, tmp_path / "deeper" / "rows")
    assert load_examples(str(tmp_path / "deeper" / "rows")) == EXAMPLES
    assert sorted(p.name for p in tmp_path.iterdir()) == ["deeper", "rows"]  # nothing left behind


def test_tfds_stores_every_key_of_a_row(tmp_path):
    from srrl_jax.data.tfds import read_tfds

    rows = [row(0, canary="c", ideal_completions_data={"ideal_completion": "ü", "x": [None, 1.5]})]
    write_tfds(rows, tmp_path / "rows")
    assert list(read_tfds(tmp_path / "rows")) == rows


def test_tfds_refuses_a_directory_in_use(tmp_path):
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(InputError, match="is in use"):
        write_tfds(ROWS, tmp_path)
    assert (tmp_path / "mine.txt").read_text() == "keep"


def test_tfds_bad_row_is_named(tmp_path):
    write_tfds([row(0), {"prompt": [], "rubrics": []}], tmp_path / "rows")
    with pytest.raises(InputError, match="rows row 1: `prompt` is empty"):
        load_examples(tmp_path / "rows")


def test_tfds_of_another_shape(tmp_path):
    import tensorflow_datasets as tfds

    class OtherRows(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")
        code_path = None

        def _info(self):
            features = tfds.features.FeaturesDict({"text": tfds.features.Text()})
            return tfds.core.DatasetInfo(builder=self, features=features)

        def _split_generators(self, dl_manager):
            return {"test": self._generate_examples()}

        def _generate_examples(self):
            yield 0, {"text": "x"}

    builder = OtherRows(data_dir=tmp_path, file_format="array_record")
    builder.download_and_prepare()
    with pytest.raises(InputError, match=r"splits \['test'\].*features \['text'\].*write_tfds"):
        load_examples(str(builder.data_path))


@pytest.fixture
def datasets(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return datasets


def test_datasets_directory_and_parquet(datasets, tmp_path):
    dataset = datasets.Dataset.from_list([e.to_dict() for e in EXAMPLES])
    dataset.save_to_disk(tmp_path / "saved")
    dataset.to_parquet(tmp_path / "rows.parquet")
    assert load_examples(tmp_path / "saved") == EXAMPLES
    assert load_examples(tmp_path / "rows.parquet") == EXAMPLES


def test_rows_in_a_bucket(datasets, bucket, tmp_path):
    dataset = datasets.Dataset.from_list([e.to_dict() for e in EXAMPLES])
    dataset.save_to_disk(tmp_path / "saved")
    dataset.to_parquet(tmp_path / "saved" / "rows.parquet")
    write_jsonl(tmp_path / "saved" / "rows.jsonl", ROWS)
    for file in (tmp_path / "saved").iterdir():
        (bucket / "saved" / file.name).write_bytes(file.read_bytes())
    assert load_examples("gs://bucket/saved/rows.jsonl") == EXAMPLES
    assert load_examples("gs://bucket/saved/rows.parquet") == EXAMPLES
    assert load_examples("gs://bucket/saved") == EXAMPLES
    with pytest.raises(InputError, match="gs://bucket/none.jsonl: no such file"):
        load_examples("gs://bucket/none.jsonl")
    (bucket / "tfds" / "features.json").write_bytes(b"{}")
    with pytest.raises(InputError, match="array_record files are read from a disk"):
        load_examples("gs://bucket/tfds")


def test_rows_are_written_to_a_bucket(bucket, tmp_path):
    rows = write_jsonl(tmp_path / "rows.jsonl", ROWS)
    assert convert(str(rows), f"{bucket}/out/rows.jsonl", "jsonl") == 3
    assert load_examples(f"{bucket}/out/rows.jsonl") == EXAMPLES
    with pytest.raises(InputError, match="is in use"):
        convert(str(rows), f"{bucket}/out/rows.jsonl", "jsonl")
    with pytest.raises(InputError, match="gs://bucket/tfds: array_record files are written to a disk"):
        convert(str(rows), f"{bucket}/tfds", "tfds")


def test_datasets_directory_of_several_splits_names_them(datasets, tmp_path):
    dataset = datasets.Dataset.from_list([e.to_dict() for e in EXAMPLES])
    datasets.DatasetDict(easy=dataset, hard=dataset).save_to_disk(tmp_path / "saved")
    with pytest.raises(InputError, match="several splits: give one of them, .*easy or .*hard"):
        load_examples(tmp_path / "saved")
    assert load_examples(tmp_path / "saved" / "hard") == EXAMPLES


def test_broken_parquet(datasets, tmp_path):
    (tmp_path / "rows.parquet").write_bytes(b"not parquet")
    with pytest.raises(InputError, match="`datasets` cannot read .*rows.parquet"):
        load_examples(tmp_path / "rows.parquet")


@pytest.mark.parametrize(("source", "split"), [("owner/name", "train"), ("owner/na.me:hard", "hard")])
def test_hub_id(datasets, monkeypatch, tmp_path, source, split):
    monkeypatch.chdir(tmp_path)
    asked = []

    def load_dataset(name, split):
        asked.append((name, split))
        return datasets.Dataset.from_list([e.to_dict() for e in EXAMPLES])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert load_examples(source) == EXAMPLES
    assert asked == [(source.partition(":")[0], split)]


@pytest.mark.parametrize("error", [FileNotFoundError, ConnectionError, ValueError])
def test_hub_failure_is_one_clear_message(datasets, monkeypatch, tmp_path, error):
    monkeypatch.chdir(tmp_path)

    def load_dataset(name, split):
        raise error("the reason")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(InputError, match=r"cannot read owner/name \(the reason\): check the path"):
        load_examples("owner/name")


def test_check_disjoint():
    check_disjoint(EXAMPLES[:1], EXAMPLES[1:])
    with pytest.raises(InputError, match=r"1 row\(s\) are in both .*id-1;"):
        check_disjoint(EXAMPLES[:2], EXAMPLES[1:])
    renamed = dataclasses.replace(EXAMPLES[1], prompt_id="another id")
    with pytest.raises(InputError, match=r"word for word.*id-1;"):
        check_disjoint(EXAMPLES[:2], [renamed])


def test_real_rows(shared_data):
    main = load_examples(shared_data / "healthbench" / "main.jsonl")
    hard = load_examples(shared_data / "healthbench" / "hard.jsonl")
    criteria = [item for example in main for item in example.rubrics]
    assert (len(main), len(criteria), len(hard)) == (400, 4725, 73)
    assert sum(item.points < 0 for item in criteria) / len(criteria) == pytest.approx(0.30, abs=0.01)
    assert sum(len(example.prompt) > 1 for example in main) == 171
    assert all(tag.count(":") >= 1 for item in criteria for tag in item.tags)
    themes = Counter(sum(t.startswith("theme:") for t in e.example_tags) for e in main)
    assert themes == {1: 400}

    hard_ids = {example.prompt_id for example in hard}
    easy = [example for example in main if example.prompt_id not in hard_ids]
    assert len(easy) == 327
    check_disjoint(easy, hard)
    with pytest.raises(InputError, match=r"^73 row"):
        check_disjoint(main, hard)


def test_real_rows_through_tfds(shared_data, tmp_path):
    from srrl_jax.data.tfds import read_tfds

    with (shared_data / "healthbench" / "hard.jsonl").open(encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    write_tfds(rows, tmp_path / "hard")
    assert list(read_tfds(tmp_path / "hard")) == rows
    expected = load_examples(shared_data / "healthbench" / "hard.jsonl")
    assert load_examples(tmp_path / "hard") == expected
