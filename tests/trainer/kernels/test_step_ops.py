"""Kernels of one token a row against their twins: under Triton's interpreter where Triton is
installed, and compiled on a GPU.

TRITON_INTERPRET=1 pytest tests/trainer/kernels/test_step_ops.py
"""

from __future__ import annotations

import os

import pytest
import torch

pytest.importorskip("triton", reason="Triton comes with torch's CUDA wheels")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not INTERPRETED and not torch.cuda.is_available():
    pytest.skip("needs a GPU, or TRITON_INTERPRET=1", allow_module_level=True)

from trainer.kernels import step_ops, step_reference  # noqa: E402
from trainer.kernels.attention import Rules  # noqa: E402
from trainer.kernels.norms import HeadNorms, Norm  # noqa: E402
from trainer.kernels.step_layer import CachePositions, by_flash, by_twin  # noqa: E402

pytestmark = [] if INTERPRETED else [pytest.mark.gpu]
DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPE = torch.float32 if INTERPRETED else torch.bfloat16
BOUND = 1e-5 if INTERPRETED else 0.01
B, K, F, LONGEST = 5, 144, 1100, 48
HEADS = (4, 2)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(3)


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape).to(DEVICE, DTYPE)


def agree(got: tuple[torch.Tensor, ...], want: tuple[torch.Tensor, ...]) -> None:
    for a, b in zip(got, want, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        a, b = a.float(), b.float()
        assert torch.isfinite(a).all()
        assert (a - b).norm() <= BOUND * b.norm()


@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("branch", [False, True])
@pytest.mark.parametrize("normed", [False, True])
def test_add_norm_is_its_twin(add: bool, branch: bool, normed: bool) -> None:
    given = (
        random(B, K),
        random(B, K) if add else None,
        random(B, K) if add and branch else None,
        Norm(random(K).float(), 1e-6) if branch else None,
        Norm(random(K), 1e-5) if normed else None,
        0.7 if branch else 1.0,
    )
    agree(step_ops.add_norm(*given), step_reference.add_norm(*given))


@pytest.mark.parametrize("d", [32, 128])
@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize("kind", ["plain", "biased", "normed", "values normed"])
def test_turn_and_keep_is_its_twin(d: int, pairs: bool, kind: str) -> None:
    qkv, angle = random(B, sum((*HEADS, HEADS[1])) * d), torch.rand(B, d // 2).repeat(1, 2) * 6
    bias = random(qkv.shape[1]) if kind == "biased" else None
    more = random(*qkv.shape) if kind in ("biased", "values normed") else None
    norms = None
    if "normed" in kind:
        norms = HeadNorms(torch.rand(3, d, device=DEVICE) + 0.5, 1e-6, kind == "values normed")
    slots = torch.tensor([6, 0, 3, 2, 5], device=DEVICE)
    positions = torch.tensor([0, 47, 13, 5, 5], device=DEVICE)
    held = [random(7, LONGEST, HEADS[1], d) for _ in range(2)]
    found = []
    for ops in (step_ops, step_reference):
        keys, values = (x.clone() for x in held)
        angles = (x.to(DEVICE, DTYPE) for x in (angle.cos(), angle.sin()))
        places = (keys, values, slots, positions)
        q = ops.turn_and_keep(qkv, more, bias, *angles, HEADS, *places, norms=norms, pairs=pairs)
        found.append((q, keys, values))
    agree(*found)


@pytest.mark.parametrize("gelu", [False, True])
def test_gate_is_its_twin(gelu: bool) -> None:
    gu, more = random(B, 2 * F), random(B, 2 * F) if gelu else None
    agree((step_ops.gate(gu, more, gelu),), (step_reference.gate(gu, more, gelu),))


@pytest.mark.skipif(INTERPRETED, reason="torch's flash attention needs a GPU")
@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("heads", [(8, 8), (8, 2)])
@pytest.mark.parametrize("longest", [48, 1000])
def test_flash_attention_of_one_query_a_row_is_its_twin(
    window: int | None, sinks: bool, heads: tuple[int, int], longest: int
) -> None:
    slots = torch.tensor([6, 0, 3, 2, 5], device=DEVICE)
    positions = torch.tensor([0, longest - 1, 13, 5, longest // 2], device=DEVICE)
    keys, values = (random(7, longest, heads[1], 128) for _ in range(2))
    q = random(B, heads[0] // heads[1], heads[1], 128)
    given = (q, keys, values, CachePositions.of(slots, positions, longest))
    more = (Rules(128**-0.5, window), random(heads[0]) if sinks else None)
    agree((by_flash(*given, *more),), (by_twin(*given, *more),))
