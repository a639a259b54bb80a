//! Waits that end without their flags, and those that must not: losses, leaving, abort.

use loom::thread::spawn;

use crate::atomic::Forgets;
use crate::explore::{ENDLESS, Outcomes, breaks, explore};
use crate::mail;
use crate::protocol::{COMBINE, Flag, Trouble};
use crate::rank::{GONE, ORDERS, Rank, SOUND, VITALS, group, join, signal};

const EPOCH: u32 = u32::MAX;
const NEXT: u32 = 0;
const STATUS: u32 = 17;
/// By gone words' numbers.
const DESTROYED: u32 = 1;
const ABORTED: u32 = 2;
const ENDED: u32 = 3;
const FAILS: &str = "assertion";

fn raise(rank: &Rank, flag: Flag, epoch: u32) {
    rank.end.raise(&signal(flag, epoch), |_| 0);
}

fn wait(rank: &Rank, epoch: u32) -> Result<(), Trouble> {
    rank.wait(signal(Flag::Combine, epoch), None)
}

/// Rank 0 has given up on rank 2.
fn gave_up() -> Trouble {
    Trouble::GaveUp { observer: 0, status: STATUS, lost: vec![2], origin: 0 }
}

/// A rank gives up on one that never came; the third, which would wait for it without end, finds that.
fn found(weak: (u64, Forgets), told: bool) {
    let [observer, waiting, _late] = group(EPOCH, weak);
    raise(&waiting, Flag::Combine, EPOCH);
    let thread = spawn(move || {
        raise(&observer, Flag::Combine, EPOCH);
        assert_eq!(observer.wait(signal(Flag::Combine, EPOCH), Some(0)), Err(Trouble::Late(vec![2])));
        if told {
            observer.end.give_up(EPOCH, STATUS, &[2], 0);
        }
    });
    assert_eq!(wait(&waiting, EPOCH), Err(gave_up()));
    join([thread]);
}

#[test]
fn a_loss_is_found_by_the_others_in_that_step() {
    explore("a loss in the same step", || found(SOUND, true));
    for forgets in ORDERS {
        breaks("a loss word without order", FAILS, move || found((mail::LOSS, forgets), true));
    }
    breaks("a loss that nobody is told of", ENDLESS, || found(SOUND, false));
}

/// A rank that has an epoch's flags gives up in the next one, while another still waits in the first for a third.
fn earlier(lost_at: u32) {
    let [ahead, waiting, slow] = group(EPOCH, SOUND);
    raise(&waiting, Flag::Combine, EPOCH);
    raise(&ahead, Flag::Combine, EPOCH);
    let threads = [
        spawn(move || ahead.end.give_up(lost_at, STATUS, &[2], 0)),
        spawn(move || raise(&slow, Flag::Combine, EPOCH)),
    ];
    assert_eq!(wait(&waiting, EPOCH), Ok(()), "the step whose flags came");
    join(threads);
}

#[test]
fn a_loss_voids_no_earlier_step() {
    explore("a loss of a later step", || earlier(NEXT));
    breaks("a loss of the step itself", "the step whose flags came", || earlier(EPOCH));
}

/// A rank gives up on a third in a step that another has whole, and finds the loss in its next.
fn later(lost_at: u32) {
    let [observer, waiting, silent] = group(EPOCH, SOUND);
    for rank in [&observer, &waiting, &silent] {
        raise(rank, Flag::Combine, EPOCH);
    }
    let thread = spawn(move || observer.end.give_up(lost_at, STATUS, &[2], 0));
    assert_eq!(wait(&waiting, EPOCH), Ok(()));
    raise(&waiting, Flag::Combine, NEXT);
    assert_eq!(wait(&waiting, NEXT), Err(gave_up()));
    join([thread]);
}

#[test]
fn a_loss_is_found_in_a_later_step() {
    explore("a loss of an earlier step", || later(EPOCH));
    breaks("a loss of a step that nobody gets to", ENDLESS, || later(NEXT + 1));
    breaks("a loss of other members", ENDLESS, || {
        let [mut observer, waiting] = group(EPOCH, SOUND);
        raise(&waiting, Flag::Combine, EPOCH);
        observer.end.generation += 1;
        observer.end.give_up(EPOCH, STATUS, &[1], 0);
        assert_eq!(wait(&waiting, EPOCH), Ok(()));
    });
}

/// A flag comes just when one rank's deadline passes: whoever has all flags keeps the step, whoever has not finds the
/// loss.
fn contested(outcomes: &Outcomes, weak: (u64, Forgets)) {
    let [impatient, waiting, slow] = group(EPOCH, weak);
    raise(&impatient, Flag::Combine, EPOCH);
    raise(&waiting, Flag::Combine, EPOCH);
    let threads = [
        spawn(move || {
            // The deadline, as it passes between any two steps of the others.
            if !impatient.end.all_have_come(Flag::Combine, EPOCH) {
                impatient.end.give_up(EPOCH, STATUS, &[2], 0);
            }
        }),
        spawn(move || raise(&slow, Flag::Combine, EPOCH)),
    ];
    match wait(&waiting, EPOCH) {
        Ok(()) => outcomes.met(0),
        Err(trouble) => {
            assert_eq!(trouble, gave_up());
            outcomes.met(1);
        }
    }
    join(threads);
}

#[test]
fn a_flag_that_comes_with_the_deadline_leaves_one_of_two_ends() {
    let outcomes = Outcomes::default();
    let met = outcomes.clone();
    explore("a flag at the deadline", move || contested(&met, SOUND));
    outcomes.assert_all(2);
    for forgets in ORDERS {
        let met = Outcomes::default();
        breaks("a loss word without order", FAILS, move || contested(&met, (mail::LOSS, forgets)));
    }
}

/// How a rank goes.
#[derive(Clone, Copy, Debug)]
enum Goes {
    Destroys,
    Aborts,
    Dies,
}

/// A rank goes, after its flag or before. The waiting one must, without a deadline, have the step or know why not.
fn goes(how: Goes, flag_first: bool, weak: (u64, Forgets)) {
    let [waiting, leaving] = group(EPOCH, weak);
    raise(&waiting, Flag::Combine, EPOCH);
    // The watchdog sees the end of a process that was, and so after all that the process did.
    let watchdog = waiting.again();
    let thread = spawn(move || {
        if flag_first {
            raise(&leaving, Flag::Combine, EPOCH);
        }
        match how {
            Goes::Destroys => leaving.end.leave(false),
            Goes::Aborts => {
                leaving.end.leave(true);
                leaving.end.leave(false);
            }
            Goes::Dies => assert!(watchdog.vitals.died(1)),
        }
    });
    let reason = match how {
        Goes::Destroys => DESTROYED,
        Goes::Aborts => ABORTED,
        Goes::Dies => ENDED,
    };
    let expected = if flag_first { Ok(()) } else { Err(Trouble::Gone(vec![(1, reason)])) };
    assert_eq!(wait(&waiting, EPOCH), expected);
    join([thread]);
}

#[test]
fn a_rank_that_goes_after_its_flag_is_not_lost() {
    for (how, word) in [(Goes::Destroys, GONE), (Goes::Aborts, GONE), (Goes::Dies, VITALS)] {
        explore(&format!("a rank that {how:?} after its flag"), move || goes(how, true, SOUND));
        for forgets in ORDERS {
            breaks("a cause without order", FAILS, move || goes(how, true, (word, forgets)));
        }
    }
}

#[test]
fn a_rank_that_goes_without_its_flag_is_lost() {
    for how in [Goes::Destroys, Goes::Aborts, Goes::Dies] {
        explore(&format!("a rank that {how:?} without its flag"), move || goes(how, false, SOUND));
    }
    breaks("an abort that a destroy overwrites", FAILS, || {
        let [waiting, leaving] = group(EPOCH, SOUND);
        raise(&waiting, Flag::Combine, EPOCH);
        let thread = spawn(move || {
            leaving.end.leave(false);
            leaving.end.leave(true);
        });
        assert_eq!(wait(&waiting, EPOCH), Err(Trouble::Gone(vec![(1, ABORTED)])));
        join([thread]);
    });
}

/// A rank dies, one of the others hears of it from its watchdog, the third from either.
#[test]
fn a_death_is_known_to_all() {
    let outcomes = Outcomes::default();
    let met = outcomes.clone();
    explore("a death that two ranks hear of", move || {
        let [first, second, _dead] = group(EPOCH, SOUND);
        raise(&first, Flag::Combine, EPOCH);
        raise(&second, Flag::Combine, EPOCH);
        let watchdog = second.again();
        let threads = [
            spawn(move || {
                assert!(first.vitals.died(2));
                assert_eq!(wait(&first, EPOCH), Err(Trouble::Gone(vec![(2, ENDED)])));
                first.end.give_up(EPOCH, STATUS, &[2], 0);
            }),
            spawn(move || assert!(watchdog.vitals.died(2))),
        ];
        match wait(&second, EPOCH).expect_err("a rank is dead") {
            Trouble::Gone(gone) => {
                assert_eq!(gone, [(2, ENDED)]);
                met.met(0);
            }
            trouble => {
                assert_eq!(trouble, gave_up());
                met.met(1);
            }
        }
        join(threads);
    });
    outcomes.assert_all(2);
}

/// Another thread of the rank aborts while it waits.
fn abort(aborts: bool) {
    let [waiting, _peer] = group(EPOCH, SOUND);
    raise(&waiting, Flag::Combine, EPOCH);
    let other = waiting.again();
    let thread = spawn(move || {
        if aborts {
            other.vitals.abort();
        }
        // Its own gone word, which stands in its window as in all, ends no wait of its own.
        other.end.leave(true);
    });
    assert_eq!(wait(&waiting, EPOCH), Err(Trouble::Aborted));
    join([thread]);
}

#[test]
fn an_abort_ends_a_wait() {
    explore("an abort", || abort(true));
    breaks("an abort that is not told", ENDLESS, || abort(false));
}

/// How a rank that is at something else goes on.
#[derive(Clone, Copy, Debug)]
enum Then {
    GivesUp,
    Leaves,
}

/// A rank is at a combine while the other is at a dispatch, and finds that first.
fn disagree(then: Then, weak: (u64, Forgets)) {
    let [waiting, other] = group(EPOCH, weak);
    raise(&waiting, Flag::Dispatch, EPOCH);
    let thread = spawn(move || {
        raise(&other, Flag::Combine, EPOCH);
        match then {
            Then::GivesUp => other.end.give_up(EPOCH, STATUS, &[0], 1),
            Then::Leaves => other.end.leave(false),
        }
    });
    let ending = waiting.wait(signal(Flag::Dispatch, EPOCH), None);
    assert_eq!(ending, Err(Trouble::Elsewhere { peer: 1, operation: COMBINE, ahead: 0 }));
    join([thread]);
}

#[test]
fn each_side_of_a_disagreement_says_it() {
    for (then, word) in [(Then::GivesUp, mail::LOSS), (Then::Leaves, GONE)] {
        explore(&format!("a rank at another operation {then:?}"), move || disagree(then, SOUND));
        for forgets in ORDERS {
            breaks("a cause without order", FAILS, move || disagree(then, (word, forgets)));
        }
    }
}
