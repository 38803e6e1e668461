"""Rollout speed: prompts x group completions, sampled, none stopping early. Prints one JSON line.

python scripts/bench_generate.py CKPT --prompts 8 --group 4 --prompt-len 256 --new 128
"""

from benchlib import Roofline, arguments, limit_threads, measure, report


def main() -> None:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--group", type=int, default=4)
    parser.add_argument("--prompt-len", type=int, default=256)
    parser.add_argument("--new", type=int, default=128)
    args = parser.parse_args()
    limit_threads(args.threads)

    import jax
    import numpy as np
    from flax import nnx

    from srrl_jax.models import Qwen3
    from srrl_jax.sampling import Buckets, Sampler

    model = Qwen3.from_pretrained(args.ckpt, dtype=args.dtype)
    ids = np.random.default_rng(0).integers(2, model.config.vocab_size, (args.prompts, args.prompt_len))
    buckets = Buckets(prefix=(args.prompt_len,), fan_out=(args.group,), rows=(args.prompts,))
    sampler = Sampler(model, buckets, new_tokens=args.new, stop_ids=[model.config.vocab_size])
    params, branches = nnx.state(model), [[[]] * args.group] * args.prompts

    def run(rep: int) -> None:
        sampler.generate(params, ids.tolist(), branches, jax.random.key(rep))

    times = measure(run, args.reps)
    roof, rows = Roofline(args.ckpt), args.prompts * args.group
    least = roof.prefill(args.prompts * args.prompt_len, args.prompt_len / 2, args.prompts)
    least += roof.decode(rows, args.prompts, args.prompt_len, 0, args.new - 1)
    report(
        "srrl_generate",
        new_tok_s=rows * args.new / times["s"],
        **times,
        roofline_fraction=least / times["s"],
        gemm_gflops=roof.gemm / 1e9,
        read_gbs=roof.bandwidth / 1e9,
    )


if __name__ == "__main__":
    main()
