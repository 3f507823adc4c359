"""Arguments that no kernel survives: freed memory, huge numbers, dtypes that only the operator itself can be given."""

import itertools
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch.func import grad, vmap
from torch.utils.flop_counter import FlopCounterMode

from lightning_acu import acu_conv2d
from lightning_acu.ops import acu_conv2d_op
from lightning_acu.ops.op import acu_conv2d_backward_op

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
NAMES = ["input", "weight", "offsets", "bias"]
PLAIN = {"stride": [1, 1], "padding": [0, 0, 0, 0], "dilation": [1, 1], "groups": 1, "backend": "auto"}


def arguments(dtype=torch.float32):
    shapes = {"input": (2, 4, 7, 6), "weight": (6, 4, 3, 3), "bias": (6,)}
    return {name: torch.randn(shape).to(dtype) for name, shape in shapes.items()} | {"offsets": torch.rand(9, 2)}


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["auto", "cython", "dense", "reference"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("left", [0, 0.5], ids=["all freed", "half freed"])
@pytest.mark.parametrize("autocast", [False, True])
def test_freed_memory_is_not_read(backend, dtype, name, left, autocast):
    given = arguments(dtype)
    given[name].untyped_storage().resize_(int(left * given[name].nbytes))
    with torch.autocast("cpu", enabled=autocast), pytest.raises(RuntimeError, match=r"was freed|out of bounds"):
        acu_conv2d(**given, padding=1, backend=backend)


@pytest.mark.parametrize("backend", ["auto", "cython", "dense"])
@pytest.mark.parametrize("name", ["input", "weight", "offsets"])
def test_memory_that_is_freed_before_the_backward_pass_is_not_read(backend, name):
    given = {key: tensor.requires_grad_() for key, tensor in arguments().items()}
    output = acu_conv2d(**given, padding=1, backend=backend).sum()
    given[name].untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match=r"was freed|out of bounds"):
        output.backward()


class Subclass(torch.Tensor):
    """Without anything of its own."""


def in_a_mode(given, backend):
    with FlopCounterMode(display=False):
        acu_conv2d(**given, backend=backend)


def under_vmap(given, backend):
    vmap(lambda bias: acu_conv2d(**given | {"bias": bias}, backend=backend))(given["bias"][None])


def under_grad(given, backend):
    grad(lambda tensors: acu_conv2d(**tensors, backend=backend).sum())(given)


def in_a_subclass(given, backend):
    acu_conv2d(**{name: tensor.as_subclass(Subclass) for name, tensor in given.items()}, backend=backend)


@pytest.mark.parametrize("how", [under_vmap, under_grad, in_a_subclass, in_a_mode])
@pytest.mark.parametrize(("backend", "autocast"), [("reference", False), ("auto", True), ("dense", True)])
@pytest.mark.parametrize("name", NAMES)
def test_memory_that_is_half_freed_is_not_read_under_transforms(how, backend, autocast, name):
    given = arguments()
    given[name].untyped_storage().resize_(given[name].nbytes // 2)
    with torch.autocast("cpu", enabled=autocast), pytest.raises(RuntimeError, match=r"was freed|out of bounds"):
        how(given, backend)


@pytest.mark.parametrize("backend", ["auto", "dense", "reference"])
@pytest.mark.parametrize(
    "view",
    [
        lambda t: torch.stack((t, t), -1)[..., 0],
        lambda t: F.pad(t, (0, 3))[..., :-3],
        lambda t: torch.stack((t, t), 1)[:, 0],
    ],
    ids=["gaps", "cropped", "interleaved"],
)
@pytest.mark.parametrize("name", ["input", "weight", "offsets"])
def test_memory_with_gaps_is_not_read_where_it_was_freed(backend, view, name):
    """Its storage is long enough for as many numbers, but not for their places."""
    given = arguments()
    given[name] = view(given[name])
    given[name].untyped_storage().resize_(given[name].nbytes)
    with pytest.raises(RuntimeError, match=r"was freed|out of bounds"):
        acu_conv2d(**given, padding=1, backend=backend)


@pytest.mark.parametrize("learning", [["bias"], ["bias", "weight"], ["offsets"]], ids=str)
def test_a_gradient_whose_memory_was_freed_is_not_read(learning):
    given = arguments()
    output = acu_conv2d(**given | {name: given[name].requires_grad_() for name in learning})
    towards = torch.randn(output.shape)
    towards.untyped_storage().resize_(100)
    with pytest.raises(RuntimeError, match=r"was freed|out of bounds"):
        torch.autograd.grad(output, [given[name] for name in learning], towards)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("convert", "layout"),
    [
        (torch.Tensor.to_sparse, "sparse_coo"),
        (lambda t: t.contiguous().to_mkldnn(), "_mkldnn"),
        (lambda t: torch.nested.nested_tensor([t, t], layout=torch.jagged), "jagged"),
    ],
    ids=["sparse", "mkldnn", "nested"],
)
def test_other_layouts_are_refused_by_name(name, convert, layout):
    given = arguments()
    given[name] = convert(given[name])
    with pytest.raises(TypeError, match=f"`{name}` must be a dense tensor, got one of layout torch.{layout}"):
        acu_conv2d(**given)


@pytest.mark.parametrize("shape", [(2, 4, 3, 3), (1, 4, 5, 3)])
def test_views_that_overlap_or_repeat_are_not_taken_for_freed(shape):
    weight, offsets = torch.randn(6, 4, 3, 3), torch.rand(9, 2)
    overlapping = torch.randn(40).as_strided(shape, (1, 2, 3, 1))
    repeated = torch.randn(1, 1, *shape[2:]).expand(shape)
    behind = torch.randn(3, *shape)[1:][0]  # its storage begins before it
    for image in (overlapping, repeated, behind):
        torch.testing.assert_close(acu_conv2d(image, weight, offsets), acu_conv2d(image.clone(), weight, offsets))


@pytest.mark.parametrize(
    "numbers",
    [
        {"stride": 2**63 - 1, "padding": 2**62},
        {"stride": (1, 2**40)},
        {"dilation": 2**20},
        {"padding": 2**40},
        {"padding": (0, 0, 2**31, 0)},
        {"dilation": (2**62, 1)},
        {"groups": 2**62},
    ],
    ids=str,
)
def test_huge_numbers_are_refused_by_name(numbers):
    with pytest.raises(ValueError, match=next(iter(numbers))):
        acu_conv2d(**arguments(), **numbers)


@pytest.mark.parametrize("name", ["stride", "padding", "dilation", "groups"])
@pytest.mark.parametrize("value", [True, "3", 1.5, None, [[1], 1]], ids=str)
def test_what_is_no_int_is_refused_by_name(name, value):
    with pytest.raises((TypeError, ValueError), match=name):
        acu_conv2d(**arguments(), **{name: value})


def test_groups_are_one_number():
    with pytest.raises(ValueError, match=r"`groups` \(=\(1, 2\)\) must be one int"):
        acu_conv2d(**arguments(), groups=(1, 2))


@pytest.mark.parametrize("stride", [1, 3, 1000, 2**40 - 1])
def test_strides_beyond_the_image(stride):
    given = arguments(torch.float64) | {"offsets": torch.zeros(9, 2)}
    expected = F.conv2d(given["input"], given["weight"], given["bias"], stride, padding=2)
    for backend in ("cython", "dense", "reference"):
        torch.testing.assert_close(acu_conv2d(**given, stride=stride, padding=2, backend=backend), expected)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64, torch.float16, torch.bfloat16], ids=str)
def test_the_operator_itself_refuses_other_offsets(dtype):
    given = arguments()
    offsets = torch.zeros(1, 9, 2).to(dtype)
    with pytest.raises(TypeError, match=f"`offsets` {dtype}"):
        acu_conv2d_op(given["input"], given["weight"], offsets, None, **PLAIN)
    grad = torch.zeros(2, 6, 5, 4)
    with pytest.raises(TypeError, match=f"`offsets` {dtype}"):
        acu_conv2d_backward_op(grad, given["input"], given["weight"], offsets, **PLAIN, needs=[True] * 3)


@pytest.mark.parametrize(
    ("name", "dtype"), [*itertools.product(["input", "weight", "bias"], [torch.int32, torch.float64])]
)
def test_the_operator_itself_refuses_mixed_dtypes(name, dtype):
    given = arguments()
    given[name] = given[name].to(dtype)
    with pytest.raises(TypeError, match=f"`{name}` {dtype}"):
        acu_conv2d_op(given["input"], given["weight"], given["offsets"][None], given["bias"], **PLAIN)


@pytest.mark.parametrize(
    "numbers",
    [
        {"stride": [0, 1]},
        {"stride": [1, 2**62]},
        {"padding": [0, -1, 0, 0]},
        {"padding": [2**62] * 4},
        {"dilation": [-1, 1]},
        {"dilation": [9, 1]},
        {"groups": 0},
        {"groups": 3},
    ],
    ids=str,
)
def test_the_operator_itself_refuses_numbers_that_do_not_fit(numbers):
    given = arguments()
    with pytest.raises(ValueError, match=r"at least|less than|do not fit"):
        acu_conv2d_op(given["input"], given["weight"], given["offsets"][None], None, **PLAIN | numbers)


def pixels(stride, padding, kernel, outputs):
    return [(o - 1) * s + k - 2 * p for o, s, k, p in zip(outputs, stride, kernel, padding, strict=True)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("outputs", [(1, 1), (3, 1), (1, 2)], ids=str)
@pytest.mark.parametrize("kernel", [(3, 3), (5, 5), (7, 7), (7, 3)], ids=str)
@pytest.mark.parametrize("stride", [1, 2, 3])
def test_gradients_of_half_precision_where_kernel_columns_read_padding_alone(dtype, outputs, kernel, stride):
    """torch's own weight gradient holds memory that nobody wrote there."""
    padding = (kernel[0] // 2, kernel[1] // 2)
    height, width = (max(n, 1) for n in pixels((stride, stride), padding, kernel, outputs))
    given = {"input": torch.randn(2, 3, height, width), "weight": torch.randn(4, 3, *kernel)}
    exact = {name: tensor.to(dtype).double().requires_grad_() for name, tensor in given.items()}
    F.conv2d(**exact, stride=stride, padding=padding).sum().backward()
    for _ in range(3):
        junk = [torch.full((4 * 3 * kernel[0] * kernel[1],), 1e4, dtype=dtype) for _ in range(4)]
        del junk
        rounded = {name: tensor.to(dtype).requires_grad_() for name, tensor in given.items()}
        offsets = torch.zeros(kernel[0] * kernel[1], 2, requires_grad=True)
        acu_conv2d(**rounded, offsets=offsets, stride=stride, padding=padding, backend="dense").sum().backward()
        for name in given:
            torch.testing.assert_close(rounded[name].grad.double(), exact[name].grad, rtol=0.02, atol=0.05)


#: (images, channels in and out, groups, image, kernel, stride, padding, dilation) where torch 2.14's own convolution of
#: bfloat16 or float16 holds memory that nobody wrote, or crashes: an output one column wide, or a row or column of the
#: kernel that reads padding alone.
FAULTY = [
    (3, 3, 6, 3, (7, 4), (1, 4), (1, 3), (0, 0), (2, 1)),
    (3, 17, 8, 1, (7, 4), (3, 4), (1, 3), (1, 2), (1, 2)),
    (2, 2, 2, 1, (6, 5), (2, 5), (1, 2), (1, 2), (1, 2)),
    (3, 16, 2, 2, (2, 1), (2, 1), (1, 3), (0, 2), (1, 2)),
    (1, 17, 8, 1, (2, 1), (2, 1), (3, 2), (0, 1), (1, 2)),
    (1, 3, 1, 1, (5, 1), (5, 1), (2, 2), (2, 1), (2, 2)),
    (2, 3, 2, 1, (3, 2), (1, 3), (1, 3), (0, 2), (1, 1)),
    (1, 2, 34, 2, (11, 1), (5, 2), (3, 3), (0, 1), (1, 1)),
    (1, 8, 3, 1, (1, 8), (2, 3), (1, 1), (1, 0), (2, 2)),
    (2, 8, 16, 1, (8, 1), (3, 2), (1, 1), (0, 1), (2, 2)),
]
HALF = """
import torch
import torch.nn.functional as F
from lightning_acu import acu_conv2d
for batch, c_in, c_out, groups, size, kernel, stride, padding, dilation in {cases}:
    for dtype in (torch.bfloat16, torch.float16):
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(batch, c_in, *size, generator=generator).to(dtype)
        w = torch.randn(c_out, c_in // groups, *kernel, generator=generator).to(dtype)
        for channels_last in (False, True):
            if channels_last:
                x = x.contiguous(memory_format=torch.channels_last)
            results = []
            for exact in (True, False):
                image, weight = (t.detach().to(torch.float64 if exact else dtype).requires_grad_() for t in (x, w))
                numbers = {{"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}}
                if exact:
                    output = F.conv2d(image, weight, **numbers)
                else:
                    junk = [torch.full((n,), 1e4, dtype=dtype) for n in (output.numel(), x.numel(), w.numel()) * 3]
                    del junk
                    offsets = torch.zeros(kernel[0] * kernel[1], 2)
                    output = acu_conv2d(image, weight, offsets, backend="dense", **numbers)
                output.sum().backward()
                results.append([output.detach().double(), image.grad.double(), weight.grad.double()])
            for right, found in zip(*results):
                torch.testing.assert_close(found, right, rtol=0.02, atol=0.02 * (1 + right.abs().max().item()))
"""


@pytest.mark.slow
def test_half_precision_where_torchs_own_convolution_reads_what_nobody_wrote():
    """In a process of its own, since a crash would end all tests."""
    run = subprocess.run([sys.executable, "-c", HALF.format(cases=FAULTY)], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
