"""Runs that learn adapters beside frozen weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from srrl_jax.checkpoints import load_model
from srrl_jax.errors import InputError
from srrl_jax.models import Qwen3, Qwen3Config, TreeBatch, branch_logprobs
from srrl_jax.models.lora import add_adapters
from srrl_jax.parallel import make_mesh
from srrl_jax.run import train
from srrl_jax.run.export import export
from srrl_jax.training.learner import Learner, build_model

LORA = (
    "lora.rank=2",
    "lora.targets=[q_proj, down_proj]",
    "optimizer.minibatches=1",
    "optimizer.warmup_steps=0",
    "optimizer.learning_rate=0.01",
    "checkpoint.every=1",
)
TREE = TreeBatch(
    np.array([[3, 4, 5, 6], [7, 8, 9, 0]]),
    np.array([4, 3]),
    np.array([[[10, 11, 12], [13, 14, 15]], [[16, 17, 18], [19, 20, 0]]]),
    np.array([[3, 3], [3, 2]]),
)
INSIDE = np.arange(3) < TREE.branch_lengths[..., None]
logprobs = jax.jit(lambda model: jnp.where(INSIDE, branch_logprobs(model, TREE)[0], 0))


@pytest.fixture(scope="module")
def run(recipe, tmp_path_factory):
    """The recipe of a run of two steps, and its end."""
    config = recipe(tmp_path_factory.mktemp("run"), *LORA)
    return config, train(config)


@pytest.fixture(scope="module")
def learner(run):
    config, _ = run
    with jax.set_mesh(mesh := make_mesh(config.mesh)):
        return Learner(build_model(config), config, mesh, longest_prompt=36)


def test_at_first_the_policy_is_the_base(run, learner):
    config, _ = run
    base = load_model(config.model)
    policy = nnx.merge(nnx.graphdef(build_model(config)), learner.frozen)
    np.testing.assert_array_equal(logprobs(policy), logprobs(base))


def test_the_reference_is_no_second_copy(run, learner):
    _, end = run
    policy = dict(nnx.to_flat_state(learner.policy(end.params)))
    frozen = dict(nnx.to_flat_state(learner.frozen))
    assert policy.keys() == frozen.keys()
    apart = {path for path in policy if policy[path][...] is not frozen[path][...]}
    assert apart == {path for path, _ in nnx.to_flat_state(end.params)}


def test_only_adapters_are_learnt_kept_and_stored(run, learner):
    config, end = run
    learnt = dict(nnx.to_flat_state(end.params))
    assert {path[-3:] for path in learnt} == {
        (name, "adapter", matrix) for name in ("q_proj", "down_proj") for matrix in ("down", "up")
    }
    assert {learnt[path].shape[-1 if path[-1] == "up" else -2] for path in learnt} == {2}
    before = dict(nnx.to_flat_state(learner.frozen))
    assert all((np.asarray(before[path][...]) != np.asarray(learnt[path][...])).any() for path in learnt)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(end.params))
    moments = sum(leaf.nbytes for leaf in jax.tree.leaves(end.opt_state))
    assert 2 * size <= moments < 2 * size + 100


def test_sampler_and_trainer_agree_and_the_policy_leaves_the_reference(run, logs):
    metrics, _ = logs(run[0].run_dir)
    assert max(m["logprob_diff/max"] for m in metrics) < 1e-4
    assert metrics[0]["kl"] == pytest.approx(0, abs=1e-6) and metrics[1]["kl"] > 1e-5


def test_an_export_is_merged(run, learner, tmp_path):
    config, end = run
    export(config.run_dir, tmp_path / "out")
    merged, base = load_model(tmp_path / "out"), load_model(config.model)
    policy = nnx.merge(nnx.graphdef(build_model(config)), learner.policy(end.params))
    np.testing.assert_allclose(logprobs(merged), logprobs(policy), rtol=0, atol=1e-5)
    assert np.abs(logprobs(merged) - logprobs(base)).max() > 1e-3
    left, right = (dict(nnx.to_flat_state(nnx.state(model))) for model in (merged, base))
    changed = {path[-2] for path in left if (left[path][...] != right[path][...]).any()}
    assert changed == {"q_proj", "down_proj"}


@pytest.mark.slow
def test_transformers_loads_an_export(run, learner, torch, tmp_path):
    from transformers import AutoModelForCausalLM

    config, end = run
    export(config.run_dir, tmp_path / "out")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    policy = nnx.merge(nnx.graphdef(build_model(config)), learner.policy(end.params))
    tokens = np.concatenate([TREE.prefix[:1], TREE.branches[0, :1]], axis=1)
    with torch.no_grad():
        expected = theirs(torch.from_numpy(tokens)).logits.numpy()
    np.testing.assert_allclose(policy(tokens), expected, rtol=0, atol=1e-4)


def test_peft_loads_an_adapter_and_merges_it(run, learner, torch, tmp_path):
    peft = pytest.importorskip("peft", reason="needs the extra `parity` (peft)")
    from transformers import AutoModelForCausalLM

    config, end = run
    assert export(config.run_dir, tmp_path / "out", adapter=True) == 2
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "README.md",
    }
    base = AutoModelForCausalLM.from_pretrained(config.model, dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "out").eval()
    assert theirs.peft_config["default"].base_model_name_or_path == config.model
    policy = nnx.merge(nnx.graphdef(build_model(config)), learner.policy(end.params))
    tokens = np.concatenate([TREE.prefix[:1], TREE.branches[0, :1]], axis=1)
    with torch.no_grad():
        beside = theirs(torch.from_numpy(tokens)).logits.numpy()
        merged = theirs.merge_and_unload()(torch.from_numpy(tokens)).logits.numpy()
    np.testing.assert_allclose(beside, policy(tokens), rtol=0, atol=1e-4)
    np.testing.assert_allclose(merged, policy(tokens), rtol=0, atol=1e-4)


def test_alpha_weighs_adapters(run, learner, recipe):
    config, end = run
    twice = recipe("unused", *LORA, f"lora.alpha={2 * config.lora.alpha}")
    base, one, two = (
        logprobs(nnx.merge(nnx.graphdef(build_model(c)), params))
        for c, params in (
            (config, learner.frozen),
            (config, learner.policy(end.params)),
            (twice, learner.policy(end.params)),
        )
    )
    assert np.abs(two - base).max() > 1.5 * np.abs(one - base).max() > 0


@pytest.mark.slow
def test_a_resumed_run_goes_on_bit_for_bit(run, recipe, logs, tmp_path):
    config, end = run
    train(recipe(tmp_path, *LORA, "steps=1"))
    again = train(recipe(tmp_path, *LORA))
    assert logs(tmp_path) == logs(config.run_dir)
    jax.tree.map(np.testing.assert_array_equal, end, again)


def test_what_is_refused(recipe, tmp_path):
    for override, message in (
        ("lora.rank=-1", "lora.rank: Input should be greater than or equal to 0, not -1"),
        ("lora.alpha=0", "lora.alpha: Input should be greater than 0, not 0"),
        ("lora.targets=[]", "lora.targets: must be different projections"),
        ("lora.targets=[q_proj, q_proj]", "lora.targets: must be different projections"),
        ("lora.targets=[gate]", "lora.targets.0: Input should be 'q_proj'"),
    ):
        with pytest.raises(InputError, match=message):
            recipe(tmp_path, override)


def test_experts_take_no_adapter():
    sizes = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    config = Qwen3Config.from_hf(
        {"model_type": "qwen3_moe", "vocab_size": 8, "num_key_value_heads": 1, "head_dim": 8, **sizes}
    )
    model = nnx.eval_shape(lambda: Qwen3(config, rngs=nnx.Rngs(0)))
    with pytest.raises(InputError, match="no layer has a up_proj that takes an adapter"):
        add_adapters(model, 2, 4, ["q_proj", "up_proj"])
