import json

import pytest
from typer.testing import CliRunner

from srrl_jax.checkpoints.tokenizer import load_tokenizer
from srrl_jax.cli import app
from srrl_jax.data.check import check_rows
from srrl_jax.errors import InputError

WORLD = "srrl_jax/tinyworld"


def row(number, **changes):
    return {
        "prompt": [{"role": "user", "content": f"question {number}"}],
        "prompt_id": f"id-{number}",
        "rubrics": [{"criterion": "Answers", "points": 3}, {"criterion": "Rambles", "points": -2}],
        **changes,
    }


@pytest.fixture
def write(tmp_path):
    def rows(*values):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join((v if isinstance(v, str) else json.dumps(v)) + "\n" for v in values))
        return path

    return rows


def faults(path, **options):
    return [fault.replace(f"{path}:", "") for fault in check_rows(path, **options).faults]


def test_all_faults_of_all_rows_are_named(write):
    path = write(
        row(0),
        '{"prompt": ',
        row(
            1, prompt=[{"role": "user"}, "hi"], rubrics=[{"criterion": " ", "points": "five"}], example_tags=3
        ),
        "",
        row(2, rubrics=[{"criterion": "A", "points": -1}]),
        row(0, prompt=[{"role": "user", "content": "another"}]),
        row(3, prompt=row(0)["prompt"]),
        row(4, rubrics=[{"criterion": "A", "points": 11}, {"criterion": "B", "points": 0}]),
        row(5, prompt=[*row(5)["prompt"], {"role": "assistant", "content": "yes"}]),
        row(6),
    )
    found = faults(path)
    assert found[0].startswith("2: not valid JSON")
    assert [fault.partition(": ")[0] for fault in found] == list("23333356788" + "9")
    told = "\n".join(found)
    for text in (
        "3: `prompt[0].content` is missing: add a string",
        "3: `prompt[1]` must be an object {role, content}, not a str",
        "3: `rubrics[0].criterion` is empty: give it some text",
        "3: `rubrics[0].points` must be a number, not a str",
        "3: `example_tags` must be a list of strings",
        "5: `rubrics` has no criterion with positive points",
        f"6: `prompt_id` 'id-0' is already used at {path}:1".replace(f"{path}:", ""),
        "7: `prompt` and `rubrics` are the same as at 1: remove one of the rows",
        "8: `rubrics[0].points` is 11, beyond 10: scale it, or allow more points",
        "8: `rubrics[1].points` is 0, so it counts for nothing",
        "9: `prompt` ends with the assistant's turn",
    ):
        assert text in told
    assert check_rows(path).rows == 9
    assert not any("is 11" in fault for fault in faults(path, max_points=20))


def test_no_rows(write):
    assert "holds no rows" in faults(write())[0]


def test_prompts_over_the_budget_are_named_by_the_tokens_they_take(write):
    tokenizer = load_tokenizer(f"{WORLD}/checkpoint")
    path = write(
        row(0, prompt=[{"role": "user", "content": "hello ."}]),
        row(1, prompt=[{"role": "user", "content": "hello . " * 30}]),
    )
    checked = check_rows(path, tokenizer=tokenizer)
    short, long = checked.prompt_tokens
    assert short < 12 and long > 60 and not checked.faults
    assert len(checked.criterion_tokens) == 4
    assert faults(path, tokenizer=tokenizer, max_prompt_tokens=long) == []
    (only,) = faults(path, tokenizer=tokenizer, max_prompt_tokens=long - 1)
    assert only.startswith(f"2: `prompt` takes {long} tokens, over {long - 1}")
    with pytest.raises(InputError, match="needs a tokenizer"):
        check_rows(path, max_prompt_tokens=10)


def test_a_prompt_that_the_chat_template_refuses(write):
    class Picky:
        def quote(self, text):
            return text

        def render(self, messages, thinking):
            raise InputError("the chat template refuses the messages: no system turn")

        def encode(self, text):
            return [0]

    (only,) = faults(write(row(0)), tokenizer=Picky())
    assert only == "1: `prompt`: the chat template refuses the messages: no system turn"


def test_real_rows_have_no_fault(shared_data):
    checked = check_rows(shared_data / "healthbench" / "main.jsonl")
    assert (checked.rows, checked.faults, len(checked.examples)) == (400, [], 400)


def run(*arguments):
    return CliRunner().invoke(app, ["data", *map(str, arguments)])


def test_the_command_prints_a_profile_and_ends_with_1_on_any_fault(write):
    good = run("check", f"{WORLD}/easy.jsonl", "--tokenizer", f"{WORLD}/checkpoint")
    assert good.exit_code == 0
    for text in ("400 rows, 0 faults", "tokens of a prompt", "criteria of a row", "theme: "):
        assert text in good.output
    path = write(row(0), row(1, rubrics=[]), "[]")
    bad = run("check", path)
    assert bad.exit_code == 1
    assert f"{path}:2: `rubrics` is empty" in bad.output and f"{path}:3: a row must be" in bad.output
    assert "3 rows, 2 faults" in bad.output


def test_convert_keeps_every_key_and_leaves_rows_out(write, tmp_path):
    path = write(row(0, canary="x"), row(1, canary="y"), row(2, canary="z"))
    held_out = tmp_path / "held.jsonl"
    held_out.write_text(json.dumps(row(1)) + "\n")
    out = tmp_path / "new" / "rows.jsonl"
    done = run("convert", path, out, "--minus", held_out)
    assert done.exit_code == 0 and f"2 rows in {out}" in done.output
    assert [json.loads(line)["canary"] for line in out.read_text().splitlines()] == ["x", "z"]
    again = run("convert", path, out)
    assert isinstance(again.exception, InputError) and "is in use" in str(again.exception)


def test_convert_to_tfds_and_by_tag(tmp_path):
    from srrl_jax.data import load_examples, select

    out = tmp_path / "rows"
    done = run("convert", f"{WORLD}/hard.jsonl", out, "--to", "tfds", "--where", "axis:completeness")
    assert done.exit_code == 0
    expected = select(load_examples(f"{WORLD}/hard.jsonl"), ["axis:completeness"])
    assert load_examples(out) == expected
    assert all(c.tags[0] == "axis:completeness" for e in expected for c in e.rubrics)
