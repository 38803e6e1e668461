"""A whole GRPO step with a random reward: rollout, reference log-probabilities, update. Prints one JSON line.

python scripts/bench_grpo.py CKPT --prompts 8 --group 4 --prompt-len 256 --new 128 --kl 0.04

With --repeated also the update with each prompt computed once per completion, as others do it
(`update_repeated_s`; how many times ours takes in `tree_speedup`).
"""

import resource
import sys
import time

from benchlib import limit_threads, measure, report, rollout_arguments


def main() -> None:
    parser = rollout_arguments(__doc__.splitlines()[0])
    parser.add_argument("--kl", type=float, default=0.04)
    parser.add_argument("--microbatch", type=int, default=2, help="prompts of one forward and backward pass")
    parser.add_argument("--remat", default="none", choices=["none", "full", "dots"])
    parser.add_argument("--repeated", action="store_true")
    args = parser.parse_args()
    limit_threads(args.threads)

    import jax
    import jax.numpy as jnp
    import numpy as np
    from flax import nnx

    from srrl_jax.checkpoints import load_model
    from srrl_jax.losses import group_advantages
    from srrl_jax.programs import fitting
    from srrl_jax.sampling import RowLengths, Sampler
    from srrl_jax.training import TrainConfig
    from srrl_jax.training.batch import pack_groups, split_batch
    from srrl_jax.training.shapes import UpdateShapes
    from srrl_jax.training.update import completion_logprobs, make_optimizer, make_update

    config = TrainConfig.from_dict(
        {
            "run_dir": "unused",
            "model": args.ckpt,
            "data": {"train": "unused"},
            "steps": 1,
            "prompts_per_step": args.prompts,
            "group_size": args.group,
            "kl_coef": args.kl,
            "rollout": {"max_new_tokens": args.new},
            "grading": {"max_new_tokens": 1},
            "optimizer": {"microbatch": args.microbatch, "remat": args.remat},
        }
    )
    model = load_model(args.ckpt)
    model.dtype = jnp.dtype(args.dtype)
    vocab = model.config.vocab_size
    rows = [RowLengths(args.prompt_len, [0] * args.group)] * args.prompts
    sampler = Sampler(model, rows, new_tokens=args.new, stop_ids=[vocab])
    shapes = UpdateShapes(args.prompt_len, (args.new,), args.microbatch)
    optimizer = make_optimizer(config.optimizer)
    graphdef, params = nnx.split(model)
    del model
    reference = jax.tree.map(jnp.copy, params) if args.kl > 0 else None
    update = make_update(graphdef, config, optimizer, args.remat)
    state = [params, optimizer.init(params)]
    del params
    random = np.random.default_rng(0)
    spent: dict[str, list[float]] = {"rollout_s": [], "logprob_s": [], "update_s": []}

    def learn(batch, microbatch: int) -> float:
        """Seconds of the update."""
        (part,) = split_batch(batch, 1, microbatch)
        start = time.perf_counter()
        with fitting("update", "Lower --microbatch, --group or --new, or set --remat full"):
            *state[:], metrics = update(*state, part)
            jax.block_until_ready(metrics)
        return time.perf_counter() - start

    def experience(key, group: int, prompts: np.ndarray):
        groups = sampler.generate(state[0], prompts.tolist(), [[[]] * group] * len(prompts), key)
        rewards = random.random((len(prompts), group), np.float32)
        batch = pack_groups(prompts.tolist(), groups, np.ones(rewards.shape, bool), shapes)
        return batch._replace(advantages=np.asarray(group_advantages(rewards)))

    def step(rep: int) -> None:
        start = time.perf_counter()
        prompts = random.integers(2, vocab, (args.prompts, args.prompt_len))
        batch = experience(jax.random.key(rep), args.group, prompts)
        spent["rollout_s"].append(time.perf_counter() - start)
        start = time.perf_counter()
        if reference is not None:
            (part,) = split_batch(batch, 1, args.microbatch)
            found = np.asarray(completion_logprobs(graphdef, reference, part, 1.0))
            batch = batch._replace(reference_logprobs=found.reshape(batch.logprobs.shape))
        spent["logprob_s"].append(time.perf_counter() - start)
        spent["update_s"].append(learn(batch, args.microbatch))
        last[0] = batch

    last = [None]
    times = measure(step, args.reps)
    # The first step compiles, and the second still does where donated buffers come back in another layout.
    middle = {name: sorted(values[1:])[(len(values) - 1) // 2] for name, values in spent.items()}
    more = {}
    if args.repeated:
        flat = jax.tree.map(lambda x: x.reshape(-1, 1, *x.shape[2:]), last[0]._replace(tree=None))
        tree = last[0].tree
        flat = flat._replace(
            tree=tree._replace(
                prefix=np.repeat(tree.prefix, args.group, axis=0),
                prefix_lengths=np.repeat(tree.prefix_lengths, args.group),
                branches=tree.branches.reshape(-1, 1, args.new),
                branch_lengths=tree.branch_lengths.reshape(-1, 1),
            )
        )
        learn(flat, args.microbatch * args.group)
        pairs = [
            (learn(last[0], args.microbatch), learn(flat, args.microbatch * args.group))
            for _ in range(args.reps)
        ]
        ours, repeated = (sorted(column)[args.reps // 2] for column in zip(*pairs, strict=True))
        more = {"update_repeated_s": repeated, "tree_speedup": repeated / ours}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    report("srrl_grpo", step_s=times.pop("s"), **middle, **times, peak_rss_mb=peak, **more)


if __name__ == "__main__":
    from srrl_jax.errors import InputError

    try:
        main()
    except InputError as error:
        sys.exit(f"bench_grpo.py: {error}")
