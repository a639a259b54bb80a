"""Comms, routings and steps of the package: what the other tests do not come by. Its views, how long they and their memory last,
outputs by name, halves, settings by name, errors with their ranks."""

import ctypes
import gc
import os
import re
import shutil
import threading
import time
import warnings
import weakref
from pathlib import Path

import a2a
import numpy as np
import pytest
from a2a import _dlpack

import ranks
from conftest import ROOT, python

ALONE = dict(num_ranks=1, num_experts=4, max_topk=2, max_hidden=8, max_tokens=6, token_dtype="float32")
X = np.arange(40, dtype=np.float32).reshape(5, 8)
IDS = np.array([[0, 3], [1, 2], [2, -1], [3, 0], [1, 1]], np.int32)
WEIGHTS = np.full((5, 2), 0.5, np.float32)


@pytest.fixture
def comm():
    with a2a.Comm(ALONE_CONFIG) as comm:
        yield comm


ALONE_CONFIG = a2a.Config(**ALONE, backend="deepep_high_throughput")


# ----------------------------------------------------------------------------------------------------------------- settings


def test_fields_by_name():
    names = dict(backend="flashinfer_nvlink_two_sided", layout="flat", quant="fp8_f32_scales", scale_layout="column",
                 overflow="drop", device="cpu", token_dtype="bf16", max_recv_rows=3)
    enums = dict(backend=a2a.Backend.NVLINK_TWO_SIDED, layout=a2a.Layout.FLAT, quant=a2a.Quant.FP8_F32_SCALES,
                 scale_layout=a2a.ScaleLayout.COLUMN, overflow=a2a.OverflowPolicy.DROP, device=a2a.Device.CPU,
                 token_dtype=a2a.bfloat16, max_recv_rows=3)
    assert a2a.explain(**(ALONE | dict(max_hidden=128) | names)) == a2a.explain(**(ALONE | dict(max_hidden=128) | enums))
    assert a2a.query_memory(a2a.Config(**ALONE), max_tokens=600).total_bytes > a2a.query_memory(**ALONE).total_bytes


@pytest.mark.parametrize("wrong, error, words", [
    (dict(nun_experts=4), TypeError, "nun_experts"),
    (dict(layout="flta"), ValueError, "layout is 'flta', known are .*rank_major"),
    (dict(backend="deepep"), ValueError, "backend is 'deepep', known are .*low_latency"),
    (dict(backend=a2a.Layout.FLAT), TypeError, "it must be one of Backend"),
    (dict(token_dtype="int64"), ValueError, "token_dtype is int64, a comm knows .*bfloat16"),
    (dict(token_dtype="float31"), ValueError, "float31"),
    (dict(unique_id=b"short"), ValueError, "128 bytes, not 5"),
    (dict(expert_owner=[0, 0]), ValueError, "expert_owner has 2 entries, num_experts is 4"),
    (dict(extra_row_bytes=[4] * 9), ValueError, "extra_row_bytes has 9 entries, at most 8"),
    (dict(num_experts=0), a2a.InvalidArgumentError, "num_experts"),
    (dict(layout=77), a2a.InvalidArgumentError, "layout"),
    (dict(backend="nvlink_one_sided", layout="flat"), a2a.UnsupportedError, "rank_major"),
])
def test_wrong_fields(wrong, error, words):
    with pytest.raises(error, match=words):
        a2a.Comm(**(ALONE | wrong))


def test_a_config_is_a_config():
    with pytest.raises(TypeError, match="config is a dict, it must be an a2a.Config"):
        a2a.Comm(ALONE)


def test_unique_ids():
    one, other = a2a.UniqueId.create(), a2a.UniqueId.create()
    assert one != other and one == a2a.UniqueId(bytes(one)) and len({one, other, a2a.UniqueId(bytes(one))}) == 2
    assert bytes(one).hex() not in repr(one)  # a secret
    assert a2a.UniqueId.from_address("127.0.0.1:4000", "key") == a2a.UniqueId.from_address("127.0.0.1:4000", "key")
    with pytest.raises(a2a.InvalidArgumentError, match="address"):
        a2a.UniqueId.from_address("nowhere", "key")


def meet(rank, gather):
    with a2a.Comm(**(ALONE | dict(rank=rank, num_ranks=2)), allgather=gather, setup_timeout_ms=5000) as comm:
        return comm.info.rank, comm.info.num_ranks


def test_ranks_meet_by_an_allgather(threads):
    barrier, sent = threading.Barrier(2), {}

    def gather_as(rank):
        def gather(data):
            sent[rank] = data
            barrier.wait(10)
            return [sent[0], sent[1]]

        return gather

    running = [threads.submit(meet, rank, gather_as(rank)) for rank in range(2)]
    assert [one.result(30) for one in running] == [(0, 2), (1, 2)]


@pytest.mark.parametrize("gather, words", [
    (lambda data: 1 / 0, "division by zero"), (lambda data: data, "bytes, .* of each of 2 ranks were due"),
])
def test_an_allgather_that_fails_is_told_by_its_own_exception(gather, words):
    with pytest.raises(a2a.Error, match="allgather") as failure:
        meet(0, gather)
    assert re.search(words, str(failure.value.__cause__))


def test_info_and_stats(comm):
    assert (comm.info.backend, comm.info.layout) == (a2a.Backend.HIGH_THROUGHPUT, a2a.Layout.FLAT)
    assert repr(comm) == "a2a.Comm(rank 0 of 1, high_throughput, flat)" and "Layout.FLAT" in repr(comm.info)
    assert comm.async_error() is None and comm.rank_mask() == (True,)
    with comm.routing() as routing:
        comm.dispatch(routing, X, IDS)
    assert dict(comm.stats())["dispatches"] == comm.stats().dispatches == 1
    with pytest.raises(a2a.UnsupportedError, match="nixl_elastic"):
        comm.set_rank_mask([True])


# ------------------------------------------------------------------------------------------------------- outputs and halves


def test_what_a_step_has(comm):
    routing = comm.routing()
    received = comm.dispatch(routing, X, IDS, WEIGHTS)
    assert repr(received) == (
        "a2a.Received(tokens, topk_ids, topk_weights, expert_counts, row_source, rank_counts, status)")
    assert received.rank_counts.tolist() == [5] and received.num_rows is None
    assert getattr(received, "scales", None) is None
    with pytest.raises(AttributeError, match="expert_offsets is not there: this step received tokens, "):
        received.expert_offsets
    with pytest.raises(AttributeError, match="tokns"):
        received.tokns
    received = comm.dispatch(routing, X, IDS, want=["rank_counts"], flags=a2a.DispatchFlag.HOST_COUNTS)
    assert repr(received) == "a2a.Received(rank_counts)" and received.num_rows == 5
    for wrong, error, words in [
        (dict(want=["counts"]), ValueError, "no output 'counts', known are tokens, "),
        (dict(out={"toks": X}), ValueError, "no output 'toks'"),
        (dict(want=["scales"]), a2a.InvalidArgumentError, "scales is wanted, but dispatch was given none"),
        (dict(rank_tokens=[5, 5]), ValueError, "rank_tokens has 2 entries, num_ranks is 1"),
        (dict(extras=[X] * 9), ValueError, "extras has 9 tensors"),
        (dict(out={"tokens": np.zeros((2, 8), np.float32)}), a2a.OverflowError, "tokens"),
        (dict(tokens=None), TypeError, r"\[0, H\]"),
        (dict(tokens=[[1.0]]), TypeError, "a list is no tensor"),
    ]:
        with pytest.raises(error, match=words):
            comm.dispatch(routing, **(dict(tokens=X, topk_ids=IDS) | wrong))
    frozen = np.zeros((6, 8), np.float32)
    frozen.flags.writeable = False
    with pytest.raises(ValueError, match="output tokens is read-only"):
        comm.dispatch(routing, X, IDS, out=dict(tokens=frozen))


@pytest.mark.parametrize("backend", ["deepep_high_throughput", "flashinfer_nvlink_two_sided", "deepep_low_latency"])
def test_scales_and_extras(backend):
    scales = np.arange(15, dtype=np.float32).reshape(5, 3)
    lora, wide = np.arange(5, dtype=np.int64), np.arange(20, dtype=np.int16).reshape(5, 4)
    with a2a.Comm(**ALONE, backend=backend, max_scale_bytes=12, extra_row_bytes=[8, 0, 8]) as comm, comm.routing() as routing:
        received = comm.dispatch(routing, X, IDS, WEIGHTS, scales, [lora, None, wide])
        source = np.from_dlpack(received.row_source).reshape(-1, 2)
        tokens = source[source[:, 0] >= 0, 1]
        assert len(received.extras) == 3 and received.extras[1] is None
        for view, sent in [(received.tokens, X), (received.scales, scales), (received.extras[0], lora), (received.extras[2], wide)]:
            rows = np.from_dlpack(view).reshape(len(source), -1)[source[:, 0] >= 0]
            assert rows.dtype == sent.dtype and (rows == sent.reshape(5, -1)[tokens]).all()


@pytest.mark.parametrize("quant", ["none", "fp8_f32_scales", "fp8_ue8m0_scales"])
@pytest.mark.parametrize("scale_layout", ["row", "column"])
def test_two_sided_rows_go_to_tensors_of_ours(quant, scale_layout):
    if quant == "none" and scale_layout == "column":
        return  # the library refuses it: columns need quant
    shape = ALONE | dict(max_hidden=272, quant=quant, scale_layout=scale_layout)
    x = np.random.default_rng(1).standard_normal((5, 272)).astype(np.float32)
    seen = []
    for backend in ("flashinfer_nvlink_two_sided", "deepep_high_throughput"):
        with a2a.Comm(**shape, backend=backend, layout="flat") as comm, comm.routing() as routing:
            received = comm.dispatch(routing, x, IDS, WEIGHTS, max_tokens=5)
            seen.append({name: getattr(received, name) for name in a2a.OUTPUTS if hasattr(received, name)})
            seen[-1] = {name: (one.shape, one.strides, one.dtype, one.tobytes()) for name, one in seen[-1].items()}
            y = comm.combine(routing, np.ones(received.tokens.shape, np.float32))
            assert (np.from_dlpack(y)[2] == 1).all()
            y = received.tokens if "two_sided" in backend else y
            y.tobytes()  # rows of ours do not end
    assert seen[0] == seen[1]


def test_gathered_without_ids():
    with a2a.Comm(**ALONE, backend="allgather_reducescatter") as comm, comm.routing() as routing:
        for flags in (0, a2a.DispatchFlag.REUSE):
            received = comm.dispatch(routing, X, rank_tokens=[5], flags=flags)
            assert not hasattr(received, "topk_ids") and received.tokens.tolist() == X.tolist()
            assert comm.combine(routing, received.tokens).tolist() == X.tolist()


def test_halves_and_slots():
    with a2a.Comm(**ALONE, backend="flashinfer_nvlink_two_sided", num_slots=2) as comm:
        first, second = comm.routing(0), comm.routing(1)
        sent = [comm.dispatch(routing, (X + n).copy(), IDS, WEIGHTS, phase=a2a.SEND) for n, routing in enumerate((first, second))]
        with pytest.raises(AttributeError, match="only been sent, dispatch_recv receives it"):
            sent[0].tokens
        gc.collect()  # what was sent is read in RECV: it is kept until then
        filler = [np.full_like(X, -1) for _ in range(100)]
        for n, routing in reversed(list(enumerate((first, second)))):
            received = comm.dispatch_recv(routing, want=["tokens", "rank_counts"])
            assert received is sent[n] and np.from_dlpack(received.tokens)[:5].tolist() == (X + n).tolist()
            out = comm.combine(routing, np.from_dlpack(received.tokens) * 2, phase=a2a.SEND)
            gc.collect()
            filler.append(np.full_like(X, -2))
            assert comm.combine(routing, phase=a2a.RECV) is out and out.tolist() == ((X + n) * 2).tolist()
        assert not comm._kept
        with pytest.raises(a2a.InvalidArgumentError):
            comm.dispatch_recv(first)
        with pytest.raises(TypeError, match="results is None"):
            comm.combine(first)


def watched(values):
    """An array, and whether somebody keeps it."""
    array = np.array(values).view(type("Watched", (np.ndarray,), {}))
    return array, weakref.ref(array)


def test_what_is_read_in_recv_is_kept():
    with a2a.Comm(**ALONE, backend="flashinfer_nvlink_two_sided", num_slots=2) as comm:
        first, second = comm.routing(0), comm.routing(1)
        x, sent = watched(X)
        comm.dispatch(first, x, IDS, phase=a2a.SEND)
        y, both = watched(X + 1)
        del x
        with pytest.raises(a2a.OverflowError, match="has 2 rows"):  # nothing happened
            comm.dispatch_recv(first, out={"tokens": np.zeros((2, 8), np.float32)})
        comm.dispatch(second, y, IDS, want=["rank_counts"])  # peers may still read it while the other slot's RECV is to come
        del y
        gc.collect()
        assert sent() is not None and both() is not None
        received = comm.dispatch_recv(first, out={"tokens": np.zeros((6, 8), np.float32)})
        assert received.tokens.tolist()[:5] == X.tolist()
        gc.collect()
        assert sent() is None and both() is None and not comm._kept


def test_what_was_received_is_the_callers():
    with a2a.Comm(**ALONE, backend="flashinfer_nvlink_two_sided") as comm, comm.routing() as routing:
        rows, seen = watched(np.zeros((6, 8), np.float32))
        received = comm.dispatch(routing, X, IDS, out={"tokens": rows}, want=[])
        comm.combine(routing, rows * 1)
        del rows, received
        gc.collect()
        assert seen() is None


def test_overflowed_calls_and_overflowed_steps():
    with a2a.Comm(**ALONE, backend="deepep_high_throughput") as comm, comm.routing() as routing:
        received = comm.dispatch(routing, X, IDS)
        view = received.tokens
        with pytest.raises(a2a.OverflowError, match="has 2 rows") as refused:  # nothing happened: views are what they were
            comm.dispatch(routing, X, IDS, out={"tokens": np.zeros((2, 8), np.float32)})
        assert refused.value.ranks == () and view.tolist()[:5] == X.tolist() and comm.combine_buffer(routing).shape == view.shape
    with a2a.Comm(**ALONE, backend="deepep_high_throughput", max_recv_rows=3) as comm, comm.routing() as routing:
        for want in (["tokens"], None):
            with pytest.raises(a2a.OverflowError, match="max_recv_rows") as overflowed:
                comm.dispatch(routing, X, IDS, want=want)
            assert overflowed.value.ranks == (0,)
        with pytest.raises(a2a.OverflowError, match="has 1 rows") as refused:
            comm.dispatch(routing, X[:2], IDS[:2], out={"tokens": np.zeros((1, 8), np.float32)})
        assert refused.value.ranks == ()


class WithoutData:
    """As torch's tensors without elements are: their address is NULL."""

    def __init__(self, columns):
        self.shape, self.strides = (ctypes.c_int64 * 2)(0, columns), (ctypes.c_int64 * 2)(columns, 1)
        self.raw = a2a._abi.Tensor(
            device=a2a._abi.TensorDevice(1, 0), ndim=2, dtype=a2a._abi.TensorDtype(2, 32, 1), shape=self.shape, strides=self.strides,
        )

    def __dlpack_device__(self):
        return 1, 0

    def __dlpack__(self, *, stream=None, max_version=None):
        capsule = _dlpack.give(self.raw, self, 0)
        self.told = [managed for managed, keeper in _dlpack._given.values() if keeper is self][-1].tensor
        return capsule


def test_an_output_without_elements_stays_its_owners():
    with a2a.Comm(**ALONE, backend="allgather_reducescatter") as comm, comm.routing() as routing:
        rows = WithoutData(8)
        received = comm.dispatch(routing, X[:0], rank_tokens=[0], out={"tokens": rows}, want=[])
        assert not rows.told.data and ctypes.addressof(rows.told.shape.contents) == ctypes.addressof(rows.shape)
        assert received.tokens.shape == (0, 8)


def test_accumulate_and_weights():
    with a2a.Comm(**ALONE, backend="deepep_low_latency") as comm, comm.routing() as routing:
        received = comm.dispatch(routing, X, IDS, WEIGHTS)
        out = np.ones((5, 8), np.float32)
        same = comm.combine(routing, comm.combine_buffer(routing, "float32").copy_from(received.tokens), out, accumulate=True)
        chosen = (IDS >= 0).sum(axis=1, keepdims=True) * 0.5
        assert same is out and (out == 1 + X * chosen).all()
        received = comm.dispatch(routing, X, IDS, WEIGHTS)
        status = np.full(5, 77, np.int32)
        comm.combine(routing, received.tokens, out, accumulate=True, status=status, phase=a2a.SEND)
        assert comm.combine_recv(routing) is out and (out == 1 + 2 * X * chosen).all() and status[0] == 0
        with pytest.raises(TypeError, match="out is None"):
            comm.combine_recv(routing)
        received = comm.dispatch(routing, X, IDS, WEIGHTS)
        y = comm.combine(routing, received.tokens, weights=2 * WEIGHTS)
        assert (np.from_dlpack(y) == 2 * X * chosen).all()


# --------------------------------------------------------------------------------------------------------- views, lifetimes


def test_views_end(comm):
    routing = comm.routing()
    ends = {
        "combine": lambda: comm.combine(routing, np.zeros((6, 8), np.float32)),
        "dispatch": lambda: comm.dispatch(routing, X, IDS),
        "recovered": comm.recover,
        "closed": routing.close,
    }
    for word, end in ends.items():
        received = comm.dispatch(routing, X, IDS)
        tokens, late = received.tokens, received
        assert np.from_dlpack(tokens).shape == (6, 8)
        end()
        for use in (lambda: np.from_dlpack(tokens), tokens.tolist, tokens.memoryview, lambda: late.rank_counts,
                    lambda: a2a.as_tensor(tokens), lambda: tokens.view("int32").tobytes()):
            with pytest.raises(BufferError, match=f"this view has ended.*{word}"):
                use()
        assert tokens.shape == (6, 8)  # what it was is still known


def test_a_refused_call_ends_nothing(comm):
    routing = comm.routing()
    tokens = comm.dispatch(routing, X, IDS).tokens
    with pytest.raises(a2a.InvalidArgumentError):
        comm.dispatch(routing, X.T, IDS)
    assert (np.from_dlpack(tokens)[:5] == X).all()


def windows():
    return Path("/proc/self/maps").read_text().count("a2a-window")


@pytest.mark.parametrize("take", [np.from_dlpack, a2a.Tensor.memoryview])
@pytest.mark.parametrize("order", ["close", "collect"])
def test_memory_that_somebody_looks_at_stays(take, order):
    gc.collect()
    before = windows()
    comm = a2a.Comm(ALONE_CONFIG)
    routing = comm.routing()
    received = comm.dispatch(routing, X, IDS)
    taken = [take(received.tokens), take(received.rank_counts)]
    assert windows() > before
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        if order == "close":
            comm.close(), routing.close()
        del comm, routing, received
        gc.collect()
    assert windows() > before
    assert np.asarray(taken[0])[:5].tolist() == X.tolist() and np.asarray(taken[1]).tolist() == [5]
    taken.pop(0)
    _dlpack.sweep()
    gc.collect()
    assert windows() > before
    taken.pop()
    gc.collect()
    assert windows() == before


def test_a_comm_that_is_never_closed_says_so():
    with pytest.warns(ResourceWarning, match="the comm of rank 0 was never closed"):
        a2a.Comm(ALONE_CONFIG)
        gc.collect()


def test_closed_objects(comm):
    routing, other = comm.routing(), comm.routing()
    routing.close(), routing.close()
    with pytest.raises(ValueError, match="the routing of slot 0 is closed"):
        comm.dispatch(routing, X, IDS)
    comm.close(), comm.close()
    assert repr(comm) == "a2a.Comm(closed)"
    for call in (lambda: comm.dispatch(other, X, IDS), comm.stats, comm.abort, comm.routing):
        with pytest.raises(ValueError, match="the comm of rank 0 is closed"):
            call()
    other.close()  # after its comm


def leave_with_views(rank, group):
    """Rank 1 closes its comm while an array still looks into it: rank 0 must learn of it all the same."""
    comm = a2a.Comm(**(ALONE | dict(rank=rank, num_ranks=2)), unique_id=group, timeout_ms=60000, first_step_timeout_ms=60000)
    routing = comm.routing()
    received = comm.dispatch(routing, X, IDS)
    rows = np.from_dlpack(received.tokens)
    begun = time.monotonic()
    if rank == 0:
        with pytest.raises(a2a.PeerLostError, match="rank 1") as failure:
            comm.combine(routing, np.zeros(rows.shape, np.float32))
        assert failure.value.ranks == (1,) and failure.value.name == "A2A_PEER_LOST"
        error = comm.async_error()
        assert (error.status, error.operation, error.lost_ranks) == (a2a.Status.PEER_LOST, 2, (1,))
        assert isinstance(failure.value, a2a.StepError)
        with pytest.raises(BufferError, match="has ended"):
            received.tokens.tolist()
    comm.close()
    assert rows.reshape(-1, 8)[0].tolist() == X[0].tolist()
    return time.monotonic() - begun


def test_peers_learn_of_a_close_that_waits_for_a_view(threads):
    assert max(ranks.together(threads, 2, leave_with_views)) < 20


def test_survivors_go_on(threads):
    def run(rank, group):
        with a2a.Comm(**(ALONE | dict(rank=rank, num_ranks=3)), unique_id=group) as comm, comm.routing() as routing:
            comm.combine(routing, comm.dispatch(routing, X, IDS).tokens)
            if rank == 2:
                return None
            with pytest.raises(a2a.PeerLostError):
                comm.dispatch(routing, X, IDS)
            told = comm.recover()
            assert told.generation == 2 and told.members == (0, 1) and comm.rank_mask() == (True, True, False)
            received = comm.dispatch(routing, X, IDS, WEIGHTS)
            status = received.status.tolist()
            comm.combine(routing, received.tokens)
            return status[:2], told.whole_steps

    first, second, _ = ranks.together(threads, 3, run)
    assert first == second == ([a2a.StepFlag.BAD_ID, 2], (1,))  # two ids of expert 3, which rank 2 owned


def test_a_second_thread_is_told_so_and_abort_ends_the_first(threads):
    inside, outcome = threading.Event(), []

    def run(rank, group):
        with a2a.Comm(**(ALONE | dict(rank=rank, num_ranks=2)), unique_id=group) as comm, comm.routing() as routing:
            if rank == 1:
                assert inside.wait(60)
                return

            def wait():
                with pytest.raises(a2a.AbortedError):
                    comm.dispatch(routing, X, IDS)
                outcome.append("aborted")

            thread = threading.Thread(target=wait)
            thread.start()
            while not comm.history()["operations"]:
                time.sleep(0.001)
            with pytest.raises(a2a.BusyError):
                comm.routing()
            comm.abort()
            thread.join()
            inside.set()

    ranks.together(threads, 2, run)
    assert outcome == ["aborted"]


def test_timeouts_can_be_changed(threads):
    done = threading.Event()

    def run(rank, group):
        with a2a.Comm(**(ALONE | dict(rank=rank, num_ranks=2)), unique_id=group) as comm, comm.routing() as routing:
            if rank == 0:
                comm.set_timeout(first_step_timeout_ms=100)
                with pytest.raises(a2a.TimeoutError, match="rank 1") as failure:
                    comm.dispatch(routing, X, IDS)
                assert failure.value.ranks == (1,)
                done.set()
            assert done.wait(60)

    ranks.together(threads, 2, run)


# ------------------------------------------------------------------------------------------------------------- the process


def test_needs_nothing_but_python():
    code = "import sys; sys.path = [p for p in sys.path if 'site-packages' not in p]; import a2a, runpy; " \
           f"runpy.run_path({str(ROOT / 'examples/python/quickstart.py')!r}); " \
           "assert not {'numpy', 'torch', 'cupy', 'jax'} & set(sys.modules)"
    done = python(code)
    assert done.returncode == 0 and done.stdout.startswith("PASS"), done.stderr


def test_imports_without_a_library():
    done = python("import a2a; a2a.Config(rank=1); a2a.empty(3, 'float32')\n"
                  "try: a2a.version()\nexcept a2a.LibraryNotFoundError as error: print(error)", A2A_LIBRARY="/nowhere/liba2a.so")
    assert done.returncode == 0 and "A2A_LIBRARY is '/nowhere/liba2a.so', which cannot be loaded" in done.stdout, done.stderr


def test_where_the_library_is_found(tmp_path):
    """Away from the build tree: nowhere, then by the loader's path, then inside the package. A2A_LIBRARY comes before all."""
    shutil.copytree(ROOT / "examples/python/a2a", tmp_path / "package/a2a", ignore=shutil.ignore_patterns("__pycache__"))
    library = os.environ.get("A2A_LIBRARY") or ROOT / "target/release/liba2a.so"

    def found(**environment):
        code = "import a2a\ntry:\n    a2a.version(); print([l.split()[-1] for l in open('/proc/self/maps') if 'liba2a' in l][0])\n" \
               "except ImportError as error: print(error)"
        done = python(code, **(dict(PYTHONPATH=str(tmp_path / "package"), A2A_LIBRARY="") | environment))
        return done.stdout.strip() or done.stderr

    def copied(place):
        place.parent.mkdir(exist_ok=True)
        return str(shutil.copy(library, place))

    for words in ("set A2A_LIBRARY to its path", "liba2a.so.0: no such file", "target/release/liba2a.so: no such file"):
        assert words in found()
    in_path = copied(tmp_path / "lib/liba2a.so.0")
    assert found(LD_LIBRARY_PATH=str(tmp_path / "lib")) == in_path
    inside = copied(tmp_path / "package/a2a/liba2a.so.0")
    assert found(LD_LIBRARY_PATH=str(tmp_path / "lib")) == inside
    assert found(A2A_LIBRARY=in_path) == in_path


def test_a_library_that_is_another_is_refused():
    libc = next(line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "libc.so" in line)
    done = python("import a2a\ntry: a2a.version()\nexcept ImportError as error: print(error)", A2A_LIBRARY=libc)
    assert "has no a2a_get_unique_id: it is not the liba2a that this package is for" in done.stdout, done.stderr


def test_views_outlive_the_interpreter():
    """Arrays that are globals are let go while it shuts down, after modules: what they call must be there."""
    code = "import a2a, numpy as np, warnings; warnings.simplefilter('ignore')\n" \
           f"comm = a2a.Comm(**{ALONE!r}); routing = comm.routing()\n" \
           "x, ids = np.ones((5, 8), np.float32), np.zeros((5, 2), np.int32)\n" \
           "received = comm.dispatch(routing, x, ids); tokens = np.from_dlpack(received.tokens)\n" \
           "view, mine = received.rank_counts.memoryview(), np.from_dlpack(a2a.empty(5, 'float32'))\n" \
           "capsule = received.tokens.__dlpack__()"
    done = python(code)
    assert done.returncode == 0 and done.stderr == "", done.stderr


def test_log_lines_go_to_a_function():
    code = "import a2a\nlines = []\na2a.set_log_callback(lambda level, line: lines.append((level, line)))\n" \
           f"a2a.Comm(**{ALONE!r}).close()\nn = len(lines)\nassert n and lines[0][0] == a2a.LogLevel.INFO, lines\n" \
           f"a2a.set_log_callback(None)\na2a.Comm(**{ALONE!r}).close()\nassert len(lines) == n\n" \
           "a2a.set_log_callback(lambda level, line: 1)"
    done = python(code)
    assert done.returncode == 0 and done.stderr == "", done.stderr
