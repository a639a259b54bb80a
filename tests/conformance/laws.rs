//! What holds between steps, between backends and between worlds, whatever the values: training, slots that cross,
//! limits that are exceeded, the same bits from everybody.

use std::collections::BTreeMap;
use std::sync::Mutex;

use super::*;

type OfABackend = fn(Backend) -> Result<(), String>;

/// The laws that every backend obeys.
pub const OF_A_BACKEND: [(&str, OfABackend); 5] = [
    ("backward_of_three_layers", backward),
    ("twenty_dispatches", twenty_dispatches),
    ("slots_that_cross", slots_that_cross),
    ("reuse_that_is_refused", refused_reuse),
    ("quantisation_that_is_refused", refused_quantisation),
];

/// Why a law cannot be tried on the GPU that was chosen, though it has the backend.
pub fn refused_here(law: &str, backend: Backend) -> Option<String> {
    let quant = (law == "quantisation_that_is_refused").then_some((Scale::F32, false));
    Cell { quant, ..Cell::plain(backend, 2) }.refused_here()
}

// ----------------------------------------------------------------------------------- steps that follow each other

impl Cell {
    /// A comm of middling size, without rounds.
    fn plain(backend: Backend, world: usize) -> Cell {
        Cell {
            backend,
            world,
            owner: oracle::contiguous(13, world),
            table: false,
            slots: 1,
            routings: 1,
            max_topk: 4,
            max_tokens: 48,
            max_row: 512,
            token_type: 0,
            combine_type: A2A_DTYPE_F32,
            combine_hidden: 0,
            max_scale_bytes: 0,
            alignment: if backend == Backend::HtContiguous { 8 } else { 1 },
            limit: Limit::None,
            max_recv_rows: 0,
            quant: None,
            fifo_rows: if backend == Backend::TwoSided { 2 } else { 0 },
            training: true,
            place: None,
            rounds: Vec::new(),
        }
    }

    /// A step of up to 40 tokens a rank with their top 4, combined as float32.
    fn step(&self, rng: &mut Rng, kind: Kind) -> Step {
        let rows = [64, 128, 288, 512];
        Step {
            topk: 4,
            with_ids: true,
            row_bytes: rng.pick(&rows),
            combine: Some(2),
            ..self.original(rng, kind, 40, "default")
        }
    }

    fn alone(&mut self, rng: &mut Rng, step: Step) {
        self.rounds.push(Round { seed: rng.next(), order: Order::Same, steps: vec![step] });
    }

    fn run_by_threads(self) -> Result<(), String> {
        threads(self.world, LIMIT, move |seat| self.run(seat))
    }
}

const SOME_KINDS: [Kind; 6] =
    [Kind::Zipf, Kind::Ragged, Kind::Duplicates, Kind::Nones, Kind::BadIds, Kind::EmptyRank];

/// Training: a slot serves the layers one after the other, each with a routing of its own. Backward, the gradients
/// of the sums go where the tokens went (dispatch with REUSE), and what comes back are the gradients of the tokens
/// (combine) and of the weights (row_weights). Twice, so that routings are dispatched anew after a replay.
fn backward(backend: Backend) -> Result<(), String> {
    const LAYERS: usize = 3;
    for world in [1, 4] {
        let mut cell = Cell { routings: LAYERS, ..Cell::plain(backend, world) };
        let rng = &mut Rng::new(&[seed(), 100, backend as u64, world as u64]);
        for kinds in SOME_KINDS.chunks(LAYERS) {
            let mut layers = Vec::new();
            for (routing, &kind) in kinds.iter().enumerate() {
                layers.push(Step { routing, ..cell.step(rng, kind) });
                cell.alone(rng, layers[routing].clone());
            }
            for layer in layers.into_iter().rev() {
                // Gradients are float32, twice as long as the tokens were.
                let row_bytes = layer.row_bytes.min(256) * 2;
                let replay = Step {
                    token_type: 2,
                    row_bytes,
                    gradients: true,
                    ..cell.replay(rng, layer.clone(), kinds.len() > 1)
                };
                cell.alone(rng, replay);
            }
        }
        cell.run_by_threads().map_err(|error| format!("world {world}: {error}"))?;
    }
    Ok(())
}

/// Dispatch after dispatch, none combined but the last; by turns on two routings.
fn twenty_dispatches(backend: Backend) -> Result<(), String> {
    let mut cell = Cell { routings: 2, ..Cell::plain(backend, 3) };
    let rng = &mut Rng::new(&[seed(), 101, backend as u64]);
    for at in 0..20 {
        let step = cell.step(rng, SOME_KINDS[at % SOME_KINDS.len()]);
        let combine = step.combine.filter(|_| at == 19);
        cell.alone(rng, Step { routing: at % 2, combine, ..step });
    }
    cell.run_by_threads()
}

/// Two slots in flight, completed in the opposite order by every other rank; FIFOs hold a fraction of the rows.
fn slots_that_cross(backend: Backend) -> Result<(), String> {
    for world in [2, 3] {
        let mut cell = Cell { slots: 2, ..Cell::plain(backend, world) };
        let rng = &mut Rng::new(&[seed(), 102, backend as u64, world as u64]);
        for order in [Order::Crossed, Order::Rotated, Order::Crossed] {
            let steps: Vec<Step> =
                (0..2).map(|slot| Step { slot, ..cell.step(rng, Kind::Duplicates) }).collect();
            cell.rounds.push(Round { seed: rng.next(), order, steps });
            // One slot more rows than the other.
            let mut steps: Vec<Step> =
                (0..2).map(|slot| Step { slot, ..cell.step(rng, Kind::Zipf) }).collect();
            steps[0].tokens.fill(1);
            cell.rounds.push(Round { seed: rng.next(), order, steps });
        }
        cell.run_by_threads().map_err(|error| format!("world {world}: {error}"))?;
    }
    Ok(())
}

// ------------------------------------------------------------------------------------------------ same bits

/// What one rank got in one step, told in terms that do not depend on where rows lie.
struct Got {
    /// What the rows are, in order.
    rows: Vec<Row>,
    tokens: Vec<Vec<u8>>,
    ids: Vec<Vec<u8>>,
    weights: Vec<Vec<u8>>,
    scales: Vec<Vec<u8>>,
    sums: Vec<u8>,
    gradients: Vec<u8>,
}

impl Got {
    fn of(live: &Live) -> Got {
        let received = &live.expected_own;
        let mine = |row: &Row| live.inputs.contributors(row.source).contains(&live.rank);
        let read = |tensor: &Option<Tensor>| {
            let bytes = tensor.as_ref().map_or(Vec::new(), Tensor::read);
            let columns = bytes.len() / received.rows.len().max(1);
            let rows = received.rows.iter().enumerate();
            let of_ours = rows.filter(|(_, row)| row.as_ref().is_some_and(mine));
            of_ours.map(|(at, _)| bytes[at * columns..][..columns].to_vec()).collect::<Vec<_>>()
        };
        let output = &live.output;
        let all = |tensor: &Option<Tensor>| tensor.as_ref().map_or(Vec::new(), Tensor::read);
        Got {
            rows: received.rows.iter().flatten().copied().filter(mine).collect(),
            tokens: read(&output.tokens),
            // Where rows belong to experts only one of two layouts has ids.
            ids: if live.cell.backend.by_expert() { Vec::new() } else { read(&output.topk_ids) },
            weights: read(&output.topk_weights),
            scales: read(&output.scales),
            sums: all(&live.sums.tokens),
            gradients: all(&live.sums.topk_weights),
        }
    }
}

/// Backends whose sums have the same terms in the same order.
pub const CLASSES: [&[Backend]; 2] = [
    &[Backend::Gather, Backend::OneSided, Backend::HtFlat, Backend::TwoSided],
    &[Backend::HtContiguous, Backend::LowLatency],
];

/// Why a class has nobody to be compared with on the GPU that was chosen.
pub fn lonely(class: &[Backend]) -> Option<String> {
    let refusals: Vec<String> = class.iter().filter_map(|backend| backend.refused_here()).collect();
    (refusals.len() + 1 >= class.len()).then(|| refusals.join("; ")).filter(|_| cuda::is_enabled())
}

/// The same steps through every backend of a class: the same rows in the same order, the same bits back.
pub fn classes(world: usize) -> Result<(), String> {
    for quant in [None, Some((Scale::F32, false)), Some((Scale::Ue8m0, true))] {
        for class in CLASSES {
            let make = |backend| Cell { quant, place: Some(Place::Own), ..Cell::plain(backend, world) };
            let rng = &mut Rng::new(&[seed(), 103, world as u64]);
            let first = make(class[0]);
            let mut steps = Vec::new();
            for kind in SOME_KINDS {
                steps.push(Step { gradients: true, ..first.step(rng, kind) });
                steps.push(Step {
                    gradients: true,
                    ..first.replay(rng, steps[steps.len() - 1].clone(), false)
                });
            }
            let mut before: Option<(Backend, BTreeMap<_, Got>)> = None;
            for &backend in class {
                let mut cell = make(backend);
                if let Some(reason) = cell.refused_here() {
                    println!("{backend:?} with {quant:?} is not compared, not on cuda: {reason}");
                    continue;
                }
                for step in &steps {
                    cell.alone(&mut Rng::new(&[step.seed]), step.clone());
                }
                let got = got_by_threads(cell).map_err(|error| format!("{}: {error}", backend.name()))?;
                if let Some((other, before)) = &before {
                    for (at, before) in before {
                        let what = format!("{quant:?}, step and rank {at:?}, {other:?} and {backend:?}");
                        same(&what, before, &got[at])?;
                    }
                }
                before = Some((backend, got));
            }
        }
    }
    Ok(())
}

fn same(what: &str, one: &Got, other: &Got) -> Result<(), String> {
    for (part, same) in [
        ("rows", one.rows == other.rows),
        ("tokens", one.tokens == other.tokens),
        ("ids", one.ids == other.ids),
        ("weights", one.weights == other.weights),
        ("scales", one.scales == other.scales),
        ("sums", one.sums == other.sums),
        ("gradients", one.gradients == other.gradients),
    ] {
        if !same {
            return Err(format!("{what}: {part} differ"));
        }
    }
    Ok(())
}

/// Runs a cell of rounds of one step and keeps what every rank got, by step and rank.
fn got_by_threads(cell: Cell) -> Result<BTreeMap<(usize, usize), Got>, String> {
    let all = Arc::new(Mutex::new(BTreeMap::new()));
    let kept = all.clone();
    threads(cell.world, LIMIT, move |seat| {
        let comm = cell.create(seat)?;
        let routing = comm.routing(0)?;
        meet(seat)?;
        for (at, round) in cell.rounds.iter().enumerate() {
            let mut live = Live::new(&cell, round, &round.steps[0], seat.rank, &routing);
            // What a rank may choose for itself is the same with every backend, and its sums are new ones.
            live.choice.accumulate = false;
            live.choice.wants_gradients = true;
            live.dispatch(&comm, A2A_PHASE_BOTH)?;
            live.compute(&comm, live.step.combine.expect("combined"))?;
            live.combine(&comm, A2A_PHASE_BOTH)?;
            kept.lock().unwrap().insert((at, seat.rank), Got::of(&live));
        }
        Ok(())
    })?;
    Ok(std::mem::take(&mut all.lock().unwrap()))
}

const EVERYBODY: usize = 48;
const GLOBAL_EXPERTS: usize = 21;
const GLOBAL_TOPK: usize = 5;
const GLOBAL_HIDDEN: usize = 144;

/// One step of 48 tokens, the same whoever has them: tokens, ids and weights in global order.
struct Global {
    tokens: Vec<u8>,
    ids: Vec<i64>,
    weights: Vec<u32>,
}

impl Global {
    fn new(rng: &mut Rng) -> Global {
        let float = |float: Float, word| Values::Spread.bits(float, word);
        let elements = EVERYBODY * GLOBAL_HIDDEN;
        let tokens =
            (0..elements).flat_map(|_| (float(Float::Bf16, rng.next()) as u16).to_le_bytes()).collect();
        let choices = EVERYBODY * GLOBAL_TOPK;
        Global {
            tokens,
            // With some none, some bad, and duplicates.
            ids: (0..choices).map(|_| rng.below(GLOBAL_EXPERTS + 3) as i64 - 1).collect(),
            weights: (0..choices).map(|_| float(Float::F32, rng.next())).collect(),
        }
    }

    /// The experts: a function of expert and row, whose values depend on both in every column.
    fn expert(expert: usize, row: &[f32]) -> Vec<u8> {
        let value = |(column, x): (usize, &f32)| x * (1.0 + expert as f32 / 7.0) + (column % 5) as f32;
        row.iter().enumerate().map(value).flat_map(f32::to_le_bytes).collect()
    }

    /// The sums, on one rank and worked out without the library.
    fn expected(&self, quant: Option<Scale>) -> Vec<u8> {
        let step = oracle::Step {
            owner: vec![0; GLOBAL_EXPERTS],
            layout: Layout::ExpertPadded,
            limit: 0,
            bound: EVERYBODY,
            topk: GLOBAL_TOPK,
            reuse: false,
            ranks: vec![Input {
                tokens: EVERYBODY,
                ids: Some(self.ids.clone()),
                weights: Some(self.weights.clone()),
                rows: Rows { row_bytes: 2 * GLOBAL_HIDDEN, bytes: self.tokens.clone() },
                ..Default::default()
            }],
        };
        let result = |_, row: Row| {
            let token = step.ranks[0].rows.row(row.source.token);
            let values = match quant {
                None => widened(token, Float::Bf16),
                Some(scale) => {
                    let (q, scales) = oracle::quantise(token, Float::Bf16, scale);
                    dequantised(&q, &scales, scale)
                }
            };
            Global::expert(row.expert.expect("a row of an expert"), &values)
        };
        let floats = (Float::F32, Float::F32);
        step.combine(0, GLOBAL_HIDDEN, floats, oracle::Weights::Dispatched, &Dropped::new(), result, None)
    }

    /// One rank's part; the sums of its tokens.
    fn run(
        &self,
        seat: &Seat,
        backend: Backend,
        owner: &[usize],
        quant: Option<Scale>,
    ) -> Result<Vec<u8>, String> {
        let mut config = config(seat);
        backend.choose(&mut config);
        let owners: Vec<i32> = owner.iter().map(|&rank| rank as i32).collect();
        config.placement = A2A_PLACEMENT_TABLE;
        config.expert_owner = owners.as_ptr();
        config.num_experts = GLOBAL_EXPERTS as i32;
        config.max_topk = GLOBAL_TOPK as i32;
        config.max_hidden = GLOBAL_HIDDEN as i32;
        config.max_tokens = EVERYBODY as i32;
        config.combine_dtype = A2A_DTYPE_F32;
        config.quant = match quant {
            None => A2A_QUANT_NONE,
            Some(Scale::F32) => A2A_QUANT_FP8_F32_SCALES,
            Some(Scale::Ue8m0) => A2A_QUANT_FP8_UE8M0_SCALES,
        };
        let comm = Comm::create(&config)?;
        let routing = comm.routing(0)?;
        meet(seat)?;
        let share = EVERYBODY / seat.world;
        let from = seat.rank * share;
        let part = |bytes: &[u8], row_bytes: usize| bytes[from * row_bytes..][..share * row_bytes].to_vec();
        let ids: Vec<u8> = self.ids.iter().flat_map(|id| id.to_le_bytes()).collect();
        let weights: Vec<u8> = self.weights.iter().flat_map(|word| word.to_le_bytes()).collect();
        let tokens = part(&self.tokens, 2 * GLOBAL_HIDDEN);
        let input = DispatchIn {
            tokens: Some(Tensor::of(BF16, &[share, GLOBAL_HIDDEN], &tokens)),
            topk_ids: Some(Tensor::of(I64, &[share, GLOBAL_TOPK], &part(&ids, 8 * GLOBAL_TOPK))),
            topk_weights: Some(Tensor::of(F32, &[share, GLOBAL_TOPK], &part(&weights, 4 * GLOBAL_TOPK))),
            max_tokens: share as i32,
            ..Default::default()
        };
        let view = || Some(Tensor::view());
        let mut output = DispatchOut {
            tokens: view(),
            scales: quant.and_then(|_| view()),
            expert_counts: view(),
            expert_offsets: view(),
            ..Default::default()
        };
        comm.dispatch(&routing, A2A_PHASE_BOTH, &input, &mut output)?;
        let read = |tensor: &Option<Tensor>| tensor.as_ref().expect("wanted").read();
        let ints = |tensor: &Option<Tensor>| tensor.as_ref().expect("wanted").read_i32();
        let (rows, counts, offsets) =
            (read(&output.tokens), ints(&output.expert_counts), ints(&output.expert_offsets));
        let scales = quant.map(|scale| (scale, read(&output.scales)));
        let mut results = comm.combine_buffer(&routing, F32)?;
        let result_bytes = 4 * GLOBAL_HIDDEN;
        let mut bytes = results.read();
        for (local, expert) in oracle::local_experts(owner, seat.rank).into_iter().enumerate() {
            let from = offsets[local] as usize;
            for row in from..from + counts[local] as usize {
                let values = match &scales {
                    None => widened(&rows[row * 2 * GLOBAL_HIDDEN..][..2 * GLOBAL_HIDDEN], Float::Bf16),
                    Some((scale, all)) => {
                        let row_bytes = scale.row_bytes(GLOBAL_HIDDEN);
                        let q = &rows[row * GLOBAL_HIDDEN..][..GLOBAL_HIDDEN];
                        dequantised(q, &all[row * row_bytes..][..row_bytes], *scale)
                    }
                };
                bytes[row * result_bytes..][..result_bytes].copy_from_slice(&Global::expert(expert, &values));
            }
        }
        results.write(&bytes);
        let mut sums =
            CombineOut { tokens: Some(Tensor::new(F32, &[share, GLOBAL_HIDDEN])), ..Default::default() };
        comm.combine(&routing, A2A_PHASE_BOTH, 0, Some(&results), &mut sums)?;
        Ok(read(&sums.tokens))
    }
}

fn widened(row: &[u8], float: Float) -> Vec<f32> {
    (0..row.len() / float.bytes()).map(|column| float.widen(float.load(row, column))).collect()
}

fn dequantised(q: &[u8], scales: &[u8], scale: Scale) -> Vec<f32> {
    let value = |(column, &bits): (usize, &u8)| {
        let group = column / 128;
        let s = match scale {
            Scale::F32 => Float::F32.widen(Float::F32.load(scales, group)),
            Scale::Ue8m0 => f32::from_bits(u32::from(scales[group]) << 23),
        };
        let magnitude = oracle::e4m3_value(bits & 0x7f) as f32;
        s * if bits >> 7 == 1 { -magnitude } else { magnitude }
    };
    q.iter().enumerate().map(value).collect()
}

/// The same tokens on one rank, on two, four and eight, whoever owns the experts: the same bits.
pub fn any_number_of_ranks(backend: Backend) -> Result<(), String> {
    for quant in [None, Some(Scale::F32), Some(Scale::Ue8m0)] {
        let rng = &mut Rng::new(&[seed(), 104]);
        let global = Arc::new(Global::new(rng));
        let expected = global.expected(quant);
        for world in [1, 2, 4, 8] {
            let scattered: Vec<usize> = (0..GLOBAL_EXPERTS).map(|_| rng.below(world)).collect();
            for owner in [oracle::contiguous(GLOBAL_EXPERTS, world), scattered] {
                let sums = Arc::new(Mutex::new(vec![Vec::new(); world]));
                let (kept, global, owners) = (sums.clone(), global.clone(), owner.clone());
                threads(world, LIMIT, move |seat| {
                    let sums = global.run(seat, backend, &owners, quant)?;
                    kept.lock().unwrap()[seat.rank] = sums;
                    Ok(())
                })?;
                let got = sums.lock().unwrap().concat();
                let (got, want) = (widened(&got, Float::F32), widened(&expected, Float::F32));
                expect("sums", got.len(), want.len())?;
                if let Some(at) = (0..got.len()).find(|&at| got[at].to_bits() != want[at].to_bits()) {
                    let (token, column) = (at / GLOBAL_HIDDEN, at % GLOBAL_HIDDEN);
                    return Err(format!(
                        "{world} ranks, owners {owner:?}, {quant:?}: token {token} column {column} is {:e}, expected {:e}",
                        got[at], want[at]
                    ));
                }
            }
        }
    }
    Ok(())
}

// ------------------------------------------------------------------------------------------------ refusals

/// max_recv_rows is exceeded under A2A_OVERFLOW_ERROR: every rank is told, nothing is left behind.
pub fn too_many_rows(backend: Backend) -> Result<(), String> {
    const LIMIT_ROWS: usize = 9;
    threads(3, LIMIT, move |seat| {
        let mut config = small(seat, backend);
        config.max_recv_rows = LIMIT_ROWS as i64;
        let comm = Comm::create(&config)?;
        let (routing, other) = (comm.routing(0)?, comm.routing(0)?);
        meet(seat)?;
        let rank = format!("rank {}", seat.rank);

        // All tokens of all ranks choose the experts of rank 1, one of them twice.
        let ids: Vec<i64> = vec![2, 3, 3];
        let ranks = vec![Input { tokens: T, ids: Some(ids.repeat(T)), ..Default::default() }; seat.world];
        let step = oracle::Step {
            owner: oracle::contiguous(EXPERTS, seat.world),
            layout: backend.layout(SMALL_ALIGNMENT),
            limit: LIMIT_ROWS,
            bound: M,
            topk: K,
            reuse: false,
            ranks,
        };
        expect("ranks with too little room", step.overflowing(), vec![1])?;
        let words =
            ["rank 1".into(), step.demand(1).to_string(), "max_recv_rows".into(), LIMIT_ROWS.to_string()];
        let words = words.each_ref().map(String::as_str);
        // On a GPU the call is over before anybody knows: the status says it.
        let words = if cuda::is_enabled() { &[] } else { &words[..] };
        let id_bytes: Vec<u8> = ids.repeat(T).iter().flat_map(|&id| (id as i32).to_le_bytes()).collect();
        let too_many = DispatchIn { topk_ids: Some(Tensor::of(I32, &[T, K], &id_bytes)), ..small_input() };
        let output = || {
            let mut output = small_output(seat, backend);
            output.status = Some(Tensor::new(I32, &[4 + seat.world]));
            output
        };
        // One token of each rank has room.
        let few = || {
            let keep = |tensor: Option<Tensor>| {
                let tensor = tensor.expect("given");
                let shape = [&[1], &tensor.shape()[1..]].concat();
                let bytes = tensor.read();
                Some(Tensor::of(tensor.dtype(), &shape, &bytes[..bytes.len() / T]))
            };
            let DispatchIn { tokens, topk_ids, topk_weights, scales, .. } = small_input();
            DispatchIn {
                tokens: keep(tokens),
                topk_ids: keep(topk_ids),
                topk_weights: keep(topk_weights),
                scales: keep(scales),
                ..Default::default()
            }
        };
        let good = |routing: &Routing| -> Result<(), String> {
            let mut received = DispatchOut { extras: Default::default(), ..output() };
            comm.dispatch(routing, A2A_PHASE_BOTH, &few(), &mut received)?;
            let status = received.status.as_ref().expect("wanted").read_i32();
            expect("bits, bad ids and drops", &status[..3], &[0, 0, 0])?;
            let rows = if backend.keeps_rows() {
                ones(seat, backend, &comm, routing)?
            } else {
                Tensor::of(F32, &[LIMIT_ROWS, HIDDEN], &1.0f32.to_le_bytes().repeat(LIMIT_ROWS * HIDDEN))
            };
            let mut sums = CombineOut { tokens: Some(Tensor::new(F32, &[1, HIDDEN])), ..small_sums() };
            comm.combine(routing, A2A_PHASE_BOTH, 0, Some(&rows), &mut sums)?;
            // Experts 0, 1, 2: of two ranks.
            let want = if backend.by_expert() { K as f32 } else { 2.0 };
            let sums = sums.tokens.expect("given").read();
            expect("sums", widened(&sums, Float::F32), vec![want; HIDDEN])
        };

        good(&routing)?;
        for split in [false, true, true, false] {
            let mut received = output();
            let result = if split ^ (seat.rank == 2) {
                comm.dispatch(&routing, A2A_PHASE_SEND, &too_many, &mut received)?;
                comm.dispatch(&routing, A2A_PHASE_RECV, &too_many, &mut received)
            } else {
                comm.dispatch(&routing, A2A_PHASE_BOTH, &too_many, &mut received)
            };
            refused("too many rows", result, A2A_OVERFLOW, words)?;
            let status = received.status.as_ref().expect("wanted").read_i32();
            expect("bits", status[0], A2A_STEP_VOID | A2A_STEP_OVERFLOW)?;
            expect("its own demand", status[3], step.demand(seat.rank) as i32)?;
            expect("ranks with too little room", &status[4..], &[0, 1, 0])?;

            let replay = reusing(small_input());
            let reused = comm.dispatch(&routing, A2A_PHASE_BOTH, &replay, &mut output());
            if cuda::is_enabled() {
                refused("reuse of nothing", reused, A2A_OVERFLOW, &[])?;
            } else {
                refused("reuse of nothing", reused, A2A_INVALID_ARGUMENT, &[&rank])?;
                let rows = Tensor::new(F32, &[LIMIT_ROWS, HIDDEN]);
                let combined = comm.combine(&routing, A2A_PHASE_BOTH, 0, Some(&rows), &mut small_sums());
                refused("combine of nothing", combined, A2A_INVALID_ARGUMENT, &[&rank])?;
            }
            if backend.keeps_rows() && !cuda::is_enabled() {
                let buffer = comm.combine_buffer(&routing, F32).map(drop);
                refused("a buffer for nothing", buffer, A2A_INVALID_ARGUMENT, &[&rank])?;
            }
            // At once, with another routing or the same.
            if split {
                good(&other)?;
            }
            good(&routing)?;
        }
        expect("an error on record", comm.async_error()?.status, A2A_SUCCESS)
    })
}

/// A dispatch once more, without ids.
fn reusing(input: DispatchIn) -> DispatchIn {
    DispatchIn { topk_ids: None, flags: input.flags | A2A_DISPATCH_REUSE, ..input }
}

/// What a dispatch with REUSE must be given, and what disagreement about it leads to.
fn refused_reuse(backend: Backend) -> Result<(), String> {
    threads(2, LIMIT, move |seat| {
        let comm = Comm::create(&small(seat, backend))?;
        let (routing, never, apart) = (comm.routing(0)?, comm.routing(0)?, comm.routing(1)?);
        meet(seat)?;
        small_step(seat, backend, &comm, &routing)?;
        let rank = format!("rank {}", seat.rank);
        let output = || small_output(seat, backend);
        let weights = |topk| Some(Tensor::of(F32, &[T, topk], &1.0f32.to_le_bytes().repeat(T * topk)));
        let with_ids = DispatchIn { topk_ids: small_input().topk_ids, ..reusing(small_input()) };
        let shorter = DispatchIn {
            tokens: Some(Tensor::new(BF16, &[T - 1, HIDDEN])),
            scales: None,
            topk_weights: None,
            extras: Default::default(),
            ..reusing(small_input())
        };
        let bound = DispatchIn { max_tokens: 8, ..reusing(small_input()) };
        let columns = DispatchIn { topk_weights: weights(K - 1), ..reusing(small_input()) };
        let cases: [(&str, &Routing, DispatchIn, &[&str]); 5] = [
            ("reuse of a routing never dispatched", &never, reusing(small_input()), &["REUSE"]),
            ("reuse with ids", &routing, with_ids, &["topk_ids"]),
            ("reuse with another T", &routing, shorter, &["4", "5"]),
            ("reuse with another bound", &routing, bound, &["max_tokens", "8", "16"]),
            ("reuse with another top-k", &routing, columns, &["topk_weights", "2", "3"]),
        ];
        let mut problems = Vec::new();
        for (what, routing, input, words) in cases {
            let mut output = output();
            if input.scales.is_none() {
                (output.scales, output.extras) = (None, Default::default());
            }
            let result = comm.dispatch(routing, A2A_PHASE_BOTH, &input, &mut output);
            let words = [&[&rank[..]], words].concat();
            problems.extend(refused(what, result, A2A_INVALID_ARGUMENT, &words).err());
        }

        // Nothing of that was a step.
        let mut sums = small_sums();
        comm.dispatch(&routing, A2A_PHASE_BOTH, &reusing(small_input()), &mut output())?;
        let rows = ones(seat, backend, &comm, &routing)?;
        comm.combine(&routing, A2A_PHASE_BOTH, 0, Some(&rows), &mut sums)?;
        check_ones(seat, backend, &sums)?;
        if backend == Backend::Gather {
            gradients_without_ids(&rank, &comm, &never, &mut problems)?;
        }

        // One rank brings row_weights, the other does not.
        comm.dispatch(&routing, A2A_PHASE_BOTH, &small_input(), &mut output())?;
        let rows = Some(ones(seat, backend, &comm, &routing)?);
        let columns: &[usize] = if backend.by_expert() { &[] } else { &[K] };
        let full = capacity(seat, backend);
        let values = Tensor::new(F32, &[&[full], columns].concat());
        let row_weights = Some(values).filter(|_| seat.rank == 0);
        let input = CombineIn { tokens: rows, row_weights, ..Default::default() };
        let result = comm.combine_with(&routing, A2A_PHASE_BOTH, &input, &mut sums);
        problems.extend(refused("row_weights of one rank", result, A2A_MISMATCH, &[&rank]).err());

        // One rank replays, the other dispatches anew: on the other slot, for the first is closed.
        small_step(seat, backend, &comm, &apart)?;
        let input = if seat.rank == 0 { reusing(small_input()) } else { small_input() };
        let result = comm.dispatch(&apart, A2A_PHASE_BOTH, &input, &mut output());
        problems.extend(refused("reuse by one rank", result, A2A_MISMATCH, &[&rank]).err());
        none_of(problems)
    })
}

/// Gathered rows without ids have no experts whose values could go back; they can be replayed all the same.
fn gradients_without_ids(
    rank: &str,
    comm: &Comm,
    routing: &Routing,
    problems: &mut Vec<String>,
) -> Result<(), String> {
    let input = || DispatchIn { topk_ids: None, topk_weights: None, ..small_input() };
    for replay in [false, true] {
        let input = if replay { reusing(input()) } else { input() };
        let view = || Some(Tensor::view());
        let mut output = DispatchOut { tokens: view(), row_source: view(), ..Default::default() };
        comm.dispatch(routing, A2A_PHASE_BOTH, &input, &mut output)?;
        let rows = || Some(Tensor::of(F32, &[2 * M, HIDDEN], &1.0f32.to_le_bytes().repeat(2 * M * HIDDEN)));
        let values = Some(Tensor::new(F32, &[2 * M, K]));
        let input = CombineIn { tokens: rows(), row_weights: values, ..Default::default() };
        let result = comm.combine_with(routing, A2A_PHASE_BOTH, &input, &mut small_sums());
        let what = "gradients without ids";
        problems.extend(refused(what, result, A2A_INVALID_ARGUMENT, &[rank, "row_weights"]).err());
        let (mut sums, rows) = (small_sums(), rows());
        comm.combine(routing, A2A_PHASE_BOTH, 0, rows.as_ref(), &mut sums)?;
        let sums = sums.tokens.expect("given").read();
        expect("sums over both ranks", widened(&sums, Float::F32), vec![2.0; T * HIDDEN])?;
    }
    Ok(())
}

/// What a dispatch that quantises must be given.
fn refused_quantisation(backend: Backend) -> Result<(), String> {
    // Three groups of columns, the last one short.
    const WIDE: usize = 272;
    const GROUPS: usize = 3;
    for by_column in [false, true] {
        threads(2, LIMIT, move |seat| {
            let mut config = small(seat, backend);
            config.max_scale_bytes = 0;
            config.max_hidden = WIDE as i32;
            config.quant = A2A_QUANT_FP8_F32_SCALES;
            config.scale_layout = if by_column { A2A_SCALES_COLUMN } else { A2A_SCALES_ROW };
            let comm = Comm::create(&config)?;
            let routing = comm.routing(0)?;
            meet(seat)?;
            let rows = small_rows(seat, backend);
            let shape = |columns: usize| [&rows[..], &[columns]].concat();
            let by_row = |dtype| Tensor::new(dtype, &shape(GROUPS));
            let columns = |dtype| Tensor::columns(dtype, &shape(GROUPS), rows[rows.len() - 1], 0);
            let scales = |dtype, by_column| if by_column { columns(dtype) } else { by_row(dtype) };
            let input = || DispatchIn {
                tokens: Some(Tensor::of(BF16, &[T, WIDE], &[7; 2 * T * WIDE])),
                scales: None,
                ..small_input()
            };
            let output = || DispatchOut {
                tokens: Some(Tensor::new(F8, &shape(WIDE))),
                scales: Some(scales(F32, by_column)),
                ..small_output(seat, backend)
            };
            let tokens = |dtype, hidden| Some(Tensor::new(dtype, &[T, hidden]));
            let given = |columns| Some(Tensor::new(F32, &[T, columns]));
            let cases: [(&str, DispatchIn, DispatchOut, &[&str]); 8] = [
                ("scales of floats", DispatchIn { scales: given(GROUPS), ..input() }, output(), &["scales"]),
                (
                    "e4m3 without scales",
                    DispatchIn { tokens: tokens(F8, WIDE), ..input() },
                    output(),
                    &["scales"],
                ),
                (
                    "e4m3 with too many scales",
                    DispatchIn { tokens: tokens(F8, WIDE), scales: given(4), ..input() },
                    output(),
                    &["scales", "16", "12"],
                ),
                ("opaque bytes", DispatchIn { tokens: tokens(U8, WIDE), ..input() }, output(), &["tokens"]),
                (
                    "24 values a row",
                    DispatchIn { tokens: tokens(BF16, 24), ..input() },
                    output(),
                    &["tokens", "24", "16"],
                ),
                (
                    "values out that are not e4m3",
                    input(),
                    DispatchOut { tokens: Some(Tensor::new(BF16, &shape(WIDE))), ..output() },
                    &["tokens", "bfloat16"],
                ),
                (
                    "scales out of another type",
                    input(),
                    DispatchOut { scales: Some(scales(I32, by_column)), ..output() },
                    &["scales", "int32", "float32"],
                ),
                (
                    "scales out the other way round",
                    input(),
                    DispatchOut { scales: Some(scales(F32, !by_column)), ..output() },
                    &["scales"],
                ),
            ];
            let mut problems = Vec::new();
            for (what, input, mut output, words) in cases {
                let result = comm.dispatch(&routing, A2A_PHASE_BOTH, &input, &mut output);
                problems.extend(refused(what, result, A2A_INVALID_ARGUMENT, words).err());
            }
            comm.dispatch(&routing, A2A_PHASE_BOTH, &input(), &mut output())?;
            none_of(problems)
        })?;
    }
    Ok(())
}
