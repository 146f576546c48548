"""A job for another scheduler: a run folder of the wire with what Slurm or Kubeflow needs."""
