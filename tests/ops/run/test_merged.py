"""A result that its box merges before it goes, against the emulator; only the merge is a stub."""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
import re
import signal
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import milktea
import rig
from ops.box.transfer import sha256_of
from ops.errors import ConfigError, OverBudget
from ops.fakevast import FakeVast
from ops.job import config
from ops.job.plan import Plan
from ops.market.client import Vast
from ops.market.provider import Provider
from ops.market.workload import Workload
from ops.run import errands
from ops.run.expected import Invalid
from ops.run.journal import Journal
from ops.run.merge import left_over
from ops.run.merged_result import listed, verify
from ops.run.reap import finish_destroys
from ops.run.session import Interrupted
from ops.run.view import Run
from ops.wait import RealClock

ONE = struct.pack("<H", 0x3F80)  # 1 in bf16
NUMBERS = {"kl_nats": 1e-7, "share_of_effect": 1e-4, "max_token_nats": 0.01}


def weights(**tensors: tuple[str, bytes]) -> bytes:
    """A safetensors file of vectors by name: (dtype, bytes)."""
    rows, at = {}, 0
    for name, (dtype, data) in tensors.items():
        item = 4 if dtype == "F32" else 2
        rows[name] = {
            "dtype": dtype,
            "shape": [len(data) // item],
            "data_offsets": [at, at + len(data)],
        }
        at += len(data)
    header = json.dumps(rows).encode()
    return len(header).to_bytes(8, "little") + header + b"".join(d for _, d in tensors.values())


def merged_model(own: rig.Rig, **more: bytes) -> Path:
    """What a trainer leaves of the stub's adapter, with `more` files."""
    folder = own.image / "merged"
    folder.mkdir(exist_ok=True)
    files = {
        "config.json": json.dumps({"model_type": "llama", "dtype": "bfloat16"}).encode(),
        "model.safetensors": weights(a=("BF16", ONE * 9), b=("BF16", ONE * 4)),
        **more,
    }
    for name, data in files.items():
        (folder / name).write_bytes(data)
    with zipfile.ZipFile(own.image / "result/adapter.zip") as archive:
        adapter = hashlib.sha256(archive.read("adapter_model.safetensors")).hexdigest()
    told = {
        "adapter_sha256": adapter,
        "files_sha256": {name: hashlib.sha256(data).hexdigest() for name, data in files.items()},
        "files_bytes": {name: len(data) for name, data in files.items()},
        "numbers": NUMBERS,
    }
    (folder / "certificate.json").write_text(json.dumps(told))
    return folder


def asking(own: rig.Rig, **more: Any) -> Plan:
    load = Workload(1e5, 1e6, cpu_practice=True, disk_gib=16, image_bytes=4e8, merged_bytes=2e6)
    return own.plan(merged=True, workload=load, **more)


def no_number(own: rig.Rig) -> None:
    merged_model(own, **{"model.safetensors": weights(a=("BF16", struct.pack("<H", 0x7FC0)))})


LIES: dict[str, tuple[Callable[[rig.Rig], object], str]] = {
    "a merge that is refused": (lambda own: None, "exit code 3: refused: the merge loses"),
    "a NaN": (no_number, "a is not finite"),
}


@pytest.mark.slow
@pytest.mark.parametrize("lie", LIES)
def test_what_is_no_merged_model_does_not_come_home_and_takes_nothing_of_the_result(
    own: rig.Rig, fake: FakeVast, lie: str
) -> None:
    act, why = LIES[lie]
    act(own)
    outcome, lines, _ = rig.whole_run(own, fake, plan=asking(own))
    assert outcome.adapter_zip.is_file(), outcome
    [line] = [line for line in lines if line.kind == "merged"]
    assert re.search(why, line["why_not"].replace("\n", " ")), line["why_not"]
    assert [p.name for p in outcome.adapter_zip.parent.glob("*merged*")] == []
    assert fake.instances() == []


def test_a_merge_for_which_the_limits_do_not_reach_is_not_begun(
    own: rig.Rig, fake: FakeVast
) -> None:
    merged_model(own)
    plan = asking(own, max_s=700.0)  # merging may take 600 s, and the box goes before its end
    outcome, lines, screen = rig.whole_run(own, fake, plan=plan)
    assert outcome.adapter_zip.is_file(), outcome
    [line] = [line for line in lines if line.kind == "merged"]
    assert "it takes up to 10 minutes, and the limits leave" in line["why_not"]
    assert any("the adapter is at home" in told for told in screen.told)
    assert Run(own.runs / plan.run_id).merged[0] is None


LIMIT = OverBudget("limits.max_usd = 1.0 or limits.max_hours is reached")  # as the keeper has it
LARGE = {"model.safetensors": weights(a=("BF16", ONE * 600_000))}


class Acting(rig.Silent):
    """Calls `act` once the box merges (`moved` 0), or once so many bytes of the model are home."""

    def __init__(self, act: Callable[[], object], moved: int = 0, choice: str = "go on") -> None:
        super().__init__(choice)
        self.act: Callable[[], object] | None = act
        self.least, self.came = moved, []

    def once(self) -> None:
        if (act := self.act) is not None:
            self.act = None
            act()

    def waiting(self, message: str) -> None:
        super().waiting(message)
        if not self.least and message.startswith("merge: "):
            self.once()

    def moving(self, what: str, done_bytes: int, total_bytes: int) -> None:
        if what == "merged" and total_bytes > 1e6:  # of the weights
            self.came.append(done_bytes)
            if done_bytes >= self.least > 0:
                self.once()


def test_the_merged_model_comes_home_beside_the_adapter_over_a_link_that_is_cut_in_its_middle(
    own: rig.Rig, fake: FakeVast
) -> None:
    made, plan = merged_model(own, **LARGE), asking(own)

    def cut() -> None:
        boxes = fake.emulator.boxes.live.values()
        fake.do(lambda: [box.break_link("cut") for box in boxes])

    screen = Acting(cut, 300_000)
    outcome, lines, _ = rig.whole_run(own, fake, plan=plan, screen=screen)
    home = outcome.adapter_zip.parent / "merged-bf16"
    names = ["certificate.json", "config.json", "model.safetensors"]
    assert sorted(p.name for p in home.iterdir()) == names
    assert all(sha256_of(home / name) == sha256_of(made / name) for name in names)
    assert [line.kind for line in lines][-5:-2] == ["pulled", "merged", "destroying"]
    assert Run(own.runs / plan.run_id).merged == (home, "")
    assert lines[-4]["tensors"] == 1 and lines[-4]["bytes_out"] > 1_200_000
    assert screen.act is None and screen.came == sorted(screen.came), "it began again"


@pytest.mark.parametrize("moved", [pytest.param(0, marks=pytest.mark.slow), 300_000])
def test_ctrl_c_in_a_merge_asks_first_and_who_goes_on_pays_for_nothing_twice(
    own: rig.Rig, fake: FakeVast, moved: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(errands, "TELL_S", 0.0)
    merged_model(own, **LARGE)
    if not moved:
        (own.image / "slow").touch()

    def pressed() -> None:
        (own.image / "slow").unlink(missing_ok=True)
        raise Interrupted

    screen = Acting(pressed, moved)
    outcome, lines, _ = rig.whole_run(own, fake, plan=asking(own), screen=screen)
    kinds = [line.kind for line in lines]
    assert kinds[kinds.index("pulled") :] == [
        *("pulled", "interrupted", "merged", "destroying", "destroyed", "bill")
    ]
    assert [told for told in screen.told if isinstance(told, list)] == [["go on", "destroy"]]
    assert outcome.sha256 and lines[kinds.index("merged")].get("why_not") is None
    assert screen.came == sorted(screen.came), "it began again"


@pytest.mark.slow
@pytest.mark.parametrize(("end", "why"), [(Interrupted(), "you ended it"), (LIMIT, str(LIMIT))])
def test_who_or_what_ends_a_merge_takes_nothing_of_the_adapter(
    own: rig.Rig, fake: FakeVast, end: BaseException, why: str
) -> None:
    merged_model(own, **LARGE)

    def act() -> None:
        raise end

    screen = Acting(act, 300_000, choice="destroy")
    outcome, lines, _ = rig.whole_run(own, fake, plan=asking(own), screen=screen)
    assert outcome.adapter_zip.is_file(), outcome
    [line] = [line for line in lines if line.kind == "merged"]
    assert line["why_not"] == why and line["bytes_out"] > 300_000
    assert [p.name for p in outcome.adapter_zip.parent.iterdir() if "merged" in p.name] == []


@pytest.mark.slow
@pytest.mark.parametrize("box", ["stands", "is gone"])
def test_a_merge_whose_owner_was_killed_is_gone_on_with_where_its_box_stands(
    own: rig.Rig, fake: FakeVast, box: str
) -> None:
    merged_model(own, **LARGE)
    plan = asking(own, when_silent="finish")
    child = os.fork()
    if child == 0:
        screen = Acting(lambda: os.kill(os.getpid(), signal.SIGKILL), 300_000)
        rig.whole_run(own, fake, plan=plan, screen=screen)
        os._exit(1)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    vast = Vast(Provider(fake.url, fake.api_key), RealClock(rig.PACE))
    if box == "is gone":
        [instance] = fake.instances()
        vast.destroy(instance["id"])
    run = milktea.resume(Run(own.runs / plan.run_id), vast=vast, root=own.runs, foreground=True)
    assert run.adapter is not None
    assert sum(r["route"] == "create" for r in fake.requests) == 1, "another was rented"
    folder, why_not = run.merged
    if box == "stands":
        assert folder and sha256_of(folder / "model.safetensors")
        assert [line.kind for line in run.journal].count("pulled") == 1
    else:
        assert folder is None and why_not == "its box is gone"
        assert [p.name for p in run.adapter.parent.iterdir() if "merged" in p.name] == []


def test_what_killed_merges_left_is_removed_and_told_once_when_nobody_can_go_on_with_it(
    own: rig.Rig, fake: FakeVast
) -> None:
    plan, out = asking(own), own.runs.parent / "out"
    for name in (".merged-bf16.part", ".merged-fp16.part", "merged-fp32"):
        (out / name).mkdir(parents=True)
        (out / name / "model.safetensors").write_bytes(b"0" * 9)
        os.utime(out / name, (0, 0))
    with Journal(own.runs / plan.run_id) as made:
        made.append("planned", began=0.0, **plan.to_line())
        for kind in ("renting", "rented", "pulled", "destroyed"):
            made.append(kind, adapter=str(out / "adapter.zip"))
        assert left_over(made.lines[:-1], 1e9) == [], "a box may go on with it"
    vast = Vast(Provider(fake.url, fake.api_key), RealClock(rig.PACE))
    told = [f"{plan.run_id}: removed 0.00 GB of a merge that was killed"]
    maker = os.open(out / ".merged-fp16.part", os.O_RDONLY)
    try:
        fcntl.flock(maker, fcntl.LOCK_EX)  # as `milktea merge` does while it lives
        assert finish_destroys(own.runs, vast, rig.Silent()).removed == told
        assert finish_destroys(own.runs, vast, rig.Silent()).removed == []
    finally:
        os.close(maker)
    assert finish_destroys(own.runs, vast, rig.Silent()).removed == told
    assert [p.name for p in out.iterdir()] == ["merged-fp32"]
    [line] = [line for line in Run(own.runs / plan.run_id).journal if line.kind == "merged"]
    assert line["why_not"] == "its process was killed, and nobody went on with it"


@pytest.mark.parametrize(
    ("files", "why"),
    [
        ({"model.safetensors": weights(a=("F32", b"\0\0\x80\x3f"))}, "is float32"),
        ({"model.safetensors": weights(a=("BF16", b"\0" * 8))}, "every weight is zero"),
        ({"model.safetensors.index.json": b'{"weight_map": {"a": "x.safetensors"}}'}, "where its"),
        ({"config.json": b'{"model_type": "x", "auto_map": {"A": "evil/x--m.C"}}'}, "another pl"),
        ({"config.json": b'{"model_type": "x", "quantization_config": {}}'}, "quantised"),
        ({"tokenizer.json": b"[]"}, "is no object"),
    ],
)
def test_every_byte_of_a_merged_model_is_looked_at(
    tmp_path: Path, files: dict[str, bytes], why: str
) -> None:
    good = {"config.json": b'{"model_type": "x"}', "model.safetensors": weights(a=("BF16", ONE))}
    for name, data in (good | files).items():
        (tmp_path / name).write_bytes(data)
    with pytest.raises(Invalid, match=why):
        verify(tmp_path)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"../config.json": ["a" * 64, 3]}, "which no merged model has"),
        ({"x.py": [HASH := "a" * 64, 3]}, "which no merged model has"),
        ({"tokenizer.json": [HASH, 3]}, "not the one in adapter.zip"),
        ({"config.json": ["A" * 64, 3]}, "without a sha256"),
        ({"config.json": [HASH, True]}, "is listed with True"),
        ({"config.json": [HASH, 65 << 20]}, "has 68,157,440 bytes"),
        ({"b.safetensors": [HASH, 3]}, "2 files and no index"),
    ],
)
def test_a_certificate_lists_what_a_merged_model_has_and_no_more(
    change: dict[str, list[Any]], why: str
) -> None:
    files = {"config.json": ["a" * 64, 3], "a.safetensors": ["a" * 64, 1 << 40]} | change
    told = {
        "adapter_sha256": "b" * 64,
        "files_sha256": {name: sha256 for name, (sha256, _) in files.items()},
        "files_bytes": {name: size for name, (_, size) in files.items()},
        "numbers": NUMBERS,
    }
    members = {"adapter_model.safetensors": {"sha256": "b" * 64}}
    members |= {"tokenizer.json": {"sha256": "c" * 64}}
    with pytest.raises(Invalid, match=why):
        listed(told, members)


def test_a_certificate_is_of_the_adapter_that_is_at_home_and_has_numbers() -> None:
    told = {
        "adapter_sha256": "b" * 64,
        "files_sha256": dict.fromkeys(("config.json", "a.safetensors"), "a" * 64),
        "files_bytes": dict.fromkeys(("config.json", "a.safetensors"), 3),
        "numbers": NUMBERS,
    }
    members = {"adapter_model.safetensors": {"sha256": "b" * 64}}
    assert listed(told, members)["files"]["a.safetensors"] == ["a" * 64, 3]
    with pytest.raises(Invalid, match="another adapter"):
        listed(told | {"adapter_sha256": "d" * 64}, members)
    with pytest.raises(Invalid, match="no numbers"):
        listed(told | {"numbers": dict.fromkeys(NUMBERS, math.nan)}, members)


def test_a_job_asks_for_a_merge_of_what_can_be_merged_alone(tmp_path: Path) -> None:
    job: dict[str, Any] = {
        "name": "x",
        "model": {"base": "org/base"},
        "data": {"files": ["rows.json"]},
        "limits": {"max_usd": 1.0},
        "results": {"merged": True},
    }
    assert config.parse(job, tmp_path / "job.toml").results.merged
    stages = [{"stage": "rm"}, {"stage": "sft"}]
    chain = config.parse(job | {"stages": stages}, tmp_path / "job.toml")
    assert [part.results.merged for part in chain.parts] == [False, True]
    for training, why in (({"method": "full"}, "whole model"), ({"method": "p_tuning"}, "learned")):
        with pytest.raises(ConfigError, match=why):
            config.parse(job | {"training": training}, tmp_path / "job.toml")
    with pytest.raises(ConfigError, match="reward model"):
        config.parse(job | {"stage": "rm"}, tmp_path / "job.toml")
