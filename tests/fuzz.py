"""Spoiled inputs to every parser that meets bytes of a box, of the API or of a user.

    python tests/fuzz.py [INPUTS] [--seed 7] [--workers 2] [--only NAME] [--corpus FOLDER]
                                         last line: `INPUTS inputs, 0 failures`

A parser may refuse an input by an error that its callers expect (`Target.known`); any other
exception, more than SECONDS, or more than MEMORY is a failure: it is told with its traceback and
the smallest input that still shows it, as base64. Inputs are small valid ones, made here by the
project itself (and any file of FOLDER), spoiled by `mutations.Mutator`; equal seeds give equal
inputs.
"""

from __future__ import annotations

import argparse
import base64
import gzip
import io
import json
import multiprocessing
import os
import queue
import random
import resource
import signal
import sys
import tempfile
import time
import traceback
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import requests  # noqa: E402
import urllib3  # noqa: E402
from mutations import Mutator  # noqa: E402

import rig  # noqa: E402
from ops.box import facts, scripts  # noqa: E402
from ops.cli.screen import JsonLines, Terminal  # noqa: E402
from ops.errors import (  # noqa: E402
    AdapterError,
    ConfigError,
    JournalError,
    MarketError,
    PreflightError,
)
from ops.job import config, data_files, lengths, model_shape, needs, pushes, wire_job  # noqa: E402
from ops.job.adapters import Adapters  # noqa: E402
from ops.market import client  # noqa: E402
from ops.market.client import Vast  # noqa: E402
from ops.market.provider import Provider  # noqa: E402
from ops.market.ranking import Needs, rank  # noqa: E402
from ops.market.workload import Workload  # noqa: E402
from ops.plain import plain  # noqa: E402
from ops.run import follow, journal, place, result, retrieve, sandbox, wishes  # noqa: E402
from ops.run.expected import ExpectedResult  # noqa: E402
from trainer.data import files, template  # noqa: E402
from trainer.data.sources import Reading, find_sources  # noqa: E402
from trainer.data.stage_rows import READERS, conversations  # noqa: E402
from trainer.wire import events, tensors  # noqa: E402
from trainer.wire.job import Job  # noqa: E402

SECONDS = 5.0
HANGS_S = 60.0
MEMORY = 1 << 30  # bytes held at once, beyond what the imports took
TRIES = 400  # of making a failing input smaller


class TooSlow(Exception):
    """A parser took more than SECONDS."""


class TooLarge(Exception):
    """A parser held more than MEMORY."""


@dataclass(frozen=True)
class Target:
    """A parser. `corpus` is the valid inputs by name; `parse` is called with the name, the spoiled
    bytes and an empty folder, and may raise `known`."""

    corpus: dict[str, bytes]
    parse: Callable[[str, bytes, Path], object]
    known: tuple[type[Exception], ...] = ()
    share: float = 1.0  # of an equal part of the inputs: less where a parse takes long


# -- what a box sends ------------------------------------------------------------------------------

STORY = """\
{"t":1.0,"event":"loading","what":"the model","done_bytes":5,"total_bytes":9}
{"t":1.0,"event":"started","step":0,"total_steps":2,"kernels":{"norm":"triton"},"versions":{}}
{"t":2.0,"event":"step","step":1,"loss":2.0,"learning_rate":0.1,"grad_norm":1.0,"eta_s":3.0}
{"t":3.0,"event":"checkpoint","step":1,"path":"checkpoints/1","manifest_sha256":"00"}
{"t":4.0,"event":"sample","prompt":"q","expected":"a","before":"b","after":"a"}
{"t":4.0,"event":"score","rows":2,"exact_match_before":0.0,"exact_match_after":0.5}
{"t":4.0,"event":"measured","rows":2,"numbers":{"accuracy":[0.5,0.75]}}
{"t":5.0,"event":"warning","message":"slow"}
{"t":5.0,"event":"failed","reason":"NaN","samples":["rows.json:1"],"hint":"lower the rate"}
{"t":6.0,"event":"finished","steps":2,"final_loss":1.0,"seconds":1,"adapter_sha256":"00"}
{"t":7.0,"event":"tomorrow","more":[1,{"a":null}]}
"""
FACTS = """\
=milktea-facts= gpu
NVIDIA GeForce RTX 4090, 24564, 570.124.06, 8.9, [N/A]
=milktea-facts= gpu-exit
0
=milktea-facts= disk
Filesystem     1024-blocks    Used Available Capacity Mounted on
overlay           52428800 1048576  51380224       2% /
=milktea-facts= memory
67430000000
68719476736
=milktea-facts= shm
Filesystem     1024-blocks    Used Available Capacity Mounted on
shm                  65536       0     65536       0% /dev/shm
"""
EXPECTED = facts.ExpectedMachine("RTX 4090", 1, 24.0, 40.0, 12.8, 16.0)


def read_events(name: str, data: bytes, folder: Path) -> None:
    """As `follow` and both screens do."""
    from rich.console import Console

    lines, used = events.whole_lines(data)
    assert used <= len(data)
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        console = Console(file=nowhere, force_terminal=True, width=60)
        screens = [Terminal(console), JsonLines()]
        before, sys.stdout = sys.stdout, nowhere
        try:
            for event in events.readable(lines)[0]:
                for screen in screens:
                    screen.event(event, 0.1, 1.0, 2e9)
        finally:
            sys.stdout = before


def read_report(name: str, data: bytes, folder: Path) -> None:
    """Facts of a verified manifest, and events, become report.html."""
    told = folder / "events.jsonl"
    told.write_bytes(data if name == "events" else STORY.encode())
    manifest = tensors.strict_json(data) if name == "manifest" else {}
    if not isinstance(manifest, dict):
        return
    shown = {k: manifest[k] for k in sandbox.REPORTED if k in manifest}
    shown["curve"] = manifest.get("curve")
    retrieve.report(JOB, shown, told, {"cost": "1 $"})


def read_facts(name: str, data: bytes, folder: Path) -> None:
    facts.unsuitable(facts.parse(data.decode("utf-8", "replace")), EXPECTED)


def read_poll(name: str, data: bytes, folder: Path) -> None:
    scripts.parse_poll(data)


def read_tensors(name: str, data: bytes, folder: Path) -> None:
    list(tensors.read(io.BytesIO(data), len(data)))


def read_checkpoint(name: str, data: bytes, folder: Path) -> None:
    follow._manifest_files(json.loads(data.decode("utf-8"))["files"], 1 << 30)


def read_archive(name: str, data: bytes, folder: Path) -> None:
    """A box whose manifest tells of the archive what is so."""
    path = folder / "adapter.zip"
    path.write_bytes(data)
    honest = rig.listed({"adapter.zip": data})
    result.verify(path, MANIFEST | {"files": honest}, EXPECT)


def read_member(name: str, data: bytes, folder: Path) -> None:
    """A member of the archive, whatever the manifest says of it being so."""
    members = MEMBERS | {name: data}
    with zipfile.ZipFile(folder / "adapter.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for member, content in members.items():
            archive.writestr(member, content)
    honest = rig.listed({"adapter.zip": (folder / "adapter.zip").read_bytes()})
    manifest = MANIFEST | {"files": honest, "members": rig.listed(members)}
    result.verify(folder / "adapter.zip", manifest, EXPECT)


def read_manifest(name: str, data: bytes, folder: Path) -> None:
    """In the process that looks at it, but for its limits."""
    (folder / "manifest.json").write_bytes(data)
    (folder / "adapter.zip").write_bytes(ARCHIVE)
    asked = {"manifest": str(folder / "manifest.json"), "names": ["adapter.zip", "loss.png"]}
    asked |= {"memory": sandbox.MAX_MEMORY}
    expect = {k: getattr(EXPECT, k) for k in EXPECT.__dataclass_fields__}
    more = {"archive": str(folder / "adapter.zip"), "expect": expect}
    for request in (asked, asked | more):
        json.dumps(sandbox._answer(request))


# -- what the API answers --------------------------------------------------------------------------


class Answering(requests.adapters.HTTPAdapter):
    """In place of the network: every request gets the same answer."""

    def __init__(self) -> None:
        super().__init__()
        self.answer, self.status = b"", 200

    def send(self, request: Any, *told: Any, **more: Any) -> requests.Response:
        body = io.BytesIO(self.answer)
        raw = urllib3.HTTPResponse(body, status=self.status, preload_content=False)
        return self.build_response(request, raw)


class Hasty:
    """A clock whose waiting takes no time."""

    pace = 1.0

    def __init__(self) -> None:
        self._t = 1.7e9

    def now(self) -> float:
        return self._t

    steady = now

    def sleep(self, seconds: float) -> None:
        self._t += 40 * seconds  # a question is asked again once or twice


def api() -> tuple[Answering, Vast]:
    client.MAX_PAGES = 3  # each answer says that there is more
    server = Answering()
    requests.Session.get_adapter = lambda session, url: server  # type: ignore[method-assign]
    return server, Vast(Provider("http://127.0.0.1:1", "key"), Hasty())


def read_api(server: Answering, vast: Vast) -> Callable[[str, bytes, Path], None]:
    work = Workload(1e5, 1e9, disk_gib=40, image_bytes=4e8, model_download_bytes=1e9)
    calls: dict[str, Callable[[], object]] = {
        "user": vast.credit_usd,
        "instances": vast.instances,
        "labels": vast.labels,
        "instance": lambda: vast.instance(7),
        "charges": lambda: vast.charges(7, 1.6e9),
        "destroy": lambda: vast.destroy(7),
        "log": lambda: vast.container_log(7),
        "create": lambda: vast.create(
            1, image="i", disk_gib=8, label="l", env={}, onstart="", bid_usd_per_hour=None
        ),
    }

    def parse(name: str, data: bytes, folder: Path) -> None:
        call, _, status = name.partition(" ")
        server.answer, server.status = data, int(status or 200)
        vast._last_call.clear()
        if call == "offers":
            offers, _ = vast.search({}, interruptible=False, disk_gib=40)
            ranked = rank(offers, Needs(disk_gib=40), work)
            json.dumps([p.why for p in ranked.accepted] + [ranked.advice()])
        else:
            calls[call]()

    return parse


# -- what a user has -------------------------------------------------------------------------------


def read_rows(name: str, data: bytes, folder: Path) -> None:
    """Every reader of rows; what is sound can be written to a box's disk and tokenised."""
    path = folder / name
    path.write_bytes(data)
    for reader in READERS.values():
        drop = "drop" if zlib.crc32(data) % 2 else "refuse"
        found, defects = reader.read([(path, name)], Reading(bad_rows=drop), [])
        for row in found:
            for sound in conversations(row):
                "".join(turn.text + turn.extra for turn in sound.turns).encode("utf-8")
        for defect in defects:
            plain(str(defect)).encode("utf-8")


def read_converted(name: str, data: bytes, folder: Path) -> None:
    path = folder / name
    path.write_bytes(data)
    data_files.convert(path, folder / "rows.jsonl.gz")


def read_registry(name: str, data: bytes, folder: Path) -> None:
    (folder / "rows.json").write_text(ROWS)
    (folder / name).write_bytes(data)
    (folder / "data-00000.arrow").write_bytes(b"ARROW1")
    given = folder if name == "state.json" else folder / name
    for preferences in (False, True):
        sources, defects = find_sources([given], Reading(), preferences)
        for source in sources:
            assert source.path.resolve().is_relative_to(folder.resolve()), source.path
        for defect in defects:
            plain(str(defect)).encode("utf-8")
    report = files.examine_files([given])
    plain(str(report)).encode("utf-8")


def read_job_toml(name: str, data: bytes, folder: Path) -> None:
    (folder / "job.toml").write_bytes(data)
    config.load(folder / "job.toml")


def read_wire_job(name: str, data: bytes, folder: Path) -> None:
    Job.model_validate_json(data).text().encode("utf-8")


def read_template(name: str, data: bytes, folder: Path) -> None:
    (folder / name).write_bytes(data)
    template.load(*wire_job.template_of(str(folder / name)))


def read_plan(name: str, data: bytes, folder: Path) -> None:
    """As `milktea plan` counts the tokens of a job's rows."""
    path = folder / name
    path.write_bytes(data)
    model = ROOT / "trainer/practice/practice_model"
    told = JOB_FILE | {"model": {"base": str(model)}, "data": {"files": [str(path)]}}
    job = config.parse(told, folder / "job.toml")
    (folder / "stage").mkdir()
    sent = [*data_files.data_files(job, folder / "stage"), *pushes.model_files(job)]
    files = [p for p in sent if p.remote.startswith("data/")]
    wire = wire_job.make_wire_job(job, "fuzz-1", [job], [files], [Adapters()])
    lengths.lengths_of(wire, folder / "stage", ".", sent, [])


def read_model_config(name: str, data: bytes, folder: Path) -> None:
    """As the plan does, before it asks for an offer."""
    (folder / "config.json").write_bytes(data)
    job = config.parse(JOB_FILE | {"model": {"base": str(folder)}}, folder / "job.toml")
    notes: list[str] = []
    told = model_shape.model_config(job, notes)
    shape = model_shape.shape_of(job, told, model_shape.family_of(job, told, 100, notes), notes)
    needs.needs_of(job, needs.workload_of(job, [100, 50], shape, []), shape)


def read_journal(name: str, data: bytes, folder: Path) -> None:
    (folder / journal.FILE).write_bytes(data)
    (folder / wishes.FILE).write_bytes(data)
    place.of_folder(folder)
    wishes.read(folder)
    place.remembered(journal.read(folder))


# -- valid inputs ----------------------------------------------------------------------------------

ALPACA = [
    {"instruction": "Say 茶", "input": "", "output": "tea"},
    {"instruction": "2+2", "input": "as a number", "output": "4", "history": [["a", "b"]]},
]
TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello", "reasoning_content": "greet", "weight": 1},
]
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
CALLS = [
    {"role": "user", "content": [{"type": "text", "text": "weather?"}]},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": "{}"}}],
    },
    {"role": "tool", "tool_call_id": "1", "content": "sun"},
    {"role": "assistant", "content": "It is sunny."},
]
SHAREGPT = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yo"}]
LINES: dict[str, list[Any]] = {
    "alpaca.jsonl": ALPACA,
    "messages.jsonl": [{"messages": TURNS}, {"messages": CALLS, "tools": TOOLS}],
    "sharegpt.jsonl": [{"conversations": SHAREGPT, "system": "s", "tools": "[]"}],
    "prompt.jsonl": [
        {"prompt": "a", "completion": "b"},
        {"prompt": TURNS[:2], "completion": CALLS},
    ],
    "text.jsonl": [{"text": "a document"}, {"text": "another"}],
    "ranking.jsonl": [{"instruction": "q", "input": "", "chosen": "a", "rejected": "b"}],
    "dpo.jsonl": [{"prompt": "q", "chosen": "a", "rejected": "b", "margin": 0.5}],
    "pairs.jsonl": [
        {"chosen": TURNS, "rejected": [*TURNS[:2], {"role": "assistant", "content": "x"}]}
    ],
    "kto.jsonl": [
        {"messages": TURNS, "label": True},
        {"prompt": "q", "completion": "a", "label": False},
    ],
    "compared.jsonl": [{"instruction": "q", "input": "", "output": ["better", "worse"]}],
}
ROWS = json.dumps(ALPACA, ensure_ascii=False)
REGISTRY = {
    "mine": {"file_name": "rows.json", "columns": {"prompt": "instruction", "response": "output"}},
    "talk": {
        "file_name": "rows.json",
        "formatting": "sharegpt",
        "columns": {"messages": "conversations"},
        "tags": {"role_tag": "from", "content_tag": "value", "user_tag": "human"},
        "num_samples": 5,
    },
    "hub": {"hf_hub_url": "somebody/rows"},
    "ranked": {"file_name": "rows.json", "ranking": True},
}
STATE = {"_data_files": [{"filename": "data-00000.arrow"}], "_fingerprint": "0"}
JOB_FILE: dict[str, Any] = {
    "name": "fuzz",
    "model": {"base": "practice"},
    "data": {"files": ["rows.json"]},
    "limits": {"max_usd": 1.0},
}
CHECKPOINT = {"step": 1, "files": {"state.bin": {"sha256": "0" * 64, "bytes": 500}}}
CONFIGS = {
    "llama": {
        "model_type": "llama", "vocab_size": 128, "hidden_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 4, "intermediate_size": 128,
        "tie_word_embeddings": False, "max_position_embeddings": 2048,
        "rope_scaling": {"rope_type": "llama3", "factor": 8.0},
    },
    "moe": {
        "model_type": "qwen3_moe", "vocab_size": 128, "hidden_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
        "intermediate_size": 128, "moe_intermediate_size": 32, "num_experts": 8,
        "num_experts_per_tok": 2, "max_position_embeddings": 2048,
    },
    "tower": {
        "model_type": "gemma3", "vision_config": {},
        "text_config": {
            "model_type": "gemma3_text", "vocab_size": 128, "hidden_size": 64,
            "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
            "head_dim": 16, "intermediate_size": 128, "sliding_window": 512,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    },
    "gpt2": {
        "model_type": "gpt2", "vocab_size": 128, "n_embd": 64, "n_head": 4, "n_layer": 2,
        "n_positions": 1024,
    },
    "quantised": {
        "model_type": "qwen3_5", "quantization_config": {"quant_method": "fp8"},
        "text_config": {
            "model_type": "qwen3_5_text", "vocab_size": 128, "hidden_size": 64,
            "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
            "head_dim": 16, "intermediate_size": 128, "linear_num_value_heads": 4,
            "linear_num_key_heads": 2, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
            "layer_types": ["linear_attention", "full_attention"] * 2,
        },
    },
}  # fmt: skip
OFFER = {
    "id": 7, "ask_contract_id": 7, "machine_id": 11, "host_id": 12, "gpu_name": "RTX 4090",
    "num_gpus": 1, "gpu_ram": 24564, "compute_cap": 890, "cuda_max_good": 13.0, "cpu_ram": 64000,
    "gpu_frac": 1.0, "disk_space": 500.0, "dph_base": 0.3, "dph_total": 0.35, "min_bid": 0.1,
    "storage_cost": 0.2, "storage_total_cost": 0.05, "inet_up": 500, "inet_down": 900.0,
    "inet_up_cost": 0.01, "inet_down_cost": 0.01, "reliability2": 0.99, "geolocation": "Berlin, DE",
    "duration": 1e6, "verification": "verified", "direct_port_count": 10, "score": 400.0,
    "rentable": True, "rented": False, "dlperf": 80.0, "gpu_mem_bw": 900.0, "disk_bw": 2000.0,
    "cpu_cores_effective": 16.0,
}  # fmt: skip
INSTANCE = {
    "id": 7, "label": "milktea-run-1", "machine_id": 11, "actual_status": "running",
    "intended_status": "running", "cur_state": "running", "next_state": "running",
    "status_msg": "ok", "gpu_name": "RTX 4090", "num_gpus": 1, "dph_total": 0.35,
    "disk_space": 40.0, "is_bid": False, "ssh_host": "ssh5.vast.ai", "ssh_port": 30022,
    "public_ipaddr": "1.2.3.4\n", "ports": {"22/tcp": [{"HostIp": "0.0.0.0", "HostPort": "30"}]},
    "end_date": 2e9, "storage_cost": 0.2, "inet_up_cost": 0.01, "inet_down_cost": None,
}  # fmt: skip
BILL = {"type": "gpu", "amount": "0.125", "description": "RTX 4090, 0.4 h"}
CHARGES = [{"source": "instance-7", "start": 1.7e9, "items": [BILL]}]
REFUSAL = {"success": False, "error": "insufficient_credit", "msg": "no", "new_contract": 7}
ANSWERS: dict[str, Any] = {
    "user": {"id": 42, "credit": 12.5, "email": "x@y"},
    "offers": {"offers": [OFFER, OFFER | {"id": 8, "ask_contract_id": 8, "dph_base": 0.2}]},
    "instances": {"instances": [INSTANCE, INSTANCE | {"id": 8}], "next_token": None},
    "labels": {"instances": [INSTANCE], "next_token": ""},
    "instance": {"instances": INSTANCE},
    "charges": {"results": CHARGES, "next_token": None},
    "destroy": {"success": True},
    "destroy 404": {"success": False, "error": "no_such_instance", "msg": "gone"},
    "log": {"success": True, "result_url": "http://127.0.0.1:1/log.txt"},
    "create": {"success": True, "new_contract": 7},
    "create 400": REFUSAL,
    "create 429": {"detail": "slow down"},
    "instances 502": {"msg": "bad gateway"},
    "user 403": {"error": "auth_error", "msg": "Invalid user key"},
}
GOLDEN = ROOT / "tests/trainer/wire/golden"
JOB: dict[str, Any] = Job.model_validate_json((GOLDEN / "job.json").read_bytes()).model_dump()
MANIFEST: dict[str, Any] = {}  # of the rig's adapter, with its archive and members
ARCHIVE = b""
MEMBERS: dict[str, bytes] = {}
EXPECT = ExpectedResult("stub", 4, ("0" * 64,), lora_alpha=8, target_modules=("q_proj",))


def make_adapter() -> None:
    global ARCHIVE
    with tempfile.TemporaryDirectory() as name:
        MANIFEST.update(rig.adapter(Path(name) / "result", "0" * 64))
        ARCHIVE = (Path(name) / "result/adapter.zip").read_bytes()
    with zipfile.ZipFile(io.BytesIO(ARCHIVE)) as archive:
        MEMBERS.update({n: archive.read(n) for n in archive.namelist()})


def json_bytes(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode()


def tables() -> dict[str, bytes]:
    """The rows in every other layout that is read."""
    import openpyxl
    import pyarrow
    from pyarrow import ipc, parquet

    made = {"rows.json": ROWS.encode(), "wrapped.json": b'{"data": %s}' % ROWS.encode()}
    made["text.txt"] = "first line\n\u8336\n\nlast".encode()
    made["rows.csv"] = b'instruction,output\r\n"a, ""b""",c\r\nd,"e\nf"\r\n'
    made["rows.tsv"] = b"messages\toutput\n" + json_bytes(TURNS) + b"\tx\n"
    made["packed.jsonl.gz"] = gzip.compress(b"\n".join(map(json_bytes, ALPACA)), mtime=0)
    book, out = openpyxl.Workbook(), io.BytesIO()
    for line in (["instruction", "output"], ["a", 4], ["b", 3.5], ["c", True]):
        book.active.append(line)
    book.save(out)
    made["rows.xlsx"] = out.getvalue()
    table = pyarrow.Table.from_pylist([{"messages": TURNS[:2]}, {"messages": TURNS}])
    out = io.BytesIO()
    parquet.write_table(table, out)
    made["rows.parquet"] = out.getvalue()
    for name, new in (("rows.arrow", ipc.new_stream), ("file.arrow", ipc.new_file)):
        out = io.BytesIO()
        with new(out, table.schema) as writer:
            writer.write_table(table)
        made[name] = out.getvalue()
    return made


def targets(corpus: Path | None) -> dict[str, Target]:
    """Every parser, by name."""
    make_adapter()
    rows = {n: b"\n".join(map(json_bytes, lines)) + b"\n" for n, lines in LINES.items()} | tables()
    for path in sorted(corpus.iterdir()) if corpus else []:
        if path.is_file() and path.stat().st_size < 1 << 16:
            rows[path.name] = path.read_bytes()
    kept = {n: d for n, d in rows.items() if n.endswith((".xlsx", ".parquet", ".arrow"))}
    poll = b"=milktea= - yes 900\n" + STORY.encode()
    written = {n: (ROOT / n).read_bytes() for n in ("jobs/practice.toml", "jobs/reference.toml")}
    forms = {p.name: p.read_bytes() for p in template.FOLDER.glob("*.toml")}
    forms |= {"mine.txt": b"Q: {instruction}\n{input}\nA: {output}"}
    forms["lora.json"] = json_bytes(
        {"prompt_input": "{instruction}{input}", "prompt_no_input": "x"}
    )
    lines = [{"n": 0, "t": 1.0, "kind": "planned", "version": 1}]
    lines += [{"n": 1, "t": 2.0, "kind": place.KIND, "url": "https://x", "account": "42"}]
    told = b"\n".join(map(json_bytes, lines)) + b"\n"
    manifest = {"manifest": json_bytes(MANIFEST)}
    server, vast = api()
    return {
        "events": Target({"events": STORY.encode()}, read_events),
        "report": Target({"events": STORY.encode()} | manifest, read_report, (ValueError,), 0.5),
        "facts": Target({"facts": FACTS.encode()}, read_facts),
        "poll": Target({"poll": poll}, read_poll, (ValueError,)),
        "safetensors": Target(
            {n: d for n, d in MEMBERS.items() if "safetensors" in n}, read_tensors, (ValueError,)
        ),
        "checkpoint": Target({"c": json_bytes(CHECKPOINT)}, read_checkpoint, follow.BAD_MANIFEST),
        "archive": Target({"adapter.zip": ARCHIVE}, read_archive, (AdapterError,)),
        "member": Target(dict(MEMBERS), read_member, (AdapterError,)),
        "manifest": Target(manifest, read_manifest),
        "api": Target(
            {n: json_bytes(v) for n, v in ANSWERS.items()},
            read_api(server, vast),
            (MarketError,),
            3,
        ),
        "rows": Target(rows, read_rows, (), 3),
        "converted": Target(kept, read_converted, (PreflightError,), 0.5),
        "registry": Target(
            {"dataset_info.json": json_bytes(REGISTRY), "state.json": json_bytes(STATE)},
            read_registry,
        ),
        "job file": Target(written, read_job_toml, (ConfigError,)),
        "wire job": Target(
            {"job.json": (GOLDEN / "job.json").read_bytes()}, read_wire_job, (ValueError,)
        ),
        "template": Target(forms, read_template, (template.TemplateError, ConfigError)),
        "model config": Target(
            {n: json_bytes(c) for n, c in CONFIGS.items()}, read_model_config, (PreflightError,)
        ),
        "journal": Target({"journal": told}, read_journal, (JournalError,)),
        "plan": Target(rows, read_plan, (PreflightError,), 0.1),
    }


# -- the run ---------------------------------------------------------------------------------------


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """Seconds of a processor, and HANGS_S by the clock in which this process did not wait for one:
    the machine may have other work."""
    timers = {signal.ITIMER_PROF: seconds, signal.ITIMER_REAL: HANGS_S}
    waited = _waited_s()

    def late(*_: object) -> None:
        raise TooSlow(f"more than {seconds:.0f} s")

    def hangs(*_: object) -> None:
        nonlocal waited
        before, waited = waited, _waited_s()
        if waited - before < 1:
            raise TooSlow(f"stands still for {HANGS_S:.0f} s")
        signal.setitimer(signal.ITIMER_REAL, waited - before)

    signal.signal(signal.SIGPROF, late)
    signal.signal(signal.SIGALRM, hangs)
    try:
        for timer, most in timers.items():
            signal.setitimer(timer, most)
        yield
    finally:
        for timer in timers:
            signal.setitimer(timer, 0)


def _waited_s() -> float:
    """Seconds for which this process could run and had no processor; 0 where no kernel counts."""
    with suppress(OSError, ValueError, IndexError):
        return int(Path("/proc/self/schedstat").read_text().split()[1]) / 1e9
    return 0.0


def fault(target: Target, name: str, data: bytes) -> BaseException | None:
    """What is wrong with how `target` takes the input; None where nothing is."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as at:
        before = most_held()
        try:
            with within(SECONDS):
                target.parse(name, data, Path(at))
        except target.known:
            pass
        except Exception as error:
            return error
        if most_held() - before > MEMORY / 4 and (grown := held_by(target, name, data)) > MEMORY:
            return TooLarge(f"{grown >> 20} MiB")
    return None


def most_held() -> int:
    """Bytes of memory that this process held at most until now."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def held_by(target: Target, name: str, data: bytes) -> int:
    """Bytes that one parse takes, by a process of its own."""
    answer, question = multiprocessing.Pipe(False)

    def parse() -> None:
        Path("/proc/self/clear_refs").write_text("5")  # the peak is counted anew
        before = _peak()
        with suppress(Exception), tempfile.TemporaryDirectory() as at:
            target.parse(name, data, Path(at))
        question.send(_peak() - before)

    child = multiprocessing.get_context("fork").Process(target=parse)
    child.start()
    question.close()
    try:
        return int(answer.recv())
    finally:
        child.join()


def _peak() -> int:
    [line] = [x for x in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in x]
    return int(line.split()[1]) * 1024


def kind_of(error: BaseException) -> str:
    """The type, and where in our own code it was raised or passed."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [f for f in frames if f.filename.startswith((str(ROOT / "ops"), str(ROOT / "trainer")))]
    at = f"{ours[-1].filename.removeprefix(str(ROOT))[1:]}:{ours[-1].lineno}" if ours else "no line"
    return f"{type(error).__name__} at {at}"


def smallest(target: Target, name: str, data: bytes, kind: str) -> bytes:
    """The input without whatever is not needed for a failure of this kind."""
    piece, tries = max(1, len(data) // 2), 0
    began = time.monotonic()
    while piece and tries < TRIES and time.monotonic() - began < 30:
        at, found = 0, False
        while at < len(data) and tries < TRIES:
            less = data[:at] + data[at + piece :]
            tries += 1
            error = fault(target, name, less)
            if error is not None and kind_of(error) == kind:
                data, found = less, True
            else:
                at += piece
        piece = piece if found and piece > 1 else piece // 2
    return data


def input_of(target: Target, seed: str) -> tuple[str, bytes]:
    """(name, spoiled bytes): equal seeds give equal inputs."""
    rng = random.Random(seed)
    name = rng.choice(sorted(target.corpus))
    mutator, data = Mutator(rng), target.corpus[name]
    if data[:2] == b"\x1f\x8b" and rng.random() < 0.5:
        return name, gzip.compress(
            mutator.of(gzip.decompress(data), list(target.corpus.values())), 1
        )
    if data[:4] == b"PK\3\4" and rng.random() < 0.6:
        return name, repacked(data, rng, mutator)
    return name, mutator.of(data, list(target.corpus.values()))


def repacked(data: bytes, rng: random.Random, mutator: Mutator) -> bytes:
    """An archive with one member spoiled, its checksum made anew."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w") as new:
        spoiled = rng.choice(old.namelist())
        for member in old.namelist():
            content = old.read(member)
            new.writestr(member, mutator.of(content, [content]) if member == spoiled else content)
    return out.getvalue()


def parts(known: dict[str, Target], total: int) -> dict[str, int]:
    """How many inputs each target gets; they add up to `total`."""
    whole = sum(t.share for t in known.values())
    counts = {name: int(total * t.share / whole) for name, t in known.items()}
    counts[next(iter(counts))] += total - sum(counts.values())
    return counts


def work(worker: int, options: argparse.Namespace, results: Any) -> None:
    known = {n: t for n, t in targets(options.corpus).items() if options.only in ("", n)}
    resource.setrlimit(resource.RLIMIT_AS, (8 * MEMORY, 8 * MEMORY))  # never the machine's end
    told: set[str] = set()
    for name, count in parts(known, options.inputs).items():
        began, done, failures = time.monotonic(), 0, 0
        for n in range(worker, count, options.workers):
            seed = f"{options.seed} {name} {n}"
            options.now[worker].value = seed.encode()[:200]
            input_name, data = input_of(known[name], seed)
            error = fault(known[name], input_name, data)
            done += 1
            if error is None:
                continue
            failures += 1
            kind = kind_of(error)
            if kind not in told:
                told.add(kind)
                least = smallest(known[name], input_name, data, kind)
                trace = "".join(traceback.format_exception(error)[-4:])[-3000:]
                results.put(("failure", f"{seed} ({input_name}): {kind}\n{trace}"
                             f"  smallest, of {len(data)} bytes {len(least)}: "
                             f"{base64.b64encode(least[:3000]).decode()}"))  # fmt: skip
        results.put(("done", (name, done, failures, time.monotonic() - began)))
    results.put(("over", None))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("inputs", nargs="?", type=int, default=250_000)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--only", default="", help="one parser's name")
    parser.add_argument("--corpus", type=Path, help="a folder of files of rows, beside our own")
    options = parser.parse_args()
    os.environ["ARROW_DEFAULT_MEMORY_POOL"] = "system"  # its own reserves a gigabyte
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    options.now = [context.Array("c", 201) for _ in range(options.workers)]
    began = time.monotonic()
    workers = [
        context.Process(target=work, args=(w, options, results)) for w in range(options.workers)
    ]
    for worker in workers:
        worker.start()
    counts: dict[str, list[float]] = {}
    kinds: set[str] = set()
    over = 0
    while over < len(workers):
        try:
            what, said = results.get(timeout=5)
        except queue.Empty:
            for n, worker in enumerate(workers):
                if not worker.is_alive() and worker.exitcode:
                    print(f"died of {worker.exitcode} at input {options.now[n].value.decode()}")
                    for other in workers:
                        other.terminate()
                    return 1
            continue
        over += what == "over"
        if what == "failure":
            print(said, flush=True)
            kinds.add(said.split(": ", 1)[1].split("\n")[0])
        elif what == "done":
            name, done, failures, seconds = said
            counts[name] = [
                a + b for a, b in zip(counts.get(name, [0, 0, 0]), said[1:], strict=True)
            ]
    for name, (done, failed, seconds) in counts.items():
        print(f"{done:8.0f} {name:<14} {failed:6.0f} failures {seconds:6.1f} s")
    failures = sum(int(c[1]) for c in counts.values())
    print(f"{time.monotonic() - began:.0f} s, {len(kinds)} kinds of failure")
    print(f"{sum(int(c[0]) for c in counts.values())} inputs, {failures} failures")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
