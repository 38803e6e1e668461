"""Grading speed: conversations x criteria verdicts, greedy, none stopping early. Prints one JSON line.

python scripts/bench_grade.py CKPT --conversations 8 --criteria 10 --prefix-len 512 --suffix-len 48 --new 16

With --verdict logits or constrained nothing is decoded: true or false is read off the end of the suffix.
"""

from benchlib import Roofline, arguments, limit_threads, measure, report


def main() -> None:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--conversations", type=int, default=8)
    parser.add_argument("--criteria", type=int, default=10)
    parser.add_argument("--prefix-len", type=int, default=512)
    parser.add_argument("--suffix-len", type=int, default=48)
    parser.add_argument("--new", type=int, default=16)
    parser.add_argument("--verdict", choices=["generate", "constrained", "logits"], default="generate")
    args = parser.parse_args()
    limit_threads(args.threads)

    import jax
    import numpy as np
    from flax import nnx

    from srrl_jax.checkpoints import load_model
    from srrl_jax.sampling import RowLengths, Sampler, SamplingConfig

    model = load_model(args.ckpt, dtype=args.dtype)
    draw, vocab = np.random.default_rng(1), model.config.vocab_size
    prefixes = draw.integers(2, vocab, (args.conversations, args.prefix_len)).tolist()
    suffixes = draw.integers(2, vocab, (args.conversations, args.criteria, args.suffix_len)).tolist()
    rows = [RowLengths(args.prefix_len, [args.suffix_len] * args.criteria)] * args.conversations
    greedy = SamplingConfig(temperature=0)
    sampler = Sampler(model, rows, new_tokens=args.new, stop_ids=[vocab], sampling=greedy)
    params = nnx.state(model)

    def run(rep: int) -> None:
        if args.verdict == "generate":
            sampler.generate(params, prefixes, suffixes, jax.random.key(rep))
        else:  # the two differ in what is done with the probabilities, on the host
            sampler.score(params, prefixes, suffixes, [2, 3])

    times = measure(run, args.reps)
    roof, verdicts = Roofline(args.ckpt, args.dtype), args.conversations * args.criteria
    least = roof.prefill(args.conversations * args.prefix_len, args.prefix_len / 2, 0)
    context = args.prefix_len + args.suffix_len / 2
    least += roof.prefill(verdicts * args.suffix_len, context, verdicts)
    if args.verdict == "generate":
        least += roof.decode(verdicts, args.conversations, args.prefix_len, args.suffix_len, args.new - 1)
    report(
        "srrl_grade",
        verdict=args.verdict,
        verdicts_s=verdicts / times["s"],
        **times,
        roofline_fraction=least / times["s"],
        gemm_gflops=roof.gemm / 1e9,
        read_gbs=roof.bandwidth / 1e9,
    )


if __name__ == "__main__":
    main()
