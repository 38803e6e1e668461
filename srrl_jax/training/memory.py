"""What to do where a part of a run does not fit the memory of its devices."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from srrl_jax.programs import Compiled, DoesNotFit, fitting

_ROLLOUT = (
    "rollout.memory_gb, rollout.max_new_tokens or group_size, or set rollout.int8=weights_kv, "
    "reference=host or optimizer.moments=host"
)
_GRADE = (
    "grading.memory_gb or grading.max_new_tokens, or set grading.int8=weights_kv, reference=host or "
    "optimizer.moments=host"
)
_UPDATE = "optimizer.microbatch, group_size or rollout.max_new_tokens, or set optimizer.remat=full"
_LEARNT = "optimizer.first_moment=bfloat16 or lora.rank"
# What helps, by what a program's name begins with or by the part of a run.
_LOWER = {
    "rollout": _ROLLOUT,
    "grade": _GRADE,
    "eval": f"{_ROLLOUT}; {_GRADE}",
    "update": f"{_UPDATE}, {_LEARNT}",
    "log-probabilities": f"{_UPDATE}, reference=host",
    "weights": f"what the weights and AdamW's moments take: set {_LEARNT}",
}
_RUNS = {"eval": ("rollout/", "grade/"), "logprob": ("log-probabilities",)}


@contextmanager
def fits(part: str, compiled: Sequence[Compiled] = ()) -> Iterator[None]:
    """Tells of a part of a run that does not fit: what it is, how much it asked for, and which keys help.

    Args:
      part: "weights", or a phase of a step.
      compiled: the programs of the run, of which the largest of the part is named.
    Raises:
      DoesNotFit: where a compiler or a device has refused for lack of memory.
    """
    try:
        with fitting(part):
            yield
    except DoesNotFit as error:
        begins = _RUNS.get(part, (part,))
        mine = [program for program in compiled if program.name.startswith(begins)]
        largest = max(mine, key=lambda program: program.bytes, default=None)
        size = f"; its largest program, {largest.name}, takes {largest.bytes / 1e9:.1f} GB" if largest else ""
        kind = (error.what if part == "compile" else begins[0] if part == "logprob" else part).split("/")[0]
        lower = _LOWER.get(kind.split(" ")[0], _LOWER["weights"])
        raise DoesNotFit(
            error.what, f"{error.told}{size}", f"Lower {lower}; or spread it over more devices (mesh)"
        ) from error
