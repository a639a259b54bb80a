//! Dispatch and combine through FIFOs.

use super::dispatch::{kind_of, unit};
use super::driver::Launch;
use super::module::Kernels;
use super::params::{Counts, Fifos, Offer, Out, Side, StreamParams, StreamResultsParams, flag};
use super::{Cuda, lock, within};
use crate::device::map::{IDS, Map, PLANES, SCALES, SOURCE, TOKENS, WEIGHTS, entry_part};
use crate::device::{Call, Combine, Dispatch, Float, Region, Target};
use crate::error::{Error, Result};

/// Threads of a block, as the kernels have it.
const THREADS: u32 = 192;
/// Words of an entry: pieces of a row, at most.
pub const PIECES: u32 = 8;
/// Vectors of a piece where tokens are many, unless a row would have more pieces than there are words.
const PIECE: u32 = 448;
/// Bytes of a stage of shared memory; stages of a block, as the kernels have it: a multiprocessor has room for two blocks.
const STAGE: u32 = PIECE * 16;
const STAGES: u32 = 2 * 3 + 4 * 2;
pub(super) const SHARED: u32 = STAGES * STAGE;
/// Sequences of pieces that a rank's rows are cut into.
const SEQUENCES: u32 = 768;

/// Of each peer's rows.
fn lanes(ranks: u32) -> u32 {
    (SEQUENCES / ranks).max(1)
}

/// FifoState in fifo.cuh, and the lists behind it.
pub(super) fn state_bytes(map: &Map) -> u64 {
    if !map.sizes.uses.fifos {
        return 0;
    }
    let ranks = map.sizes.ranks() as u64;
    let offers = 2 * (2 * ranks + ranks * lanes(ranks as u32) as u64);
    let entries = ranks * map.sizes.fifo_rows as u64;
    let lists = (4 * ranks + offers) * 8 + entries * 4;
    (32 + 2 * size_of::<Offer>() as u64 + lists).next_multiple_of(16)
}

/// A row's pieces: how many, and vectors of each. Small where tokens are few, so that all warps have work.
fn cut(vectors: u32, bound: u32) -> (u32, u32) {
    let most = match bound {
        0..=32 => PIECE / 2,
        _ => PIECE,
    };
    let pieces = vectors.div_ceil(most).clamp(1, PIECES);
    let piece = vectors.div_ceil(pieces).max(1);
    (vectors.div_ceil(piece), piece)
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
pub(super) fn waiting_blocks(kernels: &Kernels, sms: u32, sharing: u32, slots: u32) -> Result<u32> {
    let mut fewest = kernels.stream_rows.blocks_per_sm(THREADS, SHARED)?;
    for from in [Float::Bf16, Float::F16, Float::F32] {
        for to in [Float::Bf16, Float::F16, Float::F32] {
            fewest = fewest.min(kernels.stream_results(from, to).blocks_per_sm(THREADS, SHARED)?);
        }
    }
    Ok(fewest * sms / 2 / (sharing * slots).max(1))
}

impl Cuda {
    /// Rows go through FIFOs.
    pub(super) fn is_streamed(&self) -> bool {
        self.map.sizes.uses.fifos
    }

    fn fifos(&self, slot: u32) -> Fifos {
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
            lanes: lanes(self.ranks),
            slots: self.map.sizes.slots,
            slot,
            stage: STAGE,
            reserved: 0,
        }
    }

    /// Where a plane's row is in an entry.
    fn in_entry(bytes: &[u32; PLANES], plane: usize) -> u32 {
        bytes[..plane].iter().map(|bytes| entry_part(*bytes as u64)).sum::<u64>() as u32
    }

    fn rows_on_offer(&self, d: &Dispatch) -> Offer {
        let bytes = &d.send.shape.plane_bytes;
        let vectors = bytes[TOKENS] / 16;
        let (pieces, piece) = cut(vectors, d.grid.bound);
        let (rows, stride) = self.source(d, TOKENS);
        let mut offer = Offer {
            route: self.route_params(d),
            rows,
            stride,
            order: self.list(d.memory, self.routing.order),
            order_starts: self.list(d.memory, self.routing.bases),
            rows_for: if d.reuse { self.list(d.memory, self.routing.rows_for) } else { 0 },
            room: self.room(d),
            limit: self.packed_limit(d),
            vectors,
            piece,
            pieces,
            flags: flag::HAS_CHOICES,
            ids_at: Self::in_entry(bytes, IDS),
            weights_at: Self::in_entry(bytes, WEIGHTS),
            source_at: Self::in_entry(bytes, SOURCE),
            bound: d.grid.bound,
            ..Offer::default()
        };
        for (plane, &size) in bytes.iter().enumerate().skip(SCALES).filter(|(_, size)| **size > 0) {
            let side = self.side(d.call.slot, plane, size, self.source(d, plane), 0);
            offer.side[offer.sides as usize] = Side { to: Self::in_entry(bytes, plane) as u64, ..side };
            offer.sides += 1;
        }
        offer
    }

    /// The first half's one block; else one that keeps, one that helps, and those that move.
    fn stream_shape(&self, call: &Call, waits: bool) -> Launch {
        let grid = if waits { within(call, self.stream_blocks) } else { 1 };
        Launch { grid, block: THREADS, shared: if waits { SHARED } else { 0 }, ..Launch::default() }
    }

    /// `sends`: the first half; `waits`: the second.
    pub(super) fn launch_stream(&self, d: &Dispatch, sends: bool, waits: bool) -> Result<()> {
        let opens = sends && lock(&self.slots[d.call.slot as usize]).opens;
        if let Some((from, quant)) = d.send.quant.filter(|_| sends) {
            self.quantise(d, from, quant)?;
        }
        let receive = self.receive_params(d)?;
        if opens {
            self.launch_open(d)?;
        }
        let halves = if sends { flag::RAISES } else { 0 } | if waits { flag::WAITS } else { 0 };
        if sends && !d.reuse {
            // It only tells: the counts are heard where other slots are helped meanwhile.
            self.launch_place(d, flag::RAISES, opens)?;
        }
        let mut params = StreamParams {
            finish: self.packed_finish(d, receive, halves),
            place: self.place_params(d, halves, opens),
            fifos: self.fifos(d.call.slot),
            offer: self.rows_on_offer(d),
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
        let (pieces, piece) = cut(vectors, c.grid.bound);
        let mut offer = Offer {
            rows: c.send.map_or(0, |rows| rows.ptr as u64),
            stride: c.send.map_or(0, |rows| rows.stride as u64),
            rows_for: self.list(c.memory, self.routing.rank_counts),
            vectors,
            piece,
            pieces,
            bound: c.grid.bound,
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
            fifos: self.fifos(c.call.slot),
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
    fn rows_are_cut_into_pieces_that_have_words() {
        for (vectors, bound, cuts) in [
            (1, 4096, (1, 1)),
            (896, 4096, (2, 448)),
            (896, 128, (2, 448)),
            (896, 8, (4, 224)),
            (900, 8, (5, 180)),
            (10_000, 4096, (8, 1250)),
        ] {
            assert_eq!(cut(vectors, bound), cuts);
            assert!(cuts.0 <= PIECES && cuts.0 * cuts.1 >= vectors);
        }
    }
}
