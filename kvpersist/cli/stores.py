"""Whole stores: init, ddl, reset, conformance."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
from cyclopts import Parameter

from kvpersist import keys, registry
from kvpersist.bytes_level import _FORMAT_KEY
from kvpersist.cli.keys import agreed
from kvpersist.cli.options import FOR_PEOPLE, USUAL_STORE, Output, StoreOption
from kvpersist.cli.render import counted, is_terminal, print_json, print_rows, progress_bar, say, write
from kvpersist.driver import DescribesTables, Driver, Provisions
from kvpersist.errors import BadOption, FormatMismatch, ReadOnly
from kvpersist.opening import open_store
from kvpersist.ops.progress import Progress
from kvpersist.store import Store
from kvpersist.urls import Target

if TYPE_CHECKING:
    from kvpersist.testing.conformance import Report, Result

__all__ = ["conformance", "ddl", "init", "reset"]


async def init(url: str | None = None, /, *, store: StoreOption = USUAL_STORE, output: Output = FOR_PEOPLE) -> int:
    """Make what a store needs: its tables or its place, and its format record. What is there stays.

    Args:
        url: the store; default: the usual one.
        store: which store.
        output: in which form.
    """
    target = _target(url, store)
    kind = registry.driver_class(target.scheme)
    missing = await _missing(target)
    driver = await kind.open(_with(target.options, auto_create=True))
    try:
        if isinstance(driver, Provisions):
            await driver.provision()
        [entry] = await driver.get([_FORMAT_KEY])
        async with open_store(driver, sweep=None):
            [written] = await driver.get([_FORMAT_KEY])
        if written is None:
            raise ReadOnly(f"{target.shown} cannot be written: nothing was made")
    finally:
        await driver.close()
    made = {} if missing is None else {"tables" if isinstance(driver, Provisions) else "place": missing}
    made["format"] = entry is None
    states = {part: "made" if new else "there already" for part, new in made.items()}
    if output.json or output.jsonl:
        print_json({"store": target.shown, **states}, compact=output.jsonl)
    else:
        print_rows(("part", "state"), list(states.items()), cut="state")
    return 0


def ddl(url: str | None = None, /, *, store: StoreOption = USUAL_STORE, output: Output = FOR_PEOPLE) -> int:
    """Print the SQL that `init` would run, for an administrator to run; the store is not asked.

    Args:
        url: the store; default: the usual one.
        store: which store.
        output: in which form.
    """
    target = _target(url, store)
    kind: Any = registry.driver_class(target.scheme)
    told = kind.ddl_of(target.options) if isinstance(kind, DescribesTables) else ""
    if output.json or output.jsonl:
        print_json({"store": target.shown, "ddl": told}, compact=output.jsonl)
    elif told:
        write(told if told.endswith("\n") else told + "\n")
    else:
        write(f"-- {target.scheme}: there is no SQL to run; opening the store, or `kvpersist init`, makes it\n")
    return 0


async def reset(
    url: str | None = None,
    /,
    *,
    namespace: str | None = None,
    dry_run: bool = False,
    yes: Annotated[bool, Parameter(name=["--yes", "-y"])] = False,
    store: StoreOption = USUAL_STORE,
    output: Output = FOR_PEOPLE,
) -> int:
    """Empty a store, while nobody else uses it; what is left is what `init` makes.

    Args:
        url: the store; it must be named, here or by --url.
        namespace: only the keys of this namespace, such as kv, in which sessions are if not told otherwise.
        dry_run: only count what would be removed, by namespace.
        yes: do not ask.
        store: which store.
        output: in which form, with --dry-run.
    """
    if url is None and store.url is None:
        raise BadOption("url", "name the store to empty: kvpersist reset URL")
    prefix = "" if namespace is None else keys.namespace(namespace) + ":"
    option = store.named(url)
    async with open_store(option.existing(), sweep=None) as opened:
        if dry_run:
            counts = await _counts(opened, prefix)
            if output.json or output.jsonl:
                print_json(counts, compact=output.jsonl)
            else:
                rows = [(space, f"{count:,}") for space, count in sorted(counts.items())]
                print_rows(("namespace", "keys"), rows, cut="namespace", right=["keys"])
                say(f"would remove {counted(counts.total(), 'key')}")
            return 0
        if not yes:
            what = f"namespace {namespace!r} of {opened.where}" if namespace else opened.where
            if not agreed(f"remove all {counted((await _counts(opened, prefix)).total(), 'key')} of {what}?"):
                say("nothing was removed: --dry-run counts the keys, --yes removes them")
                return 2
        removed = await opened.clear(prefix, raw=True)
        await opened.sweep()
        if not prefix:
            removed -= 1  # the format record, which is there in every store
            await opened._adopt()
        say(f"removed {counted(removed, 'key')}")
    return 0


async def conformance(
    url: str | None = None,
    /,
    *,
    records: bool = False,
    store: StoreOption = USUAL_STORE,
    output: Output = FOR_PEOPLE,
) -> int:
    """Test a store: what it claims to keep, and whether it does. It works beside what is in the store.

    Every test has a corner of its own, under keys that begin with kvpersist-scratch-, and empties it.
    Exit code 1: something failed. Needs kvpersist[test].

    Args:
        url: the store; default: the usual one.
        records: also test sessions, messages and tool calls in it.
        store: which store.
        output: in which form.
    """
    from kvpersist.testing.conformance import check

    with progress_bar("testing") as bar:

        def told(result: Result, done: int, total: int) -> None:
            if output.jsonl:
                print_json(result, compact=True)
            if bar is not None:
                bar(Progress(done, total, "tests"))

        report = await check(_where(url, store), records=records, on_result=told)
    if output.json:
        print_json(report)
    elif not output.jsonl:
        _print_report(report)
    for prefix in report.left:
        say(f"could not be emptied: keys that begin with {prefix!r}", style="red")
    parts = f"{report.passed} passed, {report.skipped} skipped, {report.failed} failed"
    say(f"{parts}: {report.store}", style="green" if report.ok else "red")
    return 0 if report.ok else 1


def _print_report(report: Report) -> None:
    able = msgspec.structs.asdict(report.capabilities)
    print_rows(
        ("capability", "probed"),
        [(name, "-" if value is None else str(value).lower()) for name, value in able.items() if name != "server"]
        + [("server", report.capabilities.server), ("driver", report.driver)],
        cut="probed",
    )
    write("\n")
    ordered = sorted(report.results, key=lambda one: one.outcome != "failed") if is_terminal() else report.results
    print_rows(("result", "test", "reason"), [(one.outcome, one.test, one.reason) for one in ordered], cut="reason")


def _where(url: str | None, store: StoreOption) -> Any:
    return store.named(url).resolved().where


def _target(url: str | None, store: StoreOption) -> Target:
    return store.named(url).resolved().target


async def _missing(target: Target) -> bool | None:
    """Whether there is nothing yet where the store would be; None where its driver cannot tell."""
    closed = {name: value for name, value in (("mode", "rw"), ("auto_create", False)) if hasattr(target.options, name)}
    if not closed:
        return None
    try:
        driver: Driver = await registry.driver_class(target.scheme).open(_with(target.options, **closed))
    except FormatMismatch:  # of something half made by another, too; what is foreign is refused by the next open
        return True
    await driver.close()
    return False


def _with(options: msgspec.Struct, **changes: Any) -> msgspec.Struct:
    known = {name: value for name, value in changes.items() if hasattr(options, name)}
    return msgspec.structs.replace(options, **known)


async def _counts(store: Store, prefix: str) -> Counter[str]:
    """Keys by namespace, without the format record."""
    counts: Counter[str] = Counter()
    async for key in store.keys(prefix, raw=True):
        if key != _FORMAT_KEY:
            counts[keys.partition(key)] += 1
    return counts
