//! Timing on one GPU: device events behind a gate, a kernel that spins until the host has put everything on the
//! streams, so that what is timed is the device's work and not the host's calls.

use std::ffi::{CStr, c_void};
use std::ptr::null_mut;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use cudarc::driver::sys;

use crate::conformance::common::cuda::ok;

/// The gate and an empty kernel; the driver compiles them for whatever GPU it has. A gate that nobody opens ends by
/// itself after 10 s.
const KERNELS: &CStr = c"
.version 7.0
.target sm_80
.address_size 64

.visible .entry gate(.param .u64 word)
{
    .reg .pred %closed, %early;
    .reg .b32 %value;
    .reg .b64 %at, %now, %end;
    ld.param.u64 %at, [word];
    cvta.to.global.u64 %at, %at;
    mov.u64 %end, %globaltimer;
    add.u64 %end, %end, 10000000000;
again:
    ld.volatile.global.u32 %value, [%at];
    setp.eq.u32 %closed, %value, 0;
    @!%closed bra open;
    mov.u64 %now, %globaltimer;
    setp.lt.u64 %early, %now, %end;
    @%early bra again;
open:
    ret;
}

.visible .entry empty()
{
    ret;
}
";

/// A gate that was held longer may have opened by itself.
const HELD_AT_MOST: Duration = Duration::from_secs(5);
/// The host's stores reach the device's queues a little after the calls have returned.
const SETTLING: Duration = Duration::from_micros(50);

pub type Stream = sys::CUstream;

/// What there is for timing on the current context's GPU, for at least one rank. All of it is made before any rank's
/// kernel runs: making something may wait for kernels that wait for a peer. It lives as long as the process.
pub struct Gpu {
    gate: sys::CUfunction,
    empty: sys::CUfunction,
    /// Pinned: 0 while the gate is shut.
    word: &'static AtomicU32,
    /// Where the device sees it.
    word_address: sys::CUdeviceptr,
    main: Stream,
    /// One for each rank.
    streams: Vec<Stream>,
    /// On each rank's stream, when it is done.
    done: Vec<sys::CUevent>,
    start: sys::CUevent,
    end: sys::CUevent,
}

impl Gpu {
    /// The context is current on this thread, and stays so.
    pub fn new(ranks: usize) -> Result<Gpu, String> {
        let (mut module, mut gate, mut empty) = (null_mut(), null_mut(), null_mut());
        let (mut word, mut word_address) = (null_mut(), 0);
        let flags = sys::CU_MEMHOSTALLOC_PORTABLE | sys::CU_MEMHOSTALLOC_DEVICEMAP;
        // SAFETY: PTX that ends with a NUL, names that do, valid out-pointers.
        let word = unsafe {
            ok("cuModuleLoadData", sys::cuModuleLoadData(&mut module, KERNELS.as_ptr().cast()))?;
            ok("cuModuleGetFunction", sys::cuModuleGetFunction(&mut gate, module, c"gate".as_ptr()))?;
            ok("cuModuleGetFunction", sys::cuModuleGetFunction(&mut empty, module, c"empty".as_ptr()))?;
            ok("cuMemHostAlloc", sys::cuMemHostAlloc(&mut word, size_of::<AtomicU32>(), flags))?;
            let mapped = sys::cuMemHostGetDevicePointer_v2(&mut word_address, word, 0);
            ok("cuMemHostGetDevicePointer", mapped)?;
            word.cast::<AtomicU32>().write(AtomicU32::new(1));
            &*word.cast::<AtomicU32>()
        };
        let stream = || {
            let mut stream = null_mut();
            let flags = sys::CUstream_flags_enum::CU_STREAM_NON_BLOCKING as u32;
            // SAFETY: a valid out-pointer.
            ok("cuStreamCreate", unsafe { sys::cuStreamCreate(&mut stream, flags) }).map(|()| stream)
        };
        let event = |flags: sys::CUevent_flags_enum| {
            let mut event = null_mut();
            // SAFETY: a valid out-pointer.
            ok("cuEventCreate", unsafe { sys::cuEventCreate(&mut event, flags as u32) }).map(|()| event)
        };
        let untimed = sys::CUevent_flags_enum::CU_EVENT_DISABLE_TIMING;
        let gpu = Gpu {
            gate,
            empty,
            word,
            word_address,
            main: stream()?,
            streams: (0..ranks).map(|_| stream()).collect::<Result<_, _>>()?,
            done: (0..ranks).map(|_| event(untimed)).collect::<Result<_, _>>()?,
            start: event(sys::CUevent_flags_enum::CU_EVENT_DEFAULT)?,
            end: event(sys::CUevent_flags_enum::CU_EVENT_DEFAULT)?,
        };
        // A kernel may be loaded by its first launch only.
        gpu.time_first(|_| gpu.nothing(0))?;
        Ok(gpu)
    }

    pub fn stream(&self, rank: usize) -> Stream {
        self.streams[rank]
    }

    /// Waits for everything on every rank's stream.
    pub fn synchronize(&self) -> Result<(), String> {
        // SAFETY: streams of ours.
        self.streams
            .iter()
            .try_for_each(|stream| ok("cuStreamSynchronize", unsafe { sys::cuStreamSynchronize(*stream) }))
    }

    /// Puts an empty kernel on a rank's stream.
    pub fn nothing(&self, rank: usize) -> Result<(), String> {
        self.launch(self.empty, &mut [], self.streams[rank])
    }

    fn launch(
        &self,
        kernel: sys::CUfunction,
        parameters: &mut [*mut c_void],
        to: Stream,
    ) -> Result<(), String> {
        let parameters = if parameters.is_empty() { null_mut() } else { parameters.as_mut_ptr() };
        // SAFETY: a kernel of ours with the parameters it has, one thread; they are copied during the call.
        let launched =
            unsafe { sys::cuLaunchKernel(kernel, 1, 1, 1, 1, 1, 1, 0, to, parameters, null_mut()) };
        ok("cuLaunchKernel", launched)
    }

    fn record(&self, event: sys::CUevent, on: Stream) -> Result<(), String> {
        // SAFETY: an event and a stream of ours.
        ok("cuEventRecord", unsafe { sys::cuEventRecord(event, on) })
    }

    fn wait(&self, stream: Stream, event: sys::CUevent) -> Result<(), String> {
        // SAFETY: a stream and an event of ours.
        ok("cuStreamWaitEvent", unsafe { sys::cuStreamWaitEvent(stream, event, 0) })
    }

    /// Microseconds from the first event to the second, both reached, of what `put` puts on the streams behind a gate
    /// on `stream`.
    fn timed(&self, stream: Stream, put: impl FnOnce() -> Result<(), String>) -> Result<f64, String> {
        self.word.store(0, Ordering::SeqCst);
        let mut word = self.word_address;
        let shut = self.launch(self.gate, &mut [(&raw mut word).cast()], stream);
        let held = Instant::now();
        let outcome = shut
            .and_then(|()| self.record(self.start, stream))
            .and_then(|()| put())
            .and_then(|()| self.record(self.end, stream));
        while held.elapsed() < SETTLING {
            std::hint::spin_loop();
        }
        let held = held.elapsed();
        // Also after a failure: nothing may be left behind a shut gate.
        self.word.store(1, Ordering::SeqCst);
        outcome?;
        // SAFETY: a stream of ours.
        ok("cuStreamSynchronize", unsafe { sys::cuStreamSynchronize(stream) })?;
        if held > HELD_AT_MOST {
            return Err(format!("the gate was held for {held:?}: what is behind it was not timed"));
        }
        let mut milliseconds = 0f32;
        // SAFETY: events of ours, both recorded and reached.
        let read = unsafe { sys::cuEventElapsedTime_v2(&mut milliseconds, self.start, self.end) };
        ok("cuEventElapsedTime", read)?;
        Ok(f64::from(milliseconds) * 1e3)
    }

    /// Every rank at once: the streams part at the gate and meet again before the clock stops. Microseconds.
    pub fn time_all(&self, mut put: impl FnMut(usize, Stream) -> Result<(), String>) -> Result<f64, String> {
        let us = self.timed(self.main, || {
            for &stream in &self.streams {
                self.wait(stream, self.start)?;
            }
            for (rank, &stream) in self.streams.iter().enumerate() {
                put(rank, stream)?;
            }
            for (&stream, &done) in self.streams.iter().zip(&self.done) {
                self.record(done, stream)?;
                self.wait(self.main, done)?;
            }
            Ok(())
        })?;
        self.synchronize()?;
        Ok(us)
    }

    /// Rank 0 alone, on its own stream. Microseconds.
    pub fn time_first(&self, put: impl FnOnce(Stream) -> Result<(), String>) -> Result<f64, String> {
        self.timed(self.streams[0], || put(self.streams[0]))
    }

    /// Captures what `put` puts on a rank's stream. Where no kernel waits: a graph takes memory.
    pub fn capture(
        &self,
        rank: usize,
        put: impl FnOnce(Stream) -> Result<(), String>,
    ) -> Result<Graph, String> {
        let stream = self.streams[rank];
        let mode = sys::CUstreamCaptureMode_enum::CU_STREAM_CAPTURE_MODE_RELAXED;
        // SAFETY: a stream of ours.
        ok("cuStreamBeginCapture", unsafe { sys::cuStreamBeginCapture_v2(stream, mode) })?;
        let recorded = put(stream);
        let (mut graph, mut exec) = (null_mut(), null_mut());
        // SAFETY: this thread began the capture; valid out-pointers; a graph is needed only to make the other.
        unsafe {
            let ended = ok("cuStreamEndCapture", sys::cuStreamEndCapture(stream, &mut graph));
            // What went wrong first says more.
            recorded.and(ended)?;
            let made = ok("cuGraphInstantiate", sys::cuGraphInstantiateWithFlags(&mut exec, graph, 0));
            sys::cuGraphDestroy(graph);
            made?;
            ok("cuGraphUpload", sys::cuGraphUpload(exec, stream))?;
            ok("cuStreamSynchronize", sys::cuStreamSynchronize(stream))?;
        }
        Ok(Graph(exec))
    }
}

/// An instantiated graph; it lives as long as the process.
pub struct Graph(sys::CUgraphExec);

impl Graph {
    pub fn launch(&self, stream: Stream) -> Result<(), String> {
        // SAFETY: instantiated, and a stream of the same context.
        ok("cuGraphLaunch", unsafe { sys::cuGraphLaunch(self.0, stream) })
    }
}

/// The GPU's name, and a line about it and its driver.
pub fn describe(ordinal: i32) -> Result<(String, String), String> {
    use sys::CUdevice_attribute_enum as Attribute;
    let (mut device, mut bytes, mut cuda) = (0, 0, 0);
    let mut name = [0; 128];
    // SAFETY: valid out-pointers; the name is written with a NUL into as many bytes as are said.
    let name = unsafe {
        ok("cuDeviceGet", sys::cuDeviceGet(&mut device, ordinal))?;
        ok("cuDeviceGetName", sys::cuDeviceGetName(name.as_mut_ptr(), name.len() as i32, device))?;
        ok("cuDeviceTotalMem", sys::cuDeviceTotalMem_v2(&mut bytes, device))?;
        ok("cuDriverGetVersion", sys::cuDriverGetVersion(&mut cuda))?;
        CStr::from_ptr(name.as_ptr()).to_string_lossy().into_owned()
    };
    let attribute = |which| {
        let mut value = 0;
        // SAFETY: a valid out-pointer and a device of this machine.
        let read = unsafe { sys::cuDeviceGetAttribute(&mut value, which, device) };
        ok("cuDeviceGetAttribute", read).map(|()| value)
    };
    let mhz = |which| attribute(which).map_or("unknown".into(), |khz| format!("{} MHz", khz / 1000));
    let driver = std::fs::read_to_string("/sys/module/nvidia/version").unwrap_or_default();
    let line = format!(
        "{name}, {} SMs, {} GiB, up to {} (memory {}), driver {} (CUDA {}.{})",
        attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?,
        bytes >> 30,
        mhz(Attribute::CU_DEVICE_ATTRIBUTE_CLOCK_RATE),
        mhz(Attribute::CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE),
        if driver.is_empty() { "unknown" } else { driver.trim() },
        cuda / 1000,
        cuda % 1000 / 10
    );
    Ok((name, line))
}
