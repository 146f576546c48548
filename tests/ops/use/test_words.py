"""The words over a result: which process each becomes, and what comes of its answer."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
from typer.testing import CliRunner

from ops import api
from ops.cli import app as cli
from ops.errors import PreflightError
from ops.use import words
from ops.use.found import Found
from ops.wait import until

MINE = Found(
    "mine", Path("out/mine/adapter.zip"), "org/base", Path("held.json"), Path("job.json"), "nf4"
)
BARE = Found("bare", Path("bare.zip"), "org/base")


def test_each_word_is_a_module_with_the_adapter_its_base_and_the_jobs_rows() -> None:
    merge = words.merge(MINE, "fp16")
    assert merge.module == "trainer.result.merge"
    assert merge.arguments[:5] == (
        "out/mine/adapter.zip",
        "--base",
        "org/base",
        "--out",
        "out/mine/merged-fp16",
    )
    rows = ("--data", "held.json", "--job", "job.json")
    assert merge.arguments[-6:] == (*rows, "--trained-in", "nf4")
    assert not {"--data", "--trained-in"} & set(words.merge(BARE).arguments)
    mine = words.evaluate(MINE, Path("my.json"), BARE, 50).arguments
    assert mine[3:7] == ("--data", "my.json", "--job", "job.json")
    assert mine[7:11] == ("--against", "bare.zip", "--against-base", "org/base")
    assert words.export(MINE, "ollama").arguments[-1] == "out/mine/for-ollama"
    both = words.combine([(MINE, 1.0), (BARE, -0.5)], Path("mix.zip"), 8).arguments
    assert both == ("out/mine/adapter.zip=1.0", "bare.zip=-0.5", "--out", "mix.zip", "--rank", "8")


def test_what_cannot_be_known_is_asked_for_before_a_process_starts() -> None:
    with pytest.raises(PreflightError, match="has no held-out rows here"):
        words.evaluate(BARE)
    with pytest.raises(PreflightError, match="which base"):
        words.merge(Found("x", Path("x.zip")))


def test_an_answer_is_an_object_and_a_refusal_an_error(tmp_path: Path) -> None:
    (tmp_path / "word.py").write_text(
        "import json, sys\n"
        "print('on the way')\n"
        "print(json.dumps({'refused': 'no', 'hint': 'do'} if 'no' in sys.argv else {'a': 1}))\n"
        "sys.exit(3 if 'no' in sys.argv else 0) if 'nothing' not in sys.argv else None\n"
    )
    (tmp_path / "silent.py").write_text("")

    def told(module: str, *arguments: str) -> Any:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PYTHONPATH", str(tmp_path))
            return words.tell(words.Word(module, arguments))

    assert told("word") == {"a": 1}
    with pytest.raises(PreflightError, match="no") as refused:
        told("word", "no")
    assert refused.value.hint == "do"
    with pytest.raises(PreflightError, match="ended with 0 and no answer"):
        told("silent")


def test_the_command_line_says_what_it_does_not_know(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MILKTEA_RUNS", str(tmp_path))
    for typed, code, said in (
        (["merge", "none"], 8, "names 0 runs"),
        (["merge", "none", "--dtype", "fp8"], 2, "one of bf16, fp16, fp32"),
        (["adapter", "export", "none", "--for", "paper"], 2, "one of vllm"),
        (["adapter", "combine", "a=much", "--to", "x.zip"], 2, "has no weight"),
        (["chat", "none"], 8, "names 0 runs"),
        (["evaluate", "none"], 8, "names 0 runs"),
    ):
        done = CliRunner().invoke(cli.app, typed)
        assert done.exit_code == code and said in done.stderr, (typed, done.stderr)


def test_adapters_are_looked_at_from_python_and_the_command_line(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    np = pytest.importorskip("numpy")
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
    pair = {f"{name}A.weight": (16, 2), f"{name}B.weight": (2, 16)}
    tensors = {key: np.zeros(shape, "float32") for key, shape in pair.items()}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    config = {"r": 16, "lora_alpha": 32, "base_model_name_or_path": "org/base"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    assert [v["name"] for v in api.check_adapter(tmp_path)][:2] == ["PEFT", "vLLM"]


LASTING = ("-n", "1", "-r", "1", "import time; time.sleep(90)")  # arguments of timeit


def test_a_signal_that_comes_while_the_trainer_is_started_ends_it_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Started(subprocess.Popen[bytes]):
        def __init__(self, *words: Any, **how: Any) -> None:
            super().__init__(*words, **how)
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(subprocess, "Popen", Started)
    assert words.show(words.Word("timeit", LASTING)) == -signal.SIGTERM


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("act", ["show", "tell"])
def test_a_command_that_is_ended_ends_its_trainer_too(act: str, number: signal.Signals) -> None:
    """The word is a module that runs until it is ended."""
    code = (
        "from ops.use import words\n"
        f"word = words.Word('timeit', {LASTING})\n"
        "print('begun', flush=True)\n"
        f"words.{act}(word)\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=words.ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    assert parent.stdout and parent.stdout.readline() == b"begun\n"
    group = psutil.Process(parent.pid)
    [child] = until(lambda: group.children() or None, every_s=0.02, timeout_s=60) or []
    os.kill(parent.pid, number)
    parent.wait(60)
    parent.stdout.close()
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE
