//! Ranks that join, leave and die while others serve, over NIXL: what each phase of a plan gives is right, row by row, against the
//! oracle, or a loss that is named in time.
//!
//! A plan says who takes part, phase by phase; a rank with a minus dies in that phase. Every rank is a process that does what it is told,
//! line by line. Needs NIXL (`make test-rust`): where A2A_NIXL_LIB names none and the loader finds none, all is ignored. On CUDA memory
//! with A2A_TEST_DEVICE=cuda (tests/conformance.rs).

use std::collections::BTreeSet;
use std::io::BufRead;
use std::process::ExitCode;
use std::thread::sleep;
use std::time::{Duration, Instant};

use a2a::abi::calls::{
    a2a_activate_ranks, a2a_connect_ranks, a2a_disconnect_ranks, a2a_get_rank_mask, a2a_set_rank_mask,
};
use a2a::abi::types::*;
use libtest_mimic::{Arguments, Completion, Trial};

#[allow(dead_code, reason = "each program uses a part")]
mod common;
#[path = "elastic/hosts.rs"]
mod hosts;
#[allow(dead_code, reason = "as above")]
mod oracle;

use common::*;
use hosts::Hosts;
use oracle::{Dropped, Float, Input, Layout, Row, Rows};

/// A process, with NIXL and a comm, has come.
const START: Duration = Duration::from_secs(60);
/// Anything else that is asked of a rank.
const ANSWER: Duration = Duration::from_secs(40);
/// A rank's own, for steps.
const STEP_MS: i64 = 5000;
/// A loss is told within this, if nobody has to be waited for; else within this after the deadline.
const PROMISE: Duration = Duration::from_secs(3);

const EXPERTS_A_RANK: usize = 2;
const HIDDEN: usize = 128;
const K: usize = 3;
const M: usize = 16;
const BF16_F32: (Float, Float) = (Float::Bf16, Float::F32);

fn main() -> ExitCode {
    worker(&[FOLLOW]);
    if let Err(error) = choose_device_of_environment() {
        eprintln!("{error}");
        return ExitCode::from(2);
    }
    let mut trials = Vec::new();
    let mut add = |name: &str, run: fn() -> Result<(), String>| {
        let elsewhere = match name {
            "alone_for_a_while" => Some("a2a_set_rank_mask is the CPU's"),
            _ if name.starts_with("steps_go_on_without") => Some("A2A_CONFIG_DEGRADE is the CPU's"),
            _ => None,
        };
        let elsewhere = elsewhere.filter(|_| cuda::is_enabled()).map(String::from);
        trials.push(Trial::ignorable_test(name, move || match missing().or(elsewhere) {
            Some(reason) => Ok(Completion::ignored_with(reason)),
            None => run().map(|()| Completion::Completed).map_err(Into::into),
        }));
    };
    add("plan/the_same_ranks", || play(4, 4, &[&[0, 1, 2, 3], &[0, 1, 2, 3]]));
    add("plan/expansion_and_a_death", || play(4, 2, &[&[0, 1], &[0, 1, 2, 3], &[0, 1, -2, 3], &[0, 3]]));
    add("plan/4_to_8", || play(8, 4, &[&[0, 1, 2, 3], &[0, 1, 2, 3, 4, 5, 6, 7]]));
    add("plan/4_to_6_to_8", || play(8, 4, &[&[0, 1, 2, 3], &[0, 1, 2, 3, 4, 5], &[0, 1, 2, 3, 4, 5, 6, 7]]));
    add("plan/4_to_8_a_death_to_6", || {
        play(
            8,
            4,
            &[&[0, 1, 2, 3], &[0, 1, 2, 3, 4, 5, 6, 7], &[0, 1, 2, 3, 4, 5, -6, 7], &[0, 1, 2, 3, 4, 5]],
        )
    });
    add("plan/of_32", || play(32, 2, &[&[0, 1], &[0, 1, 31], &[0, 17, 31], &[17, -31]]));
    add("plan/a_sparse_start", || play(4, 1, &[&[0], &[0, 2], &[0, 2, 3], &[2, 3]]));
    add("a_rank_is_replaced", a_rank_is_replaced);
    add("a_stopped_rank_is_named_and_writes_nowhere", a_stopped_rank);
    add("steps_go_on_while_ranks_connect", steps_go_on_while_ranks_connect);
    add("alone_for_a_while", alone_for_a_while);
    add("steps_go_on_without_a_dead_rank", steps_go_on_without_a_dead_rank);
    add("steps_go_on_without_a_stopped_rank", steps_go_on_without_a_stopped_rank);
    add("what_is_wrong_is_said", what_is_wrong_is_said);
    add("a_rank_comes_and_goes", a_rank_comes_and_goes);
    let mut apart = |name: &str, run: fn() -> Result<(), String>| {
        trials.push(Trial::ignorable_test(name, move || match missing().or_else(hosts::missing) {
            Some(reason) => Ok(Completion::ignored_with(reason)),
            None => run().map(|()| Completion::Completed).map_err(Into::into),
        }));
    };
    apart("hosts/2/the_same_ranks", || play_on(Some(Hosts::new(2)?), 2, 2, &[&[0, 1], &[0, 1]]));
    apart("hosts/4/expansion_and_a_death", || {
        play_on(Some(Hosts::new(4)?), 4, 2, &[&[0, 1], &[0, 1, 2, 3], &[0, 1, -2, 3], &[0, 3]])
    });
    apart("hosts/4/of_two_ranks_each", || {
        let all: &[i32] = &[0, 1, 2, 3, 4, 5, 6, 7];
        play_on(Some(Hosts::new(4)?), 8, 4, &[&[0, 1, 2, 3], all, &[0, 1, 2, 3, 4, 5]])
    });
    apart("hosts/a_cable_is_out_for_a_while", a_cable_is_out_for_a_while);
    apart("hosts/a_cable_is_out_for_good", a_cable_is_out_for_good);
    let mut args = Arguments::from_args();
    // Each test has as many processes as there are ranks.
    args.test_threads.get_or_insert(1);
    libtest_mimic::run(&args, trials).exit_code()
}

/// Why nothing can be said here.
fn missing() -> Option<String> {
    let seat = Seat { rank: 0, world: 2, id: GroupId::new(), args: vec!["2".into()] };
    let refusal = query_memory(&config_of(&seat, 2)).err()?;
    assert!(std::env::var_os("A2A_NIXL_LIB").is_none(), "A2A_NIXL_LIB names a library: {refusal}");
    Some(refusal.text)
}

// ---------------------------------------------------------------------------------------------------- a rank

/// `world`: as many ranks as there may be; `first`: those that are there from the start.
fn config_of(seat: &Seat, first: usize) -> a2a_config_t {
    let mut config = config(seat);
    config.backend = A2A_BACKEND_NIXL_ELASTIC;
    for (name, flag) in [(REMOTE, A2A_CONFIG_REMOTE), (DEGRADE, A2A_CONFIG_DEGRADE)] {
        config.flags |= if seat.args.iter().any(|arg| arg == name) { flag } else { 0 };
    }
    config.num_ranks = first as i32;
    config.max_ranks = seat.world as i32;
    config.num_experts = (EXPERTS_A_RANK * seat.world) as i32;
    config.max_topk = K as i32;
    config.max_hidden = HIDDEN as i32;
    config.combine_dtype = A2A_DTYPE_BF16;
    config.max_tokens = M as i32;
    config.num_slots = 2;
    config.first_step_timeout_ms = STEP_MS;
    config.timeout_ms = STEP_MS;
    config
}

/// Step `number` of the members: all ranks' inputs; others have no tokens.
fn step(world: usize, members: &BTreeSet<usize>, number: usize) -> oracle::Step {
    let experts = EXPERTS_A_RANK * world;
    let owner = oracle::contiguous(experts, world);
    let of_rank = |rank: usize| {
        let mut rng = Rng::new(&[900, number as u64, rank as u64]);
        let tokens = if members.contains(&rank) { rng.below(M + 1) } else { 0 };
        let ids = (0..tokens * K).map(|_| match number % 3 {
            // Who names an expert of a rank that takes no part names none.
            0 => rng.below(experts + 1) as i64 - 1,
            1 => {
                let all: Vec<i64> =
                    (0..experts as i64).filter(|e| members.contains(&owner[*e as usize])).collect();
                rng.pick(&all)
            }
            _ => (number % experts) as i64,
        });
        let ids: Vec<i64> = ids.collect();
        let weights = (0..tokens * K).map(|_| (rng.below(1000) as f32 / 500.0 - 1.0).to_bits()).collect();
        let values = 0..tokens * HIDDEN;
        let bytes = values.flat_map(|_| ((rng.next() as u16 & 0xbfff) | 0x0080).to_le_bytes()).collect();
        Input {
            tokens,
            ids: Some(ids),
            weights: Some(weights),
            rows: Rows { row_bytes: 2 * HIDDEN, bytes },
            ..Default::default()
        }
    };
    let mut ranks: Vec<Input> = (0..world).map(of_rank).collect();
    for input in &mut ranks {
        for id in input.ids.iter_mut().flatten() {
            if owner.get(*id as usize).is_some_and(|owner| !members.contains(owner)) {
                *id = experts as i64;
            }
        }
    }
    oracle::Step { owner, layout: Layout::ExpertPadded, limit: 0, bound: M, topk: K, reuse: false, ranks }
}

struct Member<'a> {
    seat: &'a Seat,
    comm: &'a Comm,
    routings: Vec<Routing>,
}

fn expect<T: PartialEq + std::fmt::Debug>(what: &str, got: T, want: T) -> Result<(), String> {
    if got == want { Ok(()) } else { Err(format!("{what}: got {got:?}, expected {want:?}")) }
}

/// What ended a step: a call's failure, or what it gave.
enum Ended {
    Failed(Failure),
    Wrong(String),
}

impl From<Failure> for Ended {
    fn from(failure: Failure) -> Ended {
        Ended::Failed(failure)
    }
}
impl From<String> for Ended {
    fn from(text: String) -> Ended {
        Ended::Wrong(text)
    }
}

/// What a step gave.
struct Got {
    dispatch_status: Vec<i32>,
    rank_counts: Vec<i32>,
    expert_counts: Vec<i32>,
    row_source: Vec<i32>,
    rows: Vec<u8>,
    sums: Vec<u8>,
    combine_status: Vec<i32>,
}

fn die(now: bool) {
    if now {
        // SAFETY: ends this process.
        unsafe { libc::raise(libc::SIGKILL) };
    }
}

impl Member<'_> {
    /// Dispatches, gives every row back, combines. `dies`: this process kills itself in it, after so many calls.
    fn exchange(&self, whole: &oracle::Step, number: usize, dies: Option<usize>) -> Result<Got, Failure> {
        let (comm, routing) = (self.comm, &self.routings[number % 2]);
        let mine = &whole.ranks[self.seat.rank];
        let t = mine.tokens;
        let ids: Vec<u8> = mine.ids.iter().flatten().flat_map(|id| (*id as i32).to_le_bytes()).collect();
        let weights: Vec<u8> = mine.weights.iter().flatten().flat_map(|word| word.to_le_bytes()).collect();
        let input = DispatchIn {
            tokens: Some(Tensor::of(BF16, &[t, HIDDEN], &mine.rows.bytes)),
            topk_ids: Some(Tensor::of(I32, &[t, K], &ids)),
            topk_weights: Some(Tensor::of(F32, &[t, K], &weights)),
            ..Default::default()
        };
        let view = || Some(Tensor::view());
        let mut output = DispatchOut {
            tokens: view(),
            expert_counts: view(),
            rank_counts: view(),
            row_source: view(),
            status: view(),
            ..Default::default()
        };
        let split = number % 4 >= 2;
        let phases: &[a2a_phase_t] =
            if split { &[A2A_PHASE_SEND, A2A_PHASE_RECV] } else { &[A2A_PHASE_BOTH] };
        die(dies == Some(0));
        for phase in phases {
            comm.dispatch(routing, *phase, &input, &mut output)?;
            die(dies == Some(1));
        }
        let ints = |tensor: &Option<Tensor>| tensor.as_ref().expect("asked for").read_i32();
        let (dispatch_status, rank_counts) = (ints(&output.status), ints(&output.rank_counts));
        let (expert_counts, row_source) = (ints(&output.expert_counts), ints(&output.row_source));
        let rows = output.tokens.as_ref().expect("asked for").read();
        let mut results = comm.combine_buffer(routing, BF16)?;
        results.write(&rows);
        let mut sums = CombineOut {
            tokens: Some(Tensor::new(F32, &[t, HIDDEN])),
            status: Some(Tensor::view()),
            ..Default::default()
        };
        die(dies == Some(2));
        for phase in phases {
            comm.combine(routing, *phase, 0, Some(&results), &mut sums)?;
            die(dies == Some(3));
        }
        let combine_status = ints(&sums.status);
        let sums = sums.tokens.as_ref().expect("given").read();
        Ok(Got { dispatch_status, rank_counts, expert_counts, row_source, rows, sums, combine_status })
    }

    /// What was received is that of a step; but for its status's bits and marks.
    fn check_dispatch(&self, got: &Got, whole: &oracle::Step) -> Result<(), String> {
        let want = whole.dispatch(self.seat.rank, false);
        expect("rank_counts", &got.rank_counts, &want.rank_counts)?;
        expect("expert_counts", &got.expert_counts, &want.expert_counts)?;
        expect("row_source", &got.row_source, &want.row_source)?;
        for (at, (row, got)) in want.rows.iter().zip(got.rows.chunks_exact(2 * HIDDEN)).enumerate() {
            let Some(row) = row else { continue };
            if got != whole.ranks[row.source.rank].rows.row(row.source.token) {
                return Err(format!("row {at} is not that of {:?}", row.source));
            }
        }
        Ok(())
    }

    /// The sums are those of a step in which an expert gives a token back, and results are `missing`.
    fn check_sums(&self, got: &Got, whole: &oracle::Step, missing: &Dropped) -> Result<(), String> {
        let result = |_: usize, row: Row| whole.ranks[row.source.rank].rows.row(row.source.token).to_vec();
        let weights = oracle::Weights::Dispatched;
        let want = whole.combine(self.seat.rank, HIDDEN, BF16_F32, weights, missing, result, None);
        match (0..want.len()).find(|at| got.sums[*at] != want[*at]) {
            Some(at) => Err(format!("token {} has another sum", at / 4 / HIDDEN)),
            None => Ok(()),
        }
    }

    /// One step, checked whole.
    fn step(&self, members: &BTreeSet<usize>, number: usize, dies: Option<usize>) -> Result<(), Ended> {
        let whole = step(self.seat.world, members, number);
        let got = self.exchange(&whole, number, dies)?;
        self.check_dispatch(&got, &whole)?;
        self.check_sums(&got, &whole, &Dropped::new())?;
        let rank = self.seat.rank;
        expect("dispatch status", &got.dispatch_status, &whole.dispatch(rank, false).status)?;
        Ok(expect("combine status", &got.combine_status, &whole.combine_status(rank, &Dropped::new()))?)
    }

    /// One step in which a rank may have been lost, or was before: what is missing is the lost rank's, and its status says so.
    /// Returns whether it did.
    fn degraded_step(&self, members: &BTreeSet<usize>, victim: usize, number: usize) -> Result<bool, Ended> {
        let whole = step(self.seat.world, members, number);
        let mut without = whole.clone();
        without.ranks[victim] =
            Input { rows: Rows { row_bytes: 2 * HIDDEN, bytes: Vec::new() }, ..Default::default() };
        (without.ranks[victim].ids, without.ranks[victim].weights) = (Some(Vec::new()), Some(Vec::new()));
        let got = self.exchange(&whole, number, None)?;
        let says = |status: &[i32]| -> Result<bool, String> {
            let degraded = status[0] & A2A_STEP_DEGRADED != 0;
            let marks: Vec<usize> = (0..self.seat.world).filter(|rank| status[4 + rank] != 0).collect();
            expect("marks", marks, if degraded { vec![victim] } else { Vec::new() })?;
            Ok(degraded)
        };
        let (early, late) = (says(&got.dispatch_status)?, says(&got.combine_status)?);
        // Its rows may have come before it was lost.
        self.check_dispatch(&got, &whole)
            .or_else(|error| if early { self.check_dispatch(&got, &without) } else { Err(error) })?;
        let theirs = whole.dispatch(victim, false).rows.into_iter().flatten();
        let missing: Dropped = theirs.map(|row| (victim, row)).collect();
        let whole_sums = self.check_sums(&got, &whole, &Dropped::new());
        match whole_sums {
            Err(_) if late => self.check_sums(&got, &whole, &missing)?,
            other => other?,
        }
        Ok(late)
    }

    fn mask(&self) -> Result<Vec<i32>, Failure> {
        let mut mask = vec![-1; self.seat.world];
        // SAFETY: so many int32.
        check(unsafe { a2a_get_rank_mask(self.comm.handle(), mask.as_mut_ptr(), mask.len() as i32) })?;
        Ok(mask)
    }
}

fn numbers(text: &str) -> Vec<i32> {
    text.split(',').filter(|word| !word.is_empty()).map(|word| word.parse().expect("a number")).collect()
}
fn set(text: &str) -> BTreeSet<usize> {
    numbers(text).into_iter().map(|rank| rank as usize).collect()
}
fn text(ranks: impl IntoIterator<Item = usize>) -> String {
    ranks.into_iter().map(|rank| rank.to_string()).collect::<Vec<_>>().join(",")
}

/// What a rank answers: "fine ...", "status sentence", or "wrong ...".
fn answer(outcome: Result<String, Ended>) -> String {
    match outcome {
        Ok(text) => format!("fine {text}"),
        Err(Ended::Failed(Failure { status, text, .. })) => format!("{status} {text}"),
        Err(Ended::Wrong(text)) => format!("wrong {text}"),
    }
}

const FOLLOW: (&str, Job) = ("elastic", follow);
/// Ranks are on several hosts; steps go on without those that are lost.
const REMOTE: &str = "remote";
const DEGRADE: &str = "degrade";

/// A rank does what it is told, line by line.
fn follow(seat: &Seat) -> Result<(), String> {
    let first: usize = seat.args[0].parse().expect("how many there are from the start");
    let comm = Comm::create(&config_of(seat, first))?;
    println!("fine ready");
    let routings = (0..2).map(|slot| comm.routing(slot)).collect::<Result<_, _>>()?;
    let member = Member { seat, comm: &comm, routings };
    let handle = comm.handle();
    std::thread::scope(|scope| -> Result<(), String> {
        for order in std::io::stdin().lock().lines().map_while(Result::ok) {
            let words: Vec<&str> = order.split(' ').collect();
            let number = |at: usize| words[at].parse::<usize>().expect("a number");
            let list = words.get(1).map_or(Vec::new(), |word| {
                if word.contains(|c: char| c.is_alphabetic()) { Vec::new() } else { numbers(word) }
            });
            let (ranks, count) = (list.as_ptr(), list.len() as i32);
            let begun = Instant::now();
            let outcome: Result<String, Ended> = match words[0] {
                // SAFETY: a list of so many int32, here and below.
                "connect" => check(unsafe { a2a_connect_ranks(handle, ranks, count, 20_000) })
                    .map(|()| begun.elapsed().as_millis().to_string())
                    .map_err(Into::into),
                "activate" => {
                    let mut generation = 0;
                    // SAFETY: as above, and a valid out-pointer.
                    let done = unsafe { a2a_activate_ranks(handle, ranks, count, 20_000, &mut generation) };
                    check(done).map(|()| generation.to_string()).map_err(Into::into)
                }
                // SAFETY: as above.
                "disconnect" => check(unsafe { a2a_disconnect_ranks(handle, ranks, count) })
                    .map(|()| String::new())
                    .map_err(Into::into),
                // SAFETY: as above.
                "mask" => check(unsafe { a2a_set_rank_mask(handle, ranks, count) })
                    .map(|()| String::new())
                    .map_err(Into::into),
                "masked" => member
                    .mask()
                    .map(|mask| text(mask.into_iter().map(|word| word as usize)))
                    .map_err(Into::into),
                // steps MEMBERS FROM COUNT
                "steps" => (|| {
                    (number(2)..number(2) + number(3))
                        .try_for_each(|at| member.step(&set(words[1]), at, None))?;
                    Ok(String::new())
                })(),
                // die MEMBERS FROM CALLS
                "die" => member.step(&set(words[1]), number(2), Some(number(3))).map(|()| "and lived".into()),
                // run MEMBERS FROM: until a step fails.
                "run" => (number(2)..)
                    .try_for_each(|at| member.step(&set(words[1]), at, None))
                    .map(|()| String::new()),
                // beside MEMBERS FROM COUNT RANKS: connects meanwhile; says if all were there before the last step, and what the
                // longest took.
                "beside" => (|| {
                    let (joining, handle) = (numbers(words[4]), handle as usize);
                    let joiner = scope.spawn(move || {
                        let (ranks, count) = (joining.as_ptr(), joining.len() as i32);
                        // SAFETY: as above; the comm outlives this thread.
                        check(unsafe { a2a_connect_ranks(handle as *mut _, ranks, count, 20_000) })
                    });
                    let mut longest = Duration::ZERO;
                    for at in number(2)..number(2) + number(3) {
                        let begun = Instant::now();
                        member.step(&set(words[1]), at, None)?;
                        longest = longest.max(begun.elapsed());
                    }
                    let is_there = joiner.is_finished();
                    joiner.join().expect("a thread")?;
                    Ok(format!("{} {}", is_there as u8, longest.as_micros()))
                })(),
                // degraded MEMBERS FROM COUNT VICTIM: says how many steps were, and what the longest took.
                "degraded" => (|| {
                    let (mut degraded, mut longest) = (0, Duration::ZERO);
                    for at in number(2)..number(2) + number(3) {
                        let begun = Instant::now();
                        let is_degraded = member.degraded_step(&set(words[1]), number(4), at)?;
                        if degraded > 0 && !is_degraded {
                            return Err(Ended::Wrong(format!("step {at} is whole again")));
                        }
                        degraded += usize::from(is_degraded);
                        longest = longest.max(begun.elapsed());
                    }
                    let record = comm.async_error()?;
                    Ok(format!("{degraded} {} {} {}", longest.as_millis(), record.status, sentence(&record)))
                })(),
                "memory" => Ok(resident().to_string()),
                "remote" => comm.stats().map(|stats| stats.bytes_remote.to_string()).map_err(Into::into),
                "destroy" => break,
                _ => Err(format!("no such order: {order:?}").into()),
            };
            println!("{}", answer(outcome));
        }
        Ok(())
    })?;
    drop(member);
    comm.destroy()?;
    println!("fine destroyed");
    Ok(())
}

/// Bytes of this process.
fn resident() -> u64 {
    let text = std::fs::read_to_string("/proc/self/statm").unwrap_or_default();
    text.split(' ').nth(1).and_then(|pages| pages.parse::<u64>().ok()).unwrap_or(0) * 4096
}

// ---------------------------------------------------------------------------------------------------- a group

struct Group {
    world: usize,
    first: usize,
    id: GroupId,
    workers: Vec<Option<Worker>>,
    /// Rank r is on host r % their number.
    hosts: Option<Hosts>,
    degrades: bool,
}

impl Group {
    fn new(world: usize, first: usize) -> Group {
        let workers = (0..world).map(|_| None).collect();
        Group { world, first, id: GroupId::new(), workers, hosts: None, degrades: false }
    }
    fn on(hosts: Hosts, world: usize, first: usize) -> Result<Group, String> {
        Ok(Group { id: hosts.group()?, hosts: Some(hosts), ..Group::new(world, first) })
    }
    fn spawn(&mut self, ranks: &[usize]) -> Result<(), String> {
        for rank in ranks {
            let mut args = vec![self.first.to_string()];
            args.extend(self.degrades.then(|| DEGRADE.to_string()));
            // What UCX has to say is no answer.
            let (mut prefix, mut environment) = (Vec::new(), vec![("UCX_LOG_FILE", "stderr")]);
            if let Some(hosts) = &self.hosts {
                args.push(REMOTE.into());
                let (through, more) = hosts.enter(*rank % hosts.count());
                prefix = through;
                environment.extend(more);
            }
            let seat = Seat { rank: *rank, world: self.world, id: self.id, args };
            self.workers[*rank] = Some(Worker::spawn_in(FOLLOW.0, &[*rank], &seat, &prefix, &environment));
        }
        for rank in ranks {
            let line = self.worker(*rank).line(START)?;
            expect("a start", line.as_str(), "fine ready")
                .map_err(|error| format!("rank {rank}: {error}"))?;
        }
        Ok(())
    }
    fn plug(&self, host: usize, is_in: bool) -> Result<(), String> {
        self.hosts.as_ref().expect("hosts").plug(host, is_in)
    }
    fn worker(&mut self, rank: usize) -> &mut Worker {
        self.workers[rank].as_mut().expect("a rank that lives")
    }
    fn tell(&mut self, ranks: &[usize], order: &str) -> Result<(), String> {
        ranks.iter().try_for_each(|rank| self.worker(*rank).tell(order))
    }
    fn answers(&mut self, ranks: &[usize]) -> Result<Vec<String>, String> {
        ranks.iter().map(|rank| self.worker(*rank).line(ANSWER)).collect()
    }
    /// All do it, and it goes well.
    fn all(&mut self, ranks: &[usize], order: &str) -> Result<Vec<String>, String> {
        self.tell(ranks, order)?;
        let answers = self.answers(ranks)?;
        for (rank, answer) in ranks.iter().zip(&answers) {
            if !answer.starts_with("fine") {
                return Err(format!("rank {rank}, {order}: {answer}"));
            }
        }
        Ok(answers.into_iter().map(|answer| answer["fine".len()..].trim().to_string()).collect())
    }
    /// All do it, and are told of a loss.
    fn lost(&mut self, ranks: &[usize], status: a2a_status_t, names: &str) -> Result<(), String> {
        let answers = self.answers(ranks)?;
        match ranks
            .iter()
            .zip(&answers)
            .find(|(_, line)| !(line.starts_with(&status.to_string()) && line.contains(names)))
        {
            Some((rank, line)) => {
                Err(format!("rank {rank} got {line:?}, expected {} with {names:?}", status_name(status)))
            }
            None => Ok(()),
        }
    }
    /// They take part, as all of them say.
    fn activate(&mut self, ranks: &[usize]) -> Result<u64, String> {
        let list = text(ranks.iter().copied());
        self.all(ranks, &format!("connect {list}"))?;
        let generations: BTreeSet<String> =
            self.all(ranks, &format!("activate {list}"))?.into_iter().collect();
        let mask = text((0..self.world).map(|rank| usize::from(ranks.contains(&rank))));
        for said in self.all(ranks, "masked")? {
            expect("the mask", said.as_str(), mask.as_str())?;
        }
        let mut generations = generations.into_iter();
        match (generations.next(), generations.next()) {
            (Some(one), None) => one.parse().map_err(|_| format!("generation {one:?}")),
            (one, other) => Err(format!("generations {one:?} and {other:?}")),
        }
    }
    fn steps(&mut self, ranks: &[usize], from: usize, count: usize) -> Result<(), String> {
        let list = text(ranks.iter().copied());
        self.all(ranks, &format!("steps {list} {from} {count}")).map(drop)
    }
    /// They end in order.
    fn destroy(&mut self, ranks: &[usize]) -> Result<(), String> {
        self.tell(ranks, "destroy")?;
        for rank in ranks {
            let line = self.worker(*rank).line(ANSWER)?;
            expect("an end", line.as_str(), "fine destroyed")?;
            let status = self.worker(*rank).wait(Instant::now() + ANSWER);
            let stderr = self.worker(*rank).stderr();
            if status.is_none_or(|status| !status.success()) {
                return Err(format!("rank {rank} ended with {status:?}\n{stderr}"));
            }
            self.workers[*rank] = None;
        }
        Ok(())
    }
}

const STEPS: usize = 12;

fn play(world: usize, first: usize, plan: &[&[i32]]) -> Result<(), String> {
    play_on(None, world, first, plan)
}

/// Phase by phase: who comes joins, who is named with a minus dies in the middle of a step, who is named no more leaves. On
/// several hosts, what ranks have sent has crossed their links.
fn play_on(hosts: Option<Hosts>, world: usize, first: usize, plan: &[&[i32]]) -> Result<(), String> {
    let mut group = match hosts {
        Some(hosts) => Group::on(hosts, world, first)?,
        None => Group::new(world, first),
    };
    let (mut there, mut generation): (Vec<usize>, u64) = (Vec::new(), 0);
    for (phase, ranks) in plan.iter().enumerate() {
        let on = |error: String| format!("phase {phase}, {ranks:?}: {error}");
        let members: Vec<usize> = ranks.iter().map(|rank| rank.unsigned_abs() as usize).collect();
        let new: Vec<usize> = members.iter().copied().filter(|rank| !there.contains(rank)).collect();
        let leave: Vec<usize> = there.iter().copied().filter(|rank| !members.contains(rank)).collect();
        group.spawn(&new).map_err(on)?;
        // The first ones have met already.
        let next = group.activate(&members).map_err(on)?;
        if next <= generation {
            return Err(on(format!("generation {next} after {generation}")));
        }
        generation = next;
        if !leave.is_empty() {
            group.all(&members, &format!("disconnect {}", text(leave.iter().copied()))).map_err(on)?;
            let alive: Vec<usize> =
                leave.iter().copied().filter(|rank| group.workers[*rank].is_some()).collect();
            group.destroy(&alive).map_err(on)?;
        }
        group.steps(&members, 100 * phase, STEPS).map_err(on)?;
        let dying: Vec<usize> =
            ranks.iter().filter(|rank| **rank < 0).map(|rank| rank.unsigned_abs() as usize).collect();
        if let [victim] = dying[..] {
            let others: Vec<usize> = members.iter().copied().filter(|rank| *rank != victim).collect();
            let list = text(members.iter().copied());
            let from = 100 * phase + 50;
            group.tell(&others, &format!("run {list} {from}"))?;
            group.tell(&[victim], &format!("die {list} {from} {}", phase % 3))?;
            let begun = Instant::now();
            group.worker(victim).wait(begun + ANSWER).ok_or_else(|| on("the victim lives".into()))?;
            group.lost(&others, A2A_PEER_LOST, &format!("rank {victim}")).map_err(on)?;
            if begun.elapsed() > PROMISE {
                return Err(on(format!("rank {victim} was missed after {:?}", begun.elapsed())));
            }
            group.workers[victim] = None;
        }
        there = members;
    }
    let left: Vec<usize> = there.into_iter().filter(|rank| group.workers[*rank].is_some()).collect();
    if group.hosts.as_ref().is_some_and(|hosts| hosts.count() == world) {
        let sent = group.all(&left, "remote")?;
        for (rank, rows) in left.iter().zip(sent) {
            let rows: u64 = rows.parse().map_err(|_| format!("{rows:?} bytes"))?;
            let crossed = group.hosts.as_ref().expect("hosts").sent(*rank)?;
            if rows == 0 || crossed < rows {
                return Err(format!(
                    "rank {rank} sent {rows} bytes of rows, {crossed} have crossed its link"
                ));
            }
        }
    }
    group.destroy(&left)
}

/// A cable is out for less than TCP waits: steps go on, and nothing is lost. For 3 s, which is as long: all of it is right, or
/// a loss is named.
fn a_cable_is_out_for_a_while() -> Result<(), String> {
    let mut group = Group::on(Hosts::new(3)?, 3, 3)?;
    group.spawn(&[0, 1, 2])?;
    group.steps(&[0, 1, 2], 0, STEPS)?;
    for round in 1..4 {
        group.tell(&[0, 1, 2], &format!("steps 0,1,2 {} 500", 1000 * round))?;
        sleep(Duration::from_millis(20));
        group.plug(round % 3, false)?;
        sleep(Duration::from_millis(1200));
        group.plug(round % 3, true)?;
        for answer in group.answers(&[0, 1, 2])? {
            if !answer.starts_with("fine") {
                return Err(format!("round {round}: {answer}"));
            }
        }
    }
    group.tell(&[0, 1, 2], "steps 0,1,2 5000 500")?;
    sleep(Duration::from_millis(20));
    group.plug(1, false)?;
    sleep(Duration::from_secs(3));
    group.plug(1, true)?;
    let begun = Instant::now();
    let answers = group.answers(&[0, 1, 2])?;
    let in_order = |line: &String| line.starts_with("fine") || is_lost(line) && line.contains("rank");
    // Steps that go well all the same may take their time.
    let is_fine = answers.iter().all(|line| line.starts_with("fine"));
    let is_late = !is_fine && begun.elapsed() > Duration::from_millis(STEP_MS as u64) + PROMISE;
    if !answers.iter().all(in_order) || is_late {
        return Err(format!("after 3 s without a cable, {:?} later: {answers:?}", begun.elapsed()));
    }
    if is_fine {
        group.destroy(&[0, 1, 2])?;
    }
    Ok(())
}

/// If an answer is the status of a step that waited for a rank in vain.
fn is_lost(answer: &str) -> bool {
    [A2A_TIMEOUT, A2A_PEER_LOST].iter().any(|status| answer.starts_with(&status.to_string()))
}

/// A loss is known by the step's deadline and the promise.
fn in_time(begun: Instant, rank: usize) -> Result<(), String> {
    let (took, deadline) = (begun.elapsed(), Duration::from_millis(STEP_MS as u64));
    match took > deadline + PROMISE {
        true => Err(format!("rank {rank} was given up on after {took:?}")),
        false => Ok(()),
    }
}

/// A cable is out for good: who is behind it is named in time, and the others go on; it finds itself alone.
fn a_cable_is_out_for_good() -> Result<(), String> {
    let mut group = Group::on(Hosts::new(3)?, 3, 3)?;
    group.spawn(&[0, 1, 2])?;
    group.steps(&[0, 1, 2], 0, STEPS)?;
    group.tell(&[0, 1, 2], "run 0,1,2 100")?;
    sleep(Duration::from_millis(50));
    group.plug(2, false)?;
    let begun = Instant::now();
    for (rank, line) in (0..).zip(group.answers(&[0, 1, 2])?) {
        let named =
            if rank == 2 { line.contains("rank") } else { line.contains("rank 2") || line.contains(", 2 ") };
        if !named || !is_lost(&line) {
            return Err(format!("rank {rank} got {line:?}"));
        }
    }
    in_time(begun, 2)?;
    group.activate(&[0, 1])?;
    group.all(&[0, 1], "disconnect 2")?;
    group.steps(&[0, 1], 300, STEPS)?;
    // Back again, what it sends is nobody's.
    group.plug(2, true)?;
    group.steps(&[0, 1], 400, 100)?;
    group.destroy(&[0, 1])
}

/// A rank dies and another process takes its place, several times, among others that go on without it meanwhile.
fn a_rank_is_replaced() -> Result<(), String> {
    let mut group = Group::new(3, 3);
    group.spawn(&[0, 1, 2])?;
    // Who comes later creates its comm alone.
    group.first = 1;
    group.steps(&[0, 1, 2], 0, STEPS)?;
    for round in 1..4 {
        let victim = round % 3;
        let others: Vec<usize> = (0..3).filter(|rank| *rank != victim).collect();
        group.tell(&others, &format!("run 0,1,2 {}", 100 * round))?;
        group.worker(victim).kill();
        group.lost(&others, A2A_PEER_LOST, &format!("rank {victim}"))?;
        group.activate(&others)?;
        group.all(&others, &format!("disconnect {victim}"))?;
        group.steps(&others, 100 * round + 20, STEPS)?;
        group.spawn(&[victim])?;
        group.activate(&[0, 1, 2])?;
        group.steps(&[0, 1, 2], 100 * round + 40, STEPS)?;
    }
    group.destroy(&[0, 1, 2])
}

/// A rank stands still in the middle of its steps: the others name it at the deadline, go on without it, and with another in its place. When
/// it wakes up, what it still sends changes nothing.
fn a_stopped_rank() -> Result<(), String> {
    let mut group = Group::new(3, 3);
    group.spawn(&[0, 1, 2])?;
    group.steps(&[0, 1, 2], 0, STEPS)?;
    group.tell(&[0, 1, 2], "run 0,1,2 100")?;
    sleep(Duration::from_millis(50));
    group.worker(1).stop();
    let begun = Instant::now();
    // The other may be late too, because it waits for the same.
    for line in group.answers(&[0, 2])? {
        let names = ["rank 1 ", "ranks 1, 2 ", "ranks 0, 1 "];
        if !(line.starts_with(&A2A_TIMEOUT.to_string()) && names.iter().any(|name| line.contains(name))) {
            return Err(format!("{line:?} does not name rank 1"));
        }
    }
    in_time(begun, 1)?;
    group.activate(&[0, 2])?;
    group.all(&[0, 2], "disconnect 1")?;
    group.steps(&[0, 2], 200, STEPS)?;
    let zombie = group.workers[1].take().expect("stopped");
    group.first = 1;
    group.spawn(&[1])?;
    group.activate(&[0, 1, 2])?;
    group.steps(&[0, 1, 2], 300, STEPS)?;
    zombie.go_on();
    for from in [400, 500, 600] {
        group.steps(&[0, 1, 2], from, STEPS)?;
    }
    let line = zombie.line(ANSWER)?;
    if !is_lost(&line) {
        return Err(format!("the late rank got {line:?}"));
    }
    group.destroy(&[0, 1, 2])
}

/// Ranks connect while others step, and take part afterwards; what the longest step took is shown.
fn steps_go_on_while_ranks_connect() -> Result<(), String> {
    let mut group = Group::new(4, 2);
    group.spawn(&[0, 1])?;
    group.steps(&[0, 1], 0, STEPS)?;
    group.spawn(&[2, 3])?;
    group.tell(&[2, 3], "connect 0,1,2,3")?;
    let said = group.all(&[0, 1], "beside 0,1 100 1000 2,3")?;
    for answer in group.answers(&[2, 3])? {
        if !answer.starts_with("fine") {
            return Err(answer);
        }
    }
    println!("1000 steps, two ranks connected meanwhile (1: before the last), the longest in us: {said:?}");
    group.activate(&[0, 1, 2, 3])?;
    group.steps(&[0, 1, 2, 3], 5000, STEPS)?;
    group.destroy(&[0, 1, 2, 3])
}

/// Steps of ranks that a rank was lost for: a number of them, and the last, say so, and the record names it.
fn went_on_without(
    victim: usize,
    said: &[String],
    status: a2a_status_t,
    limit: Duration,
) -> Result<(), String> {
    for said in said {
        let words: Vec<&str> = said.splitn(4, ' ').collect();
        let number = |at: usize| words[at].parse::<u64>().map_err(|_| format!("{said:?}"));
        let named = words[3].contains(&format!("rank {victim}")) && words[3].contains("goes on degraded");
        if number(0)? == 0 || number(2)? != status as u64 || !named {
            return Err(format!("{said:?}, expected {} with rank {victim}", status_name(status)));
        }
        if Duration::from_millis(number(1)?) > limit {
            return Err(format!("a step took {} ms, promised are {limit:?}", number(1)?));
        }
    }
    Ok(())
}

/// Wherever in a step a rank dies: the others' steps go on, and what is missing is its own and said. Then they take part without it, and
/// with another in its place.
fn steps_go_on_without_a_dead_rank() -> Result<(), String> {
    for calls in 0..4 {
        let on = |error: String| format!("it dies after {calls} calls: {error}");
        let mut group = Group { degrades: true, ..Group::new(4, 4) };
        group.spawn(&[0, 1, 2, 3])?;
        group.steps(&[0, 1, 2, 3], 0, STEPS)?;
        let victim = 3 - calls;
        let others: Vec<usize> = (0..4).filter(|rank| *rank != victim).collect();
        group.tell(&[victim], &format!("die 0,1,2,3 100 {calls}"))?;
        let said = group.all(&others, &format!("degraded 0,1,2,3 100 20 {victim}")).map_err(on)?;
        went_on_without(victim, &said, A2A_PEER_LOST, PROMISE).map_err(on)?;
        let mask = text((0..4).map(|rank| usize::from(rank != victim)));
        for said in group.all(&others, "masked")? {
            expect("the mask", said.as_str(), mask.as_str())?;
        }
        group.activate(&others).map_err(on)?;
        group.all(&others, &format!("disconnect {victim}"))?;
        group.steps(&others, 200, STEPS).map_err(on)?;
        group.workers[victim] = None;
        group.first = 1;
        group.spawn(&[victim])?;
        group.activate(&[0, 1, 2, 3]).map_err(on)?;
        group.steps(&[0, 1, 2, 3], 300, STEPS).map_err(on)?;
        group.destroy(&[0, 1, 2, 3])?;
    }
    Ok(())
}

/// The same of a rank that stands still, which the deadline finds out. What it sends when it wakes up is nobody's.
fn steps_go_on_without_a_stopped_rank() -> Result<(), String> {
    let mut group = Group { degrades: true, ..Group::new(3, 3) };
    group.spawn(&[0, 1, 2])?;
    group.steps(&[0, 1, 2], 0, STEPS)?;
    group.worker(2).stop();
    let said = group.all(&[0, 1], "degraded 0,1,2 100 20 2")?;
    let deadline = Duration::from_millis(STEP_MS as u64);
    went_on_without(2, &said, A2A_TIMEOUT, deadline + PROMISE)?;
    group.worker(2).go_on();
    group.worker(2).tell("degraded 0,1,2 100 1 0")?;
    let said = group.all(&[0, 1], "degraded 0,1,2 200 200 2")?;
    went_on_without(2, &said, A2A_TIMEOUT, PROMISE)?;
    group.activate(&[0, 1])?;
    group.steps(&[0, 1], 500, STEPS)?;
    group.destroy(&[0, 1])
}

/// A rank that others take in warms up alone before; so may one that takes part, while nobody steps.
fn alone_for_a_while() -> Result<(), String> {
    let mut group = Group::new(3, 2);
    group.spawn(&[0, 1, 2])?;
    group.steps(&[0, 1], 0, STEPS)?;
    group.steps(&[2], 100, STEPS)?;
    group.all(&[0], "mask 1,0,0")?;
    for said in group.all(&[0], "masked")? {
        expect("the mask", said.as_str(), "1,0,0")?;
    }
    group.steps(&[0], 200, STEPS + 1)?;
    group.all(&[0], "mask 1,1,0")?;
    group.steps(&[0, 1], 300, STEPS)?;
    group.activate(&[0, 1, 2])?;
    group.steps(&[0, 1, 2], 400, STEPS)?;
    group.destroy(&[0, 1, 2])
}

fn what_is_wrong_is_said() -> Result<(), String> {
    let mut group = Group::new(4, 2);
    group.spawn(&[0, 1])?;
    let cases: [(&str, a2a_status_t, &[&str]); 11] = [
        ("connect 4", A2A_INVALID_ARGUMENT, &["rank 0", "ranks[0] is 4", "0 to 3"]),
        ("connect 1,-1", A2A_INVALID_ARGUMENT, &["rank 0", "ranks[1] is -1"]),
        ("connect 1,1", A2A_INVALID_ARGUMENT, &["rank 0", "ranks[1] is 1", "named before"]),
        ("activate 1", A2A_INVALID_ARGUMENT, &["rank 0", "itself"]),
        ("activate 0,1,2", A2A_INVALID_ARGUMENT, &["rank 0", "rank 2 is not connected"]),
        ("disconnect 1", A2A_INVALID_ARGUMENT, &["rank 0", "rank 1 takes part"]),
        ("disconnect 9", A2A_INVALID_ARGUMENT, &["rank 0", "ranks[0] is 9"]),
        ("mask 1,0", A2A_INVALID_ARGUMENT, &["rank 0", "count is 2", "max_ranks is 4"]),
        ("mask 1,0,1,0", A2A_INVALID_ARGUMENT, &["rank 0", "[0, 2]", "rank 0 alone"]),
        ("mask 0,1,0,0", A2A_INVALID_ARGUMENT, &["rank 0", "[1]"]),
        ("disconnect 3", A2A_SUCCESS, &[]),
    ];
    for (order, status, words) in cases {
        group.tell(&[0], order)?;
        let line = group.worker(0).line(ANSWER)?;
        let wanted = if status == A2A_SUCCESS { "fine".to_string() } else { status.to_string() };
        if !line.starts_with(&wanted) || words.iter().any(|word| !line.contains(word)) {
            return Err(format!("{order}: {line:?}, expected {} with {words:?}", status_name(status)));
        }
    }
    group.steps(&[0, 1], 0, STEPS)?;
    group.destroy(&[0, 1])
}

const CYCLES: usize = 20;

/// A rank joins, steps and leaves, again and again: those that stay keep no memory of it.
fn a_rank_comes_and_goes() -> Result<(), String> {
    let cycles = std::env::var("A2A_TEST_CYCLES").map_or(CYCLES, |text| text.parse().expect("a number"));
    let mut group = Group::new(3, 2);
    group.spawn(&[0, 1])?;
    let mut before = Vec::new();
    for cycle in 0..cycles {
        group.spawn(&[2])?;
        group.activate(&[0, 1, 2])?;
        group.steps(&[0, 1, 2], 10 * cycle, 4)?;
        group.activate(&[0, 1])?;
        group.destroy(&[2])?;
        group.all(&[0, 1], "disconnect 2")?;
        group.steps(&[0, 1], 10 * cycle + 5, 4)?;
        if cycle == cycles / 2 {
            before = group.all(&[0, 1], "memory")?;
        }
    }
    let after = group.all(&[0, 1], "memory")?;
    for (before, after) in before.iter().zip(&after) {
        let bytes = |text: &str| text.parse::<u64>().expect("a number");
        let grown = bytes(after).saturating_sub(bytes(before));
        println!("{} cycles left {grown} bytes", cycles - cycles / 2 - 1);
        if grown > 4 << 20 {
            return Err(format!("{} cycles left {grown} bytes", cycles - cycles / 2 - 1));
        }
    }
    group.destroy(&[0, 1])
}
