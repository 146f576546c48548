"""Angles that depend on a row's length: a pack's rows get what each would get alone."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from architectures import ARCHITECTURES
from torch.nn.functional import cross_entropy
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM

from trainer.kernels.attention import packed_attention
from trainer.kernels.rotary import by_document, by_length, document_lengths

ORIGINAL = 32
LENGTHS = (20, 50, 32, 70, 33)
KINDS = {
    "longrope": (
        "phi3",
        {
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": [1.0] * 4,
            "long_factor": [4.0] * 4,
            "original_max_position_embeddings": ORIGINAL,
        },
        {"max_position_embeddings": 512, "original_max_position_embeddings": ORIGINAL},
    ),
    "dynamic": (
        "llama",
        {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0},
        {"max_position_embeddings": ORIGINAL},
    ),
}


def model(kind: str):
    name, rope, more = KINDS[kind]
    settings = {**ARCHITECTURES[name][1], "sliding_window": None, **more, "rope_parameters": rope}
    torch.manual_seed(0)
    told = AutoConfig.for_model(name, **settings)
    return AutoModelForCausalLM.from_config(told, attn_implementation="eager").eval()


@pytest.mark.parametrize("kind", KINDS)
def test_each_document_of_a_pack_gets_the_angles_that_it_gets_alone(kind):
    made = model(kind)
    alone = [
        copy.deepcopy(made).model.rotary_emb(torch.zeros(1, n, 32), torch.arange(n)[None])
        for n in LENGTHS
    ]
    assert by_document(made) == 1
    for order in (range(5), (3, 1, 0, 4, 2)):  # what was asked before changes nothing
        positions = torch.cat([torch.arange(LENGTHS[i]) for i in order])[None]
        got = made.model.rotary_emb(torch.zeros(1, positions.shape[1], 32), positions)
        want = (torch.cat([alone[i][which] for i in order], 1) for which in (0, 1))
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("kind", KINDS)
def test_a_padded_rows_angles_are_those_of_the_row_alone(kind):
    made = model(kind)
    rows = [torch.arange(n) for n in (50, 20)]
    alone = [copy.deepcopy(made).model.rotary_emb(torch.zeros(1, 1, 32), r[None]) for r in rows]
    by_document(made)
    padded = torch.stack([rows[0], torch.cat([rows[1], torch.zeros(30, dtype=torch.long)])])
    cos, sin = made.model.rotary_emb(torch.zeros(2, 50, 32), padded)
    torch.testing.assert_close(cos[:1], alone[0][0])
    torch.testing.assert_close(sin[1:, :20], alone[1][1])


@pytest.mark.parametrize("kind", KINDS)
def test_a_pack_of_short_and_long_rows_has_the_loss_of_the_rows_alone(kind):
    """Stock transformers in eager attention, row by row, is the judge."""
    alone = model(kind)
    AttentionInterface.register("milktea", packed_attention)
    packed = copy.deepcopy(alone)
    packed.set_attn_implementation("milktea")
    assert by_document(packed) == 1
    rows = [torch.randint(5, 300, (n,)) for n in LENGTHS]
    boundaries = torch.tensor([0, *itertools.accumulate(LENGTHS)], dtype=torch.int32)
    with torch.no_grad():
        got = packed(
            input_ids=torch.cat(rows)[None],
            position_ids=torch.cat([torch.arange(n) for n in LENGTHS])[None],
            cu_seq_lens_q=boundaries,
            cu_seq_lens_k=boundaries,
            max_length_q=max(LENGTHS),
            max_length_k=max(LENGTHS),
            use_cache=False,
        ).logits[0]
        for ids, logits in zip(rows, got.split(LENGTHS), strict=True):
            judge = copy.deepcopy(alone)  # dynamic angles keep the longest row that they saw
            want = judge(input_ids=ids[None], use_cache=False).logits[0]
            losses = [cross_entropy(x[:-1], ids[1:]) for x in (logits, want)]
            assert abs(losses[0] - losses[1]) < 1e-5


def test_models_whose_angles_do_not_depend_on_length_are_left_alone():
    name = "llama"
    made = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **ARCHITECTURES[name][1]))
    assert by_document(made) == 0


def test_twice_is_as_once():
    made = model("longrope")
    assert (by_document(made), by_document(made)) == (1, 0)


def test_a_token_after_a_cache_counts_what_is_in_the_cache():
    assert document_lengths(torch.tensor([[40]])).tolist() == [[41]]
    assert document_lengths(torch.tensor([[0, 1, 0, 0, 1, 2]])).tolist() == [[2, 2, 1, 3, 3, 3]]


def test_long_rows_with_the_factors_of_short_ones_are_left_alone():
    name, rope, more = KINDS["longrope"]
    same = {**rope, "long_factor": rope["short_factor"]}
    settings = {**ARCHITECTURES[name][1], "sliding_window": None, **more, "rope_parameters": same}
    made = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **settings))
    assert by_document(made) == 0 and not by_length(made)
