//! A rank's membership of a group: creating it, taking it through its steps, ending it.
//!
//! This layer checks what a call asks against what the comm was made for, and remembers between the halves of a step
//! what the second half needs. What happens to rows is the backend's business, what state a slot is in the device's.

#![forbid(unsafe_code)]

mod combine;
mod dispatch;
mod explain;
mod history;
mod membership;
mod routing;
mod tensor;
mod watchdog;

use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, RwLock, TryLockError};
use std::time::{Duration, Instant};

use crate::backend::{self, Backend};
use crate::config::{Bootstrap, CallersComm, Config, DeviceKind, MAX_TIMEOUT_MS, TransportKind};
use crate::device::cuda::{self, Cuda};
use crate::device::grid::Grid;
use crate::device::host::Host;
use crate::device::{Call, Device, Half, Health, Membership, Region, Rows, Stats, Stream, Target};
use crate::error::{Error, Loss, Result, Status};
use crate::fault::{self, Point};
use crate::log::{Level, log};
use crate::memory::vmm::{self, VmmWindow};
use crate::memory::{Apart, Mapped, WindowFd, Windows};
use crate::transport::bootstrap;
use crate::transport::bootstrap::{Reach, Tied};
use crate::transport::nccl::{self, Communicators, Origin};
use crate::transport::nixl;

pub use crate::transport::bootstrap::{decline, new_unique_id};
pub use combine::{CombineRecv, CombineSend};
pub use dispatch::{DispatchRecv, DispatchSend};
pub use explain::{Memory, Plan, explain};
use history::{History, Outcome, What};
use membership::Past;
pub use routing::Routing;
use routing::Sent;
pub use tensor::{ColumnTensor, Element, Output, Tensor, View};
use watchdog::{Lifeline, Watchdog};

pub fn query_memory(config: &Config) -> Result<Memory> {
    explain::plan(config).map(|plan| plan.memory())
}

pub struct Comm {
    id: u64,
    config: Config,
    plan: Plan,
    backend: &'static dyn Backend,
    /// `None` once destroyed.
    device: RwLock<Option<Arc<dyn Device>>>,
    health: Arc<Health>,
    /// The group's key: its survivors meet under it.
    key: [u8; 16],
    windows: Mapped,
    past: Mutex<Past>,
    alive: Mutex<Option<Alive>>,
    /// The ways to other ranks, where they come and go; `None` once destroyed.
    mesh: RwLock<Option<Arc<nixl::Mesh>>>,
    /// What this rank takes part with when it is alone no more (`set_rank_mask`).
    masked: Mutex<Option<Arc<dyn Device>>>,
    /// Held by the call in flight.
    in_call: Mutex<()>,
    /// Why the comm as a whole has failed.
    failure: Mutex<Option<Error>>,
    first_step_timeout_ms: AtomicU64,
    timeout_ms: AtomicU64,
    dispatched: AtomicBool,
    first_step_done: AtomicBool,
    next_routing: AtomicU64,
    history: History,
}

/// Ends with the comm, in this order: peers learn of it, then the threads stop.
struct Alive {
    lifeline: Option<(Lifeline, Option<Tied>)>,
    /// `None` where couriers tell who is gone.
    _watchdog: Option<Watchdog>,
    _watch: Option<nccl::Watch>,
}

static NEXT_COMM: AtomicU64 = AtomicU64::new(1);

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // A panic fails the comm by itself; what the lock guards is still whole.
    mutex.lock().unwrap_or_else(|e| e.into_inner())
}

impl Comm {
    pub fn create(mut config: Config) -> Result<Arc<Comm>> {
        let callers = meet_over_callers(&mut config)?;
        let is_posted = config.wants_nixl();
        let tell = |error: &Error| match is_posted {
            true => nixl::decline(&config.meeting, error),
            false => decline(&config.meeting, error),
        };
        let plan = explain::plan(&config).inspect_err(tell)?;
        config.chosen = Some((plan.backend, plan.layout));
        let health = Arc::new(Health::new(config.num_ranks));
        if is_posted {
            let plan = explain::affordable(&config).inspect_err(tell)?;
            let built = build_posted(&config, &plan, &health).inspect_err(tell)?;
            return Comm::new(config, plan, health, bootstrap::random()?, built, None);
        }

        let rank = config.rank;
        let mut own = None;
        let started = Instant::now();
        let others = bootstrap::may_meet_others(&config.meeting);
        let reach = if explain::may_be_apart(&config, others) { Reach::Hosts } else { Reach::OneHost };
        let is_carried = plan.transport == TransportKind::Nccl;
        let gift = |apart: bool| match (is_carried || apart) && callers.is_none() {
            true => nccl::new_id(),
            false => Ok(Vec::new()),
        };
        let mut gathered = bootstrap::gather(&config, reach, gift, |apart| {
            // Refused here and not before, so that the other ranks hear of it.
            let config = if apart { explain::apart(&config) } else { config.clone() };
            let plan = explain::affordable(&config)?;
            let (lifeline, mut fds) = Lifeline::new(rank)?;
            let (window, fd) = OwnWindow::create(&config, plan.memory().window, &fds)?;
            fds.insert(0, fd);
            own = Some((lifeline, window, config, plan));
            Ok(fds)
        })?;
        let Some((lifeline, window, config, plan)) = own else {
            return Err(Error::internal("no window was made"));
        };
        let fds = std::mem::take(&mut gathered.fds);
        let key = gathered.key;
        let origin = match callers {
            Some(callers) => Origin::Caller(callers),
            None => Origin::Id(&gathered.gift),
        };
        let deadline = started + Duration::from_millis(config.meeting.timeout_ms);
        let carried = (plan.transport == TransportKind::Nccl).then_some((origin, deadline));
        let built = build(&config, &plan, &health, window, fds, carried);
        let (built, ties) = match built {
            Ok(built) => {
                fault::at(Point::CreateMapped);
                let ties = gathered.finish(Ok(()))?;
                (built, ties.map(|ties| ties.watch(health.clone())).transpose()?)
            }
            Err(error) => {
                // The others are told; their answer changes nothing about our own reason.
                let _ = gathered.finish(Err(error.clone()));
                return Err(error);
            }
        };
        Comm::new(config, plan, health, key, built, Some((lifeline, ties)))
    }

    fn new(
        config: Config,
        plan: Plan,
        health: Arc<Health>,
        key: [u8; 16],
        built: Built,
        lifeline: Option<(Lifeline, Option<Tied>)>,
    ) -> Result<Arc<Comm>> {
        let Some(backend) = backend::of(plan.backend) else {
            return Err(Error::internal("a backend was chosen that is not built"));
        };
        let Built { device, windows, watchdog, watch, mesh } = built;
        let (rank, bytes) = (config.rank, plan.memory().window);
        log(Level::Info, || {
            format!(
                "rank {rank} of {}: {} ({}) on {}, {bytes} bytes of window",
                config.num_ranks,
                plan.backend.name(),
                plan.layout.name(),
                config.device.name()
            )
        });
        Ok(Arc::new(Comm {
            id: NEXT_COMM.fetch_add(1, Ordering::Relaxed),
            backend,
            device: RwLock::new(Some(device)),
            health,
            key,
            windows,
            past: Mutex::default(),
            alive: Mutex::new(Some(Alive { lifeline, _watchdog: watchdog, _watch: watch })),
            mesh: RwLock::new(mesh),
            masked: Mutex::new(None),
            in_call: Mutex::new(()),
            failure: Mutex::new(None),
            first_step_timeout_ms: AtomicU64::new(config.first_step_timeout_ms),
            timeout_ms: AtomicU64::new(config.timeout_ms),
            dispatched: AtomicBool::new(false),
            first_step_done: AtomicBool::new(false),
            next_routing: AtomicU64::new(1),
            history: History::new(config.num_slots),
            config,
            plan,
        }))
    }

    pub fn config(&self) -> &Config {
        &self.config
    }
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    fn device(&self) -> Result<Arc<dyn Device>> {
        let device = self.device.read().unwrap_or_else(|e| e.into_inner());
        device.clone().ok_or_else(|| self.invalid("the comm was destroyed"))
    }

    /// Counters as they stand; zeros once the comm was destroyed.
    pub fn with_stats<T: Default>(&self, read: impl FnOnce(&Stats) -> T) -> T {
        self.device().map(|device| read(device.stats())).unwrap_or_default()
    }

    pub fn async_error(&self) -> Option<Error> {
        let of_steps = self.device().ok().and_then(|device| device.async_error());
        // Without its watch a comm works on, but what was promised of deaths holds no more.
        of_steps.or_else(|| lock(&self.failure).clone()).or_else(|| self.health.blind().cloned())
    }

    /// A failure's sentence, and behind it as many of the last operations as `room` bytes hold.
    pub fn error_text(&self, error: &Error, room: usize) -> String {
        // Cut at a character, so that the text stays UTF-8.
        let sentence = &error.message[..error.message.floor_char_boundary(room)];
        format!("{sentence}{}", self.history.tail(room - sentence.len()))
    }

    /// The last operations, as JSON. Takes no lock that is held while a call waits.
    pub fn history(&self) -> String {
        let ranks = |are: fn(&Health, u32) -> bool| -> Vec<u32> {
            (0..self.config.num_ranks).filter(|rank| are(&self.health, *rank)).collect()
        };
        serde_json::json!({
            "rank": self.config.rank,
            "num_ranks": self.config.num_ranks,
            "version": env!("CARGO_PKG_VERSION"),
            "age_us": self.history.age(),
            "gone_ranks": ranks(Health::is_dead),
            "dead_ranks": ranks(Health::is_proven_dead),
            "operations": self.history.operations(),
            "async_error": self.async_error().map(|error| error.message),
        })
        .to_string()
    }

    pub fn set_timeout(&self, first_step_ms: i64, ms: i64) -> Result<()> {
        for (name, value) in [("first_step_timeout_ms", first_step_ms), ("timeout_ms", ms)] {
            if !(0..=MAX_TIMEOUT_MS).contains(&value) {
                return Err(self.invalid(format!(
                    "{name} is {value}, it must be from 0 (as it is) to {}",
                    MAX_TIMEOUT_MS
                )));
            }
        }
        for (word, value) in [(&self.first_step_timeout_ms, first_step_ms), (&self.timeout_ms, ms)] {
            if value > 0 {
                word.store(value as u64, Ordering::Relaxed);
            }
        }
        let now = |word: &AtomicU64| Duration::from_millis(word.load(Ordering::Relaxed));
        self.device()?.set_timeout(now(&self.first_step_timeout_ms), now(&self.timeout_ms));
        Ok(())
    }

    /// Fails the whole comm; the first reason stays.
    pub fn fail(&self, error: Error) {
        lock(&self.failure).get_or_insert(error);
        self.leave();
    }

    pub fn abort(&self) {
        let text = format!("rank {}: the comm was aborted (a2a_abort)", self.config.rank);
        self.fail(Error::new(Status::Aborted, text));
    }

    /// Ends calls in flight and tells the peers.
    fn leave(&self) {
        self.health.abort();
        if let Ok(device) = self.device() {
            device.leave(true);
        }
        // No window tells the peers. Who holds the lock ends the comm, and with it the lifeline.
        if self.is_carried()
            && let Ok(mut alive) = self.alive.try_lock()
            && let Some(alive) = &mut *alive
        {
            alive.lifeline = None;
        }
    }

    pub fn destroy(&self) {
        // A call in flight sees the abort within one poll, so this lock is not waited for long.
        self.health.abort();
        let _call = lock(&self.in_call);
        fault::at(Point::DestroyBegins);
        let device = self.device.write().unwrap_or_else(|e| e.into_inner()).take();
        if let Some(device) = device {
            device.leave(false);
            fault::at(Point::DestroyGone);
        }
        drop(lock(&self.masked).take());
        drop(self.mesh.write().unwrap_or_else(|e| e.into_inner()).take());
        drop(lock(&self.alive).take());
        log(Level::Info, || format!("rank {}: comm destroyed", self.config.rank));
    }

    fn invalid(&self, text: impl std::fmt::Display) -> Error {
        Error::invalid(format!("rank {}: {text}", self.config.rank))
    }

    /// Makes this the call in flight.
    fn enter(&self) -> Result<(MutexGuard<'_, ()>, Arc<dyn Device>)> {
        let call = match self.in_call.try_lock() {
            Ok(call) => call,
            Err(TryLockError::Poisoned(e)) => e.into_inner(),
            Err(TryLockError::WouldBlock) => {
                return Err(Error::new(
                    Status::Busy,
                    format!("rank {}: another thread is inside a call on this comm", self.config.rank),
                ));
            }
        };
        if let Some(error) = lock(&self.failure).clone() {
            return Err(error);
        }
        Ok((call, self.device()?))
    }

    /// `max_sms`: the call's own bound, or 0.
    fn call(&self, routing: &Routing, stream: Stream, host_waits: bool, max_sms: u32) -> Call {
        let first = !self.first_step_done.load(Ordering::Relaxed);
        let ms = if first { &self.first_step_timeout_ms } else { &self.timeout_ms };
        Call {
            slot: routing.slot,
            stream,
            host_waits,
            max_sms: [max_sms, self.config.max_sms].into_iter().filter(|sms| *sms > 0).min().unwrap_or(0),
            routing: routing.id,
            started: Instant::now(),
            budget: Duration::from_millis(ms.load(Ordering::Relaxed)),
        }
    }

    pub fn routing_create(&self, slot: i32) -> Result<Routing> {
        let (_call, device) = self.enter()?;
        if slot < 0 || slot as u32 >= self.config.num_slots {
            return Err(self.invalid(format!("slot is {slot}, num_slots is {}", self.config.num_slots)));
        }
        Ok(Routing {
            id: self.next_routing.fetch_add(1, Ordering::Relaxed),
            comm: self.id,
            rank: self.config.rank,
            slot: slot as u32,
            memory: Arc::new(device.alloc(slot as u32, self.plan.routing.bytes())?),
            sent: Mutex::new(Sent::new(self.plan.map.sizes.grid, self.config.num_ranks)),
        })
    }

    fn check_routing(&self, routing: &Routing) -> Result<()> {
        if routing.comm != self.id {
            return Err(
                self.invalid(format!("the routing belongs to another comm (its rank is {})", routing.rank))
            );
        }
        Ok(())
    }

    // What both halves of both operations share.

    /// Runs a call as an operation that is on record.
    fn recorded<T>(
        &self,
        device: &dyn Device,
        call: &Call,
        what: What,
        tokens: u32,
        run: impl FnOnce() -> Result<T>,
    ) -> Result<T> {
        let operation = self.history.begin(call, what, tokens, device.sees_steps(call.slot));
        let result = run();
        operation.end(match &result {
            Ok(_) if self.config.device == DeviceKind::Cuda && !call.host_waits => Outcome::Enqueued,
            Ok(_) => Outcome::Done(Status::Success),
            Err(error) => Outcome::Done(error.status),
        });
        result
    }

    /// Runs one half of a step: its state is the device's, its loss is written where the caller looks.
    fn step(
        &self,
        device: &dyn Device,
        call: &Call,
        half: Half,
        status: Target,
        run: impl FnOnce(&dyn Device) -> Result<()>,
    ) -> Result<()> {
        let opened = device.open(call, half).inspect(|()| {
            if half == Half::DispatchSend {
                self.history.opened(call.slot, device.sees_steps(call.slot));
            }
        });
        let outcome = opened.and_then(|()| run(device));
        if outcome.is_err() {
            device.fail(call);
        }
        match outcome {
            Ok(()) => {
                match half {
                    Half::DispatchRecv => fault::at(Point::DispatchReceived),
                    Half::CombineRecv => fault::at(Point::CombineReceived),
                    _ => {}
                }
                device.close(call, half);
                // A second dispatch completes the first step of a comm that never combines.
                let second = half == Half::DispatchRecv && self.dispatched.swap(true, Ordering::Relaxed);
                if half == Half::CombineRecv || second {
                    self.first_step_done.store(true, Ordering::Relaxed);
                }
                Ok(())
            }
            Err(error) => {
                if error.status.is_step() {
                    let lost = error.loss.as_deref().map_or(&[][..], |loss: &Loss| &loss.lost);
                    device.void_status(status, call.slot, lost);
                }
                // What a driver, NCCL or NIXL refused leaves nothing to count on.
                if matches!(error.status, Status::Cuda | Status::Nccl | Status::Nixl) {
                    self.fail(error.clone());
                }
                // The abort's own sentence is the one on record.
                match lock(&self.failure).clone().filter(|_| error.status == Status::Aborted) {
                    Some(reason) => {
                        Err(Error { message: format!("{}; {}", error.message, reason.message), ..reason })
                    }
                    None => Err(error),
                }
            }
        }
    }

    /// The half that is due, or why it is not: a lost step is also said in `out.status`.
    fn check_due(&self, device: &dyn Device, call: &Call, half: Half, status: Option<&Output>) -> Result<()> {
        device.check(call, half).inspect_err(|error| {
            let ranks = self.config.num_ranks as usize;
            let region = Some((call.slot, Region::Status));
            let Some(output) = status.filter(|_| error.status.is_step()) else { return };
            // A tensor that does not fit is not written; the loss is what is reported.
            if let Ok(target) = self.check_small(device, "status", region, output, Element::I32, 4 + ranks) {
                let lost = error.loss.as_deref().map_or(&[][..], |loss: &Loss| &loss.lost);
                device.void_status(target, call.slot, lost);
            }
        })
    }

    fn check_outside(&self, device: &dyn Device, name: &str, (address, bytes): (usize, usize)) -> Result<()> {
        if device.is_inside(address, bytes) {
            return Err(self.invalid(format!(
                "the output {name} lies in the comm's own window and is not the view of this slot"
            )));
        }
        Ok(())
    }

    /// A small output: `count` elements, contiguous.
    fn check_small(
        &self,
        device: &dyn Device,
        name: &str,
        region: Option<(u32, Region)>,
        output: &Output,
        element: Element,
        count: usize,
    ) -> Result<Target> {
        let tensor = match output {
            Output::Nothing => return Ok(Target::Nothing),
            Output::View => return Ok(Target::View),
            Output::Into(tensor) => tensor,
            Output::Columns(_) => return Err(self.invalid(format!("the output {name} cannot lie by column"))),
        };
        if region.is_some_and(|(slot, region)| tensor.rows.address() == device.view(slot, region)) {
            return Ok(Target::View);
        }
        let has = tensor.rows.rows() * tensor.columns();
        if tensor.element != element || !tensor.rows.is_compact() {
            return Err(self.invalid(format!(
                "the output {name} holds {}, it must be {element}, contiguous",
                tensor.element
            )));
        }
        if has < count {
            let rank = self.config.rank;
            let text = format!("rank {rank}: the output {name} has {has} elements, it needs {count}");
            return Err(Error::new(Status::Overflow, text));
        }
        self.check_outside(device, name, (tensor.rows.address(), tensor.rows.span()))?;
        Ok(Target::Into(tensor.rows))
    }

    /// The experts this rank owns.
    fn local(&self) -> u32 {
        self.config.experts.count(self.config.rank)
    }

    /// The sizes of the two dimensions that rows have where they have two: (blocks, rows of each).
    fn row_blocks(&self, grid: &Grid) -> Option<(i64, i64)> {
        grid.block().map(|block| (grid.blocks(self.local()) as i64, block as i64))
    }

    /// A view of rows in the layout's shape: `columns` is `None` for rows of one element without a dimension.
    fn rows_view(
        &self,
        address: usize,
        element: Element,
        grid: &Grid,
        rows: i64,
        columns: Option<i64>,
    ) -> View {
        let mut sizes = [0; 3];
        let mut ndim = 0;
        let (first, second) = match self.row_blocks(grid) {
            Some((blocks, block)) => (blocks, Some(block)),
            None => (rows, None),
        };
        for size in [Some(first), second, columns].into_iter().flatten() {
            sizes[ndim] = size;
            ndim += 1;
        }
        View::new(address, element, &sizes[..ndim])
    }

    /// The caller's rows as the layout counts them: one dimension for all, or two where the layout has blocks.
    /// `None` if they do not fit.
    fn fit_rows(&self, tensor: &Tensor, grid: &Grid, row_bytes: usize) -> Option<Rows> {
        let blocks = self.row_blocks(grid);
        let shaped = |dims: &[i64]| blocks.is_some_and(|(blocks, block)| dims[..2] == [blocks, block]);
        let mut rows = tensor.rows;
        // One element a row: [blocks, block] has no dimension for it.
        if tensor.ndim == 2 && rows.row_bytes() != row_bytes && shaped(&tensor.dims) {
            rows = rows.split(tensor.dims[1] as usize)?;
        }
        (rows.row_bytes() == row_bytes && (tensor.ndim < 3 || shaped(&tensor.dims))).then_some(rows)
    }
}

impl Drop for Comm {
    fn drop(&mut self) {
        self.destroy();
    }
}

/// The caller's communicator, if it is one of these ranks; they meet over it if there is no other way.
fn meet_over_callers(config: &mut Config) -> Result<Option<CallersComm>> {
    let Some(callers) = config.nccl_comm else { return Ok(None) };
    // What else speaks against it is found by the plan.
    let is_carried = (config.device, config.transport) == (DeviceKind::Cuda, TransportKind::Nccl);
    if !is_carried || cuda::probe().is_err() || nccl::probe().is_err() {
        return Ok(None);
    }
    let seat = (config.rank, config.num_ranks, config.device_ordinal);
    let fits = nccl::check_fits(callers, seat).map_err(|e| e.context(format!("rank {}", config.rank)));
    if matches!(config.meeting.bootstrap, Bootstrap::Nothing) && config.num_ranks > 1 && fits.is_ok() {
        let timeout = Duration::from_millis(config.meeting.timeout_ms);
        let allgather = nccl::allgather(callers, config.device_ordinal, timeout);
        config.meeting.bootstrap = Bootstrap::Allgather(allgather);
    }
    fits.inspect_err(|error| decline(&config.meeting, error))?;
    Ok(Some(callers))
}

/// This rank's window before the others have theirs, and what it lies on.
enum OwnWindow {
    /// A descriptor is all of it.
    Host,
    Cuda(Box<cuda::Ground>, VmmWindow),
}

impl OwnWindow {
    /// `shared`: the lifeline and the other descriptors that peers get. Returns the window's own.
    fn create(config: &Config, bytes: u64, shared: &[OwnedFd]) -> Result<(OwnWindow, OwnedFd)> {
        if config.device == DeviceKind::Cpu {
            return Ok((OwnWindow::Host, WindowFd::create(config.rank, bytes)?.into_fd()));
        }
        let Some(lifeline) = shared.first() else { return Err(Error::internal("no lifeline was made")) };
        let ground = ground_of(config)?;
        let window = VmmWindow::create(ground.context(), config.rank, bytes, lifeline.as_fd())?;
        let fd = window.export()?;
        Ok((OwnWindow::Cuda(Box::new(ground), window), fd))
    }
}

/// What a comm is built of once the ranks have met.
struct Built {
    device: Arc<dyn Device>,
    windows: Mapped,
    watchdog: Option<Watchdog>,
    watch: Option<nccl::Watch>,
    mesh: Option<Arc<nixl::Mesh>>,
}

/// Of the UCX that NIXL brings: a host that vanishes is noticed. Beyond this machine only where the config allows it.
fn ucx_settings(remote: bool) -> String {
    let reach = if remote { "" } else { ",NET_DEVICES=lo" };
    format!("TCP_USER_TIMEOUT=3s{reach}")
}

/// A rank's own memory where couriers carry, before it has met anybody.
enum OwnMemory {
    Host(Box<Host>),
    Cuda(Box<Cuda>),
}

impl OwnMemory {
    /// And what of it couriers are told.
    fn create(config: &Config, plan: &Plan, health: &Arc<Health>) -> Result<(OwnMemory, nixl::Memory)> {
        let (rank, map, experts) = (config.rank, plan.map.clone(), config.experts.clone());
        if config.device == DeviceKind::Cpu {
            let memory = Apart::new(rank, &map)?;
            let host = Host::new(rank, map, experts, memory.bases(), health.clone());
            let (window, box_bytes) = (memory.window(), memory.box_bytes());
            let boxes = Box::new(move |peer, anew| memory.boxes(peer, anew));
            return Ok((OwnMemory::Host(Box::new(host)), nixl::Memory { window, box_bytes, boxes }));
        }
        let mut ground = ground_of(config)?;
        let memory = cuda::PostedMemory::new(&mut ground, rank, &map)?;
        let (bases, desks) = (memory.bases(rank, &map), memory.desks);
        let attic = Arc::new(cuda::Attic::default());
        let cuda = Cuda::new(rank, map, experts, bases, health.clone(), ground, attic)?;
        let (window, box_bytes) = (desks.all(), desks.box_bytes());
        let boxes = Box::new(move |peer, anew| desks.boxes(peer, anew));
        Ok((OwnMemory::Cuda(Box::new(cuda)), nixl::Memory { window, box_bytes, boxes }))
    }
}

fn ground_of(config: &Config) -> Result<cuda::Ground> {
    let (slots, sharing) = (config.num_slots, config.ranks_per_device);
    let ground = cuda::Ground::new(config.device_ordinal, slots, sharing, config.num_ranks);
    ground.map_err(|e| e.context(format!("rank {}", config.rank)))
}

/// A rank's own memory, and its ways to all others.
fn build_posted(config: &Config, plan: &Plan, health: &Arc<Health>) -> Result<Built> {
    let (rank, first) = (config.rank, config.meeting.num_ranks);
    let deadline = Instant::now() + Duration::from_millis(config.meeting.timeout_ms);
    let on_rank = |e: Error| e.context(format!("rank {rank}"));
    let (own, memory) = OwnMemory::create(config, plan, health)?;
    let agreed = config.agreed().into_iter().map(|(name, value)| (name.to_string(), value));
    let party =
        nixl::Party { meeting: config.meeting.clone(), ranks: config.num_ranks, fields: agreed.collect() };
    let mesh = nixl::Mesh::open(party, memory, |incarnation| {
        let name = format!("a2a.{rank}.{incarnation:016x}");
        let agent = nixl::Agent::new(&name, &ucx_settings(config.meeting.remote)).map_err(on_rank)?;
        Ok(Box::new(agent))
    })?;
    // Who is not there from the start is alone until others take it in.
    let membership = match rank < first {
        true => Membership::first(first),
        false => Membership::alone(rank),
    };
    if rank < first {
        let members: Vec<u32> = membership.members.iter().collect();
        mesh.connect(&members, deadline, &|| Ok(()))?;
    }
    let mesh = Arc::new(mesh);
    let device: Arc<dyn Device> = match own {
        OwnMemory::Host(host) => Arc::new(host.posted_by(mesh.clone(), membership, config.degrades)),
        OwnMemory::Cuda(cuda) => {
            cuda.post_with(mesh.clone(), membership)?;
            Arc::new(*cuda)
        }
    };
    let milliseconds = Duration::from_millis;
    device.set_timeout(milliseconds(config.first_step_timeout_ms), milliseconds(config.timeout_ms));
    Ok(Built { device, windows: Mapped::Apart, watchdog: None, watch: None, mesh: Some(mesh) })
}

/// Maps every window, puts this rank's own into its first state and starts the watchdog. No rank steps before all
/// have done this: the rendezvous ends with it.
fn build(
    config: &Config,
    plan: &Plan,
    health: &Arc<Health>,
    own: OwnWindow,
    fds: Vec<Vec<OwnedFd>>,
    carried: Option<(Origin<'_>, Instant)>,
) -> Result<Built> {
    let (rank, bytes) = (config.rank, plan.memory().window);
    let mut windows = Vec::with_capacity(fds.len());
    let mut watched = Vec::with_capacity(fds.len());
    for (peer, mut fds) in fds.into_iter().enumerate() {
        // A rank on another host has none to give; what tells of its end is kept elsewhere.
        if fds.is_empty() && carried.is_some() {
            watched.push(fds);
            continue;
        }
        if fds.len() < 2 {
            return Err(Error::new(
                Status::PeerLost,
                format!("rank {rank}: rank {peer} sent {} descriptors, at least 2 were due", fds.len()),
            ));
        }
        windows.push(fds.remove(0));
        watched.push(fds);
    }
    let (map, experts) = (plan.map.clone(), config.experts.clone());
    let mut watch = None;
    let (device, mapped): (Arc<dyn Device>, _) = match own {
        OwnWindow::Host => {
            let adopted = windows.into_iter().zip(0..).map(|(fd, peer)| WindowFd::adopt(peer, fd, bytes));
            let windows = adopted.collect::<Result<_>>().and_then(|windows| Windows::map(windows, bytes));
            let windows = windows.map_err(|e| e.context(format!("rank {rank}")))?;
            let host = Host::new(rank, map, experts, windows.bases(), health.clone());
            (Arc::new(host), Mapped::Host(windows))
        }
        OwnWindow::Cuda(mut ground, window) => {
            let deadline = carried.as_ref().map(|(_, deadline)| *deadline);
            let (windows, wire) = match carried {
                None => {
                    let lifelines = watched.iter().map(|fds| fds[0].as_fd());
                    (vmm::Windows::map(window, windows.into_iter().zip(lifelines).collect())?, None)
                }
                Some((origin, deadline)) => {
                    let context = ground.context().clone();
                    let _entered = context.enter()?;
                    let group = nccl::Group {
                        rank,
                        ranks: config.num_ranks,
                        slots: config.num_slots,
                        max_sms: config.max_sms,
                    };
                    let wire = Communicators::create(group, origin, deadline);
                    let wire = Arc::new(wire.map_err(|e| e.context(format!("rank {rank}")))?);
                    ground.carried_by(wire.clone());
                    (vmm::Windows::alone(window, config.num_ranks), Some(wire))
                }
            };
            // What is left behind is the group's where windows are, and a rank's own where they are not.
            let attic = vmm::attic(watched[if wire.is_some() { rank as usize } else { 0 }][0].as_fd())?;
            let cuda = Cuda::new(rank, map, experts, windows.bases(), health.clone(), *ground, attic)?;
            if let Some((wire, deadline)) = wire.zip(deadline) {
                cuda.warm_up(deadline)?;
                watch = Some(nccl::Watch::start(wire, cuda.lookout(), health.clone())?);
            }
            (Arc::new(cuda), Mapped::Cuda(windows))
        }
    };
    let milliseconds = Duration::from_millis;
    device.set_timeout(milliseconds(config.first_step_timeout_ms), milliseconds(config.timeout_ms));
    watched[rank as usize].clear();
    let watchdog = Some(Watchdog::start(rank, watched, health.clone())?);
    Ok(Built { device, windows: mapped, watchdog, watch, mesh: None })
}
