//! Faults at named points (the feature `faults`): the 16 kinds of docs/trust.md, each on four ranks with several seeds; and
//! losses after which the survivors recover.
//!
//! Every case asserts the same: each survivor has the right status, a sentence that names the rank, and has both in time;
//! nothing of its comm stays in any process; and a new comm of all ranks, with a fresh process in the place of one that
//! died, takes a step whose sums are right.
//!
//! Every rank is a process that obeys orders (`faults/group.rs`); one of them is told to arm a point. A2A_INCIDENTS is how
//! many seeds a kind has (5), A2A_TEST_SEED the first. With A2A_TEST_DEVICE=cuda the kinds that are of CUDA run there.

use std::io::{ErrorKind, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::os::unix::process::ExitStatusExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{JoinHandle, sleep};
use std::time::{Duration, Instant};

use a2a::abi::types::*;
use a2a::fault::{self, Action, Point};
use libtest_mimic::{Arguments, Trial};

#[allow(dead_code, reason = "each test binary uses a part")]
mod common;
#[path = "faults/group.rs"]
#[allow(dead_code, reason = "each test binary uses a part")]
mod group;
#[path = "faults/rendezvous.rs"]
#[allow(dead_code, reason = "each test binary uses a part")]
mod rendezvous;

use common::*;
use group::*;

type Done = Result<(), String>;
type Kind = fn(&Case) -> Done;

/// The list, in its order.
const KINDS: [(&str, Kind); 16] = [
    ("SIGKILL before the rendezvous", killed_before_the_rendezvous),
    ("SIGKILL in the rendezvous", killed_in_the_rendezvous),
    ("SIGKILL in dispatch before publishing", |case| case.struck_in_a_step(&BEFORE_PUBLISHING, KILL)),
    ("SIGKILL in dispatch after publishing", |case| case.struck_in_a_step(&AFTER_PUBLISHING, KILL)),
    ("SIGKILL in combine", |case| case.struck_in_a_step(&COMBINING, KILL)),
    ("SIGKILL in destroy", killed_in_destroy),
    ("SIGSTOP beyond the deadline, then SIGCONT", |case| case.struck_in_a_step(&STEPPING, STOP)),
    ("socket reset", |case| case.cut_off(Cut::Reset)),
    ("half-open", |case| case.cut_off(Cut::Hold)),
    ("other version, size or config", another_kind_of_rank),
    ("duplicate rank", a_duplicate),
    ("shm full", no_shared_memory),
    ("n-th allocation fails", an_allocation_fails),
    ("n-th launch fails", a_launch_fails),
    ("a rank skips a step", a_rank_skips),
    ("a rank calls twice", a_rank_calls_twice),
];

/// The survivors go on in the same comm.
const RECOVERIES: [(&str, Kind); 3] = [
    ("recover from SIGKILL", |case| case.recover_from(KILL)),
    ("recover from SIGSTOP, then SIGCONT", |case| case.recover_from(STOP)),
    ("SIGKILL in a recovery", killed_in_a_recovery),
];

/// Of kinds on CUDA memory: all other points stand in code of CPU memory.
const ON_CUDA: [&str; 2] = ["n-th allocation fails", "n-th launch fails"];

const KILL: &str = "kill";
const STOP: &str = "stop";

const BEFORE_PUBLISHING: [Point; 5] = [
    Point::DispatchBeforeFlags,
    Point::DispatchRow,
    Point::DispatchCounts,
    Point::DispatchBegins,
    Point::WaitCounts,
];
const AFTER_PUBLISHING: [Point; 6] = [
    Point::DispatchFlag,
    Point::DispatchAfterFlags,
    Point::WaitDispatch,
    Point::FifoEntry,
    Point::DispatchGather,
    Point::DispatchReceived,
];
const COMBINING: [Point; 6] = [
    Point::CombineFlag,
    Point::CombineRow,
    Point::CombineBeforeFlags,
    Point::CombineReceived,
    Point::CombineAfterFlags,
    Point::WaitCombine,
];
const STEPPING: [Point; 10] = [
    Point::DispatchRow,
    Point::CombineRow,
    Point::DispatchFlag,
    Point::FifoEntry,
    Point::CombineAfterFlags,
    Point::DispatchBeforeFlags,
    Point::WaitDispatch,
    Point::CombineFlag,
    Point::DispatchGather,
    Point::CombineBeforeFlags,
];

/// Where a rank that is not rank 0 may die in the rendezvous, and where rank 0 may.
const JOINING: [Point; 5] = [
    Point::CreateJoined,
    Point::CreateWelcomed,
    Point::CreateSentWindow,
    Point::CreateMapped,
    Point::CreateReady,
];
const ADMITTING: [Point; 6] = [
    Point::CreateSeated,
    Point::CreateComplete,
    Point::CreateCollected,
    Point::CreateMapped,
    Point::CreateGo,
    Point::CreateListening,
];

/// What a2a_create and a2a_routing_create take from the system.
const TAKING: [Point; 16] = [
    Point::Poll,
    Point::Listen,
    Point::Connect,
    Point::Accept,
    Point::SendWindows,
    Point::ReceiveWindows,
    Point::Lifeline,
    Point::Pidfd,
    Point::MemfdCreate,
    Point::Ftruncate,
    Point::Fallocate,
    Point::Seal,
    Point::Map,
    Point::WatchdogPipe,
    Point::WatchdogThread,
    Point::Private,
];
/// ENOMEM, EMFILE, ENOSPC.
const SHORTAGES: [i32; 3] = [12, 24, 28];

/// What a process makes for its first comm and keeps.
const ONCE_ON_CUDA: [Point; 3] = [Point::CudaModule, Point::CudaStream, Point::CudaPool];
/// What every comm takes from a GPU, whose driver says CUDA_ERROR_OUT_OF_MEMORY.
const TAKING_ON_CUDA: [Point; 8] = [
    Point::CudaPinned,
    Point::CudaWindow,
    Point::CudaReserve,
    Point::CudaMap,
    Point::CudaAccess,
    Point::CudaExport,
    Point::CudaImport,
    Point::CudaPrivate,
];
const CUDA_OUT_OF_MEMORY: i32 = 2;
const CUDA_LAUNCH_FAILED: i32 = 719;

/// The rendezvous' deadline where somebody will be missed. The one who is cut off gives up half a second later, and before
/// the others' first step does.
const SETUP: Duration = Duration::from_secs(1);
/// Nobody is missed there.
const SETUP_ON_CUDA: Duration = Duration::from_secs(20);

// ------------------------------------------------------------------------------------------ ranks that obey

/// A process that also arms its points.
fn obey_armed(_: &Seat) -> Done {
    obey_also(|words| {
        let mut outcome = Outcome::of(|| Ok(()));
        match words[0] {
            "arm" => {
                let number = |at: usize| words[at].parse::<i64>().expect("a number");
                let point = Point::ALL.iter().find(|point| point.name() == words[1]).expect("a point");
                let action = match words[3] {
                    KILL => Action::Kill,
                    STOP => Action::Stop,
                    _ => Action::Fail(number(3) as i32),
                };
                fault::arm(*point, number(2) as u64, action);
            }
            "disarm" => {
                fault::disarm();
                outcome.words = vec![fault::has_struck().into()];
            }
            _ => return None,
        }
        Some(outcome)
    })
}

fn arm(point: Point, nth: usize, action: impl std::fmt::Display) -> String {
    format!("arm {} {nth} {action}", point.name())
}

/// What every process had open before it had a comm.
type Before = Vec<Vec<i64>>;

fn begin(pair: Pair, views: bool) -> Result<(Group, Before), String> {
    let mut group = Group::spawn(pair, views);
    if cuda::is_enabled() {
        // The driver and a device's first use stay open.
        group.join(&EVERYBODY)?;
        group.step(&EVERYBODY, 0, 800)?;
        group.fine(&EVERYBODY, "drop")?;
    }
    let before = group.all(&EVERYBODY, "footprint")?.into_iter().map(|outcome| outcome.words).collect();
    Ok((group, before))
}

/// These processes end their comms, and have what they had before.
fn leave(group: &mut Group, processes: &[usize], before: &Before) -> Done {
    for outcome in group.all(processes, "drop")? {
        in_time("destroy after a fault", outcome.took, PROMISE)?;
    }
    clean(group, processes, before)
}

/// Threads may still be on their way out when what they were for has ended.
fn clean(group: &mut Group, processes: &[usize], before: &Before) -> Done {
    let limit = Instant::now() + GRACE;
    for &process in processes {
        loop {
            let [after] = &group.all(&[process], "footprint")?[..] else { unreachable!("one was asked") };
            if after.words == before[process] {
                break;
            }
            if Instant::now() > limit {
                return Err(format!(
                    "process {process} had {:?} descriptors, threads, windows and files, and keeps {:?}",
                    before[process], after.words
                ));
            }
            sleep(Duration::from_millis(5));
        }
    }
    Ok(())
}

/// A new comm of all four works, and leaves nothing.
fn anew(group: &mut Group, before: &Before, slot: usize) -> Done {
    group.join(&EVERYBODY)?;
    group.step(&EVERYBODY, slot, 900)?;
    leave(group, &EVERYBODY, before)
}

/// The fault that a process says has struck it, and when.
fn struck(group: &Group, process: usize, point: Point) -> Result<Duration, String> {
    let line = format!("fault at {},", point.name());
    let limit = Instant::now() + DEADLINE + GRACE;
    loop {
        let said = group.workers[process].stderr();
        // The last line may not be whole yet.
        let lines = said.split_inclusive('\n').filter(|text| text.ends_with('\n'));
        if let Some(found) = lines.rev().find(|text| text.contains(&line)) {
            let time = found.split(' ').next().and_then(|time| time.parse().ok());
            return time.map(Duration::from_micros).ok_or_else(|| format!("no time in {found:?}"));
        }
        if Instant::now() > limit {
            return Err(format!("nothing struck at {}: {said}", point.name()));
        }
        sleep(Duration::from_millis(1));
    }
}

// ------------------------------------------------------------------------------------------------- a case

/// One of four processes meets with something.
struct Case {
    kind: usize,
    index: u64,
    pair: Pair,
    victim: usize,
    others: Vec<usize>,
    slot: usize,
    /// Operations in halves.
    split: bool,
    views: bool,
    rng: Rng,
}

impl Case {
    fn new(kind: usize, index: u64) -> Case {
        let mut rng = Rng::new(&[seed(), 16, kind as u64, index]);
        let pair = rng.pick(&[&PAIRS[..], &[Pair::Narrow]].concat());
        let victim = rng.below(RANKS);
        let (slot, split, views) = (rng.below(SLOTS), rng.one_in(2), rng.one_in(2));
        Case { kind, index, pair, victim, others: but(victim), slot, split, views, rng }
    }

    fn describe(&self) -> String {
        let Case { pair, victim, slot, split, views, .. } = self;
        format!("{pair:?}, victim {victim}, slot {slot}, split {split}, views {views}")
    }

    /// Seeds that follow each other take what there is in turn.
    fn turn(&self) -> usize {
        (self.index + seed().saturating_sub(1)) as usize
    }

    fn point(&self, points: &[Point]) -> Point {
        points[self.turn() % points.len()]
    }

    /// A rank that is not rank 0.
    fn peer(&self) -> usize {
        1 + self.victim % (RANKS - 1)
    }

    /// Steps without end.
    fn run(&self, seed: u64, split: bool) -> String {
        let phases =
            if split { format!("{A2A_PHASE_SEND} {A2A_PHASE_RECV}") } else { A2A_PHASE_BOTH.to_string() };
        format!("run {} {seed} {phases}", self.slot)
    }

    fn victim_is_named(&self, outcome: &Outcome) -> Done {
        named(outcome, self.victim)
    }
}

fn but(victim: usize) -> Vec<usize> {
    EVERYBODY.into_iter().filter(|rank| *rank != victim).collect()
}

/// The sentence of a rank names another, alone or among others.
fn named(outcome: &Outcome, rank: usize) -> Done {
    let lists = outcome.text.split("rank").skip(1).map(|rest| {
        let rest = rest.strip_prefix('s').unwrap_or(rest);
        rest.split([',', ' ', ':', '\''])
            .filter(|word| !word.is_empty())
            .map_while(|word| word.parse::<usize>().ok())
    });
    if lists.flatten().any(|named| named == rank) {
        Ok(())
    } else {
        Err(format!("rank {rank} is not named: {}", outcome.describe()))
    }
}

// ------------------------------------------------------------------------------------------- in the rendezvous

impl Case {
    fn tell_join(&self, group: &mut Group, id: impl Fn(usize) -> GroupId) -> Done {
        let setup = if cuda::is_enabled() { SETUP_ON_CUDA } else { SETUP };
        for rank in EVERYBODY {
            let order = join(rank, RANKS, self.pair, self.views, id(rank));
            group.tell(rank, &format!("{order} {}", setup.as_millis()))?;
        }
        Ok(())
    }

    /// How the others' a2a_create ended: without a comm, or with one whose first step is lost. `misses`: nobody but the
    /// deadline tells.
    fn told_in_create(
        &self,
        group: &mut Group,
        victim: usize,
        told: &[(usize, Outcome)],
        struck: Duration,
        misses: bool,
    ) -> Done {
        let mut formed = Vec::new();
        for (rank, outcome) in told {
            let checked = match outcome.status {
                A2A_SUCCESS => {
                    formed.push(*rank);
                    Ok(())
                }
                A2A_PEER_LOST => named(outcome, victim).and_then(|()| {
                    in_time("told of a fault in a2a_create", outcome.ended.saturating_sub(struck), PROMISE)
                }),
                A2A_TIMEOUT if misses => named(outcome, victim).and_then(|()| {
                    in_time(
                        "told that a rank is missing (1 s is the deadline)",
                        outcome.took,
                        SETUP + PROMISE,
                    )
                }),
                _ => Err(format!("unexpected: {}", outcome.describe())),
            };
            checked.map_err(|error| format!("rank {rank}: {error}"))?;
        }
        for outcome in group.all(&formed, &self.run(1, self.split))? {
            outcome.is(A2A_PEER_LOST, &["sequence 1"])?;
            // Whoever has heard of it has no comm either, and may be gone first.
            let gone = told.iter().map(|(rank, _)| *rank).filter(|rank| !formed.contains(rank));
            if !gone.chain([victim]).any(|rank| named(&outcome, rank).is_ok()) {
                named(&outcome, victim)?;
            }
            in_time("told of a fault in a2a_create by the first step", outcome.took, PROMISE)?;
        }
        Ok(())
    }

    fn killed_in_create(&self, victim: usize, point: Point, nth: usize) -> Done {
        let (mut group, before) = begin(self.pair, self.views)?;
        group.fine(&[victim], &arm(point, nth, KILL))?;
        let id = GroupId::new();
        self.tell_join(&mut group, |_| id)?;
        let others = but(victim);
        let told: Vec<(usize, Outcome)> = others.iter().copied().zip(group.answers(&others)?).collect();
        let when = struck(&group, victim, point)?;
        // Rank 0's door may close before somebody has found it.
        let early = [Point::CreateBegins, Point::CreateListening, Point::CreateSeated];
        let misses = point == Point::CreateBegins || victim == 0 && early.contains(&point);
        self.told_in_create(&mut group, victim, &told, when, misses)?;
        self.buried(&mut group, victim)?;
        leave(&mut group, &others, &before)?;
        anew(&mut group, &before, self.slot)
    }

    /// The victim died of what was armed; another process takes its place.
    fn buried(&self, group: &mut Group, victim: usize) -> Done {
        let ended = group.workers[victim].wait(Instant::now() + GRACE).ok_or("the victim lives")?;
        if ended.signal() != Some(libc::SIGKILL) {
            return Err(format!("the victim ended otherwise: {ended}"));
        }
        group.replace(victim);
        // A fresh process has as much open as the one before it.
        group.fine(&[victim], "footprint")
    }
}

fn killed_before_the_rendezvous(case: &Case) -> Done {
    case.killed_in_create(case.victim, Point::CreateBegins, 0)
}

/// The first seeds kill a rank that joins, then one kills rank 0, and so on.
fn killed_in_the_rendezvous(case: &Case) -> Done {
    let mut rng = case.rng.clone();
    if case.turn().is_multiple_of(2) {
        let point = JOINING[(case.turn() / 2) % JOINING.len()];
        return case.killed_in_create(case.peer(), point, 0);
    }
    let point = ADMITTING[(case.turn() / 2) % ADMITTING.len()];
    let of_each = matches!(point, Point::CreateSeated | Point::CreateGo);
    case.killed_in_create(0, point, if of_each { rng.below(RANKS - 1) } else { 0 })
}

// ------------------------------------------------------------------------------------------------ in a step

/// Whether a step of this pair comes past the point.
fn passes(pair: Pair, point: Point) -> bool {
    match point {
        Point::DispatchRow => !pair.streams(),
        Point::DispatchCounts => pair.counts(),
        // In the first half of a whole dispatch.
        Point::WaitCounts => pair.counts() && !pair.streams(),
        Point::DispatchGather => pair == Pair::Gather,
        Point::FifoEntry => pair.streams(),
        _ => true,
    }
}

/// The operation that the others lose, if the point alone says it.
fn lost_in(pair: Pair, point: Point) -> Option<&'static str> {
    match point {
        Point::DispatchBegins
        | Point::DispatchRow
        | Point::DispatchCounts
        | Point::WaitCounts
        | Point::DispatchBeforeFlags => Some("dispatch"),
        // Rows out of FIFOs need their rank beyond its flags.
        _ if pair.streams() => None,
        Point::DispatchAfterFlags
        | Point::WaitDispatch
        | Point::DispatchGather
        | Point::DispatchReceived
        | Point::CombineBeforeFlags => Some("combine"),
        Point::CombineAfterFlags | Point::CombineRow | Point::WaitCombine | Point::CombineReceived => {
            Some("dispatch")
        }
        // Some have the flag, some have not.
        _ => None,
    }
}

/// What the others do when they have lost a rank.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Then {
    Anew,
    Recover,
}

impl Case {
    fn struck_in_a_step(&self, points: &[Point], fault: &str) -> Done {
        self.struck_and_then(points, fault, Then::Anew)
    }

    fn recover_from(&self, fault: &str) -> Done {
        self.struck_and_then(&STEPPING, fault, Then::Recover)
    }

    fn struck_and_then(&self, points: &[Point], fault: &str, then: Then) -> Done {
        let mut rng = self.rng.clone();
        let point = self.point(points);
        let pairs: Vec<Pair> =
            [&PAIRS[..], &[Pair::Narrow]].concat().into_iter().filter(|pair| passes(*pair, point)).collect();
        let pair = if pairs.contains(&self.pair) { self.pair } else { rng.pick(&pairs) };
        let nth = match point {
            Point::DispatchRow | Point::CombineRow | Point::FifoEntry => rng.below(40),
            Point::DispatchFlag | Point::CombineFlag | Point::DispatchCounts => rng.below(2 * RANKS),
            _ => rng.below(4),
        };
        // A view of a status is known from the step before.
        let steps = 1 + rng.below(4);
        self.strike(pair, point, nth, steps, (fault, then)).map_err(|error| {
            format!("{pair:?} at {}, pass {nth}, after {steps} steps: {error}", point.name())
        })
    }

    fn strike(
        &self,
        pair: Pair,
        point: Point,
        nth: usize,
        steps: usize,
        (fault, then): (&str, Then),
    ) -> Done {
        // Only a whole dispatch waits before it publishes.
        let split = self.split && point != Point::WaitCounts;
        let (mut group, before) = begin(pair, self.views)?;
        group.join(&EVERYBODY)?;
        for step in 0..steps {
            group.step(&EVERYBODY, self.slot, step as u64)?;
        }
        group.fine(&[self.victim], &arm(point, nth, fault))?;
        group.tell_all(&EVERYBODY, &self.run(100, split))?;
        let lost = group.answers(&self.others)?;
        let when = struck(&group, self.victim, point)?;
        for (rank, outcome) in self.others.iter().zip(&lost) {
            self.check_lost(outcome, pair, point, fault, when)
                .map_err(|error| format!("rank {rank}: {error}"))?;
        }
        if then == Then::Recover {
            self.recovers(&mut group, fault)?;
        }
        leave(&mut group, &self.others, &before)?;
        if fault == KILL {
            self.buried(&mut group, self.victim)?;
        } else if then == Then::Recover {
            leave(&mut group, &[self.victim], &before)?;
        } else {
            self.goes_on(&mut group, &before)?;
        }
        anew(&mut group, &before, self.slot)
    }

    /// The others agree to go on without the victim. One that wakes up where it was stopped, in the middle of a row for
    /// instance, changes nothing of their results, and is told.
    fn recovers(&self, group: &mut Group, fault: &str) -> Done {
        let stopped = fault == STOP;
        if stopped {
            group.workers[self.victim].stands();
        }
        let outcomes = group.all(&self.others, RECOVER)?;
        recovered(&outcomes, 2, &self.others, Some(stopped))?;
        let steps = |group: &mut Group, seed: u64| {
            (0..6).try_for_each(|at| group.step(&self.others, at % SLOTS, seed + at as u64))
        };
        steps(group, 500)?;
        if !stopped {
            return Ok(());
        }
        let resumed = now();
        group.workers[self.victim].go_on();
        steps(group, 510)?;
        let outcome = group.answer(self.victim)?;
        told_late(&outcome)?;
        in_time(LATE, outcome.ended.saturating_sub(resumed), PROMISE)?;
        let [late] = &group.all(&[self.victim], RECOVER)?[..] else { unreachable!("one was asked") };
        late.is(A2A_PEER_LOST, &["recovered without this rank"])?;
        steps(group, 520)
    }

    fn check_lost(&self, outcome: &Outcome, pair: Pair, point: Point, fault: &str, when: Duration) -> Done {
        let slot = format!("slot {}, sequence ", self.slot);
        self.victim_is_named(outcome)?;
        if let Some(operation) = lost_in(pair, point) {
            outcome.is(outcome.status, &[&format!("{operation} on {slot}")])?;
        }
        if fault == KILL {
            outcome.is(A2A_PEER_LOST, &[&slot])?;
            voided(&outcome.words, &[self.victim])?;
            return in_time(DEATH, outcome.ended.saturating_sub(when), PROMISE);
        }
        outcome.is(A2A_TIMEOUT, &[&slot])?;
        // Stopped between two ranks' flags, it makes others miss each other too.
        if outcome.words.first() != Some(&A2A_STEP_VOID.into()) || outcome.words[4 + self.victim] != 1 {
            return Err(format!("out.status is {:?}: {}", outcome.words, outcome.describe()));
        }
        if outcome.took < DEADLINE && !outcome.text.contains("gave up on") {
            return Err(format!("gave up early: {}", outcome.describe()));
        }
        in_time(SILENCE, outcome.took, DEADLINE + PROMISE)
    }

    /// The others have a new comm when the victim wakes up: it is told what it missed, and disturbs nobody.
    fn goes_on(&self, group: &mut Group, before: &Before) -> Done {
        group.workers[self.victim].stands();
        group.join(&self.others)?;
        group.step(&self.others, self.slot, 400)?;
        let resumed = now();
        group.workers[self.victim].go_on();
        group.step(&self.others, self.slot, 401)?;
        let outcome = group.answer(self.victim)?;
        told_late(&outcome)?;
        in_time(LATE, outcome.ended.saturating_sub(resumed), PROMISE)?;
        group.step(&self.others, self.slot, 402)?;
        leave(group, &EVERYBODY, before)
    }
}

const RECOVER: &str = "recover 10000 200";

fn recovered(outcomes: &[Outcome], generation: i64, members: &[usize], replaced: Option<bool>) -> Done {
    let mask: i64 = members.iter().map(|rank| 1 << rank).sum();
    for outcome in outcomes {
        outcome.is(A2A_SUCCESS, &[])?;
        let words = &outcome.words;
        let kept = replaced.is_none_or(|replaced| words[3] == i64::from(replaced));
        if words[0] != generation || words[1] != mask || !kept {
            return Err(format!("a2a_recover said {words:?}, generation {generation} of {mask:#x} was due"));
        }
    }
    Ok(())
}

/// One rank is stopped; while the other three recover, windows replaced, another is killed: one that follows, or the one
/// that leads. The last two go on.
fn killed_in_a_recovery(case: &Case) -> Done {
    let points = [
        (Point::CreateSentWindow, false),
        (Point::CreateCollected, true),
        (Point::CreateReady, false),
        (Point::CreateGo, true),
    ];
    let (point, leads) = points[case.turn() % points.len()];
    let (mut group, before) = begin(case.pair, case.views)?;
    let mut others = case.others.clone();
    let second = others.remove(case.rng.clone().below(others.len()));
    group.join(&EVERYBODY)?;
    group.step(&EVERYBODY, case.slot, 1)?;
    group.workers[case.victim].stop();
    for outcome in group.all(&case.others, &dispatch(case.slot, A2A_PHASE_BOTH, 2))? {
        outcome.is(A2A_TIMEOUT, &[&format!("rank {}", case.victim)])?;
    }
    group.fine(&[second], &arm(point, 0, KILL))?;
    let (first, last) = if leads { (second, others[0]) } else { (others[0], second) };
    group.tell(first, RECOVER)?;
    // It leads by now.
    sleep(Duration::from_millis(100));
    group.tell(last, RECOVER)?;
    group.tell(others[1], RECOVER)?;
    // Who was told to go before it died finds out in its next step: the first of the two, or both.
    let early = match point {
        Point::CreateGo => &others[..1],
        Point::CreateReady => &others[..],
        _ => &[],
    };
    let outcomes = group.answers(early)?;
    recovered(&outcomes, 2, &but(case.victim), Some(true))?;
    for outcome in group.all(early, &dispatch(case.slot, A2A_PHASE_BOTH, 3))? {
        outcome.is(A2A_PEER_LOST, &[&format!("rank {second}")])?;
    }
    group.tell_all(early, RECOVER)?;
    let outcomes = group.answers(&others)?;
    let generation = if early.is_empty() { 2 } else { 3 };
    recovered(&outcomes, generation, &others, Some(point != Point::CreateReady))?;
    for outcome in &outcomes {
        in_time("a recovery in which another dies", outcome.took, Duration::from_millis(200) + PROMISE)?;
    }
    for at in 0..6 {
        group.step(&others, at % SLOTS, 600 + at as u64)?;
    }
    leave(&mut group, &others, &before)?;
    case.buried(&mut group, second)?;
    group.workers[case.victim].kill();
    group.replace(case.victim);
    group.fine(&[case.victim], "footprint")?;
    anew(&mut group, &before, case.slot)
}

fn killed_in_destroy(case: &Case) -> Done {
    let point = case.point(&[Point::DestroyBegins, Point::DestroyGone]);
    let (mut group, before) = begin(case.pair, case.views)?;
    group.join(&EVERYBODY)?;
    group.step(&EVERYBODY, case.slot, 1)?;
    group.fine(&[case.victim], &arm(point, 0, KILL))?;
    group.tell_all(&case.others, &case.run(2, case.split))?;
    group.tell(case.victim, "destroy")?;
    let lost = group.answers(&case.others)?;
    let when = struck(&group, case.victim, point)?;
    let why = if point == Point::DestroyGone { "destroyed its comm" } else { "its process ended" };
    if !lost.iter().any(|outcome| outcome.text.contains(why)) {
        return Err(format!("nobody says {why:?}: {lost:?}"));
    }
    for outcome in &lost {
        outcome.is(A2A_PEER_LOST, &[&format!("dispatch on slot {}, sequence 2", case.slot)])?;
        case.victim_is_named(outcome)?;
        voided(&outcome.words, &[case.victim])?;
        in_time(DEATH, outcome.ended.saturating_sub(when), PROMISE)?;
    }
    case.buried(&mut group, case.victim)?;
    leave(&mut group, &case.others, &before)?;
    anew(&mut group, &before, case.slot)
}

// ------------------------------------------------------------------------------------- connections that break

/// What becomes of a rank's connection to rank 0 in the middle.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Cut {
    /// Both ends are told at once.
    Reset,
    /// Neither end hears anything any more.
    Hold,
}

/// The rendezvous' messages over the first connection, in order.
const MESSAGES: [(u8, &str); 5] = [(1, "CHALLENGE"), (2, "JOIN"), (3, "WELCOME"), (4, "READY"), (5, "GO")];

/// Stands between a rank and rank 0, and passes messages on up to one.
struct Proxy {
    address: String,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<std::io::Result<Duration>>>,
}

impl Proxy {
    fn before(kind: u8, cut: Cut, root: String) -> Result<Proxy, String> {
        let listener = TcpListener::bind("127.0.0.1:0").map_err(|error| error.to_string())?;
        let address = listener.local_addr().map_err(|error| error.to_string())?.to_string();
        let stop = Arc::new(AtomicBool::new(false));
        let thread = {
            let stop = stop.clone();
            std::thread::spawn(move || pass_on(&listener, &root, kind, cut, &stop))
        };
        Ok(Proxy { address, stop, thread: Some(thread) })
    }

    /// When it cut.
    fn end(mut self) -> Result<Duration, String> {
        self.stop.store(true, Ordering::Relaxed);
        let thread = self.thread.take().expect("ends once");
        thread.join().expect("no panic in a proxy").map_err(|error| format!("the proxy: {error}"))
    }
}

fn pass_on(
    listener: &TcpListener,
    root: &str,
    kind: u8,
    cut: Cut,
    stop: &AtomicBool,
) -> std::io::Result<Duration> {
    let (peer, _) = listener.accept()?;
    let root = rendezvous::knock(root).map_err(std::io::Error::other)?;
    let mut streams = [peer, root];
    let mut heard = [Vec::new(), Vec::new()];
    for stream in &streams {
        stream.set_nonblocking(true)?;
    }
    while !stop.load(Ordering::Relaxed) {
        for from in 0..2 {
            let mut chunk = [0; 4096];
            match streams[from].read(&mut chunk) {
                Ok(count) => heard[from].extend_from_slice(&chunk[..count]),
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                Err(error) => return Err(error),
            }
            while let Some(head) = heard[from].first_chunk::<5>().copied() {
                let whole = 5 + u32::from_le_bytes([head[0], head[1], head[2], head[3]]) as usize;
                if heard[from].len() < whole {
                    break;
                }
                if head[4] == kind {
                    let when = now();
                    if cut == Cut::Reset {
                        streams.iter().try_for_each(forget)?;
                    }
                    if cut == Cut::Hold {
                        hold(&streams, stop);
                    }
                    return Ok(when);
                }
                let message: Vec<u8> = heard[from].drain(..whole).collect();
                streams[1 - from].write_all(&message)?;
            }
        }
        sleep(Duration::from_millis(1));
    }
    Err(std::io::Error::other("the message never came"))
}

/// Closed, the connection is reset.
fn forget(stream: &TcpStream) -> std::io::Result<()> {
    let linger = libc::linger { l_onoff: 1, l_linger: 0 };
    let size = size_of::<libc::linger>() as libc::socklen_t;
    // SAFETY: an open socket, and a struct of this size.
    let set = unsafe {
        libc::setsockopt(
            stream.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_LINGER,
            (&raw const linger).cast(),
            size,
        )
    };
    if set == 0 { Ok(()) } else { Err(std::io::Error::last_os_error()) }
}

/// Open, and silent.
fn hold(_: &[TcpStream; 2], stop: &AtomicBool) {
    while !stop.load(Ordering::Relaxed) {
        sleep(Duration::from_millis(1));
    }
}

impl Case {
    fn cut_off(&self, cut: Cut) -> Done {
        let (kind, name) = MESSAGES[self.turn() % MESSAGES.len()];
        self.cut_off_before(kind, cut).map_err(|error| format!("in the place of {name}: {error}"))
    }

    fn cut_off_before(&self, kind: u8, cut: Cut) -> Done {
        let victim = self.peer();
        let (mut group, before) = begin(self.pair, self.views)?;
        let root = rendezvous::free_address()?;
        let direct = rendezvous::id_of(&root, "key")?;
        let proxy = Proxy::before(kind, cut, root)?;
        let through = rendezvous::id_of(&proxy.address, "key")?;
        self.tell_join(&mut group, |rank| if rank == victim { through } else { direct })?;
        let outcomes = group.answers(&EVERYBODY)?;
        let when = proxy.end()?;
        let mut told: Vec<(usize, Outcome)> = EVERYBODY.into_iter().zip(outcomes).collect();
        let (_, own) = told.remove(victim);
        // What is reset before connect() has returned was no connection: the rank goes on looking for rank 0, in vain.
        let never_was = kind == 1 && own.is(A2A_TIMEOUT, &["rank 0 did not listen within"]).is_ok();
        match cut {
            Cut::Reset if never_was => {
                in_time(
                    "a rank whose connection never was (1 s is the deadline)",
                    own.took,
                    SETUP + PROMISE,
                )?;
            }
            Cut::Reset => {
                own.is(A2A_PEER_LOST, &["rank 0 closed the connection"])?;
                in_time("a rank whose connection is reset", own.ended.saturating_sub(when), PROMISE)?;
            }
            Cut::Hold => {
                own.is(A2A_TIMEOUT, &["the group was not complete within"])?;
                in_time("a rank that hears nothing (1 s is the deadline)", own.took, SETUP + PROMISE)?;
            }
        }
        // Whoever broke off before it had joined was nobody: the group waits for the rank.
        self.told_in_create(&mut group, victim, &told, when, cut == Cut::Hold || kind <= 2)?;
        leave(&mut group, &EVERYBODY, &before)?;
        anew(&mut group, &before, self.slot)
    }
}

// ------------------------------------------------------------------------------------------ ranks that differ

/// What `faults` asserts of ranks that are threads, in a process of its own: nothing stays there, and a new comm works.
const ALONE: (&str, Job) = ("alone", alone);

fn alone(seat: &Seat) -> Done {
    let args: Vec<usize> = seat.args.iter().map(|arg| arg.parse().expect("a number")).collect();
    let [kind, index] = args[..] else { return Err("two numbers were due".into()) };
    let before = footprint()?;
    let odd = index / 3 % RANKS;
    match (KINDS[kind].0, index % 3) {
        ("duplicate rank", _) => rendezvous::a_rank_comes_twice(index % (RANKS - 1))?,
        (_, 0) => rendezvous::another_version()?,
        (_, 1) if odd == 0 => rendezvous::rank_0_has_another_size()?,
        (_, 1) => rendezvous::another_size(1 + odd % 2)?,
        _ if index % 2 == 0 => rendezvous::configs_differ(odd, None)?,
        _ => rendezvous::configs_differ_in_an_allgather(odd)?,
    }
    let crew = crew(PAIRS[index % PAIRS.len()])?;
    all_fine("a new comm", &together(&all(&crew), |m| m.step(index % SLOTS, 900)))?;
    drop(crew);
    let limit = Instant::now() + GRACE;
    while footprint()? != before && Instant::now() < limit {
        sleep(Duration::from_millis(5));
    }
    let after = footprint()?;
    if after == before { Ok(()) } else { Err(format!("before {before:?}, after {after:?}")) }
}

fn in_a_process_of_its_own(case: &Case) -> Done {
    let args = [case.kind.to_string(), case.turn().to_string()];
    launch(ALONE, 1, &[Host::Child(vec![0])], &args, LIMIT)
}

fn another_kind_of_rank(case: &Case) -> Done {
    in_a_process_of_its_own(case)
}

fn a_duplicate(case: &Case) -> Done {
    in_a_process_of_its_own(case)
}

// ------------------------------------------------------------------------------------------- want of something

fn no_shared_memory(case: &Case) -> Done {
    let victim = case.victim;
    let (mut group, before) = begin(case.pair, case.views)?;
    // ENOSPC.
    group.fine(&[victim], &arm(Point::Fallocate, 0, 28))?;
    let id = GroupId::new();
    case.tell_join(&mut group, |_| id)?;
    let outcomes = group.answers(&EVERYBODY)?;
    let when = struck(&group, victim, Point::Fallocate)?;
    for (rank, outcome) in outcomes.iter().enumerate() {
        let status = if rank == victim { A2A_OUT_OF_MEMORY } else { A2A_PEER_LOST };
        outcome
            .is(status, &[&format!("rank {victim}: fallocate of a window of "), "No space left on device"])?;
        in_time("told of a rank without memory", outcome.ended.saturating_sub(when), PROMISE)?;
    }
    leave(&mut group, &EVERYBODY, &before)?;
    anew(&mut group, &before, case.slot)
}

/// Each point for each time that a rank comes past it, until it does not as often; each kind of shortage.
fn an_allocation_fails(case: &Case) -> Done {
    let on_cuda = cuda::is_enabled();
    let points: &[Point] = if on_cuda { &TAKING_ON_CUDA } else { &TAKING };
    let codes: &[i32] = if on_cuda { &[CUDA_OUT_OF_MEMORY] } else { &SHORTAGES };
    let (mut group, before) = begin(case.pair, case.views)?;
    if on_cuda {
        ONCE_ON_CUDA.iter().try_for_each(|point| case.first_comes_without(*point))?;
    }
    let mut fatal = 0;
    for &point in points {
        let mut nth = 0;
        while codes.iter().try_fold(true, |all, &code| {
            group.deadline = Instant::now() + ANSWERS;
            let outcome = case.comes_without(&mut group, &before, point, nth, code);
            let wants =
                outcome.map_err(|error| format!("{} {nth} fails with {code}: {error}", point.name()))?;
            fatal += usize::from(wants == Want::Fatal);
            Ok::<bool, String>(all && wants != Want::Nothing)
        })? {
            nth += 1;
        }
    }
    if fatal < points.len() { Err(format!("only {fatal} shortages ended a group")) } else { Ok(()) }
}

/// What a call that fails comes to.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Want {
    /// No call failed.
    Nothing,
    /// The group is whole all the same.
    Borne,
    /// There is no group.
    Fatal,
}

impl Case {
    /// A process whose first comm a GPU refuses can have another.
    fn first_comes_without(&self, point: Point) -> Done {
        let mut group = Group::spawn(self.pair, self.views);
        group.fine(&[self.victim], &arm(point, 0, CUDA_OUT_OF_MEMORY))?;
        group.tell_join(&EVERYBODY, RANKS, GroupId::new())?;
        for (rank, outcome) in group.answers(&EVERYBODY)?.iter().enumerate() {
            let status = if rank == self.victim { A2A_OUT_OF_MEMORY } else { A2A_PEER_LOST };
            outcome.is(status, &[&format!("rank {}: ", self.victim)])?;
        }
        group.join(&EVERYBODY)?;
        group.step(&EVERYBODY, self.slot, 1)
    }

    fn comes_without(
        &self,
        group: &mut Group,
        before: &Before,
        point: Point,
        nth: usize,
        code: i32,
    ) -> Result<Want, String> {
        let victim = self.victim;
        group.fine(&[victim], &arm(point, nth, code))?;
        let id = GroupId::new();
        self.tell_join(group, |_| id)?;
        let outcomes = group.answers(&EVERYBODY)?;
        let [disarmed] = &group.all(&[victim], "disarm")?[..] else { unreachable!("one was asked") };
        let struck_at_all = disarmed.words == [1];
        let want = if outcomes[victim].status == A2A_SUCCESS {
            all_fine("join", &outcomes)?;
            // Nothing of a step is taken from the system any more.
            let private = if cuda::is_enabled() { Point::CudaPrivate } else { Point::Private };
            group.fine(&[victim], &arm(private, 0, code))?;
            group.step(&EVERYBODY, self.slot, 1)?;
            let [disarmed] = &group.all(&[victim], "disarm")?[..] else { unreachable!("one was asked") };
            if disarmed.words != [0] {
                return Err("a step took memory".into());
            }
            if struck_at_all { Want::Borne } else { Want::Nothing }
        } else {
            let when = struck(group, victim, point)?;
            outcomes[victim].is(A2A_OUT_OF_MEMORY, &[&format!("rank {victim}")])?;
            in_time("told of its own want", outcomes[victim].ended.saturating_sub(when), PROMISE)?;
            let told: Vec<(usize, Outcome)> =
                self.others.iter().map(|&rank| (rank, outcomes[rank].clone())).collect();
            // Who cannot even connect, or hear, before it has joined tells nobody.
            let misses = matches!(point, Point::Listen | Point::Connect | Point::Poll);
            self.told_in_create(group, victim, &told, when, misses)?;
            Want::Fatal
        };
        leave(group, &EVERYBODY, before)?;
        Ok(want)
    }
}

/// A kernel is refused: the comm of that rank has failed, the others are told.
fn a_launch_fails(case: &Case) -> Done {
    let (mut group, before) = begin(case.pair, case.views)?;
    for nth in 0.. {
        group.deadline = Instant::now() + ANSWERS;
        group.join(&EVERYBODY)?;
        group.step(&EVERYBODY, case.slot, 1)?;
        group.fine(&[case.victim], &arm(Point::CudaLaunch, nth, CUDA_LAUNCH_FAILED))?;
        group.tell_all(&EVERYBODY, &dispatch(case.slot, A2A_PHASE_BOTH, 2))?;
        let mut outcomes = group.answers(&EVERYBODY)?;
        if outcomes[case.victim].status == A2A_SUCCESS {
            group.tell_all(&EVERYBODY, &combine(case.slot, A2A_PHASE_BOTH))?;
            outcomes = group.answers(&EVERYBODY)?;
        }
        group.fine(&[case.victim], "disarm")?;
        let own = &outcomes[case.victim];
        if own.status == A2A_SUCCESS {
            all_fine("a step", &outcomes)?;
            leave(&mut group, &EVERYBODY, &before)?;
            if nth < 2 {
                return Err(format!("a step of {nth} launches"));
            }
            break;
        }
        own.is(A2A_CUDA_ERROR, &[&format!("rank {}: cuLaunchKernelEx of kernel ", case.victim)])?;
        for &rank in &case.others {
            // Its flags may have come.
            if outcomes[rank].status != A2A_SUCCESS {
                outcomes[rank].is(A2A_PEER_LOST, &[])?;
                case.victim_is_named(&outcomes[rank])?;
            }
        }
        leave(&mut group, &EVERYBODY, &before)?;
    }
    anew(&mut group, &before, case.slot)
}

// ------------------------------------------------------------------------------------- ranks out of step

const OUT_OF_ORDER: &str = "is out of order: the slot ";

/// What one rank leaves out of a step.
#[derive(Clone, Copy, Debug)]
enum Skips {
    All,
    Combine,
    Dispatch,
    Send,
    Recv,
}

fn a_rank_skips(case: &Case) -> Done {
    use Skips::*;
    let skips = [All, Combine, Dispatch, Send, Recv][case.turn() % 5];
    let (mut group, before) = begin(case.pair, case.views)?;
    group.join(&EVERYBODY)?;
    group.step(&EVERYBODY, case.slot, 1)?;
    case.skip(&mut group, skips).map_err(|error| format!("{skips:?}: {error}"))?;
    leave(&mut group, &EVERYBODY, &before)?;
    anew(&mut group, &before, case.slot)
}

impl Case {
    fn skip(&self, group: &mut Group, skips: Skips) -> Done {
        let [both, send, recv] = [A2A_PHASE_BOTH, A2A_PHASE_SEND, A2A_PHASE_RECV];
        let dispatch = |phase| dispatch(self.slot, phase, 2);
        let combine = |phase| combine(self.slot, phase);
        let victim = [self.victim];
        match skips {
            Skips::All => self.missed(group, &dispatch(both), &dispatch(both)),
            Skips::Combine => {
                group.fine(&EVERYBODY, &dispatch(both))?;
                group.tell_all(&self.others, &combine(both))?;
                group.tell_all(&victim, &dispatch(both))?;
                self.at_odds(&group.answers(&EVERYBODY)?)
            }
            Skips::Dispatch => {
                let refused = &group.all(&victim, &aside(combine(both)))?[0];
                refused.is(A2A_INVALID_ARGUMENT, &["combine SEND", OUT_OF_ORDER, "is idle"])?;
                in_time("told that a call is not due", refused.took, AT_ONCE)?;
                self.missed(group, &dispatch(both), &dispatch(both))
            }
            Skips::Send => {
                let refused = &group.all(&victim, &aside(dispatch(recv)))?[0];
                refused.is(A2A_INVALID_ARGUMENT, &["dispatch RECV", OUT_OF_ORDER, "is idle"])?;
                group.step(&EVERYBODY, self.slot, 2)
            }
            Skips::Recv => {
                group.fine(&EVERYBODY, &dispatch(send))?;
                let refused = &group.all(&victim, &aside(dispatch(send)))?[0];
                refused.is(A2A_INVALID_ARGUMENT, &["dispatch SEND", OUT_OF_ORDER, "waits for its RECV"])?;
                group.fine(&EVERYBODY, &dispatch(recv))?;
                group.fine(&EVERYBODY, &combine(both))
            }
        }
    }

    /// The others wait in vain for a rank that does not call; when it does, it is told.
    fn missed(&self, group: &mut Group, order: &str, late: &str) -> Done {
        for outcome in group.all(&self.others, order)? {
            outcome.is(A2A_TIMEOUT, &[&format!("dispatch on slot {}, sequence 2", self.slot)])?;
            self.victim_is_named(&outcome)?;
            voided(&outcome.words, &[self.victim])?;
            in_time(SILENCE, outcome.took, DEADLINE + PROMISE)?;
        }
        let outcome = &group.all(&[self.victim], late)?[0];
        in_time(LATE, outcome.took, PROMISE)?;
        if outcome.status == A2A_SUCCESS {
            // All it needs had come, but nobody combines.
            let outcome = &group.all(&[self.victim], &combine(self.slot, A2A_PHASE_BOTH))?[0];
            in_time(LATE, outcome.took, PROMISE)?;
            return told_late(outcome);
        }
        told_late(outcome)
    }

    /// One dispatches while the others combine: everybody says so, or that another did.
    fn at_odds(&self, outcomes: &[Outcome]) -> Done {
        for outcome in outcomes {
            outcome.is(A2A_MISMATCH, &[&format!("slot {}, sequence 2", self.slot)])?;
            in_time("told of a disagreement", outcome.took, PROMISE)?;
        }
        let own = &outcomes[self.victim];
        let named =
            own.text.contains("gave up on") || self.others.iter().any(|&rank| named(own, rank).is_ok());
        let others = self.others.iter().try_for_each(|&rank| self.victim_is_named(&outcomes[rank]));
        if named { others } else { Err(format!("nobody is named: {}", own.describe())) }
    }
}

/// What one rank calls a second time.
#[derive(Clone, Copy, Debug)]
enum Twice {
    DispatchSend,
    DispatchRecv,
    CombineSend,
    CombineRecv,
    Dispatch,
}

fn a_rank_calls_twice(case: &Case) -> Done {
    use Twice::*;
    let of = [DispatchSend, DispatchRecv, CombineSend, CombineRecv, Dispatch];
    let twice = of[case.turn() % 5];
    let (mut group, before) = begin(case.pair, case.views)?;
    group.join(&EVERYBODY)?;
    group.step(&EVERYBODY, case.slot, 1)?;
    case.twice(&mut group, twice).map_err(|error| format!("{twice:?}: {error}"))?;
    leave(&mut group, &EVERYBODY, &before)?;
    anew(&mut group, &before, case.slot)
}

impl Case {
    fn twice(&self, group: &mut Group, twice: Twice) -> Done {
        let [both, send, recv] = [A2A_PHASE_BOTH, A2A_PHASE_SEND, A2A_PHASE_RECV];
        if let Twice::Dispatch = twice {
            group.fine(&EVERYBODY, &dispatch(self.slot, both, 2))?;
            group.tell(self.victim, &dispatch(self.slot, both, 3))?;
            group.tell_all(&self.others, &combine(self.slot, both))?;
            return self.at_odds(&group.answers(&EVERYBODY)?);
        }
        // A call that is not due changes nothing: the step is whole.
        let halves = [
            (dispatch(self.slot, send, 2), "dispatch SEND", "waits for its RECV"),
            (dispatch(self.slot, recv, 2), "dispatch RECV", "waits for combine SEND"),
            (combine(self.slot, send), "combine SEND", "waits for its RECV"),
            (combine(self.slot, recv), "combine RECV", "is idle"),
        ];
        for (at, (order, half, state)) in halves.iter().enumerate() {
            group.fine(&EVERYBODY, order)?;
            if at == twice as usize {
                let refused = &group.all(&[self.victim], &aside(order.clone()))?[0];
                let rank = format!("rank {}: ", self.victim);
                refused.is(A2A_INVALID_ARGUMENT, &[&rank, half, OUT_OF_ORDER, state])?;
                in_time("told that a call is not due", refused.took, AT_ONCE)?;
            }
        }
        group.step(&EVERYBODY, self.slot, 3)
    }
}

// ------------------------------------------------------------------------------------------------ the points

/// A point in the middle of a row is there: a peer has the first half of it, and of what is read each row counts once.
fn rows_are_half_done() -> Done {
    let crew = crew(Pair::OneSided)?;
    let ask = |seed| Ask { tokens: Some(1), goes: Goes::Everywhere, ..Ask::new(seed) };
    all_fine("dispatch", &together(&all(&crew), |m| m.dispatch(0, A2A_PHASE_BOTH, &ask(1))))?;
    all_fine("combine", &together(&all(&crew), |m| m.combine(0, A2A_PHASE_BOTH, &ask(1))))?;
    // The first thing that rank 1 stores is its first token, at rank 0.
    let sent = floats(&ask(2).input(1, RANKS, Pair::OneSided, u64::MAX).0.tokens.expect("given").read());
    fault::arm(Point::DispatchRow, 0, Action::Wait);
    let (got, outcome) = std::thread::scope(|scope| {
        let send = scope.spawn(|| crew[1].dispatch(0, A2A_PHASE_SEND, &ask(2)));
        until_a_thread_waits()?;
        let got = crew[0].slot(0).1.output.tokens.as_ref().map(|rows| floats(&rows.read_row(MAX_TOKENS)));
        fault::disarm();
        Ok::<_, String>((got.expect("dispatched before"), send.join().expect("no panic in a call")))
    })?;
    all_fine("SEND", &[outcome])?;
    let (first, second) = (0..HIDDEN / 2, HIDDEN / 2..HIDDEN);
    if got[first.clone()] != sent[first] || got[second.clone()] == sent[second] {
        return Err(format!("{sent:?} is on its way, {got:?} has come"));
    }
    all_fine("SEND", &together(&all_but(&crew, 1), |m| m.dispatch(0, A2A_PHASE_SEND, &ask(2))))?;
    all_fine("RECV", &together(&all(&crew), |m| m.dispatch(0, A2A_PHASE_RECV, &ask(2))))?;
    let pulled =
        || crew.iter().map(|m| m.comm.stats().map(|stats| stats.rows_pulled)).sum::<Result<u64, _>>();
    let before = pulled()?;
    // To count from here.
    fault::arm(Point::CombineRow, u64::MAX, Action::Wait);
    all_fine("combine", &together(&all(&crew), |m| m.combine(0, A2A_PHASE_BOTH, &ask(2))))?;
    let (passed, rows) = (fault::passed(Point::CombineRow), pulled()? - before);
    fault::disarm();
    if passed == rows && rows > 0 { Ok(()) } else { Err(format!("{rows} rows, {passed} of them half")) }
}

fn until_a_thread_waits() -> Done {
    let limit = Instant::now() + DEADLINE;
    while !fault::is_waiting() {
        if Instant::now() > limit {
            return Err("nobody came to the point".into());
        }
        sleep(Duration::from_millis(1));
    }
    Ok(())
}

/// A rank that is a thread waits at a point until it is let go, and nobody minds.
fn a_thread_waits() -> Done {
    let crew = crew(Pair::Flat)?;
    fault::arm(Point::DispatchRow, 3, Action::Wait);
    let steps = std::thread::scope(|scope| {
        let steps = scope.spawn(|| together(&all(&crew), |m| m.step(0, 1)));
        let waited = until_a_thread_waits();
        fault::disarm();
        waited.map(|()| steps.join().expect("no panic in a step"))
    });
    all_fine("a step", &steps?)?;
    match [Point::DispatchRow, Point::DispatchFlag, Point::FifoEntry].map(fault::passed) {
        [rows, 16, 0] if rows > 3 => Ok(()),
        counts => Err(format!("passed {counts:?}")),
    }
}

/// Points are a process's: by itself.
const POINTS: (&str, Job) = ("points", |_| {
    a_thread_waits()?;
    rows_are_half_done()
});

// ------------------------------------------------------------------------------------------------------ main

fn main() -> std::process::ExitCode {
    worker(&[(OBEY.0, obey_armed), ALONE, POINTS]);
    if let Err(error) = choose_device_of_environment() {
        eprintln!("{error}");
        return std::process::ExitCode::FAILURE;
    }
    let mut args = Arguments::from_args();
    // Cases wait more than they work; but processes on a GPU take turns, and a comm there takes most of a second to make.
    let (threads, limit) = if cuda::is_enabled() { (1, Duration::from_secs(400)) } else { (4, LIMIT) };
    args.test_threads.get_or_insert(threads);
    let seeds =
        std::env::var("A2A_INCIDENTS").map_or(5, |text| text.parse().expect("A2A_INCIDENTS is a number"));
    let mut trials = Vec::new();
    for (kind, (name, run)) in KINDS.into_iter().chain(RECOVERIES).enumerate() {
        if let Some(why) = why_not(name) {
            println!("{name}: not run, {why}");
            continue;
        }
        for index in 0..seeds {
            let case = Case::new(kind, index);
            let run: Run =
                Box::new(move || run(&case).map_err(|error| format!("{}: {error}", case.describe())));
            let trial = Trial::test(format!("{}/{index}", name.replace(' ', "_")), move || {
                limited(run, limit).map_err(Into::into)
            });
            trials.push(trial);
        }
    }
    if !cuda::is_enabled() {
        let run: Run = Box::new(|| launch(POINTS, 1, &[Host::Child(vec![0])], &[], LIMIT));
        trials
            .push(Trial::test("points_are_where_they_say", move || limited(run, limit).map_err(Into::into)));
    }
    let conclusion = libtest_mimic::run(&args, trials);
    print_times();
    conclusion.exit_code()
}

fn why_not(kind: &str) -> Option<&'static str> {
    match (cuda::is_enabled(), kind) {
        (false, "n-th launch fails") => {
            Some("there are no launches on CPU memory (A2A_TEST_DEVICE=cuda has them)")
        }
        (true, kind) if !ON_CUDA.contains(&kind) => Some("its points stand in code of CPU memory"),
        _ => None,
    }
}
