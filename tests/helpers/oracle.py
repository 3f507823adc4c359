"""The independent oracle: the formula as explicit float64 loops, sharing no code with the package."""

import math

import torch

#: With kernel (3, 2) and input (5, 4): deliberately asymmetric, so that swapped axes cannot hide.
GEOMETRY = {"stride": (2, 1), "padding": (1, 0), "dilation": (2, 1), "groups": 2}


def assert_close(actual, expected, tolerance=1e-12):
    """Same shape and dtype, and equal to ``tolerance`` relative to the largest value (or to 1)."""
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype
    scale = expected.abs().max().clamp(min=1) if expected.numel() else 1
    assert ((actual - expected).abs() <= tolerance * scale).all()


def _pixel(image, y, x):
    """One pixel, zero outside."""
    height, width = image.shape
    return float(image[y, x]) if 0 <= y < height and 0 <= x < width else 0.0


def _bilinear(image, y, x):
    y0, x0 = math.floor(y), math.floor(x)
    fy, fx = y - y0, x - x0
    return (
        (1 - fy) * (1 - fx) * _pixel(image, y0, x0)
        + (1 - fy) * fx * _pixel(image, y0, x0 + 1)
        + fy * (1 - fx) * _pixel(image, y0 + 1, x0)
        + fy * fx * _pixel(image, y0 + 1, x0 + 1)
    )


def acu_conv2d_loops(input, weight, offsets, bias, stride, padding, dilation, groups):
    """input (N, C_in, H, W), offsets (P, K, 2), pairs for the rest; returns float64 (N, C_out, H_out, W_out)."""
    n, _, height, width = input.shape
    c_out, c_per_group, kh, kw = weight.shape
    h_out = (height + 2 * padding[0] - dilation[0] * (kh - 1) - 1) // stride[0] + 1
    w_out = (width + 2 * padding[1] - dilation[1] * (kw - 1) - 1) // stride[1] + 1
    output = torch.zeros(n, c_out, h_out, w_out, dtype=torch.float64)
    for b in range(n):
        for co in range(c_out):
            taps = offsets[co * len(offsets) // c_out]
            group = co // (c_out // groups)
            for oy in range(h_out):
                for ox in range(w_out):
                    total = 0.0 if bias is None else float(bias[co])
                    for ci in range(c_per_group):
                        for i in range(kh):
                            for j in range(kw):
                                dy, dx = taps[i * kw + j].tolist()
                                y = oy * stride[0] - padding[0] + i * dilation[0] + dy
                                x = ox * stride[1] - padding[1] + j * dilation[1] + dx
                                total += float(weight[co, ci, i, j]) * _bilinear(
                                    input[b, group * c_per_group + ci], y, x
                                )
                    output[b, co, oy, ox] = total
    return output
