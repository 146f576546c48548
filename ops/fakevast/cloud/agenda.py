"""What happens next by itself, and when: boots, end dates, credit that runs out. Pure."""

from __future__ import annotations

from collections.abc import Collection

from ops.fakevast.cloud.instance import Instance

DELETED_AFTER_END_S = 48 * 3600.0
Due = tuple[float, Instance | None]  # when; None stands for the credit reaching zero


def next_due(instances: Collection[Instance], credit_usd: float, limit: float) -> Due | None:
    """The first thing due by `limit` (epoch seconds); puts the ends of contracts on agendas."""
    first: Due | None = None
    for instance in instances:
        running = instance.cur_state == "running"
        end = instance.end_date + (0.0 if running else DELETED_AFTER_END_S)
        if not instance.agenda or end < instance.agenda[0][0]:
            if end <= limit and (first is None or end < first[0]):
                instance.agenda.insert(0, (end, "contract_ended" if running else "delete", None))
        if instance.agenda and instance.agenda[0][0] <= limit:
            if first is None or instance.agenda[0][0] < first[0]:
                first = (instance.agenda[0][0], instance)
    empty = broke_at(instances, credit_usd)
    if empty is not None and empty <= limit and (first is None or empty < first[0]):
        first = (empty, None)
    return first


def broke_at(instances: Collection[Instance], credit_usd: float) -> float | None:
    """When the credit, known as last settled, reaches zero at the present rate.

    None when it never does, or did and everything is stopped.
    """
    if not any(instance.cur_state == "running" for instance in instances):
        return None
    burn = sum(instance.burn_usd_per_s() for instance in instances)
    settled = max(instance.settled_at for instance in instances)
    if credit_usd <= 1e-9:
        return settled
    return settled + credit_usd / burn if burn > 0 else None
