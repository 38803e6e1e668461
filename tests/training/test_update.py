import contextlib
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from srrl_jax.errors import InputError
from srrl_jax.models import Qwen3, Qwen3Config, branch_logprobs
from srrl_jax.run import train
from srrl_jax.sampling import RowLengths, Sampler
from srrl_jax.training import loop
from srrl_jax.training.batch import pack_groups, split_batch
from srrl_jax.training.config import OptimizerConfig
from srrl_jax.training.shapes import UpdateShapes
from srrl_jax.training.update import completion_logprobs, make_optimizer, make_schedule, make_update

SGD = optax.sgd(1.0)  # whose step is the gradient
PROMPTS = [[3, 4, 5, 6], [7, 8], [9, 10, 11], [12]]


@pytest.fixture(scope="module")
def batch(tiny):
    """Four prompts with two sampled completions each, one of which has no reward."""
    _, params, model = tiny
    sampler = Sampler(model, [RowLengths(4, [0, 0])] * 4, new_tokens=8, stop_ids=(0, 1, 2))
    groups = sampler.generate(params, PROMPTS, [[[]] * 2] * 4, jax.random.key(0))
    scored = np.ones((4, 2), bool)
    scored[2, 1] = False
    advantages = np.array([[1.0, -1.0], [-0.5, 0.5], [0.7, 0.0], [-2.0, 2.0]], np.float32)
    return pack_groups(PROMPTS, groups, scored, UpdateShapes(4, (8,), 4))._replace(advantages=advantages)


@pytest.fixture(scope="module")
def learn(tiny, recipe):
    """One update: (batch, *overrides, microbatch, optimizer) -> its change of the weights, its metrics."""
    graphdef, params, _ = tiny
    updates = {}

    def one(batch, *overrides: str, microbatch: int = 4, optimizer=SGD):
        if (overrides, optimizer) not in updates:
            config = recipe("unused", "kl_coef=0", *overrides)
            updates[overrides, optimizer] = make_update(graphdef, config, optimizer, config.optimizer.remat)
        (part,) = split_batch(batch, 1, microbatch)
        copy = jax.tree.map(jnp.copy, params)
        state = optimizer.init(copy)
        new, _, metrics = updates[overrides, optimizer](copy, state, part)
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves((copy, state)))  # they were donated
        change = jax.tree.map(lambda a, b: np.asarray(a - b), new, params)
        return change, {name: float(value) for name, value in metrics.items()}

    return one


def assert_close(one, other, tolerance=1e-5):
    scale = max(float(np.abs(x).max()) for x in jax.tree.leaves(one))
    assert scale > 0
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * scale)


def test_four_microbatches_of_one_prompt_equal_one_of_four(batch, learn):
    whole, metrics = learn(batch, microbatch=4)
    parts, more = learn(batch, microbatch=1)
    assert_close(whole, parts)
    assert metrics == pytest.approx(more, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("remat", ["full", "dots"])
def test_remat_changes_no_gradient(batch, learn, remat):
    assert_close(learn(batch, "optimizer.remat=none")[0], learn(batch, f"optimizer.remat={remat}")[0])


def test_remat_keeps_what_its_name_says(batch, tiny):
    """Of a layer: everything, the results of its seven products with weights, or its input alone."""
    graphdef, params, _ = tiny
    tree = jax.tree.map(lambda x: x[0], split_batch(batch, 1, 4)[0].tree)
    kept = {}
    for remat in ("none", "full", "dots"):

        def backward(params, remat=remat):
            return jax.vjp(lambda p: branch_logprobs(nnx.merge(graphdef, p), tree, 1.0, remat)[0], params)[1]

        kept[remat] = sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(backward, params)))
    assert kept["full"] < kept["dots"] < kept["none"]


def test_the_update_uses_the_remat_of_the_recipe(batch, tiny, recipe):
    graphdef, params, _ = tiny
    (part,) = split_batch(batch, 1, 1)
    programs = set()
    for remat in ("none", "full", "dots"):
        update = make_update(graphdef, recipe("unused"), SGD, remat)
        lines = str(jax.make_jaxpr(update)(params, SGD.init(params), part)).splitlines()
        programs.add(
            (sum("prevent_cse" in line for line in lines), sum("dot_general" in line for line in lines))
        )
    assert len(programs) == 3


def test_gradients_are_summed_up_in_place(batch, recipe):
    """Not one for the prefixes, one for the branches, and their sum: that took 3.4 times the weights."""
    wide = Qwen3Config(
        vocab_size=64, hidden_size=256, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, tie_word_embeddings=True,
    )  # fmt: skip
    graphdef, params = nnx.split(Qwen3(wide, rngs=nnx.Rngs(0)))
    size = sum(x.nbytes for x in jax.tree.leaves(params))
    (part,) = split_batch(batch, 1, 1)
    update = make_update(graphdef, recipe("unused", "kl_coef=0"), SGD, "full")
    memory = update.lower(params, SGD.init(params), part).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 2 * size


def test_a_completion_without_a_reward_teaches_nothing(batch, learn):
    change, metrics = learn(batch)
    other = jax.tree.map(np.copy, batch)
    other.tree.branches[2, 1] = 33
    other.logprobs[2, 1] = -9.0
    other.advantages[2, 1] = 100.0
    other_change, other_metrics = learn(other)
    assert_close(change, other_change, tolerance=0)
    assert metrics == other_metrics

    counted = other._replace(mask=np.arange(8) < other.tree.branch_lengths[..., None])
    assert learn(counted)[1]["loss"] != metrics["loss"]


def test_what_is_taught_is_learnt_by_cross_entropy_whatever_its_advantage(batch, learn):
    taught = np.zeros((4, 2), bool)
    taught[1, 0] = True
    only = batch._replace(mask=batch.mask & taught[..., None], taught=taught)
    change, metrics = learn(only, "data.teacher_loss=sft", microbatch=1)
    np.testing.assert_allclose(metrics["loss"], -batch.logprobs[only.mask].mean(), rtol=1e-4)
    other = only._replace(advantages=np.zeros((4, 2), np.float32), old_logprobs=batch.logprobs - 3)
    assert_close(change, learn(other, "data.teacher_loss=sft", microbatch=1)[0], tolerance=0)
    assert metrics["logprob_diff/max"] == 0  # nothing of it was sampled


def test_padding_teaches_nothing(batch, learn):
    other = jax.tree.map(np.copy, batch)
    prefix_padding = np.arange(4) >= other.tree.prefix_lengths[:, None]
    branch_padding = np.arange(8) >= other.tree.branch_lengths[..., None]
    assert prefix_padding.any() and branch_padding.any()
    other.tree.prefix[prefix_padding] = 50
    other.tree.branches[branch_padding] = 51
    assert_close(learn(batch)[0], learn(other)[0], tolerance=1e-6)


def test_the_policy_that_samples_is_the_one_that_learns(batch, learn):
    assert learn(batch)[1]["logprob_diff/max"] < 1e-4


def test_kl_adds_its_coefficient_times_the_mean_to_the_loss(batch, learn, tiny):
    graphdef, params, _ = tiny
    shifted = jax.tree.map(lambda x: x * 1.3, params)
    (part,) = split_batch(batch, 1, 4)
    reference = np.asarray(completion_logprobs(graphdef, shifted, part, 1.0))
    with_reference = batch._replace(reference_logprobs=reference.reshape(batch.logprobs.shape))
    _, without = learn(with_reference)
    assert "kl" not in without
    kl = {}
    for estimator in ("k1", "k2", "k3"):
        _, metrics = learn(with_reference, "kl_coef=0.25", f"loss.kl_estimator={estimator}")
        assert metrics["kl"] != 0
        assert metrics["loss"] == pytest.approx(without["loss"] + 0.25 * metrics["kl"], abs=1e-6)
        kl[estimator] = metrics["kl"]
    assert kl["k2"] > 0 and kl["k3"] > 0 and len(set(kl.values())) == 3

    _, at_start = learn(batch._replace(reference_logprobs=batch.logprobs), "kl_coef=0.25")
    assert abs(at_start["kl"]) < 1e-6


def the_loss(recipe, logprobs, entropy, batch) -> float:
    """By NumPy in float64, from the formula at the head of the room's README."""
    c, mask = recipe.loss, np.asarray(batch.mask)
    logprobs, entropy, sampler, old, reference, advantages = (
        np.asarray(x, np.float64)
        for x in (logprobs, entropy, batch.logprobs, batch.old_logprobs, batch.reference_logprobs,
                  batch.advantages[..., None])
    )  # fmt: skip
    lengths = mask.sum(-1, keepdims=True)
    difference = logprobs - old
    if c.ratio == "sequence":
        difference = np.where(mask, difference, 0).sum(-1, keepdims=True) / np.maximum(lengths, 1)
    ratio = np.exp(difference)
    clipped = np.clip(ratio, 1 - c.clip_low, 1 + c.clip_high)
    term = -np.minimum(ratio * advantages, clipped * advantages)
    if c.dual_clip is not None:
        term = np.where(advantages < 0, np.minimum(term, -c.dual_clip * advantages), term)
    if c.importance_cap is not None:
        term = term * np.minimum(np.exp(old - sampler), c.importance_cap)
    d = reference - logprobs
    k = {"k1": -d, "k2": d**2 / 2, "k3": np.exp(d) - 1 - d}[c.kl_estimator]
    per_token = term + recipe.kl_coef * k - c.entropy_coef * entropy
    completions = (lengths > 0).sum()
    size = {
        "token": mask.sum(),
        "sequence": completions * np.maximum(lengths, 1),
        "constant": completions * recipe.rollout.max_new_tokens,
    }[c.aggregate]
    return np.where(mask, per_token / size, 0).sum()


@pytest.mark.parametrize(
    "overrides",
    [
        ("loss.kl_estimator=k3", "loss.entropy_coef=0.2", "loss.dual_clip=1.4", "loss.aggregate=sequence"),
        ("loss.kl_estimator=k1", "loss.importance_cap=1.1", "loss.ratio=sequence", "loss.aggregate=constant"),
        ("loss.kl_estimator=k2", "loss.importance_cap=0.8", "rollout.sampling.temperature=0.7"),
    ],
)
def test_the_loss_of_an_update_is_the_formula(batch, learn, tiny, recipe, overrides):
    """Off the policy, off the sampler and away from the reference, so that every part weighs."""
    graphdef, params, _ = tiny
    random = np.random.default_rng(0)
    off = [(batch.logprobs + 0.4 * random.standard_normal(batch.logprobs.shape)).astype(np.float32)
           for _ in range(3)]  # fmt: skip
    off = batch._replace(logprobs=off[0], old_logprobs=off[1], reference_logprobs=off[2])
    overrides = ("kl_coef=0.3", *overrides)
    config = recipe("unused", *overrides)
    logprobs, entropy = branch_logprobs(
        nnx.merge(graphdef, params), off.tree, config.rollout.sampling.temperature
    )
    _, metrics = learn(off, *overrides, microbatch=2)
    assert metrics["loss"] == pytest.approx(the_loss(config, logprobs, entropy, off), rel=1e-5)
    dull = dict(clip_low=0.9, clip_high=9.0, dual_clip=None, importance_cap=None, entropy_coef=0.0)
    dull = dataclasses.replace(config, loss=dataclasses.replace(config.loss, **dull))
    assert abs(metrics["loss"] - the_loss(dull, logprobs, entropy, off)) > 1e-3


def test_a_gradient_that_is_not_finite_is_skipped_though_the_loss_is(batch, learn):
    change, metrics = learn(batch._replace(advantages=np.float32(1e30) * batch.advantages))
    assert np.isfinite(metrics["loss"]) and not np.isfinite(metrics["grad_norm"])
    assert metrics["guard/skipped_updates"] == 1
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(change))


def test_the_first_update_moves_a_completion_the_way_of_its_advantage(batch, learn, tiny):
    """Through the recipe's own optimizer, without a warm-up; one completion at a time."""
    graphdef, params, _ = tiny
    optimizer = make_optimizer(OptimizerConfig(learning_rate=1e-4, warmup_steps=0, weight_decay=0.0))
    (part,) = split_batch(batch, 1, 4)
    before = completion_logprobs(graphdef, params, part, 1.0)
    for place in [(0, 0), (1, 1), (3, 0)]:
        for sign in (1.0, -1.0):
            advantages = np.zeros((4, 2), np.float32)
            advantages[place] = sign
            change, _ = learn(batch._replace(advantages=advantages), optimizer=optimizer)
            after = completion_logprobs(graphdef, jax.tree.map(jnp.add, params, change), part, 1.0)
            moved = np.where(part.mask, after - before, 0.0).sum(-1)[0]
            assert moved[place] * sign > 0


@pytest.mark.slow
def test_experts_are_balanced_only_when_asked(batch, recipe):
    config = Qwen3Config.from_hf(
        {
            "model_type": "qwen3_moe", "vocab_size": 64, "hidden_size": 16, "intermediate_size": 32,
            "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "num_experts": 4,
            "num_experts_per_tok": 2, "moe_intermediate_size": 8, "mlp_only_layers": [0],
            "router_aux_loss_coef": 0.5,
        }
    )  # fmt: skip
    graphdef, params = nnx.split(Qwen3(config, rngs=nnx.Rngs(0)))
    # One router that prefers an expert whatever the token, so that there is something to balance.
    params["embed_tokens"]["weight"][...] = jnp.abs(params["embed_tokens"]["weight"][...])
    gate = params["moe_layers"]["mlp"]["gate"]["weight"]
    gate[...] = gate[...].at[:, 1].set(0.1)

    def learn(value, microbatch):
        update = make_update(
            graphdef, recipe("unused", "kl_coef=0", f"loss.balance_experts={value}"), SGD, "none"
        )
        (part,) = split_batch(batch._replace(old_logprobs=batch.logprobs), 1, microbatch)
        copy = jax.tree.map(jnp.copy, params)
        new, _, metrics = update(copy, SGD.init(copy), part)
        change = (new["moe_layers"]["mlp"]["gate"]["weight"][...] - gate[...])[0]
        return change, {name: float(x) for name, x in metrics.items()}

    change, metrics = learn("false", 2)
    balanced, more = learn("true", 2)
    assert metrics["experts/imbalance"] == more["experts/imbalance"] > 2  # two experts per token when even
    assert more["loss"] == pytest.approx(metrics["loss"] + 0.5 * metrics["experts/imbalance"], rel=1e-5)
    assert np.abs(balanced - change).max() > 1e-3


def test_balance_of_a_dense_model_is_refused(recipe, tmp_path):
    with pytest.raises(InputError, match=r"^loss\.balance_experts: the model has no experts"):
        train(recipe(tmp_path, "loss.balance_experts=true"))


@pytest.mark.parametrize(
    ("warmup", "rates"), [(0, [0.5, 0.5, 0.5]), (1, [0.0, 0.5, 0.5]), (2, [0.0, 0.25, 0.5])]
)
def test_the_learning_rate_warms_up_and_stays(warmup, rates):
    schedule = make_schedule(OptimizerConfig(learning_rate=0.5, warmup_steps=warmup))
    assert [float(schedule(update)) for update in range(3)] == pytest.approx(rates)


@contextlib.contextmanager
def compilations():
    """Lists the seconds of every program that is compiled meanwhile."""
    seen, listening = [], [True]

    def listen(event, seconds, **_):
        if listening and event == "/jax/core/compile/backend_compile_duration":
            seen.append(seconds)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield seen
    finally:
        listening.clear()


@pytest.mark.slow
def test_nothing_compiles_after_the_second_step(recipe, tmp_path, monkeypatch):
    with compilations() as seen:
        counts, rows = [], loop.step_rows

        def spy(*args):
            counts.append(len(seen))
            return rows(*args)

        monkeypatch.setattr(loop, "step_rows", spy)
        train(recipe(tmp_path, "steps=4", "checkpoint.every=1"))
        counts.append(len(seen))
    assert counts[0] > 0  # ahead of the first step
    assert counts[2:] == [counts[2]] * 3
