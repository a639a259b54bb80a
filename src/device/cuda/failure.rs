//! What a kernel found, as a sentence.

use std::sync::atomic::{AtomicU32, Ordering};

use super::Cuda;
use super::params::Record;
use crate::device::Shape;
use crate::device::loss::{list, operation_name, result_word};
use crate::device::order::State;
use crate::error::{Error, Loss, Status};

impl Cuda {
    /// A slot's loss, or (`order`) what its state did not allow.
    fn record(&self, slot: u32, order: bool) -> Option<Record> {
        let at = Self::record_offset(slot) + usize::from(order) * size_of::<Record>();
        // SAFETY: a record of the pinned memory; it is written before `valid` is, with release, and not afterwards.
        unsafe {
            let record: *const Record = self.pinned.as_ptr().add(at).cast();
            let valid: *const AtomicU32 = (&raw const (*record).valid).cast();
            ((*valid).load(Ordering::Acquire) == 1).then(|| record.read_volatile())
        }
    }

    /// Why a slot is closed.
    pub(super) fn loss_of(&self, slot: u32) -> Option<Error> {
        self.record(slot, false).map(|record| self.explain(slot, &record))
    }

    /// The first failure of any step.
    pub(super) fn first_failure(&self) -> Option<Error> {
        let all = (0..self.map.sizes.slots).flat_map(|slot| [(slot, false), (slot, true)]);
        all.filter_map(|(slot, order)| self.record(slot, order).map(|record| (slot, record)))
            .min_by_key(|(_, record)| record.order)
            .map(|(slot, record)| self.explain(slot, &record))
    }

    fn explain(&self, slot: u32, r: &Record) -> Error {
        let (rank, peer) = (self.rank, r.peer);
        let lost: Vec<u32> =
            (0..self.ranks).filter(|rank| r.lost[(rank / 32) as usize] >> (rank % 32) & 1 == 1).collect();
        let names = list(&lost);
        let what = match r.cause {
            1 => format!(
                "max_tokens (the step's bound) is {} on rank {rank} and {} on rank {peer}",
                r.expected, r.seen
            ),
            2 => format!(
                "rank {rank} is in {} of sequence {}, rank {peer} went to {} of sequence {} without it",
                operation_name(r.expected as u32),
                r.sequence,
                operation_name(r.seen as u32),
                (r.sequence as i64).wrapping_add(r.aux as i64)
            ),
            3 => format!("rank {} gave up on {names}", r.origin),
            4 => {
                let why = match r.detail {
                    1 => "destroyed its comm",
                    2 => "aborted",
                    _ => "its process ended",
                };
                let each: Vec<String> =
                    lost.iter().map(|peer| format!("rank {peer} is gone ({why})")).collect();
                each.join(", ")
            }
            5 => format!("{names} did not answer within {} ms", r.aux / 1_000_000),
            6 | 7 => {
                let name = match r.cause {
                    6 => Shape::name(r.detail as usize),
                    _ => result_word((r.detail as usize).min(2)).into(),
                };
                format!("{name} is {} on rank {rank} and {} on rank {peer}", r.expected, r.seen)
            }
            8 => format!(
                "A2A_DISPATCH_REUSE is {} on rank {rank} and {} on rank {peer} (1 set, 0 not)",
                r.expected, r.seen
            ),
            9 => format!(
                "rank {peer} dispatched {} tokens, rank {rank} was told {} (rank_tokens or UNIFORM)",
                r.seen, r.expected
            ),
            _ => {
                let state = match r.detail {
                    0 => State::Idle,
                    1 => State::DispatchSent,
                    2 => State::Dispatched,
                    _ => State::CombineSent,
                };
                return Error::invalid(format!(
                    "rank {rank}: {} on slot {slot}, after sequence {}, is out of order: the slot {}; it was left out",
                    operation_name(r.operation),
                    r.sequence,
                    state.describe()
                ));
            }
        };
        let status = Status::from_code(r.status as i32).unwrap_or(Status::Internal);
        let text = format!(
            "rank {rank}: {} on slot {slot}, sequence {}, is void: {what} (expected {}, seen {})",
            operation_name(r.operation),
            r.sequence,
            r.expected,
            r.seen
        );
        Error::new(status, text).with_loss(Loss {
            operation: r.operation as i32,
            slot,
            sequence: r.sequence,
            rank,
            peer,
            expected: r.expected,
            seen: r.seen,
            lost,
        })
    }
}
