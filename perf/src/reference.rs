//! FlashInfer's measured times, to stand beside ours where card and shape are the same.

use std::sync::OnceLock;

use serde::Deserialize;

use crate::row::Row;

const MEASURED: &str = include_str!("../reference/flashinfer-h100.csv");

#[derive(Debug, Deserialize)]
struct Time {
    algo: String,
    dtype: String,
    tokens: usize,
    phase: String,
    scope: String,
    p50_us: f64,
}

fn times() -> &'static [Time] {
    static TIMES: OnceLock<Vec<Time>> = OnceLock::new();
    TIMES.get_or_init(|| {
        let mut csv = csv::ReaderBuilder::new().comment(Some(b'#')).from_reader(MEASURED.as_bytes());
        csv.deserialize().collect::<Result<_, _>>().expect("a file of ours")
    })
}

/// The p50 of FlashInfer's counterpart of a row measured on `card`.
pub fn flashinfer(card: &str, row: &Row) -> Option<f64> {
    let shape = (row.ranks, row.hidden, row.experts, row.topk, &*row.routing);
    if !card.contains("H100") || row.device != "cuda" || shape != (8, 7168, 256, 8, "hash") {
        return None;
    }
    // The first phase that was measured counts.
    let (algo, phases): (_, &[&str]) = match (&*row.backend, &*row.operation) {
        ("nvlink_one_sided", "dispatch") => ("one", &["dispatch+sanitize", "dispatch"]),
        ("nvlink_one_sided", "combine") => ("one", &["combine"]),
        ("nvlink_one_sided", "combine_staged") => ("one", &["combine-staged"]),
        ("nvlink_two_sided", "dispatch") => ("two", &["prepare+dispatch"]),
        ("nvlink_two_sided", "combine_staged") => ("two", &["combine"]),
        _ => return None,
    };
    let dtype = if row.dtype == "f8" { "fp8" } else { &*row.dtype };
    if row.dtype == "fp8" {
        // Its fp8 rows come quantised.
        return None;
    }
    let same = |time: &&Time| {
        (&*time.algo, &*time.dtype, time.tokens, &time.scope) == (algo, dtype, row.tokens, &row.scope)
    };
    phases.iter().find_map(|phase| {
        // The rows with real flags stand before those with flags set beforehand.
        times().iter().filter(same).find(|time| time.phase == *phase).map(|time| time.p50_us)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::row::tests::row;

    #[test]
    fn a_counterpart_has_the_same_card_and_shape() {
        let ours = |operation: &str, scope: &str, dtype: &str| Row {
            device: "cuda".into(),
            ranks: 8,
            experts: 256,
            scope: scope.into(),
            dtype: dtype.into(),
            ..row("nvlink_one_sided", "rank_major", 1, operation, 10.0)
        };
        let h100 = |row: &Row| flashinfer("NVIDIA H100 80GB HBM3", row);
        assert_eq!(h100(&ours("dispatch", "all", "bf16")), Some(25.25));
        assert_eq!(h100(&ours("dispatch", "rank0", "f8")), Some(9.73));
        assert_eq!(h100(&ours("combine", "all", "bf16")), Some(19.71));
        assert_eq!(h100(&ours("combine_staged", "rank0", "bf16")), Some(9.82));
        assert_eq!(h100(&ours("combine", "all", "fp8")), None);
        assert_eq!(h100(&ours("pair", "all", "bf16")), None);
        assert_eq!(h100(&Row { ranks: 4, ..ours("dispatch", "all", "bf16") }), None);
        assert_eq!(h100(&Row { tokens: 7, ..ours("dispatch", "all", "bf16") }), None);
        assert_eq!(flashinfer("NVIDIA H200", &ours("dispatch", "all", "bf16")), None);
    }
}
