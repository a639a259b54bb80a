//! loom runs the protocol that ships, `src/device/protocol.rs`, under every order of memory and of threads that the
//! memory model allows: `rank` gives its ranks windows of loom's atomics, `steps` and `endings` are the models.
//!
//! What stands in windows but is no word (rows) is a cell that loom guards: who touches it without an order fails. Time
//! is not modelled: a deadline passes after a number of looks, and since others may do anything between two looks, it
//! passes at any time.
//!
//! A model that cannot fail proves nothing: each has twins (`breaks`) that leave out what it rests upon, the order of
//! one word's stores or loads or a step of the protocol, and must fail.

#![cfg(test)]

mod atomic;
mod endings;
mod explore;
#[path = "../../src/device/mail.rs"]
#[allow(dead_code, reason = "of the words that only rows or CUDA need")]
mod mail;
#[path = "../../src/device/members.rs"]
#[allow(dead_code, reason = "what only the library calls")]
mod members;
#[path = "../../src/device/protocol.rs"]
#[allow(dead_code, reason = "what only the library calls")]
mod protocol;
mod rank;
mod steps;
