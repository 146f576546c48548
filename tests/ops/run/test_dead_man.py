"""A client that dies at any moment, in virtual time: the emulator's meter, the box's real watchdog
text, our own arithmetic."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

import rig
from ops.box import scripts
from ops.errors import OverBudget
from ops.fakevast import Cloud, VirtualClock
from ops.fakevast.cloud.settings import Settings
from ops.market.models import parse_offer
from ops.run.journal import Journal


class Virtual(VirtualClock):
    """The emulator's virtual clock, as a client reads one."""

    pace = 1.0

    def steady(self) -> float:
        return self.now()


def one_death(folder: Path, seed: int) -> tuple[float, float] | None:
    """(seconds that the box outlived its client, dollars over max_usd less one watch interval);
    None when nothing was rented."""
    rng = random.Random(seed)
    clock = Virtual()
    image_bytes = rng.randrange(10**8, 10**10)
    cloud = Cloud(
        clock,
        settings=Settings(
            boot_s=rng.uniform(1, 600), credit_usd=1e4, default_image_bytes=image_bytes
        ),
    )
    row = rng.choice(cloud.search({"num_gpus": {"lte": 8}, "limit": 64}))
    offer = parse_offer(row)
    own = rig.Rig(folder)
    plan = own.plan(
        max_usd=rng.uniform(0.02, 5.0),
        workload=rig.Workload(1e6, 1e6, cpu_practice=True, disk_gib=16, image_bytes=image_bytes),
    )
    with Journal(own.runs / f"{plan.run_id}{seed}", clock.now) as journal:
        nowhere = "http://127.0.0.1:9"
        session = rig.client(plan, journal, nowhere, "none", clock=clock)  # type: ignore[arg-type]
        try:
            allowed_s = session.allowed_s(offer)
        except OverBudget:
            return None
    asked = {
        "image": "milktea/stub:1",
        "disk": 16,
        "label": plan.run_id,
        "env": {},
        "runtype": "ssh_direc ssh_proxy",
    }
    made = cloud.create(offer.id, asked, cloud.account.key)
    instance = cloud.instances[made["new_contract"]]
    while instance.actual_status != "running":
        clock.advance(1)
        cloud.tick()
    kill_at = rng.randrange(0, int(allowed_s * 1.5) + 1)
    gone = rig.watched(
        folder, kill_at=kill_at, max_s=int(allowed_s), lease_s=scripts.LEASE_S, renew_every_s=2
    )
    clock.advance(gone)
    cloud.destroy(instance.id, made["instance_api_key"])  # the box's own key is enough
    assert not cloud.instances
    spent = sum(charge["amount"] for charge in cloud.charges())
    hour = row["dph_total"]
    return max(0.0, gone - kill_at), spent - plan.max_usd - hour * scripts.WATCH_S / 3600


def check(folder: Path, seeds: range) -> None:
    results = [r for seed in seeds if (r := one_death(folder, seed))]
    assert len(results) > len(seeds) * 0.5
    longest, most_over = max(r[0] for r in results), max(r[1] for r in results)
    print(
        f"{len(results)} deaths: longest life after the client {longest:.0f} s, dollars over "
        f"the cap less one interval: {most_over:.5f}"
    )
    assert longest <= scripts.LEASE_S + 60
    assert most_over <= 1e-6


def test_a_box_whose_client_dies_is_gone_within_lease_and_a_minute_and_within_its_dollars(
    tmp_path: Path,
) -> None:
    check(tmp_path, range(8))


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_same_over_a_thousand_seeds(tmp_path: Path) -> None:
    check(tmp_path, range(1000))
