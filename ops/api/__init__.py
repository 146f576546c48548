"""milktea from Python: what the command line does, as functions with typed results.

    import milktea

    planned = milktea.plan("jobs/practice.toml")      # checks, offers, prices; rents nothing
    run = milktea.rent_and_train(planned)             # rents; returns once the box is proven gone
    print(run.adapter, run.cost().spent_usd)

A job is a path of a TOML file, a `Job` (ops/declare/job.py), or a dict of the same keys (relative
paths in it, and its `results.folder` of `out`, are of the working directory). `vast` is vast.ai
where VAST_API_KEY is set, else the emulator on this machine (`open_market`); `root` is the folder
of runs, `runs/` or MILKTEA_RUNS. Errors are those of `ops.errors`: each has `money`, `hint` and
`exit_code`.

Whatever acts first finishes every destroy that an earlier client began and could not prove, and
raises BoxLeaked where it still cannot.
"""

from __future__ import annotations

from ops.api.chat import plan_chat, rent_and_talk
from ops.api.market import open_market, uses_vast_ai
from ops.api.planning import Job as Job
from ops.api.planning import Planned, drop, gpus, load_job, models, plan, prices, schema
from ops.api.reading import boxes, closed_runs, compare
from ops.api.reaping import finish_destroys, reap
from ops.api.running import attach, destroy, rent_and_train, resume, stop, web, wish_end
from ops.api.screen import Quiet
from ops.api.sweeping import QuietSweep, map, plan_map, variations
from ops.errors import MilkteaError
from ops.export.folder import Kind, export, export_job
from ops.hardware.gpus import Gpu
from ops.image import carry
from ops.image import workflow as images
from ops.job.cards import KnownCard, KnownModel, Price
from ops.job.job_file import JobFile
from ops.job.plan import Plan
from ops.market.client import Vast
from ops.market.models import Instance
from ops.market.ranking import Ranking
from ops.prepare import instruct as instructing
from ops.prepare import rows as data
from ops.prepare import translate as translating
from ops.prepare.calls import Spent
from ops.prepare.endpoint import Endpoint, endpoint_of
from ops.prepare.feedback import feedback
from ops.prepare.work import Tell
from ops.run import ledger, visit
from ops.run.boxes import Rented
from ops.run.eta import Eta
from ops.run.explain import Status, told_line
from ops.run.folders import runs_folder
from ops.run.journal import Line
from ops.run.meter import dearest_silence
from ops.run.reap import Reaped
from ops.run.session import Interrupted, Screen
from ops.run.view import Cost, Run, find_run, runs
from ops.sweep.begin import Swept
from ops.sweep.engine import Watcher
from ops.sweep.grid import parse_set
from ops.sweep.page import rows as sweep_rows
from ops.sweep.plan import PlannedSweep
from ops.sweep.state import Trial
from ops.use import begin, board, words
from ops.use.compare import Comparison, Outcome
from ops.use.found import Found
from ops.use.results import (
    check_adapter,
    combine_adapters,
    evaluate,
    export_adapter,
    find_result,
    merge,
)
from trainer.data.sources import Reading
from trainer.wire import events
from trainer.wire.events import Event, Sample, Score

__all__ = [
    "Comparison",
    "Cost",
    "Endpoint",
    "Eta",
    "Event",
    "Found",
    "Gpu",
    "Instance",
    "Interrupted",
    "JobFile",
    "Kind",
    "KnownCard",
    "KnownModel",
    "Line",
    "MilkteaError",
    "Outcome",
    "Plan",
    "Planned",
    "PlannedSweep",
    "Price",
    "Quiet",
    "QuietSweep",
    "Ranking",
    "Reading",
    "Reaped",
    "Rented",
    "Run",
    "Sample",
    "Score",
    "Screen",
    "Spent",
    "Status",
    "Swept",
    "Tell",
    "Trial",
    "Vast",
    "Watcher",
    "attach",
    "begin",
    "board",
    "boxes",
    "carry",
    "check_adapter",
    "closed_runs",
    "combine_adapters",
    "compare",
    "data",
    "dearest_silence",
    "destroy",
    "endpoint_of",
    "evaluate",
    "events",
    "export",
    "export_adapter",
    "export_job",
    "feedback",
    "find_result",
    "find_run",
    "finish_destroys",
    "gpus",
    "images",
    "instructing",
    "ledger",
    "load_job",
    "map",
    "merge",
    "models",
    "open_market",
    "parse_set",
    "drop",
    "plan",
    "plan_chat",
    "plan_map",
    "prices",
    "reap",
    "rent_and_talk",
    "rent_and_train",
    "resume",
    "runs",
    "runs_folder",
    "schema",
    "stop",
    "sweep_rows",
    "told_line",
    "translating",
    "uses_vast_ai",
    "variations",
    "visit",
    "web",
    "wish_end",
    "words",
]
