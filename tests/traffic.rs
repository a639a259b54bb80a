//! A strategy is its traffic: for a recorded routing, a2a_get_stats shows exactly the rows and bytes that each
//! strategy implies, worked out here from the routing alone.

use std::ptr::{null, null_mut};
use std::time::Duration;

use a2a::abi::calls::a2a_combine;
use a2a::abi::types::*;

#[allow(dead_code, reason = "each test binary uses a part")]
mod common;

use common::*;

const LIMIT: Duration = Duration::from_secs(60);
const HIDDEN: usize = 128;
const TOKEN_BYTES: u64 = 2 * HIDDEN as u64;
const SCALE_BYTES: u64 = 4;
const EXTRA_BYTES: u64 = 6;
const RESULT_BYTES: u64 = 4 * HIDDEN as u64;
const STEPS: u64 = 3;

/// What a rank does, STEPS times a dispatch and a combine.
#[derive(Clone, Copy)]
struct Run {
    world: usize,
    backend: a2a_backend_t,
    layout: a2a_layout_t,
    /// Each operation in two calls, SEND and RECV.
    split: bool,
    /// Every dispatch but the first replays the first.
    reuse: bool,
    /// The tokens that arrive go to a tensor of the caller's.
    own: bool,
    /// Of what arrives only the tokens are wanted.
    bare: bool,
    /// The results stand elsewhere than in the combine buffer.
    staged: bool,
    /// Combine carries row_weights back.
    weights_back: bool,
    fifo_rows: i32,
    /// With duplicate ids and -1.
    odd: bool,
}

impl Run {
    const fn of(backend: a2a_backend_t, layout: a2a_layout_t) -> Run {
        Run {
            world: 4,
            backend,
            layout,
            split: false,
            reuse: false,
            own: false,
            bare: false,
            staged: false,
            weights_back: false,
            fifo_rows: 0,
            odd: false,
        }
    }
    fn is_by_expert(&self) -> bool {
        matches!(self.layout, A2A_LAYOUT_EXPERT_PADDED | A2A_LAYOUT_EXPERT_CONTIGUOUS)
    }
    /// What a received row is.
    fn row(&self) -> What {
        if self.is_by_expert() { What::Experts } else { What::Tokens }
    }
}

const ALLGATHER: Run = Run::of(A2A_BACKEND_ALLGATHER_REDUCESCATTER, A2A_LAYOUT_GATHERED);
const ONE_SIDED: Run = Run::of(A2A_BACKEND_NVLINK_ONE_SIDED, A2A_LAYOUT_RANK_MAJOR);
const FLAT: Run = Run::of(A2A_BACKEND_HIGH_THROUGHPUT, A2A_LAYOUT_FLAT);
const CONTIGUOUS: Run = Run::of(A2A_BACKEND_HIGH_THROUGHPUT, A2A_LAYOUT_EXPERT_CONTIGUOUS);
const LOW_LATENCY: Run = Run::of(A2A_BACKEND_LOW_LATENCY, A2A_LAYOUT_EXPERT_PADDED);
const TWO_SIDED: Run = Run::of(A2A_BACKEND_NVLINK_TWO_SIDED, A2A_LAYOUT_FLAT);

/// What is counted of a token for a rank.
#[derive(Clone, Copy)]
enum What {
    /// 1 if one of its experts is there.
    Tokens,
    /// Its distinct experts there.
    Experts,
    /// Its ids there, duplicates too.
    Choices,
}

/// The recorded routing, cut into equal shares.
struct Shares {
    recorded: Recorded,
    world: usize,
    /// T of each rank.
    tokens: usize,
}

impl Shares {
    fn new(run: &Run) -> Shares {
        let mut recorded = Recorded::load("deepseek_v3");
        assert_eq!((recorded.tokens % run.world, recorded.experts % run.world), (0, 0));
        if run.odd {
            // What no recording has: every fifth token names an expert twice, every seventh has one expert less.
            for (token, ids) in recorded.ids.chunks_exact_mut(recorded.topk).enumerate() {
                if token % 5 == 0 {
                    ids[7] = ids[0];
                }
                if token % 7 == 0 {
                    ids[3] = -1;
                }
            }
        }
        Shares { world: run.world, tokens: recorded.tokens / run.world, recorded }
    }
    fn topk(&self) -> u64 {
        self.recorded.topk as u64
    }
    fn ids(&self, rank: usize) -> &[i64] {
        let share = self.tokens * self.recorded.topk;
        &self.recorded.ids[rank * share..][..share]
    }
    fn weights(&self, rank: usize) -> &[u32] {
        let share = self.tokens * self.recorded.topk;
        &self.recorded.weights[rank * share..][..share]
    }
    /// For each of `source`'s tokens the experts it names on `owner`, sorted.
    fn named(&self, source: usize, owner: usize) -> Vec<Vec<usize>> {
        let per_rank = self.recorded.experts / self.world;
        let own = owner * per_rank..(owner + 1) * per_rank;
        let tokens = self.ids(source).chunks_exact(self.recorded.topk);
        tokens
            .map(|ids| {
                let mut named: Vec<usize> = ids.iter().filter_map(|&id| usize::try_from(id).ok()).collect();
                named.retain(|id| own.contains(id));
                named.sort_unstable();
                named
            })
            .collect()
    }
    fn count(&self, what: What, source: usize, owner: usize) -> u64 {
        let of_token = |mut named: Vec<usize>| match what {
            What::Tokens => usize::from(!named.is_empty()),
            What::Experts => {
                named.dedup();
                named.len()
            }
            What::Choices => named.len(),
        };
        self.named(source, owner).into_iter().map(of_token).sum::<usize>() as u64
    }
    /// Of a rank's tokens: all, and those with another rank.
    fn sent(&self, what: What, source: usize) -> (u64, u64) {
        let all = (0..self.world).map(|owner| self.count(what, source, owner)).sum();
        (all, all - self.count(what, source, source))
    }
    /// Of what comes to a rank: all, and that from another rank.
    fn received(&self, what: What, rank: usize) -> (u64, u64) {
        let all = (0..self.world).map(|source| self.count(what, source, rank)).sum();
        (all, all - self.count(what, rank, rank))
    }

    fn create(&self, seat: &Seat, run: &Run) -> Result<Comm, Failure> {
        let mut config = config(seat);
        config.backend = run.backend;
        config.layout = run.layout;
        config.fifo_rows = run.fifo_rows;
        config.num_experts = self.recorded.experts as i32;
        config.max_topk = self.recorded.topk as i32;
        config.max_hidden = HIDDEN as i32;
        config.max_tokens = self.tokens as i32;
        config.combine_dtype = A2A_DTYPE_F32;
        if run.layout == A2A_LAYOUT_EXPERT_CONTIGUOUS {
            config.expert_alignment = 16;
        }
        config.max_scale_bytes = SCALE_BYTES as i32;
        config.extra_row_bytes[0] = EXTRA_BYTES as i32;
        Comm::create(&config)
    }

    fn input(&self, rank: usize) -> DispatchIn {
        let (t, k) = (self.tokens, self.recorded.topk);
        let ids: Vec<u8> = self.ids(rank).iter().flat_map(|id| (*id as i32).to_le_bytes()).collect();
        let weights: Vec<u8> = self.weights(rank).iter().flat_map(|word| word.to_le_bytes()).collect();
        let mut input = DispatchIn {
            tokens: Some(Tensor::new(BF16, &[t, HIDDEN])),
            topk_ids: Some(Tensor::of(I32, &[t, k], &ids)),
            topk_weights: Some(Tensor::of(F32, &[t, k], &weights)),
            scales: Some(Tensor::new(F32, &[t, 1])),
            ..Default::default()
        };
        input.extras[0] = Some(Tensor::new(U16, &[t, 3]));
        input
    }
}

/// Views, so that what arrives stays where it arrives; the caller's tensors where the run, or the strategy, wants them.
fn outputs(run: &Run, shares: &Shares, capacity: usize) -> DispatchOut {
    let keeps_none = run.backend == A2A_BACKEND_NVLINK_TWO_SIDED;
    let output = |own: bool, dtype: Dtype, columns: usize| {
        Some(if own || keeps_none { Tensor::new(dtype, &[capacity, columns]) } else { Tensor::view() })
    };
    let mut outputs = DispatchOut { tokens: output(run.own, BF16, HIDDEN), ..Default::default() };
    if run.bare {
        return outputs;
    }
    let topk = shares.recorded.topk;
    if run.layout != A2A_LAYOUT_EXPERT_PADDED {
        outputs.topk_ids = output(false, I32, topk);
    }
    outputs.topk_weights = output(false, F32, topk);
    outputs.row_source = output(false, I32, 2);
    outputs.scales = output(false, F32, 1);
    outputs.extras[0] = output(false, U16, 3);
    outputs
}

fn run_steps(run: &Run, shares: &Shares, seat: &Seat, comm: &Comm) -> Result<(), Failure> {
    let routing = comm.routing(0)?;
    let capacity = comm.info()?.row_capacity as usize;
    let phases: &[a2a_phase_t] =
        if run.split { &[A2A_PHASE_SEND, A2A_PHASE_RECV] } else { &[A2A_PHASE_BOTH] };
    for step in 0..STEPS {
        let mut input = shares.input(seat.rank);
        if run.reuse && step > 0 {
            input.flags = A2A_DISPATCH_REUSE;
            input.topk_ids = None;
            input.topk_weights = None;
        }
        let mut output = outputs(run, shares, capacity);
        for phase in phases {
            comm.dispatch(&routing, *phase, &input, &mut output)?;
        }
        let rows = if run.staged || run.backend == A2A_BACKEND_NVLINK_TWO_SIDED {
            Tensor::new(F32, &[capacity, HIDDEN])
        } else {
            comm.combine_buffer(&routing, F32)?
        };
        let topk = shares.recorded.topk;
        let row_weights = if run.is_by_expert() {
            Tensor::new(F32, &[capacity])
        } else {
            Tensor::new(F32, &[capacity, topk])
        };
        let mut sums = Tensor::new(BF16, &[shares.tokens, HIDDEN]);
        let mut weights = Tensor::new(F32, &[shares.tokens, topk]);
        for phase in phases {
            let input = a2a_combine_in_t {
                struct_size: size_of::<a2a_combine_in_t>(),
                tokens: rows.as_ptr(),
                topk_weights: null(),
                row_weights: if run.weights_back { row_weights.as_ptr() } else { null() },
                flags: 0,
                phase: *phase,
                max_sms: 0,
            };
            let mut output = a2a_combine_out_t {
                struct_size: size_of::<a2a_combine_out_t>(),
                tokens: sums.as_mut_ptr(),
                topk_weights: if run.weights_back { weights.as_mut_ptr() } else { null_mut() },
                status: null_mut(),
            };
            // SAFETY: live handles; the tensors outlive the call.
            check(unsafe { a2a_combine(comm.handle(), routing.handle(), &input, &mut output, null_mut()) })?;
        }
    }
    Ok(())
}

/// What the routing implies for a rank's dispatch.
fn dispatch(run: &Run, shares: &Shares, rank: usize, is_reused: bool) -> a2a_stats_t {
    let moved = TOKEN_BYTES + SCALE_BYTES + EXTRA_BYTES;
    let sides = 4 * shares.topk() + 4 * shares.topk() + 8;
    let wire = moved + sides;
    let (tokens, tokens_remote) = shares.sent(What::Tokens, rank);
    let (experts, experts_remote) = shares.sent(What::Experts, rank);
    let (rows_in, _) = shares.received(run.row(), rank);
    let (tokens_in, _) = shares.received(What::Tokens, rank);
    // A row to each rank that owns one of a token's experts.
    let once_a_rank = a2a_stats_t {
        dispatches: 1,
        rows_pushed: tokens,
        bytes_pushed: tokens * wire,
        bytes_remote: tokens_remote * wire,
        hops: 1,
        ..Default::default()
    };
    let in_place = !run.split || is_reused;
    // The counts that say where rows stand take a hop of their own; a bank per source needs them in RECV only.
    let counted = u64::from(!is_reused);
    let copied = |stats: a2a_stats_t, rows: u64, row_bytes: u64| a2a_stats_t {
        rows_copied: rows,
        bytes_copied: rows * row_bytes,
        ..stats
    };
    let to_the_caller = |stats| if run.own { copied(stats, rows_in, TOKEN_BYTES) } else { stats };
    match (run.backend, run.layout) {
        (A2A_BACKEND_ALLGATHER_REDUCESCATTER, _) => {
            let (mine, all) = (shares.tokens as u64, shares.recorded.tokens as u64);
            // The source of a gathered row is known without being sent.
            let wire = wire - 8;
            let gathered = a2a_stats_t {
                dispatches: 1,
                rows_gathered: all,
                bytes_gathered: all * wire,
                bytes_remote: (all - mine) * wire,
                hops: 1,
                ..Default::default()
            };
            // Its own rows are published in its own window. Gathered rows go straight to the caller's tensors.
            copied(gathered, mine, wire)
        }
        (A2A_BACKEND_NVLINK_ONE_SIDED, _) => to_the_caller(once_a_rank),
        (A2A_BACKEND_HIGH_THROUGHPUT, A2A_LAYOUT_FLAT) => {
            let stats = a2a_stats_t { hops: 1 + counted, ..once_a_rank };
            if in_place {
                return to_the_caller(stats);
            }
            copied(stats, rows_in, if run.bare { TOKEN_BYTES } else { wire })
        }
        (A2A_BACKEND_HIGH_THROUGHPUT, _) => {
            let stats = a2a_stats_t { hops: 1 + counted, ..once_a_rank };
            // A token comes once, to the first of its rows; the receiver makes the others.
            copied(stats, if in_place { rows_in - tokens_in } else { rows_in }, moved)
        }
        (A2A_BACKEND_LOW_LATENCY, _) => {
            let stats = a2a_stats_t { hops: 1 + counted, ..once_a_rank };
            if !in_place {
                return copied(stats, rows_in, moved);
            }
            // One weight and one source a row, and no ids.
            let wire = moved + 4 + 8;
            to_the_caller(a2a_stats_t {
                rows_pushed: experts,
                bytes_pushed: experts * wire,
                bytes_remote: experts_remote * wire,
                ..stats
            })
        }
        (A2A_BACKEND_NVLINK_TWO_SIDED, _) => a2a_stats_t {
            dispatches: 1,
            rows_fifo: tokens,
            bytes_fifo: tokens * wire,
            bytes_remote: tokens_remote * wire,
            hops: 1 + counted,
            ..Default::default()
        },
        other => unreachable!("{other:?}"),
    }
}

/// What the routing implies for a rank's combine.
fn combine(run: &Run, shares: &Shares, rank: usize) -> a2a_stats_t {
    let (rows_in, rows_in_remote) = shares.received(run.row(), rank);
    let once = a2a_stats_t { combines: 1, hops: 1, ..Default::default() };
    if run.backend == A2A_BACKEND_NVLINK_TWO_SIDED {
        // Here the experts' rank sends.
        return a2a_stats_t {
            rows_fifo: rows_in,
            bytes_fifo: rows_in * RESULT_BYTES,
            bytes_remote: rows_in_remote * RESULT_BYTES,
            ..once
        };
    }
    let (rows, rows_remote) = shares.sent(run.row(), rank);
    let (values, values_remote) = if run.weights_back { shares.sent(What::Choices, rank) } else { (0, 0) };
    let staged = match (run.staged, run.backend) {
        (false, _) => 0,
        (true, A2A_BACKEND_ALLGATHER_REDUCESCATTER) => shares.recorded.tokens as u64,
        (true, _) => rows_in,
    };
    let row_values = match (run.weights_back, run.is_by_expert()) {
        (false, _) => 0,
        (true, false) => shares.topk(),
        (true, true) => 1,
    };
    a2a_stats_t {
        rows_pulled: rows,
        bytes_pulled: rows * RESULT_BYTES + 4 * values,
        rows_copied: staged,
        bytes_copied: staged * (RESULT_BYTES + 4 * row_values),
        bytes_remote: rows_remote * RESULT_BYTES + 4 * values_remote,
        ..once
    }
}

/// Adds up what `dispatch` and `combine` can make of a counter.
fn sum(parts: &[a2a_stats_t]) -> a2a_stats_t {
    let of = |counter: fn(&a2a_stats_t) -> u64| parts.iter().map(counter).sum();
    a2a_stats_t {
        dispatches: of(|s| s.dispatches),
        combines: of(|s| s.combines),
        rows_pushed: of(|s| s.rows_pushed),
        bytes_pushed: of(|s| s.bytes_pushed),
        rows_pulled: of(|s| s.rows_pulled),
        bytes_pulled: of(|s| s.bytes_pulled),
        rows_gathered: of(|s| s.rows_gathered),
        bytes_gathered: of(|s| s.bytes_gathered),
        rows_fifo: of(|s| s.rows_fifo),
        bytes_fifo: of(|s| s.bytes_fifo),
        rows_copied: of(|s| s.rows_copied),
        bytes_copied: of(|s| s.bytes_copied),
        bytes_remote: of(|s| s.bytes_remote),
        hops: of(|s| s.hops),
        ..Default::default()
    }
}

/// The counters by name, the zero ones left out.
fn moved(stats: &a2a_stats_t) -> Vec<(&'static str, u64)> {
    let all = [
        ("dispatches", stats.dispatches),
        ("combines", stats.combines),
        ("rows_pushed", stats.rows_pushed),
        ("bytes_pushed", stats.bytes_pushed),
        ("rows_pulled", stats.rows_pulled),
        ("bytes_pulled", stats.bytes_pulled),
        ("rows_gathered", stats.rows_gathered),
        ("bytes_gathered", stats.bytes_gathered),
        ("rows_fifo", stats.rows_fifo),
        ("bytes_fifo", stats.bytes_fifo),
        ("rows_copied", stats.rows_copied),
        ("bytes_copied", stats.bytes_copied),
        ("bytes_remote", stats.bytes_remote),
        ("hops", stats.hops),
        ("bad_ids", stats.bad_ids),
        ("steps_lost", stats.steps_lost),
    ];
    all.into_iter().filter(|(_, value)| *value != 0).collect()
}

fn compare(got: &a2a_stats_t, want: a2a_stats_t) -> Result<(), String> {
    let (got, want) = (moved(got), moved(&want));
    if got == want { Ok(()) } else { Err(format!("the stats are\n {got:?}, the routing implies\n {want:?}")) }
}

/// Runs it on every rank and compares every counter.
fn implied(run: Run) {
    threads(run.world, LIMIT, move |seat| {
        let shares = Shares::new(&run);
        let comm = shares.create(seat, &run)?;
        run_steps(&run, &shares, seat, &comm)?;
        let parts: Vec<a2a_stats_t> = (0..STEPS)
            .flat_map(|step| {
                let is_reused = run.reuse && step > 0;
                [dispatch(&run, &shares, seat.rank, is_reused), combine(&run, &shares, seat.rank)]
            })
            .collect();
        compare(&comm.stats()?, sum(&parts))
    })
    .unwrap();
}

/// With 4 ranks and 8, and with ids that no recording has.
fn in_groups(run: Run) {
    implied(run);
    implied(Run { world: 8, ..run });
    implied(Run { odd: true, ..run });
}

#[test]
fn allgather_moves_every_token_to_every_rank() {
    in_groups(ALLGATHER);
    implied(Run { split: true, ..ALLGATHER });
}

#[test]
fn one_sided_moves_a_token_once_to_each_rank() {
    in_groups(ONE_SIDED);
    implied(Run { split: true, ..ONE_SIDED });
}

#[test]
fn high_throughput_moves_a_token_once_to_each_rank() {
    in_groups(FLAT);
    in_groups(CONTIGUOUS);
}

#[test]
fn high_throughput_in_two_halves_moves_what_came_to_its_place() {
    in_groups(Run { split: true, ..FLAT });
    in_groups(Run { split: true, ..CONTIGUOUS });
}

#[test]
fn low_latency_moves_a_token_to_each_expert() {
    in_groups(LOW_LATENCY);
}

#[test]
fn low_latency_in_two_halves_moves_a_token_once_to_each_rank() {
    in_groups(Run { split: true, ..LOW_LATENCY });
}

#[test]
fn two_sided_moves_rows_through_fifos() {
    in_groups(TWO_SIDED);
    implied(Run { split: true, ..TWO_SIDED });
}

#[test]
fn two_sided_fifos_wrap() {
    let run = Run { fifo_rows: 2, ..TWO_SIDED };
    let shares = Shares::new(&run);
    for (source, owner) in (0..4).flat_map(|source| (0..4).map(move |owner| (source, owner))) {
        assert!(shares.count(What::Tokens, source, owner) > 10, "rank {source} to {owner} would not wrap");
    }
    implied(run);
    implied(Run { split: true, ..run });
}

#[test]
fn a_replayed_routing_is_not_counted_again() {
    for run in [ALLGATHER, ONE_SIDED, FLAT, CONTIGUOUS, LOW_LATENCY, TWO_SIDED] {
        implied(Run { reuse: true, ..run });
        implied(Run { reuse: true, split: true, ..run });
    }
}

#[test]
fn results_are_copied_only_if_they_are_staged() {
    for run in [ALLGATHER, ONE_SIDED, FLAT, CONTIGUOUS, LOW_LATENCY] {
        implied(Run { staged: true, ..run });
    }
}

#[test]
fn a_tensor_of_the_caller_costs_a_copy_where_rows_were_placed_in_the_window() {
    for run in [ALLGATHER, ONE_SIDED, FLAT, LOW_LATENCY] {
        implied(Run { own: true, ..run });
    }
    // What is moved to its place anyway is moved there.
    for run in [FLAT, CONTIGUOUS, LOW_LATENCY] {
        implied(Run { own: true, split: true, ..run });
    }
}

#[test]
fn only_what_is_wanted_is_moved_to_its_place() {
    implied(Run { bare: true, split: true, ..FLAT });
}

#[test]
fn row_weights_come_back_value_by_value() {
    for run in [ONE_SIDED, FLAT, CONTIGUOUS, LOW_LATENCY] {
        implied(Run { weights_back: true, staged: true, odd: true, ..run });
    }
}

#[test]
fn a_dispatch_after_a_dispatch_waits_once_more() {
    for (run, own_hops) in [(ONE_SIDED, 1), (FLAT, 2), (LOW_LATENCY, 2)] {
        threads(4, LIMIT, move |seat| {
            let shares = Shares::new(&run);
            let comm = shares.create(seat, &run)?;
            let routing = comm.routing(0)?;
            for before in 0..3 {
                let mut output = outputs(&run, &shares, 0);
                comm.dispatch(&routing, A2A_PHASE_BOTH, &shares.input(seat.rank), &mut output)?;
                let hops = comm.stats()?.hops;
                // Its own, and one for the end of reading of the dispatch before it.
                if hops != own_hops + (own_hops + 1) * before {
                    return Err(format!("{hops} hops after {} dispatches", before + 1));
                }
            }
            Ok(())
        })
        .unwrap();
    }
}
