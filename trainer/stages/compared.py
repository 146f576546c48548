"""What the stages share that learn from preferences: items of one or two rows in one micro-batch,
log-probabilities of whole answers, and those of the adapter that training starts from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from trainer.data import batch, packing
from trainer.data.errors import InvalidJob
from trainer.data.tokenised import Rows
from trainer.loop.guards import ExpectedMetrics, Stopped
from trainer.loop.ranks import Ranks
from trainer.model.forward import target_log_probs
from trainer.stages import measured, sft
from trainer.wire.job import Job

SAME = 1e-6  # nats by which policy and reference may differ before the first step, an answer
REFERENCE = "reference"  # of what is kept in a checkpoint


class Reference:
    """The trained parameters as they are now, to be put in their place again: what they compute is
    the reference, with the same kernels, packs and precision as the policy."""

    def __init__(self, named: dict[str, nn.Parameter]) -> None:
        self._pairs = [(p, p.detach().clone()) for p in named.values()]

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Within it the model computes what it computed at the start. Not for gradients."""
        now = [p.data for p, _ in self._pairs]
        for parameter, start in self._pairs:
            parameter.data = start
        try:
            yield
        finally:
            for (parameter, _), data in zip(self._pairs, now, strict=True):
                parameter.data = data


def with_answers(micro: dict[str, Any], chosen: Sequence[int]) -> dict[str, Any]:
    """A micro-batch of the rows `chosen`, with what says where their answers are: "stage/slots"
    (targets,), the place of each target in a matrix of rows x "stage/longest"; "stage/lengths"
    (rows,), targets of each; "stage/ends" (rows,), flat position of the last token of each answer;
    "stage/numbers", the rows' numbers."""
    at = micro["targets_at"].numpy()
    if "cu_seq_lens_q" in micro:
        row = np.searchsorted(micro["cu_seq_lens_q"].numpy(), at, side="right") - 1
    else:
        row = at // micro["labels"].shape[1]
    lengths = np.bincount(row, minlength=len(chosen))
    firsts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
    longest = int(lengths.max())
    found = {
        "slots": row * longest + np.arange(len(at)) - firsts[row],
        "lengths": lengths,
        "ends": at[np.cumsum(lengths) - 1] + 1,
    }
    told: dict[str, Any] = {f"stage/{k}": torch.from_numpy(v) for k, v in found.items()}
    return micro | told | {"stage/longest": longest, "stage/numbers": tuple(chosen)}


def answer_log_probs(
    model: nn.Module, micro: dict[str, Any], temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """(log p of each token of each answer, entropies), fp32 (rows, longest), 0 behind an answer."""
    found, entropies = target_log_probs(model, micro, temperature)
    shape = (len(micro["stage/lengths"]), micro["stage/longest"])
    empty = found.new_zeros(shape[0] * shape[1])
    slots = micro["stage/slots"]
    return empty.scatter(0, slots, found).view(shape), empty.scatter(0, slots, entropies).view(
        shape
    )


class Stage(measured.Stage):
    """A stage whose items are `rows_per_item` rows that stay in one micro-batch."""

    def __init__(self, job: Job, run: Path) -> None:
        super().__init__(job, run)
        self.expected = ExpectedMetrics()

    def micro(self, rows: Rows, chosen: Sequence[int]) -> list[dict[str, Any]]:
        """The items `chosen` as micro-batches in host memory."""
        size, collate = self.rows_per_item, batch.packed if self.packed else batch.padded
        lengths = np.asarray(rows.lengths).reshape(-1, size)
        wide = lengths.sum(1) if self.packed else size * lengths.max(1)
        lay = packing.pack if self.packed else packing.pad
        made = []
        for items in lay(chosen, wide.tolist(), self.budget):
            numbers = [item * size + side for item in items for side in range(size)]
            one = with_answers(collate(rows, numbers, sft.HOST), numbers)
            made.append(batch.pinned(one, self.ranks.device))
        return made

    def batches(self, step: int) -> batch.Work:
        items, data, size = self.order.step(step), self.data.rows, self.rows_per_item
        wide = np.asarray(self.lengths).reshape(-1, size).sum(1).tolist()
        mine = packing.share(items, wide, self.ranks.world)[self.ranks.rank]
        return batch.Work(
            micro=self.micro(data, mine),
            filler=self.micro(data, items[:1])[0],
            count=len(items),
            tokens=sum(wide[item] for item in items),
            where=[data.where[item * size] for item in items],
        )


class Referenced(Stage):
    """A stage whose loss compares with the adapter that training starts from. The reference's
    numbers are made in the packs of the first epoch, and kept for the ones after."""

    references = True  # whether the loss asks for them

    def __init__(self, job: Job, run: Path) -> None:
        if job.lora.lora_dropout:
            raise InvalidJob(
                f"stage {job.stage} compares the model with its start, which dropout blurs",
                hint="set lora.lora_dropout = 0",
            )
        super().__init__(job, run)
        rows = len(self.data.rows)
        self.reference = torch.full((rows,), torch.nan, dtype=torch.float64)  # host memory

    def load(self, ranks: Ranks) -> None:
        super().load(ranks)
        self.start = Reference(self.trained())

    def sums(self, micro: dict[str, Any]) -> Tensor:
        """What is compared of each answer: its log-probability, fp64 (rows,)."""
        return answer_log_probs(self.model, micro)[0].double().sum(1)

    @torch.no_grad()
    def prepare(self, step: int, work: batch.Work) -> batch.Work:
        """The work with "stage/reference" (rows,) in each micro-batch."""
        if not self.references:
            return work
        rows = self._rows_of(step)
        if bool(self.reference[rows].isnan().any()):
            self._ask_reference(rows, work)
        device = self.ranks.device
        made = [
            m | {"stage/reference": self.reference[list(m["stage/numbers"])].to(device)}
            for m in (*work.micro, work.filler)
        ]
        return replace(work, micro=made[:-1], filler=made[-1])

    def _rows_of(self, step: int) -> list[int]:
        size = self.rows_per_item
        return [item * size + side for item in self.order.step(step) for side in range(size)]

    def _ask_reference(self, rows: list[int], work: batch.Work) -> None:
        """The reference's numbers of a step's rows, of all processes."""
        places = {row: k for k, row in enumerate(rows)}
        found = torch.zeros(len(rows), dtype=torch.float64, device=self.ranks.device)
        with self.start.in_place():
            for micro in work.micro:
                if self.ranks.may_leave:
                    return
                mine = [places[n] for n in micro["stage/numbers"]]
                found[mine] = self.ranks.enter(self.sums, batch.on(self.ranks.device, micro))
        self.reference[rows] = self.ranks.sum(found).cpu()

    def state(self) -> dict[str, Tensor]:
        return super().state() | {REFERENCE: self.reference}

    def restore(self, state: dict[str, Tensor]) -> None:
        super().restore(state)
        self.reference = state[REFERENCE]

    def validate_start(self, step: int, difference: float) -> None:
        """Raises Stopped when, in the first step, policy and reference differ: `difference` in
        nats, a mean over answers."""
        if step == 1 and self.references and difference > SAME:
            raise Stopped(
                f"before any training an answer's log-probability is {difference:.2e} nats off the "
                "reference's: the reference is not the model that training starts from",
                [],
                "report this, with the model's name and training.packing",
            )

    @torch.no_grad()
    def held_ratios(
        self, model: nn.Module, held: Rows, enter: measured.Enter
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Of the first held-out rows, in order: log-probability of each answer, that of the
        reference, and tokens; fp64 and int64 (rows,) in host memory."""
        size = self.rows_per_item
        items = range(min(measured.MOST_ROWS, len(held)) // size)
        found = torch.zeros(3, len(items) * size, dtype=torch.float64)
        for micro in self.micro(held, items):
            at, there = list(micro["stage/numbers"]), batch.on(self.ranks.device, micro)
            found[0, at] = enter(self._sums_of, model, there).cpu()
            with self.start.in_place():
                found[1, at] = enter(self._sums_of, model, there).cpu()
            found[2, at] = micro["stage/lengths"].double()
        return found[0], found[1], found[2].long()

    def _sums_of(self, model: nn.Module, micro: dict[str, Any]) -> Tensor:
        return answer_log_probs(model, micro)[0].double().sum(1)
