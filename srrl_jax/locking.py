"""One writer at a time: what two commands would write together is refused to the second.

On a disk the operating system keeps the lock, so it ends with the process that holds it. An object store has
no locks: there the holder renews an object, and one that nobody renews any more is taken over. No clocks are
compared: whoever finds such an object watches it.
"""

import json
import os
import shlex
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime

import fsspec
from etils import epath
from filelock import FileLock, Timeout

from srrl_jax import storage
from srrl_jax.errors import InputError
from srrl_jax.parallel import is_main

LEASE = 30.0
"""Seconds after which an object that was not renewed is nobody's."""

RENEW = 10.0


@contextmanager
def sole_writer(stem: epath.PathLike) -> Iterator[None]:
    """Nobody else writes what `stem` stands for, while the block lasts.

    `stem.json`, which names the holder, and on a disk `stem.lock` go with it; killed, it leaves them, and
    they lock nothing. With several processes only the main one takes the lock, for all.

    Args:
      stem: e.g. run_dir/writer, or OUT.jsonl.writer; its folder is made.
    Raises:
      InputError: another process holds it (names host, process, command and start), or nothing can be
        written there.
    """
    if not is_main():
        yield
        return
    stem = storage.locate(stem)
    card = stem.with_name(f"{stem.name}.json")
    try:
        card.parent.mkdir(parents=True, exist_ok=True)
        writable = storage.is_remote(card) or os.access(card.parent, os.W_OK | os.X_OK)
    except (FileExistsError, NotADirectoryError, PermissionError):
        writable = False
    if not writable:
        raise InputError(f"{card.parent}: cannot write there; give another place, or mend the directory")
    with _lease(card) if storage.is_remote(card) else _lock(card):
        yield


@contextmanager
def _lock(card: epath.Path) -> Iterator[None]:
    lock = FileLock(card.with_suffix(".lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        holder = json.loads(card.read_bytes()) if card.exists() else {}
        raise _refusal(card, holder) from None
    try:
        storage.replace(card, [json.dumps(_me()).encode()])
        yield
    finally:
        card.unlink(missing_ok=True)
        card.with_suffix(".lock").unlink()  # `acquire` of another that has opened it sees that it is gone
        lock.release()


@contextmanager
def _lease(card: epath.Path) -> Iterator[None]:
    files, path = fsspec.url_to_fs(os.fspath(card))  # past any cache of listings
    me, over = _me(), threading.Event()

    def read() -> dict | None:
        try:
            return json.loads(files.cat_file(path))
        except FileNotFoundError:
            return None

    def is_mine(found: dict | None) -> bool:
        return found is not None and found["token"] == me["token"]

    def write(**mode: str) -> None:
        files.pipe_file(path, json.dumps(me | {"renewed": _now()}).encode(), **mode)

    def renew() -> None:
        while not over.wait(RENEW):
            try:
                found = read()
                if is_mine(found):
                    write()
            except Exception:  # of whatever kind the store's library has; the next time may do
                continue
            if not is_mine(found):
                who = "nobody" if found is None else _told(found)
                print(f"srrl: {card}: now held by {who}; this process ends", file=sys.stderr, flush=True)
                os._exit(2)  # at once: what it would write is another's

    _watch(card, read)
    with suppress(FileNotFoundError):
        files.rm_file(path)
    try:
        write(mode="create")
    except FileExistsError:
        raise _refusal(card, read() or {}) from None
    thread = threading.Thread(target=renew, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        if is_mine(read()):
            files.rm_file(path)


def _watch(card: epath.Path, read) -> None:
    """Returns when nobody holds `card`. Raises InputError where it is seen to be renewed."""
    found = first = read()
    if first:
        print(f"{card}: held by {_told(first)}; waiting up to {LEASE:g} s for a sign of it", file=sys.stderr)
    end = time.monotonic() + LEASE
    while found and time.monotonic() < end:
        if found != first:
            raise _refusal(card, found)
        time.sleep(min(1.0, LEASE / 10))
        found = read()


def _me() -> dict[str, str | int]:
    return {
        "host": socket.gethostname(),
        "process": os.getpid(),
        "command": shlex.join(sys.argv)[:300],
        "started": _now(),
        "token": os.urandom(8).hex(),
    }


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def _told(holder: dict) -> str:
    if not holder:
        return "another process"
    return "process {process} on {host} ({command}; since {started})".format_map(holder)


def _refusal(card: epath.Path, holder: dict) -> InputError:
    return InputError(
        f"{card.with_suffix('')}: {_told(holder)} writes here. Let it end, end it, or write to another place"
    )
