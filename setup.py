"""Builds the native kernels: one shared library, in which the same source is compiled for several machines.

The library is optional: without a compiler the install succeeds, and the reference kernels compute. Everything else
about the package is in pyproject.toml.
"""

import os
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

SOURCE = "kernels/native"
SHARED = ("interleave", "pool", "shoal")  # the same for all machines
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

MACHINE = sysconfig.get_platform().rsplit("-", 1)[-1].lower()
if MACHINE in ("x86_64", "amd64"):
    DEFINES = [("SHOAL_X86", "1")]
    HOMES = {"scalar": [], "avx2": AVX2, "avx512": AVX512, "avx512vnni": [*AVX512, "-mavx512vnni"]}
elif MACHINE in ("aarch64", "arm64"):
    DEFINES, HOMES = [("SHOAL_ARM", "1")], {"neon": [], "neon_dot": ["-march=armv8.2-a+dotprod"]}
else:
    DEFINES, HOMES = [], {"scalar": []}


class BuildKernels(build_ext):
    """Compiles `kernels.cpp` once per home, the rest once, and links them under a fixed name."""

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split("."))) + ".so"

    def build_extension(self, ext: Extension) -> None:
        temporary = Path(self.build_temp)
        rest = [f"{SOURCE}/{name}.cpp" for name in SHARED]
        objects = self.compiler.compile(
            rest, str(temporary), DEFINES, extra_postargs=FLAGS, depends=ext.depends
        )

        def compile_home(home: str) -> list[str]:
            return self.compiler.compile(
                [f"{SOURCE}/kernels.cpp"],
                str(temporary / home),
                [*DEFINES, ("SHOAL_HOME", home)],
                extra_postargs=[*FLAGS, *HOMES[home]],
                depends=ext.depends,
            )

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for compiled in pool.map(compile_home, HOMES):
                objects += compiled
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
        )
    ],
    cmdclass={"build_ext": BuildKernels},
)
