//! What C sees: the structs, the calls, and the guard around each of them. The only exported symbols.

pub mod calls;
mod config;
mod guard;
mod tensor;
pub mod types;
