"""Settings: drivers, config."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout

from kvpersist import config as configuration
from kvpersist import registry
from kvpersist.cli.options import FOR_PEOPLE, USUAL_STORE, Output, StoreOption
from kvpersist.cli.render import print_json, print_rows, write

__all__ = ["config", "drivers"]


def drivers(*, output: Output = FOR_PEOPLE) -> int:
    """List the drivers that are installed, and what keeps one from being used."""
    with redirect_stdout(sys.stderr):  # what a plugin prints when it is imported is no data
        listed = registry.list_drivers(load=True)
    if output.json or output.jsonl:
        for value in listed if output.jsonl else [listed]:
            print_json(value, compact=output.jsonl)
        return 0
    print_rows(
        ("scheme", "from", "version", "state"),
        [(info.scheme, info.distribution, info.version, info.error or "ready") for info in listed],
        cut="state",
    )
    return 0


def config(
    *,
    origins: bool = False,
    store: StoreOption = USUAL_STORE,
    output: Output = FOR_PEOPLE,
) -> int:
    """Show which store is meant; passwords are not shown.

    Args:
        origins: show every place that can name it, the strongest first.
        store: which store.
        output: in which form.
    """
    found = configuration.origins(store.url, profile=store.profile)
    shown = found if origins else [origin for origin in found if origin.used]
    if output.json or output.jsonl:
        for value in shown if output.jsonl else [shown]:
            print_json(value, compact=output.jsonl)
    elif origins:
        print_rows(
            ("used", "from", "store"),
            [("*" if one.used else "", one.source, one.value or "-") for one in shown],
            cut="store",
        )
    else:
        write("".join(f"{one.value}\n" for one in shown))
    return 0
