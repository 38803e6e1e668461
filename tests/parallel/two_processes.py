"""Run twice by test_processes.py, with two virtual devices each; prints what it saw as JSON.

Usage: python two_processes.py COORDINATOR PROCESS
"""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np

from srrl_jax.parallel import (
    MeshConfig,
    gather,
    is_main,
    join,
    local_rows,
    make_mesh,
    place_batch,
    replicate,
    to_host,
)

join(sys.argv[1], 2, int(sys.argv[2]))
mesh = make_mesh(MeshConfig())
shared = make_mesh(MeshConfig(fsdp=1, tensor=4))
batch = place_batch(np.arange(8.0), mesh)
jax.set_mesh(mesh)
mine = {"process": jax.process_index(), "third": 1 / 3, "text": "é" * 700 * (1 + jax.process_index())}
print(
    json.dumps(
        {
            "devices": [jax.local_device_count(), jax.device_count()],
            "main": is_main(),
            "rows": [local_rows(8, mesh), local_rows(8, shared)],
            "local": [shard.data.tolist() for shard in batch.addressable_shards],
            "whole": [to_host(x).tolist() for x in (batch, replicate(np.arange(3), mesh))],
            "sum": float(jax.jit(jnp.sum)(batch)),
            "gathered": gather(mine),
        }
    )
)
