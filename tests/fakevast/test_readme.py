"""What the emulator's README shows is what it accepts."""

from __future__ import annotations

import json
import re
from pathlib import Path

import ops.fakevast
from ops.fakevast import weather
from ops.fakevast.cloud.faults import API_FAULTS, BOX_FAULTS, Faults
from ops.fakevast.http.routes import ROUTES

FOLDER = Path(ops.fakevast.__file__).parent
README = (FOLDER / "README.md").read_text()


def test_every_fault_in_the_readme_is_one_that_the_emulator_knows() -> None:
    examples = json.loads(re.findall(r"```json\n(.*?)```", README, re.DOTALL)[0])
    places = {route.name for route in ROUTES} | set(BOX_FAULTS)
    assert len(examples) >= 10
    for example in examples:
        assert Faults().add(example).where in places


def test_the_weather_in_the_readme_is_read_and_its_kinds_are_all_of_them() -> None:
    assert len(weather.parse(re.findall(r"```json\n(.*?)```", README, re.DOTALL)[1])) == 3
    kinds = [one.model_fields["kind"].default for one in weather.KINDS.__args__]
    assert [kind for kind in kinds if f"`{kind}`" not in README] == []


def test_every_fault_that_exists_is_used_by_a_test() -> None:
    tests = "".join(
        path.read_text()
        for path in Path(__file__).parent.glob("test_*.py")
        if path.name != Path(__file__).name
    )
    kinds = API_FAULTS | set().union(*BOX_FAULTS.values())
    assert len(kinds) > 25 and [kind for kind in sorted(kinds) if f'"{kind}"' not in tests] == []


def test_every_route_has_a_handler() -> None:
    from ops.fakevast.http import account as api_account
    from ops.fakevast.http import instances as api_instances

    missing = [
        route.name
        for route in ROUTES
        if not (hasattr(api_instances, route.name) or hasattr(api_account, route.name))
    ]
    assert len(ROUTES) >= 40 and missing == []
