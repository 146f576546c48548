"""60 recorded cases of driver, GPU and CUDA line, judged by the rules and by INSTALL.sh, which has
their answers from PLAN.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from machine import needs
from pydantic import ValidationError

from ops.errors import ConfigError
from ops.hardware.driver import CudaLine, is_data_center, judge
from ops.image.bundle import manifest
from ops.image.bundle.cuda_lines import line_of, lines
from ops.image.bundle.inventory import Gpu, Inventory
from ops.image.spec import definition
from ops.image.spec.lock import Cuda
from ops.image.spec.paths import Places

LINES = {
    "cu117": CudaLine("cu117", "11.7", ("3.7", "5.0", "6.0", "7.0", "7.5", "8.0", "8.6"), ("8.6",)),
    "cu126": CudaLine("cu126", "12.6", ("5.0", "6.0", "7.0", "7.5", "8.0", "8.6", "9.0")),
    "cu128": CudaLine("cu128", "12.8", ("7.5", "8.0", "8.6", "9.0", "10.0", "12.0"), ("12.0",)),
    "cu130": CudaLine(
        "cu130", "13.0", ("7.5", "8.0", "8.6", "9.0", "10.0", "11.0", "12.0"), ("12.0",)
    ),
}
INSTALLER = Path(__file__).parents[2] / "ops" / "image" / "server" / "INSTALL.sh"


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
    kepler = judge(
        "460.27.03", "3.7", True, CudaLine("old", "12.6", ("3.5", "3.7")), LINES.values()
    )
    assert (
        kepler.kind == "driver-too-old"
        and "update" not in kepler.remedy
        and "cu117" in kepler.remedy
    )


@pytest.mark.parametrize("shell", ["dash", "busybox ash", "bash"])
def test_the_shell_of_install_sh_gives_the_same_60_answers_word_for_word(
    tmp_path: Path, shell: str
) -> None:
    needs(shell.split()[0])
    functions = (
        INSTALLER.read_text()
        .replace("{ set -u", "set -u", 1)
        .rpartition('main "$@"')[0]
        .replace('"$(dirname "$0")"', str(tmp_path))
    )
    for name, line in LINES.items():
        (tmp_path / "plan" / name).mkdir(parents=True)
        rows = manifest.gpu_rows(line, LINES.values())
        (tmp_path / "plan" / name / "PLAN").write_text("".join(f"{row}\n" for row in rows))
    script = [functions, f"SMALL={tmp_path}/plan"]
    for driver, gpu, capability, name, *_ in cases():
        script += [
            f"SMALL={tmp_path}/plan/{name}",
            f"judge {driver} {capability} $(class_of '{gpu}')",
        ]
    done = subprocess.run([*shell.split(), "-c", "\n".join(script)], capture_output=True, text=True)
    assert done.stderr == ""
    expected = [
        judge(d, c, is_data_center(g), LINES[n], LINES.values()) for d, g, c, n, *_ in cases()
    ]
    assert done.stdout.splitlines() == [f"{v.kind} {v.remedy}" for v in expected]


def test_an_inventory_names_the_lines_that_every_gpu_of_the_server_runs() -> None:
    gpus = (
        Gpu("Tesla V100-SXM2-32GB", "535.104.05", "7.0"),
        Gpu("NVIDIA A100", "535.104.05", "8.0"),
    )
    server = Inventory(gpus)
    assert server.compatible_lines(list(LINES.values())) == ["cu117", "cu126"]
    assert (
        Inventory((Gpu("unknown GPU", "535.104.05", "?"),)).compatible_lines(list(LINES.values()))
        == []
    )


def test_architectures_are_read_as_a_definition_spells_them() -> None:
    spelt = ["7.5", "8.0", "9.0a", "12.0+PTX"]
    cuda = Cuda(line="cu130", toolkit="13.0.2", min_driver="580.65.06", architectures=spelt)
    assert line_of("x", cuda) == CudaLine("x", "13.0", ("7.5", "8.0", "9.0a", "12.0"), ("12.0",))
    assert line_of("cpu", None) == CudaLine("cpu", None)
    with pytest.raises(ValidationError, match="architectures"):
        Cuda(line="cu130", toolkit="13.0", min_driver="580", architectures=["sm_80"])


def test_a_toolkit_without_a_known_driver_is_refused_with_the_place_to_add_it() -> None:
    with pytest.raises(ConfigError, match=r"14\.7 is unknown") as refused:
        line_of("x", Cuda(line="cu147", toolkit="14.7", min_driver="700", architectures=[]))
    assert "ops/hardware/driver.py" in refused.value.hint


def test_the_projects_own_definitions_agree_with_the_driver_table() -> None:
    found = lines(Places())
    assert len(found) >= 2
    for line in found:
        stated = definition.read(Places().definition(line.name)).cuda
        assert stated is not None and stated.min_driver == line.floor
