"""The OpenAPI document, made of the same models that check bodies and make replies."""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic.json_schema import models_json_schema

from llmjax.serve import replies

PROBLEMS = {"400": "the request cannot be done as asked", "401": "no API key, or an unknown one", "404": "no such model", "408": "the body came too slowly", "413": "the body is too large",
            "415": "the body is not application/json", "429": "too many requests; Retry-After says when", "500": "the model or the server failed", "503": "shutting down, or the engine has failed",
            "504": "the request ran out of time"}


def describe(endpoints: Sequence[Any]) -> dict[str, Any]:
    """endpoints: app.Endpoint."""
    pages: dict[str, tuple[str, type[replies.Reply] | None, bool]] = {
        "/v1/models": ("The models here.", replies.ModelList, True), "/v1/models/{name}": ("One model.", replies.ModelReply, True),
        "/health": ("Whether the process works.", replies.HealthReply, False),
        "/ready": ("Whether requests should be sent here.", replies.HealthReply, False), "/metrics": ("Figures for Prometheus.", None, False)}
    made = [x for e in endpoints for x in (e.reply, e.problem)] + [reply for _, reply, _ in pages.values() if reply] + [replies.ErrorReply]
    _, known = models_json_schema([(e.body, "validation") for e in endpoints] + [(reply, "serialization") for reply in dict.fromkeys(made)], ref_template="#/components/schemas/{model}")

    def ref(model: type) -> dict[str, str]:
        return {"$ref": f"#/components/schemas/{model.__name__}"}

    def answer(text: str, kind: str, schema: dict[str, Any]) -> dict[str, Any]:
        return {"description": text, "content": {kind: {"schema": schema}}}
    problems = {status: answer(text, "application/json", ref(replies.ErrorReply)) for status, text in PROBLEMS.items()}
    paths: dict[str, Any] = {}
    for e in endpoints:
        good = answer("the answer", "application/json", ref(e.reply))
        if e.streams:
            good["content"]["text/event-stream"] = {"schema": {"type": "string"}}
        mine = {status: answer(text, "application/json", ref(e.problem)) for status, text in PROBLEMS.items()}
        paths[e.path] = {"post": {"summary": (e.body.__doc__ or e.path).split("\n")[0], "operationId": e.path.strip("/").replace("/", "_"), "security": [{"key": []}, {}],
                                  "requestBody": {"required": True, "content": {"application/json": {"schema": ref(e.body)}}}, "responses": {"200": good, **mine}}}
    for path, (text, reply, locked) in pages.items():
        responses = {"200": answer(text, "application/json", ref(reply)) if reply else answer(text, "text/plain", {"type": "string"})}
        responses |= {s: problems[s] for s in ("401", "404", "429")} if locked else {"503": answer("not now", "application/json", ref(replies.HealthReply))} if reply else {}
        number = path.strip("/").replace("/", "_").replace("{name}", "name")
        paths[path] = {"get": {"summary": text, "operationId": number, "responses": responses, **({"security": [{"key": []}, {}]} if locked else {})}}
        if "{name}" in path:
            paths[path]["get"]["parameters"] = [{"name": "name", "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}]
    return {"openapi": "3.1.0", "info": {"title": "llmjax", "version": "1", "description": "A language model behind OpenAI's API."}, "paths": paths,
            "components": {"schemas": known["$defs"], "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}}}
