//! Who takes part: the survivors of a loss agree, put their windows into their first state, and go on. Where couriers carry rows,
//! ranks also come, and leave: who is connected and who takes part are two things, so that connecting disturbs no step.
//!
//! A step that was given up on may still be at work somewhere: a rank that stands still in the middle of it stores the
//! rest when it goes on. So nothing is used again before every rank that is lost is known to touch it no more, or
//! before it has been replaced by other memory at the same address.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::{Comm, lock};
use crate::config::{DeviceKind, MAX_TIMEOUT_MS, TransportKind};
use crate::device::members::Members;
use crate::device::{Device, Membership, Standing};
use crate::error::{Error, Result, Status};
use crate::log::{Level, log};
use crate::transport::bootstrap::{Recovery, Regathered, regather};
use crate::transport::nixl::Mesh;

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

/// Of the generation of a rank that masks all others.
const ALONE: u64 = 1 << 63;

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
        self.reform(&device, Members::none(), timeout_ms, patience)
    }

    /// Goes on among those that come. `without`: ranks that are given up on, beside those of lost steps.
    fn reform(
        &self,
        device: &Arc<dyn Device>,
        without: Members,
        timeout_ms: u64,
        patience: Duration,
    ) -> Result<Recovered> {
        let rank = self.config.rank;
        let mut past = lock(&self.past);
        // From here on until all is done no step may run.
        let text = format!("rank {rank}: the comm is between generations: a2a_recover has not succeeded");
        let mut standing = device.suspend(&Error::new(Status::PeerLost, text))?;
        without.iter().for_each(|rank| standing.given_up.insert(rank));
        past.whole.resize(standing.whole.len(), 0);
        let begun = Instant::now();
        loop {
            match self.meet(device, &standing, &mut past, timeout_ms, patience) {
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

    // Where ranks come and go.

    fn mesh(&self) -> Result<Arc<Mesh>> {
        let mesh = self.mesh.read().unwrap_or_else(|e| e.into_inner()).clone();
        mesh.ok_or_else(|| {
            let (rank, backend) = (self.config.rank, self.plan.backend.name());
            match self.plan.transport {
                TransportKind::Nixl => self.invalid("the comm was destroyed"),
                _ => Error::unsupported(format!(
                    "rank {rank}: backend {backend} has the ranks that it was created with, or fewer: nixl_elastic (6) takes others in"
                )),
            }
        })
    }

    /// Ranks of a caller's list, ascending.
    fn check_ranks(&self, ranks: &[i32]) -> Result<Vec<u32>> {
        let most = self.config.num_ranks;
        let mut all = Vec::with_capacity(ranks.len());
        for (at, rank) in ranks.iter().enumerate() {
            match u32::try_from(*rank).ok().filter(|rank| *rank < most) {
                Some(rank) if !all.contains(&rank) => all.push(rank),
                Some(rank) => {
                    return Err(self.invalid(format!("ranks[{at}] is {rank}, which was named before")));
                }
                None => {
                    return Err(
                        self.invalid(format!("ranks[{at}] is {rank}, it must be from 0 to {}", most - 1))
                    );
                }
            }
        }
        all.sort_unstable();
        Ok(all)
    }

    fn deadline(&self, timeout_ms: i64) -> Result<Instant> {
        let timeout_ms = match timeout_ms {
            0 => self.config.meeting.timeout_ms,
            1..=MAX_TIMEOUT_MS => timeout_ms as u64,
            _ => {
                return Err(self
                    .invalid(format!("timeout_ms is {timeout_ms}, it must be from 0 to {MAX_TIMEOUT_MS}")));
            }
        };
        Ok(Instant::now() + Duration::from_millis(timeout_ms))
    }

    /// What ends a wait for ranks, beside its deadline.
    fn is_in_use(&self) -> Result<()> {
        match lock(&self.failure).clone() {
            Some(error) => Err(error),
            None if self.health.is_aborted() => Err(self.invalid("the comm was destroyed")),
            None => Ok(()),
        }
    }

    /// Beside calls that are in flight.
    pub fn connect_ranks(&self, ranks: &[i32], timeout_ms: i64) -> Result<()> {
        let (ranks, deadline) = (self.check_ranks(ranks)?, self.deadline(timeout_ms)?);
        let members = lock(&self.masked).as_ref().unwrap_or(&self.device()?).membership().members;
        if self.plan.transport == TransportKind::Window && ranks.iter().all(|rank| members.contains(*rank)) {
            return Ok(());
        }
        let mesh = self.mesh()?;
        let new = mesh.connect(&ranks, deadline, &|| self.is_in_use())?;
        // A member that was lost comes back as another incarnation once it takes part no more.
        new.iter().filter(|rank| !members.contains(**rank)).for_each(|rank| self.health.returned(*rank));
        log(Level::Info, || format!("rank {}: connected to ranks {new:?}", self.config.rank));
        Ok(())
    }

    /// Returns the generation.
    pub fn activate_ranks(&self, ranks: &[i32], timeout_ms: i64) -> Result<u64> {
        let (_call, device) = self.enter()?;
        let (ranks, me) = (self.check_ranks(ranks)?, self.config.rank);
        let deadline = self.deadline(timeout_ms)?;
        if !ranks.contains(&me) {
            return Err(self.invalid(format!("ranks is {ranks:?}, rank {me} itself is to be among them")));
        }
        if self.plan.transport == TransportKind::Window {
            return self.shrink(&device, &ranks, deadline);
        }
        let mesh = self.mesh()?;
        if lock(&self.masked).is_some() {
            return Err(
                self.invalid("rank mask: the other ranks are masked, unmask them first (a2a_set_rank_mask)")
            );
        }
        if let Some(rank) = ranks.iter().find(|rank| **rank != me && !mesh.is_connected(**rank)) {
            return Err(self.invalid(format!("rank {rank} is not connected (a2a_connect_ranks)")));
        }
        if let Some(slot) = device.busy_slot() {
            return Err(self.invalid(format!("slot {slot} is in the middle of a step")));
        }
        let former = device.membership();
        let generation = mesh.agree(&ranks, former.generation, deadline, &|| self.is_in_use())?;
        let members: Members = ranks.iter().copied().collect();
        let next = device.recovered(Membership { generation, members })?;
        *self.device.write().unwrap_or_else(|e| e.into_inner()) = Some(next);
        log(Level::Info, || format!("rank {me}: generation {generation}, ranks {ranks:?} take part"));
        Ok(generation)
    }

    /// Windows: the same ranks, or some of them. The others' are not written to any more.
    fn shrink(&self, device: &Arc<dyn Device>, ranks: &[u32], deadline: Instant) -> Result<u64> {
        let wanted: Members = ranks.iter().copied().collect();
        let members = device.membership().members;
        if wanted.without(&members).len() > 0 {
            self.mesh()?;
        }
        if let Some(slot) = device.busy_slot() {
            return Err(self.invalid(format!("slot {slot} is in the middle of a step")));
        }
        let timeout_ms = deadline.saturating_duration_since(Instant::now()).as_millis().max(1) as u64;
        let without = members.without(&wanted);
        let recovered = self.reform(device, without, timeout_ms, Duration::from_millis(1))?;
        if recovered.members == wanted {
            return Ok(recovered.generation);
        }
        let (me, come) = (self.config.rank, recovered.members.iter().collect::<Vec<_>>());
        let text = format!(
            "rank {me}: of ranks {ranks:?} only {come:?} have come, and go on (generation {})",
            recovered.generation
        );
        Err(Error::new(Status::PeerLost, text))
    }

    pub fn disconnect_ranks(&self, ranks: &[i32]) -> Result<()> {
        let (_call, device) = self.enter()?;
        let ranks = self.check_ranks(ranks)?;
        let members = lock(&self.masked).as_ref().unwrap_or(&device).membership().members;
        if let Some(rank) = ranks.iter().find(|rank| members.contains(**rank)) {
            return Err(self.invalid(format!("rank {rank} takes part: activate the others without it first")));
        }
        if self.plan.transport == TransportKind::Window {
            return Ok(());
        }
        self.mesh()?.disconnect(&ranks);
        log(Level::Info, || format!("rank {}: disconnected from ranks {ranks:?}", self.config.rank));
        Ok(())
    }

    /// Alone for a while, or as before.
    pub fn set_rank_mask(&self, mask: &[i32]) -> Result<()> {
        let (_call, device) = self.enter()?;
        self.mesh()?;
        let me = self.config.rank;
        if mask.len() != self.config.num_ranks as usize {
            let (count, ranks) = (mask.len(), self.config.num_ranks);
            return Err(self.invalid(format!("count is {count}, max_ranks is {ranks}")));
        }
        let wanted: Members = (0..).zip(mask).filter(|(_, mask)| **mask != 0).map(|(rank, _)| rank).collect();
        let mut masked = lock(&self.masked);
        let all = masked.as_ref().unwrap_or(&device).membership().members;
        let alone = Membership::alone(me).members;
        if wanted == device.membership().members {
            return Ok(());
        }
        if let Some(slot) = device.busy_slot() {
            return Err(self.invalid(format!("slot {slot} is in the middle of a step")));
        }
        let next = if wanted == all {
            masked.take().ok_or_else(|| Error::internal("nothing was masked"))?
        } else if wanted == alone && self.config.device == DeviceKind::Cuda {
            return Err(Error::unsupported(format!(
                "rank {me}: device is cuda (2), where a rank that takes part cannot be alone for a while: warm up before it is activated"
            )));
        } else if wanted == alone {
            // What is dispatched alone is not replayed among others, nor the other way round.
            let generation = device.membership().generation | ALONE;
            let next = device.clone().recovered(Membership { generation, members: alone })?;
            *masked = Some(device);
            next
        } else {
            return Err(self.invalid(format!(
                "mask names ranks {:?}: it must be rank {me} alone, or all that take part, {:?} (a2a_activate_ranks changes those)",
                wanted.iter().collect::<Vec<_>>(),
                all.iter().collect::<Vec<_>>()
            )));
        };
        *self.device.write().unwrap_or_else(|e| e.into_inner()) = Some(next);
        Ok(())
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
