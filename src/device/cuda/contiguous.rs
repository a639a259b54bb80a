//! Dispatch of (token, expert) pairs in one list, expert after expert: where it differs from other packed rows (flat.rs).

use super::dispatch::topk_bits;
use super::driver::Launch;
use super::params::{Blocks, PlaceExpertsParams, PlaceParams, SpreadParams};
use super::{Cuda, within};
use crate::config::LayoutKind;
use crate::device::map::PLACE_PARTS;
use crate::device::{Dispatch, Region};
use crate::error::Result;

/// Threads of a block, as the kernels have it.
const PLACE_THREADS: u32 = if cfg!(feature = "jitter") { 64 } else { 512 };
const SPREAD_THREADS: u32 = if cfg!(feature = "jitter") { 64 } else { 384 };
/// Vectors of a token that a warp spreads at least, as the kernel has it.
const SPREAD_VECTORS: u32 = 128;
/// Tokens of a block, if several place.
const PART_TOKENS: u32 = if cfg!(feature = "jitter") { 2 } else { 128 };

/// Shared memory that a block counts in.
pub(super) const COUNTING_SHARED: u32 = 200 << 10;
/// Experts, and as many ranks, that one warp has room to count.
pub const MOST_KEYS: u32 = COUNTING_SHARED / 8 - 1;

/// Warps that count, each for itself, and the shared memory for so many keys.
fn counting(keys: u32, threads: u32) -> (u32, u32) {
    let words = COUNTING_SHARED / 4 - 1;
    let warps = (words / keys.max(1)).saturating_sub(1).clamp(1, threads / 32);
    (warps, ((warps + 1) * keys + 1) * 4)
}

impl Cuda {
    pub(super) fn is_contiguous(&self) -> bool {
        self.map.sizes.grid.layout == LayoutKind::ExpertContiguous
    }

    pub(super) fn blocks(&self, d: &Dispatch) -> Blocks {
        Blocks {
            firsts: self.private.address() + self.layout.firsts,
            tokens: self.ranks as u64 * d.grid.bound as u64,
            topk: d.grid.topk,
            alignment: d.grid.alignment,
            limit: d.grid.limit as u32,
            reserved: 0,
        }
    }

    pub(super) fn launch_place_experts(&self, d: &Dispatch, place: PlaceParams, opens: bool) -> Result<()> {
        let list = |list| self.list(d.memory, list);
        let keys = self.experts.num() + self.ranks;
        let (warps, shared) = counting(keys, PLACE_THREADS);
        // One block has placed few tokens before two kernels more have started.
        let parts = match d.send.tokens / PART_TOKENS {
            ..3 => 1,
            parts => within(&d.call, parts.min(PLACE_PARTS)),
        };
        let params = PlaceExpertsParams {
            place,
            blocks: self.blocks(d),
            ends: list(self.routing.ends),
            starts: list(self.routing.starts),
            pairs_for: list(self.routing.pairs_for),
            bank_rows: list(self.routing.expert_keys),
            parts: list(self.routing.parts),
            num_parts: if parts > 1 { parts } else { 0 },
            topk_bits: topk_bits(d),
            warps,
            reserved: 0,
        };
        let kernels = &self.station.kernels;
        let alone = Launch { grid: 1, block: PLACE_THREADS, shared, ..Launch::default() };
        // SAFETY: the caller's ids, the routing's memory, the group's windows.
        let launch = |kernel, shape| unsafe { self.launch(kernel, shape, &d.call, &params) };
        if parts == 1 {
            return launch(&kernels.place_experts, Launch { after_previous: opens, ..alone });
        }
        launch(&kernels.count_part, Launch { grid: parts, shared: keys * 4, ..alone })?;
        launch(&kernels.place_experts, Launch { after_previous: true, ..alone })?;
        launch(&kernels.place_part, Launch { grid: parts, after_previous: true, ..alone })
    }

    /// Tokens to all their rows, padding and the small outputs.
    pub(super) fn launch_spread(&self, d: &Dispatch) -> Result<()> {
        let slot = d.call.slot;
        let list = |list| self.list(d.memory, list);
        let local = self.experts.count(self.rank);
        let (warps, shared) = counting(local, SPREAD_THREADS);
        let params = SpreadParams {
            settle: self.settle_params(d),
            owners: self.owners,
            bank_places: self.map.bank_places(slot),
            starts: list(self.routing.starts),
            block_counts: list(self.routing.counts),
            summary: list(self.routing.summary),
            expert_counts: self.small(d.expert_counts, slot, Region::ExpertCounts),
            expert_offsets: self.small(d.expert_offsets, slot, Region::ExpertOffsets),
            expert_stats: d.expert_stats.map_or(0, |rows| rows.ptr as u64),
            local,
            topk_bits: topk_bits(d),
            warps,
            reserved: 0,
        };
        // It waits for nobody, and reads and writes this GPU's memory alone: blocks for all that there may be to do.
        let rows = self.ranks as u64 * d.grid.bound as u64;
        let jobs = rows * params.settle.vectors.div_ceil(SPREAD_VECTORS).max(1) as u64;
        let blocks = jobs.div_ceil(SPREAD_THREADS as u64 / 32).clamp(1, 2 * self.station.sms() as u64) as u32;
        let grid = within(&d.call, blocks);
        let shape = Launch { grid, block: SPREAD_THREADS, shared, ..Launch::default() };
        // SAFETY: this rank's own window, the routing's memory and the caller's outputs, which comm checked.
        unsafe { self.launch(&self.station.kernels.spread, shape, &d.call, &params) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn there_is_room_to_count_for_one_warp_at_least() {
        for keys in [0, 1, 264, 2056, 20_000, MOST_KEYS] {
            let (warps, shared) = counting(keys, 512);
            assert!((1..=16).contains(&warps) && shared <= COUNTING_SHARED, "{keys}: {warps}, {shared}");
        }
        assert_eq!(counting(264, 512).0, 16);
        assert_eq!(counting(MOST_KEYS, 512).0, 1);
    }
}
