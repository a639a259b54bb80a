"""A library that was built without nvcc serves CPU memory, and says of CUDA memory that it has no device code.

    python tests/cpu_only.py LIBRARY
"""

import os
import sys
from pathlib import Path

os.environ["A2A_LIBRARY"] = sys.argv[1]
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples/python"))
import a2a  # noqa: E402


def explain(device):
    return a2a.explain(device=device, num_ranks=8, num_experts=64, max_topk=8, max_hidden=256, max_tokens=128)


assert explain("cpu")["status"] == "ok"
refused = explain("cuda")
assert refused["status"] == "refused" and "this build has no device code" in refused["why"], refused
print(refused["why"])
