"""Answers many requests at once: one thread owns the model; asks join and leave between two steps.

All asks are rows of one batch, whichever adapter answers. An answer depends on its own prompt,
adapter, settings and seed alone, apart from rounding in the model.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trainer.model.decode import KEYS_ROUNDED, PREFILL_TOKENS, Rows, packs
from trainer.model.dropout import mix
from trainer.model.sampling import noise
from trainer.serve.apart import Apart
from trainer.serve.models import Models, Voice

log = logging.getLogger(__name__)

WIDTH = 16  # answers decoded side by side
WAITING = 256  # asks that wait before one is refused
LEAST_TEMPERATURE = 1e-5  # below it fp32 leaves nothing but the likeliest token
FIRST_ROOM = 256  # tokens of a row, to begin with: rows double as they need it


class Busy(RuntimeError):
    """Too many asks wait already."""


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen: a temperature of 0 takes the likeliest; above, tokens are drawn from
    the likeliest whose probabilities make up `top_p`. `number` tells answers of one seed apart.
    `top` are how many of the likeliest tokens are told with each."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    number: int = 0
    top: int = 0

    @property
    def draws(self) -> bool:
        """Whether chance chooses; else it is the likeliest token."""
        return self.temperature >= LEAST_TEMPERATURE and self.top_p > 0


class Token(NamedTuple):
    """`log_prob` and `top` (id, log_prob) are of the model's own distribution, fp32."""

    id: int
    log_prob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(eq=False)
class Ask:
    """One answer that is asked for. `tell` is called from the engine's thread with each token and
    says whether to go on; `ended` once, with why: stop (a stop token, or `tell` said so), length,
    cancelled, or error."""

    voice: Voice
    prompt: Sequence[int]
    most: int
    sampling: SamplingParams
    tell: Callable[[Token], bool]
    ended: Callable[[str], None]
    asked_at: float = field(default_factory=time.monotonic)
    made: int = 0
    over: str = ""
    _cancelled: bool = False

    def cancel(self) -> None:
        """From any thread: the row is given up at the next step boundary."""
        self._cancelled = True

    @property
    def cancelled(self) -> bool:
        return self._cancelled


@dataclass
class Counts:
    """What the engine did since it began; seconds of waiting are until the first token."""

    steps: int = 0
    prompt_tokens: int = 0
    tokens: int = 0
    first_tokens: int = 0
    first_token_s: float = 0.0
    ended: dict[str, int] = field(default_factory=dict)


class _OnTheWay:
    """Tensors that are copied to the host while the device goes on: `lists` waits for them alone,
    not for the step that was asked of the device behind them."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._here = [x.to("cpu", non_blocking=True) for x in tensors]
        self._copied: torch.cuda.Event | None = None
        if tensors[0].is_cuda:
            self._copied = torch.cuda.Event()
            self._copied.record()

    def lists(self) -> list[list[Any]]:
        if self._copied is not None:
            self._copied.synchronize()
        return [x.tolist() for x in self._here]


class Engine:
    """The model's thread. `submit` and `Ask.cancel` may be called from any other."""

    def __init__(self, models: Models, width: int = WIDTH) -> None:
        self.models, self.width, self.counts = models, width, Counts()
        self._waiting: deque[Ask] = deque()
        self._active: list[Ask] = []  # in the order of their rows
        self._pending: list[tuple[list[Ask], _OnTheWay]] = []
        # on a GPU the tokens of a step are looked at while the next one runs
        self._behind = 1 if models.device.type == "cuda" else 0
        self._wakes, self._closed = threading.Condition(), False
        self._begin_rows()
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self._thread.start()

    def submit(self, *asks: Ask) -> None:
        """Queues asks that belong together. Raises Busy, having queued none; ValueError for a
        prompt that leaves no room."""
        for ask in asks:
            if not ask.prompt or len(ask.prompt) + ask.most > self.models.context:
                raise ValueError(f"{len(ask.prompt)} + {ask.most} tokens do not fit")
        with self._wakes:
            if self._closed or len(self._waiting) + len(asks) > WAITING:
                raise Busy("too many requests wait")
            self._waiting.extend(asks)
            self._wakes.notify()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    @property
    def load(self) -> tuple[int, int]:
        """(answers that are decoded, asks that wait)."""
        return sum(not a.over for a in list(self._active)), len(self._waiting)

    def close(self) -> None:
        """Ends what runs, as cancelled, and the thread."""
        with self._wakes:
            self._closed = True
            self._wakes.notify()
        self._thread.join()

    # -- the thread --------------------------------------------------------------------------------

    def _work(self) -> None:
        with torch.inference_mode():
            while self._wait():
                try:
                    self._leave()
                    self._join()
                    if self._active:
                        self._step()
                    self._look(self._behind if self._active else 0)
                # out of memory, for example: the asks being answered end with an error
                except Exception:
                    log.exception("the model failed")
                    self._fail()
        for ask in [*self._active, *self._waiting]:
            self._end(ask, "cancelled")

    def _wait(self) -> bool:
        with self._wakes:
            while not (self._closed or self._waiting or self._active or self._pending):
                self._wakes.wait()
            return not self._closed

    def _begin_rows(self) -> None:
        m = self.models
        self._rows: Rows | Apart = (
            Rows(m.model, 1, FIRST_ROOM, m.device, m.context)
            if packs(m.model, m.context)
            else Apart(m.model, m.device)
        )
        self._last = torch.zeros(self.width, dtype=torch.int64, device=m.device)
        self._pending.clear()

    def _fail(self) -> None:
        for ask in self._active:
            self._end(ask, "error")
        self._active.clear()
        self._begin_rows()

    def _end(self, ask: Ask, why: str) -> None:
        if not ask.over:
            ask.over = why
            self.counts.ended[why] = self.counts.ended.get(why, 0) + 1
            ask.ended(why)

    def _leave(self) -> None:
        """Gives up rows whose answers are over or given up; the last row takes each one's place."""
        with self._wakes:
            gone = [a for a in self._waiting if a.cancelled]
            self._waiting = deque(a for a in self._waiting if not a.cancelled)
        for ask in gone:
            self._end(ask, "cancelled")
        for row in reversed(range(len(self._active))):
            ask = self._active[row]
            if ask.cancelled:
                self._end(ask, "cancelled")
            if ask.over:
                last = len(self._active) - 1
                if row != last:
                    self._rows.move(last, row)
                    self._last[row] = self._last[last]
                    self._active[row] = self._active[last]
                self._active.pop()

    # -- joining -----------------------------------------------------------------------------------

    def _join(self) -> None:
        """Reads waiting prompts into free rows, those of one adapter in one pack."""
        while self._waiting and len(self._active) < self.width:
            taken: list[Ask] = []
            tokens = 0
            with self._wakes:
                while self._waiting and len(self._active) + len(taken) < self.width:
                    ask = self._waiting[0]
                    tokens += len(ask.prompt)
                    other = taken and ask.voice.adapter != taken[0].voice.adapter
                    if other or (taken and tokens > PREFILL_TOKENS):
                        break
                    taken.append(self._waiting.popleft())
            first = len(self._active)
            self._active += taken  # from here on a failure ends them too
            self._read(taken, list(range(first, first + len(taken))))

    def _read(self, taken: list[Ask], rows: list[int]) -> None:
        self._make_room()
        self.models.read_as(taken[0].voice.adapter)
        logits = self._rows.read(rows, [list(a.prompt) for a in taken])
        self.counts.prompt_tokens += sum(len(a.prompt) for a in taken)
        self._take(taken, logits, torch.tensor(rows, device=self.models.device))

    def _make_room(self) -> None:
        """Grows rows and their tokens by doubling, so that the keys are rarely copied."""
        if isinstance(self._rows, Apart):
            return
        rows, keys = self._rows, self._rows.keys
        need = max(len(a.prompt) + a.most for a in self._active)
        size, longest = keys.size, rows.longest
        while size < len(self._active):
            size *= 2
        while longest < need:
            longest *= 2
        size = min(size, self.width)
        most = -(-self.models.context // KEYS_ROUNDED) * KEYS_ROUNDED
        longest = max(rows.longest, min(longest, most))
        if (size, longest) != (keys.size, rows.longest):
            rows.grow(size, longest)

    # -- a step ------------------------------------------------------------------------------------

    def _step(self) -> None:
        asks = list(self._active)
        # one token more for each step whose tokens have not been read yet
        reach = max(len(a.prompt) + a.made for a in asks) + len(self._pending) + 1
        reach = min(reach, max(len(a.prompt) + a.most for a in asks))
        n, adapters = len(asks), [a.voice.adapter for a in asks]
        logits = step_of(self.models, self._rows, self._last[:n], reach, adapters)
        self._rows.lengths[:n] += 1
        self.counts.steps += 1
        self._take(asks, logits, torch.arange(n, device=self.models.device))

    def _take(self, asks: list[Ask], logits: Tensor, at: Tensor) -> None:
        """The next tokens of `asks`, which stand in the rows `at`."""
        found = choose(logits, [a.sampling for a in asks], self._rows.lengths[at])
        self._last[at] = found[0]
        self._pending.append((asks, _OnTheWay(found)))

    def _look(self, behind: int) -> None:
        """Hands out the tokens of all steps but the newest `behind`."""
        while len(self._pending) > behind:
            asks, found = self._pending.pop(0)
            told = zip(asks, *found.lists(), strict=True)
            for ask, id_, log_prob, its_top, its_log_probs in told:
                if ask.over or ask.cancelled:
                    continue
                pairs = zip(its_top, its_log_probs, strict=True)
                top = tuple(pairs)[: ask.sampling.top]
                self._tell(ask, Token(id_, log_prob, top))

    def _tell(self, ask: Ask, token: Token) -> None:
        ask.made += 1
        self.counts.tokens += 1
        if ask.made == 1:
            self.counts.first_tokens += 1
            self.counts.first_token_s += time.monotonic() - ask.asked_at
        goes_on = ask.tell(token)
        if not goes_on or token.id in ask.voice.stops:
            self._end(ask, "stop")
        elif ask.made >= ask.most:
            self._end(ask, "length")


def step_of(
    models: Models, rows: Rows | Apart, last: Tensor, reach: int, adapters: list[str]
) -> Tensor:
    """Logits (B, V) of the first B rows after their tokens `last` (B,), each by its adapter; those
    that do not mix go one after another. `reach`: as of `Rows.step`."""
    if models.mixes or len(set(adapters)) == 1:
        models.answer_as(adapters)
        return rows.step(last, reach, slice(0, len(adapters)))
    parts: list[tuple[Tensor, Tensor]] = []
    for adapter in dict.fromkeys(adapters):
        at = torch.tensor([i for i, a in enumerate(adapters) if a == adapter], device=last.device)
        models.answer_as([adapter])
        parts.append((at, rows.step(last[at], reach, at)))
    logits = parts[0][1].new_zeros(len(adapters), parts[0][1].shape[-1])
    for at, part in parts:
        logits[at] = part
    return logits


def choose(
    logits: Tensor, samplings: Sequence[SamplingParams], positions: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(tokens (B,), their log-probabilities, the likeliest tokens (B, k), theirs) of logits (B, V),
    each row by its own parameters; `positions` int64 (B,)."""
    device = logits.device
    own = logits.float().log_softmax(-1)
    chosen = own.argmax(-1)
    drawn = [i for i, s in enumerate(samplings) if s.draws]
    if drawn:
        at = torch.tensor(drawn, device=device)
        chosen[at] = _draw(own[at], [samplings[i] for i in drawn], positions[at])
    log_probs, most = own.gather(1, chosen[:, None]), max(s.top for s in samplings)
    if not most:
        return chosen, log_probs[:, 0], chosen[:, None][:, :0], log_probs[:, :0]
    top = own.topk(most, -1)
    return chosen, log_probs[:, 0], top.indices, top.values


def _draw(own: Tensor, samplings: Sequence[SamplingParams], positions: Tensor) -> Tensor:
    device = own.device
    temperatures = torch.tensor([s.temperature for s in samplings], device=device)
    scores = (own / temperatures[:, None]).log_softmax(-1)
    if any(s.top_p < 1 for s in samplings):
        most = torch.tensor([s.top_p for s in samplings], device=device)[:, None]
        ordered, order = scores.sort(-1, descending=True)
        before = ordered.exp().cumsum(-1) - ordered.exp()
        cut = ordered.masked_fill((before >= most) & (most < 1), float("-inf"))
        scores = torch.empty_like(scores).scatter_(-1, order, cut)
    seeds = torch.tensor([s.seed for s in samplings], device=device)
    numbers = torch.tensor([s.number for s in samplings], device=device)
    keys = mix(mix(mix(seeds) + numbers) + positions)
    return (scores + noise(keys, own.shape[-1])).argmax(-1)
