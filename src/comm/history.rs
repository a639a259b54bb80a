//! The flight recorder: a comm's last operations, for any thread to read at any time, also while a call hangs.
//!
//! Memory is taken once. The call in flight writes, one at a time (`Comm::in_call`), and waits for nobody: an entry's stamp
//! is odd while it is being written (a seqlock), and who reads one that changes reads it again, or leaves it out.

use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};
use std::sync::atomic::{AtomicU64, fence};
use std::time::Instant;

use serde_json::{Value, json};

use crate::device::Call;
use crate::error::Status;

/// Operations that are remembered.
const KEPT: usize = 256;
/// Operations that stand behind the sentence of a failure, if there is room.
const TOLD: usize = 4;

/// What a call is: an operation, and which of its halves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct What {
    pub combine: bool,
    pub sends: bool,
    pub receives: bool,
}

impl What {
    fn operation(self) -> &'static str {
        if self.combine { "combine" } else { "dispatch" }
    }
    fn half(self) -> &'static str {
        match (self.sends, self.receives) {
            (true, true) => "BOTH",
            (true, false) => "SEND",
            _ => "RECV",
        }
    }
}

/// How a call ended, if it has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    InFlight,
    /// The work is on the stream, or in a graph: what became of it is the device's to say.
    Enqueued,
    Done(Status),
}

impl Outcome {
    const IN_FLIGHT: u64 = 0xff;
    const ENQUEUED: u64 = 0xfe;

    fn word(self) -> u64 {
        match self {
            Outcome::InFlight => Outcome::IN_FLIGHT,
            Outcome::Enqueued => Outcome::ENQUEUED,
            Outcome::Done(status) => status as u64,
        }
    }
    fn of_word(word: u64) -> Outcome {
        match word {
            Outcome::IN_FLIGHT => Outcome::InFlight,
            Outcome::ENQUEUED => Outcome::Enqueued,
            code => Outcome::Done(Status::from_code(code as i32).unwrap_or(Status::Internal)),
        }
    }
    fn name(self) -> &'static str {
        match self {
            Outcome::InFlight => "in flight",
            Outcome::Enqueued => "enqueued",
            Outcome::Done(status) => status.name().to_str().unwrap_or_default(),
        }
    }
}

/// One operation. Times are microseconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Record {
    /// From 1.
    number: u64,
    /// Since the comm was created.
    begun: u64,
    /// 0 while it is in flight.
    took: u64,
    slot: u32,
    tokens: u32,
    /// Steps opened on the slot, this one included once it has begun, if the host knows.
    sequence: Option<u64>,
    routing: u64,
    what: What,
    outcome: Outcome,
}

const WORDS: usize = 7;
/// Words that change while an operation is in flight.
const TOOK: usize = 2;
const SEQUENCE: usize = 4;
const KIND: usize = 6;

fn kind(what: What, outcome: Outcome) -> u64 {
    let bits = [what.combine, what.sends, what.receives];
    bits.iter().enumerate().fold(outcome.word(), |word, (bit, is)| word | (*is as u64) << (8 + bit))
}

impl Record {
    fn words(&self) -> [u64; WORDS] {
        let Record { number, begun, took, slot, tokens, sequence, routing, what, outcome } = *self;
        let place = (slot as u64) << 32 | tokens as u64;
        [number, begun, took, place, sequence.unwrap_or(u64::MAX), routing, kind(what, outcome)]
    }
    fn of_words([number, begun, took, place, sequence, routing, kind]: [u64; WORDS]) -> Record {
        let bit = |bit: u32| kind >> (8 + bit) & 1 == 1;
        Record {
            number,
            begun,
            took,
            slot: (place >> 32) as u32,
            tokens: place as u32,
            sequence: (sequence != u64::MAX).then_some(sequence),
            routing,
            what: What { combine: bit(0), sends: bit(1), receives: bit(2) },
            outcome: Outcome::of_word(kind & 0xff),
        }
    }

    /// `now`: since the comm was created.
    fn took_until(&self, now: u64) -> u64 {
        if self.outcome == Outcome::InFlight { now.saturating_sub(self.begun) } else { self.took }
    }

    fn json(&self, now: u64) -> Value {
        json!({
            "number": self.number,
            "begun_us": self.begun,
            "took_us": self.took_until(now),
            "operation": self.what.operation(),
            "half": self.what.half(),
            "slot": self.slot,
            "sequence": self.sequence,
            "routing": self.routing,
            "tokens": self.tokens,
            "outcome": self.outcome.name(),
        })
    }

    /// "#41 dispatch RECV slot 0 timeout after 2000 ms"
    fn brief(&self, now: u64) -> String {
        let Record { number, slot, what, outcome, .. } = self;
        let took = self.took_until(now) / 1000;
        let outcome = match outcome {
            Outcome::InFlight => format!("in flight for {took} ms"),
            Outcome::Enqueued => "enqueued".into(),
            Outcome::Done(Status::Success) => "ok".into(),
            Outcome::Done(_) => {
                let name = outcome.name().trim_start_matches("A2A_").to_lowercase().replace('_', " ");
                format!("{name} after {took} ms")
            }
        };
        format!("#{number} {} {} slot {slot} {outcome}", what.operation(), what.half())
    }
}

/// A record's place, a cache line.
#[derive(Default)]
#[repr(align(64))]
struct Entry {
    stamp: AtomicU64,
    words: [AtomicU64; WORDS],
}

impl Entry {
    /// By the one that writes.
    fn write(&self, store: impl FnOnce(&[AtomicU64; WORDS])) {
        let stamp = self.stamp.load(Relaxed);
        self.stamp.store(stamp.wrapping_add(1), Relaxed);
        // Who sees a new word sees the odd stamp.
        fence(Release);
        store(&self.words);
        self.stamp.store(stamp.wrapping_add(2), Release);
    }

    /// Gives up on an entry that never holds still: its writer was stopped in the middle, or goes round and round.
    fn read(&self) -> Option<Record> {
        (0..1000).find_map(|_| {
            let stamp = self.stamp.load(Acquire);
            let words = std::array::from_fn(|i| self.words[i].load(Relaxed));
            fence(Acquire);
            (stamp.is_multiple_of(2) && self.stamp.load(Relaxed) == stamp).then(|| Record::of_words(words))
        })
    }
}

pub(super) struct History {
    created: Instant,
    /// The number of the last operation; 0: none.
    last: AtomicU64,
    entries: Box<[Entry]>,
    /// Steps opened, by slot.
    opened: Box<[AtomicU64]>,
}

impl History {
    pub fn new(slots: u32) -> History {
        History {
            created: Instant::now(),
            last: AtomicU64::new(0),
            entries: (0..KEPT).map(|_| Entry::default()).collect(),
            opened: (0..slots).map(|_| AtomicU64::new(0)).collect(),
        }
    }

    /// Microseconds since the comm was created.
    pub fn age(&self) -> u64 {
        self.created.elapsed().as_micros() as u64
    }

    fn entry(&self, number: u64) -> &Entry {
        &self.entries[(number % KEPT as u64) as usize]
    }

    /// Steps opened on a slot. `seen`: the host sees them all.
    fn sequence(&self, slot: u32, seen: bool) -> Option<u64> {
        self.opened.get(slot as usize).filter(|_| seen).map(|opened| opened.load(Relaxed))
    }

    /// The call in flight begins an operation.
    pub fn begin(&self, call: &Call, what: What, tokens: u32, seen: bool) -> Operation<'_> {
        let number = self.last.load(Relaxed) + 1;
        let record = Record {
            number,
            begun: call.started.saturating_duration_since(self.created).as_micros() as u64,
            took: 0,
            slot: call.slot,
            tokens,
            sequence: self.sequence(call.slot, seen),
            routing: call.routing,
            what,
            outcome: Outcome::InFlight,
        };
        self.entry(number).write(|words| {
            for (word, value) in words.iter().zip(record.words()) {
                word.store(value, Relaxed);
            }
        });
        self.last.store(number, Release);
        let outcome = Outcome::Done(Status::Internal);
        Operation { history: self, number, what, started: call.started, outcome }
    }

    /// The operation in flight has begun a step on the slot.
    pub fn opened(&self, slot: u32, seen: bool) {
        self.opened[slot as usize].fetch_add(1, Relaxed);
        let sequence = self.sequence(slot, seen).unwrap_or(u64::MAX);
        self.entry(self.last.load(Relaxed)).write(|words| words[SEQUENCE].store(sequence, Relaxed));
    }

    /// The last operations, oldest first.
    fn records(&self) -> impl DoubleEndedIterator<Item = Record> {
        let last = self.last.load(Acquire);
        let first = last.saturating_sub(KEPT as u64) + 1;
        // An entry that has gone to a newer operation meanwhile is not what is asked for.
        (first..=last).filter_map(|number| self.entry(number).read().filter(|record| record.number == number))
    }

    /// The last operations as JSON, oldest first.
    pub fn operations(&self) -> Vec<Value> {
        let now = self.age();
        self.records().map(|record| record.json(now)).collect()
    }

    /// "; last: ..., ...": the last few operations, newest first, as many as `room` bytes hold whole.
    pub fn tail(&self, room: usize) -> String {
        let now = self.age();
        let mut text = String::new();
        for record in self.records().rev().take(TOLD) {
            let brief = record.brief(now);
            let joint = if text.is_empty() { "; last: " } else { ", " };
            if text.len() + joint.len() + brief.len() > room {
                break;
            }
            text += joint;
            text += &brief;
        }
        text
    }
}

/// An operation in flight. Ends on drop, as a defect unless `end` was told better: a panic went through it.
pub(super) struct Operation<'a> {
    history: &'a History,
    number: u64,
    what: What,
    started: Instant,
    outcome: Outcome,
}

impl Operation<'_> {
    pub fn end(mut self, outcome: Outcome) {
        self.outcome = outcome;
    }
}

impl Drop for Operation<'_> {
    fn drop(&mut self) {
        let took = self.started.elapsed().as_micros() as u64;
        self.history.entry(self.number).write(|words| {
            words[TOOK].store(took, Relaxed);
            words[KIND].store(kind(self.what, self.outcome), Relaxed);
        });
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicBool;
    use std::time::Duration;

    use super::*;
    use crate::device::Stream;

    const DISPATCH: What = What { combine: false, sends: true, receives: true };
    const COMBINE_RECV: What = What { combine: true, sends: false, receives: true };

    fn call(slot: u32, routing: u64) -> Call {
        Call {
            slot,
            stream: Stream::none(),
            host_waits: false,
            max_sms: 0,
            routing,
            started: Instant::now(),
            budget: Duration::ZERO,
        }
    }

    #[test]
    fn a_record_is_what_was_written() {
        for status in Status::ALL.map(Outcome::Done).into_iter().chain([Outcome::InFlight, Outcome::Enqueued])
        {
            for bits in 0..8 {
                let record = Record {
                    number: 1 << 40,
                    begun: 2 << 40,
                    took: 3 << 40,
                    slot: u32::MAX,
                    tokens: u32::MAX - 1,
                    sequence: (bits % 2 == 0).then_some(4 << 40),
                    routing: 5 << 40,
                    what: What { combine: bits & 1 > 0, sends: bits & 2 > 0, receives: bits & 4 > 0 },
                    outcome: status,
                };
                assert_eq!(Record::of_words(record.words()), record);
            }
        }
    }

    #[test]
    fn the_last_operations_stay() {
        let history = History::new(2);
        for number in 1..=300 {
            let operation = history.begin(&call(1, number + 7), DISPATCH, number as u32, true);
            history.opened(1, true);
            operation.end(Outcome::Done(Status::Success));
        }
        let records: Vec<Record> = history.records().collect();
        assert_eq!(records.len(), KEPT);
        for (number, record) in (45..=300).zip(records) {
            assert_eq!((record.number, record.routing), (number, number + 7));
            assert_eq!((record.slot, record.tokens, record.sequence), (1, number as u32, Some(number)));
            assert_eq!((record.what, record.outcome), (DISPATCH, Outcome::Done(Status::Success)));
        }
    }

    #[test]
    fn an_operation_shows_while_it_is_in_flight_and_afterwards() {
        let history = History::new(1);
        let last = || history.operations().pop().unwrap();
        let operation = history.begin(&call(0, 1), DISPATCH, 5, true);
        assert_eq!((&last()["outcome"], &last()["sequence"]), (&json!("in flight"), &json!(0)));
        history.opened(0, true);
        assert_eq!((&last()["outcome"], &last()["sequence"]), (&json!("in flight"), &json!(1)));
        std::thread::sleep(Duration::from_millis(2));
        let so_far = last()["took_us"].as_u64().unwrap();
        operation.end(Outcome::Done(Status::Timeout));
        assert_eq!((&last()["outcome"], &last()["half"]), (&json!("A2A_TIMEOUT"), &json!("BOTH")));
        assert!(so_far >= 2000 && last()["took_us"].as_u64().unwrap() >= so_far);
        // A panic on its way out.
        drop(history.begin(&call(0, 1), COMBINE_RECV, 5, true));
        assert_eq!((&last()["outcome"], &last()["operation"]), (&json!("A2A_INTERNAL"), &json!("combine")));
    }

    #[test]
    fn a_step_that_the_host_may_not_have_seen_has_no_sequence() {
        let history = History::new(1);
        history.begin(&call(0, 1), DISPATCH, 5, true).end(Outcome::Enqueued);
        let operation = history.begin(&call(0, 1), DISPATCH, 5, false);
        history.opened(0, false);
        operation.end(Outcome::Enqueued);
        // A routing of another comm, whose slot is none of this one's.
        history.begin(&call(9, 1), DISPATCH, 5, true).end(Outcome::Done(Status::InvalidArgument));
        let sequences: Vec<Option<u64>> = history.records().map(|record| record.sequence).collect();
        assert_eq!(sequences, [Some(0), None, None]);
    }

    #[test]
    fn the_tail_has_whole_operations_newest_first() {
        let history = History::new(1);
        assert_eq!(history.tail(500), "");
        history.begin(&call(0, 1), DISPATCH, 5, true).end(Outcome::Done(Status::Success));
        history.begin(&call(0, 1), COMBINE_RECV, 5, true).end(Outcome::Done(Status::PeerLost));
        let whole = "; last: #2 combine RECV slot 0 peer lost after 0 ms, #1 dispatch BOTH slot 0 ok";
        assert_eq!(history.tail(500), whole);
        assert_eq!(history.tail(whole.len()), whole);
        assert_eq!(history.tail(whole.len() - 1), "; last: #2 combine RECV slot 0 peer lost after 0 ms");
        assert_eq!(history.tail(20), "");
        for _ in 0..10 {
            history.begin(&call(0, 1), DISPATCH, 5, true).end(Outcome::Enqueued);
        }
        assert_eq!(history.tail(500).matches('#').count(), TOLD);
    }

    #[test]
    fn the_longest_history_is_as_long_as_the_header_says() {
        let what = What { receives: false, ..DISPATCH };
        let outcome = Outcome::Done(Status::InvalidArgument);
        let (most, sequence) = (u64::MAX, Some(u64::MAX - 1));
        let (number, begun, took, routing) = (most, most, most, most);
        let (slot, tokens) = (u32::MAX, u32::MAX);
        let record = Record { number, begun, took, slot, tokens, sequence, routing, what, outcome };
        let records = KEPT * (record.json(most).to_string().len() + ",".len());
        // Of each rank why it is gone, and its number in two lists.
        let ranks = 1024 * ("rank 1023 is gone (its process ended), ".len() + 2 * "1023,".len());
        let rest = 1024;
        assert!(records + ranks + rest <= 128 << 10, "{records} + {ranks} + {rest}");
    }

    /// Every word of a record follows from its number: a reader that sees two records mixed would notice.
    #[test]
    fn who_reads_beside_a_writer_sees_whole_records() {
        /// Also when an assertion fails: the writer must not go on for ever.
        struct Stop<'a>(&'a AtomicBool);
        impl Drop for Stop<'_> {
            fn drop(&mut self) {
                self.0.store(true, Relaxed);
            }
        }
        let history = History::new(1);
        let stop = AtomicBool::new(false);
        let started = Instant::now();
        let (read, written) = std::thread::scope(|scope| {
            scope.spawn(|| {
                let mut number = 0u64;
                while !stop.load(Relaxed) {
                    number += 1;
                    let what = What { combine: number.is_multiple_of(2), ..DISPATCH };
                    let call = Call { started, ..call(number as u32 & 0xff, !number) };
                    history.begin(&call, what, number as u32, true).end(Outcome::Enqueued);
                }
            });
            let _stop = Stop(&stop);
            let whole = |record: &Record| {
                let number = record.number;
                assert_eq!((record.slot, record.tokens), (number as u32 & 0xff, number as u32));
                assert_eq!((record.routing, record.what.combine), (!number, number.is_multiple_of(2)));
            };
            let mut read = 0;
            // Until both have had their turns, often: the two may share a core.
            let limit = Instant::now() + Duration::from_secs(20);
            while (read < 200_000 || history.last.load(Relaxed) < 200_000) && Instant::now() < limit {
                let mut before = 0;
                for record in history.records() {
                    assert!(record.number > before);
                    before = record.number;
                    whole(&record);
                }
                // Where the writer is at work.
                let next = |_| history.entry(history.last.load(Relaxed) + 1).read();
                let beside = (0..1000).filter_map(next).filter(|record| record.number > 0);
                read += beside.inspect(whole).count();
            }
            (read, history.last.load(Relaxed))
        });
        assert!(read >= 200_000 && written >= 200_000, "{read} read, {written} written");
    }
}
