"""Answers and verdicts in, results out: with scripted judges, and with the embedded model."""

import dataclasses
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from srrl_jax.cli import app
from srrl_jax.data import load_examples
from srrl_jax.errors import InputError
from srrl_jax.evaluation.evaluate import Answers, evaluate, ready_answers
from srrl_jax.evaluation.judge import Answer
from srrl_jax.evaluation.tables import template_label
from srrl_jax.grading import JudgeConfig, Verdict
from srrl_jax.rubrics import SIMPLE_EVALS_SHA256
from srrl_jax.sampling import SamplingConfig
from srrl_jax.telemetry import read_jsonl
from srrl_jax.tinyworld import oracle, oracle_score

WORLD = Path(__file__).resolve().parents[2] / "srrl_jax" / "tinyworld"
HARD = WORLD / "hard.jsonl"


class Oracle:
    """Knows the truth of the tiny world; says so for at most `patience` calls."""

    name = "oracle"

    def __init__(self, patience: int = 1000):
        self.patience, self.graded = patience, []

    def grade(self, items):
        if self.patience == 0:
            raise KeyboardInterrupt
        self.patience -= 1
        self.graded += [item.response for item in items]
        return [[Verdict(oracle(i.response, c.criterion), "", 1, 1) for c in i.criteria] for i in items]


@pytest.fixture(scope="module")
def examples():
    return load_examples(HARD)[:7]


def says(examples, repeats):
    """An answer that tells which row and repeat it belongs to."""
    return [
        Answer(f"<think>x</think> {e.prompt_id} {r}", f"bring a book . {e.prompt_id} {r}", 3, False)
        for e, r in zip(examples, repeats, strict=True)
    ]


ANSWERS = Answers("someone", {"answering": 1}, says)


def run(examples, out, judge, repeats=2, **settings):
    return evaluate(examples, ANSWERS, judge, out, settings=settings, repeats=repeats, chunk=4)


def test_results_are_those_of_the_verdicts(examples, tmp_path):
    result = run(examples, tmp_path, Oracle())
    scores = [oracle_score(e, f"bring a book . {e.prompt_id}") for e in examples]
    assert result.scores["overall"].mean == pytest.approx(max(0, sum(scores) / len(scores)))
    assert result.scores["overall"].n == result.responses == 14
    assert result.repeats == [result.scores["overall"].mean] * 2
    assert (result.left_out, result.unscorable) == (0, 0.0)
    samples = read_jsonl(tmp_path / "samples.jsonl")
    assert [(s["sample"], s["prompt_id"]) for s in samples] == [
        (repeat, e.prompt_id) for repeat in (0, 1) for e in examples
    ]
    assert [s["reward"] for s in samples] == pytest.approx(scores * 2)
    saved = json.loads((tmp_path / "results.json").read_text())
    assert saved["scores"]["overall"]["mean"] == result.scores["overall"].mean
    assert (saved["model"], saved["grader"]) == ("someone", "oracle")


def test_what_was_killed_goes_on_and_ends_the_same(examples, tmp_path):
    whole = run(examples, tmp_path / "whole", Oracle())
    with pytest.raises(KeyboardInterrupt):
        run(examples, tmp_path / "cut", Oracle(patience=2))
    path = tmp_path / "cut" / "samples.jsonl"
    path.write_bytes(path.read_bytes()[:-20])  # killed while it wrote the eighth line
    judge = Oracle()
    assert run(examples, tmp_path / "cut", judge) == whole
    assert len(judge.graded) == 14 - 7
    assert read_jsonl(path) == read_jsonl(tmp_path / "whole" / "samples.jsonl")
    again = Oracle(patience=0)
    assert run(examples, tmp_path / "cut", again) == whole and again.graded == []
    more = Oracle()
    run(examples, tmp_path / "cut", more, repeats=3)
    assert len(more.graded) == 7


def test_other_settings_do_not_mix_with_what_is_there(examples, tmp_path):
    run(examples, tmp_path, Oracle(), seed=0)
    with pytest.raises(InputError, match="other settings: seed was 0, now 1"):
        run(examples, tmp_path, Oracle(), seed=1)


def test_rows_that_changed_do_not_mix_with_what_is_there(examples, tmp_path):
    run(examples, tmp_path, Oracle())
    asked = dataclasses.replace(examples[1], prompt=({"role": "user", "content": "another question"},))
    rubric = dataclasses.replace(examples[2], rubrics=examples[2].rubrics[1:])
    with pytest.raises(InputError, match=f"have changed since: {asked.prompt_id}, {rubric.prompt_id}[.]"):
        run([examples[0], asked, rubric, *examples[3:]], tmp_path, Oracle())
    assert run(examples[:3], tmp_path, Oracle(patience=0)).responses == 6


def test_responses_without_a_score_are_counted_and_in_no_mean(examples, tmp_path):
    class Mute(Oracle):
        def grade(self, items):
            rows = super().grade(items)
            return [[v._replace(met=None) for v in rows[0]], *rows[1:]]

    result = evaluate(examples, ANSWERS, Mute(), tmp_path, settings={}, chunk=100)
    assert (result.responses, result.left_out, result.scores["overall"].n) == (7, 1, 6)
    silent, total = len(examples[0].rubrics), sum(len(e.rubrics) for e in examples)
    assert result.unscorable == pytest.approx(silent / total)


def write(path, *lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_ready_answers_show_what_a_user_would_see(examples, tmp_path, capsys):
    lines = [
        {"prompt_id": e.prompt_id, "completion": f"<think>no</think> take {r}"}
        for r in (1, 2)
        for e in examples
    ]
    path = write(tmp_path / "done.jsonl", *lines)
    answers = ready_answers("x", path, examples, 2)
    assert [a.response for a in answers.answer(examples[:2], [0, 1])] == ["take 1", "take 2"]
    assert not capsys.readouterr().err
    ready_answers("x", path, examples[:-1], 1)
    assert "8 completions of" in capsys.readouterr().err  # two of the last row, the second of six
    with pytest.raises(InputError, match="fewer than 3 completions for 7 of 7 rows, first hard-0000"):
        ready_answers("x", path, examples, 3)
    with pytest.raises(InputError, match="object 1: `completion` is missing: add a string"):
        ready_answers("x", write(tmp_path / "bad.jsonl", {"prompt_id": "a"}), examples, 1)


def srrl(*arguments):
    return CliRunner().invoke(app, [*map(str, arguments)], catch_exceptions=False)


GRADING = (
    *("--template", WORLD / "grader.txt", "--grader-max-new-tokens", 20, "--grader-temperature", 1),
    *("--tries", 1, "--batch", 4),
)


def test_rows_that_are_too_long_are_listed_before_anything_is_sampled(tmp_path, monkeypatch):
    monkeypatch.setattr("srrl_jax.evaluation.judge.Sampler", lambda *_, **__: pytest.fail("went on"))
    rows = WORLD / "hard.jsonl"
    for options, message in (
        (("--max-new-tokens", 500), "prompts are with 500 new tokens over the 512 positions"),
        (("--max-new-tokens", 20), r"prompts of the grader, .*worst first:\n  hard-00\d\d: \d{4} tokens"),
    ):
        with pytest.raises(InputError, match=message):
            srrl("evaluate", WORLD / "checkpoint", rows, "--out", tmp_path / "out", *options, "--limit", 3)
    assert not (tmp_path / "out" / "samples.jsonl").exists()


def test_the_embedded_model_answers_and_grades_itself(tmp_path):
    arguments = (
        *("evaluate", WORLD / "checkpoint", HARD, "--out", tmp_path, "--limit", 6, *GRADING),
        *("--max-new-tokens", 64, "--temperature", 1),
    )
    done = srrl(*arguments)
    assert done.exit_code == 0
    for text in (
        "overall",
        "axis:completeness",
        "theme:",
        "± s.e.",
        "GPT-5",
        "0.462",
        "GPT-4.1",
        "self-rewarding",
    ):
        assert text in done.output
    samples = read_jsonl(tmp_path / "samples.jsonl")
    assert len(samples) == 6 and all(s["response"] and not s["truncated"] for s in samples)
    examples = load_examples(HARD)[:6]
    judged = [(oracle(s["response"], c["criterion"]), c["verdict"]) for s in samples for c in s["criteria"]]
    assert sum(truth == met for truth, met in judged) / len(judged) > 0.9
    results = json.loads((tmp_path / "results.json").read_text())
    truth = sum(oracle_score(e, s["response"]) for e, s in zip(examples, samples, strict=True)) / 6
    assert results["scores"]["overall"]["mean"] == pytest.approx(truth, abs=0.15)
    # Another checkpoint as the grader of the same completions gives the same verdicts: it is the same one.
    other = srrl(
        *("evaluate", "ready", HARD, "--out", tmp_path / "ready", "--limit", 6, *GRADING),
        *("--completions", tmp_path / "samples.jsonl", "--grader", WORLD / "checkpoint"),
    )
    assert other.exit_code == 0 and "ready" in other.output
    again = read_jsonl(tmp_path / "ready" / "samples.jsonl")
    assert [s["criteria"] for s in again] == [s["criteria"] for s in samples]
    judge = json.loads((tmp_path / "ready" / "results.json").read_text())["identity"]
    assert judge == {f"grader's {name}": value for name, value in results["identity"].items()} != {}


def test_simple_evals_own_template_is_known_by_its_text():
    settings = {"template": "x/healthbench_eval.py", "template_sha256": SIMPLE_EVALS_SHA256}
    assert template_label(settings) == "x/healthbench_eval.py (simple-evals' own words)"
    assert template_label(settings | {"template_sha256": "other"}) == "x/healthbench_eval.py"


@pytest.mark.parametrize(
    ("arguments", "runs", "prefix"),
    [
        (("grade", "MODEL", "IN", "OUT"), "lines.grade_file", ""),
        (("evaluate", "MODEL", "ROWS", "--out", "OUT"), "commands.run_evaluate", "grader-"),
        (("meta-evaluate", "MODEL", "LABELS", "--out", "OUT"), "commands.run_meta_evaluate", ""),
    ],
    ids=["grade", "evaluate", "meta-evaluate"],
)
def test_all_commands_that_judge_take_the_same_options(arguments, runs, prefix, monkeypatch):
    asked = []

    def judged(*_, config=None, judging=None, **__):
        asked.append(config or judging)

    monkeypatch.setattr(f"srrl_jax.evaluation.{runs}", judged)
    srrl(*arguments)
    srrl(*arguments, "--votes", 3, "--together", "--template", "healthbench", "--tries", 2,
         f"--{prefix}temperature", 1, f"--{prefix}max-new-tokens", 9, f"--{prefix}thinking")  # fmt: skip
    srrl(*arguments, "--verdict", "constrained")
    sampling = SamplingConfig(temperature=1, top_k=20, top_p=0.95)
    assert asked == [
        JudgeConfig(),
        JudgeConfig(
            template="healthbench",
            tries=2,
            votes=3,
            together=True,
            max_new_tokens=9,
            thinking=True,
            sampling=sampling,
        ),
        JudgeConfig(verdict="constrained"),
    ]
    with pytest.raises(InputError, match="votes: must be odd"):
        srrl(*arguments, "--votes", 2)
