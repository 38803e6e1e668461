"""The network against transformers, field by field of config.json and on random configs.

`golden_parity.npz` holds what transformers computes for VARIANTS, so that the default suite checks the
same without torch; with torch a test compares the file with transformers. `python test_parity.py`
writes it again.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from srrl_jax.checkpoints.names import tensor_names
from srrl_jax.models import Qwen3, Qwen3Config, moe

GOLDEN = Path(__file__).with_name("golden_parity.npz")
BASE = {
    "model_type": "qwen3",
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rope_theta": 100.0,
    "max_position_embeddings": 256,
}
YARN = {"rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 64}
MOE = {
    "model_type": "qwen3_moe",
    "num_experts": 5,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "num_key_value_heads": 2,
}
SLIDING = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}

# One field at a time: the config before it, and the field's new value.
VARIANTS = {
    "vocab_size": ({}, 40),
    "hidden_size": ({}, 24),
    "intermediate_size": ({}, 56),
    "num_hidden_layers": ({}, 2),
    "num_attention_heads": ({}, 4),
    "num_key_value_heads": ({}, 3),
    "head_dim": ({}, 8),
    "rms_norm_eps": ({}, 1e-2),
    "tie_word_embeddings": ({}, True),
    "attention_bias": ({}, True),
    "rope_theta": ({}, 1e6),
    "rope_parameters": ({}, {"rope_type": "linear", "rope_theta": 100.0, "factor": 3.0}),
    "rope_scaling": ({}, {"type": "linear", "factor": 3.0}),
    "yarn": ({}, YARN),
    "yarn.factor": ({"rope_parameters": YARN}, 8.0),
    "yarn.original_max_position_embeddings": ({"rope_parameters": YARN}, 512),
    "yarn.attention_factor": ({"rope_parameters": YARN}, 1.4),
    "yarn.beta_fast": ({"rope_parameters": YARN}, 3),
    "yarn.beta_slow": ({"rope_parameters": YARN}, 0.2),
    "yarn.truncate": ({"rope_parameters": YARN}, False),
    "yarn.mscale": ({"rope_parameters": {**YARN, "mscale_all_dim": 0.5}}, 2.0),
    "yarn.mscale_all_dim": ({"rope_parameters": {**YARN, "mscale": 2.0}}, 3.0),
    "max_position_embeddings": ({"rope_parameters": {**YARN, "factor": None}}, 4096),
    "use_sliding_window": ({"sliding_window": 4, "max_window_layers": 1}, True),
    "sliding_window": (SLIDING, 2),
    "max_window_layers": (SLIDING, 2),
    "layer_types": (SLIDING, ["sliding_attention", "full_attention", "sliding_attention"]),
    "num_experts": (MOE, 7),
    "num_experts_per_tok": (MOE, 3),
    "moe_intermediate_size": (MOE, 16),
    "norm_topk_prob": (MOE, True),
    "decoder_sparse_step": (MOE, 2),
    "mlp_only_layers": (MOE, [1]),
    "moe.use_sliding_window": ({**MOE, "sliding_window": 4, "max_window_layers": 1}, True),
}
# Fields of transformers' Qwen3Config that leave the forward pass alone, and a value that says so.
STILL = {
    "initializer_range": 0.5,
    "use_cache": False,
    "attention_dropout": 0.5,
    "pad_token_id": 3,
    "bos_token_id": 4,
    "eos_token_id": [5, 6],
    "max_position_embeddings": 512,
    "sliding_window": 2,
    "max_window_layers": 0,
    "hidden_act": "silu",  # others are refused
}
STILL_MOE = {"output_router_logits": True, "router_aux_loss_coef": 0.5}


def variant(name: str) -> tuple[dict, dict]:
    """The config before and after a field of VARIANTS changed."""
    before, value = VARIANTS[name]
    before = {**BASE, **before}
    name = name.removeprefix("moe.")
    field = name.removeprefix("yarn.")
    if field != name:
        return before, {**before, "rope_parameters": {**before["rope_parameters"], field: value}}
    return before, {**before, "rope_parameters" if name == "yarn" else name: value}


def random_model(fields: dict, seed: int = 0, dtype=jnp.float32) -> Qwen3:
    """All weights random, such that next tokens are far from uniform."""
    config = Qwen3Config.from_hf(fields)
    graphdef, state = nnx.split(nnx.eval_shape(lambda: Qwen3(config, rngs=nnx.Rngs(0), dtype=dtype)))
    random = np.random.default_rng(seed)
    filled = []
    for path, variable in sorted(nnx.to_flat_state(state), key=lambda item: item[0]):
        values = random.standard_normal(variable.shape, np.float32)
        if path[-2].endswith("norm"):
            values = 1 + 0.2 * values
        elif path[-1] == "bias":
            values *= 0.5
        elif path[0] in ("layers", "moe_layers"):
            values /= np.sqrt(variable.shape[-1])
        else:
            values *= 2 / np.sqrt(variable.shape[-1])
        filled.append((path, variable.replace(jnp.asarray(values, dtype))))
    return nnx.merge(graphdef, nnx.from_flat_state(filled))


def draw_tokens(fields: dict, seed: int = 0, shape=(2, 12)) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, fields["vocab_size"], shape)


def transformers_model(fields: dict, model: Qwen3):
    """transformers' network of the same config.json, in the weights (and dtype) of `model`."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    weights = {}
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        values = torch.from_numpy(np.array(variable[...], np.float32))
        weights |= {name: values[index] for name, index in tensor_names(path, model.config).items()}
    for layer in np.flatnonzero(model.config.has_experts):  # which it fuses in memory
        name = f"model.layers.{layer}.mlp.experts."
        gate, up, down = (
            torch.stack(
                [weights.pop(f"{name}{e}.{kind}_proj.weight") for e in range(model.config.moe.num_experts)]
            )
            for kind in ("gate", "up", "down")
        )
        weights |= {f"{name}gate_up_proj": torch.cat([gate, up], 1), f"{name}down_proj": down}
    theirs = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(**fields),
        experts_implementation="eager",  # the others want sizes of whole words
    ).eval()
    info = theirs.load_state_dict(weights, strict=False)
    assert not info.unexpected_keys
    assert info.missing_keys == (["lm_head.weight"] if fields.get("tie_word_embeddings") else [])
    return theirs.to(getattr(torch, model.dtype.name))


def their_logits(theirs, tokens, mask=None) -> np.ndarray:
    import torch

    mask = None if mask is None else torch.from_numpy(mask.astype(np.int64))
    with torch.no_grad():
        return theirs(torch.from_numpy(tokens), attention_mask=mask).logits.float().numpy()


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN) as arrays:
        return dict(arrays)


def test_every_field_is_there(golden):
    """No field that transformers' config names is forgotten here."""
    from transformers import Qwen3Config as Theirs
    from transformers import Qwen3MoeConfig as TheirMoe

    known = VARIANTS.keys() | STILL.keys()
    assert set(Theirs.__annotations__) - {"model_type"} <= known
    assert set(TheirMoe.__annotations__) - {"model_type"} <= known | STILL_MOE.keys()
    assert golden.keys() == {f"{name}.{when}" for name in VARIANTS for when in ("before", "after")}


@pytest.mark.parametrize("name", VARIANTS)
def test_field_moves_the_output_as_in_transformers(golden, relative_error, name):
    before, after = variant(name)
    expected = golden[f"{name}.before"], golden[f"{name}.after"]
    logits = random_model(after)(draw_tokens(after))[:, -2:]
    assert relative_error(logits, expected[1]) < 1e-5
    if expected[0].shape == expected[1].shape:
        assert relative_error(expected[0], expected[1]) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_golden_is_what_transformers_says(torch, golden, relative_error, name):
    """Of the config.json itself, and of the one that we write."""
    for fields, expected in zip(
        variant(name), (golden[f"{name}.before"], golden[f"{name}.after"]), strict=True
    ):
        model, tokens = random_model(fields), draw_tokens(fields)
        for source in (fields, model.config.to_hf()):
            logits = their_logits(transformers_model(source, model), tokens)
            assert relative_error(logits[:, -2:], expected) < 1e-5


@pytest.mark.parametrize("name", STILL)
def test_other_fields_change_nothing(name):
    config = Qwen3Config.from_hf({**BASE, name: STILL[name]})
    base = Qwen3Config.from_hf(BASE)
    assert config == base or name == "max_position_embeddings"
    assert (config.windows, config.rope_scaling) == (None, None)


@pytest.mark.parametrize("name", STILL_MOE)
def test_other_fields_of_experts_change_no_output(name):
    model, tokens = random_model({**BASE, **MOE}), draw_tokens(BASE)
    other = random_model({**BASE, **MOE, name: STILL_MOE[name]})
    np.testing.assert_array_equal(model(tokens), other(tokens))


@pytest.mark.slow
@pytest.mark.parametrize("name", [*STILL, *STILL_MOE])
def test_other_fields_change_nothing_in_transformers(torch, name):
    fields = {**BASE, **MOE} if name in STILL_MOE else BASE
    model, tokens = random_model(fields), draw_tokens(fields)
    expected = their_logits(transformers_model(fields, model), tokens)
    changed = their_logits(transformers_model({**fields, name: (STILL | STILL_MOE)[name]}, model), tokens)
    np.testing.assert_array_equal(changed, expected)


@st.composite
def configs(draw, experts: bool) -> dict:
    """Any config.json, dense or of experts, of a tiny size."""
    kv_heads = draw(st.integers(1, 3))
    layers = draw(st.integers(1, 3))
    fields = {
        "model_type": "qwen3",
        "vocab_size": draw(st.integers(11, 60)),
        "hidden_size": draw(st.integers(4, 24)) * 2,
        "intermediate_size": draw(st.integers(4, 60)),
        "num_hidden_layers": layers,
        "num_key_value_heads": kv_heads,
        "num_attention_heads": kv_heads * draw(st.integers(1, 3)),
        "head_dim": draw(st.sampled_from([4, 6, 8, 16])),
        "rms_norm_eps": draw(st.sampled_from([1e-6, 1e-5, 1e-3])),
        "tie_word_embeddings": draw(st.booleans()),
        "attention_bias": draw(st.booleans()),
        "max_position_embeddings": draw(st.sampled_from([64, 4096])),
    }
    theta = draw(st.sampled_from([30.0, 1e4, 5e6]))
    rope = draw(st.sampled_from(["flat", "default", "linear", "yarn"]))
    factor = draw(st.floats(1, 8))
    if rope == "flat":
        fields["rope_theta"] = theta
    else:
        fields["rope_parameters"] = {"rope_type": rope, "rope_theta": theta}
        if rope != "default":
            fields["rope_parameters"]["factor"] = factor
    if rope == "yarn":
        options = {
            "original_max_position_embeddings": st.sampled_from([16, 64, 2048]),
            "attention_factor": st.none() | st.floats(0.5, 2),
            "beta_fast": st.none() | st.floats(2, 40),
            "beta_slow": st.none() | st.floats(0.1, 1.9),
            "mscale": st.none() | st.floats(0.5, 2),
            "mscale_all_dim": st.none() | st.floats(0.5, 2),
            "truncate": st.booleans(),
        }
        fields["rope_parameters"] |= {
            key: draw(values) for key, values in options.items() if draw(st.booleans())
        }
    if draw(st.booleans()):
        fields |= {"use_sliding_window": True, "sliding_window": draw(st.integers(1, 6))}
        if draw(st.booleans()):
            fields["max_window_layers"] = draw(st.integers(0, layers))
        elif not experts:
            kinds = st.sampled_from(["full_attention", "sliding_attention"])
            fields["layer_types"] = draw(st.lists(kinds, min_size=layers, max_size=layers))
    if experts:
        count = draw(st.integers(1, 9))
        fields |= {
            "model_type": "qwen3_moe",
            draw(st.sampled_from(["num_experts", "num_local_experts"])): count,
            "num_experts_per_tok": draw(st.integers(1, min(count, 4))),
            "moe_intermediate_size": draw(st.integers(4, 30)),
            "norm_topk_prob": draw(st.booleans()),
            "decoder_sparse_step": draw(st.integers(1, 2)),
            "mlp_only_layers": draw(st.none() | st.lists(st.integers(0, layers), max_size=2)),
        }
    return fields


@pytest.mark.parametrize(
    "experts", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["dense", "experts"]
)
@settings(max_examples=3, deadline=None)
@given(data=st.data(), seed=st.integers(0, 2**31), padding=st.integers(0, 4), left=st.booleans())
def test_random_configs(torch, experts, data, seed, padding, left):
    """Logits of float32, unpadded and padded on either side, within 1e-5 of the largest."""
    fields = data.draw(configs(experts))
    model, tokens = random_model(fields, seed), draw_tokens(fields, seed, (2, 13))
    theirs = transformers_model(fields, model)
    mask = np.ones(tokens.shape, bool)
    mask[1, slice(0, padding) if left else slice(13 - padding, 13)] = False
    expected = their_logits(theirs, tokens, mask)[mask]
    ours = np.asarray(model(tokens, mask=mask))
    assert np.isfinite(ours).all()
    assert np.abs(ours[mask] - expected).max() / np.abs(expected).max() < 1e-5


@pytest.mark.parametrize("fields", [{}, {"rope_parameters": YARN, **SLIDING}], ids=["plain", "yarn-sliding"])
def test_bfloat16(torch, fields):
    """KL of next-token distributions, both networks in bfloat16."""
    fields = {**BASE, **fields, "num_hidden_layers": 6, "hidden_size": 64}
    tokens = draw_tokens(fields, shape=(8, 40))
    model = random_model(fields, dtype=jnp.bfloat16)
    expected = jax.nn.log_softmax(their_logits(transformers_model(fields, model), tokens))
    assert -(jnp.exp(expected) * expected).sum(-1).mean() < 0.7 * np.log(fields["vocab_size"])

    forward = jax.jit(lambda model: jax.nn.log_softmax(model(tokens)))

    def divergence():
        return (jnp.exp(expected) * (expected - forward(model))).sum(-1).max()

    assert divergence() < 0.015
    model.layers.self_attn.q_norm.weight[...] *= 1.1
    assert divergence() > 0.015


def test_bfloat16_of_experts(torch, monkeypatch):
    """KL of next-token distributions of all tokens, both networks in bfloat16 and by the same experts.

    Where a token's last chosen expert and the first not chosen lie closer than bfloat16's error, either
    choice is right, and then the outputs differ by whole experts. So theirs follows our choices, and where
    it would have chosen others, the two must lie so close.
    """
    fields = {**BASE, **MOE, "norm_topk_prob": True, "hidden_size": 64, "num_experts": 8}
    tokens = draw_tokens(fields, shape=(16, 32))
    model = random_model(fields, dtype=jnp.bfloat16)
    theirs = transformers_model(fields, model)
    ours, margins, mix = [], [], moe._on_the_mesh

    def told(x, weights, chosen, *matrices):
        jax.debug.callback(lambda c: ours.append(np.array(c).reshape(-1, c.shape[-1])), chosen, ordered=True)
        return mix(x, weights, chosen, *matrices)

    def follow(router, _, output):
        logits, _, choice = output
        mine = torch.from_numpy(ours.pop(0)).long()
        scores = torch.softmax(logits.float(), -1).gather(1, mine)
        ranked = logits.float().sort(-1, descending=True).values
        other = (choice.sort(-1).values != mine.sort(-1).values).any(-1)
        margins.append((ranked[:, 1] - ranked[:, 2])[other])  # two experts a token
        return logits, (scores / scores.sum(-1, keepdim=True)).to(logits.dtype), mine

    monkeypatch.setattr(moe, "_on_the_mesh", told)
    for layer in theirs.model.layers:
        layer.mlp.gate.register_forward_hook(follow)
    forward = jax.jit(lambda model: jax.nn.log_softmax(model(tokens)))

    def divergence():
        actual = forward(model)
        jax.effects_barrier()
        expected = jax.nn.log_softmax(their_logits(theirs, tokens))
        assert not ours
        return (jnp.exp(expected) * (expected - actual)).sum(-1).max()

    assert divergence() < 0.015
    close = torch.cat(margins)
    assert len(close) < 0.05 * 3 * tokens.size and close.max() < 0.1, (len(close), close.max())
    model.moe_layers.mlp.experts.up_proj.weight[...] *= 1.2
    assert divergence() > 0.015


def test_the_load_balancing_loss_is_that_of_transformers(torch):
    fields = {**BASE, **MOE, "mlp_only_layers": [1]}
    model, tokens = random_model(fields), draw_tokens(fields)
    mask = np.arange(tokens.shape[1]) < np.array([[12], [7]])
    theirs = transformers_model(fields, model)
    with torch.no_grad():
        expected = theirs(
            torch.from_numpy(tokens), attention_mask=torch.from_numpy(mask.astype(int)),
            output_router_logits=True,
        ).aux_loss  # fmt: skip
    positions = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)[:, None]
    *_, load = model.extend(tokens[:, None], positions, mask[:, None])
    assert float(load.imbalance()) == pytest.approx(float(expected), rel=1e-5) and expected > 2.01


@pytest.mark.parametrize(
    "fields",
    [{}, {"rope_parameters": YARN, **SLIDING}, {**MOE, "mlp_only_layers": [1]}],
    ids=["plain", "yarn-sliding", "experts"],
)
def test_hidden_states_of_every_layer(torch, relative_error, fields):
    """Of networks cut after each layer, under one final norm."""
    fields = {**BASE, **fields}
    model, tokens = random_model(fields), draw_tokens(fields)
    theirs = transformers_model(fields, model)
    with torch.no_grad():
        states = theirs.model(torch.from_numpy(tokens), output_hidden_states=True).hidden_states
        expected = [theirs.model.norm(state).numpy() for state in states[1:-1]] + [states[-1].numpy()]
    positions = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)[:, None]
    full = Qwen3Config.from_hf(fields)
    for layers in range(1, full.num_hidden_layers + 1):
        cut = {**fields, "num_hidden_layers": layers}
        if full.layer_types:
            cut["layer_types"] = list(full.layer_types[:layers])
        part = random_model(cut)
        state = nnx.state(model)
        for stack, experts in (("layers", False), ("moe_layers", True)):
            if stack in state:
                rows = part.config.has_experts.count(experts)
                state[stack] = jax.tree.map(lambda x, n=rows: x[:n], state[stack])
                if not rows:
                    del state[stack]
        nnx.update(part, state)
        hidden, *_ = part.extend(tokens[:, None], positions, np.ones_like(positions, bool))
        assert relative_error(hidden[:, 0], expected[layers - 1]) < 1e-5


if __name__ == "__main__":
    arrays = {}
    for name in VARIANTS:
        for when, fields in zip(("before", "after"), variant(name), strict=True):
            theirs = transformers_model(fields, random_model(fields))
            arrays[f"{name}.{when}"] = their_logits(theirs, draw_tokens(fields))[:, -2:]
    np.savez_compressed(GOLDEN, **arrays)
