//! From everybody's counts to the places of rows: where this rank's rows go, where the received ones lie.
//!
//! Every rank works from the same counts, so all agree without another word, also on whose rows are too many.

use super::Host;
use super::route::{DEMAND, DROPPED, END, Ledger};
use crate::config::{Experts, LayoutKind, OverflowKind};
use crate::device::Dispatch;
use crate::device::grid::Grid;
use crate::device::loss::too_many_rows;
use crate::error::Result;

/// Fills the ledger's places. `count(source, key)`: rows. `demands`: out, [R] the limit that each rank would need.
pub(super) fn place(
    experts: &Experts,
    grid: &Grid,
    me: u32,
    count: impl Fn(u32, usize) -> u64,
    l: &mut Ledger,
    demands: &mut [u64],
) {
    // Past the largest row index everything is dropped anyway.
    let word = |row: u64| row.min(i32::MAX as u64) as i32;
    let by_expert = grid.layout.by_expert();
    l.rank_counts.fill(0);
    l.summary.fill(0);
    for rank in 0..grid.ranks {
        let local = experts.count(rank);
        let capacity = grid.capacity(local);
        let first = if by_expert { experts.start(rank) } else { rank } as usize;
        let mine = rank == me;
        let (mut offset, mut largest, mut dropped) = (0u64, 0u64, 0u64);
        for place in 0..if by_expert { local } else { 1 } {
            let key = first + place as usize;
            let end = grid.end(place, capacity);
            let start = match grid.layout {
                LayoutKind::ExpertPadded => place as u64 * grid.block().unwrap_or(0),
                _ => offset,
            };
            let mut next = start;
            for source in 0..grid.ranks {
                if source == me {
                    l.bases[key] = word(next);
                    l.ends[key] = word(end);
                }
                let rows = count(source, key);
                if mine {
                    let kept = (next + rows).min(end) - next.min(end);
                    l.rank_counts[source as usize] += kept as i32;
                    dropped += rows - kept;
                }
                next += rows;
            }
            if mine {
                l.starts[place as usize] = word(start.min(end));
                l.counts[place as usize] = word(next.min(end) - start.min(end));
            }
            largest = largest.max(next - start);
            offset = match grid.layout {
                LayoutKind::ExpertContiguous => next.next_multiple_of(grid.alignment as u64),
                _ => next,
            };
        }
        demands[rank as usize] = if grid.layout == LayoutKind::ExpertPadded { largest } else { offset };
        if mine {
            l.summary[DEMAND] = word(demands[rank as usize]);
            l.summary[DROPPED] = word(dropped);
            l.summary[END] = word(match grid.layout {
                LayoutKind::ExpertPadded => capacity,
                _ => offset.min(capacity),
            });
        }
    }
}

impl Host {
    /// Places rows by the counts in this rank's window, which must all have come.
    pub(super) fn place_by_counts(&self, slot: u32, grid: &Grid, l: &mut Ledger, demands: &mut [u64]) {
        let count = |source: u32, key: usize| {
            if !self.present().contains(source) {
                return 0;
            }
            let offset = self.map.counts(slot, source) + key as u64 * 4;
            // What a peer wrote is bounded before it becomes a place.
            let rows = self.bases.half(self.rank, offset).load(std::sync::atomic::Ordering::Relaxed);
            rows.min(grid.bound) as u64
        };
        place(&self.experts, grid, self.rank, count, l, demands);
    }

    pub(super) fn place(&self, d: &Dispatch) -> Result<()> {
        let mut guard = self.slot(d.call.slot);
        let slot = &mut *guard;
        let mut l = self.ledger(d.memory);
        slot.placed = self.present();
        self.keep_told(d.call.slot, d.grid.bound, &mut slot.told);
        self.place_by_counts(d.call.slot, &d.grid, &mut l, &mut slot.demands);
        let limit = d.grid.limit;
        let over = |demand: &u64| limit > 0 && *demand > limit;
        if d.overflow == OverflowKind::Drop || !slot.demands.iter().any(over) {
            return Ok(());
        }
        let mine = l.summary[DEMAND];
        let marked = slot.demands.iter().map(over);
        self.overflow_status(d.status, d.call.slot, mine, marked);
        let (rank, demand) =
            slot.demands.iter().enumerate().find(|(_, demand)| over(demand)).unwrap_or((0, &0));
        let error = too_many_rows(self.rank, d, rank as u32, *demand);
        slot.overflowed();
        Err(error)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::route::tests::{Memory, experts};
    use super::*;

    proptest! {
        /// Over all sources and keys, kept rows fill each block from its start, without a gap, in source order; the
        /// receiver's counts, drops and demand are those that the sources' places imply.
        #[test]
        fn places_tile_the_blocks(
            (ranks, experts) in experts(),
            layout in prop::sample::select(&[
                LayoutKind::Flat, LayoutKind::ExpertPadded, LayoutKind::ExpertContiguous,
            ][..]),
            align in prop::sample::select(&[1u32, 4, 16][..]),
            limit in prop::sample::select(&[0u64, 1, 5, 17, 1000][..]),
            seed in proptest::collection::vec(0u64..9, 140),
        ) {
            let alignment = if layout == LayoutKind::ExpertContiguous { align } else { 1 };
            let grid = Grid { layout, ranks, bound: 8, topk: 20, alignment, limit };
            let keys = grid.keys(experts.num()) as usize;
            let count = |source: u32, key: usize| seed[(source as usize * 31 + key * 7) % seed.len()];
            // (base, end) by source and key, as each source works them out.
            let mut places = Vec::new();
            let mut received = Vec::new();
            for me in 0..ranks {
                let mut memory = Memory::new(grid, &experts);
                let (mut l, _block) = memory.ledger();
                let mut demands = vec![0; ranks as usize];
                place(&experts, &grid, me, count, &mut l, &mut demands);
                places.push((0..keys).map(|key| (l.bases[key] as u64, l.ends[key] as u64)).collect::<Vec<_>>());
                received.push((l.starts.to_vec(), l.counts.to_vec(), l.rank_counts.to_vec(), l.summary.to_vec(), demands));
            }
            for rank in 0..ranks {
                let (starts, counts, rank_counts, summary, demands) = &received[rank as usize];
                prop_assert_eq!(demands, &received[0].4);
                let local = experts.count(rank);
                let capacity = grid.capacity(local);
                let own: Vec<usize> = if layout.by_expert() {
                    (0..local as usize).map(|i| experts.start(rank) as usize + i).collect()
                } else {
                    vec![rank as usize]
                };
                let mut kept_from = vec![0; ranks as usize];
                let (mut dropped, mut last_end) = (0, 0);
                for (block, key) in own.iter().enumerate() {
                    let mut rows = Vec::new();
                    for source in 0..ranks {
                        let (base, end) = places[source as usize][*key];
                        for position in 0..count(source, *key) {
                            if base + position < end {
                                rows.push(base + position);
                                kept_from[source as usize] += 1;
                            } else {
                                dropped += 1;
                            }
                        }
                    }
                    let start = starts[block] as u64;
                    let want: Vec<u64> = (start..start + counts[block] as u64).collect();
                    prop_assert_eq!(&rows, &want);
                    prop_assert!(want.last().is_none_or(|last| *last < capacity));
                    prop_assert!(start >= last_end);
                    prop_assert!(start.is_multiple_of(alignment as u64) || start == capacity);
                    last_end = start + counts[block] as u64;
                }
                prop_assert_eq!(rank_counts, &kept_from);
                prop_assert_eq!(summary[DROPPED], dropped);
                // What is demanded suffices. Less does not, unless it is alignment alone that is cut.
                let exceeded = limit > 0 && demands[rank as usize] > limit;
                prop_assert!(exceeded || dropped == 0);
                let aligned = layout == LayoutKind::ExpertContiguous && alignment > 1;
                prop_assert!(!exceeded || aligned || dropped > 0);
            }
        }
    }
}
