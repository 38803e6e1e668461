"""Rollout speed: prompts x group completions, sampled, none stopping early. Prints one JSON line.

python scripts/bench_generate.py CKPT --prompts 8 --group 4 --prompt-len 256 --new 128

With --lengths geometric, four times as many prompts on the same slots, and completions that stop after a
quarter of --new tokens on average, beside the same run with each padded to --new; both rates count the
tokens up to the stop.
"""

import time

from benchlib import Roofline, limit_threads, measure, report, rollout_arguments


def main() -> None:
    parser = rollout_arguments(__doc__.splitlines()[0])
    parser.add_argument("--int8", default="none", choices=["none", "weights", "weights_kv"])
    parser.add_argument("--lengths", default="fixed", choices=["fixed", "geometric"])
    args = parser.parse_args()
    limit_threads(args.threads)

    import jax
    import numpy as np
    from flax import nnx

    from srrl_jax.checkpoints import load_model
    from srrl_jax.sampling import RowLengths, Sampler

    model = load_model(args.ckpt, dtype=args.dtype)
    params, vocab, draw = nnx.state(model), model.config.vocab_size, np.random.default_rng(0)
    geometric = args.lengths == "geometric"
    prompts = args.prompts * (4 if geometric else 1)
    ids = draw.integers(2, vocab, (prompts, args.prompt_len)).tolist()
    rows = [RowLengths(args.prompt_len, [0] * args.group)]
    produced = {}

    def runner(stop_ids):
        options = dict(together=args.prompts, new_tokens=args.new, int8=args.int8)
        sampler = Sampler(model, rows, stop_ids=stop_ids, **options)

        def run(rep: int) -> None:
            results = sampler.generate(params, ids, [[[]] * args.group] * prompts, jax.random.key(rep))
            produced[rep] = sum(len(completion.tokens) for row in results for completion in row)

        return run

    times = measure(runner([vocab]), args.reps)  # no such token: nothing stops
    if geometric:
        # One token in new / 4 is a stop.
        run, start = runner(draw.permutation(vocab)[: vocab * 4 // args.new]), time.perf_counter()
        for rep in range(1, args.reps + 1):
            run(rep)
        first = time.perf_counter() - start
        stopping = measure(run, args.reps)
        stopping["compile_s"] = first - args.reps * stopping["s"]
        tokens = sum(produced[rep] for rep in range(1, args.reps + 1)) / args.reps
        report(
            "srrl_generate_geometric",
            new_tok_s=tokens / stopping["s"],
            padded_tok_s=tokens / times["s"],
            ratio=times["s"] / stopping["s"],
            mean_length=tokens / (prompts * args.group),
            **stopping,
        )
        return
    roof, branches = Roofline(args.ckpt, args.dtype), prompts * args.group
    least = roof.prefill(prompts * args.prompt_len, args.prompt_len / 2, prompts)
    least += roof.decode(branches, prompts, args.prompt_len, 0, args.new - 1)
    report(
        "srrl_generate",
        new_tok_s=branches * args.new / times["s"],
        **times,
        roofline_fraction=least / times["s"],
        gemm_gflops=roof.gemm / 1e9,
        read_gbs=roof.bandwidth / 1e9,
    )


if __name__ == "__main__":
    main()
