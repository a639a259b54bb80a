//! Results on the CPU: staging them, and summing them bit by bit as the header says: float32, from +0.0, separate
//! multiplications and additions in the order given, one rounding at the end, in IEEE's default modes.
//!
//! Chunks stay in the first-level cache; each source row is read once, in order. Element-wise adds give the same
//! bits at any vector width, so the widest the CPU has is used.

use half::f16;
use half::slice::HalfFloatSliceExt;

use super::Host;
use super::modes::DefaultModes;
use super::route::{Ledger, keep_weights};
use super::sync::Slot;
use crate::device::members::Members;
use crate::device::{Combine, Float, Rows, Weighting};
use crate::error::Result;
use crate::fault::{self, Point};

/// Elements summed at a time: 4 KiB of accumulators. Where faults strike, few, so that they find rows half read.
const CHUNK: usize = if cfg!(feature = "faults") { 16 } else { 1024 };

/// Round to nearest even; NaN stays NaN.
#[inline(always)]
fn to_bf16(value: f32) -> u16 {
    let bits = value.to_bits();
    let rounded = bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16;
    if value.is_nan() { (bits >> 16 | 0x40) as u16 } else { rounded as u16 }
}

/// Adds `n` elements at `from`, each times the weight if there is one, to the accumulators.
///
/// # Safety
/// `n` elements of the type stand at `from`, `n <= CHUNK`.
#[inline(always)]
unsafe fn add(acc: &mut [f32; CHUNK], from: *const u8, n: usize, kind: Float, weight: Option<f32>) {
    let acc = &mut acc[..n];
    match kind {
        // SAFETY: i < n, here and below.
        Float::F32 => add_each(acc, weight, |i| unsafe { (from as *const f32).add(i).read_unaligned() }),
        Float::Bf16 => add_each(acc, weight, |i| {
            // SAFETY: as above.
            f32::from_bits((unsafe { (from as *const u16).add(i).read_unaligned() } as u32) << 16)
        }),
        Float::F16 => {
            let mut halves = [f16::ZERO; CHUNK];
            let mut floats = [0f32; CHUNK];
            // SAFETY: n elements, copied to aligned memory.
            unsafe { std::ptr::copy_nonoverlapping(from, halves.as_mut_ptr() as *mut u8, n * 2) };
            halves[..n].convert_to_f32_slice(&mut floats[..n]);
            add_each(acc, weight, |i| floats[i]);
        }
    }
}

#[inline(always)]
fn add_each(acc: &mut [f32], weight: Option<f32>, element: impl Fn(usize) -> f32) {
    match weight {
        None => acc.iter_mut().enumerate().for_each(|(i, a)| *a += element(i)),
        Some(weight) => acc.iter_mut().enumerate().for_each(|(i, a)| *a += weight * element(i)),
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

/// A row in somebody's window, and its weight if it has one.
pub(super) struct Pull(pub *const u8, pub Option<f32>);
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
                if start > 0 {
                    fault::at(Point::CombineRow);
                }
                add(&mut acc, row.0.wrapping_add(start * s.kind.bytes()), n, s.kind, row.1);
            }
            if s.accumulate {
                add(&mut acc, out, n, s.out_kind, None);
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

/// Sums one token's rows into its row of the output.
pub(super) fn sum_token(c: &Combine, token: usize, rows: &[Pull]) {
    let Some(out) = &c.out else { return };
    let s = Sum {
        rows,
        kind: c.send_type,
        out: out.row(token),
        out_kind: c.out_type,
        elements: c.hidden as usize,
        accumulate: c.accumulate,
    };
    // SAFETY: comm checked the shapes, whoever made the rows their bounds; AVX2 is asked for.
    unsafe {
        #[cfg(target_arch = "x86_64")]
        if std::arch::is_x86_feature_detected!("avx2") {
            sum_avx2(&s);
            return;
        }
        sum(&s);
    }
}

/// Puts a value that came back for a choice of a token.
pub(super) fn put_weight(out: &Rows, token: usize, k: usize, value: f32) {
    // SAFETY: comm checked that rows have top-k float32.
    unsafe { (out.row(token) as *mut f32).add(k).write_unaligned(value) };
}

/// Where results are brought: by key, how many of this rank's lie before them; none are where no courier carries.
#[derive(Clone, Copy)]
struct Brought<'a> {
    firsts: &'a [u32],
    /// This rank's own are not among them.
    in_place: bool,
}

/// What a combine reads, in numbers.
#[derive(Default)]
struct Pulled {
    rows: u64,
    bytes: u64,
    remote: u64,
    missing: u64,
    /// Of ranks that are lost.
    lost: u64,
}

impl Host {
    pub(super) fn stage(&self, c: &Combine) -> Result<()> {
        let l = self.ledger(c.memory);
        if c.weighting == Weighting::Given {
            keep_weights(&c.weights, c.tokens as usize, c.grid.topk as usize, l.given);
        }
        let (slot, size) = (c.call.slot, c.hidden as usize * c.send_type.bytes());
        let weight_bytes = c.weight_bytes();
        let (mut rows, mut bytes) = (0, 0);
        for (region, from, size) in [
            (self.map.combine(slot), &c.send, size),
            (self.map.combine_weights(slot), &c.row_weights, weight_bytes),
        ] {
            let Some(from) = from else { continue };
            let local = self.experts.count(self.rank);
            for block in 0..c.grid.blocks(local) as usize {
                let start = l.starts[block] as usize;
                for row in start..start + l.counts[block] as usize {
                    let to = self.bases.at(self.rank, region + (row * size) as u64, size as u64);
                    // SAFETY: one row on both sides.
                    unsafe { std::ptr::copy_nonoverlapping(from.row(row), to, size) };
                }
                bytes += l.counts[block] as u64 * size as u64;
            }
        }
        if c.send.is_some() {
            rows = l.counts[..c.grid.blocks(self.experts.count(self.rank)) as usize]
                .iter()
                .map(|count| *count as u64)
                .sum();
        }
        Self::add(&self.stats.rows_copied, rows);
        Self::add(&self.stats.bytes_copied, bytes);
        Ok(())
    }

    /// Where this rank's row for a choice lies among the owner's: owner and row; `None` without an expert, or dropped.
    fn result_of_choice(
        &self,
        c: &Combine,
        (l, brought, lost): (&Ledger, Brought, &Members),
        base: u64,
        token: usize,
        k: usize,
    ) -> Option<(u32, u64)> {
        let choice = token * c.grid.topk as usize + k;
        let id = l.ids[choice];
        if id < 0 {
            return None;
        }
        let owner = self.experts.place(id as usize).0;
        if lost.contains(owner) {
            return None;
        }
        if c.grid.layout.by_expert() {
            let (key, position) = l.choice(choice)?;
            let row = l.place(key, position)?;
            // What is brought lies by expert and position; else it is where the owner has it.
            let is_brought = !(brought.in_place && owner == self.rank);
            let first = brought.firsts.get(key).filter(|_| is_brought);
            return Some((owner, first.map_or(row, |first| (first + position) as u64)));
        }
        let (_, position) = l.targets(token).find(|(rank, _)| *rank == owner)?;
        self.result_row(l, base, owner, position).map(|row| (owner, row))
    }

    /// Where this rank's row `position` for a peer lies among the peer's, in per-rank layouts.
    fn result_row(&self, l: &Ledger, base: u64, peer: u32, position: u32) -> Option<u64> {
        if self.map.sizes.uses.counts {
            l.place(peer as usize, position)
        } else {
            Some(base + position as u64)
        }
    }

    pub(super) fn reduce(&self, c: &Combine) -> Result<()> {
        let mut guard = self.slot(c.call.slot);
        let l = self.ledger(c.memory);
        let size = c.hidden as u64 * c.send_type.bytes() as u64;
        let topk = c.grid.topk as usize;
        // Where this rank's rows start among a peer's, if not at places of their own.
        let base = if self.map.sizes.uses.published {
            l.rank_counts[..self.rank as usize].iter().map(|count| *count as u64).sum()
        } else {
            self.rank as u64 * c.grid.bound as u64
        };
        let weights = match c.weighting {
            Weighting::None => None,
            Weighting::Dispatched => Some(&*l.weights),
            Weighting::Given => Some(&*l.given),
        };
        let (posted, lost) = (self.map.sizes.uses.posted, self.lost());
        if posted {
            self.lay_out_results(c, &mut guard);
        }
        let _modes = DefaultModes::enter();
        let Slot { pulls: rows, firsts, beside, in_place, .. } = &mut *guard;
        let in_place = posted && *in_place;
        let mut pulled = Pulled::default();
        for token in 0..c.tokens as usize {
            rows.clear();
            // `again`: the token has read the row before.
            let mut pull = |peer: u32, row: u64, weight: Option<f32>, again: bool| {
                let at = match posted {
                    true if in_place && peer == self.rank => self.result(c, row, size),
                    true => self.bases.at(self.rank, self.map.results(c.call.slot, peer) + row * size, size),
                    false => self.bases.at(peer, self.map.combine(c.call.slot) + row * size, size),
                };
                rows.push(Pull(at, weight));
                if !again && !posted {
                    pulled.rows += 1;
                    pulled.bytes += size;
                    pulled.remote += if peer == self.rank { 0 } else { size };
                }
            };
            if c.everyone {
                self.members().for_each(|peer| pull(peer, base + token as u64, None, false));
            } else if c.grid.layout.by_expert() {
                let ids = &l.ids[token * topk..][..topk];
                for k in 0..topk {
                    let again = ids[..k].contains(&ids[k]);
                    match self.result_of_choice(c, (&l, Brought { firsts, in_place }, &lost), base, token, k)
                    {
                        Some((peer, row)) => pull(peer, row, weights.map(|w| w[token * topk + k]), again),
                        None if again || ids[k] < 0 => {}
                        None if lost.contains(self.experts.place(ids[k] as usize).0) => pulled.lost += 1,
                        None => pulled.missing += 1,
                    }
                }
            } else {
                for (peer, position) in l.targets(token) {
                    match self.result_row(&l, base, peer, position) {
                        Some(row) => pull(peer, row, None, false),
                        None => pulled.missing += 1,
                    }
                }
            }
            sum_token(c, token, rows);
            if let Some(out) = &c.out_weights {
                for k in 0..topk {
                    let found = self.result_of_choice(
                        c,
                        (&l, Brought { firsts, in_place: false }, &lost),
                        base,
                        token,
                        k,
                    );
                    let value = found.map_or(0.0, |(peer, row)| {
                        let column = if c.grid.layout.by_expert() { 0 } else { k as u64 * 4 };
                        let (window, offset) = match posted {
                            true => (self.rank, beside[peer as usize]),
                            false => (peer, self.map.combine_weights(c.call.slot)),
                        };
                        let at = self.bases.at(window, offset + row * c.weight_bytes() as u64 + column, 4);
                        pulled.bytes += if posted { 0 } else { 4 };
                        pulled.remote += if posted || peer == self.rank { 0 } else { 4 };
                        // SAFETY: `at` checked the bounds; any bits are a float32.
                        unsafe { (at as *const f32).read_unaligned() }
                    });
                    put_weight(out, token, k, value);
                }
            }
        }
        Self::add(&self.stats.rows_pulled, pulled.rows);
        Self::add(&self.stats.bytes_pulled, pulled.bytes);
        Self::add(&self.stats.bytes_remote, pulled.remote);
        drop(guard);
        self.combine_status(c.status, c.call.slot, pulled.missing, pulled.lost);
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
            let rows = [(); 2].map(|()| Pull(&tiny as *const f32 as *const u8, None));
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
