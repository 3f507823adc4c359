"""Export to ONNX, torch.export's own format and TorchScript; files are compared with the model before they are kept."""

from __future__ import annotations

import copy
import errno
import io
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .checks import require_module
from .choices import did_you_mean
from .conv import acu_layers
from .forms import check_form
from .geometry import integers
from .surgery.arithmetic import default_input_size
from .surgery.fold import fold_layers
from .surgery.fold_rule import cheapest_form
from .surgery.fold_times import quiet_export
from .surgery.outputs import difference, recorded_arguments, tensors_in

__all__ = ["FORMATS", "export_model"]

#: The formats, named by the endings of their files.
FORMATS = ("onnx", "pt2", "torchscript")

#: Largest difference from the model, relative to the largest value of each output; in half precision it may be larger.
_TOLERANCE = 1e-4

#: A full disk, quota or volume; one that is read-only or broken.
_CANNOT_WRITE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EIO)

#: Protobuf files are limited to 2 GB; larger weights go into a second file beside it.
_ONE_FILE = 1_800_000_000


#: Names of the axes of a batch of images, in a file where they are open.
_AXES = ("batch", None, "height", "width")


def export_model(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    to: str | None = None,
    input_size: tuple[int, int, int] | None = None,
    fold: bool = True,
    form: str = "auto",
    dynamic_batch: bool = True,
    dynamic_size: bool = False,
) -> float:
    """Write ``model`` in eval mode to a file that runs without this package, and compare the file with the model.

    The model itself is not changed: a copy is folded (:func:`lightning_acu.fold_acu`) and exported. The file is run on
    several images (ONNX by ONNX Runtime), with a dynamic batch also at another batch size, with dynamic
    height and width also at other sizes.

    Args:
        model: converted, folded or plain; takes one batch of images (N, C, H, W).
        path: the file to write.
        to: "onnx", "pt2" (``torch.export``) or "torchscript"; None: the ending of ``path``. In ONNX the input is
            called "images" and open axes "batch", "height" and "width".
        input_size: (C, H, W) of an image. None: the size that timm states for this model, else 224x224.
        fold: False keeps active convolutions, as one operator each: "pt2" only, and the file then needs
            ``import lightning_acu.ops`` before it is loaded.
        form: of the fold, one of :data:`lightning_acu.forms.FORMS`. "auto": for each layer what the rule expects to be
            fastest in ONNX Runtime, or in torch (:mod:`lightning_acu.surgery.fold_rule`). "single": one convolution
            for each layer.
        dynamic_batch: the file takes any batch size; False: one image.
        dynamic_size: the file takes images of any height and width that the model takes.

    Returns:
        The largest difference from the model's outputs over all these images, relative to the largest value.

    Raises:
        TypeError: ``model`` is not a module, or ``input_size`` are not ints.
        ValueError: an unknown format or form, ``fold=False`` or float64 for ONNX, an ``input_size`` the model does not
            take, a model whose outputs are all NaN, or one that detects objects.
        ModuleNotFoundError: packages for ONNX are missing; the message names the extra that has them.
        RuntimeError: the model cannot be exported, or the file computes something else and is not kept.
        OSError: the file cannot be written, for example because the disk is full; an earlier one stays as it was.
    """
    require_module(model)
    path = Path(path)
    to = path.suffix.removeprefix(".") if to is None else to
    if to not in FORMATS:
        raise ValueError(
            f"`to` (={to!r}) must be {', '.join(map(repr, FORMATS))} (by default the ending of `path` (={str(path)!r}))"
            f"{did_you_mean(to, FORMATS)}"
        )
    check_form(form)
    if input_size is not None and (len(integers("input_size", input_size)) != 3 or min(input_size) < 1):
        raise ValueError(f"`input_size` (={input_size}) must be (channels, height, width), each >= 1")
    if not fold and to != "pt2" and any(acu_layers(model)):
        raise ValueError(f"`fold`=False: {to} has no active convolution; leave it True, or export `to`='pt2'")
    if to == "onnx":
        _require_onnx()
    try:
        copied = copy.deepcopy(model).eval()
    except RuntimeError as error:
        raise RuntimeError(
            f"{type(model).__name__} cannot be copied: {error}; some models keep tensors of a forward pass with "
            "gradients: call model.train() and then model.eval() to release them"
        ) from error
    like = next(copied.parameters(), torch.empty(0, dtype=torch.float32, device="cpu"))
    if to == "onnx" and like.dtype not in (torch.float32, torch.float16):
        raise ValueError(f"`model` is in {like.dtype}, which ONNX Runtime cannot run; export model.float()")
    size = input_size if input_size is not None else default_input_size(model)
    examples = _examples(size, like, dynamic_batch, dynamic_size)
    expected = []
    for images in examples:
        with recorded_arguments(copied) as called:
            expected.append(_outputs(copied, images, images.shape[1:] == tuple(size)))
    if fold:
        runtime = "onnxruntime" if to == "onnx" else "torch"
        layers = [layer for _, layer in acu_layers(copied) if form == "auto" and layer in called]
        fold_layers(copied, form, {layer: cheapest_form(layer, called[layer], runtime) for layer in layers})
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        file = Path(folder) / path.name
        try:
            with quiet_export():
                run = _WRITERS[to](copied, examples[0], dynamic_batch, dynamic_size, file)
        except Exception as error:
            if (disk := _disk_error(error)) is not None:
                raise _cannot_write(path, disk) from error
            hint = "; try `dynamic_batch`=False, for one image at a time" if dynamic_batch else ""
            hint = "; try `dynamic_size`=False, for images of one size" if dynamic_size else hint
            raise RuntimeError(
                f"{type(model).__name__} cannot be exported to {to}: {str(error)[:1000]}{hint}"
            ) from error
        worst = 0.0
        for images, outputs in zip(examples, expected, strict=True):
            got = run(images)
            if len(got) != len(outputs):
                raise RuntimeError(f"{path.name} would give {len(got)} outputs, the model {len(outputs)}; not kept")
            worst = max(worst, difference(got, outputs))
            if not worst <= max(_TOLERANCE, 8 * torch.finfo(like.dtype).eps):
                raise RuntimeError(
                    f"{path.name} would differ from the model by {worst:.1e} of the largest value for images "
                    f"{tuple(images.shape)}; not kept"
                )
        try:
            for written in Path(folder).iterdir():
                with open(written, "rb+") as whole:
                    os.fsync(whole.fileno())
                os.replace(written, path.parent / written.name)
        except OSError as error:
            raise _cannot_write(path, error) from error
    return worst


def _examples(size: tuple[int, int, int], like: Tensor, dynamic_batch: bool, dynamic_size: bool) -> list[Tensor]:
    """Batches to compare a file with, the first of them to trace with: noise, its negative, a spot in the dark."""
    channels, height, width = size
    generator = torch.Generator().manual_seed(0)
    sizes = [(2 if dynamic_batch else 1, height, width)]
    if dynamic_size:  # taller and wider, by what a network with strides up to 64 can still divide
        sizes += [(sizes[0][0], height + 64, width), (sizes[0][0], height, width + 128)]
    if dynamic_batch:
        sizes.append((3, height, width))
    found = [
        torch.randn(n, channels, h, w, generator=generator, dtype=torch.float32, device="cpu") for n, h, w in sizes
    ]
    spot = torch.zeros(1, channels, height, width, dtype=torch.float32, device="cpu")
    spot[..., height // 3, width // 4] = 1
    # (The last one has the size of the first: what the layers were called with then decides about their forms.)
    return [images.to(like) for images in (*found, -found[0], spot)]


def _outputs(model: nn.Module, images: Tensor, own_size: bool) -> list[Tensor]:
    """The tensors that ``model`` gives for ``images``."""
    argument = "input_size" if own_size else "dynamic_size"
    try:
        with torch.no_grad():
            output = model(images)
    except Exception as error:  # whatever this model thinks of its input
        raise ValueError(
            f"`{argument}` (={tuple(images.shape[1:])}): {type(model).__name__} does not take such images: "
            f"{type(error).__name__}: {error}; "
            + ("give the size the model expects" if own_size else "leave `dynamic_size` False")
        ) from error
    if isinstance(output, list) and output and isinstance(output[0], dict) and "boxes" in output[0]:
        raise ValueError(
            f"{type(model).__name__} detects objects: how many depends on the image, which these formats cannot hold. "
            "Fold it and use torchvision's own way to ONNX: fold_acu(model.eval()); "
            "torch.onnx.export(model, ([image],), 'model.onnx', dynamo=False, opset_version=17, "
            "input_names=['image'], dynamic_axes={'image': {1: 'height', 2: 'width'}})"
        )
    tensors = list(tensors_in(output))
    for number, tensor in enumerate(tensors):
        if tensor.is_floating_point() and tensor.numel() and bool(tensor.isnan().all()):
            raise ValueError(
                f"output {number} of {type(model).__name__} is NaN everywhere for random images, so that a file could "
                "not be compared with it; export a model whose weights are finite"
            )
    return [tensor.clone() for tensor in tensors]


def _program(model: nn.Module, images: Tensor, dynamic_batch: bool, dynamic_size: bool) -> Any:
    axes: dict[int, Any] = {0: torch.export.Dim("batch")} if dynamic_batch else {}
    if dynamic_size:  # with whatever the strides of the network ask of them
        axes |= {2: torch.export.Dim.AUTO, 3: torch.export.Dim.AUTO}
    return torch.export.export(model, (images,), dynamic_shapes=(axes or None,))


def _write_pt2(
    model: nn.Module, images: Tensor, dynamic_batch: bool, dynamic_size: bool, file: Path
) -> Callable[[Tensor], list[Tensor]]:
    program = _program(model, images, dynamic_batch, dynamic_size)
    # By way of memory: where the disk is full, torch's own writer to a file ends the process.
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    file.write_bytes(buffer.getbuffer())
    with torch.device("cpu"):  # torch's own reader makes tensors on the default device and copies them
        return _runner(torch.export.load(file).module())


def _write_torchscript(
    model: nn.Module, images: Tensor, dynamic_batch: bool, dynamic_size: bool, file: Path
) -> Callable[[Tensor], list[Tensor]]:
    buffer = io.BytesIO()
    with torch.no_grad():
        torch.jit.save(torch.jit.trace(model, images, check_trace=False, strict=False), buffer)
    file.write_bytes(buffer.getbuffer())
    return _runner(torch.jit.load(file, map_location="cpu"))


def _runner(module: Callable[..., Any]) -> Callable[[Tensor], list[Tensor]]:
    def run(images: Tensor) -> list[Tensor]:
        with torch.no_grad():
            return list(tensors_in(module(images)))

    return run


def _write_onnx(
    model: nn.Module, images: Tensor, dynamic_batch: bool, dynamic_size: bool, file: Path
) -> Callable[[Tensor], list[Tensor]]:
    import onnxruntime

    program = _program(model, images, dynamic_batch, dynamic_size)
    bytes_ = sum(tensor.numel() * tensor.element_size() for tensor in program.state_dict.values())
    exported = torch.onnx.export(program, dynamo=True, input_names=["images"], verbose=False)
    assert exported is not None
    _name_axes(exported.model)
    exported.save(str(file), external_data=bytes_ > _ONE_FILE)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])

    def run(images: Tensor) -> list[Tensor]:
        return [torch.from_numpy(a) for a in session.run(None, {session.get_inputs()[0].name: images.cpu().numpy()})]

    return run


def _name_axes(model: Any) -> None:
    """Call the open axes of the input "batch", "height" and "width", wherever they appear."""
    (images,) = model.graph.inputs
    names = {axis.value: name for axis, name in zip(images.shape, _AXES, strict=True) if name and _is_open(axis)}
    values = [*model.graph.inputs, *model.graph.outputs, *(value for node in model.graph for value in node.outputs)]
    for value in values:
        for axis, length in enumerate(value.shape or ()):
            if _is_open(length) and length.value in names:
                value.shape[axis] = names[length.value]


def _is_open(axis: Any) -> bool:
    return not isinstance(axis, int)


_WRITERS = {"onnx": _write_onnx, "pt2": _write_pt2, "torchscript": _write_torchscript}


def _disk_error(error: BaseException | None) -> OSError | None:
    """The refusal of the operating system to write that ``error`` is or comes from, if there is one."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _CANNOT_WRITE:
            return error
        error = error.__cause__ or error.__context__
    return None


def _cannot_write(path: Path, error: OSError) -> OSError:
    return OSError(error.errno, f"cannot be written: {error.strerror}", str(path))


def _require_onnx() -> None:
    for name in ("onnx", "onnxruntime", "onnxscript"):
        try:
            __import__(name)
        except ImportError as error:
            raise ModuleNotFoundError(
                f"exporting to ONNX needs the package {name}; install the extra: pip install 'lightning_acu[onnx]'"
            ) from error
