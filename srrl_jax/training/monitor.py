"""Reward hacking, seen while it happens: held-out answers under the eyes of several judges.

The live policy is both pupil and judge, so its score can rise because its answers got better or because
its judgement got laxer. A frozen copy at the starting weights has the same skill and cannot drift; a
teacher has another skill. Where the live score leaves theirs behind, the judge has moved.

Controls need no other judge: criteria are also graded on answers that cannot meet them. Only those with
positive points are, since an empty answer may well meet one about what it lacks.
"""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext

import numpy as np

from srrl_jax.grading import GradingItem, Teacher, Verdict
from srrl_jax.rubrics import Criterion, score_response
from srrl_jax.training.config import EvalConfig, TrainConfig
from srrl_jax.training.experience import Graded, Task

JUDGES = ("frozen", "teacher", "own")  # beside the live policy
_CAUSES = {
    "frozen": "Likely cause: its judgement has drifted, so that it pleases its own grader; kl_coef, "
    "grader=frozen or a lower optimizer.learning_rate hold it",
    "teacher": "Likely cause: it grades worse than the teacher, and its answers make use of that; "
    "data.teacher and grader=teacher help",
}
_SEEN = 4  # verdicts on a criterion, at least, before it can be called saturated
_ALMOST = 0.05


def other_judges(config: TrainConfig) -> list[str]:
    """Who grades held-out answers beside the policy: of "frozen", "teacher", "own" those of the recipe."""
    extra = {
        "frozen": config.eval.frozen,
        "teacher": config.teacher is not None,
        "own": config.judge == "own",
    }
    return [name for name, given in extra.items() if given]


def open_teacher(config: TrainConfig) -> AbstractContextManager[Teacher | None]:
    """The recipe's teacher, if it has one. Raises InputError: see `Teacher`."""
    return Teacher(config.teacher) if config.teacher else nullcontext()


def eval_metrics(rows: Sequence[Mapping]) -> dict[str, float]:
    """Scores of held-out answers, and how far their judges agree, from the rows that `sample_rows` makes.

    Returns:
      eval/JUDGE, the mean score by "self", which is the live policy, and by each other judge;
      grader/agreement_JUDGE, of each other judge: the share of its verdicts that the policy's equal; one that
      the policy leaves unreadable does not. By the live policy: eval/unscorable, the share of criteria whose
      verdict could not be read; eval/met_rate_negative; eval/saturated_met and eval/saturated_unmet, the
      shares of criteria (by their text, with at least 4 verdicts) that (almost) all or none of the answers
      meet. eval/mean_length in tokens. NaN for what has no values.
    """
    judged = [criterion for row in rows for criterion in row["criteria"]]
    others = [name for name in JUDGES if name in judged[0]]
    metrics = {"eval/self": _mean_score(rows, "verdict")}
    for name in others:
        metrics[f"eval/{name}"] = _mean_score(rows, name)
        metrics[f"grader/agreement_{name}"] = _mean(
            [c["verdict"] == c[name] for c in judged if c[name] is not None]
        )
    by_criterion, negative = defaultdict(list), []
    for criterion in (c for c in judged if c["verdict"] is not None):
        by_criterion[criterion["criterion"]].append(criterion["verdict"])
        if criterion["points"] < 0:
            negative.append(criterion["verdict"])
    shares = [np.mean(met) for met in by_criterion.values() if len(met) >= _SEEN]
    return metrics | {
        "eval/unscorable": _mean([c["verdict"] is None for c in judged]),
        "eval/met_rate_negative": _mean(negative),
        "eval/saturated_met": _mean([share >= 1 - _ALMOST for share in shares]),
        "eval/saturated_unmet": _mean([share <= _ALMOST for share in shares]),
        "eval/mean_length": _mean([row["tokens"] for row in rows]),
    }


def control_items(tasks: Sequence[Task], graded: Sequence[Sequence[Graded]], rows: int) -> list[GradingItem]:
    """The positive criteria of the first `rows` tasks, on the empty answer, then on the next task's."""
    rubrics = [[c for c in task.example.rubrics if c.points > 0] for task in tasks[:rows]]
    following = [graded[(i + 1) % len(tasks)][0].response for i in range(len(rubrics))]
    return [
        GradingItem(task.example.prompt, answer, criteria)
        for answers in ([""] * len(rubrics), following)
        for task, answer, criteria in zip(tasks[:rows], answers, rubrics, strict=True)
    ]


def control_metrics(verdicts: Sequence[Sequence[Verdict]]) -> dict[str, float]:
    """Shares "met" of the readable verdicts on `control_items`.

    grader/control_met_rate is that on empty answers, where an honest grader has 0;
    grader/control_met_rate_other that on answers to another prompt, which may meet general criteria.
    """
    half = len(verdicts) // 2
    names = {"": verdicts[:half], "_other": verdicts[half:]}
    return {
        f"grader/control_met_rate{name}": _mean([v.met for row in rows for v in row if v.met is not None])
        for name, rows in names.items()
        if rows
    }


def divergence_warnings(metrics: Mapping[str, float], config: EvalConfig) -> list[str]:
    """A warning for each judge whose score and the live policy's are further apart than `config.margin`.

    And one where the frozen start agrees with fewer verdicts than `config.agreement`: what one finds too
    good and what it finds too bad may cancel in the scores.
    And one where more criteria than `config.control_met` are met by an empty answer.
    """
    live, messages = metrics.get("eval/self", math.nan), []
    agreed, lost = metrics.get("grader/agreement_frozen", math.nan), metrics.get("eval/unscorable", 0)
    if agreed < config.agreement:
        messages.append(
            f"the policy and its frozen start agree on {agreed:.3f} of the verdicts on held-out answers: "
            f"fewer than eval.agreement ({config.agreement:g}); {lost:.3f} of the policy's "
            f"could not be read. {_CAUSES['frozen']}; read the eval samples"
        )
    controlled = metrics.get("grader/control_met_rate", math.nan)
    if controlled > config.control_met:
        messages.append(
            f"the policy grades {controlled:.3f} of the criteria as met by an empty answer: more than "
            f"eval.control_met ({config.control_met:g}). Likely cause: it says met to whatever it is asked; "
            "another grading.template, lessons (data.teacher) or a larger model help"
        )
    for name, who in (("frozen", "its frozen start"), ("teacher", "the teacher")):
        score = metrics.get(f"eval/{name}", math.nan)
        if abs(live - score) > config.margin:
            messages.append(
                f"the policy gives its held-out answers {live:.3f}, {who} gives them {score:.3f}: "
                f"further apart than eval.margin ({config.margin:g}). {_CAUSES[name]}; read the eval samples"
            )
    return messages


def _mean_score(rows: Sequence[Mapping], judge: str) -> float:
    scores = [
        score_response(
            [Criterion(c["criterion"], c["points"]) for c in row["criteria"]],
            [c[judge] for c in row["criteria"]],
        )
        for row in rows
    ]
    return _mean([score for score in scores if score is not None])


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if len(values) else float("nan")
