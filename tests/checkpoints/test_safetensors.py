"""The file format: boxes of tensors, files that the library reads, and broken files."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from srrl_jax.checkpoints import safetensors as ours
from srrl_jax.errors import InputError

VALUES = np.random.default_rng(0).standard_normal((7, 5), np.float32)
F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def get(tensor, box, dtype):
    out = np.empty([s.stop - s.start for s in box], dtype)
    tensor.read(box, out)
    return out


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
@pytest.mark.parametrize("chunk", [1, 100, 2**26])
def test_a_box_in_any_type(tmp_path, monkeypatch, dtype, chunk):
    monkeypatch.setattr(ours, "_CHUNK", chunk)
    file, stored = tmp_path / "x.safetensors", VALUES.astype(dtype)
    safetensors.numpy.save_file({"first": np.ones(3, np.float16), "x": stored}, file)
    tensor = ours.read(file)["x"]
    assert (tensor.file, tensor.shape) == (file, (7, 5))
    for box in (np.s_[0:7, 0:5], np.s_[2:6, 1:4], np.s_[6:7, 4:5]):
        for target in ("float32", "bfloat16"):
            np.testing.assert_array_equal(
                get(tensor, box, jnp.dtype(target)), stored[box].astype(target), strict=True
            )
    np.testing.assert_array_equal(get(ours.read(file)["first"], np.s_[1:3,], np.float32), np.ones(2))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_the_library_reads_what_is_written(tmp_path, dtype):
    tensors = {"b": VALUES, "a": VALUES[0], "c": VALUES.T}
    file, shapes = tmp_path / "x.safetensors", {name: x.shape for name, x in tensors.items()}
    ours.write(file, shapes, dtype, iter(tensors.values()))
    with safetensors.safe_open(file, "numpy") as handle:
        assert handle.metadata() == {"format": "pt"}
    loaded = safetensors.numpy.load_file(file)
    assert loaded.keys() == tensors.keys()
    for name, values in tensors.items():
        np.testing.assert_array_equal(loaded[name], values.astype(dtype), strict=True)


@pytest.mark.parametrize(
    "header, message",
    [
        ({"x": {**F32, "data_offsets": [4, 12]}}, "truncated in tensor 'x'"),
        ({"x": {**F32, "data_offsets": [0, 4]}}, "corrupt: tensor 'x' has 4 bytes for F32"),
        ({"x": {**F32, "data_offsets": [-8, 0]}}, "negative numbers in tensor 'x'"),
        ({"x": F32, "y": F32}, "corrupt: tensor 'y' overlaps 'x'"),
        ({"x": {**F32, "dtype": "F8_E4M3"}}, "tensor 'x' is F8_E4M3; use an unquantized checkpoint"),
        ({"x": {"dtype": "F32"}}, "not a safetensors file"),
        ({"x": 3}, "not a safetensors file"),
        ([], "not a safetensors file"),
    ],
)
def test_a_broken_file_is_named_with_its_tensor(tmp_path, header, message):
    file, text = tmp_path / "x.safetensors", json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
    with pytest.raises(InputError, match=f"{file}: .*{message}"):
        ours.read(file)


@pytest.mark.parametrize("content", [b"", b"\x01", b"\xff" * 40, b"\x08" + bytes(7) + b"{\xff\xff\xff}   "])
def test_no_safetensors_file_at_all(tmp_path, content):
    file = tmp_path / "x.safetensors"
    file.write_bytes(content)
    with pytest.raises(InputError, match="truncated or not a safetensors file"):
        ours.read(file)
