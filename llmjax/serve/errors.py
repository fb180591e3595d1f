"""What goes wrong in a request, in the form that OpenAI's clients read: {"error": {"message", "type", "param", "code"}} and a status."""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llmjax.core.errors import nearest

TYPES = {400: "invalid_request_error", 401: "authentication_error", 403: "permission_error", 404: "not_found_error", 405: "invalid_request_error", 408: "timeout_error", 413: "invalid_request_error",
         415: "invalid_request_error", 429: "rate_limit_error", 500: "server_error", 503: "overloaded_error", 504: "timeout_error"}


BRANCHES = frozenset({"str", "int", "float", "bool", "dict", "none", "text", "json_object", "json_schema", "tool_use", "tool_result"})      # how pydantic calls the sides of a union


class ApiError(Exception):
    """An answer that is an error. param: the field it is about; code: a word that programs read; retry_after: seconds."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None, retry_after: int | None = None):
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.retry_after = status, " ".join(message.split()), param, code, retry_after

    @property
    def body(self) -> dict[str, Any]:
        return {"error": {"message": self.message, "type": TYPES.get(self.status, "server_error"), "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        found = {} if self.retry_after is None else {"retry-after": str(self.retry_after)}
        return found | ({"www-authenticate": "Bearer"} if self.status == 401 else {})


def bad(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """The request cannot be done as asked."""
    return ApiError(400, message, param=param, code=code)


def from_validation(errors: Sequence[Any], fields: dict[str, Any]) -> ApiError:
    """The first of pydantic's errors as one line: the field, its value, what is wanted. fields: those of the request, for the nearest right name."""
    error = min(errors, key=lambda e: e["type"] in ("extra_forbidden", "missing")) if len(errors) > 1 and errors[0]["loc"] and errors[0]["type"] == "extra_forbidden" else errors[0]
    where = ".".join(str(x) for x in error["loc"] if not (isinstance(x, str) and ("[" in x or x[:1].isupper() or x in BRANCHES)))
    if error["type"] == "json_invalid":
        return bad(f"the body is not JSON: {error['ctx']['error'] if 'ctx' in error else error['msg']}", code="invalid_json")
    if error["type"] == "missing":
        return bad(f"{where}: is missing", where, "missing_field")
    if error["type"] == "extra_forbidden":
        hint = nearest(str(error["loc"][-1]), fields) if len(error["loc"]) == 1 else ""
        return bad(f"{where}: there is no such field{hint if 'did you mean' in hint else ''}", where, "unknown_field")
    value = repr(error.get("input"))
    value = f"={value}" if len(value) <= 60 and error["type"] != "value_error" else ""
    message = str(error.get("ctx", {}).get("error", error["msg"])) if error["type"] == "value_error" else error["msg"][0].lower() + error["msg"][1:]
    return bad(f"{where}{value}: {message}" if where else message, where or None, "invalid_value")
