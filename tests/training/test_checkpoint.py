"""What stays of checkpoints, and what happens to damaged ones and on a full disk."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from srrl_jax.errors import InputError
from srrl_jax.parallel import fingerprint
from srrl_jax.run.checkpoint import Checkpoints, Position
from srrl_jax.training.config import CheckpointConfig
from srrl_jax.training.update import TrainState


def state(seed: int) -> TrainState:
    w = np.random.default_rng(seed).normal(size=(64, 64)).astype(np.float32)
    return TrainState({"w": jnp.asarray(w)}, {"m": jnp.asarray(w, jnp.bfloat16), "count": jnp.int32(seed)})


def save(folder, scores: dict[int, float | None], **config) -> None:
    with Checkpoints(folder, CheckpointConfig(**config)) as checkpoints:
        for step, score in scores.items():
            metrics = {} if score is None else {"eval/self": score}
            checkpoints.save(Position(step, 7, 2 * step), state(step), metrics)


def steps(folder) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def test_the_newest_and_the_best_stay_over_a_restart(tmp_path):
    save(tmp_path, {1: 0.5, 2: 0.9, 3: None, 4: 0.1}, keep=1, best="eval/self")
    assert steps(tmp_path) == ["2", "4"]
    save(tmp_path, {5: None, 6: 0.3}, keep=1, best="eval/self")
    assert steps(tmp_path) == ["2", "6"]
    save(tmp_path, {7: 0.95}, keep=1, best="eval/self")
    assert steps(tmp_path) == ["7"]


def test_a_checkpoint_is_written_behind_the_back_of_the_run(tmp_path):
    """`save` returns before it is complete, and the arrays may then go."""
    large = {"w": jnp.asarray(np.random.default_rng(0).random(2**24, np.float32))}  # 64 MB
    expected = np.asarray(large["w"]).copy()
    with Checkpoints(tmp_path, CheckpointConfig()) as checkpoints:
        checkpoints.save(Position(1, 7, 2), TrainState(large, {}), {})
        assert "1" not in steps(tmp_path)
        large["w"].delete()
        checkpoints.wait()
        assert steps(tmp_path) == ["1"]
        _, found = checkpoints.restore(1, TrainState({"w": jnp.zeros(2**24)}, {}))
    np.testing.assert_array_equal(found.params["w"], expected)


def flip(files: list[Path]) -> None:
    """One bit, in the midst of the arrays; no reader notices by itself."""
    largest = max(files, key=lambda file: file.stat().st_size)
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 1
    largest.write_bytes(data)


def cut(files: list[Path]) -> None:
    largest = max(files, key=lambda file: file.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:100])


def lose_arrays(files: list[Path]) -> None:
    shutil.rmtree(next(parent for file in files for parent in file.parents if parent.name == "state"))


def lose_position(files: list[Path]) -> None:
    shutil.rmtree(next(parent for file in files for parent in file.parents if parent.name == "position"))


@pytest.mark.parametrize("damage", [flip, cut, lose_arrays, lose_position])
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_it_used(tmp_path, damage):
    save(tmp_path, {1: None, 2: None, 3: None}, keep=3)
    damage([file for file in (tmp_path / "checkpoints" / "3").rglob("*") if file.is_file()])
    with Checkpoints(tmp_path, CheckpointConfig(keep=3)) as checkpoints:
        position, found, (message,) = checkpoints.restore_latest(state(0))
        assert position == Position(2, 7, 4)
        jax.tree.map(np.testing.assert_array_equal, found, state(2))
        assert steps(tmp_path) == ["1", "2", "damaged-3"]
        for part in ("step 3", str(tmp_path / "checkpoints" / "damaged-3"), "from step 2"):
            assert part in message
        checkpoints.save(Position(3, 7, 6), state(3), {})
    with Checkpoints(tmp_path, CheckpointConfig(keep=3)) as checkpoints:
        position, found, messages = checkpoints.restore_latest(state(0))
        assert (position.step, messages) == (3, [])
        jax.tree.map(np.testing.assert_array_equal, found, state(3))


def test_where_none_can_be_read_all_stay_in_place(tmp_path):
    save(tmp_path, {1: None, 2: None})
    other = TrainState({"w": jnp.zeros((3, 3))}, state(0).opt_state)
    with Checkpoints(tmp_path, CheckpointConfig()) as checkpoints:
        with pytest.raises(InputError, match=r"no checkpoint can be read; of the newest, step 2: "):
            checkpoints.restore_latest(other)
    assert steps(tmp_path) == ["1", "2"]
    with Checkpoints(tmp_path / "new", CheckpointConfig()) as checkpoints:
        assert checkpoints.restore_latest(other) is None


def test_a_fingerprint_sees_any_bit_and_the_order():
    one = state(1)
    w = np.asarray(one.params["w"])
    swapped, flipped = w.copy(), w.copy()
    swapped[0, :2] = w[0, 1::-1]
    flipped.view(np.uint32)[63, 63] ^= 1 << 31
    same, *others = [
        int(fingerprint(one._replace(params={"w": jnp.asarray(x)}))) for x in (w, swapped, flipped)
    ]
    assert same == int(fingerprint(one)) and same not in others
    counted = one._replace(opt_state=one.opt_state | {"count": jnp.int32(2)})
    assert int(fingerprint(counted)) != same


def test_a_full_disk_ends_with_one_message_and_the_last_checkpoint_intact(tmp_path):
    """The system's limit of a file's size stands in for the disk: the same write calls fail."""
    child = """
import resource, signal, sys
sys.path.insert(0, sys.argv[2])
from test_checkpoint import *
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
folder = Path(sys.argv[1])
try:
    with Checkpoints(folder, CheckpointConfig(keep=1)) as checkpoints:
        checkpoints.save(Position(1, 7, 2), state(1), {})
        checkpoints.wait()
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        checkpoints.save(Position(2, 7, 4), state(2), {})
        checkpoints.save(Position(3, 7, 6), state(3), {})
except InputError as error:
    print(error)
"""
    result = subprocess.run(
        [sys.executable, "-c", child, str(tmp_path), str(Path(__file__).parent)],
        capture_output=True,
        text=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )
    assert result.returncode == 0, result.stderr
    (message,) = result.stdout.splitlines()
    assert "cannot write a checkpoint" in message and "File too large" in message
    assert "the last good checkpoint is that of step 1" in message
    with Checkpoints(tmp_path, CheckpointConfig(keep=1)) as checkpoints:
        position, found, messages = checkpoints.restore_latest(state(0))
    assert (position.step, messages) == (1, [])
    jax.tree.map(np.testing.assert_array_equal, found, state(1))
    save(tmp_path, {2: None}, keep=2)  # the run goes on over what was half written
    assert steps(tmp_path) == ["1", "2"]


def test_a_disk_that_is_too_small_is_seen_before_anything_is_written(tmp_path, monkeypatch):
    needed = sum(leaf.nbytes for leaf in jax.tree.leaves(state(1)))
    save(tmp_path, {1: None})
    with Checkpoints(tmp_path, CheckpointConfig()) as checkpoints:
        for free, step in ((needed, 2), (needed - 1, 3)):
            monkeypatch.setattr(
                shutil, "disk_usage", lambda _, free=free: shutil._ntuple_diskusage(0, 0, free)
            )
            if step == 2:
                checkpoints.save(Position(step, 7, 4), state(step), {})
                continue
            with pytest.raises(InputError, match=r"No space left on device.* checkpoint is that of step 2\."):
                checkpoints.save(Position(step, 7, 6), state(step), {})
    assert steps(tmp_path) == ["1", "2"]


def test_a_directory_that_cannot_be_made(tmp_path):
    (tmp_path / "checkpoints").write_text("")
    with pytest.raises(InputError, match=r"checkpoints: cannot write a checkpoint .*there is none yet"):
        Checkpoints(tmp_path, CheckpointConfig())
