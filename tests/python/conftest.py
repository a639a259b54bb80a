"""Puts the package a2a on the path, and has a thread for each rank."""

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "examples/python"))


@pytest.fixture(scope="session")
def threads():
    # One for each rank: no rank waits for another's.
    with ThreadPoolExecutor(4) as pool:
        yield pool
