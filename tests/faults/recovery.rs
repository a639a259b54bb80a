//! After a loss the survivors go on in the same comm: who they are, that their steps are right, and that a rank they
//! went on without changes nothing, whenever it wakes up.

use std::thread::{scope, sleep};
use std::time::{Duration, Instant};

use a2a::abi::calls::a2a_abort;
use a2a::abi::types::*;

use super::common::*;
use super::*;

const RECOVERY: &str = "a recovery, once the last survivor has come";

/// What every survivor must report; `whole`: of slots 0 and 1, where the case knows.
struct Report<'a> {
    generation: i64,
    members: &'a [usize],
    replaced: bool,
    whole: Option<[i64; 2]>,
}

impl Report<'_> {
    fn check(&self, outcomes: &[Outcome]) -> Result<(), String> {
        all_fine("recover", outcomes)?;
        let mask: i64 = self.members.iter().map(|rank| 1 << rank).sum();
        let expected = [self.generation, mask, self.members.len() as i64, self.replaced.into()];
        for outcome in outcomes {
            let (words, whole) = outcome.words.split_at(4);
            if words != expected || self.whole.is_some_and(|expected| whole != expected) {
                return Err(format!(
                    "a2a_recover said {words:?} and whole steps {whole:?}, expected {expected:?}, {:?}",
                    self.whole
                ));
            }
            if outcomes[0].words != outcome.words {
                return Err(format!("survivors disagree: {:?}, {:?}", outcomes[0].words, outcome.words));
            }
        }
        Ok(())
    }
}

const PATIENCE: i64 = 200;

fn recover(patience: i64) -> String {
    format!("recover 10000 {patience}")
}

/// The survivors recover, all at once; how long the slowest takes is noted if nobody is waited for.
fn recovered(group: &mut Group, survivors: &[usize], report: &Report) -> Result<(), String> {
    let outcomes = group.all(survivors, &recover(PATIENCE))?;
    report.check(&outcomes)?;
    for outcome in &outcomes {
        let patience = Duration::from_millis(if report.replaced { PATIENCE as u64 } else { 0 });
        in_time(RECOVERY, outcome.took.saturating_sub(patience), PROMISE)?;
    }
    for (rank, outcome) in survivors.iter().zip(group.all(survivors, "mask")?) {
        let expected: Vec<i64> = EVERYBODY.map(|rank| report.members.contains(&rank).into()).into();
        if outcome.words != expected {
            return Err(format!("rank {rank}'s mask is {:?}, expected {expected:?}", outcome.words));
        }
    }
    for outcome in group.all(survivors, "record")? {
        outcome.is(A2A_SUCCESS, &[])?;
    }
    Ok(())
}

/// Steps on both slots, across the wrap of their epochs, whole and by halves.
fn steps(group: &mut Group, ranks: &[usize], seed: u64) -> Result<(), String> {
    for step in 0..4 {
        for slot in 0..SLOTS {
            group.step(ranks, slot, seed + 2 * step + slot as u64)?;
        }
    }
    for call in [
        dispatch(0, A2A_PHASE_SEND, seed + 20),
        dispatch(0, A2A_PHASE_RECV, seed + 20),
        combine(0, A2A_PHASE_SEND),
        combine(0, A2A_PHASE_RECV),
        // A dispatch after a dispatch.
        dispatch(1, A2A_PHASE_BOTH, seed + 21),
        dispatch(1, A2A_PHASE_BOTH, seed + 22),
        combine(1, A2A_PHASE_BOTH),
    ] {
        group.fine(ranks, &call)?;
    }
    Ok(())
}

fn all_others(victim: usize) -> Vec<usize> {
    EVERYBODY.into_iter().filter(|rank| *rank != victim).collect()
}

/// One after another dies at any moment of its steps, until one is left; what survives goes on each time.
fn one_by_one(pair: Pair, index: u64) -> Result<(), String> {
    let mut rng = Rng::new(&[seed(), 5, pair as u64, index]);
    let mut group = Group::spawn(pair, rng.one_in(2));
    group.join(&EVERYBODY)?;
    let mut left = EVERYBODY.to_vec();
    for generation in 2..5 {
        let victim = left.remove(rng.below(left.len()));
        let all: Vec<usize> = left.iter().copied().chain([victim]).collect();
        group.tell_all(&all, "run 0 1000")?;
        sleep(Duration::from_micros(rng.below(30_000) as u64));
        group.workers[victim].kill();
        for outcome in group.answers(&left)? {
            outcome.is(A2A_PEER_LOST, &["slot 0", &format!("rank {victim}")])?;
        }
        let report = Report { generation, members: &left, replaced: false, whole: None };
        recovered(&mut group, &left, &report)?;
        steps(&mut group, &left, 100 * generation as u64)?;
    }
    group.fine(&left, "destroy")
}

/// A rank stops at any moment; the others give up on it and go on. When it wakes up it is in the middle of what it was
/// at, which lands nowhere.
fn stopped_and_left_behind(pair: Pair, index: u64) -> Result<(), String> {
    let mut rng = Rng::new(&[seed(), 6, pair as u64, index]);
    let mut group = Group::spawn(pair, rng.one_in(2));
    group.join(&EVERYBODY)?;
    let victim = rng.below(RANKS);
    let others = all_others(victim);
    group.tell_all(&EVERYBODY, "run 0 1000")?;
    sleep(Duration::from_micros(rng.below(30_000) as u64));
    group.workers[victim].stop();
    for outcome in group.answers(&others)? {
        outcome.is(A2A_TIMEOUT, &["slot 0"])?;
    }
    recovered(&mut group, &others, &Report { generation: 2, members: &others, replaced: true, whole: None })?;
    steps(&mut group, &others, 300)?;
    let resumed = now();
    group.workers[victim].go_on();
    steps(&mut group, &others, 400)?;
    let outcome = group.answer(victim)?;
    told_late(&outcome)?;
    in_time(LATE, outcome.ended.saturating_sub(resumed), PROMISE)?;
    let outcome = group.all(&[victim], &recover(PATIENCE))?.remove(0);
    outcome.is(A2A_PEER_LOST, &["recovered without this rank", &format!("rank {victim}")])?;
    in_time("a rank that was left behind is told", outcome.took, PROMISE)?;
    steps(&mut group, &others, 500)?;
    group.fine(&EVERYBODY, "destroy")
}

/// Ranks leave one after another, all alive and in order: the others take part without them, and cannot take them in again.
fn fewer_take_part(pair: Pair) -> Result<(), String> {
    let mut group = Group::spawn(pair, false);
    group.join(&EVERYBODY)?;
    steps(&mut group, &EVERYBODY, 600)?;
    let mut left = EVERYBODY.to_vec();
    for generation in 2..5 {
        let leaves = left.remove(1);
        let list: Vec<String> = left.iter().map(usize::to_string).collect();
        for outcome in group.all(&left, &format!("activate {}", list.join(",")))? {
            outcome.is(A2A_SUCCESS, &[])?;
            if outcome.words != [generation] {
                return Err(format!("generation {:?}, expected {generation}", outcome.words));
            }
        }
        steps(&mut group, &left, 700 + 10 * generation as u64)?;
        let outcome = group.all(&[leaves], &dispatch(0, A2A_PHASE_BOTH, 1))?.remove(0);
        outcome.is(A2A_PEER_LOST, &[&format!("rank {leaves}")])?;
    }
    let outcome = group.all(&left, "activate 0,1")?.remove(0);
    outcome.is(A2A_UNSUPPORTED, &["rank 0", "nixl_elastic"])?;
    let outcome = group.all(&left, "activate 9")?.remove(0);
    outcome.is(A2A_INVALID_ARGUMENT, &["rank 0", "ranks[0] is 9"])?;
    group.fine(&EVERYBODY, "destroy")
}

/// A rank stops for longer than the deadline, then goes on and comes too: nobody is lost, all go on.
fn all_come(pair: Pair) -> Result<(), String> {
    let mut group = Group::spawn(pair, false);
    group.join(&EVERYBODY)?;
    let others = all_others(1);
    for seed in 0..3 {
        group.step(&EVERYBODY, 0, seed)?;
    }
    group.fine(&EVERYBODY, &dispatch(1, A2A_PHASE_BOTH, 9))?;
    group.workers[1].stop();
    group.tell_all(&EVERYBODY, &dispatch(0, A2A_PHASE_BOTH, 10))?;
    for outcome in group.answers(&others)? {
        outcome.is(A2A_TIMEOUT, &["slot 0, sequence 4", "rank 1"])?;
    }
    group.tell_all(&others, &recover(20_000))?;
    group.workers[1].go_on();
    // Its own dispatch may have had all it needed.
    let late = group.answer(1)?;
    if late.status != A2A_SUCCESS {
        told_late(&late)?;
    }
    group.tell(1, &recover(20_000))?;
    let outcomes = group.answers(&EVERYBODY)?;
    // The dispatch on slot 1 has no combine: that step is not whole.
    let whole = Some([3, 0]);
    Report { generation: 2, members: &EVERYBODY, replaced: false, whole }.check(&outcomes)?;
    steps(&mut group, &EVERYBODY, 20)?;
    group.fine(&EVERYBODY, "destroy")
}

/// Ranks that meet anew lose one more: who follows, or who leads.
fn one_dies_in_a_recovery(leader: bool) -> Result<(), String> {
    let mut group = Group::spawn(Pair::OneSided, false);
    group.join(&EVERYBODY)?;
    group.workers[3].kill();
    for outcome in group.all(&[0, 1, 2], &dispatch(0, A2A_PHASE_BOTH, 1))? {
        outcome.is(A2A_PEER_LOST, &["rank 3"])?;
    }
    group.tell(0, &recover(PATIENCE))?;
    sleep(Duration::from_millis(100));
    group.tell(2, &recover(PATIENCE))?;
    sleep(Duration::from_millis(100));
    let victim = if leader { 0 } else { 2 };
    group.workers[victim].kill();
    let left = [1, 2 - victim];
    group.tell(1, &recover(PATIENCE))?;
    let outcomes = group.answers(&left)?;
    Report { generation: 2, members: &left, replaced: false, whole: Some([0, 0]) }.check(&outcomes)?;
    steps(&mut group, &left, 10)
}

/// A rank that nobody gave up on does not come: the others go on without it at their deadline, and it is told.
fn one_does_not_come() -> Result<(), String> {
    let mut group = Group::spawn(Pair::Flat, false);
    group.join(&EVERYBODY)?;
    group.step(&EVERYBODY, 0, 1)?;
    let others = all_others(2);
    let outcomes = group.all(&others, "recover 500 200")?;
    Report { generation: 2, members: &others, replaced: true, whole: Some([1, 0]) }.check(&outcomes)?;
    for outcome in &outcomes {
        in_time("a recovery that waits for nothing (0.5 s is the deadline)", outcome.took, PROMISE)?;
    }
    steps(&mut group, &others, 10)?;
    let outcome = group.all(&[2], &dispatch(0, A2A_PHASE_BOTH, 2))?.remove(0);
    outcome.is(A2A_PEER_LOST, &["went on without this rank (a2a_recover)"])?;
    in_time("a rank that was left behind is told", outcome.took, PROMISE)?;
    steps(&mut group, &others, 50)
}

// -------------------------------------------------------------------------------------------------- threads

/// Ranks that are threads, of which one has destroyed or aborted its comm.
fn one_leaves(pair: Pair, destroy: bool) -> Result<(), String> {
    let crew = crew(pair)?;
    all_fine("a step", &together(&all(&crew), |m| m.step(0, 1)))?;
    if destroy {
        crew[2].destroy().is(A2A_SUCCESS, &[])?;
    } else {
        // SAFETY: a handle of ours.
        check(unsafe { a2a_abort(crew[2].comm.handle()) })?;
    }
    let others = all_but(&crew, 2);
    for outcome in together(&others, |m| m.step(1, 2)) {
        outcome.is(A2A_PEER_LOST, &["slot 1", "rank 2"])?;
    }
    let outcomes = together(&others, |m| m.recover(0, 0));
    // A call that was aborted may still be at its end; one of a comm that is destroyed is not.
    let report = Report { generation: 2, members: &[0, 1, 3], replaced: !destroy, whole: Some([1, 0]) };
    report.check(&outcomes)?;
    for seed in 3..8 {
        all_fine("a step", &together(&others, |m| m.step(seed as usize % 2, seed)))?;
    }
    // What was routed among others is not replayed.
    let ask = |m: &Member| Ask { flags: A2A_DISPATCH_REUSE, ..m.ask(7) };
    all_fine("a replay", &together(&others, |m| m.dispatch(1, A2A_PHASE_BOTH, &ask(m))))?;
    let report = Report { generation: 3, whole: Some([2, 3]), replaced: false, ..report };
    report.check(&together(&others, |m| m.recover(0, 0)))?;
    for outcome in together(&others, |m| m.dispatch(1, A2A_PHASE_BOTH, &ask(m))) {
        outcome.is(A2A_INVALID_ARGUMENT, &["A2A_DISPATCH_REUSE", "generation 2", "the comm of 3"])?;
    }
    all_fine("a step", &together(&others, |m| m.step(1, 9)))
}

/// Ranks that disagreed are all there: they go on together, from whatever state of their slots.
fn after_a_quarrel(pair: Pair) -> Result<(), String> {
    let crew = crew(pair)?;
    all_fine("SEND on slot 1", &together(&all(&crew), |m| m.dispatch(1, A2A_PHASE_SEND, &m.ask(1))))?;
    let outcomes = together(&all(&crew), |m| {
        let bound = if m.rank == 3 { MAX_TOKENS - 1 } else { MAX_TOKENS };
        m.dispatch(0, A2A_PHASE_BOTH, &Ask { bound, ..Ask::new(2) })
    });
    outcomes.iter().try_for_each(|outcome| outcome.is(A2A_MISMATCH, &["max_tokens", "rank 3"]))?;
    let report = Report { generation: 2, members: &EVERYBODY, replaced: false, whole: Some([0, 0]) };
    report.check(&together(&all(&crew), |m| m.recover(0, 0)))?;
    for seed in 3..9 {
        all_fine("a step", &together(&all(&crew), |m| m.step(seed as usize % 2, seed)))?;
    }
    Ok(())
}

/// A rank alone in its recovery is ended by another thread, at once; the comm is then only good for destroying.
fn aborted_while_it_recovers(leader: bool) -> Result<(), String> {
    let crew = crew(Pair::OneSided)?;
    scope(|scope| {
        let first = scope.spawn(|| crew[0].recover(0, 0));
        sleep(Duration::from_millis(100));
        let second = scope.spawn(|| crew[1].recover(0, 0));
        sleep(Duration::from_millis(100));
        let victim = if leader { 0 } else { 1 };
        let begun = Instant::now();
        // SAFETY: a handle of ours.
        check(unsafe { a2a_abort(crew[victim].comm.handle()) })?;
        let mut calls = [Some(first), Some(second)];
        let outcome = calls[victim].take().expect("not joined").join().expect("no panic");
        outcome.is(A2A_ABORTED, &[&format!("rank {victim}")])?;
        in_time("a2a_abort ends a2a_recover", begun.elapsed(), PROMISE)?;
        let others = all_but(&crew, victim);
        let late: Vec<&Member> = others.iter().copied().filter(|m| m.rank > 1).collect();
        let mut outcomes = together(&late, |m| m.recover(0, 0));
        outcomes.extend(calls[1 - victim].take().expect("not joined").join());
        let members = all_others(victim);
        Report { generation: 2, members: &members, replaced: true, whole: Some([0, 0]) }.check(&outcomes)?;
        all_fine("a step", &together(&others, |m| m.step(0, 1)))
    })
}

/// Nobody to agree with: a comm of one begins anew.
fn alone() -> Result<(), String> {
    let members = members(&seats(1, GroupId::new()), Pair::Padded)?;
    for generation in 2..4 {
        members[0].step(0, 1).is(A2A_SUCCESS, &[])?;
        members[0].dispatch(1, A2A_PHASE_SEND, &members[0].ask(2)).is(A2A_SUCCESS, &[])?;
        let outcome = members[0].recover(0, 0);
        Report { generation, members: &[0], replaced: false, whole: Some([1, 0]) }.check(&[outcome])?;
    }
    members[0].mask().is(A2A_SUCCESS, &[])?;
    members[0].step(1, 3).is(A2A_SUCCESS, &[])
}

/// With its memory replaced again and again, and its ranks fewer and fewer, a comm works and leaves nothing behind.
pub fn again_and_again(pair: Pair) -> Result<(), String> {
    let mut crew = crew(pair)?;
    for generation in 2.. {
        let gone = crew.pop().expect("somebody is left");
        if crew.is_empty() {
            return Ok(());
        }
        // SAFETY: a handle of ours.
        check(unsafe { a2a_abort(gone.comm.handle()) })?;
        let members: Vec<usize> = (0..crew.len()).collect();
        let report = Report { generation, members: &members, replaced: true, whole: None };
        report.check(&together(&all(&crew), |m| m.recover(0, 0)))?;
        for seed in 0..4 {
            all_fine("a step", &together(&all(&crew), |m| m.step(seed as usize % 2, seed)))?;
        }
    }
    Ok(())
}

pub fn cases(add: &mut impl FnMut(String, Run)) {
    let mut add = |name: String, run: Run| add(format!("recover/{name}"), run);
    for pair in PAIRS.into_iter().chain([Pair::Narrow]) {
        let name = pair.name();
        for index in 0..2 {
            add(format!("one_by_one/{name}/{index}"), Box::new(move || one_by_one(pair, index)));
            let of = format!("stopped/{name}/{index}");
            add(of, Box::new(move || stopped_and_left_behind(pair, index)));
        }
        add(format!("all_come/{name}"), Box::new(move || all_come(pair)));
    }
    for pair in PAIRS {
        let name = pair.name();
        for (how, destroy) in [("abort", false), ("destroy", true)] {
            add(format!("{how}/{name}"), Box::new(move || one_leaves(pair, destroy)));
        }
        add(format!("quarrel/{name}"), Box::new(move || after_a_quarrel(pair)));
        add(format!("fewer_take_part/{name}"), Box::new(move || fewer_take_part(pair)));
    }
    for (who, leader) in [("leader", true), ("follower", false)] {
        add(format!("dies_meanwhile/{who}"), Box::new(move || one_dies_in_a_recovery(leader)));
        add(format!("aborted_meanwhile/{who}"), Box::new(move || aborted_while_it_recovers(leader)));
    }
    add("does_not_come".into(), Box::new(one_does_not_come));
    add("alone".into(), Box::new(alone));
}
