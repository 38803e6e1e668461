"""What the benchmarks share: threads, timing, and the roofline of this machine."""

import argparse
import json
import os
import time
from pathlib import Path


def arguments(description: str) -> argparse.ArgumentParser:
    """A parser with what every benchmark takes."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("ckpt", help="checkpoint directory; token ids are synthetic, so any will do")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--reps", type=int, default=3)
    return parser


def rollout_arguments(description: str) -> argparse.ArgumentParser:
    """A parser with the sizes of a rollout too."""
    parser = arguments(description)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--group", type=int, default=4)
    parser.add_argument("--prompt-len", type=int, default=256)
    parser.add_argument("--new", type=int, default=128)
    return parser


def limit_threads(threads: int) -> None:
    """Call before JAX is imported: XLA's pool takes the cores that it may run on."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])


def measure(run, reps: int) -> dict[str, float]:
    """Runs once to compile, then `reps` times: seconds to compile, median seconds, their CPU seconds."""
    start = time.perf_counter()
    run(0)
    first = time.perf_counter() - start
    walls, cpus = [], []
    for rep in range(1, reps + 1):
        wall, cpu = time.perf_counter(), sum(os.times()[:2])
        run(rep)
        walls.append(time.perf_counter() - wall)
        cpus.append(sum(os.times()[:2]) - cpu)
    middle = sorted(range(reps), key=walls.__getitem__)[reps // 2]
    return {"s": walls[middle], "cpu_s": cpus[middle], "compile_s": first - walls[middle]}


class Roofline:
    """Least seconds of a workload here: distinct tokens only, at the product peak and read bandwidth.

    Both are measured now, in the type of the weights: products of random squares (2048 wide on a CPU, 8192
    elsewhere), and the sum of 512 MiB of float32 (4 GiB).
    """

    def __init__(self, ckpt: str, dtype: str):
        import jax
        import jax.numpy as jnp

        c = json.loads((Path(ckpt) / "config.json").read_text())
        hidden, layers, heads = c["hidden_size"], c["num_hidden_layers"], c["num_attention_heads"]
        kv, ffn = c["num_key_value_heads"] * c["head_dim"], c["intermediate_size"]
        self.attention = 4 * layers * heads * c["head_dim"]  # FLOPs of a token for each key
        self.layers, self.kv_weights = layers, 2 * hidden * kv
        self.body = layers * (hidden * (2 * heads * c["head_dim"] + 3 * ffn) + self.kv_weights)
        self.head = c["vocab_size"] * hidden
        self.size = jnp.dtype(dtype).itemsize
        self.key_bytes = layers * 2 * kv * self.size

        on_cpu = jax.default_backend() == "cpu"
        width, count = (2048, 2**27) if on_cpu else (8192, 2**30)
        a, big = jax.random.normal(jax.random.key(0), (width, width), dtype), jnp.ones(count)
        product, total = jax.jit(lambda x: x @ x), jax.jit(jnp.sum)
        self.gemm = 2 * width**3 / _best(lambda: product(a).block_until_ready())
        self.bandwidth = 4 * count / _best(lambda: total(big).block_until_ready())

    def forward(self, tokens: int, context: float, heads: int) -> float:
        """FLOPs of `tokens` with a mean `context`, `heads` of them unembedded."""
        return tokens * (2 * self.body + self.attention * context) + 2 * heads * self.head

    def prefill(self, tokens: int, context: float, heads: int) -> float:
        """Seconds. Of the last layer, tokens that are not unembedded need their keys and values alone."""
        body = 2 * self.body / self.layers - 2 * self.kv_weights + self.attention / self.layers * context
        return (self.forward(tokens, context, heads) - (tokens - heads) * body) / self.gemm

    def decode(self, rows: int, shared_rows: int, shared: int, own: int, steps: int) -> float:
        """Seconds of `steps` tokens in `rows` branches of `shared_rows` prefixes of `shared` tokens.

        A step reads the weights once, each prefix once, and what each branch holds of its own.
        """
        total = 0.0
        for step in range(steps):
            flops = self.forward(rows, shared + own + step, rows)
            keys = shared_rows * shared + rows * (own + step)
            read = self.size * (self.body + self.head) + keys * self.key_bytes
            total += max(flops / self.gemm, read / self.bandwidth)
        return total


def _best(run, reps: int = 5) -> float:
    run()
    times = []
    for _ in range(reps):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


def report(bench: str, **values) -> None:
    """One JSON line, with the card and the most of its memory that was in use."""
    import jax

    device = jax.devices()[0]
    if device.platform != "cpu":
        peak = (device.memory_stats() or {}).get("peak_bytes_in_use", 0)
        values |= {"device": device.device_kind, "peak_gb": peak / 1e9}
    rounded = {k: round(v, 4) if isinstance(v, float) else v for k, v in values.items()}
    print(json.dumps({"bench": bench} | rounded), flush=True)
