"""What a model says taken apart while it comes: thoughts (`<think>`), calls of tools in the formats that published models were trained on, and the answer itself.

A call is given out whole, when its end is there: half a call helps nobody, and streaming its arguments by comparing parsed halves is what goes wrong elsewhere. Text that only looks like a
call (broken JSON, a name that is no tool's) is given as text, nothing is lost.
"""
from __future__ import annotations

import dataclasses as dc
import json
import re
import secrets
from collections.abc import Callable, Collection
from typing import Any

from llmjax.decode.text import begun


@dc.dataclass(frozen=True)
class Call:
    """A tool called by name with arguments, a JSON text."""
    name: str
    arguments: str
    id: str = dc.field(default_factory=lambda: f"call_{secrets.token_hex(12)}")


@dc.dataclass(frozen=True)
class Said:
    """What became clear: thoughts, answer, calls."""
    thought: str = ""
    text: str = ""
    calls: tuple[Call, ...] = ()


def objects(text: str) -> list[Any]:
    """JSON values one after the other, divided by white space, commas or semicolons. Raises ValueError where anything else stands between."""
    found: list[Any] = []
    decoder, at = json.JSONDecoder(), 0
    while True:
        at += len(text[at:]) - len(text[at:].lstrip(" \t\r\n,;"))
        if at == len(text):
            return found
        value, at = decoder.raw_decode(text, at)
        found.append(value)


def from_json(value: Any) -> Call:
    """{"name": …, "arguments" or "parameters": {…}}. Raises ValueError for anything else."""
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        raise ValueError("no call")
    arguments = value.get("arguments", value.get("parameters", {}))
    if isinstance(arguments, str):
        arguments = json.loads(arguments or "{}")
    if not isinstance(arguments, dict):
        raise ValueError("no arguments")
    return Call(value["name"], json.dumps(arguments, ensure_ascii=False))


def read_json(body: str) -> list[Call]:
    """Calls as JSON objects, or lists of such."""
    found = []
    for value in objects(body):
        found += [from_json(v) for v in (value if isinstance(value, list) else [value])]
    return found


def read_mistral(body: str) -> list[Call]:
    """A JSON list of calls, or name[ARGS]{…} with the marker again before each further one."""
    if body.lstrip()[:1] in "[{":
        return read_json(body)
    found = []
    for part in body.split("[TOOL_CALLS]"):
        match = re.fullmatch(r"\s*([\w.-]+)\s*(?:\[CALL_ID\]\s*\w+\s*)?\[ARGS\](.*)", part, re.S)
        if match is None:
            raise ValueError("no call")
        found.append(from_json({"name": match[1], "arguments": json.loads(match[2])}))
    return found


@dc.dataclass(frozen=True)
class Format:
    """opens, closes: the texts around a call (no `closes`: it goes to the end); bare: an answer that begins with a brace is a call; read: its inside as calls, or ValueError."""
    opens: str
    closes: str | None
    read: Callable[[str], list[Call]]
    bare: bool = False


FORMATS = {"hermes": Format("<tool_call>", "</tool_call>", read_json), "mistral": Format("[TOOL_CALLS]", None, read_mistral), "llama3": Format("<|python_tag|>", None, read_json, bare=True)}
MARKERS = ("<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]", "<|python_tag|>", "<think>", "</think>")      # tokens whose text a parser has to see, special or not


def choose_format(templates: str) -> str | None:
    """The format that a chat template writes calls in."""
    if "<tool_call>" in templates:
        return "hermes"
    if "[TOOL_CALLS]" in templates:
        return "mistral"
    return "llama3" if "<|python_tag|>" in templates or '"parameters":' in templates else None


class ToolParser:
    """Text in pieces -> (text, calls) in pieces. names: the tools there are."""

    def __init__(self, form: Format, names: Collection[str]):
        self.form, self.names = form, frozenset(names)
        self.held, self.inside, self.fresh, self.called = "", "", True, False

    def push(self, text: str) -> tuple[str, list[Call]]:
        self.held += text
        out, calls = "", list[Call]()
        while True:
            if self.inside:
                end = -1 if self.form.closes is None else self.held.find(self.form.closes)
                if end < 0:
                    return out, calls
                assert self.form.closes is not None
                more, found = self.finished(self.held[:end], self.form.closes)
                self.held = self.held[end + len(self.form.closes):]
            else:
                more, found = self.outside(), []
            out, calls = out + more, calls + found
            if not self.inside and (not self.held or begun(self.held, (self.form.opens,)) or (self.fresh and not self.held.strip())):
                return out, calls

    def outside(self) -> str:
        """Text before a call; then `inside` holds the text that opened it."""
        if self.fresh and self.form.bare and self.held.lstrip()[:1] == "{":
            self.inside = " "
            return ""
        at = self.held.find(self.form.opens)
        if at < 0:
            at = len(self.held) - begun(self.held, (self.form.opens,))
            if self.fresh and self.form.bare and not self.held.strip():
                at = 0
        else:
            self.inside = self.form.opens
        text, self.held = self.held[:at], self.held[at + len(self.inside):]
        if text.strip():
            self.fresh = False
        return "" if self.called and not text.strip() else text

    def finished(self, body: str, closed: str) -> tuple[str, list[Call]]:
        opened, self.inside = self.inside.strip(), ""
        try:
            calls = self.form.read(body)
            if calls and all(c.name in self.names for c in calls):
                self.called = True
                return "", calls
        except ValueError:
            pass
        self.fresh = False
        return opened + body + closed, []

    def close(self) -> tuple[str, list[Call]]:
        """At the end of the answer."""
        if self.inside:
            text, calls = self.finished(self.held, "")
            self.held = ""
            return text, calls
        text, self.held = self.held, ""
        return text, []


class ThinkParser:
    """Text in pieces -> (thought, text) in pieces. inside: the prompt ends within a thought already."""

    def __init__(self, inside: bool = False):
        self.state, self.held = "inside" if inside else "before", ""

    def push(self, text: str) -> tuple[str, str]:
        self.held += text
        thought = ""
        if self.state == "before":
            start = self.held.lstrip()
            if start.startswith("<think>"):
                self.state, self.held = "inside", start[len("<think>"):]
            elif not "<think>".startswith(start):
                self.state = "after"
            else:
                return "", ""
        if self.state == "inside":
            at = self.held.find("</think>")
            if at < 0:
                at = len(self.held) - begun(self.held, ("</think>",))
                thought, self.held = self.held[:at], self.held[at:]
                return thought, ""
            thought, self.held, self.state = self.held[:at], self.held[at + len("</think>"):], "gap"
        if self.state == "gap":
            self.held = self.held.lstrip("\n")
            if not self.held:
                return thought, ""
            self.state = "after"
        text, self.held = self.held, ""
        return thought, text

    def close(self) -> tuple[str, str]:
        left, self.held = self.held, ""
        return (left, "") if self.state == "inside" else ("", left)


class Listener:
    """Both parsers in a row, each only where wanted."""

    def __init__(self, think: ThinkParser | None = None, tools: ToolParser | None = None):
        self.think, self.tools = think, tools

    def push(self, text: str) -> Said:
        thought, text = self.think.push(text) if self.think else ("", text)
        answer, calls = self.tools.push(text) if self.tools and text else (text, [])
        return Said(thought, answer, tuple(calls))

    def close(self) -> Said:
        thought, text = self.think.close() if self.think else ("", "")
        answer, calls = self.tools.push(text) if self.tools and text else (text, [])
        if self.tools:
            last, more = self.tools.close()
            answer, calls = answer + last, calls + more
        return Said(thought, answer, tuple(calls))
