"""Which tokens of a group's rows are shared, and where attention finds their keys."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from trainer.data import batch, sharing
from trainer.data.shared_keys import shared_keys
from trainer.data.sharing import Borrowed, beginnings
from trainer.data.tokenised import Rows
from trainer.kernels.shared_keys import gather, spread

CPU = torch.device("cpu")


def rows(*parts: tuple[list[int], list[int]]) -> Rows:
    """Each a prompt and an answer, which is trained."""
    ids = [np.asarray(p + a, np.int32) for p, a in parts]
    marks = [np.arange(len(p) + len(a)) >= len(p) for p, a in parts]
    starts = np.cumsum([0, *map(len, ids)]).astype(np.int64)
    told = [""] * len(parts)
    return Rows(np.concatenate(ids), np.concatenate(marks), starts, np.ones(len(told), bool), told)


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharing, "LEAST", 3)


def test_a_row_keeps_the_token_that_predicts_its_answer_and_what_follows() -> None:
    some = rows(([5, 6, 7, 8, 9], [1, 2]), ([5, 6, 7, 8, 9], [1, 3]), ([5, 6, 7, 0, 9], [4]))
    assert beginnings(some, [0, 1, 2]) == [0, 4, 3]


def test_a_beginning_that_is_shorter_than_what_pays_is_not_shared() -> None:
    assert beginnings(rows(([5, 6, 7], [1]), ([5, 6, 7], [2])), [0, 1]) == [0, 0]
    assert beginnings(rows(([5, 6, 7, 8], [1]), ([9, 6, 7, 8], [2])), [0, 1]) == [0, 0]


def test_a_pack_has_shared_tokens_once_and_every_target_at_its_place() -> None:
    some = rows(([5, 6, 7, 8], [1, 2]), ([5, 6, 7, 8], [3]), ([4], [9]))
    pack = batch.packed(some, [0, 1, 2], CPU, [Borrowed(0, 0), Borrowed(0, 3), Borrowed(2, 0)])
    assert pack["input_ids"].tolist() == [[5, 6, 7, 8, 1, 2, 8, 3, 4, 9]]
    assert pack["position_ids"].tolist() == [[0, 1, 2, 3, 4, 5, 3, 4, 0, 1]]
    assert pack["labels"][0, pack["targets_at"]].tolist() == [1, 2, 3, 9]
    assert pack["cu_seq_lens_q"].tolist() == [0, 6, 8, 10]
    assert pack["cu_seq_lens_k"].tolist() == [0, 6, 11, 13]
    keys = spread(pack["input_ids"][0], pack["shared_keys"])
    assert keys.tolist() == [5, 6, 7, 8, 1, 2, 5, 6, 7, 8, 3, 4, 9]
    assert "shared_keys" not in batch.packed(some, [0, 2], CPU, [Borrowed(0, 0), Borrowed(1, 0)])


def test_gradients_of_keys_that_several_rows_read_are_added_up() -> None:
    """Of two groups, of three rows and of two, that share different lengths."""
    borrowed = [Borrowed(0, 0), Borrowed(0, 4), Borrowed(0, 2), Borrowed(3, 0), Borrowed(3, 3)]
    keys, ends = shared_keys([6, 2, 3, 5, 2], borrowed)
    assert ends.tolist() == [0, 6, 12, 17, 22, 27]
    own = torch.randn(18, 2, 3, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(27, 2, 3, dtype=torch.float64)
    [want] = torch.autograd.grad(spread(own, keys), own, grad)
    torch.testing.assert_close(gather(grad, keys), want)


def test_rows_that_borrow_stand_behind_the_one_that_lends() -> None:
    with pytest.raises(ValueError, match="row 2 does not follow"):
        shared_keys([6, 2, 3], [Borrowed(0, 0), Borrowed(1, 0), Borrowed(0, 4)])
