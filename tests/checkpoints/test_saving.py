"""What save_model writes, besides that loading it gives the same weights (test_weights.py)."""

import json
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from srrl_jax.checkpoints import load_model, save_model
from srrl_jax.checkpoints.tokenizer import load_tokenizer
from srrl_jax.errors import InputError

WORLD = Path(__file__).resolve().parents[2] / "srrl_jax/tinyworld/checkpoint"


def test_files_stay_under_the_size(tiny, tmp_path):
    model = tiny()
    save_model(model, tmp_path / "whole")
    save_model(model, tmp_path / "cut", max_shard_size=30_000)
    whole = load_file(tmp_path / "whole" / "model.safetensors")
    index = json.loads((tmp_path / "cut" / "model.safetensors.index.json").read_text())
    files = sorted(tmp_path.glob("cut/*.safetensors"))
    names = [f"model-{i:05}-of-{len(files):05}.safetensors" for i in range(1, len(files) + 1)]
    assert [file.name for file in files] == names and len(files) > 3
    found = {}
    for file in files:
        tensors = load_file(file)
        assert sum(x.nbytes for x in tensors.values()) <= 30_000
        assert {name for name, place in index["weight_map"].items() if place == file.name} == set(tensors)
        found |= tensors
    assert found.keys() == whole.keys()
    assert all(np.array_equal(found[name], whole[name]) for name in whole)
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in whole.values())
    assert not (tmp_path / "whole" / "model.safetensors.index.json").exists()


def test_a_tensor_over_the_size_has_its_own_file(tiny, tmp_path):
    save_model(tiny(), tmp_path, max_shard_size=1)
    files = list(tmp_path.glob("*.safetensors"))
    assert all(len(load_file(file)) == 1 for file in files) and len(files) == 25
    load_model(tmp_path)


def test_experts_round_trip(tiny, tmp_path):
    """Layers with and without experts, cut into files between the experts of a layer."""
    model = tiny(
        "qwen3_moe", num_experts=5, moe_intermediate_size=32, num_experts_per_tok=2, mlp_only_layers=[0]
    )
    save_model(model, tmp_path / "first", max_shard_size=30_000)
    loaded = load_model(tmp_path / "first")
    expected, actual = (dict(nnx.to_flat_state(nnx.state(m))) for m in (model, loaded))
    assert expected.keys() == actual.keys()
    for path in expected:
        np.testing.assert_array_equal(actual[path][...], expected[path][...], err_msg=str(path))
    save_model(loaded, tmp_path / "second", max_shard_size=30_000)
    first, second = ({f.name: f.read_bytes() for f in tmp_path.glob(f"{n}/*")} for n in ("first", "second"))
    assert first == second and len(first) > 3


def test_weights_of_an_earlier_save_are_removed(tiny, tmp_path):
    model = tiny()
    save_model(model, tmp_path, max_shard_size=30_000)
    save_model(model, tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def test_the_type_is_that_of_the_weights_unless_said(tiny, tmp_path):
    save_model(tiny(), tmp_path / "half", jnp.float16)
    half = load_model(tmp_path / "half", dtype=jnp.bfloat16)
    save_model(half, tmp_path / "brain")
    for name, dtype in (("half", "float16"), ("brain", "bfloat16")):
        assert json.loads((tmp_path / name / "config.json").read_text())["dtype"] == dtype
        assert {str(x.dtype) for x in load_file(tmp_path / name / "model.safetensors").values()} == {dtype}


def test_tokenizer_and_generation_config_come_along(tiny, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(WORLD, source)
    (source / "generation_config.json").write_text('{"eos_token_id": [3, 4], "temperature": 0.6}')
    config = json.loads((source / "config.json").read_text()) | {"eos_token_id": 3, "bos_token_id": None}
    (source / "config.json").write_text(json.dumps(config))
    save_model(tiny(vocab_size=512), tmp_path / "out", tokenizer=source)
    saved = json.loads((tmp_path / "out" / "config.json").read_text())
    assert saved["eos_token_id"] == 3 and "bos_token_id" not in saved
    assert saved["hidden_size"] == 48 != config["hidden_size"]
    for name in ("generation_config.json", "tokenizer.model", "tokenizer_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()


def test_a_generation_config_is_made_where_there_is_none(tiny, tmp_path):
    save_model(tiny(vocab_size=512), tmp_path, tokenizer=WORLD)
    tokens = load_tokenizer(WORLD)
    settings = json.loads((tmp_path / "generation_config.json").read_text())
    assert settings == {"eos_token_id": list(tokens.stop_ids), "pad_token_id": tokens.pad_id}
    with pytest.raises(InputError, match="no such directory"):
        save_model(tiny(), tmp_path / "other", tokenizer=tmp_path / "nowhere")


def test_transformers_loads_several_files(torch, tiny, tmp_path, relative_error):
    from transformers import AutoModelForCausalLM

    model = tiny(vocab_size=512)
    save_model(model, tmp_path, tokenizer=WORLD, max_shard_size=30_000)
    theirs, info = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert theirs.generation_config.eos_token_id == list(load_tokenizer(WORLD).stop_ids)
    tokens = np.random.default_rng(0).integers(0, 512, (2, 11))
    with torch.no_grad():
        expected = theirs(torch.from_numpy(tokens)).logits.numpy()
    assert relative_error(model(tokens), expected) < 1e-5
