"""Single faults planted in a module, each judged by the module's own tests: which are not noticed?

    python tests/mutants.py [MODULE ...] [--sample 40] [--seed 7] [--seconds 60] [--workers 2]
                            last line of a module: `MODULE: NOTICED of PLANTED noticed`

A fault is one comparison, operator, number, boolean operator or `not` exchanged (`faults`). Each is
planted in a process of its own, in which the module, and whatever imported it, is loaded anew; no
file changes. Only those tests judge it that run through its lines. It is noticed when they fail or
take longer than --seconds of a processor; those that are not are printed with their line. Those of
KNOWN change nothing that can be seen.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import copy
import gc
import importlib.abc
import importlib.machinery
import importlib.util
import io
import json
import multiprocessing
import os
import random
import resource
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

TESTS = {  # module -> its own tests
    "ops.market.cost": ["tests/ops/market/test_cost.py"],
    "ops.market.workload": ["tests/ops/market/test_cost.py"],
    "ops.market.ranking": ["tests/ops/market/test_ranking.py"],
    "ops.box.facts": ["tests/ops/box/test_facts.py"],
    "ops.run.result": ["tests/ops/run/test_result.py"],
    "ops.run.lora_result": ["tests/ops/run/test_lora_result.py"],
    "ops.run.absence": ["tests/ops/run/test_absence.py"],
    "ops.run.boot": ["tests/ops/run/test_rental.py"],
    "ops.run.rental": ["tests/ops/run/test_rental.py"],
    "ops.run.keeper": ["tests/ops/run/test_keeper_limits.py"],
    "ops.run.follow": ["tests/ops/run/test_follow_limits.py"],
    "ops.run.supervisor": [
        "tests/ops/run/test_supervisor_alone.py",
        "tests/ops/run/test_notify.py",
    ],
    "trainer.data.formats": [
        "tests/trainer/data/test_files.py",
        "tests/trainer/data/test_fields.py",
        "tests/trainer/data/test_chat.py",
    ],
    "trainer.data.chat": [
        "tests/trainer/data/test_chat.py",
        "tests/trainer/data/test_chat_labels.py",
    ],
    "trainer.data.template": ["tests/trainer/data/test_template.py"],
    "trainer.data.packing": ["tests/trainer/data/test_packing.py"],
    "trainer.families": ["tests/trainer/test_families_words.py", "tests/trainer/test_families.py"],
    "trainer.kernels.attention": ["tests/trainer/kernels/test_attention.py"],
}
# module: {a fault as it is printed: why it changes nothing that can be seen}
KNOWN = {
    "ops.market.ranking": {
        'return counts.most_common(1)[0] if counts else ("", 0) -> 2': "only the first is taken",
    },
    "ops.run.boot": {
        "if booting.seconds > timeout_s: -> booting.seconds >= timeout_s": "it is never equal",
        "if left_s < needs_s: -> left_s <= needs_s": "they are never equal",
        "if running.end_unix_s < session.dies_at(): -> running.end_unix_s <= session.dies_at()": (
            "they are never equal"
        ),
    },
    "ops.run.rental": {
        "LOG_S = 5.0  # to wait for a container's log after the proof -> 6.0": (
            "how long an end waits for the log of an error"
        ),
        "LOG_S = 5.0  # to wait for a container's log after the proof -> 10.0": (
            "how long an end waits for the log of an error"
        ),
        "charges = session.vast.charges(instance_id, session.journal.lines[0].t) -> 1": (
            "only its day is asked for"
        ),
        "charges = session.vast.charges(instance_id, session.journal.lines[0].t) -> 2": (
            "only its day is asked for"
        ),
        "usd=round(sum(c.usd for c in charges), 6), -> 7": "vast.ai's charges have no more digits",
        "usd=round(sum(c.usd for c in charges), 6), -> 12": "vast.ai's charges have no more digits",
    },
    "ops.run.keeper": {
        "PRICE_S = 45.0  # between two readings of price and credit -> 46.0": (
            "it is read at each renewal, every minute"
        ),
        "ANSWER_S = 20.0  # for one renewal -> 21.0": "less than between two renewals does",
        "ANSWER_S = 20.0  # for one renewal -> 40.0": "less than between two renewals does",
        "threading.Thread(target=self._every, args=(LOOK_S, self._look), daemon=True), -> False": (
            "it is stopped before its process ends"
        ),
        "threading.Thread(target=self._every, args=(RENEW_S, self._renew), daemon=True), "
        "-> False": ("it is stopped before its process ends"),
    },
    "trainer.kernels.attention": {
        "LONG = 16384  # tokens of a document beyond which flash attention is used "
        "(docs/speed-log.md) -> 32768": "slower, and equal",
        "return zip(*(x.split(n, 2) for x, n in ((q, queries), (k, keys), (v, keys))), "
        "strict=True) -> False": ("q, k and v are cut into as many documents"),
        "cu: Tensor, tokens: int, window: int | None = None, ends: KeyEnds | None = None, "
        "keys: int = 0 -> 1": "as many as tokens, without ends",
        "cu: Tensor, tokens: int, window: int | None = None, ends: KeyEnds | None = None, "
        "keys: int = 0 -> 2": "as many as tokens, without ends",
        "if tokens > queries: -> tokens >= queries": "of as many keys, both are one triangle",
        "if causal and mask is None and queries == keys: -> mask is not None": (
            "slower, and equal: a window that no row fills hides nothing"
        ),
    },
    "trainer.data.formats": {
        "close = difflib.get_close_matches(str(name), known, 1, 0.5) -> 2": (
            "only the first is taken"
        ),
    },
    "trainer.data.chat": {
        "MAX_OPENING = 64  # characters of an answer (such as <think>) that a prompt may end with "
        "-> 128": "any length that no opening reaches",
        "if start >= 0 and marked != after: -> 1": "before an answer stands its question",
    },
    "trainer.data.template": {
        'jinja: str = field(default="", repr=False) -> True': "only how a debugger shows it",
    },
    "trainer.data.packing": {
        "wanted = max(1, math.ceil(self.epochs * self.steps_per_epoch - 1e-9)) -> 2e-09": (
            "any small number does"
        ),
        "if kept is None or kept[0] != epoch: -> 1": "made anew each time: slower, and equal",
        "loads = [0] * ranks -> 1": "all ranks begin with the same",
        "loads = [0] * ranks -> 2": "all ranks begin with the same",
    },
}
COMPARED: dict[type, type] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
}
COMPUTED: dict[type, type] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Add,
    ast.Pow: ast.Mult,
    ast.LShift: ast.RShift,
}


@dataclass(frozen=True)
class Fault:
    """The `number`-th node of a module's tree that can be exchanged, in one of its ways."""

    number: int
    way: int
    line: int
    text: str
    lines: range  # of the node


def _ways(node: ast.AST) -> list[ast.AST]:
    """What may stand in the node's place."""
    made: list[ast.AST] = []
    if isinstance(node, ast.Compare):
        for n, operator in enumerate(node.ops):
            other = copy.deepcopy(node)
            other.ops[n] = COMPARED[type(operator)]()
            made.append(other)
    elif isinstance(node, ast.BinOp) and type(node.op) in COMPUTED:
        if not any(isinstance(side, ast.JoinedStr) for side in (node.left, node.right)):
            made.append(ast.BinOp(node.left, COMPUTED[type(node.op)](), node.right))
    elif isinstance(node, ast.BoolOp):
        other_op = ast.And() if isinstance(node.op, ast.Or) else ast.Or()
        made.append(ast.BoolOp(other_op, node.values))
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        made.append(node.operand)
    elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
        made.append(ast.Constant(not node.value))
    elif isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        made += map(ast.Constant, dict.fromkeys((node.value + 1, node.value * 2 or 2)))
    return made


def _nodes(tree: ast.Module) -> Iterator[tuple[ast.AST, str, int | None]]:
    """(parent, field, index in it) of each node of code: no annotation, no text of a message."""

    def walk(node: ast.AST) -> Iterator[tuple[ast.AST, str, int | None]]:
        for name, value in ast.iter_fields(node):
            if name in ("annotation", "returns", "decorator_list", "format_spec"):
                continue
            for n, item in enumerate(value if isinstance(value, list) else [value]):
                if not isinstance(item, ast.AST) or isinstance(item, ast.JoinedStr | ast.Raise):
                    continue
                yield node, name, n if isinstance(value, list) else None
                yield from walk(item)

    return walk(tree)


def _at(place: tuple[ast.AST, str, int | None]) -> Any:
    node, name, n = place
    return getattr(node, name) if n is None else getattr(node, name)[n]


def faults(source: str) -> list[Fault]:
    """Every single fault that can be planted in a module's text."""
    lines = source.splitlines()
    return [
        Fault(
            number,
            way,
            node.lineno,
            f"{lines[node.lineno - 1].strip()} -> {ast.unparse(other)}",
            range(node.lineno, node.end_lineno + 1),
        )
        for number, place in enumerate(_nodes(ast.parse(source)))
        for node in [_at(place)]
        for way, other in enumerate(_ways(node))
    ]


def planted(source: str, fault: Fault) -> ast.Module:
    """The module's tree with the fault in it."""
    tree = ast.parse(source)
    place = list(_nodes(tree))[fault.number]
    node, name, n = place
    other = ast.copy_location(_ways(_at(place))[fault.way], _at(place))
    if n is None:
        setattr(node, name, other)
    else:
        getattr(node, name)[n] = other
    return ast.fix_missing_locations(tree)


class Planter(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Loads one module from a tree."""

    def __init__(self, module: str, path: Path, tree: ast.Module) -> None:
        self.module, self.path, self.tree = module, path, tree

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name != self.module:
            return None
        return importlib.util.spec_from_file_location(name, self.path, loader=self)

    def exec_module(self, module: Any) -> None:
        exec(compile(self.tree, self.path, "exec"), module.__dict__)


class Reached:
    """A plugin of pytest that writes down which tests ran through which lines of a file."""

    def __init__(self, path: Path) -> None:
        self.path, self.tests = str(path), dict[int, list[str]]()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Any:
        lines: set[int] = set()

        def trace(frame: Any, event: str, arg: Any) -> Any:
            if frame.f_code.co_filename != self.path:
                return None
            lines.add(frame.f_lineno)
            return trace

        threading.settrace(trace)
        sys.settrace(trace)
        try:
            return (yield)
        finally:
            sys.settrace(None)
            threading.settrace(None)  # type: ignore[arg-type]
            for line in lines:
                self.tests.setdefault(line, []).append(item.nodeid)


class Chosen:
    """A plugin of pytest that leaves out every test but these."""

    def __init__(self, tests: set[str]) -> None:
        self.tests = tests

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        if chosen := [item for item in items if item.nodeid in self.tests]:
            items[:] = chosen


def run_tests(module: str, *options: str, plugins: Sequence[object] = ()) -> int:
    """pytest's exit code for the module's own tests."""
    quiet = ["-q", "-n0", "--assert=plain", "-p", "no:cacheprovider"]
    quiet += ["-p", "no:unraisableexception"]
    return int(pytest.main([*TESTS[module], *quiet, *options], plugins=plugins))


def forget(module: str) -> None:
    """Drop the module and every module of this repository, tests too, that imports it, so that they
    are imported anew."""
    paths = {name: getattr(found, "__file__", None) or "" for name, found in sys.modules.items()}
    ours = {
        name: _imported(Path(path).read_text("utf-8"))
        for name, path in paths.items()
        if path.startswith(f"{ROOT}{os.sep}") and path.endswith(".py") and name != __name__
        if "site-packages" not in path
    }
    gone = {module}
    while more := {name for name, needs in ours.items() if needs & gone} - gone:
        gone |= more
    for name in gone:
        found = sys.modules.pop(name, None)
        package, _, own = name.rpartition(".")
        # `from package import own` takes this, and would give the module without a fault
        if found is not None and vars(sys.modules.get(package, sys)).get(own) is found:
            delattr(sys.modules[package], own)


def _imported(source: str) -> set[str]:
    """Every name that a source imports, and the module that it is imported from."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def in_child(act: Callable[[], int], seconds: int) -> int:
    """The exit code of `act` in a process of its own, without output; not 0 where it takes longer
    than so many seconds of a processor."""
    child = os.fork()
    if child == 0:
        code = 1
        with contextlib.suppress(BaseException):
            resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
            nowhere = os.open(os.devnull, os.O_RDWR)
            for number in (0, 1, 2):
                os.dup2(nowhere, number)
            with contextlib.redirect_stdout(io.StringIO()):
                code = act()
        os._exit(code)
    _, status = os.waitpid(child, 0)
    return status


def path_of(module: str) -> Path:
    return ROOT / (module.replace(".", "/") + ".py")


def reached(module: str, seconds: int) -> dict[int, list[str]] | None:
    """The tests that run through each line of the module; None where one of them fails."""
    with tempfile.TemporaryDirectory() as folder:
        written = Path(folder) / "reached.json"

        def act() -> int:
            plugin = Reached(path_of(module))
            code = run_tests(module, "--timeout", str(5 * seconds), plugins=[plugin])
            written.write_text(json.dumps(plugin.tests))
            return code

        if in_child(act, seconds):
            return None
        return {int(line): tests for line, tests in json.loads(written.read_text()).items()}


def judged(module: str, fault: Fault, tests: set[str], seconds: int) -> bool:
    """Whether one of these tests fails with the fault; of all, where none is named."""

    def act() -> int:
        tree = planted(path_of(module).read_text("utf-8"), fault)
        sys.meta_path.insert(0, Planter(module, path_of(module), tree))
        # a busy machine may give a process a fifth of a processor
        options = ["-x", "--timeout", str(5 * seconds)]
        return run_tests(module, *options, plugins=[Chosen(tests)])

    return in_child(act, seconds) != 0


def work(
    module: str,
    chosen: list[tuple[Fault, set[str]]],
    seconds: int,
    out: Any,
) -> None:
    os.chdir(ROOT)
    for fault, tests in chosen:
        out.put((fault, judged(module, fault, tests, seconds)))


def examined(module: str, options: argparse.Namespace) -> bool:
    """Plants a sample of faults; prints those that nothing notices. Whether 90 % are noticed."""
    every, began = faults(path_of(module).read_text("utf-8")), time.monotonic()
    rng = random.Random(f"{options.seed} {module}")
    chosen = sorted(rng.sample(every, min(options.sample, len(every))), key=lambda f: f.line)
    with contextlib.redirect_stdout(io.StringIO()):
        run_tests(module, "--collect-only")  # what they import is there before a process is forked
    forget(module)
    gc.freeze()  # a collection in each process would go through all of it
    through = reached(module, 10 * options.seconds)
    if through is None:
        print(f"{module}: its tests fail without a fault")
        return False
    jobs = [
        (fault, {test for line in fault.lines for test in through.get(line, ())})
        for fault in chosen
    ]
    context = multiprocessing.get_context("fork")
    out = context.Queue()
    workers = [
        context.Process(
            target=work, args=(module, jobs[n :: options.workers], options.seconds, out)
        )
        for n in range(options.workers)
    ]
    for worker in workers:
        worker.start()
    missed = []
    for n in range(len(chosen)):
        fault, noticed = out.get()
        missed += [] if noticed else [fault]
        print(f"{n + 1} of {len(chosen)} judged, {len(missed)} not noticed", end="\r", flush=True)
    for worker in workers:
        worker.join()
    excused = 0
    for fault in sorted(missed, key=lambda f: f.line):
        why = KNOWN.get(module, {}).get(fault.text, "")
        excused += bool(why)
        print(f"  {module}:{fault.line}: {fault.text}{f'  ({why})' if why else ''}", flush=True)
    noticed = len(chosen) - len(missed)
    print(
        f"{module}: {noticed} of {len(chosen)} noticed ({len(every)} can be planted, {excused} of "
        f"the rest change nothing), {time.monotonic() - began:.0f} s",
        flush=True,
    )
    return noticed >= 0.9 * (len(chosen) - excused)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("modules", nargs="*", default=list(TESTS))
    parser.add_argument("--sample", type=int, default=40)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    # a shell lets what it starts in the background ignore these, and tests send them
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    import hypothesis

    hypothesis.settings.register_profile("busy", deadline=None)  # slow is not noticed
    hypothesis.settings.load_profile("busy")
    return 0 if all([examined(module, options) for module in options.modules]) else 1


if __name__ == "__main__":
    sys.exit(main())
