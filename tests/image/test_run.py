"""milktea-run and what it runs inside the image: the docker command lines, job files, scores."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from ops.image.spec import definition
from ops.image.spec.paths import Places
from ops.job import config
from trainer.wire.job import Job

SERVER = Path(__file__).parents[2] / "ops" / "image" / "server"
TOML = """
name = "mine"
[model]
base = "{base}"
precision = "fp32"
[data]
files = ["rows.json"]
held_out = "../elsewhere/held.json"
template = "alpaca"
[training]
max_steps = 3
batch_size = 8
[offer]
num_gpus = 2
[limits]
max_usd = 1.0
"""


def module(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, SERVER / f"{name}.py")
    assert spec and spec.loader
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


@pytest.fixture
def job_folder(tmp_path: Path) -> Path:
    folder, elsewhere = tmp_path / "job", tmp_path / "elsewhere"
    folder.mkdir()
    elsewhere.mkdir()
    for file in (folder / "rows.json", elsewhere / "held.json"):
        file.write_text('[{"instruction": "a", "input": "", "output": "b"}]')
    (folder / "base").mkdir()
    (folder / "base" / "config.json").write_text("{}")
    (folder / "job.toml").write_text(TOML.format(base="base"))
    return folder


def test_a_job_file_for_renting_becomes_the_same_job_on_the_server(
    job_folder: Path, tmp_path: Path
) -> None:
    from ops.box.transfer import PushFile, sha256_of
    from ops.job.adapters import taken_up
    from ops.job.wire_job import make_wire_job

    convert = module("job_from_toml")
    job = config.load(job_folder / "job.toml")
    run = tmp_path / "milktea" / "mine-1"
    ours = convert.write_run(job_folder / "job.toml", job, run, None)
    pushes = [
        PushFile(p, f"data/{n}-{p.name}", sha256_of(p))
        for n, p in enumerate([*job.data.files, job.data.held_out])
    ]
    adapters = taken_up(job, tmp_path / "stage")[1]
    assert ours == make_wire_job(job, "mine-1", [job], [pushes], [adapters])
    assert Job.model_validate_json((run / "job.json").read_text()) == ours and ours.processes == 2
    assert (run / "model" / "config.json").is_file() and (run / "data" / "1-held.json").is_file()
    assert convert.write_run(job_folder / "job.toml", job, run, 1).processes == 1


def test_a_job_file_of_several_stages_becomes_the_same_chain_on_the_server(tmp_path: Path) -> None:
    from ops.job.planner import make_plan

    example = SERVER.parents[2] / "jobs/practice-chain.toml"
    job, run = config.load(example), tmp_path / "milktea" / "mine-1"
    ours = module("job_from_toml").write_run(example, job, run, None)
    (tmp_path / "plan").mkdir()
    theirs = Job.model_validate(make_plan(job, "mine-1", tmp_path / "plan").wire_job)
    for (mine, _), (rented, _) in zip(ours.parts(), theirs.parts(), strict=True):
        told = [part.model_dump(exclude={"data": {"files", "held_out"}}) for part in (mine, rented)]
        assert told[0] == told[1]
        hashes = [[f.sha256 for f in part.data.files] for part in (mine, rented)]
        assert hashes[0] == hashes[1]


def test_the_paths_that_a_job_names_are_told_before_anything_is_mounted(
    job_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert module("job_from_toml").main(["paths", str(job_folder / "job.toml")]) == 0
    told = capsys.readouterr().out.split()
    assert told == [
        str(job_folder / "rows.json"),
        str(job_folder.parent / "elsewhere" / "held.json"),
        str(job_folder / "base"),
    ]


def test_an_installed_model_is_found_by_its_name_and_an_unknown_one_lists_what_is_there(
    job_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    convert = module("job_from_toml")
    models = tmp_path / "models"
    (models / "abc").mkdir(parents=True)
    (models / "abc" / "config.json").write_text("{}")
    (models / "by-name" / "Qwen").mkdir(parents=True)
    (models / "by-name" / "Qwen" / "Q-7B").symlink_to(models / "abc")
    monkeypatch.setenv("MILKTEA_MODELS", str(models))
    (job_folder / "job.toml").write_text(TOML.format(base="Qwen/Q-7B"))
    assert (
        convert.find_model(job_folder / "job.toml", config.load(job_folder / "job.toml"))
        == models / "abc"
    )
    (job_folder / "job.toml").write_text(TOML.format(base="Qwen/Q-8B"))
    assert convert.main(["run", str(job_folder / "job.toml"), str(tmp_path / "r-1")]) == 2
    said = capsys.readouterr().err
    assert (
        "Qwen/Q-8B is neither a folder here nor installed" in said
        and "do this: milktea-run models" in said
    )


def test_the_practice_jobs_of_the_checkout_find_the_images_own_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert = module("job_from_toml")
    (tmp_path / "own" / "practice").mkdir(parents=True)
    (tmp_path / "own" / "practice" / "config.json").write_text("{}")
    monkeypatch.setattr(convert, "OWN_MODELS", tmp_path / "own")
    for base in ("practice", "../trainer/practice/practice_model"):
        (tmp_path / "job.toml").write_text(TOML.format(base=base))
        found = convert.find_model(tmp_path / "job.toml", config.load(tmp_path / "job.toml"))
        assert found == tmp_path / "own" / "practice", base
    (tmp_path / "practice").mkdir()  # its rows
    (tmp_path / "job.toml").write_text(TOML.format(base="practice"))
    found = convert.find_model(tmp_path / "job.toml", config.load(tmp_path / "job.toml"))
    assert found == tmp_path / "own" / "practice"


def test_a_wrong_key_and_a_missing_data_file_are_refused_with_what_to_do(
    job_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    convert = module("job_from_toml")
    (job_folder / "rows.json").unlink()
    assert convert.main(["run", str(job_folder / "job.toml"), str(tmp_path / "r-1")]) == 3
    assert "rows.json" in capsys.readouterr().err
    (job_folder / "job.toml").write_text(TOML.format(base="base").replace("max_steps", "max_step"))
    assert convert.main(["paths", str(job_folder / "job.toml")]) == 2
    assert "max_step" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["practice", "train-cu126", "train-cu130"])
def test_what_the_converter_imports_of_ops_is_in_every_image(name: str) -> None:
    root = SERVER.parents[2]
    spec = definition.read(Places().definition(name))
    text = (Places().dockerfile(spec.dockerfile) / "Dockerfile").read_text()
    carried = {f"ops/{path}" for path in re.findall(r"/mnt/ops/([\w/]+\.py)", text)}
    wanted = [SERVER / "job_from_toml.py"]
    for path in wanted:
        for package in re.findall(r"^from (ops[\w.]*) import", path.read_text(), re.M):
            file = root / f"{package.replace('.', '/')}.py"
            if not file.is_file():
                file = root / package.replace(".", "/") / "__init__.py"
            relative = str(file.relative_to(root))
            assert relative in carried, (
                f"{relative} is imported in the image: copy it in"
                f" docker/{spec.dockerfile}/Dockerfile"
            )
            if file not in wanted:
                wanted.append(file)
    assert all((root / path).is_file() for path in carried)


# -- the command lines


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., list[str]]:
    """milktea-run as installed, printing its docker commands; the engine's answers are recorded
    ones.
    """
    prefix = tmp_path / "prefix"
    for folder in ("bin", "state", "tools", "models"):
        (prefix / folder).mkdir(parents=True)
    shutil.copy(SERVER / "milktea-run.sh", prefix / "bin" / "milktea-run")
    (prefix / "state" / "default").write_text("tiny\n")
    (prefix / "state" / "tiny").write_text("current milktea/tiny:abc\nprevious milktea/tiny:old\n")
    engine = tmp_path / "engine"
    engine.mkdir()

    def call(
        *arguments: str, runtimes: str = '{"nvidia":{}}', security: str = "[]", **env: str
    ) -> list[str]:
        script = f"""#!/bin/sh
case "$*" in "image inspect"*:known) echo sha256:0123456789abcdef0123 ;; "image inspect"*) exit 1 ;;
    *Runtimes*) echo '{runtimes}' ;; *SecurityOptions*) echo '{security}' ;;
    *" paths "*) echo "$PATHS" ;; esac
"""
        (engine / "docker").write_text(script)
        (engine / "docker").chmod(0o755)
        environment = {
            "PATH": f"{engine}:{os.environ['PATH']}",
            "MILKTEA_DRY_RUN": "1",
            "HOME": str(tmp_path),
        } | env
        command = ["sh", str(prefix / "bin" / "milktea-run"), *arguments]
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            env=environment,
            cwd=tmp_path,
            stdin=subprocess.DEVNULL,
        )
        assert done.returncode == 0, done.stderr
        return [line for line in done.stdout.splitlines() if line.startswith("docker run")]

    return call


def test_every_container_has_no_network_no_writable_image_no_rights_and_the_callers_user(
    run: Callable,
) -> None:
    (line,) = run("check")
    for option in (
        "--network=none",
        "--read-only",
        "--cap-drop=ALL",
        "--security-opt no-new-privileges",
        f"--user {os.getuid()}:{os.getgid()}",
        "--gpus all",
    ):
        assert f" {option} " in line
    assert line.endswith("--entrypoint python3 milktea/tiny:abc -m trainer.checkup")
    memory_kb = int(Path("/proc/meminfo").read_text().split()[1])
    assert f"--shm-size {memory_kb // 2}k" in line


def test_python_keeps_what_it_compiles_for_the_next_start_of_the_very_same_image(
    run: Callable, tmp_path: Path
) -> None:
    (line,) = run("check", MILKTEA_IMAGE="milktea/tiny:known")
    assert f" -e PYTHONPYCACHEPREFIX={tmp_path}/milktea/cache/python-0123456789ab " in line
    assert (
        "PYTHONPYCACHEPREFIX" not in run("check")[0]
    )  # an image that cannot be asked keeps its own setting


def test_check_gives_the_self_test_the_lock_of_the_current_image(
    run: Callable, tmp_path: Path
) -> None:
    assert "image.lock" not in run("check")[0]
    lock = tmp_path / "prefix/records/image-abc.lock"
    lock.parent.mkdir()
    lock.write_text("")
    assert f" -v {lock}:/run/milktea/image.lock:ro " in run("check")[0]


def test_an_image_that_is_gone_back_to_has_the_tools_that_came_with_it(
    run: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They write job files that its own trainer reads."""
    monkeypatch.syspath_prepend(SERVER)
    small, prefix = tmp_path / "small", tmp_path / "prefix"
    (small / "tools").mkdir(parents=True)
    shutil.copy(SERVER / "milktea-run.sh", small / "tools/milktea-run")
    (small / "image.lock").touch()
    for identity in ("old", "abc"):
        (small / "tools/run_job.py").write_text(identity)
        module("installer").install_tools(f"id {identity}\n", small, prefix)
    for identity in ("abc", "old"):
        (prefix / "state/tiny").write_text(f"current milktea/tiny:{identity}\n")
        [tools] = re.findall(r"-v (\S+):/tools:ro", run("check")[0])
        assert (Path(tools) / "run_job.py").read_text() == identity


def test_rootless_engines_and_servers_without_gpus_are_seen(run: Callable) -> None:
    (line,) = run("check", runtimes='{"runc":{}}', security='["name=rootless"]')
    assert "--user" not in line and "--gpus" not in line


def test_gpus_are_chosen_by_number_or_by_name(run: Callable) -> None:
    assert "--gpus 2 " in run("check", MILKTEA_GPUS="2")[0]
    assert '--gpus "device=0,1" ' in run("check", MILKTEA_GPUS="device=0,1")[0]
    assert "--gpus" not in run("check", MILKTEA_GPUS="none")[0]


def test_a_compat_package_is_mounted_only_when_asked_for(run: Callable) -> None:
    assert "cuda-compat" not in run("check")[0]
    assert (
        "-v /opt/compat:/cuda-compat:ro -e LD_LIBRARY_PATH=/cuda-compat"
        in run("check", MILKTEA_CUDA_COMPAT="/opt/compat")[0]
    )


def test_train_mounts_what_the_job_names_and_nothing_else(run: Callable, job_folder: Path) -> None:
    held = job_folder.parent / "elsewhere" / "held.json"
    lines = run(
        "train",
        str(job_folder / "job.toml"),
        "--gpus",
        "2",
        "--run",
        "mine-7",
        PATHS=f"{job_folder}/rows.json\n{held}\n{job_folder}/base",
    )
    assert len(lines) == 2
    convert, train = lines
    mounts = re.findall(r"-v (\S+)", train)
    runs = job_folder.parent / "milktea"
    prefix = job_folder.parent / "prefix"
    assert mounts == [
        f"{job_folder}:{job_folder}:ro",
        f"{held}:{held}:ro",
        f"{prefix}/tools:/tools:ro",
        f"{prefix}/models:{prefix}/models:ro",
        f"{runs}:{runs}",
    ]
    assert f"run {job_folder}/job.toml {runs}/mine-7 2" in convert and "--gpus" not in convert
    assert train.endswith("/tools/run_job.py") and f"-w {runs}/mine-7" in train
    assert " --gpus 2 " in train and " -d " in train and " --name milktea-mine-7-" in train
    assert not (runs / "mine-7").exists(), "a dry run makes no run"


def test_a_run_that_was_begun_goes_on_without_being_written_anew(
    run: Callable, job_folder: Path
) -> None:
    begun = job_folder.parent / "milktea" / "mine-7"
    begun.mkdir(parents=True)
    (begun / "job.json").write_text("{}")
    assert len(run("train", str(job_folder / "job.toml"), "--run", "mine-7", PATHS="")) == 1


def test_launch_is_accelerates_own_in_the_current_folder(run: Callable, tmp_path: Path) -> None:
    (line,) = run("launch", "--num_processes", "2", "my.py", "--text", "two words")
    assert (
        line.endswith(
            "--entrypoint accelerate milktea/tiny:abc launch --num_processes 2 my.py --text two"
            " words"
        )
        and f"-w {tmp_path}" in line
    )


def test_chat_evaluate_and_merge_open_a_run_by_its_name(run: Callable, tmp_path: Path) -> None:
    (tmp_path / "milktea" / "mine-7").mkdir(parents=True)
    (tmp_path / "new.json").write_text("[]")
    at = tmp_path / "milktea" / "mine-7"
    assert run("chat", "mine-7", "hello there")[0].endswith(
        f"-m trainer.serve.chat {at}/result/adapter.zip --base {at}/model --prompt hello there"
    )
    assert run("evaluate", "mine-7", "new.json")[0].endswith(
        f"-m trainer.eval.score {at} {tmp_path}/new.json"
    )
    for words, dtype in (((), "bf16"), (("fp32",), "fp32")):
        assert run("merge", "mine-7", *words)[0].endswith(
            f"-m trainer.result.merge {at} --out {at}/merged-{dtype} --dtype {dtype}"
        )


def test_serve_alone_has_a_network_and_listens_on_loopback_unless_it_is_told(
    run: Callable, tmp_path: Path
) -> None:
    from trainer.serve.server import named, parse

    for name in ("mine-7", "mine-8"):
        (tmp_path / "milktea" / name).mkdir(parents=True)
    (tmp_path / "our.pem").touch()
    (line,) = run("serve", "mine-7", "mine-8")
    assert " --network=bridge -p 127.0.0.1:8014:8014 " in line and "--network=none" not in line
    told = parse(line.partition("-m trainer.serve.server ")[2].split())
    runs = tmp_path / "milktea"
    results = {n: runs / n / "result" / "adapter.zip" for n in ("mine-7", "mine-8")}
    assert named(told.results) == results
    assert (told.base, told.token_file) == (f"{runs}/mine-7/model", runs / "mine-7" / "token")
    assert (told.name, told.port, told.feedback) == (["127.0.0.1"], 8014, runs / "mine-7")
    theirs = {"MILKTEA_LISTEN": "0.0.0.0:443", "MILKTEA_NAME": "models.example"}
    (line,) = run("serve", "mine-8", MILKTEA_CERTIFICATE="our.pem", **theirs)
    told = parse(line.partition("-m trainer.serve.server ")[2].split())
    assert " -p 0.0.0.0:443:443 " in line and f"-v {tmp_path}/our.pem:{tmp_path}/our.pem:ro" in line
    assert (told.port, told.name) == (443, ["models.example"])
    assert told.certificate == tmp_path / "our.pem"


@pytest.mark.parametrize(
    ("name", "pattern"),
    [
        ("mine-7", "mine-7"),
        ("Alpaca_ZH", "alpaca-zh-[0-9a-f]{6}"),
        ("微调", "run-[0-9a-f]{6}"),
        ("r1", "r1-[0-9a-f]{6}"),
        ("a b.c", "a-b-c-[0-9a-f]{6}"),
        ("--x", "x-[0-9a-f]{6}"),
    ],
)
def test_any_name_of_a_job_file_gives_a_run_id(
    run: Callable, job_folder: Path, name: str, pattern: str
) -> None:
    line = run("train", str(job_folder / "job.toml"), "--run", name, PATHS="")[-1]
    folder = re.search(r" -w (\S+)", line)
    assert folder and re.fullmatch(pattern, Path(folder[1]).name)
    assert re.fullmatch("[a-z0-9][a-z0-9-]{2,62}", Path(folder[1]).name)


@pytest.fixture
def engine_says(tmp_path: Path, run: Callable) -> Callable[..., subprocess.CompletedProcess[str]]:
    """milktea-run for real, with an engine and an nvidia-smi that give recorded answers."""
    folder = tmp_path / "engine"

    def call(
        *arguments: str, running: str = "", gpus: int = 2, listed: str = "", **env: str
    ) -> subprocess.CompletedProcess[str]:
        for name, text in {
            "docker": (
                f"""case "$*" in *Runtimes*) echo '{{"nvidia":{{}}}}' ;;
                "ps -q"*|"container inspect --format"*) printf '{running}' ;;
                "images "*) printf '{listed}' ;;
                "container inspect"*) rm {tmp_path}/leaving ;;
                *" run "*|"run "*|"rmi "*) echo "$*" >>{tmp_path}/asked ;; esac"""
            ),
            "nvidia-smi": f"seq 0 {gpus - 1}",
        }.items():
            (folder / name).write_text(f"#!/bin/sh\n{text}\n")
            (folder / name).chmod(0o755)
        environment = {
            "PATH": f"{folder}:{os.environ['PATH']}",
            "HOME": str(tmp_path),
            "MILKTEA_TURN": str(tmp_path / "turn"),
        } | env
        return subprocess.run(
            ["sh", str(tmp_path / "prefix" / "bin" / "milktea-run"), *arguments],
            capture_output=True,
            text=True,
            env=environment,
            cwd=tmp_path,
            stdin=subprocess.DEVNULL,
        )

    return call


def test_two_users_do_not_get_the_same_gpu(
    engine_says: Callable, job_folder: Path, tmp_path: Path
) -> None:
    job = str(job_folder / "job.toml")
    done = engine_says("train", job, "--gpus", "1", "--detach", running="milktea-theirs 0\\n")
    assert done.returncode == 0, done.stderr
    assert '--gpus "device=1"' in (tmp_path / "asked").read_text().splitlines()[-1]
    done = engine_says("train", job, "--gpus", "2", running="milktea-theirs 0\\n")
    assert done.returncode == 2 and "2 GPUs are wanted, free are: 1" in done.stderr
    done = engine_says("train", job, "--gpus", "0,1", running="milktea-theirs 0\\n")
    assert done.returncode == 2 and "GPU 0 is in use by another run" in done.stderr
    done = engine_says("train", job, running="milktea-theirs all\\n")
    assert done.returncode == 2 and "are in use by other runs" in done.stderr
    done = engine_says("train", job, "--share", "--detach", running="milktea-theirs all\\n")
    assert (
        done.returncode == 0 and " --gpus all " in (tmp_path / "asked").read_text().splitlines()[-1]
    )


@pytest.mark.parametrize(
    ("gpus", "given", "processes"),
    [("all", "--gpus all", ""), ("none", "", ""), ("1,0", '--gpus "device=1,0"', " 2")],
)
def test_gpus_are_a_number_a_list_all_or_none(
    engine_says: Callable, job_folder: Path, tmp_path: Path, gpus: str, given: str, processes: str
) -> None:
    done = engine_says("train", str(job_folder / "job.toml"), "--gpus", gpus, "--detach")
    assert done.returncode == 0, done.stderr
    *_, convert, start = (tmp_path / "asked").read_text().splitlines()
    assert given in start and ("--gpus" in start) == bool(given)
    assert re.search(r" run \S+ \S+(.*)$", convert)[1] == processes  # type: ignore[index]


@pytest.mark.parametrize("gpus", ["two", "0", "1,", "-1", "1;2"])
def test_gpus_that_are_no_number_are_refused(
    engine_says: Callable, job_folder: Path, gpus: str
) -> None:
    done = engine_says("train", str(job_folder / "job.toml"), "--gpus", gpus)
    assert done.returncode == 2 and f"--gpus {gpus} is neither a number" in done.stderr


@pytest.mark.parametrize("option", ["--gpus", "--run"])
def test_an_option_without_its_value_is_refused_by_name(
    engine_says: Callable, job_folder: Path, option: str
) -> None:
    done = engine_says("train", str(job_folder / "job.toml"), option)
    assert done.returncode == 2 and f"{option} wants a value" in done.stderr
    assert "parameter not set" not in done.stderr


def test_a_changed_job_under_an_old_run_is_refused(
    engine_says: Callable, job_folder: Path, tmp_path: Path
) -> None:
    job = job_folder / "job.toml"
    assert engine_says("train", str(job), "--run", "mine-7", "--detach").returncode == 0
    assert (tmp_path / "milktea/mine-7/job.toml").read_text() == job.read_text()
    assert (tmp_path / "milktea/mine-7/image").read_text() == "milktea/tiny:abc\n"
    assert engine_says("train", str(job), "--run", "mine-7", "--detach").returncode == 0
    job.write_text(job.read_text().replace("max_steps = 3", "max_steps = 4"))
    done = engine_says("train", str(job), "--run", "mine-7", "--detach")
    assert done.returncode == 2 and "was begun with another job.toml" in done.stderr
    assert "--run" in done.stderr


def test_status_says_how_every_run_stands(engine_says: Callable, tmp_path: Path) -> None:
    for name, code in (("done-1", "0"), ("cut-1", None)):
        folder = tmp_path / "milktea" / name
        folder.mkdir(parents=True)
        (folder / "job.json").write_text("{}")
        (folder / "log.txt").write_text(f"words of {name}\n")
        if code:
            (folder / "exit_code").write_text(code)
    said = engine_says("status", running="milktea-other-12345678 0,1\\n").stdout
    assert re.search(r"done-1 +ended with 0", said) and re.search(r"cut-1 +was interrupted", said)
    assert "milktea-other-12345678 0,1" in said
    assert engine_says("logs", "done-1").stdout == "words of done-1\n"
    assert engine_says("stop", "none").returncode == engine_says("stop").returncode == 2
    done = engine_says("logs", "none")
    assert done.returncode == 2 and "there is no run none" in done.stderr


@pytest.mark.parametrize("name", ["r1", "Alpaca_ZH", "微调", "my run"])
def test_a_run_is_found_by_the_name_that_its_user_gave_it(
    engine_says: Callable, run: Callable, job_folder: Path, name: str
) -> None:
    started = engine_says("train", str(job_folder / "job.toml"), "--run", name, "--detach")
    found = re.search(r"^run (\S+): (.*?) ", started.stdout, re.M)
    assert found, started.stderr
    (Path(found[2]) / "log.txt").write_text("its words\n")
    assert engine_says("logs", name).stdout == "its words\n"
    assert engine_says("stop", name).stdout.startswith(f"run {name} stopped")
    assert f"--base {found[2]}/model" in run("chat", name)[0]


def test_a_stopped_run_may_be_begun_again_at_once(engine_says: Callable, tmp_path: Path) -> None:
    """An engine stops a container and removes it a moment later; till then its name is taken."""
    (tmp_path / "milktea/mine-1").mkdir(parents=True)
    (tmp_path / "leaving").touch()
    assert engine_says("stop", "mine-1").returncode == 0
    assert not (tmp_path / "leaving").exists()


def test_one_of_several_images_is_chosen_by_use(engine_says: Callable, tmp_path: Path) -> None:
    (tmp_path / "prefix/state/other").write_text("current milktea/other:def\n")
    assert engine_says("use", "other").returncode == 0
    engine_says("check")
    assert "milktea/other:def" in (tmp_path / "asked").read_text()
    assert engine_says("use", "nothing").returncode == 2


def test_rollback_exchanges_the_current_image_and_the_one_before(
    engine_says: Callable, tmp_path: Path
) -> None:
    state = tmp_path / "prefix/state/other"
    state.write_text("current milktea/other:new\nrelease 9\ngpus all\nprevious milktea/other:old\n")
    assert engine_says("rollback", "other").stdout == "current milktea/other:old\n"
    assert sorted(state.read_text().splitlines()) == [
        "current milktea/other:old",
        "gpus all",
        "previous milktea/other:new",
        "release 9",
    ]
    assert engine_says("rollback", "other").stdout == "current milktea/other:new\n"
    state.write_text("current milktea/other:new\nrelease 9\ngpus all\nprevious \n")
    refused = engine_says("rollback", "other")
    assert refused.returncode == 2 and "no image of other before" in refused.stderr


@pytest.mark.parametrize("registry", ["", "docker.io/"])
def test_prune_removes_what_is_neither_current_nor_the_one_before_and_says_its_size(
    engine_says: Callable, tmp_path: Path, registry: str
) -> None:
    tags = ("abc", "old", "older", "current", "previous")
    listed = "".join(f"{registry}milktea/tiny:{tag} 1.2GB\\n" for tag in tags)
    told = engine_says("images", listed=listed).stdout
    assert told.startswith("tiny: current milktea/tiny:abc, previous milktea/tiny:old\n")
    assert f"{registry}milktea/tiny:older 1.2GB\n" in told
    (tmp_path / "milktea/cache/triton").mkdir(parents=True)
    told = engine_says("prune", listed=listed).stdout
    assert f"removed {registry}milktea/tiny:older (1.2GB with what it shares)\n" in told
    assert f"\t{tmp_path}/milktea/cache\n" in told and not (tmp_path / "milktea/cache").exists()
    assert (tmp_path / "asked").read_text() == f"rmi {registry}milktea/tiny:older\n"


def test_uninstall_removes_every_image_and_none_while_a_run_trains(
    engine_says: Callable, tmp_path: Path
) -> None:
    refused = engine_says("uninstall", running="milktea-theirs 0\\n")
    assert refused.returncode == 2 and "runs train on this server" in refused.stderr
    assert not (tmp_path / "asked").exists() and (tmp_path / "prefix/state/tiny").exists()
    told = engine_says("uninstall", listed="milktea/tiny:abc\\nmilktea/tiny:old\\n").stdout
    assert told.startswith("removed milktea/tiny:abc\nremoved milktea/tiny:old\n")
    assert f"rm -r {tmp_path}/prefix" in told, "models and records are the user's"
    asked = (tmp_path / "asked").read_text()
    assert asked == "rmi -f milktea/tiny:abc\nrmi -f milktea/tiny:old\n"
    assert list((tmp_path / "prefix/state").iterdir()) == []
    assert "no image is installed" in engine_says("check").stderr


def test_a_training_leaves_its_words_and_its_exit_code_and_hears_sigterm(tmp_path: Path) -> None:
    """run_job.py with a trainer that counts until it is asked to stop."""
    (tmp_path / "trainer").mkdir()
    (tmp_path / "trainer" / "__init__.py").touch()
    (tmp_path / "trainer" / "launch.py").write_text(
        "import os, pathlib, signal, sys, time\n"
        "assert os.environ['MILKTEA_TELL'] == '1' and pathlib.Path('log.txt').is_file()\n"
        "signal.signal(signal.SIGTERM, lambda *_: (print('saved', flush=True), sys.exit(5)))\n"
        "print('step 1', flush=True)\n"
        "time.sleep(60)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    with subprocess.Popen(
        [sys.executable, str(SERVER / "run_job.py")],
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == "step 1\n"
        process.terminate()
        assert process.wait(30) == 5 and process.stdout.read() == "saved\n"
    assert (tmp_path / "log.txt").read_text() == "step 1\nsaved\n"
    assert (tmp_path / "exit_code").read_text() == "5\n"
