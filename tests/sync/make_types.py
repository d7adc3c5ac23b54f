"""Makes ``kvpersist/sync.pyi``, the types of the blocking names, from the asynchronous ones.

    python tests/sync/make_types.py            writes the file
    python tests/sync/make_types.py --check    says whether it is what would be written

Each class with something to await becomes a class of the same name without ``await``; other types are imported
from where they are. Annotations are read as they are written, so nothing is lost on the way.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import sys
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any, get_args, get_origin

import kvpersist.sync

TARGET = Path(kvpersist.sync.__file__).with_suffix(".pyi")

ROOTS = ("kvpersist.agents.persistence.Persistence", "kvpersist.store.Store")
"""What is opened; the other classes are those that can be reached from these."""

_RENAMED = {
    "AsyncIterator": "Iterator",
    "AsyncGenerator": "Generator",
    "AsyncIterable": "Iterable",
    "AbstractAsyncContextManager": "AbstractContextManager",
    "_AsyncGeneratorContextManager": "AbstractContextManager",
}
_DROPPED = ("Awaitable", "Coroutine", "Opening")  # they stand for what comes of them, their last argument
_HIDDEN = {  # the layer below, and the way back up
    "Parents": {"births"},
    "Persistence": {"placement"},
    "Records": {"repository"},
    "Store": {"driver"},
    "Transaction": {"store"},
}
_AS_THEY_ARE = {"Driver"}  # what is handed in stays asynchronous


class Types:
    """The stub in the making."""

    def __init__(self) -> None:
        self.classes: dict[str, type] = {}
        self.imports: dict[str, tuple[str, str]] = {}  # name here -> module, name there
        self.local: dict[str, str] = {}  # names defined in the stub: their source
        self.bodies: dict[str, list[str]] = {}
        self.bound: dict[str, str] = {}  # type variables of the class that is being written

    def text(self) -> str:
        waiting = [_found(root) for root in ROOTS]
        for each in waiting:
            self.classes[each.__name__] = each
        done: set[str] = set()
        while open_ := [name for name in self.classes if name not in done]:
            for name in open_:
                self.bodies[name] = self._class(self.classes[name])
                done.add(name)
        opened = [*self._opening("open_sync", "kvpersist.agents.persistence", "open")]
        opened += self._opening("open_store_sync", "kvpersist.opening", "open_store")
        lines = ['"""Made by tests/sync/make_types.py from the asynchronous names; see `kvpersist.sync`."""', ""]
        by_module: dict[str, set[str]] = {}
        for here, (module, there) in self.imports.items():
            by_module.setdefault(module, set()).add(there if there == here else f"{there} as {here}")
        for module in sorted(by_module):
            names = ", ".join(sorted(by_module[module]))
            lines.append(f"from {module} import {names}" if module else f"import {names}")
        lines += ["", '__all__ = ["open_store_sync", "open_sync"]', ""]
        lines += [self.local[name] for name in sorted(self.local)]
        lines += ["", *opened]
        for name in sorted(self.bodies):
            lines += ["", *self.bodies[name]]
        return "\n".join(lines) + "\n"

    def _opening(self, name: str, module: str, of: str) -> Iterable[str]:
        yield from self._function(name, getattr(importlib.import_module(module), of), method=False)

    def _class(self, type_: type) -> list[str]:
        names = _generic(type_)
        for name in names:
            self._name(name, importlib.import_module(type_.__module__))
        head = f"class {type_.__name__}{'(Generic[' + ', '.join(names) + '])' if names else ''}:"
        if names:
            self.imports["Generic"] = ("typing", "Generic")
        lines = [head, f"    {_first_line(type_)}"]
        members: dict[str, Any] = {}
        self.bound = self._bindings(type_)
        hidden: set[str] = set().union(*[_HIDDEN.get(base.__name__, set()) for base in type_.__mro__])
        for base in reversed([each for each in type_.__mro__ if each.__module__.startswith("kvpersist")]):
            for name, annotation, module in _attributes(base):
                if name not in hidden:
                    members[name] = f"    {name}: {self._annotation(annotation, module)}"
            for name, member in vars(base).items():
                if name.startswith("_") or name in hidden:
                    continue
                if isinstance(member, property):
                    of = inspect.get_annotations(member.fget).get("return", "Any")
                    given = self._annotation(of, importlib.import_module(base.__module__))
                    members[name] = [f"    @property\n    def {name}(self) -> {given}: ..."]
                elif inspect.isfunction(member):
                    members["close" if name == "aclose" else name] = list(self._function(name, member))
        for value in members.values():
            lines += [value] if isinstance(value, str) else value
        lines += self._protocols(type_)
        return lines

    def _bindings(self, type_: type) -> dict[str, str]:
        """What the type variables of the bases stand for in this class."""
        bound: dict[str, str] = {}
        for base in type_.__mro__:
            for given in getattr(base, "__orig_bases__", ()):
                for variable, value in zip(
                    getattr(get_origin(given), "__parameters__", ()), get_args(given), strict=False
                ):
                    if isinstance(value, type):
                        bound[variable.__name__] = self._name(value.__name__, importlib.import_module(value.__module__))
        return bound

    def _protocols(self, type_: type) -> Iterable[str]:
        enter = getattr(type_, "__aenter__", None)
        if enter is not None:
            module = importlib.import_module(enter.__module__)
            given = self._annotation(inspect.get_annotations(enter).get("return", "Self"), module)
            yield f"    def __enter__(self) -> {given}: ..."
            yield "    def __exit__(self, *problem: object) -> bool | None: ..."
        following = getattr(type_, "__anext__", None)
        if following is not None:
            module = importlib.import_module(following.__module__)
            given = self._annotation(inspect.get_annotations(following)["return"], module)
            self.imports["Iterator"] = ("collections.abc", "Iterator")
            yield f"    def __iter__(self) -> Iterator[{given}]: ..."
            yield f"    def __next__(self) -> {given}: ..."

    def _function(self, name: str, function: Any, *, method: bool = True) -> Iterable[str]:
        module = importlib.import_module(function.__module__)
        indent = "    " if method else ""
        inner = inspect.unwrap(function)
        shown: list[str] = []
        starred = False
        for parameter in inspect.signature(inner).parameters.values():
            if parameter.name == "self":
                shown.append("self")
                continue
            if parameter.kind is parameter.KEYWORD_ONLY and not starred:
                shown.append("*")
                starred = True
            starred = starred or parameter.kind is parameter.VAR_POSITIONAL
            mark = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
            text = f"{mark}{parameter.name}"
            if parameter.annotation is not parameter.empty:
                text += f": {self._annotation(parameter.annotation, module)}"
            if parameter.default is not parameter.empty:
                text += " = ..."
            shown.append(text)
        returned = self._annotation(inspect.get_annotations(inner).get("return", "Any"), module)
        if inner is not function and returned.startswith("Iterator["):  # an @asynccontextmanager
            returned = f"AbstractContextManager[{returned[len('Iterator[') : -1]}]"
            self.imports["AbstractContextManager"] = ("contextlib", "AbstractContextManager")
        name = "close" if name == "aclose" else name
        yield f"{indent}def {name}({', '.join(shown)}) -> {returned}:"
        yield f"{indent}    {_first_line(function)}"

    def _annotation(self, annotation: Any, module: ModuleType) -> str:
        text = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
        tree = ast.parse(text, mode="eval").body
        return ast.unparse(_Rewritten(self, module).visit(tree))

    def _name(self, name: str, module: ModuleType) -> str:
        """Make a name of ``module`` known in the stub, and return what it is called there."""
        if hasattr(__builtins__, name) or name in dir(__import__("builtins")):
            return self._builtin(name)
        if name in _RENAMED:
            name = _RENAMED[name]
            home = "contextlib" if "Context" in name else "collections.abc"
            self.imports[name] = (home, name)
            return name
        value = vars(module).get(name)
        if value is None:
            home, there = _import_of(name, module)
            value = vars(importlib.import_module(home)).get(there)
            module = importlib.import_module(home)
        if isinstance(value, ModuleType):
            self.imports[name] = ("", value.__name__) if value.__name__ == name else _split(value.__name__)
            return name
        if isinstance(value, type) and name not in _AS_THEY_ARE and kvpersist.sync._is_asynchronous(value):
            held = self.classes.setdefault(value.__name__, value)
            assert held is value, f"two classes are called {name}"
            return value.__name__
        if isinstance(value, type):
            home, there = value.__module__, value.__qualname__
            if home == "builtins":
                return self._builtin(there)
        else:
            home, there = _home(name, module)
        if home.startswith("kvpersist") and _is_alias(home, there):  # it may name what has a blocking twin here
            return self._alias(home, there)
        assert self.imports.setdefault(name, (home, there)) == (home, there), f"{name}: {home}, {self.imports[name]}"
        return name

    def _alias(self, home: str, name: str) -> str:
        module = importlib.import_module(home)
        for node in ast.parse(inspect.getsource(module)).body:
            target = node.target if isinstance(node, ast.AnnAssign) else getattr(node, "targets", [None])[0]
            if isinstance(target, ast.Name) and target.id == name:
                value = node.value  # type: ignore[union-attr]
                if isinstance(value, ast.Call):  # a TypeVar
                    self.imports["TypeVar"] = ("typing", "TypeVar")
                    self.local[name] = f"{name} = {ast.unparse(_Rewritten(self, module).visit(value))}"
                else:
                    given = ast.unparse(_Rewritten(self, module).visit(value))
                    self.imports["TypeAlias"] = ("typing", "TypeAlias")
                    self.local[name] = f"{name}: TypeAlias = {given}"
                return name
        raise LookupError(f"{home}.{name} is not assigned")

    def _builtin(self, name: str) -> str:
        if name in ("list", "type", "range", "id"):  # names of methods too
            self.imports["builtins"] = ("", "builtins")
            return f"builtins.{name}"
        return name


class _Rewritten(ast.NodeTransformer):
    def __init__(self, types: Types, module: ModuleType) -> None:
        self.types, self.module = types, module

    def visit_Name(self, node: ast.Name) -> ast.AST:
        if node.id in self.types.bound:
            return ast.Name(self.types.bound[node.id])
        return ast.parse(self.types._name(node.id, self.module), mode="eval").body

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        value = vars(self.module).get(ast.unparse(node.value))
        if isinstance(value, ModuleType):
            return ast.parse(self.types._name(node.attr, value), mode="eval").body
        return self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> ast.AST:
        return node

    def visit_Subscript(self, node: ast.Subscript) -> ast.AST:
        name = ast.unparse(node.value)
        if name == "Literal":
            self.types._name("Literal", self.module)
            return node
        if name in _DROPPED:
            last = node.slice.elts[-1] if isinstance(node.slice, ast.Tuple) else node.slice
            return self.visit(last)
        if name == "AsyncGenerator" and not isinstance(node.slice, ast.Tuple):
            self.types._name("AsyncIterator", self.module)
            return ast.Subscript(ast.Name("Iterator"), self.visit(node.slice))
        return self.generic_visit(node)


def _found(path: str) -> Any:
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def _split(name: str) -> tuple[str, str]:
    home, _, there = name.rpartition(".")
    return home, there


def _generic(type_: type) -> list[str]:
    return [each.__name__ for each in getattr(type_, "__parameters__", ())]


def _first_line(documented: Any) -> str:
    text = (inspect.getdoc(documented) or "").split("\n\n")[0].split("\n")
    line = " ".join(each.strip() for each in text).replace("``async ", "``").replace(" or await it and", " or")
    return f'"""{line}"""' if line else "..."


def _attributes(type_: type) -> Iterable[tuple[str, str, ModuleType]]:
    """The public attributes that ``__init__`` sets, with their types where these can be told."""
    module = importlib.import_module(type_.__module__)
    [tree] = [
        node
        for node in ast.walk(ast.parse(inspect.getsource(module)))
        if isinstance(node, ast.ClassDef) and node.name == type_.__name__
    ]
    for node in tree.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.target.id[0] != "_":
            yield node.target.id, ast.unparse(node.annotation), module
    init = next((node for node in tree.body if getattr(node, "name", "") == "__init__"), None)
    if not isinstance(init, ast.FunctionDef):
        return
    parameters = {each.arg: each.annotation for each in [*init.args.args, *init.args.kwonlyargs]}
    for node in ast.walk(init):
        targets = [node.target] if isinstance(node, ast.AnnAssign) else getattr(node, "targets", [])
        for target in targets if isinstance(node, (ast.Assign, ast.AnnAssign)) else []:
            if not isinstance(target, ast.Attribute) or target.attr.startswith("_"):
                continue
            if isinstance(node, ast.AnnAssign):
                yield target.attr, ast.unparse(node.annotation), module
                continue
            value: Any = node.value
            annotation = parameters.get(value.id) if isinstance(value, ast.Name) else None
            if annotation is not None:
                yield target.attr, ast.unparse(annotation), module
            elif isinstance(value, ast.Call) and isinstance(value.func, ast.Name) and value.func.id[0].isupper():
                yield target.attr, value.func.id, module
            else:
                raise LookupError(f"annotate {type_.__name__}.{target.attr}: its type cannot be told from its __init__")


def _import_of(name: str, module: ModuleType) -> tuple[str, str]:
    """Where a name comes from that is imported for type checkers only."""
    for node in ast.walk(ast.parse(inspect.getsource(module))):
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    return str(node.module), alias.name
    raise LookupError(f"{module.__name__} knows no {name}")


def _home(name: str, module: ModuleType) -> tuple[str, str]:
    """The module that assigns a name, and what it is called there."""
    while True:
        try:
            home, name = _import_of(name, module)
        except (LookupError, TypeError, OSError):
            return module.__name__, name
        if not home.startswith("kvpersist"):
            return home, name
        module = importlib.import_module(home)


def _is_alias(home: str, name: str) -> bool:
    for node in ast.parse(inspect.getsource(importlib.import_module(home))).body:
        target = node.target if isinstance(node, ast.AnnAssign) else getattr(node, "targets", [None])[0]
        if isinstance(target, ast.Name) and target.id == name:
            return True
    return False


def main(arguments: list[str]) -> int:
    text = Types().text()
    if "--check" in arguments:
        return 0 if TARGET.is_file() and TARGET.read_text("utf-8") == text else 1
    TARGET.write_text(text, "utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
