"""A library that was built without nvcc serves CPU memory, and says of CUDA memory that it has no device code.

    python tests/cpu_only.py LIBRARY
"""

import ctypes
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples/python"))
import a2a_ctypes as a2a  # noqa: E402

lib = a2a.load(sys.argv[1])


def explain(device):
    config = a2a.Config(device=device, num_ranks=8, num_experts=64, max_topk=8, max_hidden=256, max_tokens=128)
    text = ctypes.create_string_buffer(1 << 16)
    lib.a2a_explain(config, text, len(text), None)
    return json.loads(text.value)


assert explain(a2a.DEVICE_CPU)["status"] == "ok"
refused = explain(a2a.DEVICE_CUDA)
assert refused["status"] == "refused" and "this build has no device code" in refused["why"], refused
print(refused["why"])
