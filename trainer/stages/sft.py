"""Supervised fine-tuning: the model learns the answers (or the text) of each row.

A batch is `training.batch_size` rows of one global order, the loss the cross-entropy of their
target tokens. At the end the held-out questions are answered, by the model before and after.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from trainer.data import batch, packing
from trainer.data.errors import InvalidJob
from trainer.data.held_out import MOST_ROWS
from trainer.data.prepare import looks_at, order_of
from trainer.data.stage_rows import held_rows, prepare
from trainer.data.tokenised import Rows
from trainer.eval import held_out
from trainer.loop import checkpoint, report, stage
from trainer.loop.budget import micro_batch
from trainer.loop.guards import ExpectedMetrics, probe, target_entropy, validate_labels
from trainer.loop.held_out import Look
from trainer.loop.ranks import Ranks
from trainer.loop.reporter import Reporter
from trainer.model.forward import hidden_states, target_facts, target_loss
from trainer.model.load import family_in, why_unpacked
from trainer.model.lora import start_values
from trainer.model.parts import ModelError
from trainer.model.prompts import continue_prompt, is_prompted
from trainer.model.roles import continue_from, stack_on
from trainer.model.small_copy import copy_of
from trainer.result import adapter
from trainer.result.merged import base_of
from trainer.wire import events
from trainer.wire.chain import chain_of
from trainer.wire.job import Job, Start
from trainer.wire.page import page
from trainer.wire.prompts import places_of
from trainer.wire.stages import STAGES

log = logging.getLogger(__name__)

HOST = torch.device("cpu")
CHRF = "chrF of longer answers"
LEAK, LEAK_INT8 = 0.01, 0.05  # of a hidden state that another document may change


class Stage(stage.Stage):
    def __init__(self, job: Job, run: Path) -> None:
        super().__init__(job, run)
        self.rows_per_item = STAGES[job.stage].rows_per_item
        self.data = prepare(job, run)
        rows = self.data.rows
        self.validate(rows)
        self.front = places_of(job.training.method, job.prompt_learning)
        self.lengths, self.targets = self.places(rows), rows.targets()
        self.order = order_of(job, len(rows) // self.rows_per_item)
        self.total_steps = self.order.total_steps
        self.held = held_rows(job, run, self.data)
        if self.held is not None and STAGES[job.stage].looks:
            self.look_every = looks_at(job, rows, self.held).every
        elif asked := job.training.asks_for_the_best:
            raise InvalidJob(
                f"training.{asked}: no row is held out to look at",
                rows.summary,
                "name a file in data.held_out, or remove the setting",
            )
        self.notes = tuple(rows.notes)
        learned = job.start is not None or bool(job.merged)
        self.expected = ExpectedMetrics(entropy=target_entropy(rows), learned=learned)
        self.answers_at_end = job.data.held_out is not None

    def validate(self, rows: Rows) -> None:
        """Raises Stopped for labels that only a broken mask gives."""
        validate_labels(rows)

    def places(self, rows: Rows) -> list[int]:
        """Tokens of each row, with the places of a learned prompt in front of it."""
        return [n + self.front for n in rows.lengths]

    @property
    def longest(self) -> int:
        """Tokens of the longest row that the model reads, with a learned prompt's places."""
        return max(self.lengths)

    @property
    def step_tokens(self) -> int:
        """Tokens of the largest step, of all processes, where one micro-batch may hold it."""
        return 0

    def load(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self.base = base_of(self.job, self.run, ranks)
        longest = self.longest
        family, precision = family_in(self.base, longest), self.job.model.precision
        why = why_unpacked(family, longest, ranks.device, precision)
        self.packed = self.job.training.packing and not why
        if not self.kept.holds(self.job, self.base, ranks.device, longest):
            self.kept.compared = self.compare_with_stock(ranks, self.packed)
        if ranks.rank == 0:
            self._rehearse_saving()
        step = self.step_tokens // ranks.world if self.packed else 0
        room = micro_batch(self.job, self.base, longest, ranks, step)
        self.budget, self.recomputed = room
        self.model, self.kernels = self.kept.load(
            self.job, self.base, ranks.device, self.recomputed, ranks.shard, longest
        )
        self.keys = self.kept.keys
        self.kernels |= self.kept.compared
        if why:
            self.kernels["rows"] = f"one by one: {why}"
        if self.job.start is not None:
            self._take_up(self.job.start)
        ranks.place(self.model)
        self.initial = start_values(self.model, self.job)

    def _take_up(self, start: Start) -> None:
        """Puts the adapter that training starts from into the model. Raises ModelError for one of
        another base."""
        folder = self.run / start.path
        told = chain_of(folder)
        if told is not None and told.base_sha256 != adapter.identity(self.base):
            raise ModelError(
                f"{start.name} was trained on other weights than those of {self.job.model.base} "
                "here: start from an adapter of this base"
            )
        if is_prompted(self.model):
            continue_prompt(self.model, folder)
        else:
            (continue_from if start.how == "continue" else stack_on)(self.model, folder)

    def _rehearse_saving(self) -> None:
        """Raises ResultError where the result of this model and method could not be saved."""
        try:
            model = copy_of(self.job, self.base)
        except Exception as why:  # as compare_with_stock: the copy's own fault
            log.warning("saving was not rehearsed: %s", why)
            return
        adapter.rehearse(model, self.job)

    def probe(self) -> None:
        if not self.packed:
            return

        def read(ids: Tensor, positions: Tensor, ends: Tensor, longest: int) -> Tensor:
            inputs: dict[str, Any] = {"input_ids": ids, "position_ids": positions}
            inputs |= {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends}
            inputs |= {"max_length_q": longest, "max_length_k": longest}
            return cast(Tensor, self.ranks.enter(hidden_states, self.model, **inputs))

        leak = LEAK_INT8 if self.job.model.precision == "int8" else LEAK
        probe(self.model, read, self.data.rows, self.ranks.device, leak)

    def micro(self, rows: Rows, chosen: Sequence[int]) -> list[dict[str, Any]]:
        """The rows `chosen` as micro-batches in host memory."""
        packed = (packing.level, batch.packed)
        lay, collate = packed if self.packed else (packing.pad, batch.padded)
        packs = lay(
            chosen, self.lengths if rows is self.data.rows else self.places(rows), self.budget
        )
        return [batch.pinned(collate(rows, one, HOST), self.ranks.device) for one in packs]

    def batches(self, step: int) -> batch.Work:
        rows, data = self.order.step(step), self.data.rows
        mine = packing.share(rows, self.lengths, self.ranks.world)[self.ranks.rank]
        return batch.Work(
            micro=self.micro(data, mine),
            filler=self.micro(data, rows[:1])[0],
            count=sum(self.targets[r] for r in rows),
            tokens=sum(data.lengths[r] for r in rows),
            where=[data.where[r] for r in rows],
        )

    def loss(self, step: int, micro: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """`micro`: batch.packed's or batch.padded's."""
        self.keys.set(self.job.training.seed, step, micro["rows"], micro["position_ids"])
        return target_loss(self.model, micro), {}

    @torch.no_grad()
    def look(self) -> Look | None:
        """A look at the first MOST_ROWS held-out rows; the processes share them."""
        held = self.held
        if held is None or not STAGES[self.job.stage].looks:
            return None
        chosen, lengths, targets = range(min(MOST_ROWS, len(held))), held.lengths, held.targets()
        mine = packing.share(chosen, lengths, self.ranks.world)[self.ranks.rank]
        sums = torch.zeros(2, dtype=torch.float64, device=self.ranks.device)
        training, work = self.model.training, self.micro(held, mine)
        self.model.eval()
        for micro, weight in self.ranks.level(work, self.micro(held, chosen[:1])[0]):
            there = batch.on(self.ranks.device, micro)
            sums += weight * self.ranks.enter(target_facts, self.model, there)
        self.model.train(training)
        loss, right = (self.ranks.sum(sums) / sum(targets[row] for row in chosen)).tolist()
        return Look(len(chosen), loss, right)

    def finish(self, model: nn.Module, state: checkpoint.State, reporter: Reporter) -> str:
        scored = self._score(model, reporter)
        score = scored.exact if scored.rows else None
        more = {"held_out": {CHRF: scored.chrf}} if scored.long_rows else {}
        return self.write(model, state, more, scored.samples, score)

    def write(
        self,
        model: nn.Module,
        state: checkpoint.State,
        more: dict[str, Any],
        samples: Sequence[dict[str, str]] = (),
        score: tuple[float, float] | None = None,
    ) -> str:
        """The verified result, with `more` facts in its manifest; the sha256 of its archive."""
        job, template = self.job, self.data.template
        told = {
            "name": template.name,
            "sha256": template.sha256,
            "token_hash": self.data.token_hash,
        }
        facts = self.facts(state)
        both = {"held_out": facts.get("held_out", {}) | more.get("held_out", {})}
        facts |= {"template": told} | more | (both if both["held_out"] else {})
        png = report.curve_png(state.curve, job.run_id)
        report_html = page(job.model_dump(mode="json"), facts, samples, score)
        home, beside = {"loss.png": png}, {"report.html": report_html}
        return adapter.write_result(
            self.run, model, job, self.base, self.data, facts, home, beside, self.initial
        )

    def _score(self, model: nn.Module, reporter: Reporter) -> held_out.Scored:
        """Answers the held-out questions, where there are any and the whole model fits the
        device."""
        device = self.ranks.device
        if self.ranks.base_in_parts:
            if self.job.data.held_out:
                why = "the held-out rows were not answered: the base is in parts"
                reporter.event(events.Warned, message=f"{why} over {self.ranks.world} processes")
            return held_out.Scored()
        if next(model.parameters()).device.type != device.type:
            if self.job.data.held_out:
                why = "the held-out rows were not scored: the whole model does not fit one card"
                reporter.event(events.Warned, message=why)
            return held_out.Scored()
        scored = held_out.held_out(model, self.job, self.run, self.data, device)
        for sample in scored.samples:
            reporter.event(events.Sample, **sample)
        if scored.rows:
            match = {"exact_match_before": scored.exact[0], "exact_match_after": scored.exact[1]}
            reporter.event(events.Score, rows=scored.rows, **match)
        if scored.long_rows:
            numbers = {CHRF: scored.chrf}
            reporter.event(events.Measured, rows=scored.long_rows, numbers=numbers)
        return scored
