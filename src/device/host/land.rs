//! Rows coming in on the CPU: from banks, peers' windows and FIFOs to their places, the padding, the small outputs.

use super::modes::DefaultModes;
use super::push::{scatter, weight_of};
use super::route::{DEMAND, DROPPED, END, Ledger};
use super::{Host, copy_row};
use crate::config::{LayoutKind, MAX_TOPK};
use crate::device::map::{IDS, PLANES, SCALES, SOURCE, WEIGHTS};
use crate::device::{Columns, Device, Dispatch, Region, Rows, Target};
use crate::error::Result;
use crate::fault::Point;

/// Bits of status[0], as the ABI names them.
const STEP_BAD_ID: i32 = 1;
const STEP_DROPPED: i32 = 2;
const STEP_VOID: i32 = 4;
const STEP_OVERFLOW: i32 = 8;
const STEP_DEGRADED: i32 = 16;

/// Where a plane's rows go.
#[derive(Clone, Copy)]
enum Dest {
    Rows(Rows),
    Columns(Columns),
}

/// Where a row of a plane stands.
#[derive(Clone, Copy)]
pub(super) enum From {
    Row(*const u8),
    Cells(Columns, usize),
}

pub(super) type FromRow = [Option<From>; PLANES];

/// The outputs of a dispatch, to be filled row by row.
pub(super) struct Landing<'a> {
    d: &'a Dispatch<'a>,
    host: &'a Host,
    dest: [Option<Dest>; PLANES],
    /// Tokens of each local expert, if they are wanted and must be counted.
    counts: Option<&'a mut [i32]>,
    rows: u64,
    bytes: u64,
}

impl<'a> Landing<'a> {
    pub fn new(host: &'a Host, d: &'a Dispatch<'a>) -> Landing<'a> {
        let dest = std::array::from_fn(|plane| match d.recv[plane] {
            Target::Nothing => None,
            Target::Into(rows) => Some(Dest::Rows(rows)),
            Target::Columns(columns) => Some(Dest::Columns(columns)),
            Target::View => Some(host.received(d, plane)),
        });
        let wanted = !matches!(d.expert_counts, Target::Nothing) || d.expert_stats.is_some();
        let local = host.experts.count(host.rank) as usize;
        let counts = (wanted && d.grid.topk > 0 && !d.grid.layout.by_expert()).then(|| {
            let counts = host.small_region(d.call.slot, Region::ExpertCounts, local);
            counts.fill(0);
            counts
        });
        Landing { d, host, dest, counts, rows: 0, bytes: 0 }
    }

    fn is_callers(&self, plane: usize) -> bool {
        self.d.recv[plane].is_callers()
    }
    /// True if rows that are in place already must be looked at.
    fn looks_at_placed(&self) -> bool {
        self.counts.is_some() || (0..PLANES).any(|plane| self.is_callers(plane))
    }

    /// Puts one plane's row where it is wanted.
    #[inline]
    fn put(&self, plane: usize, row: usize, from: From) {
        let Some(dest) = &self.dest[plane] else { return };
        // SAFETY: comm checked that the outputs' rows have the bytes of the dispatched ones.
        unsafe {
            match (dest, from) {
                (Dest::Rows(rows), From::Row(from)) if plane == IDS && self.d.ids_out_are_64 => {
                    for k in 0..rows.row_bytes / 8 {
                        let id = (from as *const i32).add(k).read_unaligned();
                        (rows.row(row) as *mut i64).add(k).write_unaligned(id as i64);
                    }
                }
                (Dest::Rows(rows), From::Row(from)) => {
                    std::ptr::copy_nonoverlapping(from, rows.row(row), rows.row_bytes);
                }
                (Dest::Columns(columns), From::Row(from)) => scatter(columns, row, from),
                (Dest::Columns(columns), From::Cells(from, at)) => {
                    for element in 0..columns.elements {
                        std::ptr::copy_nonoverlapping(from.cell(at, element), columns.cell(row, element), 4);
                    }
                }
                // Scales lie by column at both ends or at none.
                (Dest::Rows(_), From::Cells(..)) => {}
            }
        }
    }

    /// A row that stands elsewhere; `placed`: in the slot, so that views have it.
    fn copy(&mut self, from: &FromRow, row: usize, placed: bool) {
        let mut bytes = 0;
        for (plane, from) in from.iter().enumerate() {
            let Some(from) = from.filter(|_| self.dest[plane].is_some()) else { continue };
            if !placed || self.is_callers(plane) {
                self.put(plane, row, from);
                bytes += self.d.row_bytes(plane) as u64;
            }
        }
        self.rows += u64::from(bytes > 0);
        self.bytes += bytes;
    }

    /// A token's row of a per-rank layout.
    pub fn token(&mut self, from: &FromRow, row: usize, placed: bool) {
        self.copy(from, row, placed);
        let (Some(counts), Some(From::Row(ids))) = (&mut self.counts, from[IDS]) else { return };
        // SAFETY: a row of ids has top-k int32.
        let ids = unsafe { read_row::<i32>(ids, self.d.grid.topk as usize) };
        count_experts(self.host, &ids[..self.d.grid.topk as usize], counts);
    }

    /// Hands over what was moved and counted.
    pub fn finish(self) {
        Host::add(&self.host.stats.rows_copied, self.rows);
        Host::add(&self.host.stats.bytes_copied, self.bytes);
    }
}

/// Distinct local experts of a token: one that it names twice counts once.
fn count_experts(host: &Host, ids: &[i32], counts: &mut [i32]) {
    for (k, id) in ids.iter().enumerate() {
        if !(0..host.experts.num() as i32).contains(id) || ids[..k].contains(id) {
            continue;
        }
        let (owner, place) = host.experts.place(*id as usize);
        if owner == host.rank {
            counts[place as usize] += 1;
        }
    }
}

/// Up to top-k 4-byte values that may be aligned to less.
///
/// # Safety
/// `count` values stand at `from`, `count <= MAX_TOPK`.
unsafe fn read_row<T: Copy + Default>(from: *const u8, count: usize) -> [T; MAX_TOPK as usize] {
    let mut values = [T::default(); MAX_TOPK as usize];
    for (i, value) in values[..count].iter_mut().enumerate() {
        // SAFETY: i < count.
        *value = unsafe { (from as *const T).add(i).read_unaligned() };
    }
    values
}

/// Fills bytes with a repeated 32-bit value.
///
/// # Safety
/// The bytes are writable.
unsafe fn fill(at: *mut u8, bytes: usize, value: u32) {
    for i in 0..bytes / 4 {
        // SAFETY: inside; a caller's tensor may be aligned to less.
        unsafe { (at as *mut u32).add(i).write_unaligned(value) };
    }
}

impl Host {
    /// The received rows of a plane in this rank's own window.
    fn received(&self, d: &Dispatch, plane: usize) -> Dest {
        if plane == SCALES && d.columns {
            return Dest::Columns(self.received_columns(self.rank, d.call.slot, d, d.capacity as u64));
        }
        let (rows, size) = (d.capacity as usize, d.row_bytes(plane));
        let bytes = if self.map.sizes.uses.rows { (rows * size) as u64 } else { 0 };
        let ptr = self.bases.at(self.rank, self.map.received(d.call.slot, plane), bytes);
        // SAFETY: `at` checked that the rows lie in the window, which stays mapped as long as self.
        Dest::Rows(unsafe { Rows::new(ptr, rows, size, size) })
    }

    /// A row among the received ones.
    fn placed_row(&self, received: &[Option<Dest>; PLANES], row: usize) -> FromRow {
        std::array::from_fn(|plane| {
            received[plane].map(|dest| match dest {
                Dest::Rows(rows) => From::Row(rows.row(row)),
                Dest::Columns(columns) => From::Cells(columns, row),
            })
        })
    }

    /// A row of a source's bank.
    fn bank_row(&self, d: &Dispatch, (source, rows): (u32, u32), position: u32) -> FromRow {
        let all = &d.send.shape.plane_bytes;
        let bank = self.map.banked((d.call.slot, source), (rows, d.grid.bound), all);
        std::array::from_fn(|plane| {
            let bytes = all[plane] as u64;
            (bytes > 0)
                .then(|| From::Row(self.bases.at(self.rank, bank[plane] + position as u64 * bytes, bytes)))
        })
    }

    pub(super) fn land(&self, d: &Dispatch) -> Result<()> {
        let mut guard = self.slot(d.call.slot);
        let slot = &mut *guard;
        let l = self.ledger(d.memory);
        let mut landing = Landing::new(self, d);
        let received = std::array::from_fn(|plane| {
            (d.send.shape.plane_bytes[plane] > 0 && d.row_bytes(plane) > 0).then(|| self.received(d, plane))
        });
        match d.grid.layout {
            layout if layout.by_expert() => {
                self.land_pairs(d, &l, &mut landing, &received, &slot.arrived, &mut slot.cursors);
            }
            _ => {
                let looks = landing.looks_at_placed();
                let mut next = 0;
                for source in 0..self.ranks {
                    let kept = l.rank_counts[source as usize] as usize;
                    let start = match d.grid.layout {
                        LayoutKind::RankMajor => source as usize * d.grid.bound as usize,
                        _ => next,
                    };
                    next += kept;
                    let (rows, banked) = slot.arrived[source as usize];
                    for i in 0..if banked || looks { kept } else { 0 } {
                        if banked {
                            landing.token(&self.bank_row(d, (source, rows), i as u32), start + i, false);
                        } else {
                            landing.token(&self.placed_row(&received, start + i), start + i, true);
                        }
                    }
                }
            }
        }
        landing.finish();
        Ok(())
    }

    /// Rows of (token, expert) pairs. `cursors`: scratch, the next row of each expert.
    fn land_pairs(
        &self,
        d: &Dispatch,
        l: &Ledger,
        landing: &mut Landing,
        received: &[Option<Dest>; PLANES],
        arrived: &[(u32, bool)],
        cursors: &mut [u64],
    ) {
        let padded = d.grid.layout == LayoutKind::ExpertPadded;
        let local = self.experts.count(self.rank) as usize;
        let looks = landing.looks_at_placed();
        let _modes = DefaultModes::enter();
        if padded && d.reuse && !self.map.sizes.uses.posted {
            for block in (0..local).filter(|_| looks) {
                let start = l.starts[block] as usize;
                for row in start..start + l.counts[block] as usize {
                    landing.copy(&self.placed_row(received, row), row, true);
                }
            }
            return;
        }
        for (cursor, start) in cursors.iter_mut().zip(l.starts.iter()) {
            *cursor = *start as u64;
        }
        for (source, (rows, banked)) in arrived.iter().enumerate() {
            if padded && !banked && self.present().contains(source as u32) {
                for (place, cursor) in cursors[..local].iter_mut().enumerate() {
                    let key = self.experts.start(self.rank) as u64 + place as u64;
                    let offset = self.map.counts(d.call.slot, source as u32) + key * 4;
                    let count = self.bases.half(self.rank, offset).load(std::sync::atomic::Ordering::Relaxed);
                    let next = *cursor + count.min(d.grid.bound) as u64;
                    let end = next.min(d.grid.end(place as u32, d.capacity as u64));
                    for row in (*cursor..end).filter(|_| looks) {
                        landing.copy(&self.placed_row(received, row as usize), row as usize, true);
                    }
                    *cursor = next;
                }
                continue;
            }
            for position in 0..*rows {
                self.land_token(d, landing, received, (source as u32, *rows, *banked), position, cursors);
            }
        }
    }

    /// All rows of a token, which stands in its source's bank or, but for what is beside it in the bank, in the first
    /// of its rows.
    fn land_token(
        &self,
        d: &Dispatch,
        landing: &mut Landing,
        received: &[Option<Dest>; PLANES],
        (source, rows, banked): (u32, u32, bool),
        position: u32,
        cursors: &mut [u64],
    ) {
        let topk = d.grid.topk as usize;
        let bank = self.bank_row(d, (source, rows), position);
        let (Some(From::Row(ids)), Some(From::Row(weights)), Some(From::Row(pair))) =
            (bank[IDS], bank[WEIGHTS], bank[SOURCE])
        else {
            return;
        };
        // SAFETY: rows of ids and weights have top-k values.
        let (ids, weights) = unsafe { (read_row::<i32>(ids, topk), read_row::<f32>(weights, topk)) };
        let mut pairs = [(0u32, 0usize); MAX_TOPK as usize];
        let mut found = 0;
        for (k, id) in ids[..topk].iter().enumerate() {
            if !(0..self.experts.num() as i32).contains(id) || ids[..k].contains(id) {
                continue;
            }
            let (owner, place) = self.experts.place(*id as usize);
            if owner == self.rank {
                pairs[found] = (place, k);
                found += 1;
            }
        }
        let pairs = &mut pairs[..found];
        pairs.sort_unstable();
        let mut from = bank;
        for (i, (place, k)) in pairs.iter().enumerate() {
            let row = cursors[*place as usize];
            cursors[*place as usize] += 1;
            if row >= d.grid.end(*place, d.capacity as u64) {
                continue;
            }
            let row = row as usize;
            let first = i == 0 && !banked;
            if first {
                from = self.placed_row(received, row);
            }
            for plane in [IDS, WEIGHTS, SOURCE] {
                from[plane] = None;
            }
            landing.copy(&from, row, first);
            let weight = weight_of(&ids[..topk], &weights[..topk], *k).unwrap_or_default();
            landing.put(WEIGHTS, row, From::Row(&weight as *const f32 as *const u8));
            landing.put(IDS, row, From::Row(&ids[*k] as *const i32 as *const u8));
            landing.put(SOURCE, row, From::Row(pair));
        }
    }

    pub(super) fn gather(&self, d: &Dispatch) -> Result<()> {
        let l = self.ledger(d.memory);
        let mut landing = Landing::new(self, d);
        let bytes = d.send.shape.plane_bytes;
        let mut start = 0;
        for (peer, count) in l.rank_counts.iter().enumerate() {
            let count = *count as usize;
            let published = |plane: usize, token: usize| {
                let size = bytes[plane] as u64;
                let offset = self.map.published(d.call.slot, plane) + token as u64 * size;
                self.bases.at(peer as u32, offset, size) as *const u8
            };
            for plane in (0..PLANES).filter(|plane| bytes[*plane] > 0 && *plane != SOURCE) {
                let size = bytes[plane] as usize;
                match landing.dest[plane] {
                    None => continue,
                    Some(Dest::Rows(to)) if to.stride == size && to.row_bytes == size && count > 0 => {
                        // The last row of both sides is checked, the ones before lie below it.
                        to.row(start + count - 1);
                        published(plane, count - 1);
                        // SAFETY: count rows on both sides.
                        unsafe {
                            copy_row(published(plane, 0), to.row(start), count * size, Point::DispatchGather);
                        }
                    }
                    Some(_) => {
                        for token in 0..count {
                            landing.put(plane, start + token, From::Row(published(plane, token)));
                        }
                    }
                }
                let moved = (count * size) as u64;
                Self::add(&self.stats.bytes_gathered, moved);
                if peer as u32 != self.rank {
                    Self::add(&self.stats.bytes_remote, moved);
                }
            }
            for token in 0..count {
                if landing.dest[SOURCE].is_some() {
                    let pair = [peer as i32, token as i32];
                    landing.put(SOURCE, start + token, From::Row(pair.as_ptr() as *const u8));
                }
                if let Some(counts) = &mut landing.counts {
                    let topk = d.grid.topk as usize;
                    // SAFETY: a published row of ids has top-k int32.
                    let ids = unsafe { read_row::<i32>(published(IDS, token), topk) };
                    count_experts(self, &ids[..topk], counts);
                }
            }
            Self::add(&self.stats.rows_gathered, count as u64);
            start += count;
        }
        landing.finish();
        Ok(())
    }

    pub(super) fn settle(&self, d: &Dispatch) -> Result<()> {
        let l = self.ledger(d.memory);
        let local = self.experts.count(self.rank) as usize;
        let blocks = d.grid.blocks(local as u32) as usize;
        // The rows between the end of a block's and the start of the next.
        let padding = |block: usize| {
            let end = if block + 1 < blocks { l.starts[block + 1] as usize } else { d.capacity as usize };
            l.starts[block] as usize + l.counts[block] as usize..end
        };
        for plane in 0..PLANES {
            let value = match plane {
                IDS | SOURCE => u32::MAX,
                WEIGHTS => 0,
                _ if d.zero_padding => 0,
                _ => continue,
            };
            let dest = match d.recv[plane] {
                Target::Nothing => continue,
                Target::View => self.received(d, plane),
                Target::Into(rows) => Dest::Rows(rows),
                Target::Columns(columns) => Dest::Columns(columns),
            };
            for row in (0..blocks).flat_map(padding) {
                // SAFETY: one row of the output.
                unsafe {
                    match dest {
                        Dest::Rows(rows) if value == 0 => {
                            std::ptr::write_bytes(rows.row(row), 0, rows.row_bytes);
                        }
                        Dest::Rows(rows) => fill(rows.row(row), rows.row_bytes, value),
                        Dest::Columns(columns) => {
                            for element in 0..columns.elements {
                                fill(columns.cell(row, element), 4, value);
                            }
                        }
                    }
                }
            }
        }
        let slot = d.call.slot;
        if d.grid.layout.by_expert() {
            self.small_region(slot, Region::ExpertCounts, local).copy_from_slice(&l.counts[..local]);
            let offsets = self.small_region(slot, Region::ExpertOffsets, local + 1);
            offsets[..local].copy_from_slice(&l.starts[..local]);
            offsets[local] = l.summary[END];
            self.small_output(d.expert_offsets, slot, Region::ExpertOffsets, local + 1);
        }
        if d.grid.topk > 0 {
            self.add_to_stats(d, local);
            self.small_output(d.expert_counts, slot, Region::ExpertCounts, local);
        }
        self.small_region(slot, Region::RankCounts, l.rank_counts.len()).copy_from_slice(l.rank_counts);
        self.small_output(d.rank_counts, slot, Region::RankCounts, l.rank_counts.len());

        let bad = self.slot(slot).bad_ids as i32;
        let bits = if bad > 0 { STEP_BAD_ID } else { 0 };
        let dropped = l.summary[DROPPED];
        let words = [bits | if dropped > 0 { STEP_DROPPED } else { 0 }, bad, dropped, l.summary[DEMAND]];
        self.write_status(d.status, slot, self.degraded(words), self.lost().iter());
        Ok(())
    }

    fn add_to_stats(&self, d: &Dispatch, local: usize) {
        let Some(stats) = d.expert_stats.filter(|_| local > 0) else { return };
        let counts = self.small_region(d.call.slot, Region::ExpertCounts, local);
        for (i, count) in counts.iter().enumerate() {
            // SAFETY: expert_stats holds one int64 per local expert; it may be aligned to less.
            unsafe {
                let at = (stats.row(0) as *mut i64).add(i);
                at.write_unaligned(at.read_unaligned() + *count as i64);
            }
        }
    }

    /// One of the slot's small outputs, as this rank's own memory.
    #[allow(clippy::mut_from_ref, reason = "shared memory; the comm's lock gives it to one call at a time")]
    fn small_region(&self, slot: u32, region: Region, count: usize) -> &mut [i32] {
        let at = self.view(slot, region) as *mut i32;
        // SAFETY: map.rs gives the region this many int32, aligned; no peer touches small outputs.
        unsafe { std::slice::from_raw_parts_mut(at, count) }
    }

    /// Hands a small output to the caller's tensor, if one was given.
    fn small_output(&self, target: Target, slot: u32, region: Region, count: usize) {
        let Target::Into(rows) = target else { return };
        if rows.rows() > 0 && count > 0 {
            let from = self.view(slot, region) as *const u8;
            // SAFETY: comm checked the caller's size; the region holds count int32.
            unsafe { std::ptr::copy_nonoverlapping(from, rows.row(0), count * 4) };
        }
    }

    /// A status: its four words, then the ranks that are marked.
    fn write_status(&self, target: Target, slot: u32, words: [i32; 4], marked: impl Iterator<Item = u32>) {
        let count = 4 + self.ranks as usize;
        let status = self.small_region(slot, Region::Status, count);
        status.fill(0);
        status[..4].copy_from_slice(&words);
        for rank in marked {
            status[4 + rank as usize] = 1;
        }
        self.small_output(target, slot, Region::Status, count);
    }

    pub(super) fn lost_status(&self, target: Target, slot: u32, lost: &[u32]) {
        self.write_status(target, slot, [STEP_VOID, 0, 0, 0], lost.iter().copied());
    }

    /// The status of a dispatch that is void because some ranks, those marked, would receive too many rows.
    pub(super) fn overflow_status(
        &self,
        target: Target,
        slot: u32,
        demand: i32,
        over: impl Iterator<Item = bool>,
    ) {
        let marked = over.zip(0..).filter_map(|(over, rank)| over.then_some(rank));
        self.write_status(target, slot, [STEP_VOID | STEP_OVERFLOW, 0, 0, demand], marked);
    }

    /// The status of a combine whose sums lack results: `dropped` of them, and others of ranks that are lost.
    pub(super) fn combine_status(&self, target: Target, slot: u32, dropped: u64, lost: u64) {
        let bits = if dropped > 0 { STEP_DROPPED } else { 0 };
        let missing = (dropped + lost).min(i32::MAX as u64) as i32;
        self.write_status(target, slot, self.degraded([bits, 0, missing, 0]), self.lost().iter());
    }

    /// The words of a step's status, where it goes on without ranks.
    fn degraded(&self, words: [i32; 4]) -> [i32; 4] {
        let bits = if self.lost().len() == 0 { 0 } else { STEP_DEGRADED };
        [words[0] | bits, words[1], words[2], words[3]]
    }
}
