"""Published figures of accelerators."""

import dataclasses

import jax


@dataclasses.dataclass(frozen=True)
class Chip:
    """Peaks of one device.

    Attributes:
      flops: bfloat16 matrix products, FLOP/s.
      hbm: bytes that programs can have.
      bandwidth: of the HBM, bytes/s.
      links: to the other devices of a slice or a node, all links of a device together, one way, bytes/s.
      network: a device's part of the network between slices or nodes, one way, bytes/s.
    """

    flops: float
    hbm: int
    bandwidth: float
    links: float
    network: float


GIB = 2**30
CHIPS = {
    # cloud.google.com/tpu/docs/v5e, v5p, v6e: "Peak compute per chip (bf16)", "HBM bandwidth per chip",
    # "Interchip Interconnect BW" (Gbit/s, here / 8), "Data center network bandwidth" (Gbit/s, of a chip or of
    # a pod of 256, here / 8). HBM is what libtpu 0.0.42 leaves to programs. For v4 (docs/v4) libtpu compiles
    # for the two cores of a chip apart, so these are halves, and no network is published: that of a v5p.
    "v4": Chip(275e12 / 2, int(15.25 * GIB), 1228e9 / 2, 2400e9 / 8 / 2, 50e9 / 8 / 2),
    "v5e": Chip(197e12, int(15.75 * GIB), 819e9, 1600e9 / 8, 6.4e12 / 256 / 8),
    "v5p": Chip(459e12, int(95.74 * GIB), 2765e9, 4800e9 / 8, 50e9 / 8),
    "v6e": Chip(918e12, int(31.25 * GIB), 1640e9, 3584e9 / 8, 25.6e12 / 256 / 8),
    # NVIDIA H100 SXM data sheet: dense bf16, 80 GB, HBM3; NVLink 900 GB/s both ways. Between nodes of a
    # DGX H100: one 400 Gbit/s port a GPU.
    "h100": Chip(989e12, 80 * 10**9, 3350e9, 900e9 / 2, 400e9 / 8),
}
# What JAX calls them. Not v4: some runtimes show its chips as devices, some their cores.
_KINDS = {"TPU v5 lite": "v5e", "TPU v5": "v5p", "TPU v6 lite": "v6e", "NVIDIA H100 80GB HBM3": "h100"}


def chip_of(device: jax.Device) -> Chip | None:
    """The figures of a device; None where they are not known."""
    kind = _KINDS.get(device.device_kind)
    return CHIPS[kind] if kind else None
