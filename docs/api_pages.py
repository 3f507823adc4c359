"""Which public names of the package are on which page of the API reference, and the pages themselves.

A page lists modules; every name in their ``__all__`` is on it, once, under its shortest path. The pages are written at
each build (``docs/api/``), so that a new public name needs nothing here.
"""

from __future__ import annotations

import inspect
import re
import sys
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType

ROOT = "lightning_acu"


@dataclass(frozen=True)
class Page:
    """A page of the reference: a title, what it is about, and (module, names) pairs; None stands for all names."""

    file: str
    title: str
    text: str
    modules: tuple[tuple[str, tuple[str, ...] | None], ...]


def _page(file: str, title: str, text: str, *modules: str | tuple[str, ...]) -> Page:
    pairs = [(entry, None) if isinstance(entry, str) else (entry[0], entry[1:]) for entry in modules]
    return Page(file, title, text, tuple(pairs))


PAGES = (
    _page(
        "layers",
        "Operator and layers",
        "The function, the layers, and the active versions of timm's convolutions.",
        (ROOT, "acu_conv2d", "ACUConv2d", "acu_layers", "ActiveShift2d", "FoldedConv2d", "warm_up"),
        "lightning_acu.functional",
        "lightning_acu.timm_convs",
    ),
    _page(
        "surgery", "Surgery", "Convert whole models, report, round and fold: :doc:`/docs/surgery`.",
        "lightning_acu.surgery",
    ),
    _page(
        "training", "Training", "Positions in any training loop: :doc:`/docs/training`.",
        ("lightning_acu.training", "PositionTrainer"),  # first
        "lightning_acu.training",
    ),
    _page(
        "callbacks", "Callbacks", "Positions in a Lightning training: :doc:`/docs/training`.",
        "lightning_acu.callbacks",
        "lightning_acu.callbacks.schedules",
    ),
    _page("metrics", "Metrics", "How far taps moved, as numbers and as torchmetrics.", "lightning_acu.metrics"),
    _page("figures", "Figures", "Pictures and films of shapes: :doc:`/docs/gallery`.", "lightning_acu.figures"),
    _page(
        "saving", "Saving", "Converted models in files, folders and checkpoints: :doc:`/docs/surgery`.",
        "lightning_acu.saving",
        "lightning_acu.saving.checkpoint",
        "lightning_acu.checkpoint",
    ),
    _page("export", "Export", "ONNX, torch.export, TorchScript: :doc:`/docs/deployment`.", "lightning_acu.export"),
    _page(
        "models", "Models", "Models by name, and the classifier that trains them.",
        (ROOT, "ImageClassifier"),
        "lightning_acu.models",
        "lightning_acu.models.cifar",
    ),
    _page("data", "Data", "Data modules for image classification.", "lightning_acu.data"),
    _page(
        "integrations", "Integrations", "Other people's training programs: :doc:`/docs/recipes/README`.",
        "lightning_acu.integrations",
        "lightning_acu.integrations.huggingface",
        "lightning_acu.integrations.run",
    ),
)  # fmt: skip


def _room(module_name: str) -> str | None:
    """The part of the package that a module is in; None for the package itself and for other packages."""
    return module_name.split(".")[1] if module_name.startswith(f"{ROOT}.") else None


def entries(page: Page) -> list[tuple[str, object]]:
    """(path, object) of what ``page`` documents, in the order of ``__all__``.

    Left out: modules, repetitions, and what is defined in a room that has a page of its own.
    """
    root = import_module(ROOT)
    rooms = {_room(name) for name, _ in page.modules}
    other_rooms = {_room(name) for other in PAGES for name, _ in other.modules} - rooms - {None}
    found: dict[str, object] = {}
    for module_name, names in page.modules:
        module = import_module(module_name)
        for name in names or module.__all__:
            value = getattr(module, name)
            if isinstance(value, ModuleType) or _room(getattr(value, "__module__", "")) in other_rooms:
                continue
            shortest = name in root.__all__ and getattr(root, name) is value
            path = f"{ROOT if shortest else module_name}.{name}"
            if path not in found and not any(value is other for other in found.values()):
                found[path] = value
    return list(found.items())


def _comment(path: str) -> str:
    """The ``#:`` comment above a constant, from the module of its room that assigns it."""
    room, _, name = path.rpartition(".")
    for module_name, module in sorted(sys.modules.items()):
        if f"{module_name}.".startswith(f"{room}.") and getattr(module, "__file__", None):
            found = re.search(rf"((?:^#: .*\n)+){name} = ", Path(module.__file__).read_text(), re.MULTILINE)
            if found:
                return " ".join(line.removeprefix("#: ") for line in found[1].splitlines())
    raise LookupError(f"{path} has no comment that starts with `#:` above its assignment")


def _hooks(cls: type) -> list[str]:
    """Methods that a trainer calls: those of a callback that its base class, of another package, has too."""
    bases = [base for base in cls.__mro__ if base.__name__ == "Callback" and _room(base.__module__) is None]
    return sorted(name for name in vars(cls) if name[0] != "_" and any(hasattr(base, name) for base in bases))


def _directive(path: str, value: object) -> tuple[str, str]:
    """The section of a documented object, and its text."""
    if inspect.isclass(value):
        options = ["   :members:\n"]
        if value.__bases__ != (object,):
            options.append("   :show-inheritance:\n")
        if hooks := _hooks(value):
            options.append(f"   :exclude-members: {', '.join(hooks)}\n")
        return "Classes", f".. autoclass:: {path}\n{''.join(options)}"
    if inspect.isfunction(value):
        return "Functions", f".. autofunction:: {path}\n"
    return "Constants and types", f".. py:data:: {path}\n   :value: {value!r}\n\n   {_comment(path)}\n"


def _heading(text: str, line: str) -> str:
    return f"{text}\n{line * len(text)}\n"


def text_of(page: Page) -> str:
    """``page`` as reStructuredText: a table of all names, then each with its docstring."""
    parts = [".. highlight:: python\n", _heading(page.title, "="), page.text + "\n"]
    parts += [f".. py:module:: {name}\n" for name, names in page.modules if names is None]
    parts += [".. py:currentmodule:: None\n"]  # names in tables are complete
    sections: dict[str, list[tuple[str, str]]] = {"Classes": [], "Functions": [], "Constants and types": []}
    for path, value in entries(page):
        section, directive = _directive(path, value)
        sections[section].append((path, directive))
    for section, documented in sections.items():
        if not documented:
            continue
        parts.append(_heading(section, "-"))
        if section != "Constants and types":  # Sphinx would show the docstrings of str and tuple
            parts.append(".. autosummary::\n   :nosignatures:\n\n" + "".join(f"   ~{path}\n" for path, _ in documented))
        parts += [directive for _, directive in documented]
    return "\n".join(parts)


def write(folder: Path) -> None:
    """Write all pages and their index into ``folder``; files that would not change are left alone."""
    index = "\n".join(
        [
            _heading("API reference", "="),
            "Every public name, from its docstring. Lengths are in pixels and times in optimizer steps, unless it says"
            " otherwise.\n",
            ".. toctree::\n   :hidden:\n",
            *(f"   {page.file}" for page in PAGES),
            "",
            *(f"- :doc:`{page.file}`. {page.text}" for page in PAGES),
            "",
        ]
    )
    folder.mkdir(exist_ok=True)
    for name, text in {"index": index, **{page.file: text_of(page) for page in PAGES}}.items():
        file = folder / f"{name}.rst"
        if not file.exists() or file.read_text() != text:
            file.write_text(text)
