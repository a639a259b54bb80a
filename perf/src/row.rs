//! One measured figure: what was measured, on what, and how long it took. The columns of CSV and JSON.

use serde::{Deserialize, Serialize};

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Row {
    /// "cpu" or "cuda".
    pub device: String,
    /// A backend's name, or a peer: "mpi_alltoallv (default)", "mpi_alltoallv (yield)", "memcpy"; on CUDA "data plane
    /// (bare)", "data plane (per expert)", or a floor.
    pub backend: String,
    /// Empty for a peer.
    pub layout: String,
    pub ranks: usize,
    /// "threads" or "processes"; "streams": ranks of one process on one GPU, a stream each.
    pub mode: String,
    /// Tokens of each rank.
    pub tokens: usize,
    pub hidden: usize,
    /// Of the tokens as they travel: "bf16", "f32", "fp8" (dispatch quantises), "f8" (given so, with scales).
    pub dtype: String,
    pub experts: usize,
    pub topk: usize,
    /// "hash", "zipf", "one_hot", or a recorded file's name.
    pub routing: String,
    /// "dispatch", "combine", or "pair" (one after the other, chained); on CUDA also "combine_staged" and "pair_staged"
    /// (results from the caller's tensor), "pair_graph" and "pair_staged_graph" (replayed), "dispatch_split" (SEND and
    /// RECV in two calls), and "floor".
    pub operation: String,
    /// "warm" or "cold" (caches emptied before each).
    pub cache: String,
    pub iterations: usize,
    /// CPU: of the slowest rank; CUDA: of the scope, by device events. Microseconds.
    pub p50_us: f64,
    pub p99_us: f64,
    /// Payload that the operation means, of the busiest rank: one row per (token, destination rank).
    pub logical_bytes: u64,
    /// Bytes that the strategy moved between ranks' memories, of the busiest rank, its own included.
    pub wire_bytes: u64,
    /// What was timed on CUDA: "all" (every rank of the GPU at once) or "rank0" (it alone, its peers done). Else empty.
    #[serde(default)]
    pub scope: String,
    /// None for a peer that does not say.
    #[serde(default)]
    pub p10_us: Option<f64>,
    #[serde(default)]
    pub p90_us: Option<f64>,
    /// CUDA: bytes of rows that the operation has to read and to write in the GPU's memory, of all ranks of the scope.
    #[serde(default)]
    pub memory_bytes: u64,
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
            scope: String::new(),
            p10_us: Some(0.5 * p50_us),
            p90_us: None,
            memory_bytes: 0,
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
