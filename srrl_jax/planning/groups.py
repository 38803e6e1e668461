"""Which devices take part in a collective, and what of it leaves a slice or a node."""

import math
import re

import numpy as np

# Devices that take part together, by their place in the mesh.
Groups = tuple[tuple[int, ...], ...]

_LISTED = re.compile(r"(?:replica_groups|source_target_pairs)=\{(\{[\d,{}\s]*\})\}")
_CONSECUTIVE = r"\[([\d,]+)\](?:T\(([\d,]+)\))?"
_IOTA = re.compile(r"replica_groups=\[([\d,]+)\]<=" + _CONSECUTIVE)
_MESH = re.compile(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(([^{]*)\))? \{([^}]*)\}")
_BETWEEN = re.compile(r'_xla_megascale_target="\{([\d,:]+)\}.*_xla_megascale_transfer_type="(\w+)"')
_AXIS = re.compile(r"'(\w+)'(?::\((\d+)\)(\d+))?")


def share_outside(kind: str, groups: Groups, ici_group_size: int) -> float:
    """Share of the bytes that a device sends in a collective which leaves its ICI or NVLink group.

    A ring through all such groups crosses each border once, and as many rings run side by side as the
    collective has members in a group: each sends only its part across. Of all-to-all it is what others get.

    Args:
      ici_group_size: number of consecutive devices that are connected, such as those of a slice.
    """
    shares = [0.0]
    for group in groups:
        members = np.bincount([device // ici_group_size for device in group])
        if np.count_nonzero(members) > 1:
            most = members.max()
            shares.append(1 - most / len(group) if kind.endswith("all-to-all") else 1 / most)
    return float(max(shares))


def groups_of(instruction: str) -> Groups:
    """As the text of a collective has them: listed, in an array of consecutive numbers, or as axes of a mesh;
    () where it names none, for all devices.
    """
    if iota := _IOTA.search(instruction):
        shape, *array = iota.groups()
        return _rows(_consecutive(*array).reshape(_numbers(shape)))
    if mesh := _MESH.search(instruction):
        return _along(*mesh.groups())
    if listed := _LISTED.search(instruction):
        return tuple(_numbers(group) for group in re.findall(r"\{([\d,]+)\}", listed[1]))
    return ()


def between_slices(instruction: str, devices: int) -> tuple[str, Groups] | None:
    """Kind and groups of a collective between slices, None where the text of a "recv" is of none.

    libtpu compiles for one slice of `devices`; to the others it has transfers by the host's network.
    """
    if not (found := _BETWEEN.search(instruction)):
        return None
    slices, kind = found.groups()
    count = 0
    for part in slices.split(","):  # "0,1", or "0:1" from the first to the last
        first, _, last = part.partition(":")
        count += int(last or first) - int(first) + 1
    ids = np.arange(count * devices).reshape(count, devices)
    return kind.lower().replace("_", "-"), _rows(ids.T)


def _along(mesh: str, devices: str | None, axes: str) -> Groups:
    """Along axes "'x','y':(2)4" of a mesh "'x'=2,'y'=8,'z'=2", of y by steps of 4 that follow 2 larger ones.

    `devices` are those of the mesh in its order: all, listed, or as "[2,2]T(1,0)".
    """
    sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", mesh)}
    parts = {name: (int(before or 1), int(size or sizes[name])) for name, before, size in _AXIS.findall(axes)}
    ids = np.arange(math.prod(sizes.values()))
    if devices:
        array = re.search(_CONSECUTIVE, devices)
        ids = _consecutive(*array.groups()) if array else np.array(_numbers(devices))
    shape, along = [], []
    for name, size in sizes.items():
        before, part = parts.get(name, (1, 1))
        shape += [before, part, size // (before * part)]
        along += [False, name in parts, False]
    group = math.prod(size for size, inside in zip(shape, along, strict=True) if inside)
    order = np.argsort(along, kind="stable")  # what is within a group comes last
    return _rows(ids.reshape(shape).transpose(order).reshape(-1, group))


def _consecutive(shape: str, order: str | None) -> np.ndarray:
    """0, 1, 2, ... in an array whose axes are then put into another order."""
    ids = np.arange(math.prod(_numbers(shape))).reshape(_numbers(shape))
    return ids.transpose(_numbers(order)) if order else ids


def _rows(ids: np.ndarray) -> Groups:
    return tuple(map(tuple, ids.tolist()))


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(",")))
