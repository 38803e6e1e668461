"""Packed rows against what each of their tokens sees, one by one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from srrl_jax.kernels import gpu_prefill, packed
from srrl_jax.kernels.packed import Pack, attend_packed

G, T, K, H, D, SHARED = 2, 48, 2, 4, 8, 16
# Of each sequence the rows: the tokens of the prefix, and of what each branch is given.
ROWS = [[(11, [5, 0, 9]), (3, [1, 1]), (6, [8])], [(30, []), (1, [2, 2, 2, 2])]]
EXPERTS = {
    "model_type": "qwen3_moe", "num_hidden_layers": 4, "mlp_only_layers": [1, 3], "num_experts": 5,
    "num_experts_per_tok": 2, "moe_intermediate_size": 24, "norm_topk_prob": True,
}  # fmt: skip


def pack_of(rows) -> tuple[Pack, np.ndarray]:
    """With random tokens; and which place each place sees, bool [G, T, T], itself at padding."""
    shape = len(rows), T
    place = np.tile(np.arange(T), (len(rows), 1))
    positions, starts, begins, ends = np.full(shape, -1), place.copy(), place.copy(), np.zeros(shape, int)
    sees = np.tile(np.eye(T, dtype=bool), (len(rows), 1, 1))
    for g, row in enumerate(rows):
        begin = 0
        for prefix, branches in row:
            stop, at = begin + prefix, begin
            for number, size in enumerate([prefix, *branches]):
                part = slice(at, at + size)
                positions[g, part] = SHARED + (np.arange(size) + (prefix if number else 0))
                starts[g, part] = at
                sees[g, part, part] |= np.tril(np.ones((size, size), bool))
                if number:
                    begins[g, part], ends[g, part] = begin, stop
                    sees[g, part, begin:stop] = True
                at += size
            begin = at
    tokens = np.random.default_rng(0).integers(0, 96, shape)
    return Pack(*(jnp.asarray(x, jnp.int32) for x in (tokens, positions, begins, ends, starts))), sees


def random(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(packed, "block_size", lambda: 8)
    monkeypatch.setattr(gpu_prefill, "KEYS", 4)
    monkeypatch.setattr(gpu_prefill, "QUERIES", 8)


@pytest.mark.parametrize("shared", [0, SHARED])
@pytest.mark.parametrize("how", ["xla", "window", "kernel"])
def test_a_token_sees_its_prefix_and_its_branch(small_blocks, how, shared):
    pack, sees = pack_of(ROWS)
    q, k, v = random(0, G, T, H, D), random(1, G, T, K, D), random(2, G, T, K, D)
    before = [random(3, 1, shared, K, D), random(4, 1, shared, K, D)] if shared else ()
    window = 9 if how == "window" else None
    found = jax.jit(lambda *x: attend_packed(*x, window, how == "kernel"))(q, k, v, tuple(before), pack)

    keys, values = k, v
    mask, at = sees, np.broadcast_to(pack.positions[:, None], sees.shape)
    if shared:
        keys, values = (
            np.concatenate([np.repeat(x, G, 0), y], 1) for x, y in zip(before, (k, v), strict=True)
        )
        mask = np.concatenate([np.ones((G, T, shared), bool), mask], 2)
        at = np.concatenate([np.broadcast_to(np.arange(shared), (G, T, shared)), at], 2)
    if window is not None:
        mask = mask & (np.asarray(pack.positions)[..., None] - at < window)
    scores = np.einsum("gthd,gshd->ghts", q, np.repeat(keys, H // K, 2)) / np.sqrt(D)
    weights = jax.nn.softmax(np.where(mask[:, None], scores, -np.inf), axis=-1)
    expected = np.einsum("ghts,gshd->gthd", weights, np.repeat(values, H // K, 2)).reshape(G, T, -1)
    real = np.asarray(pack.positions) >= 0
    np.testing.assert_allclose(np.asarray(found)[real], expected[real], rtol=0, atol=2e-6)
    assert np.isfinite(found).all()


@pytest.mark.parametrize(
    "fields",
    [{}, EXPERTS, {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1}],
    ids=["dense", "experts", "sliding"],
)
def test_keys_and_values_alone(tiny, fields):
    """The last layer leaves out the rest."""
    model, (pack, _) = tiny(**fields), pack_of(ROWS)
    prefill = jax.jit(type(model).prefill, static_argnames="states")
    states, every = prefill(model, pack, states=True)
    none, alone = prefill(model, pack)
    assert states.shape == (G, T, model.config.hidden_size) and none is None
    for x, y in zip(every, alone, strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=3e-6)


def test_no_array_has_a_score_for_each_pair_of_tokens():
    def size_of_scores(tokens: int) -> int:
        pack = Pack(*[jax.ShapeDtypeStruct((1, tokens), jnp.int32)] * 5)
        heads = [jax.ShapeDtypeStruct((1, tokens, n, D), jnp.float32) for n in (H, K, K)]
        text = jax.jit(lambda *x: attend_packed(*x[:3], (), x[3])).lower(*heads, pack).compile()
        return text.memory_analysis().temp_size_in_bytes

    block = packed.block_size()
    assert size_of_scores(16 * block) < 2.5 * size_of_scores(8 * block)
