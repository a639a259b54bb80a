//! What only a GPU has: captured graphs, work that a call leaves on a stream, kernels that wait while their host does
//! something else, memory that is the device's.
//!
//! Ranks that are threads share the GPU. Whatever takes or frees its memory (comms, routings, graphs) happens where
//! all of them `meet`, for it may wait for kernels, and kernels for peers.

use std::io::BufRead;
use std::thread::sleep;
use std::time::Instant;

use a2a::abi::calls::a2a_activate_ranks;

use super::common::cuda::{self, Beside, Graph};
use super::*;

const REPLAYS: usize = 1000;
/// Steps that follow each other without the host in between.
pub const BATCH: usize = 20;
/// Within this a loss is known, a comm is gone, a stream that waited is free.
const PROMISE: Duration = Duration::from_secs(1);
/// The same across processes, one of which the system must take down first.
const PROMISE_OF_PROCESSES: Duration = Duration::from_secs(2);
/// A call, or a replay on a closed slot, waits for nobody.
const AT_ONCE: Duration = Duration::from_millis(500);
/// A process has a context, a comm and a step behind it after this.
const START: Duration = Duration::from_secs(90);

/// The ranks of a test that would have so many: over NCCL two, since each has a GPU of its own.
fn group(ranks: usize) -> usize {
    if over_nccl() { 2 } else { ranks }
}

type PerBackend = fn(Backend) -> Result<(), String>;

/// Adds the tests to the others.
pub fn add(add: &mut impl FnMut(String, Left, Run)) {
    let each: [(&str, PerBackend); 15] = [
        ("shapes_that_others_refuse", shapes_that_others_refuse),
        ("few_multiprocessors", few_multiprocessors),
        ("a_layer_replayed_by_4", |backend| a_layer_replayed(backend, 4)),
        ("a_layer_replayed_by_8", |backend| a_layer_replayed(backend, 8)),
        ("a_dispatch_replayed_alone", a_dispatch_replayed_alone),
        ("a_layer_behind_two_streams", a_layer_behind_two_streams),
        ("slots_that_cross_on_streams", slots_that_cross_on_streams),
        ("calls_return_before_their_peers_come", calls_return_before_their_peers_come),
        ("destroyed_while_peers_wait", destroyed_while_peers_wait),
        ("aborted_while_the_stream_waits", aborted_while_the_stream_waits),
        ("one_does_not_call", one_does_not_call),
        ("killed_in_its_steps", |backend| killed(backend, false)),
        ("killed_while_peers_wait", |backend| killed(backend, true)),
        ("memory_is_what_was_said", memory_is_what_was_said),
        ("more_than_2_gib", more_than_2_gib),
    ];
    for (name, run) in each {
        for backend in BACKENDS {
            let left = move || {
                let no_rows = || {
                    let needed = name == "more_than_2_gib" && !backend.keeps_rows();
                    needed.then(|| "no rows in a slot for a copy to read".into())
                };
                let not_ours = || {
                    let counts = name == "memory_is_what_was_said" && over_nccl();
                    counts.then(|| "NCCL takes memory of its own".into())
                };
                let small_gpu = || if name == "more_than_2_gib" { too_small() } else { None };
                let heedless = || (name == "few_multiprocessors").then(|| heeds_sms(backend).err()).flatten();
                backend.refused_here().or_else(no_rows).or_else(not_ours).or_else(small_gpu).or_else(heedless)
            };
            let name = format!("gpu/{name}/{}", backend.name());
            add(name, Box::new(left), Box::new(move || run(backend)));
        }
    }
    let over_nccl_alone = || {
        let reason = || "its ranks meet over NCCL (A2A_TEST_TRANSPORT=nccl)".to_string();
        Backend::Gather.refused_here().or_else(|| (!over_nccl()).then(reason))
    };
    let over_nixl_alone = || {
        let reason = || "its ranks come and go over NIXL (A2A_TEST_TRANSPORT=nixl)".to_string();
        Backend::LowLatency.refused_here().or_else(|| (!over_nixl()).then(reason))
    };
    add(
        "gpu/a_graph_outlives_its_members".into(),
        Box::new(over_nixl_alone),
        Box::new(a_graph_outlives_its_members),
    );
    add("gpu/nccl_sums".into(), Box::new(|| Backend::Gather.refused_here()), Box::new(nccl_sums));
    add("gpu/callers_communicator".into(), Box::new(over_nccl_alone), Box::new(callers_communicator));
}

fn within(what: &str, took: Duration, limit: Duration) -> Result<(), String> {
    if took <= limit { Ok(()) } else { Err(format!("{what}: took {took:?}, promised are {limit:?}")) }
}

// -------------------------------------------------------------------------------------------------- a layer

/// What the steps of a layer have in common: a captured dispatch has one T, one hidden size, the same outputs.
#[derive(Clone)]
pub struct Form {
    /// T of each rank.
    pub tokens: Vec<usize>,
    pub experts: usize,
    pub hidden: usize,
    pub topk: usize,
    /// Received rows land in the caller's tensor, and results are staged from there; else both are views.
    pub owns: bool,
    /// Every rank is told all the others' T.
    pub told: bool,
}

impl Form {
    /// A step of the small group: the ranks' T differ, one has the bound's.
    pub fn small(world: usize) -> Form {
        let tokens = (0..world).map(|rank| M - rank % 3 * 5).collect();
        Form { tokens, experts: EXPERTS, hidden: HIDDEN, topk: K, owns: false, told: over_nccl() }
    }

    /// Step `number`, all ranks' inputs: some choose evenly, some one expert, some none, some a bad one.
    pub fn step(&self, backend: Backend, number: usize) -> oracle::Step {
        let (world, number) = (self.tokens.len(), number as u64);
        let favourite = Rng::new(&[seed(), 301, number]).below(self.experts) as i64;
        let of_rank = |rank: usize| {
            let mut rng = Rng::new(&[seed(), 300, world as u64, number, rank as u64]);
            let (tokens, choices) = (self.tokens[rank], self.tokens[rank] * self.topk);
            let ids = (0..choices)
                .map(|_| match number % 4 {
                    0 => rng.below(self.experts) as i64,
                    1 => favourite,
                    2 => rng.below(self.experts + 1) as i64 - 1,
                    _ => rng.below(self.experts + 3) as i64 - 1,
                })
                .collect();
            let mut spread = |float| Values::Spread.bits(float, rng.next());
            let weights = (0..choices).map(|_| spread(Float::F32)).collect();
            let elements = 0..tokens * self.hidden;
            let bytes = elements.flat_map(|_| (spread(Float::Bf16) as u16).to_le_bytes()).collect();
            let rows = Rows { row_bytes: 2 * self.hidden, bytes };
            Input { tokens, ids: Some(ids), weights: Some(weights), rows, ..Default::default() }
        };
        oracle::Step {
            owner: oracle::contiguous(self.experts, world),
            layout: backend.layout(SMALL_ALIGNMENT),
            limit: 0,
            bound: M,
            topk: self.topk,
            reuse: false,
            ranks: (0..world).map(of_rank).collect(),
        }
    }
}

/// A step of the small group.
fn inputs(world: usize, backend: Backend, number: usize) -> oracle::Step {
    Form::small(world).step(backend, number)
}

/// Tensors one behind the other, so that one copy moves them all.
struct Packed {
    whole: Tensor,
    shapes: Vec<(Dtype, Vec<usize>)>,
    places: Vec<std::ops::Range<usize>>,
}

impl Packed {
    fn new(shapes: Vec<(Dtype, Vec<usize>)>) -> Packed {
        let mut end = 0usize;
        let places: Vec<_> = shapes
            .iter()
            .map(|(dtype, shape)| {
                let start = end.next_multiple_of(256);
                end = start + shape.iter().product::<usize>() * dtype.bits as usize / 8;
                start..end
            })
            .collect();
        Packed { whole: Tensor::new(U8, &[end]), shapes, places }
    }
    fn tensor(&self, at: usize) -> Option<Tensor> {
        let (dtype, shape) = &self.shapes[at];
        Some(Tensor::inside(*dtype, shape, self.whole.address() + self.places[at].start))
    }
    fn bytes(&self) -> usize {
        self.whole.row_bytes()
    }
    /// One of the tensors in a copy of them all.
    fn part<'a>(&self, at: usize, copy: &'a [u8]) -> &'a [u8] {
        &copy[self.places[at].clone()]
    }
    fn ints(&self, at: usize, copy: &[u8]) -> Vec<i32> {
        self.part(at, copy).chunks_exact(4).map(|word| i32::from_le_bytes(word.try_into().unwrap())).collect()
    }
}

/// What stands in a layer's inputs, and in what it puts out.
const IN_TOKENS: usize = 0;
const IN_IDS: usize = 1;
const IN_WEIGHTS: usize = 2;
const ROWS: usize = 0;
const ROW_IDS: usize = 1;
const ROW_WEIGHTS: usize = 2;
const ROW_SOURCE: usize = 3;
const EXPERT_COUNTS: usize = 4;
const RANK_COUNTS: usize = 5;
const STATUS: usize = 6;
const SUMS: usize = 7;
const COMBINE_STATUS: usize = 8;

/// One rank's dispatch, experts that give back what they get, and combine, all in tensors that stay where they are.
pub struct Layer<'a> {
    rank: usize,
    form: Form,
    /// The outputs have as many rows as the step.
    exact: bool,
    comm: &'a Comm,
    routing: Routing,
    input: DispatchIn,
    output: DispatchOut,
    results: Option<Tensor>,
    sums: CombineOut,
    inputs: Packed,
    /// With the received rows as the experts saw them.
    outputs: Packed,
    /// Inputs of the steps to come, and outputs of those that were: step by step.
    queue: Tensor,
    logged: Tensor,
}

impl<'a> Layer<'a> {
    fn new(seat: &Seat, backend: Backend, comm: &'a Comm, slot: i32) -> Result<Layer<'a>, String> {
        Layer::of(Form::small(seat.world), seat, backend, comm, slot)
    }

    pub fn of(
        form: Form,
        seat: &Seat,
        backend: Backend,
        comm: &'a Comm,
        slot: i32,
    ) -> Result<Layer<'a>, String> {
        let form = Form { owns: form.owns || !backend.keeps_rows(), ..form };
        let (rank, world) = (seat.rank, seat.world);
        let (tokens, hidden, topk) = (form.tokens[rank], form.hidden, form.topk);
        let exact = form.told && backend == Backend::Gather;
        let rows = form.step(backend, 0).dispatch(rank, exact).rows.len();
        let local = oracle::local_experts(&oracle::contiguous(form.experts, world), rank).len();
        let choices = if backend.by_expert() { vec![rows] } else { vec![rows, topk] };
        let inputs = Packed::new(vec![
            (BF16, vec![tokens, hidden]),
            (I32, vec![tokens, topk]),
            (F32, vec![tokens, topk]),
        ]);
        let outputs = Packed::new(vec![
            (BF16, vec![rows, hidden]),
            (I32, choices.clone()),
            (F32, choices),
            (I32, vec![rows, 2]),
            (I32, vec![local]),
            (I32, vec![world]),
            (I32, vec![4 + world]),
            (F32, vec![tokens, hidden]),
            (I32, vec![4 + world]),
        ]);
        Ok(Layer {
            rank,
            exact,
            comm,
            routing: comm.routing(slot)?,
            input: DispatchIn {
                tokens: inputs.tensor(IN_TOKENS),
                topk_ids: inputs.tensor(IN_IDS),
                topk_weights: inputs.tensor(IN_WEIGHTS),
                rank_tokens: form.told.then(|| form.tokens.iter().map(|&tokens| tokens as i32).collect()),
                ..Default::default()
            },
            output: DispatchOut {
                tokens: if form.owns { outputs.tensor(ROWS) } else { Some(Tensor::view()) },
                topk_ids: outputs.tensor(ROW_IDS).filter(|_| backend.has_ids()),
                topk_weights: outputs.tensor(ROW_WEIGHTS),
                row_source: outputs.tensor(ROW_SOURCE),
                expert_counts: outputs.tensor(EXPERT_COUNTS),
                rank_counts: outputs.tensor(RANK_COUNTS),
                status: outputs.tensor(STATUS),
                ..Default::default()
            },
            results: None,
            sums: CombineOut {
                tokens: outputs.tensor(SUMS),
                status: outputs.tensor(COMBINE_STATUS),
                ..Default::default()
            },
            queue: Tensor::new(U8, &[BATCH, inputs.bytes()]),
            logged: Tensor::new(U8, &[BATCH, outputs.bytes()]),
            inputs,
            outputs,
            form,
        })
    }

    /// This rank's inputs as their tensors hold them.
    fn bytes(&self, step: &oracle::Step) -> Vec<u8> {
        let Input { ids, weights, rows, .. } = &step.ranks[self.rank];
        let ids: Vec<u8> = ids.iter().flatten().flat_map(|&id| (id as i32).to_le_bytes()).collect();
        let weights: Vec<u8> = weights.iter().flatten().flat_map(|word| word.to_le_bytes()).collect();
        let mut bytes = vec![0; self.inputs.bytes()];
        for (at, part) in [(IN_TOKENS, &rows.bytes), (IN_IDS, &ids), (IN_WEIGHTS, &weights)] {
            bytes[self.inputs.places[at].clone()].copy_from_slice(part);
        }
        bytes
    }

    /// Makes this step's inputs the next dispatch's.
    pub fn put(&mut self, step: &oracle::Step) {
        let bytes = self.bytes(step);
        self.inputs.whole.write(&bytes);
    }

    /// As `put`, for up to `BATCH` steps, each of which `feed` then takes its turn.
    fn enqueue(&mut self, steps: &[oracle::Step]) {
        steps.iter().enumerate().for_each(|(at, step)| self.enqueue_at(at, step));
    }
    pub fn enqueue_at(&mut self, at: usize, step: &oracle::Step) {
        let bytes = self.bytes(step);
        self.queue.write_row(at, &bytes);
    }
    /// On the stream. Nothing is left in the outputs of the step before.
    pub fn feed(&self, at: usize) -> Result<(), String> {
        let bytes = self.inputs.bytes();
        cuda::start_fill(self.outputs.whole.address(), self.outputs.bytes(), 0xEE)?;
        cuda::copy(self.inputs.whole.address(), self.queue.address() + at * bytes, bytes)
    }
    /// On the stream.
    pub fn log(&self, at: usize) -> Result<(), String> {
        let bytes = self.outputs.bytes();
        cuda::copy(self.logged.address() + at * bytes, self.outputs.whole.address(), bytes)
    }
    /// Of a step that was logged.
    pub fn check_logged(&self, at: usize, step: &oracle::Step) -> Result<(), String> {
        self.check_outputs(step, &self.logged.read_row(at))
    }

    pub fn dispatch(&mut self, phase: a2a_phase_t) -> Result<(), Failure> {
        self.comm.dispatch(&self.routing, phase, &self.input, &mut self.output)
    }
    pub fn combine(&mut self, phase: a2a_phase_t) -> Result<(), Failure> {
        self.comm.combine(&self.routing, phase, 0, self.results.as_ref(), &mut self.sums)
    }
    /// On the stream, between the two.
    pub fn experts(&mut self) -> Result<(), String> {
        if self.form.owns {
            self.results = self.outputs.tensor(ROWS);
            return Ok(());
        }
        let received = self.output.tokens.as_ref().expect("asked for");
        let results = self.comm.combine_buffer(&self.routing, BF16)?;
        let kept = self.outputs.places[ROWS].clone();
        for view in [received, &results] {
            if !is_compact(view) || view.shape().iter().product::<usize>() * 2 != kept.len() {
                return Err(format!("a view of {:?} with strides {:?}", view.shape(), view.strides()));
            }
        }
        cuda::copy(self.outputs.whole.address() + kept.start, received.address(), kept.len())?;
        cuda::copy(results.address(), received.address(), kept.len())?;
        self.results = Some(results);
        Ok(())
    }
    pub fn whole(&mut self) -> Result<(), String> {
        self.dispatch(A2A_PHASE_BOTH)?;
        self.experts()?;
        Ok(self.combine(A2A_PHASE_BOTH)?)
    }
    pub fn halves(&mut self) -> Result<(), String> {
        self.dispatch(A2A_PHASE_SEND)?;
        self.dispatch(A2A_PHASE_RECV)?;
        self.experts()?;
        self.combine(A2A_PHASE_SEND)?;
        Ok(self.combine(A2A_PHASE_RECV)?)
    }
    pub fn ordinary(&mut self, step: &oracle::Step) -> Result<(), String> {
        self.put(step);
        self.whole()?;
        self.check(step)
    }

    /// What the last step left in the tensors.
    pub fn check(&self, step: &oracle::Step) -> Result<(), String> {
        self.check_outputs(step, &self.outputs.whole.read())
    }
    /// `got`: a copy of the outputs.
    fn check_outputs(&self, step: &oracle::Step, got: &[u8]) -> Result<(), String> {
        let want = step.dispatch(self.rank, self.exact);
        let ints = |at| self.outputs.ints(at, got);
        expect("dispatch status", ints(STATUS), want.status)?;
        expect("rank_counts", ints(RANK_COUNTS), want.rank_counts)?;
        expect("expert_counts", ints(EXPERT_COUNTS), want.expert_counts)?;
        expect("row_source", ints(ROW_SOURCE), want.row_source)?;
        if self.output.topk_ids.is_some() {
            expect("topk_ids", ints(ROW_IDS), want.ids)?;
        }
        let weights: Vec<u8> = want.weights.iter().flat_map(|word| word.to_le_bytes()).collect();
        expect("topk_weights", self.outputs.part(ROW_WEIGHTS, got), &weights[..])?;
        let rows = self.outputs.part(ROWS, got).chunks_exact(2 * self.form.hidden);
        for (at, (row, got)) in want.rows.iter().zip(rows).enumerate() {
            let Some(Row { source, .. }) = row else { continue };
            let want = step.ranks[source.rank].rows.row(source.token);
            if got != want {
                expect(format!("row {at} ({source:?})"), got, want)?;
            }
        }
        self.check_sums(step, self.outputs.part(SUMS, got))?;
        expect("combine status", ints(COMBINE_STATUS), step.combine_status(self.rank, &Dropped::new()))
    }
    fn check_sums(&self, step: &oracle::Step, got: &[u8]) -> Result<(), String> {
        let hidden = self.form.hidden;
        let result = |_: usize, row: Row| step.ranks[row.source.rank].rows.row(row.source.token).to_vec();
        let floats = (Float::Bf16, Float::F32);
        let weights = oracle::Weights::Dispatched;
        let want = step.combine(self.rank, hidden, floats, weights, &Dropped::new(), result, None);
        match (0..want.len()).find(|&at| got[at] != want[at]) {
            None => Ok(()),
            Some(at) => {
                let at = at / 4;
                let (got, want) = (Float::F32.load(got, at), Float::F32.load(&want, at));
                let (token, column) = (at / hidden, at % hidden);
                Err(format!("token {token} column {column}: the sum is {got:#x}, expected {want:#x}"))
            }
        }
    }
}

fn is_compact(tensor: &Tensor) -> bool {
    let (shape, strides) = (tensor.shape(), tensor.strides());
    (1..shape.len()).all(|dim| strides[dim - 1] == strides[dim] * shape[dim]) && strides.last() == Some(&1)
}

pub fn nothing_on_record(comm: &Comm) -> Result<(), String> {
    let record = comm.async_error()?;
    expect(format!("a record ({})", message(&record)), record.status, A2A_SUCCESS)
}

// ---------------------------------------------------------------------------------------------------- graphs

/// A graph of dispatch, experts and combine is replayed with other tokens and another routing each time, `BATCH`
/// times without the host in between.
fn a_layer_replayed(backend: Backend, world: usize) -> Result<(), String> {
    let world = group(world);
    threads(world, GPU_LIMIT, move |seat| {
        let comm = Comm::create(&small(seat, backend))?;
        let mut layer = Layer::new(seat, backend, &comm, 0)?;
        meet(seat)?;
        layer.ordinary(&inputs(world, backend, 0)).map_err(|error| format!("an ordinary step: {error}"))?;
        meet(seat)?;
        let graph = Graph::capture(|| layer.whole())?;
        meet(seat)?;
        for batch in 0..REPLAYS / BATCH {
            let number = |at: usize| 1 + batch * BATCH + at;
            let steps: Vec<_> = (0..BATCH).map(|at| inputs(world, backend, number(at))).collect();
            layer.enqueue(&steps);
            for at in 0..BATCH {
                layer.feed(at)?;
                graph.launch(1)?;
                layer.log(at)?;
            }
            cuda::synchronize()?;
            nothing_on_record(&comm)?;
            for (at, step) in steps.iter().enumerate() {
                layer.check_logged(at, step).map_err(|error| format!("replay {}: {error}", number(at)))?;
            }
        }
        // The ordinary calls go on where the graph has stopped.
        layer.ordinary(&inputs(world, backend, 2)).map_err(|error| format!("after the replays: {error}"))?;
        meet(seat)
    })
}

/// What was captured among all goes on among some of them, and among all again. Ids of the experts of those that take no part count
/// as none, and are counted.
fn a_graph_outlives_its_members() -> Result<(), String> {
    let (world, backend) = (4, Backend::LowLatency);
    let phases: [&[i32]; 5] = [&[0, 1, 2, 3], &[0, 1, 2], &[0, 1, 2, 3], &[1, 3], &[0, 1, 2, 3]];
    threads(world, GPU_LIMIT, move |seat| {
        let comm = Comm::create(&small(seat, backend))?;
        let mut layer = Layer::new(seat, backend, &comm, 0)?;
        meet(seat)?;
        layer.ordinary(&inputs(world, backend, 0)).map_err(|error| format!("an ordinary step: {error}"))?;
        meet(seat)?;
        let graph = Graph::capture(|| layer.whole())?;
        for (phase, ranks) in phases.iter().enumerate() {
            let takes_part = |rank: usize| ranks.contains(&(rank as i32));
            meet(seat)?;
            if takes_part(seat.rank) {
                let mut generation = 0;
                // SAFETY: a list of so many int32, and a valid out-pointer.
                check(unsafe {
                    a2a_activate_ranks(
                        comm.handle(),
                        ranks.as_ptr(),
                        ranks.len() as i32,
                        20_000,
                        &mut generation,
                    )
                })?;
                expect("a generation", generation, phase as u64 + 2)?;
            }
            meet(seat)?;
            for at in (0..BATCH).filter(|_| takes_part(seat.rank)) {
                let number = 9000 + phase * BATCH + at;
                let given = inputs(world, backend, number);
                layer.put(&given);
                graph.launch(1)?;
                cuda::synchronize()?;
                nothing_on_record(&comm)?;
                let mut meant = given;
                let owner = meant.owner.clone();
                let absent = |id: &i64| owner.get(*id as usize).is_some_and(|owner| !takes_part(*owner));
                for input in &mut meant.ranks {
                    let ids = input.ids.as_mut().expect("given");
                    ids.iter_mut().filter(|id| absent(id)).for_each(|id| *id = EXPERTS as i64);
                }
                for rank in (0..world).filter(|rank| !takes_part(*rank)) {
                    let rows = Rows { row_bytes: meant.ranks[rank].rows.row_bytes, bytes: Vec::new() };
                    let (ids, weights) = (Some(Vec::new()), Some(Vec::new()));
                    meant.ranks[rank] = Input { tokens: 0, ids, weights, rows, ..Default::default() };
                }
                layer.check(&meant).map_err(|error| format!("among {ranks:?}, replay {number}: {error}"))?;
            }
        }
        meet(seat)
    })
}

/// Both calls are captured where two streams have just joined, one of which ends in kernels of the library's own.
fn a_layer_behind_two_streams(backend: Backend) -> Result<(), String> {
    let world = group(2);
    threads(world, GPU_LIMIT, move |seat| {
        let comm = Comm::create(&small(seat, backend))?;
        let mut layer = Layer::new(seat, backend, &comm, 0)?;
        let other = Tensor::new(I32, &[64]);
        let beside = Beside::new()?;
        let joins = || beside.join(other.address(), 256);
        meet(seat)?;
        layer.ordinary(&inputs(world, backend, 0)).map_err(|error| format!("an ordinary step: {error}"))?;
        meet(seat)?;
        let graph = Graph::capture(|| {
            for _ in 0..2 {
                layer.dispatch(A2A_PHASE_BOTH)?;
                joins()?;
                layer.experts()?;
                joins()?;
                layer.combine(A2A_PHASE_BOTH)?;
                joins()?;
            }
            Ok(())
        })?;
        meet(seat)?;
        for number in 1..20 {
            let step = inputs(world, backend, number);
            layer.put(&step);
            graph.launch(1)?;
            layer.check(&step).map_err(|error| format!("replay {number}: {error}"))?;
        }
        nothing_on_record(&comm)?;
        meet(seat)
    })
}

/// A graph of a dispatch alone, replayed once, twice and ten times, each time another; then a combine that is no graph's.
fn a_dispatch_replayed_alone(backend: Backend) -> Result<(), String> {
    threads(group(4), GPU_LIMIT, move |seat| {
        let comm = Comm::create(&small(seat, backend))?;
        let mut layer = Layer::new(seat, backend, &comm, 0)?;
        meet(seat)?;
        layer.ordinary(&inputs(seat.world, backend, 0))?;
        meet(seat)?;
        let graph = Graph::capture(|| Ok(layer.dispatch(A2A_PHASE_BOTH)?))?;
        meet(seat)?;
        let mut number = 2000;
        for times in [2, 10, 1, 3] {
            let steps: Vec<_> = (0..times).map(|at| inputs(seat.world, backend, number + at)).collect();
            number += times;
            layer.enqueue(&steps);
            for at in 0..times {
                layer.feed(at)?;
                graph.launch(1)?;
            }
            let mut finish = || {
                layer.experts()?;
                layer.combine(A2A_PHASE_BOTH)?;
                layer.check(&steps[times - 1])
            };
            finish().map_err(|error| format!("a dispatch replayed {times} times: {error}"))?;
        }
        nothing_on_record(&comm)?;
        meet(seat)
    })
}

/// All send on both slots; odd ranks complete them in the opposite order of even ones. The host waits for nothing until
/// the end, or, every other time, until all have sent.
fn slots_that_cross_on_streams(backend: Backend) -> Result<(), String> {
    threads(group(4), GPU_LIMIT, move |seat| {
        let comm = Comm::create(&small(seat, backend))?;
        let mut layers = [Layer::new(seat, backend, &comm, 0)?, Layer::new(seat, backend, &comm, 1)?];
        meet(seat)?;
        for round in 0..20 {
            let steps = [0, 1].map(|slot| inputs(seat.world, backend, 3000 + 2 * round + slot));
            layers.iter_mut().zip(&steps).for_each(|(layer, step)| layer.put(step));
            let same = backend.keeps_order() || seat.rank.is_multiple_of(2);
            let order = if same { [0, 1] } else { [1, 0] };
            cuda::deferred(|| -> Result<(), String> {
                layers.iter_mut().try_for_each(|layer| layer.dispatch(A2A_PHASE_SEND))?;
                if round % 2 == 1 {
                    cuda::synchronize()?;
                    meet(seat)?;
                }
                for slot in order {
                    layers[slot].dispatch(A2A_PHASE_RECV)?;
                }
                for layer in &mut layers {
                    layer.experts()?;
                    layer.combine(A2A_PHASE_SEND)?;
                }
                for slot in order.into_iter().rev() {
                    layers[slot].combine(A2A_PHASE_RECV)?;
                }
                Ok(())
            })?;
            cuda::synchronize()?;
            nothing_on_record(&comm)?;
            for (slot, (layer, step)) in layers.iter().zip(&steps).enumerate() {
                layer.check(step).map_err(|error| format!("round {round}, slot {slot}: {error}"))?;
            }
        }
        meet(seat)
    })
}

// ---------------------------------------------------------------------------------------- kernels that wait

/// Both halves of a dispatch are called before any peer calls; what they need comes later.
fn calls_return_before_their_peers_come(backend: Backend) -> Result<(), String> {
    threads(group(3), LIMIT, move |seat| {
        let comm = Comm::create(&small(seat, backend))?;
        let mut layer = Layer::new(seat, backend, &comm, 0)?;
        let step = inputs(seat.world, backend, 4000);
        meet(seat)?;
        layer.ordinary(&step)?;
        layer.put(&step);
        meet(seat)?;
        let begun = Instant::now();
        if seat.rank == 0 {
            cuda::deferred(|| layer.whole())?;
            within("calls", begun.elapsed(), AT_ONCE)?;
            expect("a stream that waits", cuda::is_idle(), false)?;
        }
        meet(seat)?;
        if seat.rank != 0 {
            layer.whole()?;
        }
        cuda::synchronize()?;
        nothing_on_record(&comm)?;
        layer.check(&step)?;
        meet(seat)
    })
}

/// Hidden sizes, top-k and numbers of ranks that DeepEP has no kernel for, different T on every rank,
/// by whole calls and by halves.
fn shapes_that_others_refuse(backend: Backend) -> Result<(), String> {
    const SHAPES: [(usize, usize); 4] = [(2880, 9), (3584, 16), (6144, 10), (7168, 22)];
    // Of all ranks, with what is logged.
    const TENSORS: usize = 5 << 30;
    let worlds: &[usize] = if over_nccl() { &[2] } else { &[3, 5, 6, 7] };
    for &world in worlds {
        let form = move |(hidden, topk): (usize, usize)| {
            let tokens = (0..world).map(|rank| M - (rank * 3 + topk) % M).collect();
            Form { tokens, experts: 3 * world + 1, hidden, topk, owns: topk % 2 == 1, told: over_nccl() }
        };
        threads(world, GPU_LIMIT, move |seat| {
            let mut config = small(seat, backend);
            config.num_experts = 3 * world as i32 + 1;
            config.max_hidden = SHAPES.map(|shape| shape.0).into_iter().max().expect("shapes") as i32;
            config.max_topk = SHAPES.map(|shape| shape.1).into_iter().max().expect("shapes") as i32;
            if seat.rank == 0 || cuda::is_by_rank() {
                cuda::grow(TENSORS)?;
            }
            meet(seat)?;
            let comm = Comm::create(&config)?;
            let mut layers = Vec::with_capacity(SHAPES.len());
            for shape in SHAPES {
                layers.push(Layer::of(form(shape), seat, backend, &comm, 0)?);
            }
            meet(seat)?;
            for (layer, shape) in layers.iter_mut().zip(SHAPES) {
                for number in 0..4 {
                    let step = form(shape).step(backend, number);
                    layer.put(&step);
                    // Ranks do not do alike.
                    let done = if (number + seat.rank) % 3 == 0 { layer.halves() } else { layer.whole() };
                    done.and_then(|()| layer.check(&step))
                        .map_err(|error| format!("{world} ranks, {shape:?}, step {number}: {error}"))?;
                }
            }
            meet(seat)
        })?;
    }
    Ok(())
}

/// If a backend takes a bound on multiprocessors; else its refusal.
fn heeds_sms(backend: Backend) -> Result<(), String> {
    let seat = Seat { rank: 0, world: 1, id: GroupId::new(), args: Vec::new() };
    let mut config = small(&seat, backend);
    config.max_sms = 3;
    query_memory(&config).map(|_| ()).map_err(|refusal| refusal.to_string())
}

/// The comm's bound on multiprocessors, and a lower one of some calls. A jitter build counts those that kernels are on.
fn few_multiprocessors(backend: Backend) -> Result<(), String> {
    // One block of LOW_LATENCY's keeps, and another moves; of NVLINK_TWO_SIDED's one more helps other slots.
    let fewest = match backend {
        Backend::LowLatency => 2,
        Backend::TwoSided => 3,
        _ => 1,
    };
    for (world, sms) in [(group(4), 3), (group(3), fewest)] {
        for owns in [false, true] {
            let form = Form { owns, ..Form::small(world) };
            threads(world, GPU_LIMIT, move |seat| {
                let mut config = small(seat, backend);
                config.max_sms = sms;
                let comm = Comm::create(&config)?;
                expect("max_sms of a2a_get_info", comm.info()?.max_sms, sms)?;
                let mut layer = Layer::of(form.clone(), seat, backend, &comm, 0)?;
                meet(seat)?;
                for number in 0..8 {
                    let step = form.step(backend, number);
                    layer.put(&step);
                    let done = if (number + seat.rank) % 3 == 0 { layer.halves() } else { layer.whole() };
                    done.and_then(|()| layer.check(&step))
                        .map_err(|error| format!("{world} ranks, {sms} SMs, step {number}: {error}"))?;
                }
                let record = comm.async_error()?;
                expect("the status of a2a_get_async_error", record.status, A2A_SUCCESS)
                    .map_err(|error| format!("{error}: {}", message(&record)))?;
                meet(seat)
            })?;
        }
    }
    Ok(())
}

/// The record, and the sentence that names a rank.
fn recorded(comm: &Comm, status: a2a_status_t, word: &str) -> Result<(), String> {
    let record = comm.async_error()?;
    let text = sentence(&record);
    if record.status == status && text.contains(word) {
        return Ok(());
    }
    let (got, want) = (status_name(record.status), status_name(status));
    Err(format!("the record is {got} ({text}), expected {want} with {word:?}"))
}

/// The last dispatch's out.status is void and marks these ranks.
fn voided(layer: &Layer, lost: &[usize]) -> Result<(), String> {
    let got = layer.output.status.as_ref().expect("given").read_i32();
    expect("the void bit of out.status", got[0] & A2A_STEP_VOID, A2A_STEP_VOID)?;
    let marked: Vec<usize> = (0..got.len() - 4).filter(|rank| got[4 + rank] != 0).collect();
    expect(format!("ranks marked in out.status {got:?}"), &marked[..], lost)
}

/// Rank 1 leaves while the others' kernels wait for its rows.
fn destroyed_while_peers_wait(backend: Backend) -> Result<(), String> {
    threads(group(3), LIMIT, move |seat| {
        let comm = Comm::create(&small(seat, backend))?;
        let mut layer = Layer::new(seat, backend, &comm, 0)?;
        meet(seat)?;
        layer.ordinary(&inputs(seat.world, backend, 5000))?;
        if seat.rank != 1 {
            cuda::deferred(|| layer.dispatch(A2A_PHASE_BOTH))?;
        }
        meet(seat)?;
        let begun = Instant::now();
        if seat.rank == 1 {
            // Their kernels wait by now; if not, the outcome is the same.
            sleep(Duration::from_millis(50));
            let begun = Instant::now();
            // The routing is destroyed after it, and the handle is stale by then.
            // SAFETY: a handle of ours.
            check(unsafe { a2a_destroy(comm.handle()) })?;
            within("a2a_destroy", begun.elapsed(), PROMISE)?;
        } else {
            cuda::synchronize()?;
            within("the wait for a rank that left", begun.elapsed(), PROMISE)?;
            recorded(&comm, A2A_PEER_LOST, "rank 1")?;
            voided(&layer, &[1])?;
            refused("the next call", layer.dispatch(A2A_PHASE_BOTH), A2A_PEER_LOST, &["rank 1"])?;
        }
        meet(seat)
    })
}

/// Another thread aborts rank 0's comm while its stream waits for the others.
fn aborted_while_the_stream_waits(backend: Backend) -> Result<(), String> {
    threads(group(3), LIMIT, move |seat| {
        let comm = Comm::create(&small(seat, backend))?;
        let mut layer = Layer::new(seat, backend, &comm, 0)?;
        meet(seat)?;
        layer.ordinary(&inputs(seat.world, backend, 6000))?;
        meet(seat)?;
        if seat.rank == 0 {
            cuda::deferred(|| layer.dispatch(A2A_PHASE_BOTH))?;
            sleep(Duration::from_millis(50));
            expect("a stream that waits", cuda::is_idle(), false)?;
            let begun = Instant::now();
            std::thread::scope(|scope| scope.spawn(|| comm.abort()).join().expect("a thread"))?;
            within("a2a_abort", begun.elapsed(), AT_ONCE)?;
            cuda::synchronize()?;
            within("the stream of an aborted comm", begun.elapsed(), PROMISE)?;
            recorded(&comm, A2A_ABORTED, "rank 0")?;
            refused("the next call", layer.dispatch(A2A_PHASE_BOTH), A2A_ABORTED, &[])?;
        }
        meet(seat)?;
        if seat.rank != 0 {
            let begun = Instant::now();
            // Its rows had come before it aborted, unless it waited for counts; its results will not. Over NCCL either may be.
            let mut last = layer.dispatch(A2A_PHASE_BOTH);
            let is_over = backend.waits_for_counts() || over_nccl() && last.is_err();
            if !is_over {
                last?;
                layer.experts()?;
                last = layer.combine(A2A_PHASE_BOTH);
            }
            refused("a peer's call", last, A2A_PEER_LOST, &["rank 0"])?;
            within("a peer's calls", begun.elapsed(), PROMISE)?;
        }
        meet(seat)
    })
}

/// The others' graph runs into its deadline because the last rank does not come. What follows on the closed slot costs no
/// second deadline.
fn one_does_not_call(backend: Backend) -> Result<(), String> {
    const DEADLINE: Duration = Duration::from_secs(1);
    const LAYERS: usize = 60;
    let (world, absent) = (group(4), group(4) - 1);
    let name = format!("rank {absent}");
    threads(world, LIMIT, move |seat| {
        let mut config = small(seat, backend);
        config.timeout_ms = DEADLINE.as_millis() as i64;
        let comm = Comm::create(&config)?;
        let mut layer = Layer::new(seat, backend, &comm, 0)?;
        meet(seat)?;
        layer.ordinary(&inputs(seat.world, backend, 7000))?;
        meet(seat)?;
        let graph = Graph::capture(|| layer.whole())?;
        meet(seat)?;
        if seat.rank != absent {
            let begun = Instant::now();
            graph.launch(1)?;
            within("a launch", begun.elapsed(), AT_ONCE)?;
            cuda::synchronize()?;
            let took = begun.elapsed();
            within("a deadline of 1 s", took, DEADLINE + PROMISE)?;
            if took < DEADLINE {
                return Err(format!("gave up after {took:?}"));
            }
            voided(&layer, &[absent])?;
            recorded(&comm, A2A_TIMEOUT, &name)?;

            // Its communicator is gone, and what was captured with it.
            if !over_nccl() {
                let begun = Instant::now();
                graph.launch(LAYERS)?;
                cuda::synchronize()?;
                within("replays on a closed slot", begun.elapsed(), AT_ONCE)?;
                voided(&layer, &[absent])?;
            }
            let begun = Instant::now();
            refused("a call on a closed slot", layer.dispatch(A2A_PHASE_BOTH), A2A_TIMEOUT, &[&name])?;
            within("a call on a closed slot", begun.elapsed(), AT_ONCE)?;
        }
        meet(seat)?;
        if seat.rank == absent {
            let begun = Instant::now();
            // The others' rows had come before they gave up, unless they waited for counts: its dispatch is whole. Their
            // results never will be.
            let mut last = layer.dispatch(A2A_PHASE_BOTH);
            let is_over = backend.waits_for_counts() || over_nccl() && last.is_err();
            if !is_over {
                last?;
                layer.experts()?;
                last = layer.combine(A2A_PHASE_BOTH);
            }
            match last {
                Err(Failure { status: A2A_TIMEOUT | A2A_PEER_LOST, .. }) => {}
                other => return Err(format!("the late rank got {other:?}")),
            }
            // What ended a collective is not said to those that come to it later: they have a deadline of their own.
            let limit = if over_nccl() { DEADLINE + PROMISE } else { PROMISE };
            within("the late rank's calls", begun.elapsed(), limit)?;
        }
        meet(seat)
    })
}

// ----------------------------------------------------------------------------------------------------- NCCL

/// A2A_COMBINE_NCCL_SUM, of numbers whose sum is the same in any order. In windows it changes nothing.
fn nccl_sums() -> Result<(), String> {
    threads(group(2), LIMIT, move |seat| {
        let comm = Comm::create(&small(seat, Backend::Gather))?;
        let routing = comm.routing(0)?;
        let value = |rank: usize, row: usize| ((rank + 1) * (1 + row % 5)) as f32;
        let floats = [(BF16, Float::Bf16), (F16, Float::F16), (F32, Float::F32)];
        for (equal, accumulates) in [(true, false), (false, false), (true, true), (false, true)] {
            let tokens: Vec<usize> =
                (0..seat.world).map(|rank| if equal { M } else { M - 5 * rank }).collect();
            let first: usize = tokens[..seat.rank].iter().sum();
            let (mine, total) = (tokens[seat.rank], tokens.iter().sum::<usize>());
            let input = DispatchIn {
                tokens: Some(Tensor::new(BF16, &[mine, HIDDEN])),
                rank_tokens: Some(tokens.iter().map(|&tokens| tokens as i32).collect()),
                ..Default::default()
            };
            for ((from, wire), (to, out)) in floats.into_iter().flat_map(|from| floats.map(|to| (from, to))) {
                let bits =
                    |float: Float, value: f32| float.round(value).to_le_bytes()[..float.bytes()].to_vec();
                let rows = |float, value: &dyn Fn(usize) -> f32, range: std::ops::Range<usize>| {
                    range.flat_map(|row| bits(float, value(row)).repeat(HIDDEN)).collect::<Vec<u8>>()
                };
                let sum = |row: usize| (0..seat.world).map(|rank| value(rank, row)).sum::<f32>();
                let results = rows(wire, &|row| value(seat.rank, row), 0..total);
                let before = rows(out, &|_| 3.0, 0..mine);
                let added = if accumulates { 3.0 } else { 0.0 };
                let want = rows(out, &|row| sum(row) + added, first..first + mine);
                comm.dispatch(&routing, A2A_PHASE_BOTH, &input, &mut DispatchOut::default())?;
                let results = Tensor::of(from, &[total, HIDDEN], &results);
                let mut sums = CombineOut {
                    tokens: Some(Tensor::of(to, &[mine, HIDDEN], &before)),
                    ..Default::default()
                };
                let flags = A2A_COMBINE_NCCL_SUM | if accumulates { A2A_COMBINE_ACCUMULATE } else { 0 };
                comm.combine(&routing, A2A_PHASE_BOTH, flags, Some(&results), &mut sums)?;
                let got = sums.tokens.as_ref().expect("given").read();
                if got != want {
                    return Err(format!(
                        "{wire:?} to {out:?}, equal {equal}, accumulated {accumulates}: other sums"
                    ));
                }
            }
        }
        nothing_on_record(&comm)?;
        meet(seat)
    })
}

/// Comms are made of communicators that are split off the caller's, which ranks also meet over if they have no id; it is
/// the caller's afterwards, and refused if it is not of these ranks.
fn callers_communicator() -> Result<(), String> {
    use nccl_sys::{Nccl, ncclSuccess, ncclUniqueId};
    static ID: std::sync::Mutex<ncclUniqueId> = std::sync::Mutex::new(ncclUniqueId { internal: [0; 128] });
    threads(group(2), LIMIT, move |seat| {
        let nccl = Nccl::get().map_err(|why| why.to_string())?;
        let said = |what: &str, result: i32| match result {
            result if result == ncclSuccess => Ok(()),
            result => Err(format!("{what} returned {result}")),
        };
        if seat.rank == 0 {
            let mut id = ID.lock().unwrap();
            // SAFETY: a valid out-pointer.
            said("ncclGetUniqueId", unsafe { (nccl.ncclGetUniqueId)(&mut *id) })?;
        }
        meet(seat)?;
        let id = *ID.lock().unwrap();
        let mut theirs = std::ptr::null_mut();
        let (world, rank, config) = (seat.world as i32, seat.rank as i32, &mut Default::default());
        // SAFETY: the same id on all ranks, which all call this now.
        let made = unsafe { (nccl.ncclCommInitRankConfig)(&mut theirs, world, id, rank, config) };
        said("ncclCommInitRankConfig", made)?;

        let mut config = small(seat, Backend::Gather);
        config.nccl_comm = theirs.cast();
        config.transport = A2A_TRANSPORT_AUTO;
        for named in [true, false] {
            if !named {
                config.unique_id.bytes = [0; 128];
            }
            let comm = Comm::create(&config)?;
            let routing = comm.routing(0)?;
            for _ in 0..3 {
                small_step(seat, Backend::Gather, &comm, &routing)?;
            }
            meet(seat)?;
        }
        let mut other = config;
        other.num_ranks += 1;
        other.num_experts = other.num_experts.max(other.num_ranks);
        let world = format!("num_ranks is {}, and {} in nccl_comm", other.num_ranks, seat.world);
        refused(
            "another number of ranks",
            Comm::create(&other).map(|_| ()),
            A2A_INVALID_ARGUMENT,
            &[&world],
        )?;
        meet(seat)?;
        let mut count = 0;
        // SAFETY: the communicator is still the caller's, and ends here.
        unsafe {
            said("ncclCommCount", (nccl.ncclCommCount)(theirs, &mut count))?;
            said("ncclCommFinalize", (nccl.ncclCommFinalize)(theirs))?;
            said("ncclCommDestroy", (nccl.ncclCommDestroy)(theirs))?;
        }
        expect("ranks of the caller's communicator", count, seat.world as i32)
    })
}

// ------------------------------------------------------------------------------------------------ processes

/// A rank that steps until it loses a peer, says so, and goes on in the group that it is then told.
pub const OBEY: (&str, Job) = ("obey on a gpu", obey);

fn obey(seat: &Seat) -> Result<(), String> {
    let backend = Backend::named(&seat.args[0]);
    let mut orders = std::io::stdin().lock().lines().map_while(Result::ok);
    let comm = Comm::create(&small(seat, backend))?;
    let routing = comm.routing(0)?;
    small_step(seat, backend, &comm, &routing)?;
    println!("ready");
    if seat.args[1] == seat.rank.to_string() {
        // It will be killed before it is told anything.
        orders.next();
    }
    let failure = loop {
        if let Err(failure) = unchecked_step(seat, backend, &comm, &routing) {
            break failure;
        }
    };
    println!("{} {}", failure.status, failure.text);
    drop((routing, comm));

    let order = orders.next().ok_or("no other group")?;
    let mut words = order.split(' ');
    let mut number = || words.next().and_then(|word| word.parse().ok()).ok_or(format!("no order: {order:?}"));
    let (rank, world) = (number()?, number()?);
    let id = GroupId::from_hex(words.next().ok_or("no id")?);
    let seat = Seat { rank, world, id, args: Vec::new() };
    let comm = Comm::create(&small(&seat, backend))?;
    let routing = comm.routing(0)?;
    for _ in 0..3 {
        small_step(&seat, backend, &comm, &routing)?;
    }
    println!("fine");
    Ok(())
}

/// Where the results of a small step stand: in the slot, if it keeps rows.
fn results_of(seat: &Seat, backend: Backend, comm: &Comm, routing: &Routing) -> Result<Tensor, Failure> {
    match backend.keeps_rows() {
        true => comm.combine_buffer(routing, F32),
        false => Ok(Tensor::new(F32, &[capacity(seat, backend), super::HIDDEN])),
    }
}

fn unchecked_step(seat: &Seat, backend: Backend, comm: &Comm, routing: &Routing) -> Result<(), Failure> {
    comm.dispatch(routing, A2A_PHASE_BOTH, &small_input(), &mut small_output(seat, backend))?;
    let rows = results_of(seat, backend, comm, routing)?;
    comm.combine(routing, A2A_PHASE_BOTH, 0, Some(&rows), &mut small_sums())
}

/// One of four processes is killed in its steps, or (`at_rest`) while it does nothing and the others wait for it. They
/// are told of it in time, and the rest of them make a group that works.
fn killed(backend: Backend, at_rest: bool) -> Result<(), String> {
    let world = group(4);
    let victim = Rng::new(&[seed(), 310, backend as u64, u64::from(at_rest)]).below(world);
    let id = GroupId::new();
    let args = vec![backend.name().to_string(), if at_rest { victim.to_string() } else { "nobody".into() }];
    let spawn = |rank| Worker::spawn(OBEY.0, &[rank], &Seat { rank, world, id, args: args.clone() });
    let mut workers: Vec<Worker> = (0..world).map(spawn).collect();
    for worker in &workers {
        expect("an answer", worker.line(START)?.as_str(), "ready")?;
    }
    sleep(Duration::from_millis(300));
    let struck = Instant::now();
    workers[victim].signal(libc::SIGKILL);
    let survivors: Vec<usize> = (0..world).filter(|&rank| rank != victim).collect();
    for &rank in &survivors {
        let line = workers[rank].line(LIMIT)?;
        let took = struck.elapsed();
        let (status, text) = line.split_once(' ').unwrap_or((&line, ""));
        if status != A2A_PEER_LOST.to_string() || !text.contains(&format!("rank {victim}")) {
            return Err(format!("rank {rank} got {line:?} after {took:?}, rank {victim} was killed"));
        }
        within("told of a death", took, PROMISE_OF_PROCESSES)?;
    }
    let again = GroupId::new().to_hex();
    for (rank, &process) in survivors.iter().enumerate() {
        workers[process].tell(&format!("{rank} {} {again}", survivors.len()))?;
    }
    for &process in &survivors {
        expect("an answer of a survivor", workers[process].line(START)?.as_str(), "fine")?;
    }
    Ok(())
}

// --------------------------------------------------------------------------------------------------- memory

/// What the driver may round up to, and keep for later: a memory pool grows by pieces of 32 MiB.
const SLACK: u64 = 40 << 20;

/// The GPU's free memory sinks by what a2a_query_memory said, not by a step, and rises again.
fn memory_is_what_was_said(backend: Backend) -> Result<(), String> {
    threads(1, LIMIT, move |seat| {
        let mut config = small(seat, backend);
        // Kernels are loaded, and whatever else the first comm of a process needs is there.
        let (input, mut output, mut sums) = (small_input(), small_output(seat, backend), small_sums());
        let comm = Comm::create(&config)?;
        let routing = comm.routing(0)?;
        small_step(seat, backend, &comm, &routing)?;
        drop((routing, comm));

        config.max_tokens = 1 << 20;
        let said = query_memory(&config)?;
        let free = || cuda::free_bytes().map(|bytes| bytes as u64);
        let near = |what: &str, took: u64, said: u64| {
            let near = took + SLACK >= said && took <= said + SLACK;
            if near { Ok(()) } else { Err(format!("{what}: {took} bytes, {said} were said")) }
        };
        let before = free()?;
        let comm = Comm::create(&config)?;
        let created = free()?;
        near("a2a_create", before.saturating_sub(created), said.window_bytes + said.private_bytes)?;
        let routing = comm.routing(0)?;
        let routed = free()?;
        near("a2a_routing_create", created.saturating_sub(routed), said.routing_bytes)?;
        let input = DispatchIn { max_tokens: M as i32, ..input };
        for _ in 0..4 {
            comm.dispatch(&routing, A2A_PHASE_BOTH, &input, &mut output)?;
            let rows = results_of(seat, backend, &comm, &routing)?;
            comm.combine(&routing, A2A_PHASE_BOTH, 0, Some(&rows), &mut sums)?;
        }
        expect("free bytes after four steps", free()?, routed)?;
        drop((routing, comm));
        near("what is not free after destroy", before.saturating_sub(free()?), 0)
    })
}

const MANY: usize = 34_000;
const LONG: usize = 16_384;
/// What the windows and tensors of two ranks take, and what the arena may have.
const NEEDED: usize = 18 << 30;

fn too_small() -> Option<String> {
    match cuda::free_bytes() {
        Ok(free) if free < NEEDED => Some(format!("{free} bytes are free on this GPU, it needs {NEEDED}")),
        _ => None,
    }
}

/// Received rows take more than 2^31 bytes on each of two ranks: 34 000 tokens of 32 KiB of each for each. A row tells
/// whose it is, in every byte; experts give back what they get, so that sums are twice the tokens.
fn more_than_2_gib(backend: Backend) -> Result<(), String> {
    const { assert!(2 * MANY * LONG * 2 > 1 << 31) };
    threads(2, GPU_LIMIT, move |seat| {
        let row = 2 * LONG;
        let mut config = small(seat, backend);
        (config.num_experts, config.max_topk) = (2, 2);
        (config.max_hidden, config.max_tokens) = (LONG as i32, MANY as i32);
        (config.combine_dtype, config.num_slots) = (A2A_DTYPE_BF16, 1);
        (config.max_scale_bytes, config.extra_row_bytes[0], config.expert_alignment) = (0, 0, 0);
        if seat.rank == 0 || cuda::is_by_rank() {
            cuda::grow(4 * MANY * row + (64 << 20))?;
        }
        meet(seat)?;
        let bytes_of = |rank: usize, token: usize| 1 + ((token * 7 + rank * 13) % 120) as u8;
        let tokens = Tensor::new(BF16, &[MANY, LONG]);
        for token in 0..MANY {
            cuda::fill(tokens.address() + token * row, row, bytes_of(seat.rank, token));
        }
        let ids: Vec<u8> = [0i32, 1].iter().flat_map(|id| id.to_le_bytes()).collect::<Vec<_>>().repeat(MANY);
        let input = DispatchIn {
            tokens: Some(tokens),
            topk_ids: Some(Tensor::of(I32, &[MANY, 2], &ids)),
            flags: if over_nccl() { A2A_DISPATCH_UNIFORM } else { 0 },
            ..Default::default()
        };
        let mut output = DispatchOut { tokens: Some(Tensor::view()), ..Default::default() };
        let mut sums = CombineOut { tokens: Some(Tensor::new(BF16, &[MANY, LONG])), ..Default::default() };
        let comm = Comm::create(&config)?;
        let routing = comm.routing(0)?;
        meet(seat)?;

        comm.dispatch(&routing, A2A_PHASE_BOTH, &input, &mut output)?;
        let received = output.tokens.as_ref().expect("asked for");
        // Every layout has the rows of rank 0 first, all of them, then those of rank 1.
        expect("rows received", received.shape().iter().rev().skip(1).product::<usize>(), 2 * MANY)?;
        let border = (1 << 31) / row;
        let mut rng = Rng::new(&[seed(), 320, seat.rank as u64]);
        let mut samples: Vec<usize> = (0..200).map(|_| rng.below(2 * MANY)).collect();
        samples.extend([0, MANY - 1, MANY, border - 1, border, border + 1, 2 * MANY - 1]);
        for &at in &samples {
            let want = vec![bytes_of(at / MANY, at % MANY); row];
            if received.read_row(at) != want {
                return Err(format!("row {at} is not token {} of rank {}", at % MANY, at / MANY));
            }
        }
        let results = comm.combine_buffer(&routing, BF16)?;
        for view in [received, &results] {
            expect("a compact view", is_compact(view), true)?;
        }
        cuda::copy(results.address(), received.address(), 2 * MANY * row)?;
        comm.combine(&routing, A2A_PHASE_BOTH, 0, Some(&results), &mut sums)?;
        for token in samples.into_iter().map(|at| at % MANY) {
            let value = Float::Bf16.widen(u32::from_le_bytes([bytes_of(seat.rank, token); 4]) & 0xffff);
            let want = (Float::Bf16.round(value + value) as u16).to_le_bytes().repeat(LONG);
            if sums.tokens.as_ref().expect("given").read_row(token) != want {
                return Err(format!("the sum of token {token} is not twice the token"));
            }
        }
        nothing_on_record(&comm)?;
        meet(seat)
    })
}
