"""Stops a run that is silently going wrong, with the reason and the rows (file:line) that it saw.

Before the first step: label fractions, masked rows, broken weights, attention that looks ahead or
across documents. While it runs: numbers that are not finite, gradients that are zero, parameters
that should move and do not, a base that moves, ranks that drift apart, a loss that is too good to
be true or that runs away.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from trainer.data.tokenised import Rows

SHOWN = 8  # rows named in a message
MIN_LABELS, MAX_LABELS = 0.001, 0.995  # of the tokens of rows that have a prompt
# steps with a rate above zero after which movement is looked at; then every 100th
CHECKS = (3, 5, 10)
TOO_GOOD = 0.02  # of the entropy of the target tokens' frequencies
EARLY = 5  # steps in which a loss below that is too early
RUNAWAY = 5  # steps in a row above the bound


class Stopped(RuntimeError):
    """The run must not go on: exit code 4. `samples` are file:line; `hint` is what to do."""

    def __init__(self, reason: str, samples: Sequence[str] = (), hint: str = "") -> None:
        super().__init__(reason)
        self.samples, self.hint = list(samples), hint


@dataclass(frozen=True)
class ExpectedMetrics:
    """What a stage's numbers look like when all is well. `entropy`: nats of guessing without
    looking, where the loss is one per target token; where it is None, no loss is too small or too
    large. `still_steps`: whether a step may have no gradient at all. `learned`: training starts
    from an adapter, which may know these rows: a loss that is small from the start is told, and
    stops nothing."""

    entropy: float | None = None
    still_steps: bool = False
    learned: bool = False


def validate_labels(rows: Rows) -> None:
    """Raises Stopped for rows without a target and for label fractions that only a broken mask
    gives."""
    targets, lengths = np.asarray(rows.targets()), np.asarray(rows.lengths)
    masked = np.flatnonzero(targets == 0)
    if len(masked):
        raise Stopped(
            f"{len(masked)} of {len(rows)} rows have no trained label: nothing can be "
            "learned from them",
            [rows.where[i] for i in masked[:SHOWN]],
            "check data.template and data.max_length",
        )
    asked = np.flatnonzero(rows.prompted)
    if len(asked):
        fraction = (
            np.add.reduceat(rows.trained.astype(np.int64), rows.starts[:-1])[asked].sum()
            / lengths[asked].sum()
        )
        if not MIN_LABELS < fraction < MAX_LABELS:
            why = (
                "the prompts would be learned too"
                if fraction >= MAX_LABELS
                else "next to nothing would be learned"
            )
            raise Stopped(
                f"{fraction:.2%} of the tokens are labels: {why}",
                [rows.where[i] for i in asked[:SHOWN]],
                "check the data's format and data.template",
            )


@torch.no_grad()
def probe(
    model: nn.Module,
    hidden: Callable[..., Tensor],
    rows: Rows,
    device: torch.device,
    tolerance: float = 0.01,
) -> None:
    """Three small forward passes on two real rows in one pack. Raises Stopped when a token sees a
    later one or another document, or when the model's numbers are not finite. `tolerance`: int8
    quantises a pack's outlier columns together, which couples rows by about 1 %, where a leak gives
    tens of them. `hidden` maps (ids, positions, boundaries) to hidden states (1, T, H)."""
    spans = [
        rows.ids[rows.starts[i] : rows.starts[i + 1]][:24].astype(np.int64)
        for i in np.argsort(rows.lengths)[-2:]
    ]
    if len(spans) < 2:
        spans = spans * 2
    first, second = len(spans[0]), len(spans[1])
    ids = torch.from_numpy(np.concatenate(spans))[None].to(device)
    positions = torch.cat([torch.arange(first), torch.arange(second)])[None].to(device)
    ends = torch.tensor([0, first, first + second], dtype=torch.int32, device=device)

    def look(change: int | None) -> Tensor:
        changed = ids.clone()
        if change is not None:
            changed[0, change] = changed[0, change] ^ 1  # another id of the vocabulary
        longest = max(first, second)
        return hidden(changed, positions, ends, longest)[0].float()

    was_training = model.training
    model.eval()
    plain, future, other = look(None), look(first + second - 1), look(0)
    model.train(was_training)
    if not torch.isfinite(plain).all():
        raise Stopped(
            "the base model's output is not finite before any training",
            [],
            "check the model's files (sha256) and its precision",
        )
    size = plain.norm(dim=-1).mean()
    ahead = float((future[:-1] - plain[:-1]).norm(dim=-1).max() / size)
    across = float((other[first:] - plain[first:]).norm(dim=-1).max() / size)
    if ahead > tolerance:
        raise Stopped(
            f"attention looks ahead: a later token changes earlier ones by {ahead:.1%}",
            [],
            "this model is not causal: name another base",
        )
    if across > tolerance:
        raise Stopped(
            f"packed documents see each other: one changes its neighbour by {across:.1%}",
            [],
            "set training.packing = false for this architecture",
        )


class TrainingMonitor:
    """Looks at every step's numbers (`look`) and, now and then, at its gradients (`before_update`)
    and parameters (`after_update`). `moving` are the trained parameters, `still` some frozen ones
    that must not change. Where `moving` are parts, `total` adds up over their holders."""

    def __init__(
        self,
        moving: Mapping[str, Tensor],
        model: nn.Module,
        expected: ExpectedMetrics,
        total: Callable[[Tensor], Tensor] = lambda t: t,
    ) -> None:
        self._total = total
        # an expert may meet no token for long
        self._moving = {n: p for n, p in moving.items() if "expert" not in n}
        frozen = [
            (n, p)
            for n, p in model.named_parameters()
            if not p.requires_grad and p.is_floating_point() and p.numel()
        ]
        self._still = dict(frozen[:: max(1, len(frozen) // 16)])
        self._start = _sums(self._moving, total)
        self._base = _sums(self._still)
        self._without_gradient = dict.fromkeys(self._moving, True)
        self._updates, self._first_loss, self._above = 0, math.nan, 0
        self._still_update = False  # the update under way has no gradient, and may
        self._expected = expected
        self._told_learned = False

    def look(self, step: int, loss: float, norm: float, seen: Sequence[str]) -> str:
        """`norm` is that of the step's gradients before they were clipped; `seen` names its rows.
        Steps come in order, maybe after their update. Returns a warning, "" without one."""
        shown = list(seen[:SHOWN])
        if not math.isfinite(loss):
            raise Stopped(
                f"step {step}: the loss is {loss}",
                shown,
                "lower training.learning_rate; look at these rows",
            )
        if not math.isfinite(norm):
            raise Stopped(
                f"step {step}: the gradient norm is {norm} (loss {loss:.4f})",
                shown,
                "lower training.learning_rate; look at these rows",
            )
        if norm == 0.0 and not self._expected.still_steps:
            raise Stopped(
                f"step {step}: every gradient is zero (loss {loss:.4f})",
                shown,
                "nothing is connected to the loss: check lora.target_modules",
            )
        if self._expected.entropy is None:
            return ""
        return self._look_at_level(step, loss, self._expected.entropy, shown)

    def _look_at_level(self, step: int, loss: float, entropy: float, shown: list[str]) -> str:
        warning = ""
        if step <= EARLY and entropy > 0.5 and loss < TOO_GOOD * entropy:
            guess = f"guessing by frequency gives {entropy:.2f}"
            level = f"step {step}: the loss is {loss:.5f}, {guess}"
            if not self._expected.learned:
                raise Stopped(
                    f"{level}: the answers leak, or were learned before",
                    shown,
                    "check that the answers are not in the prompts, and that the base is not "
                    "already trained on this data",
                )
            if not self._told_learned:
                warning = f"{level}: the adapter that it starts from knows these rows already"
            self._told_learned = True
        if math.isnan(self._first_loss):
            self._first_loss = loss
        bound = 1.5 * max(self._first_loss, entropy) + 1.0
        self._above = self._above + 1 if loss > bound else 0
        if self._above >= RUNAWAY:
            raise Stopped(
                f"step {step}: the loss ran away, from {self._first_loss:.3f} to {loss:.3f}",
                shown,
                "lower training.learning_rate",
            )
        return warning

    def before_update(self, views: Sequence[Tensor]) -> None:
        """`views` are this step's summed gradients in the order of the trained parameters."""
        if self._expected.still_steps:
            sizes = self._total(torch.stack(torch._foreach_norm(list(views))))
            self._still_update = not bool(sizes.any())
            if self._still_update:
                return
        if self._updates in (1, 2, *CHECKS) or self._updates % 100 == 0:
            norms = self._total(torch.stack(torch._foreach_norm(list(views)))).tolist()
            for name, size in zip(self._moving, norms, strict=False):
                self._without_gradient[name] &= size == 0.0

    def after_update(self, step: int, rate: float, seen: Sequence[str]) -> None:
        if self._still_update:
            return
        self._updates += rate > 0
        if rate <= 0 or (self._updates not in CHECKS and self._updates % 100):
            return
        now = _sums(self._moving, self._total)
        stuck = [
            n
            for n, before, after in zip(self._moving, self._start, now, strict=True)
            if before == after
        ]
        idle = [n for n, never in self._without_gradient.items() if never]
        if idle and len(stuck) < len(self._moving):
            raise Stopped(
                f"step {step}: {len(idle)} of {len(self._moving)} trained parameters have "
                f"had no gradient since the start: {', '.join(idle[:3])}",
                list(seen[:SHOWN]),
                "leave these modules out of lora.target_modules",
            )
        if stuck:
            raise Stopped(
                f"step {step}: {len(stuck)} of {len(self._moving)} parameters never moved in "
                f"{self._updates} updates: {', '.join(stuck[:3])}",
                list(seen[:SHOWN]),
                "training.learning_rate may be too small for their precision",
            )
        self.validate_base(step)

    def validate_base(self, step: int) -> None:
        """Raises Stopped when a frozen parameter is not what it was at the start."""
        drifted = [
            n
            for n, before, after in zip(self._still, self._base, _sums(self._still), strict=True)
            if before != after
        ]
        if drifted:
            raise Stopped(
                f"step {step}: the frozen base changed: {', '.join(drifted[:3])}",
                [],
                "report this: an adapter needs the base that it was trained on",
            )

    def checksum(self) -> float:
        """A number that differs between ranks once their parameters have drifted apart."""
        return math.fsum(_sums(self._moving, self._total))

    @property
    def compares_ranks(self) -> bool:
        return self._updates in CHECKS or (self._updates > 0 and self._updates % 100 == 0)


def _sums(
    named: Mapping[str, Tensor], total: Callable[[Tensor], Tensor] = lambda t: t
) -> list[float]:
    if not named:
        return []
    return total(
        torch.stack([(p.detach().double() * _weights(p)).sum() for p in named.values()])
    ).tolist()


def _weights(parameter: Tensor) -> Tensor:
    """Unequal weights for the elements, so that changes that cancel in a plain sum show."""
    return (
        torch.arange(1, parameter.numel() + 1, device=parameter.device, dtype=torch.float64)
        .remainder_(8191)
        .view(parameter.shape)
    )


def target_entropy(rows: Rows) -> float:
    """Nats per token of the target tokens' own frequencies: what guessing without looking would
    cost."""
    marks = rows.trained.copy()
    marks[rows.starts[:-1]] = False
    counts = np.bincount(rows.ids[marks])
    shares = counts[counts > 0] / max(1, counts.sum())
    return float(-(shares * np.log(shares)).sum())
