"""What no source file of the library may hold."""

from __future__ import annotations

import ast
import sys

import pytest
from checkout import parsed

_TREES = dict(parsed())
_REVIVING = {"pickle", "_pickle", "cPickle", "marshal", "shelve", "dill", "cloudpickle", "jsonpickle", "yaml"}
_BASE = {"kvpersist", "kvpersist_drivers", "msgspec", "platformdirs", "uuid_utils"}
_CLI = {"cyclopts", "rich"}
_POSTGRES = {"asyncpg"}
_REDIS = {"redis", "hiredis"}
_BUCKETS = {
    "kvpersist.registry": {"fsspec"},
    "kvpersist_drivers.buckets": {"fsspec"},
    "kvpersist_drivers.buckets._azure": {"adlfs", "azure"},
    "kvpersist_drivers.buckets._gcs": {"aiohttp", "gcsfs", "google", "yarl"},
    "kvpersist_drivers.buckets._s3": {"aiohttp", "botocore", "s3fs"},
}
_TESTING = {"hypothesis", "pytest", "pytest_asyncio"}
_RUNNING = {"eval", "exec", "compile", "__import__"}
_EXECUTE = {"execute", "executemany", "executescript"}


def _imported(tree: ast.Module) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.partition(".")[0])
    return names


def _called(tree: ast.Module) -> set[str]:
    return {node.func.id for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}


def _built_queries(tree: ast.Module) -> list[int]:
    """Lines where the text of a statement is put together in the call that runs it."""
    lines: list[int] = []
    for node in ast.walk(tree):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in _EXECUTE):
            continue
        for part in (inner for argument in node.args[:1] for inner in ast.walk(argument)):
            formatted = isinstance(part, ast.Call) and getattr(part.func, "attr", "") in {"format", "format_map"}
            if formatted or isinstance(part, ast.JoinedStr | ast.BinOp):
                lines.append(node.lineno)
    return lines


@pytest.mark.parametrize("module", _TREES)
def test_no_module_can_revive_objects_or_run_text(module: str) -> None:
    assert _imported(_TREES[module]) & _REVIVING == set()
    assert _called(_TREES[module]) & _RUNNING == set()


@pytest.mark.parametrize("module", _TREES)
def test_no_statement_is_put_together_where_it_is_run(module: str) -> None:
    assert _built_queries(_TREES[module]) == []


@pytest.mark.parametrize(
    "text",
    [
        "db.execute(f'SELECT {name}')",
        "db.execute('SELECT ' + name)",
        "db.execute('SELECT %s' % name)",
        "db.execute('SELECT {}'.format(name))",
        "self.db.executemany(('a' + name), rows)",
    ],
)
def test_the_scan_finds_a_statement_put_together(text: str) -> None:
    assert _built_queries(ast.parse(text)) == [1]


def test_the_scan_finds_what_revives_and_runs() -> None:
    tree = ast.parse("from pickle import loads\nimport marshal\neval('1')")

    assert _imported(tree) & _REVIVING == {"pickle", "marshal"}
    assert _called(tree) & _RUNNING == {"eval"}


@pytest.mark.parametrize("module", _TREES)
def test_a_module_imports_what_its_extra_brings_and_no_more(module: str) -> None:
    extras = {
        "kvpersist.agents.workspace.secrets": {"cryptography"},
        "kvpersist.cli": _CLI,
        "kvpersist.env": {"dotenv"},
        "kvpersist.ops.importers.agentx_places": {"pymongo", "redis"},
        "kvpersist.ops.importers.sql": {"asyncmy", "asyncpg"},
        "kvpersist.testing": _TESTING,
        "kvpersist_drivers.postgres": _POSTGRES,
        "kvpersist_drivers.mysql": {"asyncmy"},
        "kvpersist_drivers.diskcache": {"diskcache"},
        "kvpersist_drivers.filesystem": {"aiofiles"},
        "kvpersist_drivers.mongo": {"pymongo", "bson"},
        "kvpersist_drivers.redis": _REDIS,
        **_BUCKETS,
    }
    allowed = _BASE.union(*(more for prefix, more in extras.items() if module.startswith(prefix)))

    assert _imported(_TREES[module]) - set(sys.stdlib_module_names) - allowed == set()


def test_the_library_names_no_driver() -> None:
    assert [
        name
        for name, tree in _TREES.items()
        if name.startswith("kvpersist.") and "kvpersist_drivers" in _imported(tree)
    ] == []
