"""The table of shapes."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from srrl_jax.errors import InputError
from srrl_jax.sampling import Buckets
from srrl_jax.sampling.buckets import Lengths, fit, ladder, plan_waves, sort_rows

TABLE = Buckets(prefix=(4, 8, 16), branch=(0, 3, 6), fan_out=(1, 4), rows=(1, 2, 4))


@pytest.mark.parametrize("field", ["prefix", "branch", "fan_out", "rows"])
@pytest.mark.parametrize("sizes", [(), (4, 2), (2, 2), (-1, 2), (0, 2)])
def test_bad_table(field, sizes):
    good = {"prefix": (8,), "fan_out": (2,), field: sizes}
    if field == "branch" and sizes == (0, 2):
        assert Buckets(**good).branch == sizes
        return
    with pytest.raises(InputError, match=rf"^buckets.{field}: must be ascending sizes from [01] on, not \("):
        Buckets(**good)


def test_fit():
    assert [fit(size, (2, 4, 8), "x") for size in range(9)] == [2, 2, 2, 4, 4, 8, 8, 8, 8]
    with pytest.raises(InputError, match=r"^wave is 9 long, over the largest bucket \(8\)"):
        fit(9, (2, 4, 8), "wave")


@settings(deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.integers(1, 16), st.lists(st.integers(0, 6), min_size=1, max_size=4))))
def test_rows_take_the_smallest_sizes_longest_first(rows):
    prefixes, branches = [prefix for prefix, _ in rows], [lengths for _, lengths in rows]
    lengths = Lengths(prefixes, branches)
    placed = sort_rows(lengths, TABLE)
    assert sorted(row for row, _ in placed) == list(range(len(rows)))
    for row, (prefix, fan_out, branch) in placed:
        assert prefix == fit(prefixes[row], TABLE.prefix, "prefix")
        assert fan_out == fit(len(branches[row]), TABLE.fan_out, "fan_out")
        assert branch == fit(max(branches[row]), TABLE.branch, "branch")
    keys = [(sizes, prefixes[row]) for row, sizes in placed]
    assert keys == sorted(keys, reverse=True)

    waves = plan_waves(lengths, TABLE)
    assert [row for wave in waves for row in wave.indices if row >= 0] == [row for row, _ in placed]
    for wave in waves:
        sizes = [dict(placed)[row] for row in wave.indices if row >= 0]
        assert wave[1:4] == tuple(map(max, zip(*sizes, strict=True)))
        assert len(wave.indices) in TABLE.rows


def test_lengths_far_apart_sit_apart_and_alike_ones_together():
    table = Buckets(prefix=(256, 4096), branch=(0, 8), fan_out=(2,), rows=(1, 4))
    waves = plan_waves(Lengths([4000, 230, 240, 3900, 250, 220], [[0, 0]] * 4 + [[5, 3], [0, 0]]), table)
    assert [(wave.indices, wave.prefix, wave.branch) for wave in waves] == [
        ((0,), 4096, 0),
        ((3,), 4096, 0),
        ((4, 2, 1, 5), 256, 8),
    ]


def test_the_ladder_has_few_rungs_and_holds_every_length():
    assert ladder(range(1, 100)) == (8, 12, 16, 24, 32, 48, 64, 96, 128)
    assert ladder([0, 5, 6], least=4) == (0, 6)
    for length in range(1, 3000):
        (size,) = ladder([length])
        assert length <= size and (size == 8 or size < length * (1.125 if size > 576 else 1.5))
    assert ladder([130, 300, 330, 500, 520, 1100]) == (160, 320, 384, 512, 576, 1152)


def test_little_of_a_graders_prefill_is_padding():
    """On lengths spread like those of HealthBench (12 criteria of 70 tokens), 4 answers each."""
    random = np.random.default_rng(0)
    spread = lambda mean, sigma, n: np.exp(random.normal(np.log(mean), sigma, n)).astype(int) + 1  # noqa: E731
    prefix = np.repeat(spread(150, 0.9, 32), 4) + spread(400, 0.6, 128)
    branches = [spread(50, 0.7, 12).tolist() for _ in range(32) for _ in range(4)]
    lengths = Lengths(prefix.tolist(), branches)
    longest = max(map(max, branches))
    table = Buckets(ladder(prefix), (12,), tuple(range(64, longest + 64, 64)), rows=(1, 2, 4, 8))
    waves = plan_waves(lengths, table)
    real = sum(map(lengths.tokens, range(128)))
    before = sum(len(w.indices) * (w.prefix + w.lanes * w.branch) for w in waves)
    assert prefix.sum() > 0.9 * sum(len(w.indices) * w.prefix for w in waves)
    assert real > 0.8 * before


@settings(deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=12), st.integers(9, 20), st.booleans())
def test_branches_in_lanes_do_not_overlap(branches, size, apart):
    lengths = Lengths([1], [branches], apart)
    lanes, places = lengths.lanes([0], size, fan_out=12), lengths.places(0, size)
    taken = [(lane, first + i) for (lane, first), n in zip(places, branches, strict=True) for i in range(n)]
    assert len(set(taken)) == len(taken) == sum(branches)
    assert all(lane < lanes and place < size for lane, place in taken)
    assert lanes == 12 if apart else lanes <= 12


def test_short_branches_share_a_lane():
    assert Lengths([1], [[5, 3, 2, 4, 6]]).places(0, 10) == [(1, 0), (1, 5), (1, 8), (0, 6), (0, 0)]
