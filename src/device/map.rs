//! The byte map of a window, and of a routing's private memory: what lies where, made from the configured maxima
//! alone, so that every rank computes the same offsets and no step moves them.
//!
//! ```text
//! window   gone words | slot 0 | slot 1 | ...
//! slot     mailboxes | loss masks | small outputs | published rows | received rows | combine rows
//! ```
//! A mailbox is what one source rank writes into another's window. Published rows exist for gathering backends
//! only. Row regions hold `ranks * max_tokens` rows of the largest size; a step packs its own rows from the start.

use crate::error::{Error, Result};

/// Regions start at multiples of this: a cache line pair, and what wide device loads want.
const ALIGN: u64 = 128;

/// The kinds of rows that travel together; each is a region of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(usize)]
pub enum Plane {
    Tokens = 0,
    Ids = 1,
    Weights = 2,
    Source = 3,
    Scales = 4,
    Extra0 = 5,
}
pub const PLANES: usize = 13;

/// The first epoch of every slot. So close to the end that every comm's epochs wrap within a few steps: the
/// wrap-safe comparison is exercised by all that runs, not by one test.
pub const FIRST_EPOCH: u32 = u32::MAX - 2;

/// Offsets inside a mailbox. Flags and words are u64 and written by the source alone.
pub mod mail {
    /// {epoch << 32 | rows}: the source's rows of the dispatch are in place.
    pub const DISPATCH_FLAG: u64 = 0;
    /// {epoch << 32}: the source's results are in its combine rows; it has finished reading the dispatch.
    pub const COMBINE_FLAG: u64 = 8;
    /// {epoch << 32}: the source has finished reading a dispatch that no combine follows.
    pub const READ_FLAG: u64 = 16;
    /// {bound << 32 | operation << 28 | low bits of the epoch}: what the source is at.
    pub const PROGRESS: u64 = 24;
    /// {generation << 48 | status << 32 | epoch}: the source gave up on the ranks of its loss mask.
    pub const LOSS: u64 = 32;
    /// u32: the rank that gave up first, as far as the source knows.
    pub const LOSS_ORIGIN: u64 = 48;
    /// u32[16]: the shape the source dispatches.
    pub const DISPATCH_SHAPE: u64 = 64;
    /// u32[16]: the shape the source combines.
    pub const COMBINE_SHAPE: u64 = 128;
    /// u32: the tokens the source dispatches in all.
    pub const TOKENS: u64 = 192;
    pub const BYTES: u64 = 256;
}

/// The maxima a map is made from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sizes {
    pub ranks: u32,
    pub slots: u32,
    pub max_tokens: u32,
    pub max_topk: u32,
    /// Row bytes of each plane; 0 = absent.
    pub plane_bytes: [u32; PLANES],
    pub combine_bytes: u64,
    /// The most experts a rank owns.
    pub experts: u32,
    /// True if dispatch gathers from published rows instead of pushing into received ones.
    pub gathers: bool,
}

/// Offsets relative to a slot, and the slot's place in the window.
#[derive(Clone, Debug)]
pub struct Map {
    pub sizes: Sizes,
    slots: u64,
    slot_bytes: u64,
    loss_masks: u64,
    expert_counts: u64,
    rank_counts: u64,
    status: u64,
    control_bytes: u64,
    published: [u64; PLANES],
    received: [u64; PLANES],
    combine: u64,
}

/// Hands out aligned regions one after another.
struct Cursor(Option<u64>);

impl Cursor {
    fn take(&mut self, bytes: Option<u64>) -> u64 {
        let at = self.0.unwrap_or(0);
        self.0 = (|| self.0?.checked_add(bytes?)?.checked_next_multiple_of(ALIGN))();
        at
    }
    fn end(&self) -> Result<u64> {
        self.0
            .filter(|end| *end <= i64::MAX as u64)
            .ok_or_else(|| Error::invalid("the configured maxima need more than 2^63 bytes"))
    }
}

impl Map {
    pub fn new(sizes: Sizes) -> Result<Map> {
        let ranks = sizes.ranks as u64;
        let rows = ranks * sizes.max_tokens as u64;
        let mut at = Cursor(Some(0));
        at.take(Some(ranks * mail::BYTES));
        let loss_masks = at.take(Some(ranks * mask_words(sizes.ranks) as u64 * 8));
        let expert_counts = at.take(Some(sizes.experts as u64 * 4));
        let rank_counts = at.take(Some(ranks * 4));
        let status = at.take(Some((4 + ranks) * 4));
        let control_bytes = at.end()?;
        let mut planes = |rows: u64| sizes.plane_bytes.map(|bytes| at.take(rows.checked_mul(bytes as u64)));
        let published = planes(if sizes.gathers { sizes.max_tokens as u64 } else { 0 });
        let received = planes(rows);
        let combine = at.take(rows.checked_mul(sizes.combine_bytes));
        let slot_bytes = at.end()?;

        let mut window = Cursor(Some(0));
        let slots = window.take(Some(ranks * 4)).max(
            // The words before the slots are at least a line, so that slots start at one.
            (ranks * 4).next_multiple_of(ALIGN),
        );
        window.take(slot_bytes.checked_mul(sizes.slots as u64));
        window.end()?;
        Ok(Map {
            sizes,
            slots,
            slot_bytes,
            loss_masks,
            expert_counts,
            rank_counts,
            status,
            control_bytes,
            published,
            received,
            combine,
        })
    }

    pub fn window_bytes(&self) -> u64 {
        self.slots + self.slot_bytes * self.sizes.slots as u64
    }
    /// One slot's rows.
    pub fn row_bytes(&self) -> u64 {
        self.slot_bytes - self.control_bytes
    }
    /// Flags, words and small outputs of the whole window.
    pub fn control_bytes(&self) -> u64 {
        self.slots + self.control_bytes * self.sizes.slots as u64
    }

    fn slot(&self, slot: u32) -> u64 {
        self.slots + slot as u64 * self.slot_bytes
    }
    /// u32, written by `source`: 1 it destroyed its comm, 2 it aborted.
    pub fn gone(&self, source: u32) -> u64 {
        source as u64 * 4
    }
    pub fn mailbox(&self, slot: u32, source: u32) -> u64 {
        self.slot(slot) + source as u64 * mail::BYTES
    }
    /// u64[mask_words]: the ranks that `source` gave up on.
    pub fn loss_mask(&self, slot: u32, source: u32) -> u64 {
        self.slot(slot) + self.loss_masks + source as u64 * mask_words(self.sizes.ranks) as u64 * 8
    }
    /// int32[local experts].
    pub fn expert_counts(&self, slot: u32) -> u64 {
        self.slot(slot) + self.expert_counts
    }
    /// int32[ranks].
    pub fn rank_counts(&self, slot: u32) -> u64 {
        self.slot(slot) + self.rank_counts
    }
    /// int32[4 + ranks].
    pub fn status(&self, slot: u32) -> u64 {
        self.slot(slot) + self.status
    }
    /// max_tokens rows.
    pub fn published(&self, slot: u32, plane: usize) -> u64 {
        self.slot(slot) + self.published[plane]
    }
    /// ranks * max_tokens rows.
    pub fn received(&self, slot: u32, plane: usize) -> u64 {
        self.slot(slot) + self.received[plane]
    }
    /// ranks * max_tokens rows.
    pub fn combine(&self, slot: u32) -> u64 {
        self.slot(slot) + self.combine
    }
}

/// Words of a rank mask.
pub fn mask_words(ranks: u32) -> usize {
    (ranks as usize).div_ceil(64)
}

/// The private memory of a routing: where this rank's tokens went and how many rows came from whom. All int32.
#[derive(Clone, Debug)]
pub struct RoutingMap {
    /// The most ranks that one token can go to.
    pub fanout: u32,
    target_rows: u64,
    rank_counts: u64,
    bytes: u64,
}

impl RoutingMap {
    pub fn new(sizes: &Sizes) -> RoutingMap {
        let fanout = sizes.max_topk.min(sizes.ranks);
        let entries = sizes.max_tokens as u64 * fanout as u64;
        let mut at = Cursor(Some(0));
        at.take(Some(entries * 4));
        // A gathered token lies at the same row on every rank: only the ranks are kept.
        let target_rows = at.take(Some(if sizes.gathers { 0 } else { entries * 4 }));
        let rank_counts = at.take(Some(sizes.ranks as u64 * 4));
        RoutingMap { fanout, target_rows, rank_counts, bytes: at.0.unwrap_or(0) }
    }
    pub fn bytes(&self) -> u64 {
        self.bytes
    }
    /// [max_tokens, fanout]: the ranks a token went to, ascending, then -1.
    pub fn target_ranks(&self) -> u64 {
        0
    }
    /// [max_tokens, fanout]: the token's position among this rank's rows there.
    pub fn target_rows(&self) -> u64 {
        self.target_rows
    }
    /// [ranks]: rows received from each rank.
    pub fn rank_counts(&self) -> u64 {
        self.rank_counts
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sizes() -> Sizes {
        let mut plane_bytes = [0; PLANES];
        plane_bytes[..5].copy_from_slice(&[14336, 32, 32, 8, 92]);
        Sizes {
            ranks: 5,
            slots: 3,
            max_tokens: 129,
            max_topk: 8,
            plane_bytes,
            combine_bytes: 14336,
            experts: 52,
            gathers: true,
        }
    }

    #[test]
    fn regions_neither_overlap_nor_leave_the_window() {
        let map = Map::new(sizes()).unwrap();
        let (ranks, rows) = (5u64, 5 * 129u64);
        let mut regions = vec![(0, ranks * 4)];
        for slot in 0..3 {
            for source in 0..5 {
                regions.push((map.mailbox(slot, source), mail::BYTES));
                regions.push((map.loss_mask(slot, source), 8));
            }
            regions.push((map.expert_counts(slot), 52 * 4));
            regions.push((map.rank_counts(slot), ranks * 4));
            regions.push((map.status(slot), (4 + ranks) * 4));
            for plane in 0..PLANES {
                let bytes = map.sizes.plane_bytes[plane] as u64;
                regions.push((map.published(slot, plane), 129 * bytes));
                regions.push((map.received(slot, plane), rows * bytes));
                assert_eq!(map.received(slot, plane) % ALIGN, 0);
            }
            regions.push((map.combine(slot), rows * 14336));
        }
        regions.retain(|(_, bytes)| *bytes > 0);
        regions.sort();
        for pair in regions.windows(2) {
            assert!(pair[0].0 + pair[0].1 <= pair[1].0, "{pair:?}");
        }
        let (start, bytes) = *regions.last().unwrap();
        assert!(start + bytes <= map.window_bytes());
    }

    #[test]
    fn sizes_past_the_address_space_are_refused() {
        let mut huge = sizes();
        huge.max_tokens = u32::MAX;
        huge.slots = u32::MAX;
        huge.plane_bytes[0] = u32::MAX;
        assert!(Map::new(huge).is_err());
    }
}
