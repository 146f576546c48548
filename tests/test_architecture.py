"""The shape of the house: rooms that import downwards, no circle, short functions, 100 columns."""

from __future__ import annotations

import ast
import subprocess
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
COLUMNS = 100
MAX_FUNCTION_LINES = 60
# From the top floor down. What stands beside each other on a floor does not import each other.
FLOORS = {
    "ops": [
        ["cli"],
        ["declare"],
        ["api"],
        ["sweep"],
        ["export", "image", "fakevast", "use", "web"],
        ["prepare"],
        ["run"],
        ["job"],
        ["box"],
        ["market"],
        ["hardware"],
        ["catalogue"],
        ["detached", "wait"],
        ["errors", "plain"],
    ],
    "trainer": [
        ["launch", "checkup"],
        ["train"],
        ["chained"],
        ["practice", "serve", "tools"],
        ["stages"],
        ["eval"],
        ["result"],
        ["loop"],
        ["model"],
        ["kernels"],
        ["data"],
        ["loading", "machines", "memory", "outcome"],
        ["families"],
        ["config_faults"],
        ["wire"],
    ],
}
OPS_MAY_IMPORT = ("trainer.wire", "trainer.data", "trainer.memory", "trainer.families")
# Triton kernels, which the compiler takes whole, and functions that are one table.
LONG_FUNCTIONS = {
    "ops.run.explain._stage_and_text",
    "trainer.kernels.attention_device.attention_backward_kv",
    "trainer.kernels.attention_device.attention_backward_q",
    "trainer.kernels.attention_device.attention_forward",
    "trainer.kernels.step_device.turn_and_keep",
    "trainer.kernels.triton_device.norm_backward",
    "trainer.kernels.triton_device.norm_forward",
    "trainer.kernels.triton_device.rope_backward",
    "trainer.kernels.triton_device.rope_forward",
    "trainer.kernels.triton_device.swiglu_backward",
    "trainer.kernels.triton_device.swiglu_forward",
}


def python_files(*folders: str) -> list[Path]:
    """Every Python file under the folders that git knows or would know."""
    words = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "--", *folders]
    listed = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [
        ROOT / name
        for name in listed.splitlines()
        if name.endswith(".py") and (ROOT / name).is_file()
    ]


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


@cache
def imports() -> dict[str, set[str]]:
    """module -> modules of ours that it imports anywhere in its text, TYPE_CHECKING included."""
    modules = {module_name(path): path for path in python_files("ops", "trainer")}
    found: dict[str, set[str]] = {}
    for name, path in modules.items():
        found[name] = set()
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Import):
                wanted = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                inner = [f"{node.module}.{alias.name}" for alias in node.names]
                wanted = [i if i in modules else node.module for i in inner]
            else:
                assert not isinstance(node, ast.ImportFrom), f"{path}: a relative import"
                continue
            found[name] |= {w for w in wanted if w.split(".")[0] in FLOORS} - {name}
    return found


def floor(module: str) -> int | None:
    """The number of the floor from the top; None for `ops` and `trainer` themselves."""
    package, *rest = module.split(".")
    if not rest:
        return None
    numbers = [n for n, rooms in enumerate(FLOORS[package]) if rest[0] in rooms]
    assert numbers, f"{module}: the room {rest[0]} stands on no floor; see FLOORS in {__file__}"
    return numbers[0]


def test_no_module_imports_in_a_circle() -> None:
    TopologicalSorter(imports()).prepare()  # raises CycleError with the circle


def test_imports_run_downwards() -> None:
    upward = []
    for module, wanted in imports().items():
        for other in wanted:
            (package, *room), (their_package, *their_room) = module.split("."), other.split(".")
            if package != their_package or not room or not their_room or room[0] == their_room[0]:
                continue
            here, there = floor(module), floor(other)
            if here is not None and there is not None and there <= here:
                upward.append(f"{module} -> {other}")
    assert not upward


def test_ops_imports_four_things_of_the_trainer_and_the_trainer_nothing_of_ops() -> None:
    wrong = [
        f"{module} -> {other}"
        for module, wanted in imports().items()
        for other in wanted
        if (module.startswith("trainer") and other.startswith("ops"))
        or (
            module.startswith("ops")
            and other.startswith("trainer")
            and not other.startswith(OPS_MAY_IMPORT)
        )
    ]
    assert not wrong


def test_the_command_line_imports_the_python_api_errors_and_plain_and_no_more_of_ours() -> None:
    wrong = [
        f"{module} -> {other}"
        for module, wanted in imports().items()
        for other in wanted
        if module.startswith("ops.cli")
        and other not in ("ops.api", "ops.errors", "ops.plain")
        and not other.startswith("ops.cli")
    ]
    assert not wrong


def test_no_line_is_wider_than_100_columns() -> None:
    wide = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in python_files("ops", "trainer", "bench", "tests")
        for number, line in enumerate(path.read_text("utf-8").splitlines(), 1)
        if len(line) > COLUMNS
    ]
    assert not wide


def test_no_function_is_longer_than_60_lines() -> None:
    long = []
    for path in python_files("ops", "trainer", "bench"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or 0) - node.lineno + 1
                name = f"{module_name(path)}.{node.name}"
                if lines > MAX_FUNCTION_LINES and name not in LONG_FUNCTIONS:
                    long.append(f"{name}: {lines}")
    assert not long


@pytest.mark.parametrize("name", sorted(LONG_FUNCTIONS))
def test_an_excepted_function_is_still_long(name: str) -> None:
    module, _, function = name.rpartition(".")
    path = ROOT / (module.replace(".", "/") + ".py")
    nodes = ast.walk(ast.parse(path.read_text("utf-8")))
    [found] = [n for n in nodes if isinstance(n, ast.FunctionDef) and n.name == function]
    assert (found.end_lineno or 0) - found.lineno + 1 > MAX_FUNCTION_LINES
