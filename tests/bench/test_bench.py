"""What the bench measures is what it says: packs of whole rows, the protocol's lengths, the right
count of parameters; kept figures are whole."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch

from bench.peer_trl import padded, sizes
from bench.quality import CHANCES, Language
from bench.rows import Setting, batches, lengths
from bench.training import SHAPES, Dimensions, TimedSteps, build

ROOT = Path(__file__).parents[2]


def test_row_lengths_have_the_median_and_tail_of_the_protocol():
    drawn = lengths(Setting())
    assert len(drawn) == 20000
    assert (
        abs(np.median(drawn) - 180) < 6
        and abs(np.quantile(drawn, 0.95) - 520) < 25
        and drawn.max() <= 2048
    )


def test_packs_hold_whole_rows_and_count_only_them():
    for batch in batches(Setting(tokens=4096), 500, torch.device("cpu"), count=3):
        rows = (batch["cu"][1:] - batch["cu"][:-1]).tolist()
        assert sum(rows) == batch["count"] == batch["input_ids"].numel() <= 4096
        assert max(rows) == batch["longest"]
        ends = batch["cu"][1:].long() - 1
        assert (batch["labels"][0, ends] == -100).all() and (
            batch["position_ids"][0, batch["cu"][:-1].long()] == 0
        ).all()
        assert torch.equal((batch["labels"][0] >= 0).nonzero().flatten(), batch["targets_at"])


def test_a_micro_batch_of_smaller_packs_lets_no_row_cross_their_edges():
    whole, cut = (
        next(iter(batches(Setting(tokens=8192, pack=pack), 500, torch.device("cpu"), count=1)))
        for pack in (0, 2048)
    )
    assert 0.98 * 8192 < cut["count"] <= 8192 and whole["count"] <= 8192


def test_ranks_take_different_packs_of_like_rows():
    first, second = (
        batches(Setting(tokens=4096), 500, torch.device("cpu"), rank, 2, 4) for rank in (0, 1)
    )
    for a, b in zip(first, second, strict=True):
        assert (
            a["cu"].tolist() != b["cu"].tolist()
            or a["input_ids"].tolist() != b["input_ids"].tolist()
        )
        assert abs(a["count"] - b["count"]) < 100


def test_the_shapes_have_the_parameters_of_their_models():
    # the field notes' N + Nh
    assert abs(SHAPES["llama-7b"].linear_parameters / 6.607e9 - 1) < 0.001
    assert abs(SHAPES["llama-3-8b"].linear_parameters / 7.504e9 - 1) < 0.001


def test_what_a_peer_pads_counts_as_computed_and_not_as_real():
    short = {"prompt_ids": [1, 2], "chosen_ids": [3], "rejected_ids": [4, 5]}
    long = {"prompt_ids": [1] * 6, "chosen_ids": [3] * 4, "rejected_ids": [4]}
    assert sizes([short, long]) == [3, 4, 10, 7]
    assert padded([short, long], 1) == 2 * 4 + 2 * 10
    assert padded([short, long], 2) == 4 * 10


def test_the_loop_learns_on_the_cpu_too(monkeypatch):
    monkeypatch.setitem(SHAPES, "tiny", Dimensions(64, 128, 2, 2, 1, 200))
    setting = Setting(model="tiny", precision="bf16", tokens=512, checkpoint_layers=1)
    model, names = build(setting, torch.device("cpu"))
    assert names["layer"].startswith("fused, 2 of 2") and names["checkpointed_layers"] == "1 of 2"
    loop = TimedSteps(model, setting, torch.device("cpu"), 1, 0)
    tokens = [loop.step() for _ in range(6)]
    assert all(500 < n <= 512 for n in tokens)
    assert float(loop.losses[-1]) < float(loop.losses[0]) and float(loop.norms[-1]) > 0


def test_the_language_of_the_quality_bench_keeps_its_rules_but_for_the_changed_quarter():
    plain, changed = (Language(16, torch.device("cpu"), share) for share in (0.0, 0.25))
    assert all(len(set(words)) == len(CHANCES) for words in plain.follow.tolist())
    other = (plain.follow != changed.follow).any(1).float().mean()
    assert 0.15 < float(other) < 0.35
    rows = plain.rows(200, 40, seed=5)
    assert torch.equal(rows, plain.rows(200, 40, seed=5))
    pairs = rows[:, :-2] * 16 + rows[:, 1:-1]
    places = (plain.follow[pairs] == rows[:, 2:, None]).float()
    assert (places.sum(-1) == 1).all()  # each word is one of the eight that may follow
    assert (places.mean((0, 1)) - torch.tensor(CHANCES)).abs().max() < 0.03


def test_kept_figures_are_whole_and_carry_a_falling_loss():
    lines = [
        json.loads(line) for line in (ROOT / "bench/results/bench.jsonl").read_text().splitlines()
    ]
    assert len(lines) >= 10
    for line in lines:
        assert {
            "model",
            "precision",
            "gpus",
            "real_tok_s",
            "mfu",
            "peak_gib",
            "date",
            "command",
        } <= line.keys()
        assert line["loss_last"] < line["loss_first"] and line["grad_norm_last"] > 0


def test_the_memory_grid_has_its_configurations():
    lines = [
        json.loads(line)
        for line in (ROOT / "bench/results/memory-grid.jsonl").read_text().splitlines()
    ]
    measured = [x for x in lines if "peak_allocated_gib" in x]
    assert len(measured) >= 24
    assert all(
        x["static_allocated_gib"] < x["peak_allocated_gib"] <= x["peak_reserved_gib"]
        for x in measured
    )
