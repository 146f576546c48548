"""60 recorded cases of driver, GPU and CUDA line, through both implementations of the rules: Python's and INSTALL.sh's."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from ops.image.bundle.inventory import Gpu, Inventory
from ops.image.driver import Line, is_data_center, judge

LINES = {
    "cu117": Line("cu117", "11.7", ("3.7", "5.0", "6.0", "7.0", "7.5", "8.0", "8.6"), ("8.6",)),
    "cu126": Line("cu126", "12.6", ("5.0", "6.0", "7.0", "7.5", "8.0", "8.6", "9.0")),
    "cu128": Line("cu128", "12.8", ("7.5", "8.0", "8.6", "9.0", "10.0", "12.0"), ("12.0",)),
    "cu130": Line("cu130", "13.0", ("7.5", "8.0", "8.6", "9.0", "10.0", "11.0", "12.0"), ("12.0",)),
}
INSTALLER = Path(__file__).parents[2] / "ops" / "image" / "server" / "install"


def cases() -> list[list[str]]:
    lines = (Path(__file__).parent / "driver_triples.tsv").read_text().splitlines()
    return [line.split("\t") for line in lines if not line.startswith("#")]


def test_sixty_cases_were_recorded() -> None:
    assert len(cases()) == 60 and len({tuple(c[:4]) for c in cases()}) == 60


@pytest.mark.parametrize("case", cases(), ids=lambda c: f"{c[0]}-{c[1]}-{c[3]}".replace(" ", "_"))
def test_the_verdict_on_a_recorded_case_is_nvidias_and_its_remedy_helps(case: list[str]) -> None:
    driver, gpu, capability, line, expected, names, _ = case
    verdict = judge(driver, capability, is_data_center(gpu), LINES[line], LINES.values())
    assert verdict.kind == expected
    assert names in verdict.remedy


def test_no_remedy_asks_for_a_driver_that_would_take_the_gpu_away() -> None:
    for driver, gpu, capability, line, *_ in cases():
        remedy = judge(driver, capability, is_data_center(gpu), LINES[line], LINES.values()).remedy
        if capability == "3.7":
            assert "update the driver" not in remedy
    kepler = judge("460.27.03", "3.7", True, Line("old", "12.6", ("3.5", "3.7")), LINES.values())
    assert kepler.kind == "driver-too-old" and "update" not in kepler.remedy and "cu117" in kepler.remedy


@pytest.mark.parametrize("shell", ["dash", "busybox ash", "bash"])
def test_the_shell_of_install_sh_gives_the_same_60_answers_word_for_word(tmp_path: Path, shell: str) -> None:
    import shutil

    if not shutil.which(shell.split()[0]):
        pytest.skip(f"{shell} is not on this machine")
    (tmp_path / "PLAN").write_text("".join(f"line {row(x)}\n" for x in LINES.values()))
    script = ["set -u", f"BUNDLE={tmp_path} WORK={tmp_path} PREFIX={tmp_path} ALSO=''"]
    script += [(INSTALLER / name).read_text() for name in ("00-head.sh", "10-plan.sh", "20-driver.sh")]
    script += [f"BUNDLE={tmp_path} WORK={tmp_path}", "exec 3>&1"]
    for driver, gpu, capability, name, *_ in cases():
        line = LINES[name]
        _, cuda, native, floor, arches, ptx, compat = row(line).split()
        script.append(
            f"PLAN_ARCHES={arches} PLAN_PTX={ptx}; c=$(class_of '{gpu}'); v=$(verdict {driver} {capability} $c {cuda} {native} {floor} {arches} {ptx} {compat})"  # noqa: E501
        )
        script.append(f'echo "$v|$(remedy $v {driver} {capability} $c {cuda} {native} {floor})"')
    done = subprocess.run([*shell.split(), "-c", "\n".join(script)], capture_output=True, text=True)
    assert done.stderr == ""
    expected = [judge(d, c, is_data_center(g), LINES[n], LINES.values()) for d, g, c, n, *_ in cases()]
    assert done.stdout.splitlines() == [f"{v.kind}|{v.remedy}" for v in expected]


def row(line: Line) -> str:
    from ops.image.bundle.manifest import line_row

    return line_row(line)


def test_an_inventory_names_the_lines_that_every_gpu_of_the_server_runs() -> None:
    gpus = [Gpu(name="Tesla V100-SXM2-32GB", driver="535.104.05", capability="7.0"), Gpu(name="NVIDIA A100", driver="535.104.05", capability="8.0")]
    server = Inventory(milktea_preflight=1, server="s", engine="24.0.7", gpus=gpus)
    assert server.lines_that_fit(list(LINES.values())) == ["cu117", "cu126"]
    blind = server.model_copy(update={"gpus": [Gpu(name="unknown GPU", driver="535.104.05", capability="?")]})
    assert blind.lines_that_fit(list(LINES.values())) == []
