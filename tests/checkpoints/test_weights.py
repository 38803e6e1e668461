"""Loading and saving checkpoints, and what is refused."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from srrl_jax.checkpoints import load_model, loading, save_model
from srrl_jax.errors import InputError
from srrl_jax.models import Qwen3
from srrl_jax.parallel import make_mesh, shardings

UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def checkpoint(tiny, tmp_path):
    """A saved tiny model, and a function that rewrites its tensors."""
    folder = tmp_path / "checkpoint"
    save_model(tiny(), folder)

    def edit(change):
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return folder, edit


def assert_same(left: Qwen3, right: Qwen3):
    left, right = (dict(nnx.to_flat_state(nnx.state(model))) for model in (left, right))
    assert left.keys() == right.keys()
    for path in left:
        assert left[path].dtype == right[path].dtype
        np.testing.assert_array_equal(left[path][...], right[path][...], err_msg=str(path))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("tied", [False, True])
def test_round_trip_is_bit_identical(tiny, tmp_path, dtype, tied):
    save_model(tiny(tie_word_embeddings=tied), tmp_path / "first", dtype)
    first = load_model(tmp_path / "first", dtype=dtype)
    save_model(first, tmp_path / "second", dtype)
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()
    assert_same(first, load_model(tmp_path / "second", dtype=dtype))


def test_names_and_values_are_those_of_the_file(checkpoint):
    folder, _ = checkpoint
    model, tensors = load_model(folder), load_file(folder / "model.safetensors")
    np.testing.assert_array_equal(model.layers.mlp.up_proj.weight[1], tensors[UP])
    np.testing.assert_array_equal(model.lm_head.weight[...], tensors["lm_head.weight"])
    count = sum(variable[...].size for _, variable in nnx.to_flat_state(nnx.state(model)))
    assert count == sum(tensor.size for tensor in tensors.values())


def test_transformers_checkpoint_survives_unchanged(shared_data, tmp_path):
    source = shared_data / "tiny-qwen3-untied"
    save_model(load_model(source), tmp_path)
    before, after = load_file(source / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert before.keys() == after.keys()
    for name in before:
        np.testing.assert_array_equal(before[name], after[name])


def test_dtype_is_that_of_weights_and_computation(checkpoint):
    model = load_model(checkpoint[0], dtype=jnp.bfloat16)
    assert {v.dtype for _, v in nnx.to_flat_state(nnx.state(model))} == {jnp.dtype("bfloat16")}
    assert model.dtype == jnp.bfloat16
    saved = json.loads((checkpoint[0] / "config.json").read_text())
    assert saved["dtype"] == "float32"


def test_mesh_places_by_the_table(checkpoint):
    mesh = make_mesh()
    model = load_model(checkpoint[0], mesh=mesh)
    for _, variable in nnx.to_flat_state(nnx.state(model)):
        assert variable[...].sharding == shardings(variable, mesh)
    assert_same(model, load_model(checkpoint[0]))


def test_tells_what_a_mesh_leaves_whole_before_it_reads(checkpoint, caplog, monkeypatch):
    def refuse(*_):
        raise InputError("read")

    monkeypatch.setattr(loading, "unsharded_axes", lambda *_: ["mesh.tensor (16) does not divide"])
    monkeypatch.setattr(loading, "_parameter", refuse)
    with pytest.raises(InputError, match="^read$"):
        load_model(checkpoint[0], mesh=make_mesh())
    assert caplog.messages == ["mesh.tensor (16) does not divide"]


def test_shards_with_an_index(checkpoint):
    folder, _ = checkpoint
    whole = load_model(folder)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, folder / file)
    index = {name: file for file, part in parts.items() for name in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    assert_same(whole, load_model(folder))

    (folder / "b.safetensors").unlink()
    with pytest.raises(InputError, match="b.safetensors.*missing"):
        load_model(folder)


@pytest.mark.parametrize("elsewhere", ["../other/a.safetensors", "/etc/a.safetensors", "x/../../a", None])
def test_shards_outside_of_the_directory_are_not_followed(checkpoint, elsewhere):
    folder, _ = checkpoint
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {UP: elsewhere}}))
    with pytest.raises(InputError, match=f"index.json: weight_map: tensor '{UP}' lies in .* no file of this"):
        load_model(folder)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_values_that_are_not_finite_are_refused(checkpoint, value, dtype):
    folder, edit = checkpoint

    def spoil(tensors):
        for name in (UP, "model.norm.weight"):
            tensors[name].flat[-1] = value

    edit(spoil)
    with pytest.raises(InputError) as error:
        load_model(folder, mesh=make_mesh(), dtype=dtype)
    assert UP in str(error.value) and "model.norm.weight" in str(error.value)
    assert "lm_head" not in str(error.value)


def test_loads_nothing_before_all_is_checked(checkpoint, monkeypatch):
    """A misfit is known from the headers: no array of weights is made."""
    folder, edit = checkpoint
    edit(lambda tensors: tensors.pop("model.norm.weight"))
    monkeypatch.setattr(np, "empty", lambda *_: pytest.fail("allocated"))
    with pytest.raises(InputError):
        load_model(folder)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t.pop(UP), f"model.safetensors.*lack tensor '{UP}'"),
        (lambda t: t.update({"model.layers.2.mlp.x": t[UP]}), "model.safetensors.*'model.layers.2.mlp.x'"),
        (
            lambda t: t.update({UP: t[UP][:-1]}),
            rf"model.safetensors.*'{UP}' has shape \(63, 48\).*\(64, 48\)",
        ),
        (lambda t: t.update({UP: t[UP].astype(np.int8)}), f"model.safetensors.*'{UP}' is I8"),
    ],
)
def test_tensors_that_do_not_fit(checkpoint, change, message):
    folder, edit = checkpoint
    edit(change)
    with pytest.raises(InputError, match=message):
        load_model(folder)


def test_rotary_buffers_are_ignored(checkpoint):
    folder, edit = checkpoint
    edit(lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(8, np.float32)}))
    load_model(folder)


def test_tied_head_must_equal_the_embedding(tiny, tmp_path):
    model = tiny(tie_word_embeddings=True)
    save_model(model, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    embedding = tensors["model.embed_tokens.weight"]
    save_file({**tensors, "lm_head.weight": embedding}, tmp_path / "model.safetensors")
    assert_same(model, load_model(tmp_path))
    save_file({**tensors, "lm_head.weight": embedding + 1}, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match="tie_word_embeddings"):
        load_model(tmp_path)


@pytest.mark.parametrize("keep", [0, 5, 100, -100])
def test_truncated_file(checkpoint, keep):
    file = checkpoint[0] / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(InputError, match="model.safetensors: truncated"):
        load_model(checkpoint[0])


def test_no_weights_and_pickles(checkpoint):
    folder, _ = checkpoint
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(InputError, match="pytorch_model.bin.*convert to safetensors"):
        load_model(folder)
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(InputError, match="no weights"):
        load_model(folder)


def test_sources_that_are_not_there(checkpoint, tmp_path, monkeypatch):
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    def offline(name, allow_patterns):
        raise LocalEntryNotFoundError("cannot find the files\nlong story")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(InputError, match="owner/name: .*hub did not give it: cannot find the files$"):
        load_model("owner/name")
    with pytest.raises(InputError, match="no such directory"):
        load_model(tmp_path / "nowhere")
    with pytest.raises(InputError, match="give the checkpoint's directory"):
        load_model(checkpoint[0] / "config.json")


def test_hub_id_is_fetched_without_pickles(checkpoint, monkeypatch):
    import huggingface_hub

    asked = {}

    def snapshot(name, allow_patterns):
        asked.update(name=name, patterns=allow_patterns)
        return str(checkpoint[0])

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    assert_same(load_model("owner/name"), load_model(checkpoint[0]))
    assert asked["name"] == "owner/name"
    assert "model*.safetensors" in asked["patterns"]
    assert not any("bin" in pattern or pattern == "*" for pattern in asked["patterns"])


def test_config_without_weights_is_read_first(checkpoint, tmp_path):
    """An unsupported config is refused whatever the weights are."""
    shutil.copytree(checkpoint[0], tmp_path / "other")
    config = json.loads((tmp_path / "other" / "config.json").read_text())
    (tmp_path / "other" / "config.json").write_text(json.dumps({**config, "model_type": "mixtral"}))
    with pytest.raises(InputError, match="config.json: model_type 'mixtral'"):
        load_model(tmp_path / "other")


def test_abstract_model_allocates_nothing(checkpoint, monkeypatch):
    """Initial weights are never drawn when a checkpoint is loaded."""
    drawn = []
    normal = jax.random.normal

    def watch(key, shape, dtype):
        out = normal(key, shape, dtype)
        drawn.append(isinstance(out, jax.core.Tracer))
        return out

    monkeypatch.setattr(jax.random, "normal", watch)
    load_model(checkpoint[0])
    assert drawn and all(drawn)
