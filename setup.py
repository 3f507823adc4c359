"""What pyproject.toml cannot say: the CPU kernels, and the configs at the root of the repository inside the package."""

import os
import shutil
import sys
import sysconfig
import tempfile
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOM = "lightning_acu/ops/cpu/"
HEADERS = ["_platform", "_vectors", "_vector_isa", "_vector_types", "_vector_routines", "_transpose"]
HEADERS = [f"{ROOM}{name}.h" for name in HEADERS]
SHARED = [f"{ROOM}{name}.pxd" for name in ("_vectors", "_sampling", "_packing", "_cells", "_bands", "_jobs", "_planar")]

# No -march: the instruction set is chosen at run time. Numbers stay IEEE's (NaN and infinities mean something).
FLAGS = ["-O3", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-Wno-psabi"]


# Python's stable ABI: one wheel serves this and every later version. Python without a GIL has none yet.
OLDEST_PYTHON = (3, 11)
STABLE_MACROS = [("Py_LIMITED_API", "0x{:02x}{:02x}0000".format(*OLDEST_PYTHON))]
STABLE_ABI = sys.implementation.name == "cpython" and not sysconfig.get_config_var("Py_GIL_DISABLED")


class BuildKernels(build_ext):
    """Compiles as the platform needs it.

    The kernels are written in GCC's and Clang's dialect, which MSVC does not know: on Windows clang-cl compiles them.
    OpenMP only on Linux, where the library that torch has loaded serves them too; elsewhere they run on one thread.
    """

    def build_extensions(self) -> None:
        flags, openmp = FLAGS, []
        if self.compiler.compiler_type == "msvc":
            flags = [f"/clang:{flag}" for flag in FLAGS]
            self.compiler.initialize()
            self.compiler.cc = shutil.which("clang-cl")
            if self.compiler.cc is None:
                print("lightning_acu: no clang-cl, so the CPU kernels are left out", file=sys.stderr)
                self.extensions.clear()
        elif sys.platform == "linux" and self._compiles("-fopenmp"):
            openmp = ["-fopenmp"]
        for extension in self.extensions:
            extension.extra_compile_args += [*flags, *openmp]
            extension.extra_link_args += openmp
        super().build_extensions()

    def copy_extensions_to_source(self) -> None:
        super().copy_extensions_to_source()
        for extension in self.extensions:  # of two builds side by side, Python might import the older one
            built = Path(self.get_ext_filename(extension.name))
            if built.exists():
                for suffix in EXTENSION_SUFFIXES:
                    other = Path(*extension.name.split(".")).with_suffix(suffix)
                    if other != built:
                        other.unlink(missing_ok=True)

    def _compiles(self, flag: str) -> bool:
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder, "probe.c")
            source.write_text("#include <omp.h>\nint main(void) { return omp_get_max_threads() < 0; }\n")
            try:
                objects = self.compiler.compile([os.fspath(source)], output_dir=folder, extra_postargs=[flag])
                self.compiler.link_executable(objects, os.fspath(Path(folder, "probe")), extra_postargs=[flag])
            except Exception:  # each compiler class has errors of its own; any of them means no
                return False
        return True


class BuildWithConfigs(build_py):
    """Copies configs/ to lightning_acu/configs, so that a pip user has them too."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:  # an editable installation reads them where they are
            for source in sorted(Path("configs").rglob("*.yaml")):
                target = Path(self.build_lib, "lightning_acu", source)
                self.mkpath(str(target.parent))
                self.copy_file(str(source), str(target))


def kernels() -> list[Extension]:
    """The compiled modules; optional: where they cannot be built the package installs without them."""
    try:
        from Cython.Build import cythonize
    except ImportError:
        print("lightning_acu: no Cython, so the CPU kernels are left out", file=sys.stderr)
        return []
    names = ["_vectors", "_memory", "_positions"]
    names += ["_product", "_product_weight", "_channelwise", "_channelwise_weight"]
    names += ["_planar", "_planar_backward"]
    extensions = [
        Extension(
            f"lightning_acu.ops.cpu.{name}",
            [f"{ROOM}{name}.pyx"],
            depends=[*HEADERS, *SHARED],
            include_dirs=[ROOM],
            define_macros=STABLE_MACROS if STABLE_ABI else [],
            py_limited_api=STABLE_ABI,
        )
        for name in names
    ]
    directives: dict[str, object] = dict.fromkeys(("boundscheck", "wraparound", "initializedcheck"), False)
    directives |= {"language_level": 3, "cdivision": True}
    compiled: list[Extension] = cythonize(extensions, compiler_directives=directives, build_dir="build/cython")
    for extension in compiled:
        extension.optional = True  # cythonize makes new objects and forgets this
    return compiled


EXTENSIONS = kernels()
setup(
    cmdclass={"build_ext": BuildKernels, "build_py": BuildWithConfigs},
    ext_modules=EXTENSIONS,
    # The tag of the wheel: cp311-abi3.
    options={"bdist_wheel": {"py_limited_api": "cp{}{}".format(*OLDEST_PYTHON)}} if EXTENSIONS and STABLE_ABI else {},
)
