"""The sampler against golden files, flat sequences and teacher forcing; keys, stops and shapes."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from srrl_jax.checkpoints import load_model
from srrl_jax.errors import InputError
from srrl_jax.models import TreeBatch, branch_logprobs
from srrl_jax.parallel import make_mesh, shardings
from srrl_jax.programs import compile_ahead
from srrl_jax.sampling import RowLengths, Sampler, SamplingConfig

GREEDY = SamplingConfig(temperature=0)
WARM = SamplingConfig(temperature=0.8)
KEY = jax.random.key(7)
NEVER = (-1, -1)  # as many stop ids as the tests that stop have: one compiled program serves them all
MIXED = ([7, 4, 10, 5, 8], [[3, 0, 5], [1, 4], [5], [0, 0, 0], [2, 3, 1]])  # lengths of rows, branches


def rows(prefix=12, branch=6, fan_out=3, count=3):
    """What samplers here are planned for."""
    return [RowLengths(prefix, [branch] * fan_out)] * count


def flatten(results):
    return [completion for row in results for completion in row]


def assert_same(actual, expected, exact=False):
    for x, y in zip(flatten(actual), flatten(expected), strict=True):
        np.testing.assert_array_equal(x.tokens, y.tokens)
        np.testing.assert_allclose(x.logprobs, y.logprobs, rtol=0, atol=0 if exact else 1e-5)
        assert x.truncated == y.truncated


def count_steps(run: Sampler) -> list[int]:
    """Of each run of decoding, to be; which sends nothing to the device."""
    steps, decode = [], run.jitted.decode

    def counted(*args, **kwargs):
        with jax.transfer_guard("disallow"):
            out, state = decode(*args, **kwargs)
        steps.append(int(out.counts.max()))
        return out, state

    run.jitted = run.jitted._replace(decode=counted)
    return steps


@pytest.fixture(scope="module")
def mixed(draw_rows):
    return draw_rows(*MIXED)


@pytest.fixture(scope="module")
def plain(model, params, mixed):
    """8 tokens of each mixed branch, nothing stops them."""
    return Sampler(model, rows(), new_tokens=8, stop_ids=NEVER, sampling=WARM).generate(params, *mixed, KEY)


@pytest.mark.parametrize(
    "name", ["tiny-qwen3-tied", pytest.param("tiny-qwen3-untied", marks=pytest.mark.slow)]
)
def test_golden_greedy(shared_data, name):
    """transformers' greedy tokens, as a rollout and with the prompt's end given as branches."""
    with np.load(shared_data / name / "golden.npz") as arrays:
        prompts, expected = arrays["input_ids"], arrays["greedy"][:, arrays["input_ids"].shape[1] :]
    model = load_model(shared_data / name)

    def completions(table, prefixes, branches):
        run = Sampler(model, table, new_tokens=expected.shape[1], stop_ids=(), sampling=GREEDY)
        results = run.generate(nnx.state(model), prefixes, branches, KEY)
        assert all(completion.truncated for completion in flatten(results))
        return np.stack([completion.tokens for completion in flatten(results)])

    rollout = completions(rows(32, 0, 2, 2), prompts.tolist(), [[[]]] * 2)
    np.testing.assert_array_equal(rollout, expected)

    table = rows(24, 16, 1, 2)
    for cut in (16, 19):
        branches = [[row[cut:].tolist()] for row in prompts]
        continued = completions(table, prompts[:, :cut].tolist(), branches)
        np.testing.assert_array_equal(continued, expected)


def test_branches_equal_flat_sequences(model, params, mixed, flat_logprobs):
    run = Sampler(model, rows(), new_tokens=8, stop_ids=NEVER, sampling=GREEDY)
    results = run.generate(params, *mixed, KEY)
    assert [len(row) for row in results] == [len(row) for row in mixed[1]]
    for completion, logprobs in zip(flatten(results), flat_logprobs(model, *mixed, results), strict=True):
        assert completion.tokens.dtype == np.int32 and completion.logprobs.dtype == np.float32
        np.testing.assert_array_equal(completion.tokens, logprobs.argmax(-1))
        np.testing.assert_allclose(completion.logprobs, logprobs.max(-1), rtol=0, atol=1e-5)


def test_equals_each_flat_sampled_alone(model, params, mixed):
    """Greedily, since a lone row's keys are others."""
    together = Sampler(model, rows(), new_tokens=8, stop_ids=NEVER, sampling=GREEDY)
    alone = Sampler(model, rows(18, 0, 1, 1), new_tokens=8, stop_ids=NEVER, sampling=GREEDY)
    expected = [
        [alone.generate(params, [[*prefix, *branch]], [[[]]], KEY)[0][0] for branch in row]
        for prefix, row in zip(*mixed, strict=True)
    ]
    assert_same(together.generate(params, *mixed, KEY), expected)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_logprobs_equal_teacher_forcing(model, params, mixed, temperature):
    """Contract 2: what the update recomputes is what the sampler said, to rounding."""
    config = SamplingConfig(temperature)
    run = Sampler(model, rows(), new_tokens=8, stop_ids=(3, 11), sampling=config)
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
    assert_same(generate(rows(), range(5)), plain, exact=True)
    assert_same(generate(rows(), reversed_rows), plain)
    wider = rows(16, 8, 4, 2)
    assert_same(generate(wider, [2, 0, 4, 1, 3]), plain)
    for changed in (
        generate(rows(), range(5), key=jax.random.key(8)),
        generate(rows(), reversed_rows, row_ids=False),
    ):
        pairs = zip(flatten(changed), flatten(plain), strict=True)
        assert sum((x.tokens != y.tokens).any() for x, y in pairs) >= 8  # of 12; one row keeps its id


def test_branches_of_a_row_differ(model, params, draw_rows):
    prefixes, _ = draw_rows([9], [[]])
    run = Sampler(model, rows(), new_tokens=8, stop_ids=NEVER, sampling=WARM)
    row = run.generate(params, prefixes, [[[]] * 3], KEY)[0]
    assert len({tuple(completion.tokens) for completion in row}) == 3


def test_weights_come_with_the_call(model, other_model, params, mixed, plain):
    run = Sampler(model, rows(), new_tokens=8, stop_ids=NEVER, sampling=WARM)
    other = run.generate(nnx.state(other_model), *mixed, KEY)
    assert any((x.tokens != y.tokens).any() for x, y in zip(flatten(other), flatten(plain), strict=True))
    assert_same(run.generate(params, *mixed, KEY), plain, exact=True)


@pytest.mark.parametrize("int8", ["none", "weights"])
def test_prepared_weights_take_the_place_of_others(model, other_model, params, mixed, int8):
    """What decoding took of the old ones is donated; what they were made of stays."""
    run = Sampler(model, rows(), new_tokens=8, stop_ids=NEVER, sampling=WARM, int8=int8)
    expected = run.generate(params, *mixed, KEY)
    old = run.prepare(nnx.state(other_model))
    new = run.prepare(params, replaces=old)
    assert all(x.is_deleted() for x in jax.tree.leaves(old.decoder))
    assert not any(x.is_deleted() for x in jax.tree.leaves((old.params, new.decoder)))
    assert_same(run.generate(new, *mixed, KEY), expected, exact=True)
    unlike = "none" if run.int8_weights else "weights"
    other = Sampler(model, rows(), new_tokens=8, stop_ids=NEVER, int8=unlike)
    other.prepare(params, replaces=new)  # of other types, so nothing could be taken from it
    assert not any(x.is_deleted() for x in jax.tree.leaves(new.decoder))


def test_stops_each_branch_at_its_first_stop_id(model, params, mixed, plain):
    """Stopping only cuts: the tokens before it are those of a run that never stops."""
    stops = (int(plain[0][0].tokens[2]), int(plain[4][2].tokens[4]))
    run = Sampler(model, rows(), new_tokens=8, stop_ids=stops, sampling=WARM)
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

    given = Sampler(model, rows(), new_tokens=8, stop_ids=NEVER, sampling=WARM)
    assert_same(given.generate(params, *mixed, KEY, stop_ids=stops), results, exact=True)


def test_stops_early(model, params, mixed):
    """Two steps do for all, of which each first token is a stop: five rows on the slots of three."""
    run = Sampler(model, rows(), new_tokens=8, stop_ids=(0, 1), sampling=WARM, allowed=2)
    steps = count_steps(run)
    completions = flatten(run.generate(params, *mixed, KEY))
    assert all(c.tokens.size == 1 and not c.truncated for c in completions)
    assert {int(c.tokens[0]) for c in completions} == {0, 1}
    assert steps == [1, 1]


def test_slots_are_filled_again(model, params, draw_rows):
    """Rows that enter as others leave draw what they draw alone; a chunk sends nothing to the device."""
    drawn = draw_rows([3, 9, 5, 12, 7, 4, 11, 6], [[2, 0, 3]] * 8, seed=5)
    stops = (4, 9, 17, 23, 31, 40)
    run = Sampler(model, rows(), together=2, new_tokens=40, stop_ids=stops, sampling=WARM)
    steps = count_steps(run)
    together = run.generate(params, *drawn, KEY)
    longest = {
        len(prefix): max(len(c.tokens) for c in row) for prefix, row in zip(drawn[0], together, strict=True)
    }
    order = sorted(longest, reverse=True)  # longest prefixes first
    in_pairs = sum(max(longest[a], longest[b]) for a, b in zip(order[::2], order[1::2], strict=True))
    assert sum(steps) < in_pairs
    for i in (0, 3, 7):
        alone = run.generate(params, [drawn[0][i]], [drawn[1][i]], KEY, row_ids=[i])
        assert_same(alone, [together[i]])


def test_allowed(model, params, mixed):
    run = Sampler(model, rows(), new_tokens=8, stop_ids=NEVER, sampling=SamplingConfig(3.0), allowed=9)
    tokens = np.concatenate([c.tokens for c in flatten(run.generate(params, *mixed, KEY))])
    assert set(tokens) == set(range(9))


def test_reports_progress(model, params, mixed):
    told = []
    run = Sampler(model, rows(), new_tokens=8, stop_ids=NEVER, sampling=WARM)
    run.generate(params, *mixed, KEY, on_progress=lambda *counts: told.append(counts))
    assert told[-1] == (12, 12) and told == sorted(told) and len(told) > 1


@contextlib.contextmanager
def compilations():
    """The names of what is compiled meanwhile."""
    compiled = []

    def listen(event, seconds, fun_name="", **_):
        if event.endswith("backend_compile_duration"):
            compiled.append(fun_name)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield compiled
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


@pytest.mark.slow
def test_nothing_is_compiled_after_compiling_ahead(model, other_model, draw_rows):
    """Whatever the rows, as long as they are no longer than those that were planned with."""
    mesh = make_mesh()
    planned = [RowLengths(40, [3, 3]), *[RowLengths(7, [0, 3])] * 9]
    with jax.set_mesh(mesh):
        params = [nnx.state(each) for each in (model, other_model)]
        params = [jax.device_put(each, shardings(each, mesh)) for each in params]

        def make(config, seed):
            options = dict(new_tokens=5, stop_ids=(1, 2), sampling=config, allowed=40 + seed, mesh=mesh)
            return Sampler(model, planned, together=4, shared=(7, 7), **options)

        with compilations() as ahead:
            found = [p for scores in (False, True) for p in make(WARM, 0).programs(params[0], scores)]
            compile_ahead(found, mesh)
        names = ["jit(empty_caches)", "jit(prepare_weights)", "jit(prefill_shared)"]
        names += ["jit(decode)", "jit(prefill_rows)", "jit(score)"]
        assert sorted(ahead) == sorted(names)
        jax.random.split(jax.random.key(0))
        random = np.random.default_rng(0)
        with compilations() as later:
            for seed in range(1, 9):
                run = make(SamplingConfig(temperature=[0, 0.5, 1.0, 1.7][seed % 4]), seed)
                lengths = random.integers([1, 0], [39, 4], (seed, 2))
                rests, branches = draw_rows(lengths[:, 0], lengths[:, 1:].repeat(seed % 2 + 1, 1), seed)
                prefixes = [[7, 7, *rest] for rest in rests]
                run.generate(params[seed % 2], prefixes, branches, jax.random.key(seed))
                run.score(params[seed % 2], prefixes, branches, [3, 4])
        assert not {name for name in later if name in names}


@pytest.mark.parametrize(
    ("prefix_lengths", "branch_lengths", "message"),
    [
        ([3, 33], [[0], [0]], r"^row 1: 33 prefix tokens and 1 branches .* over what was planned: 32 in all"),
        (
            [3, 3],
            [[0], [1, 30]],
            r"^row 1: 3 prefix tokens and 2 branches of up to 30 given tokens, 34 in all",
        ),
        ([3], [[0] * 4], r"^row 0: 3 prefix tokens and 4 branches"),
        ([3, 0], [[0], [1]], r"^row 1: needs at least one prefix token and one branch"),
        ([3, 4, 5], [[0], [], [2]], r"^row 1: needs at least one prefix token and one branch"),
    ],
)
def test_bad_rows(model, params, draw_rows, prefix_lengths, branch_lengths, message):
    run = Sampler(model, rows(), new_tokens=2, stop_ids=())
    run.jitted = None  # nothing runs before the rows are checked
    with pytest.raises(InputError, match=message):
        run.generate(params, *draw_rows(prefix_lengths, branch_lengths), KEY)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"new_tokens": 0}, "^new_tokens must be at least 1, not 0"),
        ({"new_tokens": 47}, "^prefix .* reach 65 positions, but the model has max_position_embeddings 64"),
    ],
)
def test_bad_sampler(model, options, message):
    with pytest.raises(InputError, match=message):
        Sampler(model, rows(), stop_ids=(), **options)
    Sampler(model, rows(), stop_ids=(), new_tokens=46)


def test_nothing_to_do(model, params):
    assert Sampler(model, rows(), new_tokens=2, stop_ids=()).generate(params, [], [], KEY) == []
