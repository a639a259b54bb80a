//! Summing rows on the CPU, bit by bit as DESIGN says: float32, from +0.0, separate adds in the order given, one
//! rounding at the end, in IEEE's default modes whatever the caller's are.
//!
//! Chunks stay in the first-level cache; each source row is read once, in order. Element-wise adds give the same
//! bits at any vector width, so the widest the CPU has is used.

use half::f16;
use half::slice::HalfFloatSliceExt;

use super::Host;
use crate::device::{Combine, Float};
use crate::error::Result;

/// Elements summed at a time: 4 KiB of accumulators.
const CHUNK: usize = 1024;

/// The calling thread's floating-point modes, put aside: no flush-to-zero, round to nearest.
struct DefaultModes {
    #[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
    saved: u64,
}

#[cfg(target_arch = "x86_64")]
impl DefaultModes {
    fn enter() -> DefaultModes {
        let mut saved = 0u32;
        let modes = 0x1f80u32;
        // SAFETY: reads and writes MXCSR; 0x1f80 masks every exception.
        unsafe {
            std::arch::asm!("stmxcsr [{}]", in(reg) &mut saved, options(nostack));
            std::arch::asm!("ldmxcsr [{}]", in(reg) &modes, options(nostack));
        }
        DefaultModes { saved: saved as u64 }
    }
}
#[cfg(target_arch = "x86_64")]
impl Drop for DefaultModes {
    fn drop(&mut self) {
        let saved = self.saved as u32;
        // SAFETY: restores what was there.
        unsafe { std::arch::asm!("ldmxcsr [{}]", in(reg) &saved, options(nostack)) };
    }
}

#[cfg(target_arch = "aarch64")]
impl DefaultModes {
    fn enter() -> DefaultModes {
        let saved: u64;
        // SAFETY: reads and writes FPCR; 0 is the architecture's default.
        unsafe {
            std::arch::asm!("mrs {}, fpcr", out(reg) saved, options(nostack, nomem));
            std::arch::asm!("msr fpcr, {}", in(reg) 0u64, options(nostack));
        }
        DefaultModes { saved }
    }
}
#[cfg(target_arch = "aarch64")]
impl Drop for DefaultModes {
    fn drop(&mut self) {
        // SAFETY: restores what was there.
        unsafe { std::arch::asm!("msr fpcr, {}", in(reg) self.saved, options(nostack)) };
    }
}

#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
impl DefaultModes {
    fn enter() -> DefaultModes {
        DefaultModes {}
    }
}

/// Round to nearest even; NaN stays NaN.
#[inline(always)]
fn to_bf16(value: f32) -> u16 {
    let bits = value.to_bits();
    let rounded = bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16;
    if value.is_nan() { (bits >> 16 | 0x40) as u16 } else { rounded as u16 }
}

/// Adds `n` elements at `from` to the accumulators.
///
/// # Safety
/// `n` elements of the type stand at `from`, `n <= CHUNK`.
#[inline(always)]
unsafe fn add(acc: &mut [f32; CHUNK], from: *const u8, n: usize, kind: Float) {
    match kind {
        Float::F32 => {
            for (i, a) in acc[..n].iter_mut().enumerate() {
                // SAFETY: i < n.
                *a += unsafe { (from as *const f32).add(i).read_unaligned() };
            }
        }
        Float::Bf16 => {
            for (i, a) in acc[..n].iter_mut().enumerate() {
                // SAFETY: i < n.
                let bits = unsafe { (from as *const u16).add(i).read_unaligned() };
                *a += f32::from_bits((bits as u32) << 16);
            }
        }
        Float::F16 => {
            let mut halves = [f16::ZERO; CHUNK];
            let mut floats = [0f32; CHUNK];
            // SAFETY: n elements, copied to aligned memory.
            unsafe {
                std::ptr::copy_nonoverlapping(from, halves.as_mut_ptr() as *mut u8, n * 2);
            }
            halves[..n].convert_to_f32_slice(&mut floats[..n]);
            for (a, x) in acc[..n].iter_mut().zip(&floats[..n]) {
                *a += x;
            }
        }
    }
}

/// Rounds the accumulators once and stores them.
///
/// # Safety
/// `n` elements of the type fit at `to`, `n <= CHUNK`.
#[inline(always)]
unsafe fn store(acc: &[f32; CHUNK], to: *mut u8, n: usize, kind: Float) {
    match kind {
        // SAFETY: n elements.
        Float::F32 => unsafe {
            std::ptr::copy_nonoverlapping(acc.as_ptr() as *const u8, to, n * 4);
        },
        Float::Bf16 => {
            for (i, a) in acc[..n].iter().enumerate() {
                // SAFETY: i < n.
                unsafe { (to as *mut u16).add(i).write_unaligned(to_bf16(*a)) };
            }
        }
        Float::F16 => {
            let mut halves = [f16::ZERO; CHUNK];
            halves[..n].convert_from_f32_slice(&acc[..n]);
            // SAFETY: n elements.
            unsafe { std::ptr::copy_nonoverlapping(halves.as_ptr() as *const u8, to, n * 2) };
        }
    }
}

/// A row in somebody's window.
pub(super) struct Pull(*const u8);
// SAFETY: an address; the list it stands in is scratch memory, filled and read within one call.
unsafe impl Send for Pull {}

/// What one token's sum is made of.
struct Sum<'a> {
    rows: &'a [Pull],
    kind: Float,
    out: *mut u8,
    out_kind: Float,
    elements: usize,
    accumulate: bool,
}

/// # Safety
/// Every row holds `elements` elements of `kind`; `out` of `out_kind`.
#[inline(always)]
unsafe fn sum(s: &Sum) {
    let mut acc = [0f32; CHUNK];
    let mut start = 0;
    while start < s.elements {
        let n = CHUNK.min(s.elements - start);
        acc[..n].fill(0.0);
        let out = s.out.wrapping_add(start * s.out_kind.bytes());
        // SAFETY: start + n <= elements.
        unsafe {
            for row in s.rows {
                add(&mut acc, row.0.wrapping_add(start * s.kind.bytes()), n, s.kind);
            }
            if s.accumulate {
                add(&mut acc, out, n, s.out_kind);
            }
            store(&acc, out, n, s.out_kind);
        }
        start += n;
    }
}

/// # Safety
/// As `sum`, on a CPU with AVX2.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
unsafe fn sum_avx2(s: &Sum) {
    // SAFETY: forwarded.
    unsafe { sum(s) }
}

impl Host {
    pub(super) fn reduce(&self, c: &Combine) -> Result<()> {
        let targets = self.targets(c.memory);
        let counts = self.rank_counts(c.memory);
        let size = c.hidden as usize * c.send_type.bytes();
        // Where this rank's rows start among a peer's.
        let base = if self.map.sizes.gathers {
            counts[..self.rank as usize].iter().map(|c| *c as u64).sum()
        } else {
            self.rank as u64 * c.bound as u64
        };
        let row_of = |peer: u32, row: u64| {
            let offset = self.map.combine(c.call.slot) + (base + row) * size as u64;
            self.bases.at(peer, offset, size as u64) as *const u8
        };
        let _modes = DefaultModes::enter();
        #[cfg(target_arch = "x86_64")]
        let wide = std::arch::is_x86_feature_detected!("avx2");
        let mut slot = self.slot(c.call.slot);
        let rows = &mut slot.pulls;
        let (mut pulled, mut remote) = (0u64, 0u64);
        for token in 0..c.tokens as usize {
            rows.clear();
            let mut pull = |peer: u32, row: u64| {
                rows.push(Pull(row_of(peer, row)));
                remote += u64::from(peer != self.rank);
            };
            if c.everyone {
                (0..self.ranks).for_each(|peer| pull(peer, token as u64));
            } else if self.map.sizes.gathers {
                targets.of(token).for_each(|(peer, _)| pull(peer, token as u64));
            } else {
                targets.of(token).for_each(|(peer, row)| pull(peer, row as u64));
            }
            pulled += rows.len() as u64;
            let Some(out) = &c.out else { continue };
            let s = Sum {
                rows,
                kind: c.send_type,
                out: out.row(token),
                out_kind: c.out_type,
                elements: c.hidden as usize,
                accumulate: c.accumulate,
            };
            // SAFETY: comm checked the shapes; row_of checked the bounds; AVX2 was asked for.
            unsafe {
                #[cfg(target_arch = "x86_64")]
                if wide {
                    sum_avx2(&s);
                    continue;
                }
                sum(&s);
            }
        }
        Self::add(&self.stats.rows_pulled, pulled);
        Self::add(&self.stats.bytes_pulled, pulled * size as u64);
        Self::add(&self.stats.bytes_remote, remote * size as u64);
        self.write_status(c.status, c.call.slot, None);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bf16_rounds_to_nearest_even() {
        for (value, bits) in [
            (1.0f32, 0x3f80u16),
            (f32::from_bits(0x3f80_8000), 0x3f80),
            (f32::from_bits(0x3f81_8000), 0x3f82),
            (f32::from_bits(0x3f80_8001), 0x3f81),
            (f32::MAX, 0x7f80),
            (f32::NEG_INFINITY, 0xff80),
            (-0.0, 0x8000),
            (f32::from_bits(0x0000_8001), 0x0001),
        ] {
            assert_eq!(to_bf16(value), bits, "{value:e}");
        }
        assert_eq!(to_bf16(f32::from_bits(0x7f80_0001)) & 0x7fff, 0x7fc0);
    }

    #[test]
    #[cfg(target_arch = "x86_64")]
    fn the_callers_flush_to_zero_does_not_reach_the_sums() {
        let read = || {
            let mut modes = 0u32;
            // SAFETY: reads MXCSR.
            unsafe { std::arch::asm!("stmxcsr [{}]", in(reg) &mut modes, options(nostack)) };
            modes
        };
        let ftz = 0x9fc0u32;
        // SAFETY: sets flush-to-zero and denormals-are-zero on this thread.
        unsafe { std::arch::asm!("ldmxcsr [{}]", in(reg) &ftz, options(nostack)) };
        let tiny = f32::from_bits(3);
        let mut out = 0f32;
        {
            let _modes = DefaultModes::enter();
            let rows = [(); 2].map(|()| Pull(&tiny as *const f32 as *const u8));
            let s = Sum {
                rows: &rows,
                kind: Float::F32,
                out: &mut out as *mut f32 as *mut u8,
                out_kind: Float::F32,
                elements: 1,
                accumulate: false,
            };
            // SAFETY: one element each.
            unsafe { sum(&s) };
        }
        let after = read();
        let plain = 0x1f80u32;
        // SAFETY: back to the default.
        unsafe { std::arch::asm!("ldmxcsr [{}]", in(reg) &plain, options(nostack)) };
        assert_eq!(after & 0x8040, 0x8040, "the caller's modes came back");
        assert_eq!(out.to_bits(), 6);
    }
}
