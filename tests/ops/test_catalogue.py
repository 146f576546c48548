"""Today's models as data: found by name, with shapes that the trainer reads and their sources."""

from __future__ import annotations

import pytest

from ops.catalogue.models import entries, lookup
from trainer import families

NAMED = [
    "Qwen/Qwen3.5-9B",
    "Qwen/Qwen3-8B",
    "google/gemma-4-12B-it",
    "openai/gpt-oss-20b",
    "meta-llama/Llama-3.1-8B-Instruct",
    "Qwen/Qwen3-30B-A3B",
]


@pytest.mark.parametrize("name", NAMED)
def test_the_models_that_people_ask_for_are_there_with_what_the_plan_needs(name):
    entry = lookup(name)
    assert entry and entry.parameters and entry.weights_gb and entry.licence
    assert entry.gated is (name.startswith("meta-llama/"))


def test_a_name_is_found_with_a_revision_and_in_any_case():
    assert lookup("qwen/qwen3-8b@main") is lookup("Qwen/Qwen3-8B")
    assert lookup("somebody/something") is None


def test_the_forty_most_used_are_there_in_the_order_of_their_downloads():
    downloads = [e.values.get("downloads_30d", 0) for e in entries()]
    assert len(downloads) >= 40 and downloads == sorted(downloads, reverse=True)


@pytest.mark.parametrize("entry", entries(), ids=lambda e: e.id)
def test_every_value_has_a_source_with_a_date(entry):
    for value in entry.values:
        if value not in ("source", "sources"):
            source = entry.source_of(value)
            assert source.what and source.read >= "2026-01-01"
    named = [v for vs in entry.values.get("sources", {}).values() for v in vs]
    assert len(named) == len(set(named)) and set(named) <= set(entry.values)


@pytest.mark.parametrize("entry", entries(), ids=lambda e: e.id)
def test_the_table_of_architectures_reads_every_entry(entry):
    family = families.read(entry.config())
    assert family.layers == entry.values["layers"]
    assert family.experts == (entry.values.get("experts") or 0)
    assert (family.wrapper == entry.model_type) == ("text_type" in entry.values)
    assert family.words(2048)


def test_a_value_that_was_not_found_has_no_source():
    entry = lookup("Qwen/Qwen3-8B")
    assert entry is not None
    with pytest.raises(KeyError):
        entry.source_of("experts")
