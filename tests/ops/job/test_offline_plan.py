"""`milktea plan` without a network: the catalogue knows shape and licence, tokens are estimated."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import rig
from ops import api
from ops.catalogue.models import entries, lookup
from ops.errors import PreflightError
from ops.fakevast import FakeVast
from ops.hardware import gpus
from ops.market.client import Vast
from ops.market.provider import Provider
from ops.wait import RealClock
from trainer import families, memory
from trainer.data import estimate
from trainer.data.formats import Row
from trainer.data.template import Turn

ROWS = [{"instruction": f"say {n}", "input": "", "output": f"it is {n} " * 30} for n in range(200)]
FORTY = [entry.id for entry in entries()[:40]]
NAMED = (
    *("Qwen/Qwen3.5-9B", "Qwen/Qwen3-8B", "google/gemma-4-12B-it", "openai/gpt-oss-20b"),
    *("meta-llama/Llama-3.1-8B-Instruct", "Qwen/Qwen3-30B-A3B"),
)
TOO_LARGE = ("openai/gpt-oss-120b",)  # for one card of the emulator's, with all experts in bf16


@pytest.fixture(scope="module")
def market(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Vast]:
    with FakeVast(tmp_path_factory.mktemp("fakevast")) as cloud:
        yield Vast(Provider(cloud.url, cloud.api_key), RealClock(rig.PACE))


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    (tmp_path / "rows.json").write_text(json.dumps(ROWS))
    return tmp_path / "rows.json"


def job(base: str, rows: Path, **more: Any) -> dict[str, Any]:
    return {
        "name": "offline",
        "model": {"base": base, "precision": "bf16"},
        "data": {"files": [str(rows)], "max_length": 1024},
        "limits": {"max_usd": 20},
        **more,
    }


def planned(base: str, rows: Path, market: Vast, **more: Any) -> api.Planned:
    root = rows.parent / "runs"
    return api.plan(job(base, rows, **more), vast=market, root=root, or_estimate=True)


@pytest.mark.parametrize("base", sorted({*FORTY, *NAMED} - {*TOO_LARGE}))
def test_a_model_of_today_has_a_price_and_a_card_without_a_network(
    base: str, rows: Path, market: Vast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_of_a_test")  # a gated model is not planned without one
    made = planned(base, rows, market, env=["HF_TOKEN"])
    best = made.ranking.accepted[0]
    assert best.cost.usd > 0 and best.cost.tokens_per_s > 0
    assert best.offer.gpu_memory_gib >= made.plan.needs.min_gpu_memory_gib > 1
    said = "\n".join(made.plan.notes)
    entry = lookup(base)
    assert entry is not None
    assert "an estimate from characters" in said and "from the catalogue" in said
    assert not entry.licence or f"licence {entry.licence}" in said
    assert (", gated: the hub" in said) == bool(entry.gated)
    assert made.plan.estimated


def test_a_model_that_no_card_holds_is_told_so_without_a_network(rows: Path, market: Vast) -> None:
    with pytest.raises(PreflightError, match=r"needs \d+\.\d GiB on one GPU; the largest"):
        planned(TOO_LARGE[0], rows, market, model={"base": TOO_LARGE[0], "precision": "fp32"})


def test_nothing_is_rented_by_an_estimate(rows: Path, market: Vast) -> None:
    made = planned("Qwen/Qwen3-8B", rows, market)
    with pytest.raises(PreflightError, match="not checked with the tokenizer"):
        api.rent_and_train(made, vast=market, root=rows.parent / "runs")
    with pytest.raises(PreflightError, match="not on this machine"):
        api.rent_and_train(job("Qwen/Qwen3-8B", rows), vast=market, root=rows.parent / "runs")
    assert not list((rows.parent / "runs").glob("*"))


def test_a_model_that_nobody_knows_needs_the_network(rows: Path, market: Vast) -> None:
    with pytest.raises(PreflightError, match="not on this machine"):
        planned("somebody/some-model", rows, market)


def test_defects_of_the_data_are_found_without_a_tokenizer(rows: Path, market: Vast) -> None:
    rows.write_text(json.dumps([*ROWS, {"instruction": "say", "input": "", "output": 3}]))
    with pytest.raises(PreflightError, match=r"rows\.json:1"):
        planned("Qwen/Qwen3-8B", rows, market)


def test_a_mixture_costs_what_a_token_meets(rows: Path, market: Vast) -> None:
    mixture = planned("Qwen/Qwen3-30B-A3B", rows, market).plan.workload
    assert mixture.shape is not None and mixture.active_parameters is not None
    told = lookup("Qwen/Qwen3-30B-A3B")
    assert told is not None and told.active is not None
    assert mixture.active_parameters == pytest.approx(told.active, rel=0.15)
    assert mixture.model_parameters > 8 * mixture.active_parameters
    dense = planned("Qwen/Qwen3-32B", rows, market).plan.workload
    assert dense.active_parameters is None
    assert dense.computed_parameters == dense.model_parameters
    embeddings = mixture.shape.vocab * mixture.shape.hidden
    assert memory.active_parameters(mixture.shape) + embeddings == mixture.active_parameters


def test_experts_that_stay_in_bf16_are_told_and_priced(rows: Path, market: Vast) -> None:
    base = "Qwen/Qwen3-30B-A3B"
    made = planned(base, rows, market, model={"base": base, "precision": "int8"}).plan
    assert any("128 experts of a layer stay in bf16" in note for note in made.notes)
    experts = 48 * 128 * 3 * 768 * 2048 * 2 / memory.GIB
    assert made.needs.min_gpu_memory_gib > experts


def test_a_mixture_of_30b_fits_a_card_of_24_gb_in_nf4_and_costs_a_little_more_than_in_bf16(
    rows: Path, market: Vast
) -> None:
    base, lora = "Qwen/Qwen3-30B-A3B", {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}
    made = planned(base, rows, market, model={"base": base, "precision": "nf4"}, lora=lora).plan
    assert made.needs.min_gpu_memory_gib < 23.5  # as torch reports a card of 24
    assert made.needs.min_cpu_ram_gib > 57  # the experts are joined there as the files have them
    assert not any("stay in bf16" in note for note in made.notes)
    assert made.needs.min_compute_capability == 8.0  # nf4 computes in bf16
    card, shape = gpus.find("H100 SXM"), made.workload.shape
    assert card is not None
    nf4, bf16 = (gpus.tokens_per_second(card, p, 0, shape) for p in ("nf4", "bf16"))
    assert 0.8 * bf16 < nf4 < bf16


def test_english_and_chinese_have_the_density_of_their_tokenizer() -> None:
    english, chinese = "The cat sat on the mat. " * 50, "猫坐在垫子上面看着窗外的雨。" * 50
    large, small = estimate.Density.of(151_936, "qwen3"), estimate.Density.of(32_000, "llama")
    assert estimate.tokens(english, large) == pytest.approx(len(english) / 4.5, abs=2)
    assert estimate.tokens(chinese, large) == pytest.approx(len(chinese) / 1.6, abs=2)
    assert estimate.tokens(chinese, small) > 1.5 * estimate.tokens(chinese, large)
    assert estimate.tokens("", large) == 0


def test_a_rows_length_counts_every_turn_and_what_stands_around_it() -> None:
    density = estimate.Density.of(151_936, "qwen3")
    turns = (Turn("user", "a" * 45, "b" * 45), Turn("assistant", "c" * 90))
    plain, chat = estimate.lengths([Row("x:1", text="a" * 180), Row("x:2", turns)], density)
    assert plain == 41 and chat == 40 + estimate.AROUND_TURN + 1


def test_every_model_of_the_catalogue_has_a_family() -> None:
    refused = []
    for entry in entries():
        try:
            families.read(entry.config())
        except families.FamilyError as why:
            refused.append(f"{entry.id}: {why}")
    assert not refused


def test_a_base_that_none_of_the_cards_holds_is_planned_in_parts_over_several(
    rows: Path, market: Vast
) -> None:
    base = {"base": "Qwen/Qwen2.5-72B-Instruct", "precision": "bf16"}
    cards: dict[str, Any] = {"gpu_name": ["H100 SXM"], "num_gpus": 1}
    with pytest.raises(PreflightError, match=r"needs .* GiB on one GPU"):
        planned(base["base"], rows, market, model=base, offer=cards)
    four = planned(base["base"], rows, market, model=base, offer=cards | {"num_gpus": 4}).plan
    assert four.workload.in_parts and 40 < four.needs.min_gpu_memory_gib < 80
    assert any("base in parts over 4 GPUs" in note for note in four.notes)
    assert four.needs.min_cpu_ram_gib > 2 * 72e9 / 2**30  # process 0 reads the whole base
    small = planned("Qwen/Qwen3-8B", rows, market, offer=cards | {"num_gpus": 4}).plan
    assert not small.workload.in_parts and not any("in parts" in note for note in small.notes)
    with pytest.raises(PreflightError, match="none of them holds all of it to answer"):
        more = {"results": {"then_chat_minutes": 5}}
        planned(base["base"], rows, market, model=base, offer=cards | {"num_gpus": 4}, **more)
