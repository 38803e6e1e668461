"""The host's own time for a chunk of decoding: 28 narrow layers. Prints one JSON line.

python scripts/bench_host.py

`call_ms` is how long the host is in the call that starts a chunk, with nothing left to decode, so that the
device adds as little as it can; `with_fetch_ms` includes waiting for that and fetching the result.
"""

import statistics
import time

from benchlib import report


def main() -> None:
    import jax
    import numpy as np
    from flax import nnx

    from srrl_jax.models import Qwen3, Qwen3Config
    from srrl_jax.sampling import RowLengths, Sampler
    from srrl_jax.sampling.decoder import KeysValues

    config = Qwen3Config(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=28,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
    )
    model = Qwen3(config, rngs=nnx.Rngs(0))
    sampler = Sampler(model, [RowLengths(8, [0] * 4)] * 4, new_tokens=32, stop_ids=[1])
    weights, key = sampler.prepare(nnx.state(model)), jax.random.key(0)
    state, rule = sampler.jitted.empty(key), jax.device_put(sampler.sampling_params([1]))
    enough, cache = jax.device_put(np.int32(0)), KeysValues()  # nothing is shared
    decoder, calls, whole = tuple(jax.tree.leaves(weights.decoder)), [], []
    for _ in range(220):
        start = time.perf_counter()
        out, state = sampler.jitted.decode(decoder, cache, state, rule, enough, width=sampler.shapes.own)
        calls.append(time.perf_counter() - start)
        jax.device_get(out)
        whole.append(time.perf_counter() - start)
    middle = [statistics.median(times[20:]) * 1e3 for times in (calls, whole)]
    report("srrl_host", call_ms=middle[0], with_fetch_ms=middle[1])


if __name__ == "__main__":
    main()
