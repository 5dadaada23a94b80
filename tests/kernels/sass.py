"""What an assembler made of a kernel, read with cuobjdump (Triton brings one)."""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import pytest

triton = pytest.importorskip("triton")
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


class Function(NamedTuple):
    """One kernel of a cubin."""

    registers: int  # of a thread
    stack: int  # bytes of stack and local memory
    code: list[tuple[int, str, str]]  # address, instruction without its suffixes, the whole line

    def count(self) -> Counter[str]:
        """How often each instruction stands in the code."""
        return Counter(name for _, name, _ in self.code)

    def hot_loop(self) -> Counter[str]:
        """Of the shortest loop with products and exponentials: how often each instruction stands in it."""
        found = []
        for address, name, line in self.code:
            target = re.search(r"0x([0-9a-f]+)", line)
            if name == "BRA" and target and int(target[1], 16) < address:
                inside = [it for it in self.code if int(target[1], 16) <= it[0] <= address]
                names = Counter("EX2" if "MUFU.EX2" in text else name for _, name, text in inside)
                if names["HMMA"] and names["EX2"] >= names["HMMA"] / 2.5:
                    found.append(names)
        return min(found, key=lambda names: names.total())


def functions(cubin: Path) -> dict[str, Function]:
    """All kernels, by their mangled names."""

    def read(what: str) -> str:
        return subprocess.run([str(CUOBJDUMP), what, str(cubin)], capture_output=True, text=True, check=True).stdout

    usage = {}
    for name, text in re.findall(r"Function (\S+):\s*\n?(.*)", read("-res-usage")):
        usage[name] = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    found = {}
    for name, text in re.findall(r"Function : (\S+)\n(.*?)(?=Function :|\Z)", read("--dump-sass"), re.DOTALL):
        lines = re.findall(r"/\*([0-9a-f]{4,5})\*/\s+((?:@!?U?P\w+\s+)?([A-Z0-9_]+)[^;]*);", text)
        code = [(int(address, 16), instruction, line) for address, line, instruction in lines]
        found[name] = Function(usage[name]["REG"], usage[name]["STACK"] + usage[name]["LOCAL"], code)
    return found
