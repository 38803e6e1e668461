"""The table of shapes."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from srrl_jax.errors import InputError
from srrl_jax.sampling import Buckets
from srrl_jax.sampling.buckets import fit, ladder, plan_waves

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
def test_waves_hold_every_row_once_at_the_smallest_sizes(rows):
    prefixes, branches = [prefix for prefix, _ in rows], [lengths for _, lengths in rows]
    waves = plan_waves(prefixes, branches, TABLE)
    assert sorted(row for wave in waves for row in wave.indices) == list(range(len(rows)))
    for wave in waves:
        assert wave.rows == fit(len(wave.indices), TABLE.rows, "rows")
        for row in wave.indices:
            assert wave.prefix == fit(prefixes[row], TABLE.prefix, "prefix")
            assert wave.fan_out == fit(len(branches[row]), TABLE.fan_out, "fan_out")
            assert wave.branch == fit(max(branches[row]), TABLE.branch, "branch")
    assert [wave.prefix for wave in waves] == sorted((wave.prefix for wave in waves), reverse=True)
    # No two waves of one shape have both room left.
    shapes = [(w.prefix, w.fan_out, w.branch) for w in waves if len(w.indices) < TABLE.rows[-1]]
    assert len(shapes) == len(set(shapes))


def test_the_ladder_has_few_rungs_and_holds_every_length():
    assert ladder(range(1, 100)) == (8, 12, 16, 24, 32, 48, 64, 96, 128)
    assert ladder([0, 5, 6], least=4) == (0, 6)
    for length in range(1, 3000):
        (size,) = ladder([length])
        assert length <= size and (size == 8 or 2 * length > 4 / 3 * size)
