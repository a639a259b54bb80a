//! Who takes part: the survivors of a loss agree, put their windows into their first state, and go on.
//!
//! A step that was given up on may still be at work somewhere: a rank that stands still in the middle of it stores the
//! rest when it goes on. So nothing is used again before every rank that is lost is known to touch it no more, or
//! before it has been replaced by other memory at the same address.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::{Comm, lock};
use crate::config::{MAX_TIMEOUT_MS, TransportKind};
use crate::device::members::Members;
use crate::device::{Device, Membership, Standing};
use crate::error::{Error, Result, Status};
use crate::log::{Level, log};
use crate::transport::bootstrap::{Recovery, Regathered, regather};

/// What the survivors agreed on.
pub struct Recovered {
    pub generation: u64,
    pub members: Members,
    /// By slot: the last step that is whole on all of them.
    pub whole: Vec<u64>,
    /// The windows are other memory.
    pub replaced: bool,
}

/// What a comm keeps from one recovery to the next.
#[derive(Default)]
pub(super) struct Past {
    /// The last one failed.
    broken: bool,
    whole: Vec<u64>,
}

/// How long ranks that were given up on, but live, are waited for.
const PATIENCE_MS: u64 = 1000;

impl Comm {
    /// `timeout_ms`, `patience_ms`: 0 for the default.
    pub fn recover(&self, timeout_ms: i64, patience_ms: i64) -> Result<Recovered> {
        let (_call, device) = self.enter()?;
        let rank = self.config.rank;
        if self.plan.transport == TransportKind::Nccl {
            return Err(Error::unsupported(format!(
                "rank {rank}: transport nccl does not recover: destroy the comm and create one among the survivors"
            )));
        }
        if self.plan.transport == TransportKind::Nixl {
            return Err(Error::unsupported(format!(
                "rank {rank}: transport nixl does not recover in this build: destroy the comm and create one among the survivors"
            )));
        }
        let milliseconds = |name: &str, value: i64, default: u64| match value {
            0 => Ok(default),
            1..=MAX_TIMEOUT_MS => Ok(value as u64),
            _ => Err(self.invalid(format!("{name} is {value}, it must be from 0 to {MAX_TIMEOUT_MS}"))),
        };
        let timeout_ms = milliseconds("timeout_ms", timeout_ms, self.config.meeting.timeout_ms)?;
        let patience = Duration::from_millis(milliseconds("patience_ms", patience_ms, PATIENCE_MS)?);
        let mut past = lock(&self.past);
        // From here on until all is done no step may run.
        let text = format!("rank {rank}: the comm is between generations: a2a_recover has not succeeded");
        let standing = device.suspend(&Error::new(Status::PeerLost, text))?;
        past.whole.resize(standing.whole.len(), 0);
        let begun = Instant::now();
        loop {
            match self.meet(&device, &standing, &mut past, timeout_ms, patience) {
                // A survivor died meanwhile: all others know it, and meet again.
                Err(error)
                    if error.status == Status::PeerLost
                        && device.left_behind_by().is_none()
                        && begun.elapsed() < Duration::from_millis(timeout_ms) =>
                {
                    log(Level::Info, || format!("{error}; once more"));
                }
                outcome => return outcome,
            }
        }
    }

    /// One attempt at a recovery.
    fn meet(
        &self,
        device: &Arc<dyn Device>,
        standing: &Standing,
        past: &mut Past,
        timeout_ms: u64,
        patience: Duration,
    ) -> Result<Recovered> {
        let (rank, bytes, health) = (self.config.rank, self.plan.memory().window, self.health.clone());
        let recovery = Recovery {
            key: self.key,
            rank,
            num_ranks: self.config.num_ranks,
            device,
            standing: standing.clone(),
            intact: !past.broken,
            former: &past.whole,
            patience,
            timeout_ms,
            is_aborted: Arc::new(move || health.is_aborted()),
        };
        let mut begun = false;
        let met = regather(recovery, &mut begun, || Ok(vec![self.windows.renew(rank, bytes)?]));
        // What fails once something was agreed leaves windows of which nobody knows what they are.
        past.broken |= begun;
        let recovered = self.go_on(device, met?)?;
        *past = Past { broken: false, whole: recovered.whole.clone() };
        Ok(recovered)
    }

    /// This rank's part of what was agreed.
    fn go_on(&self, device: &Arc<dyn Device>, mut met: Regathered) -> Result<Recovered> {
        let Membership { generation, members } = met.membership;
        let lost = device.membership().members.without(&members);
        lost.iter().for_each(|lost| device.leave_behind(lost));
        let fds = met.fds.take();
        let replaced = fds.is_some();
        let whole = std::mem::take(&mut met.whole);
        let (rank, bytes) = (self.config.rank, self.plan.memory().window);
        let holds = lost.iter().find(|lost| device.shares_mappings(*lost));
        let replaced_windows = match (holds, fds) {
            (Some(lost), _) => Err(Error::unsupported(format!(
                "rank {rank}: rank {lost} is a thread of the same process, takes no part and has not destroyed its comm: \
                 destroy it first"
            ))),
            (None, Some(fds)) => self.windows.replace((rank, bytes, generation), &members, &lost, fds),
            (None, None) => Ok(()),
        };
        let built = replaced_windows.and_then(|()| device.clone().recovered(met.membership));
        let next = match built {
            Ok(next) => {
                met.finish(Ok(()))?;
                next
            }
            Err(error) => {
                // The others are told; their answer changes nothing about our own reason.
                let _ = met.finish(Err(error.clone()));
                return Err(error);
            }
        };
        *self.device.write().unwrap_or_else(|e| e.into_inner()) = Some(next);
        log(Level::Info, || {
            format!("rank {}: generation {generation}, {} ranks take part", self.config.rank, members.len())
        });
        Ok(Recovered { generation, members, whole, replaced })
    }

    /// By rank: whether it takes part and, as far as this rank knows, lives.
    pub fn rank_mask(&self) -> Result<Vec<bool>> {
        let device = self.device()?;
        let members = device.membership().members;
        let is_there =
            |rank: u32| members.contains(rank) && (rank == self.config.rank || !device.has_left(rank));
        Ok((0..self.config.num_ranks).map(is_there).collect())
    }
}
