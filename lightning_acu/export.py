"""Export to ONNX and to torch.export's own format; files are compared with the model before they are kept."""

from __future__ import annotations

import copy
import errno
import io
import logging
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from .conv import acu_layers
from .surgery import fold_acu
from .surgery.arithmetic import default_input_size
from .surgery.outputs import difference, tensors_in

__all__ = ["FORMATS", "export_model"]

#: The formats, named by the endings of their files.
FORMATS = ("onnx", "pt2")

#: Largest difference from the model, relative to the largest value of each output; in half precision it may be larger.
_TOLERANCE = 1e-4

#: A full disk, quota or volume; one that is read-only or broken.
_CANNOT_WRITE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EIO)

#: Protobuf files are limited to 2 GB; larger weights go into a second file beside it.
_ONE_FILE = 1_800_000_000


def export_model(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    to: str | None = None,
    input_size: tuple[int, int, int] | None = None,
    fold: bool = True,
    dynamic_batch: bool = True,
) -> float:
    """Write ``model`` in eval mode to a file that runs without this package, and compare the file with the model.

    The model itself is not changed: a copy is folded (:func:`lightning_acu.fold_acu`) and exported. The file is run on
    random images (ONNX by ONNX Runtime), with a dynamic batch also at another batch size.

    Args:
        model: converted, folded or plain; takes one batch of images (N, C, H, W).
        path: the file to write.
        to: "onnx" or "pt2" (``torch.export``); None: the ending of ``path``.
        input_size: (C, H, W) of an image; height and width are fixed in the file. None: the size that timm states
            for this model, else 224x224.
        fold: False keeps active convolutions, as one operator each: "pt2" only, and the file then needs
            ``import lightning_acu.ops`` before it is loaded.
        dynamic_batch: the file takes any batch size; False: one image.

    Returns:
        The largest difference from the model's outputs, relative to the largest value.

    Raises:
        ValueError: an unknown format, ``fold=False`` or float64 for ONNX, or an ``input_size`` the model does not take.
        ModuleNotFoundError: packages for ONNX are missing; the message names the extra that has them.
        RuntimeError: the model cannot be exported, or the file computes something else and is not kept.
        OSError: the file cannot be written, for example because the disk is full; an earlier one stays as it was.
    """
    path = Path(path)
    to = path.suffix.removeprefix(".") if to is None else to
    if to not in FORMATS:
        raise ValueError(f"`to` (={to!r}) must be 'onnx' or 'pt2' (by default the ending of `path` (={str(path)!r}))")
    if to == "onnx":
        if not fold and any(acu_layers(model)):
            raise ValueError("`fold`=False: ONNX has no active convolution; leave it True, or export `to`='pt2'")
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
    generator = torch.Generator().manual_seed(0)
    batch_size = 3 if dynamic_batch else 1
    images = torch.randn(batch_size, *size, generator=generator, dtype=torch.float32, device="cpu").to(like)
    try:
        with torch.no_grad():
            expected = list(tensors_in(copied(images)))
    except Exception as error:  # whatever this model thinks of its input
        raise ValueError(
            f"`input_size` (={tuple(size)}): {type(model).__name__} does not take such images: "
            f"{type(error).__name__}: {error}; give the size the model expects"
        ) from error
    if fold:
        fold_acu(copied)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        file = Path(folder) / path.name
        batch = {0: torch.export.Dim("batch")} if dynamic_batch else None
        try:
            with _quietly():
                program = torch.export.export(
                    copied, (images[:2],) if dynamic_batch else (images,), dynamic_shapes=(batch,)
                )
                run = _write_onnx(program, file) if to == "onnx" else _write_pt2(program, file)
        except Exception as error:
            if (disk := _disk_error(error)) is not None:
                raise _cannot_write(path, disk) from error
            hint = "; try `dynamic_batch`=False, for one image at a time" if dynamic_batch else ""
            raise RuntimeError(
                f"{type(model).__name__} cannot be exported to {to}: {str(error)[:1000]}{hint}"
            ) from error
        got = run(images)
        if len(got) != len(expected):
            raise RuntimeError(f"{path.name} would give {len(got)} outputs, the model {len(expected)}; not kept")
        worst = difference(got, expected)
        if not worst <= max(_TOLERANCE, 8 * torch.finfo(like.dtype).eps):
            raise RuntimeError(f"{path.name} would differ from the model by {worst:.1e} of the largest value; not kept")
        try:
            for written in Path(folder).iterdir():
                with open(written, "rb+") as whole:
                    os.fsync(whole.fileno())
                os.replace(written, path.parent / written.name)
        except OSError as error:
            raise _cannot_write(path, error) from error
    return worst


def _write_pt2(program: torch.export.ExportedProgram, file: Path) -> Callable[[Tensor], list[Tensor]]:
    # By way of memory: where the disk is full, torch's own writer to a file ends the process.
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    file.write_bytes(buffer.getbuffer())
    with torch.device("cpu"):  # torch's own reader makes tensors on the default device and copies them
        module = torch.export.load(file).module()

    def run(images: Tensor) -> list[Tensor]:
        with torch.no_grad():
            return list(tensors_in(module(images)))

    return run


def _write_onnx(program: torch.export.ExportedProgram, file: Path) -> Callable[[Tensor], list[Tensor]]:
    import onnxruntime

    bytes_ = sum(tensor.numel() * tensor.element_size() for tensor in program.state_dict.values())
    torch.onnx.export(
        program, f=str(file), dynamo=True, external_data=bytes_ > _ONE_FILE, input_names=["images"], verbose=False
    )
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])

    def run(images: Tensor) -> list[Tensor]:
        return [torch.from_numpy(a) for a in session.run(None, {session.get_inputs()[0].name: images.cpu().numpy()})]

    return run


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


@contextmanager
def _quietly() -> Iterator[None]:
    """Silence the exporters' warnings and log messages."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "torch.export")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
