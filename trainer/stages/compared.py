"""What the stages share that learn from preferences: items of one or two rows in one micro-batch,
looks at held-out ones, log-probabilities of whole answers, and those of the adapter that training
starts from."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from trainer.data import batch, packing, sharing
from trainer.data.errors import InvalidJob
from trainer.data.held_out import MOST_ROWS
from trainer.data.sharing import Borrowed
from trainer.data.tokenised import Rows
from trainer.loop.guards import ExpectedMetrics, Stopped
from trainer.loop.held_out import Look
from trainer.loop.progress import Readback
from trainer.loop.ranks import Ranks
from trainer.model.forward import target_log_probs
from trainer.model.parts import family_of
from trainer.stages import measured, sft
from trainer.stages.shared_probe import difference
from trainer.wire.job import Job
from trainer.wire.stages import Shares

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


def right(sides: Tensor) -> Tensor:
    """Of (pairs, 2), the chosen side first: 1 where it has more, 0.5 where both have the same."""
    first, second = sides.unbind(1)
    return (first > second).double() + (first == second).double() / 2


class Group(NamedTuple):
    """Rows that stay in one micro-batch, what each of them borrows of the first, and the tokens
    that they take there."""

    rows: list[int]
    borrowed: list[int]
    tokens: int


class Stage(measured.Stage):
    """A stage whose items are `rows_per_item` rows that stay in one micro-batch. Where the rows of
    an item begin alike, a pack has their beginning once (trainer/data/sharing.py)."""

    shares = False  # whether rows share their beginnings; known from `probe` on

    def __init__(self, job: Job, run: Path) -> None:
        super().__init__(job, run)
        self.expected = ExpectedMetrics()

    def probe(self) -> None:
        if isinstance(getattr(self.job, self.job.stage, None), Shares):
            why = self._why_apart()
            self.shares = not why
            self.kernels["prompts"] = f"of each row: {why}" if why else "of a group computed once"
        super().probe()

    def _why_apart(self) -> str:
        """Why rows do not share their beginnings, after comparing some that do with the same rows
        alone. Collective."""
        if why := sharing.why_apart(self.job, family_of(self.model), self.longest):
            return why
        if not self.packed:
            return "rows are not packed"
        example = self.example()
        if example is None:
            return f"no answers have {sharing.LEAST} tokens of a prompt in common"
        more = (*example, self.job.model.precision, self.ranks.device)
        said = self.ranks.enter(difference, self.model, *more)
        return next((why for why in self.ranks.gather(said) if why), "")

    def example(self) -> tuple[Rows, list[int]] | None:
        """(rows, the numbers of some of them that share their beginning); None where none do."""
        items = range(len(self.data.rows) // self.rows_per_item)
        groups = (self._item(item) for item in items)
        found = (g for g in groups if any(sharing.beginnings(self.data.rows, g)))
        group = next(found, None)
        return None if group is None else (self.data.rows, group)

    def _item(self, item: int) -> list[int]:
        """The rows of an item."""
        return [item * self.rows_per_item + side for side in range(self.rows_per_item)]

    def together(self, rows: Rows, items: Sequence[int]) -> list[list[int]]:
        """The rows of the items, in lists of those that stay together."""
        return [self._item(item) for item in items]

    def grouped(self, rows: Rows, items: Sequence[int]) -> list[Group]:
        """The rows of the items, as they stay together."""
        lengths, made = np.diff(rows.starts), []
        for one in self.together(rows, items):
            borrowed = sharing.beginnings(rows, one) if self.shares else [0] * len(one)
            tokens = int(lengths[one].sum()) - sum(borrowed)
            if not self.packed:
                tokens = len(one) * int(lengths[one].max())
            made.append(Group(one, borrowed, tokens))
        return made

    def micro(self, rows: Rows, chosen: Sequence[int]) -> list[dict[str, Any]]:
        """The items `chosen` as micro-batches in host memory."""
        groups, made = self.grouped(rows, chosen), []
        lay = packing.level if self.packed else packing.pad
        for places in lay(range(len(groups)), [g.tokens for g in groups], self.budget):
            numbers: list[int] = []
            taken: list[Borrowed] = []
            for group in (groups[k] for k in places):
                taken += [Borrowed(len(numbers), n) for n in group.borrowed]
                numbers += group.rows
            if self.packed:
                one = batch.packed(rows, numbers, sft.HOST, taken)
            else:
                one = batch.padded(rows, numbers, sft.HOST)
            made.append(batch.pinned(with_answers(one, numbers), self.ranks.device))
        return made

    def batches(self, step: int) -> batch.Work:
        items, data = self.order.step(step), self.data.rows
        wide = {i: g.tokens for i, g in zip(items, self.grouped(data, items), strict=True)}
        mine = packing.share(items, wide, self.ranks.world)[self.ranks.rank]
        return batch.Work(
            micro=self.micro(data, mine),
            filler=self.micro(data, items[:1])[0],
            count=len(items),
            tokens=sum(wide.values()),
            where=[data.where[item * self.rows_per_item] for item in items],
        )


class Judged(Stage):
    """A stage that looks at held-out items while it trains."""

    @property
    def step_tokens(self) -> int:
        tokens = np.asarray(self.data.rows.lengths).reshape(-1, self.rows_per_item).sum(1)
        steps = range(self.order.steps_per_epoch)
        return max((int(tokens[self.order.step(step)].sum()) for step in steps), default=0)

    @abstractmethod
    def judgement(self, micro: dict[str, Any]) -> Tensor:
        """Of a held-out micro-batch on the device, as `ready` makes it: (sum of the losses, items
        that are on their right side, where equal ones are half right), fp64 (2,)."""

    def before_look(self, held: Rows, items: range) -> None:
        """What `judgement` needs of all items of a look. Collective."""

    def ready(self, held: Rows, micro: dict[str, Any]) -> dict[str, Any]:
        """A held-out micro-batch on the device, with what `judgement` needs. Collective."""
        return batch.on(self.ranks.device, micro)

    @torch.no_grad()
    def look(self) -> Look | None:
        """A look at the items of the first MOST_ROWS held-out rows: the mean loss of one, and the
        share that is on its right side. The processes share them."""
        held, size = self.held, self.rows_per_item
        if held is None:
            return None
        items = range(min(MOST_ROWS, len(held)) // size)
        wide = np.asarray(held.lengths).reshape(-1, size).sum(1).tolist()
        mine = packing.share(items, wide, self.ranks.world)[self.ranks.rank]
        sums = torch.zeros(2, dtype=torch.float64, device=self.ranks.device)
        training, work = self.model.training, self.micro(held, mine)
        self.model.eval()
        self.before_look(held, items)
        for micro, weight in self.ranks.level(work, self.micro(held, items[:1])[0]):
            sums += weight * self.ranks.enter(self.judgement, self.ready(held, micro))
        self.model.train(training)
        loss, right = (self.ranks.sum(sums) / len(items)).tolist()
        return Look(len(items), loss, right)


class Referenced(Judged):
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
        held = len(self.held) if self.held is not None else 0
        self.held_reference = torch.full((held,), torch.nan, dtype=torch.float64)
        self.has_looked = False
        self._on_the_way: tuple[list[int], Readback] | None = None

    def load(self, ranks: Ranks) -> None:
        super().load(ranks)
        self.start = Reference(self.trained())

    def sums(self, micro: dict[str, Any]) -> Tensor:
        """What is compared of each answer: its log-probability, fp64 (rows,)."""
        return answer_log_probs(self.model, micro)[0].double().sum(1)

    @torch.no_grad()
    def prepare(self, step: int, work: batch.Work) -> batch.Work:
        """The work with "stage/reference" (rows,) in each micro-batch. Nothing waits for the device
        here: numbers that are made now come to the host while the step is computed."""
        if not self.references:
            return work
        self._take_home()
        rows = self._rows_of(step)
        places = {row: k for k, row in enumerate(rows)}
        found = self.reference[rows]
        if bool(found.isnan().any()):
            asked = self._asked_reference(places, work)
            self._on_the_way = None if asked is None else (rows, Readback(asked))
            found = found if asked is None else asked
        each, device = (*work.micro, work.filler), self.ranks.device
        made = []
        for micro in each:
            at = [places[n] for n in micro["stage/numbers"]]
            if found.device.type == device.type:
                chosen = found[self._index(at)]
            else:
                told = batch.pinned({"reference": found[at]}, device)
                chosen = batch.on(device, told)["reference"]
            made.append(micro | {"stage/reference": chosen})
        return replace(work, micro=made[:-1], filler=made[-1])

    def _index(self, places: list[int]) -> Tensor:
        """The numbers on the device, without waiting for it."""
        told = batch.pinned({"places": torch.tensor(places)}, self.ranks.device)
        index: Tensor = batch.on(self.ranks.device, told)["places"]
        return index

    def _take_home(self) -> None:
        """Keeps the reference's numbers of the step before in host memory."""
        if self._on_the_way is not None:
            rows, numbers = self._on_the_way
            self.reference[rows] = torch.tensor(numbers.read(), dtype=torch.float64)
            self._on_the_way = None

    def ready(self, held: Rows, micro: dict[str, Any]) -> dict[str, Any]:
        """With "stage/reference" (rows,). The reference's numbers are made in the first look."""
        there, numbers = super().ready(held, micro), list(micro["stage/numbers"])
        if not self.references:
            return there
        if not self.has_looked:
            with self.start.in_place():
                self.held_reference[numbers] = self.ranks.enter(self.sums, there).cpu()
        return there | {"stage/reference": self.held_reference[numbers].to(self.ranks.device)}

    def look(self) -> Look | None:
        found = super().look()
        self.has_looked = True
        return found

    def _rows_of(self, step: int) -> list[int]:
        size = self.rows_per_item
        return [item * size + side for item in self.order.step(step) for side in range(size)]

    def _asked_reference(self, places: dict[int, int], work: batch.Work) -> Tensor | None:
        """The reference's numbers of a step's rows, of all processes, on the device; `places` says
        where each row's stands. None when this process leaves."""
        found = torch.zeros(len(places), dtype=torch.float64, device=self.ranks.device)
        with self.start.in_place():
            for micro, weight in self.ranks.level(work.micro, work.filler):
                if self.ranks.may_leave:
                    return None
                mine = self._index([places[n] for n in micro["stage/numbers"]])
                sums = self.ranks.enter(self.sums, batch.on(self.ranks.device, micro))
                found[mine] += weight * sums
        return self.ranks.sum(found)

    def state(self) -> dict[str, Tensor]:
        self._take_home()
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
