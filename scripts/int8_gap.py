"""What decoding in 8 bits changes: the gap of sampled tokens' log-probabilities. Prints one JSON line.

    python scripts/int8_gap.py CKPT ROWS.jsonl --int8 weights_kv

Answers the first prompts of ROWS that fit, and scores the answers with the weights as they are, as a run
does with `grading.int8` (`srrl_jax/grading/gap.py`).
"""

import argparse

import jax
import numpy as np
from benchlib import report
from flax import nnx

from srrl_jax.checkpoints import load_model
from srrl_jax.checkpoints.tokenizer import load_tokenizer
from srrl_jax.data import load_examples
from srrl_jax.grading.gap import reply_gaps
from srrl_jax.sampling import RowLengths, Sampler


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("ckpt")
    parser.add_argument("rows")
    parser.add_argument("--int8", default="weights", choices=["none", "weights", "weights_kv"])
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--longest", type=int, default=128, help="tokens of a prompt")
    parser.add_argument("--new", type=int, default=32, help="tokens of an answer")
    args = parser.parse_args()

    model, tokenizer = load_model(args.ckpt), load_tokenizer(args.ckpt)
    rendered = (tokenizer.render(list(row.prompt), thinking=False) for row in load_examples(args.rows))
    prompts = [ids for text in rendered if len(ids := tokenizer.encode(text)) <= args.longest][: args.prompts]
    sampler = Sampler(
        model,
        [RowLengths(len(prompt), [0]) for prompt in prompts],
        new_tokens=args.new,
        stop_ids=tokenizer.stop_ids,
        allowed=tokenizer.size,
        int8=args.int8,
    )
    params, nothing = nnx.state(model), [[]] * len(prompts)
    replies = [row[0] for row in sampler.generate(params, prompts, [[[]]] * len(prompts), jax.random.key(0))]
    gaps = reply_gaps(sampler, params, prompts, nothing, replies)
    report(
        "srrl_int8_gap",
        int8=args.int8,
        tokens=sum(len(reply.tokens) for reply in replies),
        mean=float(np.mean([gap.mean for gap in gaps])),
        max=max(gap.max for gap in gaps),
        surprisal=-float(np.concatenate([reply.logprobs for reply in replies]).mean()),
    )


if __name__ == "__main__":
    main()
