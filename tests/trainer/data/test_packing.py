"""The order of rows, their share over ranks, and the micro-batches: to the row and the token."""

from __future__ import annotations

from itertools import chain

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.data.packing import Order, level, pack, pad, share

LENGTHS = [4, 9, 1, 6, 6, 3]
ALL = range(len(LENGTHS))


@pytest.mark.parametrize(
    ("rows", "batch_size", "epochs", "max_steps", "steps"),
    [
        (10, 4, 1, None, 3),
        (12, 4, 1, None, 3),
        (10, 4, 2, None, 6),
        (10, 4, 0.5, None, 2),
        (10, 4, 0.01, None, 1),
        (10, 10, 3, None, 3),
        (30, 10, 1.0000000000000002, None, 3),
        (10, 4, 1, 1, 1),
        (10, 4, 1, 100, 100),
    ],
)
def test_epochs_are_counted_in_whole_steps_and_max_steps_wins(
    rows: int, batch_size: int, epochs: float, max_steps: int | None, steps: int
) -> None:
    assert Order(rows, batch_size, epochs, 0, max_steps).total_steps == steps


def test_each_epoch_is_one_permutation_of_its_own_whose_last_step_is_short() -> None:
    order = Order(10, 4, 2, seed=7)
    epochs = [[order.step(3 * epoch + k) for k in range(3)] for epoch in range(2)]
    for steps in epochs:
        assert [len(step) for step in steps] == [4, 4, 2]
        assert sorted(chain.from_iterable(steps)) == list(range(10))
    assert epochs[0] != epochs[1] != [Order(10, 4, 2, seed=8).step(k) for k in range(3)]
    assert [Order(10, 4, 2, seed=7).step(k) for k in (5, 0)] == [epochs[1][2], epochs[0][0]]


def test_the_longest_row_goes_to_the_rank_with_fewest_tokens() -> None:
    assert share(ALL, LENGTHS, 2) == [[1, 0, 2], [3, 4, 5]]
    loads = [sum(LENGTHS[r] for r in rows) for rows in share(ALL, LENGTHS, 2)]
    assert loads == [14, 15]
    assert share([2, 0], LENGTHS, 3) == [[0], [2], []]
    assert share([3, 4], LENGTHS, 1) == [[3, 4]], "of equal length the first comes first"


def test_a_row_goes_where_least_room_is_left_and_one_too_long_goes_alone() -> None:
    assert pack(ALL, LENGTHS, 10) == [[1, 2], [3, 0], [4, 5]]
    assert pack(ALL, LENGTHS, 9) == [[1], [3, 5], [4, 2], [0]]
    assert pack(ALL, LENGTHS, 5) == [[1], [3], [4], [0, 2], [5]]
    assert pack([], LENGTHS, 10) == []


def test_micro_batches_are_of_like_size_where_the_last_one_would_be_small() -> None:
    assert level(ALL, LENGTHS, 10) == pack(ALL, LENGTHS, 10)
    assert pack(range(4), [4, 4, 2, 2], 10) == [[0, 1, 2], [3]]
    assert level(range(4), [4, 4, 2, 2], 10) == [[0, 2], [1, 3]]
    assert level([0, 1], [20, 2], 10) == [[0], [1]] and level([], LENGTHS, 10) == []


def test_rows_of_like_length_are_padded_into_rectangles_that_fit() -> None:
    assert pad(ALL, LENGTHS, 12) == [[1], [3, 4], [0, 5, 2]]
    assert pad(ALL, LENGTHS, 11) == [[1], [3], [4], [0, 5], [2]]
    assert pad(ALL, LENGTHS, 18) == [[1, 3], [4, 0, 5], [2]]
    assert pad([], LENGTHS, 12) == []


@settings(deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=30), st.integers(1, 60), st.integers(1, 5))
def test_no_row_is_lost_or_doubled_and_no_budget_broken(
    lengths: list[int], budget: int, ranks: int
) -> None:
    rows = list(range(len(lengths)))
    assert sorted(chain.from_iterable(share(rows, lengths, ranks))) == rows
    for made, size in (
        (pack(rows, lengths, budget), lambda b: sum(lengths[r] for r in b)),
        (level(rows, lengths, budget), lambda b: sum(lengths[r] for r in b)),
        (pad(rows, lengths, budget), lambda b: len(b) * max(lengths[r] for r in b)),
    ):
        assert sorted(chain.from_iterable(made)) == rows
        assert all(len(b) == 1 or size(b) <= budget for b in made)
