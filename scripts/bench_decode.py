"""A step of decoding beside its products with weights alone. Prints one JSON line.

python scripts/bench_decode.py CKPT --prompts 8 --group 4 --prompt-len 256 --new 128

`products_ms` runs every product of a token in turn, as decoding does, so that all weights come from memory;
`cached_ms` is the same work on the weights of one layer, over and over, which stay in the cache. `least_ms`
is the roofline of the step: products at the peak, or bytes at the read bandwidth, whatever takes longer.
"""

import time

from benchlib import Roofline, limit_threads, report, rollout_arguments


def main() -> None:
    parser = rollout_arguments(__doc__.splitlines()[0])
    args = parser.parse_args()
    limit_threads(args.threads)

    import jax
    import jax.numpy as jnp
    import numpy as np
    from flax import nnx

    from srrl_jax.checkpoints import load_model
    from srrl_jax.models.modules import project
    from srrl_jax.sampling import RowLengths, Sampler
    from srrl_jax.sampling.decoder import Decoder

    model = load_model(args.ckpt, dtype=args.dtype)
    branches = args.prompts * args.group
    decoder = Decoder(model)
    x = jax.random.normal(jax.random.key(0), (branches, model.config.hidden_size), model.dtype)

    def products(layers, head, x):
        """Each input is made of the product before, so that they run in turn."""

        def fitted(y, size):
            return jnp.tile(y, (1, -(-size // y.shape[1])))[:, :size]

        for layer in layers:
            for weight in layer:
                x = project(fitted(x, weight.shape[1]), weight)
        return project(fitted(x, head.shape[1]), head, jnp.float32).sum()

    weights = [[linear.weight[...] for linear in layer.projections().values()] for layer in decoder.stacks]
    run = jax.jit(products)

    def milliseconds(function) -> float:
        """Median, after two runs to compile and settle."""
        times = []
        for _ in range(args.reps + 2):
            start = time.perf_counter()
            jax.block_until_ready(function())
            times.append(time.perf_counter() - start)
        return sorted(times[2:])[args.reps // 2] * 1e3

    ids = (
        np.random.default_rng(0)
        .integers(2, model.config.vocab_size, (args.prompts, args.prompt_len))
        .tolist()
    )
    rows = [RowLengths(args.prompt_len, [0] * args.group)] * args.prompts
    params = nnx.state(model)

    def generate(new: int):
        sampler = Sampler(model, rows, new_tokens=new, stop_ids=[model.config.vocab_size])
        return lambda: sampler.generate(params, ids, [[[]] * args.group] * args.prompts, jax.random.key(0))

    short, long = (milliseconds(generate(new)) for new in (args.new // 2, args.new))
    roof = Roofline(args.ckpt, args.dtype)
    steps = args.new - args.new // 2
    least = roof.decode(branches, args.prompts, args.prompt_len, args.new // 2, steps) / steps
    report(
        "srrl_decode",
        rows=branches,
        step_ms=(long - short) / steps,
        products_ms=milliseconds(lambda: run(weights, decoder.head, x)),
        cached_ms=milliseconds(lambda: run([weights[0]] * len(weights), decoder.head, x)),
        least_ms=1e3 * least,
        gemm_gflops=roof.gemm / 1e9,
        read_gbs=roof.bandwidth / 1e9,
    )


if __name__ == "__main__":
    main()
