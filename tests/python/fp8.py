"""Quantised dispatch as a2a.h describes it, in numpy: e4m3 values, and a scale for each 128 columns of a row."""

import a2a
import numpy as np

GROUP = 128
# Every e4m3 value from 0 to 448 in the order of its code: exponent bias 7, 3 bits of mantissa; 0x7f is NaN.
VALUES = np.array([m / 512 if e == 0 else (8 + m) / 8 * 2.0 ** (e - 7) for e in range(16) for m in range(8)][:127])
MIDDLES = (VALUES[:-1] + VALUES[1:]) / 2


def rounded(x):
    """The e4m3 codes nearest to float32 values; the even one of two, 448 at most, NaN for NaN."""
    size = np.minimum(np.abs(x).astype(np.float64), 448)
    code = np.searchsorted(MIDDLES, size)  # how many middles lie below
    is_middle = MIDDLES[np.minimum(code, len(MIDDLES) - 1)] == size
    code = np.where(np.isnan(x), 0x7F, code + (is_middle & (code % 2 == 1)))
    return (code | np.signbit(x) << 7).astype(np.uint8)


def quantised(x, quant):
    """Rows of float32 as (e4m3 codes, scales): float32 [T, G], or UE8M0 bytes packed four to an int32."""
    groups = range(0, x.shape[1], GROUP)
    largest = [np.fmax.reduce(np.abs(x[:, g : g + GROUP]), axis=1) for g in groups]
    scales = np.fmax(np.array(largest), np.float32(1e-4)).T / np.float32(448)
    if quant == a2a.Quant.FP8_UE8M0_SCALES:
        bits = (scales.view(np.int32) + 0x7FFFFF) & 0x7F800000
        scales = bits.view(np.float32)
    with np.errstate(invalid="ignore"):
        codes = rounded(np.abs(x) / scales.repeat(GROUP, axis=1)[:, : x.shape[1]]) & 0x7F
    codes |= (np.signbit(x) << 7).astype(np.uint8)  # the sign of x, also where x / scale is a NaN of its own
    if quant == a2a.Quant.FP8_UE8M0_SCALES:
        packed = np.zeros((len(x), -(-scales.shape[1] // 4) * 4), np.uint8)
        packed[:, : scales.shape[1]] = bits >> 23
        scales = packed.view("<i4")
    return codes, np.ascontiguousarray(scales)


def dequantised(codes, scales, quant):
    """The float32 values that codes and scales stand for."""
    scales = np.ascontiguousarray(scales)
    if quant == a2a.Quant.FP8_UE8M0_SCALES:
        scales = (scales.view(np.uint8).astype(np.int32) << 23).view(np.float32)
    table = np.concatenate([VALUES, [np.nan], -VALUES, [np.nan]]).astype(np.float32)
    return table[codes] * scales.repeat(GROUP, axis=1)[:, : codes.shape[1]]
