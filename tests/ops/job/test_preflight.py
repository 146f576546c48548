"""What can fail for free fails before a cent is spent, with everything that is wrong in one
message."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import rig
from ops.errors import ConfigError, MilkteaError, PreflightError
from ops.fakevast import FakeVast
from ops.job import config, tokens
from ops.job.model_shape import model_config
from ops.job.plan import Plan
from ops.job.planner import new_plan
from ops.job.preflight import preflight
from ops.market.client import Vast
from ops.market.provider import Provider
from ops.wait import RealClock
from trainer.data.files import read_rows

ROWS = [{"instruction": f"say {n}", "input": "", "output": f"it is {n}"} for n in range(20)]


@pytest.fixture
def fake(tmp_path: Path) -> Iterator[FakeVast]:
    with FakeVast(tmp_path / "fakevast") as cloud:
        yield cloud


@pytest.fixture
def job(tmp_path: Path) -> dict[str, Any]:
    rig.tiny_model(tmp_path / "model")
    (tmp_path / "rows.json").write_text(json.dumps(ROWS))
    return {
        "name": "tiny",
        "model": {"base": "model", "precision": "fp32"},
        "data": {"files": ["rows.json"], "max_length": 512},
        "limits": {"max_usd": 1},
        "image": {"ref": "milktea/practice:3", "trainer": "image"},
    }


def planned(tmp_path: Path, fake: FakeVast, raw: dict[str, Any], key: str | None = None) -> Plan:
    vast = Vast(Provider(fake.url, key or fake.api_key), RealClock(rig.PACE))
    runs = tmp_path / "runs"
    return preflight(
        lambda: new_plan(config.parse(raw, tmp_path / "job.toml"), runs, time.time()), vast, runs
    )


def refused(
    tmp_path: Path, fake: FakeVast, raw: dict[str, Any], key: str | None = None
) -> MilkteaError:
    with pytest.raises((PreflightError, ConfigError)) as caught:
        planned(tmp_path, fake, raw, key)
    runs = tmp_path / "runs"
    assert not runs.exists() or not list(runs.iterdir()), "a run that never began left something"
    assert fake.instances() == []
    return caught.value


def test_a_good_job_becomes_a_plan_with_its_tokens_counted_and_its_files_named(
    tmp_path: Path, fake: FakeVast, job: dict[str, Any]
) -> None:
    plan = planned(tmp_path, fake, job)
    assert {p.remote for p in plan.pushes} == {
        "data/0.json",
        "model/config.json",
        "model/tokenizer.json",
        "model/tokenizer_config.json",
        "model/model.safetensors",
    }
    assert plan.workload.tokens > 20 * 100
    assert plan.wire_job["run_id"] == plan.run_id
    assert [f.name for f in (tmp_path / "runs" / plan.run_id).iterdir()] == []


def test_rows_are_held_out_by_themselves_and_the_plan_counts_them(
    tmp_path: Path, fake: FakeVast, job: dict[str, Any]
) -> None:
    many = [{"instruction": f"say {n}", "input": "", "output": f"it is {n}"} for n in range(400)]
    (tmp_path / "rows.json").write_text(json.dumps(many))
    plan = planned(tmp_path, fake, job)
    told = next(n for n in plan.notes if "are held out" in n)
    held = int(told.split()[0])
    assert told.startswith(f"{held} of 400 rows are held out, never trained on") and held > 1
    assert any(n.startswith(f"{400 - held} rows, ") for n in plan.notes)
    assert any(n.startswith("the held-out rows are measured every") for n in plan.notes)
    assert plan.wire_job["data"]["held_out_share"] == 0.02
    off = planned(tmp_path, fake, job | {"data": job["data"] | {"held_out": "none"}})
    assert not any("held out" in n or "held-out" in n for n in off.notes)
    assert any(n.startswith("400 rows, ") for n in off.notes)
    best = {"training": {"early_stopping_patience": 2}}
    none = job | {"data": job["data"] | {"held_out": "none"}} | best
    assert "nothing to look at" in str(refused_settings(tmp_path, none))


def refused_settings(tmp_path: Path, raw: dict[str, Any]) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        config.parse(raw, tmp_path / "job.toml")
    return caught.value


def test_a_dataset_info_alone_brings_the_files_that_it_names(
    tmp_path: Path, fake: FakeVast, job: dict[str, Any]
) -> None:
    """The box reads the same rows as the laptop, by the columns that the file gives."""
    (tmp_path / "mine.json").write_text(
        json.dumps([{"q": r["instruction"], "a": r["output"]} for r in ROWS])
    )
    info = {
        "mine": {"file_name": "mine.json", "columns": {"prompt": "q", "response": "a"}},
        "hub": {"hf_hub_url": "someone/something"},
    }
    (tmp_path / "dataset_info.json").write_text(json.dumps(info))
    plan = planned(
        tmp_path, fake, job | {"data": {"files": ["dataset_info.json"], "max_length": 512}}
    )
    sent = {p.local.name: p.remote for p in plan.pushes if p.remote.startswith("data/")}
    assert sent == {"dataset_info.json": "data/0.json", "mine.json": "data/1.json"}
    assert any(note.startswith("20 rows") for note in plan.notes)
    box = tmp_path / "box/data"
    box.mkdir(parents=True)
    for p in plan.pushes:
        if p.remote.startswith("data/"):
            (box.parent / p.remote).write_bytes(p.local.read_bytes())
    rows, defects = read_rows(
        [(box.parent / f["path"], f["name"]) for f in plan.wire_job["data"]["files"]]
    )
    assert defects == [] and len(rows) == 20


def test_a_model_that_this_computer_could_not_train_in_time_is_refused_without_a_key(
    tmp_path: Path, job: dict[str, Any]
) -> None:
    config_path = tmp_path / "model/config.json"
    larger = {"hidden_size": 4096, "num_hidden_layers": 60, "intermediate_size": 14336}
    config_path.write_text(json.dumps(json.loads(config_path.read_text()) | larger))
    parsed = config.parse(job | {"limits": {"max_usd": 1, "max_hours": 0.1}}, tmp_path / "job.toml")
    with pytest.raises(
        PreflightError, match=r"runs on this computer's CPU, where 1\d\.\d billion"
    ) as caught:
        new_plan(parsed, tmp_path / "runs", time.time(), on_cpu=True)
    assert "VAST_API_KEY" in caught.value.hint
    assert new_plan(parsed, tmp_path / "runs", time.time()).workload.model_parameters > 1e10


def test_a_pushed_trainer_travels_whole_with_what_starts_it(
    tmp_path: Path, fake: FakeVast, job: dict[str, Any]
) -> None:
    plan = planned(tmp_path, fake, job | {"image": {"ref": "pytorch/pytorch:x"}})
    remotes = {p.remote for p in plan.pushes}
    assert {
        "trainer-start.sh",
        "trainer-requirements.txt",
        "trainer/train.py",
        "trainer/launch.py",
    } <= remotes
    assert {"trainer/loop/step.py", "trainer/stages/sft.py", "trainer/wire/stages.py"} <= remotes
    assert sum(r.startswith("trainer/") for r in remotes) > 20


def test_packages_of_the_job_travel_where_each_is_pinned_and_none_is_the_trainer_s(
    tmp_path: Path, fake: FakeVast, job: dict[str, Any]
) -> None:
    file = tmp_path / "packages.txt"
    job = job | {"image": {"ref": "pytorch/pytorch:x", "packages": "packages.txt"}}
    digest = f"--hash=sha256:{'0' * 64}"
    for line, why in {
        "math-verify": "no pinned package",
        "math-verify>=1.14": "no pinned package",
        "math-verify==1.*": "no pinned package",
        "math-verify @ https://evil.example/sympy.whl": "no pinned package",
        "--index-url https://evil.example": "no pinned package",
        "-r other.txt": "no pinned package",
        "Transformers==4.0.0": "transformers",
        "torch==2.0.0": "torch",
        "nvidia_cublas==1.0": "nvidia-cublas",
        f"math-verify==1.14.0 {digest}\nopencc==1.1.9": "have hashes",
    }.items():
        file.write_text(line)
        assert why in str(refused(tmp_path, fake, job)), line
    file.unlink()
    assert "cannot be read" in str(refused(tmp_path, fake, job))
    with pytest.raises(ConfigError, match='packages need trainer = "push"'):
        config.parse(job | {"image": job["image"] | {"trainer": "image"}}, tmp_path / "job.toml")
    file.write_text(f"math-verify==0.8.0 \\\n  {digest}\nopencc==1.1.9 {digest}  # zh\n")
    plan = planned(tmp_path, fake, job)
    assert [p.local for p in plan.pushes if p.remote == "packages/requirements.txt"] == [file]
    assert any("packages.txt (" in note for note in plan.notes)


def test_a_key_that_vast_does_not_know_is_said_before_anything(
    tmp_path: Path, fake: FakeVast, job: dict[str, Any]
) -> None:
    error = refused(tmp_path, fake, job, key="wrong")
    assert "does not accept the key" in str(error) and "VAST_API_KEY" in error.hint


def test_no_credit_is_said_before_renting(
    tmp_path: Path, fake: FakeVast, job: dict[str, Any]
) -> None:
    fake.cloud.settings.credit_usd = 0.0
    assert "credit" in str(refused(tmp_path, fake, job))


def test_every_bad_row_is_listed_with_its_line_and_reason(
    tmp_path: Path, fake: FakeVast, job: dict[str, Any]
) -> None:
    rows = [json.dumps(r) for r in ROWS]
    rows[3] = '{"instruction": "no output"}'
    rows[7] = '{"instruction": 5, "output": "x"}'
    rows[11] = '{"instruction": "empty", "output": ""}'
    (tmp_path / "rows.json").write_text("[\n" + ",\n".join(rows) + "\n]")
    said = str(refused(tmp_path, fake, job))
    for line in (5, 9, 13):
        assert f"rows.json:{line}" in said, said


def test_rows_that_would_be_cut_are_refused_and_named(
    tmp_path: Path, fake: FakeVast, job: dict[str, Any]
) -> None:
    (tmp_path / "rows.json").write_text(
        "[\n"
        + ",\n".join(json.dumps(r) for r in [*ROWS, ROWS[0] | {"output": "long " * 300}])
        + "\n]"
    )
    error = refused(tmp_path, fake, job)
    assert "rows.json:22" in str(error)
    assert "over_length" in str(error) + error.hint


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"data": {"files": ["none.json"]}}, "none.json: no such file"),
        ({"data": {"files": ["rows.json"], "template": "alpacca"}}, "'alpacca' is none of"),
        ({"data": {"files": ["rows.json"], "template": "my.txt"}}, "my.txt"),
        ({"data": {"files": ["rows.json"], "template": "rows.gbk.txt"}}, "not UTF-8"),
        ({"model": {"base": "empty"}}, "safetensors"),
    ],
)
def test_what_is_missing_is_named(
    tmp_path: Path, fake: FakeVast, job: dict[str, Any], change: dict[str, Any], words: str
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "rows.gbk.txt").write_bytes("问：{instruction}".encode("gbk"))
    assert words in str(refused(tmp_path, fake, job | change))


def seven_billion(tmp_path: Path, job: dict[str, Any]) -> None:
    """The job's model gets Llama-7B's shape, in bf16."""
    config_path = tmp_path / "model/config.json"
    big = json.loads(config_path.read_text()) | {
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "intermediate_size": 11008,
        "vocab_size": 32000,
    }
    config_path.write_text(json.dumps(big))
    job["model"]["precision"] = "bf16"


def test_rows_beyond_the_positions_that_a_model_knows_are_told(
    tmp_path: Path, fake: FakeVast, job: dict[str, Any]
) -> None:
    path = tmp_path / "model/config.json"
    known = json.loads(path.read_text())
    path.write_text(json.dumps(known | {"max_position_embeddings": 64}))
    (told,) = [n for n in planned(tmp_path, fake, job).notes if "knows 64 positions" in n]
    assert "it learns what it cannot do" in told
    path.write_text(json.dumps(known))
    assert not any(" positions" in n for n in planned(tmp_path, fake, job).notes)


@pytest.mark.parametrize("text", ["[" * 100_000, "[1]", "{"])
def test_a_config_that_is_none_is_told_before_renting(
    tmp_path: Path, job: dict[str, Any], text: str
) -> None:
    (tmp_path / "model/config.json").write_text(text)
    told = config.parse(job | {"model": {"base": "model"}}, tmp_path / "job.toml")
    with pytest.raises(PreflightError, match="cannot be predicted"):
        model_config(told, [])


def test_a_model_that_does_not_fit_the_named_card_is_told_the_nearest_that_does(
    tmp_path: Path, fake: FakeVast, job: dict[str, Any]
) -> None:
    seven_billion(tmp_path, job)
    error = refused(tmp_path, fake, job | {"offer": {"gpu_name": ["RTX 3060"]}})
    assert "RTX 3060 12 GiB" in str(error) and "the nearest that fits is" in str(error)
    assert "nf4" in error.hint


def test_an_image_of_another_wire_is_refused_before_renting(
    tmp_path: Path, fake: FakeVast, job: dict[str, Any]
) -> None:
    for ref in (
        "milktea/practice:2",
        "ghcr.io/someone/train-cu130:1",
        "milktea/practice:2@sha256:0",
    ):
        job["image"]["ref"] = ref
        error = refused(tmp_path, fake, job)
        assert "speaks wire 1, this milktea speaks 2" in str(error) and ":3 where" in error.hint


def test_full_training_on_several_gpus_is_refused_where_the_images_torch_cannot(
    tmp_path: Path, fake: FakeVast, job: dict[str, Any]
) -> None:
    several = {"offer": {"num_gpus": 2}, "training": {"method": "full", "batch_size": 4}}
    job["image"]["ref"] = "milktea/train-cu126:3"
    error = refused(tmp_path, fake, job | several)
    assert "has torch 2.7.1, which cannot train a whole model over 2 GPUs" in str(error)
    assert "train-cu130" in error.hint
    job["image"]["ref"] = "milktea/train-cu130:3"
    assert planned(tmp_path, fake, job | several).needs.num_gpus == 2
    job["image"]["ref"] = "milktea/train-cu126:3"
    assert planned(tmp_path, fake, job | {"offer": {"num_gpus": 2}}).needs.num_gpus == 2


def test_an_image_that_is_none_of_ours_may_have_any_tag(
    tmp_path: Path, fake: FakeVast, job: dict[str, Any]
) -> None:
    for ref in ("someone/else:1", "milktea/practice", "localhost:5000/milktea/practice:3"):
        job["image"]["ref"] = ref
        assert planned(tmp_path, fake, job).image == ref


def test_rows_that_are_dropped_are_counted_in_the_plan(
    tmp_path: Path, fake: FakeVast, job: dict[str, Any]
) -> None:
    long = [{"instruction": "long", "input": "", "output": "word " * 300} for _ in range(3)]
    (tmp_path / "rows.json").write_text(json.dumps([*ROWS, *long]))
    job["data"] |= {"max_length": 256, "over_length": "drop"}
    notes = "\n".join(planned(tmp_path, fake, job).notes)
    assert "3 rows are changed or left out: rows.json:" in notes and "and 2 more" in notes
    assert "20 rows," in notes


# -- what leaves this machine ----------------------------------------------------------------------

SECRET = json.dumps([{"private_key": "-----BEGIN", "client_email": "me@example.org"}])


@pytest.mark.parametrize("how", ["a path with ..", "an absolute path", "a link", "a linked folder"])
def test_a_stranger_s_data_set_cannot_send_a_file_from_outside_its_folder(
    tmp_path: Path, fake: FakeVast, job: dict[str, Any], how: str
) -> None:
    """dataset_info.json renames columns, so that any JSON of yours would pass for rows."""
    home, folder = tmp_path / "home", tmp_path / "stranger"
    home.mkdir()
    folder.mkdir()
    (home / "cred.json").write_text(SECRET)
    (folder / "link.json").symlink_to(home / "cred.json")
    (folder / "linked").symlink_to(home)
    name = {
        "a path with ..": "../home/cred.json",
        "an absolute path": str(home / "cred.json"),
        "a link": "link.json",
        "a linked folder": "linked/cred.json",
    }[how]
    columns = {"prompt": "client_email", "response": "private_key"}
    info = {"mine": {"file_name": name, "columns": columns}}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    job["data"]["files"] = ["stranger/dataset_info.json"]
    error = refused(tmp_path, fake, job)
    assert "lies outside the folder of dataset_info.json" in str(error) and name in str(error)


def test_a_link_that_stays_in_the_folder_of_a_data_set_is_followed(
    tmp_path: Path, fake: FakeVast, job: dict[str, Any]
) -> None:
    (tmp_path / "link.json").symlink_to(tmp_path / "rows.json")
    (tmp_path / "dataset_info.json").write_text(json.dumps({"mine": {"file_name": "link.json"}}))
    job["data"]["files"] = ["dataset_info.json"]
    plan = planned(tmp_path, fake, job)
    assert {p.local.name for p in plan.pushes if p.remote.startswith("data/")} == {
        "dataset_info.json",
        "link.json",
    }


def test_a_stranger_s_model_folder_cannot_send_a_file_from_outside_it(
    tmp_path: Path, fake: FakeVast, job: dict[str, Any]
) -> None:
    (tmp_path / "id_ed25519").write_text("secret")
    (tmp_path / "model/extra.txt").symlink_to(tmp_path / "id_ed25519")
    error = refused(tmp_path, fake, job)
    assert f"extra.txt is a link to {tmp_path / 'id_ed25519'}" in str(error)


def test_a_model_in_the_hub_s_cache_is_sent_though_its_files_are_links(
    tmp_path: Path, fake: FakeVast, job: dict[str, Any]
) -> None:
    cache = tmp_path / "models--tiny"
    (cache / "blobs").mkdir(parents=True)
    (cache / "snapshots/0123").mkdir(parents=True)
    for n, path in enumerate(sorted((tmp_path / "model").iterdir())):
        path.rename(cache / f"blobs/{n}")
        (cache / "snapshots/0123" / path.name).symlink_to(f"../../blobs/{n}")
    job["model"]["base"] = "models--tiny/snapshots/0123"
    assert "model/model.safetensors" in {p.remote for p in planned(tmp_path, fake, job).pushes}


def test_the_plan_lists_every_file_that_will_travel_with_its_folder(
    tmp_path: Path, fake: FakeVast, job: dict[str, Any]
) -> None:
    other = tmp_path / "elsewhere"
    other.mkdir()
    (tmp_path / "rows.json").rename(other / "theirs.json")
    (tmp_path / "rows.json").symlink_to(other / "theirs.json")
    job["image"] = {"trainer": "push"}
    plan = planned(tmp_path, fake, job)
    told = [note for note in plan.notes if note.startswith("sends ")]
    assert any(n.startswith(f"sends from {other}: theirs.json (") for n in told), "where it lies"
    model = next(n for n in told if n.startswith(f"sends from {tmp_path / 'model'}: "))
    assert all(f"{p.name} (" in model for p in (tmp_path / "model").iterdir())
    ours = sum(p.remote.startswith("trainer/") for p in plan.pushes)
    assert any(f"sends {ours + 3} files of milktea's own trainer" == n for n in told)


# -- tokens ----------------------------------------------------------------------------------------


def test_a_variable_that_is_named_and_not_set_is_refused_before_renting(
    tmp_path: Path, fake: FakeVast, job: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HF_ENDPOINT", "two\nlines")
    error = refused(tmp_path, fake, job | {"env": ["WANDB_API_KEY", "HF_ENDPOINT"]})
    assert "WANDB_API_KEY is named in the job and not set here" in str(error)
    assert "HF_ENDPOINT is longer than 8192 bytes, or not one line" in str(error)
    assert "export it" in error.hint


@pytest.mark.parametrize("name", ["VAST_API_KEY", "PATH", "LD_PRELOAD", "MILKTEA_MAX_S"])
def test_a_variable_that_must_not_travel_is_refused_with_the_reason(
    tmp_path: Path, fake: FakeVast, job: dict[str, Any], name: str
) -> None:
    assert f"{name} does not travel: " in str(refused(tmp_path, fake, job | {"env": [name]}))


def test_the_plan_says_that_the_machine_s_owner_can_read_a_token_and_never_its_value(
    tmp_path: Path, fake: FakeVast, job: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_never_told")
    monkeypatch.setenv("GHCR_LOGIN", "me:ghp_never_told")
    job["image"] = {"ref": "ghcr.io/me/private:1", "trainer": "image", "login": "GHCR_LOGIN"}
    plan = planned(tmp_path, fake, job | {"env": ["HF_TOKEN"]})
    notes = "\n".join(plan.notes)
    assert "HF_TOKEN goes to the machine at launch" in notes and "can read it." in notes
    assert "GHCR_LOGIN goes to vast.ai" in notes
    assert plan.env == ["HF_TOKEN"] and plan.image_login == "GHCR_LOGIN"
    assert "never_told" not in json.dumps(plan.to_line())
    assert Plan.from_line(plan.to_line()) == plan


def test_a_login_that_is_no_user_and_token_is_refused(
    tmp_path: Path, fake: FakeVast, job: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    job["image"]["login"] = "GHCR_LOGIN"
    for held in ("token-alone", "me:", ":token", "me: tok en"):
        monkeypatch.setenv("GHCR_LOGIN", held)
        assert "must hold USER:TOKEN" in str(refused(tmp_path, fake, job))


def test_a_gated_model_without_a_token_is_refused_before_renting(
    tmp_path: Path, fake: FakeVast, job: dict[str, Any]
) -> None:
    job["model"]["base"] = "google/gemma-3-4b-it"
    error = refused(tmp_path, fake, job)
    assert "google/gemma-3-4b-it is gated" in str(error) and 'env = ["HF_TOKEN"]' in error.hint
    assert "https://huggingface.co/google/gemma-3-4b-it" in error.hint


def test_what_is_set_here_and_does_not_travel_is_told() -> None:
    here = {"HF_ENDPOINT": "https://hf-mirror.com", "HF_TOKEN": "hf_x"}
    told = "\n".join(tokens.describe([], "", "Qwen/Qwen3-8B", ["tensorboard", "wandb"], here))
    assert "HF_ENDPOINT is set here and not in env" in told
    assert "HF_TOKEN is set here and not in env" in told
    assert "WANDB_API_KEY is not in env" in told
    assert tokens.describe(list(here), "", "Qwen/Qwen3-8B", [], here)[1:] == []


@pytest.mark.parametrize(
    ("image", "host"),
    [
        ("ghcr.io/me/private:1", "ghcr.io"),
        ("me/private:1", "docker.io"),
        ("private", "docker.io"),
        ("localhost:5000/x", "localhost:5000"),
    ],
)
def test_a_login_names_the_registry_of_its_image(image: str, host: str) -> None:
    assert tokens.registry_login(image, "L", {"L": "me:t:1"}) == f"-u me -p t:1 {host}"
    assert tokens.registry_login(image, "", {}) is None


# -- the market ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("written", "names"),
    [
        ("4090", ["RTX 4090"]),
        ("H100", ["H100 PCIE", "H100 NVL", "H100 SXM"]),
        ("A100", ["A100 PCIE", "A100 SXM4"]),
        ("rtx_4090", ["RTX 4090"]),
        ("RTX 4070", ["RTX 4070"]),
        ("RTX 9999", ["RTX 9999"]),
    ],
)
def test_a_gpu_is_found_by_what_people_call_it(
    tmp_path: Path, fake: FakeVast, job: dict[str, Any], written: str, names: list[str]
) -> None:
    plan = planned(tmp_path, fake, job | {"offer": {"gpu_name": [written]}})
    assert list(plan.needs.gpu_names) == names
    told = any("is read as" in note for note in plan.notes)
    assert told == (written in ("4090", "H100", "A100"))


def test_two_hundred_thousand_equal_mistakes_are_a_dozen_lines(
    tmp_path: Path, fake: FakeVast, job: dict[str, Any]
) -> None:
    rows = [{"instruction": f"q {n}", "output": n} for n in range(500)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    error = refused(tmp_path, fake, job)
    assert str(error).count("rows.json:") < 15
    assert "... and 490 more of this kind in rows.json" in str(error)


def test_an_address_where_nobody_answers_is_said_at_once_and_costs_nothing(
    tmp_path: Path, fake: FakeVast, job: dict[str, Any]
) -> None:
    vast = Vast(Provider("http://127.0.0.1:9", "key"), RealClock(rig.PACE))
    told: list[str] = []
    vast.tell = told.append
    with pytest.raises(PreflightError, match=r"vast\.ai cannot be reached.*127\.0\.0\.1:9") as e:
        preflight(lambda: pytest.fail("nothing is planned"), vast, tmp_path / "runs")
    assert "VAST_URL" in e.value.hint and e.value.money == "nothing was spent"
    assert len(told) == 1 and "asked again for 20 s" in told[0]


def test_host_memory_is_predicted_with_the_copy_that_a_checkpoint_is_written_from(
    tmp_path: Path, fake: FakeVast, job: dict[str, Any]
) -> None:
    assert planned(tmp_path, fake, job).needs.min_cpu_ram_gib == 0, "practice runs take none"
    seven_billion(tmp_path, job)
    adapter = planned(tmp_path, fake, job).needs
    assert 7 <= adapter.min_cpu_ram_gib <= 9 and adapter.min_cpu_cores == 1
    whole = planned(tmp_path, fake, job | {"training": {"method": "full"}}).needs
    assert 80 <= whole.min_cpu_ram_gib <= 90, "12 bytes of each of 6.7 billion parameters"
    asked = planned(tmp_path, fake, job | {"offer": {"min_cpu_ram_gib": 64}}).needs
    assert asked.min_cpu_ram_gib == 64
