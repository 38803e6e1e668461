"""Programs before they run: jitted functions and the shapes of their arguments, compiled ahead in threads."""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from typing import Any, NamedTuple

import jax

from srrl_jax.errors import InputError


class Program(NamedTuple):
    """A jitted function and what it will be called with; once compiled, the call compiles nothing.

    Attributes:
      kind: what it does, in a word or two.
      sizes: what tells it from others of its kind, for people.
      args: trees of `jax.ShapeDtypeStruct`, placed as the arrays will be.
      static: static arguments by name.
    """

    kind: str
    sizes: str
    function: Any
    args: tuple
    static: dict[str, Any] = {}

    @property
    def name(self) -> str:
        return f"{self.kind} {self.sizes}".strip()

    def lower(self) -> jax.stages.Lowered:
        return self.function.lower(*self.args, **self.static)


class Compiled(NamedTuple):
    """What became of a program: `bytes` of arguments, results and temporaries on a device."""

    name: str
    seconds: float
    bytes: int


class DoesNotFit(InputError):
    """A device has too little memory.

    Attributes:
      what: took too much, such as a program's name.
      told: how much, in words.
    """

    def __init__(self, what: str, told: str, mend: str = ""):
        self.what, self.told = what, told
        super().__init__(f"{what}: does not fit the memory of a device ({told}). {mend}".strip())


@contextmanager
def fitting(what: str, mend: str = "") -> Iterator[None]:
    """Raises `DoesNotFit` for a compiler's or a device's own error of that kind."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        words = str(error).partition("RESOURCE_EXHAUSTED: ")[2]
        if not words:
            raise
        limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
        has = f"; it has {limit / 1e9:.1f} GB" if limit else ""
        raise DoesNotFit(what, f"{words.splitlines()[0][:300].rstrip('.')}{has}", mend) from error


def shapes_of(tree: Any) -> Any:
    """The shapes, types and placements of a tree of arrays; what is a shape already stays."""

    def shape(x):
        if isinstance(x, jax.ShapeDtypeStruct):
            return x
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, "sharding", None))

    return jax.tree.map(shape, tree)


def placed(shapes: Any, places: Any) -> Any:
    """Shapes with the placements of a tree that may be coarser; None leaves them as they are."""
    if places is None:
        return shapes

    def put(place, part):
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), part)

    return jax.tree.map(put, places, shapes)


def peak_bytes(memory: Any) -> int:
    """Most bytes of a device in use, of a compiled program's `memory_analysis`.

    A CPU's compiler knows no peak, or gives one without temporaries: there it is all that it lays out.
    """
    temporaries = memory.temp_size_in_bytes
    parts = memory.argument_size_in_bytes + memory.output_size_in_bytes + temporaries
    known = memory.peak_memory_in_bytes
    return int(known if known > temporaries else parts - memory.alias_size_in_bytes)


def compile_ahead(
    programs: Sequence[Program],
    mesh: jax.sharding.Mesh,
    on_compiled: Callable[[Compiled, int], None] = lambda compiled, total: None,
) -> list[Compiled]:
    """Compiles all of them, as many at a time as there are cores; they stay in JAX's caches.

    Args:
      on_compiled: told each that is done, and how many there are.
    Raises:
      DoesNotFit: by the name of the program.
      The compiler's other errors.
    """

    def compile_one(program: Program) -> Compiled:
        start = time.perf_counter()
        with fitting(program.name), jax.set_mesh(mesh):  # which is of each thread
            memory = program.lower().compile().memory_analysis()
        return Compiled(program.name, time.perf_counter() - start, peak_bytes(memory))

    with ThreadPoolExecutor(min(len(programs) or 1, os.cpu_count() or 1)) as pool:
        futures = [pool.submit(compile_one, program) for program in programs]
        for future in as_completed(futures):
            on_compiled(future.result(), len(programs))
        return [future.result() for future in futures]
