"""What one does with a result, by its name: find, merge, evaluate, check, export, combine."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from ops.run.folders import runs_folder
from ops.run.view import find_run, find_trained
from ops.use import found, words
from ops.use.found import Found


def find_result(name: str | Path, *, base: str | None = None, root: Path | None = None) -> Found:
    """The result of a run (as `find_run` names it), or in an adapter's folder or archive; `base` is
    the base model's folder or hub id, by default what run or adapter say. Raises PreflightError
    where there is none, JournalError."""
    root = root or runs_folder()
    path = Path(name).expanduser()
    is_run = len(path.parts) == 1 and (root / path).is_dir()
    if path.exists() and not is_run:
        return found.of_path(path, root, base)
    run = find_trained(root) if str(name) == "last" else find_run(str(name), root)
    return found.of_run(run.folder, base)


def merge(
    result: Found | str | Path,
    *,
    dtype: Literal["bf16", "fp16", "fp32"] = "bf16",
    to: Path | None = None,
    data: Path | None = None,
) -> dict[str, Any]:
    """Merge an adapter into its base, in the new folder `to` (merged-DTYPE beside the adapter).
    Returns the folder's name and its certificate, which is of the rows of `data` (the job's
    held-out ones) and of general texts. Raises PreflightError where it is refused."""
    return words.tell(words.merge(_result(result), dtype, to, data))


def evaluate(
    result: Found | str | Path,
    *,
    data: Path | None = None,
    against: Found | str | Path | None = None,
    rows: int = 200,
    new_tokens: int = 256,
    to: Path | None = None,
) -> dict[str, Any]:
    """Scores of a result and of its base (or of the result `against`) on the first `rows` rows of
    `data` (the job's held-out ones): "scores" by side and name, each with its value and 95 %
    interval, "difference", "examples"; also written to `to` (evaluation.json beside the adapter).
    Raises PreflightError where it is refused."""
    other = None if against is None else _result(against)
    return words.tell(words.evaluate(_result(result), data, other, rows, new_tokens, to))


def check_adapter(result: Found | str | Path) -> list[dict[str, Any]]:
    """For each engine its name, whether it loads the adapter, why (not), and the command. Raises
    PreflightError for what is no adapter."""
    verdicts: list[dict[str, Any]] = words.tell(words.check(_result(result)))["loads_in"]
    return verdicts


def export_adapter(
    result: Found | str | Path,
    target: Literal["vllm", "sglang", "llama.cpp", "ollama", "cog", "hf", "chatglm"],
    *,
    name: str = "tuned",
    gguf_type: Literal["f16", "q8_0"] = "f16",
    merged: bool = False,
    repo: str = "",
    public: bool = False,
    to: Path | None = None,
) -> dict[str, Any]:
    """The result as another program takes it, in the new folder `to` (for-TARGET beside the
    adapter): "folder", "commands" to type, "notes". `repo` uploads to the hub by the token in
    HF_TOKEN. Raises PreflightError where it is refused."""
    options = [f"--name={name}", f"--type={gguf_type}", f"--repo={repo}"]
    options += [f"--{word}" for word, on in (("merged", merged), ("public", public)) if on]
    return words.tell(words.export(_result(result), target, to, options))


def combine_adapters(
    weights: Mapping[str | Path, float], to: Path, *, rank: int | None = None
) -> dict[str, Any]:
    """The weighted sum of adapters (as `find_result` names them) of one base, in the new archive
    (.zip) or folder `to`; cut to `rank` where it is given. Returns "rank", "modules", "lost" (of
    each module, as a share) and "notes". Raises PreflightError where it is refused."""
    parts = [(find_result(named), weight) for named, weight in weights.items()]
    return words.tell(words.combine(parts, to, rank))


def _result(named: Found | str | Path) -> Found:
    return named if isinstance(named, Found) else find_result(named)
