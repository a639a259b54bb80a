//! Routing maths: which ranks a token goes to, and at which position among its source's rows there.
//!
//! Positions are handed out in token order, so a row's place depends on the routing alone.

use std::sync::atomic::Ordering::Relaxed;

use super::Host;
use crate::config::MAX_TOPK;
use crate::device::map::Plane;
use crate::device::{Block, Dispatch, Rows};
use crate::error::Result;

/// A routing's lists: for each token the target ranks, ascending, then -1, and the token's row on each.
pub(super) struct Targets<'a> {
    ranks: &'a mut [i32],
    /// Empty for gathering backends: a token lies at the same row everywhere.
    rows: &'a mut [i32],
    fanout: usize,
}

impl Targets<'_> {
    /// The (rank, row) pairs of a token.
    #[inline]
    pub(super) fn of(&self, token: usize) -> impl Iterator<Item = (u32, u32)> + '_ {
        let span = token * self.fanout..(token + 1) * self.fanout;
        let rows = if self.rows.is_empty() { &self.ranks[span.clone()] } else { &self.rows[span.clone()] };
        self.ranks[span]
            .iter()
            .zip(rows)
            .take_while(|(rank, _)| **rank >= 0)
            .map(|(rank, row)| (*rank as u32, *row as u32))
    }
}

/// One token's ids, as int32; anything that is no expert is -1.
pub(super) fn read_ids(rows: &Rows, token: usize, wide: bool, experts: u32, ids: &mut [i32]) -> u32 {
    let mut bad = 0;
    let row = rows.row(token);
    for (k, id) in ids.iter_mut().enumerate() {
        // SAFETY: the row holds ids.len() elements; numpy and C may align them to less than their size.
        let value = unsafe {
            if wide {
                (row as *const i64).add(k).read_unaligned()
            } else {
                (row as *const i32).add(k).read_unaligned() as i64
            }
        };
        *id = if (0..experts as i64).contains(&value) {
            value as i32
        } else {
            bad += u32::from(value != -1);
            -1
        };
    }
    bad
}

impl Host {
    pub(super) fn targets<'a>(&self, memory: &'a Block) -> Targets<'a> {
        let fanout = self.routing.fanout as usize;
        let entries = self.map.sizes.max_tokens as usize * fanout;
        let rows = if self.map.sizes.gathers { 0 } else { entries };
        // SAFETY: the two regions are disjoint parts of the block, which the comm's lock gives to one call at a time.
        unsafe {
            Targets {
                ranks: std::slice::from_raw_parts_mut(
                    memory.ints(self.routing.target_ranks(), entries),
                    entries,
                ),
                rows: std::slice::from_raw_parts_mut(memory.ints(self.routing.target_rows(), rows), rows),
                fanout,
            }
        }
    }

    /// Rows received from each rank.
    pub(super) fn rank_counts<'a>(&self, memory: &'a Block) -> &'a [i32] {
        let ranks = self.ranks as usize;
        // SAFETY: as `targets`; written by wait_dispatch, read afterwards.
        unsafe { std::slice::from_raw_parts(memory.ints(self.routing.rank_counts(), ranks), ranks) }
    }

    pub(super) fn route_tokens(&self, d: &Dispatch) -> Result<()> {
        let mut slot = self.slot(d.call.slot);
        slot.bad_ids = 0;
        slot.rows_for.clear();
        slot.rows_for.resize(self.ranks as usize, 0);
        let Some(source) = &d.send[Plane::Ids as usize] else { return Ok(()) };
        let topk = d.shape.topk as usize;
        let targets = self.targets(d.memory);
        let mut ids = [0; MAX_TOPK as usize];
        let mut owners = [0; MAX_TOPK as usize];
        for token in 0..d.tokens as usize {
            slot.bad_ids += read_ids(source, token, d.ids_are_64, self.experts.num(), &mut ids[..topk]);
            let mut found = 0;
            for id in ids[..topk].iter().filter(|id| **id >= 0) {
                owners[found] = self.experts.place(*id as usize).0;
                found += 1;
            }
            let owners = &mut owners[..found];
            owners.sort_unstable();
            let span = token * targets.fanout;
            let mut n = 0;
            for (i, rank) in owners.iter().enumerate() {
                if i > 0 && owners[i - 1] == *rank {
                    continue;
                }
                targets.ranks[span + n] = *rank as i32;
                if !targets.rows.is_empty() {
                    targets.rows[span + n] = slot.rows_for[*rank as usize] as i32;
                }
                slot.rows_for[*rank as usize] += 1;
                n += 1;
            }
            targets.ranks[span + n..span + targets.fanout].fill(-1);
        }
        self.stats.bad_ids.fetch_add(slot.bad_ids as u64, Relaxed);
        Ok(())
    }
}
