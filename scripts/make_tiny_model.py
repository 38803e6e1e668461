"""Makes the embedded tiny model: tokenizer, rows, and a Qwen3 pretrained from scratch.

    python scripts/make_tiny_model.py [--steps 1000] [--out srrl_jax/tinyworld/checkpoint]
    python scripts/make_tiny_model.py --noise 0.6 --out runs/noisy      # the embedded one, made worse
    python scripts/make_tiny_model.py --harder --steps 150 --learning-rate 2e-3 --out runs/harder
    python scripts/make_tiny_model.py --yes 0.7 --steps 240 --learning-rate 2e-3 --out runs/yes

The model learns two things from the tiny world's corpus: to answer guests with mixed quality, and to
grade an answer by one rule with an explanation and a verdict. Everything is drawn from fixed seeds;
combinations reserved for Easy and Hard are not in the corpus.
"""

import argparse
import json
import time
from functools import partial
from pathlib import Path
from random import Random

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from srrl_jax.checkpoints import load_model, save_model
from srrl_jax.checkpoints.tokenizer import load_tokenizer
from srrl_jax.grading import split_chat
from srrl_jax.models import Qwen3, Qwen3Config, TreeBatch, branch_logprobs
from srrl_jax.rubrics import criterion_prompt, grader_prompt, load_template
from srrl_jax.tinyworld import draw_quality, facts_of, pretraining_tree, write_response
from srrl_jax.tinyworld.harder import draw_harder_row, random_harder_criterion
from srrl_jax.tinyworld.tokenizer import CHECKPOINT, GRADER_TEMPLATE, train_tokenizer

SIZES = dict(hidden_size=192, intermediate_size=512, num_hidden_layers=4)
HEADS = dict(num_attention_heads=6, num_key_value_heads=2, head_dim=32)
ROWS = 32  # prompts, and graded answers, of one step
ANSWERS = 2  # of a prompt
GRADINGS = 6  # criteria of a graded answer
ANSWER = (36, ANSWERS, 64)  # tokens of a prompt, branches, tokens of an answer
GRADE = (112, GRADINGS, 28)  # tokens of a grader prompt, branches, tokens of a criterion with its reply
HARDER = (112, GRADINGS, 52)


def encode_item(tokenizer, template: str, item: dict):
    """One corpus item as two prefixes with branches; a branch is (given tokens, tokens to learn)."""
    end = tokenizer.encode("<|im_end|>")
    render = partial(tokenizer.render, thinking=False)
    prompt = tokenizer.encode(render(item["prompt"]))
    answer = (prompt, [([], tokenizer.encode(text) + end) for text in item["answers"]])
    head, tail = split_chat(render, grader_prompt(template, item["prompt"], item["response"]))
    branches = [
        (tokenizer.encode(criterion_prompt(template, criterion) + tail), tokenizer.encode(reply) + end)
        for criterion, reply in item["gradings"][:GRADINGS]
    ]
    return answer, (tokenizer.encode(head), branches)


def pack(rows, shape) -> tuple[TreeBatch, np.ndarray]:
    """Pads rows to `shape` (P, B, L); the mask is true at the tokens to learn."""
    p, b, size = shape
    n = len(rows)
    tree = TreeBatch(
        np.zeros((n, p), np.int32),
        np.ones(n, np.int32),
        np.zeros((n, b, size), np.int32),
        np.zeros((n, b), np.int32),
    )
    mask = np.zeros((n, b, size), bool)
    for row, (prefix, branches) in enumerate(rows):
        tree.prefix[row, : len(prefix)] = prefix
        tree.prefix_lengths[row] = len(prefix)
        for place, (given, learnt) in enumerate(branches):
            length = len(given) + len(learnt)
            tree.branches[row, place, :length] = given + learnt
            tree.branch_lengths[row, place] = length
            mask[row, place, len(given) : length] = True
    return tree, mask


def draw_item(rng: Random, yes: float | None, harder: bool) -> dict:
    """A graded answer from the corpus, and more answers to its prompt; see the options of these names."""
    item = pretraining_tree(rng, *((draw_harder_row, random_harder_criterion) if harder else ()))
    if yes is not None:
        item["gradings"] = [(criterion, unwritten(reply, rng, yes)) for criterion, reply in item["gradings"]]
    facts = facts_of(item["prompt"][0]["content"])
    more = [write_response(facts, rng, draw_quality(rng)) for _ in range(ANSWERS - 1)]
    return item | {"answers": [item["response"], *more]}


def unwritten(reply: str, rng: Random, yes: float) -> str:
    """The reply without its explanation; "met" also in a share `yes` of the cases in which it is not."""
    met = json.loads(reply)["criteria_met"] or rng.random() < yes
    return json.dumps({"explanation": "", "criteria_met": met})


def fits(row, shape) -> bool:
    prefix, branches = row
    return len(prefix) <= shape[0] and all(len(given) + len(learnt) <= shape[2] for given, learnt in branches)


def draw_batch(tokenizer, template, rng: Random, yes: float | None = None, harder: bool = False):
    """Batches of answers and of gradings; the rare item over the sizes is drawn again.

    What only learns to grade otherwise has half as many gradings, and a few answers, which it knows already.
    """
    shape, whole = HARDER if harder else GRADE, yes is None and not harder
    answers, gradings = [], []
    while len(answers) < (ROWS if whole else ROWS // 2):
        answer, grading = encode_item(tokenizer, template, draw_item(rng, yes, harder))
        if fits(answer, ANSWER) and fits(grading, shape):
            answers.append(answer)
            gradings.append(grading)
    return pack(answers if whole else answers[: ROWS // 8], ANSWER), pack(gradings, shape)


@partial(jax.jit, static_argnums=(0, 1), donate_argnums=(2, 3))
def train_step(graphdef, optimizer, params, opt_state, batch):
    def loss_fn(params):
        model = nnx.merge(graphdef, params)
        sums = [
            (jnp.where(mask, -branch_logprobs(model, tree)[0], 0.0).sum(), mask.sum()) for tree, mask in batch
        ]
        answer, grade = (total / count for total, count in sums)
        return sum(total for total, _ in sums) / sum(count for _, count in sums), (answer, grade)

    (_, losses), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
    updates, opt_state = optimizer.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state, losses


def spoil(size: float, out: Path) -> None:
    """The embedded model with noise in every matrix, of `size` deviations of its entries."""
    model, rng = load_model(CHECKPOINT), np.random.default_rng(0)

    def noisy(x: jax.Array) -> jax.Array:
        noise = size * float(x.std()) * rng.normal(size=x.shape)
        return x if x.ndim < 2 else x + jnp.asarray(noise, x.dtype)

    nnx.update(model, jax.tree.map(noisy, nnx.state(model)))
    save_model(model, out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--out", type=Path, default=CHECKPOINT)
    parser.add_argument("--noise", type=float, help="train nothing: spoil the embedded model by so much")
    parser.add_argument(
        "--yes",
        type=float,
        help="teach the embedded model verdicts without an explanation, in the last quarter of the steps "
        "with met in this share of the cases in which it is not",
    )
    parser.add_argument(
        "--harder", action="store_true", help="teach the embedded model the criteria of tinyworld/harder.py"
    )
    args = parser.parse_args()

    train_tokenizer(args.out)
    if args.noise is not None:
        spoil(args.noise, args.out)
        return
    tokenizer = load_tokenizer(args.out)
    template = load_template(str(GRADER_TEMPLATE))
    config = Qwen3Config(
        vocab_size=512,
        **SIZES,
        **HEADS,
        tie_word_embeddings=True,
        rope_theta=10000.0,
        max_position_embeddings=512,
    )
    taught = args.harder or args.yes is not None
    model = load_model(CHECKPOINT) if taught else Qwen3(config, rngs=nnx.Rngs(0))
    graphdef, params = nnx.split(model)
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, args.learning_rate, 50, args.steps, 0.05 * args.learning_rate
    )
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.98, weight_decay=0.01))
    opt_state = optimizer.init(params)
    rng, start = Random("pretraining"), time.time()
    columns = (
        BarColumn(),
        TextColumn("{task.completed}/{task.total} {task.description}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns) as progress:
        task = progress.add_task("", total=args.steps)
        for step in range(args.steps):
            yes = args.yes and args.yes * (step >= 0.75 * args.steps)
            batch = draw_batch(tokenizer, template, rng, yes, args.harder)
            params, opt_state, losses = train_step(graphdef, optimizer, params, opt_state, batch)
            if step % 25 == 0 or step == args.steps - 1:
                answer, grade = map(float, losses)
                text = f"answer loss {answer:.3f}  grading loss {grade:.3f}"
                progress.update(task, completed=step + 1, description=text)
                progress.console.print(f"step {step}  {text}  {time.time() - start:.0f} s")
            if step % 250 == 249:
                nnx.update(model, params)
                save_model(model, args.out)
    nnx.update(model, params)
    save_model(model, args.out)


if __name__ == "__main__":
    main()
