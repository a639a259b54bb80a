//! What dispatch and combine must give, worked out the slow way from the design page alone.
//!
//! Shares nothing with the library, not even a conversion: a mistake there must not cancel itself out here. It sees
//! the inputs of all ranks at once, so there is no communication to get wrong, and it keeps every row as a (rank,
//! token) pair until the end.

/// Tensor rows of one rank, any element type.
#[derive(Clone, Default)]
pub struct Rows {
    pub row_bytes: usize,
    pub bytes: Vec<u8>,
}

impl Rows {
    pub fn row(&self, row: usize) -> &[u8] {
        &self.bytes[row * self.row_bytes..][..self.row_bytes]
    }
}

/// What one rank dispatches.
#[derive(Clone, Default)]
pub struct Input {
    /// T.
    pub tokens: usize,
    /// [T, K] global ids as given; `None`: every token counts for every rank (GATHERED only).
    pub ids: Option<Vec<i64>>,
    /// [T, K] float32 as bits, for they travel untouched; `None`: 1 each.
    pub weights: Option<Vec<u32>>,
    pub rows: Rows,
    pub scales: Option<Rows>,
    pub extras: [Option<Rows>; 8],
}

/// One step of the whole group.
#[derive(Clone)]
pub struct Step {
    /// The rank that owns each expert.
    pub owner: Vec<usize>,
    /// M.
    pub bound: usize,
    /// K.
    pub topk: usize,
    pub ranks: Vec<Input>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    Gathered,
    RankMajor,
}

/// A token and the rank it comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Source {
    pub rank: usize,
    pub token: usize,
}

/// What one rank receives. Outputs have one row per entry of `rows`; `None` is padding.
pub struct Received {
    pub rows: Vec<Option<Source>>,
    /// [rows, 2].
    pub row_source: Vec<i32>,
    /// [rows, K].
    pub ids: Vec<i32>,
    /// [rows, K] float32 as bits.
    pub weights: Vec<u32>,
    /// [R].
    pub rank_counts: Vec<i32>,
    /// [L].
    pub expert_counts: Vec<i32>,
    /// [4 + R].
    pub status: Vec<i32>,
    /// N.
    pub num_rows: usize,
}

/// Consecutive blocks; the first `experts % ranks` ranks own one more.
pub fn contiguous(experts: usize, ranks: usize) -> Vec<usize> {
    let mut owner = Vec::new();
    for rank in 0..ranks {
        let count = experts / ranks + if rank < experts % ranks { 1 } else { 0 };
        owner.extend(std::iter::repeat_n(rank, count));
    }
    owner
}

/// A rank's own experts; the place in this list is the local index.
pub fn local_experts(owner: &[usize], rank: usize) -> Vec<usize> {
    (0..owner.len()).filter(|&expert| owner[expert] == rank).collect()
}

impl Step {
    fn is_bad(&self, id: i64) -> bool {
        id < -1 || id >= self.owner.len() as i64
    }

    /// The experts a token really has: bad ids and -1 are none.
    fn experts(&self, source: Source) -> Vec<usize> {
        let Some(ids) = &self.ranks[source.rank].ids else { return Vec::new() };
        ids[source.token * self.topk..][..self.topk]
            .iter()
            .filter(|&&id| id != -1 && !self.is_bad(id))
            .map(|&id| id as usize)
            .collect()
    }

    /// The ranks whose results make up a token's sum, ascending.
    pub fn contributors(&self, source: Source) -> Vec<usize> {
        let everyone = self.ranks[source.rank].ids.is_none();
        let experts = self.experts(source);
        (0..self.ranks.len())
            .filter(|&rank| everyone || experts.iter().any(|&expert| self.owner[expert] == rank))
            .collect()
    }

    /// What `rank` receives. `exact`: the outputs have as many rows as arrive (GATHERED where the counts are known
    /// beforehand), not as many as could.
    pub fn dispatch(&self, layout: Layout, rank: usize, exact: bool) -> Received {
        let ranks = self.ranks.len();
        let mut arriving: Vec<Vec<Source>> = Vec::new();
        for (from, input) in self.ranks.iter().enumerate() {
            let tokens = (0..input.tokens).map(|token| Source { rank: from, token });
            arriving.push(match layout {
                Layout::Gathered => tokens.collect(),
                Layout::RankMajor => {
                    tokens.filter(|&source| self.contributors(source).contains(&rank)).collect()
                }
            });
        }
        let num_rows = arriving.iter().map(Vec::len).sum();

        let mut rows = Vec::new();
        for from in &arriving {
            rows.extend(from.iter().copied().map(Some));
            if layout == Layout::RankMajor {
                rows.extend(std::iter::repeat_n(None, self.bound - from.len()));
            }
        }
        if layout == Layout::Gathered && !exact {
            rows.resize(ranks * self.bound, None);
        }

        let mut received = Received {
            row_source: Vec::new(),
            ids: Vec::new(),
            weights: Vec::new(),
            rank_counts: arriving.iter().map(|from| from.len() as i32).collect(),
            expert_counts: Vec::new(),
            status: self.status(rank, num_rows),
            num_rows,
            rows,
        };
        let mut tokens_of = vec![0; self.owner.len()];
        for row in &received.rows {
            match *row {
                Some(source) => {
                    let mut experts = self.experts(source);
                    experts.sort();
                    experts.dedup();
                    for expert in experts {
                        tokens_of[expert] += 1;
                    }
                    received.row_source.extend([source.rank as i32, source.token as i32]);
                    let input = &self.ranks[source.rank];
                    for k in 0..self.topk {
                        let at = source.token * self.topk + k;
                        let id = input.ids.as_ref().map_or(-1, |ids| ids[at]);
                        received.ids.push(if self.is_bad(id) { -1 } else { id as i32 });
                        received
                            .weights
                            .push(input.weights.as_ref().map_or(1.0f32.to_bits(), |weights| weights[at]));
                    }
                }
                None => {
                    received.row_source.extend([-1, -1]);
                    received.ids.extend(std::iter::repeat_n(-1, self.topk));
                    received.weights.extend(std::iter::repeat_n(0, self.topk));
                }
            }
        }
        for expert in local_experts(&self.owner, rank) {
            received.expert_counts.push(tokens_of[expert]);
        }
        received
    }

    /// Status bits, bad ids of this rank's own tokens, dropped rows, rows demanded, no lost rank.
    fn status(&self, rank: usize, num_rows: usize) -> Vec<i32> {
        let ids = self.ranks[rank].ids.iter().flatten();
        let bad = ids.filter(|&&id| self.is_bad(id)).count() as i32;
        let mut status = vec![i32::from(bad > 0), bad, 0, num_rows as i32];
        status.extend(std::iter::repeat_n(0, self.ranks.len()));
        status
    }

    /// What combine gives `rank`, for layouts whose rows are partial sums: `result(r, t)` is rank r's row for this
    /// rank's token t, `hidden` elements of type `from`. `before`: what the output holds, to be added last.
    pub fn combine(
        &self,
        rank: usize,
        hidden: usize,
        (from, to): (Float, Float),
        result: impl Fn(usize, usize) -> Vec<u8>,
        before: Option<&[u8]>,
    ) -> Vec<u8> {
        let mut out = Vec::new();
        for token in 0..self.ranks[rank].tokens {
            let mut sums = vec![0.0f32; hidden];
            for r in self.contributors(Source { rank, token }) {
                let row = result(r, token);
                for (column, sum) in sums.iter_mut().enumerate() {
                    *sum += from.widen(from.load(&row, column));
                }
            }
            for (column, sum) in sums.iter_mut().enumerate() {
                if let Some(before) = before {
                    *sum += to.widen(to.load(before, token * hidden + column));
                }
                out.extend(&to.round(*sum).to_le_bytes()[..to.bytes()]);
            }
        }
        out
    }
}

/// A float format that combine reads and writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Float {
    Bf16,
    F16,
    F32,
}

impl Float {
    pub fn bytes(self) -> usize {
        match self {
            Float::Bf16 | Float::F16 => 2,
            Float::F32 => 4,
        }
    }

    /// Bits of the exponent and of the mantissa.
    fn shape(self) -> (u32, u32) {
        match self {
            Float::Bf16 => (8, 7),
            Float::F16 => (5, 10),
            Float::F32 => (8, 23),
        }
    }

    /// The bits of the element at `index` of a little-endian array.
    pub fn load(self, array: &[u8], index: usize) -> u32 {
        let mut word = [0; 4];
        word[..self.bytes()].copy_from_slice(&array[index * self.bytes()..][..self.bytes()]);
        u32::from_le_bytes(word)
    }

    pub fn is_nan(self, bits: u32) -> bool {
        let (exponent, mantissa) = self.shape();
        (bits >> mantissa) & mask(exponent) == mask(exponent) && bits & mask(mantissa) != 0
    }

    /// The value of some bits; exact, for float32 holds every value of all three formats.
    pub fn widen(self, bits: u32) -> f32 {
        let (exponent, mantissa) = self.shape();
        let bias = mask(exponent - 1) as i32;
        let sign = if (bits >> (exponent + mantissa)) & 1 == 1 { -1.0f64 } else { 1.0 };
        let (e, m) = ((bits >> mantissa) & mask(exponent), bits & mask(mantissa));
        let magnitude = if e == mask(exponent) {
            if m == 0 { f64::INFINITY } else { f64::NAN }
        } else if e == 0 {
            f64::from(m) * power_of_two(1 - bias - mantissa as i32)
        } else {
            f64::from(m | 1 << mantissa) * power_of_two(e as i32 - bias - mantissa as i32)
        };
        (sign * magnitude) as f32
    }

    /// The bits of the nearest value, ties to even; past the largest, infinity.
    pub fn round(self, value: f32) -> u32 {
        let (exponent, mantissa) = self.shape();
        let bias = mask(exponent - 1) as i32;
        let sign = (value.to_bits() >> 31) << (exponent + mantissa);
        let infinity = mask(exponent) << mantissa;
        if value.is_nan() {
            return sign | infinity | 1 << (mantissa - 1);
        }
        if value.is_infinite() {
            return sign | infinity;
        }
        // value = significand * 2^power.
        let (e, m) = ((value.to_bits() >> 23) & 0xff, value.to_bits() & mask(23));
        let (significand, power) = if e == 0 { (m, -149) } else { (m | 1 << 23, e as i32 - 150) };
        // The format's spacing at this magnitude is 2^spacing; no finer than that of its subnormals.
        let top = power + 31 - significand.leading_zeros() as i32;
        let spacing = (top - mantissa as i32).max(1 - bias - mantissa as i32);
        let units = match (spacing - power).clamp(0, 63) as u32 {
            0 => u64::from(significand) << (power - spacing).clamp(0, 63),
            shift => {
                let (whole, rest) =
                    (u64::from(significand) >> shift, u64::from(significand) & ((1 << shift) - 1));
                let half = 1u64 << (shift - 1);
                whole + u64::from(rest > half || rest == half && whole % 2 == 1)
            }
        };
        // Counted in units of the subnormals' spacing, consecutive values have consecutive bits: a mantissa that
        // rounds up to a power of two carries into the exponent by itself.
        let binades = (spacing - (1 - bias - mantissa as i32)) as u32;
        let bits = (binades << mantissa) + units as u32;
        sign | bits.min(infinity)
    }
}

fn mask(bits: u32) -> u32 {
    (1 << bits) - 1
}

fn power_of_two(power: i32) -> f64 {
    f64::from_bits(((power + 1023) as u64) << 52)
}
