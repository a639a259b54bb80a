"""The package is typed: mypy --strict finds nothing in it, takes a program that uses it, and finds what that one must not do."""

import subprocess
import sys

from conftest import ROOT

USES = '''
from typing import assert_type

import a2a
import numpy as np

comm = a2a.Comm(rank=0, num_ranks=1, backend="deepep_low_latency", layout=a2a.Layout.EXPERT_PADDED, token_dtype=np.float32)
config = a2a.Config(unique_id=bytes(a2a.UniqueId.create()), expert_owner=[0, 0], allgather=lambda data: [data])
x = np.zeros((4, 8), np.float32)
ids = np.zeros((4, 2), np.int32)
with comm, comm.routing(slot=0) as routing:
    received = comm.dispatch(routing, x, ids, flags=a2a.DispatchFlag.HOST_COUNTS | a2a.DispatchFlag.UNIFORM, phase=a2a.SEND)
    assert_type(comm.dispatch_recv(routing, out={"tokens": x}), a2a.Received)
    assert_type(received.num_rows, int | None)
    rows: a2a.SupportsDLPack = received.tokens
    assert_type(np.from_dlpack(received.tokens).ndim, int)
    assert_type(comm.combine(routing, rows), a2a.Tensor)
    assert_type(comm.combine(routing, rows, x) is x, bool)
    x = comm.combine(routing, comm.combine_buffer(routing, a2a.bfloat16), x, accumulate=True)
    assert_type(comm.info.backend, a2a.Backend)
    assert_type(comm.stats().hops, int)
try:
    comm.recover(timeout_ms=5)
except a2a.StepError as error:
    assert_type(error.ranks, tuple[int, ...])
'''
WRONG = {
    'a2a.Config(nun_ranks=1)': "nun_ranks",
    'a2a.Config(rank="0")': "rank",
    'a2a.Config(layout=a2a.Backend)': "layout",
    'a2a.empty((2, 2), "float32").shape.append(1)': "append",
    'a2a.set_log_callback(lambda line: None)': "set_log_callback",
}


def mypy(*arguments, cache):
    return subprocess.run([sys.executable, "-m", "mypy", "--strict", "--cache-dir", cache, *arguments], capture_output=True, text=True,
                          cwd=ROOT / "examples/python", timeout=300)


def test_strict(tmp_path):
    (tmp_path / "uses.py").write_text(USES)
    lines = [f"import a2a\n{line}  # wrong\n" for line in WRONG]
    for i, text in enumerate(lines):
        (tmp_path / f"wrong_{i}.py").write_text(text)
    done = mypy("a2a", "quickstart.py", tmp_path / "uses.py", *tmp_path.glob("wrong_*.py"), cache=tmp_path / "cache")
    found = [line for line in done.stdout.splitlines() if ": error:" in line]
    for i, words in enumerate(WRONG.values()):
        of_this = [line for line in found if f"wrong_{i}.py" in line]
        assert any(words in line for line in of_this), (i, done.stdout, done.stderr)
        found = [line for line in found if line not in of_this]
    assert not found, "\n".join(found)
