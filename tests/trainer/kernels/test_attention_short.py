"""Attention for short packed documents against its eager twin: in Triton's interpreter on the CPU
where Triton is installed, compiled on a GPU.

TRITON_INTERPRET=1 pytest tests/trainer/kernels/test_attention_short.py
"""

from __future__ import annotations

import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton comes with torch's CUDA wheels")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not INTERPRETED and not torch.cuda.is_available():
    pytest.skip("needs a GPU, or TRITON_INTERPRET=1", allow_module_level=True)

from trainer.data import shared_keys as data  # noqa: E402
from trainer.data.sharing import Borrowed  # noqa: E402
from trainer.kernels import attention, attention_short, reference  # noqa: E402
from trainer.kernels.decoder_layer import Packed  # noqa: E402
from trainer.kernels.shared_keys import gather, spread  # noqa: E402
from trainer.kernels.verify import OTHERWISE, short_attention_error  # noqa: E402
from trainer.kernels.verify_sharing import LENGTHS, sharing  # noqa: E402

pytestmark = [] if INTERPRETED else [pytest.mark.gpu]
DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPE = torch.float32 if INTERPRETED else torch.bfloat16
BOUND = 1e-5 if INTERPRETED else 0.01


def heads_of(ends, heads, kv_heads, d):
    """q, k, v as views of one joined matrix, d(out), boundaries and spans."""
    torch.manual_seed(5)
    m = ends[-1]
    joined = torch.randn(m, (heads + 2 * kv_heads) * d).to(DEVICE, DTYPE)
    q, k, v = (
        x.unflatten(1, (-1, d)) for x in joined.split([heads * d, kv_heads * d, kv_heads * d], 1)
    )
    cu = torch.tensor(ends, dtype=torch.int32, device=DEVICE)
    return q, k, v, torch.randn(m, heads, d).to(DEVICE, DTYPE), cu, attention_short.spans(cu, m)


def agree(got, want):
    got, want = got.float(), want.float()
    assert torch.isfinite(got).all()
    assert (got - want).norm() <= BOUND * want.norm(), (
        f"{float((got - want).norm() / want.norm()):.5f}"
    )


CASES = [
    # documents that begin inside a tile, one of a single token, a last tile that is not full
    ([0, 70, 71, 100, 190], 2, 2, 64),
    ([0, 5, 6, 19, 90], 4, 1, 64),
    ([0, 130], 2, 1, 128),
    ([0, 64, 128, 130], 8, 1, 64),  # boundaries on the edges of tiles
    # query heads a key head that are no power of two, with a second key head beside
    ([0, 5, 60], 6, 2, 64),
    ([0, 30, 33, 70], 7, 1, 64),
    ([0, 40], 10, 2, 64),
    ([0, 20, 27], 16, 1, 64),
    ([0, 33, 70], 2, 1, 256),
    ([0, 9, 50], 4, 2, 512),
    ([0, 9, 21], 15, 1, 512),
]


@pytest.mark.parametrize("case", CASES)
def test_short_attention_and_its_gradients_are_the_twins(case):
    q, k, v, dout, cu, at = heads_of(*case)
    assert attention_short.fits(q, k, v)
    out, (lse,) = attention_short.forward(q, k, v, at.first, 0.2)
    want, _ = attention.eager_forward(q, k, v, cu, attention.Rules(0.2))
    agree(out, want)
    got = attention_short.backward(dout, q, k, v, out, lse, at, 0.2, None, None)
    agree(
        got,
        torch.cat(
            [
                x.flatten(1)
                for x in attention.eager_backward(dout, q, k, v, cu, attention.Rules(0.2))
            ],
            1,
        ),
    )


@pytest.mark.parametrize("case", [CASES[0], CASES[4], CASES[8]])
@pytest.mark.parametrize("window", [1, 9])
def test_a_window_a_cap_and_sinks_are_the_twins(case, window):
    q, k, v, dout, cu, _ = heads_of(*case)
    q = q * 3  # scores that the cap bends
    q, k, v = (
        x.unflatten(1, (-1, case[3]))
        for x in torch.cat([x.flatten(1) for x in (q, k, v)], 1).split(
            [n * case[3] for n in (case[1], case[2], case[2])], 1
        )
    )
    at = attention_short.spans(cu, len(q), window)
    sinks = torch.randn(case[1], device=DEVICE)
    out, (lse,) = attention_short.forward(q, k, v, at.first, 0.2, 5.0, sinks)
    got = attention_short.backward(dout, q, k, v, out, lse, at, 0.2, None, None, False, 5.0)
    rules = attention.Rules(0.2, window, 5.0)
    with torch.enable_grad():
        given = [x.detach().requires_grad_() for x in (q, k, v)]
        want = attention.eager_attention(*given, cu, rules, sinks)
        grads = torch.autograd.grad(want, given, dout)
    agree(out, want)
    agree(got, torch.cat([x.flatten(1) for x in grads], 1))


SHARED = [
    # own tokens and what is borrowed of which row; heads, key heads, head size. Answers of more
    # than a tile, of few tokens, and one between that borrows nothing
    (
        [(150, 0, 0), (70, 0, 90), (20, 2, 0), (3, 2, 17), (2, 2, 0), (2, 2, 16), (40, 6, 0)],
        2,
        2,
        64,
    ),
    ([(9, 0, 0), (40, 1, 0), (1, 1, 39), (1, 1, 20), (30, 1, 33)], 6, 2, 64),
    ([(70, 0, 0), (66, 0, 64), (5, 0, 64)], 4, 1, 128),
    ([(40, 0, 0), (9, 0, 30)], 2, 1, 256),
]


@pytest.mark.parametrize("case", SHARED)
def test_documents_that_borrow_keys_attend_to_them_as_if_these_were_their_own(case):
    rows, *heads = case
    own = [n for n, _, _ in rows]
    keys, ends = data.shared_keys(own, [Borrowed(place, n) for _, place, n in rows])
    keys, most = data.SharedKeys(*(x.to(DEVICE) for x in keys)), int(ends.diff().max())
    q, k, v, dout, cu, at = heads_of([0, *np.cumsum(own).tolist()], *heads)
    near = (cu, attention.Rules(0.2, None, 5.0), None, attention.KeyEnds(ends.to(DEVICE), most))
    out, (lse,) = attention_short.forward(q, k, v, at.first, 0.2, 5.0, lent=keys.reads)
    spread_out = (q, spread(k, keys), spread(v, keys))
    agree(out, attention.eager_forward(*spread_out, *near)[0])
    more = (at, 0.2, None, None, False, 5.0, keys.reads)
    got = attention_short.backward(dout, q, k, v, out, lse, *more)
    dq, dk, dv = attention.eager_backward(dout, *spread_out, *near)
    want = [dq, gather(dk, keys), gather(dv, keys)]
    agree(got, torch.cat([x.flatten(1) for x in want], 1))


def angles(m, d):
    angle = torch.rand(m, d // 2).repeat(1, 2) * 6
    return angle.cos().to(DEVICE, DTYPE), angle.sin().to(DEVICE, DTYPE)


def test_gradients_are_turned_back_by_the_angles_as_the_twin_does_it_after_attention():
    q, k, v, dout, cu, at = heads_of(*CASES[1])
    cos, sin = angles(len(q), q.shape[2])
    out, (lse,) = attention_short.forward(q, k, v, at.first, 0.2)
    got = attention_short.backward(dout, q, k, v, out, lse, at, 0.2, cos, sin)
    agree(
        got,
        reference.rope_backward(
            *attention.eager_backward(dout, q, k, v, cu, attention.Rules(0.2)), cos, sin, None, None
        )[0],
    )


def test_the_self_test_passes_these_kernels_and_catches_a_wrong_one():
    q, k, v, dout, cu, _ = heads_of(*CASES[0])
    packed = Packed(*angles(len(q), q.shape[2]), cu, 90)
    assert (
        short_attention_error(attention_short, q, k, v, dout, packed, attention.Rules(0.2)) <= BOUND
    )

    def blind(*given):  # every document begins at the first token: it sees its neighbours
        return attention_short.forward(*given[:3], torch.zeros_like(given[3]), *given[4:])

    wrong = SimpleNamespace(
        spans=attention_short.spans, forward=blind, backward=attention_short.backward
    )
    assert short_attention_error(wrong, q, k, v, dout, packed, attention.Rules(0.2)) > OTHERWISE


def test_the_self_test_of_shared_keys_passes_these_kernels_and_catches_a_blind_one():
    q, k, v, dout, cu, _ = heads_of([0, sum(LENGTHS)], 2, 1, 64)
    packed = sharing(Packed(*angles(len(q), q.shape[2]), cu, len(q)))
    asked = (q, k, v, dout, packed, attention.Rules(0.2))
    assert short_attention_error(attention_short, *asked) <= BOUND

    def blind(*given):  # no document sees what it borrows
        return attention_short.forward(*given[:-1])

    wrong = SimpleNamespace(
        spans=attention_short.spans, forward=blind, backward=attention_short.backward
    )
    assert short_attention_error(wrong, *asked) > OTHERWISE


def test_a_document_does_not_see_its_neighbours():
    q, k, v, _, _, at = heads_of(*CASES[0])
    out, _ = attention_short.forward(q, k, v, at.first, 0.2)
    k[71:100] = 7.0
    v[71:100] = -3.0
    again, _ = attention_short.forward(q, k, v, at.first, 0.2)
    assert torch.equal(out[:71], again[:71]) and torch.equal(out[100:], again[100:])
    assert not torch.equal(out[71:100], again[71:100])


def test_spans_name_the_document_of_each_token():
    at = attention_short.spans(torch.tensor([0, 2, 3, 6], dtype=torch.int32), 6)
    assert at.first.tolist() == [0, 0, 2, 3, 3, 3] and at.past.tolist() == [2, 2, 3, 6, 6, 6]


def test_what_the_kernels_do_not_take_is_known():
    q, k, v, *_ = heads_of(*CASES[0])
    assert not attention_short.fits(q.contiguous(), k, v)  # another distance between rows
    # three query heads on two key heads, and more than the copy engine brings at once
    assert not attention_short.fits(torch.cat([q, q[:, :1]], 1), k, v)
    many = torch.zeros(4, 19, 64, device=DEVICE, dtype=DTYPE)
    assert not attention_short.fits(many[:, :17], many[:, 17:18], many[:, 18:])
    assert not attention_short.fits(q[..., :32], k[..., :32], v[..., :32])
