"""What is said of sizes that a mesh does not divide."""

import pytest
from flax import nnx
from jax.sharding import AbstractMesh

from srrl_jax.errors import InputError
from srrl_jax.models import Qwen3, Qwen3Config
from srrl_jax.models.presets import preset
from srrl_jax.parallel import check_rows, unsharded_axes

AXES = ("slice", "data", "fsdp", "tensor", "expert")


def notes(config: Qwen3Config, *sizes: int) -> list[str]:
    state = nnx.state(nnx.eval_shape(lambda: Qwen3(config, rngs=nnx.Rngs(0))))
    return unsharded_axes(state, config.num_key_value_heads, AbstractMesh(sizes, AXES))


@pytest.mark.parametrize("sizes", [(1, 1, 1, 1, 1), (2, 3, 4, 2, 1), (1, 1, 8, 8, 1)])
def test_nothing_is_said_where_all_is_cut(sizes):
    """The sizes of slice and data cut no weight."""
    assert notes(preset("qwen3-1.7b"), *sizes) == []


def test_key_value_heads_that_stay_whole():
    """Their projections are cut: 8 heads of 128."""
    assert notes(preset("qwen3-1.7b"), 1, 1, 1, 16, 1) == [
        "mesh.tensor (16) does not divide the 8 K/V heads: each device of that axis keeps all keys and "
        "values; 2, 4 or 8 would cut them"
    ]


def test_arrays_that_stay_whole():
    tiny = Qwen3Config(
        vocab_size=35, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=4,
    )  # fmt: skip
    vocab, embed = sorted(notes(tiny, 1, 1, 3, 2, 1), key=lambda note: "embed'" in note)
    assert vocab == (
        "mesh.tensor (2) does not divide the axis 'vocab' (35) of embed_tokens.weight, lm_head.weight: each "
        "device of that axis holds them whole; 5 would cut them"
    )
    assert embed.startswith("mesh.fsdp (3) does not divide the axis 'embed' (16) of embed_tokens.weight, ")
    assert embed.endswith(" more: each device of that axis holds them whole; 2 or 4 would cut them")


@pytest.mark.parametrize(
    ("size", "words"),
    [
        (6, r"not 6; use 8, or a mesh where these multiply to 1, 2, 3 or 6$"),
        (13, r"not 13; use 16, or a mesh where these multiply to 1 or 13$"),
    ],
)
def test_rows_that_the_mesh_cannot_cut(size, words):
    mesh = AbstractMesh((2, 1, 2, 3, 2), AXES)
    check_rows({"rollout.rows": (8, 16)}, mesh)
    with pytest.raises(
        InputError,
        match=r"^rollout\.rows must be a multiple of mesh slice x data x fsdp x expert = 8, " + words,
    ):
        check_rows({"rollout.rows": (8, size)}, mesh)
