"""The wheel of `make wheel` goes into an empty environment without a network, carries its library, and two processes use it."""

import re
import subprocess
import sys
import venv
import zipfile

import pytest

from conftest import ROOT

RANK = """
import sys
import a2a
config = dict(num_ranks=2, num_experts=2, max_topk=1, max_hidden=4, max_tokens=2, token_dtype="float32")
with a2a.Comm(rank=int(sys.argv[1]), unique_id=bytes.fromhex(sys.argv[2]), **config) as comm, comm.routing() as routing:
    tokens = a2a.from_list([[1.0, 2, 3, 4], [5, 6, 7, 8]], "float32")
    received = comm.dispatch(routing, tokens, a2a.from_list([[0], [1]], "int32"))
    print(comm.combine(routing, received.tokens).tolist() == tokens.tolist())
"""


@pytest.fixture(scope="module")
def wheel():
    wheels = list((ROOT / "target/wheel").glob("*.whl"))
    assert len(wheels) == 1, f"{ROOT}/target/wheel has {len(wheels)} wheels: `make wheel` makes one"
    return wheels[0]


@pytest.fixture(scope="module")
def python(wheel, tmp_path_factory):
    """The interpreter of an environment with the wheel and nothing else."""
    place = tmp_path_factory.mktemp("environment")
    venv.create(place, with_pip=False)
    pip = [sys.executable, "-m", "pip", "--python", place, "install", "--quiet", "--no-index", wheel]
    subprocess.run(pip, check=True, timeout=120)
    return place / "bin/python"


def run(python, *arguments, cwd):
    # Nothing but what is installed: no path of ours, no library but the wheel's.
    return subprocess.Popen([python, "-I", *arguments], stdout=subprocess.PIPE, text=True, cwd=cwd, env={})


def test_what_it_is(wheel):
    version = re.search(r'^version = "(.*)"', (ROOT / "Cargo.toml").read_text(), re.M)[1]
    assert re.fullmatch(rf"liba2a-{version}-py3-none-linux_\w+\.whl", wheel.name)
    with zipfile.ZipFile(wheel) as content:
        names = {name for name in content.namelist() if ".dist-info/" not in name}
        assert content.read("a2a/liba2a.so.0") == (ROOT / "target/release/liba2a.so").read_bytes()
    ours = {f"{path.parent.name}/{path.name}" for package in ("a2a", "a2a_vllm")
            for path in (ROOT / "examples/python" / package).iterdir() if path.suffix in (".py", ".typed")}
    assert names == ours | {"a2a/LICENSE", "a2a/liba2a.so.0"}


def test_two_processes(python, tmp_path):
    with run(python, "-c", "import a2a, a2a_vllm.prepare_finalize; print(bytes(a2a.UniqueId.create()).hex(), a2a.__file__)", cwd=tmp_path) as made:
        group, place = made.stdout.read().split()
    assert made.returncode == 0 and str(ROOT) not in place
    processes = [run(python, "-c", RANK, str(rank), group, cwd=tmp_path) for rank in range(2)]
    try:
        assert [process.communicate(timeout=60)[0].strip() for process in processes] == ["True", "True"]
    finally:
        for process in processes:
            process.kill()
            process.communicate()
