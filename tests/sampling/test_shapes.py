"""Shapes planned from lengths, the memory that they take, and the schedule that fills them."""

import dataclasses

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from srrl_jax.errors import InputError
from srrl_jax.sampling import RowLengths, Sampler, shapes
from srrl_jax.sampling.scheduler import Scheduler, batches, sort_rows
from srrl_jax.sampling.shapes import Memory, plan_shapes

ROWS = st.lists(
    st.builds(RowLengths, st.integers(1, 60), st.lists(st.integers(0, 9), min_size=1, max_size=5)),
    min_size=1,
    max_size=12,
)


@pytest.fixture(scope="module")
def memory(model):
    return Memory(model.config, model.dtype, budget=10**9)


@settings(deadline=None, derandomize=True)
@given(rows=ROWS, together=st.integers(1, 12), shards=st.sampled_from([1, 2]))
def test_every_row_fits_and_enters_once(memory, rows, together, shards):
    memory = dataclasses.replace(memory, shards=shards)
    planned = plan_shapes(rows, 16, memory, together=together)
    order = sort_rows(rows, planned)
    assert sorted(order) == list(range(len(rows)))
    found = list(batches(rows, order, planned, shards))
    assert sorted(row for batch in found for shard in batch for row in shard) == sorted(order)
    assert all(any(batch) for batch in found)
    for shard in (shard for batch in found for shard in batch):
        assert len(shard) <= planned.packed
        assert sum(rows[row].tokens for row in shard) <= planned.pack


@settings(deadline=None, derandomize=True, max_examples=60)
@given(
    rows=ROWS,
    together=st.integers(1, 12),
    shards=st.sampled_from([1, 2]),
    seed=st.integers(0, 9),
)
def test_each_branch_runs_once_where_its_prefix_lies(memory, rows, together, shards, seed):
    memory = dataclasses.replace(memory, shards=shards)
    planned = plan_shapes(rows, 16, memory, together=together)
    scheduler = Scheduler(rows, sort_rows(rows, planned), planned, shards)
    random, left = (
        np.random.default_rng(seed),
        {(i, b) for i, row in enumerate(rows) for b in range(len(row.branches))},
    )
    for _ in range(1000):
        while batch := scheduler.next_batch():
            admission = scheduler.admit(batch)
            for shard, entered in enumerate(batch):  # a row lies where it was put
                places = admission.places[shard, : len(entered)]
                np.testing.assert_array_equal(scheduler.row[shard, places], entered)
            for shard, slots in enumerate(scheduler.running):  # a slot and its cell name each other
                cells = admission.cells[shard, slots]
                np.testing.assert_array_equal(admission.slots[shard, cells], np.flatnonzero(slots))
        running = scheduler.branches()
        assert len({slot for slot, *_ in running}) == len(running) and {r[1:] for r in running} <= left
        if not running:
            break
        assert scheduler.early_exit_threshold() < scheduler.running.sum(1).max()
        alive = scheduler.running.reshape(-1) & (random.random(planned.slots) < 0.6)
        left -= {(row, b) for slot, row, b in running if not alive[slot]}
        scheduler.finish(alive)
    assert not left and not scheduler.waiting


def test_slots_are_for_the_mean_number_of_branches(memory):
    """One row of 48 branches among many of 8."""
    rows = [RowLengths(100, [5] * 48)] + [RowLengths(100, [5] * 8)] * 39
    planned = plan_shapes(rows, 200, memory, together=40)
    assert (planned.running, planned.fan_out) == (40, 48) and planned.slots == 48 + 39 * 8


def test_rows_of_all_lengths_leave_little_room(memory):
    """In packs as large as the longest row, or a few of them."""
    random = np.random.default_rng(0)
    sizes = np.minimum(random.lognormal(6, 0.8, (400, 2)), 2000).astype(int)
    rows = [RowLengths(int(a), [int(b) // 10] * 10) for a, b in sizes]
    planned = plan_shapes(rows, 16, memory, together=100)
    found = list(batches(rows[:100], sort_rows(rows[:100], planned), planned, 1))
    assert sum(row.tokens for row in rows[:100]) > 0.9 * len(found) * planned.pack
    alike = plan_shapes([RowLengths(500, [0] * 4)] * 16, 16, memory, together=16)
    assert 0 <= alike.pack - 5 * 500 < 256, "which hold a whole number of them"


def test_less_memory_runs_fewer_rows_at_a_time(model, memory):
    rows = [RowLengths(12, [6] * 3)] * 6
    whole = plan_shapes(rows, 4, memory, together=6)
    assert (whole.slots, whole.rows) == (18, 6)
    tight = dataclasses.replace(memory, budget=memory.needed(whole) - 1)
    assert plan_shapes(rows, 4, tight, together=6).slots == 12
    shared = dataclasses.replace(tight, shards=2)
    assert plan_shapes(rows, 4, shared, together=6).slots == 18, "each device has half of them"
    one, half, third = (dataclasses.replace(memory, tensor=n).needed(whole) for n in (1, 2, 3))
    assert half < 0.8 * one and third == one, "3 divides no heads"


def test_a_split_changes_no_token(model, params, draw_rows):
    rows, key = draw_rows([7, 4, 10, 5, 8, 3], [[3, 0, 5]] * 6), jax.random.key(7)
    lengths = [RowLengths(12, [6] * 3)] * 6
    whole = Sampler(model, lengths, new_tokens=4, stop_ids=())
    gb = whole.memory.needed(whole.shapes) * 0.6 / 1e9
    split = Sampler(model, lengths, new_tokens=4, stop_ids=(), memory_gb=gb)
    assert split.shapes.slots < whole.shapes.slots
    drawn = [sampler.generate(params, *rows, key) for sampler in (whole, split)]
    for x, y in zip(*(sum(rows, []) for rows in drawn), strict=True):
        np.testing.assert_array_equal(x.tokens, y.tokens)


def test_a_row_over_the_budget_is_refused(model):
    message = r"^memory_gb: one row of 30 tokens, the prefix and what 3 branches are given, and 4 new tokens "
    message += "of each takes "
    message += r".* GB .*, over the budget of 1e-06 GB; raise memory_gb"
    with pytest.raises(InputError, match=message):
        Sampler(model, [RowLengths(12, [6] * 3)] * 6, new_tokens=4, stop_ids=(), memory_gb=1e-6)


class Device:
    def __init__(self, stats):
        self.stats = stats

    def memory_stats(self):
        return self.stats


def test_default_budget(monkeypatch):
    """Half of what the device tells; on a CPU, which tells nothing, half of the machine, shared."""
    monkeypatch.setattr(jax, "local_devices", lambda: [Device({"bytes_limit": 80})])
    assert shapes.default_budget() == 40
    monkeypatch.setattr(jax, "local_devices", lambda: [Device(None)] * 4)
    monkeypatch.setattr(jax, "local_device_count", lambda: 4)
    monkeypatch.setattr(shapes.os, "sysconf", {"SC_PHYS_PAGES": 1000, "SC_PAGE_SIZE": 8}.get)
    assert shapes.default_budget() == 1000
