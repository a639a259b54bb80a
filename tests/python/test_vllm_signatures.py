"""The managers' signatures against vLLM 0.33.0's, which tests/data/vllm-0.33.0.json has, and what is asked of vLLM against the same."""

import importlib.util
import inspect
import json
import re
import subprocess
import sys
import types
from pathlib import Path

import a2a_vllm
import pytest
from a2a_vllm import VllmEngine, engine

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests/data"))

from record_vllm import classes  # noqa: E402 (it is beside its table)

TABLE = json.loads((ROOT / "tests/data/vllm-0.33.0.json").read_text())
OURS = {name: found for file in sorted((ROOT / "examples/python/a2a_vllm").glob("*.py"))
        for name, found in classes(file.read_text()).items()}
# What ours have besides, by (class, method): parameters that may be left out.
ADDED = {("FlashInferNVLinkOneSidedManager", "__init__"): ", tcp_store_group=None"}


def method_of(name, method):
    """A method as the class has it, its own or inherited; None if it has none."""
    while name in OURS:
        found = OURS[name]
        if method in found["methods"]:
            return found["methods"][method]
        name = (found["bases"] or [""])[0]
    return None


def parts(signature):
    """(decorators and parameters, what it returns), with torch's types as ours name them."""
    for theirs, ours in (("torch.Tensor", "Tensor"), ("torch.dtype", "Dtype"), ("torch.device", "Device")):
        signature = signature.replace(theirs, ours)
    parameters, _, returns = signature.partition(") -> ")
    return parameters.removesuffix(")"), returns


METHODS = [(name, method) for name, manager in TABLE["managers"].items() for method in manager["methods"]]


@pytest.mark.parametrize("name, method", METHODS)
def test_a_method_has_vllms_signature(name, method):
    parameters, returns = parts(TABLE["managers"][name]["methods"][method])
    ours = method_of(name, method)
    assert ours is not None, f"{name} has no {method}"
    our_parameters, our_returns = parts(ours)
    assert our_parameters == parameters + ADDED.get((name, method), "")
    # What vLLM's may return, ours may; a class that inherits may have more.
    assert not (returns and our_returns) or set(returns.split(" | ")) <= set(our_returns.split(" | "))


@pytest.mark.parametrize("name", TABLE["managers"])
def test_a_manager_has_vllms_bases(name):
    assert all(issubclass(getattr(a2a_vllm, name), getattr(a2a_vllm, base)) for base in TABLE["managers"][name]["bases"])


def test_the_table_has_all_managers():
    assert len(TABLE["managers"]) == 8 and len(METHODS) == 67


HANDLES = {
    "deepep_ht": a2a_vllm.HighThroughputBuffer,
    "deepep_ll": a2a_vllm.LowLatencyBuffer,
    "nixl_ep": a2a_vllm.NixlBuffer,
    "flashinfer_nvlink_one_sided": a2a_vllm.OneSidedCommunication,
}


@pytest.mark.parametrize("file, method", [(file, method) for file, methods in TABLE["calls"].items() for method in methods])
def test_a_handle_takes_what_vllms_adapter_passes(file, method):
    passed = TABLE["calls"][file][method]
    call = inspect.signature(getattr(HANDLES[Path(file).stem], method))
    call.bind("self", *range(passed["positional"]), **dict.fromkeys(passed["keywords"]))


def test_the_package_is_typed(tmp_path):
    """As far as vLLM's signatures are: not all of them are annotated."""
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--check-untyped-defs", "--ignore-missing-imports", "--cache-dir", tmp_path, "a2a_vllm"],
        cwd=ROOT / "examples/python", capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr


# ------------------------------------------------------------------------------------------------- what is asked of vLLM


class Named(types.SimpleNamespace):
    """An object with fields that the table has of a class of vLLM, and no others."""

    def __init__(self, kind, **fields):
        known = {name.partition(".")[2] for names in TABLE["asked"].values() for name in names if name.startswith(kind + ".")}
        assert set(fields) <= known, f"{kind} has no {set(fields) - known}"
        super().__init__(**fields)


def module_of(file):
    """The module to import a file's names from; vllm.config gives on what its vllm.py has."""
    return file.removesuffix(".py").replace("/", ".").replace("vllm.config.vllm", "vllm.config")


@pytest.fixture
def vllm(monkeypatch):
    """Modules with the functions that the table has, and no others."""
    sizes = Named("DPMetadata", get_chunk_sizes_across_dp_rank=lambda: [3, 4])
    parallel = Named("ParallelConfig", enable_expert_parallel=True, enable_fault_tolerance=False, enable_elastic_ep=True,
                     elastic_ep_max_dp_size=4, data_parallel_size=2)
    config = Named("VllmConfig", parallel_config=parallel,
                   scheduler_config=Named("SchedulerConfig", max_num_batched_tokens=512))
    groups = {name: Named("GroupCoordinator", rank_in_group=0, world_size=2, cpu_group=None)
              for name in ("get_dp_group", "get_tp_group", "get_ep_group", "get_pcp_group")}
    answers = {name: lambda group=group: group for name, group in groups.items()}
    answers |= dict(get_current_vllm_config=lambda: config, get_forward_context=lambda: Named("ForwardContext", dp_metadata=sizes),
                    dbo_current_ubatch_id=lambda: 1)
    modules = {}
    for file, names in TABLE["asked"].items():
        path = module_of(file)
        for depth in range(1, path.count(".") + 2):
            name = ".".join(path.split(".")[:depth])
            modules.setdefault(name, types.ModuleType(name))
        for name in set(names) & set(answers):
            assert TABLE["asked"][file][name].startswith("()"), f"{name} takes arguments"
            setattr(modules[path], name, answers[name])
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    return groups


def test_vllm_is_asked_for_what_it_has(vllm):
    asked = VllmEngine(device=(1, 0))
    for name in ("dp_group", "tp_group", "ep_group", "pcp_group"):
        assert getattr(asked, name) is vllm[f"get_{name}"]
    assert asked.enable_expert_parallel is True and asked.enable_fault_tolerance is False
    assert asked.max_num_batched_tokens == 512 and asked.capacity(6) == 12
    assert asked.local_sizes == [3, 4] and asked.ubatch == 1


def test_the_package_asks_vllm_for_nothing_else():
    """Every import of vLLM in the package names what the table has."""
    known = {(module_of(file), name) for file, names in TABLE["asked"].items() for name in names}
    asked = set()
    for file in (ROOT / "examples/python/a2a_vllm").glob("*.py"):
        asked |= set(re.findall(r"from (vllm[\w.]*) import (\w+)", file.read_text()))
    assert asked and asked <= known


def test_without_vllm_an_engine_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    a2a_vllm.use(None)
    with pytest.raises(RuntimeError, match="vLLM is not installed.*a2a_vllm.use"):
        engine.current()
    named = a2a_vllm.Engine(ep_group=a2a_vllm.Group())
    a2a_vllm.use(named)
    assert engine.current() is named and named.capacity(4) == 4
    a2a_vllm.use(None)
