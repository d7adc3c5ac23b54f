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
_SHOWN = ("examples/run", "tests/run", "pip")  # run elsewhere
_PYTHON = shlex.quote(sys.executable)
_TOOLS = f"""
python() {{ {_PYTHON} "$@"; }}; python3() {{ {_PYTHON} "$@"; }}
kvpersist() {{ {_PYTHON} -m kvpersist "$@"; }}
pytest() {{ {_PYTHON} -m pytest -p no:cacheprovider -p no:kvpersist -p kvpersist.testing.plugin "$@"; }}
"""
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def _run(example: Example) -> None:
    if named := re.match(r"# (\w+\.py)\n", example.parsed):  # a file that the reader is told to save
        Path(named[1]).write_text(example.parsed, "utf-8")
        return
    printed = io.StringIO()
    code = compile(example.parsed, f"{example.path}:{example.line}", "exec", dont_inherit=True)
    with contextlib.redirect_stdout(printed):
        exec(code, {"__name__": "__main__"})
    example.namespace["printed"] = printed.getvalue()


def _compare(example: Example) -> None:
    if "printed" in example.namespace:
        assert example.namespace.pop("printed") == example.parsed


def _console(example: Example) -> None:
    """Run the commands of a block in a shell and compare what each prints, but for durations."""
    for part in re.split(r"^\$ ", example.parsed, flags=re.MULTILINE)[1:]:
        command, _, expected = part.partition("\n")
        if command.split()[0] in _SHOWN:
            continue
        done = subprocess.run(["bash", "-c", _TOOLS + command], capture_output=True, text=True, check=False)
        assert (done.returncode, _timeless(done.stdout)) == (0, _timeless(expected)), f"{command}\n{done.stderr}"


def _timeless(text: str) -> str:
    return re.sub(r"\bin \d+\.\d+s\b", "in 0.00s", text)


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
