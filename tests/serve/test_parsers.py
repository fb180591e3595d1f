"""Thoughts and calls of tools, whole and cut at every place: what comes out must not depend on how the text was cut."""
import json

import pytest

from llmjax.serve.parsers import FORMATS, Listener, ThinkParser, ToolParser, choose_format

NAMES = ("weather", "add")


def said(listener, pieces):
    thought, text, calls = "", "", []
    for one in [*map(listener.push, pieces), listener.close()]:
        thought, text, calls = thought + one.thought, text + one.text, calls + [(c.name, json.loads(c.arguments)) for c in one.calls]
    return thought, text, calls


CASES = [      # as the models' published templates and cards write them
    ("hermes", '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>', "", [("weather", {"city": "Paris"})]),
    ("hermes", 'I will look.\n<tool_call>{"name": "weather", "arguments": {"city": "</x>"}}</tool_call>\n<tool_call>\n{"name": "add", "arguments": {"a": [{"b": 1}]}}</tool_call>', "I will look.\n",
     [("weather", {"city": "</x>"}), ("add", {"a": [{"b": 1}]})]),
    ("hermes", 'x <tool_call>{"name": "weather", "arguments": {', 'x <tool_call>{"name": "weather", "arguments": {', []),
    ("hermes", '<tool_call>{"name": "rm", "arguments": {}}</tool_call> y', '<tool_call>{"name": "rm", "arguments": {}}</tool_call> y', []),
    ("hermes", '<tool_call>{"name": "add", "arguments": {}}', "", [("add", {})]),
    ("hermes", "a < b and <tool> and <tool_cal", "a < b and <tool> and <tool_cal", []),
    ("llama3", '{"name": "weather", "parameters": {"city": "Rome"}}', "", [("weather", {"city": "Rome"})]),
    ("llama3", '<|python_tag|>{"name": "weather", "parameters": {"city": "Rome"}}; {"name": "add", "parameters": {"a": 1}}', "", [("weather", {"city": "Rome"}), ("add", {"a": 1})]),
    ("llama3", '{"answer": 4}', '{"answer": 4}', []),
    ("llama3", "It is {so}.", "It is {so}.", []),
    ("mistral", '[TOOL_CALLS][{"name": "weather", "arguments": {"city": "Lyon"}}, {"name": "add", "arguments": {"a": 2}}]', "", [("weather", {"city": "Lyon"}), ("add", {"a": 2})]),
    ("mistral", '[TOOL_CALLS]weather[ARGS]{"city": "Nice"}[TOOL_CALLS]add[ARGS]{"a": 3}', "", [("weather", {"city": "Nice"}), ("add", {"a": 3})]),
    ("mistral", "[TOOL", "[TOOL", []),
]


@pytest.mark.parametrize("form, text, answer, calls", CASES)
def test_calls_of_tools_however_the_text_is_cut(form, text, answer, calls):
    for size in (1, 2, 3, 7, len(text)):
        pieces = [text[i:i + size] for i in range(0, len(text), size)]
        assert said(Listener(None, ToolParser(FORMATS[form], NAMES)), pieces) == ("", answer, calls), size


def test_a_call_comes_as_soon_as_it_is_whole_and_text_at_once():
    parser = ToolParser(FORMATS["hermes"], NAMES)
    assert parser.push("Hello <b>") == ("Hello <b>", []) and parser.push(" <tool") == (" ", []) and parser.push("box>") == ("<toolbox>", [])
    text, calls = parser.push('<tool_call>{"name": "add", "arguments": {}}</tool_call>')
    assert text == "" and calls[0].name == "add" and calls[0].id.startswith("call_")


def test_thoughts():
    for size in (1, 3, 100):
        def cut(text, size=size):
            return [text[i:i + size] for i in range(0, len(text), size)]
        assert said(Listener(ThinkParser()), cut("<think>\nhm\n</think>\n\nYes < no")) == ("\nhm\n", "Yes < no", [])
        assert said(Listener(ThinkParser(inside=True)), cut("hm</think>Yes")) == ("hm", "Yes", [])
        assert said(Listener(ThinkParser(inside=True)), cut("hm </thin")) == ("hm </thin", "", [])
        assert said(Listener(ThinkParser()), cut("No <think> here")) == ("", "No <think> here", [])
        assert said(Listener(ThinkParser(), ToolParser(FORMATS["hermes"], NAMES)), cut('<think>a</think><tool_call>{"name": "add", "arguments": {}}</tool_call>')) == ("a", "", [("add", {})])


def test_the_format_is_read_off_the_template():
    assert choose_format("… <tool_call> …") == "hermes" and choose_format("[TOOL_CALLS]") == "mistral" and choose_format("<|python_tag|>") == "llama3" and choose_format("plain") is None
