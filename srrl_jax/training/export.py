"""From a checkpoint of a run to a directory that `transformers` and serving engines load."""

import dataclasses
import tempfile
from pathlib import Path

import jax
from flax import nnx

from srrl_jax import storage
from srrl_jax.errors import InputError
from srrl_jax.locking import sole_writer
from srrl_jax.models import Qwen3
from srrl_jax.models.lora import add_adapters, merge_adapters
from srrl_jax.models.weights import abstract, read_config
from srrl_jax.parallel import make_mesh, shardings
from srrl_jax.training.checkpoint import Checkpoints
from srrl_jax.training.config import TrainConfig
from srrl_jax.training.update import NOTHING


def export(run_dir: str | Path, out: str | Path, step: int | None = None, dtype="float32") -> int:
    """Writes the policy of a run as safetensors with config, tokenizer and generation config.

    Of the checkpoint only the weights are read, onto all devices of this machine. Adapters (LoRA) are
    merged into the weights of the recipe's `model`.

    Args:
      run_dir: of `srrl train`; its config.yaml names the model whose tokenizer files are copied.
      out: a directory that is empty or does not exist; both may be gs://.
      step: a checkpoint's step; the newest by default.
      dtype: of the files. Training keeps float32, which the default leaves as it is.
    Returns:
      The step.
    Raises:
      InputError: no run, no such checkpoint (names those there are), `out` is not empty, or another
        process writes it.
    """
    run_dir, out = storage.locate(run_dir), storage.locate(out)
    recipe = run_dir / "config.yaml"
    if not recipe.exists():
        raise InputError(f"{run_dir}: no run is there (a run directory holds config.yaml)")
    config = TrainConfig.load(recipe)
    with (
        sole_writer(out.with_name(f"{out.name}.writer")),
        Checkpoints(run_dir, config.checkpoint, read_only=True) as checkpoints,
    ):
        if out.exists() and not (out.is_dir() and not any(out.iterdir())):
            raise InputError(f"{out}: exists and is not an empty directory; give another")
        steps = checkpoints.steps()
        if not steps:
            raise InputError(f"{run_dir}: the run has no checkpoint yet")
        step = steps[-1] if step is None else step
        if step not in steps:
            raise InputError(
                f"{run_dir}: no checkpoint of step {step}; there are {', '.join(map(str, steps))}"
            )
        mesh = make_mesh()
        model, base = abstract(read_config(config.model)), NOTHING
        learnt = nnx.Param
        if config.lora.rank:
            add_adapters(model, **dataclasses.asdict(config.lora))
            base, learnt = nnx.state(Qwen3.from_pretrained(config.model, mesh=mesh)), nnx.LoRAParam
        graphdef, params, _ = nnx.split(model, learnt, ...)
        like = jax.tree.map(
            lambda v: v.replace(jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=shardings(v, mesh))),
            params,
            is_leaf=lambda x: isinstance(x, nnx.Variable),
        )
        model = nnx.merge(graphdef, checkpoints.restore_params(step, like), base)
        merge_adapters(model)
        model.save_pretrained(out, dtype, tokenizer=config.model)
    return step


def exported(source: str) -> str:
    """The directory of weights that a command is to read for `source`.

    RUN_DIR or RUN_DIR@STEP stands for the policy of a run, at its newest checkpoint or at that step; it
    is exported to RUN_DIR/export/STEP once. Anything else is returned as it is. Raises InputError as
    `export` does.
    """
    name, at, number = source.rpartition("@")
    name, step = (name, int(number)) if at and number.isdigit() else (source, None)
    run_dir = storage.locate(name) if storage.is_remote(name) else Path(name)
    if not (run_dir / "config.yaml").is_file():
        return source
    if storage.is_remote(name):
        raise InputError(f"{name}: a run in an object store; write its weights first: srrl export {name} OUT")
    if step is None or not (run_dir / "export" / str(step)).exists():
        with tempfile.TemporaryDirectory(dir=run_dir) as scratch:
            whole = Path(scratch) / "model"  # moved only when all of it is there
            step = export(run_dir, whole, step)
            (run_dir / "export").mkdir(exist_ok=True)
            try:
                whole.rename(run_dir / "export" / str(step))
            except OSError:  # it is there: exported before, or by another command in the meantime
                if not (run_dir / "export" / str(step)).is_dir():
                    raise
    return str(run_dir / "export" / str(step))
