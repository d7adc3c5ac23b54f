"""Makes the second half of ``docs/reference/configuration.md``, everything below its mark, from the code.

    python tests/docs/make_configuration.py            writes the page
    python tests/docs/make_configuration.py --check    says whether it is what would be written

What things mean is taken from docstrings: of constants, of the arguments of functions, of the attributes of
the drivers' options. All drivers have to be importable.
"""

from __future__ import annotations

import ast
import inspect
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import msgspec

import kvpersist
from kvpersist import config, registry
from kvpersist.events import EventQueue
from kvpersist.urls import StoreSettings

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "reference" / "configuration.md"
MARK = "<!-- What follows is made by tests/docs/make_configuration.py. -->\n"

_PLAIN = {"KVPERSIST_TRACEBACK": "set to anything: the command line shows where an error was raised"}
_HELPERS = (config.from_database_url, config.from_redis_url, config.from_kode_env)
_THEIRS = re.compile(r"\b(?:KODE_[A-Z_]+|POSTGRES_[A-Z]+|DATABASE_URL|REDIS_URL)\b")


def page(text: str) -> str:
    """The whole page, given the one that is there."""
    return text.partition(MARK)[0] + MARK + "\n" + "\n".join(_generated()).rstrip() + "\n"


def _generated() -> Iterator[str]:
    yield "## Variables\n"
    yield from _table(("variable", "means"), sorted(_variables().items()))
    yield "\n## Variables of other systems\n"
    yield "Looked at only by the helper that is called; each returns what `kvpersist.open` takes.\n"
    yield from _table(
        ("helper", "variables", "reads"),
        [
            (
                f"`config.{helper.__name__}()`",
                ", ".join(f"`{name}`" for name in dict.fromkeys(_THEIRS.findall(inspect.getsource(helper)))),
                _first_sentence(helper),
            )
            for helper in _HELPERS
        ],
    )
    for function in (kvpersist.open, kvpersist.open_store):
        yield f"\n## Arguments of `{function.__name__}`\n"
        yield from _table(("argument", "default", "means"), _arguments(function))
    yield "\n## Settings of a store\n"
    yield "In a URL with `kv.` before them, in a mapping, a file or a call without.\n"
    meant = dict(_args_of(kvpersist.open_store.__doc__ or ""))
    hints = get_type_hints(StoreSettings, include_extras=True)
    yield from _table(
        ("setting", "type", "means"),
        [(f"`{name}`", _type(hints[name]), meant[name]) for name in StoreSettings.__annotations__],
    )
    yield "\n## Settings of events\n"
    yield "`events={...}`, or `[events]` in a file, beside `url` or `type` of a store of their own.\n"
    yield from _table(
        ("setting", "default", "means"),
        _arguments(EventQueue, EventQueue.__init__.__doc__, without=("store", "namespace")),
    )
    yield "\n## Options of the drivers\n"
    yield "In a URL with `kv.` before them, where they are no piece of it."
    for schemes, options in _drivers():
        yield f"\n### {', '.join(f'`{scheme}`' for scheme in schemes)}\n"
        yield from _table(("option", "type", "default", "means"), _options(options))


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> Iterator[str]:
    yield f"| {' | '.join(head)} |"
    yield "|" + "---|" * len(head)
    for row in rows:
        yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |"


def _variables() -> dict[str, str]:
    """Every variable that the library reads, with the text behind the constant that names it."""
    found: dict[str, str] = {f"`{name}`": text for name, text in _PLAIN.items()}
    for path in sorted((ROOT / "kvpersist").rglob("*.py")):
        body = ast.parse(path.read_text("utf-8")).body
        for node, behind in pairwise(body):
            match node, behind:
                case (
                    ast.AnnAssign(value=ast.Constant(value=str(value))),
                    ast.Expr(value=ast.Constant(value=str(text))),
                ) if value.startswith("KVPERSIST_"):
                    found[f"`{value}`"] = _sentence(text)
                case _:
                    pass
    return found


def _arguments(
    function: Callable[..., Any], doc: str | None = None, without: Iterable[str] = ()
) -> list[tuple[str, ...]]:
    meant = dict(_args_of(doc or function.__doc__ or ""))
    return [
        (
            f"`{'**' if each.kind is each.VAR_KEYWORD else ''}{name}`",
            "" if each.default is each.empty else _default(each.default),
            meant[name],
        )
        for name, each in inspect.signature(function).parameters.items()
        if name not in without
    ]


def _args_of(doc: str, section: str = "Args") -> Iterator[tuple[str, str]]:
    """The entries of a section of a docstring; one that names several is given for each."""
    part = re.search(rf"^\s*{section}:\n(.*?)(?=^\s*\w+:$|\Z)", inspect.cleandoc(doc), re.MULTILINE | re.DOTALL)
    entries: list[str] = []
    for line in inspect.cleandoc(part[1]).splitlines() if part else ():
        if not line.strip():
            continue
        if line.startswith(" "):
            entries[-1] += " " + line.strip()
        else:
            # several entries may share a line, as in "a: one thing. b: another."
            entries.extend(re.split(r"(?<=\.) (?=``?\w+``?: )", line))
    for entry in entries:
        names, _, text = entry.partition(": ")
        for name in re.split(r", | and ", names.replace("`", "").replace("*", "")):
            yield name, _sentence(text)


def _options(type_: type[Any]) -> list[tuple[str, ...]]:
    meant: dict[str, str] = {}
    for base in reversed(type_.__mro__):
        meant.update(_args_of(base.__doc__ or "", "Attributes"))
    return [
        (
            f"`{field.name}`",
            _type(field.type),
            "required" if field.required else _default(_of(field)),
            meant.get(field.name, ""),
        )
        for field in msgspec.structs.fields(type_)
    ]


def _of(field: Any) -> Any:
    return field.default if field.default is not msgspec.NODEFAULT else field.default_factory()


def _drivers() -> list[tuple[list[str], type[Any]]]:
    """The schemes of each options type of kvpersist's own drivers."""
    found: dict[type[Any], list[str]] = {}
    for info in registry.list_drivers():
        if info.builtin:
            found.setdefault(registry.driver_class(info.scheme).Options, []).append(info.scheme)
    return [(schemes, options) for options, schemes in sorted(found.items(), key=lambda item: item[1])]


def _type(kind: Any) -> str:
    origin, args = get_origin(kind), get_args(kind)
    if origin is Annotated:
        bounds = [
            f"{sign} {getattr(meta, name)}"
            for meta in args[1:]
            for name, sign in (("ge", ">="), ("gt", ">"), ("le", "<="), ("lt", "<"))
            if getattr(meta, name, None) is not None
        ]
        return " ".join([_type(args[0]), *bounds])
    if origin is Literal:
        return " or ".join(f"`{value}`" for value in args)
    if origin in (Union, UnionType):
        return " or ".join("none" if each is NoneType else _type(each) for each in args)
    if kind is Any:
        return "object"
    return {"str": "text"}.get(getattr(kind, "__name__", str(kind)), getattr(kind, "__name__", str(kind)))


def _default(value: Any) -> str:
    if value is msgspec.UNSET:  # as a URL or the driver says
        return ""
    if value is None:
        return "none"
    if callable(value):
        return f"`{value.__module__}.{value.__qualname__}`"
    if value in ("", (), {}):
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    return f"`{value}`"


def _sentence(text: str) -> str:
    return " ".join(text.split()).replace("``", "`")


def _first_sentence(function: Callable[..., Any]) -> str:
    return _sentence((function.__doc__ or "").split("\n\n")[0]).removeprefix("Read ").rstrip(".")


def main() -> int:
    """Write the page, or with ``--check`` compare it; 1: it differs."""
    text = PAGE.read_text("utf-8")
    wanted = page(text)
    if "--check" in sys.argv[1:]:
        return int(text != wanted)
    PAGE.write_text(wanted, "utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
