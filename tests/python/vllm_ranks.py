"""Ranks as processes that serve one test after the other, and the layer that managers are held against: plain numpy, no liba2a.

Values are chosen so that every sum is exact in bfloat16: tokens are -2 to 2, weights 1/4, 1/2 or 1, and expert e gives
(1 + e % 2) * token + e % 3. So results are compared bit for bit, whatever the order of the sums.
"""

import importlib
import multiprocessing
import os
import tempfile
import time
import traceback
from pathlib import Path

import numpy as np

RANKS = 4
EXPERTS, TOPK, HIDDEN = 8, 3, 48
PATIENCE = 120  # seconds for all ranks' answers
COUNTS = [5, 0, 9, 2]  # tokens of each rank: none on one of them


class FileStore:
    """A store as torch's Store is one: files of a directory."""

    def __init__(self, directory):
        self.directory = Path(directory)

    def set(self, key, value):
        path = self.directory / key.replace("/", "-")
        path.with_suffix(".part").write_text(value)
        path.with_suffix(".part").rename(path)

    def get(self, key):
        path, until = self.directory / key.replace("/", "-"), time.monotonic() + 20
        while not path.exists():
            if time.monotonic() > until:
                raise TimeoutError(f"nobody has set {key}")
            time.sleep(0.002)
        return path.read_text()


class Ranks:
    """Processes that run functions of test modules, as rank 0, 1, ... of a new group each time."""

    def __init__(self, count=RANKS):
        self.pipes, self.processes = map(list, zip(*(_process(rank) for rank in range(count))))

    def run(self, function, *arguments, gone=(), ranks=None):
        """What function(rank, size, store, *arguments) gave on each rank; None on those that are `gone`: that end in it."""
        ranks = range(len(self.pipes)) if ranks is None else ranks
        with tempfile.TemporaryDirectory() as directory:
            for rank in ranks:
                self.pipes[rank].send((function.__module__, function.__name__, len(ranks), directory, arguments))
            failures, results = [], []
            until = time.monotonic() + PATIENCE
            for rank in ranks:
                try:
                    if not self.pipes[rank].poll(max(0, until - time.monotonic())):
                        self._replace(rank)  # its answer would be taken for the next test's
                        raise TimeoutError(f"no answer within {PATIENCE} s")
                    kind, value = self.pipes[rank].recv()
                except (EOFError, TimeoutError) as error:
                    kind, value = ("result", None) if rank in gone else ("failure", repr(error))
                (failures if kind == "failure" else results).append(f"rank {rank}: {value}" if kind == "failure" else value)
        # A rank that fails takes the others' steps with it: the cause comes before what it caused.
        failures.sort(key=lambda text: "PEER_LOST" in text or "nobody has set" in text)
        assert not failures, "\n".join(failures)
        return results

    def _replace(self, rank):
        """Kills a rank that does not answer, and has another in its place."""
        self.processes[rank].kill()
        self.processes[rank].join()
        self.pipes[rank].close()
        self.pipes[rank], self.processes[rank] = _process(rank)

    def close(self):
        for pipe, process in zip(self.pipes, self.processes):
            pipe.close()
            process.join(10)


def _process(rank):
    """(pipe, process)"""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, rank), daemon=True)
    process.start()
    theirs.close()
    return ours, process


def _serve(pipe, rank):
    while True:
        try:
            module, name, size, directory, arguments = pipe.recv()
        except EOFError:
            os._exit(0)
        try:
            function = getattr(importlib.import_module(module), name)
            pipe.send(("result", function(rank, size, FileStore(directory), *arguments)))
        except BaseException:
            pipe.send(("failure", traceback.format_exc()))


# ------------------------------------------------------------------------------------------------------------------ tensors


def array_of(library, values, name):
    """An array of a library ("numpy", "torch", or "cuda": torch on this process's GPU) from numpy values."""
    if library in ("torch", "cuda"):
        import torch

        array = torch.from_numpy(np.ascontiguousarray(values)).to(getattr(torch, name))
        return array.cuda() if library == "cuda" else array
    import ml_dtypes

    return np.asarray(values).astype(getattr(ml_dtypes, name) if hasattr(ml_dtypes, name) else name)


def numpy_of(array):
    """float32 or integers, for comparisons."""
    if type(array).__module__ == "torch":
        array = array.float().cpu().numpy() if array.is_floating_point() else array.cpu().numpy()
    return np.asarray(array, np.float32) if array.dtype.kind not in "iub" else np.asarray(array)


def library_of(array):
    return type(array).__module__.partition(".")[0]


# ---------------------------------------------------------------------------------------------------------------- the layer


def tokens_of(rank, count, topk=TOPK, experts=EXPERTS, hidden=HIDDEN):
    """A rank's tokens, weights and ids: distinct, but for -1 in every fifth token from the second on."""
    random = np.random.default_rng(7 + rank)
    x = random.integers(-2, 3, (count, hidden)).astype(np.float32)
    ids = np.array([random.permutation(experts)[:topk] for _ in range(count)], np.int64).reshape(count, topk)
    if topk > 1:
        ids[1::5, 0] = -1
    return x, random.choice(np.float32([0.25, 0.5, 1]), (count, topk)), ids


def expert(number, x):
    return (1 + number % 2) * x + number % 3


def owned(rank, size, experts=EXPERTS):
    return range(rank * experts // size, (rank + 1) * experts // size)


def layer(x, weights, ids, mine=None):
    """[T, H]: the weighted sum over the experts of each token, or over those that are `mine`."""
    result = np.zeros_like(x)
    for token, chosen in enumerate(ids):
        for k, number in enumerate(chosen):
            if number >= 0 and (mine is None or number in mine):
                result[token] += weights[token, k] * expert(number, x[token])
    return result
