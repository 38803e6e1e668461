"""What keys of the recipe change in whole runs, each beside a run without it; see test_recipe_keys.py."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest

from srrl_jax.sampling import Sampler
from srrl_jax.training import learner, train

pytestmark = pytest.mark.slow
WORLD = Path(__file__).resolve().parents[2] / "srrl_jax" / "tinyworld"

# The second step has an update off its policy (two minibatches) and away from the reference.
BASE = (
    "kl_coef=0.1",
    "optimizer.minibatches=2",
    "optimizer.learning_rate=0.001",
    "optimizer.weight_decay=0.1",
    "optimizer.grad_clip=0.5",
)
EVAL = (f"data.eval={WORLD / 'hard.jsonl'}", "eval.rows=2")


class Seen(NamedTuple):
    """What a run shows of itself."""

    metrics: list[dict]
    samples: list[dict]
    params: list[np.ndarray]
    checkpoints: list[int]
    shapes: set
    batches: list[Any]
    run_dir: Path


# ---- what a key may change: functions of the run without and the run with the other value


def results(one: Seen, other: Seen) -> bool:
    """What was sampled, graded or learnt."""
    return (one.samples, one.metrics) != (other.samples, other.metrics)


def samples(one: Seen, other: Seen) -> bool:
    return one.samples[:4] != other.samples[:4]


def grades_only(one: Seen, other: Seen) -> bool:
    """The first step's verdicts or tries, of the very same completions."""
    assert [s["completion"] for s in one.samples[:4]] == [s["completion"] for s in other.samples[:4]]
    return one.samples[:4] != other.samples[:4]


def learning(one: Seen, other: Seen) -> bool:
    """The weights at the end, from the same experience in the first step."""
    assert [s["completion"] for s in one.samples[:4]] == [s["completion"] for s in other.samples[:4]]
    return any((a != b).any() for a, b in zip(one.params, other.params, strict=True))


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


def clipping(name: str) -> Callable[[Seen, Seen], bool]:
    return lambda one, other: other.metrics[1][name] > one.metrics[1][name]


def fewer_alike(one: Seen, other: Seen) -> bool:
    """Groups without variance, over the run; where a first group had variance, it was kept."""
    share = [sum(m["reward/zero_std_groups"] for m in seen.metrics) for seen in (one, other)]
    return share[1] < share[0]


def only_compute(one: Seen, other: Seen) -> bool:
    """The loss, while the weights stay float32."""
    assert {x.dtype for seen in (one, other) for x in seen.params} == {np.dtype("float32")}
    return metric("loss")(one, other)


def metric(name: str) -> Callable[[Seen, Seen], bool]:
    return lambda one, other: [m[name] for m in one.metrics] != [m[name] for m in other.metrics]


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


def kept(*steps: int) -> Callable[[Seen, Seen], bool]:
    def check(one, other):
        same_step(one, other)
        return other.checkpoints == list(steps) != one.checkpoints

    return check


def traced(one: Seen, other: Seen) -> bool:
    """A trace of one step of the two, and the same numbers."""
    assert one.metrics == other.metrics
    sessions = list((other.run_dir / "profile" / "plugins" / "profile").iterdir())
    traces = [file for file in sessions[0].iterdir() if file.name.endswith(".xplane.pb")]
    return not (one.run_dir / "profile").exists() and len(sessions) == len(traces) == 1


def best_kept(one: Seen, other: Seen) -> bool:
    """The checkpoint with the highest reward and the newest, which without the key is alone."""
    rewards = [row["reward/mean"] for row in other.metrics]
    best = 1 + int(np.argmax(rewards))
    assert one.checkpoints == [4] and best < 4, rewards
    return other.checkpoints == [best, 4]


def eval_lines(steps: list[int], rows: int) -> Callable[[Seen, Seen], bool]:
    """At which steps held-out rows are graded, and how many of their samples a time."""

    def check(one, other):
        at = [
            [(m["step"], sum(s["split"] == "eval" and s["step"] == m["step"] for s in seen.samples))
             for m in seen.metrics if "eval/self" in m]
            for seen in (one, other)
        ]  # fmt: skip
        return at[1] == [(step, rows) for step in steps] != at[0]

    return check


def judged_by_frozen(one: Seen, other: Seen) -> bool:
    named = [{name for row in seen.metrics for name in row if "frozen" in name} for seen in (one, other)]
    return named == [{"eval/frozen", "grader/agreement_frozen"}, set()]


def lines(count: int) -> Callable[[Seen, Seen], bool]:
    return lambda one, other: len(other.metrics) == count != len(one.metrics)


def per_step(prompts: int, group: int) -> Callable[[Seen, Seen], bool]:
    def check(one, other):
        step = [s for s in other.samples if s["step"] == 1]
        return len({s["prompt_id"] for s in step}) == prompts and len(step) == prompts * group

    return check


class Key(NamedTuple):
    """Another value, what it must change, and what is set beside it in both runs."""

    value: str
    changes: Callable[[Seen, Seen], bool]
    given: tuple[str, ...] = ()


HOT = ("grading.sampling.temperature=3.0",)  # where truncation matters
FAST = ("optimizer.learning_rate=0.002", "group_size=8")  # ratios far from 1
CUT = ("rollout.max_new_tokens=20",)  # too short for some answers
KIND_ONLY = ("reward.axis_weights={{accuracy: 0, completeness: 0, instruction_following: 0}}",)
BEST = ("checkpoint.every=1", "checkpoint.keep=1", "steps=4", "seed=2")  # the best is not the last
SHORT = ("grading.max_new_tokens=3",)  # too short for any verdict

KEYS = {
    "model": Key("{random}", samples),
    "data.train": Key(f"{WORLD / 'hard.jsonl'}", samples),
    "data.eval": Key(f"{WORLD / 'hard.jsonl'}", eval_lines([0, 2], 2), ("eval.rows=2",)),
    "data.minus": Key("{rest}", samples),
    "data.where": Key('["theme:3_facts"]', samples),
    "steps": Key("1", lines(1)),
    "seed": Key("1", samples),
    "prompts_per_step": Key("4", per_step(4, 2)),
    "group_size": Key("3", per_step(2, 3)),
    "grader": Key("frozen", results, ("optimizer.learning_rate=0.01",)),
    "kl_coef": Key("0.5", learning),
    "dtype": Key("bfloat16", only_compute),
    "rollout.max_new_tokens": Key("12", samples),
    "rollout.max_prompt_tokens": Key("20", samples, ("data.too_long=drop",)),
    "rollout.memory_gb": Key("0.0012", shapes),
    "rollout.thinking": Key("true", samples, ("model={thinking}",)),
    "rollout.int8": Key("weights_kv", gap),
    "rollout.sampling.temperature": Key("0.5", samples),
    "grading.max_new_tokens": Key("3", grades_only),
    "grading.template": Key("{template}", grades_only),
    "grading.memory_gb": Key("0.008", shapes),
    "grading.verdict": Key("logits", grades_only),
    "grading.votes": Key("3", grades_only),
    "grading.together": Key("true", grades_only, ("steps=1",)),
    "grading.tries": Key("1", grades_only, SHORT),
    "grading.thinking": Key("true", grades_only, ("model={thinking}",)),
    "grading.int8": Key("weights_kv", graded_in_8_bits, HOT),
    "grading.sampling.temperature": Key("3.0", grades_only),
    "grading.sampling.top_k": Key("2", grades_only, HOT),
    "grading.sampling.top_p": Key("0.5", grades_only, HOT),
    "grading.sampling.min_p": Key("0.5", grades_only, HOT),
    "loss.clip_low": Key("0.0001", clipping("clip_frac/low")),
    "loss.clip_high": Key("0.0001", clipping("clip_frac/high")),
    "reward.criteria": Key("positive", learning),
    "reward.soft": Key("true", learning, ("grading.verdict=logits",)),
    "reward.drop_unvarying": Key("true", learning, ("loss.advantage=mean",)),
    "reward.axis_weights": Key("{{completeness: 0.1}}", learning),
    "reward.overlong": Key("mask", learning, CUT),
    "reward.overlong_buffer": Key("60", learning),
    "reward.zero_variance": Key("drop", learning, (*KIND_ONLY, "prompts_per_step=4")),
    "reward.resample": Key("2", fewer_alike, (*KIND_ONLY, "prompts_per_step=4")),
    "loss.advantage": Key("mean", learning),
    "loss.ratio": Key("sequence", learning),
    "loss.aggregate": Key("sequence", learning),
    "loss.dual_clip": Key("1.2801", clipping("clip_frac/dual"), FAST),
    "loss.entropy_coef": Key("0.1", learning),
    "loss.importance_cap": Key("0.9", learning),
    "loss.kl_estimator": Key("k2", metric("kl")),
    "optimizer.learning_rate": Key("0.002", learning),
    # The first batch of a run is one of shapes, to compile by.
    "optimizer.minibatches": Key("1", lambda one, other: len(one.batches[1:]) == 2 * len(other.batches[1:])),
    "optimizer.microbatch": Key("2", update_shapes, ("optimizer.minibatches=1",)),
    "checkpoint.every": Key("1", kept(1, 2)),
    "checkpoint.keep": Key("1", kept(2), ("checkpoint.every=1",)),
    "checkpoint.best": Key("reward/mean", best_kept, BEST),
    "profile": Key("[2]", traced),
    "eval.every": Key("1", eval_lines([0, 1, 2], 2), EVAL),
    "eval.rows": Key("3", eval_lines([0, 2], 3), EVAL),
    "eval.samples": Key("2", eval_lines([0, 2], 4), EVAL),
    "eval.frozen": Key("false", judged_by_frozen, EVAL),
}  # fmt: skip


@pytest.fixture(scope="module")
def run(recipe, logs, places, tmp_path_factory):
    """Runs BASE with overrides, each set of them once."""
    done: dict[tuple[str, ...], Seen] = {}

    def once(*overrides: str) -> Seen:
        if overrides in done:
            return done[overrides]
        run_dir = tmp_path_factory.mktemp("run")
        shapes, batches = set(), []
        sample, split = Sampler.generate, learner.split_batch

        def spy_sample(self, *args, **kwargs):
            shapes.add(self.shapes)
            return sample(self, *args, **kwargs)

        def spy_split(*args):
            batches.extend(split(*args))
            return split(*args)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Sampler, "generate", spy_sample)
            patch.setattr(learner, "split_batch", spy_split)
            state = train(recipe(run_dir, *BASE, *overrides))
        steps = sorted(int(p.name) for p in (run_dir / "checkpoints").iterdir() if p.name.isdigit())
        params = [np.asarray(leaf) for leaf in jax.tree.leaves(state.params)]
        done[overrides] = Seen(*logs(run_dir), params, steps, shapes, batches, run_dir)
        return done[overrides]

    return once


@pytest.mark.parametrize("key", KEYS)
def test_a_key_changes_what_it_should(key, run, places):
    value, changes, given = KEYS[key]

    def fill(override: str, tokens: str) -> str:
        return override.format(**places, max_new_tokens=tokens)

    one = run(*[fill(override, "64") for override in given])
    other = run(*[fill(override, value) for override in given], fill(f"{key}={value}", value))
    assert changes(one, other)
