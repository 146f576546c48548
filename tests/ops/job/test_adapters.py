"""What a job starts from and is judged by: found by a run's name or a path, its LoRA settings
taken, and refused before renting where it does not fit."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import pytest

from ops.errors import ConfigError, PreflightError
from ops.job import config
from ops.job.adapters import taken_up
from ops.job.model_shape import family_of
from trainer.wire.chain import Chain, Link, weights_sha256
from trainer.wire.job import Lora

CONFIG = {
    "peft_type": "LORA",
    "r": 4,
    "lora_alpha": 8,
    "target_modules": ["q_proj", "v_proj"],
    "rank_pattern": {},
    "alpha_pattern": {},
}


def an_adapter(folder: Path, *stages: Any, base: str = "tea/7b", **changes: Any) -> Path:
    """A folder with settings, one tensor that its name decides, and a chain of these stages."""
    folder.mkdir(parents=True)
    named = folder.name.encode()
    row = {"a": {"dtype": "U8", "shape": [len(named)], "data_offsets": [0, len(named)]}}
    header = json.dumps(row).encode()
    weights = len(header).to_bytes(8, "little") + header + named
    (folder / "adapter_model.safetensors").write_bytes(weights)
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG | changes))
    links = [Link(stage=s, run_id="a-run", how="new", sha256=s[0] * 64) for s in stages]
    if links:
        links[-1] = links[-1].model_copy(update={"sha256": weights_sha256(folder)})
        chain = Chain(base=base, base_sha256="f" * 64, template="e" * 64, links=links)
        (folder / "chain.json").write_text(chain.model_dump_json())
    return folder


def archive(adapter: Path, to: Path) -> None:
    to.parent.mkdir(parents=True)
    with zipfile.ZipFile(to, "w") as out:
        for path in adapter.iterdir():
            out.write(path, path.name)


def a_job(tmp_path: Path, **changes: Any) -> config.JobFile:
    least = {
        "name": "tea",
        "model": {"base": "tea/7b@main"},
        "data": {"files": ["rows.json"]},
        "limits": {"max_usd": 1},
        "results": {"folder": "out"},
    }
    return config.parse(least | changes, tmp_path / "job.toml")


def test_a_run_is_found_by_its_name_and_its_settings_are_taken(tmp_path: Path) -> None:
    folder = an_adapter(tmp_path / "made", "sft")
    archive(folder, tmp_path / "out/a-run/adapter.zip")
    job, found = taken_up(a_job(tmp_path, start="a-run"), tmp_path / "stage")
    assert (job.lora.r, job.lora.lora_alpha) == (4, 8.0)
    assert job.lora.target_modules == ["q_proj", "v_proj"]
    names = {"adapter_model.safetensors", "adapter_config.json", "chain.json"}
    assert {p.remote for p in found.pushes} == {f"start/{name}" for name in names}
    assert all(p.local.read_bytes() == (folder / p.local.name).read_bytes() for p in found.pushes)
    told = {"path": "start", "name": "a-run", "sha256": weights_sha256(folder), "how": "continue"}
    assert found.told == {"start": told}


def test_a_folder_is_pushed_as_it_is(tmp_path: Path) -> None:
    an_adapter(tmp_path / "theirs")
    _, found = taken_up(a_job(tmp_path, start="theirs"), tmp_path / "stage")
    assert sorted(p.local.parent.name for p in found.pushes) == ["theirs", "theirs"]


def test_an_adapter_that_is_stacked_on_gives_its_rank(tmp_path: Path) -> None:
    an_adapter(tmp_path / "made", "sft")
    job = a_job(tmp_path, start="made", how="stack", lora={"r": 8, "lora_alpha": 32})
    stacked, _ = taken_up(job, tmp_path / "stage")
    assert (stacked.lora.r, stacked.lora.lora_alpha) == (12, 48.0)
    assert stacked.lora.target_modules == "all-linear"


def test_an_adapter_that_is_merged_travels_and_asks_nothing_of_the_fresh_one(
    tmp_path: Path,
) -> None:
    folder = an_adapter(tmp_path / "made", "sft", use_dora=True)
    job = a_job(tmp_path, start="made", how="merge", lora={"r": 32})
    merged, found = taken_up(job, tmp_path / "stage")
    assert merged.lora.r == 32
    told = {"path": "start", "name": "made", "sha256": weights_sha256(folder)}
    assert found.told == {"merged": [told]}
    assert {p.remote.split("/")[0] for p in found.pushes} == {"start"}


PREFIX = {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 7}


def prompted(method: str, **more: Any) -> dict[str, Any]:
    return {"start": "made", "training": {"method": method}, **more}


def test_a_learned_prompt_is_continued_with_its_own_number_of_places(tmp_path: Path) -> None:
    an_adapter(tmp_path / "made", **PREFIX)
    job, found = taken_up(a_job(tmp_path, **prompted("p_tuning_v2")), tmp_path / "stage")
    assert job.prompt_learning.num_virtual_tokens == 7
    assert found.told["start"]["how"] == "continue"


@pytest.mark.parametrize(
    "changes, settings, said",
    [
        ({"start": "made", "how": "merge"}, {"peft_type": "LOHA"}, "it is no LoRA"),
        ({"start": "nowhere"}, {}, "holds no adapter"),
        ({"start": "made"}, {"peft_type": "LOHA"}, "it is no LoRA"),
        ({"start": "made", "how": "stack"}, {"r": "4"}, "r = '4'"),
        ({"start": "made", "how": "stack"}, {"target_modules": None}, "target_modules = None"),
        ({"start": "made"}, {"use_dora": True}, "use_dora, which no stage"),
        ({"start": "made"}, {"lora_bias": True}, "lora_bias, which no stage"),
        ({"start": "made"}, {"trainable_token_indices": [1]}, "trainable_token_indices, which"),
        ({"start": "made", "lora": {"r": 32}}, {}, r"lora.r = 32 \(the adapter has 4\)"),
        ({"start": "made", "how": "stack"}, {"rank_pattern": {"q": 2}}, "no rank_pattern"),
        (prompted("p_tuning_v2"), {}, "it is LORA, and .* goes on from PREFIX_TUNING"),
        (
            prompted("p_tuning_v2", prompt_learning={"num_virtual_tokens": 9}),
            PREFIX,
            r"num_virtual_tokens = 9 \(the adapter has 7\)",
        ),
        (
            {"start": "made", "how": "stack", "lora": {"target_modules": ["q_proj"]}},
            {},
            "leaves out some",
        ),
    ],
)
def test_what_cannot_be_taken_up_is_refused(
    changes: dict[str, Any], settings: dict[str, Any], said: str, tmp_path: Path
) -> None:
    an_adapter(tmp_path / "made", "sft", **settings)
    with pytest.raises(PreflightError, match=said):
        taken_up(a_job(tmp_path, **changes), tmp_path / "stage")


def test_an_archive_or_weights_that_cannot_be_read_are_refused_before_renting(
    tmp_path: Path,
) -> None:
    folder = an_adapter(tmp_path / "made", "sft")
    archive(folder, tmp_path / "whole" / "adapter.zip")
    whole = (tmp_path / "whole" / "adapter.zip").read_bytes()
    torn = {"torn.zip": whole[:-40], "none.zip": b"not one", "null": b""}
    for name, text in torn.items():
        (tmp_path / name).write_bytes(text)
        with pytest.raises(PreflightError, match="it is no archive that can be read"):
            taken_up(a_job(tmp_path, start=name), tmp_path / "stage")
    weights = folder / "adapter_model.safetensors"
    sound = weights.read_bytes()
    for text in (b"garbage", sound[:-1]):
        weights.write_bytes(text)
        with pytest.raises(PreflightError, match="safetensors cannot be read"):
            taken_up(a_job(tmp_path, start="made"), tmp_path / "stage")
    weights.write_bytes(sound)
    (folder / "adapter_config.json").write_text("[]")
    with pytest.raises(PreflightError, match="it is no LoRA"):
        taken_up(a_job(tmp_path, start="made", how="merge"), tmp_path / "stage")


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"how": "stack"}, "needs start"),
        ({"start": "x", "training": {"method": "full"}}, "not trained on by"),
        ({"start": "x", "lora": {"init_lora_weights": "pissa"}}, "how lora begins"),
        (
            prompted("prefix_tuning"),
            'is in no file, only what it gives: go on with .*"p_tuning_v2"',
        ),
        (prompted("p_tuning_v2", how="stack"), "a learned prompt is continued"),
        (
            prompted("prompt_tuning", prompt_learning={"prompt_tuning_init_text": "a"}),
            "its prompt says how it begins",
        ),
        ({"stage": "ppo", "ppo": {"rewards": [{"kind": "model"}]}}, "which need one"),
    ],
)
def test_what_says_nothing_is_refused(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=said):
        a_job(tmp_path, **changes)


def test_a_reward_model_travels_and_is_named_as_it_lies_on_the_box(tmp_path: Path) -> None:
    an_adapter(tmp_path / "judge", "rm")
    section = {"rewards": [{"kind": "model", "path": "judge"}, {"kind": "match"}]}
    job, found = taken_up(a_job(tmp_path, stage="ppo", ppo=section), tmp_path / "stage")
    assert {p.remote.split("/")[0] for p in found.pushes} == {"judge"} == set(found.told)
    rules = job.section_on_box("judge", "reward.py")["ppo"]["rewards"]
    assert [r["path"] for r in rules] == ["judge", ""]


def test_a_reward_model_that_does_not_fit_the_start_is_refused_before_renting(
    tmp_path: Path,
) -> None:
    an_adapter(tmp_path / "policy", "sft")
    an_adapter(tmp_path / "judge", "rm")
    rewards = [{"kind": "model", "path": "judge"}]
    job = a_job(tmp_path, stage="grpo", start="policy", grpo={"rewards": rewards})
    with pytest.raises(PreflightError, match="must not judge here: it was trained from the base"):
        taken_up(job, tmp_path / "stage")
    foreign = {"rewards": rewards, "foreign_reward": True}
    taken_up(a_job(tmp_path, stage="grpo", start="policy", grpo=foreign), tmp_path / "other")


def test_settings_that_are_free_stay_the_jobs(tmp_path: Path) -> None:
    an_adapter(tmp_path / "made", "sft")
    job = a_job(tmp_path, start="made", lora={"lora_dropout": 0.1, "r": 4})
    assert taken_up(job, tmp_path / "stage")[0].lora == Lora(
        r=4, lora_alpha=8, lora_dropout=0.1, target_modules=["q_proj", "v_proj"]
    )


def test_a_reward_function_travels_with_its_hash(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def reward(prompt, answer, expected):\n    return 1.0\n")
    section = {"rewards": [{"kind": "python", "path": "mine.py"}]}
    job, found = taken_up(a_job(tmp_path, stage="grpo", grpo=section), tmp_path / "stage")
    [pushed] = found.pushes
    assert (pushed.local, pushed.remote) == (tmp_path / "mine.py", "reward.py")
    assert found.told["reward_function"]["sha256"] == pushed.sha256
    assert job.section_on_box("judge", "reward.py")["grpo"]["rewards"][0]["path"] == "reward.py"


@pytest.mark.parametrize(
    "text, said",
    [
        (None, "No such file"),
        ("def reward(prompt:\n", "mine.py, line 1"),
        ("def score(prompt): return 1\n", "defines score, and not reward"),
        ("x = 1\n", "defines no function"),
    ],
)
def test_a_file_without_a_reward_function_is_refused(
    text: str | None, said: str, tmp_path: Path
) -> None:
    if text is not None:
        (tmp_path / "mine.py").write_text(text)
    section = {"rewards": [{"kind": "python", "path": "mine.py"}]}
    with pytest.raises(PreflightError, match=said):
        taken_up(a_job(tmp_path, stage="grpo", grpo=section), tmp_path / "stage")


def test_adapters_of_experts_do_not_stand_beside_others(tmp_path: Path) -> None:
    config_of = {
        "model_type": "mixtral",
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 2,
    }
    with pytest.raises(PreflightError, match="adapters beside each other"):
        family_of(a_job(tmp_path, stage="ppo"), config_of, 8, [])
    attention = {"target_modules": ["q_proj", "v_proj"]}
    assert family_of(a_job(tmp_path, stage="ppo", lora=attention), config_of, 8, [])
    assert family_of(a_job(tmp_path, stage="grpo"), config_of, 8, []), "it has no adapter beside"
