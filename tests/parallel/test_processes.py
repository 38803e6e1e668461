import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from srrl_jax.errors import InputError
from srrl_jax.parallel import MeshConfig, gather, is_main, join, local_rows, make_mesh
from srrl_jax.parallel.processes import arguments_of

SRUN = {
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "2",
    "SLURM_LOCALID": "0",
    "SLURM_STEP_NODELIST": "gpu[01-04]",
    "SLURM_STEP_TASKS_PER_NODE": "1(x4)",
}
MPI = {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"}
EXPLICIT = {"coordinator": "10.0.0.1:1234", "processes": 2, "process": 1}
SLURM = {"cluster_detection_method": "slurm"}


@pytest.mark.parametrize(
    "environ, arguments",
    [
        ({}, None),
        ({"SLURM_NTASKS": "4", "SLURM_PROCID": "0"}, None),  # the batch script itself, not a step
        (SRUN | {"SLURM_NTASKS": "1"}, None),
        ({"OMPI_COMM_WORLD_SIZE": "1"}, None),
        (SRUN, SLURM | {"local_device_ids": None}),
        (SRUN | {"SLURM_GPUS_ON_NODE": "8"}, SLURM | {"local_device_ids": list(range(8))}),
        (
            SRUN | {"SLURM_GPUS_ON_NODE": "8", "SLURM_STEP_TASKS_PER_NODE": "2(x2)", "SLURM_LOCALID": "1"},
            SLURM | {"local_device_ids": [4, 5, 6, 7]},
        ),
        (MPI | {"OMPI_MCA_orte_hnp_uri": "1.0;tcp://10.0.0.1:1"}, {"cluster_detection_method": "ompi"}),
    ],
)
def test_launchers_are_told_by_their_variables(environ, arguments):
    assert arguments_of(environ) == arguments


def test_a_machine_with_tpus_is_left_to_its_metadata():
    assert arguments_of({}, tpu=True) == {}


def test_what_was_given_goes_before_what_was_found():
    assert arguments_of(SRUN | MPI, **EXPLICIT, tpu=True) == {
        "coordinator_address": "10.0.0.1:1234",
        "num_processes": 2,
        "process_id": 1,
        "cluster_detection_method": "deactivate",
    }


@pytest.mark.parametrize(
    "environ, given, message",
    [
        ({}, EXPLICIT | {"process": None}, "--process: missing"),
        ({}, {"coordinator": "a:1"}, "--processes, --process: missing"),
        ({}, EXPLICIT | {"coordinator": "10.0.0.1"}, "HOST:PORT"),
        ({}, EXPLICIT | {"process": 2}, "from 0 to 1"),
        ({}, EXPLICIT | {"processes": 0, "process": 0}, "from 0 to -1"),
        (MPI, {}, "--process \\$OMPI_COMM_WORLD_RANK"),
        (SRUN | {"SLURM_GPUS_ON_NODE": "8", "SLURM_STEP_TASKS_PER_NODE": "2,1"}, {}, "--ntasks-per-node"),
        (SRUN | {"SLURM_GPUS_ON_NODE": "8", "SLURM_STEP_TASKS_PER_NODE": "3(x4)"}, {}, "evenly"),
    ],
)
def test_half_of_an_answer_is_refused(environ, given, message):
    with pytest.raises(InputError, match=message):
        arguments_of(environ, **given)


def test_a_process_on_its_own_stays_as_it_is(monkeypatch):
    for name in os.environ:
        if name.startswith(("SLURM_", "OMPI_")):
            monkeypatch.delenv(name)
    join()
    assert not jax.distributed.is_initialized()
    assert is_main() and gather({"a": 1}) == [{"a": 1}]
    assert local_rows(3, make_mesh(MeshConfig())) == [0, 1, 2]


def test_two_processes_see_four_devices_and_each_others_values():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{probe.getsockname()[1]}"
    environ = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=2",
        "PYTHONPATH": str(Path(__file__).parents[2]),
    }
    script = Path(__file__).with_name("two_processes.py")
    running = [
        subprocess.Popen(
            [sys.executable, script, coordinator, str(process)],
            env=environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for process in range(2)
    ]
    try:
        ends = [process.communicate(timeout=120) for process in running]
    finally:
        for process in running:
            process.kill()
    assert [process.returncode for process in running] == [0, 0], ends
    # Gloo writes to stdout too.
    zero, one = (json.loads(out.splitlines()[-1]) for out, _ in ends)
    assert zero["devices"] == one["devices"] == [2, 4]
    assert (zero["main"], one["main"]) == (True, False)
    assert zero["rows"] == [[0, 1, 2, 3], list(range(8))]
    assert one["rows"] == [[4, 5, 6, 7], list(range(8))]
    assert one["local"] == [[4, 5], [6, 7]]  # what local_rows says is where place_batch puts them
    assert zero["whole"] == one["whole"] == [list(range(8)), [0, 1, 2]]
    assert zero["sum"] == one["sum"] == 28
    values = [{"process": i, "third": 1 / 3, "text": "é" * 700 * (1 + i)} for i in range(2)]
    assert zero["gathered"] == one["gathered"] == values
