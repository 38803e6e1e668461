"""The chunked head against the naive one: value and gradient, time and peak memory. Prints one JSON line.

python scripts/bench_head.py --tokens 4096 --vocab 151936 --hidden 256

Both run in one process by turns; memory is what the compiler reserves beyond arguments and results.
"""

import argparse
import os
import statistics
import time

from benchlib import limit_threads, report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--vocab", type=int, default=151_936)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--reps", type=int, default=2)
    args = parser.parse_args()
    limit_threads(args.threads)

    import jax
    import jax.numpy as jnp

    from srrl_jax.models.head import token_logprobs

    def naive(hidden, head, targets):
        logits = jnp.einsum("nbtd,vd->nbtv", hidden, head)
        total = jax.nn.logsumexp(logits, axis=-1)
        chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0] - total
        logprobs = logits - total[..., None]
        return chosen, -(jnp.exp(logprobs) * logprobs).sum(-1)

    keys = jax.random.split(jax.random.key(0), 3)
    shape = (1, 4, args.tokens // 4)
    hidden = jax.random.normal(keys[0], (*shape, args.hidden))
    head = 0.05 * jax.random.normal(keys[1], (args.vocab, args.hidden))
    inputs = (hidden, head, jax.random.randint(keys[2], shape, 0, args.vocab))

    def program(function):
        def loss(*inputs):
            logprobs, entropy = function(*inputs)
            return (logprobs + 0.01 * entropy).mean()

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(*inputs).compile()

    programs = {"ours": program(token_logprobs), "naive": program(naive)}
    seconds = {name: [] for name in programs}
    for rep in range(args.reps + 1):
        for name, run in programs.items():
            start = time.perf_counter()
            jax.block_until_ready(run(*inputs))
            if rep:  # the first warms up
                seconds[name].append(time.perf_counter() - start)
    times = {name: statistics.median(values) for name, values in seconds.items()}
    peaks = {name: run.memory_analysis().temp_size_in_bytes / 2**20 for name, run in programs.items()}
    report(
        "srrl_head",
        **{f"{name}_s": value for name, value in times.items()},
        **{f"{name}_temp_mib": value for name, value in peaks.items()},
        time_ratio=times["ours"] / times["naive"],
        memory_ratio=peaks["ours"] / peaks["naive"],
    )


if __name__ == "__main__":
    main()
