//! The order of the halves of steps on a slot, as far as the host can know it: which half is due, and what is said of
//! one that is not.

use super::{Call, Half};
use crate::error::{Error, Result};

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(u32)]
pub enum State {
    #[default]
    Idle,
    DispatchSent,
    Dispatched,
    CombineSent,
    /// The dispatch was void on every rank because some would receive too many rows.
    Overflowed,
}

impl State {
    /// What a slot is after a half.
    pub fn after(half: Half) -> State {
        match half {
            Half::DispatchSend => State::DispatchSent,
            Half::DispatchRecv => State::Dispatched,
            Half::CombineSend => State::CombineSent,
            Half::CombineRecv => State::Idle,
        }
    }

    /// Refuses a half that is not due. `routing`: of the slot's current step.
    pub fn check(self, rank: u32, routing: u64, call: &Call, half: Half) -> Result<()> {
        let legal = match half {
            Half::DispatchSend => matches!(self, State::Idle | State::Dispatched | State::Overflowed),
            Half::DispatchRecv => self == State::DispatchSent,
            Half::CombineSend => self == State::Dispatched,
            Half::CombineRecv => self == State::CombineSent,
        };
        if !legal {
            return Err(self.refuse(rank, call, half, ""));
        }
        if half != Half::DispatchSend && routing != call.routing {
            return Err(self.refuse(rank, call, half, ", with another routing"));
        }
        Ok(())
    }

    /// What the slot did, and waits for.
    pub fn describe(self) -> &'static str {
        match self {
            State::Idle => "is idle and waits for dispatch SEND",
            State::DispatchSent => "has sent a dispatch and waits for its RECV",
            State::Dispatched => "has received a dispatch and waits for combine SEND (or another dispatch)",
            State::CombineSent => "has sent a combine and waits for its RECV",
            State::Overflowed => "has a dispatch that exceeded max_recv_rows and waits for another dispatch",
        }
    }

    fn refuse(self, rank: u32, call: &Call, half: Half, why: &str) -> Error {
        Error::invalid(format!(
            "rank {rank}: {} {} on slot {} is out of order: the slot {}{why}",
            half.operation(),
            match half {
                Half::DispatchSend | Half::CombineSend => "SEND",
                Half::DispatchRecv | Half::CombineRecv => "RECV",
            },
            call.slot,
            self.describe(),
        ))
    }
}
