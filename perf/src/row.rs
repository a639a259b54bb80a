//! One measured figure: what was measured, on what, and how long it took. The columns of CSV and JSON.

use serde::{Deserialize, Serialize};

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Row {
    /// "cpu" or "cuda".
    pub device: String,
    /// A backend's name, or a peer: "mpi_alltoallv (default)", "mpi_alltoallv (yield)", "memcpy".
    pub backend: String,
    /// Empty for a peer.
    pub layout: String,
    pub ranks: usize,
    /// "threads" or "processes".
    pub mode: String,
    /// Tokens of each rank.
    pub tokens: usize,
    pub hidden: usize,
    /// Of the tokens as they travel: "bf16", "f32", "fp8".
    pub dtype: String,
    pub experts: usize,
    pub topk: usize,
    /// "hash", "zipf", "one_hot", or a recorded file's name.
    pub routing: String,
    /// "dispatch", "combine", or "pair" (one after the other, chained).
    pub operation: String,
    /// "warm" or "cold" (caches emptied before each).
    pub cache: String,
    pub iterations: usize,
    /// Of the slowest rank, microseconds.
    pub p50_us: f64,
    pub p99_us: f64,
    /// Payload that the operation means, of the busiest rank: one row per (token, destination rank).
    pub logical_bytes: u64,
    /// Bytes that the strategy moved between ranks' memories, of the busiest rank, its own included.
    pub wire_bytes: u64,
}
