"""From a checkpoint of a run to a directory that `transformers` and serving engines load."""

import dataclasses
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax
from etils import epath
from flax import nnx
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

from srrl_jax import storage
from srrl_jax.checkpoints import load_model, save_model
from srrl_jax.checkpoints.loading import abstract, read_config
from srrl_jax.checkpoints.saving import save_adapter
from srrl_jax.errors import InputError
from srrl_jax.locking import sole_writer
from srrl_jax.models.lora import add_adapters, merge_adapters
from srrl_jax.parallel import make_mesh, shardings
from srrl_jax.run.card import write_card
from srrl_jax.run.checkpoint import Checkpoints
from srrl_jax.training.config import TrainConfig
from srrl_jax.training.update import NOTHING


def export(
    run_dir: str | Path,
    out: str | Path,
    step: int | None = None,
    dtype="float32",
    *,
    adapter: bool = False,
    push: str | None = None,
) -> int:
    """Writes the policy of a run as safetensors with config, tokenizer, generation config and model card.

    Of the checkpoint only the weights are read, onto all devices of this machine. Adapters (LoRA) are
    merged into the weights of the recipe's `model`, or written alone.

    Args:
      run_dir: of `srrl train`; its config.yaml names the model whose tokenizer files are copied.
      out: a directory that is empty or does not exist; both may be gs://.
      step: a checkpoint's step; the newest by default.
      dtype: of the files. Training keeps float32, which the default leaves as it is.
      adapter: write the adapters alone, as `peft` writes them (`save_adapter`).
      push: also upload it as this hub repository, OWNER/NAME; one that is not there is made, private.
    Returns:
      The step.
    Raises:
      InputError: no run, no such checkpoint (names those there are), `out` is not empty, another process
        writes it, no adapters to write, or the hub does not take it.
    """
    run_dir, out = storage.locate(run_dir), storage.locate(out)
    recipe = run_dir / "config.yaml"
    if not recipe.exists():
        raise InputError(f"{run_dir}: no run is there (a run directory holds config.yaml)")
    config = TrainConfig.load(recipe)
    if adapter and not config.lora.rank:
        raise InputError(f"{run_dir}: the run learnt all weights (lora.rank is 0); export without --adapter")
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
        if push is not None:
            check_hub(push, out)
        mesh = make_mesh()
        model, base = abstract(read_config(config.model)), NOTHING
        learnt = nnx.Param
        if config.lora.rank:
            add_adapters(model, **dataclasses.asdict(config.lora))
            learnt = nnx.LoRAParam
            if not adapter:
                base = nnx.state(load_model(config.model, mesh=mesh))
        graphdef, params, rest = nnx.split(model, learnt, ...)
        like = jax.tree.map(
            lambda v: v.replace(jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=shardings(v, mesh))),
            params,
            is_leaf=lambda x: isinstance(x, nnx.Variable),
        )
        params = checkpoints.restore_params(step, like)
        if adapter:
            model = nnx.merge(graphdef, params, rest)
            save_adapter(model, out, dtype, base=config.model, **dataclasses.asdict(config.lora))
        else:
            model = nnx.merge(graphdef, params, base)
            merge_adapters(model)
            save_model(model, out, dtype, tokenizer=config.model)
        write_card(run_dir, out, config, step, adapter=adapter)
    if push is not None:
        with _hub(push, f"; {out} is written, so `hf upload {push} {out}` is enough"):
            HfApi().upload_folder(repo_id=push, folder_path=out, commit_message=f"Step {step}")
    return step


def check_hub(name: str, out: epath.Path) -> None:
    """Makes the private repository `name` of the hub that HF_ENDPOINT names, if there is none.

    Raises:
      InputError: not a name, nobody is logged in, no such repository can be made, or `out` is not on a disk.
    """
    if storage.is_remote(out):
        raise InputError(f"--push uploads from a disk, but {out} is in an object store; give a local OUT")
    with _hub(name):
        HfApi().create_repo(name, private=True, exist_ok=True)


@contextmanager
def _hub(name: str, done: str = "") -> Iterator[None]:
    try:
        yield
    except (HFValidationError, HfHubHTTPError, LocalTokenNotFoundError, OSError) as error:
        raise InputError(
            f"--push {name}: {str(error).strip()}\nGive OWNER/NAME, and a token that may write there "
            f"(`hf auth login`, or the environment variable HF_TOKEN){done}"
        ) from None


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
