"""What the census does with one model: convert, compare, perturb, fold, compare; see scripts/census.py."""

from __future__ import annotations

import copy
import inspect
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import timm
import torch
import torchvision
from timm.utils import reparameterize_model
from torch import Tensor, nn

from lightning_acu import ACUConv2d, acu_layers, convert_to_acu, fold_acu

#: Differences allowed, of the largest value: float32's, and float64's for what exceeds that one.
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-10}

#: Random networks amplify rounding, some by 1e6 in float64 too. What exceeds the tolerance is compared with how much
#: the plain network's own numbers change when each pixel is rounded otherwise, and may be this many times as much.
NOISE_FACTOR = 10

#: (arguments of the model, size of a square image), the first that the model takes; None: the model's own size.
ATTEMPTS: list[tuple[dict[str, Any], int | None]] = [
    ({}, 64), ({"img_size": 64}, 64), ({}, 128), ({"img_size": 128}, 128), ({}, 256), ({"img_size": 256}, 256),
    ({}, None), ({}, 300),
]  # fmt: skip

MERGING = ("fuse", "reparameterize", "switch_to_deploy")


@dataclass
class Result:
    """One row of the table. Differences are relative to the largest value; 0 is equal bit for bit."""

    model: str
    status: str = ""  # "ok", "no 3x3 or 5x5", "later", or what went wrong
    converted: int = 0
    skipped: int = 0  # 3x3 and 5x5 convolutions that stayed plain for a reason (CondConv2d)
    sizes: str = ""
    eval: float = 0.0
    train: float = 0.0
    gradients: float = 0.0
    perturbation: float = 0.0  # by how much perturbed positions change the output
    fold: float = 0.0
    noise: float = 0.0  # how much the plain model's numbers change with the last bit of the pixels, where measured
    merging: str = ""
    dtype: str = "float32"
    seconds: float = 0.0
    images: dict[int, Any] = field(default_factory=dict, repr=False)

    def row(self) -> dict[str, Any]:
        """For the table."""
        numbers = {k: f"{v:.1e}" if isinstance(v, float) else v for k, v in asdict(self).items() if k != "images"}
        return numbers | {"seconds": f"{self.seconds:.1f}"}


def build(name: str, **kwargs: Any) -> nn.Module:
    """A timm model, or "torchvision/" and one of theirs; random weights."""
    if not name.startswith("torchvision/"):
        return timm.create_model(name, **kwargs)
    name = name.removeprefix("torchvision/")
    known = inspect.signature(torchvision.models.get_model_builder(name)).parameters
    arguments = {"weights": None} | {k: None for k in ("weights_backbone",) if k in known}
    if name in ("inception_v3", "googlenet", "quantized_googlenet", "quantized_inception_v3"):
        arguments["init_weights"] = True
    if hasattr(torchvision.models.detection, name):
        arguments |= {} if "ssd" in name else {"min_size": 64, "max_size": 128}  # 64 pixels stay 64
    return torchvision.models.get_model(name, **arguments, **kwargs)


def wake(model: nn.Module) -> None:
    """Let every layer count: timm starts the last norms and scales of residual branches at or near zero."""
    for name, parameter in model.named_parameters():
        with torch.no_grad():
            if name.endswith("bias") or parameter.numel() == 0 or parameter.abs().max() > 1e-2:
                continue
            if parameter.ndim > 1 and parameter.shape.numel() > max(parameter.shape):
                parameter.normal_(std=0.02)
            else:
                parameter.fill_(1.0)


def run(result: Result, model: nn.Module, size: int) -> tuple[list[Tensor], Tensor]:
    """The tensors that come out for the same images and random numbers each time, and a number to differentiate."""
    torch.manual_seed(0)
    dtype = next(model.parameters()).dtype
    channels = getattr(model, "default_cfg", {"input_size": (3,)})["input_size"][0]
    if size not in result.images:
        result.images[size] = torch.randn(2, channels, size, size, generator=torch.Generator().manual_seed(size))
    images = result.images[size].to(dtype)
    if "raft" in result.model:
        output = model(images, images.flip(-1), num_flow_updates=2)
    elif hasattr(torchvision.models.detection, result.model.removeprefix("torchvision/")):
        output = detect(model, images)
    else:
        output = model(images)
    outputs = list(tensors(output))
    total = sum((o.double() * torch.randn(o.shape, dtype=torch.float64)).mean() for o in outputs if o.requires_grad)
    return [o.detach() for o in outputs], total  # type: ignore[return-value]


def detect(model: nn.Module, images: Tensor) -> Any:
    """Losses in train mode; else what the networks give, before boxes are sorted, where rounding changes the order."""
    if model.training:
        boxes = torch.tensor([[3.0, 5, 40, 50], [10, 2, 55, 30]], dtype=images.dtype)
        target = {"boxes": boxes, "labels": torch.ones(2, dtype=torch.int64)}
        target["masks"] = torch.ones(2, *images.shape[2:], dtype=torch.uint8)
        target["keypoints"] = torch.cat((boxes.view(2, 2, 2), torch.ones(2, 2, 1)), -1).repeat(1, 9, 1)[:, :17]
        return model(list(images), [target, target])
    features = list(model.backbone(model.transform(list(images))[0].tensors).values())
    outputs = [*features, (model.rpn.head if hasattr(model, "rpn") else model.head)(features)]
    for name, size in (("box_head", 7), ("mask_head", 14), ("keypoint_head", 14)):
        if (head := getattr(getattr(model, "roi_heads", None), name, None)) is not None:
            outputs.append(head(torch.randn(3, model.backbone.out_channels, size, size, dtype=images.dtype)))
    return outputs


def tensors(output: Any) -> Iterator[Tensor]:
    """All tensors in whatever a model returns."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, dict):
        yield from tensors(list(output.values()))
    elif isinstance(output, list | tuple):
        for part in output:
            yield from tensors(part)


def difference(got: list[Tensor], expected: list[Tensor]) -> float:
    """The largest, of the largest value of each tensor; inf where shapes differ or NaN is new."""
    if [t.shape for t in got] != [t.shape for t in expected]:
        return float("inf")
    worst = 0.0
    for a, b in zip(got, expected, strict=True):
        if a.numel() and not torch.equal(a, b):
            error = float((a.double() - b.double()).abs().max() / b.double().abs().max().clamp(min=1e-30))
            worst = max(worst, error if error == error else float("inf"))
    return worst


def gradients(result: Result, model: nn.Module, size: int) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Outputs and gradients of everything but positions, in train mode; buffers stay what they were.

    Of very large models at the first size only: there is no memory for more.
    """
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model.train()
    outputs, total = run(result, model, size)
    total.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            buffer.copy_(buffers[name])
    model.eval()
    if size != min(result.images) and sum(map(Tensor.numel, grads.values())) > 400_000_000:
        grads.clear()
    return outputs, {name: grad for name, grad in grads.items() if not name.endswith("offsets")}


def gradient_difference(got: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest, of the largest value of each parameter's gradient (at least 1e-4 of the largest of all)."""
    if got.keys() != expected.keys():
        return float("inf")
    scales = {name: float(grad.abs().max()) for name, grad in expected.items()}
    floor = 1e-4 * max(scales.values(), default=0.0) + 1e-30
    return max((float((got[n] - g).abs().max()) / max(scales[n], floor) for n, g in expected.items()), default=0.0)


def prepare(result: Result, dtype: torch.dtype, limit: float) -> tuple[nn.Module, list[int]] | None:
    """The model, and the even and the odd image size that it takes."""
    built: dict[str, nn.Module] = {}
    why = ""
    for kwargs, size in ATTEMPTS:
        try:
            torch.manual_seed(0)
            model = built[str(kwargs)] = built.get(str(kwargs)) or build(result.model, **kwargs)
        except TypeError as error:  # no such argument
            why = why or str(error)
            continue
        if sum(p.numel() for p in model.parameters()) > limit:
            result.status = "later"
            return None
        model.train().to(dtype)  # (some take fewer sizes in train mode)
        even = size or getattr(model, "default_cfg", {"input_size": (3, 224, 224)})["input_size"][-1]
        sizes: list[int] = []
        for candidate in (even, even + 1, even - 1):
            try:
                if all((candidate - size) % 2 for size in sizes):
                    with torch.no_grad():
                        run(result, model, candidate)
                    sizes.append(candidate)
            except Exception as error:  # a size that the plain model does not take
                why = f"{type(error).__name__}: {error}"
        if sizes:
            wake(model)
            return model.eval(), sizes  # (lets go of what LeViT computed from its parameters and kept)
    result.status = f"the plain model ran at no size: {why[:200]}"
    return None


def examine(name: str, limit: float = float("inf")) -> Result:
    """Everything for one model; a difference beyond float32's tolerance is looked at again, in float64 if it can."""
    start = time.perf_counter()
    result = attempt(name, torch.float32, limit, measure_noise=False)
    if result.status == "differs":
        try:
            again = attempt(name, torch.float64, limit, measure_noise=True)
        except RuntimeError as error:  # a model that mixes dtypes
            again = Result(name, str(error))
        result = again if again.status in ("ok", "differs") else attempt(name, torch.float32, limit, measure_noise=True)
    result.seconds = time.perf_counter() - start
    return result


def attempt(name: str, dtype: torch.dtype, limit: float, measure_noise: bool) -> Result:
    """Everything for one model in one precision."""
    result = Result(name, dtype=str(dtype).removeprefix("torch."))
    if (prepared := prepare(result, dtype, limit)) is None:
        return result
    model, sizes = prepared
    result.sizes = " ".join(map(str, sizes))
    compare(result, model, sizes, measure_noise)
    if max(result.eval, result.train, result.gradients, result.fold) > max(
        TOLERANCE[dtype], NOISE_FACTOR * result.noise
    ):
        result.status = result.status or "differs"
    result.status = result.status or "ok"
    return result


def compare(result: Result, model: nn.Module, sizes: list[int], measure_noise: bool) -> None:
    """Fill in the numbers; leaves the model folded."""

    def outputs() -> list[list[Tensor]]:
        with torch.no_grad():
            return [run(result, model, size)[0] for size in sizes]

    def furthest(got: list[list[Tensor]], expected: list[list[Tensor]]) -> float:
        return max(map(difference, got, expected))

    meant = [m for m in model.modules() if isinstance(m, nn.Conv2d) and m.kernel_size in ((3, 3), (5, 5))]
    plain = outputs()
    trained = [gradients(result, model, size) for size in sizes]
    if measure_noise:
        exact = dict(result.images)
        for size, images in exact.items():
            images = images.to(next(model.parameters()).dtype)
            result.images[size] = images * (1 + torch.finfo(images.dtype).eps * torch.randn_like(images))
        result.noise = furthest(outputs(), plain)
        for size, (expected, expected_grads) in zip(sizes, trained, strict=True):
            got, grads = gradients(result, model, size)
            result.noise = max(result.noise, difference(got, expected), gradient_difference(grads, expected_grads))
        result.images = exact
    convert_to_acu(model)
    layers = dict(acu_layers(model))
    result.converted = len(layers)
    result.skipped = sum(type(m).__name__ == "CondConv2d" and m.kernel_size[0] in (3, 5) for m in model.modules())
    if not all(isinstance(m, ACUConv2d) for m in meant) or len(layers) != len(meant):
        result.status = f"converted {len(layers)} of {len(meant)}"
        return
    result.eval = furthest(outputs(), plain)
    for size, (expected, expected_grads) in zip(sizes, trained, strict=True):
        got, grads = gradients(result, model, size)
        result.train = max(result.train, difference(got, expected))
        result.gradients = max(result.gradients, gradient_difference(grads, expected_grads))
    del trained
    generator = torch.Generator().manual_seed(1)
    for layer in layers.values():
        with torch.no_grad():
            layer.offsets.copy_(torch.rand(layer.offsets.shape, generator=generator) * 1.4 - 0.7)
    moved = outputs()
    result.perturbation = furthest(moved, plain)
    if result.perturbation < 1e-6:
        result.status = "perturbed positions change nothing"
    result.merging = merge(result, model, sizes[0], moved[0])
    fold_acu(model)
    if any(acu_layers(model)):
        result.status = "active layers are left after the fold"
    result.fold = furthest(outputs(), moved)
    result.merging = " ".join(filter(None, (result.merging, merge(result, model, sizes[0], moved[0]))))


def merge(result: Result, model: nn.Module, size: int, expected: list[Tensor]) -> str:
    """timm's reparameterize_model, on a copy: "right" or "refused"; anything else is a failure."""
    if not any(callable(getattr(type(m), name, None)) for m in model.modules() for name in MERGING):
        return ""
    precision = torch.get_default_dtype()
    torch.set_default_dtype(next(model.parameters()).dtype)  # which timm's merging makes its layers in
    try:
        merged = reparameterize_model(copy.deepcopy(model))
    except RuntimeError as error:
        if "fold" in str(error):
            return "refused"
        raise
    finally:
        torch.set_default_dtype(precision)
    with torch.no_grad():
        error = difference(run(result, merged, size)[0], expected)
    if error > 1e3 * TOLERANCE[next(model.parameters()).dtype]:
        result.status = f"merging changes the output by {error:.1e}"
    return "right"
