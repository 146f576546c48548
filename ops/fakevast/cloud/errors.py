"""The one exception of the emulated API: an answer that is not a success, as vast.ai words it."""

from __future__ import annotations

from typing import Any


class ApiError(Exception):
    """`status` is the HTTP status; `body` the JSON that goes with it."""

    def __init__(self, status: int, error: str, msg: str, **extra: Any) -> None:
        super().__init__(f"{status} {error}: {msg}")
        self.status = status
        self.error = error
        self.body: dict[str, Any] = {"success": False, "error": error, "msg": msg, **extra}


def no_such_instance(instance_id: object) -> ApiError:
    return ApiError(
        404,
        "no_such_instance",
        f"error 404/3330: no_such_instance Instance {instance_id} not found.",
    )


def no_such_ask(ask_id: object, status: int = 404) -> ApiError:
    text = (
        f"Instance type by id {ask_id} is not available."
        if status == 404
        else f"Instance type {ask_id} is no longer available."
    )
    code = {404: 3603, 410: 3907}.get(status, 3467)
    return ApiError(
        status, "no_such_ask", f"error {status}/{code}: no_such_ask {text}", ask_id=ask_id
    )


def wrong_key() -> ApiError:
    return ApiError(404, "auth_error", "Invalid user key")


def no_key() -> ApiError:
    return ApiError(403, "auth_error", "This action requires login.")
