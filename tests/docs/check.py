"""Checks the pages: their code works, their links lead somewhere, and what the library has stands in them.

    python tests/docs/check.py [PAGE...]

Pages are README.md, CONTRIBUTING.md, SECURITY.md and docs/. What becomes of a fenced block depends on its language:

    c, cpp      a whole program (it has a main) is compiled and run; a fragment is compiled inside frame.c or frame.cpp,
                which declare what fragments use
    python      the blocks of a page, one behind the other, are one program, which is run
    sh          bash runs it, from the root of the repository
    json        is parsed
    text        is shown, and nothing else

A comment in the line above a fence can say otherwise:

    <!-- not run: REASON -->    the reason is printed; syntax, targets of make, tests of cargo and options of a2a-perf are
                                compared with what there is all the same
    <!-- prints -->             of a text block: what the program before it prints; "..." stands for anything
"""

import dataclasses
import doctest
import functools
import json
import os
import re
import shlex
import subprocess
import sys
import urllib.parse
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
OUT = ROOT / "target/docs"
ENVIRONMENT = "docs/environment.md"
PERF = "target/release/a2a-perf"
LIMIT_S = 120

LIBRARIES = ["-Ltarget/release", "-la2a", "-lm", f"-Wl,-rpath,{ROOT}/target/release", "-pthread"]
WARNINGS = ["-O1", "-Wall", "-Wextra", "-Wpedantic", "-Werror", "-Iinclude"]
COMPILERS = {
    "c": [os.environ.get("CC", "cc"), "-std=gnu11"],
    "cpp": [os.environ.get("CXX", "c++"), "-std=c++17"],
}

# How a source names a variable of the environment. Where macros or variables of CMake's look alike, by how it is read.
VARIABLE = r"\b(A2A_[A-Z0-9_]*[A-Z0-9])\b"
VARIABLES = {
    ".c": f'"{VARIABLE}"', ".cpp": f'"{VARIABLE}"', ".h": f'"{VARIABLE}"', ".hpp": f'"{VARIABLE}"', ".cu": f'"{VARIABLE}"',
    ".cuh": f'"{VARIABLE}"', ".cmake": rf"ENV\{{{VARIABLE}", ".in": rf"ENV\{{{VARIABLE}", ".txt": rf"ENV\{{{VARIABLE}",
}  # fmt: skip
NO_VARIABLES = {
    "A2A_H",  # the guard of a2a.h
    "A2A_FATBIN",  # from build.rs to the crate
    "A2A_ROOT", "A2A_SOURCE", "A2A_CARGO_TARGET_DIR", "A2A_CARGO_ARGUMENTS",  # CMake's, as the Makefile passes them
}  # fmt: skip


class Failure(Exception):
    """What is wrong with a page, in a sentence or a program's own words."""


@dataclasses.dataclass
class Block:
    page: str
    line: int
    language: str
    text: str
    not_run: str | None
    prints: bool

    @property
    def where(self):
        return f"{self.page}:{self.line}"


# ------------------------------------------------------------------------------------------------------------- pages


def pages():
    return ["README.md", "CONTRIBUTING.md", "SECURITY.md"] + sorted(
        str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md")
    )


def read(page):
    return (ROOT / page).read_text()


def blocks_of(page):
    blocks, opened = [], None
    lines = read(page).splitlines()
    for number, line in enumerate(lines, 1):
        fence = re.match(r"```(\S*)\s*$", line)
        if opened is None and fence:
            above = lines[number - 2].strip() if number > 1 else ""
            reason = re.fullmatch(r"<!-- not run: (.+) -->", above)
            opened = Block(page, number, fence[1], "", reason and reason[1], above == "<!-- prints -->")
        elif opened is not None and line.rstrip() == "```":
            blocks.append(opened)
            opened = None
        elif opened is not None:
            opened.text += line + "\n"
    if opened is not None:
        raise Failure(f"{opened.where}: the block is never closed")
    return blocks


def prose_of(page):
    """The page without its blocks."""
    return re.sub(r"^```.*?^```$", "", read(page), flags=re.S | re.M)


# ------------------------------------------------------------------------------------------------------------ blocks


def run(command, **more):
    try:
        done = subprocess.run(
            command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=LIMIT_S, **more
        )
    except subprocess.TimeoutExpired:
        raise Failure(f"has not ended after {LIMIT_S} s") from None
    if done.returncode != 0:
        raise Failure(f"ended with {done.returncode}\n{done.stdout}")
    return done.stdout


def compile_and_run(block):
    """Returns what a whole program prints; None of a fragment."""
    is_program = re.search(r"^int main\(", block.text, re.M)
    text = f'#line {block.line + 1} "{block.page}"\n{block.text}'
    if not is_program:
        includes = "".join(line + "\n" for line in block.text.splitlines() if line.startswith("#include"))
        rest = re.sub(r"^#include.*$", "", block.text, flags=re.M)
        frame = (HERE / f"frame.{block.language}").read_text()
        text = includes + frame.replace("FRAGMENT", f'\n#line {block.line + 1} "{block.page}"\n{rest}')
    stem = OUT / f"{block.page.replace('/', '-')}-{block.line}"
    source = stem.with_suffix(f".{block.language}")
    source.write_text(text)
    compiler = COMPILERS[block.language] + WARNINGS
    if not is_program:
        run(compiler + ["-Wno-unused", "-Wno-maybe-uninitialized", "-Wno-uninitialized", "-fsyntax-only", str(source)])
        return None
    run(compiler + [str(source), "-o", str(stem)] + LIBRARIES)
    return run([str(stem)])


def run_python(blocks):
    """Runs a page's blocks as one program; returns what each has printed."""
    mark = "-- end of a block --"
    program = OUT / f"{blocks[0].page.replace('/', '-')}.py"
    padded = ""  # line numbers are the page's
    for block in blocks:
        padded += "\n" * (block.line - padded.count("\n")) + block.text + f"print({mark!r}, flush=True)"
    program.write_text(padded + "\n")
    path = os.pathsep.join([str(ROOT / "examples/python"), os.environ.get("PYTHONPATH", "")])
    library = str(ROOT / "target/release/liba2a.so")
    said = run([sys.executable, "-B", str(program)], env={**os.environ, "PYTHONPATH": path, "A2A_LIBRARY": library})
    return said.split(mark + "\n")[:-1]


def run_shell(block):
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    return run(["bash", "-euo", "pipefail", "-c", block.text], env=environment)


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


def compare_shell(block, known):
    """Compares what a block would run with what there is."""
    run(["bash", "-n", "-c", block.text])
    for command in commands_of(block.text):
        name, words = command[0], command[1:]
        if name == "make":
            wanted = [word for word in words if re.fullmatch(r"[\w-]+", word)]
            if missing := [target for target in wanted if target not in known.targets]:
                raise Failure(f"make has no target {missing[0]}")
        elif name == "cargo" and "--test" in words:
            test = words[words.index("--test") + 1]
            if not (ROOT / f"tests/{test}.rs").is_file():
                raise Failure(f"there is no tests/{test}.rs")
        elif name.endswith("a2a-perf"):
            for word in words:
                if word.startswith("--") and word not in known.options:
                    raise Failure(f"a2a-perf has no option {word}")
        for word in command:
            if re.match(r"(examples|perf|tests|docs|src|kernels)/[\w./-]+$", word) and not (ROOT / word).exists():
                if not word.endswith("/"):  # else a prefix of names of tests
                    raise Failure(f"there is no {word}")


class Known:
    """What the repository has, as far as shell blocks name it."""

    def __init__(self):
        makefile = read("Makefile")
        names = re.findall(r"^([\w][\w ./-]*?)\s*::?(?!=)", makefile, re.M)
        stages = re.search(r"^STAGES := (.*)$", makefile, re.M)[1].split()
        self.targets = {name for line in names for name in line.split()} | {f"test-{stage}" for stage in stages}
        helps = [run([PERF, *command, "--help"]) for command in ([], ["plot"], ["nccl"], ["nixl"])]
        self.options = set(re.findall(r"--[\w-]+", "".join(helps)))


def check_blocks(page, known):
    """Yields (where, Failure or None, reason of not running)."""
    blocks = blocks_of(page)
    printed = {}  # line of a block: what it printed
    runnable = [block for block in blocks if block.language == "python" and not block.not_run]
    program = None
    if runnable:
        try:
            printed |= {block.line: said for block, said in zip(runnable, run_python(runnable), strict=True)}
        except Failure as failure:
            program = failure
    previous = None
    for block in blocks:
        try:
            if block.prints:
                compare_output(block, previous, printed)
            elif block.language in COMPILERS and not block.not_run:
                printed[block.line] = compile_and_run(block)
            elif block.language == "python" and not block.not_run:
                if program and block is runnable[0]:
                    raise program
            elif block.language == "python":
                compile(block.text, block.where, "exec")
            elif block.language == "sh" and not block.not_run:
                printed[block.line] = run_shell(block)
            elif block.language == "sh":
                compare_shell(block, known)
            elif block.language == "json":
                json.loads(block.text)
            elif block.language != "text" and not block.not_run:
                raise Failure(f"is of language {block.language or 'none'}, which nobody here runs (text: nothing to run)")
            yield block, None
        except (Failure, ValueError, SyntaxError) as failure:
            yield block, failure
        previous = block


def compare_output(block, previous, printed):
    if previous is None or printed.get(previous.line) is None:
        raise Failure("says what the block before it prints, which was not run")
    checker = doctest.OutputChecker()
    got = printed[previous.line]
    if not checker.check_output(block.text, got, doctest.ELLIPSIS):
        raise Failure(f"{previous.where} prints something else\n{got}")


# ------------------------------------------------------------------------------------------------------------- names


@functools.cache
def sources():
    """Files of the repository that are neither pages nor data."""
    kinds = (".rs", ".py", ".sh", ".c", ".h", ".hpp", ".cpp", ".cu", ".cuh", ".toml", ".cmake", ".in")
    found = []
    for folder, inside, names in os.walk(ROOT):
        inside[:] = [name for name in inside if name not in ("target", ".git", "corpus", "__pycache__")]
        for name in names:
            if name.endswith(kinds) or name in ("Makefile", "CMakeLists.txt", "run"):
                found.append(str((Path(folder) / name).relative_to(ROOT)))
    return sorted(found)


def header():
    return re.sub(r"/\*.*?\*/", "", read("include/a2a.h"), flags=re.S)


def functions_of_header():
    return set(re.findall(r"\b(a2a_\w+)\(", header()))


def symbols_of_header():
    """Functions, structs, constants and types of include/a2a.h."""
    types = re.findall(r"\b(a2a_\w+)(?=;| \{)", header()) + re.findall(r"\(\*(a2a_\w+)\)", header())
    constants = re.findall(r"^#define (A2A_\w+) .", header(), re.M)
    return functions_of_header() | set(types) | set(constants)


def words_of(text):
    return set(re.findall(r"\b(?:a2a|A2A)_\w*\w\b", text))


def check_names(texts):
    """Every symbol of the header stands in a page, and every name in a page is one of the header or of the sources."""
    written = set().union(*map(words_of, texts.values()))
    for symbol in sorted(symbols_of_header() - written):
        yield f"include/a2a.h: {symbol} stands in no page (docs/reference.md has a table of all)"
    named = set().union(*(words_of(read(name)) for name in sources()))
    named |= {word for name in sources() for word in words_of(name)}
    for page, text in texts.items():
        if page == "docs/kernels.md":  # written by tests/kernels_table.py, of names that macros make
            continue
        for word in sorted(words_of(text) - named):
            if not any(name.startswith(word) for name in named):
                yield f"{page}: there is no {word}"


def check_bindings():
    """docs/reference.md has a row for each call, of names that a2a.hpp and the Python package have."""
    bindings = {"C++": words_in("include/a2a.hpp"), "Python": set().union(*map(words_in, python_package()))}
    table = read("docs/reference.md").partition("## In C++ and Python")[2]
    rows = re.findall(r"^\| `(a2a_\w+)` \| (.*) \| (.*) \|$", table, re.M)
    for missing in sorted(functions_of_header() - {call for call, *_ in rows}):
        yield f"docs/reference.md: {missing} has no row in the table of C++ and Python"
    for call, *cells in rows:
        for (language, known), cell in zip(bindings.items(), cells, strict=True):
            for word in re.findall(r"\w+", " ".join(re.findall(r"`(.*?)`", cell))):
                if word not in known:
                    yield f"docs/reference.md: {call}: there is no {word} in {language}"


def words_in(name):
    return set(re.findall(r"\w+", read(name)))


def python_package():
    return [name for name in sources() if name.startswith("examples/python/a2a/")]


def check_environment():
    """docs/environment.md has a row for each variable that a source names, and no other."""
    documented = set(re.findall(r"^\| `(A2A_\w+)`", read(ENVIRONMENT), re.M))
    symbols = symbols_of_header()
    used = {}
    for name in sources():
        for word in re.findall(VARIABLES.get(Path(name).suffix, VARIABLE), read(name)):
            if word not in symbols and word not in NO_VARIABLES:
                used.setdefault(word, name)
    for word in sorted(used.keys() - documented):
        yield f"{ENVIRONMENT}: lacks {word}, which {used[word]} reads"
    for word in sorted(documented - used.keys()):
        yield f"{ENVIRONMENT}: has {word}, which nothing reads"


def anchors_of(text):
    """What GitHub makes of headings."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```$", "", text, flags=re.S | re.M), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def check_links(texts):
    for page in texts:
        for link in re.findall(r"\]\(([^)\s]+)\)", prose_of(page)):
            target, _, anchor = link.partition("#")
            if urllib.parse.urlparse(link).scheme:
                continue
            path = (ROOT / page).parent / target if target else ROOT / page
            if not path.exists():
                yield f"{page}: {link} leads nowhere"
            elif anchor and path.suffix == ".md" and anchor not in anchors_of(path.read_text()):
                yield f"{page}: {link}: there is no such heading"


def check_index(texts):
    """docs/README.md links every page of docs/."""
    linked = set(re.findall(r"\]\(([^)#\s]+)", texts["docs/README.md"]))
    for page in texts:
        if page.startswith("docs/") and page != "docs/README.md" and page.removeprefix("docs/") not in linked:
            yield f"docs/README.md: has no link to {page}"


def main():
    OUT.mkdir(parents=True, exist_ok=True)
    every = {page: read(page) for page in pages()}
    wanted = sys.argv[1:] or list(every)
    known = Known()
    ran = skipped = 0
    failures = []
    for page in wanted:
        for block, failure in check_blocks(page, known):
            if failure:
                failures.append(f"{block.where}: the {block.language} block {failure}")
            elif block.not_run:
                skipped += 1
                print(f"{block.where}: not run: {block.not_run}")
            elif block.language != "text" or block.prints:
                ran += 1
    failures += [*check_names(every), *check_bindings(), *check_environment(), *check_links(every), *check_index(every)]
    for failure in failures:
        print(f"FAIL {failure}")
    print(f"{len(wanted)} pages: {ran} blocks checked, {skipped} not run, {len(failures)} failures")
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())
