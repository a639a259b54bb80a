//! Windows: memory of one rank that every rank of the group can address.
//!
//! `host` is shared memory for the CPU, `vmm` memory of a GPU. A window is made before the ranks meet and shared as a
//! file descriptor.

mod host;
pub mod vmm;

pub use host::{WindowFd, Windows};
