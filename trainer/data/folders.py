"""What a path of data.files stands for: a file, a pattern such as data/*.jsonl, a folder of files,
or a folder that `datasets` saved (save_to_disk)."""

from __future__ import annotations

import glob
import json
import re
from pathlib import Path

from trainer.data.tables import KINDS

DATASET_INFO = "dataset_info.json"  # LLaMA-Factory's, or, beside state.json, of `datasets`
# train.jsonl, test-00000-of-00001.parquet
SPLIT = re.compile(r"(train|validation|valid|val|dev|test|eval)(?:-\d+-of-\d+)?\.")
READ = (".json", ".jsonl", ".txt", *KINDS)


def kind_of(path: Path) -> str:
    """The suffix that says how a file is read: of x.csv.gz it is .csv."""
    name = path.name.lower()
    return Path(name.removesuffix(".gz")).suffix


def is_file(path: Path) -> bool:
    """Whether there is a file; a name that no file can have names none."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except (OSError, ValueError):
        return False


def expand(path: Path) -> tuple[list[Path], tuple[str, str] | None]:
    """(the files that a path stands for, or (reason, fix) where it stands for none)."""
    if _is_folder(path):
        return _folder(path)
    if is_file(path) or not glob.has_magic(str(path)):
        return [path], None  # whether it is there and sound is told with its defects
    found = sorted(Path(p) for p in glob.glob(str(path), recursive=True) if is_file(Path(p)))
    return found, None if found else ("it matches no file", "correct the pattern")


def _folder(path: Path) -> tuple[list[Path], tuple[str, str] | None]:
    if (path / "state.json").is_file():
        return _saved(path)
    if (path / "dataset_dict.json").is_file():
        splits = sorted(p.parent for p in path.glob("*/state.json"))
        train = [p for p in splits if p.name == "train"] or (splits if len(splits) == 1 else [])
        if train:
            return _saved(train[0])
        return [], (
            f"it holds the splits {', '.join(p.name for p in splits) or '(none)'}",
            "name the folder of one of them",
        )
    if (path / DATASET_INFO).is_file():
        return [path / DATASET_INFO], None
    files = [p for p in sorted(path.rglob("*")) if p.is_file() and kind_of(p) in READ]
    files = [p for p in files if not any(q.startswith(".") for q in p.relative_to(path).parts)]
    if found := _splits(files):
        first = min(p for p in files if _split_of(p) == found[0])
        ending = first.name[first.name.index(".") :]
        return [], (
            f"it holds the splits {', '.join(found)}, and one to test on must not be learned",
            f'name the files of one, such as "{first.parent / found[0]}*{ending}"',
        )
    fix = f"put files of rows there ({', '.join(READ)}), or name another folder"
    return files, None if files else ("the folder holds no file of rows", fix)


def _splits(files: list[Path]) -> list[str]:
    """The splits of files that are named as the Hugging Face hub names them; none where there is
    one, or none to train on."""
    names = {_split_of(p) for p in files} - {""}
    found = sorted(names, key=lambda name: (name != "train", name))
    return found if len(found) > 1 and found[0] == "train" else []


def _split_of(path: Path) -> str:
    named = SPLIT.match(path.name.lower())
    return named[1] if named else ""


def _saved(path: Path) -> tuple[list[Path], tuple[str, str] | None]:
    """The files of a data set that `datasets` saved, in its order."""
    fault = "not a folder of save_to_disk", "save it again: dataset.save_to_disk(...)"
    try:
        state = json.loads((path / "state.json").read_text("utf-8"))
        names = [file["filename"] for file in state["_data_files"]]
        away = any(Path(name).name != name for name in names)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return [], fault
    if not names or away:
        return [], fault
    return [path / name for name in names], None
