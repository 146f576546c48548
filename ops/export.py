"""One job for a cluster of your own: the same image and the same job.json, started by an engine that is there already.

`export` writes a folder that is a run folder of the wire (job.json, data/, model/) with what Slurm or Kubeflow Trainer needs beside it. Which machine
is first is told by the engine's own variables (trainer/machines.py); who waits for what is the engine's business.
"""

from __future__ import annotations

import json
import shlex
import shutil
import tempfile
from pathlib import Path
from typing import Any, Literal

from ops import config, planner
from ops.config import JobFile
from ops.errors import ConfigError
from ops.plan import Plan

Kind = Literal["slurm", "kubeflow"]
GRACE_S = 120  # before the end of its time a job is told to save
CPUS_PER_GPU = 4
ROOT = "/milktea"  # of the shared volume in a pod, and of the run folder in a container

# For an image without our trainer: what it imports goes into the container, on each machine, since machines share the run folder.
_PUSHED = (
    "python3 -m venv --system-site-packages /tmp/milktea-venv && /tmp/milktea-venv/bin/python -m pip install -q -r trainer-requirements.txt"
    " && PYTHONPATH=. exec /tmp/milktea-venv/bin/python -m trainer.launch job.json"
)


def export(kind: Kind, job_path: Path, out: Path, nodes: int = 1, queue: str | None = None) -> list[Path]:
    """Checks the job as a rental would be checked, and writes OUT/NAME-KIND/. Returns what it wrote, the README first.

    `queue` is Slurm's partition or Kueue's local queue. Twice is once; a folder in which a run has begun is refused. Raises ConfigError,
    PreflightError. Costs nothing, and needs no account."""
    job = config.load(job_path)
    refuse_rows_for_nobody(job, nodes)
    folder = out / f"{job.name}-{kind}"
    if (folder / "events.jsonl").exists():
        raise ConfigError(f"{folder}: a run has begun here", hint="name another --out, or remove that folder")
    with tempfile.TemporaryDirectory() as stage:
        plan = planner.planned(job, folder.name, Path(stage))
    folder.mkdir(parents=True, exist_ok=True)
    written = {"job.json": json.dumps(plan.wire_job, indent=1, ensure_ascii=False) + "\n"}
    if kind == "slurm":
        written = {"README.md": slurm_readme(plan), "train.sbatch": slurm(job, plan, nodes, queue)} | written
    else:
        objects = {"files.json": files_pod(job, plan), "trainjob.json": kubeflow(job, plan, nodes, queue)}
        written = {"README.md": kubeflow_readme(job, plan)} | {k: json.dumps(v, indent=2) + "\n" for k, v in objects.items()} | written
    for name, text in written.items():
        (folder / name).write_text(text, encoding="utf-8")
    for push in plan.pushes:
        target = folder / push.remote
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(push.local, target)
    return [folder / name for name in (*written, *(p.remote for p in plan.pushes))]


def refuse_rows_for_nobody(job: JobFile, nodes: int) -> None:
    processes = nodes * job.offer.num_gpus
    if nodes < 1 or job.training.batch_size < processes:
        raise ConfigError(
            f"training.batch_size = {job.training.batch_size} leaves some of {nodes} x {job.offer.num_gpus} GPUs without a row",
            hint="raise training.batch_size, or export for fewer nodes",
        )


def command(plan: Plan) -> list[str]:
    """What runs in the run folder, on each machine once. Our images are offline by their environment: a base from the hub opens them, and
    the machines share what was fetched."""
    from_hub = plan.wire_job["model"]["path"] is None
    online = ["env", "HF_HUB_OFFLINE=0", "TRANSFORMERS_OFFLINE=0", "HF_HOME=hub"] if from_hub else []
    return online + (["milktea-train", "job.json"] if plan.trainer == "image" else ["sh", "-c", _PUSHED])


# -- Slurm ------------------------------------------------------------------------------------------------------------------------


def slurm(job: JobFile, plan: Plan, nodes: int, queue: str | None = None) -> str:
    """The sbatch file. It requeues itself when its time ends before the training does: the next start goes on from the last checkpoint."""
    gpus = job.offer.num_gpus
    options = {
        "job-name": plan.run_id, "nodes": nodes, "ntasks-per-node": 1, "gpus-per-node": gpus, "cpus-per-task": CPUS_PER_GPU * gpus,
        "time": slurm_time(job.limits.max_hours), "output": "log.txt", "open-mode": "append", "requeue": None, "signal": f"B:USR1@{GRACE_S}",
    } | ({"partition": queue} if queue else {})  # fmt: skip
    head = "\n".join(f"#SBATCH --{k}" + ("" if v is None else f"={v}") for k, v in options.items())
    return f"""\
#!/bin/bash
# {plan.run_id} on {nodes} x {gpus} GPUs. Made by `milktea export slurm`; in this folder, which all nodes must see: sbatch train.sbatch
{head}
cd "$SLURM_SUBMIT_DIR" || exit 9
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
export MASTER_ADDR MASTER_PORT

# MILKTEA_CONTAINER: pyxis, apptainer, docker, or none (milktea-train is on the nodes' PATH). MILKTEA_IMAGE: another place, or a .sqsh or .sif file.
engine=${{MILKTEA_CONTAINER:-}}
if [ -z "$engine" ]; then
  if srun --help 2>&1 | grep -q container-image; then engine=pyxis
  elif command -v apptainer >/dev/null; then engine=apptainer
  elif command -v docker >/dev/null; then engine=docker
  else engine=none; fi
fi
run={ROOT}/{plan.run_id}
command=({shlex.join(command(plan))})
in_step=() in_front=()
case $engine in
  pyxis)
    in_step=(--container-image="${{MILKTEA_IMAGE:-{enroot(plan.image)}}}" --container-mounts="$PWD:$run" --container-workdir="$run") ;;
  apptainer)
    in_front=(apptainer exec --nv --bind "$PWD:$run" --pwd "$run" "${{MILKTEA_IMAGE:-docker://{plan.image}}}") ;;
  docker)
    in_front=(docker run --rm --gpus all --network host --ipc host --user "$(id -u):$(id -g)" --volume "$PWD:$run" --workdir "$run"
      --env HOME=/tmp --env CUDA_VISIBLE_DEVICES --env SLURM_STEP_NUM_NODES --env SLURM_NODEID --env MASTER_ADDR --env MASTER_PORT
      --entrypoint "${{command[0]}}" "${{MILKTEA_IMAGE:-{plan.image}}}")
    command=("${{command[@]:1}}") ;;
esac

# One task a node: torchrun starts a process for each GPU. No --kill-on-bad-exit: the first node may still be writing what it has.
late=
trap 'late=1; scancel --signal=TERM "$SLURM_JOB_ID"' USR1
srun --nodes={nodes} --ntasks-per-node=1 --cpus-per-task={CPUS_PER_GPU * gpus} --mpi=none "${{in_step[@]}}" "${{in_front[@]}}" "${{command[@]}}" &
task=$!
wait "$task"
code=$?
if [ -n "$late" ]; then # the signal ended that wait, not the task
  wait "$task"
  code=$?
  if [ "$code" -eq 143 ]; then scontrol requeue "$SLURM_JOB_ID"; fi
fi
exit "$code"
"""


def slurm_time(hours: float) -> str:
    """D-HH:MM:SS, at least ten minutes."""
    minutes = max(10, round(hours * 60))
    return f"{minutes // 1440}-{minutes // 60 % 24:02d}:{minutes % 60:02d}:00"


def enroot(ref: str) -> str:
    """An image reference as pyxis wants it: the registry's host is followed by #."""
    host, slash, rest = ref.partition("/")
    return f"{host}#{rest}" if slash and ("." in host or ":" in host or host == "localhost") else ref


def slurm_readme(plan: Plan) -> str:
    return f"""\
1. Put this folder where all nodes see it (NFS, Lustre), and in it: `sbatch train.sbatch`
2. `tail -f log.txt`; the image is {plan.image}, `MILKTEA_CONTAINER=apptainer sbatch train.sbatch` says how to run it.
3. result/adapter.zip is the result. A job that ends early goes on from checkpoints/ when it is submitted again.
"""


# -- Kubeflow ---------------------------------------------------------------------------------------------------------------------


def kubeflow(job: JobFile, plan: Plan, nodes: int, queue: str | None = None) -> dict[str, Any]:
    """A TrainJob (trainer.kubeflow.org/v1alpha1) on the runtime torch-distributed, which Kubeflow Trainer installs."""
    name = object_name(job)
    gpus = {"nvidia.com/gpu": job.offer.num_gpus}
    run = f"cd {ROOT}/{plan.run_id} && exec {shlex.join(command(plan))}"
    pod = {
        "terminationGracePeriodSeconds": GRACE_S,
        "volumes": [volume(name), {"name": "shm", "emptyDir": {"medium": "Memory"}}],  # NCCL's buffers: a container's own 64 MB are too few
        "containers": [{"name": "node", "volumeMounts": [mount(), {"name": "shm", "mountPath": "/dev/shm"}]}],
    }
    jobs = [{"name": "node", "template": {"spec": {"template": {"spec": pod}}}}]
    return {
        "apiVersion": "trainer.kubeflow.org/v1alpha1",
        "kind": "TrainJob",
        "metadata": {"name": name} | ({"labels": {"kueue.x-k8s.io/queue-name": queue}} if queue else {}),
        "spec": {
            "runtimeRef": {"apiGroup": "trainer.kubeflow.org", "kind": "ClusterTrainingRuntime", "name": "torch-distributed"},
            "trainer": {
                "image": plan.image,
                "command": ["sh", "-c", run],
                "numNodes": nodes,
                "numProcPerNode": job.offer.num_gpus,
                "resourcesPerNode": {"requests": gpus, "limits": gpus},
            },
            "runtimePatches": [{"manager": "milktea", "trainingRuntimeSpec": {"template": {"spec": {"replicatedJobs": jobs}}}}],
        },
    }


def files_pod(job: JobFile, plan: Plan) -> dict[str, Any]:
    """The volume that all pods share, and a pod through which files come and go; it holds no GPU."""
    name = object_name(job)
    claim = {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": {"name": name},
        "spec": {"accessModes": ["ReadWriteMany"], "resources": {"requests": {"storage": f"{round(plan.needs.disk_gib)}Gi"}}},
    }
    container = {"name": "files", "image": plan.image, "command": ["sh", "-c", "sleep 86400"], "volumeMounts": [mount()]}
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": f"{name}-files"},
        "spec": {"containers": [container], "volumes": [volume(name)], "restartPolicy": "Never", "terminationGracePeriodSeconds": 1},
    }
    return {"apiVersion": "v1", "kind": "List", "items": [claim, pod]}


def volume(name: str) -> dict[str, Any]:
    return {"name": "run", "persistentVolumeClaim": {"claimName": name}}


def mount() -> dict[str, Any]:
    return {"name": "run", "mountPath": ROOT}


def object_name(job: JobFile) -> str:
    """A DNS label: it begins with a letter, whatever the job is called."""
    return f"milktea-{job.name}".rstrip("-")


def kubeflow_readme(job: JobFile, plan: Plan) -> str:
    name, run = object_name(job), f"{ROOT}/{plan.run_id}"
    ready = f"kubectl wait --for=condition=Ready pod/{name}-files --timeout=30m"
    return f"""\
1. `kubectl apply -f files.json && {ready} && kubectl exec {name}-files -- mkdir -p {run} && kubectl cp . {name}-files:{run}`
2. `kubectl apply -f trainjob.json`, then `kubectl exec {name}-files -- tail -f {run}/events.jsonl`
3. `kubectl cp {name}-files:{run}/result result`, then `kubectl delete -f trainjob.json -f files.json` (the volume with it).
"""
