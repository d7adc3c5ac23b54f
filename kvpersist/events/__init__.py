"""Events: topics with positions, subscriptions, consumers, groups, retention and replay, over any store."""

from __future__ import annotations

from kvpersist.events.groups import EventGroup
from kvpersist.events.queue import EventQueue
from kvpersist.events.records import Claimed, EventEntry, GroupStats, Lag, NewEvent, Parked, TopicStats
from kvpersist.events.subscription import Subscription

__all__ = [
    "Claimed",
    "EventEntry",
    "EventGroup",
    "EventQueue",
    "GroupStats",
    "Lag",
    "NewEvent",
    "Parked",
    "Subscription",
    "TopicStats",
]
