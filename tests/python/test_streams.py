"""Which CUDA stream a call is given, and who waits for whom, without a GPU: the frameworks, the driver and the library are ours.

tests/python/test_cuda.py asks real ones.
"""

import ctypes
import sys
import types

import a2a
import pytest
from a2a import _cuda, _dlpack

import ranks

CUDA = (2, 0)


class Array:
    """Memory of the host that says it is a GPU's; of a framework by its class's module."""

    def __init__(self, *values):
        self.host = a2a.from_list(list(values) if len(values) > 1 else values[0], "float32")
        self.host._raw.device.device_type = 2
        self.asked = []

    def __dlpack_device__(self):
        return CUDA

    def __dlpack__(self, *, stream=None, max_version=None):
        self.asked.append(stream)
        return _dlpack.give(self.host._raw, self.host, 0 if max_version else None)


def framework(monkeypatch, name, cuda):
    """Puts a module of a name in place, as if it had been imported, and gives its class of arrays."""
    monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules[name].cuda = cuda
    return type("Tensor", (Array,), {"__module__": f"{name}.inner"})


@pytest.fixture
def torch(monkeypatch):
    streams = types.SimpleNamespace(at=0x70)
    cuda = types.SimpleNamespace(current_stream=lambda ordinal: types.SimpleNamespace(cuda_stream=streams.at + ordinal))
    return types.SimpleNamespace(Tensor=framework(monkeypatch, "torch", cuda), streams=streams)


@pytest.fixture
def waits(monkeypatch):
    """(stream, the stream that waits for it, device), for each time that the driver is asked for it."""
    seen, recorded = [], {}

    class Driver:
        def __getattr__(self, name):
            return lambda *arguments: 0

        def cuDevicePrimaryCtxRetain(self, context, ordinal):
            recorded["device"] = ordinal.value
            return 0

        def cuEventRecord(self, event, stream):
            recorded["stream"] = stream.value or 0
            return recorded.pop("failure", 0)

        def cuStreamWaitEvent(self, stream, event, flags):
            seen.append((recorded["stream"], stream.value or 0, recorded["device"]))
            return 0

    monkeypatch.setattr(_cuda, "_driver", Driver)
    seen_and_fail = types.SimpleNamespace(seen=seen, fail=lambda: recorded.update(failure=700))
    return seen_and_fail


@pytest.mark.parametrize("stream", [
    5, types.SimpleNamespace(cuda_stream=5), types.SimpleNamespace(ptr=5),
    type("Method", (), {"__cuda_stream__": lambda self: (0, 5)})(), type("Field", (), {"__cuda_stream__": (0, 5)})(),
])
def test_what_a_stream_is_called(stream):
    assert _cuda.number(stream) == 5


def test_what_is_no_stream():
    with pytest.raises(TypeError, match="stream is a str: it must be a handle as a number, or have .cuda_stream"):
        _cuda.number("5")


def test_whose_stream_is_current(monkeypatch, torch):
    cupy = framework(monkeypatch, "cupy", types.SimpleNamespace(get_current_stream=lambda: types.SimpleNamespace(ptr=0x60)))
    assert _cuda.current(_cuda.framework_of(torch.Tensor(1)), 1) == 0x71
    assert _cuda.current(_cuda.framework_of(a2a.as_tensor(torch.Tensor(1))), 1) == 0x71
    assert _cuda.current(_cuda.framework_of(cupy(1)), 1) == 0x60
    derived = type("Parameter", (torch.Tensor,), {"__module__": "engine.layers"})
    assert _cuda.framework_of(derived(1)) == "torch"
    other = type("Tensor", (Array,), {"__module__": "another.inner"})
    assert _cuda.current(_cuda.framework_of(other(1)), 0) is None and "another" not in sys.modules


def test_one_stream_waits_for_another(waits):
    _cuda.order(3, 4, 1)
    assert waits.seen == [(3, 4, 1)]
    for same in [(3, 3), (0, 1), (1, 0), (0, 0)]:  # 0 and 1 are the legacy default stream
        _cuda.order(*same, 0)
    assert len(waits.seen) == 1
    waits.fail()
    with pytest.raises(RuntimeError, match="cuEventRecord failed: CUDA error 700"):
        _cuda.order(3, 4, 0)


def test_a_producer_is_told_who_uses_its_memory(torch):
    array = torch.Tensor(1, 2)
    tensor = a2a.as_tensor(array)
    assert (tensor.device, tensor.stream, array.asked) == (CUDA, 0x70, [0x70])
    assert a2a.as_tensor(array, stream=9).stream == 9 and array.asked[1:] == [9]
    torch.streams.at = 0
    a2a.as_tensor(array)
    assert array.asked[2:] == [1]  # 0 is no stream in DLPack


def test_a_consumer_waits(torch, waits):
    tensor = a2a.as_tensor(torch.Tensor(1, 2), stream=9)
    for stream in (9, -1):
        tensor.__dlpack__(stream=stream)
    assert waits.seen == []
    for stream, number in [(None, 1), (1, 1), (8, 8)]:
        tensor.__dlpack__(stream=stream)
        assert waits.seen.pop() == (9, number, 0)
    assert a2a.as_tensor(tensor, stream=7) is tensor and waits.seen.pop() == (9, 7, 0)
    for wrong in (0, -2):
        with pytest.raises(ValueError, match=f"stream is {wrong}"):
            tensor.__dlpack__(stream=wrong)
    with pytest.raises(BufferError, match="not copied here"):
        tensor.__dlpack__(stream=9, copy=True)
    with pytest.raises(BufferError, match="not in the host's memory"):
        tensor.tolist()


class Library:
    """liba2a as far as a step on CUDA memory asks for it: keeps the streams of calls."""

    def __init__(self):
        self.streams = []

    def __getattr__(self, name):
        return lambda *arguments: 0

    def a2a_get_info(self, comm, info):
        info.device, info.num_ranks, info.max_tokens = a2a.Device.CUDA, 1, 2
        info.layout, info.backend = a2a.Layout.FLAT, a2a.Backend.HIGH_THROUGHPUT

    def a2a_dispatch(self, comm, routing, given, out, stream):
        self.streams.append(stream)
        if out is not None:
            tokens = out.tokens.contents
            tokens.data, tokens.device.device_type, tokens.ndim = 64, 2, 2
            tokens.shape, tokens.strides = (ctypes.c_int64 * 2)(2, 4), (ctypes.c_int64 * 2)(4, 1)

    def a2a_combine(self, comm, routing, given, out, stream):
        self.streams.append(stream)


def test_the_streams_of_calls(monkeypatch, torch, waits):
    fake = Library()
    monkeypatch.setattr("a2a.comm.library", lambda: fake)
    with a2a.Comm(ranks.config_of(0, 1, bytes(128), "auto", 2, "float32", device="cuda")) as comm, comm.routing() as routing:
        x, out = torch.Tensor([[1.0] * 4] * 2), torch.Tensor([[0.0] * 4] * 2)

        def streams(call):
            fake.streams.clear()
            result = call()
            return result, fake.streams

        received, used = streams(lambda: comm.dispatch(routing, x, want=["tokens"]))
        assert used == [0x70] and x.asked == [0x70] and received.tokens.stream == 0x70
        assert streams(lambda: comm.combine(routing, x, out)) == (out, [0x70])
        assert waits.seen == []
        # A view is used with the framework that the tokens are of: its current stream counts, and comes after the dispatch's.
        received, _ = streams(lambda: comm.dispatch(routing, x, want=["tokens"]))
        torch.streams.at = 0x80
        assert streams(lambda: comm.combine(routing, received.tokens, out))[1] == [0x80]
        assert set(waits.seen) == {(0x70, 0x80, 0)}
        assert streams(lambda: comm.combine(routing, x, out, stream=types.SimpleNamespace(ptr=5)))[1] == [5]

        # RECV goes where SEND was sent by name, and else where the framework is by then, after SEND.
        received, used = streams(lambda: comm.dispatch(routing, x, phase=a2a.SEND, stream=7, want=["tokens"]))
        assert used == [7] and x.asked[-1] == 7
        assert streams(lambda: comm.dispatch_recv(routing))[1] == [7] and received.tokens.stream == 7
        assert streams(lambda: comm.combine(routing, received.tokens, out, phase=a2a.SEND, stream=7))[1] == [7]
        assert streams(lambda: comm.combine_recv(routing))[1] == [7] and out.asked[-1] == 7
        comm.dispatch(routing, x, phase=a2a.SEND)
        torch.streams.at = 0x90
        waits.seen.clear()
        assert streams(lambda: comm.dispatch_recv(routing, want=["tokens"]))[1] == [0x90]
        assert waits.seen == [(0x80, 0x90, 0)]
        with pytest.raises(TypeError, match="out is None: combine needs a tensor"):
            comm.combine(routing, x)
