"""What messages are made of, and the text and the words in them."""

from __future__ import annotations

from typing import Any

import pytest

from kvpersist import Message, ToolCallPart
from kvpersist.agents.content import CONTENT_TYPES, MORE, content_types, folded, lookup, terms, text_of, words


@pytest.mark.parametrize(
    ("block", "kind"),
    [
        ({"type": "text", "text": "hi"}, "text"),
        ({"type": "input_text", "text": "hi"}, "text"),
        ({"type": "output_text", "text": "hi"}, "text"),
        ({"type": "refusal", "refusal": "no"}, "text"),
        ({"text": "hi"}, "text"),
        ({"type": "image_url", "image_url": {"url": "http://x"}}, "image"),
        ({"type": "input_image", "file_id": "f"}, "image"),
        ({"type": "image", "source": {"type": "base64", "data": "aGk="}}, "image"),
        ({"type": "audio"}, "audio"),
        ({"type": "input_audio", "input_audio": {"data": "aGk="}}, "audio"),
        ({"type": "video"}, "video"),
        ({"type": "video_url", "video_url": {"url": "http://x"}}, "video"),
        ({"type": "file", "filename": "a.pdf"}, "file"),
        ({"type": "input_file", "file_id": "f"}, "file"),
        ({"type": "document", "source": {"type": "url"}}, "file"),
        ({"type": "reasoning", "text": "so"}, "reasoning"),
        ({"type": "thinking", "thinking": "so", "signature": "x"}, "reasoning"),
        ({"type": "redacted_thinking", "data": "x"}, "reasoning"),
        ({"type": "tool_use", "id": "t", "name": "search", "input": {}}, "tool_use"),
        ({"type": "tool-call", "toolCallId": "t"}, "tool_use"),
        ({"type": "function_call", "call_id": "t", "arguments": "{}"}, "tool_use"),
        ({"functionCall": {"name": "search"}}, "tool_use"),
        ({"type": "tool_result", "tool_use_id": "t", "content": "3 found"}, "tool_result"),
        ({"type": "tool-result", "toolCallId": "t"}, "tool_result"),
        ({"type": "function_call_output", "call_id": "t", "output": "3 found"}, "tool_result"),
        ({"type": "web_search_tool_result", "content": []}, "tool_result"),
        ({"type": "chart"}, "chart"),
    ],
)
def test_every_spelling_of_a_block_has_one_type(block: dict[str, Any], kind: str) -> None:
    assert content_types(Message("user", [block])) == content_types(Message("user", block)) == {kind}
    assert kind in CONTENT_TYPES or kind == "chart"


@pytest.mark.parametrize(
    ("message", "kinds"),
    [
        (Message("user"), set()),
        (Message("user", ""), set()),
        (Message("user", "hi"), {"text"}),
        (Message("user", ["hi", {"type": "image"}]), {"text", "image"}),
        (Message("user", {"status": "late"}), set()),
        (Message("user", 7), set()),
        (Message("assistant", "so", tool_calls=[ToolCallPart("c", "search")]), {"text", "tool_use"}),
        (Message("tool", "3 found", tool_call_id="c"), {"tool_result"}),
        (Message("tool", [{"type": "image"}], tool_call_id="c"), {"tool_result", "image"}),
        (
            Message("user", [{"type": "tool_result", "content": [{"type": "text", "text": "a"}, {"type": "image"}]}]),
            {"tool_result", "image"},
        ),
        (Message("assistant", "7", extra={"reasoning_content": "because"}), {"text", "reasoning"}),
        (Message("assistant", "7", extra={"reasoning_content": ""}), {"text"}),
        (Message("user", [{"type": 7}, {"type": ""}, None]), set()),
    ],
)
def test_a_message_is_made_of_its_blocks_calls_and_role(message: Message, kinds: set[str]) -> None:
    assert content_types(message) == kinds


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (None, ""),
        (7, ""),
        ("hi", "hi"),
        (["a", {"type": "text", "text": "b"}], "a\nb"),
        ({"status": "late", "of": {"type": "parcel", "id": "7"}}, "late\n7"),
        ([{"type": "image", "source": {"data": "aGk="}, "title": "map"}], "map"),
        ([{"type": "file", "file": {"filename": "a.pdf", "file_data": "aGk="}}], "a.pdf"),
        ([{"type": "tool_use", "id": "t7", "name": "search", "input": {"q": "tea"}}], "search\ntea"),
        ([{"type": "tool_result", "tool_use_id": "t7", "content": [{"type": "text", "text": "3"}]}], "3"),
        ([{"type": "thinking", "thinking": "so", "signature": "c2ln"}], "so"),
    ],
)
def test_the_text_of_a_content_is_what_is_to_be_read(content: Any, text: str) -> None:
    assert text_of(content) == text


def test_texts_are_compared_without_case_and_form() -> None:
    assert folded("STRASSE") == folded("straße")
    assert folded("\ufb01nd") == "find"
    assert folded("e\u0301") == folded("\u00c9")
    assert words(folded("Late, PARCEL_7!")) == ["late", "parcel_7"]


def test_the_terms_of_a_message_are_bounded() -> None:
    long = Message("user", " ".join(f"w{n}" for n in range(500)))

    assert terms(Message("user", "Tea, tea & TEA for two")) == ("tea", "for", "two")
    assert terms(Message("user", None)) == ()
    assert terms(Message("user", "x" * 1_000)) == ("x" * 40,)
    assert len(terms(long)) == 129 and terms(long)[-1] == MORE
    assert MORE not in words(folded(MORE))


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("tea", ("tea", True, False)),
        ("tea!", ("tea", False, False)),
        (" tea", ("tea", True, True)),
        ("green tea", ("tea", True, True)),
        ("a late parcel", ("parcel", True, True)),
        ("a late parcel of tea", ("parcel", False, True)),
        ("x " + "y" * 50 + " z", ("y" * 40, True, True)),
        ("?!", None),
    ],
)
def test_a_text_is_looked_up_by_a_word_that_begins_wherever_it_occurs(text: str, found: Any) -> None:
    assert lookup(text) == found
