"""Puts the ctypes declarations of the examples on the path and gives every test the library."""

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "examples/python"))


@pytest.fixture(scope="session")
def lib():
    import a2a_ctypes

    return a2a_ctypes.load()


@pytest.fixture(scope="session")
def threads():
    # One for each rank: no rank waits for another's.
    with ThreadPoolExecutor(4) as pool:
        yield pool
