"""What keys of the recipe change in whole runs, beside runs without them; see test_recipe_keys.py."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest

from srrl_jax.actor import Actor
from srrl_jax.run import train
from srrl_jax.sampling import Sampler
from srrl_jax.training import learner

from .conftest import WORLD

pytestmark = pytest.mark.slow


class Seen(NamedTuple):
    """What a run shows of itself; `rollouts` are the prompts and completions of each call of the sampler."""

    metrics: list[dict]
    samples: list[dict]
    params: list[np.ndarray]
    checkpoints: list[int]
    shapes: set
    batches: list[Any]
    rollouts: list[tuple[int, int]]
    run_dir: Path

    def first(self, split: str) -> list[dict]:
        """The samples of the first step that has some of this split."""
        rows = [row for row in self.samples if row["split"] == split]
        return [row for row in rows if row["step"] == rows[0]["step"]]

    def prompts(self, split: str) -> list[str]:
        return list(dict.fromkeys(row["prompt_id"] for row in self.first(split)))


# ---- keys of what surrounds a step: a run with other values of them all, beside one with none of these

EVAL = (f"data.eval={WORLD / 'hard.jsonl'}", "eval.rows=2")
# Nearly all groups without variance.
ALIKE = "reward.axis_weights={accuracy: 0, completeness: 0, instruction_following: 0}"

# Another value, what shows it, and what that is without and with it.
RUNS = {
    "steps": ("3", lambda seen: seen.metrics[-1]["step"], 2, 3),
    "seed": ("1", lambda seen: seen.prompts("train")[0], "easy-0162", "easy-0090"),
    "prompts_per_step": ("4", lambda seen: len(seen.prompts("train")), 2, 4),
    "group_size": ("3", lambda seen: len(seen.first("train")) / len(seen.prompts("train")), 2, 3),
    "reward.resample": ("1", lambda seen: any(0 < n < 4 and g == 3 for n, g in seen.rollouts), False, True),
    "checkpoint.every": ("1", lambda seen: 2 in seen.checkpoints[:-1], False, True),
    "checkpoint.keep": ("3", lambda seen: len(seen.checkpoints), 1, 3),
    "eval.every": ("1", lambda seen: sum("eval/self" in row for row in seen.metrics), 2, 4),
    "eval.rows": ("3", lambda seen: len(seen.prompts("eval")), 2, 3),
    "eval.samples": ("2", lambda seen: len(seen.first("eval")) / len(seen.prompts("eval")), 1, 2),
    "eval.controls": ("0", lambda seen: "grader/control_met_rate" in seen.metrics[0], True, False),
    "eval.frozen": ("false", lambda seen: "eval/frozen" in seen.metrics[0], True, False),
    "profile": ("[2]", lambda seen: len(list(seen.run_dir.glob("profile/**/*.xplane.pb"))), 0, 1),
}


# ---- keys with a run of their own: functions of the run without and the run with the other value


def grades_only(one: Seen, other: Seen) -> bool:
    """The first step's verdicts or tries, of the very same completions."""
    assert [s["completion"] for s in one.samples[:4]] == [s["completion"] for s in other.samples[:4]]
    return one.samples[:4] != other.samples[:4]


def same_step(one: Seen, other: Seen) -> None:
    """The first step agrees to rounding (later ones may drift: Adam amplifies rounding)."""
    assert one.samples[:4] == other.samples[:4]
    a, b = ({k: v for k, v in seen.metrics[0].items() if k != "logprob_diff/max"} for seen in (one, other))
    assert a == pytest.approx(b, rel=1e-3, abs=1e-5)


def shapes(one: Seen, other: Seen) -> bool:
    """What is sampled at one time, and nothing else."""
    same_step(one, other)
    return one.shapes != other.shapes


def update_shapes(one: Seen, other: Seen) -> bool:
    same_step(one, other)
    return [b.mask.shape for b in one.batches] != [b.mask.shape for b in other.batches]


def fewer_alike(one: Seen, other: Seen) -> bool:
    """Groups without variance, over the run; where a first group had variance, it was kept."""
    share = [sum(m["reward/zero_std_groups"] for m in seen.metrics) for seen in (one, other)]
    return share[1] < share[0]


def only_compute(one: Seen, other: Seen) -> bool:
    """The loss, while the weights stay float32."""
    assert {x.dtype for seen in (one, other) for x in seen.params} == {np.dtype("float32")}
    return [m["loss"] for m in one.metrics] != [m["loss"] for m in other.metrics]


def gap(one: Seen, other: Seen) -> bool:
    """Between sampler and trainer at each step's first update: more than rounding, and not much."""
    wide = [max(m["logprob_diff/mean"] for m in seen.metrics) for seen in (one, other)]
    return wide[0] < 1e-6 and 1e-5 < wide[1] < 0.01


def graded_in_8_bits(one: Seen, other: Seen) -> bool:
    """Other verdicts, and their gap is measured in each step: the mean over the samples that name one."""
    for metrics in other.metrics:
        found = [c["logprob_diff"] for s in other.samples for c in s["criteria"]
                 if s["step"] == metrics["step"] and "logprob_diff" in c]  # fmt: skip
        assert len(found) == 2  # of the responses that are prefilled together
        assert metrics["grader/logprob_diff/mean"] == pytest.approx(np.mean([gap["mean"] for gap in found]))
        assert metrics["grader/logprob_diff/max"] == max(gap["max"] for gap in found) > 1e-5
    assert not any(name.startswith("grader/logprob_diff") for m in one.metrics for name in m)
    return grades_only(one, other)


def best_kept(one: Seen, other: Seen) -> bool:
    """The checkpoint with the highest reward and the newest, which without the key is alone."""
    rewards = [row["reward/mean"] for row in other.metrics]
    best = 1 + int(np.argmax(rewards))
    assert one.checkpoints == [4] and best < 4, rewards
    return other.checkpoints == [best, 4]


class Key(NamedTuple):
    """Another value, what it must change, and what is set beside it in both runs."""

    value: str
    changes: Callable[[Seen, Seen], bool]
    given: tuple[str, ...] = ()


HOT = ("grading.sampling.temperature=3.0",)  # where 8 bits change verdicts
BEST = ("checkpoint.every=1", "checkpoint.keep=1", "steps=4", "seed=2")  # the best is not the last

KEYS = {
    "dtype": Key("bfloat16", only_compute),
    "rollout.memory_gb": Key("0.0012", shapes),
    "rollout.int8": Key("weights_kv", gap),
    "grading.memory_gb": Key("0.008", shapes),
    "grading.verdict": Key("logits", grades_only),
    "grading.int8": Key("weights_kv", graded_in_8_bits, HOT),
    "reward.resample": Key("2", fewer_alike, (ALIKE, "prompts_per_step=4")),
    "optimizer.microbatch": Key("2", update_shapes, ("optimizer.minibatches=1",)),
    "checkpoint.best": Key("reward/mean", best_kept, BEST),
}


@pytest.fixture(scope="module")
def run(recipe, logs, tmp_path_factory):
    """Runs the recipe with overrides, each set of them once."""
    done: dict[tuple[str, ...], Seen] = {}

    def once(*overrides: str) -> Seen:
        if overrides in done:
            return done[overrides]
        run_dir = tmp_path_factory.mktemp("run")
        shapes, batches, rollouts = set(), [], []
        answer, sample, split = Actor.answer, Sampler.generate, learner.split_batch

        def spy_answer(self, params, prompts, samples, *rest):
            rollouts.append((len(prompts), samples))
            return answer(self, params, prompts, samples, *rest)

        def spy_sample(self, *args, **kwargs):
            shapes.add(self.shapes)
            return sample(self, *args, **kwargs)

        def spy_split(*args):
            batches.extend(split(*args))
            return split(*args)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Actor, "answer", spy_answer)
            patch.setattr(Sampler, "generate", spy_sample)
            patch.setattr(learner, "split_batch", spy_split)
            state = train(recipe(run_dir, *overrides))
        steps = sorted(int(p.name) for p in (run_dir / "checkpoints").iterdir() if p.name.isdigit())
        params = [np.asarray(leaf) for leaf in jax.tree.leaves(state.params)]
        done[overrides] = Seen(*logs(run_dir), params, steps, shapes, batches, rollouts, run_dir)
        return done[overrides]

    return once


@pytest.mark.parametrize("key", RUNS)
def test_a_key_changes_what_a_run_shows(key, run):
    _, shows, without, having = RUNS[key]
    others = [f"{name}={value}" for name, (value, *_) in RUNS.items()]
    assert (shows(run(*EVAL)), shows(run(*EVAL, *others, ALIKE))) == (without, having)


@pytest.mark.parametrize("key", KEYS)
def test_a_key_changes_what_it_should(key, run):
    value, changes, given = KEYS[key]
    assert changes(run(*given), run(*given, f"{key}={value}"))
