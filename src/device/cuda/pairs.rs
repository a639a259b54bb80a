//! Dispatch where rows are (token, expert) pairs: one kernel for all of it, or for either half.

use super::dispatch::topk_bits;
use super::driver::Launch;
use super::module::Kernels;
use super::params::{Counts, PairsParams, SIDES, flag};
use super::{Cuda, lock, within};
use crate::config::{LayoutKind, OverflowKind, QuantKind};
use crate::device::map::{COLUMN_PAD, IDS, SCALES, SOURCE, TOKENS, WEIGHTS};
use crate::device::{Dispatch, Region, Target};
use crate::error::{Error, Result};

/// Threads of a block, as the kernels have it.
const THREADS: u32 = 256;
const WARPS: u64 = 8;
/// Rows of padding that a thread writes.
const PADS_OF_A_THREAD: u64 = 8;

impl Cuda {
    pub(super) fn is_by_pairs(&self) -> bool {
        self.map.sizes.grid.layout == LayoutKind::ExpertPadded
    }

    /// `sends`: the first half; `waits`: the second.
    pub(super) fn launch_pairs(&self, d: &Dispatch, sends: bool, waits: bool) -> Result<()> {
        let slot = d.call.slot;
        let opens = sends && lock(&self.slots[slot as usize]).opens;
        let banks = sends && !waits && (!d.reuse || self.is_posted());
        let receive = self.receive_params(d)?;
        if opens {
            self.launch_open(d)?;
        }
        let kernel = match d.send.quant {
            Some((from, _)) if sends => 1 + from as usize,
            _ => 0,
        };
        let mut params = self.pairs_params(d)?;
        let present = (0..d.send.shape.plane_bytes.len()).filter(|p| d.send.shape.plane_bytes[*p] > 0);
        params.receive = receive;
        params.bank_bytes = params.receive.wire_bytes;
        params.receive.wire_bytes = present.map(|plane| d.row_bytes(plane) as u64).sum();
        let pads = |plane: usize, flag: u32| if matches!(d.recv[plane], Target::View) { flag } else { 0 };
        params.flags = if sends { flag::RAISES } else { 0 }
            | if waits { flag::WAITS } else { 0 }
            | if banks { flag::BANKS } else { 0 }
            | if opens { flag::AFTER_OPEN } else { 0 }
            | if waits { pads(WEIGHTS, flag::PADS_WEIGHTS) | pads(SOURCE, flag::PADS_SOURCE) } else { 0 }
            | match d.send.quant {
                Some((_, QuantKind::Fp8Ue8m0)) => flag::PAIR_POWERS,
                _ => 0,
            };
        if sends {
            self.onto_desks(d, &mut params);
        }
        let grid = within(&d.call, 1 + self.movers(d, &params, kernel, sends, waits));
        // A second half starts while a first one before it ends, and waits for the end of whatever is before it.
        let after_previous = opens || !sends;
        let shape = Launch { grid, block: THREADS, after_previous, ..Launch::default() };
        // SAFETY: the caller's rows, which comm checked, the routing's memory, the group's windows.
        unsafe { self.launch(&self.station.kernels.pairs[kernel], shape, &d.call, &params) }
    }

    /// Blocks that move: as many as have work, and as may wait.
    fn movers(&self, d: &Dispatch, params: &PairsParams, kernel: usize, sends: bool, waits: bool) -> u32 {
        let lanes = if kernel == 0 { 64 } else { 32 };
        let jobs = params.vectors.div_ceil(lanes) as u64 + 1;
        let blocks = |rows: u64| (rows * jobs).div_ceil(WARPS);
        let pushed = if sends { blocks(d.send.tokens as u64) } else { 0 };
        // A half on its own finds rows in banks, so many at most.
        let landed = if waits && !sends { blocks(self.ranks as u64 * d.grid.bound as u64) } else { 0 };
        // Few experts for a warp, which finds out how many rows of an expert there are, and few rows for a thread.
        let experts = self.experts.count(self.rank) as u64;
        let rows = d.capacity as u64 / (PADS_OF_A_THREAD * THREADS as u64);
        let padded = if waits { rows.max(experts.div_ceil(2 * WARPS)) } else { 0 };
        pushed.max(landed).max(padded).clamp(1, self.pair_blocks[kernel] as u64 - 1) as u32
    }

    fn pairs_params(&self, d: &Dispatch) -> Result<PairsParams> {
        let slot = d.call.slot;
        let bytes = d.send.shape.plane_bytes;
        let block = d.grid.block().unwrap_or(0);
        let block = u32::try_from(block).map_err(|_| Error::internal("a block of more than 2^32 rows"))?;
        let pitch = if d.columns { block.next_multiple_of(COLUMN_PAD as u32) } else { 0 };
        let made = d.send.quant.is_some();
        let (tokens, token_stride) =
            d.send.planes[TOKENS].map_or((0, 0), |r| (r.ptr as u64, r.stride as u64));
        let list = |list| self.list(d.memory, list);
        let mut params = PairsParams {
            seat: self.seat(&d.call, d.grid.bound, d.reuse),
            route: self.route_params(d),
            counts: Counts { region: self.map.counts(slot, 0), stride: self.map.count_stride() },
            tokens,
            token_stride,
            to_tokens: self.map.received(slot, TOKENS),
            to_weights: self.map.received(slot, WEIGHTS),
            to_source: self.map.received(slot, SOURCE),
            to_scales: self.map.received(slot, SCALES),
            bank_tokens: self.map.bank(slot, TOKENS),
            bank_ids: self.map.bank(slot, IDS),
            bank_weights: self.map.bank(slot, WEIGHTS),
            bank_source: self.map.bank(slot, SOURCE),
            bank_scales: self.map.bank(slot, SCALES),
            own: self.private.address() + self.layout.own,
            expert_stats: d.expert_stats.map_or(0, |rows| rows.ptr as u64),
            expert_offsets: self.small(d.expert_offsets, slot, Region::ExpertOffsets),
            block_counts: list(self.routing.counts),
            summary: list(self.routing.summary),
            block,
            limit: if d.overflow == OverflowKind::Error { d.grid.limit as u32 } else { 0 },
            vectors: bytes[TOKENS] / 16,
            topk_bits: topk_bits(d),
            scale_words: if made { bytes[SCALES] / 4 } else { 0 },
            scale_pitch: pitch,
            ..PairsParams::default()
        };
        for (plane, &bytes) in bytes.iter().enumerate().skip(SCALES).filter(|(_, bytes)| **bytes > 0) {
            // Scales that are made on the way have no source but a bank.
            let rows = d.send.planes[plane].filter(|_| !(made && plane == SCALES));
            let rows = rows.map_or((0, 0), |rows| (rows.ptr as u64, rows.stride as u64));
            params.side[params.sides as usize] = self.side(slot, plane, bytes, rows, pitch);
            params.sides += 1;
        }
        const { assert!(SIDES == crate::device::map::PLANES - SCALES) };
        Ok(params)
    }
}

/// Blocks of each kernel that may wait on a device, of every rank and slot. Together, whatever their kernels, waiting blocks
/// take half of the device: then there is a multiprocessor with half its room left, and no kernel of ours has a block that
/// needs more. With more than half, small blocks on all multiprocessors would keep out a large one that they wait for.
pub(super) fn waiting_blocks(kernels: &Kernels, sms: u32, sharing: u32, slots: u32) -> Result<[u32; 4]> {
    let mut blocks = [0; 4];
    for (blocks, kernel) in blocks.iter_mut().zip(&kernels.pairs) {
        *blocks = kernel.blocks_per_sm(THREADS, 0)? * sms / 2 / (sharing * slots).max(1);
    }
    Ok(blocks)
}
