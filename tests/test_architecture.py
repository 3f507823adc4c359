"""Imports go one way, and every module says what it offers."""

import ast
from pathlib import Path

import pytest

import lightning_acu

PACKAGE = Path(lightning_acu.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))

#: From the ground up: a module may import those of its own level's room and of lower levels.
LEVELS = [
    {"checks", "geometry", "sharded"},
    {"expansion", "rounding"},
    {"ops"},
    {"functional"},
    {"folded", "taps"},
    {"conv"},
    {"timm_convs"},
    {"surgery", "metrics", "figures"},
    {"callbacks", "export"},
    {"models", "data"},
    {"classifier"},
    {"saving"},
    {"checkpoint"},
    {"cli"},
]
LEVEL = {room: level for level, rooms in enumerate(LEVELS) for room in rooms}

#: Third-party packages that only some rooms may use.
ALLOWED = {
    "lightning": {"callbacks", "models", "data", "classifier", "saving", "cli"},
    "timm": {"timm_convs", "surgery", "models", "data", "saving", "cli"},
    "torchvision": {"models", "data", "cli"},
    "torchmetrics": {"classifier", "metrics", "callbacks"},
    "scipy": {"rounding"},
    "triton": {"ops"},
    "matplotlib": {"figures"},
    "rich": {"surgery", "cli"},
    "onnxruntime": {"export"},
    "safetensors": {"saving", "data"},
}


def room(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path):
    """(top-level package or None for ours, module) of each import outside ``if TYPE_CHECKING``."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            here = path.relative_to(PACKAGE).parts[:-1]
            base = here[: len(here) - node.level + 1]
            names = [node.module] if node.module else [alias.name for alias in node.names]
            for name in names:
                yield None, [*base, *name.split(".")][0]
        elif isinstance(node, ast.ImportFrom):
            yield node.module.split(".")[0], node.module
        elif isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name.split(".")[0], alias.name


@pytest.mark.parametrize("path", [path for path in FILES if room(path) != "__init__"], ids=lambda p: p.stem)
def test_imports_go_one_way(path):
    for package, module in imports(path):
        if package is None and module != room(path):
            assert LEVEL[module] < LEVEL[room(path)], f"{room(path)} must not import {module}"
        if package in ALLOWED:
            assert room(path) in ALLOWED[package], f"{room(path)} must not import {package}"


def test_every_room_is_on_the_map():
    assert {room(path) for path in FILES} - {"__init__"} == set(LEVEL)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_every_module_has_all_and_a_docstring(path):
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree)
    names = [getattr(t, "id", None) for node in tree.body if isinstance(node, ast.Assign) for t in node.targets]
    assert "__all__" in names


def test_every_public_name_can_be_imported():
    for name in lightning_acu.__all__:
        assert getattr(lightning_acu, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'ACUConv3d'"):
        lightning_acu.ACUConv3d  # noqa: B018
