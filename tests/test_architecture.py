"""Imports go one way, and every module says what it offers."""

import ast
import math
from pathlib import Path

import pytest

import lightning_acu

PACKAGE = Path(lightning_acu.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))

#: From the ground up: a module may import those of its own level's room and of lower levels.
LEVELS = [
    {"choices"},
    {"checks", "files", "geometry", "sharded"},
    {"dilation", "expansion", "rounding"},
    {"ops"},
    {"functional", "tuning"},
    {"folded", "plain"},
    {"grid_fold", "forms"},
    {"conv"},
    {"active_shift", "derived", "timm_convs", "statistics", "receptive_field"},
    {"efficientnet_convs"},
    {"transformers_convs"},
    {"surgery", "metrics", "figures", "training"},
    {"callbacks", "export", "integrations"},
    {"models", "data"},
    {"classifier"},
    {"saving"},
    {"checkpoint", "cifar_models", "view"},
    {"cli"},
    {"__main__"},
]
LEVEL = {room: level for level, rooms in enumerate(LEVELS) for room in rooms}

#: Third-party packages that only some rooms may use.
ALLOWED = {
    "lightning": {"callbacks", "models", "data", "classifier", "saving", "cli"},
    "transformers": {"integrations"},
    "timm": {"timm_convs", "surgery", "models", "data", "saving", "cli"},
    "torchvision": {"models", "data", "cli"},
    "torchmetrics": {"classifier", "metrics", "callbacks"},
    "scipy": {"rounding"},
    "triton": {"ops"},
    "matplotlib": {"figures"},
    "rich": {"surgery", "cli"},
    "onnxruntime": {"surgery", "export"},
    "safetensors": {"saving", "data"},
    "huggingface_hub": {"saving"},
}


def room(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(source, folder=()):
    """(top-level package or None for ours, module, or room of ours) of each import, also in functions.

    ``folder`` says where the file is in the package, for relative imports.
    """
    ours = lightning_acu.__name__
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if node.level:
                module = ".".join([ours, *folder[: len(folder) - node.level + 1], *filter(None, [module])])
            # `from lightning_acu import y`: y is a room, or a name that a room has
            names = [f"{ours}.{alias.name}" for alias in node.names] if module == ours else [module]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        for name in names:
            package, _, rest = name.partition(".")
            if package == ours:
                first = rest.split(".")[0] or "__init__"
                if first != "__version__":  # which the package says before it has any room
                    yield None, lightning_acu._HOME.get(first, first)
            else:
                yield package, name


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("from ..conv import ACUConv2d", (None, "conv")),
        ("from .. import conv", (None, "conv")),
        ("from . import schedules", (None, "callbacks")),
        ("from ._clock import Moment", (None, "callbacks")),
        ("def f():\n    from ..ops.op import acu", (None, "ops")),
        ("import lightning_acu.conv", (None, "conv")),
        ("import lightning_acu.ops.op as op", (None, "ops")),
        ("from lightning_acu.ops.op import acu", (None, "ops")),
        ("def f():\n    from lightning_acu import conv", (None, "conv")),
        ("from lightning_acu import ACUConv2d", (None, "conv")),
        ("import lightning_acu", (None, "__init__")),
        ("from torch.nn import functional", ("torch", "torch.nn")),
        ("import torch.nn", ("torch", "torch.nn")),
    ],
)
def test_all_ways_to_import_are_seen(source, expected):
    assert list(imports(source, ("callbacks",))) == [expected]


@pytest.mark.parametrize("path", [path for path in FILES if room(path) != "__init__"], ids=lambda p: p.stem)
def test_imports_go_one_way(path):
    for package, module in imports(path.read_text(), path.relative_to(PACKAGE).parts[:-1]):
        if package is None and module != room(path):
            assert LEVEL.get(module, math.inf) < LEVEL[room(path)], f"{room(path)} must not import {module}"
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
