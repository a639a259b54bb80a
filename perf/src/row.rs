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

/// The smallest of some sorted times that `percent` of them are not above.
pub fn percentile(sorted: &[f64], percent: usize) -> f64 {
    let at = (sorted.len() * percent).div_ceil(100).max(1) - 1;
    sorted.get(at).copied().unwrap_or(f64::NAN)
}

#[cfg(test)]
pub mod tests {
    use super::*;

    /// A figure such as others' tests need.
    pub fn row(backend: &str, layout: &str, tokens: usize, operation: &str, p50_us: f64) -> Row {
        Row {
            device: "cpu".into(),
            backend: backend.into(),
            layout: layout.into(),
            ranks: 4,
            mode: "processes".into(),
            tokens,
            hidden: 7168,
            dtype: "bf16".into(),
            experts: 64,
            topk: 8,
            routing: "hash".into(),
            operation: operation.into(),
            cache: "warm".into(),
            iterations: 100,
            p50_us,
            p99_us: 2.0 * p50_us,
            logical_bytes: (tokens * 7168 * 2) as u64,
            wire_bytes: (tokens * 7168 * 2) as u64,
        }
    }

    #[test]
    fn percentiles_are_times_that_were_measured() {
        let sorted: Vec<f64> = (1..=200).map(f64::from).collect();
        assert_eq!((percentile(&sorted, 50), percentile(&sorted, 99)), (100.0, 198.0));
        assert_eq!((percentile(&sorted[..1], 50), percentile(&sorted[..1], 99)), (1.0, 1.0));
        assert_eq!(percentile(&sorted[..3], 50), 2.0);
    }
}
