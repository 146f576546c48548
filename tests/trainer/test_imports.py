"""What a run imports, and that what it leaves out is there for whoever asks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny import events_of, manifest_of

from trainer import launch

Make = Callable[..., Path]
ROOT = Path(launch.__file__).parent.parent
LEFT_OUT = (
    "torch._dynamo.eval_frame", "torch._inductor", "torch._decomp", "sympy", "torch.fx.experimental.symbolic_shapes", "torch.distributed.tensor",
    "torch.distributed.fsdp", "torch.distributed.checkpoint", "torch.nn.attention.flex_attention", "transformers.generation.continuous_batching",
    "torch.export", "torch._subclasses", "torch.distributions", "torch.ao", "peft.tuners.adalora", "transformers.trainer", "tensorflow", "pandas",
    "scipy", "datasets",
)  # fmt: skip


def python(code: str) -> subprocess.CompletedProcess[str]:
    surroundings = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=150, env=surroundings)


def test_a_job_runs_without_torchs_compiler_distributed_tensors_and_algebra(run_folder: Make) -> None:
    job = run_folder(training={"max_steps": 3})
    code = (
        "import json, os, sys; from trainer import imports, launch; "
        f"code = launch.main([{str(job)!r}]); there = [n for n in {LEFT_OUT!r} if n in sys.modules and not imports.stands_in(n)]; "
        "print(json.dumps(there)); sys.exit(code)"
    )
    done = python(code)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == []
    assert manifest_of(job)["steps"] == 3


def test_who_asks_later_gets_the_real_thing() -> None:
    code = """
import sys
from trainer import imports
imports.begin(False, False)
imports.lean(False, False)
import transformers, torch
assert "torch._dynamo.eval_frame" not in sys.modules
assert transformers.BertModel.__module__ == "transformers.models.bert.modeling_bert"
assert not hasattr(transformers, "NoSuchModel") and transformers.AutoModelForCausalLM
import torch._dynamo.eval_frame
assert torch._dynamo.OptimizedModule.__module__ == "torch._dynamo.eval_frame"
assert torch.nn.functional.layer_norm(torch.ones(2, 3, device="meta"), (3,)).shape == (2, 3)
assert torch.compile(lambda x: x + 1, backend="eager")(torch.ones(2)).sum() == 4
from torch.nn.attention.flex_attention import create_block_mask
assert callable(create_block_mask)
from transformers.generation.continuous_batching import ContinuousBatchingManager
assert ContinuousBatchingManager.__init__.__code__.co_argcount > 1
assert torch.distributed.tensor.DTensor and not isinstance(torch.ones(1), torch.distributed.tensor.DTensor)
import torch.distributed.tensor
assert torch.distributed.tensor.DTensor.from_local
"""
    done = python(code)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("ask", ["import torch._dynamo.eval_frame", "torch.distributed.tensor.Shard(0)", "torch._meta_registrations.device_hint"])
def test_shapes_without_memory_are_there_for_who_asks_for_what_needs_them(ask: str) -> None:
    """torch.linalg.householder_product has its shape on `meta` from that module alone."""
    code = f"""
import sys
from trainer import imports
imports.begin(False, False)
imports.lean(False, False)
import torch
shape = lambda: torch.linalg.householder_product(torch.ones(4, 3, device="meta"), torch.ones(3, device="meta")).shape
try: shape(); sys.exit("this operator no longer needs the module: choose another")
except NotImplementedError: pass
{ask}
import torch.distributed.tensor
assert shape() == (4, 3)
"""
    done = python(code)
    assert done.returncode == 0, done.stderr


ENTRIES = (
    "torch.distributed.checkpoint", "torch.fx.experimental.proxy_tensor", "torch.fx.passes.shape_prop", "torch._functorch.aot_autograd",
    "torch._decomp.decompositions", "torch.ao.quantization", "torch.distributions.normal", "torch.nested._internal.ops",
    "torch.export.exported_program",
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("entry", ENTRIES)
def test_the_circles_of_torchs_modules_may_be_entered_anywhere(entry: str) -> None:
    """And no module runs twice: DTensor would register itself again."""
    code = f"""
import importlib.machinery, sys
from trainer import imports
ran, run = [], importlib.machinery.SourceFileLoader.exec_module
importlib.machinery.SourceFileLoader.exec_module = lambda loader, module: ran.append(module.__name__) or run(loader, module)
imports.begin(False, False)
imports.lean(False, False)
import {entry}
import torch.distributed.tensor, torch._dynamo.eval_frame
assert torch.compile(lambda x: x + 1, backend="eager")(torch.ones(2)).sum() == 4
assert not imports.stands_in({entry!r}) and "{entry}" in ran
sys.exit([n for n in sys.modules if n.startswith("torch.") and ran.count(n) > 1] or 0)
"""
    done = python(code)
    assert done.returncode == 0, done.stderr


def command(job: Path, path: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    """The job as ops runs it; `path` goes before the trainer's own folder."""
    surroundings = os.environ | {"PYTHONPATH": f"{path}:{ROOT}".lstrip(":"), "OMP_NUM_THREADS": "1"} | environment
    line = [sys.executable, "-m", "trainer.launch", str(job)]
    return subprocess.run(line, capture_output=True, text=True, timeout=150, env=surroundings)


@pytest.mark.slow
def test_the_numbers_are_those_of_plain_imports(run_folder: Make) -> None:
    lean, plain = run_folder(training={"max_steps": 4}), run_folder(training={"max_steps": 4})
    assert command(lean).returncode == 0 and command(plain, MILKTEA_PLAIN_IMPORTS="1").returncode == 0
    assert manifest_of(lean)["adapter_sha256"] == manifest_of(plain)["adapter_sha256"]


@pytest.mark.slow
def test_a_transformers_that_needs_more_than_a_stand_in_is_imported_whole(run_folder: Make, tmp_path: Path) -> None:
    """As a later version might be: sitecustomize adds a line to one of its modules that no stand-in satisfies."""
    (tmp_path / "sitecustomize.py").write_text(
        "import importlib.machinery as m\n"
        "read = m.SourceFileLoader.get_code\n"
        "def get_code(self, name):\n"
        "    if name != 'transformers.pytorch_utils': return read(self, name)\n"
        "    wish = '\\nfrom transformers.generation import continuous_batching as c\\nissubclass(c.PagedAttentionCache, object)\\n'\n"
        "    text = self.get_data(self.path).decode() + wish\n"
        "    return compile(text, self.path, 'exec')\n"
        "m.SourceFileLoader.get_code = get_code\n"
    )
    job = run_folder(training={"max_steps": 3})
    done = command(job, str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "importing all of it" in done.stderr and manifest_of(job)["steps"] == 3


def test_bad_data_is_told_while_torch_is_still_being_imported(run_folder: Make, tmp_path: Path) -> None:
    """Here torch is a module whose import never ends."""
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("import threading\nthreading.Event().wait()\n")
    job = run_folder(data=[{"instruction": "a"}])
    done = command(job, str(tmp_path))
    assert done.returncode == 3, done.stderr
    assert "train.jsonl:1" in done.stderr
    assert [e["event"] for e in events_of(job)] == ["failed"]


def test_the_fork_that_checks_dies_with_its_parent(run_folder: Make) -> None:
    """Here the data never ends: its digest waits."""
    job = run_folder()
    code = f"""
import hashlib, os, threading
from pathlib import Path
from trainer import launch
from trainer.job import Job
job = Path({str(job)!r})
def wait(*_): print(os.getpid(), flush=True); threading.Event().wait()
hashlib.file_digest = wait
checker = launch.Checker(lambda: launch.check(Job.model_validate_json(job.read_bytes()), job.parent), job.parent)
threading.Event().wait()
"""
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert parent.stdout is not None
    reader: list[str] = []
    fork = int(parent.stdout.readline())
    rest = threading.Thread(target=lambda: reader.append(parent.stdout.read()))  # type: ignore[union-attr]
    rest.start()
    parent.kill()
    parent.wait(30)
    rest.join(30)  # the pipe closes when its last writer, the fork, is gone
    assert not rest.is_alive() and reader == [""] and fork != parent.pid
