"""Whether a store answers: health."""

from __future__ import annotations

import kvpersist
from kvpersist.agents.health import StoreHealth
from kvpersist.cli.options import FOR_PEOPLE, USUAL_STORE, Output, StoreOption
from kvpersist.cli.render import print_json, print_rows, say
from kvpersist.errors import BadOption

__all__ = ["health"]


async def health(
    url: str | None = None,
    /,
    *,
    timeout: float = 5.0,
    write: bool = False,
    store: StoreOption = USUAL_STORE,
    output: Output = FOR_PEOPLE,
) -> int:
    """Ask a store, and those beside it, whether they answer, and with --write whether they can be written.

    Exit code 4: one does not; 1: one cannot be written.

    Args:
        url: the store; default: the usual one.
        timeout: seconds, above 0, after which a store counts as not answering.
        write: write a key, too, and remove it again.
        store: which store.
        output: in which form.
    """
    if not timeout > 0:
        raise BadOption("--timeout", f"{timeout:g} is no time to wait: use seconds above 0")
    async with kvpersist.open(store.named(url).existing()) as db:
        found = await db.health(timeout=timeout, write=write)
    if output.json or output.jsonl:
        print_json(found, compact=output.jsonl)
    else:
        print_rows(
            ("store", "state", "latency", "durable", "server", "address"),
            [
                (
                    name,
                    _state(one),
                    "-" if one.latency is None else f"{one.latency * 1000:.1f} ms",
                    "yes" if one.durable else "no",
                    one.server or one.driver,
                    one.store,
                )
                for name, one in found.stores.items()
            ],
            cut="address",
            right=("latency",),
            spare=("durable", "server"),
        )
        for name, one in found.stores.items():
            if one.error:
                say(f"{name}: {one.error}", style="red")
    if not all(one.connected for one in found.stores.values()):
        return 4
    return 0 if found.healthy else 1


def _state(one: StoreHealth) -> str:
    if not one.connected:
        return "no answer"
    if one.writable is None:
        return "answers"
    return "writable" if one.writable else "read-only" if one.read_only else "not writable"
