//! The CUDA driver's objects: one owner each, released when it is dropped.
//!
//! The driver library is looked for at run time, and the binding panics where it is missing: `probe` asks first, and
//! no object exists before it has said yes. An object keeps its context, and calls that need one make it current and
//! put the caller's back. A drop neither fails nor panics; what the driver will not release is logged.

use std::ffi::{CStr, c_char, c_int, c_void};
use std::fmt::Display;
use std::marker::PhantomData;
use std::mem::MaybeUninit;
use std::ptr::{null, null_mut};
use std::sync::{Arc, OnceLock};

use cudarc::driver::sys::{self, CUdevice, CUdevice_attribute as Attribute, CUresult};

use crate::error::{Error, Result, Status};
use crate::fault::{self, Point};
use crate::log::{Level, log};

/// The youngest functions used here, `cuFuncLoad` and `cuFuncGetParamInfo`, came with CUDA 12.4.
const OLDEST_DRIVER: i32 = 12040;
/// The oldest compute capability that there are kernels for.
const OLDEST_CAPABILITY: (u32, u32) = (9, 0);

fn is_library_present() -> bool {
    static PRESENT: OnceLock<bool> = OnceLock::new();
    // SAFETY: it opens the library and closes it again; what that runs is the driver's own start.
    *PRESENT.get_or_init(|| unsafe { sys::is_culib_present() })
}

/// Whether this process can use CUDA at all. It is found out once: looking takes some thirty names.
pub fn probe() -> Result<()> {
    static OUTCOME: OnceLock<Result<()>> = OnceLock::new();
    OUTCOME.get_or_init(start).clone()
}

fn start() -> Result<()> {
    if !is_library_present() {
        return Err(Error::unsupported("CUDA driver library (libcuda.so.1) not found"));
    }
    let unsupported = |what: &str, result| match result {
        CUresult::CUDA_SUCCESS => Ok(()),
        CUresult::CUDA_ERROR_NO_DEVICE => Err(Error::unsupported("this host has no CUDA device")),
        _ => {
            Err(Error::unsupported(format!("the CUDA driver does not start: {what}: {}", error_text(result))))
        }
    };
    let mut version = 0;
    // SAFETY: the library is there, and this needs no context.
    unsupported("cuDriverGetVersion", unsafe { sys::cuDriverGetVersion(&mut version) })?;
    refuse_old(version)?;
    // SAFETY: as above; the flags must be 0.
    unsupported("cuInit", unsafe { sys::cuInit(0) })
}

/// A version is 1000 * major + 10 * minor.
fn refuse_old(version: i32) -> Result<()> {
    if version >= OLDEST_DRIVER {
        return Ok(());
    }
    let text = |version: i32| format!("{}.{}", version / 1000, version % 1000 / 10);
    Err(Error::unsupported(format!(
        "the CUDA driver is for CUDA {}, {} or newer is needed",
        text(version),
        text(OLDEST_DRIVER)
    )))
}

/// The driver's name and text of an error.
pub fn error_text(result: CUresult) -> String {
    let said = |say: unsafe fn(CUresult, *mut *const c_char) -> CUresult| {
        let mut text = null();
        // SAFETY: gives a static string, or null for a code that it does not know.
        let known = unsafe { say(result, &mut text) } == CUresult::CUDA_SUCCESS && !text.is_null();
        // SAFETY: as said.
        known.then(|| unsafe { CStr::from_ptr(text) }.to_string_lossy())
    };
    let named = is_library_present().then(|| said(sys::cuGetErrorName).zip(said(sys::cuGetErrorString)));
    match named.flatten() {
        Some((name, text)) => format!("{name} ({text})"),
        None => format!("CUDA error {}", result as u32),
    }
}

/// The outcome of a driver call: `what` was asked for.
pub fn check(what: impl Display, result: CUresult) -> Result<()> {
    if result == CUresult::CUDA_SUCCESS { Ok(()) } else { Err(failure(what, result)) }
}

/// A call that a test may let fail, with the driver's number for an error.
pub fn attempt(point: Point, call: impl FnOnce() -> CUresult) -> CUresult {
    match fault::fails(point) {
        None => call(),
        Some(code) if code == CUresult::CUDA_ERROR_OUT_OF_MEMORY as i32 => CUresult::CUDA_ERROR_OUT_OF_MEMORY,
        Some(_) => CUresult::CUDA_ERROR_LAUNCH_FAILED,
    }
}

pub fn failure(what: impl Display, result: CUresult) -> Error {
    if result == CUresult::CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED {
        let why = "a stream is being captured, and what allocates is called before a capture or after it";
        return Error::invalid(format!("{what}: {why} ({})", error_text(result)));
    }
    let status = match result {
        CUresult::CUDA_ERROR_OUT_OF_MEMORY => Status::OutOfMemory,
        _ => Status::Cuda,
    };
    Error::new(status, format!("{what}: {}", error_text(result)))
}

/// Releases something of a context, on a drop: a failure is worth a line and nothing more.
pub fn release(context: &Context, what: &str, free: impl FnOnce() -> CUresult) {
    let released = context.enter().and_then(|_entered| check(what, free()));
    if let Err(error) = released {
        log(Level::Debug, || format!("{}: not released: {error}", context.describe()));
    }
}

/// The driver takes its handles from any thread, as long as the objects live.
macro_rules! any_thread {
    ($($object:ident),+ $(,)?) => { $(
        // SAFETY: a handle of the driver, whose functions may be called by any thread, several at a time.
        unsafe impl Send for $object {}
        // SAFETY: as above.
        unsafe impl Sync for $object {}
    )+ };
}
any_thread!(Context, Stream, RawStream, Module, Kernel, Pool, Pinned);

/// What a device can do, asked once.
#[derive(Clone, Copy, Debug)]
pub struct Abilities {
    pub sm_count: u32,
    /// Major and minor.
    pub capability: (u32, u32),
    /// `cuMemCreate` and its like.
    pub vmm: bool,
    /// Such memory can be shared as a file descriptor.
    pub posix_fd: bool,
    pub memory_pools: bool,
    pub unified_addressing: bool,
    /// Kernels of several processes run through a server, which may outlive a process that it works for.
    pub mps: bool,
}

/// A device's primary context, which is also the CUDA runtime's.
#[derive(Debug)]
pub struct Context {
    raw: sys::CUcontext,
    device: CUdevice,
    ordinal: i32,
    name: String,
    abilities: Abilities,
}

impl Context {
    pub fn retain(ordinal: i32) -> Result<Arc<Context>> {
        probe()?;
        let mut count = 0;
        // SAFETY: writes one integer.
        check("cuDeviceGetCount", unsafe { sys::cuDeviceGetCount(&mut count) })?;
        check_ordinal(ordinal, count)?;
        let mut device = 0;
        // SAFETY: as above.
        check(format_args!("device {ordinal}"), unsafe { sys::cuDeviceGet(&mut device, ordinal) })?;
        let name = device_name(device)?;
        let abilities = abilities(device)?;
        refuse_capability(ordinal, &name, abilities.capability)?;
        let mut raw = null_mut();
        // SAFETY: a device that exists; released once, on drop.
        let retained = unsafe { sys::cuDevicePrimaryCtxRetain(&mut raw, device) };
        check(format_args!("the context of device {ordinal} ({name})"), retained)?;
        Ok(Arc::new(Context { raw, device, ordinal, name, abilities }))
    }

    pub fn device(&self) -> CUdevice {
        self.device
    }
    pub fn abilities(&self) -> &Abilities {
        &self.abilities
    }
    /// For sentences.
    pub fn describe(&self) -> String {
        format!("device {} ({})", self.ordinal, self.name)
    }

    /// Makes the context current on this thread until the guard goes.
    pub fn enter(&self) -> Result<Entered<'_>> {
        // SAFETY: retained as long as self.
        check("cuCtxPushCurrent", unsafe { sys::cuCtxPushCurrent_v2(self.raw) })?;
        Ok(Entered { _context: PhantomData })
    }

    /// Waits for everything on the device, kernels of other ranks in this process included.
    pub fn synchronize(&self) -> Result<()> {
        let _entered = self.enter()?;
        // SAFETY: the context is current.
        check(format_args!("{}: cuCtxSynchronize", self.describe()), unsafe { sys::cuCtxSynchronize() })
    }

    /// Bytes that nobody has taken.
    pub fn free_memory(&self) -> Result<u64> {
        let _entered = self.enter()?;
        let (mut free, mut total) = (0, 0);
        // SAFETY: the context is current; writes two sizes.
        check("cuMemGetInfo", unsafe { sys::cuMemGetInfo_v2(&mut free, &mut total) })?;
        Ok(free as u64)
    }

    /// True if kernels of this device can address the memory of another.
    pub fn reaches(&self, other: CUdevice) -> Result<bool> {
        if other == self.device {
            return Ok(true);
        }
        let mut can = 0;
        // SAFETY: writes one integer.
        let asked = unsafe { sys::cuDeviceCanAccessPeer(&mut can, self.device, other) };
        check(format_args!("{}: peer access to device {other}", self.describe()), asked)?;
        Ok(can != 0)
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: retained by `retain`, released once.
        let released = unsafe { sys::cuDevicePrimaryCtxRelease_v2(self.device) };
        if let Err(error) = check("the context", released) {
            log(Level::Debug, || format!("{}: not released: {error}", self.describe()));
        }
    }
}

fn check_ordinal(ordinal: i32, count: i32) -> Result<()> {
    if (0..count).contains(&ordinal) {
        return Ok(());
    }
    let s = if count == 1 { "" } else { "s" };
    Err(Error::invalid(format!("device_ordinal is {ordinal}, this host has {count} CUDA device{s}")))
}

fn refuse_capability(ordinal: i32, name: &str, (major, minor): (u32, u32)) -> Result<()> {
    if (major, minor) >= OLDEST_CAPABILITY {
        return Ok(());
    }
    let (needed, point) = OLDEST_CAPABILITY;
    Err(Error::unsupported(format!(
        "device {ordinal} ({name}) has compute capability {major}.{minor}, {needed}.{point} or newer is needed"
    )))
}

fn device_name(device: CUdevice) -> Result<String> {
    let mut name = [0 as c_char; 256];
    // SAFETY: writes at most as many bytes as the array has, with the zero that ends them.
    let asked = unsafe { sys::cuDeviceGetName(name.as_mut_ptr(), name.len() as c_int, device) };
    check("cuDeviceGetName", asked)?;
    // SAFETY: it ends with a zero, in the array.
    Ok(unsafe { CStr::from_ptr(name.as_ptr()) }.to_string_lossy().into_owned())
}

fn abilities(device: CUdevice) -> Result<Abilities> {
    let ask = |attribute: Attribute| -> Result<u32> {
        let mut value = 0;
        // SAFETY: writes one integer.
        let asked = unsafe { sys::cuDeviceGetAttribute(&mut value, attribute, device) };
        check(format_args!("{attribute:?}"), asked)?;
        Ok(value as u32)
    };
    let can = |attribute| Ok(ask(attribute)? != 0);
    Ok(Abilities {
        sm_count: ask(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?,
        capability: (
            ask(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
            ask(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
        ),
        vmm: can(Attribute::CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED)?,
        posix_fd: can(Attribute::CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED)?,
        memory_pools: can(Attribute::CU_DEVICE_ATTRIBUTE_MEMORY_POOLS_SUPPORTED)?,
        unified_addressing: can(Attribute::CU_DEVICE_ATTRIBUTE_UNIFIED_ADDRESSING)?,
        // A driver that does not know the question may have a server all the same.
        mps: can(Attribute::CU_DEVICE_ATTRIBUTE_MPS_ENABLED).unwrap_or(true),
    })
}

/// A context that is current on this thread. Guards end in the reverse order of their beginnings, as locals do.
pub struct Entered<'a> {
    /// A pointer, because what is current is a matter of the thread.
    _context: PhantomData<(&'a Context, *const ())>,
}

impl Drop for Entered<'_> {
    fn drop(&mut self) {
        let mut popped = null_mut();
        // SAFETY: takes back what `enter` pushed on this thread.
        let result = unsafe { sys::cuCtxPopCurrent_v2(&mut popped) };
        if let Err(error) = check("cuCtxPopCurrent", result) {
            log(Level::Debug, || error.message);
        }
    }
}

/// A stream of our own. The legacy default stream does not wait for it, nor it for that.
pub struct Stream {
    context: Arc<Context>,
    raw: sys::CUstream,
}

impl Stream {
    pub fn new(context: &Arc<Context>) -> Result<Stream> {
        let _entered = context.enter()?;
        let mut raw = null_mut();
        let flags = sys::CUstream_flags::CU_STREAM_NON_BLOCKING as u32;
        // SAFETY: the context is current; destroyed once, on drop.
        let create = || unsafe { sys::cuStreamCreate(&mut raw, flags) };
        check("cuStreamCreate", attempt(Point::CudaStream, create))?;
        Ok(Stream { context: context.clone(), raw })
    }
    /// Not to be used after self.
    pub fn raw(&self) -> RawStream {
        RawStream(self.raw)
    }
    pub fn synchronize(&self) -> Result<()> {
        let _entered = self.context.enter()?;
        self.raw().synchronize()
    }

    /// Starts a copy into device memory.
    ///
    /// # Safety
    /// As many bytes of device memory are there, and `from` stays as it is until the stream has come past the copy.
    pub unsafe fn start_copy_in(&self, at: u64, from: &[u8]) -> Result<()> {
        let _entered = self.context.enter()?;
        // SAFETY: as promised.
        let copied = unsafe { sys::cuMemcpyHtoDAsync_v2(at, from.as_ptr().cast(), from.len(), self.raw) };
        check("cuMemcpyHtoDAsync", copied)
    }

    /// Copies into device memory, and returns when that is done.
    ///
    /// # Safety
    /// As many bytes of device memory are there.
    pub unsafe fn copy_in(&self, at: u64, from: &[u8]) -> Result<()> {
        // SAFETY: forwarded; the copy is waited for.
        unsafe { self.start_copy_in(at, from)? };
        self.synchronize()
    }
}

impl Stream {
    /// Copies out of device memory, and returns when that is done.
    ///
    /// # Safety
    /// As many bytes of device memory are there.
    pub unsafe fn copy_out(&self, at: u64, into: &mut [u8]) -> Result<()> {
        let _entered = self.context.enter()?;
        // SAFETY: as promised; the target outlives the copy, which is waited for.
        let copied = unsafe { sys::cuMemcpyDtoHAsync_v2(into.as_mut_ptr().cast(), at, into.len(), self.raw) };
        check("cuMemcpyDtoHAsync", copied)?;
        self.synchronize()
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        // SAFETY: created by `new`, destroyed once; work that is still in it ends by itself.
        release(&self.context, "cuStreamDestroy", || unsafe { sys::cuStreamDestroy_v2(self.raw) });
    }
}

/// A stream that somebody else owns, mostly the caller of a step. Its context is current wherever it is used.
#[derive(Clone, Copy, Debug)]
pub struct RawStream(sys::CUstream);

impl RawStream {
    pub fn handle(self) -> *mut c_void {
        self.0.cast()
    }

    /// # Safety
    /// NULL, which is the legacy default stream, or a stream that lives as long as the value and its copies are used.
    pub unsafe fn new(raw: *mut c_void) -> RawStream {
        RawStream(raw.cast())
    }

    /// The capture that the stream takes part in, by a number that the process never uses twice.
    pub fn capture_id(self) -> Result<Option<u64>> {
        use sys::CUstreamCaptureStatus::*;
        let (mut status, mut id) = (CU_STREAM_CAPTURE_STATUS_NONE, 0);
        // SAFETY: a stream, by `new`; the answers that may be left out are.
        let asked = unsafe {
            sys::cuStreamGetCaptureInfo_v3(
                self.0,
                &mut status,
                &mut id,
                null_mut(),
                null_mut(),
                null_mut(),
                null_mut(),
            )
        };
        match asked {
            CUresult::CUDA_ERROR_STREAM_CAPTURE_IMPLICIT => Err(Error::invalid(
                "stream is the legacy default stream, and another stream that waits for it is being captured",
            )),
            CUresult::CUDA_ERROR_INVALID_HANDLE => Err(Error::invalid("stream is not a CUDA stream")),
            _ => check("cuStreamGetCaptureInfo", asked),
        }?;
        match status {
            CU_STREAM_CAPTURE_STATUS_NONE => Ok(None),
            CU_STREAM_CAPTURE_STATUS_ACTIVE => Ok(Some(id)),
            CU_STREAM_CAPTURE_STATUS_INVALIDATED => {
                Err(Error::invalid("stream is in a capture that an earlier error has made invalid"))
            }
        }
    }

    /// Copies rows between device memory: where they are, and bytes from one to the next.
    ///
    /// # Safety
    /// `rows` rows of `bytes` bytes on both sides, until the stream's work so far is done.
    pub unsafe fn copy_rows(
        self,
        (to, to_stride): (u64, usize),
        (from, from_stride): (u64, usize),
        bytes: usize,
        rows: usize,
    ) -> Result<()> {
        let copy = sys::CUDA_MEMCPY2D {
            srcXInBytes: 0,
            srcY: 0,
            srcMemoryType: sys::CUmemorytype::CU_MEMORYTYPE_DEVICE,
            srcHost: null(),
            srcDevice: from,
            srcArray: null_mut(),
            srcPitch: from_stride.max(bytes),
            dstXInBytes: 0,
            dstY: 0,
            dstMemoryType: sys::CUmemorytype::CU_MEMORYTYPE_DEVICE,
            dstHost: null_mut(),
            dstDevice: to,
            dstArray: null_mut(),
            dstPitch: to_stride,
            WidthInBytes: bytes,
            Height: rows,
        };
        // SAFETY: the caller's promise.
        check("cuMemcpy2DAsync", unsafe { sys::cuMemcpy2DAsync_v2(&copy, self.0) })
    }

    /// If all work that was put into the stream has ended.
    pub fn is_idle(self) -> Result<bool> {
        // SAFETY: a stream, by `new`.
        match unsafe { sys::cuStreamQuery(self.0) } {
            CUresult::CUDA_ERROR_NOT_READY => Ok(false),
            asked => check("cuStreamQuery", asked).map(|()| true),
        }
    }

    /// Waits for the work that is in the stream now.
    pub fn synchronize(self) -> Result<()> {
        // SAFETY: a stream, by `new`.
        check("cuStreamSynchronize", unsafe { sys::cuStreamSynchronize(self.0) })
    }
}

/// Device code.
pub struct Module {
    context: Arc<Context>,
    raw: sys::CUmodule,
}

impl Module {
    /// Loads a fatbin.
    pub fn load(context: &Arc<Context>, image: &[u8]) -> Result<Arc<Module>> {
        if fatbin_bytes(image).is_none_or(|bytes| bytes > image.len()) {
            let text = format!("the device code of this build is no whole fatbin ({} bytes)", image.len());
            return Err(Error::internal(text));
        }
        // Embedded bytes lie anywhere, and the driver reads words. It keeps a copy of its own.
        let mut aligned = vec![0u64; image.len().div_ceil(8)];
        // SAFETY: two buffers, the second at least as long.
        unsafe { std::ptr::copy_nonoverlapping(image.as_ptr(), aligned.as_mut_ptr().cast(), image.len()) };
        let _entered = context.enter()?;
        let mut raw = null_mut();
        // SAFETY: the context is current; a whole fatbin, by its own header; unloaded once, on drop.
        let load = || unsafe { sys::cuModuleLoadData(&mut raw, aligned.as_ptr().cast()) };
        let loaded = attempt(Point::CudaModule, load);
        match loaded {
            CUresult::CUDA_ERROR_NO_BINARY_FOR_GPU
            | CUresult::CUDA_ERROR_UNSUPPORTED_PTX_VERSION
            | CUresult::CUDA_ERROR_JIT_COMPILER_NOT_FOUND
            | CUresult::CUDA_ERROR_JIT_COMPILATION_DISABLED => {
                let (major, minor) = context.abilities.capability;
                Err(Error::unsupported(format!(
                    "this build has no device code for sm_{major}{minor}, which {} is: {}",
                    context.describe(),
                    error_text(loaded)
                )))
            }
            _ => check("the device code", loaded),
        }?;
        Ok(Arc::new(Module { context: context.clone(), raw }))
    }

    /// Loads a kernel now: left to its first launch, that may wait for kernels that wait for it.
    pub fn kernel(self: &Arc<Module>, name: &'static CStr) -> Result<Kernel> {
        let _entered = self.context.enter()?;
        let called = |call: &str| format!("{call} of kernel {}", name.to_string_lossy());
        let mut raw = null_mut();
        // SAFETY: the module lives as long as the kernel.
        let found = unsafe { sys::cuModuleGetFunction(&mut raw, self.raw, name.as_ptr()) };
        check(called("cuModuleGetFunction"), found)?;
        // SAFETY: a kernel of the module; so below.
        check(called("cuFuncLoad"), unsafe { sys::cuFuncLoad(raw) })?;
        let (mut offset, mut params) = (0, 0);
        // SAFETY: writes two sizes.
        let asked = unsafe { sys::cuFuncGetParamInfo(raw, 0, &mut offset, &mut params) };
        check(called("cuFuncGetParamInfo"), asked)?;
        Ok(Kernel { name, raw, params, module: self.clone() })
    }
}

impl Drop for Module {
    fn drop(&mut self) {
        // SAFETY: loaded by `load`, unloaded once, after its kernels.
        release(&self.context, "cuModuleUnload", || unsafe { sys::cuModuleUnload(self.raw) });
    }
}

/// The length of a fatbin as its header gives it: {u32 magic, u16 version, u16 header bytes, u64 bytes after it}.
fn fatbin_bytes(image: &[u8]) -> Option<usize> {
    const MAGIC: [u8; 4] = 0xba55_ed50u32.to_le_bytes();
    let header: &[u8; 16] = image.first_chunk()?;
    let head = u16::from_le_bytes([header[6], header[7]]) as u64;
    let (_, rest) = header.split_last_chunk::<8>()?;
    let bytes = u64::from_le_bytes(*rest).checked_add(head)?;
    (header[..4] == MAGIC && head >= 16).then_some(usize::try_from(bytes).ok()?)
}

/// A kernel that is loaded.
pub struct Kernel {
    name: &'static CStr,
    raw: sys::CUfunction,
    /// Bytes of its one parameter.
    params: usize,
    module: Arc<Module>,
}

impl Kernel {
    /// Lets launches ask for so many bytes of dynamic shared memory: without it, 48 KiB at most.
    pub fn allow_shared(&self, bytes: u32) -> Result<()> {
        let _entered = self.module.context.enter()?;
        let attribute = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        // SAFETY: a kernel of a loaded module.
        let set = unsafe { sys::cuFuncSetAttribute(self.raw, attribute, bytes as c_int) };
        check("cuFuncSetAttribute", set)
    }
    /// Blocks that an SM can hold at a time.
    pub fn blocks_per_sm(&self, threads: u32, dynamic_shared: u32) -> Result<u32> {
        let _entered = self.module.context.enter()?;
        let mut blocks = 0;
        // SAFETY: writes one integer.
        let asked = unsafe {
            sys::cuOccupancyMaxActiveBlocksPerMultiprocessor(
                &mut blocks,
                self.raw,
                threads as c_int,
                dynamic_shared as usize,
            )
        };
        check("cuOccupancyMaxActiveBlocksPerMultiprocessor", asked)?;
        Ok(blocks as u32)
    }
}

/// How a kernel is launched: one dimension is enough for all of ours.
#[derive(Clone, Copy, Debug, Default)]
pub struct Launch {
    pub grid: u32,
    /// The grid's second dimension; 0 is 1.
    pub parts: u32,
    pub block: u32,
    /// Bytes of dynamic shared memory.
    pub shared: u32,
    /// It may start before the kernel ahead of it in the stream has ended, and waits for that itself
    /// (`griddepcontrol.wait`).
    pub after_previous: bool,
}

/// Launches a kernel whose one parameter is a struct by value. Nothing is allocated.
///
/// # Safety
/// `P` is the `#[repr(C)]` twin of the kernel's parameter, every address in it is good for what the kernel does there
/// until it has ended, the kernel's context is current, and the stream is one of that context.
pub unsafe fn launch<P: Copy>(kernel: &Kernel, launch: &Launch, stream: RawStream, params: &P) -> Result<()> {
    if size_of::<P>() != kernel.params {
        return Err(Error::internal(format!(
            "the parameter of kernel {} has {} bytes, {} were given",
            kernel.name.to_string_lossy(),
            kernel.params,
            size_of::<P>()
        )));
    }
    use sys::CUlaunchAttributeID::*;
    let blank = sys::CUlaunchAttribute {
        id: CU_LAUNCH_ATTRIBUTE_IGNORE,
        pad: [0; 4],
        value: sys::CUlaunchAttributeValue { pad: [0; 64] },
    };
    let mut attributes = [blank; 1];
    let mut count = 0;
    if launch.after_previous {
        attributes[count].id = CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION;
        attributes[count].value.programmaticStreamSerializationAllowed = 1;
        count += 1;
    }
    let config = sys::CUlaunchConfig {
        gridDimX: launch.grid,
        gridDimY: launch.parts.max(1),
        gridDimZ: 1,
        blockDimX: launch.block,
        blockDimY: 1,
        blockDimZ: 1,
        sharedMemBytes: launch.shared,
        hStream: stream.0,
        attrs: attributes.as_mut_ptr(),
        numAttrs: count as u32,
    };
    let mut parameters = [(params as *const P).cast_mut().cast::<c_void>()];
    // SAFETY: as promised; the driver copies the parameter, whose size was checked, before it returns.
    let start = || unsafe { sys::cuLaunchKernelEx(&config, kernel.raw, parameters.as_mut_ptr(), null_mut()) };
    let launched = attempt(Point::CudaLaunch, start);
    match launched {
        CUresult::CUDA_SUCCESS => Ok(()),
        _ => Err(failure(
            format_args!("cuLaunchKernelEx of kernel {}", kernel.name.to_string_lossy()),
            launched,
        )),
    }
}

/// Where private device memory comes from: a pool and a stream that only its requests go through. A plain
/// `cuMemAlloc` or `cuMemFree` may wait for all kernels of the device, and so for one that waits for us.
pub struct Pool {
    context: Arc<Context>,
    raw: sys::CUmemoryPool,
    stream: Stream,
}

impl Pool {
    pub fn new(context: &Arc<Context>) -> Result<Arc<Pool>> {
        if !context.abilities.memory_pools {
            return Err(Error::unsupported(format!("{} has no memory pools", context.describe())));
        }
        let stream = Stream::new(context)?;
        let _entered = context.enter()?;
        let props = sys::CUmemPoolProps {
            allocType: sys::CUmemAllocationType::CU_MEM_ALLOCATION_TYPE_PINNED,
            handleTypes: sys::CUmemAllocationHandleType::CU_MEM_HANDLE_TYPE_NONE,
            location: location(context.device),
            win32SecurityAttributes: null_mut(),
            maxSize: 0,
            usage: 0,
            reserved: [0; 54],
        };
        let mut raw = null_mut();
        // SAFETY: properties of this device; destroyed once, on drop.
        let create = || unsafe { sys::cuMemPoolCreate(&mut raw, &props) };
        check("cuMemPoolCreate", attempt(Point::CudaPool, create))?;
        let pool = Pool { context: context.clone(), raw, stream };
        // What is freed stays with the pool: giving it back may be the wait that the pool is there to avoid.
        let mut threshold = u64::MAX;
        let attribute = sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
        // SAFETY: this attribute's value is 64 bits.
        let set =
            unsafe { sys::cuMemPoolSetAttribute(raw, attribute, (&raw mut threshold).cast::<c_void>()) };
        check("cuMemPoolSetAttribute", set)?;
        Ok(Arc::new(pool))
    }

    /// Gives back what was freed and is not used.
    pub fn trim(&self) -> Result<()> {
        self.stream.synchronize()?;
        let _entered = self.context.enter()?;
        // SAFETY: a pool that lives; what is in use stays.
        check("cuMemPoolTrimTo", unsafe { sys::cuMemPoolTrimTo(self.raw, 0) })
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        // SAFETY: created by `new`, destroyed once, with all of its memory freed or on its way.
        release(&self.context, "cuMemPoolDestroy", || unsafe { sys::cuMemPoolDestroy(self.raw) });
    }
}

/// A device's memory as a place.
pub fn location(device: CUdevice) -> sys::CUmemLocation {
    sys::CUmemLocation { type_: sys::CUmemLocationType::CU_MEM_LOCATION_TYPE_DEVICE, id: device }
}

/// Private device memory. Work that uses it has ended when it is dropped: the free waits for nobody.
pub struct DeviceMemory {
    pool: Arc<Pool>,
    address: u64,
    bytes: u64,
}

impl DeviceMemory {
    /// Memory with whatever is in it.
    pub fn new(pool: &Arc<Pool>, bytes: u64) -> Result<DeviceMemory> {
        let _entered = pool.context.enter()?;
        let mut address = 0;
        // SAFETY: the pool and the stream live as long as the memory; freed once, on drop.
        let take = || unsafe {
            sys::cuMemAllocFromPoolAsync(&mut address, bytes.max(1) as usize, pool.raw, pool.stream.raw)
        };
        let taken = attempt(Point::CudaPrivate, take);
        check(format_args!("{}: {bytes} bytes of private memory", pool.context.describe()), taken)?;
        let memory = DeviceMemory { pool: pool.clone(), address, bytes };
        // Others' streams may use it from here on.
        pool.stream.synchronize()?;
        Ok(memory)
    }

    pub fn zeroed(pool: &Arc<Pool>, bytes: u64) -> Result<DeviceMemory> {
        let memory = DeviceMemory::new(pool, bytes)?;
        if bytes > 0 {
            let _entered = pool.context.enter()?;
            // SAFETY: within the memory, which nobody else knows yet.
            let set = unsafe { sys::cuMemsetD8Async(memory.address, 0, bytes as usize, pool.stream.raw) };
            check("cuMemsetD8Async", set)?;
            pool.stream.synchronize()?;
        }
        Ok(memory)
    }

    pub fn address(&self) -> u64 {
        self.address
    }

    /// Copies in, and returns when that is done. Kernels that use the same bytes are the caller's to order.
    pub fn write(&self, offset: u64, from: &[u8]) -> Result<()> {
        let at = self.at(offset, from.len())?;
        if from.is_empty() {
            return Ok(());
        }
        let _entered = self.pool.context.enter()?;
        let stream = &self.pool.stream;
        // SAFETY: within the memory; the source outlives the copy, which is waited for.
        let copied = unsafe { sys::cuMemcpyHtoDAsync_v2(at, from.as_ptr().cast(), from.len(), stream.raw) };
        check("cuMemcpyHtoDAsync", copied)?;
        stream.synchronize()
    }

    /// Copies out; as `write`.
    pub fn read(&self, offset: u64, into: &mut [u8]) -> Result<()> {
        let at = self.at(offset, into.len())?;
        if into.is_empty() {
            return Ok(());
        }
        let _entered = self.pool.context.enter()?;
        let stream = &self.pool.stream;
        // SAFETY: within the memory; the target outlives the copy, which is waited for.
        let copied =
            unsafe { sys::cuMemcpyDtoHAsync_v2(into.as_mut_ptr().cast(), at, into.len(), stream.raw) };
        check("cuMemcpyDtoHAsync", copied)?;
        stream.synchronize()
    }

    fn at(&self, offset: u64, len: usize) -> Result<u64> {
        match offset.checked_add(len as u64) {
            Some(end) if end <= self.bytes => Ok(self.address + offset),
            _ => {
                let text = format!("{len} bytes at {offset} of {} bytes of device memory", self.bytes);
                Err(Error::internal(text))
            }
        }
    }
}

impl Drop for DeviceMemory {
    fn drop(&mut self) {
        let free = || {
            // SAFETY: taken by `new`, freed once, on the stream it was taken on.
            unsafe { sys::cuMemFreeAsync(self.address, self.pool.stream.raw) }
        };
        release(&self.pool.context, "cuMemFreeAsync", free);
    }
}

/// Host memory that kernels address as well, zeroed.
pub struct Pinned {
    context: Arc<Context>,
    ptr: *mut u8,
    address: u64,
}

impl Pinned {
    pub fn new(context: &Arc<Context>, bytes: usize) -> Result<Pinned> {
        let _entered = context.enter()?;
        let mut ptr = MaybeUninit::uninit();
        let flags = sys::CU_MEMHOSTALLOC_PORTABLE | sys::CU_MEMHOSTALLOC_DEVICEMAP;
        // SAFETY: the context is current; freed once, on drop.
        let take = || unsafe { sys::cuMemHostAlloc(ptr.as_mut_ptr(), bytes.max(1), flags) };
        let taken = attempt(Point::CudaPinned, take);
        check(format_args!("{bytes} bytes of pinned memory"), taken)?;
        // SAFETY: written, as the call succeeded.
        let ptr = unsafe { ptr.assume_init() }.cast::<u8>();
        // SAFETY: so much was taken, and nobody else knows it.
        unsafe { ptr.write_bytes(0, bytes) };
        let mut pinned = Pinned { context: context.clone(), ptr, address: 0 };
        // SAFETY: the start of such memory; no flags. The same number, where addresses are unified.
        let asked = unsafe { sys::cuMemHostGetDevicePointer_v2(&mut pinned.address, ptr.cast(), 0) };
        check("cuMemHostGetDevicePointer", asked)?;
        Ok(pinned)
    }

    /// For the CPU.
    pub fn as_ptr(&self) -> *mut u8 {
        self.ptr
    }
    /// For kernels.
    pub fn address(&self) -> u64 {
        self.address
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        // SAFETY: taken by `new`, freed once.
        release(&self.context, "cuMemFreeHost", || unsafe { sys::cuMemFreeHost(self.ptr.cast()) });
    }
}

/// A context for a test, or the reason why there is none.
#[cfg(test)]
pub fn context_for_test() -> Option<Arc<Context>> {
    Context::retain(0).inspect_err(|error| println!("skipped: {error}")).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_capture_forbids_is_the_callers_mistake() {
        let error = failure("cuMemCreate", CUresult::CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
        assert_eq!(error.status, Status::InvalidArgument);
        assert!(error.message.starts_with("cuMemCreate: a stream is being captured"), "{}", error.message);
        assert_eq!(failure("cuMemCreate", CUresult::CUDA_ERROR_INVALID_VALUE).status, Status::Cuda);
    }

    #[test]
    fn a_host_without_the_library_is_told_so() {
        let outcome = probe();
        let error = Context::retain(0).map(|_| ());
        match outcome {
            Ok(()) => println!("skipped: there is a driver here"),
            Err(refused) => {
                assert_eq!(refused.status, Status::Unsupported);
                assert_eq!(error.unwrap_err().message, refused.message, "asked twice, answered alike");
                if !is_library_present() {
                    assert_eq!(refused.message, "CUDA driver library (libcuda.so.1) not found");
                }
            }
        }
    }

    #[test]
    fn errors_have_a_status_and_a_sentence() {
        assert!(check("x", CUresult::CUDA_SUCCESS).is_ok());
        let error = check("7 bytes", CUresult::CUDA_ERROR_OUT_OF_MEMORY).unwrap_err();
        assert_eq!(error.status, Status::OutOfMemory);
        assert!(error.message.starts_with("7 bytes: CUDA"), "{error}");
        assert_eq!(check("x", CUresult::CUDA_ERROR_ILLEGAL_ADDRESS).unwrap_err().status, Status::Cuda);

        assert!(refuse_old(12040).is_ok() && refuse_old(13000).is_ok());
        assert_eq!(
            refuse_old(12020).unwrap_err().message,
            "the CUDA driver is for CUDA 12.2, 12.4 or newer is needed"
        );
        assert!(check_ordinal(0, 1).is_ok());
        assert_eq!(
            check_ordinal(3, 1).unwrap_err().message,
            "device_ordinal is 3, this host has 1 CUDA device"
        );
        assert_eq!(
            check_ordinal(-1, 2).unwrap_err().message,
            "device_ordinal is -1, this host has 2 CUDA devices"
        );
        assert!(refuse_capability(0, "x", (9, 0)).is_ok() && refuse_capability(0, "x", (12, 0)).is_ok());
        assert_eq!(
            refuse_capability(1, "NVIDIA A100", (8, 0)).unwrap_err().message,
            "device 1 (NVIDIA A100) has compute capability 8.0, 9.0 or newer is needed"
        );
    }

    #[test]
    fn a_fatbin_has_the_length_in_its_header() {
        let mut image = vec![0x50, 0xed, 0x55, 0xba, 1, 0, 16, 0, 8, 0, 0, 0, 0, 0, 0, 0];
        assert_eq!(fatbin_bytes(&image), Some(24));
        assert_eq!(fatbin_bytes(&image[..15]), None);
        image[8..].fill(0xff);
        assert_eq!(fatbin_bytes(&image), None, "a length that overflows");
        assert_eq!(fatbin_bytes(b"\x7fELF, and more bytes"), None);
    }

    #[test]
    fn the_callers_context_is_put_back() {
        let Some(context) = context_for_test() else { return };
        let current = || {
            let mut raw = null_mut();
            // SAFETY: writes one address.
            check("cuCtxGetCurrent", unsafe { sys::cuCtxGetCurrent(&mut raw) }).unwrap();
            raw
        };
        let before = current();
        {
            let _outer = context.enter().unwrap();
            assert_eq!(current(), context.raw);
            let _inner = context.enter().unwrap();
        }
        assert_eq!(current(), before);
        assert!(context.free_memory().unwrap() > 0);
    }

    #[test]
    fn memory_keeps_what_is_written() {
        let Some(context) = context_for_test() else { return };
        let pool = Pool::new(&context).unwrap();
        let memory = DeviceMemory::zeroed(&pool, 3 << 20).unwrap();
        let mut back = vec![1; 3 << 20];
        memory.read(0, &mut back).unwrap();
        assert!(back.iter().all(|byte| *byte == 0));
        let text = b"some bytes";
        memory.write((3 << 20) - text.len() as u64, text).unwrap();
        memory.read(0, &mut back).unwrap();
        assert!(back.ends_with(text) && back[..100] == [0; 100]);
        assert_eq!(memory.write(3 << 20, b"x").unwrap_err().status, Status::Internal);
        assert_eq!(memory.read(u64::MAX, &mut [0]).unwrap_err().status, Status::Internal);
        assert!(DeviceMemory::zeroed(&pool, 0).unwrap().address() != 0);

        let pinned = Pinned::new(&context, 100).unwrap();
        assert_eq!(pinned.address(), pinned.as_ptr() as u64, "unified addressing");
        // SAFETY: so many bytes were asked for.
        assert_eq!(unsafe { std::slice::from_raw_parts(pinned.as_ptr(), 100) }, [0; 100]);
    }

    #[test]
    fn a_capture_is_noticed() {
        use sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL as MODE;
        let Some(context) = context_for_test() else { return };
        let stream = Stream::new(&context).unwrap();
        let _entered = context.enter().unwrap();
        // SAFETY: the legacy default stream.
        let legacy = unsafe { RawStream::new(null_mut()) };
        assert_eq!(legacy.capture_id().unwrap(), None);
        assert_eq!(stream.raw().capture_id().unwrap(), None);
        legacy.synchronize().unwrap();

        // SAFETY: a stream that lives, and that nobody else uses.
        check("begin", unsafe { sys::cuStreamBeginCapture_v2(stream.raw, MODE) }).unwrap();
        let first = stream.raw().capture_id().unwrap();
        assert!(first.is_some());
        assert_eq!(stream.raw().capture_id().unwrap(), first);
        assert_eq!(legacy.capture_id().unwrap(), None, "a stream of ours does not concern it");
        let mut graph = null_mut();
        // SAFETY: as above.
        check("end", unsafe { sys::cuStreamEndCapture(stream.raw, &mut graph) }).unwrap();
        assert_eq!(stream.raw().capture_id().unwrap(), None);
        // SAFETY: a graph of our own.
        check("graph", unsafe { sys::cuGraphDestroy(graph) }).unwrap();
    }
}
