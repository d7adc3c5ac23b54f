"""Every test of this folder runs on every driver."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # for places.py
sys.path.insert(0, str(Path(__file__).parents[1] / "ops"))  # for conversations.py

from places import PLACES, Place, Where


@pytest.fixture(params=PLACES, ids=lambda place: place.name)
def place(request: pytest.FixtureRequest) -> Place:
    return request.param


@pytest.fixture
def where(place: Place, service: Callable[[str], dict[str, str]], tmp_path: Path) -> Where:
    """An empty place of the driver; opening it again leads to the same one, but for memory's."""
    return place.make(service(place.service) if place.service else {}, tmp_path)
