"""The bill, against arithmetic that knows nothing of the emulator's code."""

from __future__ import annotations

import random

import pytest

from ops.fakevast import Cloud, VirtualClock
from ops.fakevast.cloud.settings import Settings

BOOT_S, RESTART_S = 60.0, 18.0


def wait(cloud: Cloud, seconds: float, chance: random.Random) -> float:
    """Lets so much time pass in random pieces, the cloud looking at it now and then."""
    left = seconds
    while left > 1.0:
        piece = chance.uniform(0.0, left)
        cloud.clock.advance(piece)
        left -= piece
        if chance.random() < 0.5:
            cloud.tick()
    cloud.clock.advance(left)
    return seconds


@pytest.mark.parametrize("seed", range(40))
def test_charges_equal_the_cost_computed_by_hand_to_the_cent(seed: int) -> None:
    """Random lives: started and stopped several times, with traffic both ways. The formula is
    vast.ai's documented one: GPU hours while running, disk by a month of 720 hours while it exists,
    bytes at the host's price, the image's pull included."""
    chance = random.Random(seed)
    cloud = Cloud(
        VirtualClock(),
        settings=Settings(boot_s=BOOT_S, credit_usd=1e6, default_image_bytes=2_000_000_000),
    )
    by_hand: dict[str, float] = {}
    for turn in range(4):
        offers = [
            row
            for row in cloud.offers()
            if row["duration"] > 3e6 and row["disk_space"] > 200 and row["machine_id"] != 12010
        ]
        offer = chance.choice(offers)
        disk, bid = chance.uniform(8, 200), chance.choice([None, offer["dph_base"] * 0.9])
        order = {"image": "i", "disk": disk, "label": f"run-{turn}", "price": bid}
        number = cloud.create(offer["id"], order)["new_contract"]
        running_s = exists_s = 0.0
        for period in range(chance.randint(1, 3)):
            if period:
                cloud.set_state(number, "running")
            up = wait(cloud, chance.uniform(BOOT_S, 20_000), chance)
            cloud.set_state(number, "stopped")
            running_s += up - (RESTART_S if period else BOOT_S)
            exists_s += up + wait(cloud, chance.uniform(0, 50_000), chance)
        gb_in, gb_out = chance.uniform(0, 10), chance.uniform(0, 1)
        cloud.instances[number].carry(int(gb_in * 1e9), int(gb_out * 1e9))
        cloud.destroy(number)
        wait(cloud, 1000, chance)
        by_hand[f"instance-{number}"] = (
            (offer["dph_base"] if bid is None else bid) * running_s / 3600
            + disk * offer["storage_cost"] / 720 * exists_s / 3600
            + (gb_in + 2.0) * offer["inet_down_cost"]
            + gb_out * offer["inet_up_cost"]
        )
    bill = {row["source"]: row for row in cloud.charges()}
    assert {source: row["amount"] for source, row in bill.items()} == pytest.approx(
        by_hand, abs=0.005
    )
    for turn, row in enumerate(bill.values()):
        assert sum(item["amount"] for item in row["items"]) == pytest.approx(
            row["amount"], abs=1e-5
        )
        assert row["metadata"]["label"] == f"run-{turn}"
    assert 1e6 - cloud.credit() == pytest.approx(sum(by_hand.values()), abs=0.005)


def test_an_offline_host_bills_nothing_and_a_dead_container_bills_its_card() -> None:
    cloud = Cloud(VirtualClock(), settings=Settings(boot_s=0.0, bill_image_pull=False))
    for what, gpu_h, disk_h in (("offline", 1, 1), ("exited", 2, 2)):
        ask = next(row["id"] for row in cloud.offers() if row["machine_id"] == 11007)
        one = cloud.instances[cloud.create(ask, {"image": "i", "disk": 72})["new_contract"]]
        cloud.clock.advance(3600)
        cloud.lose_host(one.id, what)
        cloud.clock.advance(3600)
        cloud.destroy(one.id)
        assert one.meter.gpu_usd == pytest.approx(0.289 * gpu_h, abs=1e-6)
        assert one.meter.disk_usd == pytest.approx(0.1 * 0.15 * disk_h, abs=1e-6)
