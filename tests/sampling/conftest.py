"""A small random network, and what the naive way says about sequences."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from srrl_jax.models import Qwen3, Qwen3Config
from srrl_jax.models.config import MoEConfig

CONFIG = Qwen3Config(
    vocab_size=50,
    hidden_size=24,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=64,
)


# Dense layers among those with experts.
EXPERTS = dataclasses.replace(
    CONFIG,
    num_hidden_layers=4,
    model_type="qwen3_moe",
    moe=MoEConfig(5, 2, 12, norm_topk_prob=True, mlp_only_layers=(1, 2)),
)


def random_model(seed: int, config: Qwen3Config = CONFIG) -> Qwen3:
    model = Qwen3(config, rngs=nnx.Rngs(0))
    random = np.random.default_rng(seed)
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        shift = 1.0 if "norm" in ".".join(path) else 0.0
        variable[...] = (shift + 0.3 * random.standard_normal(variable.shape)).astype(np.float32)
    return model


@jax.jit
def flat_logits(model: Qwen3, tokens: jax.Array) -> jax.Array:
    return model(tokens)


@pytest.fixture(scope="session")
def model() -> Qwen3:
    return random_model(1)


@pytest.fixture(scope="session")
def other_model() -> Qwen3:
    return random_model(2)


@pytest.fixture(scope="session")
def experts() -> Qwen3:
    return random_model(3, EXPERTS)


@pytest.fixture(scope="session")
def params(model):
    return nnx.state(model)


@pytest.fixture(scope="session")
def draw_rows():
    """Random prefixes of given lengths, and their branches."""

    def draw(prefix_lengths, branch_lengths, seed=0, vocab=CONFIG.vocab_size):
        random = np.random.default_rng(seed)
        prefixes = [random.integers(0, vocab, n).tolist() for n in prefix_lengths]
        branches = [[random.integers(0, vocab, n).tolist() for n in row] for row in branch_lengths]
        return prefixes, branches

    return draw


@pytest.fixture(scope="session")
def flat_logprobs():
    """Runs prefix + branch + completion of every completion as one flat sequence, all logits at once.

    Returns for each completion, in order, the log-probabilities [length, V] that its tokens were
    drawn from.
    """

    def run(model, prefixes, branches, results, temperature=1.0):
        given, whole = [], []
        for prefix, row, completions in zip(prefixes, branches, results, strict=True):
            for branch, completion in zip(row, completions, strict=True):
                given.append(len(prefix) + len(branch))
                whole.append([*prefix, *branch, *completion.tokens])
        # Few sizes, so that few programs serve all tests.
        size = [-(-n // 16) * 16 for n in (len(whole), max(map(len, whole)))]
        tokens = np.zeros(size, np.int32)
        for i, sequence in enumerate(whole):
            tokens[i, : len(sequence)] = sequence
        logits = flat_logits(model, jnp.asarray(tokens))
        logprobs = np.asarray(jax.nn.log_softmax(logits / temperature))
        return [logprobs[i, given[i] - 1 : len(whole[i]) - 1] for i in range(len(whole))]

    return run
