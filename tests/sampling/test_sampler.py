"""The sampler against golden files, flat sequences and teacher forcing; keys, stops and shapes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from srrl_jax.errors import InputError
from srrl_jax.models import Qwen3, TreeBatch, branch_logprobs
from srrl_jax.sampling import Buckets, Sampler, SamplingConfig, decode, sampler

GREEDY = SamplingConfig(temperature=0)
WARM = SamplingConfig(temperature=0.8)
KEY = jax.random.key(7)
NEVER = (-1, -1)  # as many stop ids as the tests that stop have: one compiled program serves them all
MIXED = ([7, 4, 10, 5, 8], [[3, 0, 5], [1, 4], [5], [0, 0, 0], [2, 3, 1]])  # lengths of rows, branches


def buckets(**sizes):
    return Buckets(**{"prefix": (12,), "branch": (6,), "fan_out": (3,), "rows": (3,), **sizes})


def flatten(results):
    return [completion for row in results for completion in row]


def assert_same(actual, expected, exact=False):
    for x, y in zip(flatten(actual), flatten(expected), strict=True):
        np.testing.assert_array_equal(x.tokens, y.tokens)
        np.testing.assert_allclose(x.logprobs, y.logprobs, rtol=0, atol=0 if exact else 1e-5)
        assert x.truncated == y.truncated


@pytest.fixture(scope="module")
def mixed(draw_rows):
    return draw_rows(*MIXED)


@pytest.fixture(scope="module")
def plain(model, params, mixed):
    """8 tokens of each mixed branch, nothing stops them."""
    return Sampler(model, buckets(), new_tokens=8, stop_ids=NEVER, sampling=WARM).generate(
        params, *mixed, KEY
    )


@pytest.mark.parametrize("name", ["tiny-qwen3-tied", "tiny-qwen3-untied"])
def test_golden_greedy(shared_data, name):
    """transformers' greedy tokens, as a rollout and with the prompt's end given as branches."""
    with np.load(shared_data / name / "golden.npz") as arrays:
        prompts, expected = arrays["input_ids"], arrays["greedy"][:, arrays["input_ids"].shape[1] :]
    model = Qwen3.from_pretrained(shared_data / name)

    def completions(table, prefixes, branches):
        run = Sampler(model, table, new_tokens=expected.shape[1], stop_ids=(), sampling=GREEDY)
        results = run.generate(nnx.state(model), prefixes, branches, KEY)
        assert all(completion.truncated for completion in flatten(results))
        return np.stack([completion.tokens for completion in flatten(results)])

    rollout = completions(Buckets(prefix=(32,), fan_out=(2,), rows=(2,)), prompts.tolist(), [[[]]] * 2)
    np.testing.assert_array_equal(rollout, expected)

    table = Buckets(prefix=(24,), branch=(8,), fan_out=(1,), rows=(2,))
    for cut in (16, 19):
        branches = [[row[cut:].tolist()] for row in prompts]
        continued = completions(table, prompts[:, :cut].tolist(), branches)
        np.testing.assert_array_equal(continued, expected)


def test_branches_equal_flat_sequences(model, params, mixed, flat_logprobs):
    run = Sampler(model, buckets(), new_tokens=8, stop_ids=NEVER, sampling=GREEDY)
    results = run.generate(params, *mixed, KEY)
    assert [len(row) for row in results] == [len(row) for row in mixed[1]]
    for completion, logprobs in zip(flatten(results), flat_logprobs(model, *mixed, results), strict=True):
        assert completion.tokens.dtype == np.int32 and completion.logprobs.dtype == np.float32
        np.testing.assert_array_equal(completion.tokens, logprobs.argmax(-1))
        np.testing.assert_allclose(completion.logprobs, logprobs.max(-1), rtol=0, atol=1e-5)


def test_equals_each_flat_sampled_alone(model, params, mixed):
    """Greedily, since a lone row's keys are others."""
    together = Sampler(model, buckets(), new_tokens=8, stop_ids=NEVER, sampling=GREEDY)
    one = Buckets(prefix=(16,), fan_out=(1,), rows=(1,))
    alone = Sampler(model, one, new_tokens=8, stop_ids=NEVER, sampling=GREEDY)
    expected = [
        [alone.generate(params, [[*prefix, *branch]], [[[]]], KEY)[0][0] for branch in row]
        for prefix, row in zip(*mixed, strict=True)
    ]
    assert_same(together.generate(params, *mixed, KEY), expected)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_logprobs_equal_teacher_forcing(model, params, mixed, temperature):
    """Contract 2: what the update recomputes is what the sampler said, to rounding."""
    config = SamplingConfig(temperature)
    run = Sampler(model, buckets(), new_tokens=8, stop_ids=(3, 11), sampling=config)
    results = run.generate(params, *mixed, KEY)
    longest = max(len(c.tokens) for c in flatten(results))
    assert min(len(c.tokens) for c in flatten(results)) < longest
    # The update's layout: one row for each prompt, the completions are the branches.
    prompts = [[*p, *branch] for p, row in zip(*mixed, strict=True) for branch in row]
    tree = TreeBatch(
        np.zeros((len(prompts), 16), np.int32),
        np.array([len(p) for p in prompts]),
        np.zeros((len(prompts), 1, longest), np.int32),
        np.array([[len(c.tokens)] for c in flatten(results)]),
    )
    for i, (prompt, completion) in enumerate(zip(prompts, flatten(results), strict=True)):
        tree.prefix[i, : len(prompt)] = prompt
        tree.branches[i, 0, : len(completion.tokens)] = completion.tokens
    logprobs, entropy = jax.jit(branch_logprobs)(model, jax.tree.map(jnp.asarray, tree), temperature)
    for i, completion in enumerate(flatten(results)):
        taught = logprobs[i, 0, : len(completion.tokens)]
        np.testing.assert_allclose(completion.logprobs, taught, rtol=0, atol=1e-5)
    assert ((entropy > 0) & (entropy < np.log(model.config.vocab_size))).all()


def test_same_draws_in_any_batch(model, params, mixed, plain):
    prefixes, branches = mixed

    def generate(table, order, key=KEY, row_ids=True):
        run = Sampler(model, table, new_tokens=8, stop_ids=NEVER, sampling=WARM)
        ids = order if row_ids else None
        results = run.generate(
            params, [prefixes[i] for i in order], [branches[i] for i in order], key, row_ids=ids
        )
        return [results[order.index(i)] for i in range(len(order))]

    reversed_rows = [4, 3, 2, 1, 0]
    assert_same(generate(buckets(), range(5)), plain, exact=True)
    assert_same(generate(buckets(), reversed_rows), plain)
    wider = buckets(prefix=(16,), branch=(8,), fan_out=(4,), rows=(1, 2))
    assert_same(generate(wider, [2, 0, 4, 1, 3]), plain)
    for changed in (
        generate(buckets(), range(5), key=jax.random.key(8)),
        generate(buckets(), reversed_rows, row_ids=False),
    ):
        pairs = zip(flatten(changed), flatten(plain), strict=True)
        assert sum((x.tokens != y.tokens).any() for x, y in pairs) >= 8  # of 12; one row keeps its id


def test_branches_of_a_row_differ(model, params, draw_rows):
    prefixes, _ = draw_rows([9], [[]])
    run = Sampler(model, buckets(), new_tokens=8, stop_ids=NEVER, sampling=WARM)
    row = run.generate(params, prefixes, [[[]] * 3], KEY)[0]
    assert len({tuple(completion.tokens) for completion in row}) == 3


def test_weights_come_with_the_call(model, other_model, params, mixed, plain):
    run = Sampler(model, buckets(), new_tokens=8, stop_ids=NEVER, sampling=WARM)
    other = run.generate(nnx.state(other_model), *mixed, KEY)
    assert any((x.tokens != y.tokens).any() for x, y in zip(flatten(other), flatten(plain), strict=True))
    assert_same(run.generate(params, *mixed, KEY), plain, exact=True)


@pytest.mark.parametrize("int8", ["none", "weights"])
def test_ready_weights_take_the_place_of_others(model, other_model, params, mixed, int8):
    """What decoding took of the old ones is donated; what they were made of stays."""
    run = Sampler(model, buckets(), new_tokens=8, stop_ids=NEVER, sampling=WARM, int8=int8)
    expected = run.generate(params, *mixed, KEY)
    old = run.ready(nnx.state(other_model))
    new = run.ready(params, replaces=old)
    assert all(x.is_deleted() for x in jax.tree.leaves(old.decoder))
    assert not any(x.is_deleted() for x in jax.tree.leaves((old.params, new.decoder)))
    assert_same(run.generate(new, *mixed, KEY), expected, exact=True)
    unlike = "none" if run.int8_weights else "weights"
    other = Sampler(model, buckets(), new_tokens=8, stop_ids=NEVER, int8=unlike)
    other.ready(params, replaces=new)  # of other types, so nothing could be taken from it
    assert not any(x.is_deleted() for x in jax.tree.leaves(new.decoder))


def test_stops_each_branch_at_its_first_stop_id(model, params, mixed, plain, monkeypatch):
    """Stopping only cuts: the tokens before it are those of a run that never stops."""
    stops = (int(plain[0][0].tokens[2]), int(plain[4][2].tokens[4]))
    steps = []

    def counted(*args, **kwargs):
        end = int(args[2].slots.end)
        out, running = decode.decode(*args, **kwargs)
        steps.append(int(running.slots.end) - end)
        return out, running

    monkeypatch.setattr(sampler, "decode", counted)
    run = Sampler(model, buckets(), new_tokens=8, stop_ids=stops, sampling=WARM)
    results = run.generate(params, *mixed, KEY)
    kinds, hit = set(), set()
    for x, y in zip(flatten(results), flatten(plain), strict=True):
        at = np.flatnonzero(np.isin(y.tokens, stops))
        length = at[0] + 1 if len(at) else 8
        np.testing.assert_array_equal(x.tokens, y.tokens[:length])
        np.testing.assert_allclose(x.logprobs, y.logprobs[:length], rtol=0, atol=1e-5)
        assert x.truncated == (len(at) == 0)
        kinds.add(x.truncated)
        hit |= {int(x.tokens[-1])} & set(stops)
    assert kinds == {True, False} and hit == set(stops)

    assert sum(steps) < 2 * 7  # less than two full waves: finished branches make room


def test_stops_early(model, params, mixed, monkeypatch):
    """No decode step is left when every first token is a stop."""
    ends = []

    def kept(*args, **kwargs):
        ends.append(int(args[2].slots.end))
        decoded = decode.decode(*args, **kwargs)
        ends.append(int(decoded[1].slots.end))
        return decoded

    monkeypatch.setattr(sampler, "decode", kept)
    run = Sampler(model, buckets(), new_tokens=8, stop_ids=(0, 1), sampling=WARM, allowed=2)
    completions = flatten(run.generate(params, *mixed, KEY))
    assert all(c.tokens.size == 1 and not c.truncated for c in completions)
    assert {int(c.tokens[0]) for c in completions} == {0, 1}
    assert ends and ends[::2] == ends[1::2]


def test_slots_are_filled_again(model, params, draw_rows, monkeypatch):
    """Rows that enter as others leave draw what they draw alone; a chunk sends nothing to the device."""
    rows = draw_rows([3, 9, 5, 12, 7, 4, 11, 6], [[2, 0, 3]] * 8, seed=5)
    stops, steps = (4, 9, 17, 23, 31, 40), []

    def counted(*args, **kwargs):
        end = int(args[2].slots.end)
        with jax.transfer_guard("disallow"):
            out, running = decode.decode(*args, **kwargs)
        steps.append(int(running.slots.end) - end)
        return out, running

    monkeypatch.setattr(sampler, "decode", counted)
    run = Sampler(model, buckets(rows=(1, 2)), new_tokens=40, stop_ids=stops, sampling=WARM)
    together = run.generate(params, *rows, KEY)
    longest = {
        len(prefix): max(len(c.tokens) for c in row) for prefix, row in zip(rows[0], together, strict=True)
    }
    order = sorted(longest, reverse=True)  # longest prefixes first
    in_pairs = sum(max(longest[a], longest[b]) - 1 for a, b in zip(order[::2], order[1::2], strict=True))
    assert sum(steps) < in_pairs
    for i in (0, 3, 7):
        alone = run.generate(params, [rows[0][i]], [rows[1][i]], KEY, row_ids=[i])
        assert_same(alone, [together[i]])


def test_allowed(model, params, mixed):
    run = Sampler(model, buckets(), new_tokens=8, stop_ids=NEVER, sampling=SamplingConfig(3.0), allowed=9)
    tokens = np.concatenate([c.tokens for c in flatten(run.generate(params, *mixed, KEY))])
    assert set(tokens) == set(range(9))


def test_reports_progress(model, params, mixed):
    told = []
    run = Sampler(model, buckets(), new_tokens=8, stop_ids=NEVER, sampling=WARM)
    run.generate(params, *mixed, KEY, on_wave=lambda *counts: told.append(counts))
    assert told[-1] == (12, 12) and told == sorted(told) and len(told) > 1


def test_nothing_recompiles_after_warm_up(model, other_model, draw_rows):
    table = Buckets(prefix=(4, 9), branch=(0, 3), fan_out=(2,), rows=(2,))
    compiled = []

    def listen(event, seconds, **_):
        if event.endswith("backend_compile_duration"):
            compiled.append(event)

    def generate(weights, config, prefix, branch, rows, fan_out, seed):
        run = Sampler(model, table, new_tokens=5, stop_ids=(1, 2), sampling=config, allowed=40 + seed)
        prefixes, branches = draw_rows([prefix] * rows, [[branch] * fan_out] * rows, seed)
        return run.generate(nnx.state(weights), prefixes, branches, jax.random.key(seed), range(rows))

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        for prefix in table.prefix:
            for branch in (0, 1, 3):  # none, two in a lane, two lanes
                for rows in (2, 4):
                    generate(model, WARM, prefix, branch, rows, 2, seed=0)
        assert compiled
        compiled.clear()
        programs = decode.prefill, decode.empty, decode.resize, decode.admit, decode.decode
        sizes = [program._cache_size() for program in programs]
        random = np.random.default_rng(0)
        for seed in range(1, 9):
            config = SamplingConfig(temperature=[0, 0.5, 1.0, 1.7][seed % 4])
            prefix, branch, rows, fan_out = random.integers([1, 0, 1, 1], [10, 4, 6, 3])
            generate((model, other_model)[seed % 2], config, prefix, branch, rows, fan_out, seed)
        assert [program._cache_size() for program in programs] == sizes
        assert not compiled
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


@pytest.mark.parametrize(
    ("prefix_lengths", "branch_lengths", "message"),
    [
        ([3, 13], [[0], [0]], r"^row 1: prefix is 13 long, over the largest bucket \(12\); enlarge"),
        ([3, 3], [[0], [0, 7]], r"^row 1: longest branch is 7 long, over the largest bucket \(6\)"),
        ([3], [[0] * 4], r"^row 0: list of branches is 4 long, over the largest bucket \(3\)"),
        ([3, 0], [[0], [1]], r"^row 1: needs at least one prefix token and one branch"),
        ([3, 4, 5], [[0], [], [2]], r"^row 1: needs at least one prefix token and one branch"),
    ],
)
def test_bad_rows(model, params, draw_rows, monkeypatch, prefix_lengths, branch_lengths, message):
    monkeypatch.setattr(sampler, "prefill", None)  # nothing runs before the rows are checked
    run = Sampler(model, buckets(), new_tokens=2, stop_ids=())
    with pytest.raises(InputError, match=message):
        run.generate(params, *draw_rows(prefix_lengths, branch_lengths), KEY)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"new_tokens": 0}, "^new_tokens must be at least 1, not 0"),
        ({"new_tokens": 47}, "^buckets: .* reach 65 positions, but the model has max_position_embeddings 64"),
    ],
)
def test_bad_sampler(model, options, message):
    with pytest.raises(InputError, match=message):
        Sampler(model, buckets(), stop_ids=(), **options)
    Sampler(model, buckets(), stop_ids=(), new_tokens=46)


def test_nothing_to_do(model, params):
    assert Sampler(model, buckets(), new_tokens=2, stop_ids=()).generate(params, [], [], KEY) == []
