//! Dispatch: what its kernels are told, and which are launched.

use super::driver::Launch;
use super::params::{
    DispatchParams, FinishParams, LandParams, MOST_COUNTED, OUTS, OpenParams, Out, PushParams, QuantParams,
    Receive, Route, RouteParams, Side, TELL, TOLD_DIRECTLY, TellParams, flag, kind,
};
use super::{Cuda, lock, reciprocal, threads, within};
use crate::config::{QUANT_GROUP, QuantKind};
use crate::device::map::{COLUMN_PAD, IDS, PLANES, SCALES, SOURCE, TOKENS, WEIGHTS};
use crate::device::{Device, Dispatch, Float, Region, Rows, Target, column_shape};
use crate::error::{Error, Result};

/// Warps of a block that moves, at most.
const MOST_MOVE_WARPS: u32 = 8;
/// Threads of a block, as the kernels have it.
pub(super) const FINISH_THREADS: u32 = 128;
const ONE_THREADS: u32 = 672;
const OPEN_THREADS: u32 = 128;
/// Vectors of the piece that its warps move.
const ONE_PIECE: u32 = 64;
const LAND_THREADS: u32 = 128;
const MOST_LAND_THREADS: u32 = 512;
/// Tokens that a block of a2a_route places, which are its threads, and blocks of a cluster.
const ROUTE_TOKENS: u32 = 512;
const ROUTE_BLOCKS: u32 = 8;
const QUANT_THREADS: u32 = 256;
const MOST_QUANT_THREADS: u32 = 1024;
const TELL_THREADS: u32 = 256;

/// The blocks of so many tokens find their places themselves; where there are more, a kernel places them all, in a jitter
/// build in small steps too.
const COUNTED: u32 = if cfg!(feature = "jitter") { 8 } else { MOST_COUNTED };
/// Up to so many tokens one block does all of a dispatch.
const FEWEST: u32 = 2;

/// Choices of padding that a block writes.
const PADS_OF_A_BLOCK: u64 = 4096;
const MOST_PAD_BLOCKS: u64 = 128;

/// The widest access, up to 16 bytes, that all of some addresses and sizes allow.
pub(super) fn unit(values: &[u64]) -> u32 {
    let all = values.iter().fold(16, |all, value| all | value);
    1 << all.trailing_zeros().min(4)
}

/// What kernels treat a plane of the outputs as.
pub(super) fn kind_of(plane: usize) -> u32 {
    match plane {
        TOKENS => kind::TOKENS,
        IDS => kind::IDS,
        WEIGHTS => kind::WEIGHTS,
        SOURCE => kind::SOURCE,
        _ => kind::OTHER,
    }
}

/// 2^n is the first power not below top-k.
pub(super) fn topk_bits(d: &Dispatch) -> u32 {
    d.grid.topk.next_power_of_two().trailing_zeros()
}

/// Blocks that a landing row is split over.
fn splits(vectors: u32) -> u32 {
    vectors.div_ceil(LAND_THREADS).max(1)
}

/// Vectors of the piece of a row that a warp moves: few where tokens are few, so that many SMs have work.
fn piece(tokens: u32, vectors: u32, sms: u32) -> u32 {
    let warps = sms as u64 * 16;
    let lanes = [4, 2].into_iter().find(|lanes| tokens as u64 * vectors.div_ceil(32 * lanes) as u64 >= warps);
    32 * lanes.unwrap_or(1)
}

/// FNV-1a over the words that peers must have alike.
fn digest(words: &[u32], replays: bool) -> u32 {
    let all = words.iter().copied().chain([replays as u32]);
    all.flat_map(u32::to_le_bytes)
        .fold(0x811c_9dc5, |hash, byte| (hash ^ byte as u32).wrapping_mul(0x0100_0193))
}

impl Cuda {
    /// A plane beside the tokens, as it is pushed into peers' received rows or banks; `pitch`: of scales by column.
    pub(super) fn side(&self, slot: u32, plane: usize, bytes: u32, rows: (u64, u64), pitch: u32) -> Side {
        let (from, stride) = rows;
        Side {
            from,
            stride,
            to: self.map.received(slot, plane),
            bank: self.map.bank(slot, plane),
            bytes,
            unit: unit(&[from, stride, bytes as u64]),
            pitch: if plane == SCALES { pitch } else { 0 },
            reserved: 0,
        }
    }

    /// A kernel's blocks or jobs, or why there are none.
    fn grid(&self, blocks: u64) -> Result<u32> {
        let text =
            || format!("rank {}: a kernel of {blocks} blocks or jobs, the limit is 2^31 - 1", self.rank);
        i32::try_from(blocks).map(|blocks| blocks as u32).map_err(|_| Error::unsupported(text()))
    }

    pub(super) fn route_params(&self, d: &Dispatch) -> Route {
        let memory = d.memory;
        let rows = |rows: &Option<Rows>| rows.map_or((0, 0), |rows| (rows.ptr as u64, rows.stride as u64));
        let (ids_in, ids_stride) = if d.reuse { (0, 0) } else { rows(&d.send.planes[IDS]) };
        let (weights_in, weights_stride) = rows(&d.send.planes[WEIGHTS]);
        let mut flags = 0;
        if ids_in != 0 {
            flags |= flag::HAS_IDS;
            if d.ids_are_64 {
                flags |= flag::IDS_ARE_64;
            } else if d.grid.topk.is_multiple_of(4) && unit(&[ids_in, ids_stride]) == 16 {
                flags |= flag::IDS_ARE_VECTORS;
            }
        }
        if weights_in != 0 {
            flags |= flag::HAS_WEIGHTS;
        }
        let fours = d.grid.topk.div_ceil(4).max(1);
        Route {
            owners: self.owners,
            ids_in,
            weights_in,
            ids_stride,
            weights_stride,
            ids: self.list(memory, self.routing.ids),
            weights: self.list(memory, self.routing.weights),
            target_ranks: self.list(memory, self.routing.target_ranks),
            target_rows: self.list(memory, self.routing.target_rows),
            rows_for: self.list(memory, self.routing.rows_for),
            pair_rows: self.list(memory, self.routing.expert_rows),
            absent: self.absent(),
            tokens: d.send.tokens,
            topk: d.grid.topk,
            fanout: self.routing.fanout,
            fours,
            reciprocal: reciprocal(fours),
            flags,
        }
    }

    /// An output of a few words: the caller's, the slot's, or 0.
    pub(super) fn small(&self, target: Target, slot: u32, region: Region) -> u64 {
        match target {
            Target::View => self.view(slot, region) as u64,
            Target::Into(rows) => rows.ptr as u64,
            Target::Nothing | Target::Columns(_) => 0,
        }
    }

    pub(super) fn receive_params(&self, d: &Dispatch) -> Result<Receive> {
        let slot = d.call.slot;
        let mut flags = if self.map.sizes.uses.published { flag::GATHERS } else { 0 };
        let mut receive = Receive {
            status: self.small(d.status, slot, Region::Status),
            rank_counts: self.small(d.rank_counts, slot, Region::RankCounts),
            kept_counts: self.list(d.memory, self.routing.rank_counts),
            expert_counts: self.small(d.expert_counts, slot, Region::ExpertCounts),
            local: self.experts.count(self.rank),
            wire_bytes: d.send.wire_bytes(),
            rows: if d.call.host_waits { self.pinned.address() + self.rows_word(slot) as u64 } else { 0 },
            tokens: d.send.tokens,
            digest: digest(&d.send.shape.words(), d.reuse),
            marks: self.marks_of(slot),
            ..Receive::default()
        };
        receive.shape.copy_from_slice(&d.send.shape.words());
        if let Some(told) = d.rank_tokens {
            flags |= flag::TOLD;
            if told.len() <= TOLD_DIRECTLY {
                receive.told[..told.len()].copy_from_slice(told);
            } else {
                let to = self.private.address() + self.layout.told + (slot * self.ranks) as u64 * 4;
                self.tell(d, told, to)?;
                receive.told_more = to;
            }
        } else if d.uniform {
            flags |= flag::UNIFORM;
        }
        receive.flags = flags;
        Ok(receive)
    }

    /// Carries a list of the host's into device memory as kernels' parameters: a copy would be read again, from wherever
    /// the list then is, when a captured graph is replayed.
    fn tell(&self, d: &Dispatch, values: &[i32], to: u64) -> Result<()> {
        for (i, part) in values.chunks(TELL).enumerate() {
            let mut params =
                TellParams { to, first: (i * TELL) as u32, count: part.len() as u32, values: [0; TELL] };
            params.values[..part.len()].copy_from_slice(part);
            let shape = Launch { grid: 1, block: TELL_THREADS, ..Launch::default() };
            // SAFETY: the slot's own list.
            unsafe { self.launch(&self.station.kernels.tell, shape, &d.call, &params)? };
        }
        Ok(())
    }

    /// Where a plane comes from: the caller's tensor, or what was made of it.
    pub(super) fn source(&self, d: &Dispatch, plane: usize) -> (u64, u64) {
        if d.send.quant.is_some() && matches!(plane, TOKENS | SCALES) {
            let bytes = d.send.shape.plane_bytes;
            let start = self.scratch[d.call.slot as usize].address();
            let scales = d.grid.bound as u64 * bytes[TOKENS] as u64;
            return (start + if plane == SCALES { scales } else { 0 }, bytes[plane] as u64);
        }
        d.send.planes[plane].map_or((0, 0), |rows| (rows.ptr as u64, rows.stride as u64))
    }

    pub(super) fn quantise(&self, d: &Dispatch, from: Float, quant: QuantKind) -> Result<()> {
        let Some(rows) = &d.send.planes[TOKENS] else { return Ok(()) };
        let hidden = d.send.shape.plane_bytes[TOKENS];
        let params = QuantParams {
            from: rows.ptr as u64,
            stride: rows.stride as u64,
            to: self.source(d, TOKENS).0,
            scales: self.source(d, SCALES).0,
            tokens: d.send.tokens,
            hidden,
            scale_bytes: d.send.shape.plane_bytes[SCALES],
            flags: from as u32 | if quant == QuantKind::Fp8Ue8m0 { flag::UE8M0 } else { 0 },
        };
        let warps = d.send.tokens as u64 * hidden.div_ceil(QUANT_GROUP) as u64;
        let block = threads(&d.call, QUANT_THREADS, MOST_QUANT_THREADS);
        let blocks = warps.div_ceil(block as u64 / 32);
        if blocks == 0 {
            return Ok(());
        }
        let shape = Launch { grid: within(&d.call, self.grid(blocks)?), block, ..Launch::default() };
        // SAFETY: the caller's rows, and scratch memory for as many as the configured maximum.
        unsafe { self.launch(&self.station.kernels.quantise, shape, &d.call, &params) }
    }

    /// What a call that sends puts on the stream: where rows go, the rows, the flags; with `waits` the second half too.
    pub(super) fn launch_dispatch(&self, d: &Dispatch, waits: bool) -> Result<()> {
        let slot = d.call.slot;
        let opens = lock(&self.slots[slot as usize]).opens;
        let tokens = d.send.tokens;
        if let Some((from, quant)) = d.send.quant {
            self.quantise(d, from, quant)?;
        }
        // What this carries into memory must be there before any of the kernels that overlap.
        let receive = self.receive_params(d)?;
        // A replay knows where rows go.
        let routes = !d.reuse && tokens > COUNTED;
        let counts = !d.reuse && !routes;
        if opens {
            self.launch_open(d)?;
        }
        if routes {
            self.launch_route(d, opens)?;
        }
        let finish = if waits { flag::WAITS } else { 0 } | if counts { flag::COUNTS } else { 0 };
        let mut push = self.push_params(d, opens, routes)?;
        let kernels = &self.station.kernels;
        let pads = self.pad_blocks(d);
        // Its block holds most of a multiprocessor while it waits.
        let alone = 2 * self.sharing * self.map.sizes.slots <= self.station.sms();
        if tokens <= FEWEST && pads <= 1 && alone {
            (push.piece, push.jobs) = (ONE_PIECE, push.vectors.div_ceil(ONE_PIECE) + 1);
            let params = DispatchParams { push, receive, flags: flag::RAISES | finish, reserved: 0 };
            let shape = Launch { grid: 1, block: ONE_THREADS, after_previous: opens, ..Launch::default() };
            // SAFETY: the caller's rows, which comm checked, the routing's memory, the group's windows.
            return unsafe { self.launch(&kernels.dispatch, shape, &d.call, &params) };
        }
        // A block for each token, with a warp for each of its jobs, as far as they go.
        let parts = push.jobs.div_ceil(MOST_MOVE_WARPS);
        let shape = Launch {
            // Without tokens and without padding a block has nothing to do, and finish has a kernel before it.
            grid: self.grid((tokens as u64 + pads).max(1))?,
            parts,
            block: 32 * push.jobs.div_ceil(parts),
            after_previous: opens || routes,
            ..Launch::default()
        };
        // SAFETY: as above.
        unsafe { self.launch(&kernels.push, shape, &d.call, &push)? };
        self.launch_finish(d, receive, flag::RAISES | finish)
    }

    /// Blocks that write padding: none where rows are published.
    fn pad_blocks(&self, d: &Dispatch) -> u64 {
        if self.map.sizes.uses.published {
            return 0;
        }
        let padding = self.ranks as u64 * d.grid.bound as u64 * d.grid.topk.max(1) as u64;
        padding.div_ceil(PADS_OF_A_BLOCK).min(MOST_PAD_BLOCKS)
    }

    pub(super) fn launch_open(&self, d: &Dispatch) -> Result<()> {
        let flags = if self.is_carried() { flag::ALONE } else { 0 };
        let params = OpenParams { seat: self.seat(&d.call, d.grid.bound, d.reuse), flags, reserved: 0 };
        let shape = Launch { grid: 1, block: OPEN_THREADS, ..Launch::default() };
        // SAFETY: the group's windows.
        unsafe { self.launch(&self.station.kernels.open, shape, &d.call, &params) }
    }

    fn launch_route(&self, d: &Dispatch, follows: bool) -> Result<()> {
        let flags = if follows { flag::FOLLOWS } else { 0 };
        let slot = self.seat(&d.call, d.grid.bound, d.reuse).slot;
        let params = RouteParams { route: self.route_params(d), slot, ranks: self.ranks, flags };
        let grid = d.send.tokens.div_ceil(ROUTE_TOKENS).next_multiple_of(ROUTE_BLOCKS);
        let shape = Launch { grid, block: ROUTE_TOKENS, after_previous: follows, ..Launch::default() };
        // SAFETY: the caller's ids, and the routing's memory.
        unsafe { self.launch(&self.station.kernels.route, shape, &d.call, &params) }
    }

    pub(super) fn push_params(&self, d: &Dispatch, follows: bool, routed: bool) -> Result<PushParams> {
        let slot = d.call.slot;
        let publishes = self.map.sizes.uses.published;
        let tokens = d.send.tokens;
        let bytes = d.send.shape.plane_bytes;
        let region = |plane| match publishes {
            true => self.map.published(slot, plane),
            false => self.map.received(slot, plane),
        };
        // Collectives take the rows, but for what is beside them.
        let vectors = if self.is_carried() { 0 } else { bytes[TOKENS] / 16 };
        let piece = piece(tokens, vectors, self.station.sms() / self.sharing.max(1));
        let (from, stride) = self.source(d, TOKENS);
        let mut params = PushParams {
            seat: self.seat(&d.call, d.grid.bound, d.reuse),
            route: self.route_params(d),
            tokens: from,
            token_stride: stride,
            to_tokens: region(TOKENS),
            to_ids: region(IDS),
            to_weights: region(WEIGHTS),
            to_source: region(SOURCE),
            row_base: if publishes { 0 } else { self.rank as u64 * d.grid.bound as u64 },
            vectors,
            piece,
            // The last job of a token is what travels beside its row.
            jobs: vectors.div_ceil(piece) + 1,
            counted: if d.reuse { 0 } else { tokens.min(COUNTED) },
            flags: if follows { flag::FOLLOWS } else { 0 }
                | if publishes { flag::PUBLISHES } else { 0 }
                | if routed { flag::ROUTED } else { 0 },
            ..PushParams::default()
        };
        for (plane, &bytes) in bytes.iter().enumerate().skip(SCALES).filter(|(_, bytes)| **bytes > 0) {
            if self.is_carried() && self.goes_as_it_is(d, plane).is_some() {
                continue;
            }
            let (from, stride) = self.source(d, plane);
            let pitch = match d.columns && !publishes {
                true => d.grid.bound.next_multiple_of(COLUMN_PAD as u32),
                false => 0,
            };
            let side = self.side(slot, plane, bytes, (from, stride), pitch);
            params.side[params.sides as usize] = Side { to: region(plane), ..side };
            params.sides += 1;
        }
        Ok(params)
    }

    /// The second half on its own.
    pub(super) fn launch_receive(&self, d: &Dispatch) -> Result<()> {
        let receive = self.receive_params(d)?;
        self.launch_finish(d, receive, flag::WAITS)
    }

    /// The flags: those of this rank, which go up when the kernel before is done, those of the peers, or both.
    fn launch_finish(&self, d: &Dispatch, receive: Receive, flags: u32) -> Result<()> {
        let params = FinishParams {
            seat: self.seat(&d.call, d.grid.bound, d.reuse),
            route: self.route_params(d),
            receive,
            flags,
            ..FinishParams::default()
        };
        let after_previous = flags & flag::RAISES != 0;
        let shape = Launch { grid: 1, block: FINISH_THREADS, after_previous, ..Launch::default() };
        // SAFETY: as `launch_dispatch`.
        unsafe { self.launch(&self.station.kernels.finish, shape, &d.call, &params) }
    }

    /// Rows to where they are wanted, if they are not there.
    pub(super) fn launch_land(&self, d: &Dispatch) -> Result<()> {
        let slot = d.call.slot;
        let gathers = self.map.sizes.uses.published;
        // Each rank's rows in its own window.
        let apart = gathers && !self.is_carried();
        let bytes = d.send.shape.plane_bytes;
        let wide = d.ids_out_are_64;
        let pairs = d.grid.layout.by_expert();
        let mut params = LandParams {
            seat: self.seat(&d.call, d.grid.bound, d.reuse),
            owners: self.owners,
            kept_counts: self.kept_counts(d.memory),
            ids_region: if apart { self.map.published(slot, IDS) } else { self.map.received(slot, IDS) },
            // The counts of pairs are known without looking at ids.
            expert_counts: if pairs { 0 } else { self.small(d.expert_counts, slot, Region::ExpertCounts) },
            expert_stats: d.expert_stats.filter(|_| !pairs).map_or(0, |rows| rows.ptr as u64),
            starts: self.block_starts(d.memory),
            rows: d.capacity as u64,
            block: if gathers { 1 } else { d.grid.block().unwrap_or(d.capacity as u64) as u32 },
            topk: d.grid.topk,
            outs: 0,
            flags: if gathers { flag::GATHERED } else { 0 }
                | if apart || !gathers { 0 } else { flag::TOGETHER }
                | if d.zero_padding { flag::ZERO_PADDING } else { 0 }
                | if wide { flag::WIDE_IDS } else { 0 },
            splits: 1,
            blocks: d.grid.blocks(self.experts.count(self.rank)),
            out: [Out::default(); OUTS],
        };
        for plane in 0..PLANES {
            let row_bytes = d.row_bytes(plane) as u64;
            let by_column = plane == SCALES && d.columns;
            let from = match apart {
                true => self.map.published(slot, plane),
                false if self.is_carried() && by_column => self.map.brought_scales(slot),
                false => self.map.received(slot, plane),
            };
            let mut kind = kind_of(plane);
            let received = self.own(self.map.received(slot, plane));
            let local = self.experts.count(self.rank);
            let (_, _, view_pitch) = column_shape(&d.grid, local, d.capacity as u64);
            let elements = bytes[plane] as u64 / 4;
            let (to, stride, pitch, block_stride) = match d.recv[plane] {
                Target::Nothing => continue,
                // What was pushed is in place; what is padding was marked by its source, but for zeroes.
                Target::View
                    if !gathers && (!d.zero_padding || kind != kind::TOKENS && kind != kind::OTHER) =>
                {
                    continue;
                }
                Target::View if by_column => (received, 0, view_pitch, elements * view_pitch * 4),
                Target::View => (received, row_bytes, 0, 0),
                Target::Into(rows) => (rows.ptr as u64, rows.stride as u64, 0, 0),
                Target::Columns(c) => (c.ptr as u64, 0, c.column_stride as u64 / 4, c.block_stride as u64),
            };
            if self.is_carried() && plane != SOURCE && pitch == 0 && to == self.brought_to(d, plane) {
                continue;
            }
            if !gathers && matches!(d.recv[plane], Target::View) {
                kind |= kind::IN_PLACE;
            }
            let wire = if pairs || plane == SOURCE { row_bytes as u32 } else { bytes[plane] };
            params.out[params.outs as usize] = Out {
                region: from,
                to,
                stride,
                bytes: wire,
                unit: unit(&[to, stride, wire as u64]),
                pitch,
                block_stride,
                from_pitch: if by_column && !gathers { view_pitch as u32 } else { 0 },
                kind,
            };
            params.outs += 1;
            if plane == TOKENS {
                params.splits = if d.call.max_sms > 0 { 1 } else { splits(bytes[TOKENS] / 16) };
            }
        }
        let counts = params.expert_counts != 0 || params.expert_stats != 0;
        if (params.outs == 0 && !counts) || params.rows == 0 {
            return Ok(());
        }
        let grid = within(&d.call, self.grid(params.rows * params.splits as u64)?);
        let block = threads(&d.call, LAND_THREADS, MOST_LAND_THREADS);
        let shape = Launch { grid, block, after_previous: self.is_carried(), ..Launch::default() };
        // SAFETY: the caller's outputs, which comm checked, and the group's windows.
        unsafe { self.launch(&self.station.kernels.land, shape, &d.call, &params) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn units_are_what_every_address_allows() {
        assert_eq!(unit(&[0x1000, 64, 32]), 16);
        assert_eq!(unit(&[0x1000, 92, 92]), 4);
        assert_eq!(unit(&[0x1000, 6]), 2);
        assert_eq!(unit(&[0x1001, 16]), 1);
        assert_eq!(unit(&[0x1008]), 8);
    }
}
