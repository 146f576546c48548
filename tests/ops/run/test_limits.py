"""What a run says when it ends before its training does, and how it goes on."""

from __future__ import annotations

import pytest
from owners import Forked, creates, planned, stop_in_time, told

import milktea
import rig
from ops.errors import OverBudget, PreflightError
from ops.fakevast import FakeVast
from ops.market.client import Vast
from ops.market.provider import Provider
from ops.wait import RealClock


@pytest.fixture
def vast(fake: FakeVast) -> Vast:
    return Vast(Provider(fake.url, fake.api_key), RealClock(rig.PACE))


def test_a_run_whose_limit_is_reached_goes_on_with_a_higher_one(
    own: rig.Rig, fake: FakeVast, vast: Vast
) -> None:
    run = planned(own, max_usd=0.01)  # the image alone costs a tenth of it, and two minutes more
    with pytest.raises(OverBudget) as refused:
        milktea.resume(run, vast=vast, root=own.runs, foreground=True, max_hours=0.01)
    assert f"milktea resume {run.id} --max-usd N" in refused.value.hint and creates(fake) == 0
    milktea.resume(run, vast=vast, root=own.runs, foreground=True, max_usd=1.5, max_hours=3.0)
    assert run.adapter is not None and creates(fake) == 1
    assert run.status().max_usd == 1.5 == run.cost().max_usd
    limits = [(line["max_usd"], line["max_s"]) for line in run.journal if line.kind == "limits"]
    assert limits == [(0.01, 36.0), (1.5, 10800.0)]
    assert "from now on at most 1.50 $ and 3.0 h" in "\n".join(run.explain())


@pytest.mark.parametrize(
    ("saves", "said"),
    [(True, "the checkpoint of step 1 is at home"), (False, "no checkpoint of it is at home")],
)
def test_who_stops_a_run_is_told_what_is_at_home(
    own: rig.Rig, fake: FakeVast, vast: Vast, saves: bool, said: str
) -> None:
    if saves:
        stop_in_time(own)
    (own.image / "pause").touch()
    run = planned(own)
    owner = Forked(run, vast)
    told(run, "event")
    with pytest.raises(PreflightError, match="keeps the limits"):
        milktea.resume(run, vast=vast, root=own.runs, max_usd=9.0)
    milktea.stop(run, "fetch", vast=vast)
    assert owner.ended() == 6 and f"stopped by you; {said}" in told(run, "failed")["what"]
