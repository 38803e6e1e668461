"""RunLog: what is on disk after a write, a kill and a resume."""

import json
import math

import jax.numpy as jnp
import numpy as np
import pytest

from srrl_jax import storage
from srrl_jax.errors import InputError
from srrl_jax.telemetry import RunLog, read_jsonl, read_metrics


def steps(path):
    return [row["step"] for row in read_jsonl(path)]


def filled(run_dir, last):
    log = RunLog(run_dir)
    for step in range(1, last + 1):
        log.write(
            step, {"kl": step / 3}, [{"sample": i, "completion": "né"} for i in range(2)], {"time/x": step}
        )
    return log


def test_resumed_run_leaves_the_same_files_as_an_unbroken_one(tmp_path):
    whole = filled(tmp_path / "whole", 5)
    killed = filled(tmp_path / "killed", 4)
    for path in (killed.metrics_path, killed.samples_path):
        path.write_bytes(path.read_bytes()[:-4])  # torn in the last line
    resumed = RunLog(tmp_path / "killed")
    resumed.rewind(2)
    assert steps(resumed.metrics_path) == [1, 2]
    assert steps(resumed.samples_path) == [1, 1, 2, 2]
    for step in range(3, 6):
        resumed.write(step, {"kl": step / 3}, [{"sample": i, "completion": "né"} for i in range(2)])
    assert resumed.metrics_path.read_bytes() == whole.metrics_path.read_bytes()
    assert resumed.samples_path.read_bytes() == whole.samples_path.read_bytes()
    assert steps(resumed.timings_path) == [1, 2]  # the test writes no more of them
    assert not list((tmp_path / "killed").glob("*.tmp"))


def test_rewind_drops_a_torn_line_of_the_checkpoints_own_step(tmp_path):
    log = filled(tmp_path, 3)
    with log.samples_path.open("ab") as file:
        file.write('{"step": 3, "completion": "né'.encode()[:-1])  # inside a character
    log.rewind(3)
    assert steps(log.samples_path) == [1, 1, 2, 2, 3, 3]
    assert log.samples_path.read_bytes().endswith(b"\n")


def test_rewind_of_a_new_run_is_harmless(tmp_path):
    RunLog(tmp_path / "new").rewind(0)
    assert list((tmp_path / "new").iterdir()) == []


def test_reader_skips_a_torn_last_line_but_not_a_broken_one_before_it(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n\n{"step": 2}\n{"ste')
    assert read_jsonl(path) == [{"step": 1}, {"step": 2}]
    path.write_text('{"step": 1}\n{"ste\n{"step": 3}\n')
    with pytest.raises(InputError, match=r"metrics\.jsonl:2: not JSON"):
        read_jsonl(path)
    path.write_text("[1]\n")
    with pytest.raises(InputError, match=r"metrics\.jsonl:1: not a JSON object"):
        read_jsonl(path)
    with pytest.raises(InputError, match="no such file"):
        read_jsonl(tmp_path / "absent.jsonl")


def test_numbers_that_json_lacks_become_null_and_array_scalars_plain(tmp_path):
    log = RunLog(tmp_path)
    metrics = {
        "nan": math.nan,
        "inf": np.float64("inf"),
        "jax_nan": jnp.float32(math.nan),
        "float32": np.float32(0.25),
        "jax": jnp.float32(0.5),
        "int": np.int64(3),
        "python": 0.1,
    }
    log.write(7, metrics, [{"reward": -math.inf, "criteria": [{"verdict": None, "points": -2.5}]}])
    line = log.metrics_path.read_text()
    assert json.loads(line, parse_constant=pytest.fail) == {
        "step": 7, "nan": None, "inf": None, "jax_nan": None,
        "float32": 0.25, "jax": 0.5, "int": 3, "python": 0.1,
    }  # fmt: skip
    assert '"python": 0.1}' in line
    assert read_jsonl(log.samples_path) == [
        {"step": 7, "reward": None, "criteria": [{"verdict": None, "points": -2.5}]}
    ]


def test_any_text_survives(tmp_path):
    log = RunLog(tmp_path)
    text = "half a pair \ud83d, a line separator \u2028, \r\n and 日本語"
    log.write(1, {}, [{"completion": text}])
    log.rewind(1)
    assert read_jsonl(log.samples_path) == [{"step": 1, "completion": text}]
    assert "日本語" in log.samples_path.read_text(encoding="utf-8")


def test_a_log_in_a_bucket_is_taken_back_and_goes_on_the_same(bucket):
    whole = filled(bucket / "whole", 5)
    resumed = filled(bucket / "killed", 4)
    resumed.rewind(2)
    assert steps(resumed.metrics_path) == [1, 2]
    for step in range(3, 6):
        resumed.write(step, {"kl": step / 3}, [{"sample": i, "completion": "né"} for i in range(2)])
    for one, other in (
        (resumed.metrics_path, whole.metrics_path),
        (resumed.samples_path, whole.samples_path),
    ):
        assert read_jsonl(one) == read_jsonl(other)
        assert [part.name for part in storage.parts(one)] == [part.name for part in storage.parts(other)]
    resumed.rewind(-1)
    assert storage.parts(resumed.metrics_path) == storage.parts(resumed.samples_path) == []


def test_metrics_are_read_with_the_timings_of_their_step(tmp_path):
    log = filled(tmp_path, 2)
    log.write(3, {"kl": 1.0})
    assert read_metrics(tmp_path) == [
        {"step": 1, "kl": 1 / 3, "time/x": 1},
        {"step": 2, "kl": 2 / 3, "time/x": 2},
        {"step": 3, "kl": 1.0},
    ]
    log.timings_path.unlink()
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3]


def test_events_stay_when_the_rest_is_taken_back_and_lose_a_torn_line(tmp_path):
    log = filled(tmp_path, 3)
    log.event(3, "warning", "it ends")
    with log.events_path.open("ab") as file:
        file.write(b'{"step": 3, "ev')
    log.rewind(1)
    log.event(1, "resume", "again")
    events = [(row["step"], row["event"], row["message"]) for row in read_jsonl(log.events_path)]
    assert events == [(3, "warning", "it ends"), (1, "resume", "again")]
