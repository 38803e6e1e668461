"""A run whose directory is in an object store: the same logs, checkpoints and report as on a disk."""

import builtins
import io
import os
from pathlib import Path

import jax
import numpy as np
import pytest

from srrl_jax import storage
from srrl_jax.errors import InputError
from srrl_jax.run import train
from srrl_jax.run.export import export, exported
from srrl_jax.telemetry import read_jsonl
from srrl_jax.viewer.report import write_report


@pytest.fixture
def no_open_of_gs(monkeypatch):
    """Fails where anything takes a gs:// path for one of the disk, whole or collapsed to gs:/."""

    def guarded(real):
        def call(path, *args, **kwargs):
            assert "gs:/" not in str(path), f"a file of the disk called {path}"
            return real(path, *args, **kwargs)

        return call

    for module, name in ((builtins, "open"), (io, "open"), (os, "mkdir"), (os, "replace"), (os, "stat")):
        monkeypatch.setattr(module, name, guarded(getattr(module, name)))


@pytest.mark.slow
def test_a_run_in_a_bucket_is_written_and_resumed_as_on_a_disk(
    recipe, bucket, no_open_of_gs, monkeypatch, tmp_path
):
    # Orbax asks Google whether the bucket has folders; flat ones have none.
    monkeypatch.setattr("orbax.checkpoint._src.path.gcs_utils.get_bucket", lambda name: None)
    there, here = f"{bucket}/runs/one", tmp_path / "one"
    (bucket / "easy.jsonl").write_bytes(open(recipe(here).data.train, "rb").read())
    (bucket / "model").mkdir()
    for file in Path(recipe(here).model).iterdir():
        (bucket / "model" / file.name).write_bytes(file.read_bytes())
    keys = ("checkpoint.every=1", f"data.train={bucket}/easy.jsonl")
    train(recipe(there, "steps=1", *keys, f"model={bucket}/model"))
    resumed = train(recipe(there, "steps=2", *keys, f"model={bucket}/model"))
    unbroken = train(recipe(here, "steps=2", *keys))
    for a, b in zip(jax.tree.leaves(resumed), jax.tree.leaves(unbroken), strict=True):
        np.testing.assert_array_equal(a, b)
    assert [row["step"] for row in read_jsonl(f"{there}/metrics.jsonl")] == [1, 2]
    assert read_jsonl(f"{there}/samples.jsonl") == read_jsonl(here / "samples.jsonl")
    run_dir = storage.locate(there)
    assert sorted(path.name for path in (run_dir / "checkpoints").iterdir()) == ["1", "2"]
    assert export(there, f"{bucket}/export") == export(here, tmp_path / "export") == 2
    for file in (tmp_path / "export").iterdir():
        if file.name == "README.md":  # which names the places
            continue
        assert (bucket / "export" / file.name).read_bytes() == file.read_bytes(), file.name
    with pytest.raises(InputError, match=f"^{there}: a run in an object store; .* srrl export {there} OUT"):
        exported(f"{there}@2")
    assert "<!doctype html>" in write_report(there).read_text()
    assert {path.name for path in run_dir.iterdir()} == {
        "checkpoints", "config.yaml", "report.html", "progress.json",
        "metrics-000001.jsonl", "metrics-000002.jsonl", "samples-000001.jsonl", "samples-000002.jsonl",
        "timings-000001.jsonl", "timings-000002.jsonl", "events-000001.jsonl", "events-000002.jsonl",
        "tokens",
    }  # fmt: skip
