"""How many dollars a run may have, which run ends early, and which runs there are."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import milktea
from ops.errors import ConfigError
from ops.sweep import decide, grid

USD = st.floats(0.001, 20, allow_nan=False)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(USD, st.floats(0, 1)), min_size=1, max_size=12), USD, st.integers(1, 4))
def test_whatever_runs_spend_of_their_caps_the_purse_is_never_promised_twice(
    runs: list[tuple[float, float]], purse: float, at_once: int
) -> None:
    waiting, live, spent = list(runs), list[tuple[float, float]](), 0.0
    while waiting or live:
        reserved = spent + sum(cap for cap, _ in live)
        assert reserved <= purse + 1e-9
        cap = None
        if waiting and len(live) < at_once:
            enough = waiting[0][0]
            cap = decide.cap_usd(purse - reserved, enough, 3.0, len(waiting), len(live))
        if cap is not None:
            assert min(enough, 3.0) - 1e-4 <= cap <= 3.0
            live.append((cap, waiting.pop(0)[1]))
        elif live:
            cap, share = live.pop(0)
            spent += cap * share
        else:
            assert purse - spent < min(waiting[0][0], 3.0), "there was enough for one alone"
            waiting.pop(0)


def test_of_two_that_cannot_share_the_second_waits_for_what_the_first_gives_back() -> None:
    assert decide.cap_usd(1.0, 0.8, 5.0, waiting=2, live=0) == 0.8
    assert decide.cap_usd(0.2, 0.8, 5.0, waiting=1, live=1) is None
    assert decide.cap_usd(0.9, 0.8, 5.0, waiting=1, live=0) == 0.9


def test_the_worse_half_ends_and_equal_losses_stay() -> None:
    assert decide.worse_half({1: 1.0, 2: 2.0, 3: 3.0, 4: 4.0, 5: 5.0}) == {4, 5}
    assert decide.worse_half({1: 1.0}) == set() and decide.worse_half({1: 1.0, 2: 1.0}) == set()
    assert decide.worse_half({1: math.nan, 2: 9.0}) == {1}


def test_a_run_is_compared_at_its_last_rung_with_all_that_reached_it() -> None:
    rungs = {1: {0.25: 1.0, 0.5: 0.9}, 2: {0.25: 2.0}, 3: {0.25: 1.5}, 4: {}}
    assert decide.to_end(rungs, [2, 3, 4]) == {2: 0.25}
    assert decide.to_end(rungs, [1, 3, 4]) == {}


def test_losses_of_runs_that_differ_in_what_the_loss_is_are_not_compared() -> None:
    assert decide.comparable(["training.learning_rate", "lora.r", "stage"])
    assert not decide.comparable(["training.learning_rate", "dpo.beta"])


def test_a_rung_is_the_first_look_after_its_share_and_never_the_last_step() -> None:
    looks = [(0, 9.0), (3, 3.0), (4, 2.0), (8, 1.0)]
    assert decide.reached(looks, 8) == {0.25: 3.0, 0.5: 2.0}
    assert decide.reached([(0, 9.0), (8, 1.0)], 8) == {} and decide.reached([], 0) == {}


@pytest.mark.parametrize(
    "word, values",
    [
        ("training.learning_rate=1e-4,2e-4", [1e-4, 2e-4]),
        ("lora.r=8,16", [8, 16]),
        ("lora.use_rslora=true,false", [True, False]),
        ("training.optim=adamw,muon", ["adamw", "muon"]),
        (
            'lora.target_modules="all-linear",["q_proj", "v_proj"]',
            ["all-linear", ["q_proj", "v_proj"]],
        ),
    ],
)
def test_values_are_read_as_toml_or_as_words(word: str, values: list[Any]) -> None:
    key, found = grid.parse_set(word)
    assert found == values and f"{key}=" in word


@pytest.mark.parametrize("word", ["lora.r", "lora.r=", "=3", "lora.r=8,8"])
def test_what_names_no_values_is_refused(word: str) -> None:
    with pytest.raises(ConfigError):
        grid.combinations(dict([grid.parse_set(word)]))


def test_every_combination_is_a_job_of_its_own_name() -> None:
    job = {
        "name": "m",
        "model": {"base": "org/base"},
        "data": {"files": ["rows.json"]},
        "limits": {"max_usd": 1.0},
    }
    found = milktea.variations(job, {"lora.r": [8, 16], "training.learning_rate": [1e-4, 2e-4]})
    told = [(j.name, j.lora.r, j.training.learning_rate) for j in found]
    assert told == [("m-1", 8, 1e-4), ("m-2", 8, 2e-4), ("m-3", 16, 1e-4), ("m-4", 16, 2e-4)]
    with pytest.raises(ConfigError, match=r"lora\.rank: unknown key"):
        milktea.variations(job, {"lora.rank": [8]})
    with pytest.raises(ConfigError, match="name is no table"):
        milktea.variations(job, {"name.x": [8]})
