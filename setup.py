"""Builds ``nlhf_kernels._native``, the compiled CPU backend; the rest is in pyproject.toml."""

import os
import sys
from glob import glob

from pybind11.setup_helpers import Pybind11Extension, build_ext
from setuptools import setup
from setuptools.errors import CompileError, LinkError

OPENMP = [] if sys.platform in ("darwin", "win32") else ["-fopenmp"]
# no -ffast-math: infinities and NaN are part of the contract. Of the flags here only -fopenmp-simd
# changes results, since it lets the sums marked so be reordered; it needs no OpenMP library
OPTIMIZE = ["-O3", "-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math"]
if sys.platform == "win32":
    OPTIMIZE = []


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


setup(
    ext_modules=[
        Pybind11Extension(
            "nlhf_kernels._native",
            sorted(glob("csrc/**/*.cpp", recursive=True)),
            depends=sorted(
                glob("csrc/**/*.h", recursive=True) + glob("csrc/**/*.inl", recursive=True)
            ),
            include_dirs=["csrc"],
            cxx_std=17,
            extra_compile_args=[*OPTIMIZE, *OPENMP],
            extra_link_args=OPENMP,
            # without a compiler the package still installs, and the registry gives the reason
            optional=os.environ.get("NLHF_REQUIRE_NATIVE", "0") != "1",
        )
    ],
    cmdclass={"build_ext": BuildExt},
)
