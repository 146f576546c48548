"""Answers of a loaded model, token by token: greedy, or sampled with counter-based noise.

Prompts are prefilled as packs. Each answer has its own row of the KV cache, and a row whose answer
has ended takes the next prompt. The weights are those of the training, with adapters unmerged. Each
token comes with its log-probability in fp32.

A sampled token is a function of (seed, step, number of the prompt, position). It does not depend on
the width, the order, or what else is decoded beside it, apart from the rounding of the model's own
numbers.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from trainer.data.prepare import Prepared
from trainer.kernels import rotary
from trainer.kernels.step_layer import CachePositions
from trainer.model import steps
from trainer.model.kv_cache import Keys
from trainer.model.parts import causal, family_of, name_of_cache
from trainer.model.prompts import Places, Prompt, behind, prompt_of, prompt_tokens
from trainer.model.sampling import Sampling, choose

NEW_TOKENS, AT_ONCE = 64, 64  # of one answer; prompts in one batch
PREFILL_TOKENS = 8192  # of prompts that are prefilled in one pack
KEYS_ROUNDED = 64  # attention reads a multiple of this many keys
LOOK_EVERY = {"cuda": 8, "cpu": 1}  # steps between two checks for ended answers


@dataclass
class Answer:
    """The tokens after a prompt, with the stop id where it ended by one (`ended`). `log_probs`,
    fp32, belong to the distribution that `ids` were chosen from (greedy: temperature 1)."""

    ids: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    ended: bool = False


def answer(
    model: nn.Module,
    prompts: list[list[int]],
    data: Prepared,
    device: torch.device,
    new_tokens: int = NEW_TOKENS,
) -> list[str]:
    """Greedy answers as texts, up to the stop token or `new_tokens`."""
    found = generate(model, prompts, {data.stop_id}, device, new_tokens)
    texts = [a.ids[:-1] if a.ended else a.ids for a in found]
    decode = data.vocabulary.tokenizer.decode
    return [decode(ids, skip_special_tokens=True).strip() for ids in texts]


@torch.no_grad()
def generate(
    model: nn.Module,
    prompts: Sequence[list[int]],
    stops: Collection[int],
    device: torch.device,
    new_tokens: int = NEW_TOKENS,
    sampling: Sampling | None = None,
    numbers: Sequence[int] | None = None,
    width: int = AT_ONCE,
    kept_tokens: int | None = None,
) -> list[Answer]:
    """Answers in the order of the prompts, of at most `new_tokens` tokens each. `width` are decoded
    at once, fewer where the cache would exceed `kept_tokens` tokens. `numbers` key the sampling, by
    default the prompts' indices. Dropout is off meanwhile."""
    if not prompts:
        return []
    sampling = sampling or Sampling()
    keys = list(range(len(prompts)) if numbers is None else numbers)
    training = model.training
    model.eval()
    try:
        inner = causal(model)
        longest = max(map(len, prompts)) + new_tokens
        if kept_tokens is not None:
            width = max(1, min(width, kept_tokens // longest))
        if packs(model, longest):
            loop = _Loop(model, min(width, len(prompts)), longest, new_tokens, stops, device)
            return loop.run(prompts, keys, sampling)
        return _by_length(inner, prompts, keys, stops, device, new_tokens, sampling, width)
    finally:
        model.train(training)


def packs(model: nn.Module, longest: int) -> bool:
    """Whether the model can decode in packs: its attention is the trainer's own, and no other
    module has state between tokens."""
    inner, family = causal(model), family_of(model)
    ours = inner.config.get_text_config()._attn_implementation == "milktea"
    keeps = ours and family.packs(longest) and not family.row["delta"]
    return bool(keeps and not family.tower)


def masks_of(model: nn.Module, longest: int) -> dict[str, int | None]:
    """Name -> window of the masks that the model takes; the only name is "" where one mask serves
    all layers."""
    windows = [w if w is not None and w < longest else None for w in family_of(model).windows]
    if len(set(windows)) <= 1:
        return {"": windows[0] if windows else None}
    kinds = causal(model).config.get_text_config().layer_types
    return dict(zip(kinds, windows, strict=True))


class Rows:
    """A model with a KV cache of `size` rows: prefills prompts into rows, then reads one token more
    of each. `lengths` int64 (size,), on the device, are the tokens of each row, with the `front`
    places of a learned prompt before them; lengths that are given or told are without these."""

    def __init__(
        self, model: nn.Module, size: int, longest: int, device: torch.device, most: int = 0
    ) -> None:
        """`most`: tokens to which a row may grow; by default `longest`."""
        self.model, self.inner, self.device = model, causal(model), device
        self.front = prompt_tokens(model)
        self.keys = Keys(size, longest + self.front)
        self.masks = masks_of(model, max(longest, most) + self.front)
        self.name = name_of_cache(self.inner)
        self.lengths = torch.zeros(size, dtype=torch.int64, device=device)
        tower = steps.tower_of(model)
        self.adapters = None if tower is None else steps.ActiveAdapters(model, tower)
        whole = tower is not None and steps.trust_steps(tower)
        captures = whole and device.type == "cuda" and not rotary.by_length(model)
        self.tower = tower if captures else None
        self.graphs = self._graphs()

    @property
    def longest(self) -> int:
        """Tokens that a row has room for."""
        return self.keys.longest - self.front

    def _graphs(self) -> steps.Graphs | None:
        return None if self.tower is None else steps.Graphs(self.keys.size, self.tower)

    def _first(self, last: Tensor, n: int) -> Tensor:
        """Logits after `last` of the first n rows, whether or not they are in use."""
        at = self.lengths[:n].clamp_max(self.keys.longest - 1)
        return self._compute(last, at, slice(0, n), KEYS_ROUNDED)

    def read(self, rows: list[int], prompts: Sequence[list[int]]) -> Tensor:
        """Prefill a prompt into each of `rows`, in one pack -> logits of the next token (rows,
        V)."""
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        ends = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
        positions = torch.cat([torch.arange(n) for n in lengths.tolist()]).to(self.device)
        owners = torch.tensor(rows).repeat_interleave(lengths).to(self.device)
        ids = torch.tensor([i for prompt in prompts for i in prompt], device=self.device)
        cu, longest = ends.int().to(self.device), int(lengths.max())
        self.keys.packed, self.keys.place, self.keys.steady = (owners, positions), None, False
        given: dict[str, Any] = {"input_ids": ids[None], "position_ids": positions[None]}
        given |= {"cu_seq_lens_q": cu, "cu_seq_lens_k": cu}
        given |= {"max_length_q": longest, "max_length_k": longest}
        at = ends[1:].to(self.device) - 1
        if (prompt := prompt_of(self.model)) is not None:
            given, at = self._behind(prompt, given, at, rows)
        out = self.inner(**given, use_cache=True, logits_to_keep=at, **{self.name: self.keys})
        self.keys.prefix = None
        self.lengths[torch.tensor(rows, device=self.device)] = lengths.to(self.device) + self.front
        logits: Tensor = out.logits[0]
        return logits

    def _behind(
        self, prompt: Prompt, given: dict[str, Any], at: Tensor, rows: list[int]
    ) -> tuple[dict[str, Any], Tensor]:
        """The pack `given`, and where its logits are asked, with the learned prompt in front of
        each document; the cache has room for it in front of each row."""
        places = Places.of(given["cu_seq_lens_q"], given["input_ids"].shape[1], prompt.tokens)
        assert self.keys.packed is not None
        owners, positions = self.keys.packed
        made = behind(self.inner, prompt, given, places)
        if prompt.embeddings is None:
            self.keys.packed = (owners, positions + prompt.tokens)
            self.keys.prefix = (prompt, places, torch.tensor(rows, device=self.device))
            return made, at
        self.keys.packed = (places.spread(owners, rows), made["position_ids"][0])
        return made, places.own[at]

    def step(self, last: Tensor, reach: int, rows: slice | Tensor) -> Tensor:
        """Read `last` (rows,), one token of each row -> logits of the next token (rows, V), which
        the next step may overwrite. `reach` is the largest number of tokens in any of the rows
        then. The caller adds to `lengths`."""
        if self.adapters is not None and self.adapters.look_up():
            self.graphs = self._graphs()
        if self.graphs is not None and isinstance(rows, slice) and not rows.start:
            return self.graphs.step(self._first, last)
        reach += self.front
        kept = min(self.keys.longest, -(-reach // KEYS_ROUNDED) * KEYS_ROUNDED)
        return self._compute(last, self.lengths[rows], rows, kept)

    def _compute(self, last: Tensor, at: Tensor, rows: slice | Tensor, kept: int) -> Tensor:
        """Logits after `last`, whose positions in their rows are `at`."""
        keys, slots = self.keys, rows
        if isinstance(slots, slice):
            slots = torch.arange(slots.start, slots.stop, device=self.device)
        keys.packed, keys.rows, keys.kept = None, rows, kept
        share = None if self.adapters is None else self.adapters.share(rows)
        keys.place = CachePositions.of(slots, at, keys.longest, share)
        keys.steady = self.adapters is not None
        out = self.inner(
            input_ids=last[:, None],
            position_ids=at[:, None],
            attention_mask=self._seen(at, kept),
            use_cache=True,
            logits_to_keep=1,
            **{self.name: keys},
        )
        logits: Tensor = out.logits[:, -1]
        return logits

    def grow(self, size: int, longest: int) -> None:
        """Make room for `size` rows of `longest` tokens."""
        more = size - len(self.lengths)
        self.lengths = torch.cat([self.lengths, self.lengths.new_zeros(more)])
        self.keys.grow(size, longest + self.front)
        self.graphs = self._graphs()

    def move(self, here: int, there: int) -> None:
        """Copy row `here` to row `there`."""
        self.keys.move(here, there)
        self.lengths[there] = self.lengths[here]

    def _seen(self, at: Tensor, kept: int) -> Any:
        """Masks (rows, 1, 1, kept) of what each row's query sees, for each kind of layer."""
        behind = at[:, None] - torch.arange(kept, device=self.device)
        made = {
            name: ((behind >= 0) & (behind < (window or self.keys.longest)))[:, None, None]
            for name, window in self.masks.items()
        }
        return made.get("", made)


class _Loop:
    """Decodes `size` answers side by side."""

    def __init__(
        self,
        model: nn.Module,
        size: int,
        longest: int,
        new_tokens: int,
        stops: Collection[int],
        device: torch.device,
    ) -> None:
        self.rows = Rows(model, size, longest, device)
        self.size, self.most, self.device = size, new_tokens, device
        self.stops = torch.tensor(sorted(stops), device=device)
        zeros = torch.zeros(size, dtype=torch.int64, device=device)
        self.every = torch.arange(size, device=device)
        self.numbers, self.made = zeros, zeros.clone()
        self.done = torch.ones(size, dtype=torch.bool, device=device)
        self.ids = torch.zeros(size, new_tokens, dtype=torch.int64, device=device)
        self.log_probs = torch.zeros(size, new_tokens, device=device)
        self.busy: dict[int, int] = {}  # row -> prompt
        self.reach = [0] * size  # upper bounds of the rows' tokens, known without the device

    def run(
        self, prompts: Sequence[list[int]], keys: Sequence[int], sampling: Sampling
    ) -> list[Answer]:
        waiting, found = list(range(len(prompts)))[::-1], [Answer() for _ in prompts]
        self.sampling = sampling
        while waiting or self.busy:
            if waiting and len(self.busy) < self.size:
                self._read(prompts, keys, waiting)
            for _ in range(LOOK_EVERY[self.device.type]):
                self._step()
            self._collect(found)
        return found

    def _read(self, prompts: Sequence[list[int]], keys: Sequence[int], waiting: list[int]) -> None:
        """Prefill prompts into free rows, in one pack, and choose their first tokens."""
        free = [row for row in range(self.size) if row not in self.busy]
        taken: list[int] = []
        tokens = 0
        while waiting and len(taken) < len(free):
            tokens += len(prompts[waiting[-1]])
            if taken and tokens > PREFILL_TOKENS:
                break
            taken.append(waiting.pop())
        rows = free[: len(taken)]
        logits = self.rows.read(rows, [prompts[p] for p in taken])
        at = torch.tensor(rows, device=self.device)
        self.numbers[at] = torch.tensor([keys[p] for p in taken], device=self.device)
        self.made[at], self.done[at] = 0, False
        for row, prompt in zip(rows, taken, strict=True):
            self.busy[row], self.reach[row] = prompt, len(prompts[prompt])
        self._take(at, logits)

    def _take(self, at: Tensor, logits: Tensor) -> None:
        """Choose the next token of the rows `at` from their logits; rows that are done do not
        change."""
        positions = self.rows.lengths[at]
        chosen, log_probs = choose(logits, self.sampling, self.numbers[at], positions)
        place, going = self.made[at].clamp_max(self.most - 1), ~self.done[at]
        self.ids[at, place] = torch.where(going, chosen, self.ids[at, place])
        self.log_probs[at, place] = torch.where(going, log_probs, self.log_probs[at, place])
        self.made[at] += going
        over = torch.isin(chosen, self.stops) | (self.made[at] >= self.most)
        self.done[at] |= going & over

    def _step(self) -> None:
        """Decode one token of every row that is not done."""
        last = self.ids[self.every, (self.made - 1).clamp_min(0)]
        reach = max((self.reach[row] for row in self.busy), default=0) + 1
        logits = self.rows.step(last, reach, slice(0, self.size))
        self.rows.lengths += ~self.done  # the tokens read in this step
        longest = self.rows.keys.longest
        self.reach = [n + 1 if n + 1 < longest else n for n in self.reach]
        self._take(self.every, logits)

    def _collect(self, found: list[Answer]) -> None:
        """Take the finished answers out of their rows."""
        done, made = self.done.tolist(), self.made.tolist()
        for row in [r for r in self.busy if done[r]]:
            prompt, n = self.busy.pop(row), made[row]
            ids = self.ids[row, :n].tolist()
            ended = ids[-1] in self.stops.tolist()
            found[prompt] = Answer(ids, self.log_probs[row, :n].tolist(), ended)


# -- models whose attention is transformers' own ---------------------------------------------------


def _by_length(
    inner: Any,
    prompts: Sequence[list[int]],
    keys: Sequence[int],
    stops: Collection[int],
    device: torch.device,
    new_tokens: int,
    sampling: Sampling,
    width: int,
) -> list[Answer]:
    """Decode prompts of one length together, so that nothing is padded, with transformers' own
    cache."""
    found = [Answer() for _ in prompts]
    lengths: dict[int, list[int]] = {}
    for p, prompt in enumerate(prompts):
        lengths.setdefault(len(prompt), []).append(p)
    name, ends = name_of_cache(inner), torch.tensor(sorted(stops), device=device)
    for group in (g[i : i + width] for g in lengths.values() for i in range(0, len(g), width)):
        ids, cache = torch.tensor([prompts[p] for p in group], device=device), None
        numbers = torch.tensor([keys[p] for p in group], device=device)
        done = torch.zeros(len(group), dtype=torch.bool, device=device)
        position, taken = len(prompts[group[0]]), []
        for n in range(new_tokens):
            out = inner(input_ids=ids, use_cache=True, logits_to_keep=1, **{name: cache})
            cache, at = out[name], torch.full_like(numbers, position + n)
            chosen, log_probs = choose(out.logits[:, -1], sampling, numbers, at)
            taken.append((chosen, log_probs))
            ids, done = chosen[:, None], done | torch.isin(chosen, ends)
            if bool(done.all()):
                break
        rows = torch.stack([c for c, _ in taken], 1).tolist()
        numbers_of = torch.stack([x for _, x in taken], 1).tolist()
        for p, row, log_row in zip(group, rows, numbers_of, strict=True):
            n = next((i + 1 for i, token in enumerate(row) if token in stops), len(row))
            found[p] = Answer(row[:n], log_row[:n], row[n - 1] in stops)
    return found
