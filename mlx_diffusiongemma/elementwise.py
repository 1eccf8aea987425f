"""Exponential and hyperbolic tangent of whole vocabularies, and GELU.

MLX's CPU back end computes them number by number where it has no vector instructions for them, which is everywhere but
on a Mac: together they took half of a step. There they are sums and products of arrays, two to seven times as fast: the
minimax approximations that Cephes (`expf`) and Eigen (`ptanh`) use. docs/performance.md has their times and errors.
"""

from __future__ import annotations

import math
import platform
from collections.abc import Callable
from functools import partial

import mlx.core as mx
import mlx.nn as nn

LARGE, PARTS = 1 << 17, 8  # arrays from this size on are computed in so many parts
LOWEST = -87.0  # exp is a normal float32 from here on, and 0 below
LOG2_E = 1.44269504088896341
LN2_HIGH, LN2_LOW = 0.693359375, -2.12194440e-4  # a product of the first with an exponent is exact
EXP_TERMS = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)
TANH_BOUND = 7.90531110763549805  # beyond it tanh is 1 in float32
TANH_NUMERATOR = (
    -2.76076847742355e-16,
    2.00018790482477e-13,
    -8.60467152213735e-11,
    5.12229709037114e-08,
    1.48572235717979e-05,
    6.37261928875436e-04,
    4.89352455891786e-03,
)
TANH_DENOMINATOR = (1.19825839466702e-06, 1.18534705686654e-04, 2.26843463243900e-03, 4.89352518554385e-03)


def _is_scalar() -> bool:
    """Tell whether MLX computes number by number here."""
    return platform.system() != "Darwin" and mx.default_device() == mx.Device(mx.cpu)


def exp(x: mx.array) -> mx.array:
    """Return e^x for float32 x <= 0, exactly 0 for x below `LOWEST`."""
    if not _is_scalar():
        return mx.exp(x)
    return _in_parts(_exp, x)


def _exp(x: mx.array) -> mx.array:
    bounded = mx.maximum(x, LOWEST)
    exponent = mx.round(bounded * LOG2_E)
    rest = bounded - exponent * LN2_HIGH - exponent * LN2_LOW
    series = _polynomial(EXP_TERMS, rest) * (rest * rest) + rest + 1
    power = mx.view((exponent.astype(mx.int32) + 127) << 23, mx.float32)  # 2^exponent, bit by bit
    return mx.where(x < LOWEST, 0.0, series * power)


def tanh(x: mx.array) -> mx.array:
    """Return tanh x for float32 x."""
    if not _is_scalar():
        return mx.tanh(x)
    return _in_parts(_tanh, x)


def _tanh(x: mx.array) -> mx.array:
    x = mx.clip(x, -TANH_BOUND, TANH_BOUND)
    square = x * x
    return x * _polynomial(TANH_NUMERATOR, square) / _polynomial(TANH_DENOMINATOR, square)


def gelu(x: mx.array) -> mx.array:
    """Return x times the standard normal distribution function of x, by the approximation with tanh."""
    return _in_parts(_gelu, x) if x.dtype == mx.float32 and _is_scalar() else nn.gelu_approx(x)


@partial(mx.compile, shapeless=True)  # two or three loops, which the compiler has vector instructions for
def _gelu(x: mx.array) -> mx.array:
    return 0.5 * x * (1 + _tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)))


def _in_parts(function: Callable[[mx.array], mx.array], x: mx.array) -> mx.array:
    """Apply a function to x part by part: its intermediate arrays stay small, and in the cache."""
    axis = next((axis for axis, length in enumerate(x.shape) if length >= PARTS), None)
    if x.size < LARGE or axis is None:
        return function(x)
    parts: list[mx.array] = []
    for part in mx.split(x, [x.shape[axis] * i // PARTS for i in range(1, PARTS)], axis=axis):
        parts.append(function(mx.depends(part, parts[-1:]) if parts else part))
    return mx.concatenate(parts, axis=axis)


def _polynomial(coefficients: tuple[float, ...], x: mx.array) -> mx.array:
    """Evaluate a polynomial, highest power first."""
    value = x * coefficients[0] + coefficients[1]
    for coefficient in coefficients[2:]:
        value = value * x + coefficient
    return value
