"""What a message's content is made of, and the text in it.

Content is a text, nothing, or plain data: mostly a list of blocks, mappings whose ``type`` says what
they are. Models and agent libraries spell the types differently; here each has one name:

    text         input_text, output_text, refusal, summary_text
    reasoning    thinking, redacted_thinking, reasoning_text
    tool_use     tool-call, tool_call, function_call, custom_tool_call, server_tool_use, mcp_tool_use
    tool_result  tool-result, tool_call_output, function_call_output, custom_tool_call_output, ..._tool_result
    image        image_url, input_image, image_file
    audio        input_audio, output_audio, audio_url
    video        video_url, input_video
    file         input_file, file_url, document, container_upload

A type that is not here is a content type of its own, as it is spelled.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Mapping
from typing import Any, Final, NamedTuple, cast

from kvpersist.agents.records import Message
from kvpersist.index import Index

__all__ = [
    "CONTENT_TYPES",
    "MORE",
    "TEXT_INDEX",
    "Term",
    "content_types",
    "folded",
    "lookup",
    "terms",
    "text_index",
    "text_of",
    "words",
]

CONTENT_TYPES: Final = frozenset(("text", "reasoning", "tool_use", "tool_result", "image", "audio", "video", "file"))
"""The names that several spellings share."""

TEXT_INDEX: Final = "terms"
"""The name of the index that `text_index` makes."""

MORE: Final = "*"
"""The term of messages with more words than are indexed; no word is spelled so."""

_SPELLINGS: Final = {
    "text": ("input_text", "output_text", "refusal", "summary_text"),
    "reasoning": ("thinking", "redacted_thinking", "reasoning_text", "reasoning_content"),
    "tool_use": (
        "tool-call",
        "tool_call",
        "tool-use",
        "function_call",
        "functionCall",
        "custom_tool_call",
        "server_tool_use",
        "mcp_tool_use",
        "toolUse",
    ),
    "tool_result": (
        "tool-result",
        "tool_call_output",
        "function_call_output",
        "function_response",
        "functionResponse",
        "custom_tool_call_output",
        "toolResult",
    ),
    "image": ("image_url", "input_image", "output_image", "image_file"),
    "audio": ("input_audio", "output_audio", "audio_url"),
    "video": ("input_video", "video_url"),
    "file": ("input_file", "file_url", "document", "container_upload"),
}
_NAMES: Final = {name: name for name in CONTENT_TYPES} | {
    spelling: name for name, spellings in _SPELLINGS.items() for spelling in spellings
}
_MEDIA: Final = frozenset(("image", "audio", "video", "file"))
_LABELS: Final = (
    "text",
    "filename",
    "name",
    "title",
    "caption",
    "alt",
    "transcript",
    "context",
)  # of media, to be read
_UNREAD: Final = frozenset(  # what names, signs or carries something, and is not text
    (
        "type",
        "id",
        "call_id",
        "tool_call_id",
        "toolCallId",
        "tool_use_id",
        "toolUseId",
        "item_id",
        "status",
        "signature",
        "encrypted_content",
        "cache_control",
        "data",
        "mime_type",
        "media_type",
        "mediaType",
    )
)
_EXTRA: Final = {"reasoning": "reasoning", "reasoning_content": "reasoning", "thinking": "reasoning", "audio": "audio"}

_WORD: Final = re.compile(r"\w+")
_LONGEST: Final = 40  # characters of a word that are indexed
_MOST: Final = 128  # distinct words of a message that are indexed
_RULES: Final = 1  # raised when other terms are made of the same message


def content_types(message: Message) -> frozenset[str]:
    """Return what a message is made of: of ``CONTENT_TYPES``, and types of blocks that are not among them.

    A message with ``tool_calls`` has "tool_use", one of role "tool" is a "tool_result". What stands
    inside a result counts as well, but for its text: that is the result's.

    Example:
        >>> sorted(content_types(Message("user", [{"type": "input_text", "text": "Look!"}, {"type": "image_url"}])))
        ['image', 'text']
    """
    found = set(_types(message.content))
    if message.tool_calls:
        found.add("tool_use")
    if message.role == "tool":
        found.discard("text")
        found.add("tool_result")
    for field in message.extra or ():
        if field in _EXTRA and (message.extra or {})[field]:
            found.add(_EXTRA[field])
    return frozenset(found)


def text_of(content: Any) -> str:
    r"""Return the text that a content has to be read, the pieces joined by line ends.

    That is every text in it but names, types, links to media, and data: of media only file names,
    titles and transcripts. Reasoning and the results of tools are text, too.

    Example:
        >>> text_of([{"type": "text", "text": "Late?"}, {"type": "image", "data": "iVBOR", "filename": "map.png"}])
        'Late?\nmap.png'
    """
    return content if isinstance(content, str) else "\n".join(_texts(content))


def folded(text: str) -> str:
    """Return a text as it is compared: in Unicode's form NFKC, without case."""
    if text.isascii():
        return text.lower()
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())


def words(text: str) -> list[str]:
    """Return the words of a folded text: runs of letters, digits and ``_``."""
    return _WORD.findall(text)


def terms(message: Message) -> tuple[str, ...]:
    """Return what the text index holds of a message: its distinct words, at most 128 of up to 40 characters.

    A message with more words has the term "*" besides, so that a search looks at it anyway.
    """
    distinct = list(dict.fromkeys(word[:_LONGEST] for word in words(folded(text_of(message.content)))))
    return tuple(distinct) if len(distinct) <= _MOST else (*distinct[:_MOST], MORE)


def text_index() -> Index:
    """Return an index of the words in messages, for ``message_indexes=``; ``open(text_index=True)`` adds it.

    `Messages.search` goes through it. Once one process has declared it, every other one keeps it up.
    """
    return Index(terms, name=TEXT_INDEX, multi=True, order_by="-created_at", version=_RULES)


class Term(NamedTuple):
    """What a text is looked up by in the index of words.

    ``open``: a longer word may begin with it. ``everywhere``: wherever the text occurs, this word
    begins there; otherwise the text may occur inside of a word, where the index does not tell.
    """

    word: str
    open: bool
    everywhere: bool


def lookup(text: str) -> Term | None:
    """Return how a folded text is looked up: by its longest word, but for the first, if it has others.

    None: there is no word in it.
    """
    found = list(_WORD.finditer(text))
    if not found:
        return None
    sure = [each for each in found if each.start() > 0]
    best = max(sure or found, key=lambda each: min(len(each[0]), _LONGEST))
    return Term(best[0][:_LONGEST], best.end() == len(text) or len(best[0]) >= _LONGEST, bool(sure))


def _types(content: Any) -> Iterator[str]:
    if isinstance(content, str):
        if content:
            yield "text"
    elif isinstance(content, list):
        for block in cast("list[Any]", content):
            yield from _types(block)
    elif isinstance(content, dict):
        block = cast("dict[str, Any]", content)
        name = _name(block)
        if name is None:
            return
        yield name
        if name == "tool_result":
            for inner in ("content", "output", "result"):
                yield from (each for each in _types(block.get(inner)) if each != "text")


def _name(block: Mapping[str, Any]) -> str | None:
    """What a block is; None: plain data that does not say."""
    kind = block.get("type")
    if isinstance(kind, str) and kind:
        if kind.endswith("_tool_result"):
            return "tool_result"
        return _NAMES.get(kind, kind)
    for key, value in block.items():  # {"text": ...}, {"functionCall": {...}}: named by its only content
        if key in _NAMES and (not isinstance(value, str) or key == "text"):
            return _NAMES[key]
    return None


def _texts(content: Any) -> Iterator[str]:
    if isinstance(content, str):
        yield content
    elif isinstance(content, list):
        for each in cast("list[Any]", content):
            yield from _texts(each)
    elif isinstance(content, dict):
        block = cast("dict[str, Any]", content)
        if _name(block) in _MEDIA:
            for label in _LABELS:
                if isinstance(block.get(label), str):
                    yield block[label]
                elif label == "filename" and isinstance(block.get("file"), dict):
                    yield from _texts(block["file"].get("filename"))
            return
        known = _NAMES.get(kind) if isinstance(kind := block.get("type"), str) else None
        for key, value in block.items():
            if key != "type" and not (known and key in _UNREAD and isinstance(value, str)):
                yield from _texts(value)
