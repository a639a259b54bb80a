"""Compares the names that stand in the pages with those that there are: the header's, variables of the environment, links."""

import functools
import os
import re
import urllib.parse
from pathlib import Path

from pages import ROOT, pages, prose_of, read

REFERENCE = "docs/reference.md"
ENVIRONMENT = "docs/environment.md"
INDEX = "docs/README.md"
KERNELS = "docs/kernels.md"  # written by tests/kernels_table.py, of names that macros make

# How a source names a variable of the environment; where macros, or variables of CMake's, look like one, by how it is read.
VARIABLE = r"\b(A2A_[A-Z0-9_]*[A-Z0-9])\b"
QUOTED, IN_CMAKE = f'"{VARIABLE}"', rf"ENV\{{{VARIABLE}"
VARIABLES = dict.fromkeys((".c", ".cpp", ".cu", ".cuh", ".h", ".hpp"), QUOTED) | dict.fromkeys((".cmake", ".in", ".txt"), IN_CMAKE)
NO_VARIABLES = {
    "A2A_H",  # the guard of a2a.h
    "A2A_FATBIN",  # from build.rs to the crate
    "A2A_ROOT", "A2A_SOURCE", "A2A_CARGO_TARGET_DIR", "A2A_CARGO_ARGUMENTS",  # CMake's, as the Makefile passes them
}


def check_names():
    """Yields a sentence for each thing that is missing, or is not there."""
    texts = {page: read(page) for page in pages()}
    yield from check_symbols(texts)
    yield from check_bindings()
    yield from check_environment()
    yield from check_links(texts)
    yield from check_index(texts)


@functools.cache
def sources():
    """By name, the text of each file of the repository that is neither a page nor data."""
    kinds = (".rs", ".py", ".sh", ".c", ".h", ".hpp", ".cpp", ".cu", ".cuh", ".toml", ".cmake", ".in")
    found = {}
    for folder, inside, names in os.walk(ROOT):
        inside[:] = [name for name in inside if name not in ("target", ".git", "corpus", "__pycache__")]
        for name in names:
            if name.endswith(kinds) or name in ("Makefile", "CMakeLists.txt", "run"):
                path = str((Path(folder) / name).relative_to(ROOT))
                found[path] = read(path)
    return found


@functools.cache
def header():
    """include/a2a.h without its comments."""
    return re.sub(r"/\*.*?\*/", "", read("include/a2a.h"), flags=re.S)


def functions():
    return set(re.findall(r"\b(a2a_\w+)\(", header()))


def symbols():
    """Functions, structs, constants and types of the header."""
    types = re.findall(r"\b(a2a_\w+)(?=;| \{)", header()) + re.findall(r"\(\*(a2a_\w+)\)", header())
    constants = re.findall(r"^#define (A2A_\w+) .", header(), re.M)
    return functions() | set(types) | set(constants)


def names_in(text):
    return set(re.findall(r"\b(?:a2a|A2A)_\w*\w\b", text))


def prefixes_in(text):
    """`a2a_stream_*` and its like: names of which only the beginning is given."""
    return set(re.findall(r"\b((?:a2a|A2A)_\w*)\*", text))


def check_symbols(texts):
    """Every symbol of the header stands in a page, and every name in a page in the header or another source."""
    written = set().union(*map(names_in, texts.values()))
    for symbol in sorted(symbols() - written):
        yield f"include/a2a.h: {symbol} stands in no page ({REFERENCE} has a table of all)"
    known = set().union(*(names_in(name) | names_in(text) for name, text in sources().items()))
    for page, text in texts.items():
        if page == KERNELS:
            continue
        begun = prefixes_in(text)
        for name in sorted(names_in(text) - begun - known):
            yield f"{page}: there is no {name}"
        for prefix in sorted(begun):
            if not any(name.startswith(prefix) for name in known):
                yield f"{page}: there is no {prefix}*"


def check_bindings():
    """The reference has a row for each call, of names that a2a.hpp and the Python package have."""
    package = "\n".join(text for name, text in sources().items() if name.startswith("examples/python/a2a/"))
    known = {"C++": set(re.findall(r"\w+", read("include/a2a.hpp"))), "Python": set(re.findall(r"\w+", package))}
    table = read(REFERENCE).partition("## In C++ and Python")[2]
    rows = re.findall(r"^\| `(a2a_\w+)` \| (.*) \| (.*) \|$", table, re.M)
    for call in sorted(functions() - {call for call, *_ in rows}):
        yield f"{REFERENCE}: {call} has no row in the table of C++ and Python"
    for call, *cells in rows:
        for (language, words), cell in zip(known.items(), cells, strict=True):
            for word in re.findall(r"\w+", " ".join(re.findall(r"`(.*?)`", cell))):
                if word not in words:
                    yield f"{REFERENCE}: {call}: there is no {word} in {language}"


def check_environment():
    """Its page has a row for each variable that a source names, and no other."""
    documented = set(re.findall(r"^\| `(A2A_\w+)`", read(ENVIRONMENT), re.M))
    used = {}
    for source, text in sources().items():
        for name in re.findall(VARIABLES.get(Path(source).suffix, VARIABLE), text):
            if name not in symbols() | NO_VARIABLES:
                used.setdefault(name, source)
    for name in sorted(used.keys() - documented):
        yield f"{ENVIRONMENT}: lacks {name}, which {used[name]} names"
    for name in sorted(documented - used.keys()):
        yield f"{ENVIRONMENT}: has {name}, which no source names"


def check_links(texts):
    for page in texts:
        for link in re.findall(r"\]\(([^)\s]+)\)", prose_of(page)):
            if urllib.parse.urlparse(link).scheme:
                continue
            target, _, anchor = link.partition("#")
            path = (ROOT / page).parent / target if target else ROOT / page
            if not path.exists():
                yield f"{page}: {link} leads nowhere"
            elif anchor and path.suffix == ".md" and anchor not in anchors_of(path):
                yield f"{page}: {link}: there is no such heading"


def anchors_of(page):
    """What GitHub makes of headings."""
    headings = re.findall(r"^#+ (.+)$", prose_of(page), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def check_index(texts):
    linked = set(re.findall(r"\]\(([^)#\s]+)", texts[INDEX]))
    for page in texts:
        if page.startswith("docs/") and page != INDEX and page.removeprefix("docs/") not in linked:
            yield f"{INDEX}: has no link to {page}"
