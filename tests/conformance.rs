//! Every strategy against the oracle: what arrives is exact, what comes back is bit-equal.
//!
//! A cell is one comm: a backend, a world and an index choose its config and some thirty steps, dealt from decks so
//! that no value of any axis is left to luck (a test of its own counts them). Every rank derives the whole cell, all
//! ranks' inputs included, from the seed: there is nothing to communicate but what is tested. A failing cell runs
//! alone by its name, `cargo test --release --test conformance -- threads/one_sided/8/0`; A2A_TEST_SEED (printed with
//! every failure) gives other cells.
//!
//! A2A_TEST_DEVICE=cuda (or cuda:N, cuda:rank) runs it all on CUDA memory, one test at a time. What the library refuses
//! there, or what only means something on the CPU, is ignored with its reason. With A2A_TEST_TRANSPORT=nccl beside it the cells
//! of `allgather` run over NCCL, which takes a GPU for each rank; with A2A_TEST_TRANSPORT=hosts so do those of processes, each of
//! which says that it is a host of its own. With A2A_TEST_TRANSPORT=nixl the cells of `low_latency` are NIXL_ELASTIC's, whose rows and
//! bits are the same, over the NIXL that A2A_NIXL_LIB names.

use std::alloc::{GlobalAlloc, Layout as AllocLayout, System};
use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering::Relaxed};
use std::time::Duration;

use a2a::abi::calls::{a2a_combine, a2a_combine_buffer, a2a_destroy, a2a_dispatch, a2a_routing_create};
use a2a::abi::types::*;
use libtest_mimic::{Arguments, Completion, Trial};

#[allow(dead_code, reason = "each program uses a part")]
pub(crate) mod common;
#[path = "conformance/graphs.rs"]
mod graphs;
#[path = "conformance/laws.rs"]
mod laws;
pub(crate) mod oracle;
#[path = "conformance/recover.rs"]
mod recover;
#[path = "conformance/soak.rs"]
mod soak;
#[path = "conformance/soak_cpu.rs"]
mod soak_cpu;

use common::*;
use oracle::{Dropped, Float, Input, Layout, Received, Row, Rows, Scale, Source};

const LIMIT: Duration = Duration::from_secs(60);
/// Of a cell on a GPU, whose processes take turns there.
const GPU_LIMIT: Duration = Duration::from_secs(300);

// --------------------------------------------------------------------------------------------- cells

/// A strategy and a layout.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Backend {
    OneSided,
    Gather,
    HtFlat,
    HtContiguous,
    LowLatency,
    TwoSided,
}

const BACKENDS: [Backend; 6] = [
    Backend::OneSided,
    Backend::Gather,
    Backend::HtFlat,
    Backend::HtContiguous,
    Backend::LowLatency,
    Backend::TwoSided,
];
const WORLDS: [usize; 5] = [1, 2, 3, 4, 8];
const TOPKS: [usize; 4] = [1, 2, 8, 32];
const TOKENS: [usize; 5] = [0, 1, 127, 128, 1000];
const RECORDED: [&str; 5] = ["mixtral", "qwen3_moe", "deepseek_v3", "gaussian", "worst"];
const EXTRAS: [usize; 8] = [4, 6, 92, 8, 1, 3, 128, 20];
const ALIGNMENTS: [usize; 5] = [1, 4, 16, 128, 256];
const FIFO_ROWS: [usize; 3] = [2, 3, 0];
/// Scales that dispatch makes, and whether they lie by column.
const QUANTS: [Option<(Scale, bool)>; 8] = [
    None,
    Some((Scale::F32, false)),
    None,
    Some((Scale::Ue8m0, true)),
    None,
    Some((Scale::F32, true)),
    None,
    Some((Scale::Ue8m0, false)),
];

fn over_nccl() -> bool {
    std::env::var("A2A_TEST_TRANSPORT").is_ok_and(|transport| transport == "nccl" || transport == "hosts")
}

fn over_nixl() -> bool {
    std::env::var("A2A_TEST_TRANSPORT").is_ok_and(|transport| transport == "nixl")
}

impl Backend {
    fn name(self) -> &'static str {
        match self {
            Backend::OneSided => "one_sided",
            Backend::Gather => "allgather",
            Backend::HtFlat => "ht_flat",
            Backend::HtContiguous => "ht_contiguous",
            Backend::LowLatency => "low_latency",
            Backend::TwoSided => "two_sided",
        }
    }
    fn named(name: &str) -> Backend {
        BACKENDS.into_iter().find(|backend| backend.name() == name).expect("a backend")
    }
    fn code(self) -> a2a_backend_t {
        match self {
            Backend::OneSided => A2A_BACKEND_NVLINK_ONE_SIDED,
            Backend::Gather => A2A_BACKEND_ALLGATHER_REDUCESCATTER,
            Backend::HtFlat | Backend::HtContiguous => A2A_BACKEND_HIGH_THROUGHPUT,
            Backend::LowLatency if over_nixl() => A2A_BACKEND_NIXL_ELASTIC,
            Backend::LowLatency => A2A_BACKEND_LOW_LATENCY,
            Backend::TwoSided => A2A_BACKEND_NVLINK_TWO_SIDED,
        }
    }
    fn layout(self, alignment: usize) -> Layout {
        match self {
            Backend::OneSided => Layout::RankMajor,
            Backend::Gather => Layout::Gathered,
            Backend::HtFlat | Backend::TwoSided => Layout::Flat,
            Backend::HtContiguous => Layout::ExpertContiguous { alignment },
            Backend::LowLatency => Layout::ExpertPadded,
        }
    }
    fn layout_code(self) -> a2a_layout_t {
        match self.layout(1) {
            Layout::Gathered => A2A_LAYOUT_GATHERED,
            Layout::RankMajor => A2A_LAYOUT_RANK_MAJOR,
            Layout::Flat => A2A_LAYOUT_FLAT,
            Layout::ExpertPadded => A2A_LAYOUT_EXPERT_PADDED,
            Layout::ExpertContiguous { .. } => A2A_LAYOUT_EXPERT_CONTIGUOUS,
        }
    }
    /// As a config says it: where there is a choice.
    fn choose(self, config: &mut a2a_config_t) {
        config.backend = self.code();
        config.layout = match self {
            Backend::HtFlat | Backend::HtContiguous => self.layout_code(),
            _ => A2A_LAYOUT_AUTO,
        };
        // Of ranks that are on several hosts AUTO does the same.
        if self == Backend::Gather && over_nccl() && !are_apart() {
            config.transport = A2A_TRANSPORT_NCCL;
        }
    }
    fn by_expert(self) -> bool {
        self.layout(1).by_expert()
    }
    /// Rows have an output of ids.
    fn has_ids(self) -> bool {
        self != Backend::LowLatency
    }
    /// Rows lie in the window; NVLINK_TWO_SIDED has them in the caller's tensors alone, and moves them in RECV.
    fn keeps_rows(self) -> bool {
        self != Backend::TwoSided
    }
    /// All ranks use the slots in one order: collectives that one rank has in another order than its peer wait for each other.
    fn keeps_order(self) -> bool {
        self == Backend::Gather && over_nccl()
    }
    /// A whole dispatch raises its flags only when it knows everybody's counts.
    fn waits_for_counts(self) -> bool {
        match self {
            Backend::OneSided | Backend::Gather => false,
            // Couriers bring counts with the rows.
            Backend::LowLatency => !over_nixl(),
            _ => true,
        }
    }
    /// Rows have two dimensions.
    fn in_blocks(self) -> bool {
        matches!(self, Backend::OneSided | Backend::LowLatency)
    }
    /// max_recv_rows means something.
    fn limits_rows(self) -> bool {
        !matches!(self, Backend::OneSided | Backend::Gather)
    }
}

/// What max_recv_rows is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Limit {
    None,
    /// Less than many steps need; the rest is dropped.
    Tight,
    /// Seldom too little.
    Loose,
    /// Too little for some steps, which then fail.
    Error,
}

const LIMITS: [Limit; 4] = [Limit::None, Limit::Tight, Limit::Loose, Limit::Error];

/// Where the weights of a step come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Weights {
    Absent,
    Recorded,
    Seeded(u64),
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
    /// Routings of each slot.
    routings: usize,
    max_topk: usize,
    max_tokens: usize,
    /// Bytes of the largest token row, and its element type.
    max_row: usize,
    token_type: usize,
    combine_type: a2a_dtype_t,
    /// Hidden size of the results; 0 = the tokens'.
    combine_hidden: usize,
    max_scale_bytes: usize,
    /// Of expert blocks; EXPERT_CONTIGUOUS only.
    alignment: usize,
    limit: Limit,
    max_recv_rows: usize,
    /// As an element of `QUANTS`.
    quant: Option<(Scale, bool)>,
    fifo_rows: usize,
    /// Steps may replay earlier ones, and combine may bring row_weights back.
    training: bool,
    /// Where all outputs lie; `None`: every rank deals its own.
    place: Option<Place>,
    rounds: Vec<Round>,
}

/// Steps that are in flight together, on different slots.
#[derive(Clone)]
struct Round {
    seed: u64,
    order: Order,
    steps: Vec<Step>,
}

/// How ranks go through the slots of a round.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Order {
    /// All alike.
    Same,
    /// Each from another slot on.
    Rotated,
    /// All send alike; odd ranks receive in the opposite order of even ones.
    Crossed,
}

/// One dispatch, and the combine that may follow: what all ranks share.
#[derive(Clone)]
struct Step {
    seed: u64,
    slot: usize,
    routing: usize,
    /// How many dispatches with REUSE since the one whose ids these are; 0 = it is that one.
    replays: usize,
    /// Another routing of the slot was used since.
    interrupted: bool,
    /// What the ids are made of.
    ids_seed: u64,
    kind: Kind,
    recorded: &'static str,
    topk: usize,
    with_ids: bool,
    weights: Weights,
    /// Else they are absent: 1 each, or those of the dispatch that is replayed.
    gives_weights: bool,
    /// T of each rank.
    tokens: Vec<usize>,
    /// As the call gives it; 0 = the configured maximum, or that of the dispatch that is replayed.
    said_bound: usize,
    bound: usize,
    token_type: usize,
    row_bytes: usize,
    /// Row bytes of the caller's; 0 = absent.
    scales: usize,
    extras: [usize; 8],
    values: Values,
    /// Index into FLOATS of the results' type; `None`: nothing is combined.
    combine: Option<usize>,
    /// The results come with row_weights.
    gradients: bool,
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
    outputs: [Place; 17],
    wide_ids_out: bool,
    flat_rows: bool,
    zero_copy: bool,
    accumulate: bool,
    /// The thread flushes subnormals and rounds toward zero while it calls combine, or a dispatch that computes.
    odd_modes: bool,
    weighting: Weighting,
    wants_gradients: bool,
    /// Index into FLOATS.
    out_type: usize,
}

/// The weights of an EXPERT_* combine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Weighting {
    Dispatched,
    Given,
    None,
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
        // Tall: many short rows. Wide: few long ones.
        let maxima = [(1003, 2048), (128, 14336), (1000, 5760)][(index + world) % 3];
        // A number of the backend's cells that goes through all combinations of limits, quantisation and the like.
        let place = WORLDS.iter().position(|&other| other == world).expect("one of them");
        let number = if index < 4 { 4 * place + index } else { 20 + place };
        Cell::dealt(backend, world, (index, number), maxima, |rounds| rounds.len() == 24)
    }

    /// `maxima`: tokens of a rank, bytes of a row. `enough`: no more rounds than these.
    fn dealt(
        backend: Backend,
        world: usize,
        (index, number): (usize, usize),
        (max_tokens, max_row): (usize, usize),
        enough: impl Fn(&[Round]) -> bool,
    ) -> Cell {
        let mut rng = Rng::new(&[seed(), backend as u64, world as u64, index as u64]);
        // Recorded routings need their own number of experts.
        let experts =
            [256, 2 * world + 1, world.div_ceil(2), 64, 128, 8][(index + world + backend as usize) % 6];
        let table = (index + backend as usize) % 2 == 1;
        let owner = if table {
            (0..experts).map(|_| rng.below(world)).collect()
        } else {
            oracle::contiguous(experts, world)
        };
        let limits = backend.limits_rows();
        let quant = match index {
            _ if limits => QUANTS[number % 8],
            6 => QUANTS[2 * (number % 4) + 1],
            _ => None,
        };
        let token_type = (index + world) % if quant.is_some() { 3 } else { TOKEN_TYPES.len() };
        let mut cell = Cell {
            backend,
            world,
            owner,
            table,
            slots: 1 + (index + world) % 3,
            routings: 2,
            // Fewer experts a token than ranks leave less room for its targets.
            max_topk: [32, 8, 32, 2][(index + world) % 4],
            combine_hidden: [0, 0, 0, 80, 0][(index + world) % 5],
            max_tokens,
            max_row,
            token_type,
            // The default must suffice for 8-bit tokens of the full size: bf16.
            combine_type: rng.pick(&[A2A_DTYPE_DEFAULT, A2A_DTYPE_F32]),
            max_scale_bytes: if quant.is_some() { 0 } else { 448 },
            alignment: if backend == Backend::HtContiguous {
                ALIGNMENTS[(number + number / 5) % 5]
            } else {
                1
            },
            limit: if limits { LIMITS[(number + number / 8) % 4] } else { Limit::None },
            max_recv_rows: 0,
            quant,
            fifo_rows: if backend == Backend::TwoSided { FIFO_ROWS[number % 3] } else { 0 },
            training: limits || index > 5,
            place: None,
            rounds: Vec::new(),
        };
        cell.fit();
        cell.deal_rounds(&mut rng, enough);
        cell
    }

    /// Reduces the maxima to what a test can afford.
    fn fit(&mut self) {
        if self.fifo_rows > 0 {
            // Every few rows take a turn of every rank's thread.
            self.max_tokens = self.max_tokens.min(128);
        }
        let rows = |cell: &Cell| -> usize {
            (0..cell.world).map(|rank| cell.shape(cell.max_tokens, cell.max_topk).capacity(rank)).sum()
        };
        let most =
            if self.backend.by_expert() { (100_000_000 / self.max_row).min(60_000) } else { usize::MAX };
        for fewer in [256, 128, 64, 32, 16] {
            if rows(self) > most {
                self.max_tokens = self.max_tokens.min(fewer);
            }
        }
        if self.backend.by_expert() && rows(self) * self.max_row > 200_000_000 {
            self.max_row = 2048;
        }
        let shape = self.shape(self.max_tokens, self.max_topk);
        let all = match shape.layout {
            Layout::ExpertContiguous { .. } => (0..self.world).map(|rank| shape.capacity(rank)).max(),
            _ => Some(shape.block()),
        };
        let all = all.expect("a rank");
        self.max_recv_rows = match self.limit {
            Limit::None => 0,
            Limit::Tight => all / 8 + 1,
            Limit::Loose => all - all / 8 + 1,
            Limit::Error => all / 3 + 1,
        };
    }

    /// A step of this bound and top-k without anybody's tokens, which is enough for the sizes of outputs.
    fn shape(&self, bound: usize, topk: usize) -> oracle::Step {
        oracle::Step {
            owner: self.owner.clone(),
            layout: self.backend.layout(self.alignment),
            limit: self.max_recv_rows,
            bound,
            topk,
            reuse: false,
            ranks: vec![Input::default(); self.world],
        }
    }

    fn deal_rounds(&mut self, rng: &mut Rng, enough: impl Fn(&[Round]) -> bool) {
        let recordings = self.recordings();
        let kinds = KINDS.into_iter().filter(|kind| *kind != Kind::Recorded || !recordings.is_empty());
        let mut kinds = Deck::new(&kinds.collect::<Vec<_>>());
        let mut recordings = Deck::new(&recordings);
        let mut topks = Deck::new(&TOPKS.into_iter().filter(|&k| k <= self.max_topk).collect::<Vec<_>>());
        let mut tokens: Vec<usize> = TOKENS.into_iter().filter(|&t| t <= self.max_tokens).collect();
        if !tokens.contains(&127) {
            tokens.extend([self.max_tokens - 1, self.max_tokens]);
        }
        let mut tokens = Deck::new(&tokens);
        // Opaque bytes have nothing to quantise.
        let mut types = Deck::new(if self.quant.is_some() { &[0, 1, 2, 3] } else { &[0, 1, 2, 3, 4] });
        let mut floats = Deck::new(&[0, 1, 2]);
        let mut rows = Deck::new(&[16, 32, 48, 112, 272, 1024, 2048, 5760, 14336]);
        let mut bounds = Deck::new(&["exact", "loose", "default"]);
        let mut values = Deck::new(&[Values::Spread, Values::Spread, Values::Tiny, Values::Any]);
        let mut shapes = Deck::new(&["alone", "alone", "dispatch_only", "flight", "flight"]);
        let mut permuted = Deck::new(&[true, false]);
        let mut replays = Deck::new(&[true, false]);
        let mut gradients = Deck::new(&[true, false]);
        // A dispatch that follows a dispatch waits for its peers even in SEND, so such slots keep one order.
        let mut idle = vec![true; self.slots];
        // The last dispatch of each routing, and the last routing of each slot.
        let mut last: Vec<Vec<Option<Step>>> = vec![vec![None; self.routings]; self.slots];
        let mut last_routing = vec![0; self.slots];
        while !enough(&self.rounds) {
            let shape = shapes.deal(rng);
            let mut slots: Vec<usize> = (0..self.slots).collect();
            rng.shuffle(&mut slots);
            slots.truncate(if shape == "flight" { self.slots } else { 1 });
            let free = !self.backend.keeps_order() && slots.iter().all(|&slot| idle[slot]);
            let permuted = slots.len() > 1 && free && permuted.deal(rng);
            let order = if permuted { Order::Rotated } else { Order::Same };
            let mut steps = Vec::new();
            for slot in slots {
                let routing = rng.below(self.routings);
                // Whether a dispatch overflows, and leaves nothing to replay, depends on the ids.
                let may_replay = self.training && self.limit != Limit::Error;
                let original = last[slot][routing].clone().filter(|_| may_replay && replays.deal(rng));
                let mut step = match original {
                    Some(original) => self.replay(rng, original, last_routing[slot] != routing),
                    None => {
                        let (kind, wanted) = (kinds.deal(rng), tokens.deal(rng));
                        let bound = bounds.deal(rng);
                        let (recorded, topk) =
                            if kind == Kind::Recorded { recordings.deal(rng) } else { ("", topks.deal(rng)) };
                        Step { slot, routing, recorded, topk, ..self.original(rng, kind, wanted, bound) }
                    }
                };
                // Naive sums are slow: rows are as long as the number of tokens leaves time for.
                let total = step.tokens.iter().sum::<usize>().max(1);
                let sizes = self.shape(step.bound, step.topk);
                let capacity = (0..self.world).map(|rank| sizes.capacity(rank)).max().unwrap_or(0).max(1);
                let terms = if self.backend.by_expert() {
                    (step.topk.min(self.owner.len()) / self.world).max(1)
                } else {
                    1
                };
                let affordable = if self.quant.is_some() { 300_000 } else { 1_000_000 };
                let longest =
                    (affordable / total / terms).min(8_000_000 / capacity).min(self.max_row).max(16);
                step.token_type = types.deal(rng);
                let bytes = self.bytes_of(step.token_type);
                step.row_bytes = rows.deal(rng).min(longest / 16 * 16);
                if self.quant.is_some() {
                    // Rows are 16 bytes or a multiple once they are quantised, too.
                    let hidden = (step.row_bytes / bytes / 16 * 16).clamp(16, self.max_hidden());
                    step.row_bytes = hidden * bytes;
                }
                let hidden = step.row_bytes / bytes;
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
                step.combine = (shape != "dispatch_only" && fits(float)).then_some(float);
                let is_f8 = TOKEN_TYPES[step.token_type].0 == "f8";
                step.scales = match self.quant {
                    Some((scale, _)) if is_f8 => scale.row_bytes(hidden),
                    Some(_) => 0,
                    None if is_f8 => {
                        rng.pick(&[hidden.div_ceil(128) * 4, 4, 92, 3]).min(self.max_scale_bytes)
                    }
                    None => rng.pick(&[0, 0, 12]),
                };
                // What an overflow leaves behind is not known here.
                idle[slot] = step.combine.is_some() && self.limit != Limit::Error;
                step.extras = EXTRAS.map(|bytes| if rng.one_in(3) { bytes } else { 0 });
                step.values = values.deal(rng);
                step.gradients =
                    self.training && step.with_ids && step.combine.is_some() && gradients.deal(rng);
                last_routing[slot] = routing;
                last[slot][routing] = Some(step.clone());
                steps.push(step);
            }
            self.rounds.push(Round { seed: rng.next(), order, steps });
        }
    }

    /// Who sends how much where; the rows are to be dealt.
    fn original(&self, rng: &mut Rng, kind: Kind, wanted: usize, bound: &str) -> Step {
        let mut counts = vec![wanted; self.world];
        match kind {
            Kind::AllEmpty => counts.fill(0),
            Kind::EmptyRank => counts[rng.below(self.world)] = 0,
            Kind::Ragged => counts.iter_mut().for_each(|count| *count = rng.below(wanted + 1)),
            _ => {}
        }
        let most = counts.iter().copied().max().unwrap_or(0);
        let said_bound = match bound {
            "exact" => most.max(1),
            "loose" => (most + 1 + rng.below(40)).min(self.max_tokens),
            _ => 0,
        };
        let seed = rng.next();
        let with_ids = self.backend != Backend::Gather || kind == Kind::Recorded || !rng.one_in(5);
        let weights = match kind {
            _ if !with_ids || rng.one_in(4) => Weights::Absent,
            Kind::Recorded => Weights::Recorded,
            _ => Weights::Seeded(seed),
        };
        Step {
            seed,
            slot: 0,
            routing: 0,
            replays: 0,
            interrupted: false,
            ids_seed: seed,
            kind,
            recorded: "",
            topk: 1,
            with_ids,
            weights,
            gives_weights: weights != Weights::Absent,
            tokens: counts,
            said_bound,
            bound: if said_bound == 0 { self.max_tokens } else { said_bound },
            token_type: 0,
            row_bytes: 16,
            scales: 0,
            extras: [0; 8],
            values: Values::Spread,
            combine: None,
            gradients: false,
        }
    }

    /// The same routing once more; the rows are to be dealt.
    fn replay(&self, rng: &mut Rng, original: Step, interrupted: bool) -> Step {
        let seed = rng.next();
        let gives_weights = original.with_ids && rng.one_in(3);
        Step {
            seed,
            replays: original.replays + 1,
            interrupted,
            weights: if gives_weights { Weights::Seeded(seed) } else { original.weights },
            gives_weights,
            said_bound: rng.pick(&[0, original.bound]),
            ..original
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
    fn choice(&self, round: &Round, step: &Step, rank: usize) -> Choice {
        // What concerns the order of calls is one choice per round, the rest is per step.
        // Where rows move in RECV, ranks that have sent on several slots and ranks that do one slot at a time would
        // wait for each other.
        let alike = !self.backend.keeps_rows() && round.steps.len() > 1;
        let mut order = Rng::new(&[round.seed, if alike { 0 } else { rank as u64 }]);
        let mut rng = Rng::new(&[step.seed, rank as u64, 1]);
        let hidden = self.result_hidden(step);
        let out_types: Vec<usize> = (0..FLOATS.len())
            .filter(|&float| (hidden * FLOATS[float].1.bytes()).is_multiple_of(16))
            .collect();
        let equal = step.tokens.iter().all(|&count| count == step.tokens[0]);
        Choice {
            split_dispatch: order.one_in(2) || round.order != Order::Same,
            split_combine: order.one_in(2) || round.order != Order::Same,
            // Ids past 32 bits, where ids are bad: a replay has them too.
            wide_ids: Rng::new(&[step.ids_seed, rank as u64, 5]).one_in(2),
            strided: rng.one_in(3),
            null_when_empty: rng.one_in(2),
            // Who carries rows over NCCL knows how many there are.
            rank_tokens: rng.one_in(4) || over_nccl(),
            uniform: equal && rng.one_in(3),
            host_counts: rng.one_in(4),
            zero_padding: rng.one_in(4),
            stats: rng.one_in(3),
            outputs: std::array::from_fn(|_| {
                let views = [Place::View; 3];
                let place = rng.pick(&[&views[..], &[Place::Own, Place::Strided, Place::Unwanted]].concat());
                self.place.unwrap_or(place)
            }),
            weighting: rng.pick(&[Weighting::Dispatched, Weighting::Given, Weighting::None]),
            wants_gradients: !rng.one_in(4),
            wide_ids_out: rng.one_in(2),
            flat_rows: rng.one_in(2),
            zero_copy: rng.one_in(2) && self.backend.keeps_rows(),
            accumulate: rng.one_in(2),
            odd_modes: rng.one_in(2),
            out_type: rng.pick(&out_types),
        }
    }

    /// What every rank puts in, with the rows or without.
    fn inputs(&self, step: &Step, with_rows: bool) -> oracle::Step {
        let ranks = (0..self.world)
            .map(|rank| {
                let mut rng = Rng::new(&[step.seed, rank as u64]);
                let tokens = step.tokens[rank];
                let rows = if !with_rows { 0 } else { tokens };
                let mut random = |row_bytes: usize| Rows { row_bytes, bytes: rng.bytes(rows * row_bytes) };
                let mut row_data = random(step.row_bytes);
                if let (Some(_), Some(&(_, float, _))) = (self.quant, FLOATS.get(step.token_type)) {
                    // Magnitudes that a format of 8 bits can tell apart, zeros among them.
                    let mut rng = Rng::new(&[step.seed, rank as u64, 7]);
                    row_data.bytes.clear();
                    for _ in 0..rows * step.row_bytes / float.bytes() {
                        let bits = if rng.one_in(16) { 0 } else { step.values.bits(float, rng.next()) };
                        row_data.bytes.extend_from_slice(&bits.to_le_bytes()[..float.bytes()]);
                    }
                }
                let scales = (step.scales > 0).then(|| random(step.scales));
                let extras = step.extras.map(|bytes| (bytes > 0).then(|| random(bytes)));
                // Of a replay it is the first dispatch that had them.
                let wide = Rng::new(&[step.ids_seed, rank as u64, 5]).one_in(2);
                let (ids, recorded) = self.ids(step, rank, wide);
                let weights = match step.weights {
                    Weights::Absent => None,
                    Weights::Recorded => Some(recorded),
                    Weights::Seeded(seed) => Some(self.weights(seed, rank, tokens * step.topk)),
                };
                Input { tokens, ids: step.with_ids.then_some(ids), weights, rows: row_data, scales, extras }
            })
            .collect();
        oracle::Step { reuse: step.replays > 0, ranks, ..self.shape(step.bound, step.topk) }
    }

    /// Float32 as bits. Where rows are weighted by the experts they travel as they are, whatever they mean.
    fn weights(&self, seed: u64, rank: usize, count: usize) -> Vec<u32> {
        // A replay has the weights of the step it replays, so they do not depend on the values of either.
        let mut any = Rng::new(&[seed, 8]);
        let values = if self.backend.by_expert() && !any.one_in(3) { Values::Spread } else { Values::Any };
        let mut rng = Rng::new(&[seed, rank as u64, 8]);
        (0..count).map(|_| values.bits(Float::F32, rng.next())).collect()
    }

    /// The ids a rank gives, and, if recorded, its weights.
    fn ids(&self, step: &Step, rank: usize, wide: bool) -> (Vec<i64>, Vec<u32>) {
        let (experts, topk, tokens) = (self.owner.len(), step.topk, step.tokens[rank]);
        let mut rng = Rng::new(&[step.ids_seed, rank as u64, 2]);
        if step.kind == Kind::Recorded {
            let recorded = Recorded::load(step.recorded);
            assert_eq!((recorded.experts, recorded.topk), (experts, topk), "{}", step.recorded);
            let from = |t: usize| (rank * tokens + t) % recorded.tokens * topk;
            return (
                (0..tokens).flat_map(|t| recorded.ids[from(t)..][..topk].to_vec()).collect(),
                (0..tokens).flat_map(|t| recorded.weights[from(t)..][..topk].to_vec()).collect(),
            );
        }
        let chosen_rank = self.owner[Rng::new(&[step.ids_seed]).below(experts)];
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
        add(format!("alignment {}", self.alignment));
        add(format!("limit {:?}", self.limit));
        add(format!("quant {:?}", self.quant));
        add(format!("fifo rows {}", self.fifo_rows));
        let mut given_up = vec![0; self.slots];
        for round in &self.rounds {
            if round.steps.len() > 1 {
                add(format!(
                    "slots in flight, {}",
                    if round.order == Order::Same { "one order" } else { "each rank its own order" }
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
                add(format!("weights {}", step.weights != Weights::Absent));
                add(format!("scales {}", step.scales > 0));
                add(format!("bound {}", step.bound < self.max_tokens));
                if self.quant.is_some() {
                    add(format!("{:?} of {}", self.quant, TOKEN_TYPES[step.token_type].0));
                    add(format!(
                        "groups {}",
                        (step.row_bytes / self.bytes_of(step.token_type)).div_ceil(128)
                    ));
                }
                if self.limit != Limit::None {
                    let inputs = self.inputs(step, false);
                    let lacking = if self.limit == Limit::Error {
                        !inputs.overflowing().is_empty()
                    } else {
                        !inputs.dropped().is_empty()
                    };
                    add(format!("{:?} limit, too few rows {lacking}", self.limit));
                    if lacking && self.limit != Limit::Error {
                        add(format!("dropped, then combined {}", step.combine.is_some()));
                        add(format!("dropped, then replayed {}", step.replays > 0));
                    }
                }
                if self.training {
                    add(format!("gradients {}", step.gradients));
                    add(format!("replays {}", step.replays.min(2)));
                    if step.replays > 0 {
                        add(format!("replayed with new weights {}", step.gives_weights));
                        add(format!("replayed after another routing {}", step.interrupted));
                        add(format!("replayed {:?}", step.kind));
                        add(format!("replayed ids {}", step.with_ids));
                    }
                }
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
                    if self.quant.is_some() {
                        add(format!("{:?} {:?}", self.quant, choice.outputs[OUT_SCALES]));
                    }
                    if let Some(from) = step.combine {
                        add(format!("split combine {}", choice.split_combine));
                        add(format!("zero copy {}", choice.zero_copy));
                        add(format!("accumulate {}", choice.accumulate));
                        add(format!("odd modes {}", choice.odd_modes));
                        add(format!("weighting {:?}", choice.weighting));
                        if step.gradients {
                            add(format!("wants gradients {}", choice.wants_gradients));
                        }
                        add(format!("combine {} to {}", FLOATS[from].0, FLOATS[choice.out_type].0));
                    }
                }
            }
        }
        found
    }
}

// ---------------------------------------------------------------------------------------- one rank

/// Element type and row shape of what arrives.
type Column = Option<(Dtype, Vec<usize>)>;

/// A step under way on one rank.
struct Live<'a> {
    cell: &'a Cell,
    step: &'a Step,
    rank: usize,
    choice: Choice,
    routing: &'a Routing,
    /// Of all ranks; the rows and scales as they arrive.
    inputs: oracle::Step,
    input: DispatchIn,
    output: DispatchOut,
    tokens: Column,
    scales: Column,
    extras: [Column; A2A_MAX_EXTRAS],
    /// As the views show it.
    expected: Received,
    /// As the caller's own tensors hold it: under HOST_COUNTS alone they are sized before anybody knows the counts.
    expected_own: Received,
    /// Under A2A_OVERFLOW_DROP.
    dropped: Dropped,
    /// Under A2A_OVERFLOW_ERROR the ranks that have too little room: dispatch fails.
    overflowing: Vec<usize>,
    /// What expert_stats held before.
    stats: Vec<i64>,
    results: CombineIn,
    /// The weights that combine is given, as bits.
    weights: Vec<u32>,
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
const OUT_OFFSETS: usize = 16;

impl<'a> Live<'a> {
    fn new(cell: &'a Cell, round: &Round, step: &'a Step, rank: usize, routing: &'a Routing) -> Live<'a> {
        let (choice, mut inputs) = (cell.choice(round, step, rank), cell.inputs(step, true));
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
        let replayed = step.replays > 0;
        let ids = mine.ids.as_ref().filter(|_| !replayed).map(|ids| {
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
        let scale_type = cell.quant.map(|(scale, _)| if scale == Scale::F32 { F32 } else { I32 });
        let scales = |rows: &Rows| match scale_type {
            Some(dtype) => make(dtype, rows.row_bytes / 4, &rows.bytes),
            None => side(rows),
        };
        let flag = |set: bool, bit: u64| if set { bit } else { 0 };
        let input = DispatchIn {
            tokens: Some(make(
                TOKEN_TYPES[step.token_type].2,
                step.row_bytes / cell.bytes_of(step.token_type),
                &mine.rows.bytes,
            )),
            topk_ids: ids,
            topk_weights: mine
                .weights
                .as_ref()
                .filter(|_| step.gives_weights)
                .map(|weights| make(F32, step.topk, &words(weights))),
            scales: mine.scales.as_ref().map(scales),
            extras: std::array::from_fn(|i| mine.extras[i].as_ref().map(side)),
            rank_tokens: choice.rank_tokens.then(|| step.tokens.iter().map(|&count| count as i32).collect()),
            max_tokens: step.said_bound as i32,
            flags: flag(replayed, A2A_DISPATCH_REUSE)
                | flag(choice.uniform, A2A_DISPATCH_UNIFORM)
                | flag(choice.host_counts, A2A_DISPATCH_HOST_COUNTS)
                | flag(choice.zero_padding, A2A_DISPATCH_ZERO_PADDING),
        };
        // Rows that are not gathered have places for all that may come, unless their number is asked for.
        let told = (choice.rank_tokens || choice.uniform) && cell.backend == Backend::Gather;
        let expected = inputs.dispatch(rank, told || choice.host_counts);
        let column = |tensor: &Option<Tensor>| {
            let tensor = tensor.as_ref()?;
            Some((tensor.dtype(), tensor.shape()[1..].to_vec()))
        };
        let (mut tokens, mut scales) = (column(&input.tokens), column(&input.scales));
        if let Some((scale, _)) = cell.quant {
            let hidden = step.row_bytes / cell.bytes_of(step.token_type);
            tokens = Some((F8, vec![hidden]));
            scales = Some((scale_type.expect("quantised"), vec![scale.row_bytes(hidden) / 4]));
            if let Some(&(_, float, _)) = FLOATS.get(step.token_type) {
                quantise(&mut inputs, &expected, float, scale);
            }
        }
        let mut live = Live {
            expected,
            expected_own: inputs.dispatch(rank, told),
            dropped: if cell.limit == Limit::Error { Dropped::new() } else { inputs.dropped() },
            overflowing: if cell.limit == Limit::Error { inputs.overflowing() } else { Vec::new() },
            cell,
            step,
            rank,
            choice,
            routing,
            inputs,
            tokens,
            scales,
            extras: std::array::from_fn(|i| column(&input.extras[i])),
            input,
            output: DispatchOut::default(),
            stats: Vec::new(),
            results: CombineIn::default(),
            weights: Vec::new(),
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
        match self.cell.backend {
            Backend::OneSided => vec![self.cell.world, self.step.bound],
            Backend::LowLatency => vec![self.expected.expert_counts.len(), self.inputs.block()],
            _ => vec![self.expected.rows.len()],
        }
    }

    fn prepare_outputs(&mut self) {
        let backend = self.cell.backend;
        let own = vec![self.expected_own.rows.len()];
        let blocks = if backend.in_blocks() { self.row_shape() } else { own.clone() };
        let rows = if self.choice.flat_rows { own } else { blocks.clone() };
        let by_column = self.cell.quant.is_some_and(|(_, by_column)| by_column);
        let places = self.choice.outputs;
        let make = |output: usize, dtype: Dtype, rows: &[usize], columns: &[usize], is_rows: bool| {
            let shape = [rows, columns].concat();
            match places[output] {
                Place::Unwanted => None,
                Place::View if backend.keeps_rows() || !is_rows => Some(Tensor::view()),
                Place::Strided if !columns.is_empty() => {
                    Some(Tensor::strided(dtype, &shape, 2 * pad(dtype, columns[0]), pad(dtype, columns[0])))
                }
                _ => Some(Tensor::new(dtype, &shape)),
            }
        };
        let side = |output: usize, column: &Column| {
            let (dtype, columns) = column.as_ref()?;
            let own = places[output] != Place::View || !backend.keeps_rows();
            if output == OUT_SCALES && by_column && own {
                let (shape, apart) = ([&blocks[..], columns].concat(), blocks[blocks.len() - 1]);
                return match places[output] {
                    Place::Unwanted => None,
                    Place::Strided => Some(Tensor::columns(*dtype, &shape, apart + 5, 3)),
                    _ => Some(Tensor::columns(*dtype, &shape, apart, 0)),
                };
            }
            make(output, *dtype, &rows, columns, true)
        };
        let local = self.expected.expert_counts.len();
        // Without ids there are none to receive, no weights and no counts of experts.
        let ids = self.step.with_ids;
        let per_row: &[usize] = if backend.by_expert() { &[] } else { &[self.step.topk] };
        let id_type = if self.choice.wide_ids_out { I64 } else { I32 };
        self.output = DispatchOut {
            tokens: side(OUT_TOKENS, &self.tokens),
            scales: side(OUT_SCALES, &self.scales),
            topk_ids: if ids && backend.has_ids() {
                make(OUT_IDS, id_type, &rows, per_row, true)
            } else {
                None
            },
            topk_weights: if ids { make(OUT_WEIGHTS, F32, &rows, per_row, true) } else { None },
            extras: std::array::from_fn(|i| side(OUT_EXTRA + i, &self.extras[i])),
            expert_counts: if ids { make(OUT_EXPERT_COUNTS, I32, &[local], &[], false) } else { None },
            rank_counts: make(OUT_RANK_COUNTS, I32, &[self.cell.world], &[], false),
            expert_offsets: if backend.by_expert() {
                make(OUT_OFFSETS, I32, &[local + 1], &[], false)
            } else {
                None
            },
            row_source: make(OUT_SOURCE, I32, &rows, &[2], true),
            expert_stats: None,
            status: make(OUT_STATUS, I32, &[4 + self.cell.world], &[], false),
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
        let computes = self.cell.quant.is_some() || self.cell.backend.by_expert();
        let mut call = || comm.dispatch(self.routing, phase, &self.input, &mut self.output);
        let odd = self.choice.odd_modes && computes;
        let (result, changed) = if odd { in_odd_float_modes(call) } else { (call(), false) };
        if changed {
            return Err(self.what("dispatch changed the thread's floating-point modes"));
        }
        if phase == A2A_PHASE_SEND {
            result.map_err(|failure| self.what(failure))?;
            if self.cell.backend.keeps_rows() {
                // SEND is done with its tensors.
                let DispatchIn { tokens, topk_ids, topk_weights, scales, extras, .. } = &mut self.input;
                let all = [tokens, topk_ids, topk_weights, scales].into_iter().chain(extras);
                all.flatten().for_each(Tensor::scribble);
            }
            return Ok(());
        }
        if self.overflows() {
            return self.check_overflow(result);
        }
        result.map_err(|failure| self.what(failure))?;
        self.check_received()
    }

    fn overflows(&self) -> bool {
        !self.overflowing.is_empty()
    }

    /// Every rank fails alike, and says of whom.
    fn check_overflow(&self, result: Result<(), Failure>) -> Result<(), String> {
        let first = self.overflowing[0];
        let words = [
            format!("rank {first}"),
            self.inputs.demand(first).to_string(),
            "max_recv_rows".into(),
            self.cell.max_recv_rows.to_string(),
        ];
        // On a GPU the call is over before anybody knows, unless it waits: the status says it, if it is wanted.
        let told = !cuda::is_enabled() || self.choice.host_counts;
        if !told && self.output.status.is_none() {
            return result.map_err(|failure| self.what(failure));
        }
        let words = words.each_ref().map(String::as_str);
        refused("a dispatch of too many rows", result, A2A_OVERFLOW, if told { &words } else { &[] })
            .map_err(|problem| self.what(problem))?;
        // A call that fails hands out no views.
        if let Some(status) = self.output.status.as_ref().filter(|status| !status.is_view()) {
            let got = status.read_i32();
            let mut want = got.clone();
            want[0] = A2A_STEP_VOID | A2A_STEP_OVERFLOW | got[0] & A2A_STEP_BAD_ID;
            want[3] = self.inputs.demand(self.rank) as i32;
            for rank in 0..self.cell.world {
                want[4 + rank] = i32::from(self.overflowing.contains(&rank));
            }
            self.check_list("status of an overflow", status, &[4 + self.cell.world], &got, &want)?;
        }
        Ok(())
    }

    fn check_received(&self) -> Result<(), String> {
        let output = &self.output;
        let received = if self.choice.host_counts { self.expected.num_rows as i64 } else { -1 };
        if output.num_rows != received {
            return Err(self.what(format!("num_rows is {}, expected {received}", output.num_rows)));
        }
        self.check_rows("tokens", &self.tokens, &output.tokens, |input| Some(&input.rows))?;
        self.check_rows("scales", &self.scales, &output.scales, |input| input.scales.as_ref())?;
        for (i, (column, got)) in self.extras.iter().zip(&output.extras).enumerate() {
            self.check_rows(&format!("extras[{i}]"), column, got, |input| input.extras[i].as_ref())?;
        }
        let expected = &self.expected;
        let rows = self.row_shape();
        let by_expert = self.cell.backend.by_expert();
        let with = |columns: usize| [&rows[..], &[columns]].concat();
        let per_row = if by_expert { rows.clone() } else { with(self.step.topk) };
        if let Some(ids) = &output.topk_ids {
            let wide = self.choice.wide_ids_out && !ids.is_view();
            let got = if wide { ids.read_i64() } else { ids.read_i32().into_iter().map(i64::from).collect() };
            let want: Vec<i64> = self.expected(ids).ids.iter().map(|&id| i64::from(id)).collect();
            self.check_list("topk_ids", ids, &per_row, &got, &want)?;
        }
        if let Some(weights) = &output.topk_weights {
            let want = &self.expected(weights).weights;
            let got: Vec<u32> = weights.read().chunks_exact(4).map(|w| Float::F32.load(w, 0)).collect();
            let got: Vec<u32> = got
                .iter()
                .enumerate()
                .map(|(at, &got)| match want.get(at) {
                    // A sum that is NaN is any NaN.
                    Some(&want) if by_expert && Float::F32.is_nan(got) && Float::F32.is_nan(want) => want,
                    _ => got,
                })
                .collect();
            self.check_list("topk_weights (bits)", weights, &per_row, &got, want)?;
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
            (
                "expert_offsets",
                &output.expert_offsets,
                vec![expected.expert_counts.len() + 1],
                &expected.expert_offsets,
            ),
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
        column: &Column,
        received: &Option<Tensor>,
        of: impl Fn(&Input) -> Option<&Rows>,
    ) -> Result<(), String> {
        let (Some((dtype, columns)), Some(tensor)) = (column, received) else { return Ok(()) };
        let row_bytes = of(&self.inputs.ranks[self.rank]).expect("given").row_bytes;
        let element = dtype.bits as usize / 8;
        // A row of one element keeps the shape it came with: [T] arrives as [rows], [T, 1] as [rows, 1].
        let shape = [&self.row_shape()[..], columns].concat();
        self.check_shape(name, tensor, *dtype, &shape)?;
        let got = tensor.read();
        let zeros = vec![0; row_bytes];
        for (row, source) in self.expected(tensor).rows.iter().enumerate() {
            let want = match source {
                Some(Row { source, .. }) => {
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
        let (here, there) = (tensor_device(), tensor.device());
        if (here.device_type, here.device_id) != (there.device_type, there.device_id) {
            return Err(self.what(format!(
                "{name}: lies on device {} of type {}, expected {} of {}",
                there.device_id, there.device_type, here.device_id, here.device_type
            )));
        }
        if !tensor.gaps_are_intact() {
            return Err(self.what(format!("{name}: bytes between the caller's rows were written")));
        }
        let by_column = name == "scales" && self.cell.quant.is_some_and(|(_, by_column)| by_column);
        let strides = tensor.strides();
        if !tensor.is_view() || shape.contains(&0) {
            return Ok(());
        }
        let last = shape.len() - 1;
        let right = if by_column {
            let rows = if self.cell.backend.in_blocks() { shape[1] } else { self.expected_own.rows.len() };
            let apart = rows.next_multiple_of(4);
            strides[last - 1..] == [1, apart] && (last == 1 || strides[0] == shape[2] * apart)
        } else {
            // Rows may be padded, but stand evenly.
            strides[last] == 1
                && (last < 1 || strides[last - 1] >= shape[last])
                && (last < 2 || strides[0] == shape[1] * strides[1])
        };
        if right {
            Ok(())
        } else {
            Err(self.what(format!("{name}: the view of {shape:?} has strides {strides:?}")))
        }
    }

    /// Computes what the experts would: rank r's results for the rows it received.
    fn compute(&mut self, comm: &Comm, from: usize) -> Result<(), String> {
        let (_, float, dtype) = FLOATS[from];
        let hidden = self.cell.result_hidden(self.step);
        let rows = self.row_shape();
        let shape = [&rows[..], &[hidden]].concat();
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
        for (at, row) in self.expected.rows.iter().enumerate() {
            if let Some(row) = row {
                bytes[at * row_bytes..][..row_bytes]
                    .copy_from_slice(&self.step.result(self.rank, *row, float, hidden));
            }
        }
        tensor.write(&bytes);
        // The experts read the views while they write.
        self.check_received()?;
        self.results.tokens = Some(tensor);
        if self.step.gradients {
            self.results.row_weights = Some(self.row_weights(&rows));
        }
        if self.cell.backend.by_expert() {
            let shape = [self.step.tokens[self.rank], self.step.topk];
            match self.choice.weighting {
                Weighting::Dispatched => {}
                Weighting::Given => {
                    self.weights = self.cell.weights(self.step.seed ^ 6, self.rank, shape[0] * shape[1]);
                    let bytes: Vec<u8> = self.weights.iter().flat_map(|word| word.to_le_bytes()).collect();
                    self.results.topk_weights = Some(self.small_rows(&shape));
                    self.results.topk_weights.as_mut().expect("just made").write(&bytes);
                }
                Weighting::None => self.results.flags |= A2A_COMBINE_NO_WEIGHTS,
            }
        }
        if self.choice.accumulate {
            self.results.flags |= A2A_COMBINE_ACCUMULATE;
        }
        if self.step.gradients && self.choice.wants_gradients {
            self.sums.topk_weights = Some(self.small_rows(&[self.step.tokens[self.rank], self.step.topk]));
        }

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
            let before =
                self.step.result(self.rank, Row { source: nobody, expert: None }, to, tokens * hidden);
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

    /// A float32 tensor of [T, K].
    fn small_rows(&self, shape: &[usize]) -> Tensor {
        if self.choice.strided {
            let gap = pad(F32, shape[1]);
            Tensor::strided(F32, shape, 2 * gap, gap)
        } else {
            Tensor::new(F32, shape)
        }
    }

    /// One value for each expert of each row, on its way back.
    fn row_weights(&self, rows: &[usize]) -> Tensor {
        let columns = if self.cell.backend.by_expert() { 1 } else { self.step.topk };
        let mut shape = if self.choice.flat_rows { vec![rows.iter().product()] } else { rows.to_vec() };
        if !self.cell.backend.by_expert() {
            shape.push(columns);
        }
        let mut tensor = if self.choice.strided && shape.len() > rows.len() {
            Tensor::strided(F32, &shape, pad(F32, columns), 0)
        } else {
            Tensor::new(F32, &shape)
        };
        let value =
            |row: &Option<Row>, column| row.map_or(!0, |row| self.step.gradient(self.rank, row, column));
        let rows = self.expected.rows.iter();
        let words = rows.flat_map(|row| (0..columns).map(move |column| value(row, column)));
        tensor.write(&words.flat_map(u32::to_le_bytes).collect::<Vec<_>>());
        tensor
    }

    fn combine(&mut self, comm: &Comm, phase: a2a_phase_t) -> Result<(), String> {
        let mut call = || comm.combine_with(self.routing, phase, &self.results, &mut self.sums);
        let (result, changed) =
            if self.choice.odd_modes { in_odd_float_modes(call) } else { (call(), false) };
        result.map_err(|failure| self.what(failure))?;
        if changed {
            return Err(self.what("combine changed the thread's floating-point modes"));
        }
        if phase != A2A_PHASE_SEND {
            return self.check_sums();
        }
        if self.cell.backend.keeps_rows() {
            // SEND is done with its tensors; the zero-copy target is none of them.
            let CombineIn { tokens, topk_weights, row_weights, .. } = &mut self.results;
            [tokens, topk_weights, row_weights].into_iter().flatten().for_each(Tensor::scribble);
        }
        Ok(())
    }

    fn check_sums(&self) -> Result<(), String> {
        let (from, to) = (FLOATS[self.step.combine.expect("combined")].1, FLOATS[self.choice.out_type].1);
        let hidden = self.cell.result_hidden(self.step);
        let result = |rank, row| self.step.result(rank, row, from, hidden);
        let weights = match self.choice.weighting {
            Weighting::Dispatched => oracle::Weights::Dispatched,
            Weighting::Given => oracle::Weights::Given(&self.weights),
            Weighting::None => oracle::Weights::None,
        };
        let (inputs, dropped, before) = (&self.inputs, &self.dropped, self.before.as_deref());
        let want = inputs.combine(self.rank, hidden, (from, to), weights, dropped, result, before);
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
            let want = inputs.combine_status(self.rank, dropped);
            self.check_list("combine status", status, &[want.len()], &status.read_i32(), &want)?;
        }
        if let Some(gradients) = &self.sums.topk_weights {
            let value = |rank, row, column| self.step.gradient(rank, row, column);
            let want = inputs.gradients(self.rank, dropped, value);
            let got: Vec<u32> = gradients.read().chunks_exact(4).map(|w| Float::F32.load(w, 0)).collect();
            let shape = [self.step.tokens[self.rank], self.step.topk];
            self.check_list("gradients (bits)", gradients, &shape, &got, &want)?;
        }
        Ok(())
    }

    fn what(&self, problem: impl std::fmt::Display) -> String {
        describe(self.step, &self.choice, problem)
    }
}

/// A sentence that places a problem: the step, and what this rank chose.
fn describe(step: &Step, choice: &Choice, problem: impl std::fmt::Display) -> String {
    let Step { slot, routing, kind, recorded, topk, tokens, bound, row_bytes, replays, gradients, .. } = step;
    let dtype = TOKEN_TYPES[step.token_type].0;
    let Choice { split_dispatch, split_combine, zero_copy, accumulate, weighting, outputs, .. } = choice;
    format!(
        "{kind:?} routing{recorded}, T {tokens:?}, K {topk}, M {bound}, rows of {row_bytes} bytes {dtype}, {replays} \
         replays: {problem}\n  slot {slot}, routing {routing}, split_dispatch {split_dispatch}, split_combine \
         {split_combine}, zero_copy {zero_copy}, accumulate {accumulate}, weighting {weighting:?}, gradients \
         {gradients}, host_counts {}, outputs {outputs:?}",
        choice.host_counts
    )
}

/// The rows as they arrive: those that do, quantised.
fn quantise(inputs: &mut oracle::Step, received: &Received, float: Float, scale: Scale) {
    let arriving: BTreeSet<Source> = received.rows.iter().flatten().map(|row| row.source).collect();
    for (rank, input) in inputs.ranks.iter_mut().enumerate() {
        let hidden = input.rows.row_bytes / float.bytes();
        let empty = |row_bytes| Rows { row_bytes, bytes: vec![0; input.tokens * row_bytes] };
        let (mut values, mut scales) = (empty(hidden), empty(scale.row_bytes(hidden)));
        for token in (0..input.tokens).filter(|&token| arriving.contains(&Source { rank, token })) {
            let (row, row_scales) = oracle::quantise(input.rows.row(token), float, scale);
            values.bytes[token * values.row_bytes..][..values.row_bytes].copy_from_slice(&row);
            scales.bytes[token * scales.row_bytes..][..scales.row_bytes].copy_from_slice(&row_scales);
        }
        (input.rows, input.scales) = (values, Some(scales));
    }
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

impl Values {
    /// A float made of a random word.
    fn bits(self, float: Float, word: u64) -> u32 {
        let (exponent, mantissa, bias) = match float {
            Float::Bf16 => (8, 7, 127),
            Float::F16 => (5, 10, 15),
            Float::F32 => (8, 23, 127),
        };
        let any = word as u32;
        let spread = (word >> 32) as u32;
        let sign = any & 1 << (exponent + mantissa);
        let fraction = any & ((1 << mantissa) - 1);
        match self {
            Values::Spread => sign | (bias - 9 + spread % 19) << mantissa | fraction,
            Values::Tiny => sign | (spread % 3) << mantissa | fraction,
            Values::Any => any,
        }
    }
}

impl Step {
    /// Rank `rank`'s result for a row; where experts have rows of their own, whichever rank has the expert.
    fn result(&self, rank: usize, row: Row, float: Float, hidden: usize) -> Vec<u8> {
        let Row { source, expert } = row;
        let by = expert.map_or(rank as u64, |expert| (1 << 32) + expert as u64);
        let mut rng = Rng::new(&[self.seed, by, source.rank as u64, source.token as u64, 4]);
        let mut row = Vec::with_capacity(hidden * float.bytes());
        for _ in 0..hidden {
            row.extend_from_slice(&self.values.bits(float, rng.next()).to_le_bytes()[..float.bytes()]);
        }
        row
    }

    /// Rank `rank`'s row_weights of a row: any bits.
    fn gradient(&self, rank: usize, row: Row, column: usize) -> u32 {
        let Row { source, expert } = row;
        let expert = expert.map_or(0, |expert| 1 + expert as u64);
        let (from, token) = (source.rank as u64, source.token as u64);
        Rng::new(&[self.seed, rank as u64, expert, from, token, column as u64, 9]).next() as u32
    }
}

/// The job of one rank: a whole cell.
fn conform(seat: &Seat) -> Result<(), String> {
    Cell::new(Backend::named(&seat.args[0]), seat.world, seat.args[1].parse().expect("an index")).run(seat)
}

impl Cell {
    /// One rank's part.
    fn run(&self, seat: &Seat) -> Result<(), String> {
        let comm = self.create(seat)?;
        let mut routings = Vec::new();
        for slot in 0..self.slots {
            routings
                .push((0..self.routings).map(|_| comm.routing(slot as i32)).collect::<Result<Vec<_>, _>>()?);
        }
        meet(seat)?;
        for (index, round) in self.rounds.iter().enumerate() {
            run_round(self, round, seat.rank, &comm, &routings)
                .map_err(|error| format!("round {index}, {error}"))?;
        }
        expect("an error on record", comm.async_error()?.status, A2A_SUCCESS)?;
        comm.destroy()?;
        Ok(())
    }

    /// `owner` is the table of `self.owner`.
    fn config(&self, seat: &Seat, owner: &[i32]) -> a2a_config_t {
        let mut config = config(seat);
        self.backend.choose(&mut config);
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
        // 1 is the default.
        config.expert_alignment = if self.alignment > 1 { self.alignment as i32 } else { 0 };
        config.max_recv_rows = self.max_recv_rows as i64;
        config.overflow = match self.limit {
            Limit::Tight | Limit::Loose => A2A_OVERFLOW_DROP,
            Limit::None | Limit::Error => A2A_OVERFLOW_ERROR,
        };
        config.fifo_rows = self.fifo_rows as i32;
        (config.quant, config.scale_layout) = match self.quant {
            None => (A2A_QUANT_NONE, A2A_SCALES_ROW),
            Some((scale, by_column)) => (
                if scale == Scale::F32 { A2A_QUANT_FP8_F32_SCALES } else { A2A_QUANT_FP8_UE8M0_SCALES },
                if by_column { A2A_SCALES_COLUMN } else { A2A_SCALES_ROW },
            ),
        };
        config
    }

    fn owners(&self) -> Vec<i32> {
        self.owner.iter().map(|&rank| rank as i32).collect()
    }

    fn refused_here(&self) -> Option<String> {
        refused_here(&self.config(&alone_of(self.world), &self.owners()))
    }

    fn create(&self, seat: &Seat) -> Result<Comm, String> {
        let owner = self.owners();
        let config = self.config(seat, &owner);
        let mut carried = self.config(seat, &owner);
        if are_apart() && self.backend == Backend::Gather {
            // What AUTO comes to is not known before the ranks have met.
            carried.transport = A2A_TRANSPORT_NCCL;
        }
        let need = query_memory(&carried)?;
        let comm = Comm::create(&config)?;
        let info = comm.info()?;
        let local = oracle::local_experts(&self.owner, seat.rank);
        let layout = self.backend.layout_code();
        let got = (
            info.backend,
            info.layout,
            info.first_expert,
            info.num_local_experts,
            info.row_capacity,
            info.window_bytes,
        );
        let first = local.first().map_or(-1, |&expert| expert as i32);
        let capacity = self.shape(self.max_tokens, self.max_topk).capacity(seat.rank) as i64;
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
    if round.order == Order::Rotated {
        steps.rotate_left(rank % round.steps.len());
    }
    let (split_dispatch, split_combine) = (steps[0].choice.split_dispatch, steps[0].choice.split_combine);
    // A rank that does both halves of a slot at once is done with it before it sends on the next. Where rows move in
    // RECV, it needs the others to receive in the same order.
    let same_order = match round.order {
        Order::Same => !cell.backend.keeps_rows(),
        Order::Rotated => false,
        Order::Crossed => rank.is_multiple_of(2),
    };
    fn for_each<'a, 'b>(
        steps: &'b mut [Live<'a>],
        same_order: bool,
        act: impl Fn(&mut Live<'a>) -> Result<(), String>,
    ) -> Result<(), String> {
        let order: Box<dyn Iterator<Item = &'b mut Live<'a>>> =
            if same_order { Box::new(steps.iter_mut()) } else { Box::new(steps.iter_mut().rev()) };
        order.into_iter().try_for_each(act)
    }
    if split_dispatch {
        for_each(&mut steps, true, |step| step.dispatch(comm, A2A_PHASE_SEND))?;
        for_each(&mut steps, same_order, |step| step.dispatch(comm, A2A_PHASE_RECV))?;
    } else {
        for_each(&mut steps, true, |step| step.dispatch(comm, A2A_PHASE_BOTH))?;
    }
    // What was dispatched first is combined last.
    steps.reverse();
    steps.retain(|step| step.step.combine.is_some() && !step.overflows());
    for_each(&mut steps, true, |step| step.compute(comm, step.step.combine.expect("retained")))?;
    if split_combine {
        for_each(&mut steps, true, |step| step.combine(comm, A2A_PHASE_SEND))?;
        for_each(&mut steps, same_order, |step| step.combine(comm, A2A_PHASE_RECV))
    } else {
        for_each(&mut steps, true, |step| step.combine(comm, A2A_PHASE_BOTH))
    }
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

/// Rank 0 of a group that does not exist, for configs that are only looked at.
fn alone_of(world: usize) -> Seat {
    Seat { rank: 0, world, id: GroupId::new(), args: Vec::new() }
}

/// Why the library does not serve a config on the GPU that was chosen. On the CPU nothing is left out.
fn refused_here(config: &a2a_config_t) -> Option<String> {
    let refusal = cuda::is_enabled().then(|| query_memory(config).err())??;
    (refusal.status == A2A_UNSUPPORTED).then_some(refusal.text)
}

impl Backend {
    fn refused_here(self) -> Option<String> {
        refused_here(&small(&alone_of(2), self))
    }
}

/// Every cell: where, what, how many ranks, which.
fn matrix() -> Vec<(Mode, Backend, usize, usize)> {
    let mut cells = Vec::new();
    for backend in BACKENDS {
        for world in WORLDS {
            cells.extend((0..4).map(|index| (Mode::Threads, backend, world, index)));
        }
        if !backend.limits_rows() {
            // The first four without quantisation, replays and row_weights, which the others have anyway.
            cells.extend(WORLDS.map(|world| (Mode::Threads, backend, world, 6)));
            cells.extend(WORLDS.map(|world| (Mode::Threads, backend, world, 7)));
        }
        cells.extend([2, 3, 8].map(|world| (Mode::Processes, backend, world, 4)));
        cells.push((Mode::Mixed, backend, 4, 5));
        if cuda::is_enabled() {
            cells.push((Mode::Processes, backend, 4, 4));
        }
    }
    cells
}

const CONFORM: (&str, Job) = ("conform", conform);
const MEASURE: (&str, Job) = ("measure", measure);

fn run_cell(mode: Mode, backend: Backend, world: usize, index: usize) -> Result<(), String> {
    let args = [backend.name().to_string(), index.to_string()];
    let limit = if cuda::is_enabled() { GPU_LIMIT } else { LIMIT };
    launch(CONFORM, world, &mode.hosts(world), &args, limit)
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
        let orders = ["one order", "each rank its own order"];
        want("slots in flight,", &orders[..if backend.keeps_order() { 1 } else { 2 }]);
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
            "gradients",
            "wants gradients",
            "replayed with new weights",
            "replayed after another routing",
        ];
        for name in both.into_iter().filter(|name| *name != "zero copy" || backend.keeps_rows()) {
            want(name, &["true", "false"]);
        }
        let ids: &[&str] = if backend == Backend::Gather { &["true", "false"] } else { &["true"] };
        want("ids", ids);
        want("replayed ids", ids);
        want("replays", &["0", "1", "2"]);
        want("replayed", &["Duplicates", "BadIds", "EmptyRank", "AllEmpty", "Nones", "Recorded"]);
        want("groups", &["1", "3", "8"]);
        for quant in QUANTS.into_iter().flatten().map(Some) {
            want("quant", &[&format!("{quant:?}")]);
            want(&format!("{quant:?} of"), &["bf16", "f16", "f32", "f8"]);
            want(&format!("{quant:?}"), &["View", "Own", "Strided", "Unwanted"]);
        }
        want("quant", &["None"]);
        if backend.limits_rows() {
            want("limit", &["None", "Tight", "Loose", "Error"]);
            want("Tight limit, too few rows", &["true", "false"]);
            want("Error limit, too few rows", &["true", "false"]);
            want("dropped, then combined", &["true", "false"]);
            want("dropped, then replayed", &["true", "false"]);
        }
        if backend.by_expert() {
            want("weighting", &["Dispatched", "Given", "None"]);
        }
        if backend == Backend::HtContiguous {
            want("alignment", &ALIGNMENTS.map(|rows| rows.to_string()).each_ref().map(String::as_str));
        }
        if backend == Backend::TwoSided {
            want("fifo rows", &FIFO_ROWS.map(|rows| rows.to_string()).each_ref().map(String::as_str));
        }
        for output in 0..=OUT_OFFSETS {
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

/// The oracle's e4m3: every value survives, what lies between two goes to the nearer, ties to even, past the largest
/// to the largest; and the scales of groups whose scales are known.
fn the_oracle_quantises_right() -> Result<(), String> {
    let value = |bits| oracle::e4m3_value(bits) as f32;
    expect(
        "the least, the least normal, one, the largest",
        [1, 8, 0x38, 0x7e].map(value),
        [1.0 / 512.0, 1.0 / 64.0, 1.0, 448.0],
    )?;
    for bits in 0..0x7f {
        expect(format!("e4m3 {bits:#x}"), oracle::e4m3(value(bits)), bits)?;
    }
    for low in 0..0x7e {
        let middle = (value(low) + value(low + 1)) / 2.0;
        expect(format!("below the middle of {low:#x}"), oracle::e4m3(middle.next_down()), low)?;
        expect(format!("the middle of {low:#x}"), oracle::e4m3(middle), low + low % 2)?;
        expect(format!("above the middle of {low:#x}"), oracle::e4m3(middle.next_up()), low + 1)?;
    }
    for large in [449.0, 464.0, 465.0, 1e30, f32::INFINITY] {
        expect(format!("{large}"), oracle::e4m3(large), 0x7e)?;
    }
    expect("NaN", oracle::e4m3(f32::NAN), 0x7f)?;

    let row = |values: &[f32]| values.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<u8>>();
    let f32_scales = |bytes: &[u8]| -> Vec<f32> {
        bytes.chunks_exact(4).map(|word| f32::from_le_bytes(word.try_into().unwrap())).collect()
    };
    // 448 makes the scale one; a group of its own has the rest, and the least scale.
    let mut values = vec![-448.0, 17.0, 0.0, -0.0, f32::NAN, -f32::NAN, 1.0, 0.3];
    values.resize(128, 0.0);
    values.extend([0.0, 1e-4]);
    let (q, scales) = oracle::quantise(&row(&values), Float::F32, Scale::F32);
    expect("values of scale one", &q[..8], &[0xfe, 0x58, 0, 0x80, 0x7f, 0xff, 0x38, 0x2a])?;
    expect("values of the least scale", &q[128..], &[0, 0x7e])?;
    expect("scales", f32_scales(&scales), vec![1.0, 1e-4 / 448.0])?;
    let (_, scales) = oracle::quantise(&row(&values), Float::F32, Scale::Ue8m0);
    // 1e-4 / 448 lies between 2^-23 and 2^-22.
    expect("exponents", scales, vec![127, 127 - 22, 0, 0])?;
    let (q, scales) = oracle::quantise(&row(&[448.0f32.next_up(), 3.0]), Float::F32, Scale::Ue8m0);
    expect("the next power of two", (q, scales), (vec![0x76, 0x3c], vec![128, 0, 0, 0]))?;
    // Infinity over infinity is not a number, anything else over it nothing.
    let (q, scales) = oracle::quantise(&row(&[f32::NEG_INFINITY, -5.0]), Float::F32, Scale::F32);
    expect("infinity", (q, f32_scales(&scales)), (vec![0xff, 0x80], vec![f32::INFINITY]))
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
const M: usize = 16;
const SMALL_ALIGNMENT: usize = 4;

/// A small group: K up to 4, 16 tokens of 128 bytes and as many results of 256, 16 bytes of scales, 8 of the first extra, two slots.
fn small(seat: &Seat, backend: Backend) -> a2a_config_t {
    let mut config = config(seat);
    backend.choose(&mut config);
    if backend == Backend::HtContiguous {
        config.expert_alignment = SMALL_ALIGNMENT as i32;
    }
    config.num_experts = EXPERTS as i32;
    config.max_topk = 4;
    config.max_hidden = HIDDEN as i32;
    config.combine_dtype = A2A_DTYPE_F32;
    config.max_tokens = M as i32;
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
        topk_weights: Some(Tensor::of(F32, &[T, K], &1.0f32.to_le_bytes().repeat(T * K))),
        scales: Some(Tensor::of(F32, &[T, 4], &[8; T * 16])),
        extras,
        flags: if over_nccl() { A2A_DISPATCH_UNIFORM } else { 0 },
        ..Default::default()
    }
}

/// [rows] of a step of the small group.
fn small_rows(seat: &Seat, backend: Backend) -> Vec<usize> {
    let step = oracle::Step {
        owner: oracle::contiguous(EXPERTS, seat.world),
        layout: backend.layout(SMALL_ALIGNMENT),
        limit: 0,
        bound: M,
        topk: K,
        reuse: false,
        ranks: vec![Input::default(); seat.world],
    };
    match backend {
        Backend::OneSided => vec![seat.world, M],
        Backend::LowLatency => vec![step.capacity(seat.rank) / step.block(), step.block()],
        _ => vec![step.capacity(seat.rank)],
    }
}

fn capacity(seat: &Seat, backend: Backend) -> usize {
    small_rows(seat, backend).iter().product()
}

/// Everything as views, where rows have any.
fn small_output(seat: &Seat, backend: Backend) -> DispatchOut {
    let rows = small_rows(seat, backend);
    let own = |dtype: Dtype, columns: &[usize]| {
        Some(if backend.keeps_rows() {
            Tensor::view()
        } else {
            Tensor::new(dtype, &[&rows[..], columns].concat())
        })
    };
    let mut extras = [const { None }; A2A_MAX_EXTRAS];
    extras[0] = own(I64, &[]);
    let view = || Some(Tensor::view());
    DispatchOut {
        tokens: own(BF16, &[HIDDEN]),
        scales: own(F32, &[4]),
        topk_ids: if backend.has_ids() { own(I32, &[K]) } else { None },
        topk_weights: own(F32, &[K]),
        extras,
        expert_counts: view(),
        rank_counts: view(),
        expert_offsets: if backend.by_expert() { view() } else { None },
        row_source: own(I32, &[2]),
        expert_stats: None,
        status: view(),
        num_rows: 0,
    }
}

/// Every row of every rank is ones, so a token's sum counts the ranks that own its experts, or its experts.
fn ones(seat: &Seat, backend: Backend, comm: &Comm, routing: &Routing) -> Result<Tensor, String> {
    let mut tensor = if backend.keeps_rows() {
        comm.combine_buffer(routing, F32)?
    } else {
        Tensor::new(F32, &[capacity(seat, backend), HIDDEN])
    };
    let elements: usize = tensor.shape().iter().product();
    tensor.write(&1.0f32.to_le_bytes().repeat(elements));
    Ok(tensor)
}

fn small_sums() -> CombineOut {
    CombineOut {
        tokens: Some(Tensor::new(F32, &[T, HIDDEN])),
        status: Some(Tensor::view()),
        ..Default::default()
    }
}

fn check_ones(seat: &Seat, backend: Backend, sums: &CombineOut) -> Result<(), String> {
    let owner = oracle::contiguous(EXPERTS, seat.world);
    let got = sums.tokens.as_ref().expect("given").read();
    for at in 0..T * HIDDEN {
        let token = at / HIDDEN;
        let owners: BTreeSet<usize> = (0..K).map(|k| owner[(token + k) % EXPERTS]).collect();
        let terms = if backend.by_expert() { K } else { owners.len() };
        let sum = Float::F32.widen(Float::F32.load(&got, at));
        expect(format!("token {token} column {}", at % HIDDEN), sum, terms as f32)?;
    }
    Ok(())
}

/// A whole step that must succeed.
fn small_step(seat: &Seat, backend: Backend, comm: &Comm, routing: &Routing) -> Result<(), String> {
    comm.dispatch(routing, A2A_PHASE_BOTH, &small_input(), &mut small_output(seat, backend))?;
    let mut sums = small_sums();
    comm.combine(routing, A2A_PHASE_BOTH, 0, Some(&ones(seat, backend, comm, routing)?), &mut sums)?;
    check_ones(seat, backend, &sums)
}

/// One rank waits in a combine for a peer that waits, in the dispatch of another slot, for rows that the first has sent but not
/// received: a rank that waits does what the SENDs of all its slots promised.
fn a_combine_serves_other_slots(backend: Backend) -> Result<(), String> {
    threads(2, LIMIT, move |seat| {
        let comm = Comm::create(&small(seat, backend))?;
        let (first, second) = (comm.routing(0)?, comm.routing(1)?);
        meet(seat)?;
        let (input, mut outputs) = (small_input(), [0, 1].map(|_| small_output(seat, backend)));
        let mut sums = [0, 1].map(|_| small_sums());
        comm.dispatch(&first, A2A_PHASE_BOTH, &input, &mut outputs[0])?;
        let results = ones(seat, backend, &comm, &first)?;
        comm.dispatch(&second, A2A_PHASE_SEND, &input, &mut outputs[1])?;
        if seat.rank == 0 {
            comm.combine(&first, A2A_PHASE_BOTH, 0, Some(&results), &mut sums[0])?;
            comm.dispatch(&second, A2A_PHASE_RECV, &input, &mut outputs[1])?;
        } else {
            comm.dispatch(&second, A2A_PHASE_RECV, &input, &mut outputs[1])?;
            comm.combine(&first, A2A_PHASE_BOTH, 0, Some(&results), &mut sums[0])?;
        }
        let results = ones(seat, backend, &comm, &second)?;
        comm.combine(&second, A2A_PHASE_BOTH, 0, Some(&results), &mut sums[1])?;
        sums.iter().try_for_each(|sums| check_ones(seat, backend, sums))
    })
}

/// Only rank 0 acts, then only the others, and so on: each SEND returns while no peer is in a call, each RECV
/// completes while no peer's thread does anything. Not with NVLINK_TWO_SIDED, whose rows move while both ranks are in
/// RECV.
fn nobody_needs_the_other_thread(backend: Backend) -> Result<(), String> {
    let turn = Arc::new(Turn::new(3));
    threads(3, LIMIT, move |seat| {
        let comm = Comm::create(&small(seat, backend))?;
        let routing = comm.routing(0)?;
        let (input, mut output, mut sums) = (small_input(), small_output(seat, backend), small_sums());
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
                        comm.combine(
                            &routing,
                            A2A_PHASE_SEND,
                            0,
                            Some(&ones(seat, backend, &comm, &routing)?),
                            &mut sums,
                        )?;
                    }
                    _ => {
                        comm.combine(&routing, A2A_PHASE_RECV, 0, None, &mut sums)?;
                        check_ones(seat, backend, &sums)?;
                    }
                }
            }
            turn.wait()?;
        }
        Ok(())
    })
}

/// A rank that destroys its comm after its last flag is not missed: after its SEND, or, where rows move in RECV, as
/// soon as it has its own sums.
fn leaving_after_the_last_flag(backend: Backend) -> Result<(), String> {
    let turn = Arc::new(Turn::new(3));
    threads(3, LIMIT, move |seat| {
        let comm = Comm::create(&small(seat, backend))?;
        let routing = comm.routing(0)?;
        meet(seat)?;
        let mut sums = small_sums();
        comm.dispatch(&routing, A2A_PHASE_BOTH, &small_input(), &mut small_output(seat, backend))?;
        let rows = ones(seat, backend, &comm, &routing)?;
        comm.combine(&routing, A2A_PHASE_SEND, 0, Some(&rows), &mut sums)?;
        let finish = |sums: &mut CombineOut| -> Result<(), String> {
            comm.combine(&routing, A2A_PHASE_RECV, 0, None, sums)?;
            check_ones(seat, backend, sums)
        };
        if !backend.keeps_rows() {
            // Rank 1 goes while the others may still be receiving.
            finish(&mut sums)?;
            if seat.rank == 1 {
                comm.destroy()?;
            }
            return turn.wait();
        }
        if seat.rank == 1 {
            comm.destroy()?;
            return turn.wait();
        }
        turn.wait()?;
        finish(&mut sums)
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
        meet(seat)?;
        let (input, mut output, mut sums) = (small_input(), small_output(seat, backend), small_sums());
        let rows = Tensor::new(F32, &[&small_rows(seat, backend)[..], &[HIDDEN]].concat());
        let rank = format!("rank {}", seat.rank);
        let mut problems = Vec::new();
        let mut no = |what: &str, result: Result<(), Failure>| {
            let words = [&rank, "slot 1", "order"];
            problems.extend(refused(what, result, A2A_INVALID_ARGUMENT, &words).err());
        };

        if backend.keeps_rows() {
            no("combine buffer before dispatch", comm.combine_buffer(&routing, F32).map(drop));
        }
        no("combine before dispatch", comm.combine(&routing, A2A_PHASE_BOTH, 0, Some(&rows), &mut sums));
        no("combine RECV before dispatch", comm.combine(&routing, A2A_PHASE_RECV, 0, None, &mut sums));
        no("dispatch RECV without SEND", comm.dispatch(&routing, A2A_PHASE_RECV, &input, &mut output));

        comm.dispatch(&routing, A2A_PHASE_SEND, &input, &mut output)?;
        no("dispatch SEND after SEND", comm.dispatch(&routing, A2A_PHASE_SEND, &input, &mut output));
        no("dispatch BOTH after SEND", comm.dispatch(&other, A2A_PHASE_BOTH, &input, &mut output));
        no("RECV with another routing", comm.dispatch(&other, A2A_PHASE_RECV, &input, &mut output));
        no("combine before RECV", comm.combine(&routing, A2A_PHASE_BOTH, 0, Some(&rows), &mut sums));
        if backend.keeps_rows() {
            no("combine buffer before RECV", comm.combine_buffer(&routing, F32).map(drop));
        }

        comm.dispatch(&routing, A2A_PHASE_RECV, &input, &mut output)?;
        no("dispatch RECV after RECV", comm.dispatch(&routing, A2A_PHASE_RECV, &input, &mut output));
        no("combine RECV without SEND", comm.combine(&routing, A2A_PHASE_RECV, 0, None, &mut sums));
        no("combine with another routing", comm.combine(&other, A2A_PHASE_BOTH, 0, Some(&rows), &mut sums));

        let rows = ones(seat, backend, &comm, &routing)?;
        comm.combine(&routing, A2A_PHASE_SEND, 0, Some(&rows), &mut sums)?;
        no("combine SEND after SEND", comm.combine(&routing, A2A_PHASE_SEND, 0, Some(&rows), &mut sums));
        no("dispatch after combine SEND", comm.dispatch(&routing, A2A_PHASE_BOTH, &input, &mut output));
        no("combine RECV with another routing", comm.combine(&other, A2A_PHASE_RECV, 0, None, &mut sums));

        comm.combine(&routing, A2A_PHASE_RECV, 0, None, &mut sums)?;
        check_ones(seat, backend, &sums)?;
        no("a second combine", comm.combine(&routing, A2A_PHASE_BOTH, 0, Some(&rows), &mut sums));
        small_step(seat, backend, &comm, &other)?;
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
        |_, o| o.extras[1] = Some(Tensor::new(U8, &[128, 1])),
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
];

/// Rank 1 makes every mistake alone while rank 0 waits in an honest step; then it takes that step too.
fn bad_arguments(backend: Backend) -> Result<(), String> {
    threads(2, LIMIT, move |seat| {
        let comm = Comm::create(&small(seat, backend))?;
        let routing = comm.routing(0)?;
        meet(seat)?;
        small_step(seat, backend, &comm, &routing)?;
        let mut outcome = Ok(());
        // Making a comm takes memory, for which no rank may wait in a kernel.
        meet(seat)?;
        if seat.rank == 1 {
            spoil_handles(seat, &comm, &routing, backend)?;
        }
        meet(seat)?;
        if seat.rank == 1 {
            outcome = spoil_dispatch(seat, &comm, &routing, backend);
        }
        comm.dispatch(&routing, A2A_PHASE_BOTH, &small_input(), &mut small_output(seat, backend))?;
        if seat.rank == 1 {
            spoil_combine(seat, &comm, &routing, backend)?;
        }
        let mut sums = small_sums();
        comm.combine(&routing, A2A_PHASE_BOTH, 0, Some(&ones(seat, backend, &comm, &routing)?), &mut sums)?;
        check_ones(seat, backend, &sums)?;
        expect("dispatches counted", comm.stats()?.dispatches, 2)?;
        expect("an error on record", comm.async_error()?.status, A2A_SUCCESS)?;
        outcome
    })
}

/// Outputs that dispatch must refuse, whose sizes depend on the layout.
fn bad_outputs(seat: &Seat, backend: Backend) -> Vec<(&'static str, DispatchOut, a2a_status_t, Vec<String>)> {
    let rows = capacity(seat, backend);
    let good = || small_output(seat, backend);
    let words = |words: &[&str]| words.iter().map(|word| word.to_string()).collect::<Vec<_>>();
    let tokens = |tensor| DispatchOut { tokens: Some(tensor), ..good() };
    let mut cases = vec![
        (
            "too few rows out",
            tokens(Tensor::new(BF16, &[rows - 1, HIDDEN])),
            A2A_OVERFLOW,
            words(&["tokens", &(rows - 1).to_string(), &rows.to_string()]),
        ),
        (
            "short rows out",
            tokens(Tensor::new(BF16, &[rows, 32])),
            A2A_INVALID_ARGUMENT,
            words(&["tokens", "64", "128"]),
        ),
        (
            "misaligned rows out",
            tokens(Tensor::strided(BF16, &[rows, HIDDEN], 16, 8)),
            A2A_INVALID_ARGUMENT,
            words(&["output tokens", "16 bytes"]),
        ),
        (
            "int sources as floats",
            DispatchOut { row_source: Some(Tensor::new(F32, &[rows, 2])), ..good() },
            A2A_INVALID_ARGUMENT,
            words(&["row_source", "float32"]),
        ),
        (
            "the wrong shape out",
            DispatchOut {
                scales: Some(match backend {
                    // As many rows, the other way round.
                    Backend::LowLatency => Tensor::new(F32, &[rows / 3, 3, 4]),
                    _ => Tensor::new(F32, &[rows / 2, 2, 4]),
                }),
                ..good()
            },
            A2A_INVALID_ARGUMENT,
            words(&["scales"]),
        ),
    ];
    let ids = |tensor| DispatchOut { topk_ids: Some(tensor), ..good() };
    let columns: &[usize] = if backend.by_expert() { &[] } else { &[K] };
    cases.push(if backend.has_ids() {
        (
            "float ids out",
            ids(Tensor::new(F32, &[&[rows], columns].concat())),
            A2A_INVALID_ARGUMENT,
            words(&["topk_ids", "float32"]),
        )
    } else {
        ("ids out", ids(Tensor::view()), A2A_INVALID_ARGUMENT, words(&["topk_ids"]))
    });
    if !backend.by_expert() {
        let output = DispatchOut { expert_offsets: Some(Tensor::view()), ..good() };
        cases.push(("expert offsets", output, A2A_INVALID_ARGUMENT, words(&["expert_offsets"])));
    }
    if !backend.keeps_rows() {
        let view = || Some(Tensor::view());
        let outputs = [
            ("tokens", DispatchOut { tokens: view(), ..good() }),
            ("scales", DispatchOut { scales: view(), ..good() }),
            ("topk_ids", DispatchOut { topk_ids: view(), ..good() }),
            ("topk_weights", DispatchOut { topk_weights: view(), ..good() }),
            ("row_source", DispatchOut { row_source: view(), ..good() }),
            (
                "extras[0]",
                DispatchOut { extras: std::array::from_fn(|i| view().filter(|_| i == 0)), ..good() },
            ),
        ];
        for (name, output) in outputs {
            let words = words(&[name, "has no data", "backend nvlink_two_sided keeps no rows"]);
            cases.push(("a view of nothing", output, A2A_INVALID_ARGUMENT, words));
        }
    }
    cases
}

fn spoil_dispatch(seat: &Seat, comm: &Comm, routing: &Routing, backend: Backend) -> Result<(), String> {
    type Case = (&'static str, Spoil, a2a_status_t, &'static [&'static str]);
    let without_ids: &[Case] = &[(
        "no ids",
        |i, _| (i.topk_ids, i.topk_weights) = (None, None),
        A2A_INVALID_ARGUMENT,
        &["topk_ids is NULL"],
    )];
    fn on(input: &mut DispatchIn, device_type: i32) {
        input.tokens.as_mut().unwrap().raw_mut().device.device_type = device_type;
    }
    let elsewhere: Case = if cuda::is_enabled() {
        ("tokens on the CPU", |i, _| on(i, A2A_DEVICE_CPU), A2A_INVALID_ARGUMENT, &["tokens", "1"])
    } else {
        ("tokens on a GPU", |i, _| on(i, A2A_DEVICE_CUDA), A2A_INVALID_ARGUMENT, &["tokens", "2", "CPU"])
    };
    let mut problems = Vec::new();
    let more = if backend == Backend::Gather { &[] } else { without_ids };
    for (what, spoil, status, words) in BAD_DISPATCH.iter().chain(more).chain([&elsewhere]) {
        let (mut input, mut output) = (small_input(), small_output(seat, backend));
        spoil(&mut input, &mut output);
        let words = [&["rank 1"], *words].concat();
        let result = comm.dispatch(routing, A2A_PHASE_BOTH, &input, &mut output);
        problems.extend(refused(what, result, *status, &words).err());
    }
    for (what, mut output, status, words) in bad_outputs(seat, backend) {
        let result = comm.dispatch(routing, A2A_PHASE_BOTH, &small_input(), &mut output);
        let words: Vec<&str> = words.iter().map(String::as_str).chain(["rank 1"]).collect();
        problems.extend(refused(what, result, status, &words).err());
    }
    // The CPU has no SMs, and does not ask.
    let sms: &[(&str, SpoilRaw, a2a_status_t, &[&str])] =
        &[("some SMs of a GPU", |i, _| i.max_sms = 8, A2A_UNSUPPORTED, &["rank 1", "max_sms", "8"])];
    let heeds =
        matches!(backend, Backend::HtFlat | Backend::HtContiguous | Backend::LowLatency | Backend::TwoSided);
    let sms = if cuda::is_enabled() && !heeds { sms } else { &[] };
    for (what, spoil, status, words) in BAD_RAW.iter().chain(sms) {
        let (input, mut output) = (small_input(), small_output(seat, backend));
        let (mut raw_in, mut raw_out) = (input.raw(A2A_PHASE_BOTH), output.raw());
        spoil(&mut raw_in, &mut raw_out);
        // SAFETY: the tensors live in `input` and `output`; the sizes are refused before they are believed.
        let result =
            check(unsafe { a2a_dispatch(comm.handle(), routing.handle(), &raw_in, &mut raw_out, stream()) });
        problems.extend(refused(what, result, *status, words).err());
    }
    none_of(problems)
}

fn spoil_handles(seat: &Seat, comm: &Comm, routing: &Routing, backend: Backend) -> Result<(), String> {
    use std::ptr::null_mut;
    let (input, mut output) = (small_input(), small_output(seat, backend));
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
    small_step(&alone, Backend::OneSided, &single, &foreign)?;
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

fn spoil_combine(seat: &Seat, comm: &Comm, routing: &Routing, backend: Backend) -> Result<(), String> {
    let rows = |rows: usize, hidden: usize, dtype: Dtype| Tensor::new(dtype, &[rows, hidden]);
    let full = capacity(seat, backend);
    let (all, fewer) = (full.to_string(), (full - 1).to_string());
    let (fewer, all) = (fewer.as_str(), all.as_str());
    let good = || rows(full, HIDDEN, BF16);
    let buffer = ones(seat, backend, comm, routing)?;
    // One row into the buffer: neither the whole of it nor outside.
    let mut overlapping = good();
    overlapping.raw_mut().data = (buffer.address() + HIDDEN * 2) as *mut _;
    let mut misplaced = good();
    misplaced.raw_mut().byte_offset = 8;
    let out = |dtype, shape: &[usize]| Some(Tensor::new(dtype, shape));
    let sums = || out(F32, &[T, HIDDEN]);
    let too_few = ["tokens", fewer, all];
    type Case<'a> = (&'a str, Option<Tensor>, Option<Tensor>, a2a_phase_t, u64, &'a [&'a str]);
    let mut cases: Vec<Case> = vec![
        ("no rows", None, sums(), A2A_PHASE_BOTH, 0, &["tokens is NULL"]),
        (
            "integer rows",
            Some(rows(full, HIDDEN, I32)),
            sums(),
            A2A_PHASE_BOTH,
            0,
            &["tokens", "int32", "bfloat16"],
        ),
        ("8-bit rows", Some(rows(full, HIDDEN, F8)), sums(), A2A_PHASE_BOTH, 0, &["tokens", "8", "bfloat16"]),
        ("too few rows", Some(rows(full - 1, HIDDEN, BF16)), sums(), A2A_PHASE_BOTH, 0, &too_few),
        (
            "rows too long",
            Some(rows(full, 2 * HIDDEN, F32)),
            sums(),
            A2A_PHASE_BOTH,
            0,
            &["tokens", "512", "256"],
        ),
        ("rows too short", Some(rows(full, 12, BF16)), sums(), A2A_PHASE_BOTH, 0, &["tokens", "24", "16"]),
        ("misaligned rows", Some(misplaced), sums(), A2A_PHASE_BOTH, 0, &["tokens", "16 bytes"]),
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
        ("an unknown flag", Some(good()), sums(), A2A_PHASE_BOTH, 1 << 9, &["flags", "0x200"]),
        ("an unknown phase", Some(good()), sums(), -1, 0, &["phase", "-1"]),
    ];
    if backend.keeps_rows() {
        let words: &[&str] = &["tokens", "combine buffer"];
        cases.push(("rows inside the buffer", Some(overlapping), sums(), A2A_PHASE_BOTH, 0, words));
    }
    if !backend.by_expert() {
        let words: &[&str] = &["NO_WEIGHTS"];
        let flags = A2A_COMBINE_NO_WEIGHTS;
        cases.push(("weights where there are none", Some(good()), sums(), A2A_PHASE_BOTH, flags, words));
    }
    for (what, rows, tokens, phase, flags, words) in cases {
        let result = comm.combine(
            routing,
            phase,
            flags,
            rows.as_ref(),
            &mut CombineOut { tokens, ..Default::default() },
        );
        refused(what, result, A2A_INVALID_ARGUMENT, &[&["rank 1"], words].concat())?;
    }
    if backend == Backend::OneSided {
        let transposed = Tensor::new(BF16, &[16, 2, HIDDEN]);
        let result = comm.combine(routing, A2A_PHASE_BOTH, 0, Some(&transposed), &mut small_sums());
        refused("rows by token", result, A2A_INVALID_ARGUMENT, &["rank 1", "tokens", "[2, 16, 64]"])?;
    }
    let result = comm.combine_buffer(routing, I64).map(drop);
    if backend.keeps_rows() {
        refused("an integer buffer", result, A2A_INVALID_ARGUMENT, &["rank 1", "int64"])?;
    } else {
        refused("a buffer", result, A2A_UNSUPPORTED, &["rank 1", "nvlink_two_sided"])?;
        let result = comm.combine_buffer(routing, F32).map(drop);
        refused("a buffer", result, A2A_UNSUPPORTED, &["rank 1", "nvlink_two_sided"])?;
    }

    let weights = || Some(Tensor::of(F32, &[T, K], &1.0f32.to_le_bytes().repeat(T * K)));
    let input = || CombineIn { tokens: Some(good()), ..Default::default() };
    let columns: &[usize] = if backend.by_expert() { &[] } else { &[K] };
    let values = |dtype: Dtype, rows: usize| Some(Tensor::new(dtype, &[&[rows], columns].concat()));
    let mut cases = vec![
        (
            "gradients of too few rows",
            CombineIn { row_weights: values(F32, full - 1), ..input() },
            None,
            vec!["row_weights", fewer, all],
        ),
        (
            "16-bit gradients",
            CombineIn { row_weights: values(BF16, full), ..input() },
            None,
            vec!["row_weights", "bfloat16", "float32"],
        ),
        ("gradients of nothing", input(), weights(), vec!["topk_weights", "row_weights"]),
        (
            "gradients of fewer tokens",
            CombineIn { row_weights: values(F32, full), ..input() },
            Some(Tensor::new(F32, &[T - 1, K])),
            vec!["topk_weights", "[4, 3]", "[5, 3]"],
        ),
        (
            "16-bit gradients back",
            CombineIn { row_weights: values(F32, full), ..input() },
            Some(Tensor::new(F16, &[T, K])),
            vec!["topk_weights", "float16", "float32"],
        ),
    ];
    if backend.by_expert() {
        let flags = A2A_COMBINE_NO_WEIGHTS;
        let both = CombineIn { topk_weights: weights(), flags, ..input() };
        cases.push(("weights and none", both, None, vec!["topk_weights", "NO_WEIGHTS"]));
        let fewer = CombineIn { topk_weights: Some(Tensor::new(F32, &[T, 2])), ..input() };
        cases.push(("fewer weights than ids", fewer, None, vec!["topk_weights", "2", "3"]));
    } else {
        let weights = CombineIn { topk_weights: weights(), ..input() };
        cases.push(("weights", weights, None, vec!["topk_weights"]));
    }
    for (what, input, topk_weights, words) in cases {
        let mut output = CombineOut { topk_weights, ..small_sums() };
        let result = comm.combine_with(routing, A2A_PHASE_BOTH, &input, &mut output);
        refused(what, result, A2A_INVALID_ARGUMENT, &[&["rank 1"], &words[..]].concat())?;
    }
    Ok(())
}

/// A memory limit may decide what AUTO chooses: ranks that come to different answers are told so, not left to wait.
fn auto_comes_to_one_answer() -> Result<(), String> {
    threads(2, LIMIT, |seat| {
        let mut config = small(seat, Backend::HtFlat);
        config.max_tokens = 1 << 14;
        let need = query_memory(&config)?.total_bytes;
        config.backend = A2A_BACKEND_AUTO;
        if seat.rank == 1 {
            config.memory_limit = need - 1;
        }
        let refusal = Comm::create(&config).map(|_| ());
        refused("two answers", refusal, A2A_MISMATCH, &["AUTO chose", "memory_limit"])?;
        // With one limit for all there is one answer.
        config.memory_limit = need - 1;
        let explained = |config: &a2a_config_t| query_memory(config).map(|memory| memory.window_bytes);
        let auto = explained(&config)?;
        config.backend = A2A_BACKEND_NVLINK_TWO_SIDED;
        expect("AUTO within the limit", auto, explained(&config)?)
    })
}

/// Configs that a2a_query_memory and a2a_create refuse alike.
fn bad_configs() -> Result<(), String> {
    type Spoil = fn(&mut a2a_config_t);
    let cases: Vec<(&str, Spoil, a2a_status_t, &[&str])> = vec![
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
        (
            "a FIFO of one row",
            |c| (c.backend, c.fifo_rows) = (A2A_BACKEND_NVLINK_TWO_SIDED, 1),
            A2A_INVALID_ARGUMENT,
            &["fifo_rows", "1"],
        ),
        (
            "a FIFO too long",
            |c| (c.backend, c.fifo_rows) = (A2A_BACKEND_NVLINK_TWO_SIDED, 65537),
            A2A_INVALID_ARGUMENT,
            &["fifo_rows", "65537", "65536"],
        ),
        ("a negative timeout", |c| c.timeout_ms = -4, A2A_INVALID_ARGUMENT, &["timeout_ms", "-4"]),
        ("another's layout", |c| c.layout = A2A_LAYOUT_FLAT, A2A_UNSUPPORTED, &["flat"]),
        ("an unknown quantisation", |c| c.quant = 7, A2A_INVALID_ARGUMENT, &["quant", "7"]),
        (
            "scales given and made",
            |c| c.quant = A2A_QUANT_FP8_F32_SCALES,
            A2A_INVALID_ARGUMENT,
            &["max_scale_bytes", "16", "quant"],
        ),
        (
            "columns of the caller's scales",
            |c| c.scale_layout = A2A_SCALES_COLUMN,
            A2A_INVALID_ARGUMENT,
            &["scale_layout", "quant"],
        ),
        ("an unknown scale layout", |c| c.scale_layout = 2, A2A_INVALID_ARGUMENT, &["scale_layout", "2"]),
        ("an unknown policy", |c| c.overflow = 2, A2A_INVALID_ARGUMENT, &["overflow", "2"]),
        ("a limit on rows", |c| c.max_recv_rows = 5, A2A_UNSUPPORTED, &["max_recv_rows"]),
        (
            "a limit on gathered rows",
            |c| (c.backend, c.max_recv_rows) = (A2A_BACKEND_ALLGATHER_REDUCESCATTER, 5),
            A2A_UNSUPPORTED,
            &["max_recv_rows"],
        ),
        (
            "a negative limit",
            |c| (c.backend, c.max_recv_rows) = (A2A_BACKEND_LOW_LATENCY, -5),
            A2A_INVALID_ARGUMENT,
            &["max_recv_rows", "-5"],
        ),
        (
            "a negative alignment",
            |c| {
                (c.backend, c.layout) = (A2A_BACKEND_HIGH_THROUGHPUT, A2A_LAYOUT_EXPERT_CONTIGUOUS);
                c.expert_alignment = -4;
            },
            A2A_INVALID_ARGUMENT,
            &["expert_alignment", "-4"],
        ),
        (
            "padding where nothing is padded",
            |c| (c.backend, c.layout) = (A2A_BACKEND_HIGH_THROUGHPUT, A2A_LAYOUT_EXPERT_PADDED),
            A2A_UNSUPPORTED,
            &["expert_padded"],
        ),
    ];
    let seat = Seat { rank: 0, world: 1, id: GroupId::new(), args: Vec::new() };
    for (what, spoil, status, words) in cases {
        let mut config = small(&seat, Backend::OneSided);
        spoil(&mut config);
        let backend = BACKENDS.into_iter().find(|backend| backend.code() == config.backend);
        if backend.is_some_and(|backend| backend.refused_here().is_some()) {
            // On the GPU it would be refused for that.
            (config.device, config.device_ordinal, config.ranks_per_device) = (A2A_DEVICE_CPU, 0, 0);
        }
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
    let backend = Backend::named(&seat.args[0]);
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

    config.max_tokens = 2000;
    let more = query_memory(&config)?.window_bytes;
    expect(
        "a window that does not grow with the tokens",
        more == memory.window_bytes,
        !backend.keeps_rows(),
    )?;

    let (mut input, mut output, mut sums) = (small_input(), small_output(seat, backend), small_sums());
    input.max_tokens = M as i32;
    for step in 0..4 {
        let before = CALLS.get();
        comm.dispatch(&routing, A2A_PHASE_BOTH, &input, &mut output)?;
        let dispatch = CALLS.get() - before;
        let rows = ones(seat, backend, &comm, &routing)?;
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

#[allow(dead_code, reason = "a2a-perf has its own")]
fn main() -> std::process::ExitCode {
    worker(&JOBS);
    if let Err(error) = choose_device_of_environment() {
        eprintln!("{error}");
        return std::process::ExitCode::FAILURE;
    }
    run(&Arguments::from_args())
}

/// What the program does when it is one of its own children.
pub const JOBS: [(&str, Job); 5] = [CONFORM, MEASURE, graphs::OBEY, recover::FOLLOW, soak_cpu::CHURN];

type Run = Box<dyn Fn() -> Result<(), String> + Send>;
/// Why a test says nothing on the GPU that was chosen.
type Left = Box<dyn Fn() -> Option<String> + Send>;

/// Runs the whole matrix, or what the arguments leave of it. `a2a-perf --check` does the same.
pub fn run(args: &Arguments) -> std::process::ExitCode {
    let mut trials = Vec::new();
    let mut add = |name: String, left: Left, run: Run| {
        trials.push(Trial::ignorable_test(name, move || match left() {
            Some(reason) => Ok(Completion::ignored_with(format!("not on cuda: {reason}"))),
            None => run().map(|()| Completion::Completed).map_err(Into::into),
        }));
    };
    let of = |backend: Backend| -> Left { Box::new(move || backend.refused_here()) };
    let everywhere = || -> Left { Box::new(|| None) };
    for (mode, backend, world, index) in matrix() {
        let name = format!("{}/{}/{world}/{index}", mode.name(), backend.name());
        let left = move || cuda::is_enabled().then(|| Cell::new(backend, world, index).refused_here())?;
        add(name, Box::new(left), Box::new(move || run_cell(mode, backend, world, index)));
    }
    type PerBackend = fn(Backend) -> Result<(), String>;
    let each: [(&str, PerBackend); 5] = [
        ("a_combine_serves_other_slots", a_combine_serves_other_slots),
        ("nobody_needs_the_other_thread", nobody_needs_the_other_thread),
        ("leaving_after_the_last_flag", leaving_after_the_last_flag),
        ("calls_out_of_order", calls_out_of_order),
        ("bad_arguments", bad_arguments),
    ];
    for (name, run) in each {
        let apart = name == "nobody_needs_the_other_thread";
        for backend in BACKENDS.into_iter().filter(|backend| backend.keeps_rows() || !apart) {
            add(format!("{name}/{}", backend.name()), of(backend), Box::new(move || run(backend)));
        }
    }
    for backend in BACKENDS {
        let name = format!("memory_is_what_was_said/{}", backend.name());
        let counts_host_memory = || {
            cuda::is_enabled()
                .then(|| "counts host memory; gpu/memory_is_what_was_said counts a GPU's".into())
        };
        let measured = move || launch(MEASURE, 1, &[Host::Child(vec![0])], &[backend.name().into()], LIMIT);
        add(name, Box::new(counts_host_memory), Box::new(measured));
    }
    for (name, run) in laws::OF_A_BACKEND {
        for backend in BACKENDS {
            let left = move || backend.refused_here().or_else(|| laws::refused_here(name, backend));
            add(format!("{name}/{}", backend.name()), Box::new(left), Box::new(move || run(backend)));
        }
    }
    for backend in BACKENDS.into_iter().filter(|backend| backend.limits_rows()) {
        let name = format!("too_many_rows/{}", backend.name());
        add(name, of(backend), Box::new(move || laws::too_many_rows(backend)));
    }
    for backend in BACKENDS.into_iter().filter(|backend| backend.by_expert()) {
        let name = format!("any_number_of_ranks_gives_the_same_bits/{}", backend.name());
        add(name, of(backend), Box::new(move || laws::any_number_of_ranks(backend)));
    }
    for world in [2, 3, 4] {
        let name = format!("a_class_of_backends_gives_the_same_bits/{world}");
        let left = || laws::CLASSES.iter().map(|class| laws::lonely(class)).min().expect("two classes");
        add(name, Box::new(left), Box::new(move || laws::classes(world)));
    }
    soak_cpu::add(&mut add);
    add("bad_configs".into(), everywhere(), Box::new(bad_configs));
    let choices = || Backend::HtFlat.refused_here().or_else(|| Backend::TwoSided.refused_here());
    add("auto_comes_to_one_answer".into(), Box::new(choices), Box::new(auto_comes_to_one_answer));
    add("everything_is_tried".into(), everywhere(), Box::new(everything_is_tried));
    add("the_oracle_rounds_right".into(), everywhere(), Box::new(the_oracle_rounds_right));
    add("the_oracle_quantises_right".into(), everywhere(), Box::new(the_oracle_quantises_right));
    let mut args = args.clone();
    if cuda::is_enabled() {
        graphs::add(&mut add);
        recover::add(&mut add);
        soak::add(&mut add);
        // Ranks of two tests would wait for each other's kernels.
        args.test_threads = Some(1);
    }
    libtest_mimic::run(&args, trials).exit_code()
}
