"""a2a._abi says what a2a.h says: every struct's size, every field's place, every constant, every function."""

import ctypes
import dataclasses
import os
import re
import subprocess

import a2a
import pytest
from a2a import _abi

from conftest import ROOT

HEADER = (ROOT / "include/a2a.h").read_text()

STRUCTS = {
    "a2a_unique_id_t": _abi.UniqueId,
    "a2a_config_t": _abi.Config,
    "a2a_memory_t": _abi.Memory,
    "a2a_info_t": _abi.Info,
    "a2a_tensor_device_t": _abi.TensorDevice,
    "a2a_tensor_dtype_t": _abi.TensorDtype,
    "a2a_tensor_t": _abi.Tensor,
    "a2a_dispatch_in_t": _abi.DispatchIn,
    "a2a_dispatch_out_t": _abi.DispatchOut,
    "a2a_combine_in_t": _abi.CombineIn,
    "a2a_combine_out_t": _abi.CombineOut,
    "a2a_error_info_t": _abi.ErrorInfo,
    "a2a_stats_t": _abi.Stats,
    "a2a_recover_in_t": _abi.RecoverIn,
    "a2a_recover_out_t": _abi.RecoverOut,
}
CONSTANTS = {prefix + one.name: one.value for enum, prefix in _abi.PREFIXES.items() for one in enum}
CONSTANTS |= {name: value for name, value in vars(_abi).items() if name.startswith("MAX_")}


@pytest.fixture(scope="module")
def header(tmp_path_factory):
    """What a C compiler makes of the header: {"a2a_config_t": 376, "a2a_config_t.rank": 8, "TIMEOUT": 16, ...}"""
    lines = []
    for name, struct in STRUCTS.items():
        lines.append(f'printf("{name} %zu\\n", sizeof({name}));')
        for field, *_ in struct._fields_:
            lines.append(f'printf("{name}.{field} %zu\\n", offsetof({name}, {field}));')
    lines += [f'printf("{name} %lld\\n", (long long)A2A_{name});' for name in CONSTANTS]
    directory = tmp_path_factory.mktemp("layout")
    source = directory / "layout.c"
    source.write_text("#include <a2a.h>\n#include <stdio.h>\nint main(void)\n{\n" + "\n".join(lines) + "\n}\n")
    compiler = os.environ.get("CC", "cc")
    subprocess.run([compiler, f"-I{ROOT}/include", source, "-o", directory / "layout"], check=True)
    out = subprocess.run([directory / "layout"], check=True, capture_output=True, text=True).stdout
    return {name: int(value) for name, value in map(str.split, out.splitlines())}


def test_every_struct_is_declared():
    assert set(re.findall(r"^} (a2a_\w+);", HEADER, re.M)) == set(STRUCTS)


@pytest.mark.parametrize("name", STRUCTS)
def test_struct(header, name):
    struct = STRUCTS[name]
    assert ctypes.sizeof(struct) == header[name]
    places = {field: getattr(struct, field).offset for field, *_ in struct._fields_}
    assert places == {field: header[f"{name}.{field}"] for field in places}
    # No struct has holes, so that the fields fill it says that none is missing.
    assert sum(getattr(struct, field).size for field in places) == header[name]


def test_constants(header):
    assert CONSTANTS == {name: header[name] for name in CONSTANTS}
    macros = set(re.findall(r"^#define A2A_(\w+) ", HEADER, re.M))
    assert {name for name in macros if not name.startswith("VERSION")} == set(CONSTANTS)


def test_every_function_is_declared():
    code = re.sub(r"/\*.*?\*/", "", HEADER, flags=re.S)
    assert set(re.findall(r"\b(a2a_\w+)\(", code)) == set(_abi.SIGNATURES)


def test_a_config_has_the_fields_of_the_header():
    theirs = {name for name, *_ in _abi.Config._fields_} - {"struct_size", "allgather_user"}  # which are ours to set
    assert {field.name for field in dataclasses.fields(a2a.Config)} == theirs


def test_a_status_has_an_exception():
    for status in a2a.Status:
        if status != a2a.Status.SUCCESS:
            error = a2a.error_of(status, "a sentence")
            assert type(error) is not a2a.Error and type(error).__name__.lower().startswith(status.name.replace("_", "").lower()[:6])
            group = a2a.CallError if status < 16 else a2a.StepError if status < 32 else a2a.CommError
            assert isinstance(error, group) and str(error) == f"A2A_{status.name}: a sentence"
