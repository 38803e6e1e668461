"""Where a run does not fit the memory of its devices, it says what did not, and keeps what was computed."""

import types
from functools import partial

import jax
import jax.numpy as jnp
import pytest

from srrl_jax.errors import InputError
from srrl_jax.evaluation.judge import Checkpoint
from srrl_jax.parallel import make_mesh
from srrl_jax.programs import Compiled, Program, compile_ahead, peak_bytes
from srrl_jax.run.session import Session
from srrl_jax.telemetry import read_jsonl
from srrl_jax.training.memory import fits
from srrl_jax.training.update import TrainState

REFUSAL = "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 51.00GiB.\nmore lines"


def refuse(*_, **__):
    raise jax.errors.JaxRuntimeError(REFUSAL)


@pytest.mark.parametrize(
    ("kind", "keys"),
    [
        ("rollout/decode", ("rollout.memory_gb", "rollout.max_new_tokens")),
        ("grade/enter", ("grading.memory_gb",)),
        ("update", ("optimizer.microbatch", "optimizer.remat=full", "optimizer.first_moment=bfloat16")),
        ("log-probabilities", ("optimizer.microbatch", "reference=host")),
    ],
)
def test_a_program_that_does_not_compile_for_lack_of_memory_is_named(kind, keys):
    program = Program(kind, "8 x 512", types.SimpleNamespace(lower=refuse), ())
    with pytest.raises(InputError) as error, fits("compile"):
        compile_ahead([program], make_mesh())
    message = str(error.value)
    told = "does not fit the memory of a device (Out of memory while trying to allocate 51.00GiB"
    assert message.startswith(f"{kind} 8 x 512: {told}")
    assert all(key in message for key in (*keys, "mesh")) and "\n" not in message


@pytest.mark.parametrize(
    ("part", "largest"), [("rollout", "rollout/decode 9"), ("eval", "grade/enter 4"), ("logprob", "log-prob")]
)
def test_the_largest_program_of_a_part_is_named(part, largest):
    sizes = {"rollout/decode 9": 9e9, "rollout/enter 1": 1e9, "grade/enter 4": 12e9, "log-prob": 5e9}
    sizes["log-probabilities"] = sizes.pop("log-prob")
    with pytest.raises(InputError, match=f"largest program, {largest}") as error:
        with fits(part, [Compiled(name, 1.0, int(size)) for name, size in sizes.items()]):
            refuse()
    assert "group_size" in str(error.value)


def test_a_device_that_refuses_is_told_of_with_what_helps():
    """By this device, and for real."""
    with pytest.raises(InputError, match=r"^update: .*memory allocating \d+ bytes\)\. Lower .*microbatch"):
        with fits("update"):
            jax.block_until_ready(jnp.zeros(2**50, jnp.uint8))


def test_temporaries_are_of_what_a_program_takes():
    many = jax.jit(lambda x: jnp.sort(jnp.outer(x, x).reshape(-1))[0])
    memory = many.lower(jax.ShapeDtypeStruct((1000,), jnp.float32)).compile().memory_analysis()
    assert peak_bytes(memory) >= 4 * 1000 * 1000


def test_other_errors_stay_what_they_are():
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"), fits("update"):
        raise jax.errors.JaxRuntimeError("INTERNAL: bug")


def judge_fails(disk: bool = False):
    raise InputError("51.00GiB of mistakes") from (OSError() if disk else None)


@pytest.mark.parametrize(
    ("part", "fail", "given_away", "kept"),
    [
        ("rollout", refuse, False, [1]),
        ("eval", refuse, True, []),
        ("grade", judge_fails, False, [1]),
        ("grade", partial(judge_fails, disk=True), False, []),
    ],
)
def test_steps_that_were_done_are_saved_where_their_state_is_there(
    recipe, tmp_path, part, fail, given_away, kept
):
    state = TrainState({"w": jnp.ones(3)}, {"m": jnp.zeros(3)})
    with pytest.raises(InputError, match=f"^{part}: does not fit" if fail is refuse else "mistakes"):
        with Session(recipe(tmp_path), [], {}) as session:
            session.resume(state)
            session.write(1, state, {"reward/mean": 0.5}, [])
            with session.phase(part):
                if given_away:
                    jax.tree.map(lambda x: x.delete(), state)
                fail()
    assert [int(path.name) for path in (tmp_path / "checkpoints").iterdir()] == kept
    (failed,) = [row for row in read_jsonl(tmp_path / "events.jsonl") if row["event"] == "failed"]
    assert "51.00GiB" in failed["message"]


def test_commands_name_their_own_options(monkeypatch):
    monkeypatch.setattr("srrl_jax.evaluation.judge.load_model", refuse)
    with pytest.raises(InputError, match="weights: does not fit .*51.00GiB.* --dtype bfloat16"):
        Checkpoint("srrl_jax/tinyworld/checkpoint")
