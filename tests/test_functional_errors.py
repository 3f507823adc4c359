"""Bad input of acu_conv2d: the error names the argument and its value."""

import pytest
import torch

from lightning_acu import acu_conv2d

GOOD = {"input": (2, 4, 7, 6), "weight": (6, 2, 3, 3), "offsets": (9, 2), "bias": (6,)}


def call(groups=2, device=None, dtype=None, backend="auto", shapes=None, **arguments):
    tensors = {name: torch.randn(shape) for name, shape in (GOOD | (shapes or {})).items()}
    for name, value in (device or {}).items():
        tensors[name] = tensors[name].to(value)
    for name, value in (dtype or {}).items():
        tensors[name] = tensors[name].to(value)
    return acu_conv2d(**tensors, groups=groups, backend=backend, **arguments)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (
            {"offsets": (8, 2)},
            r"`offsets` must be \(K, 2\) or \(P, K, 2\) with K = 3 \* 3 = 9 taps, got shape \(8, 2\)",
        ),
        ({"offsets": (9, 3)}, r"`offsets` must be .* got shape \(9, 3\)"),
        ({"offsets": (18,)}, r"`offsets` must be .* got shape \(18,\)"),
        ({"offsets": (4, 9, 2)}, r"`offsets` has 4 position groups, which must divide the output channels \(=6\)"),
        ({"offsets": (0, 9, 2)}, r"`offsets` has 0 position groups"),
        ({"input": (4, 7)}, r"`input` must be \(N, C_in, H, W\) or \(C_in, H, W\), got shape \(4, 7\)"),
        ({"weight": (6, 2, 9)}, r"`weight` must be \(C_out, C_in/groups, kh, kw\), got shape \(6, 2, 9\)"),
        ({"input": (2, 5, 7, 6)}, r"`groups` \(=2\) must divide the `input` channels \(=5\)"),
        ({"weight": (5, 2, 3, 3)}, r"`groups` \(=2\) must divide the output channels of `weight` \(=5\)"),
        ({"weight": (6, 4, 3, 3)}, r"takes 4 channels for each of 2 groups, but `input` has 4 channels"),
        ({"bias": (5,)}, r"`bias` must be \(6,\), got shape \(5,\)"),
        ({"input": (2, 4, 2, 6)}, r"the kernel covers \(3, 3\) pixels .* more than the padded `input` of \(2, 6\)"),
    ],
)
def test_shapes(shapes, message):
    with pytest.raises(ValueError, match=message):
        call(shapes=shapes)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"groups": 0}, r"`groups` \(=0\) must divide"),
        ({"stride": 0}, r"`stride` \(=0\) must be an int >= 1 or a pair of them"),
        ({"stride": (1, 2, 3)}, r"`stride` \(=\(1, 2, 3\)\)"),
        ({"dilation": -1}, r"`dilation` \(=-1\) must be an int >= 0"),
        ({"padding": -1}, r"`padding` \(=-1\) must not be negative"),
        ({"padding": (1, 2, 3)}, r"`padding` \(=\(1, 2, 3\)\) must have 1, 2 or 4 numbers, got 3"),
        ({"padding": "full"}, r"`padding` \(='full'\) must be .* 'same' or 'valid'"),
        ({"padding": "same", "stride": 2}, r"`padding`='same' needs stride 1, got `stride` \(=\(2, 2\)\)"),
        ({"backend": "cuda"}, r"`backend` \(='cuda'\) is unknown; choose one of auto, reference, cython, triton"),
        ({"dilation": 4}, r"the kernel covers \(9, 9\) pixels .*`dilation` \(4, 4\)"),
    ],
)
def test_numbers(arguments, message):
    with pytest.raises(ValueError, match=message):
        call(**arguments)


@pytest.mark.parametrize(
    ("dtype", "message"),
    [
        ({"offsets": torch.bfloat16}, "`offsets` must be float32 or float64, got torch.bfloat16"),
        ({"offsets": torch.int64}, "`offsets` must be a floating point tensor, got torch.int64"),
        ({"input": torch.uint8}, "`input` must be a floating point tensor, got torch.uint8"),
        ({"weight": torch.complex64}, "`weight` must be a floating point tensor, got torch.complex64"),
        ({"weight": torch.float64}, "`weight` is torch.float64 but `input` is torch.float32"),
        ({"bias": torch.float16}, "`bias` is torch.float16 but `input` is torch.float32"),
    ],
)
def test_dtypes(dtype, message):
    with pytest.raises(TypeError, match=message):
        call(dtype=dtype)


@pytest.mark.parametrize("name", ["weight", "offsets", "bias"])
def test_devices(name):
    with pytest.raises(RuntimeError, match=f"`{name}` is on meta but `input` is on cpu; move them together"):
        call(device={name: "meta"})


def test_offsets_may_be_more_precise_than_the_input():
    assert call(dtype={"offsets": torch.float64}).dtype == torch.float32


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"stride": 2.0}, r"`stride` \(=2.0\) must be an int or a sequence of ints"),
        ({"stride": (1.9, 1)}, r"`stride` \(=\(1.9, 1\)\)"),
        ({"padding": 0.9}, r"`padding` \(=0.9\)"),
        ({"dilation": "2"}, r"`dilation` \(='2'\)"),
        ({"groups": 2.0}, r"`groups` \(=2.0\)"),
    ],
)
def test_numbers_that_are_not_whole(arguments, message):
    with pytest.raises(TypeError, match=message):
        call(**arguments)


def test_what_is_no_tensor():
    with pytest.raises(TypeError, match="`offsets` must be a tensor, got list"):
        acu_conv2d(torch.randn(1, 2, 5, 5), torch.randn(2, 2, 3, 3), [[0.0, 0.0]] * 9)
