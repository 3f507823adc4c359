"""What is shipped: the source distribution, the wheel built from it, and wheels built where there is no compiler."""

import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import Cython.Build
import pytest
import setuptools
import torch
from setuptools.command.build_ext import build_ext

from lightning_acu.ops.cpu import backend as cpu_backend

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
OPS = "lightning_acu/ops/cpu/"
KERNELS = {path.stem for path in (ROOT / OPS).glob("*.pyx")}
SOURCES = (".pyx", ".pxd", ".h", ".c")

USE = """
import sys, torch, lightning_acu
from lightning_acu.ops import available_backends
from lightning_acu.ops.cpu import backend as cpu_backend

assert lightning_acu.__file__.startswith(sys.argv[1]), lightning_acu.__file__
assert "cython" in available_backends()
case = torch.randn(2, 4, 6, 5), torch.randn(6, 2, 3, 3), torch.randn(9, 2)
expected = lightning_acu.acu_conv2d(*case, groups=2, backend="reference")
reason = cpu_backend.why_not(case[0])
for backend in ("auto", "dense", *(["cython"] if reason is None else [])):
    torch.testing.assert_close(lightning_acu.acu_conv2d(*case, groups=2, backend=backend), expected)
if reason is not None:
    try:
        lightning_acu.acu_conv2d(*case, groups=2, backend="cython")
    except RuntimeError as error:
        assert reason in str(error), error
    else:
        raise AssertionError("the missing backend ran")
print(reason)
"""


def run(code, *arguments, cwd, **environment):
    """What the program prints."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def build(kind, source, folder, before="", **environment):
    """Build an "sdist" or a "wheel" of `source`, without network, and unpack it in `folder`; the unpacked folder."""
    code = f"import sys\n{before}\nfrom setuptools import build_meta\nbuild_meta.build_{kind}(sys.argv[1])"
    run(code, folder, cwd=source, **environment)
    (archive,) = [path for path in folder.iterdir() if path.suffix in (".gz", ".whl")]
    shutil.unpack_archive(archive, folder / "unpacked", "zip" if kind == "wheel" else None, filter=None)
    return folder / "unpacked"


def files(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def compiled(names):
    return {name for name in names if name.endswith((".so", ".pyd"))}


def use(wheel):
    """Import and run the unpacked wheel, not the installation here; why the kernels are missing there, or "None"."""
    return run(USE, wheel, cwd=wheel.parent, PYTHONPATH=str(wheel)).strip()


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    """The unpacked source distribution."""
    source = tmp_path_factory.mktemp("source") / "source"
    ignored = shutil.ignore_patterns(".*", "build", "*.egg-info", "__pycache__", "runs", "*.so")
    shutil.copytree(ROOT, source, ignore=ignored)
    (unpacked,) = build("sdist", source, tmp_path_factory.mktemp("sdist")).iterdir()
    return unpacked


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory):
    """The wheel, compiled without optimisation: that takes a third of the time."""
    folder = tmp_path_factory.mktemp("wheel")
    compiler = folder.parent / f"{folder.name}_compiler"
    compiler.write_text('#!/bin/bash\nexec cc "${@/#-O3/-O0}"\n')
    compiler.chmod(0o755)
    return build("wheel", sdist, folder, CC=str(compiler))


@pytest.fixture(scope="module")
def pure_wheel(sdist, tmp_path_factory):
    """The wheel where the compiler does not work."""
    source = tmp_path_factory.mktemp("pure") / "source"
    shutil.copytree(sdist, source, ignore=shutil.ignore_patterns("build"))
    return build("wheel", source, tmp_path_factory.mktemp("pure_wheel"), CC="false")


def test_the_kernels_are_built_here():
    assert cpu_backend.why_not(torch.zeros(1, 1, 1, 1)) is None


def test_the_sdist_holds_what_a_build_needs(sdist):
    names = files(sdist)
    sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / OPS).iterdir() if path.suffix in SOURCES}
    assert f"{OPS}_product.pyx" in sources
    assert sources | {"LICENSE", "setup.py", "pyproject.toml", "configs/quickstart.yaml"} <= names
    assert not compiled(names)


def test_the_wheel_holds_the_kernels_and_the_configs_but_no_sources_or_tests(wheel):
    names = files(wheel)
    assert {Path(name).name.split(".")[0] for name in compiled(names)} == KERNELS
    assert {"lightning_acu/configs/quickstart.yaml", "lightning_acu/py.typed", "lightning_acu/ops/dense.py"} <= names
    assert "lightning_acu/configs/paper/cifar10_plain_acu.yaml" in names
    assert not {name for name in names if name.endswith(SOURCES)}
    assert {name.split("/")[0].split("-")[0] for name in names} == {"lightning_acu"}  # no tests, no configs beside it
    assert any(name.endswith("/LICENSE") for name in names)


def test_one_wheel_serves_every_python(wheel):
    """By Python's stable ABI."""
    (tag,) = [line for line in next(wheel.glob("*.dist-info/WHEEL")).read_text().splitlines() if "Tag:" in line]
    assert tag.startswith("Tag: cp311-abi3-")
    assert all(name.endswith((".abi3.so", ".pyd")) for name in compiled(files(wheel)))


def test_the_wheel_runs_its_kernels(wheel):
    assert use(wheel) == "None"


def test_without_a_compiler_all_but_the_kernels_works(pure_wheel):
    assert not compiled(files(pure_wheel))
    assert "the compiled extension is missing" in use(pure_wheel)


def test_without_cython_the_wheel_is_the_same(sdist, pure_wheel, tmp_path):
    (tmp_path / "wheel").mkdir()
    source = shutil.copytree(sdist, tmp_path / "source", ignore=shutil.ignore_patterns("build"))
    names = files(build("wheel", source, tmp_path / "wheel", before="sys.modules['Cython'] = None"))
    assert names == files(pure_wheel)


@pytest.fixture
def setup_arguments(monkeypatch):
    """What setup.py gives to setuptools."""
    given = {}
    monkeypatch.setattr(setuptools, "setup", lambda **arguments: given.update(arguments))
    monkeypatch.setattr(Cython.Build, "cythonize", lambda extensions, **options: extensions)
    runpy.run_path(str(ROOT / "setup.py"))
    return given


def flags(setup_arguments, monkeypatch, platform, compiler):
    """The compiler's and the linker's flags of each kernel on another platform."""
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(build_ext, "build_extensions", lambda command: None)  # do not compile
    command = setup_arguments["cmdclass"]["build_ext"](setuptools.Distribution())
    command.compiler, command.extensions = compiler, setup_arguments["ext_modules"]
    command.build_extensions()
    return [(extension.extra_compile_args, extension.extra_link_args) for extension in command.extensions]


class FakeCompiler(SimpleNamespace):
    """Accepts every flag."""

    def initialize(self):
        self.cc = "cl.exe"

    def compile(self, sources, **options):
        return sources

    def link_executable(self, *arguments, **options): ...


@pytest.mark.parametrize(("platform", "expected"), [("linux", ["-fopenmp"]), ("darwin", [])])
def test_openmp_is_used_on_linux_only(setup_arguments, monkeypatch, platform, expected):
    found = flags(setup_arguments, monkeypatch, platform, FakeCompiler(compiler_type="unix"))
    assert len(found) == len(KERNELS)
    for compile_flags, link_flags in found:
        assert "-O3" in compile_flags
        assert [flag for flag in compile_flags if "openmp" in flag] == link_flags == expected


def test_on_windows_clang_takes_the_place_of_msvc(setup_arguments, monkeypatch):
    monkeypatch.setattr(shutil, "which", {"clang-cl": "C:/LLVM/clang-cl.exe"}.get)
    compiler = FakeCompiler(compiler_type="msvc")
    found = flags(setup_arguments, monkeypatch, "win32", compiler)
    assert compiler.cc == "C:/LLVM/clang-cl.exe"
    assert all("/clang:-O3" in compile_flags and not link_flags for compile_flags, link_flags in found)


def test_on_windows_without_clang_the_kernels_are_left_out(setup_arguments, monkeypatch, capsys):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert flags(setup_arguments, monkeypatch, "win32", FakeCompiler(compiler_type="msvc")) == []
    assert "no clang-cl" in capsys.readouterr().err
