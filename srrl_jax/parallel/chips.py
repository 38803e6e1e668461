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
    # NVIDIA's Ada architecture paper: dense bf16 summed in float32, 24 GB, GDDR6X; PCIe 4 x 16, one way.
    # Between nodes: 10 Gbit/s Ethernet, as such machines have it.
    "rtx4090": Chip(165e12, 24 * 10**9, 1008e9, 32e9, 10e9 / 8),
}
# Dense bfloat16 peaks by what JAX calls a device, FLOP/s. Not v4: some runtimes show its chips as devices,
# some their cores. GPUs by NVIDIA's data sheets, products summed in float32.
_PEAKS = {
    "TPU v5 lite": CHIPS["v5e"].flops,
    "TPU v5": CHIPS["v5p"].flops,
    "TPU v6 lite": CHIPS["v6e"].flops,
    **dict.fromkeys(("NVIDIA A100-SXM4-40GB", "NVIDIA A100-SXM4-80GB"), 312e12),
    **dict.fromkeys(("NVIDIA A100-PCIE-40GB", "NVIDIA A100 80GB PCIe"), 312e12),
    **dict.fromkeys(("NVIDIA H100 80GB HBM3", "NVIDIA H200"), CHIPS["h100"].flops),
    "NVIDIA B200": 2250e12,
    "NVIDIA L4": 121e12,
    "NVIDIA GeForce RTX 4090": CHIPS["rtx4090"].flops,
}


def peak_flops(device: jax.Device) -> float | None:
    """Of a device, in bfloat16; None where it is not known."""
    return _PEAKS.get(device.device_kind)
