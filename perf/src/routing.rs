//! Which experts tokens choose: the same for every backend and peer, from a seed.

use std::path::Path;

use crate::conformance::common::Recorded;

/// How tokens choose.
#[derive(Clone, Debug, PartialEq)]
pub enum Routing {
    /// Distinct experts by a keyed hash of (rank, token): even in the mean, as a trained router tries to be.
    Hash,
    /// Distinct experts, the i-th with a chance of 1 / i.
    Zipf,
    /// Every token chooses the first top-k experts: all go to the first rank or ranks.
    OneHot,
    /// Rows of a recorded file (tests/data/README.md), again from the start where they do not suffice.
    File(String),
}

impl Routing {
    pub fn parse(text: &str) -> Result<Routing, String> {
        match text {
            "hash" => Ok(Routing::Hash),
            "zipf" => Ok(Routing::Zipf),
            "one_hot" => Ok(Routing::OneHot),
            path if Path::new(path).exists() => Ok(Routing::File(path.into())),
            _ => Err(format!("routing {text:?} is not hash, zipf, one_hot, or a file that exists")),
        }
    }
    pub fn name(&self) -> String {
        match self {
            Routing::Hash => "hash".into(),
            Routing::Zipf => "zipf".into(),
            Routing::OneHot => "one_hot".into(),
            Routing::File(path) => {
                Path::new(path).file_stem().map_or(path.clone(), |name| name.to_string_lossy().into_owned())
            }
        }
    }

    /// [tokens, topk] ids of a rank.
    pub fn ids(
        &self,
        rank: usize,
        tokens: usize,
        experts: usize,
        topk: usize,
        seed: u64,
    ) -> Result<Vec<i32>, String> {
        if topk > experts {
            return Err(format!("topk is {topk}, there are {experts} experts"));
        }
        if let Routing::File(path) = self {
            let bytes = std::fs::read(path).map_err(|error| format!("{path}: {error}"))?;
            let file = Recorded::parse(&bytes).ok_or_else(|| format!("{path} is no recorded routing"))?;
            if (file.experts, file.topk) != (experts, topk) || file.tokens == 0 {
                return Err(format!(
                    "{path} has {} experts and top-{}, asked for are {experts} and top-{topk}",
                    file.experts, file.topk
                ));
            }
            let row = |token: usize| {
                let at = (rank * tokens + token) % file.tokens * topk;
                file.ids[at..at + topk].iter().map(|id| *id as i32)
            };
            return Ok((0..tokens).flat_map(row).collect());
        }
        let mut ids = Vec::with_capacity(tokens * topk);
        for token in 0..tokens {
            let start = ids.len();
            let mut draw = 0;
            while ids.len() < start + topk {
                let random = hash(&[seed, rank as u64, token as u64, draw]);
                draw += 1;
                let id = match self {
                    Routing::OneHot => (ids.len() - start) as i32,
                    Routing::Zipf => {
                        // Inverse of a 1 / x density.
                        let u = (random >> 11) as f64 / (1u64 << 53) as f64;
                        (((experts as f64 + 1.0).powf(u) - 1.0) as i32).min(experts as i32 - 1)
                    }
                    _ => (random % experts as u64) as i32,
                };
                if !ids[start..].contains(&id) {
                    ids.push(id);
                }
            }
        }
        Ok(ids)
    }
}

/// A well-mixed word of some words (splitmix64).
pub fn hash(words: &[u64]) -> u64 {
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    for word in words {
        state = state.wrapping_add(*word).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        state = (state ^ state >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        state = (state ^ state >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        state ^= state >> 31;
    }
    state
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_token_chooses_distinct_experts() {
        for routing in [Routing::Hash, Routing::Zipf, Routing::OneHot] {
            let ids = routing.ids(1, 50, 16, 8, 7).unwrap();
            assert_eq!(ids.len(), 400);
            for row in ids.chunks(8) {
                let mut row = row.to_vec();
                row.sort();
                row.dedup();
                assert!(row.len() == 8 && row[0] >= 0 && row[7] < 16, "{routing:?} {row:?}");
            }
        }
        assert!(Routing::Hash.ids(0, 1, 4, 5, 0).is_err());
        assert!(Routing::parse("no such thing").is_err());
    }

    #[test]
    fn ranks_and_seeds_differ() {
        let ids = |rank, seed| Routing::Hash.ids(rank, 20, 64, 8, seed).unwrap();
        assert!(ids(0, 1) != ids(1, 1) && ids(0, 1) != ids(0, 2) && ids(0, 1) == ids(0, 1));
    }
}
