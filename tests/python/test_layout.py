"""a2a_ctypes says what a2a.h says: every struct's size, every field's place, every constant, every function."""

import ctypes
import os
import re
import subprocess

import a2a_ctypes as a2a
import pytest

from conftest import ROOT

HEADER = (ROOT / "include/a2a.h").read_text()

STRUCTS = {
    "a2a_unique_id_t": a2a.UniqueId,
    "a2a_config_t": a2a.Config,
    "a2a_memory_t": a2a.Memory,
    "a2a_info_t": a2a.Info,
    "a2a_tensor_device_t": a2a.TensorDevice,
    "a2a_tensor_dtype_t": a2a.TensorDtype,
    "a2a_tensor_t": a2a.Tensor,
    "a2a_dispatch_in_t": a2a.DispatchIn,
    "a2a_dispatch_out_t": a2a.DispatchOut,
    "a2a_combine_in_t": a2a.CombineIn,
    "a2a_combine_out_t": a2a.CombineOut,
    "a2a_error_info_t": a2a.ErrorInfo,
    "a2a_stats_t": a2a.Stats,
    "a2a_recover_in_t": a2a.RecoverIn,
    "a2a_recover_out_t": a2a.RecoverOut,
}
CONSTANTS = [name for name, value in vars(a2a).items() if name.isupper() and isinstance(value, int)]


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
    assert len(CONSTANTS) > 30
    assert {name: getattr(a2a, name) for name in CONSTANTS} == {name: header[name] for name in CONSTANTS}
    macros = set(re.findall(r"^#define A2A_(\w+) ", HEADER, re.M))
    assert {name for name in macros if not name.startswith("VERSION")} == set(CONSTANTS)


def test_every_function_is_declared(lib):
    code = re.sub(r"/\*.*?\*/", "", HEADER, flags=re.S)
    assert set(re.findall(r"\b(a2a_\w+)\(", code)) == set(a2a.SIGNATURES)
    assert all(getattr(lib, name) for name in a2a.SIGNATURES)
