"""What the compiled programs of a small model on a small slice send and keep."""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import pytest

from srrl_jax.cli import TPU_FLAGS
from srrl_jax.models.config import MoEConfig
from srrl_jax.models.moe import mix_experts
from srrl_jax.planning import programs
from srrl_jax.planning.collectives import array_bytes, collectives
from srrl_jax.planning.plan import model_config
from srrl_jax.planning.programs import Compiler, Setup

pytestmark = pytest.mark.usefixtures("uncached")


def compiled(setup: Setup, group: str) -> Compiler:
    """What the compiler makes of a group of programs."""
    compiler = Compiler(group)
    with jax.set_mesh(setup.mesh):
        for program, held in setup.programs(group).values():
            compiler(program, held)
    return compiler


@pytest.fixture(scope="module")
def rollout(setup):
    return compiled(setup, "rollout")


def test_the_programs_of_a_rollout(rollout):
    names = [compiled.name.removeprefix("rollout/") for compiled in rollout.found]
    assert names == ["relayout", "empty caches", "prefill", "decode"]
    assert all(found.peak_bytes > found.held_bytes > 0 for found in rollout.found)


def gathered_in_decoding(compiler: Compiler) -> int:
    """Bytes of the largest array that the loop of decoding sends, other than sums of all devices."""
    found = collectives(compiler.texts["rollout/decode"])
    inside = [c for c in found if c.loops and c.kind != "all-reduce"]
    return max(sum(map(array_bytes, c.arrays)) for c in inside)


def test_no_weights_are_gathered_while_decoding(rollout, setup):
    """Layout of rollouts: fsdp cuts no weight, so what is gathered in the loop are a few numbers a slot."""
    smallest = min(math.prod(x.shape) * 4 for x in jax.tree.leaves(setup.params) if x.ndim == 3) // 16
    assert gathered_in_decoding(rollout) < smallest
    found = collectives(rollout.texts["rollout/decode"])
    assert any(c.loops and c.kind == "all-reduce" for c in found), "tensor parallelism sums in the loop"
    moved = collectives(rollout.texts["rollout/relayout"])
    assert sum(c.bytes for c in moved if c.kind == "all-gather") > smallest, "they are gathered before it"


@pytest.mark.slow
def test_no_weights_of_experts_are_gathered_while_decoding(planned, v6e, make_setup):
    """The slots of an `expert` group are."""
    config = planned("mesh.fsdp=2", "mesh.tensor=1", "mesh.expert=2")
    setup = make_setup(config, v6e.devices(), with_experts(config))
    slots = setup.rollout.shapes.slots
    assert gathered_in_decoding(compiled(setup, "rollout")) == slots // 2 * setup.model.config.hidden_size * 4


def with_experts(config):
    """Two layers of four experts, as wide as the recipe's model."""
    experts = MoEConfig(4, 2, moe_intermediate_size=64)
    return dataclasses.replace(model_config(config.model), num_hidden_layers=2, moe=experts)


def test_weights_move_into_the_place_of_those_before(setup):
    """Where frozen weights grade: the re-layout's results lie in what is donated, as training's stay."""
    compiler = Compiler("grade")
    with jax.set_mesh(setup.mesh):
        made = compiler(setup.grading.relayout(setup.params, replaces=True))
    assert compiler.texts["grade/relayout"].count("may-alias") == len(jax.tree.leaves(made))
    facts = [jax.tree.map(lambda x: (x.shape, x.dtype), tree) for tree in (made, setup.grading.decoding)]
    assert facts[0] == facts[1]


def test_no_device_holds_the_cache_of_another(rollout, setup):
    slots, heads = 8 * 4, setup.model.config.num_key_value_heads
    layers, tokens = setup.model.config.num_hidden_layers, setup.rollout.shapes.pack
    shards = setup.rollout.shards
    for name in ("decode", "prefill"):
        assert f"[{layers},{slots // 2},{heads // 2},32," in rollout.texts[f"rollout/{name}"]
        assert f"{slots},{heads}," not in rollout.texts[f"rollout/{name}"]
    text = rollout.texts["rollout/prefill"]
    own = layers * shards // 2 * tokens * heads // 2 * setup.model.config.head_dim
    assert {size(array) for array in re.findall(rf"\[{layers},[\d,]*\b{tokens}\b[\d,]*", text)} == {own}


@pytest.fixture(scope="module")
def updating(setup):
    """The compiler, and what the update gives back."""
    compiler = Compiler("update")
    with jax.set_mesh(setup.mesh):
        params, opt_state, _ = compiler(setup.programs("update")["update"][0])
    return compiler, (params, opt_state)


def size(array: str) -> int:
    """Numbers in "bf16[1024,512]"."""
    return math.prod(map(int, re.findall(r"\d+", array.partition("[")[2])))


@pytest.mark.slow
def test_an_update_gives_back_what_it_took(setup, updating):
    """Else the second update would compile again, and nothing would be donated."""
    same = jax.tree.map(
        lambda a, b: a.sharding.is_equivalent_to(b.sharding, len(a.shape)), updating[1],
        (setup.learnt, setup.opt_state),
    )  # fmt: skip
    assert all(jax.tree.leaves(same))


def pieces(setup, rows: int, tokens: int) -> tuple[int, int, int]:
    """Numbers in activations: of all rows; of a device's rows; of these the tokens it has between layers."""
    whole = rows * tokens * setup.model.config.hidden_size
    own = whole // math.prod(setup.mesh.shape[axis] for axis in ("data", "fsdp"))
    return whole, own, own // setup.mesh.shape["tensor"]


@pytest.fixture(scope="module")
def batches(setup):
    """Rows and tokens of what a prefill and an update compute."""
    rollout, update = setup.rollout, setup.shapes
    branches = setup.config.group_size * update.completions[-1]
    updated = [(update.microbatch, tokens) for tokens in (update.prompt, branches)]
    return {"rollout/prefill": [(rollout.shards, rollout.shapes.pack)], "update/update": updated}


def test_weights_are_gathered_a_layer_at_a_time_and_activations_of_own_rows_alone(
    rollout, updating, setup, batches
):
    """A row's activations stay on the devices that have the row."""
    layer = [x.shape[1:] if x.ndim == 3 else x.shape for x in jax.tree.leaves(setup.params) if x.ndim > 1]
    weights = {math.prod(shape) // setup.mesh.shape["tensor"] for shape in layer}
    weights |= {shape[-1] for shape in layer}  # norms
    texts = rollout.texts | updating[0].texts
    for name, sizes in batches.items():
        of_all, own, _ = (set(each) for each in zip(*(pieces(setup, *size) for size in sizes), strict=True))
        assert not weights & (of_all | own)
        found = [c for c in collectives(texts[name]) if c.kind == "all-gather"]
        gathered = {size(a) for c in found for a in c.arrays}
        assert gathered <= weights | own and len(gathered & weights) > 2


def test_a_layer_is_summed_twice_each_way_and_handed_on_in_pieces(rollout, updating, setup, batches):
    """After attention and after the MLP, for prefixes and for branches, each device of `tensor` gets the
    sum of its tokens; before them it gathers all. Nothing is summed whole."""
    layers, texts = setup.model.config.num_hidden_layers, rollout.texts | updating[0].texts
    for name, sizes in batches.items():
        update = name == "update/update"
        runs = layers * setup.microbatches if update else layers
        found = [c for c in collectives(texts[name]) if c.runs == runs]
        for rows, tokens in sizes:
            _, own, piece = pieces(setup, rows, tokens)

            def count(kind, numbers, found=found):
                return sum(size(a) == numbers for c in found if c.kind == kind for a in c.arrays)

            each_way = 4 if update else 2
            assert count("reduce-scatter", piece) == count("all-gather", own) == each_way
            assert count("all-reduce", own) == 0


@pytest.mark.slow
def test_what_the_backward_pass_keeps_is_in_pieces(planned, v6e, make_setup):
    """With full remat, of each layer its input."""
    setup = make_setup(planned("optimizer.remat=full"), v6e.devices(), prompt=128)
    layers, hidden = setup.model.config.num_hidden_layers, setup.model.config.hidden_size
    text = compiled(setup, "update").texts["update/update"]
    found = set(re.findall(rf"\[{layers},[\d,]+,{hidden}\]", text))
    kept = {math.prod(map(int, x[1:-1].split(","))) // layers for x in found}
    for tokens in (setup.shapes.prompt, setup.config.group_size * setup.shapes.completions[-1]):
        _, own, piece = pieces(setup, setup.shapes.microbatch, tokens)
        assert piece in kept and own not in kept


@pytest.mark.slow
@pytest.mark.parametrize(("fsdp", "tensor", "least"), [(4, 1, 12), (1, 4, 6)])
def test_what_is_gathered_is_on_its_way_while_others_are_multiplied(
    planned, v6e, make_setup, monkeypatch, fsdp, tensor, least
):
    """With the flags of `srrl`, at the effort of a run: parts of a gathering, of weights or of activations,
    are fused with products. What is summed is cut while it is summed."""
    config = planned(
        f"mesh.fsdp={fsdp}", f"mesh.tensor={tensor}", "dtype=bfloat16", "rollout.max_new_tokens=64"
    )
    wide = dataclasses.replace(
        model_config(config.model), hidden_size=1024, intermediate_size=3072, num_attention_heads=8,
        num_key_value_heads=8, head_dim=128, num_hidden_layers=2,
    )  # fmt: skip
    options = dict(flag.removeprefix("--").split("=") for flag in TPU_FLAGS.split())
    monkeypatch.setattr(programs, "_options", lambda: options)
    setup = make_setup(config, v6e.devices(), wide, prompt=64)
    compiler = compiled(setup, "update")
    text = compiler.texts["update/update"]
    both = [body for body in text.split("\n}") if body.lstrip().startswith("%async_collective_fusion")]
    assert len(both) >= least and all(" all-gather(" in b and " convolution(" in b for b in both)
    found = [c for c in collectives(text) if max(map(size, c.arrays)) > 1024 * 3]  # norms are less
    in_layers = [c for c in found if c.runs == wide.num_hidden_layers * setup.microbatches]
    assert {c.kind for c in in_layers} == {"all-gather", "reduce-scatter"}
    if tensor == 1:  # else the head sums gradients of whole states, a chunk of its vocabulary on each device
        large = [c for c in found if max(map(size, c.arrays)) >= 1024 * 256]
        assert {c.kind for c in large} == {"all-gather", "reduce-scatter"}


@pytest.mark.slow
def test_experts_gather_tokens_and_sum_them_in_pieces(planned, v6e, make_setup):
    """Over `expert` and `tensor` at once, forward and backward."""
    config = planned("mesh.fsdp=1", "mesh.tensor=2", "mesh.expert=2")
    sizes = with_experts(config)
    setup = make_setup(config, v6e.devices(), sizes, prompt=320)
    compiler = compiled(setup, "update")
    found = collectives(compiler.texts["update/update"])
    in_layers = [c for c in found if c.runs == sizes.num_hidden_layers * setup.microbatches]
    for tokens in (setup.shapes.prompt, config.group_size * setup.shapes.completions[-1]):
        whole = config.optimizer.microbatch * tokens * sizes.hidden_size
        gathered = [c for c in in_layers for a in c.arrays if size(a) == whole]
        scattered = [c for c in in_layers for a in c.arrays if size(a) == whole // 4]
        scattered = [c for c in scattered if len(c.groups[0]) == 4]
        assert [c.kind for c in gathered] == ["all-gather"] * 2
        assert [c.kind for c in scattered] == ["reduce-scatter"] * 2


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(4, 1, 1), (2, 1, 2), (1, 1, 4)])
def test_nothing_is_scattered_over_one_device(planned, v6e, make_setup, sizes):
    """libtpu aborts on that, without a message: here no axis is cut over `fsdp`."""
    config = planned(*(f"mesh.{axis}={n}" for axis, n in zip(("data", "fsdp", "tensor"), sizes, strict=True)))
    compiler = compiled(make_setup(config, v6e.devices()), "update")
    scattered = [c for c in collectives(compiler.texts["update/update"]) if c.kind == "reduce-scatter"]
    assert all(len(group) > 1 for c in scattered for group in c.groups)


@pytest.mark.slow
def test_gradients_of_experts_take_no_more_work_for_more_experts(v6e):
    """XLA's own gradient by the matrices multiplies every row for every expert (`kernels/ragged.py`)."""
    rows, hidden, inner, experts = 4096, 256, 512, 16
    place = jax.sharding.SingleDeviceSharding(v6e.devices()[0])

    def shaped(*shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

    def loss(x, matrices, chosen):
        return mix_experts(x, jnp.ones((rows, 1), x.dtype), chosen, *matrices).astype(jnp.float32).sum()

    up, down = (experts, inner, hidden), (experts, hidden, inner)
    matrices = [shaped(*up), shaped(*up), shaped(*down)]
    given = shaped(rows, hidden), matrices, shaped(rows, 1, dtype=jnp.int32)
    compiled = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(*given).compile()
    product = 2 * rows * hidden * inner
    # Two forward (the sum needs no third), three by the rows; by the matrices a tile of rows, counted once.
    assert 5 * product < compiled.cost_analysis()["flops"] < 6 * product
