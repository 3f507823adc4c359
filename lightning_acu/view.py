"""The report of what a model has learned: its shapes, how they came about, how far it sees, and what its fold costs."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from .conv import acu_layers
from .figures.page import Fields, Frame, Note, TableOf, shapes_page
from .figures.shapes import shapes_of
from .receptive_field import receptive_energy, spread
from .surgery.arithmetic import default_input_size
from .surgery.report import report_acu

__all__ = ["view_model", "view_run"]

#: Random images for the effective receptive field.
_IMAGES = 4

#: Where a run's model is, best first; and the callback whose state has its film.
_CHECKPOINTS = ("final.ckpt", "checkpoints/last.ckpt", "rounded.ckpt", "before_rounding.ckpt")
_FILM = "OffsetLogger"


def view_run(
    source: str | os.PathLike[str],
    *,
    input_size: tuple[int, int, int] | None = None,
    class_path: str | None = None,
    trust: bool = False,
) -> str:
    """The report, an HTML page, of a run's folder, a Lightning checkpoint or a file of ``save_acu``.

    Args:
        source: the folder (with final.ckpt, or checkpoints/), or the file.
        input_size: see :func:`view_model`.
        class_path: "package.Class" of the LightningModule of a checkpoint, as for ``lightning-acu export``.
        trust: let the file execute code and import what it names; only for files whose source you trust.

    Raises:
        FileNotFoundError: there is no such file, or the folder has no checkpoint.
        ValueError: the file is none of these, needs ``trust``, or its model has no active convolution.
    """
    from .saving.checkpoint import load_any  # needs Lightning, which view_model does not

    source = Path(source)
    path = _checkpoint_of(source) if source.is_dir() else source
    model = load_any(path, class_path, trust=trust)
    frames = _film(path, model, trust) if path.suffix == ".ckpt" else None
    summary = path.parent / "summary.json"
    stages = json.loads(summary.read_text()).get("test") if path.suffix == ".ckpt" and summary.is_file() else None
    return view_model(model, title=str(source), frames=frames, stages=stages, input_size=input_size)


def view_model(
    model: nn.Module,
    *,
    title: str | None = None,
    frames: Sequence[tuple[int, Mapping[str, Tensor]]] | None = None,
    stages: Mapping[str, Mapping[str, float]] | None = None,
    input_size: tuple[int, int, int] | None = None,
) -> str:
    """The report, an HTML page in one piece: write it to a file and open that in a browser.

    Args:
        model: with active convolutions. It is not changed.
        title: the heading; None: the model's class.
        frames: (step, positions (P, K, 2) of each layer by name) of each moment of a training.
        stages: for each stage of a training the metrics of its test.
        input_size: (channels, height, width) of an image. None: the size that timm states for the model, else 224x224;
            28x28 for grey images.

    Raises:
        TypeError: ``input_size`` does not consist of ints.
        ValueError: ``model`` has no active convolution, or does not take such images.
    """
    shapes = shapes_of(model)
    named = {shape.name: shape for shape in shapes}
    moments: list[Frame] = [
        (step, [replace(shape, positions=positions[name]) for name, shape in named.items()])
        for step, positions in frames or [(0, {name: shape.positions for name, shape in named.items()})]
    ]
    size = default_input_size(model) if input_size is None else input_size
    moved = sum(int(shape.movable.sum()) * len(shape.positions) for shape in shapes)
    subtitle = f"{len(shapes)} active convolutions with {moved:,} taps that can move; images of {_times(*size)}."
    parts = [_stages(stages), *_field(model, size), *_folds(model, size)]
    return shapes_page(moments, title=title or type(model).__name__, subtitle=subtitle, parts=parts)


def _times(*sizes: int) -> str:
    return "x".join(map(str, sizes))


def _checkpoint_of(folder: Path) -> Path:
    found = next((folder / name for name in _CHECKPOINTS if (folder / name).is_file()), None)
    if found is None:
        newest = sorted(folder.glob("**/*.ckpt"), key=lambda path: path.stat().st_mtime)
        if not newest:
            raise FileNotFoundError(f"{folder} has no checkpoint (*.ckpt); give the folder of a run, or a file")
        found = newest[-1]
    return found


def _film(path: Path, model: nn.Module, trust: bool) -> list[tuple[int, dict[str, Tensor]]] | None:
    """The frames that OffsetLogger keeps in the run's checkpoints, if they are of ``model``, and ``model`` itself.

    The last checkpoint of a run that has ended is the model alone; those that a training goes on from have its film.
    """
    own = {name: layer.positions.cpu() for name, layer in acu_layers(model)}
    for file in (path, *sorted(path.parent.glob("**/*.ckpt"), key=lambda file: file.stat().st_mtime, reverse=True)):
        checkpoint = torch.load(file, map_location="cpu", weights_only=not trust)
        callbacks = checkpoint.get("callbacks", {})
        kept = next(
            (state for name, state in callbacks.items() if name.startswith(_FILM) and state.get("frames")), None
        )
        if kept is None:
            continue
        # Names in the LightningModule begin with that of the model in it.
        full = {name: [known for known in kept["last"][1] if f".{known}".endswith(f".{name}")] for name in own}
        if not all(full.values()):
            return None
        moments = [*kept["frames"], *([] if kept["last"][0] == kept["frames"][-1][0] else [kept["last"]])]
        film = [(step, {name: positions[known[0]] for name, known in full.items()}) for step, positions in moments]
        if any(not torch.equal(own[name], taps) for name, taps in film[-1][1].items()):
            film.append((max(checkpoint["global_step"], film[-1][0] + 1), own))
        return film
    return None


def _stages(stages: Mapping[str, Mapping[str, float]] | None) -> Note:
    title = "Accuracy by stage"
    if not stages:
        return Note(title, "Not known. `lightning-acu fit --test_after_fit true` writes it to summary.json of the run.")
    names = list(dict.fromkeys(name for metrics in stages.values() for name in metrics))
    rows = [
        [stage, *(f"{metrics[name]:.4f}" if name in metrics else "" for name in names)]
        for stage, metrics in stages.items()
    ]
    return TableOf(title, "On the test images.", ["stage", *names], rows)


def _field(model: nn.Module, size: tuple[int, int, int]) -> list[Note]:
    title = "Effective receptive field"
    before = copy.deepcopy(model)
    with torch.no_grad():
        for _, layer in acu_layers(before):
            layer.offsets.copy_(layer.starting_offsets(layer.offsets.device).flatten())
    parameter = next(model.parameters())
    random = torch.Generator().manual_seed(0)
    images = torch.randn(_IMAGES, *size, generator=random, dtype=torch.float32, device="cpu").to(parameter)
    fields = []
    for name, network in (("taps where they started", before), ("taps as learned", model)):
        try:
            energy = receptive_energy(network, images, generator=torch.Generator().manual_seed(0))
        except (RuntimeError, ValueError, TypeError) as error:
            return [Note(title, f"Not known: {error}")]
        if not (energy.sum() > 0 and energy.isfinite().all()):
            return [Note(title, "Not known: the middle of the last feature map does not depend on random images.")]
        _, deviations = spread(energy)
        radius = deviations.square().mean().sqrt().item()
        fields.append((f"{name}: radius {radius:.1f} pixels", energy / energy.sum()))
    text = (
        "Which pixels of the image the middle of the last feature map depends on, by the energy of its gradient over "
        "random images: the same weights with the taps on the regular grid, and as learned. The darker, the more; "
        "white is less than a ten-thousandth of the most."
    )
    return [Fields(title, text, fields)]


def _folds(model: nn.Module, size: tuple[int, int, int]) -> list[Note]:
    title = "Price of the fold"
    try:
        report = report_acu(model, size, forms=True)
    except ValueError as error:
        return [Note(title, f"Not known: {error}")]
    rows = []
    for row in report.converted:
        single = "" if row.folded_macs is None else f"{row.folded_macs / row.macs:.2f}"
        form, price = min(row.form_prices.items(), key=lambda pair: pair[1]) if row.form_prices else ("", None)
        form = "one convolution" if form == "auto" else form
        plain = f"{row.macs * (row.pixels or 0):,}"
        rows.append([row.name or row.kind, plain, single, form, "" if price is None else f"{price:.2f}"])
    text = (
        "What each layer costs as plain convolutions: multiply-accumulates of one image before, the arithmetic of one "
        "larger convolution as a multiple of that, and the form expected to be fastest with its estimated time."
    )
    return [TableOf(title, text, ["layer", "plain MACs", "one convolution x", "cheapest form", "time x"], rows)]
