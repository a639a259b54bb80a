//! What only a GPU has: captured graphs, work that a call leaves on a stream, kernels that wait while their host does
//! something else, memory that is the device's.
//!
//! Ranks that are threads share the GPU. Whatever takes or frees its memory (comms, routings, graphs) happens where
//! all of them `meet`, for it may wait for kernels, and kernels for peers.

use std::io::BufRead;
use std::thread::sleep;
use std::time::Instant;

use super::common::cuda::{self, Graph};
use super::*;

const REPLAYS: usize = 1000;
/// Replays that follow each other without the host in between.
const BATCH: usize = 20;
/// Within this a loss is known, a comm is gone, a stream that waited is free.
const PROMISE: Duration = Duration::from_secs(1);
/// The same across processes, one of which the system must take down first.
const PROMISE_OF_PROCESSES: Duration = Duration::from_secs(2);
/// A call, or a replay on a closed slot, waits for nobody.
const AT_ONCE: Duration = Duration::from_millis(500);
/// A process has a context, a comm and a step behind it after this.
const START: Duration = Duration::from_secs(90);

type PerBackend = fn(Backend) -> Result<(), String>;

/// Adds the tests to the others.
pub fn add(add: &mut impl FnMut(String, Left, Run)) {
    let each: [(&str, PerBackend); 12] = [
        ("a_layer_replayed_by_4", |backend| a_layer_replayed(backend, 4)),
        ("a_layer_replayed_by_8", |backend| a_layer_replayed(backend, 8)),
        ("a_dispatch_replayed_alone", a_dispatch_replayed_alone),
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
                let no_rows =
                    || (!backend.keeps_rows()).then(|| "no rows in a slot for a copy to read".into());
                let small_gpu = || if name == "more_than_2_gib" { too_small() } else { None };
                backend.refused_here().or_else(no_rows).or_else(small_gpu)
            };
            let name = format!("gpu/{name}/{}", backend.name());
            add(name, Box::new(left), Box::new(move || run(backend)));
        }
    }
}

fn within(what: &str, took: Duration, limit: Duration) -> Result<(), String> {
    if took <= limit { Ok(()) } else { Err(format!("{what}: took {took:?}, promised are {limit:?}")) }
}

// -------------------------------------------------------------------------------------------------- a layer

/// Step `number` of a small group, all ranks' inputs: some choose evenly, some one expert, some none, some a bad one.
fn inputs(world: usize, backend: Backend, number: usize) -> oracle::Step {
    let number = number as u64;
    let favourite = Rng::new(&[seed(), 301, number]).below(EXPERTS) as i64;
    let of_rank = |rank: usize| {
        let mut rng = Rng::new(&[seed(), 300, world as u64, number, rank as u64]);
        let tokens = tokens_of(rank);
        let ids = (0..tokens * K)
            .map(|_| match number % 4 {
                0 => rng.below(EXPERTS) as i64,
                1 => favourite,
                2 => rng.below(EXPERTS + 1) as i64 - 1,
                _ => rng.below(EXPERTS + 3) as i64 - 1,
            })
            .collect();
        let mut spread = |float| Values::Spread.bits(float, rng.next());
        let weights = (0..tokens * K).map(|_| spread(Float::F32)).collect();
        let bytes = (0..tokens * HIDDEN).flat_map(|_| (spread(Float::Bf16) as u16).to_le_bytes()).collect();
        let rows = Rows { row_bytes: 2 * HIDDEN, bytes };
        Input { tokens, ids: Some(ids), weights: Some(weights), rows, ..Default::default() }
    };
    oracle::Step {
        owner: oracle::contiguous(EXPERTS, world),
        layout: backend.layout(SMALL_ALIGNMENT),
        limit: 0,
        bound: M,
        topk: K,
        reuse: false,
        ranks: (0..world).map(of_rank).collect(),
    }
}

/// A captured dispatch has one T; the ranks' differ, one has the bound's.
fn tokens_of(rank: usize) -> usize {
    M - rank % 3 * 5
}

/// One rank's dispatch, experts that give back what they get, and combine, all in tensors that stay where they are.
struct Layer<'a> {
    rank: usize,
    comm: &'a Comm,
    routing: Routing,
    input: DispatchIn,
    output: DispatchOut,
    /// The received rows as the experts saw them.
    kept: Tensor,
    results: Option<Tensor>,
    sums: CombineOut,
    /// Inputs of the steps to come, and sums of those that were: step by step.
    queue: [Tensor; 3],
    logged: Tensor,
}

impl<'a> Layer<'a> {
    fn new(seat: &Seat, backend: Backend, comm: &'a Comm, slot: i32) -> Result<Layer<'a>, String> {
        let (tokens, rows) = (tokens_of(seat.rank), capacity(seat, backend));
        let local = oracle::local_experts(&oracle::contiguous(EXPERTS, seat.world), seat.rank).len();
        let status = || Some(Tensor::new(I32, &[4 + seat.world]));
        let steps = |bytes: usize| Tensor::new(U8, &[BATCH, bytes]);
        Ok(Layer {
            rank: seat.rank,
            comm,
            routing: comm.routing(slot)?,
            input: DispatchIn {
                tokens: Some(Tensor::new(BF16, &[tokens, HIDDEN])),
                topk_ids: Some(Tensor::new(I32, &[tokens, K])),
                topk_weights: Some(Tensor::new(F32, &[tokens, K])),
                ..Default::default()
            },
            output: DispatchOut {
                tokens: Some(Tensor::view()),
                row_source: Some(Tensor::new(I32, &[rows, 2])),
                expert_counts: Some(Tensor::new(I32, &[local])),
                rank_counts: Some(Tensor::new(I32, &[seat.world])),
                status: status(),
                ..Default::default()
            },
            kept: Tensor::new(BF16, &[rows, HIDDEN]),
            results: None,
            sums: CombineOut {
                tokens: Some(Tensor::new(F32, &[tokens, HIDDEN])),
                status: status(),
                ..Default::default()
            },
            queue: [steps(tokens * HIDDEN * 2), steps(tokens * K * 4), steps(tokens * K * 4)],
            logged: steps(tokens * HIDDEN * 4),
        })
    }

    /// This rank's inputs as the tensors hold them.
    fn bytes(&self, step: &oracle::Step) -> [Vec<u8>; 3] {
        let Input { ids, weights, rows, .. } = &step.ranks[self.rank];
        let ids = ids.iter().flatten().flat_map(|&id| (id as i32).to_le_bytes());
        let weights = weights.iter().flatten().flat_map(|word| word.to_le_bytes());
        [rows.bytes.clone(), ids.collect(), weights.collect()]
    }
    fn tensors(&mut self) -> [&mut Tensor; 3] {
        let DispatchIn { tokens, topk_ids, topk_weights, .. } = &mut self.input;
        [tokens, topk_ids, topk_weights].map(|tensor| tensor.as_mut().expect("given"))
    }

    /// Makes this step's inputs the next dispatch's.
    fn put(&mut self, step: &oracle::Step) {
        let bytes = self.bytes(step);
        self.tensors().into_iter().zip(bytes).for_each(|(tensor, bytes)| tensor.write(&bytes));
    }

    /// As `put`, for up to `BATCH` steps, each of which `feed` then takes its turn.
    fn enqueue(&mut self, steps: &[oracle::Step]) {
        for (at, step) in steps.iter().enumerate() {
            let bytes = self.bytes(step);
            self.queue.iter_mut().zip(bytes).for_each(|(queue, bytes)| queue.write_row(at, &bytes));
        }
    }
    /// On the stream.
    fn feed(&mut self, at: usize) -> Result<(), String> {
        let from =
            self.queue.each_ref().map(|queue| (queue.address() + at * queue.row_bytes(), queue.row_bytes()));
        let to = self.tensors().map(|tensor| tensor.address());
        to.into_iter().zip(from).try_for_each(|(to, (from, bytes))| cuda::copy(to, from, bytes))
    }
    /// On the stream.
    fn log(&self, at: usize) -> Result<(), String> {
        let (sums, bytes) = (self.sums.tokens.as_ref().expect("given"), self.logged.row_bytes());
        cuda::copy(self.logged.address() + at * bytes, sums.address(), bytes)
    }

    fn dispatch(&mut self, phase: a2a_phase_t) -> Result<(), Failure> {
        self.comm.dispatch(&self.routing, phase, &self.input, &mut self.output)
    }
    fn combine(&mut self, phase: a2a_phase_t) -> Result<(), Failure> {
        self.comm.combine(&self.routing, phase, 0, self.results.as_ref(), &mut self.sums)
    }
    /// On the stream, between the two.
    fn experts(&mut self) -> Result<(), String> {
        let received = self.output.tokens.as_ref().expect("asked for");
        let results = self.comm.combine_buffer(&self.routing, BF16)?;
        let bytes = self.kept.shape().iter().product::<usize>() * 2;
        for view in [received, &results] {
            if !is_compact(view) || view.shape().iter().product::<usize>() * 2 != bytes {
                return Err(format!("a view of {:?} with strides {:?}", view.shape(), view.strides()));
            }
        }
        cuda::copy(self.kept.address(), received.address(), bytes)?;
        cuda::copy(results.address(), received.address(), bytes)?;
        self.results = Some(results);
        Ok(())
    }
    fn whole(&mut self) -> Result<(), String> {
        self.dispatch(A2A_PHASE_BOTH)?;
        self.experts()?;
        Ok(self.combine(A2A_PHASE_BOTH)?)
    }
    fn ordinary(&mut self, step: &oracle::Step) -> Result<(), String> {
        self.put(step);
        self.whole()?;
        self.check(step)
    }

    /// What the last step left in the tensors.
    fn check(&self, step: &oracle::Step) -> Result<(), String> {
        self.check_received(step)?;
        self.check_sums(step, &self.sums.tokens.as_ref().expect("given").read())?;
        let status = self.sums.status.as_ref().expect("given").read_i32();
        expect("combine status", status, step.combine_status(self.rank, &Dropped::new()))
    }
    fn check_received(&self, step: &oracle::Step) -> Result<(), String> {
        let want = step.dispatch(self.rank, false);
        let ints = |tensor: &Option<Tensor>| tensor.as_ref().expect("given").read_i32();
        expect("dispatch status", ints(&self.output.status), want.status)?;
        expect("rank_counts", ints(&self.output.rank_counts), want.rank_counts)?;
        expect("expert_counts", ints(&self.output.expert_counts), want.expert_counts)?;
        expect("row_source", ints(&self.output.row_source), want.row_source)?;
        let got = self.kept.read();
        for (at, row) in want.rows.iter().enumerate() {
            let Some(Row { source, .. }) = row else { continue };
            let want = step.ranks[source.rank].rows.row(source.token);
            expect(format!("row {at} ({source:?})"), &got[at * 2 * HIDDEN..][..2 * HIDDEN], want)?;
        }
        Ok(())
    }
    fn check_sums(&self, step: &oracle::Step, got: &[u8]) -> Result<(), String> {
        let result = |_: usize, row: Row| step.ranks[row.source.rank].rows.row(row.source.token).to_vec();
        let floats = (Float::Bf16, Float::F32);
        let weights = oracle::Weights::Dispatched;
        let want = step.combine(self.rank, HIDDEN, floats, weights, &Dropped::new(), result, None);
        match (0..want.len()).find(|&at| got[at] != want[at]) {
            None => Ok(()),
            Some(at) => {
                let at = at / 4;
                let (got, want) = (Float::F32.load(got, at), Float::F32.load(&want, at));
                let (token, column) = (at / HIDDEN, at % HIDDEN);
                Err(format!("token {token} column {column}: the sum is {got:#x}, expected {want:#x}"))
            }
        }
    }
}

fn is_compact(tensor: &Tensor) -> bool {
    let (shape, strides) = (tensor.shape(), tensor.strides());
    (1..shape.len()).all(|dim| strides[dim - 1] == strides[dim] * shape[dim]) && strides.last() == Some(&1)
}

fn nothing_on_record(comm: &Comm) -> Result<(), String> {
    let record = comm.async_error()?;
    expect(format!("a record ({})", message(&record)), record.status, A2A_SUCCESS)
}

// ---------------------------------------------------------------------------------------------------- graphs

/// A graph of dispatch, experts and combine is replayed with other tokens and another routing each time, `BATCH`
/// times without the host in between. All sums are compared, and of the last of each batch everything.
fn a_layer_replayed(backend: Backend, world: usize) -> Result<(), String> {
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
                let sums = layer.logged.read_row(at);
                layer.check_sums(step, &sums).map_err(|error| format!("replay {}: {error}", number(at)))?;
            }
            let last = BATCH - 1;
            layer.check(&steps[last]).map_err(|error| format!("replay {}: {error}", number(last)))?;
        }
        // The ordinary calls go on where the graph has stopped.
        layer.ordinary(&inputs(world, backend, 2)).map_err(|error| format!("after the replays: {error}"))?;
        meet(seat)
    })
}

/// A graph of a dispatch alone, replayed once, twice and ten times, each time another; then a combine that is no graph's.
fn a_dispatch_replayed_alone(backend: Backend) -> Result<(), String> {
    threads(4, GPU_LIMIT, move |seat| {
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
    threads(4, GPU_LIMIT, move |seat| {
        let comm = Comm::create(&small(seat, backend))?;
        let mut layers = [Layer::new(seat, backend, &comm, 0)?, Layer::new(seat, backend, &comm, 1)?];
        meet(seat)?;
        for round in 0..20 {
            let steps = [0, 1].map(|slot| inputs(seat.world, backend, 3000 + 2 * round + slot));
            layers.iter_mut().zip(&steps).for_each(|(layer, step)| layer.put(step));
            let order = if seat.rank.is_multiple_of(2) { [0, 1] } else { [1, 0] };
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
    threads(3, LIMIT, move |seat| {
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

/// The record, and the sentence that names a rank.
fn recorded(comm: &Comm, status: a2a_status_t, word: &str) -> Result<(), String> {
    let record = comm.async_error()?;
    let text = message(&record);
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
    threads(3, LIMIT, move |seat| {
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
    threads(3, LIMIT, move |seat| {
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
            // Its rows had come before it aborted; its results will not.
            layer.dispatch(A2A_PHASE_BOTH)?;
            layer.experts()?;
            refused("a peer's call", layer.combine(A2A_PHASE_BOTH), A2A_PEER_LOST, &["rank 0"])?;
            within("a peer's calls", begun.elapsed(), PROMISE)?;
        }
        meet(seat)
    })
}

/// The others' graph runs into its deadline because rank 3 does not come. What follows on the closed slot costs no
/// second deadline.
fn one_does_not_call(backend: Backend) -> Result<(), String> {
    const DEADLINE: Duration = Duration::from_secs(1);
    const LAYERS: usize = 60;
    threads(4, LIMIT, move |seat| {
        let mut config = small(seat, backend);
        config.timeout_ms = DEADLINE.as_millis() as i64;
        let comm = Comm::create(&config)?;
        let mut layer = Layer::new(seat, backend, &comm, 0)?;
        meet(seat)?;
        layer.ordinary(&inputs(seat.world, backend, 7000))?;
        meet(seat)?;
        let graph = Graph::capture(|| layer.whole())?;
        meet(seat)?;
        if seat.rank != 3 {
            let begun = Instant::now();
            graph.launch(1)?;
            within("a launch", begun.elapsed(), AT_ONCE)?;
            cuda::synchronize()?;
            let took = begun.elapsed();
            within("a deadline of 1 s", took, DEADLINE + PROMISE)?;
            if took < DEADLINE {
                return Err(format!("gave up after {took:?}"));
            }
            voided(&layer, &[3])?;
            recorded(&comm, A2A_TIMEOUT, "rank 3")?;

            let begun = Instant::now();
            graph.launch(LAYERS)?;
            cuda::synchronize()?;
            within("replays on a closed slot", begun.elapsed(), AT_ONCE)?;
            voided(&layer, &[3])?;
            let begun = Instant::now();
            refused("a call on a closed slot", layer.dispatch(A2A_PHASE_BOTH), A2A_TIMEOUT, &["rank 3"])?;
            within("a call on a closed slot", begun.elapsed(), AT_ONCE)?;
        }
        meet(seat)?;
        if seat.rank == 3 {
            let begun = Instant::now();
            // The others' rows had come before they gave up: its dispatch is whole. Their results never will be.
            layer.dispatch(A2A_PHASE_BOTH)?;
            layer.experts()?;
            match layer.combine(A2A_PHASE_BOTH) {
                Err(Failure { status: A2A_TIMEOUT | A2A_PEER_LOST, .. }) => {}
                other => return Err(format!("the late rank got {other:?}")),
            }
            within("the late rank's calls", begun.elapsed(), PROMISE)?;
        }
        meet(seat)
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

fn unchecked_step(seat: &Seat, backend: Backend, comm: &Comm, routing: &Routing) -> Result<(), Failure> {
    comm.dispatch(routing, A2A_PHASE_BOTH, &small_input(), &mut small_output(seat, backend))?;
    let rows = comm.combine_buffer(routing, F32)?;
    comm.combine(routing, A2A_PHASE_BOTH, 0, Some(&rows), &mut small_sums())
}

/// One of four processes is killed in its steps, or (`at_rest`) while it does nothing and the others wait for it. They
/// are told of it in time, and three of them make a group that works.
fn killed(backend: Backend, at_rest: bool) -> Result<(), String> {
    const WORLD: usize = 4;
    let victim = Rng::new(&[seed(), 310, backend as u64, u64::from(at_rest)]).below(WORLD);
    let id = GroupId::new();
    let args = vec![backend.name().to_string(), if at_rest { victim.to_string() } else { "nobody".into() }];
    let spawn = |rank| Worker::spawn(OBEY.0, &[rank], &Seat { rank, world: WORLD, id, args: args.clone() });
    let mut workers: Vec<Worker> = (0..WORLD).map(spawn).collect();
    for worker in &workers {
        expect("an answer", worker.line(START)?.as_str(), "ready")?;
    }
    sleep(Duration::from_millis(300));
    let struck = Instant::now();
    workers[victim].signal(libc::SIGKILL);
    let survivors: Vec<usize> = (0..WORLD).filter(|&rank| rank != victim).collect();
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
            let rows = comm.combine_buffer(&routing, F32)?;
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
