"""What is public is listed, and what is listed is there."""

from __future__ import annotations

import ast
import importlib

import pytest
from checkout import parsed

import kvpersist

_NAMES = dict(parsed())


def _defined(tree: ast.Module) -> set[str]:
    """Public names that a module defines itself; what it imports is another's."""
    names: set[str] = set()
    for node in tree.body:
        match node:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                names.add(name)
            case ast.Assign(value=ast.Call(func=ast.Name(id="TypeVar" | "ParamSpec"))):
                pass  # a parameter of signatures, not a thing to import
            case ast.Assign(targets=targets):
                names |= {target.id for target in targets if isinstance(target, ast.Name)}
            case ast.AnnAssign(target=ast.Name(id=name)):
                names.add(name)
            case _:
                pass
    return {name for name in names if not name.startswith("_")}


def _listed(tree: ast.Module) -> list[str] | None:
    for node in tree.body:
        target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
        if isinstance(target, ast.Name) and target.id == "__all__":
            assert isinstance(node, ast.Assign | ast.AnnAssign)
            assert node.value is not None
            return list(ast.literal_eval(node.value))
    return None


@pytest.mark.parametrize("module", [name for name in _NAMES if not name.rpartition(".")[2].startswith("_")])
def test_a_module_lists_exactly_its_public_names(module: str) -> None:
    tree = _NAMES[module]
    listed, defined = _listed(tree), _defined(tree)

    if listed is None:
        assert defined == set(), "it has public names and no __all__"
        return
    assert len(set(listed)) == len(listed)
    assert defined <= set(listed), "defined and not listed"
    loaded = importlib.import_module(module)
    assert [name for name in listed if not hasattr(loaded, name)] == [], "listed and not there"


def test_every_name_of_the_package_can_be_had() -> None:
    for name in [*kvpersist.__all__, "open"]:
        assert getattr(kvpersist, name) is not None
        assert name in dir(kvpersist)


def test_open_does_not_hide_the_built_in_behind_a_star() -> None:
    assert "open" not in kvpersist.__all__


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'opne'"):
        _ = kvpersist.opne
