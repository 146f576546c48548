"""A job in Python: declared, planned, run, and its result talked to.

`Job` is what a job file says, checked by the same models; `Run` (ops/run/view.py) is the folder of
one run of it, and `Result` what that run came to.
"""

from ops.declare.job import Job
from ops.declare.result import Result
from ops.declare.volume import Volume
from ops.job.afterwards import Evaluate, Results
from ops.job.job_file import Data, Image, Limits, Model, OfferRequirements
from trainer.wire.job import Lora, Training

__all__ = [
    "Data",
    "Evaluate",
    "Image",
    "Job",
    "Limits",
    "Lora",
    "Model",
    "OfferRequirements",
    "Result",
    "Results",
    "Training",
    "Volume",
]
