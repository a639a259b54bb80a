"""The pages, and the blocks of code in them."""

import dataclasses
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


class Failure(Exception):
    """What is wrong with a page, in a sentence or a program's own words."""


@dataclasses.dataclass
class Block:
    page: str
    line: int  # of its fence, from 1
    language: str
    comment: str  # what stands in the line above it
    text: str = ""

    @property
    def where(self):
        return f"{self.page}:{self.line}"

    @property
    def not_run(self):
        """The reason, or None."""
        return self._said("not run: (.+)")

    @property
    def file(self):
        """The name under which shell blocks have it, or None."""
        return self._said("file: (.+)")

    @property
    def prints(self):
        """Whether it is what the block before it prints."""
        return self._said("(prints)") is not None

    @property
    def framed(self):
        """Whether it is a fragment that a frame completes, of Python; of C and C++ that shows by itself."""
        return self._said("in (frame.py)") is not None

    def _said(self, pattern):
        found = re.fullmatch(f"<!-- {pattern} -->", self.comment)
        return found and found[1]


def read(name):
    return (ROOT / name).read_text()


def pages():
    return ["README.md", "CONTRIBUTING.md", "SECURITY.md"] + sorted(
        str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md")
    )


def blocks_of(page):
    blocks, opened, above = [], None, ""
    for number, line in enumerate(read(page).splitlines(), 1):
        fence = re.match(r"(\s*)(```|~~~)(.*)", line)
        if opened is None and fence:
            if fence[1] or fence[2] != "```":
                raise Failure(f"{page}:{number}: a block begins with ``` at the beginning of a line, or is not found")
            opened = Block(page, number, fence[3].strip(), above.strip())
        elif opened is not None and line.rstrip() == "```":
            blocks.append(opened)
            opened = None
        elif opened is not None:
            opened.text += line + "\n"
        above = line
    if opened is not None:
        raise Failure(f"{opened.where}: the block is never closed")
    return blocks


def prose_of(page):
    """The page without its blocks."""
    return re.sub(r"^```.*?^```$", "", read(page), flags=re.S | re.M)
