"""Checks the pages: their code works, their links lead somewhere, and what the library has stands in them.

    python tests/docs/check.py [PAGE...]

Pages are README.md, CONTRIBUTING.md, SECURITY.md and docs/. What becomes of a block of code depends on its language:

    c, cpp      a whole program (it has a main) is compiled and run; a fragment is compiled inside frame.c or frame.cpp,
                which declare what fragments use
    python      the blocks of a page, one behind the other, are one program, which is run; a fragment is run behind frame.py
    sh          bash runs it where the folders of the repository are, with an installation that pkg-config and CMake find
    json        is parsed
    text        is shown, and nothing else

A comment in the line above a block can say otherwise:

    <!-- not run: REASON -->    the reason is printed; of shell blocks, targets of make, tests of cargo, options of a2a-perf and
                                files are compared with what there is all the same
    <!-- prints -->             of a text block: what the block before it prints; "..." stands for anything
    <!-- file: NAME -->         shell blocks of the page find it under this name
    <!-- in frame.py -->        it is a fragment of Python

Then every name of the header, variable of the environment and link is compared (names.py). `make test-docs` builds what this needs.
"""

import sys

from blocks import OUT, Known, check_blocks
from names import check_names
from pages import Failure, pages


def main():
    OUT.mkdir(parents=True, exist_ok=True)
    wanted = sys.argv[1:] or pages()
    known = Known()
    ran, skipped, failures = 0, 0, []
    for page in wanted:
        try:
            for block, failure in check_blocks(page, known):
                if failure:
                    failures.append(f"{block.where}: the {block.language} block {failure}")
                elif block.not_run:
                    skipped += 1
                    print(f"{block.where}: not run: {block.not_run}")
                elif block.language != "text" or block.prints:
                    ran += 1
        except Failure as failure:  # of the page, not of a block
            failures.append(str(failure))
    failures += check_names()
    for failure in failures:
        print(f"FAIL {failure}")
    print(f"{len(wanted)} pages: {ran} blocks checked, {skipped} not run, {len(failures)} failures")
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())
