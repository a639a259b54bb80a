//! Who chooses which experts, on every backend and layout: what two to four ranks receive and get back is compared with
//! the oracle of the tests, received rows exactly and sums bit by bit.
//!
//! The bytes say the placement, each rank's tokens, every id and every weight of up to four steps, which may repeat a
//! routing, overflow, come in halves and be in flight together. Anything but equality is a crash, as is a call that fails.
#![no_main]

use std::time::Duration;

use a2a::abi::types::*;
use a2a_fuzz::bytes::Bytes;
use libfuzzer_sys::fuzz_target;

#[allow(dead_code, reason = "each program uses a part")]
#[path = "../../tests/common/mod.rs"]
mod common;
#[allow(dead_code, reason = "as above")]
#[path = "../../tests/oracle/mod.rs"]
mod oracle;

use common::*;
use oracle::{Float, Input, Layout, Row, Rows};

/// A group that has not finished after this hangs.
const LIMIT: Duration = Duration::from_secs(60);
const MAX_TOKENS: usize = 6;
const MAX_TOPK: usize = 6;
const HIDDEN: usize = 8;
const STEPS: usize = 4;
const SLOTS: usize = 2;

fuzz_target!(|data: &[u8]| {
    let plan = Plan::read(&mut Bytes::new(data));
    threads(plan.world, LIMIT, move |seat| plan.run(seat)).unwrap_or_else(|error| panic!("{error}"));
});

/// A backend and a layout: what they are called, and whether rows stand in the comm's window.
const PAIRS: [(a2a_backend_t, a2a_layout_t); 6] = [
    (A2A_BACKEND_NVLINK_ONE_SIDED, A2A_LAYOUT_RANK_MAJOR),
    (A2A_BACKEND_ALLGATHER_REDUCESCATTER, A2A_LAYOUT_GATHERED),
    (A2A_BACKEND_HIGH_THROUGHPUT, A2A_LAYOUT_FLAT),
    (A2A_BACKEND_HIGH_THROUGHPUT, A2A_LAYOUT_EXPERT_CONTIGUOUS),
    (A2A_BACKEND_LOW_LATENCY, A2A_LAYOUT_EXPERT_PADDED),
    (A2A_BACKEND_NVLINK_TWO_SIDED, A2A_LAYOUT_FLAT),
];

/// One comm and its steps, the same for all ranks.
struct Plan {
    world: usize,
    backend: a2a_backend_t,
    layout_code: a2a_layout_t,
    layout: Layout,
    owner: Vec<usize>,
    table: bool,
    limit: usize,
    drops: bool,
    fifo_rows: i32,
    steps: Vec<Step>,
}

struct Step {
    inputs: oracle::Step,
    wide: bool,
    halves: bool,
    /// Of float32; else bf16.
    wide_sums: bool,
    gives_weights: bool,
    host_counts: bool,
}

fn weight(byte: u8) -> u32 {
    let special =
        [0.0, -0.0, f32::MIN_POSITIVE / 2.0, f32::INFINITY, f32::NEG_INFINITY, f32::NAN, f32::MAX, -1e-38];
    match byte {
        0 => 1.0f32.to_bits(),
        1..248 => (f32::from(byte) * 0.37 - 40.0).to_bits(),
        _ => special[byte as usize - 248].to_bits(),
    }
}

impl Plan {
    fn read(bytes: &mut Bytes) -> Plan {
        let (backend, layout_code) = bytes.pick(&PAIRS);
        let world = bytes.pick(&[2, 2, 3, 4]);
        let experts = 1 + bytes.below(10);
        let table = bytes.half();
        let owner = match table {
            true => (0..experts).map(|_| bytes.below(world)).collect(),
            false => oracle::contiguous(experts, world),
        };
        let alignment = bytes.pick(&[1, 2, 4, 5]);
        let layout = match layout_code {
            A2A_LAYOUT_RANK_MAJOR => Layout::RankMajor,
            A2A_LAYOUT_GATHERED => Layout::Gathered,
            A2A_LAYOUT_FLAT => Layout::Flat,
            A2A_LAYOUT_EXPERT_PADDED => Layout::ExpertPadded,
            _ => Layout::ExpertContiguous { alignment },
        };
        let limit = match layout {
            Layout::RankMajor | Layout::Gathered => 0,
            _ => bytes.pick(&[0, 0, 1, 2, 5, 9]),
        };
        let drops = bytes.half();
        let fifo_rows = if backend == A2A_BACKEND_NVLINK_TWO_SIDED { bytes.pick(&[0, 2, 3]) } else { 0 };
        let mut plan = Plan {
            world,
            backend,
            layout_code,
            layout,
            owner,
            table,
            limit,
            drops,
            fifo_rows,
            steps: Vec::new(),
        };
        while plan.steps.len() < STEPS && (plan.steps.is_empty() || !bytes.is_empty()) {
            let step = plan.step(bytes);
            plan.steps.push(step);
        }
        plan
    }

    fn step(&self, bytes: &mut Bytes) -> Step {
        let style = bytes.byte();
        let number = self.steps.len();
        let last = number.checked_sub(SLOTS).map(|last| &self.steps[last]);
        // What was refused has left nothing to replay.
        let last = last.filter(|last| style & 1 != 0 && (self.drops || last.inputs.overflowing().is_empty()));
        let replayed = last.map(|last| &last.inputs);
        let topk = replayed.map_or_else(|| 1 + bytes.below(MAX_TOPK), |last| last.topk);
        let with_ids = self.layout != Layout::Gathered || style & 6 != 6;
        let gives_weights = with_ids && style & 8 != 0;
        let wide = style & 16 != 0;
        let ranks: Vec<Input> = (0..self.world)
            .map(|rank| {
                let before = replayed.map(|last| &last.ranks[rank]);
                let tokens = before.map_or_else(|| bytes.below(MAX_TOKENS + 1), |before| before.tokens);
                let ids = match before {
                    Some(before) => before.ids.clone(),
                    None => {
                        with_ids.then(|| (0..tokens * topk).map(|_| self.id(bytes.byte(), wide)).collect())
                    }
                };
                let gives = gives_weights && ids.is_some();
                let mut given = || (0..tokens * topk).map(|_| weight(bytes.byte())).collect();
                let weights =
                    if gives { Some(given()) } else { before.and_then(|before| before.weights.clone()) };
                let mut rng = Rng::new(&[number as u64, rank as u64]);
                let rows = Rows { row_bytes: 2 * HIDDEN, bytes: rng.bytes(tokens * 2 * HIDDEN) };
                Input { tokens, ids, weights, rows, ..Default::default() }
            })
            .collect();
        let most = ranks.iter().map(|input| input.tokens).max().unwrap_or(0).max(1);
        let bound = replayed.map_or(if style & 32 != 0 { most } else { MAX_TOKENS }, |last| last.bound);
        let layout = self.layout;
        Step {
            gives_weights: gives_weights && ranks[0].ids.is_some(),
            inputs: oracle::Step {
                owner: self.owner.clone(),
                layout,
                limit: self.limit,
                bound,
                topk,
                reuse: replayed.is_some(),
                ranks,
            },
            wide,
            halves: style & 64 != 0,
            wide_sums: style & 128 != 0,
            host_counts: bytes.half(),
        }
    }

    fn id(&self, byte: u8, wide: bool) -> i64 {
        let experts = self.owner.len() as i64;
        match byte {
            0..240 => i64::from(byte) % experts,
            240..248 => -1,
            248 => experts,
            249 => i64::from(i32::MAX),
            250 => i64::from(i32::MIN),
            251 if wide => 1 << 32,
            252 if wide => i64::MIN,
            253 if wide => -1 - (1 << 32),
            _ => -2,
        }
    }

    fn config(&self, seat: &Seat, owner: &[i32]) -> a2a_config_t {
        let mut config = config(seat);
        (config.backend, config.layout) = (self.backend, self.layout_code);
        config.num_experts = owner.len() as i32;
        if self.table {
            (config.placement, config.expert_owner) = (A2A_PLACEMENT_TABLE, owner.as_ptr());
        }
        (config.max_topk, config.max_tokens) = (MAX_TOPK as i32, MAX_TOKENS as i32);
        (config.max_hidden, config.combine_dtype) = (HIDDEN as i32, A2A_DTYPE_F32);
        config.num_slots = SLOTS as i32;
        if let Layout::ExpertContiguous { alignment } = self.layout {
            config.expert_alignment = alignment as i32;
        }
        config.max_recv_rows = self.limit as i64;
        config.overflow = if self.drops { A2A_OVERFLOW_DROP } else { A2A_OVERFLOW_ERROR };
        config.fifo_rows = self.fifo_rows;
        config
    }

    fn keeps_rows(&self) -> bool {
        self.backend != A2A_BACKEND_NVLINK_TWO_SIDED
    }

    /// One rank's part.
    fn run(&self, seat: &Seat) -> Result<(), String> {
        let owner: Vec<i32> = self.owner.iter().map(|&rank| rank as i32).collect();
        let comm = Comm::create(&self.config(seat, &owner))?;
        let routings = [comm.routing(0)?, comm.routing(1)?];
        // Two steps are in flight together, each on a slot of its own.
        for (pair, steps) in self.steps.chunks(SLOTS).enumerate() {
            let mut live: Vec<Live> = steps
                .iter()
                .zip(&routings)
                .map(|(step, routing)| Live::new(self, step, seat.rank, &comm, routing))
                .collect();
            let here = |at: usize| move |error: String| format!("step {}: {error}", pair * SLOTS + at);
            // Halves are a choice of the whole pair: whoever waits for a peer has sent what that one may wait for.
            let halves = steps[0].halves;
            if halves {
                for (at, step) in live.iter_mut().enumerate() {
                    step.dispatch(A2A_PHASE_SEND).map_err(here(at))?;
                }
            }
            let phase = if halves { A2A_PHASE_RECV } else { A2A_PHASE_BOTH };
            for (at, step) in live.iter_mut().enumerate() {
                step.dispatch(phase).map_err(here(at))?;
            }
            for (at, step) in live.iter_mut().enumerate() {
                step.combine().map_err(here(at))?;
            }
        }
        let record = comm.async_error()?;
        if record.status != A2A_SUCCESS {
            return Err(format!("on record: {}", message(&record)));
        }
        Ok(comm.destroy()?)
    }
}

/// A step under way on one rank.
struct Live<'a> {
    plan: &'a Plan,
    step: &'a Step,
    rank: usize,
    comm: &'a Comm,
    routing: &'a Routing,
    input: DispatchIn,
    output: DispatchOut,
    overflows: bool,
    expected: oracle::Received,
}

impl<'a> Live<'a> {
    fn new(plan: &'a Plan, step: &'a Step, rank: usize, comm: &'a Comm, routing: &'a Routing) -> Live<'a> {
        let mine = &step.inputs.ranks[rank];
        let shape = [mine.tokens, step.inputs.topk];
        let words =
            |words: &Vec<u32>| -> Vec<u8> { words.iter().flat_map(|word| word.to_le_bytes()).collect() };
        let ids = |ids: &Vec<i64>| match step.wide {
            true => Tensor::of(I64, &shape, &ids.iter().flat_map(|id| id.to_le_bytes()).collect::<Vec<u8>>()),
            false => Tensor::of(
                I32,
                &shape,
                &ids.iter().flat_map(|&id| (id as i32).to_le_bytes()).collect::<Vec<u8>>(),
            ),
        };
        let replays = step.inputs.reuse;
        let input = DispatchIn {
            tokens: Some(Tensor::of(BF16, &[mine.tokens, HIDDEN], &mine.rows.bytes)),
            topk_ids: mine.ids.as_ref().filter(|_| !replays).map(ids),
            topk_weights: mine
                .weights
                .as_ref()
                .filter(|_| step.gives_weights)
                .map(|weights| Tensor::of(F32, &shape, &words(weights))),
            max_tokens: step.inputs.bound as i32,
            flags: if replays { A2A_DISPATCH_REUSE } else { 0 }
                | if step.host_counts { A2A_DISPATCH_HOST_COUNTS } else { 0 },
            ..Default::default()
        };
        let rows = step.inputs.capacity(rank);
        let make = |dtype, columns: &[usize]| match plan.keeps_rows() {
            true => Some(Tensor::view()),
            false => Some(Tensor::new(dtype, &[&[rows], columns].concat())),
        };
        let by_expert = plan.layout.by_expert();
        let with_ids = mine.ids.is_some();
        let topk = step.inputs.topk;
        let output = DispatchOut {
            tokens: make(BF16, &[HIDDEN]),
            topk_ids: if with_ids && plan.layout != Layout::ExpertPadded { make(I32, &[topk]) } else { None },
            topk_weights: if with_ids { make(F32, &[topk]) } else { None },
            row_source: make(I32, &[2]),
            expert_counts: with_ids.then(Tensor::view),
            rank_counts: Some(Tensor::view()),
            expert_offsets: by_expert.then(Tensor::view),
            status: Some(Tensor::new(I32, &[4 + plan.world])),
            ..Default::default()
        };
        let overflows = !plan.drops && !step.inputs.overflowing().is_empty();
        // Views are cut to what has come where the host knows it; tensors of our own are as large as can be.
        let expected = step.inputs.dispatch(rank, step.host_counts && plan.keeps_rows());
        Live { plan, step, rank, comm, routing, input, output, overflows, expected }
    }

    fn dispatch(&mut self, phase: a2a_phase_t) -> Result<(), String> {
        let result = self.comm.dispatch(self.routing, phase, &self.input, &mut self.output);
        if phase == A2A_PHASE_SEND {
            return Ok(result?);
        }
        if self.overflows {
            return match result {
                Err(failure) if failure.status == A2A_OVERFLOW => Ok(()),
                other => Err(format!("too many rows: {other:?}")),
            };
        }
        result?;
        let (output, expected) = (&self.output, &self.expected);
        let counted = if self.step.host_counts { expected.num_rows as i64 } else { -1 };
        same("num_rows", &[output.num_rows], &[counted])?;
        let ints = [
            ("topk_ids", &output.topk_ids, &expected.ids),
            ("row_source", &output.row_source, &expected.row_source),
            ("expert_counts", &output.expert_counts, &expected.expert_counts),
            ("rank_counts", &output.rank_counts, &expected.rank_counts),
            ("expert_offsets", &output.expert_offsets, &expected.expert_offsets),
            ("status", &output.status, &expected.status),
        ];
        for (name, tensor, want) in ints {
            if let Some(tensor) = tensor {
                same(name, &tensor.read_i32(), want)?;
            }
        }
        if let Some(weights) = &output.topk_weights {
            let got: Vec<u32> = weights.read().chunks_exact(4).map(|word| Float::F32.load(word, 0)).collect();
            let want = &expected.weights;
            if got.len() != want.len()
                || !got.iter().zip(want).all(|(&got, &want)| alike(Float::F32, got, want))
            {
                return Err(format!("topk_weights: got {got:x?}, expected {want:x?}"));
            }
        }
        let tokens = output.tokens.as_ref().expect("asked for").read();
        let rows = tokens.chunks_exact(2 * HIDDEN);
        same("rows", &[rows.len()], &[expected.rows.len()])?;
        for (at, (got, row)) in rows.zip(&expected.rows).enumerate() {
            if let Some(Row { source, .. }) = row {
                let want = self.step.inputs.ranks[source.rank].rows.row(source.token);
                same(&format!("row {at} ({source:?})"), got, want)?;
            }
        }
        Ok(())
    }

    fn combine(&mut self) -> Result<(), String> {
        if self.overflows {
            return Ok(());
        }
        let inputs = &self.step.inputs;
        let float = if self.step.wide_sums { Float::F32 } else { Float::Bf16 };
        let dtype = if self.step.wide_sums { F32 } else { BF16 };
        let result = |rank: usize, row: Row| -> Vec<u8> {
            let Row { source, expert } = row;
            let by = expert.map_or(rank, |expert| 1000 + expert) as u64;
            let mut rng = Rng::new(&[by, source.rank as u64, source.token as u64]);
            // Any bits: infinities and NaN, too.
            rng.bytes(HIDDEN * float.bytes())
        };
        let row_bytes = HIDDEN * float.bytes();
        let mut bytes = vec![0xff; self.expected.rows.len() * row_bytes];
        for (at, row) in self.expected.rows.iter().enumerate() {
            if let Some(row) = row {
                bytes[at * row_bytes..][..row_bytes].copy_from_slice(&result(self.rank, *row));
            }
        }
        let mut shape = self.output.tokens.as_ref().expect("asked for").shape();
        *shape.last_mut().expect("a dimension") = HIDDEN;
        let rows = Tensor::of(dtype, &shape, &bytes);
        let tokens = inputs.ranks[self.rank].tokens;
        let mut sums = CombineOut {
            tokens: Some(Tensor::new(dtype, &[tokens, HIDDEN])),
            status: Some(Tensor::view()),
            ..Default::default()
        };
        if self.step.halves {
            self.comm.combine(self.routing, A2A_PHASE_SEND, 0, Some(&rows), &mut sums)?;
            self.comm.combine(self.routing, A2A_PHASE_RECV, 0, None, &mut sums)?;
        } else {
            self.comm.combine(self.routing, A2A_PHASE_BOTH, 0, Some(&rows), &mut sums)?;
        }
        let dropped = if self.plan.drops { inputs.dropped() } else { Default::default() };
        let weights = oracle::Weights::Dispatched;
        let want = inputs.combine(self.rank, HIDDEN, (float, float), weights, &dropped, result, None);
        let got = sums.tokens.as_ref().expect("given").read();
        for at in 0..tokens * HIDDEN {
            let (got, want) = (float.load(&got, at), float.load(&want, at));
            if !alike(float, got, want) {
                let (token, column) = (at / HIDDEN, at % HIDDEN);
                return Err(format!(
                    "sum of token {token}, column {column}: got {got:#x}, expected {want:#x}"
                ));
            }
        }
        let status = sums.status.as_ref().expect("asked for").read_i32();
        same("combine status", &status, &inputs.combine_status(self.rank, &dropped))
    }
}

/// Any NaN is NaN.
fn alike(float: Float, got: u32, want: u32) -> bool {
    got == want || float.is_nan(got) && float.is_nan(want)
}

fn same<T: PartialEq + std::fmt::Debug>(name: &str, got: &[T], want: &[T]) -> Result<(), String> {
    if got == want { Ok(()) } else { Err(format!("{name}: got {got:?}, expected {want:?}")) }
}
