//! A strategy is its traffic: for a recorded routing, a2a_get_stats shows exactly the rows and bytes that each
//! strategy implies, worked out here from the routing alone.

use std::time::Duration;

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

/// The recorded routing, cut into equal shares.
struct Shares {
    recorded: Recorded,
    world: usize,
    /// T of each rank.
    tokens: usize,
}

impl Shares {
    fn new(world: usize) -> Shares {
        let recorded = Recorded::load("deepseek_v3");
        assert_eq!((recorded.tokens % world, recorded.experts % world), (0, 0));
        Shares { world, tokens: recorded.tokens / world, recorded }
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
    /// How many of `source`'s tokens have an expert on `owner`.
    fn rows(&self, source: usize, owner: usize) -> u64 {
        let per_rank = self.recorded.experts / self.world;
        let tokens = self.ids(source).chunks_exact(self.recorded.topk);
        tokens.filter(|ids| ids.iter().any(|&id| id as usize / per_rank == owner)).count() as u64
    }
    /// Distinct (token, rank) pairs of a rank's tokens: all, and those with another rank.
    fn pairs(&self, source: usize) -> (u64, u64) {
        let all = (0..self.world).map(|owner| self.rows(source, owner)).sum();
        (all, all - self.rows(source, source))
    }
    /// Rows a rank receives, each token once.
    fn received(&self, rank: usize) -> u64 {
        (0..self.world).map(|source| self.rows(source, rank)).sum()
    }

    fn create(&self, seat: &Seat, backend: a2a_backend_t) -> Result<Comm, Failure> {
        let mut config = config(seat);
        config.backend = backend;
        config.num_experts = self.recorded.experts as i32;
        config.max_topk = self.recorded.topk as i32;
        config.max_hidden = HIDDEN as i32;
        config.max_tokens = self.tokens as i32;
        config.combine_dtype = A2A_DTYPE_F32;
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

/// Every row output as a view: what arrives stays where it arrives.
fn views() -> DispatchOut {
    let mut output = DispatchOut {
        tokens: Some(Tensor::view()),
        topk_ids: Some(Tensor::view()),
        topk_weights: Some(Tensor::view()),
        row_source: Some(Tensor::view()),
        scales: Some(Tensor::view()),
        ..Default::default()
    };
    output.extras[0] = Some(Tensor::view());
    output
}

fn run_steps(
    shares: &Shares,
    seat: &Seat,
    comm: &Comm,
    routing: &Routing,
    staged: bool,
) -> Result<(), Failure> {
    for _ in 0..STEPS {
        let mut output = views();
        comm.dispatch(routing, A2A_PHASE_BOTH, &shares.input(seat.rank), &mut output)?;
        let buffer = comm.combine_buffer(routing, F32)?;
        let rows = if staged { Tensor::new(F32, &buffer.shape()) } else { buffer };
        let mut sums =
            CombineOut { tokens: Some(Tensor::new(BF16, &[shares.tokens, HIDDEN])), ..Default::default() };
        comm.combine(routing, A2A_PHASE_BOTH, 0, Some(&rows), &mut sums)?;
    }
    Ok(())
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

/// One row per (token, rank) pushed with its ids, weights and source; as many results pulled.
fn one_sided(world: usize, staged: bool) {
    threads(world, LIMIT, move |seat| {
        let shares = Shares::new(world);
        let comm = shares.create(seat, A2A_BACKEND_NVLINK_ONE_SIDED)?;
        run_steps(&shares, seat, &comm, &comm.routing(0)?, staged)?;
        let (pairs, remote) = shares.pairs(seat.rank);
        let row = TOKEN_BYTES + 4 * shares.topk() + 4 * shares.topk() + 8 + SCALE_BYTES + EXTRA_BYTES;
        let copied = if staged { shares.received(seat.rank) } else { 0 };
        compare(
            &comm.stats()?,
            a2a_stats_t {
                dispatches: STEPS,
                combines: STEPS,
                rows_pushed: STEPS * pairs,
                bytes_pushed: STEPS * pairs * row,
                rows_pulled: STEPS * pairs,
                bytes_pulled: STEPS * pairs * RESULT_BYTES,
                rows_copied: STEPS * copied,
                bytes_copied: STEPS * copied * RESULT_BYTES,
                bytes_remote: STEPS * remote * (row + RESULT_BYTES),
                hops: 2 * STEPS,
                ..Default::default()
            },
        )
    })
    .unwrap();
}

/// Every token read by every rank, R * sum of T rows in all; results pulled from the ranks that own an expert.
fn allgather(world: usize, staged: bool) {
    threads(world, LIMIT, move |seat| {
        let shares = Shares::new(world);
        let comm = shares.create(seat, A2A_BACKEND_ALLGATHER_REDUCESCATTER)?;
        run_steps(&shares, seat, &comm, &comm.routing(0)?, staged)?;
        let (pairs, remote) = shares.pairs(seat.rank);
        let (mine, all) = (shares.tokens as u64, shares.recorded.tokens as u64);
        // The source of a gathered row is known without being sent.
        let row = TOKEN_BYTES + 4 * shares.topk() + 4 * shares.topk() + SCALE_BYTES + EXTRA_BYTES;
        let copied = if staged { all } else { 0 };
        compare(
            &comm.stats()?,
            a2a_stats_t {
                dispatches: STEPS,
                combines: STEPS,
                rows_gathered: STEPS * all,
                bytes_gathered: STEPS * all * row,
                rows_pulled: STEPS * pairs,
                bytes_pulled: STEPS * pairs * RESULT_BYTES,
                // Its own rows are published in its own window.
                rows_copied: STEPS * (mine + copied),
                bytes_copied: STEPS * (mine * row + copied * RESULT_BYTES),
                bytes_remote: STEPS * ((all - mine) * row + remote * RESULT_BYTES),
                hops: 2 * STEPS,
                ..Default::default()
            },
        )
    })
    .unwrap();
}

#[test]
fn one_sided_moves_a_token_once_to_each_rank() {
    one_sided(4, false);
    one_sided(8, false);
}

#[test]
fn one_sided_copies_results_only_if_they_are_staged() {
    one_sided(4, true);
}

#[test]
fn allgather_moves_every_token_to_every_rank() {
    allgather(4, false);
    allgather(8, false);
}

#[test]
fn allgather_copies_results_only_if_they_are_staged() {
    allgather(4, true);
}

#[test]
fn a_dispatch_after_a_dispatch_waits_once_more() {
    threads(4, LIMIT, |seat| {
        let shares = Shares::new(4);
        let comm = shares.create(seat, A2A_BACKEND_NVLINK_ONE_SIDED)?;
        let routing = comm.routing(0)?;
        for dispatches in 0..3 {
            comm.dispatch(&routing, A2A_PHASE_BOTH, &shares.input(seat.rank), &mut views())?;
            let hops = comm.stats()?.hops;
            // One for its own flags, one for the end of reading before it.
            if hops != 1 + 2 * dispatches {
                return Err(format!("{hops} hops after {} dispatches", dispatches + 1));
            }
        }
        Ok(())
    })
    .unwrap();
}
