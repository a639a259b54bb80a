"""What hatchling asks while it builds the wheel: which library goes in (A2A_LIBRARY, else the build tree's), and for which machine.

The tag is linux_<machine>, not manylinux: the library asks for the glibc of the machine that built it.
"""

import os
import sysconfig
from pathlib import Path

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class CarriesTheLibrary(BuildHookInterface):
    def initialize(self, version, build_data):
        library = Path(os.environ.get("A2A_LIBRARY") or Path(self.root, "../../target/release/liba2a.so")).resolve()
        if not library.is_file():
            raise FileNotFoundError(f"{library} is not there: build it with `make`, or name another by A2A_LIBRARY")
        build_data["force_include"][str(library)] = "a2a/liba2a.so.0"
        build_data["force_include"][str(Path(self.root, "../../LICENSE").resolve())] = "a2a/LICENSE"
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{sysconfig.get_platform().replace('-', '_').replace('.', '_')}"
