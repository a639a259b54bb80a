//! Steps whose rows and words couriers carry: what kernels are told of desks and inboxes, and which are launched.
//!
//! A dispatch is LOW_LATENCY's split one, whose rows all go through banks: those of a peer's window are here a desk for it. Its second half
//! finds what a2a_fetch has brought where peers would have stored it. Results go back the same way.

use std::any::Any;
use std::sync::Arc;

use super::desks::{self, Desks};
use super::dispatch::unit;
use super::driver::{DeviceMemory, Launch};
use super::params::{
    BringParams, Counts, FetchParams, OrderParams, PairsParams, Plane, ReturnParams, Seat, flag,
};
use super::proxy::Proxy;
use super::{Cuda, Ground, Station, lock, within};
use crate::device::map::{IDS, INBOX_ALIGN, Map, PLANES, SCALES, SOURCE, TOKENS, WEIGHTS};
use crate::device::{Bases, Combine, Dispatch, Membership, Post};
use crate::error::Result;
use crate::log::{Level, log};

/// Threads of a block, as the kernels have it.
const THREADS: u32 = 256;
const ARRIVE_THREADS: u32 = 128;
const ORDER_THREADS: u32 = 1024;
/// Bytes that a block fetches, and blocks that share what comes of a rank, at most.
const BYTES_OF_A_BLOCK: u64 = 64 << 10;
const MOST_PARTS: u64 = 32;
/// Blocks that share the results of an expert for a rank, at most.
const MOST_SPREAD: u32 = 16;

/// A rank's window and desks.
pub struct Memory {
    pub desks: Arc<Desks>,
    window: Arc<OwnWindow>,
    bytes: u64,
}

/// Goes back to the device when it goes, and not to the pool alone.
struct OwnWindow {
    memory: Option<DeviceMemory>,
    address: u64,
    station: Arc<Station>,
}

impl Drop for OwnWindow {
    fn drop(&mut self) {
        self.memory = None;
        if let Err(error) = self.station.pool.trim() {
            log(Level::Debug, || format!("a window's memory: {error}"));
        }
    }
}

impl Memory {
    pub fn new(ground: &mut Ground, rank: u32, map: &Map) -> Result<Memory> {
        let named = |e: crate::error::Error| e.context(format!("rank {rank}"));
        let bytes = map.window_bytes();
        let station = ground.station.clone();
        let memory = DeviceMemory::zeroed(&station.pool, bytes).map_err(named)?;
        let window = Arc::new(OwnWindow { address: memory.address(), memory: Some(memory), station });
        let desks = Desks::new(ground, rank, map).map_err(named)?;
        ground.desks = Some(desks.clone());
        Ok(Memory { desks, window, bytes })
    }
    /// Bytes of pinned memory.
    pub fn pinned_bytes(map: &Map) -> u64 {
        desks::bytes(map)
    }
    /// What kernels take for windows: the own one, and for each peer what has its words, and its box, on the desk for it.
    pub fn bases(&self, rank: u32, map: &Map) -> Bases {
        let own = self.window.address;
        let window = |peer: u32| match peer == rank {
            true => own,
            false => own.wrapping_add(self.desks.desk(peer)).wrapping_sub(self.desks.desk(rank)),
        };
        let windows = (0..map.sizes.ranks())
            .map(|peer| (std::ptr::without_provenance_mut(window(peer) as usize), self.bytes))
            .collect();
        let keep: Arc<dyn Any + Send + Sync> = Arc::new((self.window.clone(), self.desks.clone()));
        // SAFETY: device memory that `keep` keeps; of the peers' only addresses are made, with the offsets of desks.
        unsafe { Bases::new(windows, keep) }
    }
}

impl Cuda {
    pub(super) fn is_posted(&self) -> bool {
        self.desks.is_some()
    }

    /// From the own window to the own desk: what is added to an offset on desks.
    pub(super) fn to_desks(&self) -> u64 {
        self.desks.as_ref().map_or(0, |desks| desks.desk(self.rank).wrapping_sub(self.own(0)))
    }

    /// Begins with these members, and sends and hears from now on.
    pub fn post_with(&self, post: Arc<dyn Post>, membership: Membership) -> Result<()> {
        let Some(desks) = &self.desks else { return Ok(()) };
        self.begin_anew(membership)?;
        let who = (self.rank, &self.map, &self.experts);
        let proxy = Proxy::start(who, desks.clone(), post, self.health.clone(), membership)?;
        *lock(&self.proxy) = Some(proxy);
        Ok(())
    }

    /// Where kernels find inboxes.
    fn inboxes(&self) -> u64 {
        self.private.address() + self.layout.inboxes
    }

    /// Tells kernels where inboxes are, and of the own window in every rank's place (`seat_alone`).
    pub(super) fn write_inboxes(&self) -> Result<()> {
        let Some(desks) = &self.desks else { return Ok(()) };
        let inboxes: Vec<u64> = (0..self.ranks).map(|peer| desks.inbox(peer)).collect();
        self.private.write(self.layout.inboxes, super::bytes_of(&inboxes))?;
        let alone = vec![self.own(0); self.ranks as usize];
        self.private.write(self.layout.alone, super::bytes_of(&alone))
    }

    /// What was brought is all in this rank's own window.
    fn seat_alone(&self, seat: Seat) -> Seat {
        let mut seat = Seat { windows: self.private.address() + self.layout.alone, ..seat };
        seat.near.fill(self.own(0));
        seat
    }

    /// Counts and banks are those of desks.
    pub(super) fn onto_desks(&self, d: &Dispatch, params: &mut PairsParams) {
        let Some(desks) = &self.desks else { return };
        let (counts, start, _) = self.map.in_inbox(d.call.slot);
        let to_box = self.to_desks().wrapping_add(desks.box_offset());
        // Kernels add what lies before this rank's.
        let mine = |at: u64, each: u64| to_box.wrapping_add(at).wrapping_sub(self.rank as u64 * each);
        params.counts.region = mine(counts, params.counts.stride);
        let mut at = start;
        let banks = d.send.shape.plane_bytes.map(|bytes| {
            let all = d.grid.bound as u64 * bytes as u64;
            let bank = mine(at, all);
            at += all.next_multiple_of(INBOX_ALIGN);
            bank
        });
        (params.bank_tokens, params.bank_ids) = (banks[TOKENS], banks[IDS]);
        (params.bank_weights, params.bank_source) = (banks[WEIGHTS], banks[SOURCE]);
        params.bank_scales = banks[SCALES];
        let present = (SCALES..PLANES).filter(|plane| d.send.shape.plane_bytes[*plane] > 0);
        present.zip(&mut params.side).for_each(|(plane, side)| side.bank = banks[plane]);
        params.flags |= flag::POSTED;
    }

    fn counts(&self, slot: u32) -> Counts {
        Counts { region: self.map.counts(slot, 0), stride: self.map.count_stride() }
    }

    /// Blocks for what comes of each rank.
    fn parts(&self, bytes: u64) -> u32 {
        bytes.div_ceil(BYTES_OF_A_BLOCK).clamp(1, MOST_PARTS) as u32
    }

    /// A dispatch, or either half of it.
    pub(super) fn launch_posted(&self, d: &Dispatch, sends: bool, waits: bool) -> Result<()> {
        if sends {
            self.launch_pairs(d, true, false)?;
        }
        if !waits {
            return Ok(());
        }
        let seat = self.seat(&d.call, d.grid.bound, d.reuse);
        let params = super::params::OpenParams { seat, flags: 0, reserved: 0 };
        let shape = Launch { grid: 1, block: ARRIVE_THREADS, ..Launch::default() };
        // SAFETY: this rank's own memory.
        unsafe { self.launch(&self.station.kernels.arrive, shape, &d.call, &params)? };
        let (counts_at, rows_at, _) = self.map.in_inbox(d.call.slot);
        let bytes = d.send.shape.plane_bytes;
        let mut params = FetchParams {
            seat,
            counts: self.counts(d.call.slot),
            inboxes: self.inboxes(),
            counts_at,
            rows_at,
            parts: self.parts(d.grid.bound as u64 * d.send.wire_bytes()),
            ..FetchParams::default()
        };
        for plane in (0..PLANES).filter(|plane| bytes[*plane] > 0) {
            let bank = self.map.bank(d.call.slot, plane);
            let unit = unit(&[bytes[plane] as u64]);
            params.plane[params.planes as usize] = Plane { bank, bytes: bytes[plane], unit };
            params.planes += 1;
        }
        let grid = within(&d.call, self.ranks * params.parts);
        let shape = Launch { grid, block: THREADS, ..Launch::default() };
        // SAFETY: as above, with room for the most that there can be.
        unsafe { self.launch(&self.station.kernels.fetch, shape, &d.call, &params)? };
        self.launch_pairs(d, false, true)
    }

    fn order_params(&self, c: &Combine) -> OrderParams {
        OrderParams {
            seat: self.seat(&c.call, c.grid.bound, false),
            owners: self.owners,
            counts: self.counts(c.call.slot),
            firsts: self.private.address() + self.layout.firsts,
            starts: self.list(c.memory, self.routing.result_starts),
        }
    }

    /// Results to the desks.
    pub(super) fn launch_return(&self, c: &Combine) -> Result<()> {
        let Some(desks) = &self.desks else { return Ok(()) };
        let (slot, local) = (c.call.slot, self.experts.count(self.rank));
        let order = self.order_params(c);
        let shape = Launch { grid: 1, block: ORDER_THREADS, ..Launch::default() };
        // SAFETY: this rank's own memory, and the routing's.
        unsafe { self.launch(&self.station.kernels.order, shape, &c.call, &order)? };
        if local == 0 {
            return Ok(());
        }
        let size = Self::result_bytes(c);
        let (rows, stride) = match &c.send {
            Some(rows) => (rows.ptr as u64, rows.stride as u64),
            None => (self.own(self.map.combine(slot)), size),
        };
        let (_, _, results) = self.map.in_inbox(slot);
        let params = ReturnParams {
            seat: order.seat,
            counts: order.counts,
            firsts: order.firsts,
            starts: order.starts,
            own: self.private.address() + self.layout.own,
            rows,
            stride,
            weights: c.row_weights.map_or(0, |rows| rows.ptr as u64),
            weights_stride: c.row_weights.map_or(0, |rows| rows.stride as u64),
            results: self.to_desks().wrapping_add(desks.box_offset() + results),
            brought: self.map.brought(slot),
            brought_weights: self.map.brought_weights(slot),
            room: self.map.sizes.most_results(),
            local,
            block: c.grid.block().unwrap_or(0) as u32,
            vectors: (size / 16) as u32,
            spread: c.grid.bound.clamp(1, MOST_SPREAD),
        };
        let units = self.ranks as u64 * local as u64 * params.spread as u64;
        let grid = within(&c.call, units.min(self.station.sms() as u64 * 8) as u32);
        let shape = Launch { grid, block: THREADS, ..Launch::default() };
        // SAFETY: the experts' rows, which comm checked, and this rank's own memory.
        unsafe { self.launch(&self.station.kernels.give_back, shape, &c.call, &params) }
    }

    /// Results from inboxes, once their flags have come.
    pub(super) fn launch_bring(&self, c: &Combine) -> Result<()> {
        let slot = c.call.slot;
        let (_, _, results) = self.map.in_inbox(slot);
        let size = Self::result_bytes(c);
        let params = BringParams {
            order: self.order_params(c),
            inboxes: self.inboxes(),
            results,
            brought: self.map.brought(slot),
            brought_weights: self.map.brought_weights(slot),
            ids: self.list(c.memory, self.routing.ids),
            pair_rows: self.list(c.memory, self.routing.expert_rows),
            result_rows: self.list(c.memory, self.routing.result_rows),
            tokens: c.tokens,
            topk: c.grid.topk,
            block: c.grid.block().unwrap_or(0) as u32,
            vectors: (size / 16) as u32,
            parts: self.parts(c.tokens as u64 * c.grid.topk as u64 * size / self.ranks as u64),
            has_weights: c.has_row_weights as u32,
        };
        let grid = within(&c.call, self.ranks * params.parts);
        let shape = Launch { grid, block: THREADS, ..Launch::default() };
        // SAFETY: this rank's own memory, and the routing's.
        unsafe { self.launch(&self.station.kernels.bring, shape, &c.call, &params) }
    }

    /// What a sum reads of results that were brought.
    pub(super) fn sums_of_brought(&self, c: &Combine, params: &mut super::params::ReduceParams) {
        params.meet.seat = self.seat_alone(params.meet.seat);
        params.pair_rows = self.list(c.memory, self.routing.result_rows);
        params.from_rows = self.map.brought(c.call.slot);
        params.from_weights = self.map.brought_weights(c.call.slot);
    }

    /// A slot that is in the middle of a step, once all that this rank has launched is done.
    pub(super) fn busy_when_done(&self) -> Result<Option<u32>> {
        self.station.context.synchronize()?;
        let is_busy = |slot: &super::Slot| slot.closed == 0 && matches!(slot.state, 1..=3);
        Ok(self.read_slots()?.iter().position(is_busy).map(|slot| slot as u32))
    }
}
