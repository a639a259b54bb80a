"""Dispatch that quantises: codes and scales bit for bit what numpy makes of the tokens, in every layout."""

import a2a
import numpy as np
import pytest

import fp8
import ranks

COUNTS = [13, 0, 6]
HIDDEN = 656  # five groups of 128 columns and one of 16: UE8M0 scales fill one int32 and half of another
QUANTS = {"f32": a2a.Quant.FP8_F32_SCALES, "ue8m0": a2a.Quant.FP8_UE8M0_SCALES}
SCALES = {"row": a2a.ScaleLayout.ROW, "column": a2a.ScaleLayout.COLUMN}


def columns_of(quant, hidden):
    groups = -(-hidden // fp8.GROUP)
    return groups if quant == a2a.Quant.FP8_F32_SCALES else -(-groups // 4)


def as_sent(x, dtype):
    """Tokens of a type as (what dispatch takes, the code of its type, their float32 values)."""
    if dtype == "bfloat16":
        words = (x.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
        return words, a2a.bfloat16, (words.astype(np.uint32) << 16).view(np.float32)
    return x.astype(dtype), None, x.astype(dtype).astype(np.float32)


def run_rank(rank, group, backend, layout, dtype, quant, scale_layout, is_ready):
    """One step; every received row is checked, and the sums of experts that dequantise."""
    sent, x_type, values = [], None, []
    for r, count in enumerate(COUNTS):
        tokens, x_type, value = as_sent(ranks.tokens_of(r, count, "float32", HIDDEN)[0], dtype)
        sent.append(tokens), values.append(value)
    references = [fp8.quantised(value, quant) for value in values]
    _, ids, weights = ranks.tokens_of(rank, COUNTS[rank], "float32", HIDDEN)
    columns = columns_of(quant, HIDDEN)
    x, scales = sent[rank], None
    if is_ready:
        (x, scales), x_type = references[rank], a2a.float8_e4m3fn
    fields = dict(max_hidden=HIDDEN, quant=quant, scale_layout=scale_layout)
    with ranks.Rank(rank, group, backend, layout, COUNTS, dtype, **fields) as me:
        got = me.dispatch(x, ids, weights, scale_columns=columns, x_type=x_type, scales=scales)
        scales = got.received.scales
        assert got.received.tokens.dtype == a2a.float8_e4m3fn
        assert scales.shape == (*got.shape, columns)
        if scale_layout == a2a.ScaleLayout.COLUMN:
            padded = -(-got.shape[-1] // 4) * 4
            assert scales.strides == (columns * padded, 1, padded)[-scales.ndim :]
        got_scales = got.scales.reshape(-1, columns)
        valid = np.flatnonzero(got.row_source[:, 0] >= 0)
        assert len(valid) == got.rank_counts.sum()
        for row in valid:
            source, token = got.row_source[row]
            assert got.tokens[row].tobytes() == references[source][0][token].tobytes()
            assert got_scales[row].tobytes() == references[source][1][token].tobytes()
        dequantised = fp8.dequantised(got.tokens, got_scales, quant)
        y = me.combine(got, me.compute(got, dequantised), COUNTS[rank])
    wanted = ranks.alone(fp8.dequantised(*references[rank], quant), ids, weights, len(COUNTS), layout)
    assert y.tobytes() == wanted.tobytes()
    # Which is the layer, but for what 3 bits of mantissa lose: at most 1/16 of each token's element.
    exact = ranks.alone(values[rank], ids, weights, len(COUNTS), layout)
    assert np.allclose(y, exact, rtol=0, atol=np.abs(exact).max(initial=0) / 8)


@pytest.mark.parametrize("scale_layout", SCALES)
@pytest.mark.parametrize("quant", QUANTS)
@pytest.mark.parametrize("backend, layout", ranks.PAIRS)
def test_round_trip(threads, backend, layout, quant, scale_layout):
    arguments = backend, layout, "float32", QUANTS[quant], SCALES[scale_layout], False
    ranks.together(threads, len(COUNTS), run_rank, *arguments)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("quant", QUANTS)
def test_types_of_tokens(threads, quant, dtype):
    arguments = "deepep_low_latency", "expert_padded", dtype, QUANTS[quant], a2a.ScaleLayout.ROW, False
    ranks.together(threads, len(COUNTS), run_rank, *arguments)


@pytest.mark.parametrize("scale_layout", SCALES)
@pytest.mark.parametrize("quant", QUANTS)
@pytest.mark.parametrize("backend, layout", ranks.PAIRS)
def test_quantised_tokens_travel_as_they_are(threads, backend, layout, quant, scale_layout):
    arguments = backend, layout, "float32", QUANTS[quant], SCALES[scale_layout], True
    ranks.together(threads, len(COUNTS), run_rank, *arguments)


def hard_rows():
    """Rows of 256 columns in which rounding is decided: a group with 448 in it has the scale 1."""
    middles = fp8.MIDDLES.astype(np.float32)
    assert (middles == fp8.MIDDLES).all()
    rows = []
    for group in (middles, np.nextafter(middles, np.float32(0)), np.nextafter(middles, np.float32(1000))):
        group = np.append(group, np.float32([448, 0]))
        rows += [np.append(group, -group), np.append(group / 7, group * 3)]
    special = np.float32([np.nan, -np.nan, np.inf, -np.inf, 0, -0.0, 1e-45, 1e-38, 3e38, 1])
    zeros = np.zeros(128, np.float32)
    for value in special:  # alone in a group, and beside ordinary values
        rows.append(np.append(np.full(128, value, np.float32), np.append(value, middles[-60:]).repeat(3)[:128]))
    for largest in np.float32([1e-4, 9.9e-5, 1.0001e-4, 1e-30, 447.99997, 448.00003, 2**-9, 3.5, 3.5000002]):
        rows.append(np.append(np.append(largest, zeros[1:]), np.append(zeros[1:], -largest)))
    return np.array(rows, np.float32)


@pytest.mark.parametrize("quant", QUANTS)
def test_hard_values(quant):
    quant, x = QUANTS[quant], hard_rows()
    ids = np.zeros((len(x), ranks.TOPK), np.int32)
    fields = dict(max_hidden=x.shape[1], quant=quant)
    with ranks.Rank(0, bytes(128), "deepep_high_throughput", "flat", [len(x)], **fields) as me:
        got = me.dispatch(x, ids, scale_columns=columns_of(quant, x.shape[1]))
        codes, scales = fp8.quantised(x, quant)
        for row in range(len(x)):
            assert got.tokens[row].tobytes() == codes[row].tobytes(), (row, x[row], got.tokens[row], codes[row])
            assert got.scales[row].tobytes() == scales[row].tobytes(), (row, x[row], got.scales[row], scales[row])


def test_the_reference_knows_e4m3():
    """Against values that are known: what the reference itself must not get wrong."""
    known = {0.0: 0x00, 2.0**-9: 0x01, 2.0**-10: 0x00, 3 * 2.0**-10: 0x02, 2.0**-6: 0x08, 1.0: 0x38,
             1.0625: 0x38, 1.1875: 0x3A, -1.125: 0xB9, 17.0: 0x58, 19.0: 0x5A, 448.0: 0x7E, 1e6: 0x7E, -449.0: 0xFE}
    assert fp8.rounded(np.float32(list(known))).tolist() == list(known.values())
    assert fp8.rounded(np.float32([np.nan, np.inf, -0.0])).tolist() == [0x7F, 0x7E, 0x80]
    x = np.float32([[448, 1, -2] + [0] * 125 + [0.75] * 16])
    codes, scales = fp8.quantised(x, a2a.Quant.FP8_UE8M0_SCALES)
    assert scales.tolist() == [[127 | 118 << 8]]  # 2^0, and 2^-9 for 0.75 / 448
    assert codes[0, [0, 1, 2, 3, 128]].tolist() == [0x7E, 0x38, 0xC0, 0, 0x7C]
    assert (fp8.dequantised(codes, scales, a2a.Quant.FP8_UE8M0_SCALES) == x).all()
