"""Pure: what a run will cost on an offer, what it has cost so far, and how the bill compares.

vast.ai bills GPUs by the second while running (not while loading), disk by the second while the
instance exists, and every byte both ways at the host's price. A month is 720 hours (its own
arithmetic), a GB here is 1e9 bytes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from ops.market.models import Instance, Offer
from ops.market.workload import Workload, tokens_per_second
from ops.plain import span

MONTH_H = 720.0
GB = 1e9

# share of the advertised bandwidth that one download reaches (550 of a gigabit: dstack#2020)
_LINK_SHARE = 0.6
_UNPACK_BYTES_S = 120e6  # compressed image bytes: docker inflates a layer on one core
_MODEL_READ_BYTES_S = 800e6  # from the host's disk to the GPU; used when the offer does not say
# of a bf16 base, by one core: merged with rank 32 in every layer (132e6 seen on an EPYC of 2026),
# hashed (1,500e6 seen; a core without SHA instructions does a third), opened in fp32 (820e6 seen)
_MERGE_BYTES_S, _HASH_BYTES_S, _OPEN_BYTES_S = 120e6, 500e6, 800e6
_MERGE_START_S = 120.0  # to import what merges, and to read the adapter: a guess, on the safe side
# of a certificate: tokens of its general texts and of the held-out rows at most (trainer/result/
# certificate.py), how many passes read them, what is kept of one (fp32, a vocabulary of 262,144)
_GENERAL_TOKENS, _CERTIFY_ROWS, _CERTIFY_ROW_TOKENS, _CERTIFY_PASSES = 1500, 16, 512, 4
_SAID_BYTES, _ROUND_BYTES, _CERTIFY_GPU_BYTES = 1 << 20, 1 << 30, 4 << 30
# fp32 of one of a host's threads (70e9 seen of one whose core is its own), and their number where
# the offer does not say
_CPU_FLOPS, _CPU_THREADS = 25e9, 4.0
_INSTALL_BYTES_S = 3.5e6  # of wheels, by pip on one core: 44 s were seen for the box's 148 MB
_RELIABLE_FOR_H = 24.0  # a host of reliability 0.98 survives a day with a chance of 0.98
_OUTBID_PER_H = 0.08  # at 20 % over the minimum bid; halves with each 20 % more
_BOOT_FAILS = 0.02  # chance, even on the best host
# its boxes are processes
_PRACTICE_BOOT_S, _PRACTICE_START_S, _PRACTICE_HOME_S = 3.0, 10.0, 2.0
_PRACTICE_MERGE_S = 600.0
# from the training's end to the proof that the box is gone, a small result's way home
HOME_S = 30.0


@dataclass(frozen=True)
class CostEstimate:
    """The prediction for one offer. `usd` is a run without a failure; `expected_usd` adds failed
    boots and restarts from the last checkpoint; `p_finish` is the chance (0 to 1) that this machine
    finishes the run. `hours` is from create to destroy."""

    usd: float
    gpu_usd: float
    disk_usd: float
    inet_down_usd: float
    inet_up_usd: float
    boot_s: float
    pull_s: float
    train_s: float
    transfer_s: float
    hours: float
    p_finish: float
    expected_usd: float
    lines: tuple[str, ...]
    start_s: float
    usd_per_hour: float
    tokens_per_s: float
    risk_usd: float
    gb_in: float
    gb_out: float
    stages_s: tuple[float, ...]  # of `train_s`, by stage
    talk_s: float
    evaluate_s: float
    merge_s: float
    home_s: float
    result_s: float  # of `transfer_s`, the result's way home
    merged_s: float  # of `transfer_s`, the merged model's way home

    @property
    def running_h(self) -> float:
        """The hours for which GPUs are billed: all but boot and image pull."""
        after_s = self.evaluate_s + self.merge_s + self.talk_s
        return (self.transfer_s + self.start_s + self.train_s + after_s) / 3600


def bid_for(offer: Offer, bid_usd_per_hour: float | None = None) -> float:
    """The $/h to bid: the user's, or 20 % over the minimum, which outbids most later bids."""
    return bid_usd_per_hour or round(1.2 * offer.min_bid_usd_per_hour, 4)


def disk_usd_per_hour(machine: Instance | Offer, disk_gib: float) -> float:
    """$/h for a disk of `disk_gib`, billed from create to destroy."""
    return disk_gib * machine.storage_usd_per_gib_month / MONTH_H


def predict(
    offer: Offer, workload: Workload, bid_usd_per_hour: float | None = None, p_bad: float = 0.0
) -> CostEstimate:
    """Dollars and seconds of `workload` on `offer`. `bid_usd_per_hour` makes it interruptible;
    `p_bad` is the chance (0 to 1) that this machine fails again, by earlier runs. Raises
    DoesNotFit."""
    speeds = [tokens_per_second(offer, one) for one in workload.each]
    if workload.cpu_practice:
        workload = replace(workload, boot_s=_PRACTICE_BOOT_S, start_s=_PRACTICE_START_S)
    pull_s, read_s = _reading_s(offer, workload)
    moved_s = {t.name: t.seconds for t in transfers(offer, workload)}
    transfer_s = sum(moved_s.values())
    stages_s = tuple(one.tokens / s for one, s in zip(workload.each, speeds, strict=True))
    merging_s = 2 * workload.model_parameters / _MERGE_BYTES_S + 2 * read_s  # read and written
    start_s = workload.start_s + workload.install_bytes / _INSTALL_BYTES_S + read_s
    start_s += merging_s * sum(one.merges for one in workload.each)
    train_s = sum(stages_s)
    merged_s = merge_s(offer, workload)
    after_s = workload.evaluate_s + merged_s + workload.talk_s
    running_h = (transfer_s + start_s + train_s + after_s) / 3600
    hours = running_h + (workload.boot_s + pull_s) / 3600
    rate = offer.usd_per_hour if bid_usd_per_hour is None else bid_usd_per_hour
    disk_rate = disk_usd_per_hour(offer, workload.disk_gib)
    gb_in = (workload.image_bytes + workload.fetched_bytes + workload.push_bytes) / GB
    inet_down_usd = gb_in * offer.inet_down_usd_per_gb
    mirrored_bytes = workload.checkpoint_bytes * math.floor(train_s / workload.save_every_s)
    gb_out = (workload.pull_bytes + workload.merged_bytes + mirrored_bytes) / GB
    gpu_usd, disk_usd = rate * running_h, disk_rate * hours
    inet_up_usd = gb_out * offer.inet_up_usd_per_gb
    usd = gpu_usd + disk_usd + inet_down_usd + inet_up_usd
    undisturbed = CostEstimate(
        usd=usd,
        gpu_usd=gpu_usd,
        disk_usd=disk_usd,
        inet_down_usd=inet_down_usd,
        inet_up_usd=inet_up_usd,
        boot_s=workload.boot_s,
        pull_s=pull_s,
        train_s=train_s,
        transfer_s=transfer_s,
        hours=hours,
        p_finish=math.nan,  # this and the risk by `_with_accidents`
        expected_usd=usd,
        lines=(),
        start_s=start_s,
        usd_per_hour=rate,
        tokens_per_s=speeds[-1],
        risk_usd=math.nan,
        stages_s=stages_s,
        gb_in=gb_in,
        gb_out=gb_out,
        talk_s=workload.talk_s,
        evaluate_s=workload.evaluate_s,
        merge_s=merged_s,
        home_s=_PRACTICE_HOME_S if workload.cpu_practice else HOME_S,
        result_s=moved_s.get("result", 0.0),
        merged_s=moved_s.get("merged", 0.0),
    )
    predicted = _with_accidents(undisturbed, offer, workload, bid_usd_per_hour, p_bad)
    return replace(predicted, lines=_arithmetic(offer, workload, predicted))


def _reading_s(offer: Offer, workload: Workload) -> tuple[float, float]:
    """(seconds to pull the image, to read the model)."""
    if workload.cpu_practice:
        return 0.0, 0.0
    down = offer.inet_down_mbps * _LINK_SHARE * 125e3  # bytes a second
    pull_s = max(_seconds_for(workload.image_bytes, down), workload.image_bytes / _UNPACK_BYTES_S)
    read_s = 2 * workload.model_parameters / min(_disk_speed(offer), _MODEL_READ_BYTES_S)
    return pull_s, read_s


def merge_s(offer: Offer, workload: Workload) -> float:
    """Seconds at most to merge the result into its base on the box and to certify it: on the CPU
    where no GPU holds the model in fp32. 0 where the job does not ask for it.

    Derived, and never seen on a rented box: the base is read to merge, base and model to hash, both
    once more for each round of the certificate, at the offer's disk speed; a core merges, hashes
    and opens them at speeds seen on one machine; the certificate's four passes over its texts take
    2 FLOP a weight and token where the CPU computes them, and no time on a GPU."""
    if not workload.merged_bytes:
        return 0.0
    if workload.cpu_practice:
        return _PRACTICE_MERGE_S
    size = workload.merged_bytes
    row_tokens = min(_CERTIFY_ROW_TOKENS, workload.least_tokens or _CERTIFY_ROW_TOKENS)
    tokens = _GENERAL_TOKENS + _CERTIFY_ROWS * row_tokens
    opened = 2 * math.ceil(tokens * _SAID_BYTES / max(_ROUND_BYTES, size / 2))
    disk_s = (1 + 1 + 2 + opened) * size / min(_disk_speed(offer), _MODEL_READ_BYTES_S)
    core_s = size / _MERGE_BYTES_S + 2 * size / _HASH_BYTES_S + opened * size / _OPEN_BYTES_S
    on_gpu = offer.gpu_memory_gib * 2**30 > 4.4 * workload.model_parameters + _CERTIFY_GPU_BYTES
    flops_s = _CPU_FLOPS * (offer.cpu_cores or _CPU_THREADS)
    certify_s = (
        0.0 if on_gpu else 2.0 * _CERTIFY_PASSES * tokens * workload.computed_parameters / flops_s
    )
    return _MERGE_START_S + disk_s + core_s + certify_s


@dataclass(frozen=True)
class Transfer:
    """One transfer: what is moved, where from or to, and its seconds and dollars."""

    name: str
    way: str
    size_bytes: float
    seconds: float
    usd: float


def transfers(offer: Offer, workload: Workload) -> list[Transfer]:
    """The transfers while the GPU is billed and does not train, in order. Checkpoints are pulled
    while it trains, and are not among them."""
    down, up = offer.inet_down_mbps * _LINK_SHARE * 125e3, offer.inet_up_mbps * _LINK_SHARE * 125e3
    home_up, home_down = workload.home_up_mbps * 125e3, workload.home_down_mbps * 125e3
    in_usd_per_gb, out_usd_per_gb = offer.inet_down_usd_per_gb, offer.inet_up_usd_per_gb
    moved = (
        ("push", "from here", workload.push_bytes, min(down, home_up), in_usd_per_gb),
        ("packages", "from PyPI", workload.install_bytes, down, in_usd_per_gb),
        ("model", "from the hub", workload.model_download_bytes, down, in_usd_per_gb),
        ("result", "home", workload.pull_bytes, min(up, home_down), out_usd_per_gb),
        ("merged", "home", workload.merged_bytes, min(up, home_down), out_usd_per_gb),
    )
    return [
        Transfer(name, way, size, _seconds_for(size, rate), size / GB * usd)
        for name, way, size, rate, usd in moved
        if size
    ]


def checkpoint_transfer(offer: Offer, workload: Workload) -> Transfer:
    """The transfer of one checkpoint home."""
    rate = min(offer.inet_up_mbps * _LINK_SHARE * 125e3, workload.home_down_mbps * 125e3)
    size = workload.checkpoint_bytes
    usd = size / GB * offer.inet_up_usd_per_gb
    return Transfer("save", "home", size, _seconds_for(size, rate), usd)


def _with_accidents(
    cost: CostEstimate,
    offer: Offer,
    workload: Workload,
    bid_usd_per_hour: float | None,
    p_bad: float,
) -> CostEstimate:
    """`cost` of a run without a failure, with what failures are expected to add. A boot that fails
    costs the image and some disk; an interruption costs everything up to the first step again."""
    disk_rate = disk_usd_per_hour(offer, workload.disk_gib)
    p_boot_fails = 1 - (1 - _BOOT_FAILS) * max(offer.reliability, 0.5) * (1 - min(p_bad, 0.99))
    interruptions_per_h = _interruptions_per_hour(offer, bid_usd_per_hour)
    loading_h = (cost.boot_s + cost.pull_s) / 3600
    dead_boot_usd = (
        workload.image_bytes / GB * offer.inet_down_usd_per_gb + disk_rate * 3 * loading_h
    )
    again_h = (cost.transfer_s + cost.start_s + min(workload.save_every_s, cost.train_s) / 2) / 3600
    again_usd = (
        (cost.usd_per_hour + disk_rate) * again_h + disk_rate * loading_h + cost.inet_down_usd
    )
    interruptions = (
        interruptions_per_h * cost.running_h / max(1 - interruptions_per_h * again_h, 0.05)
    )
    risk_usd = interruptions * again_usd + (1 + interruptions) * dead_boot_usd * p_boot_fails / (
        1 - p_boot_fails
    )
    return replace(
        cost,
        p_finish=(1 - p_boot_fails) * math.exp(-interruptions_per_h * cost.running_h),
        expected_usd=cost.usd + risk_usd,
        risk_usd=risk_usd,
    )


def burn_usd(
    machine: Instance | Offer,
    elapsed_running_s: float,
    elapsed_existing_s: float,
    gb_in: float = 0.0,
    gb_out: float = 0.0,
    disk_gib: float | None = None,
    bid_usd_per_hour: float | None = None,
) -> float:
    """Dollars spent so far: GPUs (or the bid) for the seconds it ran, disk for the seconds it
    existed, bytes at the host's prices.

    For an Offer, `disk_gib` says how much disk was rented. An Instance knows it, and its $/h
    contains the bid already.
    """
    disk_rate = disk_usd_per_hour(
        machine,
        machine.disk_gib if disk_gib is None and isinstance(machine, Instance) else disk_gib or 0.0,
    )
    gpu_rate = (
        machine.usd_per_hour - disk_rate if isinstance(machine, Instance) else machine.usd_per_hour
    )
    if bid_usd_per_hour is not None:
        gpu_rate = bid_usd_per_hour
    spent = (gpu_rate * elapsed_running_s + disk_rate * elapsed_existing_s) / 3600
    return spent + gb_in * machine.inet_down_usd_per_gb + gb_out * machine.inet_up_usd_per_gb


def compare(prediction: Mapping[str, Any], bill_items: Iterable[Mapping[str, Any]]) -> list[str]:
    """Lines that compare the bill (items of /charges/: type gpu, disk, bwd or bwu, and amount) with
    the prediction, a CostEstimate as a journal keeps it: one for each type and a total. A type that
    we do not know is listed by its name."""
    predicted = {
        "gpu": prediction["gpu_usd"],
        "disk": prediction["disk_usd"],
        "bwd": prediction["inet_down_usd"],
        "bwu": prediction["inet_up_usd"],
    }
    billed: dict[str, float] = dict.fromkeys(predicted, 0.0)
    for item in bill_items:
        kind = str(item.get("type", "unknown"))
        billed[kind] = billed.get(kind, 0.0) + float(item.get("amount") or 0.0)
    lines = [
        _comparison(_KINDS.get(k, k), predicted.get(k, 0.0), amount) for k, amount in billed.items()
    ]
    return [*lines, _comparison("total", prediction["usd"], sum(billed.values()))]


_KINDS = {"gpu": "GPU", "disk": "disk", "bwd": "download", "bwu": "upload"}


def _interruptions_per_hour(offer: Offer, bid: float | None) -> float:
    host = -math.log(max(offer.reliability, 0.5)) / _RELIABLE_FOR_H
    if bid is None or offer.min_bid_usd_per_hour <= 0:
        return host
    over = (bid / offer.min_bid_usd_per_hour - 1.2) / 0.2
    return host + _OUTBID_PER_H * math.pow(0.5, over)


def _disk_speed(offer: Offer) -> float:
    return offer.disk_mb_s * 1e6 if offer.disk_mb_s > 0 else _MODEL_READ_BYTES_S


def _seconds_for(amount: float, rate: float) -> float:
    return amount / max(rate, 1e3) if amount > 0 else 0.0


def _arithmetic(offer: Offer, workload: Workload, c: CostEstimate) -> tuple[str, ...]:
    gpu = f"{offer.num_gpus}x {offer.gpu_name}" if offer.num_gpus > 1 else offer.gpu_name
    where = "this computer" if workload.cpu_practice else gpu
    disk_month = offer.storage_usd_per_gib_month
    moved = [
        f"{t.name:<9} {span(t.seconds)} and ${t.usd:.4f} for {t.size_bytes / GB:.3g} GB {t.way}"
        for t in transfers(offer, workload)
    ]
    saves = math.floor(c.train_s / workload.save_every_s)
    if saves and workload.checkpoint_bytes:
        one = checkpoint_transfer(offer, workload)
        late = ": longer than save_every_s, not each comes home"
        moved.append(
            f"saves     {saves} x {one.size_bytes / GB:.3g} GB home while it trains, "
            f"{span(one.seconds)} and ${one.usd:.4f} each"
            + (late if one.seconds > workload.save_every_s else "")
        )
    each = workload.each
    trained = [
        f"train     {f'{one.stage} ' if len(each) > 1 else ''}{span(seconds)} = "
        f"{one.counted} / {one.tokens / max(seconds, 1e-9):,.0f} a second on {where}"
        + (f", ${c.usd_per_hour * seconds / 3600:.4f}" if len(each) > 1 else "")
        for one, seconds in zip(each, c.stages_s, strict=True)
    ]
    rate = (c.usd_per_hour + disk_usd_per_hour(offer, workload.disk_gib)) / 3600
    talked = f"talk      {span(c.talk_s)} on {where} for ${c.talk_s * rate:.4f} at most"
    scored = f"evaluate  at most {span(c.evaluate_s)} for ${c.evaluate_s * rate:.4f}"
    merged = f"merge     at most {span(c.merge_s)} for ${c.merge_s * rate:.4f}"
    return (
        *(trained if workload.tokens else []),
        *([scored] if c.evaluate_s else []),
        *([merged] if c.merge_s else []),
        *([talked] if c.talk_s else []),
        f"before    {span(c.boot_s + c.pull_s)} to boot and pull "
        f"{workload.image_bytes / GB:.2f} GB of image",
        *moved,
        f"start     {span(c.start_s)} from the launch to the first "
        f"{'step' if workload.tokens else 'answer'}",
        f"GPU       ${c.gpu_usd:.4f} = {c.running_h:.3f} h x ${c.usd_per_hour:.4f}/h "
        "(loading is not billed)",
        f"disk      ${c.disk_usd:.4f} = {c.hours:.3f} h x {workload.disk_gib:g} GB x "
        f"${disk_month:.3f}/GB/month",
        f"download  ${c.inet_down_usd:.4f} = {c.gb_in:.2f} GB x "
        f"${offer.inet_down_usd_per_gb:.4f}/GB",
        f"upload    ${c.inet_up_usd:.4f} = {c.gb_out:.2f} GB x ${offer.inet_up_usd_per_gb:.4f}/GB",
        f"risk      ${c.risk_usd:.4f} for boots that fail and restarts, at reliability "
        f"{offer.reliability:.3f}",
        f"total     ${c.expected_usd:.4f} expected, ${c.usd:.4f} without accident; "
        f"{c.p_finish:.0%} that this machine finishes",
    )


def _comparison(what: str, predicted: float, billed: float) -> str:
    off = f" ({billed / predicted - 1:+.0%})" if predicted > 0 else ""
    return f"{what:<9} predicted ${predicted:.4f}, billed ${billed:.4f}{off}"
