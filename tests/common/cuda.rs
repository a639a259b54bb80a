//! CUDA memory for the tests, through the driver alone: an arena that all tensors come from, a stream for every
//! thread, copies that wait for that stream alone, captured graphs.
//!
//! Ranks that share a GPU spin in their kernels until their peers have come, and the driver's own calls may wait for
//! such a kernel: one that allocates, frees, loads or instantiates would wait for a peer that waits for its caller.
//! So all memory is taken by `enable`, all streams before ranks start (`reserve`), and graphs are made where no rank
//! spins (`meet` in the parent module). Nothing here uses the NULL stream.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::ffi::{CStr, c_void};
use std::ptr::null_mut;
use std::sync::{Mutex, OnceLock};

use cudarc::driver::sys;

/// Megabytes of the arena of each GPU.
const ARENA_MB: &str = "A2A_TEST_ARENA_MB";
const DEFAULT_ARENA_MB: usize = 2048;
/// Bytes of a lane's pinned memory: what one copy moves at most.
const CHUNK: usize = 4 << 20;
/// Of every allocation, as cuMemAlloc promises it.
const ALIGNMENT: usize = 256;

// ------------------------------------------------------------------------------------------------- devices

/// A GPU in use.
struct Device {
    ordinal: i32,
    context: Context,
    /// One, unless a test has asked for more.
    arenas: Mutex<Vec<Arena>>,
    /// Those that no thread has.
    lanes: Mutex<Vec<Lane>>,
}

struct Context(sys::CUcontext);
// SAFETY: a handle that any thread may make current.
unsafe impl Send for Context {}
// SAFETY: as above.
unsafe impl Sync for Context {}

/// What a thread works with: a stream, and pinned memory for its copies.
#[derive(Clone, Copy)]
struct Lane {
    stream: sys::CUstream,
    staging: *mut u8,
}
// SAFETY: one thread has it at a time.
unsafe impl Send for Lane {}

struct Devices {
    /// GPUs of this machine.
    count: usize,
    /// Rank r uses GPU r % count; else all ranks use the only one.
    by_rank: bool,
    used: Vec<Device>,
}

static DEVICES: OnceLock<Devices> = OnceLock::new();

thread_local! {
    static ENTERED: RefCell<Option<Entered>> = const { RefCell::new(None) };
    static DEFERRED: Cell<bool> = const { Cell::new(false) };
}

/// A thread's device and lane, given back when it ends.
struct Entered {
    device: &'static Device,
    lane: Lane,
}

impl Drop for Entered {
    fn drop(&mut self) {
        // The driver is not asked anything by a thread that ends: `take` looks whether the lane's work is done.
        self.device.lanes.lock().unwrap().push(self.lane);
    }
}

/// Takes GPU `ordinal` for all ranks of this process. Once, before any other thread exists.
pub fn enable(ordinal: i32) -> Result<(), String> {
    set_up(false, |_| vec![ordinal])
}

/// As `enable`, with rank r on GPU r % the number of GPUs; takes those of `ranks`.
pub fn enable_by_rank(ranks: &[usize]) -> Result<(), String> {
    set_up(true, |count| {
        let mut ordinals: Vec<i32> = ranks.iter().map(|rank| (rank % count) as i32).collect();
        ordinals.sort();
        ordinals.dedup();
        ordinals
    })
}

fn set_up(by_rank: bool, choose: impl FnOnce(usize) -> Vec<i32>) -> Result<(), String> {
    if is_enabled() {
        return Err("CUDA is enabled already".into());
    }
    // Streams that share a hardware queue wait for each other, and so would the ranks. The environment may say otherwise.
    if std::env::var_os("CUDA_DEVICE_MAX_CONNECTIONS").is_none() {
        // SAFETY: no other thread exists yet, by this function's contract.
        unsafe { std::env::set_var("CUDA_DEVICE_MAX_CONNECTIONS", "32") };
    }
    // SAFETY: loads the driver's library, whose constructors are as trusted as the rest of it.
    if !unsafe { sys::is_culib_present() } {
        return Err("no libcuda.so on this machine".into());
    }
    let mut count = 0;
    // SAFETY: the library is there; valid out-pointers.
    unsafe {
        ok("cuInit", sys::cuInit(0))?;
        ok("cuDeviceGetCount", sys::cuDeviceGetCount(&mut count))?;
    }
    if count < 1 {
        return Err("this machine has no GPU".into());
    }
    let megabytes = std::env::var(ARENA_MB).map_or(Ok(DEFAULT_ARENA_MB), |text| text.parse());
    let bytes = megabytes.map_err(|_| format!("{ARENA_MB} is no number"))? << 20;
    let mut used = Vec::new();
    for ordinal in choose(count as usize) {
        if !(0..count).contains(&ordinal) {
            return Err(format!("no GPU {ordinal}: this machine has {count}"));
        }
        used.push(Device::new(ordinal, bytes)?);
    }
    let devices = Devices { count: count as usize, by_rank, used };
    DEVICES.set(devices).map_err(|_| "CUDA is enabled already".to_string())?;
    enter();
    Ok(())
}

impl Device {
    fn new(ordinal: i32, bytes: usize) -> Result<Device, String> {
        let (mut device, mut context, mut start) = (0, null_mut(), 0);
        // SAFETY: valid out-pointers; the context is retained for as long as the process lives.
        unsafe {
            ok("cuDeviceGet", sys::cuDeviceGet(&mut device, ordinal))?;
            ok("cuDevicePrimaryCtxRetain", sys::cuDevicePrimaryCtxRetain(&mut context, device))?;
            ok("cuCtxSetCurrent", sys::cuCtxSetCurrent(context))?;
            ok(&format!("an arena of {bytes} bytes ({ARENA_MB})"), sys::cuMemAlloc_v2(&mut start, bytes))?;
        }
        let arenas = Mutex::new(vec![Arena::new(start as usize, bytes)]);
        let device = Device { ordinal, context: Context(context), arenas, lanes: Mutex::new(Vec::new()) };
        device.reserve(1)?;
        let lane = device.lanes.lock().unwrap()[0];
        // What the driver needs for its own copies is loaded now: later a rank may spin.
        // SAFETY: the arena's first bytes, which nobody has yet, and the lane's pinned memory.
        unsafe {
            ok("cuMemsetD8Async", sys::cuMemsetD8Async(start, 0, CHUNK.min(bytes) / 2, lane.stream))?;
            ok("cuMemcpyDtoDAsync", sys::cuMemcpyDtoDAsync_v2(start + 1024, start, 512, lane.stream))?;
            ok("cuMemcpyDtoHAsync", sys::cuMemcpyDtoHAsync_v2(lane.staging.cast(), start, 512, lane.stream))?;
            ok("cuMemcpyHtoDAsync", sys::cuMemcpyHtoDAsync_v2(start, lane.staging.cast(), 512, lane.stream))?;
            ok("cuStreamSynchronize", sys::cuStreamSynchronize(lane.stream))?;
        }
        Ok(device)
    }

    /// Makes lanes until so many are free. The device's context is current.
    fn reserve(&self, lanes: usize) -> Result<(), String> {
        let mut free = self.lanes.lock().unwrap();
        let ready = free.iter().filter(|lane| lane.is_idle()).count();
        for _ in ready..lanes {
            free.push(Lane::new()?);
        }
        Ok(())
    }

    fn take(&self) -> Result<Lane, String> {
        let mut free = self.lanes.lock().unwrap();
        // A thread that was left behind may have left its kernels too.
        match free.iter().position(Lane::is_idle) {
            Some(at) => Ok(free.remove(at)),
            None => Lane::new(),
        }
    }
}

impl Lane {
    fn new() -> Result<Lane, String> {
        let (mut stream, mut staging) = (null_mut(), null_mut());
        let flags = sys::CUstream_flags_enum::CU_STREAM_NON_BLOCKING as u32;
        // SAFETY: valid out-pointers.
        unsafe {
            ok("cuStreamCreate", sys::cuStreamCreate(&mut stream, flags))?;
            ok("cuMemHostAlloc", sys::cuMemHostAlloc(&mut staging, CHUNK, 0))?;
        }
        Ok(Lane { stream, staging: staging.cast() })
    }
    fn is_idle(&self) -> bool {
        // SAFETY: a stream of ours, never destroyed.
        unsafe { sys::cuStreamQuery(self.stream) == sys::CUresult::CUDA_SUCCESS }
    }
    fn synchronize(&self) -> Result<(), String> {
        // SAFETY: as above.
        ok("cuStreamSynchronize", unsafe { sys::cuStreamSynchronize(self.stream) })
    }
}

pub fn ok(what: &str, result: sys::CUresult) -> Result<(), String> {
    if result == sys::CUresult::CUDA_SUCCESS {
        return Ok(());
    }
    let mut name = std::ptr::null();
    // SAFETY: a valid out-pointer; it receives a static string, or NULL for a number that the driver does not know.
    let name = unsafe {
        let known = sys::cuGetErrorName(result, &mut name) == sys::CUresult::CUDA_SUCCESS;
        (known && !name.is_null()).then(|| CStr::from_ptr(name).to_string_lossy())
    };
    Err(format!("{what}: {}", name.as_deref().unwrap_or("an error without a name")))
}

pub fn is_enabled() -> bool {
    DEVICES.get().is_some()
}

/// True if ranks are spread over the machine's GPUs.
pub fn is_by_rank() -> bool {
    DEVICES.get().is_some_and(|devices| devices.by_rank)
}

/// Of this thread's GPU.
pub fn ordinal() -> i32 {
    entered().0.ordinal
}

/// GPUs of this machine.
pub fn count() -> usize {
    DEVICES.get().expect("CUDA is enabled").count
}

/// Ranks that share a GPU where a group has so many.
pub fn ranks_per_device(world: usize) -> usize {
    let devices = DEVICES.get().expect("CUDA is enabled");
    if devices.by_rank { world.div_ceil(devices.count) } else { world }
}

/// Makes the GPU usable on this thread: its context is current, a stream is this thread's own.
pub fn enter() {
    enter_on(&DEVICES.get().expect("CUDA is enabled").used[0]);
}

/// As `enter`, on the GPU of this rank.
pub fn enter_rank(rank: usize) {
    let devices = DEVICES.get().expect("CUDA is enabled");
    enter_on(devices.of(rank));
}

fn enter_on(device: &'static Device) {
    ENTERED.with_borrow_mut(|entered| {
        if entered.is_some() {
            return;
        }
        // SAFETY: a context that stays retained.
        ok("cuCtxSetCurrent", unsafe { sys::cuCtxSetCurrent(device.context.0) }).expect("a context");
        *entered = Some(Entered { device, lane: device.take().expect("a stream") });
    });
}

impl Devices {
    fn of(&self, rank: usize) -> &Device {
        let ordinal = (rank % self.count) as i32;
        let own = self.used.iter().find(|device| device.ordinal == ordinal).filter(|_| self.by_rank);
        own.unwrap_or(&self.used[0])
    }
}

fn entered() -> (&'static Device, Lane) {
    enter_if_new();
    ENTERED.with_borrow(|entered| {
        let entered = entered.as_ref().expect("entered just now");
        (entered.device, entered.lane)
    })
}

fn enter_if_new() {
    if ENTERED.with_borrow(Option::is_none) {
        enter();
    }
}

/// Takes streams for so many of these ranks' threads: before they start, for creating one may wait for a kernel.
pub fn reserve(ranks: &[usize]) {
    let devices = DEVICES.get().expect("CUDA is enabled");
    for device in &devices.used {
        let lanes = ranks.iter().filter(|&&rank| devices.of(rank).ordinal == device.ordinal).count();
        // SAFETY: contexts that stay retained; this thread's own is current again afterwards.
        let reserved = unsafe { ok("cuCtxSetCurrent", sys::cuCtxSetCurrent(device.context.0)) }
            .and_then(|()| device.reserve(lanes));
        reserved.expect("streams");
    }
    // SAFETY: as above.
    ok("cuCtxSetCurrent", unsafe { sys::cuCtxSetCurrent(entered().0.context.0) }).expect("a context");
}

// -------------------------------------------------------------------------------------------------- streams

/// This thread's own, non-blocking.
pub fn stream() -> *mut c_void {
    entered().1.stream.cast()
}

/// Waits for this thread's stream.
pub fn synchronize() -> Result<(), String> {
    entered().1.synchronize()
}

/// True if this thread's stream has nothing left to do.
pub fn is_idle() -> bool {
    entered().1.is_idle()
}

/// In `body` this thread's calls of the library are put on the stream and not waited for.
pub fn deferred<T>(body: impl FnOnce() -> T) -> T {
    struct Restore(bool);
    impl Drop for Restore {
        fn drop(&mut self) {
            DEFERRED.set(self.0);
        }
    }
    let _restore = Restore(DEFERRED.replace(true));
    body()
}

pub fn is_deferred() -> bool {
    DEFERRED.get()
}

// --------------------------------------------------------------------------------------------------- memory

/// Free stretches of one allocation, by address.
struct Arena {
    start: usize,
    bytes: usize,
    free: BTreeMap<usize, usize>,
}

impl Arena {
    fn new(start: usize, bytes: usize) -> Arena {
        Arena { start, bytes, free: BTreeMap::from([(start, bytes)]) }
    }
    fn has(&self, address: usize) -> bool {
        (self.start..self.start + self.bytes).contains(&address)
    }
    /// From the first stretch that is long enough.
    fn take(&mut self, bytes: usize) -> Option<usize> {
        let bytes = bytes.max(1).next_multiple_of(ALIGNMENT);
        let (&at, &length) = self.free.iter().find(|(_, length)| **length >= bytes)?;
        self.free.remove(&at);
        if length > bytes {
            self.free.insert(at + bytes, length - bytes);
        }
        Some(at)
    }
    fn give(&mut self, mut at: usize, bytes: usize) {
        let mut bytes = bytes.max(1).next_multiple_of(ALIGNMENT);
        if let Some(after) = self.free.remove(&(at + bytes)) {
            bytes += after;
        }
        if let Some((&before, &length)) = self.free.range(..at).next_back().filter(|(at0, n)| *at0 + *n == at)
        {
            self.free.remove(&before);
            (at, bytes) = (before, length + bytes);
        }
        self.free.insert(at, bytes);
    }
}

/// Device memory of this thread's GPU.
pub fn allocate(bytes: usize) -> usize {
    let mut arenas = entered().0.arenas.lock().unwrap();
    let address = arenas.iter_mut().find_map(|arena| arena.take(bytes));
    drop(arenas);
    address.unwrap_or_else(|| panic!("no {bytes} bytes left in the arena: raise {ARENA_MB}"))
}

/// Gives back what `allocate` gave; on any thread, once no kernel uses it.
pub fn release(address: usize, bytes: usize) {
    for device in &DEVICES.get().expect("CUDA is enabled").used {
        let mut arenas = device.arenas.lock().unwrap();
        if let Some(arena) = arenas.iter_mut().find(|arena| arena.has(address)) {
            return arena.give(address, bytes);
        }
    }
    panic!("{address:#x} is no memory of an arena");
}

/// Makes sure that so many more bytes can be allocated on this thread's GPU. Where no rank spins.
pub fn grow(bytes: usize) -> Result<(), String> {
    let mut arenas = entered().0.arenas.lock().unwrap();
    let longest = arenas.iter().flat_map(|arena| arena.free.values()).max();
    if longest.is_some_and(|&longest| longest >= bytes) {
        return Ok(());
    }
    let mut start = 0;
    // SAFETY: a valid out-pointer; this thread's context is current.
    ok(&format!("{bytes} more bytes"), unsafe { sys::cuMemAlloc_v2(&mut start, bytes) })?;
    arenas.push(Arena::new(start as usize, bytes));
    Ok(())
}

/// Copies device memory here, in the order of this thread's stream, and waits for it.
pub fn read(address: usize, into: &mut [u8]) {
    let (_, lane) = entered();
    for (at, chunk) in into.chunks_mut(CHUNK).enumerate() {
        let from = (address + at * CHUNK) as sys::CUdeviceptr;
        // SAFETY: the caller's device memory, and a pinned chunk that only this thread uses.
        let copied =
            unsafe { sys::cuMemcpyDtoHAsync_v2(lane.staging.cast(), from, chunk.len(), lane.stream) };
        ok("a copy from the device", copied)
            .and_then(|()| lane.synchronize())
            .unwrap_or_else(|e| panic!("{e}"));
        // SAFETY: the copy is done, and no longer than a chunk.
        chunk.copy_from_slice(unsafe { std::slice::from_raw_parts(lane.staging, chunk.len()) });
    }
}

/// Copies to device memory, in the order of this thread's stream, and waits for it.
pub fn write(address: usize, from: &[u8]) {
    let (_, lane) = entered();
    for (at, chunk) in from.chunks(CHUNK).enumerate() {
        let to = (address + at * CHUNK) as sys::CUdeviceptr;
        // SAFETY: a pinned chunk that only this thread uses, whose last copy is done; the caller's device memory.
        let copied = unsafe {
            lane.staging.copy_from_nonoverlapping(chunk.as_ptr(), chunk.len());
            sys::cuMemcpyHtoDAsync_v2(to, lane.staging.cast(), chunk.len(), lane.stream)
        };
        ok("a copy to the device", copied)
            .and_then(|()| lane.synchronize())
            .unwrap_or_else(|e| panic!("{e}"));
    }
}

/// Sets device memory, in the order of this thread's stream, and waits for it.
pub fn fill(address: usize, bytes: usize, value: u8) {
    start_fill(address, bytes, value).and_then(|()| synchronize()).unwrap_or_else(|e| panic!("{e}"));
}

/// As `fill`, without the wait; may be captured.
pub fn start_fill(address: usize, bytes: usize, value: u8) -> Result<(), String> {
    if bytes == 0 {
        return Ok(());
    }
    let (_, lane) = entered();
    // SAFETY: the caller's device memory.
    ok("a fill", unsafe { sys::cuMemsetD8Async(address as sys::CUdeviceptr, value, bytes, lane.stream) })
}

/// Puts a copy inside the device's memory on this thread's stream; may be captured.
pub fn copy(to: usize, from: usize, bytes: usize) -> Result<(), String> {
    if bytes == 0 {
        return Ok(());
    }
    let (to, from) = (to as sys::CUdeviceptr, from as sys::CUdeviceptr);
    // SAFETY: the caller's device memory.
    ok("cuMemcpyDtoDAsync", unsafe { sys::cuMemcpyDtoDAsync_v2(to, from, bytes, entered().1.stream) })
}

/// A stream beside this thread's, taken before a capture and given back after it.
pub struct Beside(Lane);

impl Beside {
    pub fn new() -> Result<Beside, String> {
        entered().0.take().map(Beside)
    }

    /// Lets it fill `bytes` at `address` while this thread's stream waits: in a capture, what comes next stands behind work
    /// of two streams.
    pub fn join(&self, address: usize, bytes: usize) -> Result<(), String> {
        let (own, other) = (entered().1.stream, self.0.stream);
        let (mut forks, mut joins) = (null_mut(), null_mut());
        let flags = sys::CUevent_flags_enum::CU_EVENT_DISABLE_TIMING as u32;
        // SAFETY: streams of ours, the caller's device memory, events that are destroyed once.
        unsafe {
            ok("cuEventCreate", sys::cuEventCreate(&mut forks, flags))?;
            ok("cuEventCreate", sys::cuEventCreate(&mut joins, flags))?;
            ok("cuEventRecord", sys::cuEventRecord(forks, own))?;
            ok("cuStreamWaitEvent", sys::cuStreamWaitEvent(other, forks, 0))?;
            ok("a fill", sys::cuMemsetD8Async(address as sys::CUdeviceptr, 0, bytes, other))?;
            ok("cuEventRecord", sys::cuEventRecord(joins, other))?;
            ok("cuStreamWaitEvent", sys::cuStreamWaitEvent(own, joins, 0))?;
            ok("cuEventDestroy", sys::cuEventDestroy_v2(forks))?;
            ok("cuEventDestroy", sys::cuEventDestroy_v2(joins))
        }
    }
}

impl Drop for Beside {
    fn drop(&mut self) {
        entered().0.lanes.lock().unwrap().push(self.0);
    }
}

/// Free bytes of this thread's GPU, whoever uses the rest.
pub fn free_bytes() -> Result<usize, String> {
    enter_if_new();
    let (mut free, mut total) = (0, 0);
    // SAFETY: valid out-pointers.
    ok("cuMemGetInfo", unsafe { sys::cuMemGetInfo_v2(&mut free, &mut total) }).map(|()| free)
}

// --------------------------------------------------------------------------------------------------- graphs

/// Work of this thread's stream, captured, instantiated and uploaded.
pub struct Graph {
    graph: sys::CUgraph,
    exec: sys::CUgraphExec,
}

impl Graph {
    /// Captures what `record` puts on this thread's stream. Where no rank spins: the graph takes memory.
    pub fn capture(record: impl FnOnce() -> Result<(), String>) -> Result<Graph, String> {
        let (_, lane) = entered();
        let mode = sys::CUstreamCaptureMode_enum::CU_STREAM_CAPTURE_MODE_RELAXED;
        // SAFETY: a stream of ours.
        ok("cuStreamBeginCapture", unsafe { sys::cuStreamBeginCapture_v2(lane.stream, mode) })?;
        let recorded = deferred(record);
        let mut graph = Graph { graph: null_mut(), exec: null_mut() };
        // SAFETY: this thread began the capture; valid out-pointers.
        unsafe {
            let ended = ok("cuStreamEndCapture", sys::cuStreamEndCapture(lane.stream, &mut graph.graph));
            // What went wrong first says more.
            recorded.and(ended)?;
            let instantiated = sys::cuGraphInstantiateWithFlags(&mut graph.exec, graph.graph, 0);
            ok("cuGraphInstantiate", instantiated)?;
            ok("cuGraphUpload", sys::cuGraphUpload(graph.exec, lane.stream))?;
        }
        lane.synchronize()?;
        Ok(graph)
    }

    /// Puts the work on this thread's stream so many times, one after the other.
    pub fn launch(&self, times: usize) -> Result<(), String> {
        let (_, lane) = entered();
        for _ in 0..times {
            // SAFETY: an instantiated graph and a stream of ours.
            ok("cuGraphLaunch", unsafe { sys::cuGraphLaunch(self.exec, lane.stream) })?;
        }
        Ok(())
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        // SAFETY: ours, each destroyed once; failures have nobody to tell.
        unsafe {
            if !self.exec.is_null() {
                sys::cuGraphExecDestroy(self.exec);
            }
            if !self.graph.is_null() {
                sys::cuGraphDestroy(self.graph);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn an_arena_gives_what_it_has_and_takes_it_back_whole() {
        let mut arena = super::Arena::new(4096, 1024);
        let parts: Vec<usize> = [1, 256, 257].iter().map(|&bytes| arena.take(bytes).unwrap()).collect();
        assert_eq!(parts, [4096, 4352, 4608]);
        assert_eq!(arena.take(1), None);
        arena.give(4352, 256);
        assert_eq!(arena.take(512), None);
        arena.give(4608, 257);
        assert_eq!(arena.take(768), Some(4352));
        arena.give(4352, 768);
        arena.give(4096, 1);
        assert_eq!(arena.take(1024), Some(4096));
        assert!(arena.has(5119) && !arena.has(5120));
    }
}
