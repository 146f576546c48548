"""Pure: which of the known models train, and which of the known cards hold a job.

Memory is that of LoRA as a job has it that says nothing of it: `R` on all linear layers, rows of
`MAX_LENGTH` tokens, the longest alone in a micro-batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from ops.catalogue.models import Entry, entries
from ops.hardware import gpus
from ops.hardware.gpus import Gpu
from ops.job.job_file import Data
from ops.job.needs import DRIVER_SHARE
from ops.market.ranking import Needs
from trainer import families, memory
from trainer.wire.job import Lora

PRECISIONS = ("bf16", "nf4")
R: int = Lora().r
MAX_LENGTH: int = Data.model_fields["max_length"].default


def label(g: Gpu) -> str:
    """A card's name, with its GiB where there are several sizes of it."""
    sizes = {other.memory_gib for other in gpus.GPUS if other.name == g.name}
    return g.name if len(sizes) == 1 else f"{g.name} {g.memory_gib:.0f}G"


@dataclass(frozen=True)
class KnownModel:
    """A model of the catalogue. `why` is the reason why it is refused, "" where it trains; `notes`
    tell what its family means for training; `lora_gib` is precision -> GiB that one card must have,
    empty where that is not known."""

    entry: Entry
    why: str
    hint: str
    notes: tuple[str, ...]
    lora_gib: dict[str, float]

    @property
    def template(self) -> str:
        """What data.template suits it: its own, where it was made to talk."""
        return "chat" if self.entry.values.get("kind") == "instruct" else "alpaca"

    def cards(self, precision: str) -> list[str]:
        """The known cards that hold it alone, smallest first."""
        if precision not in self.lora_gib:
            return []
        return [label(g) for g in gpus.that_hold(self.lora_gib[precision], precision)]

    def as_dict(self) -> dict[str, Any]:
        """For JSON; GiB, and 10^9 bytes of weights."""
        e = self.entry
        lora = {
            p: {"gib": round(gib, 1), "cards": self.cards(p)} for p, gib in self.lora_gib.items()
        }
        return {
            "model": e.id,
            "model_type": e.model_type,
            "parameters": e.parameters,
            "active": e.active,
            "weights_gb": e.weights_gb,
            "licence": e.licence,
            "gated": e.gated,
            "context": e.values.get("context"),
            "template": self.template,
            "trains": not self.why,
            "why": self.why,
            "hint": self.hint,
            "notes": list(self.notes),
            "lora": lora,
        }


def models(words: Sequence[str] = ()) -> list[KnownModel]:
    """The catalogue's models in whose id, type and licence each of `words` stands, those with the
    most downloads first."""
    return [known(entry) for entry in entries() if _has(words, entry)]


def known(entry: Entry) -> KnownModel:
    """What training knows of a model."""
    config = entry.config()
    try:
        family = families.read(config)
        need = lora_gib(config, entry.parameters)
    except families.FamilyError as e:
        return KnownModel(entry, str(e), e.hint, (), {})
    except ValueError as e:
        return KnownModel(entry, "", "", (f"its memory is not known: {e}",), {})
    return KnownModel(entry, "", "", tuple(family.words()), need)


def lora_gib(config: dict[str, Any], parameters: int | None = None) -> dict[str, float]:
    """Precision -> GiB that one card must have for LoRA on a model with this config.json, which has
    so many `parameters` in all where that is known. Raises ValueError for one that does not say."""
    shape = memory.Shape.from_config(config)
    if parameters:  # towers, and what the shape does not tell of
        shape = replace(shape, other_parameters=parameters - memory.parameters(shape))
    return {
        p: memory.min_gpu_memory_gib(shape, p, R, min_tokens=MAX_LENGTH) / DRIVER_SHARE
        for p in PRECISIONS
    }


def _has(words: Sequence[str], entry: Entry) -> bool:
    told = f"{entry.id} {entry.model_type} {entry.licence or ''}".lower()
    return all(word.lower() in told for word in words)


@dataclass(frozen=True)
class Price:
    """What the market asks now for one card: the cheapest offer of `offers`, without disk."""

    usd_per_hour: float
    offers: int


@dataclass(frozen=True)
class KnownCard:
    """A card of the table; `price` is None where the market was not asked or has none. `fits` and
    `why_not` are of a job, None and "" without one."""

    gpu: Gpu
    price: Price | None = None
    fits: bool | None = None
    why_not: str = ""

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        g = self.gpu
        row = {"gpu": g.name, "memory_gib": g.memory_gib, "bf16_tflops": g.bf16_tflops}
        row |= {"fp8_tflops": g.fp8_tflops, "memory_gb_s": g.memory_gb_s}
        price = None if self.price is None else asdict(self.price)
        return row | {"price": price, "fits": self.fits, "why_not": self.why_not}


def cards(
    words: Sequence[str], prices: dict[Gpu, Price], needs: Needs | None, names: Sequence[str]
) -> list[KnownCard]:
    """The cards in whose name each of `words` stands, the smallest and slowest first; with the
    needs of a job, whether one holds it. `names` are the cards that the job accepts, all where
    empty."""
    spelt = [gpus.plain(word) for word in words]
    found = [g for g in gpus.GPUS if all(word in gpus.plain(g.name) for word in spelt)]
    accepted = {m for name in names for m in gpus.meant(name)}
    rows = []
    for g in sorted(found, key=lambda g: (g.memory_gib, g.bf16_tflops)):
        why = "" if needs is None else _why_not(g, needs, accepted)
        rows.append(KnownCard(g, prices.get(g), None if needs is None else not why, why))
    return rows


def _why_not(g: Gpu, needs: Needs, accepted: set[str]) -> str:
    if g.memory_gib < needs.min_gpu_memory_gib:
        return f"the job needs {needs.min_gpu_memory_gib:.1f} GiB"
    if g.compute_capability < needs.min_compute_capability:
        return (
            f"compute capability {g.compute_capability}, the precision needs "
            f"{needs.min_compute_capability}"
        )
    if accepted and g.name not in accepted:
        return "would fit, but offer.gpu_name does not name it"
    return ""
