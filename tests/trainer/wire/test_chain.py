"""The chain of an adapter, and whether a reward model fits a policy's."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import pytest

from trainer.wire.chain import CHAIN, Chain, Link, chain_of, reward_defect, weights_sha256

A, B, C = ("a" * 64, "b" * 64, "c" * 64)


def link(stage: Any, sha256: str, **numbers: float) -> Link:
    how: Any = "new" if stage == "sft" else "continue"
    return Link(stage=stage, run_id="a-run", how=how, sha256=sha256, numbers=numbers)


def chain(*links: Link, **changes: str) -> Chain:
    told = {"base": "tea/7b", "base_sha256": "f" * 64, "template": "e" * 64} | changes
    return Chain(**told, links=list(links))  # type: ignore[arg-type]


POLICY = chain(link("sft", A))
JUDGE = chain(link("sft", A), link("rm", B, accuracy=0.9))


def test_a_reward_model_trained_from_the_policys_start_fits() -> None:
    assert reward_defect(JUDGE, B, POLICY, "tea/7b", foreign=False) == ""
    from_the_base = chain(link("rm", B))
    assert reward_defect(from_the_base, B, None, "tea/7b", foreign=False) == ""


@pytest.mark.parametrize(
    "judge, start, said",
    [
        (None, POLICY, "no chain.json"),
        (chain(), POLICY, "no chain.json"),
        (POLICY, POLICY, "its last stage is sft"),
        (chain(link("sft", A), link("rm", C)), POLICY, "not those that its chain.json names"),
        (chain(link("sft", A), link("rm", B), base="tea/8b"), POLICY, "stands on tea/8b"),
        (chain(*JUDGE.links, base_sha256="0" * 64), POLICY, "other weights of the same base"),
        (JUDGE, None, "after sft aaaaaaaaaaaa, the policy starts from the base"),
        (JUDGE, chain(link("sft", C)), "the policy starts after sft cccccccccccc"),
        (chain(link("rm", B)), POLICY, "trained from the base, the policy starts after sft"),
        (chain(link("sft", A), link("rm", B, accuracy=0.54)), POLICY, "less than 55 %"),
    ],
)
def test_what_does_not_fit_is_told(judge: Chain | None, start: Chain | None, said: str) -> None:
    assert said in reward_defect(judge, B, start, "tea/7b", foreign=False)


def test_foreign_takes_another_chain_and_a_guessing_model_but_no_other_base() -> None:
    weak = chain(link("rm", B, accuracy=0.5))
    assert reward_defect(weak, B, POLICY, "tea/7b", foreign=True) == ""
    other = chain(link("rm", B), base="tea/8b")
    assert reward_defect(other, B, POLICY, "tea/7b", foreign=True)


def test_a_policy_on_a_merged_base_is_judged_by_a_model_on_the_same() -> None:
    on_the_base = chain(link("sft", A), link("rm", B))
    merged = chain(link("sft", A), link("rm", B).model_copy(update={"how": "merge"}))
    merged = merged.model_copy(update={"base_sha256": "0" * 64})
    said = reward_defect(on_the_base, B, POLICY, "tea/7b", foreign=True, merged=True)
    assert "the policy on a base with an adapter merged into it" in said
    assert reward_defect(merged, B, POLICY, "tea/7b", foreign=False, merged=True) == ""
    other = reward_defect(merged, B, chain(link("sft", C)), "tea/7b", foreign=False, merged=True)
    assert "the policy starts after sft" in other
    assert "other weights" in reward_defect(merged, B, POLICY, "tea/7b", foreign=False)


def test_a_chain_is_read_from_a_folder_and_from_an_archive(tmp_path: Path) -> None:
    folder, archive = tmp_path / "adapter", tmp_path / "adapter.zip"
    folder.mkdir()
    (folder / "adapter_model.safetensors").write_bytes(b"weights")
    assert chain_of(folder) is None, "another trainer's adapter says nothing"
    (folder / CHAIN).write_text(JUDGE.model_dump_json())
    with zipfile.ZipFile(archive, "w") as out:
        for path in folder.iterdir():
            out.write(path, path.name)
    assert chain_of(folder) == chain_of(archive) == JUDGE
    assert weights_sha256(folder) == weights_sha256(archive)
    (folder / CHAIN).write_text(json.dumps({"links": 3}))
    with pytest.raises(ValueError, match="base"):
        chain_of(folder)
