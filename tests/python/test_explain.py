"""explain names what was chosen, and why the rest was not."""

import a2a
import pytest

from conftest import python

SHAPE = dict(num_ranks=8, num_experts=64, max_topk=8, max_hidden=256, max_tokens=128)
# The names of the constants, in lower case.
OFFERS = {
    "allgather_reducescatter": ["gathered"],
    "high_throughput": ["flat", "expert_contiguous"],
    "low_latency": ["expert_padded"],
    "nvlink_one_sided": ["rank_major"],
    "nvlink_two_sided": ["flat"],
    "nixl_elastic": ["expert_padded"],
}
BUILT = [name for name in OFFERS if name != "nixl_elastic"]


def explain(**fields):
    return a2a.explain(**(SHAPE | fields))


def memory(**fields):
    return a2a.query_memory(**(SHAPE | fields))


def entry(explained, name):
    return next(entry for entry in explained["backends"] if entry["name"] == name)


def chosen(explained):
    return [entry["name"] for entry in explained["backends"] if entry["chosen"]]


@pytest.mark.parametrize("name", ["auto", *BUILT])
def test_what_is_chosen(name):
    explained = explain(backend=name)
    assert explained["status"] == "ok" and explained["why"]
    assert name in ("auto", explained["backend"])
    assert explained["layout"] == OFFERS[explained["backend"]][0]
    assert explained["transport"] == "window"
    assert chosen(explained) == [explained["backend"]]
    assert {entry["name"]: entry["layouts"] for entry in explained["backends"]} == OFFERS
    assert all(entry["why"] for entry in explained["backends"])
    need = memory(backend=name)
    assert {field: explained["memory"][field] for field, _ in need} == dict(need)
    assert explained["limits"]["max_tokens"] == 128 and explained["limits"]["max_topk"] == 8


def test_what_this_machine_cannot_load():
    # In a process of its own: a library that could not be opened stays so.
    code = f"import a2a; shape = dict({SHAPE}, backend='nixl_ep'); explained = a2a.explain(**shape)\n" \
           "print(explained['status'], explained['why'], [entry['name'] for entry in explained['backends'] if entry['chosen']])\n" \
           "try: a2a.query_memory(**shape)\nexcept a2a.UnsupportedError as error: print(error)"
    done = python(code, A2A_NIXL_LIB="/nowhere/libnixl_capi.so")
    explained, refused = done.stdout.splitlines()
    assert explained.startswith("refused ") and "/nowhere/libnixl_capi.so" in explained and explained.endswith(" []")
    assert refused.startswith("A2A_UNSUPPORTED: ") and "/nowhere/libnixl_capi.so" in refused


@pytest.mark.parametrize("layout, name", [
    ("gathered", "allgather_reducescatter"), ("rank_major", "nvlink_one_sided"), ("flat", "high_throughput"),
    ("expert_padded", "low_latency"), ("expert_contiguous", "high_throughput"),
])
def test_auto_chooses_by_layout(layout, name):
    explained = explain(layout=layout)
    assert (explained["status"], explained["backend"], explained["layout"]) == ("ok", name, layout)
    assert chosen(explained) == [name]
    for other in BUILT:
        fields = dict(layout=layout, backend=other)
        if layout in OFFERS[other]:
            assert entry(explained, other)["window_bytes"] == memory(**fields).window_bytes
        else:
            assert layout in entry(explained, other)["why"]
            # Asked for, it is refused with the layouts that it has.
            refused = explain(**fields)
            assert refused["status"] == "refused" and chosen(refused) == []
            for word in (other, layout, *OFFERS[other]):
                assert word in refused["why"]
            with pytest.raises(a2a.UnsupportedError, match=layout):
                memory(**fields)


def test_auto_takes_what_the_memory_allows():
    fields = dict(layout=a2a.Layout.FLAT, max_tokens=8192)
    ample = memory(backend=a2a.Backend.HIGH_THROUGHPUT, **fields)
    small = memory(backend=a2a.Backend.NVLINK_TWO_SIDED, **fields)
    assert small.total_bytes < ample.total_bytes

    explained = explain(memory_limit=ample.total_bytes, **fields)
    assert explained["backend"] == "high_throughput"
    for limit in (ample.total_bytes - 1, small.total_bytes):
        explained = explain(memory_limit=limit, **fields)
        assert (explained["status"], explained["backend"]) == ("ok", "nvlink_two_sided")
        assert explained["memory"]["total_bytes"] == small.total_bytes
        assert explained["memory"]["memory_limit"] == limit
        assert chosen(explained) == ["nvlink_two_sided"]
        # It says why the first choice was not taken.
        assert "memory_limit" in entry(explained, "high_throughput")["why"]
        assert entry(explained, "high_throughput")["window_bytes"] == ample.window_bytes

    explained = explain(memory_limit=small.total_bytes - 1, **fields)
    assert explained["status"] == "refused" and "memory_limit" in explained["why"]
    assert chosen(explained) == []


def test_two_sided_windows_do_not_depend_on_tokens():
    fields = dict(backend=a2a.Backend.NVLINK_TWO_SIDED)
    few, many = (memory(max_tokens=tokens, **fields) for tokens in (8, 8192))
    assert few.window_bytes == many.window_bytes
    two, four = (memory(fifo_rows=rows, **fields) for rows in (2, 4))
    assert two.window_bytes < four.window_bytes


def test_the_same_config_is_explained_alike():
    assert explain() == explain()
