"""Keys that names, paths, patterns, collations or query languages are known to confuse."""

from __future__ import annotations

from typing import Final

from kvpersist.driver import Committed, Delete, Driver
from kvpersist.testing.contract.base import Contract, D
from kvpersist.testing.contract.steps import batch, fill, in_byte_order, needs, values_of

__all__ = ["AWKWARD_KEYS", "AwkwardKeys", "awkward_entries"]

AWKWARD_KEYS: Final = (
    *("a:b", "a::b", ":", "::", ":a", "a:", "a!b", "a!!b", "!", "a#b", "#"),
    *("/", "//", "a/b", "a//b", "/a", "a/", ".", "..", "../a", "a/../b", "./a", "\\", "a\\b", "C:\\a"),
    *("%", "%%", "%25", "a%2Fb", "%00", "{", "{}", "{a}b", "a{b}c", "{a", "}a", "$where", "$a.b", "a.b"),
    *("\x00", "a\x00", "a\x00b", "\x01", "a\x01b", "a\x01\x02", "\x7f", "\t", "a\nb", "a\r\nb", "\x1b[31m"),
    *(" ", " a", "a ", "a.", ".a", "a. ", "-a", "--help", "~", "~a", "_", "*", "a*", "?", "[a]", "a^b"),
    *("A", "a", "AB", "Ab", "aB", "ab", "\u00df", "SS", "ss", "I", "i", "\u0130", "\u0131"),
    *("\u00e9", "e\u0301", "\u00c5", "A\u030a", "\u212b", "\uac00", "\u1100\u1161"),
    *("\ud7ff", "\ue000", "\ufeff", "\ufffd", "\uffff", "\U00010000", "\U0001f600", "\U0010ffff", "\U0010ffffa"),
    *("a\ud7ff", "a\ue000", "a\U0010ffff", "\u202eabc", "\U0001f468\u200d\U0001f469\u200d\U0001f467", "\u2028"),
    *(
        "CON",
        "con",
        "nul",
        "aux.txt",
        "COM1",
        "LPT1.",
        "__proto__",
        "constructor",
        "__class__",
        "None",
        "null",
        "0",
        "-0",
    ),
    *("' OR '1'='1", '"; DROP TABLE kv; --', "a';--", "$(id)", "`id`", "<script>", "${a}", "#{a}", "\u00ff", "\u0080"),
    *("x" * 200, "x" * 200 + "y", "\u00e9" * 120, "a" * 255, "a" * 256, "seg/" * 60, "x:" * 100),
)
"""Distinct keys that names, paths, patterns, collations or query languages are known to confuse."""


class AwkwardKeys(Contract[D]):
    """Distinct keys stay apart, in their order, on this backend too."""

    async def test_awkward_keys_stay_apart_and_come_back_as_they_were(self, driver: D) -> None:
        stored = awkward_entries(driver)
        await fill(driver, stored)

        entries = await driver.get(list(stored))

        assert {key: entry and (entry.key, entry.value) for key, entry in zip(stored, entries, strict=True)} == {
            key: (key, value) for key, value in stored.items()
        }

    async def test_a_scan_of_awkward_keys_gives_each_once_in_byte_order(self, driver: D) -> None:
        stored = awkward_entries(driver)
        await fill(driver, stored)

        found = await driver.scan(None, None, limit=2 * len(stored))

        if not driver.capabilities.ordered:
            found.sort(key=lambda entry: entry.key.encode())
        assert [(entry.key, entry.value) for entry in found] == [(key, stored[key]) for key in in_byte_order(stored)]

    async def test_any_awkward_key_is_a_scan_bound(self, driver: D) -> None:
        needs(driver.capabilities.ordered, "ordered")
        stored = awkward_entries(driver)
        await fill(driver, stored)
        ordered = in_byte_order(stored)

        for position, key in enumerate(ordered):
            [found] = await driver.scan(key, None, limit=1)
            after = await driver.scan(key + "\x00", None, limit=1)
            until = await driver.scan(ordered[max(position - 1, 0)], key, limit=5)

            assert found.key == key
            assert [entry.key for entry in after] == ordered[position + 1 : position + 2]
            assert [entry.key for entry in until] == ordered[max(position - 1, 0) : position]

    async def test_deleting_every_second_awkward_key_leaves_the_others(self, driver: D) -> None:
        stored = awkward_entries(driver)
        await fill(driver, stored)
        doomed = list(stored)[::2]

        outcomes = await driver.commit([batch(Delete(key)) for key in doomed])

        assert all(isinstance(outcome, Committed) for outcome in outcomes)
        assert values_of(await driver.get(list(stored))) == [
            None if key in doomed else value for key, value in stored.items()
        ]
        assert len(await driver.scan(None, None, limit=2 * len(stored))) == len(stored) - len(doomed)

    async def test_the_backend_holds_awkward_keys_apart_too(self, driver: D) -> None:
        stored = awkward_entries(driver)
        await fill(driver, stored)

        assert {key: await self.peek(driver, key) for key in stored} == stored


def awkward_entries(driver: Driver) -> dict[str, bytes]:
    """`AWKWARD_KEYS` as far as ``driver`` takes them, each with a value of its own."""
    limit = driver.capabilities.max_key_bytes or 512
    keys = [key for key in AWKWARD_KEYS if len(key.encode()) <= limit]
    return {key: b"%d" % number for number, key in enumerate(keys)}
