"""Loading and saving on a mesh of eight devices that several processes hold."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from flax import nnx

from srrl_jax.checkpoints import save_model

WORLD = Path(__file__).resolve().parents[2] / "srrl_jax/tinyworld/checkpoint"


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 8])
def test_each_process_reads_its_own_and_saves_what_one_device_saves(tiny, tmp_path, processes):
    """Eight devices, fsdp 8: with eight processes each reads an eighth."""
    source, out = tmp_path / "source", tmp_path / "out"
    model = tiny(hidden_size=64, tie_word_embeddings=True)
    save_model(model, source, tokenizer=WORLD)
    save_model(model, tmp_path / "alone", tokenizer=WORLD, max_shard_size=50_000)

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = Path(__file__).with_name("weights_processes.py")
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(sys.path)}
    running = [
        subprocess.Popen(
            [sys.executable, script, *map(str, (process, processes, port, source, out))],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for process in range(processes)
    ]
    try:
        results = [process.communicate(timeout=600) for process in running]
    finally:
        for process in running:
            process.kill()
    assert [process.returncode for process in running] == [0] * processes, results

    whole = sum(x.nbytes for x in jax.tree.leaves(nnx.state(model)))
    for stdout, _ in results:
        # Beside its share a process reads the norms of q and k, which the mesh does not cut.
        assert whole / processes <= int(stdout.splitlines()[-1]) <= whole / processes + 1024
    expected = {file.name: file.read_bytes() for file in (tmp_path / "alone").iterdir()}
    assert {file.name: file.read_bytes() for file in out.iterdir()} == expected
    assert sum(name.endswith(".safetensors") for name in expected) > 2
