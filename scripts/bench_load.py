"""Host memory and speed of loading a checkpoint. Prints one JSON line.

    python scripts/bench_load.py [--dtype bfloat16]

Writes Qwen3-1.7B with an untied head, bfloat16, 4.06 GB of random weights in files of 1 GB, to a
temporary folder, and loads it in a process of its own. On CPU the loaded arrays are host memory too, so
`above_arrays_mb` is the peak of resident memory less what was resident before and less the arrays. The
bound is the largest tensor (as loaded) and 256 MB. The files are warm in the page cache.
"""

import argparse
import dataclasses
import json
import math
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
from benchlib import report
from flax import nnx

from srrl_jax.checkpoints import load_model, safetensors
from srrl_jax.checkpoints.loading import abstract
from srrl_jax.checkpoints.names import tensor_names
from srrl_jax.checkpoints.saving import split
from srrl_jax.models.presets import preset


def generate(folder: Path) -> None:
    config = dataclasses.replace(preset("qwen3-1.7b"), tie_word_embeddings=False)
    shapes = {
        name: variable.shape[len(index) :]
        for path, variable in nnx.to_flat_state(nnx.state(abstract(config)))
        for name, index in tensor_names(path, config).items()
    }
    files, random = split(shapes, 2, 10**9), np.random.default_rng(0)
    for file, names in files.items():
        # The lower half of the positive bfloat16 numbers: those below 1.
        tensors = (random.integers(0, 0x3F80, shapes[name], np.uint16).view("bfloat16") for name in names)
        safetensors.write(folder / file, {name: shapes[name] for name in names}, "bfloat16", tensors)
    index = {"weight_map": {name: file for file, names in files.items() for name in names}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(config.to_hf()))


def resident(field: str) -> int:
    """Bytes of VmRSS (now) or VmHWM (the most so far) of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def load(folder: Path, dtype: str) -> None:
    jax.block_until_ready(jax.numpy.zeros(1))  # the backend is up
    before, start = resident("VmRSS"), time.perf_counter()
    model = load_model(folder, dtype=dtype)
    arrays = jax.block_until_ready(jax.tree.leaves(nnx.state(model)))
    seconds, above = time.perf_counter() - start, resident("VmHWM") - before - sum(x.nbytes for x in arrays)
    largest = model.head.nbytes
    report(
        "srrl_load",
        above_arrays_mb=above / 1e6,
        bound_mb=largest / 1e6 + 256,
        largest_tensor_mb=largest / 1e6,
        s=seconds,
        gb_s=sum(math.prod(x.shape) for x in arrays) * 2 / 1e9 / seconds,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"], help="of the arrays")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)  # the second process
    args = parser.parse_args()
    if args.folder:
        load(args.folder, args.dtype)
        return
    with tempfile.TemporaryDirectory() as folder:
        generate(Path(folder))
        command = [sys.executable, __file__, "--dtype", args.dtype, "--folder", folder]
        subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
