"""One folder for everything an application keeps beside its code: data, work folders, logs.

::

    DIR/data/default.db           the store, where none is named
    DIR/containers/<id>/          a container's work folder, its id escaped
    DIR/logs/kvpersist.log        what the library logs, where that is asked for
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from hashlib import blake2b
from pathlib import Path
from typing import Final

from kvpersist.errors import BadKey, BadOption, ReadOnly

__all__ = ["LOGS", "Home"]

LOGS: Final = "KVPERSIST_LOGS"
"""The environment variable that asks for a log file in the home folder, and names its level."""

_PLAIN: Final = frozenset(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_-.@")
_NAME_BYTES: Final = 200  # of a work folder's name; file systems take 255
_LOG_BYTES: Final = 10 << 20  # of one log file; two older ones are kept
_MODE: Final = 0o700
_FORM: Final = "%(asctime)s %(levelname)s %(name)s: %(message)s"

_handlers: dict[Path, tuple[logging.Handler, list[int]]] = {}  # log file -> its handler, the levels asked for


class Home:
    """The folder ``path``; what is in it is made when it is first asked for, for its owner only.

    Attributes:
        path: absolute.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """
        Raises:
            BadOption: it is empty, or in the home of a user that is not there.
        """
        if not os.fspath(path):
            raise BadOption("home", "it is empty: name a folder")
        try:
            self.path = Path(path).expanduser().absolute()
        except RuntimeError as error:
            raise BadOption("home", f"{os.fspath(path)}: there is no such user: name a folder") from error

    def __repr__(self) -> str:
        return f"Home({str(self.path)!r})"

    @property
    def data(self) -> Path:
        """The folder of what is stored; it may not be there yet."""
        return self.path / "data"

    @property
    def containers(self) -> Path:
        """The folder of the work folders; it may not be there yet."""
        return self.path / "containers"

    @property
    def logs(self) -> Path:
        """The folder of logs; it may not be there yet."""
        return self.path / "logs"

    def workdir(self, container_id: str, *, create: bool = True) -> Path:
        """Return the work folder of a container, directly below `containers` whatever its id is.

        Two ids never share a folder. Letters, digits, ``_ - . @`` of ASCII stay as they are, everything
        else and a leading dot become ``%XX``; a long id is cut, and ends in ``~`` and its hash.

        Args:
            create: make it if it is missing. It stays when the container is deleted.

        Raises:
            BadKey: the id is empty, or no text.
            ReadOnly: the folder cannot be made, or something else has its name.
        """
        path = self.containers / _safe(container_id)
        if create:
            _made(path)
        return path

    def made(self) -> Path:
        """Make `data`, and return it.

        Raises:
            ReadOnly: it cannot be made.
        """
        _made(self.data)
        return self.data

    def log_to_file(self, level: int | str | bool = logging.INFO) -> Callable[[], None]:
        """Write what the library logs to ``logs/kvpersist.log``; return a function that ends this.

        Several callers share one file, which is written until the last of them ends.

        Args:
            level: a number or name of `logging`; True: INFO.

        Raises:
            BadOption: no such level. ReadOnly: the file cannot be made.
        """
        number = _level(level)
        path = self.logs / "kvpersist.log"
        _made(self.logs)
        handler, levels = _handlers.get(path) or (_opened(path), [])
        _handlers[path] = (handler, levels)
        levels.append(number)
        _apply(handler, levels)
        ended = False

        def end() -> None:
            nonlocal ended
            if ended:
                return
            ended = True
            levels.remove(number)
            _apply(handler, levels)
            if not levels:
                del _handlers[path]
                handler.close()

        return end


def _safe(container_id: str) -> str:
    if not container_id:
        raise BadKey(container_id, "a container's id is not empty")
    try:
        raw = container_id.encode()
    except UnicodeEncodeError as error:
        raise BadKey(container_id, "it holds half of a surrogate pair: it is no text") from error
    name = "".join(chr(byte) if byte in _PLAIN else f"%{byte:02X}" for byte in raw)
    if name.startswith("."):
        name = "%2E" + name[1:]
    if len(name) <= _NAME_BYTES:
        return name
    return f"{name[: _NAME_BYTES - 33]}~{blake2b(raw, digest_size=16).hexdigest()}"


def _made(path: Path) -> None:
    try:
        for folder in reversed([path, *path.parents]):
            if not folder.exists():
                folder.mkdir(mode=_MODE, exist_ok=True)
        path.mkdir(exist_ok=True)  # raises where something else has its name
    except OSError as error:
        raise ReadOnly(f"the folder {path} cannot be made ({error.strerror}): choose another home") from error
    if path.is_symlink():
        raise ReadOnly(f"{path} is a link to elsewhere: remove it")


def _opened(path: Path) -> logging.Handler:
    from logging.handlers import RotatingFileHandler

    try:
        handler = RotatingFileHandler(path, maxBytes=_LOG_BYTES, backupCount=2, encoding="utf-8")
    except OSError as error:
        raise ReadOnly(f"the log file {path} cannot be written ({error.strerror}): choose another home") from error
    handler.setFormatter(logging.Formatter(_FORM))
    return handler


def _apply(handler: logging.Handler, levels: list[int]) -> None:
    """Let the library's logger write to ``handler`` whatever one of ``levels`` asks for."""
    logger = logging.getLogger("kvpersist")
    logger.removeHandler(handler)
    if levels:
        handler.setLevel(min(levels))
        logger.addHandler(handler)
    asked = [level for _, others in _handlers.values() for level in others]
    logger.setLevel(min(asked) if asked else logging.NOTSET)


def _level(level: int | str | bool) -> int:
    if level is True:
        return logging.INFO
    if isinstance(level, str):
        known = logging.getLevelNamesMapping()
        if level.upper() not in known:
            raise BadOption("logs", f"{level!r} is none of {', '.join(name.lower() for name in known)}")
        return known[level.upper()]
    return int(level)
