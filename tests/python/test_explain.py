"""a2a_explain gives JSON that names what was chosen, and why the rest was not."""

import ctypes
import json

import a2a_ctypes as a2a
import pytest


def explain(lib, **fields):
    config = a2a.Config(**dict(num_ranks=8, num_experts=64, max_topk=8, max_hidden=256, max_tokens=128) | fields)
    needed = ctypes.c_size_t()
    lib.a2a_explain(config, None, 0, needed)
    text = ctypes.create_string_buffer(needed.value)
    lib.a2a_explain(config, text, needed, None)
    return json.loads(text.value), text.value.decode()


@pytest.mark.parametrize(
    "name", ["auto", "allgather_reducescatter", "flashinfer_nvlink_one_sided", "deepep_low_latency",
             "deepep_high_throughput", "flashinfer_nvlink_two_sided", "nixl_ep"],
)
def test_every_backend_is_explained(lib, name):
    explained, text = explain(lib, backend=lib.a2a_backend_from_name(name.encode()))
    assert isinstance(explained, dict)
    built = name in ("auto", "allgather_reducescatter", "flashinfer_nvlink_one_sided")
    memory = a2a.Memory()
    config = a2a.Config(num_ranks=8, num_experts=64, max_topk=8, max_hidden=256, max_tokens=128,
                        backend=lib.a2a_backend_from_name(name.encode()))
    if built:
        lib.a2a_query_memory(config, memory)
        assert str(memory.total_bytes) in text
    else:
        assert "not in this build" in text
        with pytest.raises(a2a.Error, match="not in this build") as refusal:
            lib.a2a_query_memory(config, memory)
        assert refusal.value.status == a2a.UNSUPPORTED


def test_the_same_config_is_explained_alike(lib):
    assert explain(lib) == explain(lib)
