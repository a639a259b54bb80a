//! liba2a: mixture-of-experts dispatch and combine between ranks, six strategies behind one C ABI.
//!
//! The product is `liba2a.so` and `include/a2a.h`. Layers, top to bottom; each may use those below it, and `error`,
//! `config`, `log` and `fault` are leaves for all (`tests/layering.rs` checks it):
//!
//! ```text
//! abi                  what C sees
//! comm                 a rank's membership: choosing, creating, stepping, ending
//! backend              the strategies: orders of ops over windows
//! transport | memory   how ranks meet | windows
//! device               the ops
//! ```

#![deny(unsafe_op_in_unsafe_fn)]
#![warn(clippy::undocumented_unsafe_blocks, clippy::allow_attributes_without_reason)]

// C names, C contracts: each function's comment is its safety section.
#[allow(non_camel_case_types, clippy::missing_safety_doc, reason = "the names and contracts are C's")]
pub mod abi;
mod backend;
mod comm;
mod config;
mod device;
mod error;
#[cfg(not(feature = "faults"))]
mod fault;
/// What tests arm; no part of the library.
#[cfg(feature = "faults")]
pub mod fault;
mod log;
mod memory;
mod transport;
