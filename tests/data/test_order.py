import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from srrl_jax.data import draw_ids, epochs_done, step_rows


@given(
    num_rows=st.integers(1, 40),
    prompts_per_step=st.integers(1, 60),
    seed=st.integers(0, 2**63),
    epochs=st.integers(1, 4),
)
@settings(max_examples=50, deadline=None)
def test_every_epoch_holds_every_row_once(num_rows, prompts_per_step, seed, epochs):
    steps = -(-epochs * num_rows // prompts_per_step)
    stream = [index for step in range(steps) for index in step_rows(num_rows, prompts_per_step, step, seed)]
    for epoch in range(epochs):
        rows = stream[epoch * num_rows : (epoch + 1) * num_rows]
        assert sorted(rows) == list(range(num_rows))


def test_the_stream_does_not_depend_on_the_step_size():
    def stream(size):
        return [i for step in range(60 // size) for i in step_rows(10, size, step, 3)]

    assert stream(4) == stream(6) == stream(60)


def test_a_row_that_is_twice_in_a_step_is_drawn_otherwise():
    assert draw_ids([3, 1, 2]) == [3, 1, 2]
    ids = draw_ids([3, 1, 3, 3])
    assert ids[:2] == [3, 1] and len(set(ids)) == 4 and max(ids) < 2**32


def test_epochs_and_seeds_are_shuffled_differently():
    first, second = step_rows(100, 100, 0, 0), step_rows(100, 100, 1, 0)
    assert len({tuple(first), tuple(second), tuple(step_rows(100, 100, 0, 1)), tuple(range(100))}) == 4
    assert step_rows(100, 100, 1, 0) != step_rows(100, 100, 0, 1)  # (seed, epoch) is not a sum


def test_a_late_step_needs_no_earlier_one():
    assert step_rows(7, 3, 10**9, 5) == step_rows(7, 3, 10**9, 5)
    assert all(type(i) is int for i in step_rows(7, 3, 10**9, 5))


def test_order_is_the_same_on_every_machine_and_version():
    assert step_rows(8, 10, 0, 42) == [7, 1, 6, 4, 3, 5, 0, 2, 4, 5]


def test_shuffle_is_uniform():
    firsts = [step_rows(4, 4, 0, seed)[0] for seed in range(4000)]
    for row in range(4):
        assert abs(firsts.count(row) - 1000) < 150  # 5.5 standard deviations


def test_epochs_done():
    assert [epochs_done(10, 4, step) for step in (0, 1, 5)] == [0.0, 0.4, 2.0]


@pytest.mark.parametrize("bad", [(0, 1, 0, 0), (1, 0, 0, 0), (1, 1, -1, 0), (1, 1, 0, -1)])
def test_bad_numbers(bad):
    with pytest.raises(ValueError, match="need num_rows|seed must"):
        step_rows(*bad)
