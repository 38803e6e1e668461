"""What an endpoint said, on disk: one SQLite file, keyed by all that decides a reply."""

import hashlib
import json
import sqlite3
from pathlib import Path
from typing import Any, NamedTuple

from srrl_jax.errors import InputError


class CachedReply(NamedTuple):
    """A reply's text and the tokens that were paid for it."""

    text: str
    prompt_tokens: int
    completion_tokens: int


def request_id(base_url: str, body: dict[str, Any], draw: int) -> str:
    """A hash of the endpoint, of a request (model, prompt, parameters), and of which draw of it this is."""
    return hashlib.sha256(json.dumps([base_url, body, draw], sort_keys=True).encode()).hexdigest()


class ReplyCache:
    """Replies by `request_id`. Each is on disk when `put` returns; several processes may share a file.

    Prompts are not kept, only their hashes.

    Raises:
      InputError: the file cannot be made, or is not such a cache.
    """

    def __init__(self, path: str | Path):
        try:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(path, timeout=60, isolation_level=None)  # every statement commits
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("CREATE TABLE IF NOT EXISTS replies (id TEXT PRIMARY KEY, reply TEXT NOT NULL)")
        except (OSError, sqlite3.Error) as error:
            raise InputError(
                f"cache: cannot use {path} ({error}); give the path of a file on this machine"
            ) from None

    def get(self, name: str) -> CachedReply | None:
        """The reply, or None."""
        row = self._db.execute("SELECT reply FROM replies WHERE id = ?", (name,)).fetchone()
        return row and CachedReply(*json.loads(row[0]))

    def put(self, name: str, reply: CachedReply) -> None:
        """Keeps a reply; one that is there already stays."""
        # As ASCII: a reply may hold half of a surrogate pair.
        self._db.execute("INSERT OR IGNORE INTO replies VALUES (?, ?)", (name, json.dumps(reply)))

    def close(self) -> None:
        self._db.close()
