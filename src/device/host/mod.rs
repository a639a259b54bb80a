//! The ops on CPU memory, run by the calling thread.
//!
//! `sync` holds a slot's state, what a step says and waits for through `device/protocol.rs`, and how it is given up;
//! `route` and `place` the maths of where rows go; `push` and `land` move them out and in, `fifo` both ways, `post` where a courier
//! carries them; `quant` and `reduce` compute.

mod fifo;
mod land;
mod modes;
mod place;
mod post;
mod push;
mod quant;
mod reduce;
mod route;
mod sync;

use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use super::map::{Map, RoutingMap};
use super::members::Members;
use super::{
    Bases, Block, Call, Combine, Device, Dispatch, Half, Health, Membership, Post, Region, Standing, Stats,
    Target,
};
use crate::config::{Experts, LayoutKind};
use crate::error::{Error, Result};
use crate::fault::{self, Point};
use sync::Slot;

/// A rank on the CPU.
pub struct Host {
    rank: u32,
    ranks: u32,
    map: Map,
    routing: RoutingMap,
    experts: Experts,
    bases: Bases,
    /// What carries rows and words, where other ranks' windows are not to be addressed.
    post: Option<Arc<dyn Post>>,
    /// Steps go on without ranks that are lost, and say so.
    degrades: bool,
    /// Of the members, those.
    lost: Mutex<Members>,
    health: Arc<Health>,
    membership: Membership,
    slots: Vec<Mutex<Slot>>,
    first_error: Mutex<Option<Error>>,
    stats: Arc<Stats>,
}

impl Host {
    /// Puts this rank's own window into its first state: no peer may step before that.
    pub fn new(rank: u32, map: Map, experts: Experts, bases: Bases, health: Arc<Health>) -> Host {
        let membership = Membership::first(map.sizes.ranks());
        Host::with(rank, map, experts, bases, health, membership, Arc::default())
    }

    /// What it writes into other ranks' windows is carried there, to those that take part.
    pub fn posted_by(self, post: Arc<dyn Post>, membership: Membership, degrades: bool) -> Host {
        Host { post: Some(post), membership, degrades, ..self }
    }

    fn with(
        rank: u32,
        map: Map,
        experts: Experts,
        bases: Bases,
        health: Arc<Health>,
        membership: Membership,
        stats: Arc<Stats>,
    ) -> Host {
        let host = Host {
            rank,
            ranks: map.sizes.ranks(),
            routing: RoutingMap::new(&map.sizes),
            slots: (0..map.sizes.slots).map(|_| Mutex::new(Slot::new(&map))).collect(),
            map,
            experts,
            bases,
            post: None,
            degrades: false,
            lost: Mutex::default(),
            health,
            membership,
            first_error: Mutex::new(None),
            stats,
        };
        host.reset_flags();
        host
    }

    /// The ranks that take part, ascending.
    fn members(&self) -> impl Iterator<Item = u32> + use<> {
        self.present().iter()
    }
    fn present(&self) -> Members {
        if !self.degrades {
            return self.membership.members;
        }
        self.membership.members.without(&self.lost())
    }
    /// Those that steps go on without.
    fn lost(&self) -> Members {
        *self.lost.lock().unwrap_or_else(|e| e.into_inner())
    }

    fn add(counter: &AtomicU64, value: u64) {
        counter.fetch_add(value, Ordering::Relaxed);
    }
}

const BLOCK_ALIGN: usize = 128;

/// Copies a row, or a piece of one. Where faults strike, they find it half copied.
///
/// # Safety
/// So many bytes stand at `from` and fit at `to`; they do not overlap.
#[inline(always)]
unsafe fn copy_row(from: *const u8, to: *mut u8, bytes: usize, point: Point) {
    let half = fault::half(bytes);
    // SAFETY: as promised; half <= bytes.
    unsafe {
        std::ptr::copy_nonoverlapping(from, to, half);
        fault::at(point);
        std::ptr::copy_nonoverlapping(from.add(half), to.add(half), bytes - half);
    }
}

impl Device for Host {
    fn alloc(&self, _slot: u32, bytes: u64) -> Result<Block> {
        let refused = || {
            let text = format!("rank {}: no memory for {bytes} bytes of private memory", self.rank);
            Error::new(crate::error::Status::OutOfMemory, text)
        };
        let layout = Layout::from_size_align(bytes.max(1) as usize, BLOCK_ALIGN).map_err(|_| refused())?;
        if fault::fails(Point::Private).is_some() {
            return Err(refused());
        }
        // SAFETY: the size is not zero.
        let ptr = unsafe { alloc_zeroed(layout) };
        if ptr.is_null() {
            return Err(refused());
        }
        // SAFETY: the layout it was allocated with, once.
        let free = move |ptr, _| unsafe { dealloc(ptr, layout) };
        Ok(Block { ptr, bytes: layout.size(), free: Some(Box::new(free)) })
    }

    fn view(&self, slot: u32, region: Region) -> usize {
        self.bases.at(self.rank, self.map.region(slot, region), 0) as usize
    }

    fn is_inside(&self, address: usize, bytes: usize) -> bool {
        let window = self.bases.at(self.rank, 0, 0) as usize;
        address < window + self.map.window_bytes() as usize && address + bytes > window
    }
    fn check(&self, call: &Call, half: Half) -> Result<()> {
        self.check_half(&self.slot(call.slot), call, half)
    }
    fn open(&self, call: &Call, half: Half) -> Result<()> {
        self.open_half(call, half)
    }
    fn sees_steps(&self, _slot: u32) -> bool {
        true
    }
    fn close(&self, call: &Call, half: Half) {
        self.close_half(call, half)
    }
    fn fail(&self, call: &Call) {
        self.flush_after_failure(call)
    }
    fn route(&self, d: &Dispatch) -> Result<()> {
        self.route_tokens(d)
    }
    fn renew(&self, d: &Dispatch) -> Result<()> {
        self.renew_weights(d)
    }
    fn tell_counts(&self, d: &Dispatch) -> Result<()> {
        self.raise_counts(d)
    }
    fn wait_counts(&self, d: &Dispatch) -> Result<()> {
        self.await_counts(d)
    }
    fn place_rows(&self, d: &Dispatch) -> Result<()> {
        self.place(d)
    }
    fn push_rows(&self, d: &Dispatch) -> Result<()> {
        self.push(d)
    }
    fn push_first_rows(&self, d: &Dispatch) -> Result<()> {
        self.push_first(d)
    }
    fn push_banks(&self, d: &Dispatch) -> Result<()> {
        self.push_bank(d)
    }
    fn publish_rows(&self, d: &Dispatch) -> Result<()> {
        self.publish(d)
    }
    fn offer_rows(&self, d: &Dispatch) -> Result<()> {
        self.offer_dispatch(d)
    }
    fn signal_dispatch(&self, d: &Dispatch) -> Result<()> {
        self.raise_dispatch(d)
    }
    fn wait_dispatch(&self, d: &Dispatch) -> Result<()> {
        self.await_dispatch(d)
    }
    fn land_rows(&self, d: &Dispatch) -> Result<()> {
        self.land(d)
    }
    fn gather_rows(&self, d: &Dispatch) -> Result<()> {
        self.gather(d)
    }
    fn stream_rows(&self, d: &Dispatch) -> Result<()> {
        self.stream(d)
    }
    fn settle_rows(&self, d: &Dispatch) -> Result<()> {
        self.settle(d)
    }
    fn return_rows(&self, c: &Combine) -> Result<()> {
        self.pack_results(c)
    }
    fn stage_rows(&self, c: &Combine) -> Result<()> {
        self.stage(c)
    }
    fn offer_results(&self, c: &Combine) -> Result<()> {
        self.offer_combine(c)
    }
    fn signal_combine(&self, c: &Combine) -> Result<()> {
        self.raise_combine(c)
    }
    fn wait_combine(&self, c: &Combine) -> Result<()> {
        self.await_combine(c)
    }
    fn reduce_rows(&self, c: &Combine) -> Result<()> {
        self.reduce(c)
    }
    fn stream_results(&self, c: &Combine) -> Result<()> {
        self.stream_and_reduce(c)
    }
    fn received_rows(&self, d: &Dispatch) -> Result<u64> {
        let l = self.ledger(d.memory);
        Ok(match d.grid.layout {
            LayoutKind::ExpertContiguous => l.summary[route::END] as u64,
            _ => l.rank_counts.iter().map(|count| *count as u64).sum(),
        })
    }
    fn void_status(&self, target: Target, slot: u32, lost: &[u32]) {
        self.lost_status(target, slot, lost)
    }
    fn async_error(&self) -> Option<Error> {
        self.first_error.lock().unwrap_or_else(|e| e.into_inner()).clone()
    }
    fn stats(&self) -> &Stats {
        &self.stats
    }
    fn set_timeout(&self, _first_step: Duration, _step: Duration) {
        // A call brings its own budget.
    }
    fn leave(&self, aborted: bool) {
        self.mark_gone(aborted)
    }
    fn membership(&self) -> Membership {
        self.membership
    }
    fn busy_slot(&self) -> Option<u32> {
        (0..self.map.sizes.slots).find(|slot| self.slot(*slot).is_in_a_step())
    }
    fn suspend(&self, why: &Error) -> Result<Standing> {
        let mut standing = Standing::default();
        for slot in self.slots.iter().map(|slot| slot.lock().unwrap_or_else(|e| e.into_inner())) {
            standing.whole.push(slot.whole);
            let lost = slot.error().and_then(|error| error.loss.as_ref()).map(|loss| &loss.lost);
            lost.into_iter().flatten().for_each(|rank| standing.given_up.insert(*rank));
        }
        (0..self.map.sizes.slots).for_each(|slot| self.slot(slot).close(why.clone()));
        Ok(standing)
    }
    fn shares_mappings(&self, _peer: u32) -> bool {
        false
    }
    fn has_left(&self, peer: u32) -> bool {
        self.lost().contains(peer) || self.endpoint(0).why_gone(peer, &self.health.vitals).is_some()
    }
    fn cannot_touch(&self, peer: u32) -> bool {
        self.health.is_proven_dead(peer) || self.endpoint(0).has_destroyed(peer)
    }
    fn left_behind_by(&self) -> Option<u32> {
        self.endpoint(0).left_behind_by()
    }
    fn leave_behind(&self, lost: u32) {
        self.endpoint(0).leave_behind(lost)
    }
    fn recovered(self: Arc<Self>, membership: Membership) -> Result<Arc<dyn Device>> {
        for (offset, bytes) in self.map.control_regions() {
            let at = self.bases.at(self.rank, offset, bytes);
            // SAFETY: `at` checked the bounds; no member steps before all have done this, and nobody else can.
            unsafe { std::ptr::write_bytes(at, 0, bytes as usize) };
        }
        let (bases, health, stats) = (self.bases.clone(), self.health.clone(), self.stats.clone());
        let (map, experts) = (self.map.clone(), self.experts.clone());
        let next = Host::with(self.rank, map, experts, bases, health, membership, stats);
        Ok(Arc::new(Host { post: self.post.clone(), degrades: self.degrades, ..next }))
    }
}
