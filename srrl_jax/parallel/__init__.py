"""Mesh, logical axes, placement, and several processes."""

from srrl_jax.parallel.fingerprint import fingerprint
from srrl_jax.parallel.mesh import (
    ROLLOUT_RULES,
    MeshConfig,
    batch_sharding,
    computing,
    constrain,
    in_memory,
    make_mesh,
    mesh_axes,
    place_batch,
    platform,
    replicate,
    rollout_layout,
    row_shards,
    shardings,
    train_layout,
)
from srrl_jax.parallel.processes import abort_all_on_error, gather, is_main, join, local_rows, to_host
from srrl_jax.parallel.sizes import check_rows, unsharded_axes

__all__ = [
    "ROLLOUT_RULES",
    "MeshConfig",
    "batch_sharding",
    "check_rows",
    "computing",
    "constrain",
    "abort_all_on_error",
    "fingerprint",
    "gather",
    "in_memory",
    "is_main",
    "join",
    "unsharded_axes",
    "local_rows",
    "make_mesh",
    "mesh_axes",
    "place_batch",
    "platform",
    "replicate",
    "rollout_layout",
    "row_shards",
    "shardings",
    "to_host",
    "train_layout",
]
