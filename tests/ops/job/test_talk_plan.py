"""What a box to talk on needs and costs, beside what the training needed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import rig
from ops.errors import PreflightError
from ops.job.talk_plan import talk_plan
from ops.market import cost
from ops.market.models import Offer
from trainer.memory import Mixture, Shape

QWEN_7B = Shape(152064, 3584, 28, 28, 4, 128, 18944, qkv_bias=True)
QWEN_30B_A3B = Shape(
    vocab=151936, hidden=2048, layers=48, heads=32, kv_heads=4, head_dim=128, intermediate=6144,
    qk_norm=True, mixture=Mixture(128, 8, 768, True, 0, 0, False, lean=True, held=True),
)  # fmt: skip
NOW = 1795740000.0
OFFER: dict[str, Any] = {
    "id": 1,
    "machine_id": 2,
    "host_id": 3,
    "gpu_name": "RTX 4090",
    "num_gpus": 1,
    "gpu_memory_gib": 23.99,
    "compute_capability": 8.9,
    "cuda_max": 12.8,
    "cpu_ram_gib": 64,
    "disk_gib": 500,
    "usd_per_hour": 0.36,
    "min_bid_usd_per_hour": 0.2,
    "storage_usd_per_gib_month": 0.144,
    "inet_up_mbps": 1000,
    "inet_down_mbps": 1000,
    "inet_up_usd_per_gb": 0.004,
    "inet_down_usd_per_gb": 0.002,
    "reliability": 0.99,
    "country": "US",
    "duration_s": 1e6,
    "verified": True,
    "direct_ports": 2,
}


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    file = tmp_path / "adapter.zip"
    file.write_bytes(b"z" * 80_000_000)
    return file


def test_talking_needs_less_memory_than_training_and_holds_no_rows(
    own: rig.Rig, adapter: Path
) -> None:
    run = own.plan()
    large = replace(run.workload, shape=QWEN_7B, model_parameters=7.6e9, cpu_practice=False)
    run = replace(run, workload=large)
    plan = talk_plan(run, adapter, NOW, 30, 0.5)
    assert 15 < plan.needs.min_gpu_memory_gib < 19, "weights of 14.2 GiB, and room to talk in"
    small = replace(run, workload=replace(large, precision="nf4"))
    assert talk_plan(small, adapter, NOW, 30, 0.5).needs.min_gpu_memory_gib < 8
    assert [p.remote for p in plan.pushes] == ["result/adapter.zip"]
    assert plan.when_silent == "destroy" and not plan.trains and plan.needs.max_usd == 0.5
    assert plan.run_id.startswith("stub-chat-") and plan.run_id != run.run_id


def test_a_mixture_trained_in_nf4_is_talked_to_on_a_card_of_24_gib(
    own: rig.Rig, adapter: Path
) -> None:
    run = own.plan()
    large = replace(run.workload, shape=QWEN_30B_A3B, model_parameters=30.5e9, cpu_practice=False)
    needs = {
        precision: talk_plan(
            replace(run, workload=replace(large, precision=precision)), adapter, NOW, 30, 0.5
        ).needs
        for precision in ("nf4", "fp8", "bf16", "int8")
    }
    # experts of 29.0 G weights: 0.5625, 1 and 2 bytes each
    assert 19 < needs["nf4"].min_gpu_memory_gib < 23.5  # as torch reports a card of 24
    assert 30 < needs["fp8"].min_gpu_memory_gib < 38
    assert needs["bf16"].min_gpu_memory_gib > 57 and needs["int8"].min_gpu_memory_gib > 55
    assert needs["nf4"].min_cpu_ram_gib > 57, "where experts are joined"


def test_a_plan_prices_the_minutes_of_talk(own: rig.Rig, adapter: Path) -> None:
    offer = Offer(**OFFER)
    half, whole = (talk_plan(own.plan(), adapter, NOW, m, 1.0).workload for m in (30, 60))
    less, more = cost.predict(offer, half), cost.predict(offer, whole)
    rate = offer.usd_per_hour + cost.disk_usd_per_hour(offer, half.disk_gib)
    assert more.usd - less.usd == pytest.approx(rate / 2)
    assert any(line.startswith("talk      60 min") for line in more.lines)
    assert not any(line.startswith("train") for line in more.lines)


def test_a_base_that_was_moved_is_said_before_anything_is_rented(
    own: rig.Rig, adapter: Path
) -> None:
    run = own.plan()
    gone = replace(run.pushes[0], local=own.folder / "gone.safetensors", remote="model/m")
    with pytest.raises(PreflightError, match="not where it was"):
        talk_plan(replace(run, pushes=[gone]), adapter, NOW, 30, 1.0)
