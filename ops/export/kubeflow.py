"""A TrainJob for Kubeflow Trainer, and the pod through which files come and go."""

from __future__ import annotations

import json
import shlex
from typing import Any

from ops.export.common import GRACE_S, ROOT, command
from ops.job.job_file import JobFile
from ops.job.plan import Plan

API = "trainer.kubeflow.org"


def kubeflow_files(job: JobFile, plan: Plan, nodes: int, queue: str | None) -> dict[str, str]:
    """name -> text of what `milktea export kubeflow` adds to the run folder, the README first."""
    objects = {
        "files.json": files_pod(job, plan),
        "trainjob.json": train_job(job, plan, nodes, queue),
    }
    texts = {name: json.dumps(value, indent=2) + "\n" for name, value in objects.items()}
    return {"README.md": readme(job, plan)} | texts


def train_job(job: JobFile, plan: Plan, nodes: int, queue: str | None) -> dict[str, Any]:
    """A TrainJob (v1alpha1) on the runtime torch-distributed, which Kubeflow Trainer installs."""
    name = object_name(job)
    gpus = {"nvidia.com/gpu": job.offer.num_gpus}
    pod = {
        "terminationGracePeriodSeconds": GRACE_S,
        # NCCL's buffers: a container's own 64 MB are too few
        "volumes": [volume(name), {"name": "shm", "emptyDir": {"medium": "Memory"}}],
        "containers": [
            {"name": "node", "volumeMounts": [mount(), {"name": "shm", "mountPath": "/dev/shm"}]}
        ],
    }
    jobs = [{"name": "node", "template": {"spec": {"template": {"spec": pod}}}}]
    labels = {"labels": {"kueue.x-k8s.io/queue-name": queue}} if queue else {}
    return {
        "apiVersion": f"{API}/v1alpha1",
        "kind": "TrainJob",
        "metadata": {"name": name} | labels,
        "spec": {
            "runtimeRef": {
                "apiGroup": API,
                "kind": "ClusterTrainingRuntime",
                "name": "torch-distributed",
            },
            "trainer": {
                "image": plan.image,
                "command": [
                    "sh",
                    "-c",
                    f"cd {ROOT}/{plan.run_id} && exec {shlex.join(command(plan))}",
                ],
                "numNodes": nodes,
                "numProcPerNode": job.offer.num_gpus,
                "resourcesPerNode": {"requests": gpus, "limits": gpus},
            },
            "runtimePatches": [
                {
                    "manager": "milktea",
                    "trainingRuntimeSpec": {"template": {"spec": {"replicatedJobs": jobs}}},
                }
            ],
        },
    }


def files_pod(job: JobFile, plan: Plan) -> dict[str, Any]:
    """The volume that all pods share, and a pod without a GPU that reads and writes it."""
    name = object_name(job)
    storage = f"{round(plan.needs.disk_gib)}Gi"
    claim = {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": {"name": name},
        "spec": {
            "accessModes": ["ReadWriteMany"],
            "resources": {"requests": {"storage": storage}},
        },
    }
    container = {
        "name": "files",
        "image": plan.image,
        "command": ["sh", "-c", "sleep 86400"],
        "volumeMounts": [mount()],
    }
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": f"{name}-files"},
        "spec": {
            "containers": [container],
            "volumes": [volume(name)],
            "restartPolicy": "Never",
            "terminationGracePeriodSeconds": 1,
        },
    }
    return {"apiVersion": "v1", "kind": "List", "items": [claim, pod]}


def volume(name: str) -> dict[str, Any]:
    return {"name": "run", "persistentVolumeClaim": {"claimName": name}}


def mount() -> dict[str, Any]:
    return {"name": "run", "mountPath": ROOT}


def object_name(job: JobFile) -> str:
    """A DNS label: it begins with a letter, whatever the job is called."""
    return f"milktea-{job.name}".rstrip("-")


def readme(job: JobFile, plan: Plan) -> str:
    name, run = object_name(job), f"{ROOT}/{plan.run_id}"
    ready = f"kubectl wait --for=condition=Ready pod/{name}-files --timeout=30m"
    inside = f"kubectl exec {name}-files --"
    return (
        f"1. `kubectl apply -f files.json && {ready} && {inside} mkdir -p {run}"
        f" && kubectl cp . {name}-files:{run}`\n"
        f"2. `kubectl apply -f trainjob.json`, then `{inside} tail -f {run}/events.jsonl`\n"
        f"3. `kubectl cp {name}-files:{run}/result result`, then"
        " `kubectl delete -f trainjob.json -f files.json` (the volume with it).\n"
    )
