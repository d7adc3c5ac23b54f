"""The 200 real conversations, and what a store holds of conversations, to be compared."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import msgspec

from kvpersist.agents.persistence import Persistence

__all__ = ["SOURCE", "everything"]

SOURCE: Final = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "tau-airline-gpt4o.json"
"""Of an airline's agent (tau-bench, gpt-4o); beside the checkout, where it lies there."""

_TIMES: Final = {"created_at", "updated_at", "completed_at"}  # of the import, so never the same twice


async def everything(db: Persistence) -> dict[str, Any]:
    """Sessions, messages, calls and counts by session id, without the times."""
    return {
        session.id: (
            _timeless(session),
            [_timeless(message) async for message in db.messages.iterate(session.id)],
            [_timeless(call) for call in await db.tool_calls.of(session.id)],
            _timeless(await db.sessions.stat(session.id)),
        )
        async for session in db.sessions.iterate()
    }


def _timeless(record: Any) -> dict[str, Any]:
    return {name: value for name, value in msgspec.structs.asdict(record).items() if name not in _TIMES}
