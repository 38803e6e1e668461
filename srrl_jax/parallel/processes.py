"""Several processes, one program: how they find each other, what their hosts share, how they end.

Every process runs every program, so all must take the same decisions in the same order. They do
because each takes all of them, from the same numbers: `to_host` gives every process the whole of what
the devices sampled. Nothing is decided in one place and sent, but SIGTERM (`Preemption.check`).
"""

import importlib.util
import json
import os
import re
import sys
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from srrl_jax.errors import InputError
from srrl_jax.parallel.mesh import RULES

# Within this time the others learn that a process or its machine is gone, when no connection says it.
HEARTBEAT_SECONDS = 30


def join(coordinator: str | None = None, processes: int | None = None, process: int | None = None) -> None:
    """Joins the other processes of this run, where there are others; before any computation in JAX.

    Args:
      coordinator: HOST:PORT of process 0, with the other two where no launcher tells them.
      processes: how many there are.
      process: which one this is, from 0 on.
    Raises:
      InputError: see `arguments_of`.
    """
    arguments = arguments_of(os.environ, coordinator, processes, process, tpu=_has_tpu())
    if arguments is not None:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")  # where the devices are CPUs
        jax.config.update("jax_enable_preemption_service", False)  # it would swallow SIGTERM
        jax.distributed.initialize(**arguments, heartbeat_timeout_seconds=HEARTBEAT_SECONDS)


def arguments_of(
    environ: Mapping[str, str],
    coordinator: str | None = None,
    processes: int | None = None,
    process: int | None = None,
    tpu: bool = False,
) -> dict[str, Any] | None:
    """What `jax.distributed.initialize` needs here; None for a process on its own.

    In this order: what was given, SLURM's or Open MPI's variables with more than one process, and on a
    machine with TPUs (`tpu`) its metadata, which JAX reads.

    Raises:
      InputError: only some of the three are given or they do not fit each other, or the launcher's
        variables do not say enough.
    """
    given = {"--coordinator": coordinator, "--processes": processes, "--process": process}
    missing = [flag for flag, value in given.items() if value is None]
    if not missing:
        if not re.fullmatch(r".+:\d+", coordinator):
            raise InputError(f"--coordinator: must be HOST:PORT, not {coordinator!r}")
        if not 0 <= process < processes:
            raise InputError(
                f"--process: must be from 0 to {processes - 1} (--processes less 1), not {process}"
            )
        return {
            "coordinator_address": coordinator,
            "num_processes": processes,
            "process_id": process,
            "cluster_detection_method": "deactivate",
        }
    if len(missing) < len(given):
        raise InputError(f"{', '.join(missing)}: missing; give all of {', '.join(given)}, or none")
    # SLURM_STEP_NODELIST is what srun sets and the shell of a batch script lacks.
    if int(environ.get("SLURM_NTASKS", 1)) > 1 and {"SLURM_PROCID", "SLURM_STEP_NODELIST"} <= environ.keys():
        return {"cluster_detection_method": "slurm", "local_device_ids": _slurm_gpus(environ)}
    if int(environ.get("OMPI_COMM_WORLD_SIZE", 1)) > 1:
        if "OMPI_MCA_orte_hnp_uri" not in environ:
            raise InputError(
                "this Open MPI does not tell its processes a coordinator: give --coordinator HOST:PORT "
                "--processes $OMPI_COMM_WORLD_SIZE --process $OMPI_COMM_WORLD_RANK"
            )
        return {"cluster_detection_method": "ompi"}
    return {} if tpu else None


def is_main() -> bool:
    """Whether this process writes logs and reports; true for a process on its own."""
    return jax.process_index() == 0


def local_rows(rows: int, mesh: Mesh) -> list[int]:
    """The rows of a batch of `rows` that lie on this process's devices, ascending.

    Processes whose devices share a row (a tensor axis across them) all have it.
    """
    cut = NamedSharding(mesh, P(RULES["batch"])).addressable_devices_indices_map((rows,))
    return sorted({row for (piece,) in cut.values() for row in range(rows)[piece]})


def to_host(arrays: Any) -> Any:
    """The whole of `arrays` in NumPy, on every process; each has to call it, under the mesh.

    A token with its log-probability is 8 bytes: a step of the paper (32 prompts, 4 completions of 6,144
    tokens, about 12 verdicts each of 256) sends at most 9.4 MB to each process, where one all-gather of
    a 32B model's weights in bfloat16 is 64 GB.
    """
    if jax.process_count() > 1:
        arrays = jax.tree.map(lambda x: x if x.is_fully_replicated else _whole(x), arrays)
    return jax.device_get(arrays)


@partial(jax.jit, out_shardings=P())
def _whole(x: jax.Array) -> jax.Array:
    return x


@contextmanager
def abort_all_on_error() -> Iterator[None]:
    """On an error, exits at once so that the other processes fail too and do not hang in a collective.

    Python's way out would wait for them at JAX's shutdown, while they wait for this one in a program.
    The exit code is 2 for bad input, 1 for other errors. The others fail at the closed connection, or
    JAX aborts them (exit code 134) within `HEARTBEAT_SECONDS`.
    """
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        if jax.process_count() == 1:
            raise
        where = f"process {jax.process_index()} of {jax.process_count()}"
        if isinstance(error, InputError):
            print(f"srrl: {where}: {error}", file=sys.stderr)
        else:
            traceback.print_exc()
            print(
                f"srrl: {where} ends by the error above, and the others with it. If it tells of a connection "
                "or a collective, another process was lost first: see its output, then run the same command "
                "on all to go on",
                file=sys.stderr,
            )
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(2 if isinstance(error, InputError) else 1)


def gather(value: Any) -> list[Any]:
    """The `value` of every process, by process, on each of them; every process has to call it.

    Values are JSON's types; floats arrive bit for bit.
    """
    if jax.process_count() == 1:
        return [value]
    data = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(data.size))
    padded = np.zeros(1 << int(sizes.max() - 1).bit_length(), np.uint8)  # few sizes, few programs
    padded[: data.size] = data
    rows = multihost_utils.process_allgather(padded)
    return [json.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)]


def _slurm_gpus(environ: Mapping[str, str]) -> list[int] | None:
    """This task's share of its node's GPUs, all of which it has to see; None where SLURM gave none.

    JAX alone would give each task one GPU, which is wrong for one task a node.
    """
    if "SLURM_GPUS_ON_NODE" not in environ:
        return None
    tasks = re.fullmatch(r"(\d+)(\(x\d+\))?", environ.get("SLURM_STEP_TASKS_PER_NODE", "1"))
    gpus = int(environ["SLURM_GPUS_ON_NODE"])
    if not tasks or gpus % int(tasks[1]):
        raise InputError(
            f"SLURM: {gpus} GPUs a node cannot be shared evenly by its tasks "
            f"({environ['SLURM_STEP_TASKS_PER_NODE']}); set --ntasks-per-node to 1, or to the number of GPUs"
        )
    share = gpus // int(tasks[1])
    first = int(environ["SLURM_LOCALID"]) * share
    return list(range(first, first + share))


def _has_tpu() -> bool:
    """Whether JAX will use TPUs of this machine."""
    if os.environ.get("JAX_PLATFORMS", "tpu").partition(",")[0] not in ("", "tpu"):
        return False
    devices = ("/dev/accel0", "/dev/vfio/0")
    return importlib.util.find_spec("libtpu") is not None and any(Path(device).exists() for device in devices)
