"""Measure the rows of the performance goals: ``bench.py [S1 R2 ...] [--quick] [--json FILE]``; ``--list`` names them.

Each goal is a cost ratio to a floor written by hand (``floors_*.py``), measured interleaved in this
one process. A row whose server or client is missing is skipped, with the reason. ``--noise`` runs
every floor against itself: what that shows beyond 1.00 is the machine.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import platform
import sqlite3
import sys
import tempfile
import time
from pathlib import Path

import msgspec

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(Path(__file__).resolve().parent), str(ROOT), str(ROOT / "drivers")]

from measure import Figure, Line, Plan, measure, over, spread  # noqa: E402
from rows import MODULES, Row, row  # noqa: E402
from servers import Missing  # noqa: E402

from kvpersist.errors import MissingExtra  # noqa: E402

__all__ = ["main"]

QUICK = Plan(rounds=5, turns=2, scale=0.4, load=0.25)


def main(arguments: list[str] | None = None) -> int:
    """Print the table; exit status 1 where ``--strict`` and a goal was missed."""
    parser = argparse.ArgumentParser(prog="bench", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"of {' '.join(MODULES)}; all without any")
    parser.add_argument("--list", action="store_true", help="print the rows and the modules that hold them")
    parser.add_argument("--quick", action="store_true", help="a few seconds each; for a first look only")
    parser.add_argument("--rounds", type=int, help="at least 5 to be quoted")
    parser.add_argument("--noise", action="store_true", help="each floor against itself")
    parser.add_argument("--json", metavar="FILE", help="write settings and figures there ('-': standard output)")
    parser.add_argument("--dir", metavar="DIR", help="where the database files go")
    parser.add_argument("--strict", action="store_true", help="exit status 1 when a goal is missed")
    options = parser.parse_args(arguments)
    if options.list:
        print(*(f"{name}: {module}.py" for name, module in MODULES.items()), sep="\n")
        return 0
    wanted = [name.upper() for name in options.rows] or list(MODULES)
    if unknown := [name for name in wanted if name not in MODULES]:
        parser.error(f"no row {', '.join(unknown)}; there are {' '.join(MODULES)}")
    plan = QUICK if options.quick else Plan()
    if options.rounds:
        plan = msgspec.structs.replace(plan, rounds=options.rounds)
    out = sys.stderr if options.json == "-" else sys.stdout
    with tempfile.TemporaryDirectory(prefix="kvbench-", dir=options.dir) as folder:
        settings = _settings(folder, plan)
        print(*(f"{name}: {value}" for name, value in settings.items()), sep="\n", file=out)
        print(_HEAD, file=out, flush=True)
        begun = time.monotonic()
        figures: list[Figure] = []
        skipped: dict[str, str] = {}
        for name in dict.fromkeys(wanted):
            place = Path(folder, name)
            place.mkdir()
            try:
                figures += asyncio.run(_row(row(name), str(place), plan, options.noise, out))
            except (Missing, MissingExtra, ModuleNotFoundError) as reason:
                skipped[name] = str(reason)
                print(f"| {name} | skipped: {reason} |" + " |" * 6, file=out, flush=True)
    settings["seconds"] = round(time.monotonic() - begun, 1)
    settings["skipped"] = skipped
    settings["spread"] = round(spread(figures), 3)
    print(f"{settings['seconds']} s; spread of the rounds, (max - min) / median: {settings['spread']:.0%}", file=out)
    if options.json:
        report = msgspec.json.format(msgspec.json.encode({"settings": settings, "figures": figures})).decode()
        if options.json == "-":
            print(report)
        else:
            Path(options.json).write_text(report + "\n", encoding="utf-8")
    return 1 if options.strict and any(figure.reached is False for figure in figures) else 0


async def _row(row: Row, folder: str, plan: Plan, noise: bool, out: object) -> list[Figure]:
    figures: list[Figure] = []
    async with row(folder, plan) as lines:
        for line in lines:
            figure = await measure(_against_itself(line) if noise else line, plan)
            figures.append(figure)
            print(_shown(figure), file=out, flush=True)  # pyright: ignore[reportArgumentType]
    return figures


def _against_itself(line: Line) -> Line:
    floor = next(side for name, side in line.sides.items() if name.startswith("floor"))
    return msgspec.structs.replace(line, sides={"kvpersist": floor, "floor": floor}, ratio=over(), goal=None)


def _settings(folder: str, plan: Plan) -> dict[str, object]:
    load = f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "unknown"
    return {
        "python": f"{platform.python_implementation()} {platform.python_version()}, sqlite {sqlite3.sqlite_version}",
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, load {load} at the start",
        "files": _file_system(folder),
        "plan": f"{plan.rounds} rounds of {plan.turns} turns, slices x {plan.scale:g}, stored before x {plan.load:g}",
        "judged": "median ratio <= goal; rows of one task (c1) pinned to one core, with 25 % slack",
    }


def _file_system(folder: str) -> str:
    try:
        mounts = [line.split()[1:3] for line in Path("/proc/mounts").read_text(encoding="utf-8").splitlines()]
    except OSError:
        return "unknown file system"
    holding = [mount for mount in mounts if (folder + "/").startswith(mount[0].rstrip("/") + "/")]
    return max(holding, key=lambda mount: len(mount[0]))[1] if holding else "unknown file system"


_HEAD = "\n| row | what | setting | goal | ratio (min - max) | cpu | us: ours / floor | reached |\n" + "|---" * 8 + "|"


def _shown(figure: Figure) -> str:
    goal = "-" if figure.goal is None else f"{figure.goal:g}"
    if figure.slack != 1.0 and figure.goal is not None:
        goal += f" (x {figure.slack:g})"
    reached = {None: "-", True: "yes", False: "NO"}[figure.reached]
    if figure.reached and figure.goal is not None and figure.ratio > figure.goal:
        reached = "slack"  # over the goal, within the slack
    times = " / ".join(f"{value:.1f}" for value in figure.microseconds.values())
    return (
        f"| {figure.row} | {figure.what} | {figure.setting} | {goal} | {figure.ratio:.2f} "
        f"({figure.low:.2f} - {figure.high:.2f}) | {figure.cpu:.2f} | {times} | {reached} |"
    )


if __name__ == "__main__":
    sys.exit(main())
