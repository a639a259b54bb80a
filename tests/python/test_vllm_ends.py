"""How managers end what they made, and whose tensors they take.

A comm that is destroyed while its last combine is still under way on a stream aborts it.
"""

import sys
from types import SimpleNamespace

import a2a
import a2a_vllm
import numpy as np
import pytest
from a2a_vllm import arrays, comms, groups
from a2a_vllm.engine import Group


class Framework:
    """As much of torch or CuPy as waits for a device. It records whom it has waited for."""

    def __init__(self, calls, used=True, failure=None):
        def wait(ordinal):
            calls.append(f"waited for {ordinal}")
            if failure is not None:
                raise failure

        self.cuda = SimpleNamespace(is_initialized=lambda: used, synchronize=wait,
                                    Device=lambda ordinal: SimpleNamespace(synchronize=lambda: wait(ordinal)))


def wire_on(calls, device):
    info = SimpleNamespace(rank=1, num_slots=2, device=device, device_ordinal=3)
    return comms.Wire(SimpleNamespace(info=info, routing=lambda slot: None, close=lambda: calls.append("closed")))


@pytest.mark.parametrize("modules, waits", [
    (dict(torch=True, cupy=None), True), (dict(torch=False, cupy=True), True), (dict(torch=None, cupy=True), True),
    (dict(torch=None, cupy=None), False),
])
def test_a_comm_ends_after_this_ranks_work(monkeypatch, modules, waits):
    calls = []
    for name, used in modules.items():
        monkeypatch.setitem(sys.modules, name, None if used is None else Framework(calls, used))
    wire = wire_on(calls, a2a.Device.CUDA)
    wire.close()
    wire.close()
    assert calls == (["waited for 3"] if waits else []) + ["closed"]


def test_nothing_is_waited_for_on_the_cpu(monkeypatch):
    calls = []
    monkeypatch.setitem(sys.modules, "torch", Framework(calls))
    wire_on(calls, a2a.Device.CPU).close()
    assert calls == ["closed"]


def test_a_device_that_has_failed_keeps_no_comm(monkeypatch, caplog):
    calls = []
    monkeypatch.setitem(sys.modules, "torch", Framework(calls, failure=RuntimeError("an illegal address")))
    wire_on(calls, a2a.Device.CUDA).close()
    assert calls == ["waited for 3", "closed"] and "rank 1: a comm is closed on a device that has failed: an illegal address" in caplog.text


def test_subclasses_are_their_librarys():
    class Own(np.ndarray):
        pass

    assert arrays.of(np.zeros(3).view(Own)) is arrays.of(np.zeros(3))
    with pytest.raises(TypeError, match="a tensor of builtins.list: it takes torch's, numpy's and CuPy's"):
        arrays.of([1])


@pytest.fixture
def one_sided(monkeypatch):
    """A manager of one rank, and what happened to it in which order."""
    calls = []
    monkeypatch.setattr(arrays, "synchronize", lambda *device: calls.append("waited"))
    real = groups.gather
    monkeypatch.setattr(groups, "gather", lambda group, value: calls.append(value) or real(group, value))
    a2a_vllm.use(a2a_vllm.Engine(Group(0, 1), max_num_batched_tokens=16))

    class Alone:
        rank, size = (lambda self: 0), (lambda self: 1)

        def all_gather_object(self, value):
            return [value]

    made = a2a_vllm.FlashInferNVLinkOneSidedManager(Alone())
    made.initialize(8, 2, 4, 64)
    calls.clear()
    yield made, calls
    made.destroy()
    a2a_vllm.use(None)


def test_growth_waits_before_it_says_so(one_sided):
    manager, calls = one_sided
    manager.initialize(16, 2, 4, 64)
    assert calls[:3] == ["waited", "grow", "waited"]
