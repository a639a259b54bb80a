//! The ops on CUDA memory: kernels on the caller's stream.
//!
//! An op here only takes note; the last one of a half launches what the half needs, so that what can be one kernel is
//! one. A half that is not split is launched with the next: `dispatch` is a push of which one block waits, `combine` a
//! meeting and a sum. What decides (sequence, state, epoch) lives in device memory, where a replayed graph finds it;
//! what the host keeps of a slot is good for sentences, and only as long as nothing on it was captured.

mod carried;
mod combine;
mod contiguous;
mod desks;
mod dispatch;
pub mod driver;
mod failure;
mod fifo;
mod flat;
#[cfg(feature = "jitter")]
mod jitter;
mod module;
mod pairs;
mod params;
mod posted;
mod proxy;

use std::any::Any;
use std::mem::offset_of;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering, fence};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use super::loss::too_many_rows;
use super::mail;
use super::map::{FIRST_EPOCH, List, Map, RoutingMap};
use super::order::State;
use super::protocol::{DESTROYED, WITHOUT};
use super::{
    Bases, Block, Call, Combine, Device, Dispatch, Half, Health, Membership, Region, Standing, Stats,
    Stream as CallersStream, Target, Wire,
};
use crate::config::{Experts, LayoutKind};
use crate::error::{Error, Result, Status};
use crate::log::{Level, log};
use desks::Desks;
use driver::{Context, DeviceMemory, Launch, Pinned, Pool, RawStream, Stream, launch};
use module::Kernels;
use params::{Control, MAX_RANKS, NEAR_RANKS, Owners, Record, Seat, Shared, Slot, TOO_MANY};

use proxy::Proxy;

pub use contiguous::MOST_KEYS;
pub use driver::probe;
pub use fifo::{MOST_BESIDE as FIFO_MOST_BESIDE, beside as fifo_beside, most_pieces as fifo_pieces};
pub use module::check_kernels;
pub use posted::Memory as PostedMemory;

/// What the host knows of one slot.
#[derive(Default)]
struct HostSlot {
    state: State,
    routing: u64,
    /// Work on the slot was captured, so that the host cannot know its state any more.
    captured: bool,
    /// The capture that the last half belongs to, if it was captured.
    capture: Option<u64>,
    /// The dispatch in flight must look if one came before it.
    opens: bool,
    /// Why the slot is closed, once known.
    closed: Option<Error>,
}

/// A device as this process uses it: made once and kept, since making and releasing streams and modules may wait for
/// kernels, and (seen with driver 580) dead-locks with a thread that synchronises the context.
struct Station {
    context: Arc<Context>,
    kernels: Kernels,
    pool: Arc<Pool>,
    /// For what the host writes into windows.
    stream: Stream,
}

impl Station {
    fn of(ordinal: i32) -> Result<Arc<Station>> {
        static STATIONS: Mutex<Vec<(i32, Arc<Station>)>> = Mutex::new(Vec::new());
        let mut stations = lock(&STATIONS);
        if let Some((_, station)) = stations.iter().find(|(known, _)| *known == ordinal) {
            return Ok(station.clone());
        }
        let context = Context::retain(ordinal)?;
        let station = Arc::new(Station {
            kernels: Kernels::load(&context)?,
            pool: Pool::new(&context)?,
            stream: Stream::new(&context)?,
            context,
        });
        stations.push((ordinal, station.clone()));
        Ok(station)
    }

    fn sms(&self) -> u32 {
        self.context.abilities().sm_count
    }
}

/// What destroyed ranks of a group leave behind in this process, for work on its way may still use it, and freeing may
/// wait for the kernels of those that go on. The last one out waits for the device and frees it all.
#[derive(Default)]
pub struct Attic {
    items: Mutex<Vec<Left>>,
}

/// Something of a device's, to be freed.
type Left = (Arc<Station>, Box<dyn Any + Send + Sync>);

impl Drop for Attic {
    fn drop(&mut self) {
        let items = std::mem::take(&mut *lock(&self.items));
        let mut stations: Vec<Arc<Station>> = Vec::new();
        for (station, _) in &items {
            if !stations.iter().any(|other| Arc::ptr_eq(other, station)) {
                stations.push(station.clone());
            }
        }
        let told = |what: &str, result: Result<()>| {
            if let Err(error) = result {
                log(Level::Debug, || format!("{what}: {error}"));
            }
        };
        stations.iter().for_each(|station| told("a group's last work", station.context.synchronize()));
        drop(items);
        stations.iter().for_each(|station| told("private memory", station.pool.trim()));
    }
}

/// What a rank needs before it has windows: its device, and the memory that host and kernels share.
pub struct Ground {
    station: Arc<Station>,
    pinned: Arc<Pinned>,
    /// Blocks of sums that may wait by themselves; of each kernel that moves (token, expert) pairs.
    waiting_blocks: u32,
    pair_blocks: [u32; 4],
    stream_blocks: u32,
    sharing: u32,
    wire: Option<Arc<dyn Wire>>,
    desks: Option<Arc<Desks>>,
}

/// Grids that a device runs at a time, by CUDA's table of compute capabilities: a waiting kernel takes one of them.
const RESIDENT_GRIDS: u32 = 128;

impl Ground {
    /// `sharing`: the ranks on this device; `ranks`: all.
    pub fn new(ordinal: i32, slots: u32, sharing: u32, ranks: u32) -> Result<Ground> {
        let station = Station::of(ordinal)?;
        // A call has at most one waiting kernel at a time, of one block; all of them must find a place beside those
        // that move rows.
        let most = RESIDENT_GRIDS - 1;
        if sharing.saturating_mul(slots) > most {
            return Err(Error::unsupported(format!(
                "ranks_per_device * num_slots is {}, {} runs at most {most} waiting kernels beside others",
                sharing as u64 * slots as u64,
                station.context.describe()
            )));
        }
        let pinned = Arc::new(Pinned::new(&station.context, pinned_bytes(slots))?);
        let waiting_blocks = combine::waiting_blocks(&station.kernels, station.sms(), sharing, slots)?;
        let pair_blocks = pairs::waiting_blocks(&station.kernels, station.sms(), sharing, slots)?;
        let stream_blocks = fifo::waiting_blocks(&station.kernels, station.sms(), sharing, slots, ranks)?;
        Ok(Ground {
            station,
            pinned,
            waiting_blocks,
            pair_blocks,
            stream_blocks,
            sharing,
            wire: None,
            desks: None,
        })
    }
    /// Rows and words are carried, in the place of windows that peers address.
    pub fn carried_by(&mut self, wire: Arc<dyn Wire>) {
        self.wire = Some(wire);
    }
    pub fn context(&self) -> &Arc<Context> {
        &self.station.context
    }
}

/// Bytes of a slot's words about collectives.
const MARKS: usize = 32;

/// Control, then two records a slot, then a word a slot for hosts that wait, then a slot's words about collectives, then what a
/// rank that leaves writes.
fn pinned_bytes(slots: u32) -> usize {
    size_of::<Control>() + slots as usize * (2 * size_of::<Record>() + 8 + MARKS) + 16
}

/// Private device memory of a comm, routings apart.
pub fn private_bytes(map: &Map) -> u64 {
    let sizes = &map.sizes;
    Layout::new(map).bytes + sizes.slots as u64 * scratch_bytes(map)
}

/// A slot's quantised tokens and their scales, unless they are quantised on their way.
fn scratch_bytes(map: &Map) -> u64 {
    if map.sizes.grid.layout == LayoutKind::ExpertPadded {
        0
    } else {
        map.sizes.scratch_bytes() * map.sizes.grid.bound as u64
    }
}

/// What lies where in the comm's private memory.
#[derive(Clone, Copy)]
struct Layout {
    windows: u64,
    owner: u64,
    place: u64,
    /// The experts that are this rank's.
    own: u64,
    /// Where each rank's experts start, numbered rank after rank, and how many they are.
    firsts: u64,
    told: u64,
    shared: u64,
    slots: u64,
    /// What a rank knows of its FIFOs.
    fifos: u64,
    /// Where couriers carry: by rank, its inbox; the own window.
    inboxes: u64,
    alone: u64,
    bytes: u64,
}

impl Layout {
    fn new(map: &Map) -> Layout {
        let (ranks, experts) = (map.sizes.ranks() as u64, map.sizes.num_experts as u64);
        let mut end = 0u64;
        let mut take = |bytes: u64| {
            let at = end;
            end = (end + bytes).next_multiple_of(256);
            at
        };
        let slots = map.sizes.slots as u64;
        let inboxes = if map.sizes.uses.posted { ranks * 8 } else { 0 };
        Layout {
            windows: take(ranks * 8),
            owner: take(experts * 4),
            place: take(experts * 4),
            own: take(map.sizes.experts as u64 * 4),
            firsts: take((ranks + 1) * 4),
            told: take(slots * ranks * 4),
            shared: take(size_of::<Shared>() as u64),
            slots: take(slots * size_of::<Slot>() as u64),
            fifos: take(slots * fifo::state_bytes(map)),
            inboxes: take(inboxes),
            alone: take(inboxes),
            bytes: end,
        }
    }
}

/// A rank on a CUDA device.
pub struct Cuda {
    rank: u32,
    ranks: u32,
    map: Map,
    routing: RoutingMap,
    experts: Experts,
    health: Arc<Health>,
    private: Arc<DeviceMemory>,
    layout: Layout,
    /// A slot's quantised tokens.
    scratch: Arc<Vec<DeviceMemory>>,
    owners: Owners,
    waiting_blocks: u32,
    pair_blocks: [u32; 4],
    stream_blocks: u32,
    /// Ranks on this device.
    sharing: u32,
    pinned: Arc<Pinned>,
    slots: Vec<Mutex<HostSlot>>,
    stats: Stats,
    /// Of all calls, the loosest bound on multiprocessors; 0 before the first.
    #[cfg(feature = "jitter")]
    loosest: AtomicU32,
    /// By slot: memory of routings that are gone, for those to come. It never goes back while the comm lives, since
    /// work that uses it may still be on its way; the work of a slot is in order.
    spare: Arc<Vec<Mutex<Vec<DeviceMemory>>>>,
    aborted: AtomicBool,
    membership: Mutex<Membership>,
    /// Goes after what it keeps too, and before the windows: the last one waits for what may still use any of them.
    attic: Arc<Attic>,
    bases: Bases,
    /// What carries rows and words, where windows do not reach.
    wire: Option<Arc<dyn Wire>>,
    /// What couriers carry, and who hands it to them.
    desks: Option<Arc<Desks>>,
    proxy: Mutex<Option<Proxy>>,
    station: Arc<Station>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|e| e.into_inner())
}

fn bytes_of<T>(values: &[T]) -> &[u8] {
    // SAFETY: integers; as many bytes as they have.
    unsafe { std::slice::from_raw_parts(values.as_ptr().cast(), size_of_val(values)) }
}

/// ceil(2^32 / n): the high half of a product with it is a quotient, as long as dividend * n < 2^32. 0 for 1, which
/// has no such reciprocal of 32 bits.
fn reciprocal(n: u32) -> u32 {
    (1u64 << 32).div_ceil(n as u64) as u32
}

/// A slot before its first step.
fn idle(absent: bool) -> Slot {
    Slot { epoch: FIRST_EPOCH.wrapping_sub(1), absent: absent as u32, ..Slot::default() }
}

/// A replay of which everything is told anew.
const ANEW: u32 = 2;

/// A slot's state that the host does not know: a dispatch follows a dispatch, and every rank has read the former one.
const OPENED: u32 = 4;

impl Cuda {
    /// Puts this rank's own window into its first state: no peer may step before that.
    pub fn new(
        rank: u32,
        map: Map,
        experts: Experts,
        bases: Bases,
        health: Arc<Health>,
        ground: Ground,
        attic: Arc<Attic>,
    ) -> Result<Cuda> {
        let Ground { station, pinned, waiting_blocks, pair_blocks, stream_blocks, sharing, wire, desks } =
            ground;
        let by_pairs = map.sizes.grid.layout == LayoutKind::ExpertPadded;
        if by_pairs && pair_blocks.iter().any(|blocks| *blocks < 2) {
            return Err(Error::unsupported(format!(
                "rank {rank}: ranks_per_device * num_slots is {}, layout {} waits with two blocks for each, and {} has room \
                 for fewer",
                sharing as u64 * map.sizes.slots as u64,
                map.sizes.grid.layout.name(),
                station.context.describe()
            )));
        }
        if map.sizes.uses.fifos {
            fifo::check(rank, &map, stream_blocks, sharing, &station.context.describe())?;
        }
        // A block that places experts fills most of a multiprocessor while it waits.
        let waiting = sharing as u64 * map.sizes.slots as u64;
        if map.sizes.grid.layout == LayoutKind::ExpertContiguous && 2 * waiting > station.sms() as u64 {
            return Err(Error::unsupported(format!(
                "rank {rank}: ranks_per_device * num_slots is {waiting}, layout {} waits on a multiprocessor for each, and may on \
                 half of those of {}",
                map.sizes.grid.layout.name(),
                station.context.describe()
            )));
        }
        let named = |e: Error| e.context(format!("rank {rank}"));
        let layout = Layout::new(&map);
        let private = Arc::new(DeviceMemory::zeroed(&station.pool, layout.bytes).map_err(named)?);
        let (ranks, slots) = (map.sizes.ranks(), map.sizes.slots);

        let windows: Vec<u64> = (0..ranks).map(|r| bases.at(r, 0, 0) as u64).collect();
        private.write(layout.windows, bytes_of(&windows))?;
        let places: Vec<(u32, u32)> = (0..experts.num()).map(|e| experts.place(e as usize)).collect();
        let owner: Vec<i32> = places.iter().map(|(owner, _)| *owner as i32).collect();
        let place: Vec<i32> = places.iter().map(|(_, place)| *place as i32).collect();
        let mut own: Vec<(i32, i32)> =
            (0..).zip(&places).filter(|(_, at)| at.0 == rank).map(|(e, at)| (at.1 as i32, e)).collect();
        own.sort_unstable();
        let own: Vec<i32> = own.into_iter().map(|(_, expert)| expert).collect();
        private.write(layout.owner, bytes_of(&owner))?;
        private.write(layout.place, bytes_of(&place))?;
        private.write(layout.own, bytes_of(&own))?;
        let firsts: Vec<u32> = (0..ranks).map(|r| experts.start(r)).chain([experts.num()]).collect();
        private.write(layout.firsts, bytes_of(&firsts))?;
        private.write(layout.slots, bytes_of(&vec![idle(false); slots as usize]))?;
        let address = private.address();
        let owners = Owners {
            owner: address + layout.owner,
            place: address + layout.place,
            experts: experts.num(),
            ..divisions(&owner, ranks)
        };
        let scratch = match scratch_bytes(&map) {
            0 => Vec::new(),
            bytes => (0..slots)
                .map(|_| DeviceMemory::new(&station.pool, bytes).map_err(named))
                .collect::<Result<_>>()?,
        };
        let control: *const Control = pinned.as_ptr().cast();
        // SAFETY: the pinned memory begins with a Control, and lives as long as the Arc.
        unsafe {
            let keep: Arc<dyn Any + Send + Sync> = pinned.clone();
            health.mirror((&raw const (*control).aborted).cast(), (&raw const (*control).dead).cast(), keep);
        }
        let cuda = Cuda {
            rank,
            ranks,
            routing: RoutingMap::new(&map.sizes),
            slots: (0..slots).map(|_| Mutex::default()).collect(),
            spare: Arc::new((0..slots).map(|_| Mutex::default()).collect()),
            map,
            experts,
            attic,
            bases,
            wire,
            desks,
            proxy: Mutex::new(None),
            health,
            station,
            private,
            layout,
            scratch: Arc::new(scratch),
            owners,
            waiting_blocks,
            pair_blocks,
            stream_blocks,
            sharing,
            pinned,
            stats: Stats::default(),
            #[cfg(feature = "jitter")]
            loosest: AtomicU32::new(0),
            aborted: AtomicBool::new(false),
            membership: Mutex::new(Membership::first(ranks)),
        };
        cuda.reset_window()?;
        cuda.write_inboxes()?;
        Ok(cuda)
    }

    /// Control words are zero, and no flag of the first epoch has come.
    fn reset_window(&self) -> Result<()> {
        if let Some(desks) = &self.desks {
            desks.reset();
            return Ok(());
        }
        let window = |offset, bytes| self.bases.at(self.rank, offset, bytes) as u64;
        let gone = self.ranks as u64 * 4;
        self.write(window(0, gone), &vec![0; gone as usize])?;
        let before = FIRST_EPOCH.wrapping_sub(1);
        for slot in 0..self.map.sizes.slots {
            let start = self.map.mailbox(slot, 0);
            let mut control = vec![0u8; self.map.control_bytes_of_slot() as usize];
            for source in 0..self.ranks {
                let mailbox = (self.map.mailbox(slot, source) - start) as usize;
                let pair = [mail::DISPATCH_PAIR, mail::DISPATCH_PAIR + 8];
                for flag in pair.into_iter().chain([mail::COMBINE_FLAG, mail::READ_FLAG, mail::COUNTS_FLAG]) {
                    let word = (before as u64) << 32;
                    control[mailbox + flag as usize..][..8].copy_from_slice(&word.to_le_bytes());
                }
                // As a progress word has it: no operation, no bound.
                let word = (before & 0x0fff_ffff) as u64;
                control[mailbox + mail::PROGRESS as usize..][..8].copy_from_slice(&word.to_le_bytes());
            }
            // Counts carry epochs of their own.
            let counts = (self.map.counts(slot, 0) - start) as usize;
            let count_bytes = if self.map.sizes.uses.counts { self.map.count_stride() } else { 0 };
            for word in control[counts..][..(self.ranks as u64 * count_bytes) as usize].chunks_exact_mut(8) {
                word.copy_from_slice(&((before as u64) << 32).to_le_bytes());
            }
            self.write(window(start, control.len() as u64), &control)?;
        }
        Ok(())
    }

    /// Copies into device memory and returns when that is done; on a stream of our own.
    fn write(&self, at: u64, from: &[u8]) -> Result<()> {
        // SAFETY: callers give addresses of windows and of outputs that comm checked, and as many bytes.
        unsafe { self.station.stream.copy_in(at, from) }
    }

    /// Ends what this rank's kernels are at, and returns when they have. They do what they do in an abort.
    fn end_work(&self) -> Result<()> {
        let control: *const Control = self.pinned.as_ptr().cast();
        // SAFETY: the pinned memory begins with a Control; the word is an atomic for both sides.
        unsafe { (*(&raw const (*control).aborted).cast::<AtomicU32>()).store(1, Ordering::SeqCst) };
        self.station.context.synchronize()
    }

    fn slot_at(&self, slot: u32) -> u64 {
        self.layout.slots + slot as u64 * size_of::<Slot>() as u64
    }

    fn read_slots(&self) -> Result<Vec<Slot>> {
        let mut slots = vec![Slot::default(); self.map.sizes.slots as usize];
        // SAFETY: integers, of any bits.
        let bytes = unsafe {
            std::slice::from_raw_parts_mut(slots.as_mut_ptr().cast::<u8>(), size_of_val(&slots[..]))
        };
        self.private.read(self.layout.slots, bytes)?;
        Ok(slots)
    }

    /// What each rank has written of its end.
    fn gone_words(&self) -> Result<Vec<u32>> {
        if let Some(desks) = &self.desks {
            return Ok((0..self.ranks).map(|rank| desks.gone(rank).load(Ordering::Acquire)).collect());
        }
        let mut bytes = vec![0; self.ranks as usize * 4];
        // SAFETY: words at the start of this rank's own window.
        unsafe { self.station.stream.copy_out(self.own(self.map.gone(0)), &mut bytes)? };
        Ok(bytes
            .chunks_exact(4)
            .map(|word| u32::from_le_bytes([word[0], word[1], word[2], word[3]]))
            .collect())
    }
    fn has_destroyed(&self, peer: u32) -> bool {
        self.gone_words().is_ok_and(|words| words[peer as usize] == DESTROYED)
    }

    /// Where kernels find who takes part no more.
    fn absent(&self) -> u64 {
        self.private.address() + self.layout.shared + offset_of!(Shared, absent) as u64
    }

    /// All slots idle among other members, at the same addresses: captured graphs go on.
    fn begin_anew(&self, membership: Membership) -> Result<()> {
        match &*lock(&self.proxy) {
            Some(proxy) => proxy.begin_anew(membership),
            None => self.reset_window()?,
        }
        self.write_inboxes()?;
        let mut absent = [0u32; 1 + MAX_RANKS / 32];
        for rank in (0..self.ranks).filter(|rank| !membership.members.contains(*rank)) {
            (absent[0], absent[1 + rank as usize / 32]) =
                (1, absent[1 + rank as usize / 32] | 1 << (rank % 32));
        }
        let shared = |offset: usize| self.layout.shared + offset as u64;
        self.private.write(shared(offset_of!(Shared, absent)), bytes_of(&absent))?;
        self.private.write(shared(offset_of!(Shared, pending)), &[0; 4])?;
        let slots = self.map.sizes.slots;
        self.private.write(self.layout.slots, bytes_of(&vec![idle(absent[0] != 0); slots as usize]))?;
        let fifos = slots as u64 * fifo::state_bytes(&self.map);
        self.private.write(self.layout.fifos, &vec![0; fifos as usize])?;
        for slot in 0..slots {
            for order in [0, 1] {
                let at = Self::record_offset(slot) + order * size_of::<Record>();
                // SAFETY: a record of the pinned memory; no kernel of this rank is on its way.
                unsafe {
                    let record: *const Record = self.pinned.as_ptr().add(at).cast();
                    (*(&raw const (*record).valid).cast::<AtomicU32>()).store(0, Ordering::Release);
                }
            }
            // What was captured may be replayed now as before.
            let mut slot = lock(&self.slots[slot as usize]);
            *slot = HostSlot { captured: slot.captured, ..HostSlot::default() };
        }
        *lock(&self.membership) = membership;
        let control: *const Control = self.pinned.as_ptr().cast();
        // SAFETY: as in `end_work`.
        unsafe { (*(&raw const (*control).aborted).cast::<AtomicU32>()).store(0, Ordering::SeqCst) };
        // Another thread may have aborted meanwhile.
        if self.health.is_aborted() {
            self.health.abort();
        }
        Ok(())
    }

    /// Where a region of this rank's own window lies.
    fn own(&self, offset: u64) -> u64 {
        self.bases.at(self.rank, offset, 0) as u64
    }

    fn stream_of(&self, stream: CallersStream) -> RawStream {
        // SAFETY: the caller of the ABI vouches for it.
        unsafe { RawStream::new(stream.0) }
    }

    fn control(&self) -> u64 {
        self.pinned.address()
    }
    fn record_offset(slot: u32) -> usize {
        size_of::<Control>() + slot as usize * 2 * size_of::<Record>()
    }
    /// The word that a host waits for, of a slot.
    fn rows_word(&self, slot: u32) -> usize {
        Self::record_offset(self.map.sizes.slots) + slot as usize * 8
    }

    /// Of a slot: the word of the collective that began last, of the one that ended last, and of one that the host has ended.
    fn marks(&self, slot: u32) -> u64 {
        self.pinned.address() + (self.rows_word(self.map.sizes.slots) + slot as usize * MARKS) as u64
    }
    fn slot_of(&self, slot: u32) -> u64 {
        self.private.address() + self.slot_at(slot)
    }
    /// The same, where collectives carry anything; else 0.
    fn marks_of(&self, slot: u32) -> u64 {
        self.wire.as_ref().map_or(0, |_| self.marks(slot))
    }

    /// Where words are in every window: those of desks, where couriers carry.
    fn words_at(&self, on_desks: impl FnOnce(&desks::WordMap) -> u64, in_window: u64) -> u64 {
        match &self.desks {
            Some(desks) => self.to_desks().wrapping_add(on_desks(desks.words())),
            None => in_window,
        }
    }

    fn seat(&self, call: &Call, bound: u32, replays: bool) -> Seat {
        let private = self.private.address();
        let mut near = [0; NEAR_RANKS];
        for (rank, window) in near.iter_mut().enumerate().take(self.ranks as usize) {
            *window = self.bases.at(rank as u32, 0, 0) as u64;
        }
        Seat {
            near,
            windows: private + self.layout.windows,
            control: self.control(),
            record: self.control() + Self::record_offset(call.slot) as u64,
            slot: private + self.layout.slots + call.slot as u64 * size_of::<Slot>() as u64,
            shared: private + self.layout.shared,
            mailboxes: self.words_at(|words| words.mailbox(call.slot, 0), self.map.mailbox(call.slot, 0)),
            loss_masks: self
                .words_at(|words| words.loss_mask(call.slot, 0), self.map.loss_mask(call.slot, 0)),
            routing: call.routing,
            rank: self.rank,
            ranks: self.ranks,
            bound,
            replays: if replays && self.is_posted() { ANEW } else { replays as u32 },
        }
    }

    /// The rows of each block of what this rank received: by source, by expert, or of the one block that there is.
    fn kept_counts(&self, memory: &Block) -> u64 {
        let by_source = !self.is_by_pairs() && !self.is_packed();
        self.list(memory, if by_source { self.routing.rank_counts } else { self.routing.counts })
    }

    /// Where blocks of received rows start, if not at multiples of a size.
    fn block_starts(&self, memory: &Block) -> u64 {
        if self.is_contiguous() { self.list(memory, self.routing.starts) } else { 0 }
    }

    /// The address of a list of a routing; 0 if it is empty.
    fn list(&self, memory: &Block, list: List) -> u64 {
        if list.len == 0 { 0 } else { memory.list(list) as u64 }
    }

    /// # Safety
    /// As `driver::launch`, but for the context.
    unsafe fn launch<P: Copy>(
        &self,
        kernel: &driver::Kernel,
        shape: Launch,
        call: &Call,
        params: &P,
    ) -> Result<()> {
        #[cfg(feature = "jitter")]
        self.note_bound(call);
        // Kernels that overlap use a multiprocessor more than the larger of them.
        let shape = Launch { after_previous: shape.after_previous && call.max_sms == 0, ..shape };
        let _entered = self.station.context.enter()?;
        // SAFETY: forwarded; the context is current.
        unsafe { launch(kernel, &shape, self.stream_of(call.stream), params) }
            .map_err(|e| e.context(format!("rank {}", self.rank)))
    }

    fn check_half(&self, slot: &mut HostSlot, call: &Call, half: Half) -> Result<()> {
        if slot.closed.is_none() {
            slot.closed = self.loss_of(call.slot);
        }
        if let Some(error) = &slot.closed {
            return Err(error.clone());
        }
        if slot.captured {
            // Replays may have moved it on; the kernels know, and say so in the status.
            return Ok(());
        }
        slot.state.check(self.rank, slot.routing, call, half)
    }

    /// The capture that a call's stream is in.
    fn capture_of(&self, call: &Call) -> Result<Option<u64>> {
        let _entered = self.station.context.enter()?;
        self.stream_of(call.stream).capture_id().map_err(|e| e.context(format!("rank {}", self.rank)))
    }
}

/// How owners follow from experts by division; all zero where they do not.
fn divisions(owner: &[i32], ranks: u32) -> Owners {
    let (experts, ranks) = (owner.len() as u32, ranks.max(1));
    let (quotient, larger) = (experts / ranks, experts % ranks);
    let split = larger * (quotient + 1);
    let by_division =
        |e: u32| if e < split { e / (quotient + 1) } else { larger + (e - split) / quotient.max(1) };
    // Past 2^16 the product with a reciprocal is no longer exact; a quotient of 1 has no reciprocal.
    let fits = experts <= 1 << 16 && quotient > 1;
    if !fits || (0..experts).any(|e| owner[e as usize] != by_division(e) as i32) {
        return Owners::default();
    }
    Owners {
        larger,
        split,
        reciprocal_larger: reciprocal(quotient + 1),
        reciprocal: reciprocal(quotient),
        quotient,
        ..Owners::default()
    }
}

impl Drop for Cuda {
    fn drop(&mut self) {
        // Kernels that wait end at the abort.
        self.health.abort();
        // What kernels have left is sent, and that this rank leaves; who waits for this one's kernels waits no longer.
        drop(lock(&self.proxy).take());
        // Communicators go with the comm, and so what uses them must have ended: who watches them ends what does not.
        if self.wire.is_some()
            && let Err(error) = self.station.context.synchronize()
        {
            log(Level::Debug, || format!("rank {}: a comm's last work: {error}", self.rank));
        }
        let left = (self.pinned.clone(), self.private.clone(), self.scratch.clone(), self.spare.clone());
        lock(&self.attic.items).push((self.station.clone(), Box::new(left)));
    }
}

impl Device for Cuda {
    fn alloc(&self, slot: u32, bytes: u64) -> Result<Block> {
        let used = lock(&self.spare[slot as usize]).pop();
        let memory = match used {
            Some(memory) => memory,
            None => DeviceMemory::zeroed(&self.station.pool, bytes)
                .map_err(|e| e.context(format!("rank {}", self.rank)))?,
        };
        let (ptr, spare) = (memory.address(), self.spare.clone());
        let free = move |_, _| lock(&spare[slot as usize]).push(memory);
        Ok(Block {
            ptr: std::ptr::without_provenance_mut(ptr as usize),
            bytes: bytes as usize,
            free: Some(Box::new(free)),
        })
    }
    fn view(&self, slot: u32, region: Region) -> usize {
        self.own(self.map.region(slot, region)) as usize
    }
    fn is_inside(&self, address: usize, bytes: usize) -> bool {
        let window = self.own(0) as usize;
        address < window + self.map.window_bytes() as usize && address + bytes > window
    }

    fn check(&self, call: &Call, half: Half) -> Result<()> {
        if call.host_waits && self.capture_of(call)?.is_some() {
            return Err(Error::invalid(format!(
                "rank {}: flags has A2A_DISPATCH_HOST_COUNTS, which waits on the host, and stream is being captured",
                self.rank
            )));
        }
        self.check_half(&mut lock(&self.slots[call.slot as usize]), call, half)
    }
    fn open(&self, call: &Call, half: Half) -> Result<()> {
        let capture = self.capture_of(call)?;
        let mut slot = lock(&self.slots[call.slot as usize]);
        self.check_half(&mut slot, call, half)?;
        if half == Half::DispatchSend {
            // Inside one capture the order is known; past it only the kernels know what came before.
            let known = if capture.is_some() { slot.capture == capture } else { !slot.captured };
            slot.opens = !known || slot.state != State::Idle;
            slot.routing = call.routing;
        }
        slot.capture = capture;
        slot.captured |= capture.is_some();
        Ok(())
    }
    fn sees_steps(&self, slot: u32) -> bool {
        // A slot that is not there: the routing is another comm's, and will be refused.
        self.slots.get(slot as usize).is_some_and(|slot| !lock(slot).captured)
    }
    fn close(&self, call: &Call, half: Half) {
        lock(&self.slots[call.slot as usize]).state = State::after(half);
    }
    fn fail(&self, _call: &Call) {}

    // Taken note of by what `Dispatch` and `Uses` say; launched by the last op of a half.
    fn route(&self, _d: &Dispatch) -> Result<()> {
        Ok(())
    }
    fn renew(&self, _d: &Dispatch) -> Result<()> {
        Ok(())
    }
    fn tell_counts(&self, _d: &Dispatch) -> Result<()> {
        Ok(())
    }
    fn wait_counts(&self, _d: &Dispatch) -> Result<()> {
        Ok(())
    }
    fn place_rows(&self, _d: &Dispatch) -> Result<()> {
        Ok(())
    }
    fn push_rows(&self, _d: &Dispatch) -> Result<()> {
        Ok(())
    }
    fn push_first_rows(&self, _d: &Dispatch) -> Result<()> {
        Ok(())
    }
    fn push_banks(&self, _d: &Dispatch) -> Result<()> {
        Ok(())
    }
    fn publish_rows(&self, _d: &Dispatch) -> Result<()> {
        Ok(())
    }
    fn signal_dispatch(&self, d: &Dispatch) -> Result<()> {
        #[cfg(feature = "jitter")]
        self.poison_before_dispatch(d)?;
        if !d.split { Ok(()) } else { self.launch_halves(d, true, false) }
    }
    fn wait_dispatch(&self, _d: &Dispatch) -> Result<()> {
        Ok(())
    }
    fn land_rows(&self, _d: &Dispatch) -> Result<()> {
        Ok(())
    }
    fn gather_rows(&self, _d: &Dispatch) -> Result<()> {
        Ok(())
    }
    fn settle_rows(&self, d: &Dispatch) -> Result<()> {
        self.launch_halves(d, !d.split, true)?;
        if !self.is_streamed() {
            self.launch_land(d)?;
        }
        #[cfg(feature = "jitter")]
        self.poison_results(d)?;
        Ok(())
    }

    fn return_rows(&self, c: &Combine) -> Result<()> {
        self.keep_weights(c)?;
        self.launch_return(c)
    }
    fn stage_rows(&self, c: &Combine) -> Result<()> {
        self.keep_weights(c)?;
        self.launch_stage(c)
    }
    fn signal_combine(&self, c: &Combine) -> Result<()> {
        #[cfg(feature = "jitter")]
        self.poison_received(c)?;
        match c.split {
            true if self.is_streamed() => self.launch_stream_results(c, true, false),
            true => self.launch_send(c),
            false if self.is_posted() => self.launch_send(c),
            false => Ok(()),
        }
    }
    fn wait_combine(&self, _c: &Combine) -> Result<()> {
        Ok(())
    }
    fn reduce_rows(&self, c: &Combine) -> Result<()> {
        self.launch_sums(c)?;
        #[cfg(feature = "jitter")]
        self.poison_published(c)?;
        Ok(())
    }

    fn offer_rows(&self, _d: &Dispatch) -> Result<()> {
        Ok(())
    }
    fn stream_rows(&self, _d: &Dispatch) -> Result<()> {
        Ok(())
    }
    fn offer_results(&self, _c: &Combine) -> Result<()> {
        Ok(())
    }
    fn stream_results(&self, c: &Combine) -> Result<()> {
        self.launch_stream_results(c, !c.split, true)
    }

    fn received_rows(&self, d: &Dispatch) -> Result<u64> {
        {
            let _entered = self.station.context.enter()?;
            self.stream_of(d.call.stream).synchronize()?;
        }
        if let Some(error) = self.loss_of(d.call.slot) {
            return Err(error);
        }
        // SAFETY: one word of the pinned memory, which the kernels that wrote it have left.
        let word =
            unsafe { self.pinned.as_ptr().add(self.rows_word(d.call.slot)).cast::<u64>().read_volatile() };
        if word & TOO_MANY == 0 {
            return Ok(word);
        }
        lock(&self.slots[d.call.slot as usize]).state = State::Overflowed;
        let (rank, demand) = ((word & !TOO_MANY) >> 32, word & u32::MAX as u64);
        Err(too_many_rows(self.rank, d, rank as u32, demand))
    }
    fn void_status(&self, target: Target, slot: u32, lost: &[u32]) {
        let mut words = vec![0i32; 4 + self.ranks as usize];
        words[0] = 4;
        for rank in lost {
            words[4 + *rank as usize] = 1;
        }
        let at = match target {
            Target::View => self.view(slot, Region::Status) as u64,
            Target::Into(rows) => rows.ptr as u64,
            Target::Nothing | Target::Columns(_) => return,
        };
        if let Err(error) = self.write(at, bytes_of(&words)) {
            log(Level::Error, || format!("rank {}: a status could not be written: {error}", self.rank));
        }
    }
    fn async_error(&self) -> Option<Error> {
        #[cfg(feature = "jitter")]
        if let Some(error) = self.too_many_sms() {
            return Some(error);
        }
        let of_proxy = || lock(&self.proxy).as_ref().and_then(Proxy::failure);
        self.first_failure().or_else(|| self.wire.as_ref()?.failure()).or_else(of_proxy)
    }
    fn stats(&self) -> &Stats {
        let mut bytes = [0u8; size_of::<Shared>()];
        if self.private.read(self.layout.shared, &mut bytes).is_ok() {
            let words = bytes.chunks_exact(8).map(|word| {
                let mut bytes = [0; 8];
                bytes.copy_from_slice(word);
                u64::from_le_bytes(bytes)
            });
            for (counter, word) in self.stats.all().zip(words) {
                counter.store(word, Ordering::Relaxed);
            }
        }
        &self.stats
    }
    fn set_timeout(&self, first_step: Duration, step: Duration) {
        let control: *mut Control = self.pinned.as_ptr().cast();
        let nanoseconds = |time: Duration| u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        // SAFETY: the pinned memory begins with a Control; kernels read these words whole.
        unsafe {
            (&raw mut (*control).first_step_ns).write_volatile(nanoseconds(first_step));
            (&raw mut (*control).step_ns).write_volatile(nanoseconds(step));
        }
    }
    fn membership(&self) -> Membership {
        *lock(&self.membership)
    }
    fn busy_slot(&self) -> Option<u32> {
        // Only the kernels know. `suspend` ends what they are at; where couriers carry, they come to their end.
        if !self.is_posted() {
            return None;
        }
        self.busy_when_done().unwrap_or_else(|error| {
            log(Level::Error, || format!("rank {}: {error}", self.rank));
            Some(0)
        })
    }
    fn suspend(&self, why: &Error) -> Result<Standing> {
        self.end_work()?;
        let slots = self.read_slots()?;
        let mut standing = Standing::default();
        for (number, slot) in (0..).zip(&slots) {
            let is_whole = slot.state == State::Idle as u32 || slot.state == OPENED;
            standing.whole.push(slot.sequence.saturating_sub(u64::from(!is_whole)));
            let loss = self.loss_of(number).and_then(|error| error.loss);
            loss.iter().flat_map(|loss| &loss.lost).for_each(|rank| standing.given_up.insert(*rank));
            lock(&self.slots[number as usize]).closed.get_or_insert_with(|| why.clone());
            let closed = (Status::PeerLost as u32).to_le_bytes();
            self.private.write(self.slot_at(number) + offset_of!(Slot, closed) as u64, &closed)?;
        }
        Ok(standing)
    }
    fn has_left(&self, peer: u32) -> bool {
        self.health.is_dead(peer) || self.gone_words().is_ok_and(|words| words[peer as usize] != 0)
    }
    fn cannot_touch(&self, peer: u32) -> bool {
        // A process that has ended has no kernels, unless another one runs them for it. What a thread has launched before it
        // destroyed its comm ends within this context.
        self.health.is_proven_dead(peer) && !self.station.context.abilities().mps
            || self.has_destroyed(peer)
                && self.bases.local.contains(peer)
                && self.station.context.synchronize().is_ok()
    }
    fn left_behind_by(&self) -> Option<u32> {
        let words = self.gone_words().ok()?;
        words.iter().position(|word| *word == WITHOUT).map(|peer| peer as u32)
    }
    fn leave_behind(&self, lost: u32) {
        let at = self.bases.at(lost, self.map.gone(self.rank), 4) as u64;
        if let Err(error) = self.write(at, &WITHOUT.to_le_bytes()) {
            log(Level::Error, || format!("rank {}: rank {lost} could not be told: {error}", self.rank));
        }
    }
    fn recovered(self: Arc<Self>, membership: Membership) -> Result<Arc<dyn Device>> {
        self.begin_anew(membership)?;
        Ok(self)
    }
    fn shares_mappings(&self, peer: u32) -> bool {
        self.bases.local.contains(peer) && !self.has_destroyed(peer)
    }
    fn leave(&self, aborted: bool) {
        // An abort stays an abort when the comm is destroyed afterwards.
        if self.aborted.swap(true, Ordering::AcqRel) {
            return;
        }
        let word = if aborted { 2u32 } else { 1 };
        if self.is_posted() {
            lock(&self.proxy).iter().for_each(|proxy| proxy.leave(word));
            return;
        }
        // SAFETY: the last word of the pinned memory, which only this call writes.
        let from = unsafe {
            let at = self.pinned.as_ptr().add(pinned_bytes(self.map.sizes.slots) - 16);
            (*at.cast::<AtomicU32>()).store(word, Ordering::Release);
            std::slice::from_raw_parts(at, 4)
        };
        for peer in 0..self.ranks {
            let at = self.bases.at(peer, self.map.gone(self.rank), 4) as u64;
            // SAFETY: a word of a window; the source lives as long as the stream's work, which drop waits for.
            let _ = unsafe { self.station.stream.start_copy_in(at, from) };
        }
    }
}

/// What a thread that watches collectives sees of them, and tells kernels behind them: all in pinned memory, because a copy
/// might wait in the queue of the collective that it is about.
pub struct Lookout {
    pinned: Arc<Pinned>,
    slots: u32,
}

impl Lookout {
    /// One of a slot's words.
    fn mark(&self, slot: u32, word: usize) -> &AtomicU64 {
        let at = Cuda::record_offset(self.slots) + self.slots as usize * 8 + slot as usize * MARKS + word * 8;
        // SAFETY: a word of the pinned memory that kernels and this write whole.
        unsafe { &*self.pinned.as_ptr().add(at).cast() }
    }
    /// The operation that has begun on a slot and not ended: its number, twice, + 1 before the comm's first step is done.
    pub fn in_flight(&self, slot: u32) -> Option<u64> {
        // The end is read before the beginning, so that one which ends meanwhile is not taken for one in flight.
        let ended = self.mark(slot, 1).load(Ordering::Acquire);
        let begun = self.mark(slot, 0).load(Ordering::Acquire);
        (begun != ended).then_some(begun)
    }
    /// How long an operation may take.
    pub fn deadline(&self, operation: u64) -> Duration {
        let control: *const Control = self.pinned.as_ptr().cast();
        // SAFETY: the pinned memory begins with a Control; the host writes these words whole.
        let nanoseconds = unsafe {
            if operation % 2 == 1 {
                (&raw const (*control).first_step_ns).read_volatile()
            } else {
                (&raw const (*control).step_ns).read_volatile()
            }
        };
        Duration::from_nanos(nanoseconds)
    }
    /// From now on nothing counts of what the slot's operation brings; false if it has come to its end meanwhile. The kernel
    /// behind it sees this, or this sees what that kernel has told (mark_end), or both.
    pub fn break_off(&self, slot: u32, operation: u64) -> bool {
        let broken = self.mark(slot, 2);
        broken.store(operation, Ordering::SeqCst);
        fence(Ordering::SeqCst);
        let is_there = self.in_flight(slot) == Some(operation);
        if is_there {
            // What is behind it on the same communicator brings nothing either.
            broken.store(u64::MAX, Ordering::SeqCst);
        }
        is_there
    }
}

/// As many blocks as a call may use multiprocessors, since each may be on one of its own.
fn within(call: &Call, blocks: u32) -> u32 {
    if call.max_sms > 0 { blocks.min(call.max_sms) } else { blocks }
}

/// Threads of a block: `few` where blocks are many, `most` where they must not be.
fn threads(call: &Call, few: u32, most: u32) -> u32 {
    if call.max_sms > 0 { most } else { few }
}

impl Cuda {
    pub fn lookout(&self) -> Lookout {
        Lookout { pinned: self.pinned.clone(), slots: self.map.sizes.slots }
    }

    /// A dispatch, or either half of it.
    fn launch_halves(&self, d: &Dispatch, sends: bool, waits: bool) -> Result<()> {
        if self.is_posted() {
            self.launch_posted(d, sends, waits)
        } else if self.is_streamed() {
            self.launch_stream(d, sends, waits)
        } else if self.is_by_pairs() {
            self.launch_pairs(d, sends, waits)
        } else if self.is_packed() {
            self.launch_packed(d, sends, waits)
        } else if let Some(wire) = &self.wire {
            self.launch_carried(wire, d, sends, waits)
        } else if sends {
            self.launch_dispatch(d, waits)
        } else {
            self.launch_receive(d)
        }
    }
}
