"""`milktea models` and `milktea gpus`: what is known without a network, in words and as JSON."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ops import api
from ops.catalogue.models import Entry, entries
from ops.cli.app import app
from ops.fakevast import FakeVast
from ops.hardware import gpus
from ops.job.cards import cards, known
from ops.market.provider import Provider
from ops.market.ranking import Needs
from ops.wait import RealClock


def said(*words: str) -> str:
    done = CliRunner().invoke(app, list(words))
    assert done.exit_code == 0, done.output
    return done.stdout


def rows(*words: str) -> list[dict]:
    return [json.loads(line) for line in said(*words, "--json").splitlines()]


def test_every_known_model_is_listed_within_100_columns() -> None:
    lines = said("models").splitlines()
    assert max(map(len, lines)) <= 100
    for entry in entries():
        assert any(line.startswith(entry.id[:37]) for line in lines), entry.id


def test_the_json_of_models_tells_why_a_model_is_refused_or_what_holds_it() -> None:
    found = rows("models")
    assert [row["model"] for row in found] == [entry.id for entry in entries()]
    for row in found:
        assert row["trains"] == (not row["why"])
        if row["lora"]:
            assert row["trains"]
            assert row["lora"]["nf4"]["gib"] <= row["lora"]["bf16"]["gib"]


def test_the_smallest_card_of_a_model_is_the_one_that_its_need_gives() -> None:
    [row] = [r for r in rows("models", "qwen3-8b") if r["model"] == "Qwen/Qwen3-8B"]
    need = row["lora"]["bf16"]
    first = gpus.find(need["cards"][0])
    assert first is not None and first.memory_gib >= need["gib"]
    smaller = {g.name for g in gpus.GPUS if g.memory_gib < need["gib"]}
    assert smaller and not smaller & set(need["cards"])


def test_words_filter_models_by_name_type_and_licence() -> None:
    found = rows("models", "qwen3", "APACHE")
    assert found
    for row in found:
        assert "qwen3" in (row["model"] + row["model_type"]).lower()
        assert "apache" in row["licence"]
    assert CliRunner().invoke(app, ["models", "no such model"]).exit_code != 0


def test_few_models_are_told_in_full_within_100_columns() -> None:
    text = said("models", "qwen/qwen3-8b-base")
    assert "licence: apache-2.0, not gated" in text and "LoRA nf4 needs" in text
    assert max(map(len, text.splitlines())) <= 100


def test_gpus_lists_every_card_and_filters_by_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VAST_API_KEY", raising=False)
    found = rows("gpus")
    assert {row["gpu"] for row in found} == {g.name for g in gpus.GPUS}
    assert all(row["price"] is None and row["fits"] is None for row in found)
    assert {row["gpu"] for row in rows("gpus", "h100")} == {"H100 PCIE", "H100 NVL", "H100 SXM"}
    assert max(map(len, said("gpus").splitlines())) <= 100


def test_a_card_is_judged_by_memory_precision_and_the_names_of_the_job() -> None:
    needs = Needs(min_gpu_memory_gib=30.0, min_compute_capability=8.9)
    found = {c.gpu.name: c for c in cards([], {}, needs, ["RTX 5090", "H100"])}
    assert found["RTX 5090"].fits and found["H100 SXM"].fits
    assert "needs 30.0 GiB" in found["RTX 4090"].why_not
    assert "compute capability 8.6" in found["RTX A6000"].why_not
    assert "offer.gpu_name" in found["L40S"].why_not


def test_the_practice_job_fits_every_card_that_its_image_has_code_for() -> None:
    job = Path(__file__).parents[3] / "jobs" / "practice.toml"
    for card in api.gpus(job=job):
        volta = card.gpu.compute_capability < 7.5
        assert card.fits != volta and ("compute capability 7.0" in card.why_not) == volta


def test_a_model_that_cannot_be_trained_is_told_with_its_reason() -> None:
    entry = Entry({"id": "somebody/encoder", "model_type": "bert", "source": "memory"})
    model = known(entry)
    assert model.why and not model.lora_gib
    assert model.as_dict()["trains"] is False


def test_prices_are_the_cheapest_single_cards_of_the_market(fake: FakeVast) -> None:
    market = api.Vast(Provider(fake.url, fake.api_key), RealClock(0.002))
    found = api.prices(market)
    assert found
    for gpu, price in found.items():
        assert gpu in gpus.GPUS and price.usd_per_hour > 0 and price.offers >= 1
