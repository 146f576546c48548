"""A Slurm of two nodes on this machine: Debian's munged, slurmctld and two slurmd, in a folder and
on loopback. All end with it.

`apt-get install slurmctld slurmd slurm-client munge`; as root, as slurmd wants it.
"""

from __future__ import annotations

import os
import secrets
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from machine import free_port

TOOLS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel")
NODES = ("n1", "n2")
CONF = """\
ClusterName=tea
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={port}
FirstJobId={first}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CryptoType=crypto/munge
CredType=cred/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmdParameters=config_overrides
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
GresTypes=gpu
PartitionName=gpu Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
NODE = "NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=4 Gres=gpu:1\n"


@contextmanager
def slurm(folder: Path) -> Iterator[dict[str, str]]:
    """The environment in which Slurm's commands speak to it. Raises AssertionError where its nodes
    do not come up."""
    for name in ("state", *(f"spool-{node}" for node in NODES)):
        (folder / name).mkdir(parents=True)
    first, control, *ports = (free_port() for _ in range(2 + len(NODES)))
    # the processes of a job meet at a port that follows from its number (ops/export)
    text = CONF.format(folder=folder, port=control, first=20000 + first % 20000)
    for name, port in zip(NODES, ports, strict=True):
        text += NODE.format(name=name, host=socket.gethostname(), port=port)
    (folder / "slurm.conf").write_text(text)
    (folder / "gres.conf").write_text(
        "".join(f"NodeName={name} Name=gpu File=/dev/null\n" for name in NODES)
    )
    (folder / "cgroup.conf").write_text("CgroupAutomount=no\n")
    (folder / "munge.key").write_bytes(secrets.token_bytes(32))
    (folder / "munge.key").chmod(0o600)
    env = os.environ | {"SLURM_CONF": str(folder / "slurm.conf")}
    munge = [f"--{word}={folder}/munge.{word.split('-')[0]}" for word in ("socket", "pid-file")]
    munge += [f"--key-file={folder}/munge.key", f"--log-file={folder}/munge.log"]
    munge += [f"--seed-file={folder}/munge.seed", "--foreground", "--force"]
    with ExitStack() as stack:
        for words in (
            ["munged", *munge],
            ["slurmctld", "-D", "-c"],
            *(["slurmd", "-D", "-N", name] for name in NODES),
        ):
            stack.enter_context(_running(words, env, folder))
            time.sleep(1)
        _wait_for_nodes(env, folder)
        yield env


@contextmanager
def _running(words: list[str], env: dict[str, str], folder: Path) -> Iterator[None]:
    with open(folder / f"{words[0]}-{words[-1].strip('-').replace('/', '_')}.log", "wb") as log:
        child = subprocess.Popen(words, env=env, stdout=log, stderr=log)
        try:
            yield
        finally:
            child.terminate()
            try:
                child.wait(20)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()


def _wait_for_nodes(env: dict[str, str], folder: Path) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        words = ["sinfo", "--noheader", "--Node", "--format=%t"]
        told = subprocess.run(words, env=env, capture_output=True, text=True).stdout.split()
        if told == ["idle"] * len(NODES):
            return
        time.sleep(0.5)
    logs = "\n".join(p.read_text(errors="replace")[-800:] for p in folder.glob("*.log"))
    raise AssertionError(f"its nodes are {told}\n{logs}")
