"""Builds ``nlhf_kernels._native``, the compiled CPU backend; the rest is in pyproject.toml."""

import os
import sys
from glob import glob

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext
from setuptools import setup
from setuptools.errors import CompileError, LinkError

OPENMP = [] if sys.platform in ("darwin", "win32") else ["-fopenmp"]
# no -ffast-math: infinities and NaN are part of the contract. Of the flags here only -fopenmp-simd
# changes results, since it lets the sums marked so be reordered; it needs no OpenMP library
OPTIMIZE = ["-O3", "-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math"]
if sys.platform == "win32":
    OPTIMIZE = []
SANITIZERS = {
    "": [],
    "address": ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "thread": ["-fsanitize=thread"],
}
SANITIZER = os.environ.get("NLHF_SANITIZE", "")
if SANITIZER not in SANITIZERS:
    sys.exit(f'setup.py: NLHF_SANITIZE must be "address" or "thread", got "{SANITIZER}"')
if SANITIZER:
    # Python's own flags define what overflows. The undefined registers that gcc would warn of are
    # those of the intrinsics, in its own headers
    OPTIMIZE += ["-O1", "-g1", "-fno-omit-frame-pointer", "-fno-wrapv"]
    OPTIMIZE += ["-Wno-uninitialized", "-Wno-maybe-uninitialized"]
if SANITIZER == "thread":
    # no library of OpenMP says to a sanitizer which of its threads waited for which
    OPENMP = []
FLAGS = [*OPTIMIZE, *OPENMP, *SANITIZERS[SANITIZER]]
LINK = [*OPENMP, *SANITIZERS[SANITIZER]]


class BuildExt(build_ext):
    """Builds with OpenMP, or single-threaded where the compiler has none."""

    def build_extension(self, ext):
        try:
            super().build_extension(ext)
        except (CompileError, LinkError):
            if not OPENMP:
                raise
            self.warn("compiling again without OpenMP")
            ext.extra_compile_args = [x for x in ext.extra_compile_args if x not in OPENMP]
            ext.extra_link_args = [x for x in ext.extra_link_args if x not in OPENMP]
            super().build_extension(ext)


class BuildCounts(BuildExt):
    """``build_counts``: the ops without the bindings, compiled as the module is, for callgrind."""

    def build_extension(self, ext):
        sources = [x for x in ext.sources if not x.endswith("bindings.cpp")]
        objects = self.compiler.compile(
            [*sources, "bench/counts.cpp"],
            output_dir=self.build_temp,
            include_dirs=ext.include_dirs,
            extra_postargs=ext.extra_compile_args,
        )
        self.compiler.link_executable(
            objects,
            "counts",
            output_dir=self.build_temp,
            extra_postargs=ext.extra_link_args,
            target_lang="c++",
        )


ParallelCompile().install()
setup(
    ext_modules=[
        Pybind11Extension(
            "nlhf_kernels._native",
            sorted(glob("csrc/**/*.cpp", recursive=True)),
            depends=[
                "setup.py",
                *glob("csrc/**/*.h", recursive=True),
                *glob("csrc/**/*.inl", recursive=True),
            ],
            include_dirs=["csrc"],
            cxx_std=17,
            extra_compile_args=FLAGS,
            extra_link_args=LINK,
            # without a compiler the package still installs, and the registry gives the reason
            optional=os.environ.get("NLHF_REQUIRE_NATIVE", "0") != "1",
        )
    ],
    cmdclass={"build_ext": BuildExt, "build_counts": BuildCounts},
)
