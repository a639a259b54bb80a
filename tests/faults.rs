//! Ranks that die, stop, abort, leave or disagree: everybody else gets a status and a sentence in time, the group's
//! processes go on in a new comm, and nothing stays behind.
//!
//! Where a rank must be killed or stopped, every rank is a process that obeys orders, one line each, and this process
//! takes it to the point where the fault strikes. Elsewhere ranks are threads. What is measured is printed at the
//! end: the promises are 1 s after a death and the deadline plus 1 s after a silence, and asserts add `GRACE` for
//! machines with fewer cores than ranks. A2A_TEST_SEED gives other ranks, tokens and moments.

use std::thread::{scope, sleep};
use std::time::{Duration, Instant};

use a2a::abi::types::*;
use libtest_mimic::{Arguments, Trial};
use serde_json::{Value, json};

#[allow(dead_code, reason = "each test binary uses a part")]
mod common;
#[path = "faults/group.rs"]
#[allow(dead_code, reason = "each test binary uses a part")]
mod group;
#[path = "faults/recovery.rs"]
mod recovery;
#[path = "faults/rendezvous.rs"]
mod rendezvous;

use common::*;
use group::*;
use recovery::again_and_again;
use rendezvous::*;

// ----------------------------------------------------------------------------------- killed and stopped

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
    Kill,
    Stop,
}

impl Fault {
    fn strike(self, group: &mut Group, victim: usize) {
        match self {
            Fault::Kill => group.workers[victim].kill(),
            Fault::Stop => group.workers[victim].stop(),
        }
    }
}

/// How far the victim has come in its last step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Point {
    BeforeSend,
    /// In a whole dispatch: its counts are out, its rows must wait for the others' counts.
    Counted,
    /// Its rows are out, it waits for the others'.
    Dispatching,
    /// It computes.
    Dispatched,
    /// Its results are out, it waits for the others'.
    Combining,
    /// In a2a_destroy, or close to it.
    Leaving,
}

const POINTS: [Point; 6] = [
    Point::BeforeSend,
    Point::Counted,
    Point::Dispatching,
    Point::Dispatched,
    Point::Combining,
    Point::Leaving,
];

/// One process of four is killed or stopped.
struct Incident {
    fault: Fault,
    pair: Pair,
    point: Point,
    victim: usize,
    others: Vec<usize>,
    slot: usize,
    /// Steps opened on the slot when the survivors lose one.
    sequence: u64,
    /// Whether a call that needs nothing more from the victim comes before the fault or after it.
    late: bool,
}

fn at_a_point(fault: Fault, pair: Pair, point: Point, index: u64) -> Result<(), String> {
    let mut rng = Rng::new(&[seed(), 1, fault as u64, pair as u64, point as u64, index]);
    let victim = rng.below(RANKS);
    let others: Vec<usize> = EVERYBODY.into_iter().filter(|rank| *rank != victim).collect();
    // The epochs of a slot wrap after three steps. A view of a status is known from the step before.
    let (before, views) = (1 + rng.below(4) as u64, rng.one_in(2));
    let (slot, late) = (rng.below(SLOTS), index % 2 == 1);
    // Rows that move in RECV need their rank as long as they have not moved.
    let waits = match point {
        Point::Counted => true,
        Point::Dispatching | Point::Combining => late,
        _ => false,
    };
    let half_sent = pair.streams() && waits;
    let pair = if half_sent { Pair::Narrow } else { pair };
    let finished = u64::from(matches!(point, Point::Combining | Point::Leaving) && !half_sent);
    let sequence = before + 1 + finished;
    let incident = Incident { fault, pair, point, victim, others, slot, sequence, late };

    let mut group = Group::spawn(pair, views);
    group.join(&EVERYBODY)?;
    for step in 0..before {
        group.step(&EVERYBODY, slot, step)?;
    }
    incident.lose(&mut group).map_err(|error| {
        format!("victim {victim}, slot {slot}, {before} steps before, views {views}, late {late}: {error}")
    })
}

impl Incident {
    fn lose(&self, group: &mut Group) -> Result<(), String> {
        let operation = self.approach(group)?;
        let sent = self.half_sent() && self.point != Point::Counted;
        let phase = if sent { A2A_PHASE_RECV } else { A2A_PHASE_BOTH };
        let order = match operation {
            "dispatch" => dispatch(self.slot, phase, 100),
            _ => combine(self.slot, phase),
        };
        // Already down when others completed what needed nothing more from it.
        let down = self.late && matches!(self.point, Point::Dispatching | Point::Combining)
            || self.point == Point::Counted;
        let told = now();
        group.tell_all(&self.others, &order)?;
        if !down {
            // They wait by now; if not, they will soon and the outcome is the same.
            sleep(Duration::from_millis(50));
            self.fault.strike(group, self.victim);
        }
        let struck = if down { told } else { now() };
        let lost = group.answers(&self.others)?;
        self.check_lost(&lost, operation, told, struck)?;
        self.check_afterwards(group, &lost, operation)?;

        // The survivors go on, and what a late rank still stores lands nowhere near.
        for outcome in group.all(&self.others, "destroy")? {
            outcome.is(A2A_SUCCESS, &[])?;
            in_time("destroy after a loss", outcome.took, PROMISE)?;
        }
        let survivors = self.others.clone();
        group.join(&survivors)?;
        group.step(&survivors, 0, 200)?;
        if self.fault == Fault::Stop {
            self.resume(group)?;
            // A comm that a process has already is destroyed when it has joined the next.
            group.join(&EVERYBODY)?;
            group.step(&EVERYBODY, 1, 300)?;
        }
        Ok(())
    }

    /// Takes everybody to the point; returns the operation in which the survivors then miss the victim. On the way
    /// all must go well: until the point, the victim's flags have come.
    fn approach(&self, group: &mut Group) -> Result<&'static str, String> {
        let (slot, victim, seed) = (self.slot, [self.victim], 90);
        let [send, recv] = [A2A_PHASE_SEND, A2A_PHASE_RECV].map(|phase| dispatch(slot, phase, seed));
        let [combine_send, combine_recv] = [A2A_PHASE_SEND, A2A_PHASE_RECV].map(|phase| combine(slot, phase));
        if self.point == Point::BeforeSend {
            return Ok("dispatch");
        }
        if self.point == Point::Counted {
            group.tell(self.victim, &dispatch(slot, A2A_PHASE_BOTH, seed))?;
            // Its counts are out by now; if not, the outcome is the same.
            sleep(Duration::from_millis(50));
            self.fault.strike(group, self.victim);
            return Ok("dispatch");
        }
        if self.half_sent() {
            return self.send_half(group);
        }
        group.fine(&victim, &send)?;
        if self.point == Point::Dispatching {
            group.tell(self.victim, &recv)?;
            if self.late {
                self.fault.strike(group, self.victim);
            }
            group.fine(&self.others, &send)?;
            group.fine(&self.others, &recv)?;
            return Ok("combine");
        }
        group.fine(&self.others, &send)?;
        group.fine(&EVERYBODY, &recv)?;
        if self.point == Point::Dispatched {
            return Ok("combine");
        }
        group.fine(&victim, &combine_send)?;
        if self.point == Point::Combining {
            group.tell(self.victim, &combine_recv)?;
            if self.late {
                self.fault.strike(group, self.victim);
            }
            group.fine(&self.others, &combine(slot, A2A_PHASE_BOTH))?;
            return Ok("dispatch");
        }
        group.fine(&self.others, &combine_send)?;
        group.fine(&EVERYBODY, &combine_recv)?;
        group.tell(self.victim, "destroy")?;
        Ok("dispatch")
    }

    fn half_sent(&self) -> bool {
        self.pair == Pair::Narrow
    }

    /// `approach` for rows that move in RECV: the victim's fill the FIFOs of ranks that take none yet.
    fn send_half(&self, group: &mut Group) -> Result<&'static str, String> {
        let slot = self.slot;
        group.fine(&EVERYBODY, &dispatch(slot, A2A_PHASE_SEND, 90))?;
        let (recv, operation) = if self.point == Point::Dispatching {
            (dispatch(slot, A2A_PHASE_RECV, 90), "dispatch")
        } else {
            group.fine(&EVERYBODY, &dispatch(slot, A2A_PHASE_RECV, 90))?;
            group.fine(&EVERYBODY, &combine(slot, A2A_PHASE_SEND))?;
            (combine(slot, A2A_PHASE_RECV), "combine")
        };
        group.tell(self.victim, &recv)?;
        // They are full by now; if not, the outcome is the same.
        sleep(Duration::from_millis(50));
        self.fault.strike(group, self.victim);
        Ok(operation)
    }

    /// What a survivor may be told: a victim stopped in a2a_destroy may have said goodbye before.
    fn statuses(&self) -> &'static [a2a_status_t] {
        match (self.fault, self.point) {
            (Fault::Kill, _) => &[A2A_PEER_LOST],
            (Fault::Stop, Point::Leaving) => &[A2A_PEER_LOST, A2A_TIMEOUT],
            (Fault::Stop, _) => &[A2A_TIMEOUT],
        }
    }

    fn check_lost(
        &self,
        lost: &[Outcome],
        operation: &str,
        told: Duration,
        struck: Duration,
    ) -> Result<(), String> {
        let (slot, sequence) = (format!("slot {}", self.slot), format!("sequence {}", self.sequence));
        let rank = format!("rank {}", self.victim);
        for outcome in lost {
            if !self.statuses().contains(&outcome.status) {
                return Err(format!("expected one of {:?}, got {}", self.statuses(), outcome.describe()));
            }
            outcome.is(outcome.status, &[operation, &slot, &sequence, &rank])?;
            self.check_status(&outcome.words).map_err(|error| format!("{error}, {}", outcome.describe()))?;
            if outcome.status == A2A_PEER_LOST {
                in_time(DEATH, outcome.ended.saturating_sub(struck), PROMISE)?;
            } else {
                let took = outcome.ended - told;
                in_time(SILENCE, took, DEADLINE + PROMISE)?;
                if took < DEADLINE {
                    return Err(format!("gave up after {took:?}: {}", outcome.describe()));
                }
            }
        }
        Ok(())
    }

    /// out.status of a step that the victim voided.
    fn check_status(&self, words: &[i64]) -> Result<(), String> {
        voided(words, &[self.victim])
    }

    /// The record agrees, the slot is closed, another slot is no trap.
    fn check_afterwards(&self, group: &mut Group, lost: &[Outcome], operation: &str) -> Result<(), String> {
        self.check_records(group, lost, operation)?;
        let again = group.all(&self.others, &dispatch(self.slot, A2A_PHASE_BOTH, 101))?;
        for (again, lost) in again.iter().zip(lost) {
            if (again.status, again.sentence()) != (lost.status, lost.sentence()) || again.took > AT_ONCE {
                return Err(format!(
                    "a closed slot said first {}, then {}",
                    lost.describe(),
                    again.describe()
                ));
            }
            self.check_status(&again.words).map_err(|error| format!("the slot closed: {error}"))?;
        }
        if self.fault == Fault::Kill {
            let (other, rank) = (SLOTS - 1 - self.slot, format!("rank {}", self.victim));
            for outcome in group.all(&self.others, &dispatch(other, A2A_PHASE_BOTH, 102))? {
                let slot = format!("dispatch on slot {other}, sequence 1");
                outcome.is(A2A_PEER_LOST, &[&slot, &rank])?;
                in_time("told of a death on another slot", outcome.took, PROMISE)?;
            }
        }
        // It stays the first.
        self.check_records(group, lost, operation)
    }

    fn check_records(&self, group: &mut Group, lost: &[Outcome], operation: &str) -> Result<(), String> {
        let records = group.all(&self.others, "record")?;
        for ((rank, record), lost) in self.others.iter().zip(records).zip(lost) {
            let operation = if operation == "dispatch" { 1 } else { 2 };
            let (slot, sequence) = (self.slot as i64, self.sequence as i64);
            let expected =
                vec![operation, slot, *rank as i64, self.victim as i64, sequence, 1 << self.victim];
            if (record.status, &record.text[..], &record.words) != (lost.status, lost.sentence(), &expected) {
                let (got, want) = (&record.words, lost.describe());
                return Err(format!(
                    "a2a_get_async_error of rank {rank}: {got:?} {}, expected {expected:?} {want}",
                    record.describe()
                ));
            }
        }
        Ok(())
    }

    /// The victim wakes up and goes on as if nothing had happened, while the others are busy in their new comm.
    fn resume(&self, group: &mut Group) -> Result<(), String> {
        let others = self.others.clone();
        let resumed = now();
        group.workers[self.victim].go_on();
        // The rest of its step, for which it may have all it needs, and the next one.
        let step = [dispatch(self.slot, A2A_PHASE_BOTH, 100), combine(self.slot, A2A_PHASE_BOTH)];
        let rest = matches!(self.point, Point::Counted | Point::Dispatching | Point::Dispatched) as usize;
        let calls = step[rest..].iter().chain(&step);
        if !matches!(self.point, Point::BeforeSend | Point::Dispatched) {
            // What it was at when it was stopped: everything that call needs had come, unless rows wait for more than
            // flags.
            let outcome = group.answer(self.victim)?;
            if outcome.status != A2A_SUCCESS && (self.point == Point::Counted || self.half_sent()) {
                in_time(LATE, outcome.ended.saturating_sub(resumed), PROMISE)?;
                return told_late(&outcome);
            }
            all_fine("the call that was stopped", &[outcome])?;
        }
        if self.point == Point::Leaving {
            return group.step(&others, 0, 201);
        }
        for (at, call) in calls.enumerate() {
            let begun = now();
            group.tell(self.victim, call)?;
            group.step(&others, at % SLOTS, 201 + at as u64)?;
            let outcome = group.answer(self.victim)?;
            in_time(LATE, outcome.ended - begun, PROMISE)?;
            if outcome.status != A2A_SUCCESS {
                return told_late(&outcome);
            }
        }
        Err("the late rank was never told that the others gave up".into())
    }
}

/// A rank is killed or stopped at no particular moment of its steps.
fn at_any_time(fault: Fault, pair: Pair, index: u64) -> Result<(), String> {
    let mut rng = Rng::new(&[seed(), 2, fault as u64, pair as u64, index]);
    let victim = rng.below(RANKS);
    let others: Vec<usize> = EVERYBODY.into_iter().filter(|rank| *rank != victim).collect();
    let mut group = Group::spawn(pair, false);
    group.join(&EVERYBODY)?;
    group.tell_all(&EVERYBODY, "run 0 1000")?;
    sleep(Duration::from_micros(rng.below(60_000) as u64));
    fault.strike(&mut group, victim);
    let struck = now();
    for outcome in group.answers(&others)? {
        let took = outcome.ended.saturating_sub(struck);
        if fault == Fault::Kill {
            outcome.is(A2A_PEER_LOST, &["slot 0, sequence", &format!("rank {victim}")])?;
            voided(&outcome.words, &[victim])?;
            in_time(DEATH, took, PROMISE)?;
        } else {
            // Stopped between its flag for one rank and for the next, it makes others miss each other too.
            outcome.is(A2A_TIMEOUT, &["slot 0, sequence"])?;
            in_time(SILENCE, took, DEADLINE + PROMISE)?;
        }
    }
    group.fine(&others, "destroy")?;
    group.join(&others)?;
    group.step(&others, 1, 5)?;
    if fault == Fault::Stop {
        let resumed = now();
        group.workers[victim].go_on();
        group.step(&others, 0, 6)?;
        let outcome = group.answer(victim)?;
        told_late(&outcome)?;
        in_time(LATE, outcome.ended.saturating_sub(resumed), PROMISE)?;
        group.step(&others, 1, 7)?;
    }
    Ok(())
}

/// A loss on slot 0 takes nothing from slot 1: what was received there can be read, and what all had sent arrives.
fn the_other_slot_keeps_its_data(pair: Pair) -> Result<(), String> {
    let mut group = Group::spawn(pair, false);
    let (victim, others) = (2, [0, 1, 3]);
    group.join(&EVERYBODY)?;
    group.fine(&EVERYBODY, &dispatch(1, A2A_PHASE_BOTH, 7))?;
    // Results that stream are out once their rank's RECV has returned, for which the others' must be on offer.
    let last = if pair.streams() { A2A_PHASE_RECV } else { A2A_PHASE_BOTH };
    let senders = if pair.streams() { &EVERYBODY[..] } else { &[victim] };
    group.fine(senders, &combine(1, A2A_PHASE_SEND))?;
    group.tell_all(&others, &dispatch(0, A2A_PHASE_BOTH, 8))?;
    if pair.streams() {
        group.fine(&[victim], &combine(1, A2A_PHASE_RECV))?;
    }
    group.workers[victim].kill();
    for outcome in group.answers(&others)? {
        outcome.is(A2A_PEER_LOST, &["dispatch on slot 0, sequence 1", "rank 2"])?;
    }
    // Reads the rows received before, and the dead rank's results.
    group.fine(&others, &combine(1, last))
}

/// A rank is stopped for less than the deadline: nobody gives up. Only its death ends the others' steps.
fn a_pause(pair: Pair) -> Result<(), String> {
    let mut rng = Rng::new(&[seed(), 4, pair as u64]);
    let mut group = Group::spawn(pair, false);
    group.join(&EVERYBODY)?;
    let victim = rng.below(RANKS);
    group.tell_all(&EVERYBODY, "run 0 1000")?;
    sleep(Duration::from_micros(rng.below(60_000) as u64));
    group.workers[victim].stop();
    sleep(DEADLINE / 5);
    group.workers[victim].go_on();
    sleep(Duration::from_millis(50));
    group.workers[victim].kill();
    let struck = now();
    for rank in EVERYBODY.into_iter().filter(|rank| *rank != victim) {
        let outcome = group.answer(rank)?;
        outcome.is(A2A_PEER_LOST, &[&format!("rank {victim}")])?;
        in_time(DEATH, outcome.ended.saturating_sub(struck), PROMISE)?;
    }
    Ok(())
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Operation {
    Dispatch,
    Combine,
}

const OPERATIONS: [Operation; 2] = [Operation::Dispatch, Operation::Combine];

impl Operation {
    fn run(self, member: &Member, phase: a2a_phase_t, seed: u64) -> Outcome {
        match self {
            Operation::Dispatch => member.dispatch(0, phase, &member.ask(seed)),
            Operation::Combine => member.combine(0, phase, &member.ask(seed)),
        }
    }
    fn name(self) -> &'static str {
        if self == Operation::Dispatch { "dispatch" } else { "combine" }
    }
    fn next(self) -> Operation {
        if self == Operation::Dispatch { Operation::Combine } else { Operation::Dispatch }
    }
}

/// Rank 1 waits in an operation when another thread ends its comm, by abort or by destroy.
fn ended_while_it_waits(pair: Pair, operation: Operation, destroy: bool) -> Result<(), String> {
    let crew = crew(pair)?;
    let (victim, peers) = (&crew[1], all_but(&crew, 1));
    let everywhere = Ask { tokens: Some(TOKENS), goes: Goes::Everywhere, ..Ask::new(1) };
    if operation == Operation::Combine {
        all_fine("dispatch", &together(&all(&crew), |m| m.dispatch(0, A2A_PHASE_BOTH, &everywhere)))?;
    }
    let hops = victim.hops()?;
    let (begun, ending, waiting) = scope(|scope| {
        let call = scope.spawn(|| match operation {
            Operation::Dispatch => victim.dispatch(0, A2A_PHASE_BOTH, &everywhere),
            Operation::Combine => victim.combine(0, A2A_PHASE_BOTH, &everywhere),
        });
        victim.until_waiting(hops)?;
        let begun = now();
        let ending = if destroy { victim.destroy() } else { Outcome::of(|| victim.comm.abort()) };
        Ok::<_, String>((begun, ending, call.join().expect("no panic in a call")))
    })?;
    ending.is(A2A_SUCCESS, &[])?;
    waiting.is(A2A_ABORTED, &["rank 1", operation.name(), "slot 0, sequence 1"])?;
    in_time("a waiting call ends with its comm", waiting.ended.saturating_sub(begun), PROMISE)?;
    if destroy {
        in_time("destroy beside a waiting call", ending.took, PROMISE)?;
        let stale = victim.dispatch(0, A2A_PHASE_BOTH, &Ask::new(2));
        stale.is(A2A_INVALID_ARGUMENT, &["is not a live a2a_comm_t"])?;
    } else {
        only_three_calls_remain(victim)?;
    }

    let why = if destroy { "destroyed" } else { "aborted" };
    if pair.counts() && operation == Operation::Dispatch {
        // It has told its counts, its rows waited for the others'.
        return peers_lose(&peers, operation, why);
    }
    // Its flag of this operation had come: the peers miss it in the next one.
    all_fine(operation.name(), &together(&peers, |m| operation.run(m, A2A_PHASE_BOTH, 1)))?;
    peers_lose(&peers, operation.next(), why)
}

/// Rank 1 is missed: everybody is told, somebody of the reason.
fn peers_lose(peers: &[&Member], operation: Operation, why: &str) -> Result<(), String> {
    let lost = together(peers, |m| operation.run(m, A2A_PHASE_BOTH, 2));
    told_of_rank_1(&lost, operation, why)?;
    for outcome in &lost {
        in_time("told of a rank that left", outcome.took, PROMISE)?;
    }
    Ok(())
}

fn told_of_rank_1(lost: &[Outcome], operation: Operation, why: &str) -> Result<(), String> {
    for outcome in lost {
        outcome.is(A2A_PEER_LOST, &[operation.name(), "slot 0, sequence", "rank 1"])?;
    }
    if lost.iter().any(|outcome| outcome.text.contains(why)) {
        Ok(())
    } else {
        Err(format!("nobody says {why:?}"))
    }
}

fn only_three_calls_remain(member: &Member) -> Result<(), String> {
    let routing = &member.slots[1].0;
    let calls = [
        member.dispatch(0, A2A_PHASE_BOTH, &Ask::new(3)),
        Outcome::of(|| member.comm.combine(routing, A2A_PHASE_RECV, 0, None, &mut sums())),
        Outcome::of(|| member.comm.routing(0).map(drop)),
        Outcome::of(|| member.comm.combine_buffer(routing, F32).map(drop)),
    ];
    for call in calls {
        call.is(A2A_ABORTED, &["rank 1", "a2a_abort"])?;
    }
    member.record().is(A2A_ABORTED, &["rank 1", "a2a_abort"])?;
    Outcome::of(|| member.comm.abort()).is(A2A_SUCCESS, &[])
}

fn sums() -> CombineOut {
    CombineOut { tokens: Some(Tensor::new(F32, &[TOKENS, HIDDEN])), ..Default::default() }
}

/// Rank 1 is between two calls when another thread ends its comm; the peers wait for it.
fn ended_while_peers_wait(pair: Pair, operation: Operation, destroy: bool) -> Result<(), String> {
    let crew = crew(pair)?;
    let (victim, peers) = (&crew[1], all_but(&crew, 1));
    if operation == Operation::Combine {
        all_fine("dispatch", &together(&all(&crew), |m| m.dispatch(0, A2A_PHASE_BOTH, &Ask::new(1))))?;
    }
    let hops = peers.iter().map(|peer| peer.hops()).collect::<Result<Vec<_>, _>>()?;
    let (struck, lost) = scope(|scope| {
        let calls: Vec<_> =
            peers.iter().map(|peer| scope.spawn(|| operation.run(peer, A2A_PHASE_BOTH, 1))).collect();
        peers.iter().zip(hops).try_for_each(|(peer, hops)| peer.until_waiting(hops))?;
        let ending = if destroy { victim.destroy() } else { Outcome::of(|| victim.comm.abort()) };
        let struck = now();
        ending.is(A2A_SUCCESS, &[])?;
        let lost: Vec<_> = calls.into_iter().map(|call| call.join().expect("no panic in a call")).collect();
        Ok::<_, String>((struck, lost))
    })?;
    told_of_rank_1(&lost, operation, if destroy { "destroyed" } else { "aborted" })?;
    for outcome in &lost {
        in_time("told of a rank that left", outcome.ended.saturating_sub(struck), PROMISE)?;
    }
    Ok(())
}

/// Rank 1 leaves before anybody needs it.
fn gone_before_it_is_needed(pair: Pair, operation: Operation, destroy: bool) -> Result<(), String> {
    let crew = crew(pair)?;
    if operation == Operation::Combine {
        all_fine("dispatch", &together(&all(&crew), |m| m.dispatch(0, A2A_PHASE_BOTH, &Ask::new(1))))?;
    }
    let ending = if destroy { crew[1].destroy() } else { Outcome::of(|| crew[1].comm.abort()) };
    ending.is(A2A_SUCCESS, &[])?;
    peers_lose(&all_but(&crew, 1), operation, if destroy { "destroyed" } else { "aborted" })
}

/// The last operations of a member, oldest first.
fn operations(member: &Member) -> Result<Vec<Value>, String> {
    let history = member.history()?;
    let (rank, world) = (&history["rank"], &history["num_ranks"]);
    if (rank, world) != (&json!(member.rank), &json!(member.world)) {
        return Err(format!("the history of rank {} of {}: {history}", member.rank, member.world));
    }
    Ok(history["operations"].as_array().ok_or("no list of operations")?.clone())
}

/// Fields of an operation are as said.
fn operation_is(operation: &Value, fields: Value) -> Result<(), String> {
    let fields = fields.as_object().expect("fields");
    match fields.iter().find(|(name, value)| operation[name.as_str()] != **value) {
        Some((name, value)) => Err(format!("{name} is not {value} in {operation}")),
        None => Ok(()),
    }
}

fn took(operation: &Value) -> Duration {
    Duration::from_micros(operation["took_us"].as_u64().expect("a number"))
}

/// Rank 1 never calls. Another thread sees where rank 0 hangs, and afterwards how it ended.
fn a_hang_is_on_record(pair: Pair) -> Result<(), String> {
    let crew = members(&seats(2, GroupId::new()), pair)?;
    let member = &crew[0];
    let ask = Ask { tokens: Some(TOKENS), ..Ask::new(1) };
    let asked = json!({
        "number": 1, "operation": "dispatch", "half": "BOTH", "slot": 0, "sequence": 1, "routing": 1, "tokens": TOKENS,
    });
    let hops = member.hops()?;
    let lost = scope(|scope| {
        let call = scope.spawn(|| member.dispatch(0, A2A_PHASE_BOTH, &ask));
        member.until_waiting(hops)?;
        let mut before = Duration::ZERO;
        for _ in 0..2 {
            let begun = Instant::now();
            let told = operations(member)?;
            in_time("a history is read beside a call that hangs", begun.elapsed(), Duration::ZERO)?;
            let [operation] = &told[..] else { return Err(format!("one operation and not {told:?}")) };
            operation_is(operation, asked.clone())?;
            operation_is(operation, json!({ "outcome": "in flight" }))?;
            if took(operation) <= before {
                return Err(format!("{operation} took {before:?} before"));
            }
            before = took(operation);
            sleep(Duration::from_millis(50));
        }
        Ok::<_, String>(call.join().expect("no panic in a call"))
    })?;
    lost.is(A2A_TIMEOUT, &["dispatch on slot 0, sequence 1", "rank 1"])?;

    let history = member.history()?;
    let operation = &history["operations"][0];
    operation_is(operation, asked)?;
    operation_is(operation, json!({ "outcome": "A2A_TIMEOUT" }))?;
    if !(DEADLINE..=lost.took).contains(&took(operation)) {
        return Err(format!("{operation}, and the call took {:?}", lost.took));
    }
    if history["async_error"] != json!(lost.sentence()) {
        return Err(format!("{}: {}", lost.describe(), history["async_error"]));
    }
    let text = message(&member.comm.async_error()?);
    let brief = format!("{LAST}#1 dispatch BOTH slot 0 timeout after {} ms", took(operation).as_millis());
    if text != format!("{}{brief}", lost.sentence()) {
        return Err(format!("a2a_get_async_error says {text:?}"));
    }

    // After an abort too; what is refused since then is not told.
    member.comm.abort()?;
    member.dispatch(1, A2A_PHASE_BOTH, &Ask::new(1)).is(A2A_ABORTED, &[])?;
    match operations(member)?.len() {
        1 => Ok(()),
        count => Err(format!("{count} operations after an abort")),
    }
}

/// A rank that destroyed its comm is gone. Nobody says that it is dead before its process has ended.
fn who_is_gone_and_who_is_dead() -> Result<(), String> {
    let mut group = Group::spawn(Pair::OneSided, false);
    group.join(&EVERYBODY)?;
    group.step(&EVERYBODY, 0, 1)?;
    await_watch(&mut group, &[0, 1, 2, 3], "gone [] dead []")?;
    group.fine(&[2], "destroy")?;
    await_watch(&mut group, &[0, 1, 3], "gone [2] dead []")?;
    sleep(Duration::from_millis(100));
    await_watch(&mut group, &[0, 1, 3], "gone [2] dead []")?;
    group.workers[1].kill();
    await_watch(&mut group, &[0, 3], "gone [1,2] dead [1]")?;
    group.workers[2].kill();
    await_watch(&mut group, &[0, 3], "gone [1,2] dead [1,2]")
}

/// A process may have fewer descriptors than its comm watches, from now on: poll refuses them. The comm says so, and goes on
/// to what it can know without.
fn a_watch_that_is_refused() -> Result<(), String> {
    let mut group = Group::spawn(Pair::OneSided, false);
    group.join(&EVERYBODY)?;
    group.fine(&[0], "limit 4")?;
    group.step(&EVERYBODY, 0, 1)?;
    group.fine(&[2], "destroy")?;
    await_watch(&mut group, &[0, 1, 3], "gone [2] dead []")?;
    let begun = now();
    let refused = |outcome: &Outcome| {
        let sentence =
            "rank 0: the watchdog cannot poll 6 descriptors, a rank that dies is noticed at the deadline";
        outcome.is(A2A_SYSTEM_ERROR, &[sentence, "Invalid argument"])
    };
    while let Err(error) = refused(&group.all(&[0], "record")?[0]) {
        if now() - begun > PROMISE + GRACE {
            return Err(error);
        }
    }
    // Nobody tells rank 0 of this any more.
    group.workers[3].kill();
    await_watch(&mut group, &[1], "gone [2,3] dead [3]")?;
    await_watch(&mut group, &[0], "gone [2] dead []")?;
    // What is graver is what the record says.
    let lost = group.all(&[0], &dispatch(0, A2A_PHASE_BOTH, 2))?;
    lost[0].is(A2A_PEER_LOST, &["rank 2"])?;
    group.all(&[0], "record")?[0].is(A2A_PEER_LOST, &["rank 2"])
}

/// Returns once all of these say so.
fn await_watch(group: &mut Group, processes: &[usize], say: &str) -> Result<(), String> {
    let begun = now();
    loop {
        let answers = group.all(processes, "watch")?;
        all_fine("watch", &answers)?;
        if answers.iter().all(|answer| answer.text == say) {
            return in_time("known of a rank that left or died", now() - begun, PROMISE);
        }
        if now() - begun > PROMISE + GRACE {
            return Err(format!("not {say:?} but {:?}", answers[0].text));
        }
    }
}

/// 300 steps of three calls each: the last 256 calls are told, each as it was.
fn the_last_operations_are_told(pair: Pair) -> Result<(), String> {
    const STEPS: u64 = 300;
    let crew = members(&seats(2, GroupId::new()), pair)?;
    let done = together(&all(&crew), |member| {
        for step in 0..STEPS {
            let ask = member.ask(step);
            let calls = [
                member.dispatch(1, A2A_PHASE_SEND, &ask),
                member.dispatch(1, A2A_PHASE_RECV, &ask),
                member.combine(1, A2A_PHASE_BOTH, &ask),
            ];
            all_fine(&format!("step {step}"), &calls)?;
        }
        let told = operations(member)?;
        if told.len() != 256 {
            return Err(format!("{} operations", told.len()));
        }
        let mut begun = 0;
        for (number, operation) in (3 * STEPS - 255..=3 * STEPS).zip(&told) {
            let (name, half) =
                [("dispatch", "SEND"), ("dispatch", "RECV"), ("combine", "BOTH")][(number - 1) as usize % 3];
            let tokens =
                member.ask((number - 1) / 3).input(member.rank, member.world, pair, u64::MAX).0.tokens;
            operation_is(
                operation,
                json!({
                    "number": number, "operation": name, "half": half, "slot": 1, "sequence": number.div_ceil(3),
                    "routing": 2, "tokens": tokens.expect("tokens").shape()[0], "outcome": "A2A_SUCCESS",
                }),
            )?;
            let after = operation["begun_us"].as_u64().filter(|after| *after >= begun);
            begun =
                after.ok_or(format!("{operation} began before the one before, which did at {begun} us"))?;
        }
        Ok(())
    });
    done.into_iter().collect()
}

/// One call at a time: a second thread is told so, and the first one's step goes on.
fn a_second_call_is_busy(pair: Pair) -> Result<(), String> {
    let crew = crew(pair)?;
    let member = &crew[2];
    let hops = member.hops()?;
    let first = scope(|scope| {
        let call = scope.spawn(|| member.dispatch(0, A2A_PHASE_BOTH, &Ask::new(1)));
        member.until_waiting(hops)?;
        let routing = &member.slots[1].0;
        let (input, ..) = Ask::new(2).input(member.rank, member.world, pair, u64::MAX);
        let calls = [
            Outcome::of(|| {
                member.comm.dispatch(routing, A2A_PHASE_BOTH, &input, &mut DispatchOut::default())
            }),
            Outcome::of(|| member.comm.combine(routing, A2A_PHASE_RECV, 0, None, &mut sums())),
            Outcome::of(|| member.comm.routing(0).map(drop)),
            Outcome::of(|| member.comm.combine_buffer(routing, F32).map(drop)),
        ];
        for second in calls {
            second.is(A2A_BUSY, &["rank 2", "another thread"])?;
        }
        member.record().is(A2A_SUCCESS, &[])?;
        let others = together(&all_but(&crew, 2), |m| m.dispatch(0, A2A_PHASE_BOTH, &Ask::new(1)));
        all_fine("dispatch", &others)?;
        Ok::<_, String>(call.join().expect("no panic in a call"))
    })?;
    first.is(A2A_SUCCESS, &[])?;
    all_fine("combine", &together(&all(&crew), |m| m.combine(0, A2A_PHASE_BOTH, &Ask::new(1))))?;
    all_fine("a step", &together(&all(&crew), |m| m.step(1, 3)))
}

// ---------------------------------------------------------------------------------------- disagreements

/// What one rank asks unlike all others.
struct Quarrel {
    name: &'static str,
    /// What everybody asks but for this.
    common: fn(&mut Ask),
    odd: fn(&mut Ask),
    /// What the sentence says of the others' value and of the odd one's, and what it calls it.
    words: [&'static str; 3],
}

const QUARRELS: [Quarrel; 8] = [
    Quarrel {
        name: "bound",
        common: |_| {},
        odd: |ask| ask.bound = 8,
        words: ["max_tokens (the step's bound)", "16", "8"],
    },
    Quarrel {
        name: "row_bytes",
        common: |_| {},
        odd: |ask| ask.hidden = 16,
        words: ["the row bytes of tokens", "128", "64"],
    },
    Quarrel { name: "topk", common: |_| {}, odd: |ask| ask.topk = 1, words: ["top-k", "2", "1"] },
    Quarrel {
        // As many bytes as 32 float32. bf16 is code 4, float32 code 2: code | bits << 8 | lanes << 16.
        name: "element_type",
        common: |_| {},
        odd: |ask| (ask.element, ask.hidden) = (BF16, 2 * HIDDEN),
        words: ["the element type of tokens", "73730", "69636"],
    },
    Quarrel {
        name: "uniform",
        common: |ask| (ask.flags, ask.tokens) = (A2A_DISPATCH_UNIFORM, Some(5)),
        odd: |ask| ask.tokens = Some(6),
        words: ["UNIFORM", "5", "6"],
    },
    Quarrel {
        name: "combine_hidden",
        common: |_| {},
        odd: |ask| ask.result = Some((16, F32)),
        words: ["the hidden size of the experts' rows", "32", "16"],
    },
    Quarrel {
        name: "combine_type",
        common: |_| {},
        odd: |ask| ask.result = Some((HIDDEN, BF16)),
        words: ["the element type of the experts' rows", "2", "0"],
    },
    Quarrel {
        name: "row_weights",
        common: |_| {},
        odd: |ask| ask.row_weights = true,
        words: ["the presence of row_weights", "0 on rank", "1 on rank"],
    },
];

/// How the ranks of a group that disagree end: each by what it sees itself. A rank may also be told first, if a third
/// one is interrupted between its word to one rank and to the next: so rarely that it does not happen three times.
fn disagree(pair: Pair, act: impl Fn(&[Member]) -> Outcomes) -> Outcomes {
    for _ in 0..3 {
        let crew = crew(pair)?;
        let lost = act(&crew)?;
        for outcome in &lost {
            outcome.is(A2A_MISMATCH, &[])?;
            in_time("told of a disagreement", outcome.took, PROMISE)?;
        }
        closed(&crew, &lost)?;
        if !lost.iter().any(|outcome| outcome.text.contains("gave up on")) {
            return Ok(lost);
        }
    }
    Err("three times in a row a rank was only told that another gave up".into())
}

/// A step as the ranks ask for it, up to its first failure.
fn ask_for(crew: &[Member], ask: impl Fn(usize) -> Ask + Sync) -> Vec<Outcome> {
    together(&all(crew), |member| {
        let ask = ask(member.rank);
        let outcome = member.dispatch(0, A2A_PHASE_BOTH, &ask);
        if outcome.status == A2A_SUCCESS { member.combine(0, A2A_PHASE_BOTH, &ask) } else { outcome }
    })
}

/// Each side says both values.
fn quarrel(pair: Pair, quarrel: &Quarrel, odd: usize) -> Result<(), String> {
    let lost = disagree(pair, |crew| {
        Ok(ask_for(crew, |rank| {
            let mut ask = Ask::new(1);
            (quarrel.common)(&mut ask);
            if rank == odd {
                (quarrel.odd)(&mut ask);
            }
            ask
        }))
    })?;
    let [name, usual, unusual] = quarrel.words;
    for (rank, outcome) in lost.iter().enumerate() {
        // The odd one names whoever it found at odds first.
        let of = if name == "UNIFORM" { format!("rank {rank} was told") } else { format!("on rank {rank}") };
        outcome.is(A2A_MISMATCH, &[name, usual, unusual, &of, &format!("rank {odd}")])?;
    }
    Ok(())
}

/// The slot is closed on every rank, and the record says why.
fn closed(crew: &[Member], lost: &[Outcome]) -> Result<(), String> {
    for (member, lost) in crew.iter().zip(lost) {
        let again = member.dispatch(0, A2A_PHASE_BOTH, &Ask::new(2));
        if (again.status, again.sentence()) != (lost.status, lost.sentence()) || again.took > AT_ONCE {
            return Err(format!("a closed slot said first {}, then {}", lost.describe(), again.describe()));
        }
        let record = member.record();
        if (record.status, &record.text[..]) != (lost.status, lost.sentence()) {
            return Err(format!("the record is {}, the call said {}", record.describe(), lost.describe()));
        }
    }
    Ok(())
}

/// One rank replays the routing, the others route anew; or the other way round, in halves.
fn one_replays(pair: Pair, odd: usize, all_but_one: bool) -> Result<(), String> {
    let lost = disagree(pair, |crew| {
        let ask = Ask { tokens: Some(5), ..Ask::new(1) };
        for operation in [Member::dispatch, Member::combine] {
            all_fine("a step", &together(&all(crew), |m| operation(m, 0, A2A_PHASE_BOTH, &ask)))?;
        }
        let replay = Ask { flags: A2A_DISPATCH_REUSE, ..ask.clone() };
        let ask = |rank: usize| if (rank == odd) != all_but_one { &replay } else { &ask };
        Ok(together(&all(crew), |member| {
            if !all_but_one {
                return member.dispatch(0, A2A_PHASE_BOTH, ask(member.rank));
            }
            let sent = member.dispatch(0, A2A_PHASE_SEND, ask(member.rank));
            match sent.status {
                A2A_SUCCESS => member.dispatch(0, A2A_PHASE_RECV, ask(member.rank)),
                _ => sent,
            }
        }))
    })?;
    for outcome in &lost {
        outcome.is(A2A_MISMATCH, &["dispatch", "slot 0, sequence 2", "REUSE", &format!("rank {odd}")])?;
    }
    Ok(())
}

/// One rank gives its dispatch up and dispatches again, the others combine.
fn dispatch_again(pair: Pair, odd: usize) -> Result<(), String> {
    let lost = disagree(pair, |crew| {
        all_fine("dispatch", &together(&all(crew), |m| m.dispatch(0, A2A_PHASE_BOTH, &Ask::new(1))))?;
        Ok(together(&all(crew), |member| {
            let operation = if member.rank == odd { Operation::Dispatch } else { Operation::Combine };
            operation.run(member, A2A_PHASE_BOTH, 1)
        }))
    })?;
    for (rank, outcome) in lost.iter().enumerate() {
        let both = ["combine", "dispatch", &format!("rank {rank} is in"), &format!("rank {odd}")];
        outcome.is(A2A_MISMATCH, &both)?;
    }
    Ok(())
}

/// One rank's rank_tokens are wrong about another rank: it says both values, the others hear of it.
fn a_lie_about_a_peer(pair: Pair, odd: usize) -> Result<(), String> {
    let about = (odd + 2) % RANKS;
    let crew = crew(pair)?;
    let lost = ask_for(&crew, |rank| {
        let mut told = vec![5; RANKS];
        if rank == odd {
            told[about] = 4;
        }
        Ask { tokens: Some(5), rank_tokens: Some(told), ..Ask::new(1) }
    });
    let (liar, subject) = (format!("rank {odd}"), format!("rank {about}"));
    for outcome in &lost {
        outcome.is(A2A_MISMATCH, &[&liar, &subject])?;
        in_time("told of a disagreement", outcome.took, PROMISE)?;
    }
    lost[odd]
        .is(A2A_MISMATCH, &[&format!("{subject} dispatched 5 tokens"), &format!("{liar} was told 4")])?;
    closed(&crew, &lost)
}

// --------------------------------------------------------------------------------------- rows that stream

/// Rank 1 has filled the FIFOs of ranks that take nothing yet when another thread ends its comm.
fn ended_while_it_streams(operation: Operation, destroy: bool) -> Result<(), String> {
    let crew = crew(Pair::Narrow)?;
    let (victim, peers) = (&crew[1], all_but(&crew, 1));
    if operation == Operation::Combine {
        all_fine("dispatch", &together(&all(&crew), |m| Operation::Dispatch.run(m, A2A_PHASE_BOTH, 1)))?;
    }
    all_fine("SEND", &together(&all(&crew), |m| operation.run(m, A2A_PHASE_SEND, 1)))?;
    // What it has for itself it takes, unless a sum waits for others' results.
    let own = if operation == Operation::Dispatch { MANY * TOPK / RANKS } else { FIFO_ROWS };
    let sent = || Ok::<_, String>(victim.comm.stats()?.rows_fifo);
    let full = sent()? + (own + (RANKS - 1) * FIFO_ROWS) as u64;
    let (begun, ending, waiting) = scope(|scope| {
        let call = scope.spawn(|| operation.run(victim, A2A_PHASE_RECV, 1));
        let limit = Instant::now() + DEADLINE;
        while sent()? < full && Instant::now() < limit {
            sleep(Duration::from_millis(1));
        }
        let begun = now();
        let ending = if destroy { victim.destroy() } else { Outcome::of(|| victim.comm.abort()) };
        Ok::<_, String>((begun, ending, call.join().expect("no panic in a call")))
    })?;
    ending.is(A2A_SUCCESS, &[])?;
    waiting.is(A2A_ABORTED, &["rank 1", operation.name(), "slot 0, sequence 1"])?;
    in_time("a waiting call ends with its comm", waiting.ended.saturating_sub(begun), PROMISE)?;

    let lost = together(&peers, |m| operation.run(m, A2A_PHASE_RECV, 1));
    told_of_rank_1(&lost, operation, if destroy { "destroyed" } else { "aborted" })?;
    for outcome in &lost {
        voided(&outcome.words, &[1])?;
        in_time("told of a rank that left", outcome.took, PROMISE)?;
    }
    Ok(())
}

/// Ranks that owe nobody rows take none: the others have all they need, and cannot get rid of what those are due.
fn rows_that_are_never_taken(operation: Operation, late: &[usize]) -> Result<(), String> {
    let crew = crew(Pair::Narrow)?;
    let is_late = |m: &&Member| late.contains(&m.rank);
    let (idle, peers): (Vec<&Member>, Vec<&Member>) = crew.iter().partition(is_late);
    if operation == Operation::Dispatch {
        let ask = |m: &Member| Ask { tokens: Some(if is_late(&m) { 0 } else { MANY }), ..m.ask(1) };
        all_fine("SEND", &together(&all(&crew), |m| m.dispatch(0, A2A_PHASE_SEND, &ask(m))))?;
    } else {
        let goes = |m: &Member| if is_late(&m) { Goes::Everywhere } else { Goes::Past(late[0]) };
        let ask = |m: &Member| Ask { goes: goes(m), ..m.ask(1) };
        all_fine("dispatch", &together(&all(&crew), |m| m.dispatch(0, A2A_PHASE_BOTH, &ask(m))))?;
        all_fine("SEND", &together(&all(&crew), |m| m.combine(0, A2A_PHASE_SEND, &ask(m))))?;
    }
    let names: Vec<String> = late.iter().map(usize::to_string).collect();
    let names = format!("{} did not take", names.join(", "));
    for outcome in together(&peers, |m| operation.run(m, A2A_PHASE_RECV, 1)) {
        outcome.is(A2A_TIMEOUT, &[operation.name(), "slot 0, sequence 1", &names, "2000 ms"])?;
        voided(&outcome.words, late)?;
        in_time(SILENCE, outcome.took, DEADLINE + PROMISE)?;
        if outcome.took < DEADLINE {
            return Err(format!("gave up early: {}", outcome.describe()));
        }
    }
    for told in together(&idle, |m| operation.run(m, A2A_PHASE_RECV, 1)) {
        told.is(A2A_TIMEOUT, &[operation.name(), "slot 0, sequence 1", "gave up on rank"])?;
        voided(&told.words, late)?;
        in_time(LATE, told.took, PROMISE)?;
    }
    Ok(())
}

/// Rank 1 never sends its results, rank 0 needs them and cannot take the others' meanwhile, which have all they need:
/// nobody blames rank 0, though the others' deadline ends before its own.
fn who_is_behind_it() -> Result<(), String> {
    let crew = crew(Pair::Narrow)?;
    let ask = |m: &Member| match m.rank {
        0 => m.ask(1),
        1 => Ask { tokens: Some(0), ..m.ask(1) },
        _ => Ask { goes: Goes::Past(1), ..m.ask(1) },
    };
    all_fine("dispatch", &together(&all(&crew), |m| m.dispatch(0, A2A_PHASE_BOTH, &ask(m))))?;
    all_fine("SEND", &together(&all(&crew), |m| m.combine(0, A2A_PHASE_SEND, &ask(m))))?;
    let lost = together(&all_but(&crew, 1), |m| {
        if m.rank == 0 {
            sleep(DEADLINE / 10);
        }
        m.combine(0, A2A_PHASE_RECV, &ask(m))
    });
    // Once rank 0 has given up, nobody needs to get rid of its rows.
    let (whole, lost): (Vec<_>, Vec<_>) = lost.into_iter().partition(|outcome| outcome.status == A2A_SUCCESS);
    for outcome in &lost {
        outcome.is(A2A_TIMEOUT, &["combine", "slot 0, sequence 1", "rank 1"])?;
        voided(&outcome.words, &[1])?;
        in_time(SILENCE, outcome.took, DEADLINE + PROMISE)?;
    }
    let told = lost.iter().any(|outcome| outcome.text.contains("for want of those of rank 1"));
    if told && whole.len() <= 1 { Ok(()) } else { Err(format!("whole are {whole:?}, lost {lost:?}")) }
}

/// A rank is through with an operation and gone while what it sent stands in FIFOs that nobody has looked into.
fn what_it_sent_outlives_it(operation: Operation, destroy: bool) -> Result<(), String> {
    let seats = seats(RANKS, GroupId::new());
    let mut process = Worker::spawn(OBEY.0, &[3], &seats[3]);
    process.tell(&join(3, RANKS, Pair::TwoSided, false, seats[3].id))?;
    let members = members(&seats[..3], Pair::TwoSided)?;
    let peers = all(&members);
    let done = |process: &Worker| all_fine("rank 3", &[Outcome::from_line(&process.line(ANSWERS)?)?]);
    done(&process)?;
    // It waits for nobody's rows, so that it is through before anybody takes one of its own.
    if operation == Operation::Dispatch {
        let past = Ask { tokens: Some(TOKENS), goes: Goes::Past(3), ..Ask::new(1) };
        all_fine("SEND", &together(&peers, |m| m.dispatch(0, A2A_PHASE_SEND, &past)))?;
        process.tell(&dispatch(0, A2A_PHASE_BOTH, 1))?;
    } else {
        let everywhere = Ask { tokens: Some(TOKENS), goes: Goes::Everywhere, ..Ask::new(1) };
        process.tell(&format!("{} 0", dispatch(0, A2A_PHASE_BOTH, 1)))?;
        all_fine("dispatch", &together(&peers, |m| m.dispatch(0, A2A_PHASE_BOTH, &everywhere)))?;
        done(&process)?;
        all_fine("SEND", &together(&peers, |m| m.combine(0, A2A_PHASE_SEND, &everywhere)))?;
        process.tell(&combine(0, A2A_PHASE_BOTH))?;
    }
    done(&process)?;
    if destroy {
        process.tell("destroy")?;
        done(&process)?;
    } else {
        process.kill();
    }
    all_fine(operation.name(), &together(&peers, |m| operation.run(m, A2A_PHASE_RECV, 1)))?;
    for outcome in together(&peers, |m| operation.next().run(m, A2A_PHASE_BOTH, 2)) {
        outcome.is(A2A_PEER_LOST, &[operation.next().name(), "rank 3"])?;
        in_time("told of a rank that left", outcome.took, PROMISE)?;
    }
    Ok(())
}

/// A dispatch that all have on offer outlives a quarrel about another slot's: rank 1, which waits for nobody's rows,
/// still sends all of its own, though no later call of it is there to do so.
fn a_quarrel_beside_a_stream() -> Result<(), String> {
    let crew = crew(Pair::Narrow)?;
    let ask =
        |m: &Member| Ask { goes: if m.rank == 1 { Goes::Everywhere } else { Goes::Past(1) }, ..m.ask(1) };
    all_fine("SEND", &together(&all(&crew), |m| m.dispatch(1, A2A_PHASE_SEND, &ask(m))))?;
    for outcome in together(&all(&crew), |m| m.dispatch(0, A2A_PHASE_BOTH, &at_odds(m))) {
        outcome.is(A2A_MISMATCH, &["dispatch on slot 0", "rank 2"])?;
        in_time("told of a disagreement", outcome.took, PROMISE)?;
    }
    all_fine("RECV on slot 1", &together(&all(&crew), |m| m.dispatch(1, A2A_PHASE_RECV, &ask(m))))?;
    all_fine("combine on slot 1", &together(&all(&crew), |m| m.combine(1, A2A_PHASE_BOTH, &ask(m))))
}

/// Rank 2 has another bound.
fn at_odds(member: &Member) -> Ask {
    Ask { tokens: Some(4), bound: if member.rank == 2 { MANY / 2 } else { MANY }, ..member.ask(1) }
}

/// What becomes of the dispatch on slot 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    Quarrel,
    /// Void on every rank, because too many rows would come.
    Overflow,
    /// Rank 2 destroys its comm before it has sent it.
    Gone,
    /// As above, and nobody comes to take the rows of slot 1.
    GoneAndNobodyComes,
}

impl Fate {
    fn is_gone(self) -> bool {
        matches!(self, Fate::Gone | Fate::GoneAndNobodyComes)
    }
}

/// Rank 1 completes slot 1 first, the others slot 0, which fails: rank 1's rows on slot 1, which are on offer until its
/// last RECV, reach the others all the same.
fn slots_cross_and_one_fails(fate: Fate) -> Result<(), String> {
    let seats = seats(RANKS, GroupId::new());
    // Enough for what rank 1 has for everybody on slot 1, not for what all have on slot 0.
    let rows = (MANY * TOPK / RANKS) as i64;
    let comms = create(&seats, |seat| a2a_config_t { max_recv_rows: rows, ..settings(seat, Pair::Narrow) });
    let crew =
        comms.into_iter().zip(&seats).map(|((comm, _), seat)| Member::new(seat, comm?, Pair::Narrow, false));
    let mut crew: Vec<Member> = crew.collect::<Result<_, Failure>>()?;
    let ask = |m: &Member, slot: usize| match (slot, fate) {
        (1, _) if m.rank == 1 => m.ask(1),
        (1, _) => Ask { tokens: Some(0), ..m.ask(1) },
        (_, Fate::Quarrel) => at_odds(m),
        _ => m.ask(1),
    };
    let absent = if fate.is_gone() { 2 } else { RANKS };
    all_fine("SEND on slot 1", &together(&all(&crew), |m| m.dispatch(1, A2A_PHASE_SEND, &ask(m, 1))))?;
    all_fine(
        "SEND on slot 0",
        &together(&all_but(&crew, absent), |m| m.dispatch(0, A2A_PHASE_SEND, &ask(m, 0))),
    )?;
    if fate.is_gone() {
        crew[2].destroy().is(A2A_SUCCESS, &[])?;
        crew.remove(2);
    }
    all_fine("RECV on slot 1", &[crew[1].dispatch(1, A2A_PHASE_RECV, &ask(&crew[1], 1))])?;
    let ends = together(&all(&crew), |m| {
        let failed = m.dispatch(0, A2A_PHASE_RECV, &ask(m, 0));
        let comes = m.rank != 1 && fate != Fate::GoneAndNobodyComes;
        let received = comes.then(|| m.dispatch(1, A2A_PHASE_RECV, &ask(m, 1)));
        (failed, received)
    });
    for (member, (failed, received)) in crew.iter().zip(&ends) {
        match fate {
            Fate::Quarrel => failed.is(A2A_MISMATCH, &["dispatch on slot 0", "rank 2"])?,
            Fate::Overflow => {
                failed.is(A2A_OVERFLOW, &["dispatch on slot 0", "rank 0 would receive 128 rows"])?
            }
            Fate::Gone | Fate::GoneAndNobodyComes => {
                failed.is(A2A_PEER_LOST, &["dispatch on slot 0", "rank 2"])?
            }
        }
        if fate == Fate::GoneAndNobodyComes && member.rank == 1 {
            in_time("told when nobody took its other rows (2 s are the deadline)", failed.took, DEADLINE)?;
        } else {
            in_time("told of slot 0 before slot 1 is through", failed.took, PROMISE)?;
        }
        all_fine("RECV on slot 1", received.as_slice())?;
    }
    if !fate.is_gone() {
        all_fine("combine on slot 1", &together(&all(&crew), |m| m.combine(1, A2A_PHASE_BOTH, &ask(m, 1))))?;
    }
    Ok(())
}

// --------------------------------------------------------------------------------------- what stays behind

/// A process of its own, so that nothing else opens or maps anything while it counts.
const TIDY: (&str, Job) = ("tidy", tidy);

fn tidy(_: &Seat) -> Result<(), String> {
    // What the first use of anything leaves for good is not a leak.
    trouble(1)?;
    cycle(Pair::OneSided)?;
    again_and_again(Pair::OneSided)?;
    let before = footprint()?;
    for index in 0..48 {
        cycle(PAIRS[index % PAIRS.len()])?;
    }
    for index in 0..3 {
        trouble(index)?;
    }
    PAIRS.into_iter().try_for_each(again_and_again)?;
    // Threads of the launcher end by themselves, a little after their process.
    let limit = Instant::now() + GRACE;
    while footprint()? != before && Instant::now() < limit {
        sleep(Duration::from_millis(10));
    }
    let after = footprint()?;
    if after == before { Ok(()) } else { Err(format!("before {before:?}, after {after:?}")) }
}

fn cycle(pair: Pair) -> Result<(), String> {
    let crew = crew(pair)?;
    all_fine("a step", &together(&all(&crew), |m| m.step(0, 1)))
}

/// Everything that ends badly.
fn trouble(index: usize) -> Result<(), String> {
    configs_differ(0, None)?;
    ranks_that_never_come(&[1])?;
    a_rank_comes_twice(2)?;
    the_wrong_key()?;
    garbage_at_the_door()?;
    // Two pairs each time.
    for pair in PAIRS.into_iter().skip(2 * index).take(2) {
        ended_while_it_waits(pair, Operation::Dispatch, index == 0)?;
        ended_while_peers_wait(pair, Operation::Combine, index == 1)?;
        quarrel(pair, &QUARRELS[0], 1)?;

        // A peer in another process dies.
        let seats = seats(RANKS, GroupId::new());
        let mut process = Worker::spawn(OBEY.0, &[3], &seats[3]);
        process.tell(&join(3, RANKS, pair, false, seats[3].id))?;
        let members = members(&seats[..3], pair)?;
        process.kill();
        for outcome in together(&all(&members), |m| m.step(0, 1)) {
            outcome.is(A2A_PEER_LOST, &["rank 3"])?;
        }
    }
    Ok(())
}

// ------------------------------------------------------------------------------------------------ main

fn main() -> std::process::ExitCode {
    worker(&[OBEY, TIDY, FEW_FILES]);
    let mut args = Arguments::from_args();
    // Cases wait more than they work.
    args.test_threads.get_or_insert(4);
    let mut trials = Vec::new();
    let mut add = |name: String, run: Run| {
        trials.push(Trial::test(name, || limited(run, LIMIT).map_err(Into::into)));
    };
    for (number, pair) in PAIRS.into_iter().enumerate() {
        let name = pair.name();
        for (at, point) in POINTS.into_iter().enumerate() {
            if point == Point::Counted && !pair.counts() {
                continue;
            }
            for index in 0..2 {
                let of = format!("{name}/{point:?}/{index}");
                add(format!("kill/{of}"), Box::new(move || at_a_point(Fault::Kill, pair, point, index)));
                // A silence takes its time: pairs and points are dealt, but for rows that move late.
                if (number + at + index as usize).is_multiple_of(2) || pair.streams() {
                    add(format!("stop/{of}"), Box::new(move || at_a_point(Fault::Stop, pair, point, index)));
                }
            }
        }
        for index in 0..2 {
            let of = format!("{name}/AtAnyTime/{index}");
            add(format!("kill/{of}"), Box::new(move || at_any_time(Fault::Kill, pair, index)));
        }
        add(format!("stop/{name}/AtAnyTime/0"), Box::new(move || at_any_time(Fault::Stop, pair, 0)));
        add(format!("pause/{name}"), Box::new(move || a_pause(pair)));
        add(format!("two_slots/{name}"), Box::new(move || the_other_slot_keeps_its_data(pair)));
        add(format!("history/hang/{name}"), Box::new(move || a_hang_is_on_record(pair)));
        add(format!("history/last/{name}"), Box::new(move || the_last_operations_are_told(pair)));
        add(format!("busy/{name}"), Box::new(move || a_second_call_is_busy(pair)));
        for operation in OPERATIONS {
            for (how, destroy) in [("abort", false), ("destroy", true)] {
                let of = format!("{name}/{operation:?}");
                type Case = fn(Pair, Operation, bool) -> Result<(), String>;
                let cases: [(&str, Case); 3] = [
                    ("while_it_waits", ended_while_it_waits),
                    ("while_peers_wait", ended_while_peers_wait),
                    ("before_it_is_needed", gone_before_it_is_needed),
                ];
                for (when, run) in cases {
                    add(format!("{how}/{when}/{of}"), Box::new(move || run(pair, operation, destroy)));
                }
            }
        }
        for odd in [0, 3] {
            for (at, Quarrel { name: about, .. }) in QUARRELS.iter().enumerate() {
                let of = format!("disagree/{about}/{name}/{odd}");
                add(of, Box::new(move || quarrel(pair, &QUARRELS[at], odd)));
            }
            let of = format!("{name}/{odd}");
            add(format!("disagree/operation/{of}"), Box::new(move || dispatch_again(pair, odd)));
            add(format!("disagree/rank_tokens/{of}"), Box::new(move || a_lie_about_a_peer(pair, odd)));
            add(format!("disagree/reuse/{of}"), Box::new(move || one_replays(pair, odd, odd > 0)));
        }
    }
    for index in 0..4 {
        add(format!("stream/kill/{index}"), Box::new(move || at_any_time(Fault::Kill, Pair::Narrow, index)));
    }
    for index in 0..2 {
        add(format!("stream/stop/{index}"), Box::new(move || at_any_time(Fault::Stop, Pair::Narrow, index)));
    }
    add("stream/pause".into(), Box::new(|| a_pause(Pair::Narrow)));
    for operation in OPERATIONS {
        for (how, destroy) in [("abort", false), ("destroy", true)] {
            let of = format!("stream/{how}/{operation:?}");
            add(of, Box::new(move || ended_while_it_streams(operation, destroy)));
        }
        for (how, destroy) in [("kill", false), ("destroy", true)] {
            let of = format!("stream/finished_before/{how}/{operation:?}");
            add(of, Box::new(move || what_it_sent_outlives_it(operation, destroy)));
        }
    }
    for (operation, late) in
        [(Operation::Dispatch, &[1][..]), (Operation::Dispatch, &[0, 2]), (Operation::Combine, &[3])]
    {
        let of = format!("stream/never_taken/{operation:?}/{late:?}");
        add(of, Box::new(move || rows_that_are_never_taken(operation, late)));
    }
    add("watch/gone_and_dead".into(), Box::new(who_is_gone_and_who_is_dead));
    add("watch/refused".into(), Box::new(a_watch_that_is_refused));
    add("stream/never_taken/behind".into(), Box::new(who_is_behind_it));
    add("stream/beside/quarrel".into(), Box::new(a_quarrel_beside_a_stream));
    for fate in [Fate::Quarrel, Fate::Overflow, Fate::Gone, Fate::GoneAndNobodyComes] {
        add(format!("stream/crossing/{fate:?}"), Box::new(move || slots_cross_and_one_fails(fate)));
    }
    rendezvous::cases(&mut add);
    recovery::cases(&mut add);
    add("nothing_stays_behind".into(), Box::new(|| launch(TIDY, 1, &[Host::Child(vec![0])], &[], LIMIT)));

    let conclusion = libtest_mimic::run(&args, trials);
    print_times();
    conclusion.exit_code()
}
