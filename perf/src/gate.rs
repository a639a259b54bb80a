//! The correctness gate: what dispatch and combine must give, by the oracle of the conformance tests.
//!
//! Every received row is compared; sums are compared for up to 64 tokens of each rank, spread over all of them, bit by
//! bit. A shape that fails has no time.

use crate::conformance::common::{DispatchIn, DispatchOut, F32, I32, Seat, Tensor};
use crate::conformance::oracle::{
    self, Dropped, Input, Received, Row, Rows, Scale, Source, Step, Weights, quantise,
};
use crate::routing::{Routing, hash};
use crate::shape::{Kind, Pair, Shape};

const SAMPLES: usize = 64;

pub struct Gate {
    rank: usize,
    pair: Pair,
    kind: Kind,
    hidden: usize,
    seed: u64,
    step: Step,
    received: Received,
}

/// The bits of a token's element, or of an expert's result: finite, of magnitudes far enough apart that the order of a
/// sum shows.
fn element(kind: Kind, random: u64) -> u32 {
    let exponent = 118 + (random >> 40) % 19;
    let bits = (random as u32 & 0x807f_ffff) | (exponent as u32) << 23;
    if kind == Kind::F32 { bits } else { bits >> 16 }
}

/// A row's numbers.
fn fill(kind: Kind, hidden: usize, words: &[u64]) -> Vec<u8> {
    let start = hash(words);
    let size = kind.float().bytes();
    let mut row = Vec::with_capacity(hidden * size);
    let mut state = start;
    for _ in 0..hidden {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        row.extend_from_slice(&element(kind, state ^ state >> 29).to_le_bytes()[..size]);
    }
    row
}

/// A row of e4m3 numbers, of which none is a NaN.
fn fill_f8(hidden: usize, words: &[u64]) -> Vec<u8> {
    let mut state = hash(words);
    let byte = |_| {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        let bits = (state >> 56) as u8;
        if bits & 0x7f == 0x7f { bits ^ 1 } else { bits }
    };
    (0..hidden).map(byte).collect()
}

impl Gate {
    pub fn new(seat: &Seat, shape: &Shape, pair: Pair, routing: &Routing) -> Result<Gate, String> {
        let mut ranks = Vec::new();
        for rank in 0..seat.world {
            let ids = routing.ids(rank, shape.tokens, shape.experts, shape.topk, shape.seed)?;
            let weights = (0..ids.len() as u64)
                .map(|at| element(Kind::F32, hash(&[shape.seed, 11, rank as u64, at])))
                .collect();
            ranks.push(Input {
                tokens: shape.tokens,
                ids: Some(ids.into_iter().map(i64::from).collect()),
                weights: Some(weights),
                ..Input::default()
            });
        }
        let step = Step {
            owner: oracle::contiguous(shape.experts, seat.world),
            layout: pair.oracle_layout(),
            limit: shape.max_recv_rows as usize,
            bound: shape.tokens.max(1),
            topk: shape.topk,
            reuse: false,
            ranks,
        };
        if !step.overflowing().is_empty() {
            return Err(format!("max_recv_rows {} does not hold this step's rows", shape.max_recv_rows));
        }
        let received = step.dispatch(seat.rank, false);
        let (rank, kind, hidden, seed) = (seat.rank, shape.kind, shape.hidden, shape.seed);
        Ok(Gate { rank, pair, kind, hidden, seed, step, received })
    }

    /// A token as it is given.
    fn token(&self, source: Source) -> Vec<u8> {
        let words = [self.seed, 1, source.rank as u64, source.token as u64];
        if self.kind == Kind::F8 {
            fill_f8(self.hidden, &words)
        } else {
            fill(self.kind, self.hidden, &words)
        }
    }
    /// Its scales, where they are given with it.
    fn scales(&self, source: Source, scale: Scale) -> Vec<u8> {
        let words = [self.seed, 3, source.rank as u64, source.token as u64];
        fill(Kind::F32, scale.row_bytes(self.hidden) / 4, &words)
    }
    /// A token as it arrives, and what arrives as its scales.
    fn arriving(&self, source: Source) -> (Vec<u8>, Vec<u8>) {
        let token = self.token(source);
        match self.kind.scale() {
            None => (token, Vec::new()),
            Some(scale) if self.kind == Kind::F8 => (token, self.scales(source, scale)),
            Some(scale) => quantise(&token, self.kind.float(), scale),
        }
    }
    /// Rank `rank`'s result for a row.
    fn result(&self, rank: usize, row: Row) -> Vec<u8> {
        let expert = row.expert.map_or(0, |expert| expert as u64 + 1);
        let source = row.source;
        let words = [self.seed, 2, rank as u64, source.rank as u64, source.token as u64, expert];
        fill(self.kind, self.hidden, &words)
    }

    pub fn input(&self) -> DispatchIn {
        let mine = &self.step.ranks[self.rank];
        let (tokens, topk) = (mine.tokens, self.step.topk);
        let own = |token| Source { rank: self.rank, token };
        let rows: Vec<u8> = (0..tokens).flat_map(|token| self.token(own(token))).collect();
        let given = self.kind.scale().filter(|_| self.kind == Kind::F8);
        let scales = given.map(|scale| {
            let rows: Vec<u8> = (0..tokens).flat_map(|token| self.scales(own(token), scale)).collect();
            Tensor::of(F32, &[tokens, scale.row_bytes(self.hidden) / 4], &rows)
        });
        let ids: Vec<u8> = mine.ids.iter().flatten().flat_map(|id| (*id as i32).to_le_bytes()).collect();
        let weights: Vec<u8> = mine.weights.iter().flatten().flat_map(|word| word.to_le_bytes()).collect();
        DispatchIn {
            tokens: Some(Tensor::of(self.kind.given(), &[tokens, self.hidden], &rows)),
            topk_ids: Some(Tensor::of(I32, &[tokens, topk], &ids)),
            topk_weights: Some(Tensor::of(F32, &[tokens, topk], &weights)),
            scales,
            ..Default::default()
        }
    }

    /// Distinct (token, rank) rows that this rank sends, and that it receives.
    pub fn rows(&self) -> (u64, u64) {
        let ranks = || 0..self.step.ranks.len();
        let sent = ranks().map(|rank| self.rows_between(self.rank, rank)).sum();
        let received = ranks().map(|rank| self.rows_between(rank, self.rank)).sum();
        (sent, received)
    }

    /// Distinct (token, rank) rows of `from`'s tokens for `to`.
    pub fn rows_between(&self, from: usize, to: usize) -> u64 {
        let tokens = 0..self.step.ranks[from].tokens;
        tokens.filter(|&token| self.step.contributors(Source { rank: from, token }).contains(&to)).count()
            as u64
    }

    /// Rows of the layout that came from `source`.
    pub fn rows_from(&self, source: usize) -> u64 {
        self.received.rows.iter().flatten().filter(|row| row.source.rank == source).count() as u64
    }

    /// Compares every output that was asked for.
    pub fn check_received(&self, output: &DispatchOut) -> Result<(), String> {
        let tokens = output.tokens.as_ref().expect("wanted");
        let source = output.row_source.as_ref().map(Tensor::read_i32);
        for (at, row) in self.received.rows.iter().enumerate() {
            let pair = row.map_or([-1, -1], |row| [row.source.rank as i32, row.source.token as i32]);
            if let Some(source) = &source
                && source[at * 2..at * 2 + 2] != pair
            {
                return Err(format!(
                    "row_source: row {at} is {:?}, expected {pair:?}",
                    &source[at * 2..][..2]
                ));
            }
            let Some(row) = row else { continue };
            let (want, factors) = self.arriving(row.source);
            if let Some(scales) = &output.scales
                && scales.read_row(at) != factors
            {
                return Err(format!("scales: row {at} ({row:?}) differs"));
            }
            if tokens.read_row(at) != want {
                return Err(format!("tokens: row {at} ({row:?}) differs"));
            }
        }
        let counts = [
            ("expert_counts", &output.expert_counts, &self.received.expert_counts),
            ("rank_counts", &output.rank_counts, &self.received.rank_counts),
        ];
        for (name, got, want) in counts {
            let Some(got) = got.as_ref().map(Tensor::read_i32) else { continue };
            if &got != want {
                return Err(format!("{name} are {got:?}, expected {want:?}"));
            }
        }
        let ids = self.received.ids.iter().flat_map(|id| id.to_le_bytes()).collect::<Vec<u8>>();
        let weights = self.received.weights.iter().flat_map(|bits| bits.to_le_bytes()).collect();
        for (name, got, want) in
            [("topk_ids", &output.topk_ids, ids), ("topk_weights", &output.topk_weights, weights)]
        {
            // A caller's tensor may have more rows than the step.
            if got.as_ref().is_some_and(|got| got.read()[..want.len()] != want) {
                return Err(format!("{name} differ"));
            }
        }
        Ok(())
    }

    /// Writes this rank's results for the rows it received.
    pub fn write_results(&self, results: &mut Tensor) {
        for (at, row) in self.received.rows.iter().enumerate() {
            if let Some(row) = row {
                results.write_row(at, &self.result(self.rank, *row));
            }
        }
    }

    pub fn check_sums(&self, sums: &Tensor) -> Result<(), String> {
        let size = self.hidden * self.kind.float().bytes();
        let tokens = self.step.ranks[self.rank].tokens;
        let topk = self.step.topk;
        // A step of the sampled tokens alone: a token's sum depends on no other.
        let samples: Vec<usize> =
            (0..tokens.min(SAMPLES)).map(|i| i * tokens / tokens.min(SAMPLES)).collect();
        let mut step = self.step.clone();
        let mine = &mut step.ranks[self.rank];
        let choose = |from: &Option<Vec<i64>>| {
            from.as_ref().map(|ids| samples.iter().flat_map(|t| ids[t * topk..][..topk].to_vec()).collect())
        };
        let choose_bits = |from: &Option<Vec<u32>>| {
            from.as_ref().map(|bits| samples.iter().flat_map(|t| bits[t * topk..][..topk].to_vec()).collect())
        };
        *mine = Input {
            tokens: samples.len(),
            ids: choose(&mine.ids),
            weights: choose_bits(&mine.weights),
            rows: Rows::default(),
            ..Input::default()
        };
        let result = |rank: usize, row: Row| {
            let source = Source { token: samples[row.source.token], ..row.source };
            self.result(rank, Row { source, ..row })
        };
        let floats = (self.kind.float(), self.kind.float());
        let want =
            step.combine(self.rank, self.hidden, floats, Weights::Dispatched, &Dropped::new(), result, None);
        for (at, token) in samples.iter().enumerate() {
            if sums.read_row(*token) != want[at * size..][..size] {
                return Err(format!("combine: token {token} ({}) differs", self.pair.name));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use a2a::abi::types::*;

    use super::*;
    use crate::conformance::common::{CombineOut, Comm, config, threads};
    use crate::shape::PAIRS;

    /// A whole step of one rank; `spoil` says which row's tokens, and which token's sum, are changed by a bit.
    fn step(pair: Pair, kind: Kind, spoil: (Option<usize>, Option<usize>)) -> Result<(), String> {
        threads(1, std::time::Duration::from_secs(60), move |seat| {
            let shape = Shape {
                pair: pair.name.into(),
                ranks: 1,
                tokens: 3,
                hidden: 16,
                experts: 4,
                topk: 2,
                kind,
                routing: "hash".into(),
                seed: 5,
                iterations: 1,
                staged: true,
                ..Shape::default()
            };
            let mut config = config(seat);
            (config.backend, config.layout) = (pair.backend, pair.layout);
            (config.num_experts, config.max_topk, config.max_hidden, config.max_tokens) = (4, 2, 16, 3);
            kind.configure(&mut config);
            let comm = Comm::create(&config)?;
            let routing = comm.routing(0)?;
            let gate = Gate::new(seat, &shape, pair, &Routing::Hash)?;
            let mut output = DispatchOut {
                tokens: Some(Tensor::view()),
                scales: kind.scale().map(|_| Tensor::view()),
                topk_weights: Some(Tensor::view()),
                rank_counts: Some(Tensor::view()),
                row_source: Some(Tensor::view()),
                expert_counts: Some(Tensor::view()),
                ..Default::default()
            };
            comm.dispatch(&routing, A2A_PHASE_BOTH, &gate.input(), &mut output)?;
            let flip = |tensor: &mut Tensor, row: usize| {
                let mut bytes = tensor.read_row(row);
                bytes[0] ^= 1;
                tensor.write_row(row, &bytes);
            };
            if let Some(row) = spoil.0 {
                flip(output.tokens.as_mut().expect("wanted"), row);
            }
            gate.check_received(&output)?;
            let mut results = comm.combine_buffer(&routing, Kind::Bf16.dtype())?;
            gate.write_results(&mut results);
            let mut sums =
                CombineOut { tokens: Some(Tensor::new(Kind::Bf16.dtype(), &[3, 16])), ..Default::default() };
            comm.combine(&routing, A2A_PHASE_BOTH, 0, Some(&results), &mut sums)?;
            let mut sums = sums.tokens.expect("wanted");
            if let Some(token) = spoil.1 {
                flip(&mut sums, token);
            }
            gate.check_sums(&sums)
        })
    }

    #[test]
    fn a_single_wrong_bit_has_no_time() {
        for pair in PAIRS.into_iter().filter(|pair| pair.keeps_rows()) {
            for kind in [Kind::Bf16, Kind::Fp8, Kind::F8] {
                step(pair, kind, (None, None)).unwrap();
                let why = step(pair, kind, (Some(0), None)).unwrap_err();
                assert!(why.contains("tokens: row 0"), "{}: {why}", pair.name);
                let why = step(pair, kind, (None, Some(2))).unwrap_err();
                assert!(why.contains("token 2"), "{}: {why}", pair.name);
            }
        }
    }
}
