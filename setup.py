"""Build the native CPU kernels; everything else about the package is in pyproject.toml.

The library has no Python interface, so one wheel serves every Python version. A machine without
a C compiler gets one as a build requirement: the ``ziglang`` wheel brings clang and a C library.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

NATIVE = Path("kernels", "native")
FLAGS = [
    *("-std=gnu11", "-O3", "-fPIC", "-shared", "-s", "-pthread", "-fvisibility=hidden"),
    *("-ffp-contract=fast", "-Wall", "-Wextra", "-Wno-psabi"),
]
ZIG = [sys.executable, "-m", "ziglang", "cc"]
# Without these zig builds for the processor at hand only, and traps what C leaves undefined.
ZIG_FLAGS = ["-mcpu=baseline", "-fno-sanitize=undefined"]
PROBE = "#include <pthread.h>\n#include <string.h>\nint probe(void) { return 0; }\n"


def _works(compiler: list[str]) -> bool:
    """Whether a compiler is there and has the C library's headers, which are packaged apart."""
    if shutil.which(compiler[0]) is None:
        return False
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.c")
        source.write_text(PROBE, encoding="utf-8")
        command = [*compiler, "-shared", "-fPIC", str(source), "-o", str(Path(folder, "probe.so"))]
        return subprocess.run(command, capture_output=True, check=False).returncode == 0


def find_compiler() -> list[str] | None:
    """Return the command of the machine's own C compiler, $CC first, or None without one."""
    named = os.environ.get("CC")
    if named:
        # A name that does not work is left to fail in the build, where its error is seen.
        return shlex.split(named)
    return next((found for found in (["cc"], ["gcc"], ["clang"]) if _works(found)), None)


class BuildScan(build_ext):
    """Compile a library without a Python interface, with whichever C compiler there is."""

    def get_ext_filename(self, fullname: str) -> str:
        """Return the path without Python's version in its name."""
        return str(Path(*fullname.split("."))) + ".so"

    def build_extension(self, ext: Extension) -> None:
        """Run the compiler once for all source files."""
        target = Path(self.get_ext_fullpath(ext.name)).absolute()
        target.parent.mkdir(parents=True, exist_ok=True)
        compiler = find_compiler()
        with tempfile.TemporaryDirectory() as cache:
            command = [*(compiler or [*ZIG, *ZIG_FLAGS]), *FLAGS, *map(str, ext.sources)]
            # Linked under another name and moved: a process that runs the old one keeps it.
            fresh = target.with_suffix(".new")
            print(shlex.join(command), flush=True)
            subprocess.run(
                [*command, "-o", str(fresh)],
                check=True,
                env={**os.environ, "ZIG_GLOBAL_CACHE_DIR": cache, "ZIG_LOCAL_CACHE_DIR": cache},
            )
            fresh.replace(target)


class PlatformWheel(bdist_wheel):
    """A wheel for one platform and every Python 3."""

    def get_tag(self) -> tuple[str, str, str]:
        """Return the tag, which would otherwise name this Python and its interface."""
        return ("py3", "none", super().get_tag()[2])


if __name__ == "__main__":
    setup(
        ext_modules=[
            Extension(
                "mambamic.kernels._scan2d",
                sources=[str(path) for path in sorted(NATIVE.glob("*.c"))],
                depends=[str(path) for path in sorted(NATIVE.glob("*.h"))],
            )
        ],
        cmdclass={"build_ext": BuildScan, "bdist_wheel": PlatformWheel},
        setup_requires=[] if find_compiler() else ["ziglang"],
    )
