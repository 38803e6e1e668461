"""Fused attention over the tree layout against plain XLA, and for a TPU that is not there."""

import functools
import importlib.util
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from srrl_jax.errors import InputError
from srrl_jax.kernels import attention, fused
from srrl_jax.kernels.attention import attend, check_kernel, choose_kernel, within_window
from srrl_jax.kernels.segment import Segment
from srrl_jax.models import Qwen3, Qwen3Config, TreeBatch, branch_logprobs
from srrl_jax.parallel import MeshConfig, make_mesh, shardings

N, K, G, D = 2, 2, 2, 16


def random(*shape, seed=0):
    return jnp.asarray(np.random.default_rng((seed, *shape)).standard_normal(shape), jnp.float32)


def tree(b, t, contexts, window=None):
    """Queries, segments with padding at the end of each, and which queries are real [N, B, T]."""

    def positions(own, size):
        return jnp.broadcast_to(jnp.arange(size), (N, own, size))

    segments, before = [], 0
    for own, size in (*contexts, (b, t)):
        lengths = size - np.arange(N * own).reshape(N, own) % 3 * (size // 4)
        real = jnp.arange(size) < lengths[..., None]
        mask = real[:, :, None]
        if (own, size) == (b, t):
            mask = mask & jnp.tril(jnp.ones((t, t), bool)) & real[..., None]
        segments.append(Segment(random(N, K, own, size, D), random(N, K, own, size, D, seed=1), mask))
        before += size
    q = random(N, b, t, K * G, D)
    if window is not None:
        starts = np.cumsum([0, *[size for _, size in contexts]])
        at = positions(b, t) + starts[-1]
        segments = [
            s._replace(mask=s.mask & within_window(at, positions(s.k.shape[2], s.k.shape[3]) + start, window))
            for s, start in zip(segments, starts, strict=True)
        ]
    return q, segments, real


def everything(function, q, segments, real):
    """The output at real queries, and its weighted sum's gradients by q and all keys and values."""

    @jax.jit
    def run(q, kv):
        def out(q, kv):
            with_kv = [s._replace(k=k, v=v) for s, (k, v) in zip(segments, kv, strict=True)]
            return jnp.where(real[..., None], function(q, with_kv), 0.0)

        y, back = jax.vjp(out, q, kv)
        return y, back(jnp.cos(jnp.arange(y.size)).reshape(y.shape))

    return jax.tree.leaves(run(q, [(s.k, s.v) for s in segments]))


def assert_same(actual, expected, tolerance):
    for x, y in zip(actual, expected, strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=tolerance * np.abs(y).max())


# A prefix of its own; branches on a prefix; the same with tokens that each branch has read before.
TREES = [(1, 70, []), (3, 40, [(1, 130)]), (2, 40, [(1, 50), (2, 9)])]


@pytest.mark.parametrize("shape", TREES)
def test_splash_equals_xla(shape):
    q, (*context, own), real = tree(*shape)
    expected = everything(attend, q, [*context, own], real)
    told = [*context, own._replace(mask=real[:, :, None])]  # the order it knows
    actual = everything(functools.partial(fused.splash, interpret=True), q, told, real)
    assert_same(actual, expected, 5e-6)


@pytest.mark.parametrize("window", [None, 11])
def test_the_call_of_cudnn_equals_xla(window):
    """Computed by XLA: there is no GPU here."""
    for shape in TREES:
        args = tree(*shape, window)
        call = functools.partial(fused.cudnn, implementation="xla")
        assert_same(everything(call, *args), everything(attend, *args), 5e-6)


def by_lengths(q, segments, real):
    """The same with a mask of lengths for the queries' own tokens, and no numbers at their padding."""
    *context, own = segments
    nothing = jnp.where(real, 0, jnp.nan)
    keys = [x + nothing[:, None, :, :, None] for x in (own.k, own.v)]
    return q + nothing[..., None, None], [*context, own._replace(k=keys[0], v=keys[1], mask=real[:, :, None])]


@pytest.mark.parametrize("branches", [1, 3])
def test_cudnn_by_lengths_equals_xla(branches):
    """As a branch that is met alone is; beyond its length cuDNN leaves what it finds, also of gradients."""
    q, segments, real = tree(branches, 40, [])
    call = functools.partial(fused.cudnn, implementation="xla")
    found = everything(call, *by_lengths(q, segments, real), real)
    assert_same(found, everything(attend, q, segments, real), 5e-6)


def test_splash_skips_what_no_query_sees():
    """Of 4 branches, each sees its prefix and itself: 4 + 4 of 4 x 5 blocks."""
    mask = fused.TreeMask(4, 128, [(1, 128)])
    blocks = mask[:, :].reshape(4, 128, 5, 128).any((1, 3))
    assert blocks.sum() == 8


@pytest.mark.slow
def test_the_network_with_splash_equals_the_network_with_xla(tiny, monkeypatch):
    monkeypatch.setitem(fused.KERNELS, "splash", functools.partial(fused.splash, interpret=True))
    batch = TreeBatch(
        jnp.arange(18).reshape(2, 9) + 3, jnp.array([7, 9]),
        jnp.arange(42).reshape(2, 3, 7) + 5, jnp.array([[5, 0, 3], [2, 7, 1]]),
    )  # fmt: skip
    inside = jnp.arange(7) < batch.branch_lengths[..., None]

    def run(kernel):
        model = tiny()
        model.attention = kernel

        @jax.jit
        def loss(model):
            return jnp.where(inside, branch_logprobs(model, batch, remat="full")[0], 0.0).sum()

        return jax.tree.leaves(jax.jit(nnx.value_and_grad(loss))(model))

    assert_same(run("splash"), run("xla"), 2e-5)


@pytest.mark.parametrize(
    ("platform", "dtype", "slides", "tokens", "kernel"),
    [
        ("cpu", "bfloat16", False, 8, "xla"),
        ("tpu", "float32", False, 8, "splash"),
        ("tpu", "float32", False, 1, "xla"),
        ("tpu", "float32", True, 8, "xla"),
        ("gpu", "bfloat16", True, 8, "cudnn"),
        ("gpu", "float32", False, 8, "xla"),
    ],
)
def test_auto(monkeypatch, platform, dtype, slides, tokens, kernel):
    monkeypatch.setattr(attention, "platform", lambda: platform)
    assert choose_kernel("auto", dtype, slides, tokens) == kernel
    assert (
        choose_kernel("cudnn", dtype, slides, 8) == "cudnn"
        and choose_kernel("cudnn", dtype, slides, 1) == "xla"
    )


@pytest.mark.parametrize(
    ("platform", "kernel", "message"),
    [
        ("tpu", "splash", "sliding attention"),
        ("tpu", "cudnn", "needs a GPU, and this is a tpu"),
        ("gpu", "cudnn", "16 bits"),
        ("gpu", "splash", "needs a TPU"),
    ],
)
def test_what_cannot_run_is_refused(monkeypatch, platform, kernel, message):
    monkeypatch.setattr(attention, "platform", lambda: platform)
    with pytest.raises(InputError, match=f"^attention: .*{message}"):
        check_kernel(kernel, "float32", slides=True)
    check_kernel("auto", "float32", slides=True)


@pytest.fixture
def v5e(uncached, monkeypatch):
    """Four TPU v5e chips to compile for: the extra `aot` (libtpu). CI must have it."""
    if os.environ.get("CI") != "true" and importlib.util.find_spec("libtpu") is None:
        pytest.skip("needs the extra `aot` (libtpu)")
    from jax.experimental import topologies

    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    return topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices


@pytest.mark.slow
def test_gradient_compiles_for_a_tpu(v5e):
    """By "auto", which takes splash there: on a mesh that cuts rows, weights, heads and the vocabulary."""
    config = Qwen3Config(
        vocab_size=512,
        hidden_size=256,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=128,
    )
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=2), v5e)
    with jax.set_mesh(mesh):
        abstract = nnx.eval_shape(lambda: Qwen3(config, rngs=nnx.Rngs(0), dtype=jnp.bfloat16))
        graphdef, state = nnx.split(abstract)
        params = jax.tree.map(
            lambda x, s: x.replace(jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)),
            state,
            shardings(state, mesh),
            is_leaf=lambda x: isinstance(x, nnx.Variable),
        )
        rows = NamedSharding(mesh, P(("data", "fsdp")))
        shapes = TreeBatch((2, 1536), (2,), (2, 2, 64), (2, 2))
        batch = TreeBatch(*[jax.ShapeDtypeStruct(shape, jnp.int32, sharding=rows) for shape in shapes])

        def loss(params, batch):
            return branch_logprobs(nnx.merge(graphdef, params), batch, remat="full")[0].sum()

        old = jax.__version__.startswith("0.10.")
        quick = {"exec_time_optimization_effort": -1.0} if old else {"optimization_level": "O0"}
        lowered = jax.jit(jax.grad(loss)).lower(params, batch)
        text = lowered.compile(compiler_options=quick).as_text()
    assert "splash_mqa_fwd" in text and "splash_mqa_dkv" in text
    assert "tpu_custom_call" in text
    assert "1536,1536]" not in text  # no mask of the square of a length
