//! Faults at named points, for the tests alone: nothing without the feature `faults`, not even the points' names.
//!
//! Code says where it is (`at`), and which calls of the system or of the driver a test may let fail (`call`, `fails`). A
//! test arms one point of its process, for the n-th time that somebody comes past it: the process is killed or stopped
//! right there, the call fails, or the thread waits until it is let go.
//!
//! A leaf.

/// The points, and their names.
macro_rules! points {
    ($($(#[$about:meta])* $point:ident = $name:literal,)+) => {
        #[derive(Clone, Copy, PartialEq, Eq)]
        #[cfg_attr(feature = "faults", derive(Debug))]
        pub enum Point { $($(#[$about])* $point,)+ }

        #[cfg(feature = "faults")]
        impl Point {
            pub const ALL: &[Point] = &[$(Point::$point,)+];
            pub fn name(self) -> &'static str {
                match self { $(Point::$point => $name,)+ }
            }
        }
    };
}

points! {
    // Creating a comm: every rank.
    /// Before a rank listens or connects.
    CreateBegins = "create/begins",
    /// All windows are mapped, nobody was told yet.
    CreateMapped = "create/mapped",

    // Rank 0.
    CreateListening = "create/listening",
    /// A rank was let in.
    CreateSeated = "create/seated",
    /// All have joined, none was welcomed.
    CreateComplete = "create/complete",
    /// All windows have come, none was handed round.
    CreateCollected = "create/collected",
    /// A rank was told to go.
    CreateGo = "create/go",

    // The other ranks.
    CreateJoined = "create/joined",
    CreateWelcomed = "create/welcomed",
    CreateSentWindow = "create/sent_window",
    /// Rank 0 was told that all is mapped here.
    CreateReady = "create/ready",

    // A dispatch.
    /// Nothing of it was stored.
    DispatchBegins = "dispatch/begins",
    /// A rank is about to be told this one's counts; those before it have been.
    DispatchCounts = "dispatch/counts",
    /// The first half of a piece of a row is stored, the second is not.
    DispatchRow = "dispatch/row",
    /// Rows are out, no flag is.
    DispatchBeforeFlags = "dispatch/before_flags",
    /// A rank is about to get this one's flag; those before it have it.
    DispatchFlag = "dispatch/flag",
    DispatchAfterFlags = "dispatch/after_flags",
    /// Half of a peer's published rows of one kind were read.
    DispatchGather = "dispatch/gather",
    /// It has received all.
    DispatchReceived = "dispatch/received",

    // A combine.
    CombineBeforeFlags = "combine/before_flags",
    CombineFlag = "combine/flag",
    CombineAfterFlags = "combine/after_flags",
    /// The first elements of a row were added, the last ones were not read.
    CombineRow = "combine/row",
    CombineReceived = "combine/received",

    // Either.
    /// The first half of a row stands in a FIFO's entry.
    FifoEntry = "fifo/entry",
    /// A wait for counts, flags, or rows out of FIFOs looked in vain.
    WaitCounts = "wait/counts",
    WaitDispatch = "wait/dispatch",
    WaitCombine = "wait/combine",

    // Destroying a comm.
    DestroyBegins = "destroy/begins",
    /// Peers were told that this rank is gone, nothing was freed.
    DestroyGone = "destroy/gone",

    // Calls that a test may let fail.
    Listen = "system/listen",
    Connect = "system/connect",
    Accept = "system/accept",
    Poll = "system/poll",
    SendWindows = "system/sendmsg",
    ReceiveWindows = "system/recvmsg",
    Lifeline = "system/lifeline",
    Pidfd = "system/pidfd_open",
    MemfdCreate = "system/memfd_create",
    Ftruncate = "system/ftruncate",
    Fallocate = "system/fallocate",
    Seal = "system/seal",
    Map = "system/mmap",
    WatchdogPipe = "system/watchdog_pipe",
    WatchdogThread = "system/watchdog_thread",
    /// Private memory of a routing.
    Private = "memory/private",
    // The same of CUDA.
    CudaModule = "driver/module",
    CudaStream = "driver/stream",
    CudaPool = "driver/pool",
    CudaPrivate = "driver/private",
    CudaPinned = "driver/pinned",
    CudaWindow = "driver/window",
    CudaExport = "driver/export",
    CudaImport = "driver/import",
    CudaReserve = "driver/reserve",
    CudaMap = "driver/map",
    CudaAccess = "driver/access",
    CudaLaunch = "driver/launch",
}

/// Somebody comes past a point.
#[inline(always)]
pub fn at(point: Point) {
    let _ = fails(point);
}

/// The code with which a call fails here, if a test wants it to.
#[inline(always)]
pub fn fails(point: Point) -> Option<i32> {
    #[cfg(feature = "faults")]
    return armed::pass(point);
    #[cfg(not(feature = "faults"))]
    {
        let _ = point;
        None
    }
}

/// A call, or its failure with an error of the system.
#[inline(always)]
pub fn call<T, E: From<rustix::io::Errno>>(
    point: Point,
    call: impl FnOnce() -> Result<T, E>,
) -> Result<T, E> {
    match fails(point) {
        None => call(),
        Some(code) => Err(rustix::io::Errno::from_raw_os_error(code).into()),
    }
}

/// How many of some bytes are copied before a point: all, without the feature.
#[inline(always)]
pub fn half(bytes: usize) -> usize {
    if cfg!(feature = "faults") { bytes / 2 } else { bytes }
}

#[cfg(feature = "faults")]
pub use armed::{Action, arm, disarm, has_struck, is_waiting, passed};

#[cfg(feature = "faults")]
mod armed {
    use std::sync::{Condvar, Mutex, MutexGuard};
    use std::time::Duration;

    use rustix::process::{Signal, getpid, kill_process};

    use super::Point;
    use crate::log::{Level, log};

    /// What happens at the point.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub enum Action {
        /// SIGKILL of this process.
        Kill,
        /// SIGSTOP of this process.
        Stop,
        /// The call fails with this error of the system or of CUDA; nothing where there is no call.
        Fail(i32),
        /// The thread waits until `disarm`.
        Wait,
    }

    struct State {
        armed: Option<(Point, u64, Action)>,
        /// By point, since it was last armed.
        passed: [u64; Point::ALL.len()],
        has_struck: bool,
        is_waiting: bool,
    }

    static STATE: Mutex<State> = Mutex::new(State {
        armed: None,
        passed: [0; Point::ALL.len()],
        has_struck: false,
        is_waiting: false,
    });
    static DISARMED: Condvar = Condvar::new();

    fn state() -> MutexGuard<'static, State> {
        STATE.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Acts once, when somebody comes past the point for the `nth` time from now, counted from 0.
    pub fn arm(point: Point, nth: u64, action: Action) {
        let mut state = state();
        state.armed = Some((point, nth, action));
        state.passed.fill(0);
        (state.has_struck, state.is_waiting) = (false, false);
        DISARMED.notify_all();
    }

    /// Nothing acts any more, and who waits goes on. Counts stay.
    pub fn disarm() {
        let mut state = state();
        state.armed = None;
        state.is_waiting = false;
        DISARMED.notify_all();
    }

    /// How often somebody came past the point since one was armed.
    pub fn passed(point: Point) -> u64 {
        state().passed[point as usize]
    }
    pub fn has_struck() -> bool {
        state().has_struck
    }
    /// A thread stands at the armed point.
    pub fn is_waiting() -> bool {
        state().is_waiting
    }

    pub(super) fn pass(point: Point) -> Option<i32> {
        let mut state = state();
        let nth = state.passed[point as usize];
        state.passed[point as usize] += 1;
        let (_, _, action) =
            state.armed.filter(|armed| (armed.0, armed.1) == (point, nth) && !state.has_struck)?;
        state.has_struck = true;
        if let Action::Wait = action {
            state.is_waiting = true;
            let _state = DISARMED.wait_while(state, |state| state.is_waiting);
            return None;
        }
        drop(state);
        log(Level::Info, || format!("fault at {}, pass {nth}: {action:?}", point.name()));
        match action {
            Action::Fail(code) => return Some(code),
            // Every thread of the process has it when the call returns, this one too.
            Action::Kill => drop(kill_process(getpid(), Signal::KILL)),
            _ => {
                let _ = kill_process(getpid(), Signal::STOP);
                stand();
            }
        }
        None
    }

    /// A stop is the whole process's, and any of its threads may be the one that takes it: until one has, this one would
    /// run on. Once none has it pending any more, this one does not come out of the call that asked.
    fn stand() {
        let is_pending = || {
            let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
            let pending = status.lines().find_map(|line| line.strip_prefix("ShdPnd:"));
            let pending = pending.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok());
            pending.is_some_and(|mask| mask >> (Signal::STOP.as_raw() - 1) & 1 == 1)
        };
        while is_pending() {
            std::thread::sleep(Duration::from_micros(20));
        }
    }
}
