"""Each tracker by its real library, offline; a resumed run goes on in the tracked run, no step twice."""

import importlib
import json
import os
import sqlite3
import struct
import sys
import time

import pytest

from srrl_jax.errors import InputError
from srrl_jax.telemetry.trackers import Trackers, find_tracker, sample_table

SAMPLE = {
    "split": "train",
    "prompt_id": "p1",
    "sample": 0,
    "prompt": [{"role": "user", "content": "My knee hurts."}],
    "completion": "<think>so</think>How long?",
    "response": "How long?",
    "reward": 0.5,
    "advantage": None,
    "tokens": 9,
    "truncated": False,
    "criteria": [{"criterion": "Asks how long", "points": 5, "verdict": True, "explanation": "it does"}],
}


def library(name: str):
    """A module of the extra `trackers`. CI must have it."""
    if os.environ.get("CI") == "true":
        return importlib.import_module(name)
    return pytest.importorskip(name, reason="needs the extra `trackers`")


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """Every library writes here and asks nobody."""
    for name, value in {
        "WANDB_MODE": "offline",
        "WANDB_SILENT": "true",
        "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/mlflow.db",
        "TRACKIO_DIR": str(tmp_path / "trackio"),
        "HF_HUB_OFFLINE": "1",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)  # MLflow puts artifacts of a local store where it runs
    return tmp_path / "knee"


def run_twice(name: str, run_dir) -> str:
    """Two steps, a kill before the checkpoint of the second, and three; returns the id of the tracked run."""
    run_dir.mkdir()
    config = {"steps": 3, "loss": {"clip_low": 0.2}}
    with pytest.raises(KeyboardInterrupt), Trackers([name], run_dir, config) as trackers:
        for step in (1, 2):
            missed = trackers.write(step, {"reward/mean": step / 10, "kl": float("nan"), "x": None}, [SAMPLE])
            assert missed == []
        raise KeyboardInterrupt
    if name == "wandb":
        time.sleep(1 - time.time() % 1)  # its files are empty where two sessions begin in one second
    with Trackers([name], run_dir, config | {"steps": 4}) as trackers:
        for step in (2, 3):
            assert trackers.write(step, {"reward/mean": step / 10}, [SAMPLE]) == []
    return json.loads((run_dir / "trackers.json").read_text())[name]["id"]


def test_tensorboard_reads_what_was_written(offline):
    library("tensorboardX")
    reader = library("tensorboard.backend.event_processing.event_accumulator")
    events = reader.EventAccumulator(str(offline / run_twice("tensorboard", offline)))
    events.Reload()
    seen = [(event.step, round(event.value, 6)) for event in events.Scalars("reward/mean")]
    assert seen == [(1, 0.1), (2, 0.2), (3, 0.3)]
    assert events.Tags()["scalars"] == ["reward/mean"]
    assert "clip_low: 0.2" in events.Tensors("recipe/text_summary")[0].tensor_proto.string_val[0].decode()


def wandb_records(file):
    """The records of an offline run: 7 bytes, then LevelDB's log format, whose blocks have 32 KiB."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, position, record = file.read_bytes(), 7, b""
    while position < len(data):
        if 0 < (rest := -position % 32768) < 7:
            position += rest
            continue
        _, length, part = struct.unpack_from("<IHB", data, position)
        record += data[position + 7 : position + 7 + length]
        position += 7 + length
        if part in (1, 4):  # whole, or the last part
            yield Record.FromString(record)
            record = b""


def test_wandb_keeps_one_run_in_its_files(offline):
    library("wandb")
    name = run_twice("wandb", offline)
    files = sorted((offline / "wandb").glob(f"offline-run-*/run-{name}.wandb"), key=os.path.getmtime)
    assert len(files) == 2  # of one run; `wandb sync` brings them together
    records = [record for file in files for record in wandb_records(file)]
    assert {r.run.run_id for r in records if r.HasField("run")} == {name}
    rows = [
        {item.key or item.nested_key[0]: item.value_json for item in r.history.item}
        for r in records
        if r.HasField("history")
    ]
    assert [(row["_step"], row["reward/mean"]) for row in rows] == [("1", "0.1"), ("2", "0.2"), ("3", "0.3")]
    tables = [json.loads(t.read_text()) for file in files for t in file.parent.rglob("*.table.json")]
    shown = [dict(zip(table["columns"], table["data"][0], strict=True)) for table in tables]
    assert [row["response"] for row in shown] == ["How long?"] * 3


@pytest.mark.parametrize("store", ["sqlite:///{}/mlflow.db", "file://{}/mlruns"])
def test_mlflow_holds_metrics_params_and_tables(offline, monkeypatch, store):
    library("mlflow")
    from mlflow import MlflowClient

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # which newer versions want to be told
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store.format(offline.parent))

    client, name = MlflowClient(), run_twice("mlflow", offline)
    (run,) = client.search_runs([client.get_experiment_by_name("srrl").experiment_id])
    assert (run.info.run_id, run.info.status, run.info.run_name) == (name, "FINISHED", "knee")
    assert run.data.params == {"steps": "3", "loss.clip_low": "0.2"}  # as it began
    history = client.get_metric_history(name, "reward/mean")
    assert [(m.step, m.value) for m in history] == [(1, 0.1), (2, 0.2), (3, 0.3)]
    table = client.load_table(client.get_experiment_by_name("srrl").experiment_id, "samples/step_000002.json")
    assert table["verdicts"].tolist() == ["[+5] met: Asks how long (it does)"]


def test_trackio_holds_metrics_and_tables(offline, capsys):
    library("trackio")
    name = run_twice("trackio", offline)
    (database,) = (offline.parent / "trackio").glob("*.db")
    with sqlite3.connect(database) as connection:
        rows = connection.execute("select run_name, step, metrics from metrics order by step").fetchall()
    metrics = [json.loads(row[2]) for row in rows]
    assert [row[:2] for row in rows] == [(name, 1), (name, 2), (name, 3)]
    assert [row["reward/mean"] for row in metrics] == [0.1, 0.2, 0.3]
    assert metrics[0]["samples"]["_value"][0]["response"] == "How long?"
    assert "\x1b" not in capsys.readouterr().out


def test_a_table_shows_conversation_and_verdicts_as_text():
    table = sample_table([SAMPLE])
    assert table["prompt"] == ["user: My knee hurts."] and table["reward"] == [0.5]
    assert table["verdicts"] == ["[+5] met: Asks how long (it does)"]


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "mlflow", "trackio"])
def test_a_missing_library_is_named_with_its_extra(monkeypatch, name):
    monkeypatch.setitem(sys.modules, "tensorboardX" if name == "tensorboard" else name, None)
    with pytest.raises(InputError, match=rf"trackers: {name} needs .*'srrl-jax\[{name}\]'"):
        find_tracker(name)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tensorbord", "'tensorbord' is none of tensorboard, wandb"),
        ("json:Nothing", "cannot import json:Nothing"),
    ],
)
def test_an_unknown_tracker_is_refused(name, message):
    with pytest.raises(InputError, match=message):
        find_tracker(name)


def test_a_tracker_that_cannot_be_opened_is_named(tmp_path):
    with pytest.raises(InputError, match="trackers: json:loads cannot be opened: TypeError"):
        with Trackers(["json:loads"], tmp_path, {}):
            pass
