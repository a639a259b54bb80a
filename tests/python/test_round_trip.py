"""Dispatch and combine over four ranks, threads and processes, bit for bit what numpy computes alone: every backend
with every layout."""

import multiprocessing
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import pytest

import ranks
from conftest import ROOT

COUNTS = [17, 0, 33, 5]


@pytest.fixture(scope="module")
def processes():
    # One worker per rank: no rank waits for another's worker.
    with ProcessPoolExecutor(len(COUNTS), multiprocessing.get_context("spawn")) as pool:
        yield pool


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("backend, layout", ranks.PAIRS)
@pytest.mark.parametrize("pool", ["threads", "processes"])
def test_round_trip(request, pool, backend, layout, dtype):
    pool = request.getfixturevalue(pool)
    outcomes = ranks.together(pool, len(COUNTS), ranks.run_rank, backend, layout, COUNTS, dtype)
    for rank, outcome in enumerate(outcomes):
        wanted = ranks.alone(*ranks.tokens_of(rank, COUNTS[rank], dtype), len(COUNTS), layout)
        for got in outcome:
            assert got.tobytes() == wanted.tobytes(), np.abs(got - wanted).max()


def test_quickstart():
    quickstart = ROOT / "examples/python/quickstart.py"
    done = subprocess.run([sys.executable, "-B", quickstart], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("PASS: 2 ranks")
