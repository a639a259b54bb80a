"""Dispatch and combine over four ranks, threads and processes, bit for bit what numpy computes alone."""

import multiprocessing
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor

import a2a_ctypes as a2a
import numpy as np
import pytest

import ranks
from conftest import ROOT

BACKENDS = ["allgather_reducescatter", "flashinfer_nvlink_one_sided"]
COUNTS = [17, 0, 33, 5]


@pytest.fixture(scope="module")
def processes():
    # One worker per rank: no rank waits for another's worker.
    with ProcessPoolExecutor(len(COUNTS), multiprocessing.get_context("spawn")) as pool:
        yield pool


@pytest.fixture(scope="module")
def threads():
    with ThreadPoolExecutor(len(COUNTS)) as pool:
        yield pool


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("pool", ["threads", "processes"])
def test_round_trip(lib, request, pool, backend, dtype):
    pool = request.getfixturevalue(pool)
    group = bytes(a2a.unique_id(lib))
    running = [pool.submit(ranks.run_rank, rank, group, backend, COUNTS, dtype) for rank in range(len(COUNTS))]
    failures = [str(error) for error in (future.exception(timeout=120) for future in running) if error]
    assert not failures, "\n".join(failures)
    for rank, outcome in enumerate(future.result() for future in running):
        wanted = ranks.alone(rank, len(COUNTS), COUNTS[rank], dtype)
        for got in outcome:
            assert got.tobytes() == wanted.tobytes(), np.abs(got - wanted).max()


def test_quickstart():
    quickstart = ROOT / "examples/python/quickstart.py"
    done = subprocess.run([sys.executable, "-B", quickstart], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("PASS: 2 ranks")
