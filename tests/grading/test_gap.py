"""What 8 bits change in the replies of the grader, on the embedded checkpoint."""

from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from srrl_jax.checkpoints import load_model
from srrl_jax.checkpoints.tokenizer import load_tokenizer
from srrl_jax.data import load_examples
from srrl_jax.grading import Grader, GradingItem
from srrl_jax.rubrics import load_template
from srrl_jax.sampling import RowLengths, Sampler, SamplingConfig
from srrl_jax.tinyworld import grader_pairs

WORLD = Path(__file__).resolve().parents[2] / "srrl_jax" / "tinyworld"
TEMPERATURE = 5.0  # at which the tokens of this model are far from certain


@pytest.mark.slow
def test_a_gap_is_that_to_the_whole_sequence_without_8_bits(monkeypatch):
    """Of the first reply to each of as many responses as are prefilled together."""
    model, tokenizer = load_model(WORLD / "checkpoint"), load_tokenizer(WORLD / "checkpoint")
    rows, pairs = load_examples(WORLD / "hard.jsonl"), grader_pairs()[:3]
    items = [GradingItem(said, response, rows[i].rubrics) for i, (said, response, *_) in enumerate(pairs)]
    sampler = Sampler(
        model,
        [RowLengths(120, [16] * 8)] * 2,
        new_tokens=20,
        stop_ids=tokenizer.stop_ids,
        sampling=SamplingConfig(TEMPERATURE),
        allowed=tokenizer.size,
        int8="weights_kv",
    )
    calls, generate = [], Sampler.generate

    def spy(self, params, prefixes, branches, *args, **kwargs):
        found = generate(self, params, prefixes, branches, *args, **kwargs)
        calls.append((prefixes, [row[0] for row in branches], [row[0] for row in found]))
        return found

    monkeypatch.setattr(Sampler, "generate", spy)
    grader = Grader(sampler, tokenizer, load_template(str(WORLD / "grader.txt")), tries=2)
    verdicts = grader.grade(nnx.state(model), items, jax.random.key(1))
    measured = [[verdict.gap is not None for verdict in row] for row in verdicts]
    assert measured == [[i < 2 and c == 0 for c in range(len(row))] for i, row in enumerate(verdicts)]
    for row, prefix, branch, reply in zip(verdicts[:2], *calls[0], strict=False):
        tokens, start = np.array([*prefix, *branch, *reply.tokens]), len(prefix) + len(branch)
        padded = np.pad(tokens, (0, 160 - len(tokens)))[None]
        logprobs = np.asarray(jax.nn.log_softmax(model(padded)[0] / TEMPERATURE))
        gaps = np.abs(logprobs[np.arange(start, len(tokens)) - 1, tokens[start:]] - reply.logprobs)
        assert row[0].gap == pytest.approx((gaps.mean(), gaps.max()), abs=1e-5)
        assert 1e-3 < row[0].gap.mean < row[0].gap.max < 0.5
