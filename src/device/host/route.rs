//! Routing maths: which ranks and experts a token goes to, and at which position among its source's rows there.
//!
//! Positions are handed out in token order, so a row's place depends on the routing alone.

use std::sync::atomic::Ordering::Relaxed;

use super::Host;
use crate::config::{Experts, MAX_TOPK};
use crate::device::grid::Grid;
use crate::device::map::{IDS, List, RoutingMap, WEIGHTS};
use crate::device::{Block, Dispatch, Rows};
use crate::error::Result;

/// A routing's private memory, list by list as `RoutingMap` describes them.
pub(super) struct Ledger<'a> {
    fanout: usize,
    pub ids: &'a mut [i32],
    pub weights: &'a mut [f32],
    pub given: &'a mut [f32],
    pub target_ranks: &'a mut [i32],
    pub target_rows: &'a mut [i32],
    pub rows_for: &'a mut [i32],
    pub expert_keys: &'a mut [i32],
    pub expert_rows: &'a mut [i32],
    pub bases: &'a mut [i32],
    pub ends: &'a mut [i32],
    pub starts: &'a mut [i32],
    pub counts: &'a mut [i32],
    pub rank_counts: &'a mut [i32],
    pub summary: &'a mut [i32],
}

/// Entries of `Ledger::summary`.
pub(super) const DEMAND: usize = 0;
pub(super) const DROPPED: usize = 1;
pub(super) const END: usize = 2;

impl<'a> Ledger<'a> {
    pub fn new(map: &RoutingMap, memory: &'a Block) -> Ledger<'a> {
        // SAFETY: the lists are disjoint parts of the block, zeroed when it was made; the comm's lock gives it to one
        // call at a time, and a call looks at it through one ledger at a time.
        let ints = |list: List| unsafe { std::slice::from_raw_parts_mut(memory.list(list), list.len) };
        // SAFETY: as above; any bits are a float32.
        let floats =
            |list: List| unsafe { std::slice::from_raw_parts_mut(memory.list(list) as *mut f32, list.len) };
        Ledger {
            fanout: map.fanout as usize,
            ids: ints(map.ids),
            weights: floats(map.weights),
            given: floats(map.given),
            target_ranks: ints(map.target_ranks),
            target_rows: ints(map.target_rows),
            rows_for: ints(map.rows_for),
            expert_keys: ints(map.expert_keys),
            expert_rows: ints(map.expert_rows),
            bases: ints(map.bases),
            ends: ints(map.ends),
            starts: ints(map.starts),
            counts: ints(map.counts),
            rank_counts: ints(map.rank_counts),
            summary: ints(map.summary),
        }
    }

    /// The ranks of a token, ascending, and the token's position among this rank's rows there.
    #[inline]
    pub fn targets(&self, token: usize) -> impl Iterator<Item = (u32, u32)> + '_ {
        let span = token * self.fanout..(token + 1) * self.fanout;
        let rows = if self.target_rows.is_empty() { None } else { Some(&self.target_rows[span.clone()]) };
        let ranks = self.target_ranks[span].iter().take_while(|rank| **rank >= 0).enumerate();
        ranks.map(move |(i, rank)| (*rank as u32, rows.map_or(token as u32, |rows| rows[i] as u32)))
    }

    /// Where row `position` of this rank's rows for a key lies; `None` if it is dropped.
    #[inline]
    pub fn place(&self, key: usize, position: u32) -> Option<u64> {
        let row = self.bases[key] as u64 + position as u64;
        (row < self.ends[key] as u64).then_some(row)
    }

    /// A choice that is an expert: its number in the order (owner, place), and the row's position.
    #[inline]
    pub fn choice(&self, choice: usize) -> Option<(usize, u32)> {
        let key = self.expert_keys[choice];
        (key >= 0).then_some((key as usize, self.expert_rows[choice] as u32))
    }
}

/// One token's ids, as int32; anything that is no expert is -1. Returns how many were neither.
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

/// The distinct owners of a token's experts, ascending.
fn owners<'a>(experts: &Experts, ids: &[i32], owners: &'a mut [u32; MAX_TOPK as usize]) -> &'a [u32] {
    let mut found = 0;
    for id in ids.iter().filter(|id| **id >= 0) {
        owners[found] = experts.place(*id as usize).0;
        found += 1;
    }
    owners[..found].sort_unstable();
    let mut distinct = 0;
    for i in 0..found {
        if i == 0 || owners[i] != owners[i - 1] {
            owners[distinct] = owners[i];
            distinct += 1;
        }
    }
    &owners[..distinct]
}

/// Routes tokens whose ids stand in the ledger. `rows_of`: scratch, rows of this rank by expert number; it ends as
/// the counts, where rows are (token, expert) pairs.
fn route(experts: &Experts, grid: &Grid, tokens: usize, l: &mut Ledger, rows_of: &mut [i32]) {
    l.rows_for.fill(0);
    rows_of.fill(0);
    let topk = grid.topk as usize;
    let mut scratch = [0; MAX_TOPK as usize];
    for token in 0..tokens {
        let ids = &l.ids[token * topk..][..topk];
        let span = token * l.fanout..(token + 1) * l.fanout;
        l.target_ranks[span.clone()].fill(-1);
        for (i, rank) in owners(experts, ids, &mut scratch).iter().enumerate() {
            l.target_ranks[span.start + i] = *rank as i32;
            let rows = &mut l.rows_for[*rank as usize];
            if !l.target_rows.is_empty() {
                l.target_rows[span.start + i] = *rows;
            }
            *rows += 1;
        }
        if !grid.layout.by_expert() {
            continue;
        }
        for (k, id) in ids.iter().enumerate() {
            let choice = token * topk + k;
            if *id < 0 {
                l.expert_keys[choice] = -1;
                continue;
            }
            let key = experts.slot(*id as usize);
            l.expert_keys[choice] = key as i32;
            l.expert_rows[choice] = match ids[..k].iter().position(|other| other == id) {
                // An expert named twice has one row.
                Some(first) => l.expert_rows[token * topk + first],
                None => {
                    let rows = &mut rows_of[key as usize];
                    *rows += 1;
                    *rows - 1
                }
            };
        }
    }
}

impl Host {
    pub(super) fn ledger<'a>(&self, memory: &'a Block) -> Ledger<'a> {
        Ledger::new(&self.routing, memory)
    }

    pub(super) fn route_tokens(&self, d: &Dispatch) -> Result<()> {
        let mut guard = self.slot(d.call.slot);
        let slot = &mut *guard;
        let mut l = self.ledger(d.memory);
        let (tokens, topk) = (d.send.tokens as usize, d.grid.topk as usize);
        slot.bad_ids = 0;
        if let Some(rows) = &d.send.planes[IDS] {
            for token in 0..tokens {
                let ids = &mut l.ids[token * topk..][..topk];
                slot.bad_ids += read_ids(rows, token, d.ids_are_64, self.experts.num(), ids);
                if self.membership.members.len() < self.ranks {
                    slot.bad_ids += self.forget_absent(ids);
                }
            }
        }
        keep_weights(&d.send.planes[WEIGHTS], tokens, topk, l.weights);
        route(&self.experts, &d.grid, tokens, &mut l, &mut slot.rows_of);
        self.stats.bad_ids.fetch_add(slot.bad_ids as u64, Relaxed);
        Ok(())
    }

    /// Ids that a rank owns which takes part no more count as -1. Returns how many there were.
    fn forget_absent(&self, ids: &mut [i32]) -> u32 {
        let members = &self.membership.members;
        let mut absent = 0;
        for id in ids.iter_mut().filter(|id| **id >= 0) {
            if !members.contains(self.experts.place(*id as usize).0) {
                *id = -1;
                absent += 1;
            }
        }
        absent
    }

    /// A replayed routing keeps its weights unless new ones come with the tokens.
    pub(super) fn renew_weights(&self, d: &Dispatch) -> Result<()> {
        self.slot(d.call.slot).bad_ids = 0;
        if d.send.planes[WEIGHTS].is_some() {
            let l = self.ledger(d.memory);
            let (tokens, topk) = (d.send.tokens as usize, d.grid.topk as usize);
            keep_weights(&d.send.planes[WEIGHTS], tokens, topk, l.weights);
        }
        if self.map.sizes.uses.posted {
            self.count_again(d);
        }
        Ok(())
    }
}

/// Copies [tokens, topk] weights; absent ones are ones.
pub(super) fn keep_weights(rows: &Option<Rows>, tokens: usize, topk: usize, to: &mut [f32]) {
    let Some(rows) = rows else {
        to[..tokens * topk].fill(1.0);
        return;
    };
    for (token, to) in to.chunks_exact_mut(topk.max(1)).take(tokens).enumerate() {
        // SAFETY: both sides hold topk float32.
        unsafe {
            std::ptr::copy_nonoverlapping(rows.row(token), to.as_mut_ptr() as *mut u8, topk * 4);
        }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::config::LayoutKind;
    use crate::device::map::{PLANES, Sizes, Uses};

    /// A routing's memory on its own.
    pub struct Memory {
        words: Vec<u64>,
        map: RoutingMap,
    }

    impl Memory {
        pub fn new(grid: Grid, experts: &Experts) -> Memory {
            let sizes = Sizes {
                grid,
                slots: 1,
                num_experts: experts.num(),
                experts: experts.most(),
                plane_bytes: [0; PLANES],
                quantises: false,
                columns: false,
                combine_bytes: 0,
                uses: Uses { counts: true, rows: true, ..Uses::default() },
                fifo_rows: 0,
                fifo_pieces: 0,
            };
            let map = RoutingMap::new(&sizes);
            Memory { words: vec![0; map.bytes().div_ceil(8) as usize], map }
        }
        pub fn ledger(&mut self) -> (Ledger<'static>, Box<Block>) {
            let bytes = self.words.len() * 8;
            let block = Box::new(Block { ptr: self.words.as_mut_ptr() as *mut u8, bytes, free: None });
            // SAFETY: the block is boxed, and the caller keeps both it and the memory.
            (Ledger::new(&self.map, unsafe { &*(&*block as *const Block) }), block)
        }
    }

    pub fn experts() -> impl Strategy<Value = (u32, Experts)> {
        (1u32..7).prop_flat_map(|ranks| {
            proptest::collection::vec(0..ranks, 1..20)
                .prop_map(move |owners| (ranks, Experts::from_owners(owners, ranks)))
        })
    }

    proptest! {
        /// Positions count a destination's rows in token order, each token once, each (token, expert) pair once.
        #[test]
        fn positions_are_token_order(
            ((ranks, experts), topk, choices) in (experts(), 1u32..9)
                .prop_flat_map(|(e, k)| {
                    let ids = proptest::collection::vec(-1i32..e.1.num() as i32, 0..40 * k as usize);
                    (Just(e), Just(k), ids)
                })
        ) {
            let tokens = choices.len() / topk as usize;
            let layout = LayoutKind::ExpertContiguous;
            let grid = Grid { layout, ranks, bound: 40, topk, alignment: 1, limit: 0 };
            let mut memory = Memory::new(grid, &experts);
            let (mut l, _block) = memory.ledger();
            let ids = &choices[..tokens * topk as usize];
            l.ids[..ids.len()].copy_from_slice(ids);
            let mut rows_of = vec![7; experts.num() as usize];
            route(&experts, &grid, tokens, &mut l, &mut rows_of);

            let mut by_rank = vec![0u32; ranks as usize];
            let mut by_key = vec![0u32; experts.num() as usize];
            for (token, ids) in ids.chunks(topk as usize).enumerate() {
                let mut owners: Vec<u32> =
                    ids.iter().filter(|id| **id >= 0).map(|id| experts.place(*id as usize).0).collect();
                owners.sort();
                owners.dedup();
                let want: Vec<(u32, u32)> = owners.iter().map(|r| (*r, by_rank[*r as usize])).collect();
                prop_assert_eq!(l.targets(token).collect::<Vec<_>>(), want);
                owners.iter().for_each(|r| by_rank[*r as usize] += 1);
                for (k, id) in ids.iter().enumerate() {
                    let choice = l.choice(token * topk as usize + k);
                    if *id < 0 {
                        prop_assert_eq!(choice, None);
                        continue;
                    }
                    let key = experts.slot(*id as usize) as usize;
                    let seen = ids[..k].contains(id);
                    by_key[key] += u32::from(!seen);
                    prop_assert_eq!(choice, Some((key, by_key[key] - 1)));
                }
            }
            let as_u32 = |list: &[i32]| list.iter().map(|n| *n as u32).collect::<Vec<_>>();
            prop_assert_eq!(as_u32(l.rows_for), by_rank);
            prop_assert_eq!(as_u32(&rows_of), by_key);
        }
    }
}
