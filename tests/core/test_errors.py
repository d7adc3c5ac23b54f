"""Every error can be raised, told, pickled and caught as what a reader expects."""

from __future__ import annotations

import inspect
import pickle
from typing import Any

import pytest

from kvpersist import errors
from kvpersist.driver import ABSENT
from kvpersist.errors import KvError

_CLASSES = [getattr(errors, name) for name in errors.__all__]
_SAMPLES: dict[str, Any] = {
    "size": 2,
    "limit": 1,
    "seconds": 1.5,
    "position": 3,
    "keys": ("a", "b", "c", "d"),
    "available": ("by_user",),
    "known": ("memory",),
    "expected": ABSENT,
    "found": b"\x00" * 8,
    "settled": True,
    "done": 3,
    "failed": {"key": errors.StoreClosed("why")},
}


def _sample(class_: type[KvError]) -> KvError:
    if class_.__init__ is Exception.__init__:
        return class_("why")
    named = list(inspect.signature(class_.__init__).parameters.values())[1:]
    if any(one.kind is inspect.Parameter.VAR_POSITIONAL for one in named):
        return class_("why")
    return class_(*(_SAMPLES.get(one.name, f"<{one.name}>") for one in named))


@pytest.mark.parametrize("class_", _CLASSES)
def test_an_error_survives_pickling_whole(class_: type[KvError]) -> None:
    error = _sample(class_)

    again = pickle.loads(pickle.dumps(error))

    assert type(again) is class_
    assert (str(again), repr(again), repr(vars(again))) == (str(error), repr(error), repr(vars(error)))


@pytest.mark.parametrize("class_", _CLASSES)
def test_an_error_tells_something_and_has_a_code(class_: type[KvError]) -> None:
    with pytest.raises(KvError) as caught:
        raise _sample(class_)

    assert str(caught.value)
    assert caught.value.code.startswith("KV")
    assert len(caught.value.code) == 5


def test_codes_are_given_once() -> None:
    codes = [class_.code for class_ in _CLASSES]

    assert len(set(codes)) == len(codes)


def test_only_an_unknown_outcome_is_not_none() -> None:
    assert [class_.__name__ for class_ in _CLASSES if class_.outcome == "unknown"] == ["CommitUnknown"]


def test_what_changed_nothing_and_may_pass_is_retryable() -> None:
    retryable = {class_.__name__ for class_ in _CLASSES if class_.retryable}

    assert retryable == {
        "Unavailable",
        "DeadlineExceeded",
        "Busy",
        "PoolExhausted",
        "TooManyClients",
        "ValueReplaced",
        "Locked",
    }


@pytest.mark.parametrize(
    ("name", "builtin"),
    [
        ("Unavailable", ConnectionError),
        ("DeadlineExceeded", TimeoutError),
        ("ParentGone", LookupError),
        ("BadRequest", ValueError),
        ("BadKey", ValueError),
        ("CorruptRecord", ValueError),
        ("ReadOnly", PermissionError),
        ("StoreClosed", RuntimeError),
        ("WrongLoop", RuntimeError),
        ("ForkedStore", RuntimeError),
        ("MissingExtra", ImportError),
        ("BrokenPlugin", ImportError),
    ],
)
def test_an_error_is_also_the_built_in_that_a_reader_expects(name: str, builtin: type[Exception]) -> None:
    assert issubclass(getattr(errors, name), builtin)


def test_every_error_is_drawn_in_the_tree() -> None:
    drawn = errors.__doc__ or ""

    assert [name for name in errors.__all__ if name not in drawn] == []
