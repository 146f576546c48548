"""Which result a user names, and the base that it stands on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import rig
from ops import api
from ops.box.transfer import PushFile, sha256_of
from ops.errors import PreflightError
from ops.job.plan import Plan
from ops.run.journal import Journal


def at_home(folder: Path, *, pushed: bool = False, pulled: bool = True) -> tuple[Path, Plan]:
    """The runs' folder and the plan of one run whose result is at home."""
    own = rig.Rig(folder)
    held_out, model = folder / "held.json", rig.tiny_model(folder / "base")
    held_out.write_text('[{"instruction": "q", "input": "", "output": "a"}]')
    asked = PushFile(held_out, "data/9-held.json", sha256_of(held_out))
    config = PushFile(model / "config.json", "model/config.json", "0" * 64)
    plan = own.plan()
    plan = own.plan(pushes=[*plan.pushes, asked, *([config] if pushed else [])])
    named = {"path": asked.remote, "name": "held.json", "sha256": asked.sha256, "size_bytes": 50}
    plan.wire_job["data"]["held_out"] = named
    plan.wire_job["model"] = {"base": "org/base", "revision": "abc"}
    out = folder / "out" / plan.run_id
    shutil.copytree(own.image / "result", out)
    with Journal(own.runs / plan.run_id) as journal:
        journal.append("planned", **plan.to_line())
        if pulled:
            journal.append("pulled", sha256="0" * 64, adapter=str(out / "adapter.zip"))
    return own.runs, plan


def test_a_run_knows_its_adapter_its_base_and_its_held_out_rows(tmp_path: Path) -> None:
    runs, plan = at_home(tmp_path)
    found = api.find_result("last", root=runs)
    assert found.adapter == tmp_path / "out" / plan.run_id / "adapter.zip"
    assert (found.base, found.held_out) == ("org/base@abc", tmp_path / "held.json")
    assert api.find_result(plan.run_id[:8], root=runs, base="mine").base == "mine"


def test_a_base_that_was_sent_from_a_folder_is_found_there(tmp_path: Path) -> None:
    runs, _ = at_home(tmp_path, pushed=True)
    assert api.find_result("last", root=runs).base == str(tmp_path / "base")


def test_held_out_rows_that_were_edited_since_are_not_taken(tmp_path: Path) -> None:
    runs, _ = at_home(tmp_path)
    (tmp_path / "held.json").write_text("[]")
    assert api.find_result("last", root=runs).held_out is None


def test_a_folder_or_an_archive_of_a_run_is_known_as_that_run(tmp_path: Path) -> None:
    runs, plan = at_home(tmp_path)
    out = tmp_path / "out" / plan.run_id
    for path in (out, out / "adapter.zip"):
        assert api.find_result(path, root=runs).base == "org/base@abc"


def test_an_adapter_that_is_no_runs_is_believed_in_what_it_says_of_its_base(
    tmp_path: Path,
) -> None:
    runs, plan = at_home(tmp_path)
    moved = tmp_path / "moved.zip"
    shutil.copy(tmp_path / "out" / plan.run_id / "adapter.zip", moved)
    found = api.find_result(moved, root=runs)
    assert (found.base, found.held_out, found.beside) == ("stub", None, tmp_path)
    verdicts = api.check_adapter(found)
    assert [v["name"] for v in verdicts if v["loads"]] == [v["name"] for v in verdicts]


def test_what_is_no_result_is_told_in_a_sentence(tmp_path: Path) -> None:
    runs, plan = at_home(tmp_path / "a", pulled=False)
    with pytest.raises(PreflightError, match="has no result at home"):
        api.find_result(plan.run_id, root=runs)
    runs, plan = at_home(tmp_path / "b")
    (tmp_path / "b/out" / plan.run_id / "adapter.zip").unlink()
    with pytest.raises(PreflightError, match="is gone"):
        api.find_result(plan.run_id, root=runs)
    (tmp_path / "text").write_text("no zip")
    with pytest.raises(PreflightError, match="no folder and no zip"):
        api.find_result(tmp_path / "text", root=runs)
    (tmp_path / "empty").mkdir()
    bare = api.find_result(tmp_path / "empty", root=runs)
    with pytest.raises(PreflightError, match="which base"):
        bare.needs_base()
    with pytest.raises(PreflightError, match="adapter_config"):
        api.check_adapter(bare)


def test_the_base_of_a_strange_configuration_is_not_believed(tmp_path: Path) -> None:
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "adapter_config.json").write_text(
        json.dumps({"base_model_name_or_path": 7})
    )
    assert api.find_result(tmp_path / "odd", root=tmp_path).base == ""
