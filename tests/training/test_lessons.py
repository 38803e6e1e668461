"""Lessons in grading, from a file that a teacher graded."""

import json
import math
from collections import Counter

import numpy as np
import pytest

from srrl_jax.checkpoints.tokenizer import load_tokenizer
from srrl_jax.errors import InputError
from srrl_jax.grading import Grader
from srrl_jax.grading.asking import GradingItem
from srrl_jax.rubrics import Criterion, parse_verdict
from srrl_jax.run import train
from srrl_jax.run.replay import replay
from srrl_jax.sampling import Completion
from srrl_jax.telemetry import read_jsonl
from srrl_jax.tinyworld import grader_pairs, oracle
from srrl_jax.training.lessons import load_lessons, with_lessons, with_replies

CHECKPOINT = "srrl_jax/tinyworld/checkpoint"


def graded_row(i: int, met: bool | None) -> dict:
    messages, response, criterion, _ = grader_pairs()[i]
    return {
        "prompt": list(messages),
        "prompt_id": f"p{i}",
        "rubrics": [{"criterion": criterion.criterion, "points": abs(criterion.points)}],
        "completion": f"<think>hm</think>{response}",
        "verdicts": [{"criterion": criterion.criterion, "met": met}],
    }


@pytest.fixture
def graded(tmp_path):
    """Writes rows as `srrl grade` does: (rows) -> path; by default eight with the oracle's verdicts."""

    def write(rows=None):
        if rows is None:
            truths = [oracle(response, c.criterion) for _, response, c, _ in grader_pairs()[:8]]
            rows = [graded_row(i, truth) for i, truth in enumerate(truths)]
        path = tmp_path / "graded.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    return write


def lessons_of(config, path):
    grader = Grader.at(config.grading, load_tokenizer(CHECKPOINT))
    return load_lessons(path, grader, config, first_row=400, positions=512), grader


def test_a_lesson_asks_what_the_grader_is_asked(recipe, graded, tmp_path):
    path = graded([graded_row(0, True), graded_row(1, None), graded_row(2, False)])
    lessons, grader = lessons_of(recipe(tmp_path), path)
    assert [(lesson.met, lesson.row) for lesson in lessons] == [(True, 400), (False, 401)]
    messages, response, criterion, _ = grader_pairs()[2]
    text = lessons[1].example.prompt[0]["content"]
    assert response in text and criterion.criterion in text and "hm" not in text.split()
    asked = GradingItem(messages, response, [Criterion(criterion.criterion, abs(criterion.points))])
    prefix, (branch,) = grader.encode(asked)
    assert lessons[1].prompt == prefix + branch


def test_a_share_of_all_prompts_are_lessons(recipe, graded, tmp_path):
    config = recipe(tmp_path, f"data.teacher={graded()}", "data.teacher_share=0.15", "prompts_per_step=4")
    lessons, _ = lessons_of(config, config.data.teacher)
    steps = [with_lessons("abcd", lessons, config, step) for step in range(40)]
    assert all(len(tasks) == 4 for tasks in steps)
    given = [[task for task in tasks if not isinstance(task, str)] for tasks in steps]
    assert sum(map(len, given)) == math.floor(0.15 * 160)
    assert {len(tasks) for tasks in given} == {0, 1}
    assert set(Counter(task.row for tasks in given for task in tasks).values()) == {3}  # epochs of eight
    assert with_lessons("abcd", lessons, config, 17) == steps[17]


@pytest.mark.parametrize("forced", [False, True])
def test_the_teachers_reply_takes_the_place_of_the_last_completion(recipe, graded, tmp_path, forced):
    rows = [graded_row(0, True), graded_row(1, False)]
    for row in rows:
        row["verdicts"][0]["explanation"] = "so ."
    config = recipe(tmp_path, f"grading.verdict={'constrained' if forced else 'generate'}")
    lessons, grader = lessons_of(config, graded(rows))
    for lesson in lessons:
        *reply, stop = lesson.reply
        said = grader.tokenizer.decode(reply)
        assert parse_verdict(lesson.opening + said) is lesson.met
        assert ('"so ."' in said) is not forced and stop == grader.tokenizer.stop_ids[0]

    own = Completion(np.array([7]), np.array([-1.0]), False)
    tasks, groups = [lessons[0]._replace(met=None), *lessons], [[own, own]] * 3
    scored = np.array([[True, True], [True, True], [False, False]])
    for how, counts in {
        "grpo": scored,
        "both": [[1, 1], [1, 1], [0, 1]],
        "sft": [[1, 1], [0, 1], [0, 1]],
    }.items():
        given, counted, taught = with_replies(tasks, groups, scored, how)
        np.testing.assert_array_equal(counted, counts)
        np.testing.assert_array_equal(taught, [[0, 0], *[[0, how != "grpo"]] * 2])
        last = [tuple(group[-1].tokens) for group in given]
        assert last == ([(7,)] * 3 if how == "grpo" else [(7,), *(lesson.reply for lesson in lessons)])
        assert all(group[0] is own for group in given)


def test_a_reply_over_the_limit_is_refused(recipe, graded, tmp_path):
    row = graded_row(0, True)
    row["verdicts"][0]["explanation"] = "word " * 80
    with pytest.raises(
        InputError, match=r"object 1: the teacher's reply takes .* over rollout\.max_new_tokens"
    ):
        lessons_of(recipe(tmp_path, "data.teacher_loss=sft"), graded([row]))


@pytest.mark.slow
@pytest.mark.parametrize("verdict", ["generate", "constrained"])
def test_the_policy_is_rewarded_for_the_teachers_verdict(recipe, graded, verdict, tmp_path):
    run = tmp_path / "run"
    teaching = (f"data.teacher={graded()}", "data.teacher_share=0.5")
    train(recipe(run, "steps=1", *teaching, f"grading.verdict={verdict}"))
    rows = read_jsonl(run / "samples.jsonl")
    taught = [row for row in rows if row["split"] == "lesson"]
    opening = lessons_of(recipe(tmp_path, f"grading.verdict={verdict}"), graded())[0][0].opening
    assert len(taught) == len(rows) / 2 == 2
    truth = {f"lesson:p{i}": oracle(r, c.criterion) for i, (_, r, c, _) in enumerate(grader_pairs()[:8])}
    for row in taught:
        said = parse_verdict(opening + row["completion"])
        assert row["reward"] == (said is truth[row["prompt_id"].rpartition(":")[0]])
    metrics = read_jsonl(run / "metrics.jsonl")
    for step in metrics:
        now = [row["reward"] for row in taught if row["step"] == step["step"]]
        own = [row["reward"] for row in rows if row["step"] == step["step"] and row["split"] == "train"]
        assert step["lessons/right"] == pytest.approx(sum(now) / len(now))
        assert step["reward/mean"] == pytest.approx(sum(own) / len(own))
    assert {row.verdict for row in replay(str(run), 1)[0]} == {"same"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda row: row.pop("verdicts"), "object 1: needs response .*`srrl grade` wrote"),
        (lambda row: row.pop("completion"), "object 1: needs response"),
        (lambda row: row.pop("prompt"), "object 1: .*prompt"),
        (lambda row: row["verdicts"].append({}), "object 1: 2 verdicts on 1 criteria"),
        (lambda row: row["verdicts"][0].update(met=None), "no verdict that could be read"),
        (
            lambda row: row.update(completion="word " * 600),
            r"takes \d+ tokens, over 448 \(rollout.max_prompt",
        ),
    ],
)
def test_a_bad_file_is_refused_by_object(recipe, graded, tmp_path, change, message):
    row = graded_row(0, True)
    change(row)
    with pytest.raises(InputError, match=message):
        lessons_of(recipe(tmp_path), graded([row]))


def test_a_share_needs_a_file(recipe, tmp_path):
    with pytest.raises(InputError, match=r"data\.teacher_share: needs data\.teacher"):
        recipe(tmp_path, "data.teacher_share=0.1")
    with pytest.raises(InputError, match=r"data\.teacher_share: Input should be less than 1"):
        recipe(tmp_path, "data.teacher_share=1", "data.teacher=x")
