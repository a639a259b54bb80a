"""Steps on CUDA memory with torch, CuPy and JAX: on whose stream, in which order with other streams, inside a graph.

    A2A_LIBRARY=... python -m pytest tests/python/test_cuda.py
"""

import threading

import a2a
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed: CUDA memory has not been tried")
if not torch.cuda.is_available():
    pytest.skip("there is no GPU: CUDA memory has not been tried", allow_module_level=True)
if a2a.explain(device="cuda", num_ranks=1, num_experts=4, max_topk=2, max_hidden=8, max_tokens=5)["status"] != "ok":
    pytest.skip("this build has no device code: CUDA memory has not been tried", allow_module_level=True)

HIDDEN, TOKENS, LONG = 512, 5, 200_000_000  # LONG: cycles, a tenth of a second
SHAPE = dict(
    device="cuda", num_experts=4, max_topk=2, max_hidden=HIDDEN, max_tokens=TOKENS, token_dtype="float32",
    backend="deepep_low_latency", setup_timeout_ms=20000, first_step_timeout_ms=20000, timeout_ms=20000,
)
IDS = [[0, 3], [1, 2], [2, -1], [3, 0], [1, 2]]


def inputs(rank=0):
    x = torch.arange(TOKENS * HIDDEN, dtype=torch.float32, device="cuda").reshape(TOKENS, HIDDEN) + rank
    ids = torch.tensor(IDS, dtype=torch.int64, device="cuda")
    return x, ids, torch.full((TOKENS, 2), 0.5, device="cuda"), x * ((ids >= 0).sum(1, keepdim=True) * 0.5)


@pytest.fixture
def alone():
    with a2a.Comm(**SHAPE, num_ranks=1) as comm, comm.routing() as routing:
        yield comm, routing
        torch.cuda.synchronize()


def rows_of(received):
    """Which token stands in each row: [L, R * M]."""
    return torch.from_dlpack(received.row_source)[..., 1].long()


def test_the_current_stream(alone):
    comm, routing = alone
    x, ids, weights, wanted = inputs()
    late, out = torch.zeros_like(x), torch.full_like(x, -1)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        mine = torch.cuda.current_stream()
        torch.cuda._sleep(LONG)
        late.copy_(x)  # what is dispatched is there only on this stream
        received = comm.dispatch(routing, late, ids, weights)
        assert received.tokens.device == (2, torch.cuda.current_device()) and received.tokens.stream == mine.cuda_stream
        results = comm.combine_buffer(routing)
        torch.from_dlpack(results).copy_(torch.from_dlpack(received.tokens))
        assert comm.combine(routing, results, out) is out
        assert not mine.query()  # nobody has waited for it
        mine.synchronize()
    assert torch.equal(out, wanted)


def test_a_view_on_another_stream(alone):
    comm, routing = alone
    x, ids, weights, _ = inputs()
    late, mine, other = torch.zeros_like(x), torch.cuda.Stream(), torch.cuda.Stream()
    seen = torch.zeros(4, TOKENS, HIDDEN, device="cuda")
    comm.dispatch(routing, x * 0, ids)  # what the other stream must not see
    torch.cuda.synchronize()
    with torch.cuda.stream(mine):
        torch.cuda._sleep(LONG)
        late.copy_(x)
        received = comm.dispatch(routing, late, ids, weights)
    with torch.cuda.stream(other):
        seen.copy_(torch.from_dlpack(received.tokens))
        other.synchronize()
    source = rows_of(received)
    assert torch.equal(seen[source >= 0], x[source[source >= 0]])


@pytest.mark.parametrize("kind", ["torch", "handle", "cupy", "protocol"])
def test_a_stream_that_is_named(alone, kind):
    comm, routing = alone
    x, ids, weights, wanted = inputs()
    named = torch.cuda.Stream()
    if kind == "cupy":
        stream = pytest.importorskip("cupy", reason="CuPy is not installed").cuda.ExternalStream(named.cuda_stream)
    else:
        protocol = type("Stream", (), {"__cuda_stream__": lambda self: (0, named.cuda_stream)})
        stream = {"torch": named, "handle": named.cuda_stream, "protocol": protocol()}[kind]
    late, out = torch.zeros_like(x), torch.full_like(x, -1)
    torch.cuda.synchronize()
    torch.cuda._sleep(LONG)
    late.copy_(x)  # on the default stream: the named one has to wait for it
    received = comm.dispatch(routing, late, ids, weights, stream=stream)
    assert received.tokens.stream == named.cuda_stream
    comm.combine(routing, received.tokens, out, stream=stream)
    named.synchronize()
    assert torch.equal(out, wanted)


def test_halves_go_to_the_stream_of_send(alone):
    comm, routing = alone
    x, ids, weights, wanted = inputs()
    out, mine = torch.full_like(x, -1), torch.cuda.Stream()
    torch.cuda.synchronize()
    comm.dispatch(routing, x, ids, weights, phase=a2a.SEND, stream=mine)
    received = comm.dispatch_recv(routing)
    assert received.tokens.stream == mine.cuda_stream
    comm.combine(routing, received.tokens, out, phase=a2a.SEND, stream=mine)
    comm.combine_recv(routing)
    mine.synchronize()
    assert torch.equal(out, wanted)


def test_a_graph(alone):
    comm, routing = alone
    x, ids, weights, wanted = inputs()
    sent, out = torch.zeros_like(x), torch.full_like(x, -1)

    def step():
        received = comm.dispatch(routing, sent, ids, weights)
        results = comm.combine_buffer(routing)
        torch.from_dlpack(results).copy_(torch.from_dlpack(received.tokens))
        comm.combine(routing, results, out)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        step()
    for factor in (1, 2, 3):
        sent.copy_(x * factor)
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(out, wanted * factor)


@pytest.mark.parametrize("backend", ["deepep_low_latency", "flashinfer_nvlink_two_sided", "flashinfer_nvlink_one_sided"])
def test_ranks_that_share_the_gpu(backend):
    group, outcome = a2a.UniqueId.create(), [None, None]
    meet = threading.Barrier(2)
    by_rank = backend != "deepep_low_latency"

    def run(rank):
        x, ids, weights, wanted = inputs(rank)
        out = torch.full_like(x, -1)
        rows = {}
        config = SHAPE | dict(backend=backend, rank=rank, num_ranks=2, ranks_per_device=2)
        with a2a.Comm(**config, unique_id=group) as comm, comm.routing() as routing, torch.cuda.stream(torch.cuda.Stream()):
            if comm.info.backend == a2a.Backend.NVLINK_TWO_SIDED:
                with pytest.raises(a2a.InvalidArgumentError, match="it needs a tensor of the caller's"):
                    comm.dispatch(routing, x, ids, weights, want=["tokens"])
                rows = dict(tokens=torch.empty(2 * TOKENS, HIDDEN, device="cuda"))
            torch.cuda.synchronize()
            meet.wait(20)
            for _ in range(3):
                received = comm.dispatch(routing, x, ids, weights, out=rows, want=["rank_counts"] if rows else None)
                comm.combine(routing, received.tokens, out)
            torch.cuda.current_stream().synchronize()
            meet.wait(20)
            # Experts that give back what they get: a row for each expert, weighted, or for each rank.
            owners = torch.where(ids >= 0, ids // 2, ids)
            ranks = (owners[:, :1] >= 0).float() + ((owners[:, 1:] >= 0) & (owners[:, 1:] != owners[:, :1])).float()
            outcome[rank] = torch.equal(out, x * ranks if by_rank else wanted)
            meet.wait(20)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert outcome == [True, True]


@pytest.mark.parametrize("framework", ["cupy", "jax.numpy"])
def test_other_frameworks(alone, framework, monkeypatch):
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    xp = pytest.importorskip(framework, reason=f"{framework} is not installed")
    comm, routing = alone
    x = xp.arange(TOKENS * HIDDEN, dtype="float32").reshape(TOKENS, HIDDEN)
    received = comm.dispatch(routing, x, xp.asarray(IDS, dtype="int32"), xp.full((TOKENS, 2), 0.5, dtype="float32"))
    source, rows = xp.from_dlpack(received.row_source)[..., 1], xp.from_dlpack(received.tokens)
    assert bool((rows[source >= 0] == x[source[source >= 0]]).all())


def test_what_is_not_there_on_cuda(alone):
    comm, routing = alone
    x, ids, weights, _ = inputs()
    received = comm.dispatch(routing, x, ids, weights)
    with pytest.raises(TypeError, match="out is None: combine needs a tensor"):
        comm.combine(routing, received.tokens)
    for use in (received.tokens.tolist, received.status.memoryview, received.tokens.copy):
        with pytest.raises(BufferError, match="is not in the host's memory"):
            use()
    with pytest.raises(BufferError, match="not copied here"):
        received.tokens.__dlpack__(copy=True)
    with pytest.raises(ValueError, match="stream is 0"):
        received.tokens.__dlpack__(stream=0)
    with pytest.raises(a2a.InvalidArgumentError, match="lies on DLPack device type 1"):
        comm.dispatch(routing, x.cpu(), ids, weights)
