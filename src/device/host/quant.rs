//! Quantising tokens on their way, bit by bit: e4m3 per 128 columns, with float32 or UE8M0 scales.

use half::f16;

use crate::config::{QUANT_GROUP, QuantKind};
use crate::device::Float;

/// The largest e4m3 value.
const LARGEST: f32 = 448.0;
/// The smallest maximum that a scale is made of.
const FLOOR: f32 = 1e-4;
const GROUP: usize = QUANT_GROUP as usize;

/// The nearest e4m3 value, ties to even; past the largest, the largest; NaN stays NaN.
#[inline(always)]
fn to_e4m3(value: f32) -> u8 {
    let bits = value.to_bits();
    let (sign, magnitude) = ((bits >> 24 & 0x80) as u8, bits & 0x7fff_ffff);
    let code = if magnitude > 0x7f80_0000 {
        0x7f
    } else if magnitude >= LARGEST.to_bits() {
        0x7e
    } else if magnitude >= (1.0f32 / 64.0).to_bits() {
        // Three bits of mantissa stay; the exponent's bias falls from 127 to 7.
        let rounded = magnitude + 0x7_ffff + (magnitude >> 20 & 1);
        ((rounded >> 20) - (120 << 3)) as u8
    } else {
        // Multiples of 2^-9.
        (f32::from_bits(magnitude) * 512.0).round_ties_even() as u8
    };
    sign | code
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
    for (i, x) in to.iter_mut().enumerate() {
        // SAFETY: i < to.len().
        *x = unsafe {
            match kind {
                Float::F32 => (from as *const f32).add(i).read_unaligned(),
                Float::Bf16 => f32::from_bits(((from as *const u16).add(i).read_unaligned() as u32) << 16),
                Float::F16 => f16::from_bits((from as *const u16).add(i).read_unaligned()).to_f32(),
            }
        };
    }
}

/// Quantises a row of `hidden` elements. The caller's floating-point modes must be the default ones.
///
/// # Safety
/// `hidden` elements of the type stand at `from`.
pub(super) unsafe fn quantise(
    from: *const u8,
    kind: Float,
    hidden: usize,
    quant: QuantKind,
    tokens: &mut [u8],
    scales: &mut [u8],
) {
    scales.fill(0);
    let mut group = [0f32; GROUP];
    for (g, codes) in tokens[..hidden].chunks_mut(GROUP).enumerate() {
        let group = &mut group[..codes.len()];
        // SAFETY: the group lies inside the row.
        unsafe { load(from.add(g * GROUP * kind.bytes()), kind, group) };
        // A comparison with NaN is false: it does not count.
        let most = group.iter().fold(FLOOR, |most, x| if x.abs() > most { x.abs() } else { most });
        let scale = scale_of(most, quant);
        for (code, x) in codes.iter_mut().zip(group.iter()) {
            // The sign is the element's: that of a NaN from a division is the processor's choice.
            *code = to_e4m3(x.abs() / scale) & 0x7f | (x.to_bits() >> 24 & 0x80) as u8;
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

    /// What a code means.
    fn value(code: u8) -> f32 {
        let (exponent, mantissa) = ((code >> 3 & 15) as i32, (code & 7) as f32);
        let magnitude = match exponent {
            0 => mantissa / 512.0,
            _ => (1.0 + mantissa / 8.0) * 2f32.powi(exponent - 7),
        };
        if code & 0x80 == 0 { magnitude } else { -magnitude }
    }

    #[test]
    fn every_code_survives_and_what_lies_between_goes_to_the_nearer() {
        for code in (0..=0xfe).filter(|code| code & 0x7f != 0x7f) {
            assert_eq!(to_e4m3(value(code)), code, "{code:#x}");
        }
        for low in 0..0x7e {
            let middle = (value(low) + value(low + 1)) / 2.0;
            assert_eq!(to_e4m3(middle), low + low % 2, "the middle above {low:#x}");
            assert_eq!(to_e4m3(middle.next_down()), low);
            assert_eq!(to_e4m3(middle.next_up()), low + 1);
        }
        assert_eq!(to_e4m3(f32::INFINITY), 0x7e);
        assert_eq!(to_e4m3(-1e30), 0xfe);
        assert_eq!(to_e4m3(f32::NAN) & 0x7f, 0x7f);
        assert_eq!(to_e4m3(f32::from_bits(1)), 0);
    }

    #[test]
    fn infinities_become_nan_of_their_own_sign() {
        let (mut tokens, mut scales) = ([0; 4], [0; 4]);
        let row = [f32::INFINITY, f32::NEG_INFINITY, 1.0, -f32::NAN];
        // SAFETY: four elements.
        unsafe {
            quantise(row.as_ptr() as *const u8, Float::F32, 4, QuantKind::Fp8F32, &mut tokens, &mut scales)
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
