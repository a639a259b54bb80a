//! What a kernel found, as a sentence.

use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use super::Cuda;
use super::params::Record;
use crate::device::Shape;
use crate::device::loss::{Void, Why, operation_name, result_word, why_gone};
use crate::device::order::State;
use crate::error::{Error, Status};

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
        let rank = self.rank;
        let lost: Vec<u32> =
            (0..self.ranks).filter(|rank| r.lost[(rank / 32) as usize] >> (rank % 32) & 1 == 1).collect();
        let why = match r.cause {
            1 => Why::Bound,
            2 => Why::Elsewhere { ahead: r.aux as i64 },
            3 => Why::GaveUp { origin: r.origin },
            4 => Why::Gone { whys: why_gone(r.detail).into_iter().collect() },
            5 => Why::Late { deadline: Duration::from_nanos(r.aux) },
            6 => Why::Word { name: Shape::name(r.detail as usize) },
            7 => Why::Word { name: result_word((r.detail as usize).min(2)).into() },
            8 => Why::Replay,
            9 => Why::Told,
            _ => {
                let state = match r.detail {
                    // 4: opened, which is idle once more.
                    0 | 4 => State::Idle,
                    1 => State::DispatchSent,
                    2 => State::Dispatched,
                    5 => State::Overflowed,
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
        let (sequence, operation) = (r.sequence, r.operation);
        Void { rank, slot, sequence, operation, status, lost, expected: r.expected, seen: r.seen, why }
            .error()
    }
}
