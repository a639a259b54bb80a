//! The byte map of a window, and of a routing's private memory: what lies where, made from the configured maxima
//! alone, so that every rank computes the same offsets and no step moves them.
//!
//! ```text
//! window   gone words | slot 0 | slot 1 | ...
//! slot     mailboxes | loss masks | counts | small outputs | words of FIFOs' entries
//!          | published rows | banks, places beside them | received rows | combine rows, combine weights
//!          | brought results, weights | boxes | FIFOs
//! inbox    slot 0 | slot 1 | ...      where couriers bring what others send: one for each source, each memory of its own
//! slot     counts, rows | results, result weights
//! ```
//! A mailbox (`mail`) is what one source rank writes into another's window. Which regions of rows exist is the strategy's to
//! say (`Uses`). A step packs its own rows from a region's start.

use super::grid::Grid;
use super::{Region, mail};
use crate::config::LayoutKind;
use crate::error::{Error, Result};

/// Regions start at multiples of this: a cache line pair, and what wide device loads want.
const ALIGN: u64 = 128;
/// Regions of at least `WIDE` bytes start at a page: measured, 3 % of a dispatch of 4096 tokens on an H100.
const WIDE: u64 = 64 << 10;
const WIDE_ALIGN: u64 = 4096;

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
/// Planes of a source's rows start at multiples of this in an inbox.
pub const INBOX_ALIGN: u64 = 16;
pub const TOKENS: usize = Plane::Tokens as usize;
pub const IDS: usize = Plane::Ids as usize;
pub const WEIGHTS: usize = Plane::Weights as usize;
pub const SOURCE: usize = Plane::Source as usize;
pub const SCALES: usize = Plane::Scales as usize;

/// The first epoch of every slot. So close to the end that every comm's epochs wrap within a few steps: the
/// wrap-safe comparison is exercised by all that runs, not by one test.
pub const FIRST_EPOCH: u32 = u32::MAX - 2;

/// The regions of a slot that a strategy needs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Uses {
    /// Rows that every rank reads.
    pub published: bool,
    /// Every rank's counts.
    pub counts: bool,
    /// A bank for each source, where rows wait until their places are known.
    pub banks: bool,
    /// Received rows, and combine rows.
    pub rows: bool,
    /// A FIFO for each source.
    pub fifos: bool,
    /// Collectives bring what others have: results of every rank for this rank's tokens, published scales that are to lie
    /// by column. Nobody else reads or writes the window.
    pub carried: bool,
    /// Couriers bring what others send: counts, rows and results, into an inbox for each source, in the place of banks and of
    /// counts in the window. Nobody else reads or writes the window.
    pub posted: bool,
    /// On CUDA: what they bring is fetched into banks and counts in the window after all, and results into brought ones.
    pub fetched: bool,
}

/// The maxima a map is made from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sizes {
    /// Of the largest step.
    pub grid: Grid,
    pub slots: u32,
    pub num_experts: u32,
    /// The most experts a rank owns.
    pub experts: u32,
    /// Row bytes of each plane as a token's row travels; 0 = absent.
    pub plane_bytes: [u32; PLANES],
    /// Tokens are quantised on their way.
    pub quantises: bool,
    /// Scales lie by column.
    pub columns: bool,
    pub combine_bytes: u64,
    pub uses: Uses,
    /// Rows of each FIFO.
    pub fifo_rows: u32,
    /// On CUDA: pieces of a row in a FIFO, at most, each of which is told of by itself.
    pub fifo_pieces: u32,
}

/// What ids and weights of a step may be, of all ranks together, for collectives to carry them in boxes, behind the words.
pub const BOXED_BYTES: u64 = 32 << 10;

/// On CUDA: blocks at most that count and place the tokens of a list of (token, expert) pairs, a part each.
pub const PLACE_PARTS: u32 = 32;

/// Rows of a column of scales are padded to a multiple of this.
pub const COLUMN_PAD: u64 = 4;

/// The room of a part of a FIFO's entry.
pub fn entry_part(bytes: u64) -> u64 {
    bytes.next_multiple_of(16)
}

/// Row bytes of a received plane, if a token's row travels with `bytes`: where a row is a (token, expert) pair it has
/// one weight, and one id if rows of several experts stand in one list.
pub fn received_bytes(layout: LayoutKind, plane: usize, bytes: u32) -> u32 {
    match (plane, layout) {
        (IDS, LayoutKind::ExpertPadded) => 0,
        (IDS, LayoutKind::ExpertContiguous) => 4,
        (WEIGHTS, layout) if layout.by_expert() => 4,
        // A gathering receiver knows where a row comes from without being sent it.
        (SOURCE, _) => 8,
        _ => bytes,
    }
}

impl Sizes {
    pub fn ranks(&self) -> u32 {
        self.grid.ranks
    }
    /// Received rows at most, on the rank with the most experts.
    pub fn rows(&self) -> u64 {
        self.grid.capacity(self.experts)
    }
    fn received_region(&self, plane: usize) -> Option<u64> {
        let bytes = received_bytes(self.grid.layout, plane, self.plane_bytes[plane]) as u64;
        if plane == SCALES && self.columns {
            let (blocks, rows) = match self.grid.block() {
                Some(block) => (self.grid.blocks(self.experts) as u64, block),
                None => (1, self.rows()),
            };
            return blocks.checked_mul(rows.next_multiple_of(COLUMN_PAD))?.checked_mul(bytes);
        }
        self.rows().checked_mul(bytes)
    }
    /// Row bytes of the values that combine carries back beside a result.
    pub fn combine_weight_bytes(&self) -> u64 {
        if self.grid.layout.by_expert() { 4 } else { self.grid.topk as u64 * 4 }
    }
    /// Results of a rank's tokens that one other has at most: a token has one for each of its experts there.
    pub fn most_results(&self) -> u64 {
        self.grid.bound as u64 * self.experts.min(self.grid.topk) as u64
    }
    /// Bytes of a quantised token with its scales.
    pub fn scratch_bytes(&self) -> u64 {
        if self.quantises { (self.plane_bytes[TOKENS] + self.plane_bytes[SCALES]) as u64 } else { 0 }
    }
    fn fifo_word_bytes(&self) -> u64 {
        let words = 2 * self.fifo_pieces as u64;
        self.ranks() as u64 * self.fifo_rows as u64 * words * 8
    }
    /// Bytes of a FIFO's entry: a row of every plane, or a result with its weights.
    pub fn entry_bytes(&self) -> u64 {
        let dispatch: u64 = self.plane_bytes.iter().map(|bytes| entry_part(*bytes as u64)).sum();
        let combine = entry_part(self.combine_bytes) + entry_part(self.combine_weight_bytes());
        dispatch.max(combine).next_multiple_of(ALIGN)
    }
}

/// Offsets relative to a slot, and the slot's place in the window.
#[derive(Clone, Debug)]
pub struct Map {
    pub sizes: Sizes,
    slots: u64,
    slot_bytes: u64,
    loss_masks: u64,
    counts: u64,
    keys: u64,
    expert_counts: u64,
    expert_offsets: u64,
    rank_counts: u64,
    status: u64,
    fifo_words: u64,
    control_bytes: u64,
    published: [u64; PLANES],
    banks: [u64; PLANES],
    bank_places: u64,
    received: [u64; PLANES],
    combine: u64,
    combine_weights: u64,
    brought: u64,
    brought_weights: u64,
    brought_scales: u64,
    boxes: u64,
    fifos: u64,
    entry_bytes: u64,
    inboxes: Inboxes,
}

/// Where inboxes lie behind the window, and in each of them, of a slot, what lies where. All zero where there are none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Inboxes {
    start: u64,
    bytes: u64,
    slot_bytes: u64,
    rows: u64,
    results: u64,
}

/// Hands out aligned regions one after another.
struct Cursor(Option<u64>);

impl Cursor {
    fn take(&mut self, bytes: Option<u64>) -> u64 {
        let align = if bytes.is_some_and(|bytes| bytes >= WIDE) { WIDE_ALIGN } else { ALIGN };
        self.0 = self.0.and_then(|at| at.checked_next_multiple_of(align));
        let at = self.0.unwrap_or(0);
        self.0 = (|| self.0?.checked_add(bytes?)?.checked_next_multiple_of(align))();
        at
    }
    fn end(&self) -> Result<u64> {
        self.0
            .filter(|end| *end <= i64::MAX as u64)
            .ok_or_else(|| Error::invalid("the configured maxima need more than 2^63 bytes"))
    }
}

impl Inboxes {
    fn new(sizes: &Sizes, keys: u64) -> Result<Inboxes> {
        let grid = &sizes.grid;
        let bound = grid.bound as u64;
        let results = sizes.most_results();
        let mut at = Cursor(Some(0));
        at.take(Some(if sizes.uses.fetched { count_bytes(keys) } else { keys * 4 }));
        let planes = sizes.plane_bytes.map(|bytes| bound * (bytes as u64).next_multiple_of(INBOX_ALIGN));
        let rows = at.take(Some(planes.iter().sum()));
        let weights = (results * sizes.combine_weight_bytes()).checked_add(INBOX_ALIGN);
        let all = (|| results.checked_mul(sizes.combine_bytes)?.checked_add(weights?))();
        let results = at.take(all);
        let slot_bytes = at.end()?;
        let bytes = slot_bytes.checked_mul(sizes.slots as u64);
        let bytes = bytes.and_then(|bytes| bytes.checked_next_multiple_of(WIDE_ALIGN));
        let bytes = bytes.ok_or_else(|| Error::invalid("the configured maxima need more than 2^64 bytes"))?;
        Ok(Inboxes { start: 0, bytes, slot_bytes, rows, results })
    }
}

impl Map {
    pub fn new(sizes: Sizes) -> Result<Map> {
        let (ranks, uses) = (sizes.ranks() as u64, sizes.uses);
        let keys = sizes.grid.keys(sizes.num_experts) as u64;
        let mut at = Cursor(Some(0));
        at.take(Some(ranks * mail::BYTES));
        let loss_masks = at.take(Some(ranks * mask_words(sizes.ranks()) as u64 * 8));
        let in_window = uses.counts && (!uses.posted || uses.fetched);
        let counts = at.take(Some(if in_window { ranks * count_bytes(keys) } else { 0 }));
        let expert_counts = at.take(Some(sizes.experts as u64 * 4));
        let expert_offsets = at.take(Some((sizes.experts as u64 + 1) * 4));
        let rank_counts = at.take(Some(ranks * 4));
        let status = at.take(Some((4 + ranks) * 4));
        let fifo_words = at.take(if uses.fifos { Some(sizes.fifo_word_bytes()) } else { Some(0) });
        let control_bytes = at.end()?;

        let bound = sizes.grid.bound as u64;
        let mut planes = |rows: u64| sizes.plane_bytes.map(|bytes| at.take(rows.checked_mul(bytes as u64)));
        let published = planes(if uses.published { bound } else { 0 });
        let banks = planes(if uses.banks { ranks * bound } else { 0 });
        let placed = uses.banks && sizes.grid.layout == LayoutKind::ExpertContiguous;
        let bank_places = at.take(Some(if placed { ranks * bound * sizes.grid.topk as u64 * 4 } else { 0 }));
        let rows = if uses.rows { sizes.rows() } else { 0 };
        let received = std::array::from_fn(|plane| {
            at.take(if uses.rows { sizes.received_region(plane) } else { Some(0) })
        });
        let combine = at.take(rows.checked_mul(sizes.combine_bytes));
        let combine_weights = at.take(rows.checked_mul(sizes.combine_weight_bytes()));
        let brought_rows = match (uses.carried, uses.fetched) {
            (true, _) => ranks * bound,
            (_, true) => bound * sizes.grid.topk as u64,
            _ => 0,
        };
        let brought = |bytes: u64| brought_rows.checked_mul(bytes);
        let results = at.take(brought(sizes.combine_bytes));
        let weights = at.take(brought(sizes.combine_weight_bytes()));
        let scales = if uses.carried && sizes.columns { sizes.plane_bytes[SCALES] as u64 } else { 0 };
        let scales = at.take(brought(scales));
        let boxes = at.take(Some(if uses.carried { ranks * mail::BYTES + BOXED_BYTES } else { 0 }));
        let entry_bytes = sizes.entry_bytes();
        let entries = if uses.fifos { ranks * sizes.fifo_rows as u64 } else { 0 };
        let fifos = at.take(entries.checked_mul(entry_bytes));
        let slot_bytes = at.end()?;
        let slot_bytes = slot_bytes.next_multiple_of(if slot_bytes >= WIDE { WIDE_ALIGN } else { ALIGN });

        let mut window = Cursor(Some(0));
        window.take(Some(ranks * 4));
        let slots = window.take(slot_bytes.checked_mul(sizes.slots as u64));
        let mut inboxes = Inboxes::default();
        if uses.posted {
            inboxes = Inboxes::new(&sizes, keys)?;
            window.0 = window.0.and_then(|at| at.checked_next_multiple_of(WIDE_ALIGN));
            inboxes.start = window.take(inboxes.bytes.checked_mul(ranks));
        }
        window.end()?;
        Ok(Map {
            sizes,
            slots,
            slot_bytes,
            loss_masks,
            counts,
            keys,
            expert_counts,
            expert_offsets,
            rank_counts,
            status,
            fifo_words,
            control_bytes,
            published,
            banks,
            bank_places,
            received,
            combine,
            combine_weights,
            brought: results,
            brought_weights: weights,
            brought_scales: scales,
            boxes,
            fifos,
            entry_bytes,
            inboxes,
        })
    }

    /// Without inboxes.
    pub fn window_bytes(&self) -> u64 {
        self.slots + self.slot_bytes * self.sizes.slots as u64
    }
    /// Where inboxes begin behind the window, as offsets have it, and the bytes of each.
    pub fn inboxes(&self) -> (u64, u64) {
        (self.inboxes.start, self.inboxes.bytes)
    }
    /// What a slot has of a source's inbox.
    fn inbox(&self, slot: u32, source: u32) -> u64 {
        let Inboxes { start, bytes, slot_bytes, .. } = self.inboxes;
        start + source as u64 * bytes + slot as u64 * slot_bytes
    }
    /// Where a source's results lie in its inbox, one behind the other by expert and position, and then their weights.
    pub fn results(&self, slot: u32, source: u32) -> u64 {
        self.inbox(slot, source) + self.inboxes.results
    }
    /// Where the weights beside so many bytes of results begin.
    pub fn result_weights(&self, slot: u32, source: u32, bytes: u64) -> u64 {
        self.results(slot, source) + bytes.next_multiple_of(INBOX_ALIGN)
    }
    /// Where a source's rows wait for their places, plane by plane. `rows`: those that it sends in this step; `bound`: the step's.
    pub fn banked(
        &self,
        (slot, source): (u32, u32),
        (rows, bound): (u32, u32),
        plane_bytes: &[u32; PLANES],
    ) -> [u64; PLANES] {
        if !self.sizes.uses.posted {
            let before = source as u64 * bound as u64;
            return std::array::from_fn(|plane| self.bank(slot, plane) + before * plane_bytes[plane] as u64);
        }
        let mut next = self.inbox(slot, source) + self.inboxes.rows;
        plane_bytes.map(|bytes| {
            let at = next;
            next += (rows as u64 * bytes as u64).next_multiple_of(INBOX_ALIGN);
            at
        })
    }
    /// What a source sends in a dispatch: where its counts begin, and the bytes of counts and rows.
    pub fn dispatched(&self, slot: u32, source: u32, rows: u32, plane_bytes: &[u32; PLANES]) -> (u64, u64) {
        let bytes = |plane: &u32| (rows as u64 * *plane as u64).next_multiple_of(INBOX_ALIGN);
        let rows: u64 = plane_bytes.iter().map(bytes).sum();
        (self.inbox(slot, source), self.inboxes.rows + rows)
    }
    /// What a slot keeps outside the window that grows with the config: a row being quantised, counts by expert.
    pub fn private_bytes(&self) -> u64 {
        let sizes = &self.sizes;
        let by_expert = sizes.num_experts as u64 * 4 + sizes.experts as u64 * 8;
        let counts = if sizes.grid.layout.by_expert() { by_expert } else { 0 };
        (sizes.scratch_bytes() + counts) * sizes.slots as u64
    }
    /// One slot's rows.
    pub fn row_bytes(&self) -> u64 {
        self.slot_bytes - self.control_bytes
    }
    /// Flags, words, counts and small outputs of the whole window.
    pub fn control_bytes(&self) -> u64 {
        self.slots + self.control_bytes * self.sizes.slots as u64
    }

    /// Where those stand: offsets and bytes.
    pub fn control_regions(&self) -> impl Iterator<Item = (u64, u64)> {
        let slots = (0..self.sizes.slots).map(|slot| (self.slot(slot), self.control_bytes));
        std::iter::once((0, self.slots)).chain(slots)
    }

    /// Where what a view can show starts.
    pub fn region(&self, slot: u32, region: Region) -> u64 {
        match region {
            Region::Plane(plane) => self.received(slot, plane),
            Region::ExpertCounts => self.expert_counts(slot),
            Region::ExpertOffsets => self.expert_offsets(slot),
            Region::RankCounts => self.rank_counts(slot),
            Region::Status => self.status(slot),
            Region::Combine => self.combine(slot),
        }
    }
    /// Of one slot.
    pub fn control_bytes_of_slot(&self) -> u64 {
        self.control_bytes
    }

    fn slot(&self, slot: u32) -> u64 {
        self.slots + slot as u64 * self.slot_bytes
    }
    /// u32, written by `source`: why it sends nothing more (`protocol`).
    pub fn gone(&self, source: u32) -> u64 {
        source as u64 * 4
    }
    pub fn mailbox(&self, slot: u32, source: u32) -> u64 {
        self.slot(slot) + source as u64 * mail::BYTES
    }
    /// u64[mask_words]: the ranks that `source` gave up on.
    pub fn loss_mask(&self, slot: u32, source: u32) -> u64 {
        self.slot(slot) + self.loss_masks + source as u64 * mask_words(self.sizes.ranks()) as u64 * 8
    }
    /// int32[keys]: rows of `source` by key. On CUDA {epoch << 32 | rows}[keys].
    pub fn counts(&self, slot: u32, source: u32) -> u64 {
        if self.sizes.uses.posted && !self.sizes.uses.fetched {
            return self.inbox(slot, source);
        }
        self.slot(slot) + self.counts + source as u64 * self.count_stride()
    }
    /// Bytes from one source's counts to the next's.
    pub fn count_stride(&self) -> u64 {
        count_bytes(self.keys)
    }
    /// int32[local experts].
    pub fn expert_counts(&self, slot: u32) -> u64 {
        self.slot(slot) + self.expert_counts
    }
    /// int32[local experts + 1].
    pub fn expert_offsets(&self, slot: u32) -> u64 {
        self.slot(slot) + self.expert_offsets
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
    /// ranks * max_tokens rows as they travel, a step's own bound apart by source.
    pub fn bank(&self, slot: u32, plane: usize) -> u64 {
        self.slot(slot) + self.banks[plane]
    }
    /// On CUDA, int32[ranks * max_tokens, K]: beside the ids in a bank, the rows that their source has found for them here.
    pub fn bank_places(&self, slot: u32) -> u64 {
        self.slot(slot) + self.bank_places
    }
    /// `Sizes::rows` rows.
    pub fn received(&self, slot: u32, plane: usize) -> u64 {
        self.slot(slot) + self.received[plane]
    }
    /// `Sizes::rows` rows.
    pub fn combine(&self, slot: u32) -> u64 {
        self.slot(slot) + self.combine
    }
    /// float32[`Sizes::rows`, top-k or 1].
    pub fn combine_weights(&self, slot: u32) -> u64 {
        self.slot(slot) + self.combine_weights
    }
    /// Where couriers bring a slot's part of any inbox: its counts, its rows, its results.
    pub fn in_inbox(&self, slot: u32) -> (u64, u64, u64) {
        let Inboxes { slot_bytes, rows, results, .. } = self.inboxes;
        let start = slot as u64 * slot_bytes;
        (start, start + rows, start + results)
    }
    /// ranks * max_tokens results, a step's own bound apart by rank; or max_tokens * top-k, by expert.
    pub fn brought(&self, slot: u32) -> u64 {
        self.slot(slot) + self.brought
    }
    /// The values beside them.
    pub fn brought_weights(&self, slot: u32) -> u64 {
        self.slot(slot) + self.brought_weights
    }
    /// Everybody's rows of scales, one behind the other, where views have them by column.
    pub fn brought_scales(&self, slot: u32) -> u64 {
        self.slot(slot) + self.brought_scales
    }
    /// Every rank's words, and `BOXED_BYTES` for what goes with them.
    pub fn boxes(&self, slot: u32) -> u64 {
        self.slot(slot) + self.boxes
    }
    /// On CUDA, u64[ranks][rows of a FIFO][pieces]: by source, which row it wrote last, + 1; then u64[ranks][rows of a FIFO]:
    /// by receiver, which row it took.
    pub fn fifo_words(&self, slot: u32) -> u64 {
        self.slot(slot) + self.fifo_words
    }
    /// From one slot to the next.
    pub fn slot_stride(&self) -> u64 {
        self.slot_bytes
    }
    pub fn entry_bytes(&self) -> u64 {
        self.entry_bytes
    }
    /// What lies behind all other rows.
    pub fn fifos(&self, slot: u32) -> u64 {
        self.slot(slot) + self.fifos
    }
    /// An entry of the FIFO that `source` writes, by the number of rows before it.
    pub fn fifo_entry(&self, slot: u32, source: u32, number: u64) -> u64 {
        let rows = self.sizes.fifo_rows as u64;
        self.fifos(slot) + (source as u64 * rows + number % rows) * self.entry_bytes
    }
}

/// A word for each key, of 8 bytes; stored by twos.
fn count_bytes(keys: u64) -> u64 {
    (keys * 8).next_multiple_of(16)
}

/// Words of a rank mask.
pub const fn mask_words(ranks: u32) -> usize {
    (ranks as usize).div_ceil(64)
}

/// A list of int32 in a routing's private memory.
#[derive(Clone, Copy, Debug, Default)]
pub struct List {
    pub offset: u64,
    pub len: usize,
}

/// The private memory of a routing: where this rank's tokens went, and where the rows it received lie.
#[derive(Clone, Debug, Default)]
pub struct RoutingMap {
    /// The most ranks that one token can go to.
    pub fanout: u32,
    /// [max_tokens, K] ids; anything that is no expert is -1.
    pub ids: List,
    /// [max_tokens, K] float32.
    pub weights: List,
    /// [max_tokens, K] float32: those given to combine.
    pub given: List,
    /// [max_tokens, fanout]: the ranks a token went to, ascending, then -1.
    pub target_ranks: List,
    /// [max_tokens, fanout]: the token's position among this rank's rows there. Empty where it is the token's number.
    pub target_rows: List,
    /// [max_tokens, K]: the expert by its number in the order (owner, place), or -1; the token's position among this
    /// rank's rows for it. Where rows are (token, expert) pairs. On CUDA the first has, as `target_rows`, where what is
    /// beside a token goes; the second has the row at the owner, or -1.
    pub expert_keys: List,
    pub expert_rows: List,
    /// [ranks]: how many of this rank's rows went to each.
    pub rows_for: List,
    /// [keys]: where this rank's rows for a key start at their destination, and where they must end.
    pub bases: List,
    pub ends: List,
    /// [blocks]: where the blocks of received rows start, and how many rows they hold.
    pub starts: List,
    pub counts: List,
    /// [ranks]: rows received from each rank.
    pub rank_counts: List,
    /// [keys + 1], [max_tokens, K], where results are fetched: where this rank's results for a key start, and a result's number
    /// among all of them, or -1.
    pub result_starts: List,
    pub result_rows: List,
    /// [ranks], on CUDA: rows that each is to receive; this rank's at each, where they are (token, expert) pairs.
    pub demands: List,
    pub pairs_for: List,
    /// [PLACE_PARTS, ranks + experts], on CUDA, for (token, expert) pairs in one list: what each part's tokens are, and then
    /// where they start.
    pub parts: List,
    /// Rows demanded, rows dropped, where the last block ends (on CUDA: this rank's rows that others dropped, and then where
    /// the last block ends).
    pub summary: List,
    bytes: u64,
}

impl RoutingMap {
    pub fn new(sizes: &Sizes) -> RoutingMap {
        let (grid, uses) = (&sizes.grid, &sizes.uses);
        let fanout = grid.topk.min(grid.ranks);
        let (tokens, ranks) = (grid.bound as usize, grid.ranks as usize);
        let choices = tokens * grid.topk as usize;
        let by_expert = |len: usize| if grid.layout.by_expert() { len } else { 0 };
        let keys = if uses.counts { grid.keys(sizes.num_experts) as usize } else { 0 };
        let blocks = grid.blocks(sizes.experts) as usize;
        let parts = match grid.layout {
            LayoutKind::ExpertContiguous => PLACE_PARTS as usize * (ranks + sizes.num_experts as usize),
            _ => 0,
        };
        let mut at = Cursor(Some(0));
        let mut list = |len: usize| List { offset: at.take(Some(len as u64 * 4)), len };
        let mut map = RoutingMap {
            fanout,
            ids: list(choices),
            weights: list(choices),
            given: list(by_expert(choices)),
            target_ranks: list(tokens * fanout as usize),
            target_rows: list(if uses.published { 0 } else { tokens * fanout as usize }),
            expert_keys: list(by_expert(choices)),
            expert_rows: list(by_expert(choices)),
            rows_for: list(ranks),
            bases: list(keys),
            ends: list(keys),
            starts: list(blocks),
            counts: list(blocks),
            rank_counts: list(ranks),
            result_starts: list(if uses.fetched { keys + 1 } else { 0 }),
            result_rows: list(if uses.fetched { choices } else { 0 }),
            demands: list(if uses.counts { ranks } else { 0 }),
            pairs_for: list(by_expert(ranks)),
            parts: list(parts),
            summary: list(4),
            bytes: 0,
        };
        map.bytes = at.0.unwrap_or(0);
        map
    }
    pub fn bytes(&self) -> u64 {
        self.bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sizes(layout: LayoutKind, uses: Uses) -> Sizes {
        let mut plane_bytes = [0; PLANES];
        plane_bytes[..5].copy_from_slice(&[14336, 32, 32, 8, 92]);
        let grid = Grid { layout, ranks: 5, bound: 129, topk: 8, alignment: 1, limit: 0 };
        Sizes {
            grid,
            slots: 3,
            num_experts: 256,
            experts: 52,
            plane_bytes,
            quantises: true,
            columns: true,
            combine_bytes: 14336,
            uses,
            fifo_rows: 7,
            fifo_pieces: 8,
        }
    }

    #[test]
    fn regions_neither_overlap_nor_leave_the_window() {
        let pushed = Uses { counts: true, banks: true, rows: true, ..Uses::default() };
        for (layout, uses) in [
            (LayoutKind::Gathered, Uses { published: true, rows: true, ..Uses::default() }),
            (LayoutKind::Gathered, Uses { published: true, rows: true, carried: true, ..Uses::default() }),
            (LayoutKind::RankMajor, Uses { rows: true, ..Uses::default() }),
            (LayoutKind::Flat, pushed),
            (LayoutKind::ExpertPadded, pushed),
            (LayoutKind::ExpertPadded, Uses { posted: true, fetched: true, ..pushed }),
            (LayoutKind::ExpertContiguous, pushed),
            (LayoutKind::Flat, Uses { counts: true, fifos: true, ..Uses::default() }),
        ] {
            let map = Map::new(sizes(layout, uses)).unwrap();
            let (ranks, sent) = (5u64, 5 * 129u64);
            let rows = map.sizes.rows();
            let mut regions = vec![(0, ranks * 4)];
            for slot in 0..3 {
                for source in 0..5 {
                    regions.push((map.mailbox(slot, source), mail::BYTES));
                    regions.push((map.loss_mask(slot, source), 8));
                    if uses.counts {
                        regions.push((map.counts(slot, source), map.keys * 8));
                    }
                    if uses.fifos {
                        let entries =
                            (0..7).map(|n| (map.fifo_entry(slot, source, 700 + n), map.entry_bytes));
                        regions.extend(entries);
                    }
                }
                regions.push((map.expert_counts(slot), 52 * 4));
                regions.push((map.expert_offsets(slot), 53 * 4));
                regions.push((map.rank_counts(slot), ranks * 4));
                regions.push((map.status(slot), (4 + ranks) * 4));
                for plane in 0..PLANES {
                    let bytes = map.sizes.plane_bytes[plane] as u64;
                    let of = |used: bool, bytes: u64| if used { bytes } else { 0 };
                    regions.push((map.published(slot, plane), of(uses.published, 129 * bytes)));
                    regions.push((map.bank(slot, plane), of(uses.banks, sent * bytes)));
                    let received = received_bytes(layout, plane, bytes as u32) as u64;
                    regions.push((map.received(slot, plane), of(uses.rows, rows * received)));
                    let align = if of(uses.rows, rows * received) >= WIDE { WIDE_ALIGN } else { ALIGN };
                    assert_eq!(map.received(slot, plane) % align, 0);
                }
                if layout == LayoutKind::ExpertContiguous {
                    regions.push((map.bank_places(slot), sent * 32));
                }
                if uses.rows {
                    regions.push((map.combine(slot), rows * 14336));
                    regions.push((map.combine_weights(slot), rows * 4));
                }
                if uses.fetched {
                    regions.push((map.brought(slot), 129 * 8 * 14336));
                    regions.push((map.brought_weights(slot), 129 * 8 * 4));
                    let (counts, rows, results) = map.in_inbox(slot);
                    let (start, each) = map.inboxes();
                    let planes = 129 * map.sizes.plane_bytes.iter().map(|bytes| *bytes as u64).sum::<u64>();
                    assert!(start >= map.window_bytes() && counts + map.count_stride() <= rows);
                    assert!(rows + planes <= results && results + 129 * 8 * (14336 + 4) <= each);
                }
                if uses.carried {
                    regions.push((map.brought(slot), sent * 14336));
                    regions.push((map.brought_weights(slot), sent * 32));
                    regions.push((map.brought_scales(slot), sent * 92));
                    regions.push((map.boxes(slot), ranks * mail::BYTES + BOXED_BYTES));
                }
            }
            regions.retain(|(_, bytes)| *bytes > 0);
            regions.sort();
            for pair in regions.windows(2) {
                assert!(pair[0].0 + pair[0].1 <= pair[1].0, "{layout:?} {pair:?}");
            }
            let (start, bytes) = *regions.last().unwrap();
            assert!(start + bytes <= map.window_bytes());
        }
    }

    #[test]
    fn fifos_do_not_grow_with_tokens() {
        let uses = Uses { counts: true, fifos: true, ..Uses::default() };
        let few = sizes(LayoutKind::Flat, uses);
        let mut many = few.clone();
        many.grid.bound = 1 << 20;
        assert_eq!(Map::new(few).unwrap().window_bytes(), Map::new(many).unwrap().window_bytes());
    }

    #[test]
    fn sizes_past_the_address_space_are_refused() {
        let mut huge = sizes(LayoutKind::RankMajor, Uses { rows: true, ..Uses::default() });
        huge.grid.bound = u32::MAX;
        huge.slots = u32::MAX;
        huge.plane_bytes[0] = u32::MAX;
        assert!(Map::new(huge).is_err());
    }
}
