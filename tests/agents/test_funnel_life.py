"""An append from where the store is not open is refused, also while another append is under way."""

import asyncio
import subprocess
import sys
from pathlib import Path

import pytest

import kvpersist
from kvpersist import Message
from kvpersist.errors import WrongLoop


async def test_an_append_from_another_loop_is_refused_while_one_is_under_way(tmp_path: Path) -> None:
    async with kvpersist.open(tmp_path / "agent.db") as db:
        await db.sessions.create(id="s")
        under_way = asyncio.create_task(db.messages.append("s", Message("user", "ours")))
        await asyncio.sleep(0)

        def elsewhere() -> None:
            with pytest.raises(WrongLoop):
                asyncio.run(asyncio.wait_for(db.messages.append("s", Message("user", "theirs")), 5))

        await asyncio.to_thread(elsewhere)
        await under_way
        assert [message.content for message in await db.messages.last("s", 9)] == ["ours"]


_FORKED = """
import asyncio, os, sys, warnings
import kvpersist
warnings.simplefilter("ignore", DeprecationWarning)
async def main(path):
    db = await kvpersist.open(path)
    await db.sessions.create(id="s")
    under_way = asyncio.create_task(db.messages.append("s", kvpersist.Message("user", "ours")))
    await asyncio.sleep(0)
    ours, theirs = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            answer = repr(asyncio.run(asyncio.wait_for(db.messages.append("s", kvpersist.Message("user", "x")), 5)))
        except BaseException as error:
            answer = type(error).__name__
        os.write(theirs, answer.encode())
        os._exit(0)
    os.waitpid(pid, 0)
    await under_way
    await db.close()
    print(os.read(ours, 1000).decode())
asyncio.run(main(sys.argv[1]))
"""


def test_an_append_in_a_forked_child_is_refused_while_the_parents_is_under_way(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _FORKED, str(tmp_path / "a.db")], capture_output=True, text=True, timeout=60
    )
    assert done.stdout.strip() == "ForkedStore", done.stderr
