"""A hub id, through huggingface_hub itself, from a server of this machine."""

import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import jax
import numpy as np
import pytest
from flax import nnx
from huggingface_hub import constants

from srrl_jax.checkpoints import load_model
from srrl_jax.checkpoints.tokenizer import load_tokenizer

WORLD = Path(__file__).resolve().parents[2] / "srrl_jax/tinyworld/checkpoint"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Serves the embedded checkpoint and a pickle as owner/name; lists the files that are fetched."""
    files = {path.name: path.read_bytes() for path in WORLD.iterdir()} | {"pytorch_model.bin": b"pickle"}
    fetched = []

    class Hub(BaseHTTPRequestHandler):
        def do_HEAD(self):
            self._answer(body=False)

        def do_GET(self):
            self._answer(body=True)

        def log_message(self, *_):
            """Says nothing."""

        def _answer(self, body: bool):
            path = urlsplit(self.path).path
            if "/resolve/" in path:
                name = path.rpartition("/")[2]
                data, status = files.get(name, b""), 200 if name in files else 404
                fetched.extend([name] if body else [])
            elif "/tree/" in path:
                listed = [
                    {"type": "file", "oid": "0" * 40, "path": name, "size": len(data)}
                    for name, data in files.items()
                ]
                data, status = json.dumps(listed).encode(), 200
            else:
                siblings = [{"rfilename": name} for name in files]
                about = {"id": "owner/name", "sha": COMMIT, "siblings": siblings}
                data, status = json.dumps(about).encode(), 200
            self.send_response(status)
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if body:
                self.wfile.write(data)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("TQDM_POSITION", "-1")  # bars even where there is no terminal
    yield fetched
    server.shutdown()


def test_a_hub_id_is_fetched_once_with_a_progress_bar(hub, capsys):
    model, expected = load_model("owner/name"), load_model(WORLD)
    assert re.search(r"100%.*B", capsys.readouterr().err)
    for one, other in zip(*(jax.tree.leaves(nnx.state(m)) for m in (model, expected)), strict=True):
        np.testing.assert_array_equal(one, other)
    assert load_tokenizer("owner/name").encode("hello") == load_tokenizer(WORLD).encode("hello")
    assert "model.safetensors" in hub and not any(name.endswith(".bin") for name in hub)
    before = len(hub)
    load_model("owner/name")
    assert len(hub) == before == len(set(hub))
