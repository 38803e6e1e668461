"""Mesh, logical axes and placement."""

from srrl_jax.parallel.mesh import (
    MeshConfig,
    constrain,
    make_mesh,
    mesh_axes,
    place_batch,
    row_shards,
    shardings,
)

__all__ = ["MeshConfig", "constrain", "make_mesh", "mesh_axes", "place_batch", "row_shards", "shardings"]
