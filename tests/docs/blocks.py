"""Compiles, runs and compares the blocks of a page; check.py says what becomes of which."""

import doctest
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from pages import ROOT, Failure, blocks_of, read

HERE = Path(__file__).resolve().parent
OUT = ROOT / "target/docs"
SHELL = OUT / "shell"  # where shell blocks run
INSTALLED = ROOT / "target/install-test/unpacked"
PERF = "target/release/a2a-perf"
LIMIT_S = 120

LIBRARIES = ["-Ltarget/release", "-la2a", f"-Wl,-rpath,{ROOT}/target/release", "-pthread"]
WARNINGS = ["-O1", "-Wall", "-Wextra", "-Wpedantic", "-Werror", "-Iinclude"]
OF_FRAGMENTS = ["-Wno-unused", "-Wno-uninitialized", "-Wno-maybe-uninitialized", "-fsyntax-only"]
COMPILERS = {
    "c": [*shlex.split(os.environ.get("CC", "cc")), "-std=gnu11"],
    "cpp": [*shlex.split(os.environ.get("CXX", "c++")), "-std=c++17"],
}


def check_blocks(page, known):
    """Yields each block, with its failure or None."""
    blocks = blocks_of(page)
    make_shell(blocks)
    printed = {}  # by line of the block: what it printed, or a Failure
    python = [block for block in blocks if block.language == "python" and not block.not_run]
    for program in [[block for block in python if not block.framed], *([block] for block in python if block.framed)]:
        printed |= run_python(program)
    before = None
    for block in blocks:
        try:
            check(block, before, printed, known)
            yield block, None
        except (Failure, ValueError, SyntaxError) as failure:
            yield block, failure
        before = block


def check(block, before, printed, known):
    language = block.language
    if block.prints:
        compare_output(block, before, printed)
    elif block.not_run:
        if language == "sh":
            compare_shell(block, known)
        elif language == "python":
            compile(block.text, block.where, "exec")
    elif language in COMPILERS:
        printed[block.line] = compile_and_run(block)
    elif language == "python":
        if isinstance(printed[block.line], Failure):
            raise printed[block.line]
    elif language == "sh":
        printed[block.line] = run_shell(block)
    elif language == "json":
        json.loads(block.text)
    elif language != "text":
        raise Failure(f"is of language {language or 'none'}, which nobody here runs (text: there is nothing to run)")


def run(command, cwd=ROOT, **more):
    """Returns what it prints."""
    try:
        done = subprocess.run(
            command, cwd=cwd, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=LIMIT_S, **more
        )
    except subprocess.TimeoutExpired:
        raise Failure(f"has not ended after {LIMIT_S} s") from None
    if done.returncode != 0:
        raise Failure(f"ended with {done.returncode}\n{done.stdout}")
    return done.stdout


def compare_output(block, before, printed):
    got = before and printed.get(before.line)
    if not isinstance(got, str):
        raise Failure("says what the block before it prints, which was not run")
    if not doctest.OutputChecker().check_output(block.text, got, doctest.ELLIPSIS):
        raise Failure(f"is not what {before.where} prints\n{got}")


# ---------------------------------------------------------------------------------------------------------- C and C++


def compile_and_run(block):
    """Returns what a whole program prints; None of a fragment."""
    stem = OUT / f"{block.page.replace('/', '-')}-{block.line}"
    source = stem.with_suffix(f".{block.language}")
    compiler = [*COMPILERS[block.language], *WARNINGS, str(source)]
    here = f'#line {block.line + 1} "{block.page}"\n'
    if re.search(r"^int main\(", block.text, re.M):
        source.write_text(here + block.text)
        run([*compiler, "-o", str(stem), *LIBRARIES])
        return run([str(stem)])
    includes = "".join(re.findall(r"^#include.*\n", block.text, re.M))
    statements = re.sub(r"^#include.*$", "", block.text, flags=re.M)
    frame = (HERE / f"frame.{block.language}").read_text()
    source.write_text(includes + frame.replace("FRAGMENT", f"\n{here}{statements}"))
    run([*compiler, *OF_FRAGMENTS])
    return None


# ------------------------------------------------------------------------------------------------------------- Python


def run_python(blocks):
    """Runs blocks as one program; returns for the line of each what it has printed, or the failure of the whole."""
    if not blocks:
        return {}
    end = "-- end of a block --"
    text = f"exec(open({str(HERE / 'frame.py')!r}).read())" if blocks[0].framed else ""  # its lines have the page's numbers
    for block in blocks:
        text += "\n" * (block.line - text.count("\n")) + block.text + f"print({end!r}, flush=True)"
    program = OUT / f"{blocks[0].page.replace('/', '-')}-{blocks[0].line}.py"
    program.write_text(text + "\n")
    path = os.pathsep.join([str(ROOT / "examples/python"), os.environ.get("PYTHONPATH", "")])
    library = str(ROOT / "target/release/liba2a.so")
    try:
        said = run([sys.executable, "-B", str(program)], env={**os.environ, "PYTHONPATH": path, "A2A_LIBRARY": library})
        *printed, _ = said.split(end + "\n")
        if len(printed) != len(blocks):
            raise Failure(f"and the others of the page ended after {len(printed)} of {len(blocks)}")
    except Failure as failure:
        return {block.line: failure for block in blocks}
    return {block.line: said for block, said in zip(blocks, printed, strict=True)}


# -------------------------------------------------------------------------------------------------------------- shell


def make_shell(blocks):
    """A place for shell blocks: nothing but the repository's folders, and blocks that are files."""
    shutil.rmtree(SHELL, ignore_errors=True)
    SHELL.mkdir(parents=True)
    for folder in ROOT.iterdir():
        if folder.is_dir() and not folder.name.startswith("."):
            (SHELL / folder.name).symlink_to(folder)
    for block in blocks:
        if block.file:
            (SHELL / block.file).write_text(block.text)


def run_shell(block):
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    environment |= {"PKG_CONFIG_PATH": f"{INSTALLED}/lib/pkgconfig", "CMAKE_PREFIX_PATH": str(INSTALLED)}
    return run(["bash", "-euo", "pipefail", "-c", block.text], cwd=SHELL, env=environment)


class Known:
    """What the repository has, as far as shell blocks name it."""

    def __init__(self):
        makefile = read("Makefile")
        names = re.findall(r"^(\w[\w ./-]*?)\s*::?(?!=)", makefile, re.M)
        stages = re.search(r"^STAGES := (.*)$", makefile, re.M)[1].split()
        self.targets = {name for line in names for name in line.split()} | {f"test-{stage}" for stage in stages}
        helps = [run([PERF, *command, "--help"]) for command in ([], ["plot"], ["nccl"], ["nixl"])]
        self.options = set(re.findall(r"--[\w-]+", "".join(helps)))


def compare_shell(block, known):
    """Compares what a block would run with what there is."""
    run(["bash", "-n", "-c", block.text])
    for name, *words in commands_of(block.text):
        if name == "make":
            missing = [f"target {word} of make" for word in words if "=" not in word and word not in known.targets]
        elif name == "cargo" and "--test" in words:
            test = words[words.index("--test") + 1]
            missing = [] if (ROOT / f"tests/{test}.rs").is_file() else [f"tests/{test}.rs"]
        elif name.endswith("a2a-perf"):
            missing = [f"option {word} of a2a-perf" for word in words if word.startswith("--") and word not in known.options]
        else:
            missing = []
        files = [word for word in (name, *words) if re.match(r"(examples|perf|tests|docs|src|kernels)/.*\.\w+$", word)]
        missing += [file for file in files if not (ROOT / file).exists()]
        if missing:
            raise Failure(f"names what there is not: {missing[0]}")


def commands_of(text):
    """The simple commands of a shell block, as words, without what they are run with in their environment."""
    for line in text.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=";&|")
        lexer.whitespace_split = True
        command = []
        for word in [*lexer, ";"]:
            if re.fullmatch(r"[;&|]+", word):
                if command:
                    yield command
                command = []
            elif command or not re.fullmatch(r"\w+=.*", word):
                command.append(word)
