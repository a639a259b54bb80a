//! The part of NCCL's C API that liba2a calls, from NCCL 2.19 on, found at run time.
//!
//! Nothing is linked: [`Nccl::get`] opens the library once a process, and says in a sentence why it cannot. Types and
//! functions have the names and the meaning that `nccl.h` gives them. Structs and numbers are those of 2.19, which later
//! versions accept: a communicator's configuration says its own size and version.
#![allow(non_camel_case_types, non_snake_case, non_upper_case_globals)]
#![deny(missing_docs)]

mod load;

use std::ffi::{c_char, c_int, c_uint, c_void};

pub use load::LoadError;

/// The oldest NCCL that has everything here, as `ncclGetVersion` says it: 2.19.0.
pub const OLDEST: c_int = 21900;

/// What a call returned: a number, since a newer library may return one that nobody here knows.
pub type ncclResult_t = c_int;
/// The call did what it was asked.
pub const ncclSuccess: ncclResult_t = 0;
/// The call goes on in the background: ask `ncclCommGetAsyncError`.
pub const ncclInProgress: ncclResult_t = 7;

/// A communicator's insides.
#[repr(C)]
pub struct ncclComm {
    _opaque: [u8; 0],
}
/// One rank's handle of a communicator.
pub type ncclComm_t = *mut ncclComm;
/// A CUDA stream: `cudaStream_t` and `CUstream` alike.
pub type cudaStream_t = *mut c_void;

/// What ranks that make a communicator have in common.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct ncclUniqueId {
    /// Bytes that rank 0 gets and hands to the others.
    pub internal: [u8; 128],
}

/// The type of elements.
pub type ncclDataType_t = c_int;
/// Bytes.
pub const ncclUint8: ncclDataType_t = 1;
/// IEEE half.
pub const ncclFloat16: ncclDataType_t = 6;
/// IEEE single.
pub const ncclFloat32: ncclDataType_t = 7;
/// bfloat16.
pub const ncclBfloat16: ncclDataType_t = 9;

/// What a reduction does.
pub type ncclRedOp_t = c_int;
/// It adds.
pub const ncclSum: ncclRedOp_t = 0;

/// An `int` of a configuration that is left to the library.
pub const UNDEFINED: c_int = c_int::MIN;

/// How a communicator is made: the struct of 2.17 to 2.19, which later versions know by its size.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct ncclConfig_t {
    size: usize,
    magic: c_uint,
    version: c_uint,
    /// 0: calls return before they are done, with `ncclInProgress`. 1: they do not.
    pub blocking: c_int,
    /// Blocks of a cluster.
    pub cgaClusterSize: c_int,
    /// The fewest blocks that a kernel has.
    pub minCTAs: c_int,
    /// The most.
    pub maxCTAs: c_int,
    /// The network to use, or NULL.
    pub netName: *const c_char,
    /// 1: a communicator that is split off shares what the first one took.
    pub splitShare: c_int,
}

impl Default for ncclConfig_t {
    fn default() -> ncclConfig_t {
        ncclConfig_t {
            size: size_of::<ncclConfig_t>(),
            magic: 0xcafe_beef,
            version: OLDEST as c_uint,
            blocking: UNDEFINED,
            cgaClusterSize: UNDEFINED,
            minCTAs: UNDEFINED,
            maxCTAs: UNDEFINED,
            netName: std::ptr::null(),
            splitShare: UNDEFINED,
        }
    }
}

const _: () = {
    use std::mem::offset_of;
    assert!(size_of::<ncclUniqueId>() == 128);
    assert!(size_of::<ncclConfig_t>() == 48);
    assert!(offset_of!(ncclConfig_t, blocking) == 16 && offset_of!(ncclConfig_t, netName) == 32);
};

late_library::functions! {
    Nccl;

    /// major * 10000 + minor * 100 + patch.
    fn ncclGetVersion(version: *mut c_int) -> ncclResult_t;
    /// Static text.
    fn ncclGetErrorString(result: ncclResult_t) -> *const c_char;
    /// What this thread's last failure was, in words; the communicator is not looked at. Since 2.13.
    fn ncclGetLastError(comm: ncclComm_t) -> *const c_char;
    /// Opens a socket and a thread of rank 0's, which last as long as the process.
    fn ncclGetUniqueId(id: *mut ncclUniqueId) -> ncclResult_t;
    /// Collective, on the current context's device.
    fn ncclCommInitRankConfig(
        comm: *mut ncclComm_t, ranks: c_int, id: ncclUniqueId, rank: c_int, config: *mut ncclConfig_t,
    ) -> ncclResult_t;
    /// Collective over `comm`: a communicator of the ranks with the same color, ordered by key.
    fn ncclCommSplit(
        comm: ncclComm_t, color: c_int, key: c_int, split: *mut ncclComm_t, config: *mut ncclConfig_t,
    ) -> ncclResult_t;
    /// Ends what is in flight, before `ncclCommDestroy`. Collective.
    fn ncclCommFinalize(comm: ncclComm_t) -> ncclResult_t;
    /// Frees a communicator that is finalized.
    fn ncclCommDestroy(comm: ncclComm_t) -> ncclResult_t;
    /// Makes kernels that wait return, and frees the communicator. Local.
    fn ncclCommAbort(comm: ncclComm_t) -> ncclResult_t;
    /// What became of the communicator in the background.
    fn ncclCommGetAsyncError(comm: ncclComm_t, result: *mut ncclResult_t) -> ncclResult_t;
    /// How many ranks it has.
    fn ncclCommCount(comm: ncclComm_t, count: *mut c_int) -> ncclResult_t;
    /// Which of them this is.
    fn ncclCommUserRank(comm: ncclComm_t, rank: *mut c_int) -> ncclResult_t;
    /// The CUDA device it is on, by its ordinal.
    fn ncclCommCuDevice(comm: ncclComm_t, device: *mut c_int) -> ncclResult_t;
    /// What follows, up to the end, is one operation.
    fn ncclGroupStart() -> ncclResult_t;
    /// Launches what the group gathered.
    fn ncclGroupEnd() -> ncclResult_t;
    /// `count` elements of every rank to all.
    fn ncclAllGather(
        send: *const c_void, receive: *mut c_void, count: usize, kind: ncclDataType_t, comm: ncclComm_t,
        stream: cudaStream_t,
    ) -> ncclResult_t;
    /// Sums, of which each rank gets its `count` elements.
    fn ncclReduceScatter(
        send: *const c_void, receive: *mut c_void, count: usize, kind: ncclDataType_t, op: ncclRedOp_t,
        comm: ncclComm_t, stream: cudaStream_t,
    ) -> ncclResult_t;
    /// `root`'s elements to all.
    fn ncclBroadcast(
        send: *const c_void, receive: *mut c_void, count: usize, kind: ncclDataType_t, root: c_int,
        comm: ncclComm_t, stream: cudaStream_t,
    ) -> ncclResult_t;
    /// A sum that `root` gets.
    fn ncclReduce(
        send: *const c_void, receive: *mut c_void, count: usize, kind: ncclDataType_t, op: ncclRedOp_t, root: c_int,
        comm: ncclComm_t, stream: cudaStream_t,
    ) -> ncclResult_t;
    /// Elements to one rank, which receives as many.
    fn ncclSend(
        send: *const c_void, count: usize, kind: ncclDataType_t, peer: c_int, comm: ncclComm_t, stream: cudaStream_t,
    ) -> ncclResult_t;
    /// Elements from one rank, which sends as many.
    fn ncclRecv(
        receive: *mut c_void, count: usize, kind: ncclDataType_t, peer: c_int, comm: ncclComm_t,
        stream: cudaStream_t,
    ) -> ncclResult_t;
}

impl Nccl {
    /// As `ncclGetVersion` says it; 0 if it does not.
    pub fn version(&self) -> c_int {
        self.ask_version().unwrap_or(0)
    }
    /// The same, or what it returned.
    fn ask_version(&self) -> Result<c_int, ncclResult_t> {
        let mut version = 0;
        // SAFETY: a valid out-pointer.
        match unsafe { (self.ncclGetVersion)(&mut version) } {
            ncclSuccess => Ok(version),
            result => Err(result),
        }
    }
}
