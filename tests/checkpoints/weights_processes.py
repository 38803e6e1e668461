"""Run by test_weights_processes.py in each of several processes that share a mesh of eight devices.

Usage: python weights_processes.py PROCESS PROCESSES PORT SOURCE OUT

Loads SOURCE onto the mesh, saves it to OUT, and prints how many bytes of tensors it read.
"""

import sys

import jax
from flax import nnx

from srrl_jax.checkpoints import load_model, safetensors, save_model
from srrl_jax.parallel import make_mesh, shardings


def main(process: str, processes: str, port: str, source: str, out: str) -> None:
    jax.config.update("jax_num_cpu_devices", 8 // int(processes))
    jax.distributed.initialize(f"127.0.0.1:{port}", int(processes), int(process))
    mesh = make_mesh()
    assert mesh.shape["fsdp"] == 8

    taken, read = [], safetensors.read

    def counted(file):
        def count(tensor):
            def read(box, out):
                taken.append(out.nbytes)
                tensor.read(box, out)

            return tensor._replace(read=read)

        return {name: count(tensor) for name, tensor in read(file).items()}

    safetensors.read = counted
    with jax.set_mesh(mesh):
        model = load_model(source, mesh=mesh)
        for _, variable in nnx.to_flat_state(nnx.state(model)):
            assert variable[...].sharding.is_equivalent_to(shardings(variable, mesh), variable.ndim)
        save_model(model, out, tokenizer=source, max_shard_size=50_000)
    print(sum(taken))


main(*sys.argv[1:])
