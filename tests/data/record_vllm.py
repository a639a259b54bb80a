#!/usr/bin/env python3
"""Record what vLLM's all-to-all managers look like: python record_vllm.py WHEEL_OR_DIRECTORY OUTPUT.json

Writes the signatures of the managers (names, parameters, defaults, annotations: nothing of their bodies), which arguments vLLM's
adapters pass to what get_handle gives, and the signatures of the functions and settings that examples/python/a2a_vllm asks.
Files are parsed with `ast`, never imported: no torch and no GPU are needed.

  pip download --no-deps --only-binary :all: vllm==0.33.0
  python tests/data/record_vllm.py vllm-0.33.0-*.whl tests/data/vllm-0.33.0.json
"""

import ast
import json
import re
import sys
import zipfile
from pathlib import Path

# The managers whose names are in scope, by the file that has them.
MANAGERS = {
    "vllm/distributed/device_communicators/base_device_communicator.py": ["All2AllManagerBase"],
    "vllm/distributed/device_communicators/all2all.py": [
        "AgRsAll2AllManager", "DeepEPAll2AllManagerBase", "DeepEPHTAll2AllManager", "DeepEPLLAll2AllManager",
        "FlashInferNVLinkOneSidedManager", "FlashInferNVLinkTwoSidedManager", "NixlEPAll2AllManager",
    ],
}
# What a manager asks of vLLM itself: functions, and methods and fields of classes.
ASKED = {
    "vllm/distributed/parallel_state.py": [
        "get_dp_group", "get_tp_group", "get_ep_group", "get_pcp_group",
        "GroupCoordinator.rank_in_group", "GroupCoordinator.world_size", "GroupCoordinator.cpu_group",
    ],
    "vllm/distributed/utils.py": [
        "StatelessProcessGroup.rank", "StatelessProcessGroup.world_size", "StatelessProcessGroup.all_gather_obj",
    ],
    "vllm/forward_context.py": [
        "get_forward_context", "ForwardContext.dp_metadata", "DPMetadata.get_chunk_sizes_across_dp_rank",
    ],
    "vllm/config/vllm.py": ["get_current_vllm_config", "VllmConfig.parallel_config", "VllmConfig.scheduler_config"],
    "vllm/config/parallel.py": [
        "ParallelConfig.enable_expert_parallel", "ParallelConfig.enable_elastic_ep", "ParallelConfig.elastic_ep_max_dp_size",
        "ParallelConfig.data_parallel_size", "ParallelConfig.enable_fault_tolerance",
    ],
    "vllm/v1/worker/ubatching.py": ["dbo_current_ubatch_id"],
    "vllm/config/scheduler.py": ["SchedulerConfig.max_num_batched_tokens"],
}
# Whose calls the handles answer: by file, what vLLM's adapters name them.
ADAPTERS = {
    "vllm/model_executor/layers/fused_moe/prepare_finalize/deepep_ht.py": "self.buffer",
    "vllm/model_executor/layers/fused_moe/prepare_finalize/deepep_ll.py": "self.buffer",
    "vllm/model_executor/layers/fused_moe/prepare_finalize/nixl_ep.py": "self.buffer",
    "vllm/model_executor/layers/fused_moe/prepare_finalize/flashinfer_nvlink_one_sided.py": "communication",
}
# Private, and yet part of how handles are made.
PRIVATE = {"__init__", "_make_all2all_kwargs"}


def signature(function):
    """A function as a line: its decorators, its parameters with annotations and defaults, and what it returns."""
    decorators = "".join(f"@{ast.unparse(decorator)} " for decorator in function.decorator_list)
    for argument in ast.walk(function.args):
        if isinstance(argument, ast.arg) and isinstance(argument.annotation, ast.Constant):
            argument.annotation = ast.parse(argument.annotation.value, mode="eval").body  # written in quotes
    returns = f" -> {ast.unparse(function.returns)}" if function.returns else ""
    return f"{decorators}({ast.unparse(function.args)}){returns}".replace("'", "")


def classes(source):
    """By name: the bases of a file's classes, and the signatures of their methods."""
    return {
        node.name: dict(
            bases=[ast.unparse(base) for base in node.bases],
            methods={
                method.name: signature(method) for method in node.body
                if isinstance(method, ast.FunctionDef) and (not method.name.startswith("_") or method.name in PRIVATE)
            },
        )
        for node in ast.parse(source).body if isinstance(node, ast.ClassDef)
    }


def asked(source, names):
    """By name: the signature of a function or method, or the annotation of a field."""
    found = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef):
            found[node.name] = signature(node)
        elif isinstance(node, ast.ClassDef):
            for member in node.body:
                if isinstance(member, ast.FunctionDef):
                    found[f"{node.name}.{member.name}"] = signature(member)
                elif isinstance(member, ast.AnnAssign):
                    found[f"{node.name}.{ast.unparse(member.target)}"] = ast.unparse(member.annotation)
    missing = sorted(set(names) - set(found))
    if missing:
        sys.exit(f"vLLM has no {', '.join(missing)}: what asks for it must be changed")
    return {name: found[name] for name in names}


def calls(source, of):
    """By method of an object: how many arguments a file passes by position, and which by name."""
    return {
        node.func.attr: dict(positional=len(node.args), keywords=sorted(k.arg for k in node.keywords if k.arg))
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and ast.unparse(node.func.value) == of
    }


def reader(place):
    """A function that gives a file's text, from a wheel or from the directory that it was unpacked into."""
    if place.is_dir():
        return lambda name: (place / name).read_text()
    wheel = zipfile.ZipFile(place)
    return lambda name: wheel.read(name).decode()


def record(place):
    read = reader(place)
    version = re.search(r"vllm-([0-9.]+)", place.name)
    managers = {}
    for file, names in MANAGERS.items():
        found = classes(read(file))
        managers |= {name: found[name] for name in names}
    return dict(
        vllm=version.group(1) if version else place.name,
        managers=managers,
        calls={file: calls(read(file), of) for file, of in ADAPTERS.items()},
        asked={file: asked(read(file), names) for file, names in ASKED.items()},
    )


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    Path(sys.argv[2]).write_text(json.dumps(record(Path(sys.argv[1])), indent=1) + "\n")
