//! What tests of faults share: ranks that take steps and check what comes of them, as threads or as processes that obey
//! orders, one line each; how calls end and how long that may take; and what a process must not leave behind.

use std::collections::BTreeMap;
use std::io::BufRead;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::channel;
use std::sync::{Mutex, MutexGuard};
use std::thread::{scope, sleep};
use std::time::{Duration, Instant};

use a2a::abi::calls::{a2a_activate_ranks, a2a_destroy, a2a_get_rank_mask, a2a_set_log_callback};
use a2a::abi::types::*;

use super::common::*;

pub type Outcomes = Result<Vec<Outcome>, String>;

pub const RANKS: usize = 4;
/// Deadline of every step.
pub const DEADLINE: Duration = Duration::from_secs(2);
/// Within this a loss is known, a comm is gone, a closed group is told.
pub const PROMISE: Duration = Duration::from_secs(1);
/// For a loaded machine; only asserts know it.
pub const GRACE: Duration = Duration::from_secs(2);
/// A call on a closed slot waits for nobody.
pub const AT_ONCE: Duration = Duration::from_millis(100);
/// A case is given up after this, whatever hangs.
pub const LIMIT: Duration = Duration::from_secs(40);
/// What processes have for all their answers: less, so that they are killed by the case itself.
pub const ANSWERS: Duration = Duration::from_secs(30);

pub const HIDDEN: usize = 32;
pub const TOPK: usize = 2;
pub const MAX_TOKENS: usize = 16;
/// Ranks dispatch at most this many, so that the bound can differ.
pub const TOKENS: usize = 8;
/// Of `Pair::Narrow`, whose FIFOs hold 2 rows: every rank has 32 for every rank.
pub const MANY: usize = 64;
pub const FIFO_ROWS: usize = 2;
pub const SLOTS: usize = 2;

/// A strategy and the layout of its rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pair {
    OneSided,
    Gather,
    Flat,
    Contiguous,
    Padded,
    TwoSided,
    /// TWO_SIDED with more rows than fit into its FIFOs, so that faults find them half sent.
    Narrow,
}

/// What every case runs on.
pub const PAIRS: [Pair; 6] =
    [Pair::OneSided, Pair::Gather, Pair::Flat, Pair::Contiguous, Pair::Padded, Pair::TwoSided];

impl Pair {
    pub fn name(self) -> &'static str {
        match self {
            Pair::OneSided => "one_sided",
            Pair::Gather => "allgather",
            Pair::Flat => "flat",
            Pair::Contiguous => "contiguous",
            Pair::Padded => "padded",
            Pair::TwoSided => "two_sided",
            Pair::Narrow => "narrow",
        }
    }
    pub fn of(name: &str) -> Pair {
        PAIRS.into_iter().chain([Pair::Narrow]).find(|pair| pair.name() == name).expect("a pair")
    }
    /// AUTO: the backend's first.
    pub fn code(self) -> (a2a_backend_t, a2a_layout_t) {
        match self {
            Pair::OneSided => (A2A_BACKEND_NVLINK_ONE_SIDED, A2A_LAYOUT_AUTO),
            Pair::Gather => (A2A_BACKEND_ALLGATHER_REDUCESCATTER, A2A_LAYOUT_AUTO),
            Pair::Flat => (A2A_BACKEND_HIGH_THROUGHPUT, A2A_LAYOUT_FLAT),
            Pair::Contiguous => (A2A_BACKEND_HIGH_THROUGHPUT, A2A_LAYOUT_EXPERT_CONTIGUOUS),
            Pair::Padded => (A2A_BACKEND_LOW_LATENCY, A2A_LAYOUT_EXPERT_PADDED),
            Pair::TwoSided | Pair::Narrow => (A2A_BACKEND_NVLINK_TWO_SIDED, A2A_LAYOUT_AUTO),
        }
    }
    /// Rows move while both ends are in RECV, and into the caller's tensors.
    pub fn streams(self) -> bool {
        matches!(self, Pair::TwoSided | Pair::Narrow)
    }
    /// A whole dispatch tells counts and waits for everybody's before any row moves.
    pub fn counts(self) -> bool {
        !matches!(self, Pair::OneSided | Pair::Gather)
    }
    pub fn by_expert(self) -> bool {
        matches!(self, Pair::Contiguous | Pair::Padded)
    }
    pub fn max_tokens(self) -> usize {
        if self == Pair::Narrow { MANY } else { MAX_TOKENS }
    }
}

pub fn seed() -> u64 {
    std::env::var("A2A_TEST_SEED").map_or(1, |text| text.parse().expect("A2A_TEST_SEED is a number"))
}

// ---------------------------------------------------------------------------------------------- times

/// The time that all processes of this machine share.
pub fn now() -> Duration {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: a valid out-pointer; this clock always exists.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &mut time) };
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

/// The worst of every kind, and how many there were.
pub static MEASURED: Mutex<BTreeMap<&str, (Duration, usize)>> = Mutex::new(BTreeMap::new());

pub const DEATH: &str = "told of a death";
pub const SILENCE: &str = "told of a silence (2 s are the deadline)";
pub const LATE: &str = "a late rank is told";

/// Notes a time and asserts that it is within the promise and the grace.
pub fn in_time(what: &'static str, took: Duration, promise: Duration) -> Result<(), String> {
    let mut measured = MEASURED.lock().unwrap();
    let (worst, count) = measured.entry(what).or_default();
    (*worst, *count) = (took.max(*worst), *count + 1);
    if took <= promise + GRACE {
        Ok(())
    } else {
        Err(format!("{what}: took {took:?}, promised are {promise:?}"))
    }
}

pub fn print_times() {
    for (what, (worst, count)) in MEASURED.lock().unwrap().iter() {
        println!("{what}: {count} times, at worst {worst:?}");
    }
}

// ------------------------------------------------------------------------------------------- outcomes

/// How a call ended.
#[derive(Clone, Debug)]
pub struct Outcome {
    pub status: a2a_status_t,
    pub text: String,
    /// out.status where it was asked for; an error record's numbers.
    pub words: Vec<i64>,
    pub took: Duration,
    /// When, by `now`.
    pub ended: Duration,
}

/// A step that went well and gave something wrong: no status of the library.
pub const WRONG: a2a_status_t = -1;

impl Outcome {
    pub fn of(call: impl FnOnce() -> Result<(), Failure>) -> Outcome {
        let begun = now();
        let result = call();
        let ended = now();
        let Failure { status, text } =
            result.err().unwrap_or(Failure { status: A2A_SUCCESS, text: String::new() });
        Outcome { status, text, words: Vec::new(), took: ended - begun, ended }
    }

    /// As a line between processes.
    pub fn to_line(&self) -> String {
        let words: Vec<String> = self.words.iter().map(i64::to_string).collect();
        let (took, ended) = (self.took.as_micros(), self.ended.as_micros());
        format!("{}|{took}|{ended}|{}|{}", self.status, words.join(","), self.text)
    }
    pub fn from_line(line: &str) -> Result<Outcome, String> {
        let parse = || {
            let mut parts = line.splitn(5, '|');
            let mut next = || parts.next();
            let status = next()?.parse().ok()?;
            let took = Duration::from_micros(next()?.parse().ok()?);
            let ended = Duration::from_micros(next()?.parse().ok()?);
            let words = next()?.split(',').filter_map(|word| word.parse().ok()).collect();
            Some(Outcome { status, text: next()?.to_string(), words, took, ended })
        };
        parse().ok_or_else(|| format!("not an answer: {line:?}"))
    }

    /// The status that was due, and every word that the sentence must have.
    pub fn is(&self, status: a2a_status_t, words: &[&str]) -> Result<(), String> {
        let missing: Vec<_> = words.iter().filter(|word| !self.text.contains(**word)).collect();
        if self.status == status && missing.is_empty() {
            return Ok(());
        }
        Err(format!("expected {} with {words:?}, got {}", status_name(status), self.describe()))
    }
    pub fn describe(&self) -> String {
        let name = if self.status == WRONG { "a wrong result" } else { status_name(self.status) };
        format!("{name} after {:?}: {:?}", self.took, self.text)
    }

    /// The sentence without the function that returned it.
    pub fn sentence(&self) -> &str {
        self.text.split_once(": ").map_or(&self.text, |(_, sentence)| sentence)
    }
}

pub fn all_fine(what: &str, outcomes: &[Outcome]) -> Result<(), String> {
    for (at, outcome) in outcomes.iter().enumerate() {
        outcome.is(A2A_SUCCESS, &[]).map_err(|error| format!("{what}, answer {at}: {error}"))?;
    }
    Ok(())
}

/// out.status of a step that was given up because of these ranks.
pub fn voided(words: &[i64], ranks: &[usize]) -> Result<(), String> {
    let mut expected = vec![0; 4 + RANKS];
    expected[0] = A2A_STEP_VOID as i64;
    ranks.iter().for_each(|rank| expected[4 + rank] = 1);
    if words == expected { Ok(()) } else { Err(format!("out.status is {words:?}, expected {expected:?}")) }
}

/// What a rank gets that the others gave up on: their deadline, or that they left since.
pub fn told_late(outcome: &Outcome) -> Result<(), String> {
    match outcome.status {
        A2A_TIMEOUT | A2A_PEER_LOST => Ok(()),
        _ => Err(format!("the late rank got {}", outcome.describe())),
    }
}

// --------------------------------------------------------------------------------------------- a rank

/// What a rank dispatches and combines. All ranks ask the same, but where they are to disagree.
#[derive(Clone)]
pub struct Ask {
    /// Of the tokens and their experts; two steps never have the same.
    pub seed: u64,
    /// T; `None`: up to the seed.
    pub tokens: Option<usize>,
    pub bound: usize,
    pub hidden: usize,
    pub topk: usize,
    pub element: Dtype,
    pub rank_tokens: Option<Vec<i32>>,
    pub flags: u64,
    pub goes: Goes,
    /// Hidden size and type of rows of zeros that stand for the experts' results.
    pub result: Option<(usize, Dtype)>,
    /// Zeros go back beside them.
    pub row_weights: bool,
}

/// Which ranks tokens go to.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Goes {
    Anywhere,
    /// As many rows to every rank.
    Everywhere,
    /// As many rows to every rank but this one, which gets none.
    Past(usize),
}

impl Goes {
    /// The expert of a token's choice.
    pub fn expert(self, rng: &mut Rng, choice: usize, world: usize) -> i32 {
        let rank = match self {
            Goes::Anywhere if rng.one_in(8) => return -1,
            Goes::Anywhere => return rng.below(2 * world) as i32,
            Goes::Everywhere => choice % world,
            Goes::Past(past) => choice % (world - 1) + usize::from(choice % (world - 1) >= past),
        };
        (2 * rank + rng.below(2)) as i32
    }
}

impl Ask {
    pub fn new(seed: u64) -> Ask {
        Ask {
            seed,
            tokens: None,
            bound: MAX_TOKENS,
            hidden: HIDDEN,
            topk: TOPK,
            element: F32,
            rank_tokens: None,
            flags: 0,
            goes: Goes::Anywhere,
            result: None,
            row_weights: false,
        }
    }

    /// A rank's input and the sums that combine must give: rank r's experts multiply by r + 1, all in small integers
    /// that float32 holds exactly. A rank owns two experts; where a row is a (token, expert) pair, a token has the
    /// result of each of its choices, else of each of its ranks.
    /// Ranks that are not `members` have no experts: third, how many choices name one of theirs.
    pub fn input(&self, rank: usize, world: usize, pair: Pair, members: u64) -> (DispatchIn, Vec<f32>, i64) {
        let mut rng = Rng::new(&[self.seed, rank as u64]);
        let drawn = rng.below(TOKENS + 1);
        let tokens = self.tokens.unwrap_or(drawn);
        let mut ids = Vec::new();
        let mut values = Vec::new();
        let mut sums = Vec::new();
        let mut absent = 0;
        for token in 0..tokens {
            let choices = token * self.topk..(token + 1) * self.topk;
            let experts: Vec<i32> = choices.map(|choice| self.goes.expert(&mut rng, choice, world)).collect();
            let mut owners: Vec<usize> =
                experts.iter().filter(|id| **id >= 0).map(|id| *id as usize / 2).collect();
            let named = owners.len();
            owners.retain(|rank| members >> rank & 1 == 1);
            absent += (named - owners.len()) as i64;
            if !pair.by_expert() {
                owners.sort();
                owners.dedup();
            }
            let factor: usize = owners.iter().map(|rank| rank + 1).sum();
            for _ in 0..self.hidden {
                let value = rng.below(1000) as f32;
                values.extend(value.to_le_bytes());
                sums.push(value * factor as f32);
            }
            ids.extend(experts.iter().flat_map(|id| id.to_le_bytes()));
        }
        let replays = self.flags & A2A_DISPATCH_REUSE != 0;
        values.truncate(tokens * self.hidden * self.element.bits as usize / 8);
        let input = DispatchIn {
            tokens: Some(Tensor::of(self.element, &[tokens, self.hidden], &values)),
            // A routing that is replayed has its own.
            topk_ids: (!replays).then(|| Tensor::of(I32, &[tokens, self.topk], &ids)),
            rank_tokens: self.rank_tokens.clone(),
            max_tokens: self.bound as i32,
            flags: self.flags,
            ..Default::default()
        };
        (input, sums, if replays { 0 } else { absent })
    }
}

/// What the calls on a slot read and write.
#[derive(Default)]
pub struct Work {
    pub input: DispatchIn,
    pub output: DispatchOut,
    pub results: CombineIn,
    pub sums: CombineOut,
    pub expected: Vec<f32>,
    /// Choices of experts of ranks that take part no more.
    pub absent: i64,
}

/// A rank's comm with a routing on every slot.
pub struct Member {
    pub rank: usize,
    pub world: usize,
    pub pair: Pair,
    pub slots: Vec<(Routing, Mutex<Work>)>,
    pub comm: Comm,
    /// Ranks that take part, a bit each.
    pub members: AtomicU64,
}

pub fn settings(seat: &Seat, pair: Pair) -> a2a_config_t {
    let mut config = config(seat);
    (config.backend, config.layout) = pair.code();
    if pair == Pair::Narrow {
        config.fifo_rows = FIFO_ROWS as i32;
    }
    config.num_experts = 2 * seat.world as i32;
    config.max_topk = TOPK as i32;
    config.max_hidden = HIDDEN as i32;
    config.token_dtype = A2A_DTYPE_F32;
    config.max_tokens = pair.max_tokens() as i32;
    config.num_slots = SLOTS as i32;
    config.setup_timeout_ms = 10_000;
    config.first_step_timeout_ms = DEADLINE.as_millis() as i64;
    config.timeout_ms = DEADLINE.as_millis() as i64;
    config
}

impl Member {
    /// `views`: statuses are asked for as views, else in tensors of our own.
    pub fn new(seat: &Seat, comm: Comm, pair: Pair, views: bool) -> Result<Member, Failure> {
        let status = || Some(if views { Tensor::view() } else { Tensor::new(I32, &[4 + seat.world]) });
        let slot = |slot| {
            let mut work = Work::default();
            (work.output.status, work.sums.status) = (status(), status());
            comm.routing(slot as i32).map(|routing| (routing, Mutex::new(work)))
        };
        let slots = (0..SLOTS).map(slot).collect::<Result<_, _>>()?;
        let members = AtomicU64::new((1 << seat.world) - 1);
        Ok(Member { rank: seat.rank, world: seat.world, pair, slots, comm, members })
    }

    pub fn join(seat: &Seat, pair: Pair, views: bool) -> Result<Member, Failure> {
        Member::new(seat, Comm::create(&settings(seat, pair))?, pair, views)
    }

    pub fn slot(&self, slot: usize) -> (&Routing, MutexGuard<'_, Work>) {
        let (routing, work) = &self.slots[slot];
        (routing, work.lock().unwrap())
    }

    pub fn dispatch(&self, slot: usize, phase: a2a_phase_t, ask: &Ask) -> Outcome {
        let (routing, mut work) = self.slot(slot);
        let work = &mut *work;
        if phase != A2A_PHASE_RECV {
            let members = self.members.load(Ordering::Relaxed);
            (work.input, work.expected, work.absent) = ask.input(self.rank, self.world, self.pair, members);
            work.output.tokens = Some(match self.pair.streams() {
                true => Tensor::new(ask.element, &[self.world * ask.bound, ask.hidden]),
                false => Tensor::view(),
            });
        }
        spoil(&mut work.output.status);
        let (input, output) = (&work.input, &mut work.output);
        let mut outcome = Outcome::of(|| self.comm.dispatch(routing, phase, input, output));
        outcome.words = read(&output.status);
        let counted = (phase != A2A_PHASE_SEND).then(|| outcome.words.get(1).copied()).flatten();
        if let Some(bad) = counted.filter(|bad| outcome.status == A2A_SUCCESS && *bad != work.absent) {
            outcome.status = WRONG;
            outcome.text = format!("{bad} ids of lost ranks were counted and not {}", work.absent);
        }
        outcome
    }

    /// After a received dispatch. Sums are checked in RECV and BOTH.
    pub fn combine(&self, slot: usize, phase: a2a_phase_t, ask: &Ask) -> Outcome {
        let (routing, mut work) = self.slot(slot);
        let work = &mut *work;
        if phase != A2A_PHASE_RECV {
            let received = work.output.tokens.as_ref().expect("dispatched before");
            work.results.tokens = Some(self.experts(received, ask));
            work.results.row_weights = ask.row_weights.then(|| {
                let rows = received.shape().split_last().map_or(0, |(_, rows)| rows.iter().product());
                let shape = if self.pair.by_expert() { vec![rows] } else { vec![rows, ask.topk] };
                Tensor::new(F32, &shape)
            });
            let tokens = work.input.tokens.as_ref().expect("dispatched before").shape()[0];
            work.sums.tokens =
                Some(Tensor::new(F32, &[tokens, ask.result.map_or(HIDDEN, |(hidden, _)| hidden)]));
        }
        spoil(&mut work.sums.status);
        let (results, sums) = (&work.results, &mut work.sums);
        let mut outcome = Outcome::of(|| self.comm.combine_with(routing, phase, results, sums));
        outcome.words = read(&sums.status);
        if outcome.status == A2A_SUCCESS && phase != A2A_PHASE_SEND && ask.result.is_none() {
            let got = floats(&sums.tokens.as_ref().expect("given").read());
            if let Some(at) = (0..got.len()).find(|&at| got[at] != work.expected[at]) {
                outcome.status = WRONG;
                outcome.text = format!("sum {at} is {} and not {}", got[at], work.expected[at]);
            }
        }
        outcome
    }

    /// A call that is to be refused: what the slot's last one reads and writes stays as it is.
    pub fn aside<T>(&self, slot: usize, call: impl FnOnce() -> T) -> T {
        let rows = self.world * self.pair.max_tokens();
        let mut other = Work::default();
        other.input.tokens = Some(Tensor::new(F32, &[0, HIDDEN]));
        other.output.tokens = Some(Tensor::new(F32, &[rows, HIDDEN]));
        std::mem::swap(&mut other, &mut *self.slot(slot).1);
        let outcome = call();
        std::mem::swap(&mut other, &mut *self.slot(slot).1);
        outcome
    }

    /// The received rows times rank + 1, or zeros of the type that the disagreement is about.
    pub fn experts(&self, received: &Tensor, ask: &Ask) -> Tensor {
        let mut shape = received.shape();
        if let Some((hidden, element)) = ask.result {
            *shape.last_mut().expect("rows have columns") = hidden;
            let bytes = shape.iter().product::<usize>() * element.bits as usize / 8;
            return Tensor::of(element, &shape, &vec![0; bytes]);
        }
        let scale = |value: f32| (value * (self.rank + 1) as f32).to_le_bytes();
        let bytes: Vec<u8> = floats(&received.read()).into_iter().flat_map(scale).collect();
        Tensor::of(F32, &shape, &bytes)
    }

    pub fn ask(&self, seed: u64) -> Ask {
        match self.pair {
            Pair::Narrow => Ask { tokens: Some(MANY), bound: MANY, goes: Goes::Everywhere, ..Ask::new(seed) },
            _ => Ask::new(seed),
        }
    }

    /// A whole step; the outcome that ended it.
    pub fn step(&self, slot: usize, seed: u64) -> Outcome {
        self.step_in(&[A2A_PHASE_BOTH], slot, seed)
    }

    /// As above, each operation in these phases.
    pub fn step_in(&self, phases: &[a2a_phase_t], slot: usize, seed: u64) -> Outcome {
        let ask = self.ask(seed);
        let dispatches = phases.iter().map(|&phase| self.dispatch(slot, phase, &ask));
        let combines = phases.iter().map(|&phase| self.combine(slot, phase, &ask));
        let mut last = None;
        for outcome in dispatches.chain(combines) {
            let failed = outcome.status != A2A_SUCCESS;
            last = Some(outcome);
            if failed {
                break;
            }
        }
        last.expect("at least one phase")
    }

    /// The comm's last operations.
    pub fn history(&self) -> Result<serde_json::Value, String> {
        let text = self.comm.history()?;
        serde_json::from_str(&text).map_err(|error| format!("{error} in {text}"))
    }

    /// The comm's record of its first failure.
    pub fn record(&self) -> Outcome {
        let mut info = None;
        let mut outcome = Outcome::of(|| {
            info = Some(self.comm.async_error()?);
            Ok(())
        });
        if let Some(info) = info {
            outcome.status = info.status;
            outcome.text = sentence(&info);
            outcome.words = vec![
                info.operation.into(),
                info.slot.into(),
                info.rank.into(),
                info.peer.into(),
                info.sequence as i64,
                info.lost_ranks[0] as i64,
            ];
        }
        outcome
    }

    /// Beside what `drop` does later: a stale handle is refused then, and nobody minds.
    pub fn destroy(&self) -> Outcome {
        // SAFETY: a handle of ours.
        Outcome::of(|| check(unsafe { a2a_destroy(self.comm.handle()) }))
    }

    /// Its words: generation, members, how many they are, whether windows are others, and the whole steps of each slot.
    pub fn recover(&self, timeout_ms: i64, patience_ms: i64) -> Outcome {
        let mut output = None;
        let mut outcome = Outcome::of(|| {
            output = Some(self.comm.recover(timeout_ms, patience_ms)?);
            Ok(())
        });
        if let Some(output) = output {
            self.members.store(output.members[0], Ordering::Relaxed);
            outcome.words = vec![
                output.generation as i64,
                output.members[0] as i64,
                output.num_members.into(),
                output.replaced.into(),
                output.whole_steps[0] as i64,
                output.whole_steps[1] as i64,
            ];
        }
        outcome
    }

    /// These are to take part from now on.
    pub fn activate(&self, ranks: &[i32]) -> Outcome {
        let mut generation = 0;
        let mut outcome = Outcome::of(|| {
            let (handle, count) = (self.comm.handle(), ranks.len() as i32);
            // SAFETY: so many int32, a valid out-pointer.
            check(unsafe { a2a_activate_ranks(handle, ranks.as_ptr(), count, 10_000, &mut generation) })
        });
        if outcome.status == A2A_SUCCESS {
            self.members.store(ranks.iter().map(|rank| 1 << rank).sum(), Ordering::Relaxed);
        }
        outcome.words = vec![generation as i64];
        outcome
    }

    pub fn mask(&self) -> Outcome {
        let mut mask = vec![-1; self.world];
        // SAFETY: as many int32 as are said.
        let mut get =
            || unsafe { a2a_get_rank_mask(self.comm.handle(), mask.as_mut_ptr(), self.world as i32) };
        let mut outcome = Outcome::of(|| check(get()));
        outcome.words = mask.into_iter().map(i64::from).collect();
        outcome
    }

    /// Returns once a call of another thread waits for a peer; `hops` as they were before that call.
    pub fn until_waiting(&self, hops: u64) -> Result<(), String> {
        let limit = Instant::now() + DEADLINE;
        while self.hops()? == hops {
            if Instant::now() > limit {
                return Err(format!("rank {} waits for nobody", self.rank));
            }
            sleep(Duration::from_millis(1));
        }
        Ok(())
    }
    pub fn hops(&self) -> Result<u64, String> {
        Ok(self.comm.stats()?.hops)
    }
}

/// So that a status that a call does not write is not taken for one that it wrote.
pub fn spoil(status: &mut Option<Tensor>) {
    if let Some(status) = status.as_mut().filter(|status| !status.is_view()) {
        status.write(&vec![0xff; 4 * status.shape()[0]]);
    }
}

/// Empty for a view that no call has made yet.
pub fn read(status: &Option<Tensor>) -> Vec<i64> {
    let status = status.as_ref().filter(|status| status.address() != 0);
    status.map_or(Vec::new(), |status| status.read_i32().into_iter().map(i64::from).collect())
}

pub fn floats(bytes: &[u8]) -> Vec<f32> {
    bytes.chunks_exact(4).map(|word| f32::from_le_bytes(word.try_into().unwrap())).collect()
}

// ------------------------------------------------------------------------------------- ranks as processes

/// A rank that does what it is told, line by line, until its standard input ends.
pub const OBEY: (&str, Job) = ("obey", obey);

pub fn obey(_: &Seat) -> Result<(), String> {
    obey_also(|_| None)
}

/// Obeys, and knows orders of one kind of test alone: `extra` gives the answer to those.
pub fn obey_also(extra: impl Fn(&[&str]) -> Option<Outcome>) -> Result<(), String> {
    // SAFETY: the callback is a function, it needs no pointer.
    check(unsafe { a2a_set_log_callback(Some(log_line), std::ptr::null_mut()) })?;
    let mut member = None;
    for line in std::io::stdin().lock().lines().map_while(Result::ok) {
        let words: Vec<&str> = line.split(' ').collect();
        let answer = match extra(&words) {
            Some(answer) => answer,
            None => follow(&mut member, &line, &words)?,
        };
        println!("{}", answer.to_line());
    }
    Ok(())
}

/// Standard error is where `Worker` collects lines that are no answers; each has the time before it.
unsafe extern "C" fn log_line(_: i32, line: *const std::ffi::c_char, _: *mut std::ffi::c_void) {
    // SAFETY: NUL-terminated and valid during the call, by the ABI.
    let line = unsafe { std::ffi::CStr::from_ptr(line) }.to_string_lossy();
    eprintln!("{} {line}", now().as_micros());
}

fn follow(member: &mut Option<Member>, line: &str, words: &[&str]) -> Result<Outcome, String> {
    let number = |at: usize| words[at].parse::<u64>().map_err(|error| format!("{line:?}: {error}"));
    if words[0] == "join" {
        let bytes: Vec<u8> = words[5..133].iter().map(|byte| byte.parse().expect("a byte")).collect();
        let id = GroupId(a2a_unique_id_t { bytes: bytes.try_into().expect("128 bytes") });
        let seat = Seat { rank: number(1)? as usize, world: number(2)? as usize, id, args: Vec::new() };
        let (pair, views) = (Pair::of(words[3]), words[4] == "views");
        let mut config = settings(&seat, pair);
        if words.len() > 133 {
            config.setup_timeout_ms = number(133)? as i64;
        }
        return Ok(Outcome::of(|| {
            *member = Some(Member::new(&seat, Comm::create(&config)?, pair, views)?);
            Ok(())
        }));
    }
    if words[0] == "drop" {
        return Ok(Outcome::of(|| {
            *member = None;
            Ok(())
        }));
    }
    if words[0] == "footprint" {
        let mut outcome = Outcome::of(|| Ok(()));
        outcome.words = footprint()?.map(|count| count as i64).into();
        return Ok(outcome);
    }
    act(member.as_ref().ok_or("no comm yet")?, line, words)
}

/// An order that a comm is needed for.
fn act(member: &Member, line: &str, words: &[&str]) -> Result<Outcome, String> {
    let number = |at: usize| words[at].parse::<u64>().map_err(|error| format!("{line:?}: {error}"));
    Ok(match words[0] {
        "aside" => member.aside(number(2)? as usize, || act(member, line, &words[1..]))?,
        "dispatch" => {
            let mut ask = member.ask(number(3)?);
            if words.len() > 4 {
                ask.tokens = Some(number(4)? as usize);
            }
            member.dispatch(number(1)? as usize, number(2)? as i32, &ask)
        }
        "combine" => member.combine(number(1)? as usize, number(2)? as i32, &member.ask(0)),
        "run" => {
            // Steps without end, in the phases that are named; the outcome that ends them.
            let mut step = number(2)?;
            let phases = (3..words.len()).map(|at| number(at).map(|phase| phase as a2a_phase_t));
            let phases = phases.collect::<Result<Vec<_>, _>>()?;
            let phases = if phases.is_empty() { &[A2A_PHASE_BOTH] } else { &phases[..] };
            loop {
                let outcome = member.step_in(phases, number(1)? as usize, step);
                if outcome.status != A2A_SUCCESS {
                    break outcome;
                }
                step += 1;
            }
        }
        "record" => member.record(),
        "recover" => member.recover(number(1)? as i64, number(2)? as i64),
        "activate" => {
            let ranks = words[1].split(',').map(|rank| rank.parse().expect("a rank")).collect::<Vec<i32>>();
            member.activate(&ranks)
        }
        "mask" => member.mask(),
        "watch" => {
            let history = member.history()?;
            let mut outcome = Outcome::of(|| Ok(()));
            outcome.text = format!("gone {} dead {}", history["gone_ranks"], history["dead_ranks"]);
            outcome
        }
        "destroy" => member.destroy(),
        "limit" => {
            let most = number(1)?;
            Outcome::of(|| limit_descriptors(most))
        }
        _ => return Err(format!("no such order: {line:?}")),
    })
}

/// This process may not have more descriptors than these, beside those it has.
pub fn limit_descriptors(most: u64) -> Result<(), Failure> {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: valid pointers, used during the calls.
    let done = unsafe {
        libc::getrlimit(libc::RLIMIT_NOFILE, &mut limit) == 0 && {
            limit.rlim_cur = most;
            libc::setrlimit(libc::RLIMIT_NOFILE, &limit) == 0
        }
    };
    let failure = || Failure { status: WRONG, text: std::io::Error::last_os_error().to_string() };
    done.then_some(()).ok_or_else(failure)
}

/// Processes that obey, one rank each. Killed when this is dropped.
pub struct Group {
    pub workers: Vec<Worker>,
    pub deadline: Instant,
    pub pair: Pair,
    pub views: bool,
}

pub const EVERYBODY: [usize; RANKS] = [0, 1, 2, 3];

impl Group {
    pub fn spawn(pair: Pair, views: bool) -> Group {
        let workers = EVERYBODY.map(worker_of).into();
        Group { workers, deadline: Instant::now() + ANSWERS, pair, views }
    }

    /// A fresh process in the place of one that is gone.
    pub fn replace(&mut self, process: usize) {
        self.workers[process] = worker_of(process);
    }

    pub fn tell(&mut self, process: usize, order: &str) -> Result<(), String> {
        self.workers[process].tell(order)
    }
    pub fn answer(&self, process: usize) -> Result<Outcome, String> {
        let left = self.deadline.saturating_duration_since(Instant::now());
        Outcome::from_line(&self.workers[process].line(left)?)
    }
    pub fn tell_all(&mut self, processes: &[usize], order: &str) -> Result<(), String> {
        processes.iter().try_for_each(|&process| self.tell(process, order))
    }
    pub fn answers(&self, processes: &[usize]) -> Outcomes {
        processes.iter().map(|&process| self.answer(process)).collect()
    }
    pub fn all(&mut self, processes: &[usize], order: &str) -> Outcomes {
        self.tell_all(processes, order)?;
        self.answers(processes)
    }
    /// An order that all must carry out.
    pub fn fine(&mut self, processes: &[usize], order: &str) -> Result<(), String> {
        all_fine(order, &self.all(processes, order)?)
    }

    /// Tells these processes to be a new group, in this order.
    pub fn tell_join(&mut self, processes: &[usize], world: usize, id: GroupId) -> Result<(), String> {
        for (rank, &process) in processes.iter().enumerate() {
            self.tell(process, &join(rank, world, self.pair, self.views, id))?;
        }
        Ok(())
    }
    pub fn join(&mut self, processes: &[usize]) -> Result<(), String> {
        self.tell_join(processes, processes.len(), GroupId::new())?;
        all_fine("join", &self.answers(processes)?)
    }
    pub fn step(&mut self, processes: &[usize], slot: usize, seed: u64) -> Result<(), String> {
        self.fine(processes, &dispatch(slot, A2A_PHASE_BOTH, seed))?;
        self.fine(processes, &combine(slot, A2A_PHASE_BOTH))
    }
}

fn worker_of(rank: usize) -> Worker {
    // The group is named later, by "join".
    let seat = Seat { rank, world: RANKS, id: GroupId::new(), args: Vec::new() };
    Worker::spawn(OBEY.0, &[rank], &seat)
}

pub fn join(rank: usize, world: usize, pair: Pair, views: bool, id: GroupId) -> String {
    let bytes: Vec<String> = id.0.bytes.iter().map(u8::to_string).collect();
    let views = if views { "views" } else { "own" };
    format!("join {rank} {world} {} {views} {}", pair.name(), bytes.join(" "))
}
pub fn dispatch(slot: usize, phase: a2a_phase_t, seed: u64) -> String {
    format!("dispatch {slot} {phase} {seed}")
}
pub fn combine(slot: usize, phase: a2a_phase_t) -> String {
    format!("combine {slot} {phase}")
}
/// As an order that is to be refused, so that it costs the step nothing.
pub fn aside(order: String) -> String {
    format!("aside {order}")
}
// -------------------------------------------------------------------------------------- ranks as threads

/// One call per rank, each on a thread of its own.
pub fn together<T: Send>(members: &[&Member], call: impl Fn(&Member) -> T + Sync) -> Vec<T> {
    scope(|scope| {
        let calls: Vec<_> = members.iter().map(|member| scope.spawn(|| call(member))).collect();
        calls.into_iter().map(|call| call.join().expect("no panic in a call")).collect()
    })
}

/// What came out of a2a_create, and after how long.
pub type Created = (Result<Comm, Failure>, Duration);

/// Every rank creates its comm. `config` runs on the rank's thread.
pub fn create(seats: &[Seat], config: impl Fn(&Seat) -> a2a_config_t + Sync) -> Vec<Created> {
    scope(|scope| {
        let config = &config;
        let create = |seat: &Seat| {
            let config = config(seat);
            let begun = Instant::now();
            (Comm::create(&config), begun.elapsed())
        };
        let calls: Vec<_> = seats.iter().map(|seat| scope.spawn(move || create(seat))).collect();
        calls.into_iter().map(|call| call.join().expect("no panic in a2a_create")).collect()
    })
}

pub fn seats(world: usize, id: GroupId) -> Vec<Seat> {
    (0..world).map(|rank| Seat { rank, world, id, args: Vec::new() }).collect()
}

pub fn members(seats: &[Seat], pair: Pair) -> Result<Vec<Member>, String> {
    let comms = create(seats, |seat| settings(seat, pair));
    let members = comms.into_iter().zip(seats).map(|((comm, _), seat)| Member::new(seat, comm?, pair, false));
    Ok(members.collect::<Result<_, Failure>>()?)
}

pub fn crew(pair: Pair) -> Result<Vec<Member>, String> {
    members(&seats(RANKS, GroupId::new()), pair)
}

pub fn all_but(crew: &[Member], rank: usize) -> Vec<&Member> {
    crew.iter().filter(|member| member.rank != rank).collect()
}

pub fn all(crew: &[Member]) -> Vec<&Member> {
    crew.iter().collect()
}

// --------------------------------------------------------------------------------------- what stays behind

/// Open descriptors, threads, mapped windows, and files with our name.
pub fn footprint() -> Result<[usize; 4], String> {
    let entries = |path: &str| -> Result<Vec<String>, String> {
        let entries = std::fs::read_dir(path).map_err(|error| format!("{path}: {error}"))?;
        Ok(entries.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned()).collect())
    };
    let maps = std::fs::read_to_string("/proc/self/maps").map_err(|error| error.to_string())?;
    let windows = maps.lines().filter(|line| line.contains("a2a-window")).count();
    let temporary = std::env::temp_dir().display().to_string();
    let files = [entries("/dev/shm")?, entries(&temporary)?].concat();
    let files = files.iter().filter(|name| name.contains("a2a")).count();
    Ok([entries("/proc/self/fd")?.len(), entries("/proc/self/task")?.len(), windows, files])
}

// ------------------------------------------------------------------------------------------- the cases

pub type Run = Box<dyn FnOnce() -> Result<(), String> + Send>;

/// Runs a case under the hard limit. One that hangs is left behind, its processes go with its thread or with us.
pub fn limited(run: Run, limit: Duration) -> Result<(), String> {
    let (done, outcome) = channel();
    std::thread::spawn(move || {
        // Nobody listens any more once the time is up.
        let _ = done.send(run());
    });
    outcome.recv_timeout(limit).unwrap_or_else(|_| Err(format!("panicked, or not finished after {limit:?}")))
}
