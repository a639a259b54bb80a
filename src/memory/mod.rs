//! Windows: memory of one rank that every rank of the group can address.
//!
//! `host` is shared memory for the CPU. A window is made before the ranks meet and shared as a file descriptor.

mod host;

pub use host::{WindowFd, Windows};
