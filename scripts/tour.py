# %% [markdown]
# # A tour of srrl_jax
# Model, sampler, grader, reward, three training steps and a plot, in about a minute on a CPU. It opens as a
# notebook in editors that know the percent format, and runs as a script: `python scripts/tour.py [FOLDER]`,
# where FOLDER takes the run (default: runs/tour).

# %%
import sys
from pathlib import Path

import jax
import matplotlib.pyplot as plt
import numpy as np

import srrl_jax
from srrl_jax.data import load_examples
from srrl_jax.evaluation.judge import AnswerConfig, Checkpoint
from srrl_jax.grading import GradingItem
from srrl_jax.rubrics import score_response
from srrl_jax.sampling import SamplingConfig
from srrl_jax.telemetry import read_jsonl

FOLDER = Path(sys.argv[1] if len(sys.argv) == 2 and Path(sys.argv[0]).name == "tour.py" else "runs/tour")
config = srrl_jax.TrainConfig.load("demo", [
    f"run_dir={FOLDER}", "steps=3", "prompts_per_step=8", "group_size=4", "optimizer.microbatch=8",
    "data.eval=null", "kl_coef=0",
])  # fmt: skip

# %% [markdown]
# ## Rows
# A prompt and a rubric: criteria whose points a response earns by meeting them.

# %%
rows = load_examples(config.data.train)[:8]
example = rows[0]
print(example.prompt[-1]["content"])
for criterion in example.rubrics:
    print(f"  [{criterion.points:+g}] {criterion.criterion}")

# %% [markdown]
# ## Model and sampler
# A tiny Qwen3 that knows a tiny world answers the prompt four times.

# %%
policy = Checkpoint(config.model)
print(f"{policy.model.config.num_hidden_layers} layers, "
      f"{sum(leaf.size for leaf in jax.tree.leaves(policy.weights)):,} weights")  # fmt: skip
answering = AnswerConfig(config.rollout.max_new_tokens, sampling=SamplingConfig(temperature=1.0))
(answers,) = policy.answers([example.prompt], [0], jax.random.key(0), answering, samples=4)
for answer in answers:
    print(f"- {answer.response}")

# %% [markdown]
# ## Grader
# The same weights judge each answer by each criterion.

# %%
items = [GradingItem(example.prompt, answer.response, example.rubrics) for answer in answers]
verdicts = policy.grade(items, jax.random.key(1), config.grading)
for row in verdicts:
    print([verdict.met for verdict in row])

# %% [markdown]
# ## Reward
# Points met over points that could be had, set against the group.

# %%
rewards = [score_response(example.rubrics, [verdict.met for verdict in row]) for row in verdicts]
rewards = np.array([rewards], np.float32)  # None, where no verdict could be read, becomes NaN
print("rewards   ", rewards[0])
print("advantages", srrl_jax.losses.group_advantages(rewards, ~np.isnan(rewards))[0])

# %% [markdown]
# ## Three training steps
# With rows and a reward of our own: the rubric's, less a little for each token. A callback sees each step.


# %%
def brevity(group):
    """The rubric's reward, less a thousandth for each token."""
    return group.rewards - 0.001 * np.array(group.lengths)


srrl_jax.train(
    config,
    rows=rows,
    reward=brevity,
    callbacks=[lambda step, metrics, samples: print(f"step {step}: reward {metrics['reward/mean']:.3f}")],
)

# %% [markdown]
# ## A plot

# %%
steps = read_jsonl(FOLDER / "metrics.jsonl")
figure, axes = plt.subplots()
axes.plot([row["step"] for row in steps], [row["reward/mean"] for row in steps], marker="o")
axes.set(xlabel="step", ylabel="mean reward", xticks=[row["step"] for row in steps])
figure.savefig(FOLDER / "tour.png")
print(f"plot: {FOLDER / 'tour.png'}")
