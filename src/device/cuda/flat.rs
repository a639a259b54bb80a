//! Dispatch of packed rows, (token, rank) pairs without gaps or (token, expert) pairs expert after expert: places by
//! everybody's counts, then copies by few multiprocessors. What is for the latter alone is in contiguous.rs.

use super::dispatch::FINISH_THREADS;
use super::driver::Launch;
use super::params::{
    Blocks, Counts, FinishParams, PlaceParams, PushParams, Receive, SettleParams, Side, flag,
};
use super::{Cuda, within};
use crate::config::{LayoutKind, OverflowKind};
use crate::device::map::{COLUMN_PAD, IDS, SCALES, SOURCE, TOKENS, WEIGHTS};
use crate::device::{Dispatch, Target};
use crate::error::Result;

/// Threads of a block, as the kernels have it.
const PLACE_THREADS: u32 = if cfg!(feature = "jitter") { 64 } else { 512 };
const CARRY_WARPS: u32 = 14;
const BESIDE_WARPS: u32 = 8;
const CARRY_THREADS: u32 = 32 * (CARRY_WARPS + BESIDE_WARPS);
const CARRY_STAGES: u32 = 2;
const SETTLE_THREADS: u32 = 512;
/// Vectors of the largest piece of a row that a warp carries.
const MOST_PIECE: u32 = 448;
/// Shared memory of a block whose warps carry the largest pieces: a multiprocessor has room for one.
pub(super) const CARRY_SHARED: u32 = CARRY_WARPS * CARRY_STAGES * MOST_PIECE * 16;

/// Multiprocessors, and so blocks, that carry rows unless a call says how many: they take three times a link's rate.
const SMS: u32 = 20;

fn carriers(d: &Dispatch) -> u32 {
    if d.call.max_sms > 0 { d.call.max_sms } else { SMS }
}

impl Cuda {
    pub(super) fn is_flat(&self) -> bool {
        self.map.sizes.grid.layout == LayoutKind::Flat
    }

    /// Rows are those of one list.
    pub(super) fn is_packed(&self) -> bool {
        self.is_flat() || self.is_contiguous()
    }

    /// What goes before the kernels of a dispatch whose rows are those of one list; whether a dispatch may follow a dispatch.
    pub(super) fn begin_packed(&self, d: &Dispatch, sends: bool) -> Result<(Receive, bool)> {
        let opens = sends && super::lock(&self.slots[d.call.slot as usize]).opens;
        if let Some((from, quant)) = d.send.quant.filter(|_| sends) {
            self.quantise(d, from, quant)?;
        }
        // What this carries into memory must be there before any of the kernels that overlap.
        let receive = self.receive_params(d)?;
        if opens {
            self.launch_open(d)?;
        }
        Ok((receive, opens))
    }

    /// `sends`: the first half; `waits`: the second.
    pub(super) fn launch_packed(&self, d: &Dispatch, sends: bool, waits: bool) -> Result<()> {
        let banks = sends && !waits && !d.reuse;
        let (receive, opens) = self.begin_packed(d, sends)?;
        let halves = if sends { flag::RAISES } else { 0 } | if waits { flag::WAITS } else { 0 };
        if !d.reuse {
            self.launch_place(d, halves, opens)?;
        }
        if sends {
            self.launch_carry(d, banks, opens)?;
        }
        let banked = if banks { flag::BANKED } else { 0 };
        let ends = if self.is_contiguous() { flag::ENDS } else { 0 };
        let finish = self.packed_finish(d, receive, halves | banked | ends);
        let shape = Launch { grid: 1, block: FINISH_THREADS, after_previous: sends, ..Launch::default() };
        // SAFETY: the group's windows, the routing's memory, the caller's outputs, which comm checked.
        unsafe { self.launch(&self.station.kernels.finish, shape, &d.call, &finish)? };
        match waits {
            true if self.is_contiguous() => self.launch_spread(d),
            true => self.launch_settle(d),
            false => Ok(()),
        }
    }

    /// Rows of a rank that are too many, or 0.
    pub(super) fn packed_limit(&self, d: &Dispatch) -> u32 {
        if d.overflow == OverflowKind::Error { d.grid.limit as u32 } else { 0 }
    }

    /// Tells counts, or hears them, or both, and finds places.
    pub(super) fn launch_place(&self, d: &Dispatch, halves: u32, opens: bool) -> Result<()> {
        let place = self.place_params(d, halves, opens);
        if self.is_contiguous() {
            return self.launch_place_experts(d, place, opens);
        }
        let shape = Launch { grid: 1, block: PLACE_THREADS, after_previous: opens, ..Launch::default() };
        // SAFETY: the caller's ids, the routing's memory, the group's windows.
        unsafe { self.launch(&self.station.kernels.place, shape, &d.call, &place) }
    }

    /// The end of a dispatch whose places follow from everybody's counts.
    pub(super) fn packed_finish(&self, d: &Dispatch, receive: Receive, flags: u32) -> FinishParams {
        FinishParams {
            seat: self.seat(&d.call, d.grid.bound, d.reuse),
            route: self.route_params(d),
            receive,
            summary: self.list(d.memory, self.routing.summary),
            demands: self.list(d.memory, self.routing.demands),
            limit: self.packed_limit(d),
            flags,
        }
    }

    pub(super) fn place_params(&self, d: &Dispatch, halves: u32, opens: bool) -> PlaceParams {
        let list = |list| self.list(d.memory, list);
        let mut route = self.route_params(d);
        if halves & flag::RAISES == 0 {
            // The caller's ids may be gone: those that were kept.
            let stride = route.topk as u64 * 4;
            (route.ids_in, route.ids_stride) = (route.ids, stride);
            route.flags = if route.topk.is_multiple_of(4) { flag::IDS_ARE_VECTORS } else { 0 };
        }
        PlaceParams {
            seat: self.seat(&d.call, d.grid.bound, false),
            route,
            counts: Counts { region: self.map.counts(d.call.slot, 0), stride: self.map.count_stride() },
            kept_counts: list(self.routing.rank_counts),
            received: list(self.routing.counts),
            summary: list(self.routing.summary),
            demands: list(self.routing.demands),
            room: self.room(d),
            limit: self.packed_limit(d),
            flags: halves
                | if opens { flag::AFTER_OPEN } else { 0 }
                | if self.is_streamed() { flag::FROM_ZERO } else { 0 },
            reserved: 0,
        }
    }

    /// Rows from here on are dropped, on every rank alike: without a limit there is room for all that there can be.
    pub(super) fn room(&self, d: &Dispatch) -> u32 {
        if d.grid.limit > 0 { d.grid.limit as u32 } else { u32::MAX }
    }

    fn launch_carry(&self, d: &Dispatch, banks: bool, opens: bool) -> Result<()> {
        let slot = d.call.slot;
        let bytes = d.send.shape.plane_bytes;
        // What follows from experts goes to the banks in any case.
        let split = self.is_contiguous();
        let in_bank = |plane| banks || (split && matches!(plane, IDS | WEIGHTS | SOURCE));
        let region =
            |plane| if in_bank(plane) { self.map.bank(slot, plane) } else { self.map.received(slot, plane) };
        let vectors = bytes[TOKENS] / 16;
        let jobs = vectors.div_ceil(MOST_PIECE).max(1);
        let piece = vectors.div_ceil(jobs);
        let (tokens, token_stride) = self.source(d, TOKENS);
        let mut params = PushParams {
            seat: self.seat(&d.call, d.grid.bound, d.reuse),
            route: self.route_params(d),
            tokens,
            token_stride,
            to_tokens: region(TOKENS),
            to_ids: region(IDS),
            to_weights: region(WEIGHTS),
            to_source: region(SOURCE),
            vectors,
            piece,
            jobs,
            flags: flag::PACKED | if opens { flag::FOLLOWS } else { 0 },
            bank_rows: if split && !banks { self.list(d.memory, self.routing.expert_keys) } else { 0 },
            to_places: self.map.bank_places(slot),
            blocks: if split { self.blocks(d) } else { Blocks::default() },
            ..PushParams::default()
        };
        for side in self.packed_sides(d) {
            let side = if banks { Side { to: side.bank, pitch: 0, ..side } } else { side };
            params.side[params.sides as usize] = side;
            params.sides += 1;
        }
        let items = d.send.tokens as u64 * jobs as u64;
        let grid = items.div_ceil(CARRY_WARPS as u64).clamp(1, carriers(d) as u64) as u32;
        let shape = Launch {
            grid,
            block: CARRY_THREADS,
            shared: CARRY_WARPS * CARRY_STAGES * piece * 16,
            after_previous: !d.reuse || opens,
            ..Launch::default()
        };
        // SAFETY: the caller's rows, which comm checked, the routing's memory, the group's windows.
        unsafe { self.launch(&self.station.kernels.carry, shape, &d.call, &params) }
    }

    /// The planes beside tokens, ids, weights and sources.
    fn packed_sides(&self, d: &Dispatch) -> impl Iterator<Item = Side> {
        let slot = d.call.slot;
        // A rank without experts sends by column too.
        let pitch = if d.columns { d.capacity.max(1).next_multiple_of(COLUMN_PAD as u32) } else { 0 };
        let planes = d.send.shape.plane_bytes.into_iter().enumerate().skip(SCALES);
        planes
            .filter(|(_, bytes)| *bytes > 0)
            .map(move |(plane, bytes)| self.side(slot, plane, bytes, self.source(d, plane), pitch))
    }

    fn launch_settle(&self, d: &Dispatch) -> Result<()> {
        let params = self.settle_params(d);
        let shape = Launch { grid: within(&d.call, SMS), block: SETTLE_THREADS, ..Launch::default() };
        // SAFETY: this rank's own window and the routing's memory.
        unsafe { self.launch(&self.station.kernels.settle, shape, &d.call, &params) }
    }

    pub(super) fn settle_params(&self, d: &Dispatch) -> SettleParams {
        let slot = d.call.slot;
        let pads = |plane: usize, flag: u32| if matches!(d.recv[plane], Target::View) { flag } else { 0 };
        let (to, bank) = (|plane| self.map.received(slot, plane), |plane| self.map.bank(slot, plane));
        let mut params = SettleParams {
            seat: self.seat(&d.call, d.grid.bound, d.reuse),
            kept_counts: self.list(d.memory, self.routing.rank_counts),
            to_tokens: to(TOKENS),
            to_ids: to(IDS),
            to_weights: to(WEIGHTS),
            to_source: to(SOURCE),
            bank_tokens: bank(TOKENS),
            bank_ids: bank(IDS),
            bank_weights: bank(WEIGHTS),
            bank_source: bank(SOURCE),
            rows: d.capacity as u64,
            vectors: d.send.shape.plane_bytes[TOKENS] / 16,
            topk: d.grid.topk,
            flags: pads(IDS, flag::PAD_IDS)
                | pads(WEIGHTS, flag::PAD_WEIGHTS)
                | pads(SOURCE, flag::PAD_SOURCE),
            ..SettleParams::default()
        };
        for side in self.packed_sides(d) {
            // From a bank, whose rows begin at any multiple of their size.
            let unit = super::dispatch::unit(&[side.bank, side.bytes as u64]);
            params.side[params.sides as usize] = Side { unit, ..side };
            params.sides += 1;
        }
        params
    }
}
