//! Steps in which all goes well: who has seen a flag sees what it speaks of, and nobody overwrites what another still
//! reads.

use loom::thread::{spawn, yield_now};

use crate::atomic::Forgets;
use crate::explore::{RACE, breaks, explore};
use crate::mail;
use crate::protocol::Flag;
use crate::rank::{GONE, ORDERS, Rank, SOUND, group, join, signal};

/// The last epoch before the wrap: every model of two steps crosses it.
const LAST: u32 = u32::MAX;

/// Two ranks that do the same, in windows whose first epoch is the last before the wrap.
fn both(weak: (u64, Forgets), each: impl Fn(&Rank) + Copy + Send + 'static) {
    let [first, second] = group(LAST, weak);
    let thread = spawn(move || each(&second));
    each(&first);
    join([thread]);
}

/// Three ranks, of which a model lets those act that matter: with all in one step the orders are too many.
fn three(weak: (u64, Forgets)) -> [Rank; 3] {
    group(LAST, weak)
}

/// A row that says whose it is, and of which step.
fn row(rank: u32, epoch: u32) -> u32 {
    epoch.wrapping_mul(16).wrapping_add(rank)
}

/// Rows to every rank, then the flag, and with it a count, a word of the shape and the tokens.
fn send(rank: &Rank, epoch: u32) {
    let me = rank.end.rank;
    rank.peers().for_each(|peer| rank.put(peer, row(me, epoch)));
    rank.end.raise(&signal(Flag::Dispatch, epoch), |peer| {
        let number = row(me, epoch);
        rank.end.tell(peer, mail::DISPATCH_SHAPE, !number);
        rank.end.tell(peer, mail::TOKENS, number);
        number
    });
}

/// Reads what every rank sent, by right of its flag.
fn receive(rank: &Rank, epoch: u32) {
    for source in rank.peers() {
        assert_eq!(rank.row(source), row(source, epoch), "a row");
        let words = [mail::DISPATCH_SHAPE, mail::TOKENS].map(|word| rank.end.told(source, word));
        let number = row(source, epoch);
        assert_eq!(words, [!number, number], "words beside a flag");
        assert_eq!(rank.end.flag(source, Flag::Dispatch) as u32, number, "the number in a flag");
    }
}

fn dispatch(rank: &Rank, epoch: u32) {
    send(rank, epoch);
    rank.await_flags(Flag::Dispatch, epoch);
    receive(rank, epoch);
}

fn one_dispatch(weak: (u64, Forgets)) {
    both(weak, |rank| dispatch(rank, LAST));
}

#[test]
fn who_has_seen_a_flag_sees_its_rows() {
    explore("a dispatch, 2 ranks", || one_dispatch(SOUND));
    explore("a dispatch to one of 3 ranks", || {
        // Two send; the third has sent and receives.
        let [receiver, a, b] = three(SOUND);
        send(&receiver, LAST);
        let senders = [a, b].map(|rank| spawn(move || send(&rank, LAST)));
        receiver.await_flags(Flag::Dispatch, LAST);
        receive(&receiver, LAST);
        join(senders);
    });
    for forgets in ORDERS {
        breaks("a dispatch flag without order", RACE, move || one_dispatch((mail::DISPATCH_FLAG, forgets)));
    }
    breaks("rows behind their flag", RACE, || {
        both(SOUND, |rank| {
            rank.end.raise(&signal(Flag::Dispatch, LAST), |_| 0);
            rank.peers().for_each(|peer| rank.put(peer, 1));
            rank.await_flags(Flag::Dispatch, LAST);
            rank.peers().for_each(|source| assert_eq!(rank.row(source), 1));
        });
    });
    // The words of a new window are those of epoch 0, which a flag of the last epoch before it has passed.
    breaks("a window that was not reset", "a row", || {
        let [first, second] = group(1, SOUND);
        let thread = spawn(move || dispatch(&second, LAST));
        dispatch(&first, LAST);
        join([thread]);
    });
}

/// A dispatch, a flag by which every rank says that it has read it, and rows of the next one in their place.
fn dispatch_again(flag: Flag, weak: (u64, Forgets), waits: bool) {
    both(weak, move |rank| {
        dispatch(rank, LAST);
        rank.end.raise(&signal(flag, LAST), |_| 0);
        if waits {
            rank.await_flags(flag, LAST);
        }
        dispatch(rank, LAST.wrapping_add(1));
    });
}

/// Of three ranks, two read what all have dispatched and say so; the third, which has, dispatches again.
fn overwrite(flag: Flag, weak: (u64, Forgets), waits: bool) {
    let [writer, a, b] = three(weak);
    for rank in [&writer, &a, &b] {
        send(rank, LAST);
    }
    let readers = [a, b].map(|rank| {
        spawn(move || {
            rank.await_flags(Flag::Dispatch, LAST);
            receive(&rank, LAST);
            rank.end.raise(&signal(flag, LAST), |_| 0);
        })
    });
    receive(&writer, LAST);
    writer.end.raise(&signal(flag, LAST), |_| 0);
    if waits {
        writer.await_flags(flag, LAST);
    }
    send(&writer, LAST.wrapping_add(1));
    join(readers);
}

/// A combine's flag, or where no combine follows the flag that says so: with either, a slot needs no barrier.
#[test]
fn rows_are_overwritten_when_all_have_read_them() {
    for (flag, word) in [(Flag::Combine, mail::COMBINE_FLAG), (Flag::Read, mail::READ_FLAG)] {
        explore(&format!("dispatch, {flag:?}, dispatch: 2 ranks"), move || dispatch_again(flag, SOUND, true));
        explore(&format!("dispatch, {flag:?}, dispatch: 3 ranks"), move || overwrite(flag, SOUND, true));
        for forgets in ORDERS {
            let weak = (word, forgets);
            breaks("a flag without order, 2 ranks", RACE, move || dispatch_again(flag, weak, true));
            breaks("a flag without order, 3 ranks", RACE, move || overwrite(flag, weak, true));
        }
        breaks("a flag that is not waited for, 2 ranks", RACE, move || dispatch_again(flag, SOUND, false));
        breaks("a flag that is not waited for, 3 ranks", RACE, move || overwrite(flag, SOUND, false));
    }
}

/// Results in their owner's memory, which every rank reads when their flag has come: written again when every rank's
/// next dispatch flag has.
fn pull(weak: (u64, Forgets), waits: bool) {
    both(weak, move |rank| {
        let (me, next) = (rank.end.rank, LAST.wrapping_add(1));
        rank.put(me, row(me, LAST));
        rank.end.raise(&signal(Flag::Combine, LAST), |_| 0);
        rank.await_flags(Flag::Combine, LAST);
        rank.peers().for_each(|peer| assert_eq!(rank.row_of(peer, peer), row(peer, LAST)));
        rank.end.raise(&signal(Flag::Dispatch, next), |_| 0);
        if waits {
            rank.await_flags(Flag::Dispatch, next);
        }
        rank.put(me, row(me, next));
    });
}

#[test]
fn results_are_overwritten_when_all_have_pulled_them() {
    explore("results over results", || pull(SOUND, true));
    for word in [mail::DISPATCH_FLAG, mail::COMBINE_FLAG] {
        for forgets in ORDERS {
            breaks("a flag without order", RACE, move || pull((word, forgets), true));
        }
    }
    breaks("a dispatch that is not waited for", RACE, || pull(SOUND, false));
}

/// Three rows through a FIFO of one entry.
fn fifo(weak: (u64, Forgets), entries: u64) {
    both(weak, move |rank| {
        for number in 0..3 {
            match rank.end.rank {
                0 => {
                    while rank.end.credit(1, number, entries) == 0 {
                        yield_now();
                    }
                    rank.put(1, number as u32);
                    rank.end.tell_head(1, number + 1);
                }
                _ => {
                    while rank.end.head(0) <= number {
                        yield_now();
                    }
                    assert_eq!(rank.row(0), number as u32, "a row");
                    rank.end.tell_tail(0, number + 1);
                }
            }
        }
    });
}

#[test]
fn an_entry_of_a_fifo_is_written_when_it_is_free() {
    explore("a FIFO", || fifo(SOUND, 1));
    for word in [mail::FIFO_HEAD, mail::FIFO_TAIL] {
        for forgets in ORDERS {
            breaks("a FIFO's word without order", RACE, move || fifo((word, forgets), 1));
        }
    }
    breaks("a FIFO that is thought to be longer", RACE, || fifo(SOUND, 2));
}

/// One rank looks for trouble whenever it waits, while the other ends its step, begins the next and leaves.
fn watched(weak: (u64, Forgets)) {
    let [watchful, other] = group(LAST, weak);
    watchful.end.raise(&signal(Flag::Combine, LAST), |_| 0);
    let thread = spawn(move || {
        other.end.raise(&signal(Flag::Combine, LAST), |_| 0);
        other.end.raise(&signal(Flag::Dispatch, LAST.wrapping_add(1)), |_| 0);
        other.end.leave(false);
    });
    assert_eq!(watchful.wait(signal(Flag::Combine, LAST), None), Ok(()));
    join([thread]);
}

#[test]
fn nobody_finds_trouble_where_there_is_none() {
    explore("a step under suspicion", || watched(SOUND));
    for word in [mail::PROGRESS, GONE] {
        for forgets in ORDERS {
            breaks("a cause without order", "assertion", move || watched((word, forgets)));
        }
    }
}
