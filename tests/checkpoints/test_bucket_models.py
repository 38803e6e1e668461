"""Checkpoints in an object store: the same models and tokenizers as from a disk, read by byte range."""

import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from fsspec.implementations.memory import MemoryFile

from srrl_jax.checkpoints import load_model, safetensors, save_model
from srrl_jax.checkpoints.tokenizer import load_tokenizer
from srrl_jax.errors import InputError
from srrl_jax.models import Qwen3
from srrl_jax.parallel import make_mesh

WORLD = Path(__file__).resolve().parents[2] / "srrl_jax" / "tinyworld" / "checkpoint"


def upload(folder: Path, path) -> str:
    path.mkdir()
    for file in folder.iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    return str(path)


def same(a: Qwen3, b: Qwen3) -> None:
    jax.tree.map(np.testing.assert_array_equal, nnx.state(a), nnx.state(b))


def test_a_model_is_saved_and_loaded(tiny, bucket, tmp_path):
    model = tiny()
    for folder in (f"{bucket}/one", tmp_path / "one"):
        save_model(model, folder, max_shard_size=30_000, tokenizer=WORLD)
    here, there = (
        sorted(path.iterdir(), key=lambda f: f.name) for path in (tmp_path / "one", bucket / "one")
    )
    assert [(f.name, f.read_bytes()) for f in here] == [(f.name, f.read_bytes()) for f in there]
    same(load_model(f"{bucket}/one"), model)
    cut = load_model(f"{bucket}/one", mesh=make_mesh(), dtype=jnp.bfloat16)
    same(cut, load_model(tmp_path / "one", dtype=jnp.bfloat16))


def test_no_more_is_read_than_a_chunk_at_a_time(tiny, bucket, monkeypatch):
    """Nor anything twice: two parts of the rows of a tensor are two ranges of its bytes."""
    model, sizes, read = tiny(), [], MemoryFile.read
    save_model(model, f"{bucket}/one")
    tensor = safetensors.read(bucket / "one" / "model.safetensors")["model.embed_tokens.weight"]
    rows, width = tensor.shape
    monkeypatch.setattr(safetensors, "_CHUNK", 4 * width * 5)
    monkeypatch.setattr(MemoryFile, "read", lambda file, size=-1: sizes.append(size) or read(file, size))
    out = np.empty((8, width - 1), np.float32)
    tensor.read((slice(3, 11), slice(1, width)), out)
    np.testing.assert_array_equal(out, np.asarray(model.embed_tokens.weight)[3:11, 1:])
    assert sizes == [4 * width * 5, 4 * width * 3]


def test_a_tokenizer_is_loaded_and_goes_along(tiny, bucket, tmp_path):
    source = upload(WORLD, bucket / "world")
    here, there = load_tokenizer(WORLD), load_tokenizer(source)
    text = here.render([{"role": "user", "content": "name : red"}], thinking=False)
    assert there.encode(text) == here.encode(text) and there.stop_ids == here.stop_ids
    save_model(tiny(), tmp_path / "out", tokenizer=source)
    assert load_tokenizer(tmp_path / "out").encode(text) == here.encode(text)


def test_what_is_missing_or_broken_is_named_by_its_address(bucket, tmp_path):
    with pytest.raises(InputError, match=r"^gs://bucket/none: no such directory$"):
        load_model(f"{bucket}/none")
    broken = tmp_path / "broken"
    shutil.copytree(WORLD, broken)
    (broken / "model.safetensors").write_bytes((WORLD / "model.safetensors").read_bytes()[:-9])
    (broken / "tokenizer.model").write_bytes(b"no model")
    source = upload(broken, bucket / "broken")
    with pytest.raises(InputError, match=r"^gs://bucket/broken/model\.safetensors: truncated in tensor"):
        load_model(source)
    with pytest.raises(InputError, match=r"^gs://bucket/broken/tokenizer\.model: not a SentencePiece model"):
        load_tokenizer(source)


def test_a_broken_gguf_file_is_named_where_it_lies(bucket):
    (bucket / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(InputError, match=r"^gs://bucket/model\.gguf: truncated or not a GGUF file"):
        load_model(str(bucket))
