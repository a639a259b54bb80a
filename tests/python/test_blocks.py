"""Mixture-of-experts layers that others wrote and engines run, mlx-lm's, split by experts over rank processes: what the
block gives whole in one process, bit for bit where a sum is by slots.

What equals what, in float32:

* A block sums weight * result over a token's K slots, slot 0 first, each product and each sum rounded. EXPERT_* layouts
  do just that in combine: the same bits as the block, on any number of ranks.
* Per-rank layouts add each rank's weighted sum over its own slots, rank 0 first: the same bits as the block's results
  per slot added in that order, which is the block's sum in another order, and the very same where a token's experts are
  all of one rank.
"""

import functools
import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import pytest

import ranks

try:
    import blocks
except ImportError as error:
    blocks, missing = None, error

RANKS = 4
LAYERS, FEW = 4, 101  # layers on end, and their tokens
KINDS = ["mixtral", "qwen3_moe", "deepseek_v3"]
LOADS = ["text", "gaussian", "worst"]
BY_EXPERT = [pair for pair in ranks.PAIRS if ranks.is_by_expert(pair[1])]


@pytest.fixture(scope="module", autouse=True)
def installed():
    if blocks is None:
        pytest.fail(f"{missing}: mlx-lm's blocks have not been tried. `make test` installs them into target/venv from "
                    "tests/requirements-blocks.txt; if it could not, pip has said why: not every platform has a wheel "
                    "of mlx", pytrace=False)


@pytest.fixture(scope="module")
def processes(installed):
    with ProcessPoolExecutor(RANKS, multiprocessing.get_context("spawn")) as pool:
        yield pool


@functools.lru_cache(maxsize=None)
def whole(kind, load):
    return blocks.whole(kind, blocks.load_of(kind, load))


@functools.lru_cache(maxsize=None)
def by_slot(kind, load):
    return blocks.by_slot(kind, blocks.load_of(kind, load))


@functools.lru_cache(maxsize=None)
def whole_layers(kind):
    x = blocks.load_of(kind, "text")[:FEW]
    for layer in range(LAYERS):
        x = blocks.after(x, y) if layer else x
        y = blocks.whole(kind, x)
    return y.tobytes()


def in_slot_order(terms):
    return functools.reduce(np.add, terms.swapaxes(0, 1), np.float32(0))


def relative_error(got, wanted):
    """Of the worst token: the largest difference against the largest element."""
    return (np.abs(got - wanted).max(axis=1) / np.abs(wanted).max(axis=1)).max()


def split(pool, count, kind, backend, layout, x, layers=1):
    parts = np.array_split(x, count)
    return np.concatenate(ranks.together(pool, count, blocks.run_rank, kind, backend, layout, parts, layers))


@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_block_sums_in_slot_order(kind, load):
    """What equality with the block rests on: a failure here is no fault of liba2a's."""
    _, _, terms, last = by_slot(kind, load)
    assert (in_slot_order(terms) + last).tobytes() == whole(kind, load).tobytes()


@pytest.mark.parametrize("kind", KINDS)
def test_the_loads_are_what_they_are_called(kind):
    most = {}
    for load in LOADS:
        ids, weights, *_ = by_slot(kind, load)
        assert (np.diff(np.sort(ids)) > 0).all() and (weights > 0).all()
        most[load] = np.bincount(ids.ravel(), minlength=blocks.EXPERTS).max()
        owners = ids // (blocks.EXPERTS // RANKS)
        assert (owners == blocks.FULL_RANK).all() == (load == "worst")
        if load != "worst":
            assert set(owners.ravel()) == set(range(RANKS))
        if kind == "deepseek_v3":  # experts of two groups of four at most
            assert max(len(set(row)) for row in owners) <= 2
    assert most["gaussian"] < most["text"] < most["worst"] == blocks.TOKENS


@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend, layout", ranks.PAIRS)
def test_split_over_ranks(processes, backend, layout, kind, load):
    got = split(processes, RANKS, kind, backend, layout, blocks.load_of(kind, load))
    wanted = whole(kind, load)
    if ranks.is_by_expert(layout):
        assert got.tobytes() == wanted.tobytes(), relative_error(got, wanted)
        return
    ids, _, terms, last = by_slot(kind, load)
    owners = ids // (blocks.EXPERTS // RANKS)
    sums = [in_slot_order(np.where((owners == rank)[..., None], terms, 0)) for rank in range(RANKS)]
    assert got.tobytes() == (functools.reduce(np.add, sums, np.float32(0)) + last).tobytes()
    assert relative_error(got, wanted) < 1e-6
    one = (owners == owners[:, :1]).all(axis=1)
    assert got[one].tobytes() == wanted[one].tobytes()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend, layout", BY_EXPERT)
def test_the_number_of_ranks_leaves_no_trace(processes, backend, layout, kind):
    """Several layers, each fed with what the last one gave: a bit that differed would reach routers and grow."""
    x = blocks.load_of(kind, "text")[:FEW]
    got = {count: split(processes, count, kind, backend, layout, x, LAYERS).tobytes() for count in (1, 2, 4)}
    assert [count for count in got if got[count] != whole_layers(kind)] == []
