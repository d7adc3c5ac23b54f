"""An agent's todo list: whole, counted, and never with two things in progress."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
import pytest

from kvpersist import Persistence, Todo
from kvpersist.errors import BadRequest, Conflict, Unencodable


@pytest.fixture(autouse=True)
async def agent(db: Persistence) -> None:
    await db.agents.create(id="a")


async def test_a_list_comes_back_in_order_with_ids_and_times(db: Persistence) -> None:
    saved = await db.todos.save(
        "a", [Todo(title="z", assignee="me", notes=""), Todo(id="mine", title="y", status="completed")]
    )

    assert await db.todos.get("a") == saved
    assert [(todo.title, todo.status, todo.notes) for todo in saved.todos] == [
        ("z", "pending", ""),
        ("y", "completed", None),
    ]
    assert saved.version == 1
    assert saved.todos[0].id and saved.todos[1].id == "mine"
    assert all(todo.created_at == todo.updated_at == saved.updated_at for todo in saved.todos)
    assert await db.todos.get("nobody") is None


async def test_each_save_replaces_the_list_and_counts(db: Persistence) -> None:
    await db.todos.save("a", [Todo(title="one"), Todo(title="two")])

    again = await db.todos.save("a", [Todo(title="three")])
    emptied = await db.todos.save("a", [])

    assert [todo.title for todo in again.todos] == ["three"]
    assert (again.version, emptied.version, emptied.todos) == (2, 3, [])
    assert await db.todos.delete("a") is True
    assert await db.todos.delete("a") is False
    assert await db.todos.get("a") is None


async def test_only_what_changed_is_newer(db: Persistence) -> None:
    first = await db.todos.save("a", [Todo(title="same"), Todo(title="other")])

    changed = [first.todos[0], msgspec.structs.replace(first.todos[1], status="in_progress")]
    second = await db.todos.save("a", changed)

    assert second.todos[0] == first.todos[0]
    assert second.todos[1].created_at == first.todos[1].created_at
    assert second.todos[1].updated_at == second.updated_at != first.updated_at


async def test_an_item_given_by_id_without_times_is_as_old_as_it_was(db: Persistence) -> None:
    first = await db.todos.save("a", [Todo(id="t", title="same")])

    second = await db.todos.save("a", [Todo(id="t", title="same")])

    assert second.todos == first.todos


async def test_a_save_of_another_version_is_refused(db: Persistence) -> None:
    with pytest.raises(Conflict, match="todo list of a"):
        await db.todos.save("a", [], version=1)
    await db.todos.save("a", [Todo(title="x")], version=0)
    with pytest.raises(Conflict):
        await db.todos.save("a", [Todo(title="y")], version=0)

    saved = await db.todos.save("a", [Todo(title="z")], version=1)

    assert (saved.version, [todo.title for todo in saved.todos]) == (2, ["z"])


async def test_of_several_saves_of_one_version_one_succeeds(db: Persistence) -> None:
    await db.todos.save("a", [])

    answers: list[Any] = await asyncio.gather(
        *[db.todos.save("a", [Todo(title=str(n))], version=1) for n in range(6)], return_exceptions=True
    )

    won = [answer for answer in answers if not isinstance(answer, BaseException)]
    assert len(won) == 1
    assert {type(answer) for answer in answers} == {type(won[0]), Conflict}
    assert await db.todos.get("a") == won[0]


async def test_updates_at_once_lose_nothing(db: Persistence) -> None:
    async def add(n: int) -> None:
        await db.todos.update("a", lambda todos: [*todos, Todo(title=str(n))])

    await asyncio.gather(*[add(n) for n in range(6)])

    found = await db.todos.get("a")
    assert found is not None
    assert {todo.title for todo in found.todos} == {str(n) for n in range(6)}
    assert found.version == 6


@pytest.mark.parametrize(
    ("todos", "said"),
    [
        ([Todo(title="x", status="in_progress"), Todo(title="y", status="in_progress")], "at most one"),
        ([Todo(id="t", title="x"), Todo(id="t", title="y")], "one id"),
        ([Todo(title="")], "no title"),
        ([Todo(title="x", status="done")], "in_progress"),  # pyright: ignore[reportArgumentType]
        ([{"title": "x"}], "kvpersist.Todo"),
    ],
)
async def test_a_list_at_odds_with_itself_is_refused_whole(
    db: Persistence, driver: Any, todos: list[Any], said: str
) -> None:
    await db.todos.save("a", [Todo(title="before")])
    before = await driver.everything()

    with pytest.raises(BadRequest, match=said):
        await db.todos.save("a", todos)
    with pytest.raises(BadRequest, match=said):
        await db.todos.update("a", lambda _: todos)

    assert await driver.everything() == before


async def test_a_field_of_another_type_is_refused(db: Persistence) -> None:
    with pytest.raises(Unencodable):
        await db.todos.save("a", [Todo(title="x", notes=3)])  # pyright: ignore[reportArgumentType]

    assert await db.todos.get("a") is None
