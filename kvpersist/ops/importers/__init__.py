"""Importing from other systems: their own layouts, read as they lie.

``open_source("agentx:PATH")`` gives a `Source`, and `import_from` brings what it holds into a store.
"""

from __future__ import annotations

import os
import re
from collections.abc import Awaitable, Callable
from difflib import get_close_matches
from importlib import import_module
from inspect import Parameter, signature
from typing import Any, Final, cast
from urllib.parse import unquote_plus

from kvpersist import urls
from kvpersist.errors import BadOption
from kvpersist.ops.importers.plan import Problem, Source
from kvpersist.ops.importers.report import SessionCheck, SystemImport, Verified
from kvpersist.ops.importers.run import import_from

__all__ = [
    "SYSTEMS",
    "Problem",
    "SessionCheck",
    "Source",
    "SystemImport",
    "Verified",
    "import_from",
    "names_system",
    "open_source",
]

SYSTEMS: Final = {
    "agentx": "agentx:open_agentx",
    "kode": "kode:open_kode",
    "prisma": "prisma:open_prisma",
    "seashore": "seashore:open_seashore",
    "langgraph": "langgraph:open_langgraph",
    "openai-agents": "openai_agents:open_openai_agents",
}
"""By name, the reader: a module of this package and its function, loaded when it is asked for."""

_NAME: Final = re.compile(r"([A-Za-z][A-Za-z0-9-]*):(?!//)(.*)", re.DOTALL)
_OPTIONS: Final = ("base", "channel", "collection", "database", "files", "table")


def names_system(text: str) -> bool:
    """Whether ``text`` is of the form ``SYSTEM:WHERE``, be the system known or not."""
    return _NAME.fullmatch(text) is not None


async def open_source(text: str, **options: str) -> Source:
    """Open ``SYSTEM:WHERE``, such as ``agentx:./agentx.db`` or ``kode:postgresql://host/db``; nothing is written there.

    Args:
        options: of the reader, such as ``files="dir"``; ``kv.files=dir`` and so on in a URL mean the same.

    Raises:
        BadOption: no such system, or an option that is none.
        BadRequest: nothing of that system is there.
        FileNotFoundError: there is no such file. MissingExtra: a client library is not installed.
        Unavailable: the server does not answer.
    """
    found = _NAME.fullmatch(text)
    name = found[1].lower() if found else ""
    if found is None and "://" in text:
        example = next(iter(SYSTEMS))
        raise BadOption("source", f"of which system is {urls.redact(text)}? Write its name before, as in {example}:URL")
    if found is None or name not in SYSTEMS:
        near = get_close_matches(name, SYSTEMS, n=1)
        meant = f"did you mean {near[0]}:?" if near else "known: " + ", ".join(SYSTEMS)
        raise BadOption("source", f"{name or text.partition(':')[0][:20]!r} is no system to import from; {meant}")
    where, written = _split(found[2])
    for option in (*options, *written):
        if option not in _OPTIONS:
            raise BadOption(option, "there is no such option; known: " + ", ".join(_OPTIONS))
    if not where:
        raise BadOption("source", f"write {name}:PATH or {name}:URL")
    module, _, function = SYSTEMS[name].partition(":")
    opened = cast("Callable[..., Awaitable[Source]]", getattr(import_module(f"{__name__}.{module}"), function))
    given: dict[str, Any] = {**written, **options}
    taken = signature(opened).parameters
    for option in given:
        if option not in taken and not any(each.kind is Parameter.VAR_KEYWORD for each in taken.values()):
            raise BadOption(option, f"{name} takes no such option")
    return await opened(where, **given)


def _split(where: str) -> tuple[str, dict[str, str]]:
    """Take our own ``kv.`` parameters out of a URL; a path has none, but may begin with ``~``."""
    if "://" not in where:
        return os.path.expanduser(where), {}  # behind ``SYSTEM:`` no shell does it
    if "?" not in where or where.lower().startswith("sqlite:"):
        return where, {}
    address, _, query = where.partition("?")
    pairs = [pair for pair in query.split("&") if pair]
    ours = [pair.removeprefix("kv.").partition("=") for pair in pairs if pair.startswith("kv.")]
    theirs = "&".join(pair for pair in pairs if not pair.startswith("kv."))
    return address + (f"?{theirs}" if theirs else ""), {name: unquote_plus(value) for name, _, value in ours}
