//! What went wrong: one status, one sentence, and (for a lost step) a record of who waited for whom.
//!
//! A leaf: every layer may use it, it uses nothing of the crate.

use std::ffi::CStr;
use std::fmt;

/// The status of a call. The numbers are the ABI's (`abi::types` asserts it).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(i32)]
pub enum Status {
    Success = 0,
    // The call: nothing happened.
    InvalidArgument = 1,
    Unsupported = 2,
    Busy = 3,
    OutOfMemory = 4,
    Overflow = 5,
    System = 6,
    // The step: it is void on every rank that has not completed it.
    Timeout = 16,
    PeerLost = 17,
    Mismatch = 18,
    // The comm: only get_async_error, abort and destroy remain.
    Cuda = 32,
    Nccl = 33,
    Nixl = 34,
    Aborted = 35,
    Internal = 36,
}

impl Status {
    pub const ALL: [Status; 15] = [
        Status::Success,
        Status::InvalidArgument,
        Status::Unsupported,
        Status::Busy,
        Status::OutOfMemory,
        Status::Overflow,
        Status::System,
        Status::Timeout,
        Status::PeerLost,
        Status::Mismatch,
        Status::Cuda,
        Status::Nccl,
        Status::Nixl,
        Status::Aborted,
        Status::Internal,
    ];

    pub fn from_code(code: i32) -> Option<Status> {
        Status::ALL.into_iter().find(|s| *s as i32 == code)
    }

    /// The constant's name.
    pub fn name(self) -> &'static CStr {
        match self {
            Status::Success => c"A2A_SUCCESS",
            Status::InvalidArgument => c"A2A_INVALID_ARGUMENT",
            Status::Unsupported => c"A2A_UNSUPPORTED",
            Status::Busy => c"A2A_BUSY",
            Status::OutOfMemory => c"A2A_OUT_OF_MEMORY",
            Status::Overflow => c"A2A_OVERFLOW",
            Status::System => c"A2A_SYSTEM_ERROR",
            Status::Timeout => c"A2A_TIMEOUT",
            Status::PeerLost => c"A2A_PEER_LOST",
            Status::Mismatch => c"A2A_MISMATCH",
            Status::Cuda => c"A2A_CUDA_ERROR",
            Status::Nccl => c"A2A_NCCL_ERROR",
            Status::Nixl => c"A2A_NIXL_ERROR",
            Status::Aborted => c"A2A_ABORTED",
            Status::Internal => c"A2A_INTERNAL",
        }
    }

    /// True if the failure voids the step on every rank and closes its slot.
    pub fn is_step(self) -> bool {
        matches!(self, Status::Timeout | Status::PeerLost | Status::Mismatch)
    }
}

/// Where a step was lost: what `a2a_get_async_error` reports beside the sentence.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Loss {
    /// 1 dispatch, 2 combine, 3 the "rows read" words between two dispatches.
    pub operation: i32,
    pub slot: u32,
    /// Steps opened on the slot, this one included.
    pub sequence: u64,
    pub rank: u32,
    /// The first rank that was waited for.
    pub peer: u32,
    pub expected: u64,
    pub seen: u64,
    /// Every rank given up on, ascending.
    pub lost: Vec<u32>,
}

/// A status and the sentence that explains it.
#[derive(Clone, Debug)]
pub struct Error {
    pub status: Status,
    pub message: String,
    pub loss: Option<Box<Loss>>,
}

pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    pub fn new(status: Status, message: impl Into<String>) -> Error {
        Error { status, message: message.into(), loss: None }
    }
    pub fn invalid(message: impl Into<String>) -> Error {
        Error::new(Status::InvalidArgument, message)
    }
    pub fn unsupported(message: impl Into<String>) -> Error {
        Error::new(Status::Unsupported, message)
    }
    pub fn internal(message: impl Into<String>) -> Error {
        Error::new(Status::Internal, message)
    }
    /// An operating-system refusal; running out of something is told apart from the rest.
    pub fn system(what: impl fmt::Display, os: impl Into<std::io::Error>) -> Error {
        let os = os.into();
        let status = if is_shortage(&os) { Status::OutOfMemory } else { Status::System };
        Error::new(status, format!("{what}: {os}"))
    }
    pub fn with_loss(mut self, loss: Loss) -> Error {
        self.loss = Some(Box::new(loss));
        self
    }
    /// Puts a prefix before the sentence: the function's name, or the rank's.
    pub fn context(mut self, prefix: impl fmt::Display) -> Error {
        self.message = format!("{prefix}: {}", self.message);
        self
    }
}

/// True if the system has run out of something: memory, descriptors, room.
pub fn is_shortage(os: &std::io::Error) -> bool {
    // ENOMEM, ENFILE, EMFILE, ENOSPC, ENOBUFS
    matches!(os.raw_os_error(), Some(12 | 23 | 24 | 28 | 105))
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Error {}
