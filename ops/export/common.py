"""What both schedulers share: the command of a machine and where the run folder is."""

from __future__ import annotations

from ops.job.plan import Plan

GRACE_S = 120  # before the end of its time a job is told to save
CPUS_PER_GPU = 4
ROOT = "/milktea"  # of the shared volume in a pod, and of the run folder in a container

# For an image without our trainer: what it imports goes into the container, on each machine,
# since machines share the run folder. Its folder has a name that nobody can make first: a node's
# /tmp is open to its other users, and apptainer shows it inside.
_PUSHED = (
    'venv=`mktemp -d` && python3 -m venv --system-site-packages "$venv"'
    ' && "$venv/bin/python" -m pip install -q --no-deps --require-hashes'
    " -r trainer-requirements.txt"
    ' && PYTHONPATH=. exec "$venv/bin/python" -m trainer.launch job.json'
)


def command(plan: Plan) -> list[str]:
    """What runs in the run folder, once on each machine. Our images are offline by their
    environment: a base from the hub opens them, and the machines share what was fetched."""
    from_hub = plan.wire_job["model"]["path"] is None
    online = ["HF_HUB_OFFLINE=0", "TRANSFORMERS_OFFLINE=0", "HF_HOME=hub"]
    train = ["milktea-train", "job.json"] if plan.trainer == "image" else ["sh", "-c", _PUSHED]
    return (["env", *online] if from_hub else []) + train
