//! Quantising tokens on their way, bit by bit: e4m3 per 128 columns, with float32 or UE8M0 scales.

use half::f16;

use crate::config::{QUANT_GROUP, QuantKind};
use crate::device::Float;

/// The largest e4m3 value.
const LARGEST: f32 = 448.0;
/// The smallest maximum that a scale is made of.
const FLOOR: f32 = 1e-4;
const GROUP: usize = QUANT_GROUP as usize;

/// The nearest e4m3 magnitude, ties to even; past the largest, the largest; NaN stays NaN. `value` has no sign. Both
/// ways are always taken, so that the compiler can do eight at a time.
#[inline(always)]
fn to_e4m3(value: f32) -> u8 {
    let bits = value.to_bits();
    // Three bits of mantissa stay; the exponent's bias falls from 127 to 7.
    let rounded = bits.wrapping_add(0x7_ffff + (bits >> 20 & 1));
    let normal = (rounded >> 20).wrapping_sub(120 << 3);
    // Below 2^-6, multiples of 2^-9: adding 1.5 * 2^23 rounds to an integer, which then stands in the last bits.
    let small = (value * 512.0 + 12_582_912.0).to_bits() & 0xff;
    let code = if bits < (1.0f32 / 64.0).to_bits() { small } else { normal };
    let code = if bits >= LARGEST.to_bits() { 0x7e } else { code };
    (if bits > 0x7f80_0000 { 0x7f } else { code }) as u8
}

/// The scale for a group whose largest magnitude is `most`.
#[inline(always)]
fn scale_of(most: f32, quant: QuantKind) -> f32 {
    let scale = most / LARGEST;
    match quant {
        // Up to the next power of two, taken from the bits.
        QuantKind::Fp8Ue8m0 => f32::from_bits((scale.to_bits() + 0x7f_ffff) & 0x7f80_0000),
        _ => scale,
    }
}

/// Reads up to a group's elements as float32.
///
/// # Safety
/// `to.len()` elements of the type stand at `from`.
#[inline(always)]
unsafe fn load(from: *const u8, kind: Float, to: &mut [f32]) {
    let each = to.iter_mut().enumerate();
    // SAFETY: i < to.len(), here and below.
    let half = |i: usize| unsafe { (from as *const u16).add(i).read_unaligned() };
    match kind {
        // SAFETY: as above.
        Float::F32 => each.for_each(|(i, x)| *x = unsafe { (from as *const f32).add(i).read_unaligned() }),
        Float::Bf16 => each.for_each(|(i, x)| *x = f32::from_bits((half(i) as u32) << 16)),
        Float::F16 => each.for_each(|(i, x)| *x = f16::from_bits(half(i)).to_f32()),
    }
}

/// A row to quantise: `hidden` elements of a type at an address.
#[derive(Clone, Copy)]
pub(super) struct Row {
    pub from: *const u8,
    pub kind: Float,
    pub hidden: usize,
}

/// Quantises a row. The caller's floating-point modes must be the default ones. Element-wise arithmetic gives the same
/// bits at any vector width, so the widest the CPU has is used.
///
/// # Safety
/// The row's elements are there.
pub(super) unsafe fn quantise(row: Row, quant: QuantKind, tokens: &mut [u8], scales: &mut [u8]) {
    // SAFETY: forwarded; AVX2 is asked for.
    unsafe {
        #[cfg(target_arch = "x86_64")]
        if std::arch::is_x86_feature_detected!("avx2") {
            return quantise_avx2(row, quant, tokens, scales);
        }
        quantise_any(row, quant, tokens, scales)
    }
}

/// # Safety
/// As `quantise`, on a CPU with AVX2.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
unsafe fn quantise_avx2(row: Row, quant: QuantKind, tokens: &mut [u8], scales: &mut [u8]) {
    // SAFETY: forwarded.
    unsafe { quantise_any(row, quant, tokens, scales) }
}

/// # Safety
/// As `quantise`.
#[inline(always)]
unsafe fn quantise_any(row: Row, quant: QuantKind, tokens: &mut [u8], scales: &mut [u8]) {
    let Row { from, kind, hidden } = row;
    scales.fill(0);
    let mut group = [0f32; GROUP];
    for (g, codes) in tokens[..hidden].chunks_mut(GROUP).enumerate() {
        let group = &mut group[..codes.len()];
        // SAFETY: the group lies inside the row.
        unsafe { load(from.add(g * GROUP * kind.bytes()), kind, group) };
        // Eight maxima side by side. A comparison with NaN is false: it does not count.
        let larger = |most: f32, x: f32| if x > most { x } else { most };
        let mut lanes = [FLOOR; 8];
        for part in group.chunks(8) {
            lanes.iter_mut().zip(part).for_each(|(most, x)| *most = larger(*most, x.abs()));
        }
        let most = lanes.into_iter().fold(FLOOR, larger);
        let scale = scale_of(most, quant);
        for (code, x) in codes.iter_mut().zip(group.iter()) {
            // The sign is the element's: that of a NaN from a division is the processor's choice.
            *code = to_e4m3(x.abs() / scale) | (x.to_bits() >> 24 & 0x80) as u8;
        }
        match quant {
            QuantKind::Fp8Ue8m0 => scales[g] = (scale.to_bits() >> 23) as u8,
            _ => scales[g * 4..][..4].copy_from_slice(&scale.to_le_bytes()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The magnitude that a code means.
    fn value(code: u8) -> f32 {
        let (exponent, mantissa) = ((code >> 3 & 15) as i32, (code & 7) as f32);
        match exponent {
            0 => mantissa / 512.0,
            _ => (1.0 + mantissa / 8.0) * 2f32.powi(exponent - 7),
        }
    }

    #[test]
    fn every_code_survives_and_what_lies_between_goes_to_the_nearer() {
        for code in 0..0x7f {
            assert_eq!(to_e4m3(value(code)), code, "{code:#x}");
        }
        for low in 0..0x7e {
            let middle = (value(low) + value(low + 1)) / 2.0;
            assert_eq!(to_e4m3(middle), low + low % 2, "the middle above {low:#x}");
            assert_eq!(to_e4m3(middle.next_down()), low);
            assert_eq!(to_e4m3(middle.next_up()), low + 1);
        }
        assert_eq!(to_e4m3(f32::INFINITY), 0x7e);
        assert_eq!(to_e4m3(1e30), 0x7e);
        assert_eq!(to_e4m3(f32::from_bits(0x7fc0_0001)), 0x7f);
        assert_eq!(to_e4m3(f32::from_bits(1)), 0);
    }

    #[test]
    fn infinities_become_nan_of_their_own_sign() {
        let (mut tokens, mut scales) = ([0; 4], [0; 4]);
        let row = [f32::INFINITY, f32::NEG_INFINITY, 1.0, -f32::NAN];
        let from = row.as_ptr() as *const u8;
        // SAFETY: four elements.
        unsafe {
            quantise(Row { from, kind: Float::F32, hidden: 4 }, QuantKind::Fp8F32, &mut tokens, &mut scales)
        };
        assert_eq!(tokens, [0x7f, 0xff, 0, if (-f32::NAN).is_sign_negative() { 0xff } else { 0x7f }]);
        assert_eq!(f32::from_le_bytes(scales), f32::INFINITY);
    }

    #[test]
    fn ue8m0_scales_are_the_next_power_of_two() {
        for (most, power) in [(448.0, 0), (449.0, 1), (224.0, -1), (1e-4, -22), (3e38, 120)] {
            assert_eq!(scale_of(most, QuantKind::Fp8Ue8m0), 2f32.powi(power), "{most}");
        }
    }
}
