//! Dispatch and combine through FIFOs.

use super::dispatch::{kind_of, unit};
use super::driver::Launch;
use super::module::Kernels;
use super::params::{Counts, Fifos, Offer, Out, Side, StreamParams, StreamResultsParams, flag};
use super::{Cuda, within};
use crate::config::MAX_RANKS;
use crate::device::map::{IDS, Map, PLANES, SCALES, SOURCE, Sizes, TOKENS, WEIGHTS, entry_part};
use crate::device::{Call, Combine, Dispatch, Float, Region, Target};
use crate::error::{Error, Result};

/// Threads of a block, as the kernels have it.
const THREADS: u32 = 256;
/// Bytes of shared memory for stages: a multiprocessor has room for two blocks.
const ROOM: u32 = 106_400;
/// Stages of a block, many small ones or few large ones; results have many.
const MANY: u32 = 14;
const FEW: u32 = 7;
/// Rows are cut small where tokens are this few, so that all warps have work.
const FEW_TOKENS: u32 = 64;
/// What may be beside a row, in bytes, so that a stage has room for a piece of the row too.
pub const MOST_BESIDE: u32 = 12 << 10;
/// Vectors of a piece at least, if small stages are to do.
const LEAST: u32 = 64;
/// Sequences that a dispatch is cut into, and lanes that send results: at most.
const SENDERS: u32 = 256;
const LANES: u32 = 2048;

/// How rows are cut: pieces, 16-byte vectors of each, and what each goes through.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Cut {
    pieces: u32,
    piece: u32,
    stages: u32,
}

impl Cut {
    /// Rows of `vectors` and `beside` bytes behind them.
    fn new(vectors: u32, beside: u32, stages: u32) -> Cut {
        let most = (Self::stage(stages) - beside.min(MOST_BESIDE)) / 16;
        let pieces = vectors.div_ceil(most).max(1);
        let piece = vectors.div_ceil(pieces).max(1);
        Cut { pieces: vectors.div_ceil(piece).max(1), piece, stages }
    }
    fn stage(stages: u32) -> u32 {
        ROOM / stages
    }
    fn rows(vectors: u32, beside: u32, bound: u32) -> Cut {
        let few = Self::new(vectors, beside, FEW);
        if beside + 16 * LEAST > Self::stage(MANY) {
            return few;
        }
        let many = Self::new(vectors, beside, MANY);
        if bound > FEW_TOKENS && few.pieces < many.pieces { few } else { many }
    }
    fn results(vectors: u32, beside: u32) -> Cut {
        Self::new(vectors, beside, MANY)
    }
    /// Warps of a block that send tokens.
    fn senders(&self) -> u32 {
        if self.stages == FEW { 1 } else { 2 }
    }
}

/// Words of an entry, an even number: pieces of a row, at most.
pub fn most_pieces(sizes: &Sizes) -> u32 {
    let (bytes, beside) = (sizes.plane_bytes[TOKENS], beside(&sizes.plane_bytes));
    let results =
        Cut::results((sizes.combine_bytes / 16) as u32, entry_part(sizes.combine_weight_bytes()) as u32);
    Cut::rows(bytes / 16, beside, 0).pieces.max(results.pieces).next_multiple_of(2)
}

/// What is behind a row's tokens in an entry.
pub fn beside(bytes: &[u32; PLANES]) -> u32 {
    bytes[TOKENS + 1..].iter().map(|bytes| entry_part(*bytes as u64)).sum::<u64>().min(u32::MAX as u64) as u32
}

/// Words of an offer's list of how far its sequences are.
fn cursors(ranks: u32) -> u32 {
    (SENDERS * ranks).max(LANES)
}

/// Bytes of a block's shared memory: stages, and what it knows of each rank.
fn shared(ranks: u32) -> u32 {
    ROOM + 16 * ranks
}
pub(super) const MOST_SHARED: u32 = ROOM + 16 * MAX_RANKS;

/// FifoState in fifo.cuh, and the lists behind it.
pub(super) fn state_bytes(map: &Map) -> u64 {
    if !map.sizes.uses.fifos {
        return 0;
    }
    let ranks = map.sizes.ranks() as u64;
    let lists = (5 * ranks + 2 * (2 * ranks + cursors(ranks as u32) as u64 / 2)) * 8;
    (32 + 2 * size_of::<Offer>() as u64 + lists).next_multiple_of(16)
}

/// Blocks that the kernels need at least: one that keeps, one that helps other slots, one that moves.
fn fewest_blocks(map: &Map) -> u32 {
    if map.sizes.slots > 1 { 3 } else { 2 }
}

pub(super) fn check(rank: u32, map: &Map, blocks: u32, sharing: u32, device: &str) -> Result<()> {
    let fewest = fewest_blocks(map);
    if blocks < fewest {
        return Err(Error::unsupported(format!(
            "rank {rank}: ranks_per_device * num_slots is {}, FIFOs wait with {fewest} blocks for each, and {device} has room \
             for {blocks}",
            sharing as u64 * map.sizes.slots as u64
        )));
    }
    Ok(())
}

/// Blocks that may wait on a device, of every rank and slot: half of it stays for what does not wait (see pairs.rs).
pub(super) fn waiting_blocks(
    kernels: &Kernels,
    sms: u32,
    sharing: u32,
    slots: u32,
    ranks: u32,
) -> Result<u32> {
    let shared = shared(ranks);
    let mut fewest = kernels.stream_rows.blocks_per_sm(THREADS, shared)?;
    for from in [Float::Bf16, Float::F16, Float::F32] {
        for to in [Float::Bf16, Float::F16, Float::F32] {
            fewest = fewest.min(kernels.stream_results(from, to).blocks_per_sm(THREADS, shared)?);
        }
    }
    Ok(fewest * sms / 2 / (sharing * slots).max(1))
}

impl Cuda {
    /// Rows go through FIFOs.
    pub(super) fn is_streamed(&self) -> bool {
        self.map.sizes.uses.fifos
    }

    fn fifos(&self, slot: u32, cut: Cut) -> Fifos {
        let private = self.private.address();
        Fifos {
            states: private + self.layout.fifos,
            state_bytes: state_bytes(&self.map),
            all: private + self.layout.slots,
            entries: self.map.fifos(0),
            words: self.map.fifo_words(0),
            slot_bytes: self.map.slot_stride(),
            entry_bytes: self.map.entry_bytes(),
            counts: Counts { region: self.map.counts(0, 0), stride: self.map.count_stride() },
            rows: self.map.sizes.fifo_rows,
            words_each: self.map.sizes.fifo_pieces,
            slots: self.map.sizes.slots,
            slot,
            stage: Cut::stage(cut.stages),
            stages: cut.stages,
            senders: cut.senders(),
            cursors: cursors(self.ranks),
        }
    }

    /// Where a plane's row is in an entry.
    fn in_entry(bytes: &[u32; PLANES], plane: usize) -> u32 {
        bytes[..plane].iter().map(|bytes| entry_part(*bytes as u64)).sum::<u64>() as u32
    }

    fn rows_on_offer(&self, d: &Dispatch, cut: Cut) -> Offer {
        let bytes = &d.send.shape.plane_bytes;
        let (rows, stride) = self.source(d, TOKENS);
        let mut offer = Offer {
            route: self.route_params(d),
            rows,
            stride,
            rows_for: if d.reuse { self.list(d.memory, self.routing.rows_for) } else { 0 },
            room: self.room(d),
            limit: self.packed_limit(d),
            vectors: bytes[TOKENS] / 16,
            piece: cut.piece,
            pieces: cut.pieces,
            flags: flag::HAS_CHOICES,
            ids_at: Self::in_entry(bytes, IDS),
            weights_at: Self::in_entry(bytes, WEIGHTS),
            source_at: Self::in_entry(bytes, SOURCE),
            bound: d.grid.bound,
            beside: beside(bytes),
            sequences: (self.stream_movers(&d.call) * cut.senders()).min(SENDERS),
            ..Offer::default()
        };
        for (plane, &size) in bytes.iter().enumerate().skip(SCALES).filter(|(_, size)| **size > 0) {
            let side = self.side(d.call.slot, plane, size, self.source(d, plane), 0);
            offer.side[offer.sides as usize] = Side { to: Self::in_entry(bytes, plane) as u64, ..side };
            offer.sides += 1;
        }
        offer
    }

    /// Blocks that move, if a call both sends and takes.
    fn stream_movers(&self, call: &Call) -> u32 {
        within(call, self.stream_blocks) + 1 - fewest_blocks(&self.map)
    }

    /// The first half's one block; else one that keeps, one that helps, and those that move.
    fn stream_shape(&self, call: &Call, waits: bool) -> Launch {
        let grid = if waits { within(call, self.stream_blocks) } else { 1 };
        Launch {
            grid,
            block: THREADS,
            shared: if waits { shared(self.ranks) } else { 0 },
            ..Launch::default()
        }
    }

    /// `sends`: the first half; `waits`: the second.
    pub(super) fn launch_stream(&self, d: &Dispatch, sends: bool, waits: bool) -> Result<()> {
        let (receive, opens) = self.begin_packed(d, sends)?;
        let halves = if sends { flag::RAISES } else { 0 } | if waits { flag::WAITS } else { 0 };
        let bytes = &d.send.shape.plane_bytes;
        let cut = Cut::rows(bytes[TOKENS] / 16, beside(bytes), d.grid.bound);
        if sends && !d.reuse {
            // It only tells: the counts are heard where other slots are helped meanwhile.
            self.launch_place(d, flag::RAISES, opens)?;
        }
        let mut params = StreamParams {
            finish: self.packed_finish(d, receive, halves),
            place: self.place_params(d, halves, opens),
            fifos: self.fifos(d.call.slot, cut),
            offer: self.rows_on_offer(d, cut),
            owners: self.owners,
            expert_counts: self.small(d.expert_counts, d.call.slot, Region::ExpertCounts),
            expert_stats: d.expert_stats.map_or(0, |rows| rows.ptr as u64),
            rows: d.capacity as u64,
            flags: if d.zero_padding { flag::ZERO_PADDING } else { 0 }
                | if d.ids_out_are_64 { flag::WIDE_IDS } else { 0 },
            ..StreamParams::default()
        };
        for plane in 0..PLANES {
            let bytes = d.send.shape.plane_bytes[plane];
            let (to, stride, pitch) = match d.recv[plane] {
                Target::Into(rows) => (rows.ptr as u64, rows.stride as u64, 0),
                Target::Columns(c) => (c.ptr as u64, 0, c.column_stride as u64 / 4),
                Target::Nothing | Target::View => continue,
            };
            params.out[params.outs as usize] = Out {
                region: Self::in_entry(&d.send.shape.plane_bytes, plane) as u64,
                to,
                stride,
                bytes,
                unit: unit(&[to, stride, bytes as u64]),
                pitch,
                kind: kind_of(plane),
                ..Out::default()
            };
            params.outs += 1;
        }
        let shape = self.stream_shape(&d.call, waits);
        // SAFETY: the caller's rows and outputs, which comm checked, the routing's memory, the group's windows.
        unsafe { self.launch(&self.station.kernels.stream_rows, shape, &d.call, &params) }
    }

    /// A combine, or either half of it.
    pub(super) fn launch_stream_results(&self, c: &Combine, sends: bool, waits: bool) -> Result<()> {
        let mut meet = self.meet_params(c, sends, waits);
        meet.flags = (meet.flags & !flag::STAGED) | flag::THROUGH_FIFOS;
        meet.staged_bytes = 0;
        let weights_at = entry_part(Self::result_bytes(c)) as u32;
        let vectors = (Self::result_bytes(c) / 16) as u32;
        let beside = if c.has_row_weights { entry_part(c.weight_bytes() as u64) as u32 } else { 0 };
        let cut = Cut::results(vectors, beside);
        let mut offer = Offer {
            rows: c.send.map_or(0, |rows| rows.ptr as u64),
            stride: c.send.map_or(0, |rows| rows.stride as u64),
            rows_for: self.list(c.memory, self.routing.rank_counts),
            vectors,
            piece: cut.piece,
            pieces: cut.pieces,
            bound: c.grid.bound,
            beside,
            sequences: ((self.stream_movers(&c.call) * cut.stages).min(LANES) / self.ranks).max(1),
            ..Offer::default()
        };
        if c.has_row_weights {
            let rows = c.row_weights.map_or((0, 0), |rows| (rows.ptr as u64, rows.stride as u64));
            let bytes = c.weight_bytes() as u32;
            // A rank without rows may have no tensor.
            offer.side[0] = Side {
                from: rows.0,
                stride: rows.1,
                to: weights_at as u64,
                bytes,
                unit: unit(&[rows.0, rows.1, bytes as u64]),
                ..Side::default()
            };
            offer.sides = 1;
        }
        let list = |list| self.list(c.memory, list);
        let params = StreamResultsParams {
            meet,
            fifos: self.fifos(c.call.slot, cut),
            offer,
            owners: self.owners,
            target_ranks: list(self.routing.target_ranks),
            target_rows: list(self.routing.target_rows),
            rows_for: list(self.routing.rows_for),
            ids: list(self.routing.ids),
            out: c.out.map_or(0, |rows| rows.ptr as u64),
            out_stride: c.out.map_or(0, |rows| rows.stride as u64),
            out_weights: c.out_weights.map_or(0, |rows| rows.ptr as u64),
            out_weights_stride: c.out_weights.map_or(0, |rows| rows.stride as u64),
            tokens: c.tokens,
            fanout: self.routing.fanout,
            topk: c.grid.topk,
            flags: if c.accumulate { flag::ACCUMULATE } else { 0 },
            weights_at,
            reserved: 0,
        };
        let shape = self.stream_shape(&c.call, waits);
        let kernel = self.station.kernels.stream_results(c.send_type, c.out_type);
        // SAFETY: the experts' rows and the output, which comm checked, the routing's memory, the group's windows.
        unsafe { self.launch(kernel, shape, &c.call, &params) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stage_has_room_for_a_piece_and_what_is_beside_it() {
        for vectors in [1, 448, 896, 900, 1792, 10_000] {
            for beside in [0, 80, 304, 6_560, 6_576, MOST_BESIDE] {
                for bound in [1, 128, FEW_TOKENS + 1, 4096] {
                    let cut = Cut::rows(vectors, beside, bound);
                    assert!(
                        cut.pieces * cut.piece >= vectors && (cut.pieces - 1) * cut.piece < vectors,
                        "{cut:?}"
                    );
                    assert!(16 * cut.piece + beside <= Cut::stage(cut.stages), "{cut:?}");
                    assert!(cut.pieces <= Cut::rows(vectors, beside, 0).pieces, "{cut:?}");
                    assert!(3 * cut.senders() < cut.stages, "{cut:?}");
                }
            }
        }
        assert_eq!(Cut::rows(896, 304, FEW_TOKENS), Cut { pieces: 2, piece: 448, stages: MANY });
        assert_eq!(Cut::rows(896, 304, 4096), Cut { pieces: 1, piece: 896, stages: FEW });
        assert_eq!(Cut::results(1792, 32), Cut { pieces: 4, piece: 448, stages: MANY });
    }
}
