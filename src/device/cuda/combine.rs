//! Combine: what its kernels are told, and which are launched.

use super::driver::Launch;
use super::module::Kernels;
use super::params::{MeetParams, ReduceParams, StageParams, flag};
use super::{Cuda, threads, within};
use crate::device::{Combine, Device, Float, Region, Rows, Target, Weighting};
use crate::error::{Error, Result};

/// Threads of a block, as the kernels have it.
const STAGE_THREADS: u32 = 256;
const MOST_STAGE_THREADS: u32 = 1024;
/// Where blocks share a block of rows.
const STAGE_BLOCKS_PER_SM: u64 = 32;
const MEET_THREADS: u32 = 128;
const SUM_THREADS: u32 = 128;
const MOST_SUM_THREADS: u32 = 768;

impl Cuda {
    fn is_gathered(&self) -> bool {
        self.map.sizes.uses.published
    }

    pub(super) fn result_bytes(c: &Combine) -> u64 {
        c.hidden as u64 * c.send_type.bytes() as u64
    }

    /// Results are weighted, one for each (token, expert) pair.
    fn weighs(c: &Combine) -> bool {
        c.grid.layout.by_expert()
    }

    /// Weights that were given to a half of its own are kept for the other.
    pub(super) fn keep_weights(&self, c: &Combine) -> Result<()> {
        let Some(weights) = c.weights.filter(|_| c.split && c.tokens > 0) else { return Ok(()) };
        let bytes = c.grid.topk as usize * 4;
        let to = self.list(c.memory, self.routing.given);
        let _entered = self.station.context.enter()?;
        let stream = self.stream_of(c.call.stream);
        // SAFETY: as many rows as comm checked, and a list for the most there can be.
        unsafe {
            stream.copy_rows((to, bytes), (weights.ptr as u64, weights.stride), bytes, c.tokens as usize)
        }
    }

    /// Where the weights of a sum are, and how far apart a token's are from the next's; 0 if there are none.
    fn weights_of(&self, c: &Combine) -> (u64, u64) {
        let stride = c.grid.topk as u64 * 4;
        match (c.weighting, c.weights) {
            (Weighting::None, _) => (0, 0),
            (Weighting::Dispatched, _) => (self.list(c.memory, self.routing.weights), stride),
            (Weighting::Given, Some(rows)) if !c.split => (rows.ptr as u64, rows.stride as u64),
            (Weighting::Given, _) => (self.list(c.memory, self.routing.given), stride),
        }
    }

    /// The experts' rows, if they are copied to where peers can read them.
    fn staged_rows(&self, c: &Combine) -> Option<Rows> {
        c.send.filter(|_| !self.is_carried() || self.copies_results(c))
    }

    /// Copies the experts' rows to where peers can read them, unless they were written there.
    pub(super) fn launch_stage(&self, c: &Combine) -> Result<()> {
        let rows = self.staged_rows(c);
        if rows.is_none() && c.row_weights.is_none() {
            return Ok(());
        }
        let slot = c.call.slot;
        let local = self.experts.count(self.rank);
        let (blocks, block) = match self.is_gathered() {
            // As many as there can be.
            true => (self.ranks as u64 * c.grid.bound as u64, 1),
            false => {
                let all = c.grid.capacity(local);
                (c.grid.blocks(local) as u64, c.grid.block().unwrap_or(all))
            }
        };
        // The block of an expert, or of all, is rarely full: those that share it take what there is in turn.
        let spread = match Self::weighs(c) || self.is_packed() {
            true => block.min((STAGE_BLOCKS_PER_SM * self.station.sms() as u64).div_ceil(blocks.max(1))),
            false => block,
        };
        let text = || Error::internal("more rows than a grid has blocks");
        let units = u32::try_from(blocks * spread).map_err(|_| text())?;
        let params = StageParams {
            seat: self.seat(&c.call, c.grid.bound, false),
            kept_counts: self.kept_counts(c.memory),
            starts: self.block_starts(c.memory),
            rows: rows.map_or(0, |rows| rows.ptr as u64),
            stride: rows.map_or(0, |rows| rows.stride as u64),
            to_rows: self.map.combine(slot),
            weights: c.row_weights.map_or(0, |rows| rows.ptr as u64),
            weights_stride: c.row_weights.map_or(0, |rows| rows.stride as u64),
            to_weights: self.map.combine_weights(slot),
            vectors: (Self::result_bytes(c) / 16) as u32,
            weight_bytes: c.weight_bytes() as u32,
            flags: if self.is_gathered() { flag::GATHERED } else { 0 },
            block: block as u32,
            spread: spread as u32,
            units,
        };
        if units == 0 {
            return Ok(());
        }
        let block = threads(&c.call, STAGE_THREADS, MOST_STAGE_THREADS);
        let shape = Launch { grid: within(&c.call, units), block, ..Launch::default() };
        // SAFETY: the experts' rows, which comm checked, and this rank's own window.
        unsafe { self.launch(&self.station.kernels.stage, shape, &c.call, &params) }
    }

    pub(super) fn meet_params(&self, c: &Combine, sends: bool, waits: bool) -> MeetParams {
        let staged = sends && !self.is_posted() && (self.staged_rows(c).is_some() || c.row_weights.is_some());
        // What goes back beside a result is posted with it.
        let beside = if self.is_posted() && c.row_weights.is_some() { 4 } else { 0 };
        let weights = if c.row_weights.is_some() { c.weight_bytes() as u64 } else { 0 };
        let rows = if self.staged_rows(c).is_some() { Self::result_bytes(c) } else { 0 };
        let shape = [c.hidden, c.send_type as u32, c.has_row_weights as u32, c.wire_sums as u32];
        MeetParams {
            seat: self.seat(&c.call, c.grid.bound, false),
            status: match c.status {
                Target::View => self.view(c.call.slot, Region::Status) as u64,
                Target::Into(rows) => rows.ptr as u64,
                Target::Nothing | Target::Columns(_) => 0,
            },
            rows_for: self.list(
                c.memory,
                if self.is_contiguous() { self.routing.pairs_for } else { self.routing.rows_for },
            ),
            kept_counts: self.list(c.memory, self.routing.rank_counts),
            summary: if Self::weighs(c) || self.is_packed() {
                self.list(c.memory, self.routing.summary)
            } else {
                0
            },
            result_bytes: Self::result_bytes(c) + beside,
            staged_bytes: if staged { rows + weights } else { 0 },
            weight_bytes: c.weight_bytes() as u64,
            shape,
            // Rows are multiples of 16 bytes below 2^31, so the last two bits of a hidden size are zero, and the first two.
            digest: c.hidden | shape[1] | shape[2] << 31 | shape[3] << 30,
            tokens: c.tokens,
            flags: if sends { flag::SENDS } else { 0 }
                | if waits { flag::MEET_WAITS } else { 0 }
                | if c.everyone { flag::EVERYONE } else { 0 }
                | if staged { flag::STAGED } else { 0 }
                | if self.is_posted() { flag::RESULTS_POSTED } else { 0 },
            reserved: 0,
            marks: self.marks_of(c.call.slot),
        }
    }

    fn launch_meet(&self, c: &Combine, params: &MeetParams) -> Result<()> {
        let after_previous = params.flags & flag::STAGED != 0 || self.is_carried();
        let shape = Launch { grid: 1, block: MEET_THREADS, after_previous, ..Launch::default() };
        // SAFETY: the group's windows, the routing's memory, the caller's status.
        unsafe { self.launch(&self.station.kernels.meet, shape, &c.call, params) }
    }

    /// The first half on its own.
    pub(super) fn launch_send(&self, c: &Combine) -> Result<()> {
        self.launch_meet(c, &self.meet_params(c, true, false))?;
        match &self.wire {
            Some(wire) => self.carry_results(wire, c),
            None => Ok(()),
        }
    }

    /// What is left of both halves: flags, the wait, the sums.
    pub(super) fn launch_sums(&self, c: &Combine) -> Result<()> {
        if self.is_carried() && !c.split {
            self.launch_send(c)?;
        }
        let sends = !c.split && !self.is_carried() && !self.is_posted();
        let mut meet = self.meet_params(c, sends, true);
        let sums = c.tokens > 0 && self.takes_sums(c).is_none();
        let (Some(out), true) = (&c.out, sums) else {
            meet.flags |= flag::SETTLES;
            return self.launch_meet(c, &meet);
        };
        let slot = c.call.slot;
        let vectors = (Self::result_bytes(c) / 16) as u32;
        let most = threads(&c.call, SUM_THREADS, MOST_SUM_THREADS);
        let mut splits = vectors.div_ceil(most);
        // So many blocks of a token may wait by themselves, beside those of every slot and of every rank on this device; a
        // thread that sums two vectors takes less time than a kernel before it.
        let waiting = self.waiting_blocks.saturating_sub(1) / c.tokens;
        // What a collective carries has come before any of them begins.
        let may = self.is_carried() || meet.flags & flag::STAGED == 0 && waiting >= splits.div_ceil(2);
        let itself = may && c.call.max_sms == 0 && !self.is_posted();
        if itself && !self.is_carried() {
            splits = splits.min(waiting);
        }
        // As even as they can be; a block that meets has a warp that raises flags and one that looks.
        let block = vectors.div_ceil(splits).next_multiple_of(32).clamp(64, most);
        let blocks = c.tokens as u64 * splits as u64;
        if !itself {
            self.launch_meet(c, &meet)?;
        }
        if self.is_posted() {
            self.launch_bring(c)?;
        }
        let (weights, weights_stride) = self.weights_of(c);
        let mut params = ReduceParams {
            meet,
            owners: self.owners,
            target_ranks: self.list(c.memory, self.routing.target_ranks),
            target_rows: self.list(c.memory, self.routing.target_rows),
            kept_counts: self.list(c.memory, self.routing.rank_counts),
            ids: self.list(c.memory, self.routing.ids),
            pair_rows: self.list(c.memory, self.routing.expert_rows),
            weights,
            weights_stride,
            from_rows: if self.is_carried() { self.map.brought(slot) } else { self.map.combine(slot) },
            from_weights: match self.is_carried() {
                true => self.map.brought_weights(slot),
                false => self.map.combine_weights(slot),
            },
            out: out.ptr as u64,
            out_stride: out.stride as u64,
            out_weights: c.out_weights.map_or(0, |rows| rows.ptr as u64),
            out_weights_stride: c.out_weights.map_or(0, |rows| rows.stride as u64),
            row_bytes: Self::result_bytes(c),
            tokens: c.tokens,
            fanout: self.routing.fanout,
            topk: c.grid.topk,
            vectors,
            splits,
            flags: if self.is_gathered() { flag::REDUCE_GATHERED } else { 0 }
                | if c.everyone { flag::REDUCE_EVERYONE } else { 0 }
                | if self.is_flat() { flag::REDUCE_PACKED } else { 0 }
                | if c.accumulate { flag::ACCUMULATE } else { 0 }
                | if self.is_carried() { flag::REDUCE_BROUGHT } else { 0 }
                | if c.wire_sums { flag::REDUCE_SUMMED } else { 0 },
            own: if self.is_carried() { self.own_results(c) } else { 0 },
        };
        if self.is_posted() {
            self.sums_of_brought(c, &mut params);
        }
        // One more meets for all.
        let blocks = blocks + itself as u64;
        let grid = u32::try_from(blocks).map_err(|_| Error::internal("more blocks than a grid has"))?;
        let grid = within(&c.call, grid);
        // Where each row of a token starts.
        let places = if Self::weighs(c) { c.grid.topk } else { self.routing.fanout };
        let shared = 8 * if c.everyone { self.ranks } else { places.max(1) };
        let after_previous = !itself || self.is_carried();
        let shape = Launch { grid, block, shared, after_previous, ..Launch::default() };
        let kernel = self.station.kernels.sums(c.send_type, c.out_type, Self::weighs(c), itself);
        // SAFETY: the caller's output, which comm checked, the routing's memory, the group's windows.
        unsafe { self.launch(kernel, shape, &c.call, &params) }
    }
}

/// Blocks of sums that may wait on a device, of every rank and slot.
pub(super) fn waiting_blocks(kernels: &Kernels, sms: u32, sharing: u32, slots: u32) -> Result<u32> {
    let mut fewest = u32::MAX;
    for from in [Float::Bf16, Float::F16, Float::F32] {
        for to in [Float::Bf16, Float::F16, Float::F32] {
            for weighs in [false, true] {
                fewest = fewest.min(kernels.sums(from, to, weighs, true).blocks_per_sm(SUM_THREADS, 0)?);
            }
        }
    }
    // Half of the device stays for what does not wait: see pairs.rs.
    Ok(fewest * sms / 2 / (sharing * slots).max(1))
}
