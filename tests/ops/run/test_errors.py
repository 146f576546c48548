from __future__ import annotations

import pytest

from ops import errors
from ops.errors import BoxError, Lost, MarketError, MilkteaError, NoAnswer, OfferGone, Refused
from ops.market.replies import refusal


def classes(of: type[MilkteaError] = MilkteaError) -> list[type[MilkteaError]]:
    return [of, *(c for sub in of.__subclasses__() for c in classes(sub))]


def test_every_class_has_an_exit_code_and_a_word_on_the_money() -> None:
    assert {c.__name__ for c in classes() if c.__module__ == errors.__name__} >= {
        "NoOffer",
        "HostKeyChanged",
        "BoxLeaked",
    }
    for kind in classes():
        assert kind.exit_code and kind("what").money, kind


@pytest.mark.parametrize(
    ("kind", "money"),
    [
        (Lost, "the box is still rented"),
        (BoxError, "the box is still rented"),
        (NoAnswer, "unknown"),
    ],
)
def test_the_meter_replaces_what_a_class_says_of_the_money(
    kind: type[MilkteaError], money: str
) -> None:
    error = kind("what")
    assert error.money == money
    error.fill_in_money("spent 0.1 $ of 1 $")
    assert error.money == "spent 0.1 $ of 1 $"
    error.fill_in_money("spent 0.2 $ of 1 $")
    assert error.money == "spent 0.1 $ of 1 $", "filled in once"
    assert kind("what").money == money, "another one of its class is as before"


def test_the_meter_does_not_replace_what_a_raise_knew() -> None:
    error = MilkteaError("what", money="the other client looks after the box")
    error.fill_in_money("spent 0.1 $ of 1 $")
    assert error.money == "the other client looks after the box"


@pytest.mark.parametrize(
    ("status", "reply", "kind", "code", "instance_id"),
    [
        (404, {"error": "no_such_ask", "msg": "gone"}, OfferGone, "no_such_ask", None),
        (401, {"error": "auth_error", "msg": "no"}, Refused, "auth_error", None),
        (400, {"error": "insufficient_credit"}, Refused, "insufficient_credit", None),
        (200, {"success": False, "msg": "no", "new_contract": 7}, Refused, "", 7),
        (500, "a page", Refused, "", None),
    ],
)
def test_a_refusal_keeps_vast_ais_code_and_the_contract_that_it_names(
    status: int, reply: object, kind: type[MarketError], code: str, instance_id: int | None
) -> None:
    error = refusal(status, reply)
    assert (type(error), error.code, error.instance_id) == (kind, code, instance_id)
