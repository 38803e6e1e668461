"""Mesh, logical axes, placement, and several processes."""

from srrl_jax.parallel.mesh import (
    MeshConfig,
    constrain,
    make_mesh,
    mesh_axes,
    place_batch,
    row_shards,
    shardings,
)
from srrl_jax.parallel.processes import gather, is_main, join, local_rows

__all__ = [
    "MeshConfig",
    "constrain",
    "gather",
    "is_main",
    "join",
    "local_rows",
    "make_mesh",
    "mesh_axes",
    "place_batch",
    "row_shards",
    "shardings",
]
