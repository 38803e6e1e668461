"""Every key of the recipe is read and changes something: a table of all keys, each where it is used.

What surrounds a step is tried in whole runs in test_recipe_runs.py, which is slow.
"""

import dataclasses
import re
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from srrl_jax.checkpoints.tokenizer import load_tokenizer
from srrl_jax.errors import InputError
from srrl_jax.grading import GradingItem, Verdict
from srrl_jax.parallel import computing, make_mesh
from srrl_jax.rubrics import Criterion, Example
from srrl_jax.run import train
from srrl_jax.sampling import Completion
from srrl_jax.telemetry import read_jsonl
from srrl_jax.training import TrainConfig, learner
from srrl_jax.training.experience import Graded, Task, make_actor
from srrl_jax.training.learner import Learner
from srrl_jax.training.rewards import compute_advantages, training_rewards
from srrl_jax.training.tasks import load_tasks
from srrl_jax.training.update import make_optimizer, make_update

from .conftest import FOUR, WORLD
from .test_recipe_runs import RUNS

PLAIN = (str, int, float, tuple)


# ---- what becomes of a recipe: what is compared with and without another value of a key


def rows(config: TrainConfig) -> Any:
    """Training rows, lessons and held-out rows, made ready, or why they are refused."""
    try:
        return load_tasks(config, load_tokenizer(config.model))
    except InputError as error:
        return str(error)


def roles(config: TrainConfig) -> Any:
    """How the policy is sampled from, as what answers and as what grades, and how it is asked to grade."""
    mesh, tokenizer = make_mesh(config.mesh), load_tokenizer(config.model)
    lengths = load_tasks(config, tokenizer).lengths(config)
    with jax.set_mesh(mesh):
        made = make_actor(learner.build_model(config), tokenizer, config, mesh, lengths)
    item = GradingItem(
        ({"role": "user", "content": "hello"},), "bye", (Criterion("kind", 1), Criterion("so", -1))
    )
    asked = made.grader.encode(item)
    return repr(asked), *(settings(part) for part in (made.sampler, made.grader, made.grader.sampler))


def settings(part: Any) -> dict[str, str]:
    """The plain values that an object keeps."""
    plain = {name: value for name, value in vars(part).items() if name != "config"}
    return {n: repr(v) for n, v in plain.items() if dataclasses.is_dataclass(v) or isinstance(v, PLAIN)}


GROUP = (  # of three completions, one cut off: tokens, verdicts
    (10, (True, True, False)),
    (20, (False, True, False)),
    (64, (True, True, True)),
)
TASK = Task(
    Example(
        ({"role": "user", "content": "?"},),
        (
            Criterion("right", 6, ("axis:accuracy",)),
            Criterion("kind", 4, ("axis:communication_quality",)),
            Criterion("sells", -5, ("axis:accuracy",)),
        ),
        "id",
    ),
    [5, 6, 7],
    "",
    0,
)


def experience() -> tuple[list[Task], list[list[Completion]], list[list[Graded]]]:
    """Four groups, the first without variance."""
    groups = [
        [Completion(np.full(n, 5, np.int32), np.full(n, -1.0, np.float32), n == 64) for n, _ in GROUP]
    ] * 4
    graded = [[Graded("", "", [Verdict(m, "", 1, 1, 0.3 + m / 2) for m in met], None) for _, met in group]
              for group in [GROUP[:1] * 3, *[GROUP] * 3]]  # fmt: skip
    return [TASK] * 4, groups, graded


def rewards(config: TrainConfig) -> Any:
    """Advantages, and which completions count."""
    tasks, groups, graded = experience()
    given = training_rewards(tasks, groups, graded, config.reward, config.rollout.max_new_tokens)
    return [x.tolist() for x in compute_advantages(given, config.loss, config.reward)]


def made(config: TrainConfig) -> tuple[Learner, list]:
    """A learner, and the minibatches of a step."""
    tasks, groups, _ = experience()
    groups = [group[:2] for group in groups]  # of at most 20 tokens
    with jax.set_mesh(mesh := make_mesh(config.mesh)):
        one = Learner(learner.build_model(config), config, mesh, longest_prompt=36)
        return one, one.minibatches(tasks, groups, np.ones((4, 2), bool), np.ones((4, 2), np.float32))


def weights(config: TrainConfig) -> Any:
    """What is learnt, before the first step."""
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(made(config)[0].init_state().params)]


def batches(config: TrainConfig) -> Any:
    """The shapes of a step's minibatches."""
    return [part.mask.shape for part in made(config)[1]]


def update(config: TrainConfig) -> str:
    """The traced program of an update; the weights that it takes are float32."""
    one, (part, *_) = made(config)
    state, graphdef = one.init_state(), nnx.graphdef(learner.build_model(config))
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {jnp.dtype("float32")}
    program = make_update(graphdef, config, make_optimizer(config.optimizer), one.shapes.remat)
    with computing(make_mesh(config.mesh), config.dtype, config.matmul_precision):
        return re.sub("0x[0-9a-f]+", "", str(jax.make_jaxpr(program)(*state, part)))


def where(config: TrainConfig) -> Any:
    """In which memory what is learnt lies between updates."""
    return [leaf.sharding.memory_kind for leaf in jax.tree.leaves(made(config)[0].init_state())]


def optimized(config: TrainConfig) -> list[float]:
    """Two weights after three steps of the optimizer."""
    optimizer, w = make_optimizer(config.optimizer), jnp.array([1.0, -2.0])
    state = optimizer.init(w)
    for gradient in ([0.3, 0.4], [-3.0, 4.0], [0.5, 0.1]):
        updates, state = optimizer.update(jnp.array(gradient), state, w)
        w = w + updates
    return w.tolist()


class Key(NamedTuple):
    """Another value, what it must change, and what is set beside it in both."""

    value: str
    changes: Callable[[TrainConfig], Any]
    given: tuple[str, ...] = ()


LOGITS = ("grading.verdict=logits",)

KEYS = {
    "model": Key("{random}", weights),
    "dtype": Key("bfloat16", update),
    "matmul_precision": Key("default", update),
    "data.train": Key(f"{WORLD / 'hard.jsonl'}", rows),
    "data.minus": Key("{rest}", rows),
    "data.where": Key('["theme:3_facts"]', rows),
    "data.fields": Key("{{prompt: question}}", rows, ("data.train={asked}",)),
    "rollout.thinking": Key("true", rows, ("model={thinking}",)),
    "data.too_long": Key("drop", rows, ("rollout.max_prompt_tokens=20",)),
    "rollout.max_new_tokens": Key("12", roles),
    "rollout.max_prompt_tokens": Key("20", rows, ("data.too_long=drop",)),
    "rollout.memory_gb": Key("0.003", roles),
    "rollout.int8": Key("weights_kv", roles),
    "rollout.sampling.temperature": Key("0.5", roles),
    "grading.max_new_tokens": Key("3", roles),
    "grading.template": Key("{template}", roles),
    "grading.memory_gb": Key("0.012", roles),
    "grading.verdict": Key("logits", roles),
    "grading.votes": Key("3", roles),
    "grading.together": Key("true", roles),
    "grading.calibrate": Key("controls", roles, LOGITS),
    "grading.tries": Key("1", roles),
    "grading.thinking": Key("true", roles, ("model={thinking}",)),
    "grading.int8": Key("weights_kv", roles),
    "grading.sampling.temperature": Key("3.0", roles),
    "grading.sampling.top_k": Key("2", roles),
    "grading.sampling.top_p": Key("0.5", roles),
    "grading.sampling.min_p": Key("0.5", roles),
    "reward.criteria": Key("positive", rewards),
    "reward.soft": Key("true", rewards),
    "reward.drop_unvarying": Key("true", rewards, ("loss.advantage=mean",)),
    "reward.reweight": Key("1", rewards),
    "reward.criteria_dropout": Key("0.6", rewards),
    "reward.axis_weights": Key("{{accuracy: 0.1}}", rewards),
    "reward.overlong": Key("mask", rewards),
    "reward.overlong_buffer": Key("60", rewards),
    "reward.zero_variance": Key("drop", rewards),
    "kl_coef": Key("0.5", update),
    "loss.advantage": Key("mean", rewards),
    "loss.ratio": Key("sequence", update),
    "loss.aggregate": Key("sequence", update),
    "loss.clip_low": Key("0.0001", update),
    "loss.clip_high": Key("0.0001", update),
    "loss.dual_clip": Key("1.5", update),
    "loss.kl_estimator": Key("k2", update),
    "loss.entropy_coef": Key("0.1", update),
    "loss.importance_cap": Key("0.9", update),
    "optimizer.learning_rate": Key("0.002", optimized),
    "optimizer.warmup_steps": Key("0", optimized),
    "optimizer.weight_decay": Key("0.5", optimized),
    "optimizer.beta1": Key("0.5", optimized),
    "optimizer.beta2": Key("0.9", optimized),
    "optimizer.grad_clip": Key("10", optimized),
    "optimizer.first_moment": Key("bfloat16", optimized),
    "optimizer.minibatches": Key("1", batches),
    "optimizer.microbatch": Key("2", batches),
    "optimizer.remat": Key("full", update),
    "optimizer.moments": Key("host", where),
}  # fmt: skip


# Keys with a test of their own, below or in the file that is named.
ELSEWHERE = {
    "run_dir", "data.eval", "reference", "attention",
    "rollout.sampling.top_k", "rollout.sampling.top_p", "rollout.sampling.min_p",
    "mesh.slice", "mesh.data", "mesh.fsdp", "mesh.tensor", "mesh.expert",
    "grader",  # test_experience.py
    "reward.function",  # test_own.py
    "teacher", "eval.margin", "eval.agreement", "eval.control_met", "eval.stop_on_warning",  # test_monitor.py
    "data.teacher", "data.teacher_share", "data.teacher_loss",  # test_lessons.py
    "lora.rank", "lora.alpha", "lora.targets",  # test_lora.py
    "optimizer.max_skipped",  # test_guards.py
    "checkpoint.best",  # test_checkpoint.py
    "checkpoint.preemption_seconds",  # test_preemption.py
    "checkpoint.accept_changes",  # test_run.py
    "loss.balance_experts",  # test_update.py
    "trackers",  # test_resume.py
}  # fmt: skip


def leaves(kind, path: str = "") -> set[str]:
    names = set()
    for field in dataclasses.fields(kind):
        nested = dataclasses.is_dataclass(field.type)
        names |= leaves(field.type, f"{path}{field.name}.") if nested else {path + field.name}
    return names


def test_the_table_has_every_key_of_the_recipe():
    assert sorted(leaves(TrainConfig)) == sorted([*KEYS, *RUNS, *ELSEWHERE])


@pytest.fixture(scope="module")
def becomes(recipe, places):
    """What becomes of the recipe with overrides, by one of the functions above; each once."""

    @cache
    def once(function: Callable[[TrainConfig], Any], *overrides: str) -> Any:
        return function(recipe("unused", "prompts_per_step=4", *overrides))

    return once


@pytest.mark.parametrize("key", KEYS)
def test_a_key_changes_what_it_should(key, becomes, places):
    value, changes, given = KEYS[key]

    def fill(override: str, tokens: str) -> str:
        return override.format(**places, max_new_tokens=tokens)

    one = becomes(changes, *[fill(override, "64") for override in given])
    other = becomes(changes, *[fill(override, value) for override in given], fill(f"{key}={value}", value))
    assert one != other


@pytest.mark.parametrize("function", [rows, roles, weights, rewards, batches, update, optimized])
def test_of_one_recipe_becomes_the_same(function, becomes, recipe):
    """Without this, a difference in the table above would tell nothing."""
    assert function(recipe("unused", "prompts_per_step=4")) == becomes(function)


def test_run_dir_is_where_everything_is_written(finished):
    run_dir, _ = finished
    names = {path.name for path in run_dir.iterdir()}
    assert {"config.yaml", "metrics.jsonl", "samples.jsonl", "checkpoints"} <= names
    first = read_jsonl(run_dir / "timings.jsonl")[0]
    assert 0 < first["time/compile"] and "perf/mfu" not in first  # a CPU has no published peak


@pytest.mark.parametrize("override", ["top_k=5", "top_p=0.9", "min_p=0.1"])
def test_truncated_sampling_of_rollouts_is_refused(recipe, tmp_path, override):
    """Log-probabilities are those of the whole distribution, so training could not use the samples."""
    with pytest.raises(InputError, match=r"rollout\.sampling"):
        recipe(tmp_path, f"rollout.sampling.{override}")


@pytest.mark.parametrize("axis", ["slice", "data", "fsdp", "tensor", "expert"])
def test_mesh_asks_for_devices(recipe, tmp_path, axis):
    sizes = dict.fromkeys(("slice", "data", "fsdp", "tensor", "expert"), 1) | {axis: 1024}
    with pytest.raises(InputError, match=rf"'{axis}': 1024.*but there are"):
        train(recipe(tmp_path, *[f"mesh.{name}={size}" for name, size in sizes.items()]))


@pytest.mark.parametrize(("kernel", "device"), [("splash", "TPU"), ("cudnn", "GPU")])
def test_attention_asks_for_its_device(recipe, tmp_path, kernel, device):
    """What the kernels compute is tested in tests/models/test_kernels.py."""
    with pytest.raises(InputError, match=rf"attention: {kernel} needs a {device}, and this is a cpu"):
        train(recipe(tmp_path, f"attention={kernel}"))


@pytest.mark.slow
def test_the_reference_may_lie_in_host_memory(recipe, finished, logs, tmp_path):
    """It grades there too, so it comes for both of its uses; nothing else changes."""
    train(recipe(tmp_path, *FOUR, "steps=2", "reference=host"))
    for there, here in zip(logs(tmp_path), logs(finished[0]), strict=True):
        assert there == [row for row in here if row["step"] <= 2] != []
    config = recipe("unused", "reference=host")
    with jax.set_mesh(mesh := make_mesh(config.mesh)):
        made = learner.Learner(learner.build_model(config), config, mesh, longest_prompt=36)
    stored, fetched = made._frozen, made.frozen
    for tree, kind in ((stored, "pinned_host"), (fetched, "device")):
        assert {leaf.sharding.memory_kind for leaf in jax.tree.leaves(tree)} == {kind}
    jax.tree.map(np.testing.assert_array_equal, stored, fetched)
    with pytest.raises(InputError, match="reference: with LoRA"):
        recipe("unused", "reference=host", "lora.rank=2")


@pytest.mark.parametrize(
    ("override", "says"),
    [
        (
            "rollout.max_prompt_tokens=20",
            r"^\d+ rows are too long, the worst first:\n  .*easy.jsonl: row \d+ \(easy-\d+\): the prompt "
            r"takes \d+ tokens, over 20\n(.*\n)*rollout.max_prompt_tokens=\d+ would take all of them; "
            r"or .* data.too_long=drop",
        ),
        ("rollout.max_new_tokens=500", r"over 512\n(.*\n)*the model has 512 positions: rollout"),
    ],
)
def test_rows_that_are_too_long_are_refused_all_at_once(recipe, tmp_path, override, says):
    with pytest.raises(InputError) as refused:
        train(recipe(tmp_path / "run", override))
    assert re.search(says, str(refused.value))
    assert not (tmp_path / "run").exists()
