"""Whether sizes go with a mesh, said before anything is loaded."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from flax import nnx
from jax.sharding import Mesh

from srrl_jax.errors import InputError
from srrl_jax.parallel.mesh import RULES, divisors, listed, row_shards


def check_rows(rows: Mapping[str, Sequence[int]], mesh: Mesh) -> None:
    """Refuses numbers of rows, by the key that they come from, which the mesh cannot cut.

    Raises:
      InputError: names the key, the size and what would do.
    """
    cut = row_shards(mesh)
    for key, sizes in rows.items():
        for size in sizes:
            if size % cut:
                raise InputError(
                    f"{key} must be a multiple of mesh {' x '.join(RULES['batch'])} = {cut}, not {size}; "
                    f"use {-(-size // cut) * cut}, or a mesh where these multiply to {listed(divisors(size))}"
                )


def unsharded_axes(variables: Any, kv_heads: int, mesh: Mesh) -> list[str]:
    """Array axes that stay unsharded because a mesh axis does not divide their size.

    Args:
      variables: NNX variables with `axes` metadata; shapes are enough.
      kv_heads: of the network, which its K/V caches are cut by.
    Returns:
      A sentence for each mesh axis and size, which says what would do; none where all are cut.
    """
    arrays: dict[tuple[str, str, int], list[str]] = defaultdict(list)
    for path, variable in nnx.to_flat_state(variables):
        for axis, size in zip(variable.get_metadata()["axes"], variable.shape, strict=True):
            if RULES[axis] and size % mesh.shape[RULES[axis]]:
                arrays[RULES[axis], axis, size].append(".".join(map(str, path)))
    found = [
        f"mesh.{name} ({mesh.shape[name]}) does not divide the axis {axis!r} ({size}) of {_some(paths)}: "
        f"each device of that axis holds them whole; {_would_cut(size, mesh)}"
        for (name, axis, size), paths in arrays.items()
    ]
    tensor = RULES["kv_heads"]
    if kv_heads % mesh.shape[tensor]:
        found.append(
            f"mesh.{tensor} ({mesh.shape[tensor]}) does not divide the {kv_heads} K/V heads: each device of "
            f"that axis keeps all keys and values; {_would_cut(kv_heads, mesh)}"
        )
    return found


def _would_cut(size: int, mesh: Mesh) -> str:
    sizes = divisors(size, min(size, mesh.size))[1:]
    return f"{listed(sizes)} would cut them" if sizes else "no other size would cut them"


def _some(paths: list[str]) -> str:
    return ", ".join(paths[:2]) + (f" and {len(paths) - 2} more" if len(paths) > 2 else "")
