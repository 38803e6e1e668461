"""What was compiled once, kept as JSON: JAX's own cache does not serve compilation for absent devices."""

import hashlib
import importlib.metadata
import importlib.util
import json
import os
from collections.abc import Callable
from pathlib import Path

import jax

import srrl_jax
from srrl_jax.planning.chips import Topology
from srrl_jax.planning.programs import Compiled
from srrl_jax.training.config import TrainConfig

# Rooms whose code makes the programs.
_ROOMS = ("models", "parallel", "sampling", "training", "planning", "losses.py")
_COMPILERS = ("libtpu", "jax_cuda12_plugin", "jax_cuda13_plugin")
# Keys of a recipe that no program depends on.
_APART = ("run_dir", "data", "seed", "steps", "checkpoint")


class Cache:
    """Results by recipe, topology, code and compiler; in `directory`, or nowhere with None."""

    def __init__(self, directory: Path | None):
        self.directory = directory

    @classmethod
    def default(cls) -> "Cache":
        """In the user's cache directory."""
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        return cls(Path(base) / "srrl_jax" / "plans")

    def get(
        self, name: str, config: TrainConfig, topology: Topology, make: Callable[[], list[Compiled]]
    ) -> list[Compiled]:
        """The programs of a group, compiled by `make` unless they have been."""
        if self.directory is None:
            return make()
        path = self.directory / f"{_key(name, config, topology)}.json"
        if path.exists():
            return [Compiled(**entry) for entry in json.loads(path.read_text())]
        found = make()
        self.directory.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}")
        part.write_text(json.dumps([compiled._asdict() for compiled in found]))
        part.replace(path)
        return found


def _key(name: str, config: TrainConfig, topology: Topology) -> str:
    recipe = {key: value for key, value in config.to_dict().items() if key not in _APART}
    digest = hashlib.sha256(json.dumps([name, recipe, str(topology), _compiler()], sort_keys=True).encode())
    for room in _ROOMS:
        root = Path(srrl_jax.__file__).parent / room
        for file in sorted(root.rglob("*.py")) if root.is_dir() else [root]:
            digest.update(file.read_bytes())
    return digest.hexdigest()[:32]


def _compiler() -> list[str]:
    found = (importlib.metadata.distribution(name) for name in _COMPILERS if importlib.util.find_spec(name))
    return [jax.__version__, *(f"{d.name} {d.version}" for d in found)]
