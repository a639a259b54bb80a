//! Combine: what its kernels are told, and which are launched.

use super::Cuda;
use super::driver::Launch;
use super::module::Kernels;
use super::params::{MeetParams, ReduceParams, StageParams, flag};
use crate::device::{Combine, Device, Float, Region, Target};
use crate::error::{Error, Result};

/// Threads of a block, as the kernels have it.
const STAGE_THREADS: u32 = 256;
const MEET_THREADS: u32 = 128;
const SUM_THREADS: u32 = 128;

impl Cuda {
    fn is_gathered(&self) -> bool {
        self.map.sizes.uses.published
    }

    fn result_bytes(c: &Combine) -> u64 {
        c.hidden as u64 * c.send_type.bytes() as u64
    }

    /// Copies the experts' rows to where peers can read them, unless they were written there.
    pub(super) fn launch_stage(&self, c: &Combine) -> Result<()> {
        if c.send.is_none() && c.row_weights.is_none() {
            return Ok(());
        }
        let slot = c.call.slot;
        let params = StageParams {
            seat: self.seat(&c.call, c.grid.bound, false),
            kept_counts: self.list(c.memory, self.routing.rank_counts),
            rows: c.send.map_or(0, |rows| rows.ptr as u64),
            stride: c.send.map_or(0, |rows| rows.stride as u64),
            to_rows: self.map.combine(slot),
            weights: c.row_weights.map_or(0, |rows| rows.ptr as u64),
            weights_stride: c.row_weights.map_or(0, |rows| rows.stride as u64),
            to_weights: self.map.combine_weights(slot),
            vectors: (Self::result_bytes(c) / 16) as u32,
            weight_bytes: c.weight_bytes() as u32,
            flags: if self.is_gathered() { flag::GATHERED } else { 0 },
            reserved: 0,
        };
        let rows = self.ranks as u64 * c.grid.bound as u64;
        let grid = u32::try_from(rows).map_err(|_| Error::internal("more rows than a grid has blocks"))?;
        let shape = Launch { grid, block: STAGE_THREADS, ..Launch::default() };
        // SAFETY: the experts' rows, which comm checked, and this rank's own window.
        unsafe { self.launch(&self.station.kernels.stage, shape, &c.call, &params) }
    }

    fn meet_params(&self, c: &Combine, sends: bool, waits: bool) -> MeetParams {
        let staged = sends && (c.send.is_some() || c.row_weights.is_some());
        let weights = if c.row_weights.is_some() { c.weight_bytes() as u64 } else { 0 };
        let rows = if c.send.is_some() { Self::result_bytes(c) } else { 0 };
        let shape = [c.hidden, c.send_type as u32, c.has_row_weights as u32, 0];
        MeetParams {
            seat: self.seat(&c.call, c.grid.bound, false),
            status: match c.status {
                Target::View => self.view(c.call.slot, Region::Status) as u64,
                Target::Into(rows) => rows.ptr as u64,
                Target::Nothing | Target::Columns(_) => 0,
            },
            rows_for: self.list(c.memory, self.routing.rows_for),
            kept_counts: self.list(c.memory, self.routing.rank_counts),
            result_bytes: Self::result_bytes(c),
            staged_bytes: if staged { rows + weights } else { 0 },
            weight_bytes: c.weight_bytes() as u64,
            shape,
            // Rows are multiples of 16 bytes below 2^31, so the last two bits of a hidden size are zero, and the first.
            digest: c.hidden | shape[1] | shape[2] << 31,
            tokens: c.tokens,
            flags: if sends { flag::SENDS } else { 0 }
                | if waits { flag::MEET_WAITS } else { 0 }
                | if c.everyone { flag::EVERYONE } else { 0 }
                | if staged { flag::STAGED } else { 0 },
            reserved: 0,
        }
    }

    fn launch_meet(&self, c: &Combine, params: &MeetParams) -> Result<()> {
        let after_previous = params.flags & flag::STAGED != 0;
        let shape = Launch { grid: 1, block: MEET_THREADS, after_previous, ..Launch::default() };
        // SAFETY: the group's windows, the routing's memory, the caller's status.
        unsafe { self.launch(&self.station.kernels.meet, shape, &c.call, params) }
    }

    /// The first half on its own.
    pub(super) fn launch_send(&self, c: &Combine) -> Result<()> {
        self.launch_meet(c, &self.meet_params(c, true, false))
    }

    /// What is left of both halves: flags, the wait, the sums.
    pub(super) fn launch_sums(&self, c: &Combine) -> Result<()> {
        let mut meet = self.meet_params(c, !c.split, true);
        let (Some(out), true) = (&c.out, c.tokens > 0) else {
            meet.flags |= flag::SETTLES;
            return self.launch_meet(c, &meet);
        };
        let slot = c.call.slot;
        let vectors = (Self::result_bytes(c) / 16) as u32;
        let splits = vectors.div_ceil(SUM_THREADS);
        // As even as they can be; a block that meets has a warp that raises flags and one that looks.
        let block = vectors.div_ceil(splits).next_multiple_of(32).max(64);
        let blocks = c.tokens as u64 * splits as u64;
        // So few blocks may wait by themselves, beside those of every slot and of every rank on this device.
        let itself = meet.flags & flag::STAGED == 0 && blocks < self.waiting_blocks as u64;
        if !itself {
            self.launch_meet(c, &meet)?;
        }
        let params = ReduceParams {
            meet,
            owners: self.owners,
            target_ranks: self.list(c.memory, self.routing.target_ranks),
            target_rows: self.list(c.memory, self.routing.target_rows),
            kept_counts: self.list(c.memory, self.routing.rank_counts),
            ids: self.list(c.memory, self.routing.ids),
            from_rows: self.map.combine(slot),
            from_weights: self.map.combine_weights(slot),
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
                | if c.accumulate { flag::ACCUMULATE } else { 0 },
        };
        // One more meets for all.
        let blocks = blocks + itself as u64;
        let grid = u32::try_from(blocks).map_err(|_| Error::internal("more blocks than a grid has"))?;
        // Where each row of a token starts.
        let shared = 8 * if c.everyone { self.ranks } else { self.routing.fanout.max(1) };
        let shape = Launch { grid, block, shared, after_previous: !itself, ..Launch::default() };
        let kernel = self.station.kernels.sums(c.send_type, c.out_type, itself);
        // SAFETY: the caller's output, which comm checked, the routing's memory, the group's windows.
        unsafe { self.launch(kernel, shape, &c.call, &params) }
    }
}

/// Blocks of sums that may wait on a device, of every rank and slot.
pub(super) fn waiting_blocks(kernels: &Kernels, sms: u32, sharing: u32, slots: u32) -> Result<u32> {
    let mut fewest = u32::MAX;
    for from in [Float::Bf16, Float::F16, Float::F32] {
        for to in [Float::Bf16, Float::F16, Float::F32] {
            fewest = fewest.min(kernels.sums(from, to, true).blocks_per_sm(SUM_THREADS, 0)?);
        }
    }
    // Half of the device stays for what does not wait.
    Ok(fewest * sms / 2 / (sharing * slots).max(1))
}
