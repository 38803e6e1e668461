"""What a compiled program sends between devices, read off its text."""

import math
import re
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

from srrl_jax.planning.groups import Groups, between_slices, groups_of, share_outside

KINDS = (
    "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute",
    "collective-broadcast",
)  # fmt: skip

_BITS = {"pred": 8, "s4": 4, "u4": 4, "bf16": 16}
_ARRAY = re.compile(r"\b([a-z]+\d+\w*|pred)\[([\d,]*)\]")
_HEAD = re.compile(r"^(?:ENTRY )?%?([\w.-]+) .*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.-]+) = (.*?) ([a-z][\w-]*)\((.*)$")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_CONSTANT = re.compile(r"[su]32\[\]\S* constant\((\d+)\)")
# libtpu writes a reduce-scatter as a fusion of an all-reduce and of slices of its results.
_SCATTERING = re.compile(r"calls=%?(all-reduce-scatter[\w.-]*)")
_DEVICES = re.compile(r"num_partitions=(\d+)")


class Collective(NamedTuple):
    """One instruction.

    Attributes:
      kind: of `KINDS`.
      arrays: its result on a device, as the text has it: "bf16[1024,512]".
      groups: devices that take part together, by their place in the mesh; of a permute, those that send
        and receive.
      runs: how often it runs in one run of the program.
      loops: names of the while bodies around it, outermost first.
    """

    kind: str
    arrays: tuple[str, ...]
    groups: Groups
    runs: int
    loops: tuple[str, ...]

    @property
    def bytes(self) -> float:
        """That a device sends in one run of the instruction, by the ring algorithms."""
        size, group = sum(map(array_bytes, self.arrays)), len(self.groups[0])
        others = (group - 1) / group
        match self.kind:
            case "all-reduce":
                return 2 * size * others
            case "reduce-scatter":  # the result is one part of what is reduced
                return size * (group - 1)
            case "collective-permute":
                return size
        return size * others


def array_bytes(array: str) -> int:
    """Bytes of "bf16[1024,512]" without its padding in tiles."""
    kind, dims = _ARRAY.search(array).groups()
    bits = _BITS.get(kind) or int(re.search(r"\d+", kind)[0])
    return math.prod(int(d) for d in dims.split(",") if d) * bits // 8


def collectives(text: str) -> list[Collective]:
    """All collectives of a compiled program's text.

    A scan's body is written once but runs many times: what is in it counts as often. Where the text
    does not say how often a loop runs, it is the largest constant that its condition compares with,
    which for a loop that may end early is its limit. Of the branches of a condition the one that sends most
    counts.
    """
    bodies, entry = _computations(text)
    devices = int(found[1]) if (found := _DEVICES.search(text)) else 2
    everyone = (tuple(range(devices)),)

    def walk(name: str, runs: int, loops: tuple[str, ...]) -> list[Collective]:
        found = []
        for line in bodies.get(name, ()):
            match = _INSTRUCTION.match(line)
            if not match:
                continue
            _, result, operation, rest = match.groups()
            kind = operation.removesuffix("-start")
            if kind in KINDS:
                groups = groups_of(rest) or everyone
                found.append(Collective(kind, _results(result, operation), groups, runs, loops))
            elif operation == "recv" and (between := between_slices(rest, devices)):
                kind, groups = between
                found.append(Collective(kind, _results(result, operation)[:1], groups, runs, loops))
            elif operation == "while":
                called = dict(re.findall(r"(body|condition)=%?([\w.-]+)", rest))
                times = _trips(rest, bodies, called["condition"])
                found += walk(called["body"], runs * times, (*loops, called["body"]))
            elif operation == "conditional":
                branches = [walk(branch, runs, loops) for branch in _callees(rest)]
                found += max(branches, key=lambda sent: sum(c.bytes * c.runs for c in sent))
            elif operation == "fusion" and (sums := _SCATTERING.search(rest)):
                (summed,) = walk(sums[1], runs, loops)
                found.append(summed._replace(kind="reduce-scatter", arrays=_results(result, operation)))
            elif not operation.endswith("-done"):
                for callee in _callees(rest):
                    found += walk(callee, runs, loops)
        return found

    return walk(entry, 1, ())


def bytes_by_kind(found: list[Collective]) -> dict[str, float]:
    """Bytes that a device sends in one run of the program."""
    total: Counter[str] = Counter()
    for collective in found:
        total[collective.kind] += collective.bytes * collective.runs
    return {kind: float(size) for kind, size in total.items() if size}


def bytes_outside(found: list[Collective], ici_group_size: int) -> float:
    """Bytes that leave a group of devices connected by ICI or NVLink, see `share_outside`."""
    return float(sum(c.bytes * c.runs * share_outside(c.kind, c.groups, ici_group_size) for c in found))


def largest_array(text: str) -> str:
    """The largest result of an instruction, as the text has it."""
    arrays = {match[0] for line in text.splitlines() if " = " in line for match in _ARRAY.finditer(line)}
    return max(arrays, key=array_bytes, default="")


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    bodies: dict[str, list[str]] = {}
    name = entry = ""
    for line in text.splitlines():
        if head := _HEAD.match(line):
            name = head[1]
            bodies[name] = []
            entry = name if line.startswith("ENTRY") else entry
        elif name:
            bodies[name].append(line)
    return bodies, entry


def _callees(rest: str) -> Iterator[str]:
    yield from _CALLED.findall(rest)
    for names in _BRANCHES.findall(rest):
        yield from (name.strip().removeprefix("%") for name in names.split(","))


def _trips(rest: str, bodies: dict[str, list[str]], condition: str) -> int:
    if known := _TRIPS.search(rest):
        return int(known[1])
    constants, seen, left = [1], set(), [condition]
    while left:
        name = left.pop()
        if name in seen:
            continue
        seen.add(name)
        for line in bodies.get(name, ()):
            constants += map(int, _CONSTANT.findall(line))
            left += _callees(line)
    return max(constants)


def _results(result: str, operation: str) -> tuple[str, ...]:
    arrays = [match[0] for match in _ARRAY.finditer(result)]
    # The tuple of a started one holds its operands, then its results (a permute: and two counters).
    if operation.endswith("-start") and result.startswith("(") and operation != "all-reduce-start":
        arrays = [a for a in arrays if not a.endswith("[]")]
        arrays = arrays[len(arrays) // 2 :]
    return tuple(arrays)
