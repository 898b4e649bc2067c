"""Errors as OpenAI's clients know them: {"error": {message, type, param, code}}.

What a sender can mend also says `value` (what was got) and `allowed`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.requests import Request

from lenvm.errors import CapacityError, ControlError, InputError, LenVMError
from lenvm.guidance.request import LengthControl

MAX_SHOWN = 200


class ErrorDetail(BaseModel):
    """What went wrong. `param` is the field, dotted; `value` what was got, `allowed` the rest."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None
    value: str | None = None
    allowed: str | None = None


class ErrorBody(BaseModel):
    """Body of every answer that is not 2xx."""

    error: ErrorDetail


RESPONSES: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody, "description": text}
    for status, text in {
        400: "The body is no JSON, or the request can never run.",
        401: "No API key, or an unknown one.",
        404: "No such model.",
        408: "The body came too slowly.",
        413: "The body is too large.",
        422: "A field is out of range; the error names it.",
        429: "All places are taken; Retry-After says when to come again.",
        500: "A defect; the log has it.",
        503: "The server is going down.",
        504: "The request took too long.",
    }.items()
}
KINDS = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """An answer that is not 2xx."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        value: object = None,
        allowed: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.headers = status, dict(headers or {})
        kind = KINDS.get(status, "invalid_request_error" if status < 500 else "server_error")
        shown = None if value is None else _show(value)
        self.detail = ErrorDetail(
            message=message, type=kind, param=param, code=code, value=shown, allowed=allowed
        )

    def body(self) -> dict[str, Any]:
        return ErrorBody(error=self.detail).model_dump()

    def response(self) -> JSONResponse:
        return JSONResponse(self.body(), self.status, self.headers)


FORMS = {"prompt": "a text, token ids, or a list of either, none of them empty"}
"""Fields of several forms, where pydantic says what is wrong with each."""
CUT_OFF = ApiError(503, "the server went down before this was finished")


def refuse(param: str, value: object, allowed: str, *, status: int = 422) -> ApiError:
    """An error that names a field, what was got and what is allowed."""
    message = f"{param} is {_show(value)}; allowed: {allowed}"
    return ApiError(
        status, message, param=param, code="invalid_value", value=value, allowed=allowed
    )


def from_lenvm(error: LenVMError) -> ApiError:
    """What the engine says of a request, as an answer."""
    if isinstance(error, ControlError):
        field = "length" if error.field == "(whole)" else f"length.{error.field}"
        return refuse(field, error.value, error.allowed)
    if isinstance(error, CapacityError):
        return ApiError(400, str(error), param="max_tokens", code="context_length_exceeded")
    if isinstance(error, InputError):
        return ApiError(400, str(error))
    return ApiError(500, str(error))


def from_validation(errors: Sequence[Any]) -> ApiError:
    """The first error of pydantic, in our words."""
    first = errors[0]
    place = [str(part) for part in first["loc"] if part != "body" and not _is_branch(part)]
    if first["type"] == "json_invalid":
        return ApiError(400, f"the body is no JSON: {first.get('ctx', {}).get('error', '')}")
    if first["type"] == "extra_forbidden":
        allowed = "nothing: there is no such field"
        if place[:-1] == ["length"]:
            allowed += f"; length has {', '.join(LengthControl.model_fields)}"
        return refuse(".".join(place), first["input"], allowed)
    if not place and isinstance(first.get("input"), bytes):
        return ApiError(
            400, "the body came without its type; send the header content-type: application/json"
        )
    if (form := FORMS.get(place[0] if place else "")) and len(errors) > 1:
        message = f"{place[0]} has another form; allowed: {form}"
        return ApiError(422, message, param=place[0], code="invalid_value", allowed=form)
    if not place and first["type"] == "missing":
        return ApiError(400, "the body is empty; send a JSON object")
    allowed = str(first["msg"]).removeprefix("Value error, ")
    if not place and first["type"] == "value_error":  # several fields: the body would drown it
        return ApiError(422, allowed, code="invalid_value", allowed=allowed)
    if first["type"] == "missing":
        return refuse(".".join(place) or "body", "missing", allowed)
    return refuse(".".join(place) or "body", first["input"], allowed)


def _is_branch(part: object) -> bool:
    """pydantic names the branch of a union in the place of an error; it is no field."""
    return isinstance(part, str) and ("[" in part or part in ("str", "int", "constrained-str"))


def install(app: FastAPI) -> None:
    """Every error of an app in this form."""

    @app.exception_handler(ApiError)
    async def _api(request: Request, error: ApiError) -> JSONResponse:
        return error.response()

    @app.exception_handler(LenVMError)
    async def _lenvm(request: Request, error: LenVMError) -> JSONResponse:
        return from_lenvm(error).response()

    @app.exception_handler(RequestValidationError)
    async def _validation(request: Request, error: RequestValidationError) -> JSONResponse:
        return from_validation(error.errors()).response()

    @app.exception_handler(HTTPException)
    async def _http(request: Request, error: HTTPException) -> JSONResponse:
        return ApiError(error.status_code, str(error.detail), headers=error.headers).response()


def _show(value: object) -> str:
    """A value as JSON-safe text, cut."""
    if isinstance(value, BaseModel):
        value = value.model_dump(exclude_defaults=True)
    text = repr(value) if not isinstance(value, int) else _show_int(value)
    text = text.encode("utf-8", errors="backslashreplace").decode()
    return text if len(text) <= MAX_SHOWN else text[: MAX_SHOWN - 1] + "…"


def _show_int(value: int) -> str:
    """Python refuses to print very long integers."""
    return repr(value) if abs(value) < 10**60 else f"an integer of {value.bit_length()} bits"
