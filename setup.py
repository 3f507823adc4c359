"""What pyproject.toml cannot say: the CPU kernels, and the configs at the root of the repository inside the package."""

import os
import sys
import tempfile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOM = "lightning_acu/ops/cpu/"
HEADERS = [f"{ROOM}{name}.h" for name in ("_vectors", "_vector_isa", "_vector_types", "_vector_routines", "_transpose")]
SHARED = [f"{ROOM}{name}.pxd" for name in ("_vectors", "_sampling", "_packing", "_cells", "_bands", "_jobs")]

# No -march: the instruction set is chosen at run time. Numbers stay IEEE's (NaN and infinities mean something).
FLAGS = ["-O3", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-Wno-psabi"]


class BuildKernels(build_ext):
    """Uses OpenMP where the compiler has it; without, the kernels run on one thread."""

    def build_extensions(self) -> None:
        openmp = ["-fopenmp"] if sys.platform != "win32" and self._compiles("-fopenmp") else []
        for extension in self.extensions:
            extension.extra_compile_args += openmp
            extension.extra_link_args += openmp
        super().build_extensions()

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
    extensions = [
        Extension(
            f"lightning_acu.ops.cpu.{name}",
            [f"{ROOM}{name}.pyx"],
            depends=[*HEADERS, *SHARED],
            include_dirs=[ROOM],
            extra_compile_args=list(FLAGS),
        )
        for name in names
    ]
    directives: dict[str, object] = dict.fromkeys(("boundscheck", "wraparound", "initializedcheck"), False)
    directives |= {"language_level": 3, "cdivision": True}
    compiled: list[Extension] = cythonize(extensions, compiler_directives=directives, build_dir="build/cython")
    for extension in compiled:
        extension.optional = True  # cythonize makes new objects and forgets this
    return compiled


setup(cmdclass={"build_ext": BuildKernels, "build_py": BuildWithConfigs}, ext_modules=kernels())
