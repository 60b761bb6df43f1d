"""Builds the native kernels: one shared library, in which the same source is compiled for several machines. And a small
one for bytes between the ranks of a group.

Both are optional: without a compiler the install succeeds, the reference kernels compute, and waiting takes longer.
Everything else about the package is in pyproject.toml.
"""

import os
import sys
import sysconfig
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

SOURCE = "kernels/native"
BYTES = "comm/group/native/bytes.cpp"
SHARED = ("interleave", "pool", "routing", "shoal")  # the same for all machines
FLAGS = [
    "-O1" if "-fsanitize" in os.environ.get("CXXFLAGS", "") else "-O3",  # checks make compiling slow
    "-std=c++17",
    "-fPIC",
    "-fvisibility=hidden",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-Wno-psabi",
    "-g0",
]
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
# GCC 12 warns of its own AVX-512 header.
AVX512 = [
    *AVX2,
    "-mavx512f",
    "-mavx512bw",
    "-mavx512vl",
    "-mavx512dq",
    "-mprefer-vector-width=512",
    "-Wno-uninitialized",
    "-Wno-maybe-uninitialized",
]

NEWER = {"avxvnni": "SHOAL_AVXVNNI"}  # homes that a compiler may not know, and what is defined if it does

MACHINE = sysconfig.get_platform().rsplit("-", 1)[-1].lower()
if MACHINE in ("x86_64", "amd64"):
    DEFINES = [("SHOAL_X86", "1")]
    HOMES = {
        "scalar": [],
        "avx2": AVX2,
        "avxvnni": [*AVX2, "-mavxvnni"],
        "avx512": AVX512,
        "avx512vnni": [*AVX512, "-mavx512vnni"],
    }
elif MACHINE in ("aarch64", "arm64"):
    DEFINES, HOMES = [("SHOAL_ARM", "1")], {"neon": [], "neon_dot": ["-march=armv8.2-a+dotprod"]}
else:
    DEFINES, HOMES = [], {"scalar": []}


def tell(text: str) -> None:
    """How far building is. pip keeps what its builds print to itself (but for `-v`), so `make` names a file that it
    shows meanwhile."""
    print(text, file=sys.stderr, flush=True)
    if place := os.environ.get("SHOAL_BUILD_LOG"):
        with Path(place).open("a", encoding="utf-8") as log:
            log.write(f"{text}\n")


class BuildKernels(build_ext):
    """Compiles `kernels.cpp` once per home, the rest once, and links them under fixed names; tells how far it is."""

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split("."))) + ".so"

    def _knows(self, flags: list[str]) -> bool:
        """Whether the compiler takes these flags."""
        probe = Path(self.build_temp) / "probe.cpp"
        probe.parent.mkdir(parents=True, exist_ok=True)
        probe.write_text("", encoding="utf-8")
        try:
            self.compiler.compile([str(probe)], self.build_temp, extra_postargs=flags)
        except CompileError:
            tell(
                f"this compiler does not know {flags[-1]}: a newer one makes faster kernels for some machines"
            )
            return False
        return True

    def build_extension(self, ext: Extension) -> None:
        if ext.sources == [BYTES]:
            self.link(ext, self.compiler.compile(ext.sources, self.build_temp, extra_postargs=FLAGS))
            return
        homes = {home: flags for home, flags in HOMES.items() if home not in NEWER or self._knows(flags)}
        defines = [*DEFINES, *((name, "1") for home, name in NEWER.items() if home in homes)]
        parts = [(f"{SOURCE}/{name}.cpp", name, defines, []) for name in SHARED]
        parts += [
            (f"{SOURCE}/kernels.cpp", home, [*defines, ("SHOAL_HOME", home)], flags)
            for home, flags in homes.items()
        ]
        began_s = time.monotonic()
        tell(
            f"compiling the kernels: {len(parts)} parts for {MACHINE}, a minute or two, more on a busy machine"
        )

        def compile_part(
            source: str, name: str, defines: list[tuple[str, str]], flags: list[str]
        ) -> list[str]:
            place = str(Path(self.build_temp) / name)
            return self.compiler.compile(
                [source], place, defines, extra_postargs=[*FLAGS, *flags], depends=ext.depends
            )

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            names = {pool.submit(compile_part, *part): part[1] for part in parts}
            for number, done in enumerate(as_completed(names), 1):
                if done.exception() is None:
                    took_s = time.monotonic() - began_s
                    left = f", about {took_s / number * (len(parts) - number):.0f} s left" * (
                        number < len(parts)
                    )
                    tell(f"compiled {number} of {len(parts)}: {names[done]}, after {took_s:.0f} s{left}")
        # In this order: of what several parts have, the linker takes the first, and that has to run on any machine.
        self.link(ext, [compiled for part in names for compiled in part.result()])

    def link(self, ext: Extension, objects: list[str]) -> None:
        threads = [] if sys.platform == "darwin" else ["-pthread"]
        self.compiler.link_shared_object(
            objects, self.get_ext_fullpath(ext.name), extra_postargs=threads, target_lang="c++"
        )


setup(
    ext_modules=[
        Extension(
            "shoal.kernels.libshoal",
            sources=[f"{SOURCE}/{name}.cpp" for name in ("kernels", *SHARED)],
            depends=sorted(map(str, Path(SOURCE).glob("*.h"))),
            language="c++",
            optional=True,
        ),
        Extension("shoal.comm.group.libshoal_bytes", sources=[BYTES], language="c++", optional=True),
    ],
    cmdclass={"build_ext": BuildKernels},
)
