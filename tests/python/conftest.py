"""Puts the package a2a on the path, and has a thread for each rank."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "examples/python"))


def python(code, **environment):
    """What a process of its own makes of a program that may import a2a; warnings are errors."""
    environment = os.environ | dict(PYTHONPATH=str(ROOT / "examples/python")) | environment
    return subprocess.run(
        [sys.executable, "-B", "-W", "error", "-c", code], capture_output=True, text=True, timeout=120, env=environment
    )


@pytest.fixture(scope="session")
def threads():
    # One for each rank: no rank waits for another's.
    with ThreadPoolExecutor(4) as pool:
        yield pool
