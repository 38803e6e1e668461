"""Slices and clusters of accelerators, by name."""

import dataclasses
import importlib.util
import math
import os
import re
from pathlib import Path
from typing import Self

import jax

from srrl_jax.errors import InputError
from srrl_jax.parallel.chips import CHIPS, Chip

_CUDA_PLUGINS = ("jax_cuda12_plugin", "jax_cuda13_plugin")
_GPUS = ("h100", "rtx4090")  # of each a file beside this one: what XLA wants to know of it
JAX_SHARE = 0.75  # of a GPU's memory, that JAX takes for programs unless told otherwise


@dataclasses.dataclass(frozen=True)
class Topology:
    """A slice: `kind` a chip or "cpu", `shape` its grid, such as (4, 4, 4); GPUs: (nodes, of a node)."""

    kind: str
    shape: tuple[int, ...]
    slices: int = 1

    @classmethod
    def parse(cls, text: str, slices: int = 1) -> Self:
        """Reads "v5p:4x4x4", "h100:4x8" or "cpu:8".

        Raises:
          InputError: the form or the chip is not known.
        """
        match = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)", text)
        if not match or match[1] not in (*CHIPS, "cpu"):
            raise InputError(
                f"--topology {text}: not a slice; write CHIP:SHAPE with a chip of {', '.join(CHIPS)}, as "
                "v5p:4x4x4 or h100:4x8, or cpu:8 for virtual devices"
            )
        if slices < 1:
            raise InputError(f"--slices: must be at least 1, not {slices}")
        return cls(match[1], tuple(map(int, match[2].split("x"))), slices)

    def __str__(self) -> str:
        name = f"{self.kind}:{'x'.join(map(str, self.shape))}"
        return name if self.slices == 1 else f"{self.slices} x {name}"

    @property
    def compiles(self) -> bool:
        """Whether the compiler for it is here: for GPUs JAX's CUDA plugin."""
        return self.kind not in _GPUS or any(importlib.util.find_spec(name) for name in _CUDA_PLUGINS)

    @property
    def chips(self) -> int:
        """Of all slices."""
        return math.prod(self.shape) * self.slices

    @property
    def size(self) -> int:
        """Devices of all slices."""
        return self.chips * (2 if self.kind == "v4" else 1)

    @property
    def ici_group_size(self) -> int:
        """Number of consecutive devices connected by ICI (a TPU slice) or NVLink (a GPU node)."""
        return self.shape[-1] if self.kind in _GPUS else self.size // self.slices

    @property
    def chip(self) -> Chip:
        """Nothing is published of a CPU: one core as measured, its share of the memory, links as guessed."""
        if self.kind == "cpu":
            memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
            return Chip(80e9, memory // self.size, 15e9, 5e9, 1e9)
        chip = CHIPS[self.kind]
        if self.kind in _GPUS:
            share = float(os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION", JAX_SHARE))
            chip = dataclasses.replace(chip, hbm=int(share * chip.hbm))
        return chip

    def devices(self) -> list:
        """Devices to compile for. Nothing may have asked JAX for devices in this process before a "cpu".

        Raises:
          InputError: the compiler is not installed, or does not know the shape.
        """
        if self.kind == "cpu":
            return _virtual(self.size)
        if not self.compiles:
            raise InputError("srrl plan for a GPU needs JAX's CUDA plugin: pip install 'srrl-jax[plan-gpu]'")
        if self.kind in _GPUS:
            nodes, described = self.size // self.ici_group_size, Path(__file__).with_name(f"{self.kind}.txt")
            options = {"target_config": described.read_text(), "topology": f"1x{nodes}x{self.ici_group_size}"}
            return self._described("cuda", "", options)
        if importlib.util.find_spec("libtpu") is None:
            raise InputError("srrl plan for a TPU needs libtpu: pip install 'srrl-jax[aot]'")
        # libtpu would ask the metadata server of a TPU VM what it is, and lock the chips.
        os.environ.update(TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1")
        options = {"num_slices": self.slices} if self.slices > 1 else {}
        return self._described("tpu", f"{self.kind}:{'x'.join(map(str, self.shape))}", options)

    def _described(self, platform: str, name: str, options: dict) -> list:
        from jax.experimental import topologies

        try:
            return topologies.get_topology_desc(name, platform, **options).devices
        except (jax.errors.JaxRuntimeError, NotImplementedError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise InputError(f"--topology {self}: the compiler for {platform} refuses it: {reason}") from None


def _virtual(count: int) -> list:
    try:
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError:  # the devices are there already
        pass
    devices = jax.devices("cpu")
    if len(devices) < count:
        raise InputError(f"--topology cpu:{count}: JAX has started with {len(devices)} devices")
    return devices[:count]
