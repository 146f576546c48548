"""Supervised fine-tuning: the model learns the answers (or the text) of each row.

A batch is `training.batch_size` rows of one global order, the loss the cross-entropy of their
target tokens. At the end the held-out questions are answered, by the model before and after.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from trainer.data import batch, packing
from trainer.data.prepare import model_folder, prepare
from trainer.eval import held_out
from trainer.loop import checkpoint, report, stage
from trainer.loop.budget import micro_batch
from trainer.loop.guards import Expected, probe, target_entropy, validate_labels
from trainer.loop.ranks import Ranks
from trainer.loop.reporter import Reporter
from trainer.model import likeness
from trainer.model.dropout import TokenKeys
from trainer.model.load import family_in, hidden_states, load, start_values, target_loss
from trainer.result import adapter
from trainer.wire import events
from trainer.wire.job import Job
from trainer.wire.page import page

log = logging.getLogger(__name__)

HOST = torch.device("cpu")
LEAK, LEAK_INT8 = 0.01, 0.05  # of a hidden state that another document may change


class Stage(stage.Stage):
    def __init__(self, job: Job, run: Path) -> None:
        super().__init__(job, run)
        self.data = prepare(job, run)
        rows, training = self.data.rows, job.training
        validate_labels(rows)
        self.lengths, self.targets = rows.lengths, rows.targets()
        epochs, seed, most = training.num_train_epochs, training.seed, training.max_steps
        self.order = packing.Order(len(rows), training.batch_size, epochs, seed, most)
        self.total_steps = self.order.total_steps
        self.notes = tuple(rows.notes)
        self.expected = Expected(entropy=target_entropy(rows))
        self.answers_at_end = job.data.held_out is not None

    def load(self, ranks: Ranks) -> None:
        self.ranks, self.keys = ranks, TokenKeys()
        self.base = model_folder(self.job, self.run, weights=True)
        longest = max(self.lengths)
        packs = family_in(self.base, longest).packs(longest)
        self.packed = self.job.training.packing and packs
        compared = self.compare_with_stock(ranks, self.packed)
        if ranks.rank == 0:
            self._rehearse_saving()
        room = micro_batch(self.job, self.base, longest, ranks.device, ranks.world)
        self.budget, recomputed = room
        self.model, self.kernels = load(
            self.job, self.base, ranks.device, self.keys, recomputed, ranks.shard, longest
        )
        self.kernels |= compared
        ranks.place(self.model)
        self.initial = start_values(self.model, self.job)

    def _rehearse_saving(self) -> None:
        """Raises ResultError where the result of this model and method could not be saved."""
        try:
            model = likeness.copy_of(self.job, self.base)
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

    def batches(self, step: int) -> batch.Work:
        packed = (packing.pack, batch.packed)
        lay, collate = packed if self.packed else (packing.pad, batch.padded)
        rows, data = self.order.step(step), self.data.rows
        mine = packing.share(rows, self.lengths, self.ranks.world)[self.ranks.rank]
        packs = lay(mine, self.lengths, self.budget)
        return batch.Work(
            micro=[
                batch.pinned(collate(data, chosen, HOST), self.ranks.device) for chosen in packs
            ],
            filler=collate(data, rows[:1], HOST),
            count=sum(self.targets[r] for r in rows),
            tokens=sum(self.lengths[r] for r in rows),
            where=[data.where[r] for r in rows],
        )

    def loss(self, step: int, micro: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """`micro`: batch.packed's or batch.padded's."""
        self.keys.set(self.job.training.seed, step, micro["rows"], micro["position_ids"])
        return target_loss(self.model, micro), {}

    def finish(self, model: nn.Module, state: checkpoint.State, reporter: Reporter) -> str:
        scored, job = self._score(model, reporter), self.job
        score = (scored.before, scored.after) if scored.rows else None
        template = self.data.template
        told = {
            "name": template.name,
            "sha256": template.sha256,
            "token_hash": self.data.token_hash,
        }
        facts = self.facts(state) | {"template": told}
        png = report.curve_png(state.curve, job.run_id)
        report_html = page(job.model_dump(mode="json"), facts, scored.samples, score)
        home, beside = {"loss.png": png}, {"report.html": report_html}
        return adapter.write_result(
            self.run, model, job, self.base, self.data, facts, home, beside, self.initial
        )

    def _score(self, model: nn.Module, reporter: Reporter) -> held_out.Scored:
        """Answers the held-out questions, where there are any and the whole model fits the
        device."""
        device = self.ranks.device
        if next(model.parameters()).device.type != device.type:
            if self.job.data.held_out:
                why = "the held-out rows were not scored: the whole model does not fit one card"
                reporter.event(events.Warned, message=why)
            return held_out.Scored()
        scored = held_out.held_out(model, self.job, self.run, self.data, device)
        for sample in scored.samples:
            reporter.event(events.Sample, **sample)
        if scored.rows:
            match = {"exact_match_before": scored.before, "exact_match_after": scored.after}
            reporter.event(events.Score, rows=scored.rows, **match)
        return scored
