"""The outside grader of claim b of the study: the embedded model at four times its layers, here or over HTTP.

    python scripts/outside.py      # prints the base_url of an endpoint on a free port of 127.0.0.1; serves

The layers that it has more add nothing to what it computes, so that its verdicts are those of the embedded
model: it differs in what a verdict costs alone. As servers with a prefix cache do, the endpoint answers what
comes at the same time together, and reads a response once for all criteria that are asked about it.
"""

import dataclasses
import functools
import json
import queue
import sys
import threading
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import jax
import jax.numpy as jnp
from flax import nnx

from srrl_jax.checkpoints import load_model
from srrl_jax.checkpoints.tokenizer import load_tokenizer
from srrl_jax.grading import Grader, GradingItem, Verdict
from srrl_jax.models import Qwen3
from srrl_jax.parallel import make_mesh
from srrl_jax.sampling import RowLengths, Sampler, SamplingConfig
from srrl_jax.tinyworld.tokenizer import CHECKPOINT
from srrl_jax.training import TrainConfig
from srrl_jax.training.experience import make_actor
from srrl_jax.training.tasks import load_tasks

LAYERS = 16
TOGETHER = 128  # prompts that the endpoint answers at a time
LONGEST = RowLengths(160, [32] * 8)  # tokens of a prompt up to the criterion, and of eight with what follows
REPLY = 20  # tokens, as in configs/demo.yaml


def larger() -> Qwen3:
    """The embedded model with layers behind its own that add nothing: all their weights are 0."""
    small = load_model(CHECKPOINT)
    model = Qwen3(dataclasses.replace(small.config, num_hidden_layers=LAYERS), rngs=nnx.Rngs(0))

    def padded(old: jax.Array, new: jax.Array) -> jax.Array:
        return jnp.pad(old, [(0, n - o) for o, n in zip(old.shape, new.shape, strict=True)])

    nnx.update(model, jax.tree.map(padded, nnx.state(small), nnx.state(model)))
    return model


def examiner(model: Qwen3, *keys: str) -> tuple[jax.sharding.Mesh, Grader]:
    """Asks a model of this structure as configs/demo.yaml with these keys does."""
    config = TrainConfig.load("configs/demo.yaml", [f"model={CHECKPOINT}", "eval.rows=8", *keys])
    mesh, tokenizer = make_mesh(config.mesh), load_tokenizer(CHECKPOINT)
    with jax.set_mesh(mesh):
        lengths = load_tasks(config, tokenizer).lengths(config)
        return mesh, make_actor(model, tokenizer, config, mesh, lengths).grader


class Larger:
    """`grader=outside:Larger` in a recipe: it grades in the process of the run."""

    def __init__(self):
        model = larger()
        self._params, (self._mesh, self._grader), self._calls = nnx.state(model), examiner(model), 0

    def grade(
        self, items: Sequence[GradingItem], on_progress: Callable[[int, int], None] = lambda done, total: None
    ) -> list[list[Verdict]]:
        self._calls += 1
        with jax.set_mesh(self._mesh):
            return self._grader.grade(self._params, items, jax.random.key(self._calls), on_progress)


def answer(waiting: queue.Queue) -> None:
    """Takes (messages, future) for ever, as many as are there at a time, and samples their replies."""
    model, tokenizer = larger(), load_tokenizer(CHECKPOINT)
    sampler = Sampler(
        model,
        [LONGEST] * (TOGETHER // 8),
        new_tokens=REPLY,
        stop_ids=tokenizer.stop_ids,
        sampling=SamplingConfig(temperature=1.0),
        allowed=tokenizer.size,
    )
    weights = sampler.prepare(nnx.state(model))
    for call in range(sys.maxsize):
        asked = [waiting.get()]
        with suppress(queue.Empty):
            while len(asked) < TOGETHER:
                asked.append(waiting.get(timeout=0.05))  # those that come with it
        rows = defaultdict(list)
        for messages, future in asked:
            prompt = tokenizer.render(messages, thinking=False)
            start = prompt.rindex("rule :")  # of tinyworld/grader.txt
            rows[prompt[:start]].append((tokenizer.encode(prompt[start:]), future))
        prefixes = [tokenizer.encode(text) for text in rows]
        branches = [[branch for branch, _ in row] for row in rows.values()]
        replies = sampler.generate(weights, prefixes, branches, jax.random.key(call))
        for prefix, row, found in zip(prefixes, rows.values(), replies, strict=True):
            for (branch, future), reply in zip(row, found, strict=True):
                usage = {"prompt_tokens": len(prefix) + len(branch), "completion_tokens": len(reply.tokens)}
                future.set_result((tokenizer.decode(reply.tokens.tolist()), usage))


def serve() -> None:
    """Prints the endpoint's base_url, and serves until stdin is closed, as by the end of who began it."""
    waiting: queue.Queue = queue.Queue()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            future: Future = Future()
            waiting.put((body["messages"], future))
            text, usage = future.result()
            message = {"role": "assistant", "content": text}
            found = json.dumps({"choices": [{"message": message}], "usage": usage}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(found)))
            self.end_headers()
            self.wfile.write(found)

        def log_message(self, *_):
            """Says nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    for target in (server.serve_forever, functools.partial(answer, waiting)):
        threading.Thread(target=target, daemon=True).start()
    print(f"http://127.0.0.1:{server.server_port}/v1", flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    serve()
