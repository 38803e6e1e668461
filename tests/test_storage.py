import sys

import pytest

from srrl_jax import storage
from srrl_jax.errors import InputError


@pytest.fixture(params=["disk", "bucket"])
def folder(request, tmp_path):
    return request.getfixturevalue("bucket") if request.param == "bucket" else tmp_path


def read(log) -> bytes:
    return b"".join(part.read_bytes() for part in storage.parts(log))


def test_a_log_grows_and_is_read_in_order(folder):
    log = folder / "metrics.jsonl"
    assert storage.parts(log) == []
    for number in range(12):
        storage.append(log, b"%d\n" % number)
    storage.append(folder / "metrics-old.jsonl", b"another log\n")
    assert read(log) == b"".join(b"%d\n" % number for number in range(12))
    assert len(storage.parts(log)) == (12 if storage.is_remote(folder) else 1)


def test_parts_brought_to_a_disk_are_read_before_what_is_added_there(tmp_path):
    (tmp_path / "metrics-000001.jsonl").write_bytes(b"1\n")
    (tmp_path / "metrics-000002.jsonl").write_bytes(b"2\n")
    storage.append(tmp_path / "metrics.jsonl", b"3\n")
    assert read(tmp_path / "metrics.jsonl") == b"1\n2\n3\n"


def test_replace_is_whole_or_nothing(folder):
    def dies():
        yield b"new"
        raise KeyboardInterrupt

    path = folder / "config.yaml"
    storage.replace(path, [b"o", b"ld"])
    with pytest.raises(KeyboardInterrupt):
        storage.replace(path, dies())
    assert path.read_bytes() == b"old"


def test_locate_gives_whole_paths(bucket, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert str(storage.locate(f"{bucket}/run")) == "gs://bucket/run"
    assert str(storage.locate("run")) == str(tmp_path.resolve() / "run")


def test_urls_and_stores_without_their_library_are_refused(monkeypatch):
    with pytest.raises(InputError, match="is a URL: give a path on this machine, or gs"):
        storage.locate("https://example.com/rows.jsonl")
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(InputError, match="gs://bucket/run: .*gcsfs"):
        storage.locate("gs://bucket/run")


def test_the_stand_in_bucket_cannot_append(bucket):
    with pytest.raises(NotImplementedError):
        (bucket / "log").open("ab")
