"""The data files that are pushed for a job: folders and patterns are expanded, and tables that need
a package which the box may not have are converted to JSON lines."""

from __future__ import annotations

import gzip
from pathlib import Path

from ops.box.transfer import PushFile, sha256_of
from ops.errors import PreflightError
from ops.job.job_file import JobFile
from trainer.data import tables
from trainer.data.folders import DATASET_INFO, expand, is_file, kind_of
from trainer.data.mistakes import grouped
from trainer.data.scan import Broken
from trainer.data.sources import Reading, find_sources
from trainer.wire.stages import STAGES


def data_files(job: JobFile, folder: Path, first: int = 0) -> list[PushFile]:
    """Every file of rows, the held-out one last, numbered from `first` on the box. Converted files
    are written to `folder`. Raises PreflightError for a file that does not exist or cannot be
    read."""
    data = job.data
    given = [file for path in data.files for file in _expanded(path)]
    wanted = _with_listed_files(given, STAGES[job.stage].learns_preferences)
    if data.held_out_file:
        held_out = _expanded(data.held_out_file)
        if len(held_out) > 1:
            raise PreflightError(
                f"{data.held_out_file}: it stands for {len(held_out)} files",
                hint="name one file in data.held_out",
            )
        wanted += held_out
    missing = [p for p in wanted if not is_file(p)]
    if missing:
        raise PreflightError(
            "\n".join(f"{p}: no such file" for p in missing), hint="edit data.files in the job file"
        )
    return [_push_file(path, n, folder) for n, path in enumerate(wanted, first)]


def _expanded(path: Path) -> list[Path]:
    files, defect = expand(path)
    if defect:
        raise PreflightError(f"{path}: {defect[0]}", hint=defect[1])
    return files


def _with_listed_files(files: list[Path], preferences: bool) -> list[Path]:
    """`files`, and the files that they name when they are only LLaMA-Factory's dataset_info.json:
    the box needs both."""
    if not all(p.name == DATASET_INFO and is_file(p) for p in files):
        return files
    sources, defects = find_sources(files, Reading(), preferences)
    if defects:
        raise PreflightError(
            "\n".join(grouped(str(d) for d in defects)),
            hint="correct the file, or name the data files themselves in data.files",
        )
    return [*files, *(s.path for s in sources)]


def _push_file(path: Path, number: int, folder: Path) -> PushFile:
    """The file under a name of ours on the box, because a user's may have characters that a shell
    interprets. Errors show the user's name, so a converted file keeps it here."""
    kind = kind_of(path)
    if kind in tables.NEEDS_PACKAGE:
        local = folder / "converted" / str(number) / path.name
        local.parent.mkdir(parents=True)
        convert(path, local)
        return PushFile(local, f"data/{number}.jsonl.gz", sha256_of(local))
    packed = ".gz" if path.name.lower().endswith(".gz") else ""
    suffix = kind + packed if kind[1:].isalnum() else ""
    return PushFile(path, f"data/{number}{suffix}", sha256_of(path))


def convert(table: Path, to: Path) -> None:
    """Write a table's rows as gzipped JSON lines. A row is on the line with its number in the
    table, so that errors name the same place. Raises PreflightError for what cannot be read."""
    with open(to, "wb") as raw, gzip.GzipFile("", "wb", 6, raw, mtime=0) as file:
        line = 1
        for item in tables.rows(table, kind_of(table)):
            if isinstance(item, Broken):
                place = f"{table.name}:{item.line}:{item.column}"
                raise PreflightError(f"{place}: {item.reason}", hint=item.fix)
            file.write(b"\n" * (item[0].line - line))
            file.write((tables.as_json_line(item) + "\n").encode("utf-8", "surrogatepass"))
            line = item[0].line + 1
