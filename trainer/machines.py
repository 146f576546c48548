"""Which machine of several this is, read from the environment that a scheduler sets. torchrun's
rendezvous does the rest.

Kubeflow Trainer   PET_NNODES, PET_NODE_RANK, PET_MASTER_ADDR, PET_MASTER_PORT (torchrun's own
names; PET_NNODES may be a range, 1:4)
Slurm              SLURM_STEP_NUM_NODES, SLURM_NODEID, set by srun for each task; MASTER_ADDR,
MASTER_PORT by the batch file
by hand            NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

PORT = 29500  # torchrun's own
# of all processes together, after one was lost; each goes on from the newest whole checkpoint
RESTARTS = 3
LAST_CALL_S = 30  # how long a range of machines waits for one more once it has enough


@dataclass(frozen=True)
class Machines:
    """From `min_nodes` to `max_nodes` machines that meet at address:port. `rank` is None where only
    the rendezvous will number them."""

    min_nodes: int
    max_nodes: int
    rank: int | None
    address: str
    port: int
    restarts: int = RESTARTS
    last_call_s: int = LAST_CALL_S

    @property
    def elastic(self) -> bool:
        return self.min_nodes < self.max_nodes

    def _rendezvous(self) -> list[str]:
        """Its store lives on machine 0: said where it is known, so that no name has to be compared
        with the machine's own."""
        return [] if self.rank is None else [f"is_host={str(self.rank == 0).lower()}"]

    def accelerate_options(self) -> list[str]:
        conf = ",".join(self._rendezvous())
        return [
            "--machine_rank",
            str(self.rank),
            "--main_process_ip",
            self.address,
            "--main_process_port",
            str(self.port),
            "--rdzv_backend",
            "c10d",
            "--rdzv_conf",
            conf,
            "--max_restarts",
            str(self.restarts),
        ]

    def torchrun_options(self, processes: int) -> list[str]:
        conf = ",".join([*self._rendezvous(), f"last_call_timeout={self.last_call_s}"])
        return [
            "--nnodes",
            f"{self.min_nodes}:{self.max_nodes}",
            "--nproc-per-node",
            str(processes),
            "--max-restarts",
            str(self.restarts),
            "--rdzv-backend",
            "c10d",
            "--rdzv-endpoint",
            f"{self.address}:{self.port}",
            "--rdzv-conf",
            conf,
        ]


def read_machines(environment: Mapping[str, str]) -> Machines | None:
    """None on one machine. Raises ValueError, saying what to set, when the environment tells of
    several but not where they meet."""
    for count, rank, prefix in (
        ("PET_NNODES", "PET_NODE_RANK", "PET_"),
        ("NNODES", "NODE_RANK", ""),
        ("SLURM_STEP_NUM_NODES", "SLURM_NODEID", ""),
    ):
        if environment.get(count, "1") == "1":
            continue
        min_nodes, max_nodes = _range(count, environment[count])
        address, number = environment.get(f"{prefix}MASTER_ADDR"), environment.get(rank)
        if not address:
            raise ValueError(
                f"{count}={environment[count]} tells of several machines: set "
                f"{prefix}MASTER_ADDR to the first one's name, on each"
            )
        if number is None and min_nodes == max_nodes:
            raise ValueError(
                f"{count}={environment[count]} tells of several machines: set {rank} on "
                "each, from 0"
            )
        if number is not None and not 0 <= int(number) < max_nodes:
            raise ValueError(
                f"{rank}={number} is not one of {max_nodes} machines, which count from 0"
            )
        port = int(environment.get(f"{prefix}MASTER_PORT", PORT))
        restarts = int(environment.get(f"{prefix}MAX_RESTARTS", RESTARTS))
        last_call = int(environment.get("MILKTEA_LAST_CALL_S", LAST_CALL_S))
        return Machines(
            min_nodes,
            max_nodes,
            None if number is None else int(number),
            address,
            port,
            restarts,
            last_call,
        )
    return None


def _range(name: str, text: str) -> tuple[int, int]:
    """ "2" or "1:4"."""
    first, _, last = text.partition(":")
    last = last or first
    if not (first.isdigit() and last.isdigit() and 1 <= int(first) <= int(last)):
        raise ValueError(f"{name}={text} is neither a number of machines nor a range like 1:4")
    return int(first), int(last)
