"""Single faults planted in a module, each judged by the module's own tests: which are not noticed?

    python tests/mutants.py [MODULE ...] [--sample 40] [--seed 7] [--seconds 60] [--workers 2]
                            last line of a module: `MODULE: NOTICED of PLANTED noticed`

A fault is one comparison, operator, number, boolean operator or `not` exchanged (`faults`). Each is
planted in a process of its own, in which the module, and whatever imported it, is loaded anew; no
file changes. A fault is noticed when its tests fail or take longer than --seconds of a processor;
those that are not are printed with their line. Those of KNOWN change nothing that can be seen.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import copy
import importlib.abc
import importlib.machinery
import importlib.util
import io
import multiprocessing
import os
import random
import resource
import sys
import time
from collections.abc import Iterator
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
    "ops.run.lora_result": ["tests/ops/run/test_result.py"],
    "ops.run.absence": ["tests/ops/run/test_absence.py"],
    "ops.run.rental": ["tests/ops/run/test_rental.py"],
    "ops.run.keeper": ["tests/ops/run/test_keeper_limits.py"],
    "ops.run.follow": ["tests/ops/run/test_follow.py", "tests/ops/run/test_story.py"],
    "ops.run.supervisor": ["tests/ops/run/test_supervisor.py"],
    "trainer.data.formats": [
        "tests/trainer/data/test_files.py",
        "tests/trainer/data/test_fields.py",
        "tests/trainer/data/test_chat.py",
    ],
    "trainer.data.template": ["tests/trainer/data/test_template.py"],
    "trainer.data.packing": ["tests/trainer/data/test_packing.py"],
    "trainer.families": ["tests/trainer/test_families.py"],
    "trainer.kernels.attention": ["tests/trainer/kernels/test_attention.py"],
}
# module: {a fault as it is printed: why it changes nothing that can be seen}
KNOWN = {
    "ops.market.ranking": {
        'return counts.most_common(1)[0] if counts else ("", 0) -> 2': "only the first is taken",
    },
    "ops.run.rental": {
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
        Fault(number, way, node.lineno, f"{lines[node.lineno - 1].strip()} -> {ast.unparse(other)}")
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


def run_tests(module: str, *options: str) -> int:
    """pytest's exit code for the module's own tests."""
    quiet = ["-q", "-n0", "-p", "no:cacheprovider"]
    quiet += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]
    return int(pytest.main([*TESTS[module], *quiet, *options]))


def forget_ours() -> None:
    """Drop every module that lies in this repository, tests and their helpers too, so that it is
    imported anew; other people's packages stay."""
    for name, module in list(sys.modules.items()):
        path = getattr(module, "__file__", None) or ""
        ours = path.startswith(f"{ROOT}{os.sep}") and "site-packages" not in path
        if (ours or name.split(".")[0] in ("ops", "trainer", "tests")) and name != __name__:
            del sys.modules[name]


def judged(module: str, fault: Fault | None, seconds: int) -> bool:
    """Whether the module's tests fail with the fault, in a process of its own."""
    child = os.fork()
    if child == 0:
        code = 1
        with contextlib.suppress(BaseException):
            path = ROOT / (module.replace(".", "/") + ".py")
            resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
            forget_ours()
            if fault is not None:
                tree = planted(path.read_text("utf-8"), fault)
                sys.meta_path.insert(0, Planter(module, path, tree))
            nowhere = os.open(os.devnull, os.O_RDWR)
            for number in (0, 1, 2):
                os.dup2(nowhere, number)
            with contextlib.redirect_stdout(io.StringIO()):
                # a busy machine may give a process a fifth of a processor
                code = run_tests(module, "-x", "--timeout", str(5 * seconds))
        os._exit(code)
    _, status = os.waitpid(child, 0)
    return status != 0


def work(
    module: str, chosen: list[Fault], seconds: int, worker: int, workers: int, out: Any
) -> None:
    os.chdir(ROOT)
    for fault in chosen[worker::workers]:
        out.put((fault, judged(module, fault, seconds)))


def examined(module: str, options: argparse.Namespace) -> bool:
    """Plants a sample of faults; prints those that nothing notices. Whether 90 % are noticed."""
    path = ROOT / (module.replace(".", "/") + ".py")
    every, began = faults(path.read_text("utf-8")), time.monotonic()
    rng = random.Random(f"{options.seed} {module}")
    chosen = sorted(rng.sample(every, min(options.sample, len(every))), key=lambda f: f.line)
    with contextlib.redirect_stdout(io.StringIO()):
        run_tests(module, "--collect-only")  # what they import is there before a process is forked
    if judged(module, None, 10 * options.seconds):
        print(f"{module}: its tests fail without a fault")
        return False
    context = multiprocessing.get_context("fork")
    out = context.Queue()
    workers = [
        context.Process(
            target=work, args=(module, chosen, options.seconds, n, options.workers, out)
        )
        for n in range(options.workers)
    ]
    for worker in workers:
        worker.start()
    missed = [fault for fault, noticed in (out.get() for _ in chosen) if not noticed]
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
    import hypothesis

    hypothesis.settings.register_profile("busy", deadline=None)  # slow is not noticed
    hypothesis.settings.load_profile("busy")
    return 0 if all([examined(module, options) for module in options.modules]) else 1


if __name__ == "__main__":
    sys.exit(main())
