//! Moving rows on the CPU: push, publish, gather, settle, stage.
//!
//! Sources and destinations never overlap: a caller's tensor inside its own window is refused before it gets here,
//! and two windows are two mappings.

use super::Host;
use super::route::read_ids;
use crate::config::MAX_TOPK;
use crate::device::map::{PLANES, Plane};
use crate::device::{Combine, Device, Dispatch, Region, Rows, Target};
use crate::error::Result;

const IDS: usize = Plane::Ids as usize;
const WEIGHTS: usize = Plane::Weights as usize;
const SOURCE: usize = Plane::Source as usize;

/// Bits of status[0], as the ABI names them.
const STEP_BAD_ID: i32 = 1;
const STEP_VOID: i32 = 4;

/// Which rows of an output are valid and which are padding, in the layout's order.
struct Runs<'a> {
    counts: &'a [i32],
    received: usize,
    d: &'a Dispatch<'a>,
    gathers: bool,
}

impl Runs<'_> {
    /// (start, end of the valid rows, end of the padding), run by run.
    fn runs(&self) -> impl Iterator<Item = (usize, usize, usize)> + '_ {
        let bound = self.d.shape.bound as usize;
        let gathered = self.gathers.then_some((0, self.received, self.d.capacity as usize));
        let per_rank = self.counts.iter().enumerate().filter(|_| !self.gathers);
        let per_rank = per_rank.map(move |(r, n)| (r * bound, r * bound + *n as usize, (r + 1) * bound));
        gathered.into_iter().chain(per_rank)
    }
    fn valid(&self) -> impl Iterator<Item = usize> + '_ {
        self.runs().flat_map(|(start, valid, _)| start..valid)
    }
    fn padding(&self) -> impl Iterator<Item = usize> + '_ {
        self.runs().flat_map(|(_, valid, end)| valid..end)
    }
}

/// A row on its way: where its bytes stand.
type Sources = [Option<*const u8>; PLANES];

/// The parts of a row that are made rather than read.
struct Made {
    ids: [i32; MAX_TOPK as usize],
    ones: [f32; MAX_TOPK as usize],
    source: [i32; 2],
}

impl Made {
    fn new(rank: u32) -> Made {
        Made { ids: [0; 32], ones: [1.0; 32], source: [rank as i32, 0] }
    }
    /// The sources of a token's row: the caller's tensors, and what stands in for absent ones.
    fn row(&mut self, d: &Dispatch, experts: u32, token: usize) -> Sources {
        let mut sources = [None; PLANES];
        for (plane, rows) in d.send.iter().enumerate() {
            sources[plane] = rows.as_ref().map(|rows| rows.row(token) as *const u8);
        }
        if let Some(rows) = &d.send[IDS] {
            read_ids(rows, token, d.ids_are_64, experts, &mut self.ids[..d.shape.topk as usize]);
            sources[IDS] = Some(self.ids.as_ptr() as *const u8);
        }
        if d.shape.plane_bytes[WEIGHTS] > 0 {
            sources[WEIGHTS].get_or_insert(self.ones.as_ptr() as *const u8);
        }
        if d.shape.plane_bytes[SOURCE] > 0 {
            self.source[1] = token as i32;
            sources[SOURCE] = Some(self.source.as_ptr() as *const u8);
        }
        sources
    }
}

/// Fills `count` bytes with a repeated 32-bit value.
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
    pub(super) fn push(&self, d: &Dispatch) -> Result<()> {
        let targets = self.targets(d.memory);
        let bytes = d.shape.plane_bytes;
        let row_bytes: u64 = bytes.iter().map(|b| *b as u64).sum();
        let base = self.rank as u64 * d.shape.bound as u64;
        let (mut rows, mut remote) = (0, 0);
        let mut made = Made::new(self.rank);
        for token in 0..d.tokens as usize {
            let sources = made.row(d, self.experts.num(), token);
            for (peer, position) in targets.of(token) {
                rows += 1;
                remote += u64::from(peer != self.rank);
                for (plane, source) in sources.iter().enumerate() {
                    let Some(source) = source else { continue };
                    let size = bytes[plane] as u64;
                    let offset = self.map.received(d.call.slot, plane) + (base + position as u64) * size;
                    let to = self.bases.at(peer, offset, size);
                    // SAFETY: both sides hold one row of the plane.
                    unsafe { std::ptr::copy_nonoverlapping(*source, to, size as usize) };
                }
            }
        }
        Self::add(&self.stats.rows_pushed, rows);
        Self::add(&self.stats.bytes_pushed, rows * row_bytes);
        Self::add(&self.stats.bytes_remote, remote * row_bytes);
        Ok(())
    }

    pub(super) fn publish(&self, d: &Dispatch) -> Result<()> {
        let mut made = Made::new(self.rank);
        let bytes = d.shape.plane_bytes;
        for token in 0..d.tokens as usize {
            let sources = made.row(d, self.experts.num(), token);
            for (plane, source) in sources.iter().enumerate() {
                let Some(source) = source else { continue };
                let size = bytes[plane] as u64;
                let offset = self.map.published(d.call.slot, plane) + token as u64 * size;
                let to = self.bases.at(self.rank, offset, size);
                // SAFETY: both sides hold one row of the plane.
                unsafe { std::ptr::copy_nonoverlapping(*source, to, size as usize) };
            }
        }
        self.count_copied(d.tokens as u64, bytes.iter().map(|b| *b as u64).sum());
        Ok(())
    }

    fn count_copied(&self, rows: u64, row_bytes: u64) {
        Self::add(&self.stats.rows_copied, rows);
        Self::add(&self.stats.bytes_copied, rows * row_bytes);
    }

    /// The received rows of a plane in this rank's own window, as a tensor.
    fn received(&self, d: &Dispatch, plane: usize, rows: usize) -> Rows {
        // Gathered rows are given their source here, it does not travel.
        let size = if plane == SOURCE { 8 } else { d.shape.plane_bytes[plane] as usize };
        let ptr = self.view(d.call.slot, Region::Plane(plane)) as *mut u8;
        // SAFETY: the region holds ranks * max_tokens rows of at least this size, mapped as long as self.
        unsafe { Rows::new(ptr, rows, size, size) }
    }

    /// Where a plane's rows go: the slot or the caller's tensor; ids for the caller are converted in `settle`.
    fn destination(&self, d: &Dispatch, plane: usize) -> Option<Rows> {
        match d.recv[plane] {
            Target::Nothing => None,
            Target::Into(rows) if !(plane == IDS && d.ids_out_are_64) => Some(rows),
            _ => Some(self.received(d, plane, d.capacity as usize)),
        }
    }

    pub(super) fn gather(&self, d: &Dispatch) -> Result<()> {
        let counts = self.rank_counts(d.memory);
        let bytes = d.shape.plane_bytes;
        let mut start = 0;
        for (peer, count) in counts.iter().enumerate() {
            let count = *count as usize;
            for (plane, size) in bytes.iter().enumerate() {
                let size = *size as usize;
                // Ids are needed for the counts of experts, wanted or not.
                let to = match self.destination(d, plane) {
                    Some(rows) => rows,
                    None if plane == IDS => self.received(d, plane, d.capacity as usize),
                    None => continue,
                };
                if size == 0 || count == 0 || plane == SOURCE {
                    continue;
                }
                let from =
                    self.bases.at(peer as u32, self.map.published(d.call.slot, plane), (count * size) as u64);
                if to.is_compact() && to.stride == size {
                    // The last row's address is checked, the ones before lie below it.
                    to.row(start + count - 1);
                    // SAFETY: count rows on both sides.
                    unsafe { std::ptr::copy_nonoverlapping(from, to.row(start), count * size) };
                } else {
                    for i in 0..count {
                        // SAFETY: one row on both sides.
                        unsafe { std::ptr::copy_nonoverlapping(from.add(i * size), to.row(start + i), size) };
                    }
                }
                let moved = (count * size) as u64;
                Self::add(&self.stats.bytes_gathered, moved);
                if peer as u32 != self.rank {
                    Self::add(&self.stats.bytes_remote, moved);
                }
            }
            if let Some(rows) = self.destination(d, SOURCE) {
                for i in 0..count {
                    let pair = [peer as i32, i as i32];
                    // SAFETY: a row_source row holds two int32.
                    unsafe { (rows.row(start + i) as *mut [i32; 2]).write_unaligned(pair) };
                }
            }
            Self::add(&self.stats.rows_gathered, count as u64);
            start += count;
        }
        Ok(())
    }

    pub(super) fn settle(&self, d: &Dispatch) -> Result<()> {
        let counts = self.rank_counts(d.memory);
        let received: usize = counts.iter().map(|c| *c as usize).sum();
        let runs = Runs { counts, received, d, gathers: self.map.sizes.gathers };
        for plane in 0..PLANES {
            let Some(rows) = self.destination(d, plane).filter(|rows| rows.row_bytes > 0) else { continue };
            if !runs.gathers
                && matches!(d.recv[plane], Target::Into(_))
                && !(plane == IDS && d.ids_out_are_64)
            {
                let from = self.received(d, plane, d.capacity as usize);
                for row in runs.valid() {
                    // SAFETY: one row on both sides.
                    unsafe { std::ptr::copy_nonoverlapping(from.row(row), rows.row(row), rows.row_bytes) };
                }
                self.count_copied(received as u64, rows.row_bytes as u64);
            }
            let value = match plane {
                IDS | SOURCE => Some(u32::MAX),
                WEIGHTS => Some(0),
                _ if d.zero_padding => None,
                _ => continue,
            };
            for row in runs.padding() {
                // SAFETY: one row of the output.
                unsafe {
                    match value {
                        Some(value) => fill(rows.row(row), rows.row_bytes, value),
                        None => std::ptr::write_bytes(rows.row(row), 0, rows.row_bytes),
                    }
                }
            }
        }
        if let (Target::Into(wide), true) = (d.recv[IDS], d.ids_out_are_64) {
            let narrow = self.received(d, IDS, d.capacity as usize);
            for row in 0..d.capacity as usize {
                for k in 0..d.shape.topk as usize {
                    // SAFETY: both rows hold topk ids.
                    unsafe {
                        let id = *(narrow.row(row) as *const i32).add(k);
                        (wide.row(row) as *mut i64).add(k).write_unaligned(id as i64);
                    }
                }
            }
        }
        self.count_experts(d, runs.valid());
        self.small_region(d.call.slot, Region::RankCounts, counts.len()).copy_from_slice(counts);
        self.small_output(d.rank_counts, d.call.slot, Region::RankCounts, counts.len());
        self.settle_status(d, received);
        Ok(())
    }

    /// Distinct tokens per local expert: a token that names an expert twice counts once.
    fn count_experts(&self, d: &Dispatch, rows: impl Iterator<Item = usize>) {
        let wanted = !matches!(d.expert_counts, Target::Nothing) || d.expert_stats.is_some();
        if d.shape.topk == 0 || !wanted {
            return;
        }
        // Gathered ids may have gone straight to the caller.
        let ids = match (self.map.sizes.gathers, d.recv[IDS]) {
            (true, Target::Into(rows)) if !d.ids_out_are_64 => rows,
            _ => self.received(d, IDS, d.capacity as usize),
        };
        let local = self.experts.count(self.rank) as usize;
        let counts = self.small_region(d.call.slot, Region::ExpertCounts, local);
        counts.fill(0);
        let mut row_ids = [0i32; MAX_TOPK as usize];
        let row_ids = &mut row_ids[..d.shape.topk as usize];
        for row in rows {
            read_ids(&ids, row, false, self.experts.num(), row_ids);
            for (k, id) in row_ids.iter().enumerate() {
                if *id < 0 || row_ids[..k].contains(id) {
                    continue;
                }
                let (owner, place) = self.experts.place(*id as usize);
                if owner == self.rank {
                    counts[place as usize] += 1;
                }
            }
        }
        if let Some(stats) = &d.expert_stats {
            for (i, count) in counts.iter().enumerate() {
                // SAFETY: expert_stats holds one int64 per local expert; it may be aligned to less.
                unsafe {
                    let at = (stats.row(0) as *mut i64).add(i);
                    at.write_unaligned(at.read_unaligned() + *count as i64);
                }
            }
        }
        self.small_output(d.expert_counts, d.call.slot, Region::ExpertCounts, local);
    }

    /// One of the slot's small outputs, as this rank's own memory.
    #[allow(clippy::mut_from_ref, reason = "shared memory; the comm's lock gives it to one call at a time")]
    fn small_region(&self, slot: u32, region: Region, count: usize) -> &mut [i32] {
        let at = self.view(slot, region) as *mut i32;
        // SAFETY: map.rs gives the region this many int32, aligned; no peer touches small outputs.
        unsafe { std::slice::from_raw_parts_mut(at, count) }
    }

    /// Hands a small output to the caller's tensor, if one was given.
    pub(super) fn small_output(&self, target: Target, slot: u32, region: Region, count: usize) {
        let Target::Into(rows) = target else { return };
        if rows.rows() > 0 && count > 0 {
            let from = self.view(slot, region) as *const u8;
            // SAFETY: comm checked the caller's size; the region holds count int32.
            unsafe { std::ptr::copy_nonoverlapping(from, rows.row(0), count * 4) };
        }
    }

    fn settle_status(&self, d: &Dispatch, received: usize) {
        let bad = self.slot(d.call.slot).bad_ids;
        let count = 4 + self.ranks as usize;
        let status = self.small_region(d.call.slot, Region::Status, count);
        status.fill(0);
        status[0] = if bad > 0 { STEP_BAD_ID } else { 0 };
        status[1] = bad as i32;
        status[3] = received as i32;
        self.small_output(d.status, d.call.slot, Region::Status, count);
    }

    /// The status of a combine: `lost` is `None` for one that went well, else the ranks given up on.
    pub(super) fn write_status(&self, target: Target, slot: u32, lost: Option<&[u32]>) {
        let count = 4 + self.ranks as usize;
        let status = self.small_region(slot, Region::Status, count);
        status.fill(0);
        if let Some(lost) = lost {
            status[0] = STEP_VOID;
            for r in lost {
                status[4 + *r as usize] = 1;
            }
        }
        self.small_output(target, slot, Region::Status, count);
    }

    pub(super) fn stage(&self, c: &Combine) -> Result<()> {
        let Some(from) = &c.send else { return Ok(()) };
        let counts = self.rank_counts(c.memory);
        let size = c.hidden as usize * c.send_type.bytes();
        let mut staged = 0;
        let mut copy = |start: usize, count: usize| {
            for row in start..start + count {
                let offset = self.map.combine(c.call.slot) + (row * size) as u64;
                let to = self.bases.at(self.rank, offset, size as u64);
                // SAFETY: one row on both sides.
                unsafe { std::ptr::copy_nonoverlapping(from.row(row), to, size) };
            }
            staged += count as u64;
        };
        if self.map.sizes.gathers {
            copy(0, counts.iter().map(|c| *c as usize).sum());
        } else {
            for (r, count) in counts.iter().enumerate() {
                copy(r * c.bound as usize, *count as usize);
            }
        }
        self.count_copied(staged, size as u64);
        Ok(())
    }
}
