"""docs/kernels.md below its marker is what ptxas says of the kernels: `make kernels` writes it, --check compares.

    python tests/kernels_table.py [--check] [ARGUMENT OF CARGO...], from the root of the repository

Builds the library, or with arguments what they say (--package a2a ...); cargo says where build.rs left nvcc's report. Either way it
is an error if a function has a stack frame or spills registers, or if the fatbin does not hold code for every architecture.
"""

import argparse
import json
import os
import re
import struct
import subprocess
import sys
from pathlib import Path

PAGE = Path("docs/kernels.md")
MARKER = "<!-- From here on written by `make kernels`. -->\n"
# What the fatbin must hold, as build.rs asks for it.
MACHINE_CODE, PTX = (90, 100, 120), (90,)
COLUMNS = ("registers", "spill stores", "spill loads", "stack", "static shared", "constant")


def build(arguments):
    """The build script's directory and the fatbin, of a build with device code."""
    command = [os.environ.get("CARGO", "cargo"), "build", "--release", *(arguments or ["--lib"])]
    done = subprocess.run([*command, "--message-format=json-render-diagnostics"], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed")
    for message in map(json.loads, done.stdout.splitlines()):
        if message["reason"] == "build-script-executed" and "a2a_kernels" in message["cfgs"]:
            return Path(message["out_dir"]), Path(dict(message["env"])["A2A_FATBIN"])
    sys.exit("this build has no device code: set A2A_NVCC to an nvcc")


def contents(fatbin):
    """The architectures that there is machine code for, and PTX for."""
    magic, _, header, size = struct.unpack_from("<IHHQ", fatbin)
    assert magic == 0xBA55ED50 and header + size == len(fatbin), "not a fatbin"
    found, at = {1: [], 2: []}, header
    while at < len(fatbin):
        kind, _, header, size, arch = struct.unpack_from("<HHIQ12xI", fatbin, at)
        found[kind].append(arch)
        at += header + size
    return tuple(sorted(found[2])), tuple(sorted(found[1]))


def parse(report):
    """What ptxas says: {(kernel, architecture): figures}, and the functions with a stack frame or spills."""
    kernels, offences, frames = {}, [], {}
    kernel, function, arch = None, None, "?"
    for line in report.splitlines():
        if found := re.search(r"Compiling entry function '(.+)' for '(\w+)'", line):
            kernel, arch = found.groups(), found[2]
        elif found := re.search(r"Function properties for (\S+)", line):
            function = (found[1], arch)
        elif found := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line):
            frames[function] = stack, stores, loads = tuple(map(int, found.groups()))
            if any(frames[function]):
                offences.append(f"{' for '.join(function)}: stack {stack}, spill stores {stores}, spill loads {loads}")
        elif found := re.search(r"Used (\d+) registers", line):
            shared = sum(map(int, re.findall(r"(\d+) bytes smem", line)))
            constant = sum(map(int, re.findall(r"(\d+) bytes cmem", line))) or "-"
            assert kernel not in kernels, f"{' for '.join(kernel)} stands twice in ptxas's report"
            stack, stores, loads = frames[kernel]
            kernels[kernel] = (int(found[1]), stores, loads, stack, shared, constant)
    return kernels, offences


def readable(names):
    """The names as in the source: c++filt's of a template, without the parameters where that is one name still."""
    filtered = subprocess.run(["c++filt"], input="\n".join(names), stdout=subprocess.PIPE, text=True, check=True)
    full = dict(zip(names, filtered.stdout.splitlines()))
    short = {name: re.sub(r"^void |\(anonymous namespace\)::|\([^()]*\)$", "", text) for name, text in full.items()}
    values = list(short.values())
    return {name: text if values.count(text) == 1 else full[name] for name, text in short.items()}


def table(kernels, version):
    names = readable(sorted({name for name, _ in kernels}))
    lines = [
        f"nvcc {version}.",
        "",
        f"| kernel | architecture | {' | '.join(COLUMNS)} |",
        f"|---|---|{'---:|' * len(COLUMNS)}",
    ]
    for name, arch in sorted(kernels, key=lambda key: (names[key[0]], int(key[1].removeprefix("sm_")))):
        lines.append(f"| `{names[name]}` | {arch} | {' | '.join(map(str, kernels[name, arch]))} |")
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    options, arguments = parser.parse_known_args()
    check = options.check

    out, fatbin = build(arguments)
    report = (out / "resources.txt").read_text()
    version = re.search(r"release .*, V([\d.]+)", report)[1]
    kernels, offences = parse(report)
    architectures = contents(fatbin.read_bytes())
    if architectures != (MACHINE_CODE, PTX):
        sys.exit(f"{fatbin}: machine code and PTX for {architectures}, they must be for {(MACHINE_CODE, PTX)}")
    names = {name for name, _ in kernels}
    missing = {(name, f"sm_{arch}") for name in names for arch in MACHINE_CODE} - kernels.keys()
    if missing or not kernels:
        sys.exit(f"ptxas's report lacks {sorted(missing) or 'kernels'}: {out / 'resources.txt'}")
    if offences:
        sys.exit("\n".join(["local memory is used:", *offences]))
    print(f"kernels: {len(names)}, architectures: {len(MACHINE_CODE)}, no stack frames, no spills")

    prose, marker, rest = PAGE.read_text().partition(MARKER)
    if not marker:
        sys.exit(f"{PAGE} lacks the line {MARKER.strip()}")
    fresh = table(kernels, version)
    made_by = re.search(r"^nvcc ([\d.]+)\.$", rest, re.MULTILINE)
    if not check:
        PAGE.write_text(prose + marker + "\n" + fresh)
        print(f"{PAGE} written")
    elif made_by and made_by[1] != version:
        print(f"skipped: {PAGE} has the figures of nvcc {made_by[1]}, this is {version}")
    elif rest.strip() != fresh.strip():
        sys.exit(f"{PAGE} is stale: run `make kernels` and commit it")
    else:
        print(f"{PAGE} is up to date")


if __name__ == "__main__":
    main()
