//! Dispatch: what its kernels are told, and which are launched.

use super::driver::Launch;
use super::params::{
    LandParams, OUTS, Out, PushParams, QuantParams, Receive, ReceiveParams, Route, RouteParams, SIDES, Side,
    TELL, TOLD_DIRECTLY, TellParams, flag, kind,
};
use super::{Cuda, lock};
use crate::config::{QUANT_GROUP, QuantKind};
use crate::device::map::{COLUMN_PAD, IDS, PLANES, SCALES, SOURCE, TOKENS, WEIGHTS};
use crate::device::{Device, Dispatch, Float, Region, Rows, Target, column_shape};
use crate::error::{Error, Result};

/// Threads of a block, as the kernels have it.
const MOVE_THREADS: u32 = 256;
const MOVE_WARPS: u32 = MOVE_THREADS / 32;
const RECEIVE_THREADS: u32 = 128;
const LAND_THREADS: u32 = 128;
/// Tokens that a2a_route counts together, and its threads.
pub(super) const CHUNK: u32 = 128;
const QUANT_THREADS: u32 = 256;

/// Up to so many tokens each block counts all earlier ones itself; past it a kernel counts them by chunks first,
/// in a jitter build of small steps too.
const ROUTES_ITSELF: u32 = if cfg!(feature = "jitter") { 8 } else { 256 };

/// Threads' worth of padding that a block writes.
const PADS_OF_A_BLOCK: u64 = 16 * MOVE_THREADS as u64;
const MOST_PAD_BLOCKS: u64 = 128;

/// The widest access, up to 16 bytes, that all of some addresses and sizes allow.
fn unit(values: &[u64]) -> u32 {
    let all = values.iter().fold(16, |all, value| all | value);
    1 << all.trailing_zeros().min(4)
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
    /// A kernel's blocks or jobs, or why there are none.
    fn grid(&self, blocks: u64) -> Result<u32> {
        let text =
            || format!("rank {}: a kernel of {blocks} blocks or jobs, the limit is 2^31 - 1", self.rank);
        i32::try_from(blocks).map(|blocks| blocks as u32).map_err(|_| Error::unsupported(text()))
    }

    fn route_params(&self, d: &Dispatch, chunked: bool) -> Route {
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
            chunks: if chunked { self.private.address() + self.layout.chunks(d.call.slot) } else { 0 },
            tokens: d.send.tokens,
            topk: d.grid.topk,
            fanout: self.routing.fanout,
            flags,
        }
    }

    /// An output of a few words: the caller's, the slot's, or 0.
    fn small(&self, target: Target, slot: u32, region: Region) -> u64 {
        match target {
            Target::View => self.view(slot, region) as u64,
            Target::Into(rows) => rows.ptr as u64,
            Target::Nothing | Target::Columns(_) => 0,
        }
    }

    fn receive_params(&self, d: &Dispatch) -> Result<Receive> {
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
            let shape = Launch { grid: 1, block: MOVE_THREADS, ..Launch::default() };
            // SAFETY: the slot's own list.
            unsafe { self.launch(&self.station.kernels.tell, shape, &d.call, &params)? };
        }
        Ok(())
    }

    /// Where a plane comes from: the caller's tensor, or what was made of it.
    fn source(&self, d: &Dispatch, plane: usize) -> (u64, u64) {
        if d.send.quant.is_some() && matches!(plane, TOKENS | SCALES) {
            let bytes = d.send.shape.plane_bytes;
            let start = self.scratch[d.call.slot as usize].address();
            let scales = d.grid.bound as u64 * bytes[TOKENS] as u64;
            return (start + if plane == SCALES { scales } else { 0 }, bytes[plane] as u64);
        }
        d.send.planes[plane].map_or((0, 0), |rows| (rows.ptr as u64, rows.stride as u64))
    }

    fn quantise(&self, d: &Dispatch, from: Float, quant: QuantKind) -> Result<()> {
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
        let blocks = warps.div_ceil(QUANT_THREADS as u64 / 32);
        if blocks == 0 {
            return Ok(());
        }
        let shape = Launch { grid: self.grid(blocks)?, block: QUANT_THREADS, ..Launch::default() };
        // SAFETY: the caller's rows, and scratch memory for as many as the configured maximum.
        unsafe { self.launch(&self.station.kernels.quantise, shape, &d.call, &params) }
    }

    /// The first half, and with `waits` the second one's wait.
    pub(super) fn launch_push(&self, d: &Dispatch, waits: bool) -> Result<()> {
        let slot = d.call.slot;
        let opens = lock(&self.slots[slot as usize]).opens;
        let publishes = self.map.sizes.uses.published;
        let tokens = d.send.tokens;
        if let Some((from, quant)) = d.send.quant {
            self.quantise(d, from, quant)?;
        }
        let itself = !d.reuse && !opens && tokens <= ROUTES_ITSELF;
        let routed = !d.reuse && !itself;
        let seat = self.seat(&d.call, d.grid.bound, d.reuse);
        let shared = self.ranks * 4;
        let mut flags = if waits { flag::WAITS } else { 0 };
        if opens || routed {
            let params = RouteParams {
                seat,
                route: self.route_params(d, routed),
                flags: if opens { flag::OPENS } else { 0 } | if routed { flag::ROUTES } else { 0 },
                reserved: 0,
            };
            let grid = if routed { tokens.div_ceil(CHUNK).max(1) } else { 1 };
            let shape = Launch { grid, block: CHUNK, shared, ..Launch::default() };
            // SAFETY: the caller's ids and weights, the routing's memory, the group's windows.
            unsafe { self.launch(&self.station.kernels.route, shape, &d.call, &params)? };
            flags |= flag::FOLLOWS | if opens { flag::WAS_OPENED } else { 0 };
        }
        if !d.reuse {
            flags |= flag::PLACES;
        }
        if publishes {
            flags |= flag::PUBLISHES;
        }
        let bytes = d.send.shape.plane_bytes;
        let region = |plane| match publishes {
            true => self.map.published(slot, plane),
            false => self.map.received(slot, plane),
        };
        let vectors = bytes[TOKENS] / 16;
        let piece = piece(tokens, vectors, self.station.sms() / self.sharing.max(1));
        // The last job of a token is what travels beside its row.
        let jobs = vectors.div_ceil(piece) + 1;
        let padding = match publishes {
            true => 0,
            false => self.ranks as u64 * d.grid.bound as u64 * d.grid.topk.max(1) as u64,
        };
        let pad_blocks = padding.div_ceil(PADS_OF_A_BLOCK).clamp(1, MOST_PAD_BLOCKS) as u32;
        let (from, stride) = self.source(d, TOKENS);
        let mut params = PushParams {
            seat,
            route: self.route_params(d, routed),
            receive: self.receive_params(d)?,
            tokens: from,
            token_stride: stride,
            to_tokens: region(TOKENS),
            to_ids: region(IDS),
            to_weights: region(WEIGHTS),
            to_source: region(SOURCE),
            row_base: if publishes { 0 } else { self.rank as u64 * d.grid.bound as u64 },
            vectors,
            piece,
            jobs,
            pad_blocks,
            sides: 0,
            // A second job would wait for the first: 155 us against 148 for 4096 tokens of 8 ranks on an H100.
            block_jobs: MOVE_WARPS,
            flags,
            reserved: 0,
            side: [Side::default(); SIDES],
        };
        for (plane, &bytes) in bytes.iter().enumerate().skip(SCALES).filter(|(_, bytes)| **bytes > 0) {
            let (from, stride) = self.source(d, plane);
            let by_column = plane == SCALES && d.columns && !publishes;
            params.side[params.sides as usize] = Side {
                from,
                stride,
                to: region(plane),
                bytes,
                unit: unit(&[from, stride, bytes as u64]),
                pitch: if by_column { d.grid.bound.next_multiple_of(COLUMN_PAD as u32) } else { 0 },
                reserved: 0,
            };
            params.sides += 1;
        }
        let all = self.grid(tokens as u64 * jobs as u64)?;
        let blocks = all.div_ceil(MOVE_WARPS) as u64;
        let grid = self.grid(pad_blocks as u64 + blocks)?;
        let after_previous = flags & flag::FOLLOWS != 0;
        let shape = Launch { grid, block: MOVE_THREADS, shared, after_previous };
        // SAFETY: the caller's rows, which comm checked, the routing's memory, the group's windows.
        unsafe { self.launch(&self.station.kernels.push, shape, &d.call, &params) }
    }

    /// The second half on its own.
    pub(super) fn launch_receive(&self, d: &Dispatch) -> Result<()> {
        let seat = self.seat(&d.call, d.grid.bound, d.reuse);
        let params = ReceiveParams { seat, receive: self.receive_params(d)? };
        let shape = Launch { grid: 1, block: RECEIVE_THREADS, ..Launch::default() };
        // SAFETY: as `launch_push`.
        unsafe { self.launch(&self.station.kernels.receive, shape, &d.call, &params) }
    }

    /// Rows to where they are wanted, if they are not there.
    pub(super) fn launch_land(&self, d: &Dispatch) -> Result<()> {
        let slot = d.call.slot;
        let gathers = self.map.sizes.uses.published;
        let bytes = d.send.shape.plane_bytes;
        let wide = d.ids_out_are_64;
        let mut params = LandParams {
            seat: self.seat(&d.call, d.grid.bound, d.reuse),
            owners: self.owners,
            kept_counts: self.list(d.memory, self.routing.rank_counts),
            ids_region: if gathers { self.map.published(slot, IDS) } else { self.map.received(slot, IDS) },
            expert_counts: self.small(d.expert_counts, slot, Region::ExpertCounts),
            expert_stats: d.expert_stats.map_or(0, |rows| rows.ptr as u64),
            rows: d.capacity as u64,
            topk: d.grid.topk,
            outs: 0,
            flags: if gathers { flag::GATHERED } else { 0 }
                | if d.zero_padding { flag::ZERO_PADDING } else { 0 }
                | if wide { flag::WIDE_IDS } else { 0 },
            splits: 1,
            out: [Out::default(); OUTS],
        };
        for plane in 0..PLANES {
            let row_bytes = d.row_bytes(plane) as u64;
            let from = if gathers { self.map.published(slot, plane) } else { self.map.received(slot, plane) };
            let mut kind = match plane {
                TOKENS => kind::TOKENS,
                IDS => kind::IDS,
                WEIGHTS => kind::WEIGHTS,
                SOURCE => kind::SOURCE,
                _ => kind::OTHER,
            };
            let by_column = plane == SCALES && d.columns;
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
            if !gathers && matches!(d.recv[plane], Target::View) {
                kind |= kind::IN_PLACE;
            }
            let wire = if plane == SOURCE { 8 } else { bytes[plane] };
            params.out[params.outs as usize] = Out {
                region: from,
                to,
                stride,
                bytes: wire,
                unit: unit(&[to, stride, wire as u64]),
                pitch,
                block_stride,
                from_pitch: match by_column && !gathers {
                    true => d.grid.bound.next_multiple_of(COLUMN_PAD as u32),
                    false => 0,
                },
                kind,
            };
            params.outs += 1;
            if plane == TOKENS {
                params.splits = splits(bytes[TOKENS] / 16);
            }
        }
        let counts = params.expert_counts != 0 || params.expert_stats != 0;
        if (params.outs == 0 && !counts) || params.rows == 0 {
            return Ok(());
        }
        let grid = self.grid(params.rows * params.splits as u64)?;
        let shape = Launch { grid, block: LAND_THREADS, ..Launch::default() };
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
