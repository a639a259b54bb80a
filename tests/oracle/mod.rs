//! What dispatch and combine must give, worked out the slow way from the design page alone.
//!
//! Shares nothing with the library, not even a conversion: a mistake there must not cancel itself out here. It sees
//! the inputs of all ranks at once, so there is no communication to get wrong, and it keeps every row as a (rank,
//! token) pair until the end.

use std::collections::BTreeSet;

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
    pub layout: Layout,
    /// max_recv_rows; 0 = none.
    pub limit: usize,
    /// M.
    pub bound: usize,
    /// K.
    pub topk: usize,
    /// The ids are those of an earlier dispatch, and are not looked at again.
    pub reuse: bool,
    pub ranks: Vec<Input>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    Gathered,
    RankMajor,
    Flat,
    ExpertPadded,
    ExpertContiguous { alignment: usize },
}

impl Layout {
    /// A row belongs to one expert.
    pub fn by_expert(self) -> bool {
        matches!(self, Layout::ExpertPadded | Layout::ExpertContiguous { .. })
    }
}

/// A token and the rank it comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Source {
    pub rank: usize,
    pub token: usize,
}

/// What a row holds: a token, and (EXPERT_*) the expert it is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Row {
    pub source: Source,
    pub expert: Option<usize>,
}

/// Rows that found no room, with the ranks that had none.
pub type Dropped = BTreeSet<(usize, Row)>;

/// What one rank receives. Outputs have one row per entry of `rows`; `None` is padding.
pub struct Received {
    pub rows: Vec<Option<Row>>,
    /// [rows, 2].
    pub row_source: Vec<i32>,
    /// [rows, K]; EXPERT_*: [rows].
    pub ids: Vec<i32>,
    /// [rows, K] float32 as bits; EXPERT_*: [rows].
    pub weights: Vec<u32>,
    /// [R].
    pub rank_counts: Vec<i32>,
    /// [L].
    pub expert_counts: Vec<i32>,
    /// [L + 1]; EXPERT_* only.
    pub expert_offsets: Vec<i32>,
    /// [4 + R].
    pub status: Vec<i32>,
    /// What HOST_COUNTS reports.
    pub num_rows: usize,
}

/// The weights of an EXPERT_* combine.
#[derive(Clone, Copy)]
pub enum Weights<'a> {
    /// Those that dispatch was given; absent ones are 1.
    Dispatched,
    /// [T, K] float32 as bits, of this rank's tokens.
    Given(&'a [u32]),
    /// A sum without weights.
    None,
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

/// Where the rows that are meant for a rank come to lie.
struct Places {
    /// As long as the outputs.
    rows: Vec<Option<Row>>,
    dropped: Vec<Row>,
    /// The max_recv_rows that would have dropped nothing.
    demand: usize,
    /// [L + 1].
    offsets: Vec<usize>,
}

impl Step {
    fn is_bad(&self, id: i64) -> bool {
        id < -1 || id >= self.owner.len() as i64
    }

    /// The experts a token really has, each with its k: bad ids and -1 are none.
    fn experts(&self, source: Source) -> impl Iterator<Item = (usize, usize)> {
        let all = self.ranks[source.rank].ids.as_deref().unwrap_or(&[]);
        let ids = if all.is_empty() { all } else { &all[source.token * self.topk..][..self.topk] };
        let good = ids.iter().enumerate().filter(|&(_, &id)| id != -1 && !self.is_bad(id));
        good.map(|(k, &id)| (k, id as usize))
    }

    fn has_expert_on(&self, source: Source, rank: usize) -> bool {
        self.ranks[source.rank].ids.is_none()
            || self.experts(source).any(|(_, expert)| self.owner[expert] == rank)
    }

    /// The ranks whose results make up a token's sum, ascending.
    pub fn contributors(&self, source: Source) -> Vec<usize> {
        (0..self.ranks.len()).filter(|&rank| self.has_expert_on(source, rank)).collect()
    }

    fn tokens_of(&self, rank: usize) -> impl Iterator<Item = Source> + use<> {
        (0..self.ranks[rank].tokens).map(move |token| Source { rank, token })
    }

    fn local_experts(&self, rank: usize) -> Vec<usize> {
        local_experts(&self.owner, rank)
    }

    /// The rows of each block of the outputs of a rank: R * M at most where an expert has one, all of them else.
    pub fn block(&self) -> usize {
        let all = self.ranks.len() * self.bound;
        if self.limit > 0 { all.min(self.limit) } else { all }
    }

    /// The rows of a rank's outputs.
    pub fn capacity(&self, rank: usize) -> usize {
        let (all, local) = (self.ranks.len() * self.bound, self.local_experts(rank).len());
        match self.layout {
            Layout::Gathered | Layout::RankMajor => all,
            Layout::Flat => self.block(),
            Layout::ExpertPadded => local * self.block(),
            Layout::ExpertContiguous { .. } if local == 0 => 0,
            Layout::ExpertContiguous { alignment } => {
                let rows = all * self.topk.min(local) + local * (alignment - 1);
                let rows = rows.next_multiple_of(alignment);
                if self.limit > 0 { rows.min(self.limit) } else { rows }
            }
        }
    }

    /// The rows meant for a rank, in order: by source rank, or by expert.
    fn blocks(&self, rank: usize) -> Vec<Vec<Row>> {
        let sources = (0..self.ranks.len()).map(|from| self.tokens_of(from));
        if self.layout.by_expert() {
            let local = self.local_experts(rank);
            let mut blocks = vec![Vec::new(); local.len()];
            for source in sources.flatten() {
                let mine: BTreeSet<usize> = self
                    .experts(source)
                    .map(|(_, expert)| expert)
                    .filter(|&expert| self.owner[expert] == rank)
                    .collect();
                for expert in mine {
                    let index = local.iter().position(|&own| own == expert).expect("its own");
                    blocks[index].push(Row { source, expert: Some(expert) });
                }
            }
            return blocks;
        }
        let everything = self.layout == Layout::Gathered;
        let arrives = |&source: &Source| everything || self.has_expert_on(source, rank);
        let rows = |source| Row { source, expert: None };
        sources.map(|tokens| tokens.filter(arrives).map(rows).collect()).collect()
    }

    fn places(&self, rank: usize) -> Places {
        let blocks = self.blocks(rank);
        let (mut rows, mut dropped, mut offsets) = (Vec::new(), Vec::new(), vec![0]);
        let total = blocks.iter().map(Vec::len).sum();
        let (size, mut demand) = (self.capacity(rank), total);
        match self.layout {
            Layout::Gathered | Layout::Flat => rows.extend(blocks.into_iter().flatten().map(Some)),
            Layout::RankMajor => {
                for (from, block) in blocks.into_iter().enumerate() {
                    rows.extend(block.into_iter().map(Some));
                    rows.resize((from + 1) * self.bound, None);
                }
            }
            Layout::ExpertPadded => {
                demand = blocks.iter().map(Vec::len).max().unwrap_or(0);
                for mut block in blocks {
                    dropped.extend(block.drain(block.len().min(self.block())..));
                    rows.extend(block.into_iter().map(Some));
                    rows.resize(offsets.len() * self.block(), None);
                    offsets.push(rows.len());
                }
            }
            Layout::ExpertContiguous { alignment } => {
                for block in blocks {
                    rows.extend(block.into_iter().map(Some));
                    rows.resize(rows.len().next_multiple_of(alignment), None);
                    offsets.push(rows.len());
                }
                demand = rows.len();
                offsets.iter_mut().for_each(|offset| *offset = size.min(*offset));
            }
        }
        dropped.extend(rows.drain(rows.len().min(size)..).flatten());
        rows.resize(size, None);
        Places { rows, dropped, demand, offsets }
    }

    /// The rows that a rank must have room for.
    pub fn demand(&self, rank: usize) -> usize {
        self.places(rank).demand
    }

    /// The ranks that have too little room; under A2A_OVERFLOW_ERROR the step fails if there are any.
    pub fn overflowing(&self) -> Vec<usize> {
        let limited = if self.limit > 0 { self.ranks.len() } else { 0 };
        (0..limited).filter(|&rank| self.demand(rank) > self.limit).collect()
    }

    /// What is dropped under A2A_OVERFLOW_DROP.
    pub fn dropped(&self) -> Dropped {
        let limited = if self.limit > 0 { self.ranks.len() } else { 0 };
        let of = |rank| self.places(rank).dropped.into_iter().map(move |row| (rank, row));
        (0..limited).flat_map(of).collect()
    }

    /// What `rank` receives. `exact`: the outputs have as many rows as are in use (where the counts are known
    /// beforehand, or afterwards), not as many as could be.
    pub fn dispatch(&self, rank: usize, exact: bool) -> Received {
        let Places { mut rows, dropped, demand, offsets } = self.places(rank);
        let kept = rows.iter().flatten().count();
        let num_rows = match self.layout {
            Layout::ExpertContiguous { .. } => *offsets.last().expect("L + 1 of them"),
            _ => kept,
        };
        let fixed = matches!(self.layout, Layout::RankMajor | Layout::ExpertPadded);
        if exact && !fixed {
            rows.truncate(num_rows);
        }

        let mut received = Received {
            row_source: Vec::new(),
            ids: Vec::new(),
            weights: Vec::new(),
            rank_counts: vec![0; self.ranks.len()],
            expert_counts: Vec::new(),
            expert_offsets: offsets.iter().map(|&offset| offset as i32).collect(),
            status: self.status(rank, dropped.len(), demand),
            num_rows,
            rows,
        };
        let columns = if self.layout.by_expert() { 1 } else { self.topk };
        let mut tokens_of = vec![0; self.owner.len()];
        for row in &received.rows {
            let Some(Row { source, expert }) = *row else {
                received.row_source.extend([-1, -1]);
                received.ids.extend(std::iter::repeat_n(-1, columns));
                received.weights.extend(std::iter::repeat_n(0, columns));
                continue;
            };
            received.rank_counts[source.rank] += 1;
            received.row_source.extend([source.rank as i32, source.token as i32]);
            if let Some(expert) = expert {
                tokens_of[expert] += 1;
                received.ids.push(expert as i32);
                let mine = self.experts(source).filter(|(_, other)| *other == expert);
                let mut weights = mine.map(|(k, _)| self.weight(source, k));
                let first = weights.next().expect("the row is there because of it");
                received.weights.push(
                    weights
                        .fold(first, |sum, weight| (f32::from_bits(sum) + f32::from_bits(weight)).to_bits()),
                );
                continue;
            }
            let experts: BTreeSet<usize> = self.experts(source).map(|(_, expert)| expert).collect();
            for expert in experts {
                tokens_of[expert] += 1;
            }
            for k in 0..self.topk {
                let ids = self.ranks[source.rank].ids.as_ref();
                let id = ids.map_or(-1, |ids| ids[source.token * self.topk + k]);
                received.ids.push(if self.is_bad(id) { -1 } else { id as i32 });
                received.weights.push(self.weight(source, k));
            }
        }
        for expert in self.local_experts(rank) {
            received.expert_counts.push(tokens_of[expert]);
        }
        received
    }

    /// Float32 as bits.
    fn weight(&self, source: Source, k: usize) -> u32 {
        let weights = self.ranks[source.rank].weights.as_ref();
        weights.map_or(1.0f32.to_bits(), |weights| weights[source.token * self.topk + k])
    }

    /// Status bits, bad ids of this rank's own tokens, dropped rows, rows demanded, no lost rank.
    fn status(&self, rank: usize, dropped: usize, demand: usize) -> Vec<i32> {
        let ids = self.ranks[rank].ids.iter().flatten();
        let bad = if self.reuse { 0 } else { ids.filter(|&&id| self.is_bad(id)).count() as i32 };
        let bits = i32::from(bad > 0) | i32::from(dropped > 0) << 1;
        let mut status = vec![bits, bad, dropped as i32, demand as i32];
        status.extend(std::iter::repeat_n(0, self.ranks.len()));
        status
    }

    /// The rows that make up a token's sum, in the order of the sum, each with the rank that has it and (EXPERT_*)
    /// its k.
    fn terms(&self, source: Source) -> Vec<(usize, Row, usize)> {
        if self.layout.by_expert() {
            let experts = self.experts(source);
            return experts
                .map(|(k, expert)| (self.owner[expert], Row { source, expert: Some(expert) }, k))
                .collect();
        }
        self.contributors(source).into_iter().map(|rank| (rank, Row { source, expert: None }, 0)).collect()
    }

    /// What combine gives `rank`: `result(r, row)` is rank r's row, `hidden` elements of type `from`. `before`: what
    /// the output holds, to be added last.
    #[allow(clippy::too_many_arguments, reason = "a sum depends on this much")]
    pub fn combine(
        &self,
        rank: usize,
        hidden: usize,
        (from, to): (Float, Float),
        weights: Weights,
        dropped: &Dropped,
        result: impl Fn(usize, Row) -> Vec<u8>,
        before: Option<&[u8]>,
    ) -> Vec<u8> {
        let mut out = Vec::new();
        for source in self.tokens_of(rank) {
            let mut sums = vec![0.0f32; hidden];
            for (r, row, k) in self.terms(source) {
                if dropped.contains(&(r, row)) {
                    continue;
                }
                let weight = match weights {
                    _ if !self.layout.by_expert() => None,
                    Weights::Dispatched => Some(self.weight(source, k)),
                    Weights::Given(given) => Some(given[source.token * self.topk + k]),
                    Weights::None => None,
                };
                let values = result(r, row);
                for (column, sum) in sums.iter_mut().enumerate() {
                    let mut value = from.widen(from.load(&values, column));
                    if let Some(weight) = weight {
                        value *= f32::from_bits(weight);
                    }
                    *sum += value;
                }
            }
            for (column, sum) in sums.iter_mut().enumerate() {
                if let Some(before) = before {
                    *sum += to.widen(to.load(before, source.token * hidden + column));
                }
                out.extend(&to.round(*sum).to_le_bytes()[..to.bytes()]);
            }
        }
        out
    }

    /// Combine's status: how many distinct rows this rank's sums lack.
    pub fn combine_status(&self, rank: usize, dropped: &Dropped) -> Vec<i32> {
        let mut missing = 0;
        if !dropped.is_empty() {
            for source in self.tokens_of(rank) {
                let terms: BTreeSet<_> = self.terms(source).into_iter().map(|(r, row, _)| (r, row)).collect();
                missing += terms.intersection(dropped).count() as i32;
            }
        }
        let mut status = vec![i32::from(missing > 0) << 1, 0, missing, 0];
        status.extend(std::iter::repeat_n(0, self.ranks.len()));
        status
    }

    /// What the row_weights of all ranks bring back to `rank`, [T, K] as bits: `value(r, row, column)` is what rank r
    /// sends with a row, in column k, or 0 where rows have one value.
    pub fn gradients(
        &self,
        rank: usize,
        dropped: &Dropped,
        value: impl Fn(usize, Row, usize) -> u32,
    ) -> Vec<u32> {
        let mut out = Vec::new();
        for source in self.tokens_of(rank) {
            let mut values = vec![0; self.topk];
            for (k, expert) in self.experts(source) {
                let by_expert = self.layout.by_expert();
                let row = Row { source, expert: by_expert.then_some(expert) };
                let owner = self.owner[expert];
                if !dropped.contains(&(owner, row)) {
                    values[k] = value(owner, row, if by_expert { 0 } else { k });
                }
            }
            out.extend(values);
        }
        out
    }
}

/// Scales that quantisation makes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scale {
    F32,
    /// Powers of two, their exponents packed four to an int32.
    Ue8m0,
}

impl Scale {
    /// Bytes of the scales of a row.
    pub fn row_bytes(self, hidden: usize) -> usize {
        let groups = hidden.div_ceil(GROUP);
        match self {
            Scale::F32 => 4 * groups,
            Scale::Ue8m0 => 4 * groups.div_ceil(4),
        }
    }
}

const GROUP: usize = 128;

/// A row as e4m3, and its scales.
pub fn quantise(row: &[u8], float: Float, scale: Scale) -> (Vec<u8>, Vec<u8>) {
    let elements: Vec<u32> = (0..row.len() / float.bytes()).map(|column| float.load(row, column)).collect();
    let (mut values, mut scales) = (Vec::new(), Vec::new());
    for group in elements.chunks(GROUP) {
        let mut largest = 1e-4f32;
        for &bits in group {
            let magnitude = float.widen(bits).abs();
            // False for NaN.
            if magnitude > largest {
                largest = magnitude;
            }
        }
        let mut s = largest / 448.0;
        match scale {
            Scale::F32 => scales.extend(s.to_le_bytes()),
            Scale::Ue8m0 => {
                // The next power of two: only a zero mantissa does not carry into the exponent.
                s = f32::from_bits((s.to_bits() + 0x7f_ffff) & 0x7f80_0000);
                scales.push((s.to_bits() >> 23) as u8);
            }
        }
        for &bits in group {
            let negative = bits >> (8 * float.bytes() - 1) == 1;
            values.push(u8::from(negative) << 7 | e4m3((float.widen(bits) / s).abs()));
        }
    }
    scales.resize(scale.row_bytes(elements.len()), 0);
    (values, scales)
}

/// The value of the seven lower bits of an e4m3 number, NaN (0x7f) apart: four bits of exponent, three of mantissa.
pub fn e4m3_value(bits: u8) -> f64 {
    let (exponent, mantissa) = (i32::from(bits >> 3), f64::from(bits & 7));
    if exponent == 0 { mantissa / 512.0 } else { (8.0 + mantissa) * power_of_two(exponent - 10) }
}

/// The bits of the e4m3 number nearest to a magnitude, ties to even; 448 for all that is larger.
pub fn e4m3(magnitude: f32) -> u8 {
    const LARGEST: u8 = 0x7e;
    if magnitude.is_nan() {
        return LARGEST + 1;
    }
    let value = f64::from(magnitude);
    // The largest number that is not above it, by halves: their bits ascend with their values.
    let (mut below, mut above) = (0, LARGEST + 1);
    while above - below > 1 {
        let middle = (below + above) / 2;
        if e4m3_value(middle) <= value {
            below = middle;
        } else {
            above = middle;
        }
    }
    if below == LARGEST {
        return LARGEST;
    }
    let (down, up) = (value - e4m3_value(below), e4m3_value(above) - value);
    if down < up || down == up && below.is_multiple_of(2) { below } else { above }
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
