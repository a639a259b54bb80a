//! Every strategy against the oracle: what arrives is exact, what comes back is bit-equal.
//!
//! A cell is one comm: a backend, a world and an index choose its config and some thirty steps, dealt from decks so
//! that no value of any axis is left to luck (a test of its own counts them). Every rank derives the whole cell, all
//! ranks' inputs included, from the seed: there is nothing to communicate but what is tested. A failing cell runs
//! alone by its name, `cargo test --release --test conformance -- threads/one_sided/8/0`; A2A_TEST_SEED (printed with
//! every failure) gives other cells.

use std::alloc::{GlobalAlloc, Layout as AllocLayout, System};
use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering::Relaxed};
use std::time::Duration;

use a2a::abi::calls::{a2a_combine, a2a_combine_buffer, a2a_destroy, a2a_dispatch, a2a_routing_create};
use a2a::abi::types::*;
use libtest_mimic::{Arguments, Trial};

#[allow(dead_code, reason = "each test binary uses a part")]
mod common;
mod oracle;

use common::*;
use oracle::{Float, Input, Layout, Received, Rows, Source};

const LIMIT: Duration = Duration::from_secs(60);

// --------------------------------------------------------------------------------------------- cells

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Backend {
    OneSided,
    Gather,
}

const BACKENDS: [Backend; 2] = [Backend::OneSided, Backend::Gather];
const WORLDS: [usize; 5] = [1, 2, 3, 4, 8];
const TOPKS: [usize; 4] = [1, 2, 8, 32];
const TOKENS: [usize; 5] = [0, 1, 127, 128, 1000];
const RECORDED: [&str; 5] = ["mixtral", "qwen3_moe", "deepseek_v3", "gaussian", "worst"];
const EXTRAS: [usize; 8] = [4, 6, 92, 8, 1, 3, 128, 20];
const ROUTINGS_PER_SLOT: usize = 2;

impl Backend {
    fn name(self) -> &'static str {
        match self {
            Backend::OneSided => "one_sided",
            Backend::Gather => "allgather",
        }
    }
    fn code(self) -> a2a_backend_t {
        match self {
            Backend::OneSided => A2A_BACKEND_NVLINK_ONE_SIDED,
            Backend::Gather => A2A_BACKEND_ALLGATHER_REDUCESCATTER,
        }
    }
    fn layout(self) -> Layout {
        match self {
            Backend::OneSided => Layout::RankMajor,
            Backend::Gather => Layout::Gathered,
        }
    }
}

/// How a step's tokens choose their experts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Even,
    Zipf,
    Recorded,
    AllToOne,
    EmptyRank,
    AllEmpty,
    Nones,
    Duplicates,
    Ragged,
    BadIds,
}

const KINDS: [Kind; 10] = [
    Kind::Even,
    Kind::Zipf,
    Kind::Recorded,
    Kind::AllToOne,
    Kind::EmptyRank,
    Kind::AllEmpty,
    Kind::Nones,
    Kind::Duplicates,
    Kind::Ragged,
    Kind::BadIds,
];

/// What is dispatched: the element types of the config and of DLPack.
const TOKEN_TYPES: [(&str, a2a_dtype_t, Dtype); 5] = [
    ("bf16", A2A_DTYPE_BF16, BF16),
    ("f16", A2A_DTYPE_F16, F16),
    ("f32", A2A_DTYPE_F32, F32),
    ("f8", A2A_DTYPE_F8_E4M3, F8),
    ("u8", A2A_DTYPE_U8, U8),
];
const FLOATS: [(&str, Float, Dtype); 3] =
    [("bf16", Float::Bf16, BF16), ("f16", Float::F16, F16), ("f32", Float::F32, F32)];

/// The values that results are made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Values {
    /// Magnitudes far enough apart that the order of a sum shows in its bits.
    Spread,
    /// Subnormals and their neighbours.
    Tiny,
    /// Any bits at all: infinities, NaNs.
    Any,
}

/// Deals every item once before any comes again.
struct Deck<T> {
    items: Vec<T>,
    left: Vec<T>,
}

impl<T: Copy> Deck<T> {
    fn new(items: &[T]) -> Deck<T> {
        Deck { items: items.to_vec(), left: Vec::new() }
    }
    fn deal(&mut self, rng: &mut Rng) -> T {
        if self.left.is_empty() {
            self.left = self.items.clone();
            rng.shuffle(&mut self.left);
        }
        self.left.pop().expect("a deck has items")
    }
}

/// One comm and all its steps.
struct Cell {
    backend: Backend,
    world: usize,
    /// The rank that owns each expert, and whether the config spells it out.
    owner: Vec<usize>,
    table: bool,
    slots: usize,
    max_topk: usize,
    max_tokens: usize,
    /// Bytes of the largest token row, and its element type.
    max_row: usize,
    token_type: usize,
    combine_type: a2a_dtype_t,
    /// Hidden size of the results; 0 = the tokens'.
    combine_hidden: usize,
    max_scale_bytes: usize,
    rounds: Vec<Round>,
}

/// Steps that are in flight together, on different slots.
struct Round {
    seed: u64,
    /// Ranks go through the slots in different orders.
    permuted: bool,
    steps: Vec<Step>,
}

/// One dispatch, and the combine that may follow: what all ranks share.
struct Step {
    seed: u64,
    slot: usize,
    routing: usize,
    kind: Kind,
    recorded: &'static str,
    topk: usize,
    with_ids: bool,
    with_weights: bool,
    /// T of each rank.
    tokens: Vec<usize>,
    /// As the call gives it; 0 = the configured maximum.
    bound: usize,
    token_type: usize,
    row_bytes: usize,
    /// Row bytes; 0 = absent.
    scales: usize,
    extras: [usize; 8],
    values: Values,
    /// Index into FLOATS of the results' type; `None`: nothing is combined.
    combine: Option<usize>,
}

/// What a rank may choose for itself.
struct Choice {
    split_dispatch: bool,
    split_combine: bool,
    wide_ids: bool,
    strided: bool,
    null_when_empty: bool,
    rank_tokens: bool,
    uniform: bool,
    host_counts: bool,
    zero_padding: bool,
    stats: bool,
    /// Whether each output is a view, the caller's, the caller's with gaps, or not wanted.
    outputs: [Place; 16],
    wide_ids_out: bool,
    flat_rows: bool,
    zero_copy: bool,
    accumulate: bool,
    /// The thread flushes subnormals and rounds toward zero while it calls combine.
    odd_modes: bool,
    /// Index into FLOATS.
    out_type: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    View,
    Own,
    Strided,
    Unwanted,
}

/// The seed of all cells.
fn seed() -> u64 {
    std::env::var("A2A_TEST_SEED").map_or(1, |seed| seed.parse().expect("A2A_TEST_SEED is a number"))
}

impl Cell {
    fn new(backend: Backend, world: usize, index: usize) -> Cell {
        let mut rng = Rng::new(&[seed(), backend as u64, world as u64, index as u64]);
        // Tall: many short rows. Wide: few long ones. Recorded routings need their own number of experts.
        let (max_tokens, max_row) = [(1003, 2048), (128, 14336), (1000, 5760)][(index + world) % 3];
        let experts =
            [256, 2 * world + 1, world.div_ceil(2), 64, 128, 8][(index + world + backend as usize) % 6];
        let table = (index + backend as usize) % 2 == 1;
        let owner = if table {
            (0..experts).map(|_| rng.below(world)).collect()
        } else {
            oracle::contiguous(experts, world)
        };
        let token_type = (index + world) % TOKEN_TYPES.len();
        let mut cell = Cell {
            backend,
            world,
            owner,
            table,
            slots: 1 + (index + world) % 3,
            // Fewer experts a token than ranks leave less room for its targets.
            max_topk: [32, 8, 32, 2][(index + world) % 4],
            combine_hidden: [0, 0, 0, 80, 0][(index + world) % 5],
            max_tokens,
            max_row,
            token_type,
            // The default must suffice for 8-bit tokens of the full size: bf16.
            combine_type: rng.pick(&[A2A_DTYPE_DEFAULT, A2A_DTYPE_F32]),
            max_scale_bytes: 448,
            rounds: Vec::new(),
        };
        cell.deal_rounds(&mut rng);
        cell
    }

    fn deal_rounds(&mut self, rng: &mut Rng) {
        let recordings = self.recordings();
        let kinds = KINDS.into_iter().filter(|kind| *kind != Kind::Recorded || !recordings.is_empty());
        let mut kinds = Deck::new(&kinds.collect::<Vec<_>>());
        let mut recordings = Deck::new(&recordings);
        let mut topks = Deck::new(&TOPKS.into_iter().filter(|&k| k <= self.max_topk).collect::<Vec<_>>());
        let mut tokens = Deck::new(&TOKENS.into_iter().filter(|&t| t <= self.max_tokens).collect::<Vec<_>>());
        let mut types = Deck::new(&[0, 1, 2, 3, 4]);
        let mut floats = Deck::new(&[0, 1, 2]);
        let mut rows = Deck::new(&[16, 32, 48, 112, 272, 1024, 2048, 5760, 14336]);
        let mut bounds = Deck::new(&["exact", "loose", "default"]);
        let mut values = Deck::new(&[Values::Spread, Values::Spread, Values::Tiny, Values::Any]);
        let mut shapes = Deck::new(&["alone", "alone", "dispatch_only", "flight", "flight"]);
        let mut permuted = Deck::new(&[true, false]);
        // A dispatch that follows a dispatch waits for its peers even in SEND, so such slots keep one order.
        let mut idle = vec![true; self.slots];
        for _ in 0..24 {
            let shape = shapes.deal(rng);
            let mut slots: Vec<usize> = (0..self.slots).collect();
            rng.shuffle(&mut slots);
            slots.truncate(if shape == "flight" { self.slots } else { 1 });
            let permuted = slots.len() > 1 && slots.iter().all(|&slot| idle[slot]) && permuted.deal(rng);
            let mut steps = Vec::new();
            for slot in slots {
                let (kind, wanted) = (kinds.deal(rng), tokens.deal(rng));
                let mut counts = vec![wanted; self.world];
                match kind {
                    Kind::AllEmpty => counts.fill(0),
                    Kind::EmptyRank => counts[rng.below(self.world)] = 0,
                    Kind::Ragged => counts.iter_mut().for_each(|count| *count = rng.below(wanted + 1)),
                    _ => {}
                }
                let most = counts.iter().copied().max().unwrap_or(0);
                let bound = match bounds.deal(rng) {
                    "exact" => most.max(1),
                    "loose" => (most + 1 + rng.below(40)).min(self.max_tokens),
                    _ => 0,
                };
                let (recorded, topk) =
                    if kind == Kind::Recorded { recordings.deal(rng) } else { ("", topks.deal(rng)) };
                // Naive sums are slow: rows are as long as the number of tokens leaves time for.
                let total = counts.iter().sum::<usize>().max(1);
                let capacity = self.world * if bound == 0 { self.max_tokens } else { bound };
                let longest = (1_000_000 / total).min(8_000_000 / capacity).min(self.max_row).max(16);
                let row_bytes = rows.deal(rng).min(longest / 16 * 16);
                let token_type = types.deal(rng);
                let hidden = row_bytes / self.bytes_of(token_type);
                let results = if self.combine_hidden == 0 { hidden } else { self.combine_hidden };
                let mut float = floats.deal(rng);
                let fits = |float: usize| {
                    let bytes = results * FLOATS[float].1.bytes();
                    bytes.is_multiple_of(16) && bytes <= self.max_combine_bytes()
                };
                for _ in 0..FLOATS.len() {
                    if !fits(float) {
                        float = (float + 1) % FLOATS.len();
                    }
                }
                let combine = (shape != "dispatch_only" && fits(float)).then_some(float);
                let is_f8 = TOKEN_TYPES[token_type].0 == "f8";
                let scales = if is_f8 {
                    rng.pick(&[hidden.div_ceil(128) * 4, 4, 92, 3])
                } else {
                    rng.pick(&[0, 0, 12])
                };
                idle[slot] = combine.is_some();
                let with_ids = self.backend == Backend::OneSided || kind == Kind::Recorded || !rng.one_in(5);
                steps.push(Step {
                    seed: rng.next(),
                    slot,
                    routing: rng.below(ROUTINGS_PER_SLOT),
                    kind,
                    recorded,
                    topk,
                    with_ids,
                    with_weights: with_ids && !rng.one_in(4),
                    tokens: counts,
                    bound,
                    token_type,
                    row_bytes,
                    scales: scales.min(self.max_scale_bytes),
                    extras: EXTRAS.map(|bytes| if rng.one_in(3) { bytes } else { 0 }),
                    values: values.deal(rng),
                    combine,
                });
            }
            self.rounds.push(Round { seed: rng.next(), permuted, steps });
        }
    }

    /// The recordings whose experts this cell has, and their top-k.
    fn recordings(&self) -> Vec<(&'static str, usize)> {
        let shapes = [(8, 2), (128, 8), (256, 8), (64, 8), (64, 8)];
        let fits = |(experts, topk)| experts == self.owner.len() && topk <= self.max_topk;
        let fitting = RECORDED.into_iter().zip(shapes).filter(|(_, shape)| fits(*shape));
        fitting.map(|(name, (_, topk))| (name, topk)).collect()
    }

    fn bytes_of(&self, token_type: usize) -> usize {
        TOKEN_TYPES[token_type].2.bits as usize / 8
    }
    fn max_hidden(&self) -> usize {
        self.max_row / self.bytes_of(self.token_type)
    }
    fn max_combine_bytes(&self) -> usize {
        // The default is the tokens' type if combine can sum it, else bf16.
        let four = self.combine_type == A2A_DTYPE_F32 || TOKEN_TYPES[self.token_type].0 == "f32";
        let hidden = if self.combine_hidden == 0 { self.max_hidden() } else { self.combine_hidden };
        hidden * if four { 4 } else { 2 }
    }
    /// Elements of a step's results.
    fn result_hidden(&self, step: &Step) -> usize {
        if self.combine_hidden == 0 {
            step.row_bytes / self.bytes_of(step.token_type)
        } else {
            self.combine_hidden
        }
    }
    fn bound(&self, step: &Step) -> usize {
        if step.bound == 0 { self.max_tokens } else { step.bound }
    }

    fn choice(&self, round: &Round, step: &Step, rank: usize) -> Choice {
        // What concerns the order of calls is one choice per round, the rest is per step.
        let mut order = Rng::new(&[round.seed, rank as u64]);
        let mut rng = Rng::new(&[step.seed, rank as u64, 1]);
        let hidden = self.result_hidden(step);
        let out_types: Vec<usize> = (0..FLOATS.len())
            .filter(|&float| (hidden * FLOATS[float].1.bytes()).is_multiple_of(16))
            .collect();
        let equal = step.tokens.iter().all(|&count| count == step.tokens[0]);
        Choice {
            split_dispatch: order.one_in(2) || round.permuted,
            split_combine: order.one_in(2) || round.permuted,
            wide_ids: rng.one_in(2),
            strided: rng.one_in(3),
            null_when_empty: rng.one_in(2),
            rank_tokens: rng.one_in(4),
            uniform: equal && rng.one_in(3),
            host_counts: rng.one_in(4),
            zero_padding: rng.one_in(4),
            stats: rng.one_in(3),
            outputs: std::array::from_fn(|_| {
                rng.pick(&[
                    Place::View,
                    Place::View,
                    Place::View,
                    Place::Own,
                    Place::Strided,
                    Place::Unwanted,
                ])
            }),
            wide_ids_out: rng.one_in(2),
            flat_rows: rng.one_in(2),
            zero_copy: rng.one_in(2),
            accumulate: rng.one_in(2),
            odd_modes: rng.one_in(2),
            out_type: rng.pick(&out_types),
        }
    }

    /// What every rank puts in.
    fn inputs(&self, round: &Round, step: &Step) -> oracle::Step {
        let ranks = (0..self.world)
            .map(|rank| {
                let mut rng = Rng::new(&[step.seed, rank as u64]);
                let tokens = step.tokens[rank];
                let mut rows = |row_bytes: usize| Rows { row_bytes, bytes: rng.bytes(tokens * row_bytes) };
                let (row_data, scales) = (rows(step.row_bytes), (step.scales > 0).then(|| rows(step.scales)));
                let extras = step.extras.map(|bytes| (bytes > 0).then(|| rows(bytes)));
                let wide = self.choice(round, step, rank).wide_ids;
                let (ids, mut weights) = self.ids(step, rank, wide);
                if step.recorded.is_empty() {
                    // Weights travel as they are, whatever their bits mean.
                    weights = (0..tokens * step.topk).map(|_| rng.next() as u32).collect();
                }
                Input {
                    tokens,
                    ids: step.with_ids.then_some(ids),
                    weights: step.with_weights.then_some(weights),
                    rows: row_data,
                    scales,
                    extras,
                }
            })
            .collect();
        oracle::Step { owner: self.owner.clone(), bound: self.bound(step), topk: step.topk, ranks }
    }

    /// The ids a rank gives, and, if recorded, its weights.
    fn ids(&self, step: &Step, rank: usize, wide: bool) -> (Vec<i64>, Vec<u32>) {
        let (experts, topk, tokens) = (self.owner.len(), step.topk, step.tokens[rank]);
        let mut rng = Rng::new(&[step.seed, rank as u64, 2]);
        if step.kind == Kind::Recorded {
            let recorded = Recorded::load(step.recorded);
            assert_eq!((recorded.experts, recorded.topk), (experts, topk), "{}", step.recorded);
            let from = |t: usize| (rank * tokens + t) % recorded.tokens * topk;
            return (
                (0..tokens).flat_map(|t| recorded.ids[from(t)..][..topk].to_vec()).collect(),
                (0..tokens).flat_map(|t| recorded.weights[from(t)..][..topk].to_vec()).collect(),
            );
        }
        let chosen_rank = self.owner[Rng::new(&[step.seed]).below(experts)];
        let favourites = oracle::local_experts(&self.owner, chosen_rank);
        let mut all: Vec<usize> = (0..experts).collect();
        let mut ids = Vec::with_capacity(tokens * topk);
        for token in 0..tokens {
            let mut distinct = |rng: &mut Rng| -> Vec<i64> {
                for at in 0..topk.min(experts) {
                    let other = at + rng.below(experts - at);
                    all.swap(at, other);
                }
                all.iter().take(topk).map(|&expert| expert as i64).collect()
            };
            let mut row: Vec<i64> = match step.kind {
                Kind::Even => (0..topk.min(experts))
                    .map(|k| ((rank * tokens + token) * topk + k) % experts)
                    .map(|e| e as i64)
                    .collect(),
                Kind::Zipf => {
                    // Inverse of a 1/x density: half of the draws fall on the first sqrt(E) experts.
                    let mut row = Vec::new();
                    for _ in 0..4 * topk {
                        let u = (rng.next() >> 11) as f64 / (1u64 << 53) as f64;
                        let id = ((experts as f64 + 1.0).powf(u) - 1.0) as i64;
                        if row.len() < topk && !row.contains(&id) {
                            row.push(id);
                        }
                    }
                    row
                }
                Kind::AllToOne => favourites.iter().take(topk).map(|&expert| expert as i64).collect(),
                Kind::Nones if rng.one_in(4) => Vec::new(),
                Kind::Nones => {
                    distinct(&mut rng).into_iter().map(|id| if rng.one_in(3) { -1 } else { id }).collect()
                }
                Kind::Duplicates => {
                    let few = rng.pick(&[1, 2, 3]).min(experts);
                    (0..topk).map(|_| rng.below(few) as i64).collect()
                }
                Kind::BadIds => {
                    let n = experts as i64;
                    let bad = [n, n + 1, -2, i64::from(i32::MIN), i64::from(i32::MAX)];
                    // Good ids, or -1, to whoever looks at 32 bits only.
                    let bad_if_wide = [1 << 32, (1 << 32) + n - 1, i64::MIN, -1 - (1 << 32)];
                    let bad = if wide { [&bad[..], &bad_if_wide].concat() } else { bad.to_vec() };
                    distinct(&mut rng)
                        .into_iter()
                        .map(|id| if rng.one_in(4) { rng.pick(&bad) } else { id })
                        .collect()
                }
                _ => distinct(&mut rng),
            };
            row.resize(topk, -1);
            ids.extend(row);
        }
        (ids, Vec::new())
    }

    /// The names of all that a cell tries, for the coverage test.
    fn features(&self) -> BTreeSet<String> {
        let mut found = BTreeSet::new();
        let mut add = |feature: String| {
            found.insert(feature);
        };
        add(format!("world {}", self.world));
        add(format!("placement {}", if self.table { "table" } else { "contiguous" }));
        if !self.owner.len().is_multiple_of(self.world) {
            add("uneven experts".into());
        }
        if (0..self.world).any(|rank| !self.owner.contains(&rank)) {
            add("a rank without experts".into());
        }
        add(format!("max_topk {}", self.max_topk));
        add(format!("results of their own size {}", self.combine_hidden > 0));
        let mut given_up = vec![0; self.slots];
        for round in &self.rounds {
            if round.steps.len() > 1 {
                add(format!(
                    "slots in flight, {}",
                    if round.permuted { "each rank its own order" } else { "one order" }
                ));
            }
            for step in &round.steps {
                add(format!("dispatches given up before {}", given_up[step.slot]));
                given_up[step.slot] = if step.combine.is_some() { 0 } else { given_up[step.slot] + 1 };
                add(format!("world {} {:?}", self.world, step.kind));
                add(format!("topk {}", step.topk));
                add(format!("tokens {}", step.tokens[0]));
                add(format!("row bytes {}", step.row_bytes));
                add(format!("token type {}", TOKEN_TYPES[step.token_type].0));
                add(format!("results {:?}", step.values));
                add(format!("combine {}", step.combine.map_or("none", |float| FLOATS[float].0)));
                add(format!("ids {}", step.with_ids));
                add(format!("weights {}", step.with_weights));
                add(format!("scales {}", step.scales > 0));
                add(format!("bound {}", step.bound > 0 && step.bound < self.max_tokens));
                add(format!("routing {}", step.routing));
                if step.kind == Kind::Recorded {
                    add(format!("recorded {}", step.recorded));
                }
                for (index, bytes) in step.extras.iter().enumerate().filter(|(_, bytes)| **bytes > 0) {
                    add(format!("extra {index} of {bytes} bytes"));
                }
                for rank in 0..self.world {
                    let choice = self.choice(round, step, rank);
                    add(format!("split dispatch {}", choice.split_dispatch));
                    add(format!("wide ids {}", choice.wide_ids));
                    add(format!("strided input {}", choice.strided));
                    add(format!("rank_tokens {}", choice.rank_tokens));
                    add(format!("uniform {}", choice.uniform));
                    add(format!("host counts {}", choice.host_counts));
                    add(format!("zero padding {}", choice.zero_padding));
                    add(format!("expert_stats {}", choice.stats));
                    add(format!("flat rows {}", choice.flat_rows));
                    add(format!("wide ids out {}", choice.wide_ids_out));
                    for (output, place) in choice.outputs.iter().enumerate() {
                        add(format!("output {output} {place:?}"));
                    }
                    if let Some(from) = step.combine {
                        add(format!("split combine {}", choice.split_combine));
                        add(format!("zero copy {}", choice.zero_copy));
                        add(format!("accumulate {}", choice.accumulate));
                        add(format!("odd modes {}", choice.odd_modes));
                        add(format!("combine {} to {}", FLOATS[from].0, FLOATS[choice.out_type].0));
                    }
                }
            }
        }
        found
    }
}

// ---------------------------------------------------------------------------------------- one rank

/// A step under way on one rank.
struct Live<'a> {
    cell: &'a Cell,
    step: &'a Step,
    rank: usize,
    choice: Choice,
    routing: &'a Routing,
    /// Of all ranks.
    inputs: oracle::Step,
    input: DispatchIn,
    output: DispatchOut,
    /// As the views show it.
    expected: Received,
    /// As the caller's own tensors hold it: under HOST_COUNTS alone they are sized before anybody knows the counts.
    expected_own: Received,
    /// What expert_stats held before.
    stats: Vec<i64>,
    results: Option<Tensor>,
    sums: CombineOut,
    /// What the sums' tensor held before, if it is added to.
    before: Option<Vec<u8>>,
}

/// The outputs of a dispatch, in the order of `Choice::outputs`; extras follow.
const OUT_TOKENS: usize = 0;
const OUT_SCALES: usize = 1;
const OUT_IDS: usize = 2;
const OUT_WEIGHTS: usize = 3;
const OUT_EXPERT_COUNTS: usize = 4;
const OUT_RANK_COUNTS: usize = 5;
const OUT_SOURCE: usize = 6;
const OUT_STATUS: usize = 7;
const OUT_EXTRA: usize = 8;

impl<'a> Live<'a> {
    fn new(cell: &'a Cell, round: &Round, step: &'a Step, rank: usize, routing: &'a Routing) -> Live<'a> {
        let (choice, inputs) = (cell.choice(round, step, rank), cell.inputs(round, step));
        let mine = &inputs.ranks[rank];
        let tokens = mine.tokens;
        let make = |dtype: Dtype, columns: usize, bytes: &[u8]| {
            let shape = [tokens, columns];
            let mut tensor = if choice.strided {
                Tensor::strided(dtype, &shape, 3 * pad(dtype, columns), pad(dtype, columns))
            } else {
                Tensor::new(dtype, &shape)
            };
            tensor.write(bytes);
            if tokens == 0 && choice.null_when_empty {
                tensor.raw_mut().data = std::ptr::null_mut();
                tensor.raw_mut().byte_offset = 0;
            }
            tensor
        };
        let words = |bits: &[u32]| -> Vec<u8> { bits.iter().flat_map(|word| word.to_le_bytes()).collect() };
        let ids = mine.ids.as_ref().map(|ids| {
            if choice.wide_ids {
                make(I64, step.topk, &ids.iter().flat_map(|id| id.to_le_bytes()).collect::<Vec<_>>())
            } else {
                make(
                    I32,
                    step.topk,
                    &ids.iter().flat_map(|id| (*id as i32).to_le_bytes()).collect::<Vec<_>>(),
                )
            }
        });
        let side = |rows: &Rows| {
            let (dtype, columns) = side_shape(rows.row_bytes);
            match columns {
                // One element per token may come as a vector.
                1 if !choice.strided => Tensor::of(dtype, &[tokens], &rows.bytes),
                _ => make(dtype, columns, &rows.bytes),
            }
        };
        let flag = |set: bool, bit: u64| if set { bit } else { 0 };
        let input = DispatchIn {
            tokens: Some(make(
                TOKEN_TYPES[step.token_type].2,
                step.row_bytes / cell.bytes_of(step.token_type),
                &mine.rows.bytes,
            )),
            topk_ids: ids,
            topk_weights: mine.weights.as_ref().map(|weights| make(F32, step.topk, &words(weights))),
            scales: mine.scales.as_ref().map(side),
            extras: std::array::from_fn(|i| mine.extras[i].as_ref().map(side)),
            rank_tokens: choice.rank_tokens.then(|| step.tokens.iter().map(|&count| count as i32).collect()),
            max_tokens: step.bound as i32,
            flags: flag(choice.uniform, A2A_DISPATCH_UNIFORM)
                | flag(choice.host_counts, A2A_DISPATCH_HOST_COUNTS)
                | flag(choice.zero_padding, A2A_DISPATCH_ZERO_PADDING),
        };
        let (layout, told) = (cell.backend.layout(), choice.rank_tokens || choice.uniform);

        let mut live = Live {
            expected: inputs.dispatch(layout, rank, told || choice.host_counts),
            expected_own: inputs.dispatch(layout, rank, told),
            cell,
            step,
            rank,
            choice,
            routing,
            inputs,
            input,
            output: DispatchOut::default(),
            stats: Vec::new(),
            results: None,
            sums: CombineOut::default(),
            before: None,
        };
        live.prepare_outputs();
        live
    }

    /// What an output of rows must hold.
    fn expected(&self, tensor: &Tensor) -> &Received {
        if tensor.is_view() { &self.expected } else { &self.expected_own }
    }

    /// [rows] as the layout shapes it.
    fn row_shape(&self) -> Vec<usize> {
        match self.cell.backend.layout() {
            Layout::RankMajor => vec![self.cell.world, self.cell.bound(self.step)],
            Layout::Gathered => vec![self.expected.rows.len()],
        }
    }

    fn prepare_outputs(&mut self) {
        let own = self.expected_own.rows.len();
        let rows = if self.choice.flat_rows || self.cell.backend == Backend::Gather {
            vec![own]
        } else {
            self.row_shape()
        };
        let places = self.choice.outputs;
        let make = |output: usize, dtype: Dtype, rows: &[usize], columns: &[usize]| {
            let shape = [rows, columns].concat();
            match places[output] {
                Place::Unwanted => None,
                Place::View => Some(Tensor::view()),
                Place::Strided if !columns.is_empty() => {
                    Some(Tensor::strided(dtype, &shape, 2 * pad(dtype, columns[0]), pad(dtype, columns[0])))
                }
                Place::Own | Place::Strided => Some(Tensor::new(dtype, &shape)),
            }
        };
        let side = |output: usize, input: &Option<Tensor>| {
            let input = input.as_ref()?;
            make(output, input.dtype(), &rows, &input.shape()[1..])
        };
        let local = self.expected.expert_counts.len();
        // Without ids there are none to receive, no weights and no counts of experts.
        let ids = self.step.with_ids;
        self.output = DispatchOut {
            tokens: side(OUT_TOKENS, &self.input.tokens),
            scales: side(OUT_SCALES, &self.input.scales),
            topk_ids: if ids {
                make(OUT_IDS, if self.choice.wide_ids_out { I64 } else { I32 }, &rows, &[self.step.topk])
            } else {
                None
            },
            topk_weights: if ids { make(OUT_WEIGHTS, F32, &rows, &[self.step.topk]) } else { None },
            extras: std::array::from_fn(|i| side(OUT_EXTRA + i, &self.input.extras[i])),
            expert_counts: if ids { make(OUT_EXPERT_COUNTS, I32, &[local], &[]) } else { None },
            rank_counts: make(OUT_RANK_COUNTS, I32, &[self.cell.world], &[]),
            row_source: make(OUT_SOURCE, I32, &rows, &[2]),
            expert_stats: None,
            status: make(OUT_STATUS, I32, &[4 + self.cell.world], &[]),
            num_rows: 0,
        };
        if self.choice.stats && ids {
            let mut rng = Rng::new(&[self.step.seed, self.rank as u64, 3]);
            self.stats = (0..local).map(|_| rng.next() as i64 >> 8).collect();
            let bytes: Vec<u8> = self.stats.iter().flat_map(|n| n.to_le_bytes()).collect();
            self.output.expert_stats = Some(Tensor::of(I64, &[local], &bytes));
        }
    }

    fn dispatch(&mut self, comm: &Comm, phase: a2a_phase_t) -> Result<(), String> {
        comm.dispatch(self.routing, phase, &self.input, &mut self.output)
            .map_err(|failure| self.what(failure))?;
        if phase != A2A_PHASE_SEND { self.check_received() } else { Ok(()) }
    }

    fn check_received(&self) -> Result<(), String> {
        let output = &self.output;
        let received = if self.choice.host_counts { self.expected.num_rows as i64 } else { -1 };
        if output.num_rows != received {
            return Err(self.what(format!("num_rows is {}, expected {received}", output.num_rows)));
        }
        self.check_rows("tokens", &self.input.tokens, &output.tokens, |input| Some(&input.rows))?;
        self.check_rows("scales", &self.input.scales, &output.scales, |input| input.scales.as_ref())?;
        for (i, (given, got)) in self.input.extras.iter().zip(&output.extras).enumerate() {
            self.check_rows(&format!("extras[{i}]"), given, got, |input| input.extras[i].as_ref())?;
        }
        let expected = &self.expected;
        let rows = self.row_shape();
        let with = |columns: usize| [&rows[..], &[columns]].concat();
        if let Some(ids) = &output.topk_ids {
            let wide = self.choice.wide_ids_out && !ids.is_view();
            let got = if wide { ids.read_i64() } else { ids.read_i32().into_iter().map(i64::from).collect() };
            let want: Vec<i64> = self.expected(ids).ids.iter().map(|&id| i64::from(id)).collect();
            self.check_list("topk_ids", ids, &with(self.step.topk), &got, &want)?;
        }
        if let Some(weights) = &output.topk_weights {
            let got: Vec<u32> = weights.read().chunks_exact(4).map(|w| Float::F32.load(w, 0)).collect();
            self.check_list(
                "topk_weights (bits)",
                weights,
                &with(self.step.topk),
                &got,
                &self.expected(weights).weights,
            )?;
        }
        let source = output.row_source.as_ref().map_or(expected, |tensor| self.expected(tensor));
        let ints = [
            ("row_source", &output.row_source, with(2), &source.row_source),
            (
                "expert_counts",
                &output.expert_counts,
                vec![expected.expert_counts.len()],
                &expected.expert_counts,
            ),
            ("rank_counts", &output.rank_counts, vec![self.cell.world], &expected.rank_counts),
            ("status", &output.status, vec![4 + self.cell.world], &expected.status),
        ];
        for (name, tensor, shape, want) in ints {
            if let Some(tensor) = tensor {
                self.check_list(name, tensor, &shape, &tensor.read_i32(), want)?;
            }
        }
        if let Some(stats) = &output.expert_stats {
            let added = self
                .stats
                .iter()
                .zip(&expected.expert_counts)
                .map(|(a, b)| a + i64::from(*b))
                .collect::<Vec<_>>();
            self.check_list("expert_stats", stats, &[added.len()], &stats.read_i64(), &added)?;
        }
        Ok(())
    }

    /// Compares rows that travelled as bytes; what lies past the counts only if zeros were asked for.
    fn check_rows(
        &self,
        name: &str,
        given: &Option<Tensor>,
        received: &Option<Tensor>,
        of: impl Fn(&Input) -> Option<&Rows>,
    ) -> Result<(), String> {
        let (Some(given), Some(tensor)) = (given, received) else { return Ok(()) };
        let row_bytes = of(&self.inputs.ranks[self.rank]).expect("given").row_bytes;
        let element = given.dtype().bits as usize / 8;
        // A row of one element keeps the shape it came with: [T] arrives as [rows], [T, 1] as [rows, 1].
        let shape = [&self.row_shape()[..], &given.shape()[1..]].concat();
        self.check_shape(name, tensor, given.dtype(), &shape)?;
        let got = tensor.read();
        let zeros = vec![0; row_bytes];
        for (row, source) in self.expected(tensor).rows.iter().enumerate() {
            let want = match source {
                Some(source) => {
                    of(&self.inputs.ranks[source.rank]).expect("all ranks or none").row(source.token)
                }
                None if self.choice.zero_padding => &zeros,
                None => continue,
            };
            let got = &got[row * row_bytes..][..row_bytes];
            if got != want {
                let byte = (0..row_bytes).find(|&byte| got[byte] != want[byte]).expect("they differ");
                let from = byte / element * element;
                return Err(self.what(format!(
                    "{name}: row {row} ({source:?}) column {}: got {:02x?}, expected {:02x?}",
                    byte / element,
                    &got[from..from + element],
                    &want[from..from + element]
                )));
            }
        }
        Ok(())
    }

    fn check_list<T: PartialEq + std::fmt::Debug>(
        &self,
        name: &str,
        tensor: &Tensor,
        shape: &[usize],
        got: &[T],
        want: &[T],
    ) -> Result<(), String> {
        self.check_shape(name, tensor, tensor.dtype(), shape)?;
        let columns = if shape.len() > 1 { shape[shape.len() - 1] } else { 1 };
        match (0..want.len()).find(|&at| got.get(at) != Some(&want[at])) {
            None => Ok(()),
            Some(at) => Err(self.what(format!(
                "{name}: row {} column {}: got {:?}, expected {:?}",
                at / columns,
                at % columns,
                got.get(at),
                want[at]
            ))),
        }
    }

    /// A view must say what was asked for; a tensor of ours must not be touched between its rows.
    fn check_shape(&self, name: &str, tensor: &Tensor, dtype: Dtype, shape: &[usize]) -> Result<(), String> {
        let kind = |dtype: Dtype| (dtype.code, dtype.bits, dtype.lanes);
        if tensor.is_view() && (tensor.shape() != shape || kind(tensor.dtype()) != kind(dtype)) {
            let (shape_is, kind_is) = (tensor.shape(), kind(tensor.dtype()));
            return Err(self.what(format!(
                "{name}: the view is {shape_is:?} of {kind_is:?}, expected {shape:?} of {:?}",
                kind(dtype)
            )));
        }
        if !tensor.gaps_are_intact() {
            return Err(self.what(format!("{name}: bytes between the caller's rows were written")));
        }
        Ok(())
    }

    /// Computes what the experts would: rank r's results for the rows it received.
    fn compute(&mut self, comm: &Comm, from: usize) -> Result<(), String> {
        let (_, float, dtype) = FLOATS[from];
        let hidden = self.cell.result_hidden(self.step);
        let shape = [&self.row_shape()[..], &[hidden]].concat();
        let mut tensor = if self.choice.zero_copy {
            let tensor = comm.combine_buffer(self.routing, dtype).map_err(|failure| self.what(failure))?;
            self.check_shape("combine buffer", &tensor, dtype, &shape)?;
            tensor
        } else if self.choice.strided {
            Tensor::strided(dtype, &shape, 32, 16)
        } else {
            Tensor::new(dtype, &shape)
        };
        // Rows past the counts are NaN: they must not find their way into a sum.
        let row_bytes = hidden * float.bytes();
        let mut bytes = vec![0xff; self.expected.rows.len() * row_bytes];
        for (row, source) in self.expected.rows.iter().enumerate() {
            if let Some(source) = source {
                bytes[row * row_bytes..][..row_bytes]
                    .copy_from_slice(&self.step.result(self.rank, *source, float, hidden));
            }
        }
        tensor.write(&bytes);
        // The experts read the views while they write.
        self.check_received()?;
        self.results = Some(tensor);

        let (_, to, to_dtype) = FLOATS[self.choice.out_type];
        let tokens = self.step.tokens[self.rank];
        let shape = [tokens, hidden];
        let mut sums = if self.choice.strided {
            Tensor::strided(to_dtype, &shape, 48, 32)
        } else {
            Tensor::new(to_dtype, &shape)
        };
        if tokens == 0 && self.choice.null_when_empty {
            sums.raw_mut().data = std::ptr::null_mut();
            sums.raw_mut().byte_offset = 0;
        }
        if self.choice.accumulate {
            let nobody = Source { rank: self.cell.world, token: self.rank };
            let before = self.step.result(self.rank, nobody, to, tokens * hidden);
            sums.write(&before);
            self.before = Some(before);
        }
        self.sums.tokens = Some(sums);
        self.sums.status = match self.choice.outputs[OUT_STATUS] {
            Place::Unwanted => None,
            Place::View => Some(Tensor::view()),
            Place::Own | Place::Strided => Some(Tensor::new(I32, &[4 + self.cell.world])),
        };
        Ok(())
    }

    fn combine(&mut self, comm: &Comm, phase: a2a_phase_t) -> Result<(), String> {
        let flags = if self.choice.accumulate { A2A_COMBINE_ACCUMULATE } else { 0 };
        let rows = if phase == A2A_PHASE_RECV { None } else { self.results.as_ref() };
        let mut call = || comm.combine(self.routing, phase, flags, rows, &mut self.sums);
        let (result, changed) =
            if self.choice.odd_modes { in_odd_float_modes(call) } else { (call(), false) };
        result.map_err(|failure| self.what(failure))?;
        if changed {
            return Err(self.what("combine changed the thread's floating-point modes"));
        }
        if phase != A2A_PHASE_SEND { self.check_sums() } else { Ok(()) }
    }

    fn check_sums(&self) -> Result<(), String> {
        let (from, to) = (FLOATS[self.step.combine.expect("combined")].1, FLOATS[self.choice.out_type].1);
        let hidden = self.cell.result_hidden(self.step);
        let result = |rank, token| self.step.result(rank, Source { rank: self.rank, token }, from, hidden);
        let want = self.inputs.combine(self.rank, hidden, (from, to), result, self.before.as_deref());
        let sums = self.sums.tokens.as_ref().expect("prepared");
        let got = sums.read();
        for at in 0..self.step.tokens[self.rank] * hidden {
            let (got, want) = (to.load(&got, at), to.load(&want, at));
            if got != want && !(to.is_nan(got) && to.is_nan(want)) {
                return Err(self.what(format!(
                    "combine {from:?} to {to:?}: token {} column {}: got {got:#x} ({:e}), expected {want:#x} ({:e}), sum of ranks {:?}",
                    at / hidden,
                    at % hidden,
                    to.widen(got),
                    to.widen(want),
                    self.inputs.contributors(Source { rank: self.rank, token: at / hidden }),
                )));
            }
        }
        if !sums.gaps_are_intact() {
            return Err(self.what("combine: bytes between the caller's rows were written"));
        }
        if let Some(status) = &self.sums.status {
            // Nothing to say of a combine that went well.
            let zeros = vec![0; 4 + self.cell.world];
            self.check_list("combine status", status, &[zeros.len()], &status.read_i32(), &zeros)?;
        }
        Ok(())
    }

    fn what(&self, problem: impl std::fmt::Display) -> String {
        describe(self.step, &self.choice, problem)
    }
}

/// A sentence that places a problem: the step, and what this rank chose.
fn describe(step: &Step, choice: &Choice, problem: impl std::fmt::Display) -> String {
    let Step { slot, routing, kind, recorded, topk, tokens, bound, row_bytes, .. } = step;
    let dtype = TOKEN_TYPES[step.token_type].0;
    let Choice { split_dispatch, split_combine, zero_copy, accumulate, outputs, .. } = choice;
    format!(
        "{kind:?} routing{recorded}, T {tokens:?}, K {topk}, M {bound} (0 = maximum), rows of {row_bytes} bytes \
         {dtype}: {problem}\n  slot {slot}, routing {routing}, split_dispatch {split_dispatch}, split_combine \
         {split_combine}, zero_copy {zero_copy}, accumulate {accumulate}, outputs {outputs:?}"
    )
}

/// A gap that keeps rows aligned: tokens move in vectors of 16 bytes, other rows need no more than their element.
fn pad(dtype: Dtype, columns: usize) -> usize {
    let element = dtype.bits as usize / 8;
    if (columns * element).is_multiple_of(16) { 16 } else { element }
}

/// Element type and columns of a side tensor's row.
fn side_shape(row_bytes: usize) -> (Dtype, usize) {
    match row_bytes {
        8 => (I64, 1),
        bytes if bytes % 4 == 0 => (F32, bytes / 4),
        bytes if bytes % 2 == 0 => (U16, bytes / 2),
        bytes => (U8, bytes),
    }
}

impl Step {
    /// Rank `rank`'s result for a token.
    fn result(&self, rank: usize, source: Source, float: Float, hidden: usize) -> Vec<u8> {
        let mut rng = Rng::new(&[self.seed, rank as u64, source.rank as u64, source.token as u64, 4]);
        let (exponent, mantissa, bias) = match float {
            Float::Bf16 => (8, 7, 127),
            Float::F16 => (5, 10, 15),
            Float::F32 => (8, 23, 127),
        };
        let mut row = Vec::with_capacity(hidden * float.bytes());
        for _ in 0..hidden {
            let word = rng.next();
            let any = word as u32;
            let spread = (word >> 32) as u32;
            let sign = any & 1 << (exponent + mantissa);
            let fraction = any & ((1 << mantissa) - 1);
            let bits = match self.values {
                Values::Spread => sign | (bias - 9 + spread % 19) << mantissa | fraction,
                Values::Tiny => sign | (spread % 3) << mantissa | fraction,
                Values::Any => any,
            };
            row.extend_from_slice(&bits.to_le_bytes()[..float.bytes()]);
        }
        row
    }
}

/// The job of one rank: a whole cell.
fn conform(seat: &Seat) -> Result<(), String> {
    let backend = BACKENDS.into_iter().find(|backend| backend.name() == seat.args[0]).expect("a backend");
    let cell = Cell::new(backend, seat.world, seat.args[1].parse().expect("an index"));
    let comm = cell.create(seat)?;
    let mut routings = Vec::new();
    for slot in 0..cell.slots {
        routings
            .push((0..ROUTINGS_PER_SLOT).map(|_| comm.routing(slot as i32)).collect::<Result<Vec<_>, _>>()?);
    }
    for (index, round) in cell.rounds.iter().enumerate() {
        run_round(&cell, round, seat.rank, &comm, &routings)
            .map_err(|error| format!("round {index}, {error}"))?;
    }
    comm.destroy()?;
    Ok(())
}

impl Cell {
    fn create(&self, seat: &Seat) -> Result<Comm, String> {
        let mut config = config(seat);
        let owner: Vec<i32> = self.owner.iter().map(|&rank| rank as i32).collect();
        config.backend = self.backend.code();
        config.num_experts = owner.len() as i32;
        if self.table {
            config.placement = A2A_PLACEMENT_TABLE;
            config.expert_owner = owner.as_ptr();
        }
        config.max_topk = self.max_topk as i32;
        config.max_hidden = self.max_hidden() as i32;
        config.max_tokens = self.max_tokens as i32;
        config.token_dtype = TOKEN_TYPES[self.token_type].1;
        config.combine_dtype = self.combine_type;
        config.combine_hidden = self.combine_hidden as i32;
        config.max_scale_bytes = self.max_scale_bytes as i32;
        config.extra_row_bytes = EXTRAS.map(|bytes| bytes as i32);
        config.num_slots = self.slots as i32;
        let need = query_memory(&config)?;
        let comm = Comm::create(&config)?;
        let info = comm.info()?;
        let local = oracle::local_experts(&self.owner, seat.rank);
        let layout = match self.backend.layout() {
            Layout::Gathered => A2A_LAYOUT_GATHERED,
            Layout::RankMajor => A2A_LAYOUT_RANK_MAJOR,
        };
        let got = (
            info.backend,
            info.layout,
            info.first_expert,
            info.num_local_experts,
            info.row_capacity,
            info.window_bytes,
        );
        let first = local.first().map_or(-1, |&expert| expert as i32);
        let capacity = (self.world * self.max_tokens) as i64;
        let want = (self.backend.code(), layout, first, local.len() as i32, capacity, need.window_bytes);
        if got != want {
            return Err(format!("a2a_get_info says {got:?}, expected {want:?}"));
        }
        Ok(comm)
    }
}

fn run_round(
    cell: &Cell,
    round: &Round,
    rank: usize,
    comm: &Comm,
    routings: &[Vec<Routing>],
) -> Result<(), String> {
    let mut steps: Vec<Live> = round
        .steps
        .iter()
        .map(|step| Live::new(cell, round, step, rank, &routings[step.slot][step.routing]))
        .collect();
    if round.permuted {
        steps.rotate_left(rank % round.steps.len());
    }
    let (split_dispatch, split_combine) = (steps[0].choice.split_dispatch, steps[0].choice.split_combine);
    if split_dispatch {
        for step in &mut steps {
            step.dispatch(comm, A2A_PHASE_SEND)?;
        }
        for step in steps.iter_mut().rev() {
            step.dispatch(comm, A2A_PHASE_RECV)?;
        }
    } else {
        for step in &mut steps {
            step.dispatch(comm, A2A_PHASE_BOTH)?;
        }
    }
    // What was dispatched first is combined last.
    steps.reverse();
    steps.retain(|step| step.step.combine.is_some());
    for step in &mut steps {
        step.compute(comm, step.step.combine.expect("retained"))?;
    }
    if split_combine {
        for step in &mut steps {
            step.combine(comm, A2A_PHASE_SEND)?;
        }
        for step in steps.iter_mut().rev() {
            step.combine(comm, A2A_PHASE_RECV)?;
        }
    } else {
        for step in &mut steps {
            step.combine(comm, A2A_PHASE_BOTH)?;
        }
    }
    Ok(())
}

// ------------------------------------------------------------------------------------------ the matrix

/// Where the ranks of a cell live.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    Threads,
    Processes,
    Mixed,
}

impl Mode {
    fn name(self) -> &'static str {
        match self {
            Mode::Threads => "threads",
            Mode::Processes => "processes",
            Mode::Mixed => "mixed",
        }
    }
    fn hosts(self, world: usize) -> Vec<Host> {
        match self {
            Mode::Threads => vec![Host::Here((0..world).collect())],
            Mode::Processes => (0..world).map(|rank| Host::Child(vec![rank])).collect(),
            // Two processes with several ranks each and one with a single one.
            Mode::Mixed => vec![
                Host::Child((0..world / 2).collect()),
                Host::Here((world / 2..world - 1).collect()),
                Host::Child(vec![world - 1]),
            ],
        }
    }
}

/// Every cell: where, what, how many ranks, which.
fn matrix() -> Vec<(Mode, Backend, usize, usize)> {
    let mut cells = Vec::new();
    for backend in BACKENDS {
        for world in WORLDS {
            cells.extend((0..4).map(|index| (Mode::Threads, backend, world, index)));
        }
        cells.extend([2, 3, 8].map(|world| (Mode::Processes, backend, world, 4)));
        cells.push((Mode::Mixed, backend, 4, 5));
    }
    cells
}

const CONFORM: (&str, Job) = ("conform", conform);
const MEASURE: (&str, Job) = ("measure", measure);

fn run_cell(mode: Mode, backend: Backend, world: usize, index: usize) -> Result<(), String> {
    let args = [backend.name().to_string(), index.to_string()];
    launch(CONFORM, world, &mode.hosts(world), &args, LIMIT)
        .map_err(|error| format!("A2A_TEST_SEED={}\n{error}", seed()))
}

/// The decks deal what they should: every value of every axis in the cells of each backend, every kind of routing in
/// every world.
fn everything_is_tried() -> Result<(), String> {
    for backend in BACKENDS {
        let mut found = BTreeSet::new();
        for (_, _, world, index) in matrix().into_iter().filter(|cell| cell.1 == backend) {
            found.extend(Cell::new(backend, world, index).features());
        }
        let mut wanted: Vec<String> = Vec::new();
        let mut want =
            |name: &str, values: &[&str]| wanted.extend(values.iter().map(|value| format!("{name} {value}")));
        want("topk", &TOPKS.map(|k| k.to_string()).each_ref().map(String::as_str));
        want("tokens", &TOKENS.map(|t| t.to_string()).each_ref().map(String::as_str));
        want("row bytes", &["16", "48", "5760", "14336"]);
        want("recorded", &RECORDED);
        want("token type", &TOKEN_TYPES.map(|(name, ..)| name));
        want("results", &["Spread", "Tiny", "Any"]);
        want("combine", &["none"]);
        want("placement", &["table", "contiguous"]);
        want("slots in flight,", &["one order", "each rank its own order"]);
        want("routing", &["0", "1"]);
        want("max_topk", &["2", "8", "32"]);
        want("dispatches given up before", &["0", "1", "2"]);
        for (from, ..) in FLOATS {
            want(&format!("combine {from} to"), &FLOATS.map(|(to, ..)| to));
        }
        let both = [
            "weights",
            "scales",
            "bound",
            "split dispatch",
            "split combine",
            "wide ids",
            "strided input",
            "rank_tokens",
            "uniform",
            "host counts",
            "zero padding",
            "expert_stats",
            "flat rows",
            "wide ids out",
            "zero copy",
            "accumulate",
            "odd modes",
            "results of their own size",
        ];
        for name in both {
            want(name, &["true", "false"]);
        }
        want("ids", if backend == Backend::Gather { &["true", "false"] } else { &["true"] });
        for output in 0..OUT_EXTRA + A2A_MAX_EXTRAS {
            want(&format!("output {output}"), &["View", "Own", "Strided", "Unwanted"]);
        }
        for (index, bytes) in EXTRAS.iter().enumerate() {
            want(&format!("extra {index} of"), &[&format!("{bytes} bytes")]);
        }
        for world in WORLDS {
            for kind in KINDS.into_iter().filter(|kind| *kind != Kind::Recorded) {
                want(&format!("world {world}"), &[&format!("{kind:?}")]);
            }
        }
        wanted.extend(["uneven experts".into(), "a rank without experts".into()]);
        let missing: Vec<_> = wanted.iter().filter(|feature| !found.contains(*feature)).collect();
        if !missing.is_empty() {
            return Err(format!("{}: no cell has {missing:?}", backend.name()));
        }
    }
    Ok(())
}

/// The oracle's conversions: every 16-bit value survives, and what lies between two goes to the nearer, ties to even.
fn the_oracle_rounds_right() -> Result<(), String> {
    for (float, largest) in [(Float::Bf16, 0x7f7f), (Float::F16, 0x7bff)] {
        for bits in (0..=0xffff).filter(|&bits| !float.is_nan(bits)) {
            let value = float.widen(bits);
            expect(format!("{float:?} {bits:#x}"), float.round(value), bits)?;
            expect(format!("f32 of {float:?} {bits:#x}"), Float::F32.round(value), value.to_bits())?;
        }
        for low in 0..largest {
            // The midpoint is exact in float32 for f16 and for bf16 alike; its neighbours are one unit away.
            let middle = float.widen(low) / 2.0 + float.widen(low + 1) / 2.0;
            expect(format!("below the middle of {float:?} {low:#x}"), float.round(middle.next_down()), low)?;
            expect(format!("the middle of {float:?} {low:#x}"), float.round(middle), low + low % 2)?;
            expect(
                format!("above the middle of {float:?} {low:#x}"),
                float.round(middle.next_up()),
                low + 1,
            )?;
        }
        expect(format!("past the largest {float:?}"), float.round(f32::MAX), largest + 1)?;
    }
    expect("one in bf16, f16", (Float::Bf16.round(1.0), Float::F16.round(1.0)), (0x3f80, 0x3c00))?;
    for bits in [0, 1, 0x007f_ffff, 0x0080_0000, 0x3f80_0001, 0x7f7f_ffff, 0x7f80_0000, 0x8000_0000] {
        expect(format!("f32 {bits:#x}"), Float::F32.round(Float::F32.widen(bits)), bits)?;
    }
    Ok(())
}

fn expect<T: PartialEq + std::fmt::Debug>(
    what: impl std::fmt::Display,
    got: T,
    want: T,
) -> Result<(), String> {
    if got == want { Ok(()) } else { Err(format!("{what}: got {got:x?}, expected {want:x?}")) }
}

// ------------------------------------------------------------------------- order, arguments, handles

const EXPERTS: usize = 6;
const HIDDEN: usize = 64;
const T: usize = 5;
const K: usize = 3;

/// A small group: K up to 4, 16 tokens of 128 bytes and as many results of 256, 16 bytes of scales, 8 of the first extra, two slots.
fn small(seat: &Seat, backend: Backend) -> a2a_config_t {
    let mut config = config(seat);
    config.backend = backend.code();
    config.num_experts = EXPERTS as i32;
    config.max_topk = 4;
    config.max_hidden = HIDDEN as i32;
    config.combine_dtype = A2A_DTYPE_F32;
    config.max_tokens = 16;
    config.max_scale_bytes = 16;
    config.extra_row_bytes[0] = 8;
    config.num_slots = 2;
    config.first_step_timeout_ms = 10_000;
    config.timeout_ms = 10_000;
    config
}

/// T tokens with the experts t, t+1, t+2 (mod E), scales and an extra.
fn small_input() -> DispatchIn {
    let ids: Vec<u8> =
        (0..T * K).flat_map(|at| (((at / K + at % K) % EXPERTS) as i32).to_le_bytes()).collect();
    let mut extras = [const { None }; A2A_MAX_EXTRAS];
    extras[0] = Some(Tensor::of(I64, &[T], &[9; T * 8]));
    DispatchIn {
        tokens: Some(Tensor::of(BF16, &[T, HIDDEN], &[7; T * HIDDEN * 2])),
        topk_ids: Some(Tensor::of(I32, &[T, K], &ids)),
        topk_weights: Some(Tensor::of(F32, &[T, K], &[0; T * K * 4])),
        scales: Some(Tensor::of(F32, &[T, 4], &[8; T * 16])),
        extras,
        ..Default::default()
    }
}

/// Everything as views.
fn small_output() -> DispatchOut {
    let mut extras = [const { None }; A2A_MAX_EXTRAS];
    extras[0] = Some(Tensor::view());
    let view = || Some(Tensor::view());
    DispatchOut {
        tokens: view(),
        scales: view(),
        topk_ids: view(),
        topk_weights: view(),
        extras,
        expert_counts: view(),
        rank_counts: view(),
        row_source: view(),
        expert_stats: None,
        status: view(),
        num_rows: 0,
    }
}

/// Every row of every rank is ones, so a token's sum counts the ranks that own its experts.
fn ones(comm: &Comm, routing: &Routing) -> Result<Tensor, String> {
    let mut tensor = comm.combine_buffer(routing, F32)?;
    let elements: usize = tensor.shape().iter().product();
    tensor.write(&1.0f32.to_le_bytes().repeat(elements));
    Ok(tensor)
}

fn small_sums() -> CombineOut {
    CombineOut { tokens: Some(Tensor::new(F32, &[T, HIDDEN])), status: Some(Tensor::view()) }
}

fn check_ones(seat: &Seat, sums: &CombineOut) -> Result<(), String> {
    let owner = oracle::contiguous(EXPERTS, seat.world);
    let got = sums.tokens.as_ref().expect("given").read();
    for at in 0..T * HIDDEN {
        let token = at / HIDDEN;
        let owners: BTreeSet<usize> = (0..K).map(|k| owner[(token + k) % EXPERTS]).collect();
        let sum = Float::F32.widen(Float::F32.load(&got, at));
        expect(format!("token {token} column {}", at % HIDDEN), sum, owners.len() as f32)?;
    }
    Ok(())
}

/// A whole step that must succeed.
fn small_step(seat: &Seat, comm: &Comm, routing: &Routing) -> Result<(), String> {
    comm.dispatch(routing, A2A_PHASE_BOTH, &small_input(), &mut small_output())?;
    let mut sums = small_sums();
    comm.combine(routing, A2A_PHASE_BOTH, 0, Some(&ones(comm, routing)?), &mut sums)?;
    check_ones(seat, &sums)
}

/// Only rank 0 acts, then only the others, and so on: each SEND returns while no peer is in a call, each RECV
/// completes while no peer's thread does anything.
fn nobody_needs_the_other_thread(backend: Backend) -> Result<(), String> {
    let turn = Arc::new(Turn::new(3));
    threads(3, LIMIT, move |seat| {
        let comm = Comm::create(&small(seat, backend))?;
        let routing = comm.routing(0)?;
        let (input, mut output, mut sums) = (small_input(), small_output(), small_sums());
        let mine = |turn: usize| turn.is_multiple_of(2) == (seat.rank == 0);
        turn.wait()?;
        for now in 0..6 {
            // Rank 0 has the even turns and is one call ahead of the others throughout.
            let call = now / 2;
            if mine(now) {
                match call {
                    0 => comm.dispatch(&routing, A2A_PHASE_SEND, &input, &mut output)?,
                    1 => {
                        comm.dispatch(&routing, A2A_PHASE_RECV, &input, &mut output)?;
                        comm.combine(&routing, A2A_PHASE_SEND, 0, Some(&ones(&comm, &routing)?), &mut sums)?;
                    }
                    _ => {
                        comm.combine(&routing, A2A_PHASE_RECV, 0, None, &mut sums)?;
                        check_ones(seat, &sums)?;
                    }
                }
            }
            turn.wait()?;
        }
        Ok(())
    })
}

/// A rank that destroys its comm after its last SEND is not missed.
fn leaving_after_the_last_flag(backend: Backend) -> Result<(), String> {
    let turn = Arc::new(Turn::new(3));
    threads(3, LIMIT, move |seat| {
        let comm = Comm::create(&small(seat, backend))?;
        let routing = comm.routing(0)?;
        let mut sums = small_sums();
        comm.dispatch(&routing, A2A_PHASE_BOTH, &small_input(), &mut small_output())?;
        comm.combine(&routing, A2A_PHASE_SEND, 0, Some(&ones(&comm, &routing)?), &mut sums)?;
        if seat.rank == 1 {
            comm.destroy()?;
            return turn.wait();
        }
        turn.wait()?;
        comm.combine(&routing, A2A_PHASE_RECV, 0, None, &mut sums)?;
        check_ones(seat, &sums)
    })
}

/// The refusal that was due: its status, and every word that its sentence must have.
fn refused(
    what: &str,
    result: Result<(), Failure>,
    status: a2a_status_t,
    words: &[&str],
) -> Result<(), String> {
    match result {
        Ok(()) => Err(format!("{what}: accepted")),
        Err(failure) if failure.status != status => {
            Err(format!("{what}: refused as {failure}, expected {}", status_name(status)))
        }
        Err(failure) => match words.iter().find(|word| !failure.text.contains(*word)) {
            Some(word) => Err(format!("{what}: the sentence {:?} does not say {word:?}", failure.text)),
            None => Ok(()),
        },
    }
}

fn none_of(problems: Vec<String>) -> Result<(), String> {
    if problems.is_empty() { Ok(()) } else { Err(problems.join("\n")) }
}

/// Every call that a slot's state does not allow is refused and changes nothing.
fn calls_out_of_order(backend: Backend) -> Result<(), String> {
    threads(2, LIMIT, move |seat| {
        let comm = Comm::create(&small(seat, backend))?;
        let (routing, other) = (comm.routing(1)?, comm.routing(1)?);
        let (input, mut output, mut sums) = (small_input(), small_output(), small_sums());
        let rows = Tensor::new(F32, &[seat.world, 16, HIDDEN]);
        let rows =
            if backend == Backend::OneSided { rows } else { Tensor::new(F32, &[seat.world * 16, HIDDEN]) };
        let rank = format!("rank {}", seat.rank);
        let mut problems = Vec::new();
        let mut no = |what: &str, result: Result<(), Failure>| {
            let words = [&rank, "slot 1", "order"];
            problems.extend(refused(what, result, A2A_INVALID_ARGUMENT, &words).err());
        };

        no("combine buffer before dispatch", comm.combine_buffer(&routing, F32).map(drop));
        no("combine before dispatch", comm.combine(&routing, A2A_PHASE_BOTH, 0, Some(&rows), &mut sums));
        no("combine RECV before dispatch", comm.combine(&routing, A2A_PHASE_RECV, 0, None, &mut sums));
        no("dispatch RECV without SEND", comm.dispatch(&routing, A2A_PHASE_RECV, &input, &mut output));

        comm.dispatch(&routing, A2A_PHASE_SEND, &input, &mut output)?;
        no("dispatch SEND after SEND", comm.dispatch(&routing, A2A_PHASE_SEND, &input, &mut output));
        no("dispatch BOTH after SEND", comm.dispatch(&other, A2A_PHASE_BOTH, &input, &mut output));
        no("RECV with another routing", comm.dispatch(&other, A2A_PHASE_RECV, &input, &mut output));
        no("combine before RECV", comm.combine(&routing, A2A_PHASE_BOTH, 0, Some(&rows), &mut sums));
        no("combine buffer before RECV", comm.combine_buffer(&routing, F32).map(drop));

        comm.dispatch(&routing, A2A_PHASE_RECV, &input, &mut output)?;
        no("dispatch RECV after RECV", comm.dispatch(&routing, A2A_PHASE_RECV, &input, &mut output));
        no("combine RECV without SEND", comm.combine(&routing, A2A_PHASE_RECV, 0, None, &mut sums));
        no("combine with another routing", comm.combine(&other, A2A_PHASE_BOTH, 0, Some(&rows), &mut sums));

        let rows = ones(&comm, &routing)?;
        comm.combine(&routing, A2A_PHASE_SEND, 0, Some(&rows), &mut sums)?;
        no("combine SEND after SEND", comm.combine(&routing, A2A_PHASE_SEND, 0, Some(&rows), &mut sums));
        no("dispatch after combine SEND", comm.dispatch(&routing, A2A_PHASE_BOTH, &input, &mut output));
        no("combine RECV with another routing", comm.combine(&other, A2A_PHASE_RECV, 0, None, &mut sums));

        comm.combine(&routing, A2A_PHASE_RECV, 0, None, &mut sums)?;
        check_ones(seat, &sums)?;
        no("a second combine", comm.combine(&routing, A2A_PHASE_BOTH, 0, Some(&rows), &mut sums));
        small_step(seat, &comm, &other)?;
        expect("an error on record", comm.async_error()?.status, A2A_SUCCESS)?;
        none_of(problems)
    })
}

type Spoil = fn(&mut DispatchIn, &mut DispatchOut);
type SpoilRaw = fn(&mut a2a_dispatch_in_t, &mut a2a_dispatch_out_t);

/// Tensors that dispatch must refuse: what is wrong, how it comes to be, and words of the sentence.
const BAD_DISPATCH: &[(&str, Spoil, a2a_status_t, &[&str])] = &[
    ("no tokens", |i, _| i.tokens = None, A2A_INVALID_ARGUMENT, &["tokens is NULL"]),
    (
        "tokens of one dimension",
        |i, _| i.tokens = Some(Tensor::new(BF16, &[T])),
        A2A_INVALID_ARGUMENT,
        &["tokens", "1"],
    ),
    (
        "tokens of three dimensions",
        |i, _| i.tokens = Some(Tensor::new(BF16, &[1, T, HIDDEN])),
        A2A_INVALID_ARGUMENT,
        &["tokens", "3 dimensions", "[T, H]"],
    ),
    (
        "rows too long",
        |i, _| i.tokens = Some(Tensor::new(F32, &[T, HIDDEN])),
        A2A_INVALID_ARGUMENT,
        &["tokens", "256", "128", "max_hidden"],
    ),
    (
        "empty rows",
        |i, _| i.tokens = Some(Tensor::new(BF16, &[T, 0])),
        A2A_INVALID_ARGUMENT,
        &["tokens", "0", "128"],
    ),
    (
        "rows of 24 bytes",
        |i, _| i.tokens = Some(Tensor::strided(BF16, &[T, 12], 8, 0)),
        A2A_INVALID_ARGUMENT,
        &["tokens", "24", "16"],
    ),
    (
        "misaligned data",
        |i, _| i.tokens = Some(Tensor::strided(BF16, &[T, HIDDEN], 16, 8)),
        A2A_INVALID_ARGUMENT,
        &["tokens", "16 bytes"],
    ),
    (
        "misaligned rows",
        |i, _| i.tokens = Some(Tensor::strided(BF16, &[T, HIDDEN], 8, 0)),
        A2A_INVALID_ARGUMENT,
        &["tokens", "136", "16 bytes"],
    ),
    (
        "tokens without data",
        |i, _| i.tokens.as_mut().unwrap().raw_mut().data = std::ptr::null_mut(),
        A2A_INVALID_ARGUMENT,
        &["tokens", "data"],
    ),
    (
        "tokens on a GPU",
        |i, _| i.tokens.as_mut().unwrap().raw_mut().device.device_type = A2A_DEVICE_CUDA,
        A2A_INVALID_ARGUMENT,
        &["tokens", "2", "CPU"],
    ),
    (
        "a negative size",
        |i, _| {
            let raw = i.tokens.as_mut().unwrap().raw_mut();
            // SAFETY: the shape has two entries.
            unsafe { *raw.shape = -1 };
        },
        A2A_INVALID_ARGUMENT,
        &["tokens", "-1"],
    ),
    (
        "a shape past the address space",
        |i, _| {
            let raw = i.tokens.as_mut().unwrap().raw_mut();
            // SAFETY: the shape has two entries.
            unsafe { *raw.shape = i64::MAX / 2 };
        },
        A2A_INVALID_ARGUMENT,
        &["tokens", "address space"],
    ),
    (
        "columns apart",
        |i, _| {
            let tensor = i.tokens.insert(Tensor::strided(BF16, &[T, HIDDEN], 16, 0));
            // SAFETY: the strides have two entries.
            unsafe { *tensor.raw_mut().strides.add(1) = 2 };
        },
        A2A_INVALID_ARGUMENT,
        &["tokens", "2", "contiguous"],
    ),
    (
        "elements of 4 bits",
        |i, _| i.tokens.as_mut().unwrap().raw_mut().dtype.bits = 4,
        A2A_INVALID_ARGUMENT,
        &["tokens", "bytes"],
    ),
    (
        "more tokens than the bound",
        |i, _| i.max_tokens = 4,
        A2A_INVALID_ARGUMENT,
        &["tokens", "5", "max_tokens", "4"],
    ),
    ("a bound past the maximum", |i, _| i.max_tokens = 17, A2A_INVALID_ARGUMENT, &["max_tokens", "17", "16"]),
    ("a negative bound", |i, _| i.max_tokens = -1, A2A_INVALID_ARGUMENT, &["max_tokens", "-1", "16"]),
    (
        "float ids",
        |i, _| i.topk_ids = Some(Tensor::new(F32, &[T, K])),
        A2A_INVALID_ARGUMENT,
        &["topk_ids", "float32", "int32"],
    ),
    (
        "ids of one dimension",
        |i, _| i.topk_ids = Some(Tensor::new(I32, &[T])),
        A2A_INVALID_ARGUMENT,
        &["topk_ids", "[T, K]"],
    ),
    (
        "ids of fewer tokens",
        |i, _| i.topk_ids = Some(Tensor::new(I32, &[4, K])),
        A2A_INVALID_ARGUMENT,
        &["topk_ids", "4", "5"],
    ),
    (
        "too many ids",
        |i, _| i.topk_ids = Some(Tensor::new(I32, &[T, 5])),
        A2A_INVALID_ARGUMENT,
        &["topk_ids", "5", "max_topk", "4"],
    ),
    (
        "no ids a token",
        |i, _| i.topk_ids = Some(Tensor::new(I32, &[T, 0])),
        A2A_INVALID_ARGUMENT,
        &["topk_ids", "0", "max_topk", "4"],
    ),
    (
        "16-bit weights",
        |i, _| i.topk_weights = Some(Tensor::new(F16, &[T, K])),
        A2A_INVALID_ARGUMENT,
        &["topk_weights", "float16", "float32"],
    ),
    (
        "fewer weights than ids",
        |i, _| i.topk_weights = Some(Tensor::new(F32, &[T, 2])),
        A2A_INVALID_ARGUMENT,
        &["topk_weights", "2", "3"],
    ),
    (
        "weights of fewer tokens",
        |i, _| i.topk_weights = Some(Tensor::new(F32, &[4, K])),
        A2A_INVALID_ARGUMENT,
        &["topk_weights", "4", "5"],
    ),
    ("weights without ids", |i, _| i.topk_ids = None, A2A_INVALID_ARGUMENT, &["topk_"]),
    (
        "scales too long",
        |i, _| i.scales = Some(Tensor::new(F32, &[T, 5])),
        A2A_INVALID_ARGUMENT,
        &["scales", "20", "16", "max_scale_bytes"],
    ),
    (
        "scales of fewer tokens",
        |i, _| i.scales = Some(Tensor::new(F32, &[1, 4])),
        A2A_INVALID_ARGUMENT,
        &["scales", "1", "5"],
    ),
    (
        "an extra too long",
        |i, _| i.extras[0] = Some(Tensor::new(U8, &[T, 9])),
        A2A_INVALID_ARGUMENT,
        &["extras[0]", "9", "8"],
    ),
    (
        "an extra not configured",
        |i, _| i.extras[7] = Some(Tensor::new(U8, &[T, 1])),
        A2A_INVALID_ARGUMENT,
        &["extras[7]", "extra_row_bytes[7]"],
    ),
    (
        "rank_tokens that lie",
        |i, _| i.rank_tokens = Some(vec![5, 4]),
        A2A_INVALID_ARGUMENT,
        &["rank_tokens[1]", "4", "5"],
    ),
    (
        "rank_tokens past the bound",
        |i, _| i.rank_tokens = Some(vec![17, 5]),
        A2A_INVALID_ARGUMENT,
        &["rank_tokens[0]", "17", "16"],
    ),
    (
        "negative rank_tokens",
        |i, _| i.rank_tokens = Some(vec![-2, 5]),
        A2A_INVALID_ARGUMENT,
        &["rank_tokens[0]", "-2"],
    ),
    ("an unknown flag", |i, _| i.flags = 1 << 40, A2A_INVALID_ARGUMENT, &["flags", "0x10000000000"]),
    ("reuse", |i, _| i.flags = A2A_DISPATCH_REUSE, A2A_UNSUPPORTED, &["REUSE", "not in this build"]),
    (
        "too few rows out",
        |_, o| o.tokens = Some(Tensor::new(BF16, &[31, HIDDEN])),
        A2A_OVERFLOW,
        &["tokens", "31", "32"],
    ),
    (
        "short rows out",
        |_, o| o.tokens = Some(Tensor::new(BF16, &[32, 32])),
        A2A_INVALID_ARGUMENT,
        &["tokens", "64", "128"],
    ),
    (
        "misaligned rows out",
        |_, o| o.tokens = Some(Tensor::strided(BF16, &[32, HIDDEN], 16, 8)),
        A2A_INVALID_ARGUMENT,
        &["output tokens", "16 bytes"],
    ),
    (
        "float ids out",
        |_, o| o.topk_ids = Some(Tensor::new(F32, &[32, K])),
        A2A_INVALID_ARGUMENT,
        &["topk_ids", "float32"],
    ),
    (
        "int sources as floats",
        |_, o| o.row_source = Some(Tensor::new(F32, &[32, 2])),
        A2A_INVALID_ARGUMENT,
        &["row_source", "float32"],
    ),
    (
        "the wrong shape out",
        |_, o| o.scales = Some(Tensor::new(F32, &[16, 2, 4])),
        A2A_INVALID_ARGUMENT,
        &["scales", "16", "32"],
    ),
    (
        "counts too short",
        |_, o| o.rank_counts = Some(Tensor::new(I32, &[1])),
        A2A_OVERFLOW,
        &["rank_counts", "1", "2"],
    ),
    (
        "a status too short",
        |_, o| o.status = Some(Tensor::new(I32, &[5])),
        A2A_OVERFLOW,
        &["status", "5", "6"],
    ),
    (
        "stats of 32 bits",
        |_, o| o.expert_stats = Some(Tensor::new(I32, &[3])),
        A2A_INVALID_ARGUMENT,
        &["expert_stats", "int32", "int64"],
    ),
    (
        "stats as a view",
        |_, o| o.expert_stats = Some(Tensor::view()),
        A2A_INVALID_ARGUMENT,
        &["expert_stats", "data"],
    ),
    (
        "extras never given",
        |_, o| o.extras[1] = Some(Tensor::view()),
        A2A_INVALID_ARGUMENT,
        &["extras[1]", "given"],
    ),
];

/// The same for what is no tensor of ours.
const BAD_RAW: &[(&str, SpoilRaw, a2a_status_t, &[&str])] = &[
    ("an unknown phase", |i, _| i.phase = 3, A2A_INVALID_ARGUMENT, &["rank 1", "phase", "3"]),
    ("a reserved field", |i, _| i.reserved = 1, A2A_INVALID_ARGUMENT, &["rank 1", "reserved", "1"]),
    ("negative SMs", |i, _| i.max_sms = -1, A2A_INVALID_ARGUMENT, &["rank 1", "max_sms", "-1"]),
    (
        "a short in",
        |i, _| i.struct_size = 8,
        A2A_INVALID_ARGUMENT,
        &["a2a_dispatch_in_t", "struct_size", "8"],
    ),
    (
        "a short out",
        |_, o| o.struct_size = 0,
        A2A_INVALID_ARGUMENT,
        &["a2a_dispatch_out_t", "struct_size", "0"],
    ),
    (
        "expert offsets",
        |_, o| o.expert_offsets = o.rank_counts,
        A2A_INVALID_ARGUMENT,
        &["rank 1", "expert_offsets"],
    ),
];

/// Rank 1 makes every mistake alone while rank 0 waits in an honest step; then it takes that step too.
fn bad_arguments(backend: Backend) -> Result<(), String> {
    threads(2, LIMIT, move |seat| {
        let comm = Comm::create(&small(seat, backend))?;
        let routing = comm.routing(0)?;
        small_step(seat, &comm, &routing)?;
        let mut outcome = Ok(());
        if seat.rank == 1 {
            outcome = spoil_dispatch(&comm, &routing, backend);
            spoil_handles(seat, &comm, &routing)?;
        }
        comm.dispatch(&routing, A2A_PHASE_BOTH, &small_input(), &mut small_output())?;
        if seat.rank == 1 {
            spoil_combine(&comm, &routing, backend)?;
        }
        let mut sums = small_sums();
        comm.combine(&routing, A2A_PHASE_BOTH, 0, Some(&ones(&comm, &routing)?), &mut sums)?;
        check_ones(seat, &sums)?;
        expect("dispatches counted", comm.stats()?.dispatches, 2)?;
        expect("an error on record", comm.async_error()?.status, A2A_SUCCESS)?;
        outcome
    })
}

fn spoil_dispatch(comm: &Comm, routing: &Routing, backend: Backend) -> Result<(), String> {
    let without_ids: &[(&str, Spoil, a2a_status_t, &[&str])] = &[(
        "no ids",
        |i, _| (i.topk_ids, i.topk_weights) = (None, None),
        A2A_INVALID_ARGUMENT,
        &["topk_ids is NULL"],
    )];
    let mut problems = Vec::new();
    let more = if backend == Backend::OneSided { without_ids } else { &[] };
    for (what, spoil, status, words) in BAD_DISPATCH.iter().chain(more) {
        let (mut input, mut output) = (small_input(), small_output());
        spoil(&mut input, &mut output);
        let words = [&["rank 1"], *words].concat();
        let result = comm.dispatch(routing, A2A_PHASE_BOTH, &input, &mut output);
        problems.extend(refused(what, result, *status, &words).err());
    }
    for (what, spoil, status, words) in BAD_RAW {
        let (input, mut output) = (small_input(), small_output());
        let (mut raw_in, mut raw_out) = (input.raw(A2A_PHASE_BOTH), output.raw());
        spoil(&mut raw_in, &mut raw_out);
        // SAFETY: the tensors live in `input` and `output`; the sizes are refused before they are believed.
        let result = check(unsafe {
            a2a_dispatch(comm.handle(), routing.handle(), &raw_in, &mut raw_out, std::ptr::null_mut())
        });
        problems.extend(refused(what, result, *status, words).err());
    }
    none_of(problems)
}

fn spoil_handles(seat: &Seat, comm: &Comm, routing: &Routing) -> Result<(), String> {
    use std::ptr::null_mut;
    let (input, mut output) = (small_input(), small_output());
    let (raw_in, mut raw_out) = (input.raw(A2A_PHASE_BOTH), output.raw());
    let (c, r) = (comm.handle(), routing.handle());
    // SAFETY: handles are looked up, not followed; NULL is refused.
    let calls = unsafe {
        [
            (
                "a NULL comm",
                check(a2a_dispatch(null_mut(), r, &raw_in, &mut raw_out, null_mut())),
                "a2a_comm_t",
            ),
            (
                "a NULL routing",
                check(a2a_dispatch(c, null_mut(), &raw_in, &mut raw_out, null_mut())),
                "a2a_routing_t",
            ),
            (
                "a routing for a comm",
                check(a2a_dispatch(r.cast(), r, &raw_in, &mut raw_out, null_mut())),
                "a2a_comm_t",
            ),
            (
                "a comm for a routing",
                check(a2a_dispatch(c, c.cast(), &raw_in, &mut raw_out, null_mut())),
                "a2a_routing_t",
            ),
            (
                "a NULL in",
                check(a2a_dispatch(c, r, std::ptr::null(), &mut raw_out, null_mut())),
                "a2a_dispatch_in_t",
            ),
            ("a NULL out", check(a2a_dispatch(c, r, &raw_in, null_mut(), null_mut())), "a2a_dispatch_out_t"),
            (
                "a NULL combine in",
                check(a2a_combine(c, r, std::ptr::null(), null_mut(), null_mut())),
                "a2a_combine_in_t",
            ),
            ("a NULL tensor", check(a2a_combine_buffer(c, r, null_mut())), "tensor is NULL"),
            ("no room for a routing", check(a2a_routing_create(c, 0, null_mut())), "routing is NULL"),
            ("slot 2 of 2", comm.routing(2).map(drop), "slot is 2"),
            ("slot -1", comm.routing(-1).map(drop), "slot is -1"),
            ("a negative timeout", comm.set_timeout(0, -5), "timeout_ms is -5"),
        ]
    };
    for (what, result, words) in calls {
        refused(what, result, A2A_INVALID_ARGUMENT, &[words])?;
    }

    let alone = Seat { rank: 0, world: 1, ..seat.clone() };
    let single = Comm::create(&small(&alone, Backend::OneSided))?;
    let (foreign, stale) = (single.routing(0)?, single.routing(0)?);
    let result = comm.dispatch(&foreign, A2A_PHASE_BOTH, &input, &mut output);
    refused("another comm's routing", result, A2A_INVALID_ARGUMENT, &["rank 1", "another comm"])?;
    let handle = stale.handle();
    stale.destroy()?;
    // SAFETY: handles are looked up, not followed.
    let result = check(unsafe { a2a_dispatch(single.handle(), handle, &raw_in, &mut raw_out, null_mut()) });
    refused("a destroyed routing", result, A2A_INVALID_ARGUMENT, &["not a live a2a_routing_t"])?;
    let handle = single.handle();
    small_step(&alone, &single, &foreign)?;
    single.destroy()?;
    // SAFETY: as above.
    let result = check(unsafe { a2a_dispatch(handle, foreign.handle(), &raw_in, &mut raw_out, null_mut()) });
    refused("a destroyed comm", result, A2A_INVALID_ARGUMENT, &["not a live a2a_comm_t"])?;
    // SAFETY: as above.
    let result = check(unsafe { a2a_destroy(handle) });
    refused("a comm destroyed twice", result, A2A_INVALID_ARGUMENT, &["not a live a2a_comm_t"])?;
    // Its routings outlive it.
    foreign.destroy()?;
    Ok(())
}

fn spoil_combine(comm: &Comm, routing: &Routing, backend: Backend) -> Result<(), String> {
    let rows = |rows: usize, hidden: usize, dtype: Dtype| Tensor::new(dtype, &[rows, hidden]);
    let good = || rows(32, HIDDEN, BF16);
    let buffer = ones(comm, routing)?;
    // One row into the buffer: neither the whole of it nor outside.
    let mut overlapping = good();
    overlapping.raw_mut().data = (buffer.address() + HIDDEN * 2) as *mut _;
    let mut misplaced = good();
    misplaced.raw_mut().byte_offset = 8;
    let out = |dtype, shape: &[usize]| Some(Tensor::new(dtype, shape));
    let sums = || out(F32, &[T, HIDDEN]);
    type Case<'a> = (&'a str, Option<Tensor>, Option<Tensor>, a2a_phase_t, u64, &'a [&'a str]);
    let cases: Vec<Case> = vec![
        ("no rows", None, sums(), A2A_PHASE_BOTH, 0, &["tokens is NULL"]),
        (
            "integer rows",
            Some(rows(32, HIDDEN, I32)),
            sums(),
            A2A_PHASE_BOTH,
            0,
            &["tokens", "int32", "bfloat16"],
        ),
        ("8-bit rows", Some(rows(32, HIDDEN, F8)), sums(), A2A_PHASE_BOTH, 0, &["tokens", "8", "bfloat16"]),
        ("too few rows", Some(rows(31, HIDDEN, BF16)), sums(), A2A_PHASE_BOTH, 0, &["tokens", "31", "32"]),
        (
            "rows too long",
            Some(rows(32, 2 * HIDDEN, F32)),
            sums(),
            A2A_PHASE_BOTH,
            0,
            &["tokens", "512", "256"],
        ),
        ("rows too short", Some(rows(32, 12, BF16)), sums(), A2A_PHASE_BOTH, 0, &["tokens", "24", "16"]),
        ("misaligned rows", Some(misplaced), sums(), A2A_PHASE_BOTH, 0, &["tokens", "16 bytes"]),
        (
            "rows inside the buffer",
            Some(overlapping),
            sums(),
            A2A_PHASE_BOTH,
            0,
            &["tokens", "combine buffer"],
        ),
        ("nowhere to put sums", Some(good()), None, A2A_PHASE_BOTH, 0, &["the output tokens is NULL"]),
        (
            "integer sums",
            Some(good()),
            out(I32, &[T, HIDDEN]),
            A2A_PHASE_BOTH,
            0,
            &["output tokens", "int32"],
        ),
        (
            "too few sums",
            Some(good()),
            out(F32, &[4, HIDDEN]),
            A2A_PHASE_BOTH,
            0,
            &["output tokens", "[4, 64]", "[5, 64]"],
        ),
        (
            "short sums",
            Some(good()),
            out(F32, &[T, 32]),
            A2A_PHASE_BOTH,
            0,
            &["output tokens", "[5, 32]", "[5, 64]"],
        ),
        ("flat sums", Some(good()), out(F32, &[T]), A2A_PHASE_BOTH, 0, &["output tokens", "4 bytes"]),
        (
            "weights where there are none",
            Some(good()),
            sums(),
            A2A_PHASE_BOTH,
            A2A_COMBINE_NO_WEIGHTS,
            &["NO_WEIGHTS"],
        ),
        ("an unknown flag", Some(good()), sums(), A2A_PHASE_BOTH, 1 << 9, &["flags", "0x200"]),
        ("an unknown phase", Some(good()), sums(), -1, 0, &["phase", "-1"]),
    ];
    for (what, rows, tokens, phase, flags, words) in cases {
        let result =
            comm.combine(routing, phase, flags, rows.as_ref(), &mut CombineOut { tokens, status: None });
        refused(what, result, A2A_INVALID_ARGUMENT, &[&["rank 1"], words].concat())?;
    }
    if backend == Backend::OneSided {
        let transposed = Tensor::new(BF16, &[16, 2, HIDDEN]);
        let result = comm.combine(routing, A2A_PHASE_BOTH, 0, Some(&transposed), &mut small_sums());
        refused("rows by token", result, A2A_INVALID_ARGUMENT, &["rank 1", "tokens", "[2, 16, 64]"])?;
    }
    let result = comm.combine_buffer(routing, I64).map(drop);
    refused("an integer buffer", result, A2A_INVALID_ARGUMENT, &["rank 1", "int64"])?;

    let (rows, mut sums) = (good(), small_sums());
    let (weights, mut weights_out) = (Tensor::new(F32, &[T, K]), Tensor::new(F32, &[T, K]));
    let mut raw_in = combine_in(A2A_PHASE_BOTH, 0, Some(&rows));
    let mut raw_out = sums.raw();
    let call =
        |what: &str, raw_in: &a2a_combine_in_t, raw_out: &mut a2a_combine_out_t, status, words: &[&str]| {
            // SAFETY: the tensors live in this function.
            let result = check(unsafe {
                a2a_combine(comm.handle(), routing.handle(), raw_in, raw_out, std::ptr::null_mut())
            });
            refused(what, result, status, &[&["rank 1"], words].concat())
        };
    raw_in.row_weights = weights.as_ptr();
    call("gradients in", &raw_in, &mut raw_out, A2A_UNSUPPORTED, &["row_weights"])?;
    raw_in.row_weights = std::ptr::null();
    raw_in.topk_weights = weights.as_ptr();
    call("weights", &raw_in, &mut raw_out, A2A_INVALID_ARGUMENT, &["topk_weights"])?;
    raw_in.topk_weights = std::ptr::null();
    raw_out.topk_weights = weights_out.as_mut_ptr();
    call("gradients out", &raw_in, &mut raw_out, A2A_UNSUPPORTED, &["topk_weights"])
}

/// Configs that a2a_query_memory and a2a_create refuse alike.
fn bad_configs() -> Result<(), String> {
    type Spoil = fn(&mut a2a_config_t);
    let cases: [(&str, Spoil, a2a_status_t, &[&str]); 27] = [
        ("no ranks", |c| c.num_ranks = 0, A2A_INVALID_ARGUMENT, &["num_ranks", "0", "1024"]),
        ("too many ranks", |c| c.num_ranks = 1025, A2A_INVALID_ARGUMENT, &["num_ranks", "1025", "1024"]),
        ("a rank of nobody", |c| c.rank = 1, A2A_INVALID_ARGUMENT, &["rank is 1", "0"]),
        (
            "fewer ranks at most",
            |c| (c.num_ranks, c.max_ranks) = (4, 2),
            A2A_INVALID_ARGUMENT,
            &["max_ranks", "2", "4"],
        ),
        ("no experts", |c| c.num_experts = 0, A2A_INVALID_ARGUMENT, &["num_experts", "0"]),
        ("no top-k", |c| c.max_topk = 0, A2A_INVALID_ARGUMENT, &["max_topk", "0", "32"]),
        ("top-33", |c| c.max_topk = 33, A2A_INVALID_ARGUMENT, &["max_topk", "33", "32"]),
        ("no tokens", |c| c.max_tokens = 0, A2A_INVALID_ARGUMENT, &["max_tokens", "0"]),
        (
            "rows past int32",
            |c| (c.num_ranks, c.max_tokens) = (1024, 1 << 21),
            A2A_INVALID_ARGUMENT,
            &["2147483648", "2147483647"],
        ),
        ("no hidden", |c| c.max_hidden = 0, A2A_INVALID_ARGUMENT, &["max_hidden", "0"]),
        ("rows of 26 bytes", |c| c.max_hidden = 13, A2A_INVALID_ARGUMENT, &["max_hidden", "26", "16"]),
        (
            "results of 52 bytes",
            |c| c.combine_hidden = 13,
            A2A_INVALID_ARGUMENT,
            &["combine_hidden", "52", "16"],
        ),
        ("an unknown type", |c| c.token_dtype = 9, A2A_INVALID_ARGUMENT, &["token_dtype", "9"]),
        (
            "8-bit results",
            |c| c.combine_dtype = A2A_DTYPE_F8_E4M3,
            A2A_INVALID_ARGUMENT,
            &["combine_dtype", "f8"],
        ),
        (
            "a negative extra",
            |c| c.extra_row_bytes[3] = -1,
            A2A_INVALID_ARGUMENT,
            &["extra_row_bytes[3]", "-1"],
        ),
        ("65 slots", |c| c.num_slots = 65, A2A_INVALID_ARGUMENT, &["num_slots", "65", "64"]),
        ("an unknown backend", |c| c.backend = 99, A2A_INVALID_ARGUMENT, &["backend", "99"]),
        ("an unknown layout", |c| c.layout = -1, A2A_INVALID_ARGUMENT, &["layout", "-1"]),
        (
            "a table without one",
            |c| c.placement = A2A_PLACEMENT_TABLE,
            A2A_INVALID_ARGUMENT,
            &["expert_owner", "NULL"],
        ),
        (
            "a table unasked",
            |c| c.expert_owner = [0; 8].as_ptr(),
            A2A_INVALID_ARGUMENT,
            &["expert_owner", "placement"],
        ),
        (
            "an owner of nowhere",
            |c| (c.placement, c.expert_owner) = (A2A_PLACEMENT_TABLE, const { &[0, 0, 7, 0, 0, 0] }.as_ptr()),
            A2A_INVALID_ARGUMENT,
            &["expert_owner[2]", "7", "0"],
        ),
        ("an unknown flag", |c| c.flags = 4, A2A_INVALID_ARGUMENT, &["flags", "0x4"]),
        ("a reserved field", |c| c.reserved = 4, A2A_INVALID_ARGUMENT, &["reserved", "4"]),
        ("a negative timeout", |c| c.timeout_ms = -4, A2A_INVALID_ARGUMENT, &["timeout_ms", "-4"]),
        ("another's layout", |c| c.layout = A2A_LAYOUT_FLAT, A2A_UNSUPPORTED, &["flat"]),
        ("quantisation", |c| c.quant = A2A_QUANT_FP8_F32_SCALES, A2A_UNSUPPORTED, &["quant"]),
        ("a limit on rows", |c| c.max_recv_rows = 5, A2A_UNSUPPORTED, &["max_recv_rows"]),
    ];
    let seat = Seat { rank: 0, world: 1, id: GroupId::new(), args: Vec::new() };
    for (what, spoil, status, words) in cases {
        let mut config = small(&seat, Backend::OneSided);
        spoil(&mut config);
        let words = [&["rank "], words].concat();
        refused(what, query_memory(&config).map(drop), status, &words)?;
        refused(what, Comm::create(&config).map(drop), status, &words)?;
    }
    Ok(())
}

// ---------------------------------------------------------------------------------------------- memory

/// The system's allocator, counting.
struct Counting;

#[global_allocator]
static ALLOCATOR: Counting = Counting;
static LIVE: AtomicI64 = AtomicI64::new(0);
thread_local! {
    /// Of this thread: the library's watchdog wakes when it likes.
    static CALLS: std::cell::Cell<i64> = const { std::cell::Cell::new(0) };
}

fn count_call() {
    // A thread that is ending has no cell left, and nothing to count.
    let _ = CALLS.try_with(|calls| calls.set(calls.get() + 1));
}

// SAFETY: the system's allocator does the work.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: AllocLayout) -> *mut u8 {
        LIVE.fetch_add(layout.size() as i64, Relaxed);
        count_call();
        // SAFETY: forwarded.
        unsafe { System.alloc(layout) }
    }
    unsafe fn alloc_zeroed(&self, layout: AllocLayout) -> *mut u8 {
        LIVE.fetch_add(layout.size() as i64, Relaxed);
        count_call();
        // SAFETY: forwarded; the system gives zeroed pages without touching them.
        unsafe { System.alloc_zeroed(layout) }
    }
    unsafe fn dealloc(&self, at: *mut u8, layout: AllocLayout) {
        LIVE.fetch_sub(layout.size() as i64, Relaxed);
        // SAFETY: forwarded.
        unsafe { System.dealloc(at, layout) }
    }
}

/// What may be taken beyond what a2a_query_memory says: "small host objects, a few KiB".
const SMALL: i64 = 8 << 10;

/// In a process of its own: what a2a_create and a2a_routing_create take is what a2a_query_memory said, and steps
/// take nothing.
fn measure(seat: &Seat) -> Result<(), String> {
    let backend = BACKENDS.into_iter().find(|backend| backend.name() == seat.args[0]).expect("a backend");
    let mut config = small(seat, backend);
    config.max_tokens = 1000;
    let memory = query_memory(&config)?;
    let total = memory.window_bytes + memory.private_bytes + config.num_slots as u64 * memory.routing_bytes;
    expect("total_bytes", memory.total_bytes, total)?;
    config.memory_limit = total - 1;
    let words = [(total - 1).to_string(), total.to_string()];
    let words = ["rank 0", "memory_limit", &words[0], &words[1]];
    refused("a limit one byte short", Comm::create(&config).map(drop), A2A_OUT_OF_MEMORY, &words)?;
    config.memory_limit = total;

    let mapped = mapped_windows()?;
    let before = LIVE.load(Relaxed);
    let comm = Comm::create(&config)?;
    let taken = LIVE.load(Relaxed) - before - memory.private_bytes as i64;
    if !(0..64 << 10).contains(&taken) {
        return Err(format!("a2a_create took {taken} bytes beyond private_bytes, {}", memory.private_bytes));
    }
    let window = mapped_windows()? - mapped;
    expect("pages of the window", window, memory.window_bytes.next_multiple_of(4096))?;

    let before = LIVE.load(Relaxed);
    let routing = comm.routing(0)?;
    let taken = LIVE.load(Relaxed) - before - memory.routing_bytes as i64;
    if !(0..SMALL).contains(&taken) {
        return Err(format!(
            "a2a_routing_create took {taken} bytes beyond routing_bytes, {}",
            memory.routing_bytes
        ));
    }

    let (input, mut output, mut sums) = (small_input(), small_output(), small_sums());
    for step in 0..4 {
        let before = CALLS.get();
        comm.dispatch(&routing, A2A_PHASE_BOTH, &input, &mut output)?;
        let dispatch = CALLS.get() - before;
        let rows = ones(&comm, &routing)?;
        let before = CALLS.get();
        comm.combine(&routing, A2A_PHASE_BOTH, 0, Some(&rows), &mut sums)?;
        let combine = CALLS.get() - before;
        expect(format!("allocations of step {step} in dispatch, combine"), (dispatch, combine), (0, 0))?;
    }
    drop((routing, comm));
    expect("windows mapped after destroy", mapped_windows()?, mapped)
}

/// Bytes of this process' mappings of windows.
fn mapped_windows() -> Result<u64, String> {
    let maps = std::fs::read_to_string("/proc/self/maps").map_err(|error| error.to_string())?;
    let size = |line: &str| {
        let (start, end) = line.split_once(' ')?.0.split_once('-')?;
        Some(u64::from_str_radix(end, 16).ok()? - u64::from_str_radix(start, 16).ok()?)
    };
    Ok(maps.lines().filter(|line| line.contains("memfd:a2a")).filter_map(size).sum())
}

// ------------------------------------------------------------------------------------------------ main

fn main() -> std::process::ExitCode {
    worker(&[CONFORM, MEASURE]);
    let args = Arguments::from_args();
    let trial = |name: String, run: Box<dyn Fn() -> Result<(), String> + Send>| {
        Trial::test(name, move || run().map_err(Into::into))
    };
    let mut trials = Vec::new();
    for (mode, backend, world, index) in matrix() {
        let name = format!("{}/{}/{world}/{index}", mode.name(), backend.name());
        trials.push(trial(name, Box::new(move || run_cell(mode, backend, world, index))));
    }
    type PerBackend = fn(Backend) -> Result<(), String>;
    let each: [(&str, PerBackend); 5] = [
        ("nobody_needs_the_other_thread", nobody_needs_the_other_thread),
        ("leaving_after_the_last_flag", leaving_after_the_last_flag),
        ("calls_out_of_order", calls_out_of_order),
        ("bad_arguments", bad_arguments),
        ("memory_is_what_was_said", |backend| {
            launch(MEASURE, 1, &[Host::Child(vec![0])], &[backend.name().into()], LIMIT)
        }),
    ];
    for (name, run) in each {
        for backend in BACKENDS {
            trials.push(trial(format!("{name}/{}", backend.name()), Box::new(move || run(backend))));
        }
    }
    trials.push(trial("bad_configs".into(), Box::new(bad_configs)));
    trials.push(trial("everything_is_tried".into(), Box::new(everything_is_tried)));
    trials.push(trial("the_oracle_rounds_right".into(), Box::new(the_oracle_rounds_right)));
    libtest_mimic::run(&args, trials).exit_code()
}
