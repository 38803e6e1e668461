"""The memory budget: how many rows run at one time, and what is refused."""

import jax
import numpy as np
import pytest

from srrl_jax.errors import InputError
from srrl_jax.sampling import Buckets, Sampler, memory, score
from srrl_jax.sampling.buckets import Lengths
from srrl_jax.sampling.decode import prefill

TABLE = Buckets(prefix=(12, 24), branch=(6,), fan_out=(3,), rows=(2, 6))
ROWS = ([7, 4, 10, 5, 8, 3], [[3, 0, 5]] * 6)


@pytest.fixture
def make(model):
    def make(gb=None, rows=TABLE.rows):
        table = Buckets(TABLE.prefix, TABLE.fan_out, TABLE.branch, rows)
        return Sampler(model, table, new_tokens=4, stop_ids=(), memory_gb=gb)

    return make


def gb_of(model, rows, prefix=12):
    return rows * memory.needed(model.config, model.dtype, 1, prefix, 3, 6, 4) * 1.001 / 1e9


@pytest.mark.parametrize(
    ("table", "room", "rows"), [((2, 6), 6, (2, 6)), ((2, 6), 5, (2,)), ((6,), 5, (5,)), ((2, 6), 1, (1,))]
)
def test_rows_that_fit(model, make, draw_rows, table, room, rows):
    assert make(gb_of(model, room), table).plan(*draw_rows(*ROWS)).buckets.rows == rows


def test_long_rows_take_the_room_of_several(model, make, draw_rows):
    rows = draw_rows([20, 3], [[3, 0, 5]] * 2)
    assert make(gb_of(model, 6)).plan(*rows).buckets.rows == (2,)


def test_a_mesh_shares_rows_and_heads(model):
    sizes = TABLE, Lengths(*ROWS), 4
    budget = int(gb_of(model, 1) * 1e9)
    (alone,) = memory.rows_within(budget, model.config, model.dtype, (1, 1), *sizes)
    assert alone == 1
    assert memory.rows_within(budget, model.config, model.dtype, (2, 1), *sizes) == (2,)
    one, half, third = (memory.needed(model.config, model.dtype, n, 12, 3, 6, 4) for n in (1, 2, 3))
    assert half < 0.8 * one and third == one


def test_a_split_into_waves_changes_no_token(model, params, make, draw_rows):
    rows, key = draw_rows(*ROWS), jax.random.key(7)
    whole, split = (make(gb).generate(params, *rows, key) for gb in (None, gb_of(model, 2)))
    for x, y in zip(sum(whole, []), sum(split, []), strict=True):
        np.testing.assert_array_equal(x.tokens, y.tokens)
    told = []
    score(make(gb_of(model, 2)), params, *rows, [3], on_wave=lambda *counts: told.append(counts))
    assert told == [(6, 18), (12, 18), (18, 18)]


@pytest.mark.parametrize("ask", ["generate", "score"])
def test_a_row_over_the_budget_is_refused(params, make, draw_rows, ask):
    sampler, rows = make(1e-6), draw_rows(*ROWS)
    compiled = prefill._cache_size()
    message = r"^memory_gb: one row of 12 prefix tokens and 3 branches of 6 given and 4 new tokens takes "
    message += r".* GB .*, over the budget of 1e-06 GB; raise memory_gb"
    with pytest.raises(InputError, match=message):
        if ask == "generate":
            sampler.generate(params, *rows, jax.random.key(0))
        else:
            score(sampler, params, *rows, [3])
    assert prefill._cache_size() == compiled


class Device:
    def __init__(self, stats):
        self.stats = stats

    def memory_stats(self):
        return self.stats


def test_default_budget(monkeypatch):
    """Half of what the device tells; on a CPU, which tells nothing, half of the machine, shared."""
    monkeypatch.setattr(jax, "local_devices", lambda: [Device({"bytes_limit": 80})])
    assert memory.default_budget() == 40
    monkeypatch.setattr(jax, "local_devices", lambda: [Device(None)] * 4)
    monkeypatch.setattr(jax, "local_device_count", lambda: 4)
    monkeypatch.setattr(memory.os, "sysconf", {"SC_PHYS_PAGES": 1000, "SC_PAGE_SIZE": 8}.get)
    assert memory.default_budget() == 1000
