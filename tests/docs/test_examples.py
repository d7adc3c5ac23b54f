"""Every Python block of the README and the docs runs, and prints what the text block after it says."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from sybil import Example, Sybil
from sybil.parsers.markdown import CodeBlockParser

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def _run(example: Example) -> None:
    printed = io.StringIO()
    code = compile(example.parsed, f"{example.path}:{example.line}", "exec", dont_inherit=True)
    with contextlib.redirect_stdout(printed):
        exec(code, {"__name__": "__main__"})
    example.namespace["printed"] = printed.getvalue()


def _compare(example: Example) -> None:
    if "printed" in example.namespace:
        assert example.namespace.pop("printed") == example.parsed


def _console(example: Example) -> None:
    """Run the ``$ kvpersist`` lines of a block and compare what each prints; other commands are only shown."""
    for part in re.split(r"^\$ ", example.parsed, flags=re.MULTILINE)[1:]:
        command, _, expected = part.partition("\n")
        if command.startswith("kvpersist "):
            line = f"{shlex.quote(sys.executable)} -m {command}"
            done = subprocess.run(line, shell=True, capture_output=True, text=True, check=False)
            assert (done.returncode, done.stdout) == (0, expected), f"{command}\n{done.stderr}"


SYBIL = Sybil(
    parsers=[
        CodeBlockParser("python", _run),
        CodeBlockParser("text", _compare),
        CodeBlockParser("console", _console),
    ]
)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_examples_of_a_page_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KVPERSIST_URL", "sqlite:///usual.db")
    document = SYBIL.parse(page)

    for example in document.examples():
        example.evaluate()

    assert "printed" not in document.namespace or document.namespace["printed"] == "", "an output is not shown"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_links_of_a_page_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text("utf-8"))

    assert [link for link in links if "://" not in link and not (page.parent / link).exists()] == []


def test_the_readme_begins_with_what_it_is_and_how_to_try_it() -> None:
    text = (ROOT / "README.md").read_text("utf-8")
    commands = re.findall(r"^\$ (.+)$", text, re.MULTILINE)

    assert commands[:2] == ["examples/run", "tests/run"]
    assert all((ROOT / command).is_file() for command in commands[:2])
    assert len(text.partition("```python\n")[2].partition("```")[0].splitlines()) <= 30
