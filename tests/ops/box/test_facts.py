"""ops/box/facts.py: outputs as real tools print them (public bug reports, and tools run here), and
what they are judged to be."""

from __future__ import annotations

import subprocess
from dataclasses import replace

import pytest

from ops.box.facts import (
    MARK,
    SCRIPT,
    DiskFacts,
    ExpectedMachine,
    Facts,
    GpuFacts,
    HostFacts,
    parse,
    parse_disk,
    parse_gpu,
    same_gpu,
    unsuitable,
)

GPUS = {
    "one consumer card": (
        "NVIDIA GeForce RTX 4090, 24564, 570.153.02, 8.9, [N/A]",
        GpuFacts("NVIDIA GeForce RTX 4090", 1, 24564 / 1024, "570.153.02", 8.9),
    ),
    "eight data-centre cards": (
        "\n".join(["NVIDIA H100 80GB HBM3, 81559, 580.65.06, 9.0, Disabled"] * 8),
        GpuFacts("NVIDIA H100 80GB HBM3", 8, 81559 / 1024, "580.65.06", 9.0),
    ),
    "two cards of different size: the smaller counts, the odd one is named": (
        "NVIDIA GeForce RTX 3090, 24576, 550.54.14, 8.6, [N/A]\nNVIDIA GeForce RTX 3060, "
        "12288, 550.54.14, 8.6, [N/A]",
        GpuFacts("NVIDIA GeForce RTX 3060", 2, 12.0, "550.54.14", 8.6),
    ),
    "an A100 cut into MIG slices": (
        "NVIDIA A100-SXM4-80GB, 81920, 535.183.01, 8.0, Enabled",
        GpuFacts("NVIDIA A100-SXM4-80GB", 1, 80.0, "535.183.01", 8.0, mig=True),
    ),
    "no MIG, in the words of an old driver": (
        "Tesla V100-SXM2-16GB, 16160, 470.82.01, 7.0, [Not Supported]",
        GpuFacts("Tesla V100-SXM2-16GB", 1, 16160 / 1024, "470.82.01", 7.0),
    ),
}


@pytest.mark.parametrize("name", GPUS)
def test_what_nvidia_smi_prints_becomes_facts(name):
    output, facts = GPUS[name]
    assert parse_gpu(output + "\n") == (facts, "")


COMPLAINTS = {
    "no device": ("No devices were found", "6", "No devices were found"),
    "no driver": (
        "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver. "
        "Make sure that the latest NVIDIA driver is installed and running.",
        "9",
        "couldn't communicate with the NVIDIA driver",
    ),
    "library of another version": (
        "Failed to initialize NVML: Driver/library version mismatch\nNVML library version: 535.183",
        "18",
        "Driver/library version mismatch",
    ),
    "cgroup lost the device": ("Failed to initialize NVML: Unknown Error", "255", "Unknown Error"),
    "not installed": ("sh: 1: nvidia-smi: not found", "127", "not found"),
    "one of two fell off the bus": (
        "Unable to determine the device handle for GPU0000:01:00.0: GPU is lost.  Reboot the "
        "system to recover this GPU\n"
        "NVIDIA GeForce RTX 3090, 24576, 550.54.14, 8.6, [N/A]",
        "15",
        "GPU is lost",
    ),
    "memory cannot be read": ("NVIDIA GH200 480GB, [N/A], 560.35.03, 9.0, Disabled", "0", "GH200"),
    "needs a reset": (
        "NVIDIA A100-SXM4-40GB, [GPU requires reset], 535.104.05, 8.0, [GPU requires reset]",
        "0",
        "requires reset",
    ),
    "a field that an old driver lacks": (
        'Field "compute_cap" is not a valid field to query.',
        "2",
        "compute_cap",
    ),
    "right rows, wrong exit": ("NVIDIA L4, 23034, 550.54.15, 8.9, [N/A]", "14", "(exit 14)"),
    "it hangs": ("", "124", "does not answer within 30 s"),
    "silence": ("", "0", "says nothing"),
}


@pytest.mark.parametrize("name", COMPLAINTS)
def test_what_is_no_answer_becomes_a_complaint_in_its_own_words(name):
    output, code, words = COMPLAINTS[name]
    facts, complaint = parse_gpu(output, code)
    assert facts is None
    assert words in complaint


DISKS = {
    "English": (
        "Filesystem     1024-blocks      Used Available Capacity Mounted on\n"
        "overlay           41943040   1234567  40708473       3% /",
        DiskFacts(40708473 * 1024, "/"),
    ),
    "German": (
        "Dateisystem    1024-Blöcke  Benutzt Verfügbar Kapazität Eingehängt auf\n/dev/sda2   "
        "102400  51200  51200  50% /home",
        DiskFacts(51200 * 1024, "/home"),
    ),
    "Chinese": (
        "文件系统       1024-块      已用      可用 容量 挂载点\n"
        "/dev/nvme0n1p2 959786032 20 911011956    0% /工作 目录",
        DiskFacts(911011956 * 1024, "/工作 目录"),
    ),
    "a device with spaces, a mount point with spaces": (
        "Filesystem 1024-blocks Used Available Capacity Mounted on\n//nas/my share  1000 400 "
        "600  40% /mnt/my share",
        DiskFacts(600 * 1024, "/mnt/my share"),
    ),
    "busybox": (
        "Filesystem           1024-blocks    Used Available Capacity Mounted on\n"
        "overlay              61255492  15234932  42876516  26% /",
        DiskFacts(42876516 * 1024, "/"),
    ),
    "over-full for the user": ("F 1K U A C M\n/dev/sda1 1000 1000 -20 101% /", DiskFacts(0, "/")),
    "no capacity": ("F 1K U A C M\ntmpfs 0 0 0 - /x", DiskFacts(0, "/x")),
    "no answer": ("df: .: No such file or directory", None),
    "nothing": ("", None),
}


@pytest.mark.parametrize("name", DISKS)
def test_what_df_prints_becomes_facts_in_any_language(name):
    output, facts = DISKS[name]
    assert parse_disk(output) == facts


def test_the_script_runs_in_a_plain_shell_and_its_answer_parses_here():
    done = subprocess.run(["/bin/sh", "-c", SCRIPT], capture_output=True, text=True, check=True)
    facts = parse(done.stdout)
    assert facts.disk is not None
    assert facts.disk.path.startswith("/")
    assert (facts.gpu is None) == bool(facts.complaint)
    assert done.stderr == ""


@pytest.mark.parametrize(
    "output",
    ["", "rubbish", MARK, f"{MARK} gpu", f"{MARK} disk\n\n{MARK} gpu\n,,,,\n,", "\x00" * 100],
)
def test_rubbish_is_a_complaint_and_never_an_exception(output):
    facts = parse(output)
    assert facts.complaint
    assert unsuitable(facts, EXPECTED)


def test_a_driver_of_endless_digits_is_judged_and_not_counted():
    long = replace(GOOD, gpu=replace(GOOD.gpu, driver="570." + "9" * 5000))
    assert unsuitable(long, EXPECTED) is None
    old = replace(GOOD, gpu=replace(GOOD.gpu, driver="550." + "9" * 5000))
    assert "older than" in unsuitable(old, EXPECTED)


# -- judging ---------------------------------------------------------------------------------------

EXPECTED = ExpectedMachine("RTX 4090", 2, 23.99, 40.0, 12.8)
GOOD = Facts(
    GpuFacts("NVIDIA GeForce RTX 4090", 2, 23.99, "570.153.02", 8.9), DiskFacts(39 << 30, "/")
)


def test_a_box_that_is_what_was_offered_suits():
    assert unsuitable(GOOD, EXPECTED) is None


FAULTS = {
    "another GPU": (
        {"name": "NVIDIA GeForce RTX 3090"},
        "its GPU is NVIDIA GeForce RTX 3090, offered was RTX 4090",
    ),
    "a cut-down GPU": ({"name": "NVIDIA GeForce RTX 4090 D"}, "RTX 4090 D"),
    "a laptop's GPU": ({"name": "NVIDIA GeForce RTX 4090 Laptop GPU"}, "Laptop"),
    "one GPU of two": ({"count": 1}, "it has 1 GPUs, offered were 2"),
    "more GPUs": ({"count": 4}, "it has 4 GPUs"),
    "half the memory": ({"memory_gib": 12.0}, "has 12.0 GiB, offered were 24.0"),
    "MIG": ({"mig": True}, "MIG"),
    "an old driver": ({"driver": "550.54.14"}, "550.54.14 is older than 570.26"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_what_is_not_as_offered_is_said_with_both_numbers(name):
    change, words = FAULTS[name]
    assert words in (unsuitable(replace(GOOD, gpu=replace(GOOD.gpu, **change)), EXPECTED) or "")


def test_a_full_disk_does_not_suit():
    said = unsuitable(replace(GOOD, disk=DiskFacts(3 << 30, "/")), EXPECTED)
    assert said == "/ has 3.0 GiB free, rented were 40"


def test_a_little_less_memory_or_disk_is_rounding():
    gpu = replace(GOOD.gpu, memory_gib=23.5)
    assert unsuitable(replace(GOOD, gpu=gpu, disk=DiskFacts(30 << 30, "/")), EXPECTED) is None


def test_a_cuda_version_that_nobody_knows_is_not_held_against_the_box():
    assert unsuitable(GOOD, replace(EXPECTED, min_cuda=99.0)) is None


def test_a_disk_that_df_does_not_find_is_a_complaint_and_any_other_is_none():
    gpu = f"{MARK} gpu\n{GPUS['one consumer card'][0]}\n{MARK} gpu-exit\n0\n{MARK} disk\n"
    assert parse(gpu + "df: .: Stale file handle").complaint == "df: df: .: Stale file handle"
    assert parse(gpu + DISKS["English"][0]).complaint == ""


def test_a_complaint_is_the_reason():
    facts = Facts(None, GOOD.disk, "nvidia-smi: No devices were found (exit 6)")
    assert unsuitable(facts, EXPECTED) == "nvidia-smi: No devices were found (exit 6)"


SAME = [
    ("NVIDIA GeForce RTX 4090", "RTX 4090"),
    ("NVIDIA GeForce RTX 4080 SUPER", "RTX 4080S"),
    ("NVIDIA GeForce RTX 4090 D", "RTX 4090D"),
    ("NVIDIA GeForce RTX 4070 Ti SUPER", "RTX 4070S Ti"),
    ("NVIDIA GeForce RTX 3080 Ti", "RTX 3080 Ti"),
    ("NVIDIA GeForce RTX 4060 Ti", "RTX 4060 Ti"),
    ("NVIDIA RTX A6000", "RTX A6000"),
    ("NVIDIA RTX A4000", "RTX A4000"),
    ("NVIDIA RTX 6000 Ada Generation", "RTX 6000Ada"),
    ("NVIDIA RTX 4000 Ada Generation", "RTX 4000Ada"),
    ("NVIDIA RTX PRO 6000 Blackwell Server Edition", "RTX PRO 6000 S"),
    ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", "RTX PRO 6000 WS"),
    ("NVIDIA A100-SXM4-80GB", "A100 SXM4"),
    ("NVIDIA A100-SXM4-40GB", "A100 SXM4"),
    ("NVIDIA A100 80GB PCIe", "A100 PCIE"),
    ("NVIDIA A100-PCIE-40GB", "A100 PCIE"),
    ("NVIDIA H100 80GB HBM3", "H100 SXM"),
    ("NVIDIA H100 PCIe", "H100 PCIE"),
    ("NVIDIA H100 NVL", "H100 NVL"),
    ("NVIDIA H200", "H200"),
    ("NVIDIA B200", "B200"),
    ("NVIDIA L40S", "L40S"),
    ("NVIDIA L40", "L40"),
    ("NVIDIA L4", "L4"),
    ("NVIDIA A40", "A40"),
    ("NVIDIA A10", "A10"),
    ("Tesla V100-SXM2-32GB", "Tesla V100"),
    ("Tesla T4", "Tesla T4"),
    ("Quadro RTX 8000", "Q RTX 8000"),
    ("NVIDIA GeForce GTX 1080 Ti", "GTX 1080 Ti"),
    ("NVIDIA TITAN RTX", "Titan RTX"),
    ("NVIDIA GeForce RTX 5090", "RTX 5090"),
]
OTHER = [
    ("NVIDIA GeForce RTX 4090", "RTX 4090D"),
    ("NVIDIA GeForce RTX 4080", "RTX 4080S"),
    ("NVIDIA GeForce RTX 3080", "RTX 3080 Ti"),
    ("NVIDIA GeForce RTX 3080 Ti", "RTX 3080"),
    ("NVIDIA L40", "L40S"),
    ("NVIDIA L40S", "L40"),
    ("NVIDIA L4", "L40"),
    ("NVIDIA A10", "A100 PCIE"),
    ("NVIDIA A100 80GB PCIe", "A100 SXM4"),
    ("NVIDIA H100 PCIe", "H100 SXM"),
    ("NVIDIA H100 80GB HBM3", "H100 PCIE"),
    ("NVIDIA H100 80GB HBM3", "H200"),
    ("NVIDIA RTX A6000", "RTX 6000Ada"),
    ("Quadro RTX 6000", "RTX A6000"),
    ("NVIDIA RTX PRO 6000 Blackwell Server Edition", "RTX PRO 6000 WS"),
    ("NVIDIA GeForce RTX 2060", "RTX 4090"),
    ("NVIDIA GeForce RTX 3060 Laptop GPU", "RTX 3060"),
    ("", "RTX 4090"),
    ("NVIDIA GeForce RTX 4070 Ti SUPER", "RTX 4070 Ti"),
    ("NVIDIA GeForce RTX 4070 SUPER", "RTX 4070S Ti"),
]


@pytest.mark.parametrize(("driver_name", "market_name"), SAME)
def test_the_driver_and_the_market_name_the_same_gpu(driver_name, market_name):
    assert same_gpu(driver_name, market_name)


@pytest.mark.parametrize(("driver_name", "market_name"), OTHER)
def test_the_driver_names_another_gpu_than_the_market(driver_name, market_name):
    assert not same_gpu(driver_name, market_name)


def test_every_card_of_the_emulators_market_is_what_its_own_nvidia_smi_says():
    """The emulator's boxes answer with full names: none of its honest machines may be refused."""
    from ops.fakevast.cloud.catalogue import CARDS

    full = {"A100 SXM4": "A100-SXM4-80GB", "H100 SXM": "H100 80GB HBM3"}
    assert len(CARDS) > 10
    for name in CARDS:
        assert same_gpu(f"NVIDIA {full.get(name, name)}", name), name


def test_a_b300_is_the_card_that_its_driver_calls_ac() -> None:
    assert same_gpu("NVIDIA B300 SXM6 AC", "B300")


# -- the host --------------------------------------------------------------------------------------


def host(memory: str = "", shm: str = "") -> HostFacts:
    return parse(f"{MARK} memory\n{memory}\n{MARK} shm\n{shm}\n").host


def test_the_limits_of_the_container_count_and_not_what_the_machine_has():
    assert host("135000000000\n17179869184\n") == HostFacts(16.0)
    assert host("17179869184\nmax\n") == HostFacts(16.0)
    assert host("17179869184\n9223372036854771712\n") == HostFacts(16.0)


@pytest.mark.parametrize("said", ["", "nonsense", "-5", "9" * 5000, "max"])
def test_a_host_that_says_nothing_is_not_judged(said):
    assert host(said, said) == HostFacts()
    unknown = replace(GOOD, host=HostFacts())
    assert unsuitable(unknown, replace(EXPECTED, min_cpu_ram_gib=64)) is None
    assert parse_disk(f"/dev/x 1 1 {said} 5% /") is None or said == "-5"


def test_a_container_with_less_memory_than_the_job_needs_is_refused():
    small = replace(GOOD, host=HostFacts(memory_gib=3.9))
    assert "3.9 GiB of host memory, this job needs 9" in str(
        unsuitable(small, replace(EXPECTED, min_cpu_ram_gib=9))
    )
    assert unsuitable(small, replace(EXPECTED, min_cpu_ram_gib=4)) is None
    tiny = replace(GOOD, host=HostFacts(memory_gib=0.5))
    assert "needs 4" in str(unsuitable(tiny, replace(EXPECTED, min_cpu_ram_gib=4)))
    assert unsuitable(tiny, EXPECTED) is None, "this job asks for none"


def test_several_gpus_need_shared_memory_to_speak_by():
    small = replace(GOOD, host=HostFacts(64, 1 << 20))
    assert "/dev/shm has 1 MiB" in str(unsuitable(small, EXPECTED))
    assert "/dev/shm has 0 MiB" in str(unsuitable(replace(GOOD, host=HostFacts(0, 1)), EXPECTED))
    one = replace(small, gpu=replace(GOOD.gpu, count=1))
    assert unsuitable(one, replace(EXPECTED, num_gpus=1)) is None


def test_this_machine_says_what_a_container_here_may_use():
    done = subprocess.run(["sh", "-c", SCRIPT], capture_output=True, text=True, timeout=60)
    shown = parse(done.stdout).host
    assert shown.memory_gib > 0


# -- to the number ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("least", "most_too_little", "word"),
    [
        ({"gpu": {"memory_gib": 19.0}}, {"gpu": {"memory_gib": 18.99}}, "its GPU has"),
        ({"host": {"memory_gib": 14.4}}, {"host": {"memory_gib": 14.39}}, "its container"),
        ({"host": {"shm_bytes": 32 << 20}}, {"host": {"shm_bytes": (32 << 20) - 1}}, "/dev/shm"),
        ({"disk": {"free_bytes": 20 << 30}}, {"disk": {"free_bytes": (20 << 30) - 1}}, "free"),
        ({"gpu": {"driver": "570.26"}}, {"gpu": {"driver": "570.25.99"}}, "is older than"),
    ],
)
def test_each_limit_is_kept_to_the_last_unit(least, most_too_little, word):
    expected = ExpectedMachine("RTX 4090", 2, 20.0, 40.0, 12.8, 16.0)

    def judged(changes):
        facts = GOOD
        for part, values in changes.items():
            facts = replace(facts, **{part: replace(getattr(facts, part), **values)})
        return unsuitable(facts, expected)

    assert judged(least) is None
    assert word in judged(most_too_little)


def test_of_several_gpus_the_weakest_counts_and_one_that_differs_is_named():
    rows = (
        "NVIDIA GeForce RTX 4090, 24564, 570.1, 8.9, Disabled\n"
        "NVIDIA GeForce RTX 3090, 24576, 570.1, 8.6, Enabled\n"
    )
    gpu, complaint = parse_gpu(rows)
    assert complaint == ""
    assert gpu == GpuFacts(
        "NVIDIA GeForce RTX 3090", 2, pytest.approx(24564 / 1024), "570.1", 8.6, True
    )
    alone, _ = parse_gpu("NVIDIA GeForce RTX 4090, 1024, 570.1, 8.9, Disabled\n", "0\n")
    assert alone == GpuFacts("NVIDIA GeForce RTX 4090", 1, 1.0, "570.1", 8.9, False)


def test_what_nvidia_smi_says_is_quoted_with_its_exit_code_and_cut():
    assert parse_gpu("", "124\n") == (None, "nvidia-smi does not answer within 30 s")
    assert parse_gpu("odd\n", "9") == (None, "nvidia-smi: odd (exit 9)")
    assert parse_gpu("odd\n", "") == (None, "nvidia-smi: odd")
    assert parse_gpu("", "") == (None, "nvidia-smi: says nothing")
    _, complaint = parse_gpu("z" * 500)
    assert complaint.count("z") == 200
    sound = "NVIDIA GeForce RTX 4090, 24564, 570.1, 8.9, [N/A]\n"
    assert parse_gpu(sound + "a warning\n") == (None, "nvidia-smi: a warning (exit 0)")
    assert parse_gpu(sound, "6")[0] is None, "an exit code spoils a whole answer"


def test_free_space_is_counted_in_bytes_and_never_below_nothing():
    assert parse_disk("h\n/dev/x 9 2 7 23% /home") == DiskFacts(7 * 1024, "/home")
    assert parse_disk("h\n/dev/x 9 12 -3 100% /") == DiskFacts(0, "/")
    assert parse_disk("h\n/dev/x 9 2 7 - /") == DiskFacts(7 * 1024, "/")
    assert parse_disk(f"h\n/dev/x 9 2 {'9' * 19} 1% /") is None


def test_the_smallest_of_a_hosts_limits_counts():
    assert host("2147483648\n1073741824\n") == HostFacts(1.0)
    assert host(shm="h\nshm 65536 0 65536 0% /dev/shm").shm_bytes == 64 << 20
