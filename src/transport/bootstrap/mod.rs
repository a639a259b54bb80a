//! Rendezvous: ranks meet at rank 0, prove the group's key, agree on version and config, and hand round the file
//! descriptors of their windows.
//!
//! ```text
//! peer -> root  connect                 (Unix abstract name, or TCP)
//! root -> peer  CHALLENGE nonce
//! peer -> root  JOIN      rank, size, version, config, nonce, and the proof over all of it
//! root -> peer  WELCOME   name of the descriptor socket, what rank 0 made for all, proof  once all have joined
//! peer -> root  descriptors, over a second, Unix connection                              once its window is made
//! root -> peer  descriptors of all ranks, over the same, each answered by a byte
//! peer -> root  READY                                                                    once all are mapped
//! root -> peer  GO                                                                       once all are ready
//! ```
//! At any point FAIL, with a sentence, ends it: from a peer it ends the whole group, from the root it is the group's
//! end. A connection that proves no key is refused alone, and so is a rank of another version or size or whose place is
//! taken: who they were stands in rank 0's sentence if the group is not complete at the deadline. Ranks that disagree on
//! the config end the group, because it could never be complete. A rank that is refused by itself comes with DECLINE
//! in the place of JOIN. One deadline covers everything.
//!
//! Survivors of a loss meet again (`recover`) by the same words, wherever the first of them listens.
//!
//! Where the caller brings an all-gather, that goes first (`allgather`): it finds the differences and carries the id.

#![forbid(unsafe_code)]

mod allgather;
mod peer;
mod recover;
mod root;
mod socket;
mod wire;

use std::os::fd::OwnedFd;
use std::sync::Arc;

use crate::config::{Address, Bootstrap, Config, Meeting, UniqueId};
use crate::error::{Error, Result};
use crate::fault::{self, Point};
use socket::Deadline;

pub use recover::{Recovery, Regathered, regather};

pub fn random<const N: usize>() -> Result<[u8; N]> {
    let mut bytes = [0; N];
    let mut filled = 0;
    while filled < N {
        filled += rustix::rand::getrandom(&mut bytes[filled..], rustix::rand::GetRandomFlags::empty())
            .map_err(|e| Error::system("getrandom", e))?;
    }
    Ok(bytes)
}

pub fn new_unique_id() -> Result<UniqueId> {
    Ok(UniqueId { address: Address::Local(random()?), key: random()? })
}

/// What this host is, as far as sharing memory goes: one kernel, one boot, one network namespace.
fn host_identity() -> u64 {
    use sha2::{Digest, Sha256};
    let boot = std::fs::read("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    let net = std::fs::read_link("/proc/self/ns/net").map(|p| p.into_os_string().into_encoded_bytes());
    let digest = Sha256::digest([boot, net.unwrap_or_default()].concat());
    digest.iter().take(8).fold(0, |n, b| n << 8 | *b as u64)
}

/// One rank's part in a rendezvous.
#[derive(Clone)]
struct Party {
    rank: u32,
    num_ranks: u32,
    id: UniqueId,
    /// Rank 0 may be reached by more than a loopback address.
    remote: bool,
    /// What every rank must share, by name.
    fields: Vec<(String, u64)>,
    deadline: Deadline,
    /// Who the others meet at, as a sentence names it.
    root: &'static str,
    /// Why this rank must not go on, asked now and then while it waits.
    check: Arc<Check>,
}

type Check = dyn Fn() -> Result<()> + Send + Sync;

impl Party {
    fn of(meeting: &Meeting, id: UniqueId, timeout_ms: u64) -> Party {
        Party {
            rank: meeting.rank,
            num_ranks: meeting.num_ranks,
            id,
            remote: meeting.remote,
            fields: Vec::new(),
            deadline: Deadline::after_ms(timeout_ms),
            root: "rank 0",
            check: Arc::new(|| Ok(())),
        }
    }
}

/// Descriptors of every rank, rank ascending, this one's own included.
pub struct Gathered {
    pub fds: Vec<Vec<OwnedFd>>,
    /// The group's, which its members meet under again.
    pub key: [u8; 16],
    /// What rank 0 made for all.
    pub gift: Vec<u8>,
    /// To tell the others whether this rank could use them.
    finish: Finish,
}

enum Finish {
    Alone,
    Peer { peer: peer::Peer },
    Root { root: root::Root },
}

/// Meets the other ranks. `gift` makes, on rank 0, what all get; `own` this rank's descriptors, once all have agreed.
pub fn gather(
    config: &Config,
    gift: impl FnOnce() -> Result<Vec<u8>>,
    own: impl FnOnce() -> Result<Vec<OwnedFd>>,
) -> Result<Gathered> {
    let meeting = &config.meeting;
    if config.num_ranks == 1 {
        return Ok(Gathered { fds: vec![own()?], key: random()?, gift: gift()?, finish: Finish::Alone });
    }
    let id = match &meeting.bootstrap {
        Bootstrap::UniqueId(id) => id.clone(),
        Bootstrap::Allgather(_) => new_unique_id()?,
        Bootstrap::Nothing => {
            return Err(Error::invalid(format!(
                "rank {}: unique_id is not set and num_ranks is {}",
                config.rank, config.num_ranks
            )));
        }
    };
    fault::at(Point::CreateBegins);
    let mut party = Party::of(meeting, id, meeting.timeout_ms);
    party.fields.push(("the host (boot and network namespace)".into(), host_identity()));
    party.fields.extend(config.agreed().into_iter().map(|(name, value)| (name.to_string(), value)));
    if let Bootstrap::Allgather(allgather) = &meeting.bootstrap {
        party.id = allgather::agree(allgather, &party)?;
        // The caller's collective has its own idea of time.
        party.deadline = Deadline::after_ms(meeting.timeout_ms);
    }
    if config.rank == 0 { root::gather(party, gift, own) } else { peer::gather(party, own) }
}

/// Rank 0 may not be there yet, or wait for ranks that are: a rank with nothing to offer does not wait for long.
const DECLINE_MS: u64 = 1000;

/// A rank that is refused by itself tells the others why, if they can be found soon: it gives them its error instead of
/// a deadline.
pub fn decline(meeting: &Meeting, error: &Error) {
    if meeting.num_ranks == 1 {
        return;
    }
    // Who cannot be told finds out at the deadline.
    let _ = match &meeting.bootstrap {
        Bootstrap::Nothing => Ok(()),
        Bootstrap::Allgather(call) => allgather::decline(call, (meeting.rank, meeting.num_ranks), error),
        Bootstrap::UniqueId(id) => {
            let party = Party::of(meeting, id.clone(), DECLINE_MS.min(meeting.timeout_ms));
            if meeting.rank == 0 { root::decline(&party, error) } else { peer::decline(&party, error) }
        }
    };
}

impl Gathered {
    /// Ends the rendezvous: returns when every rank could use what it got, or with the reason why one could not.
    pub fn finish(mut self, outcome: Result<()>) -> Result<()> {
        self.finish.run(outcome)
    }
}

impl Finish {
    fn run(&mut self, outcome: Result<()>) -> Result<()> {
        match self {
            Finish::Alone => outcome,
            Finish::Peer { peer } => peer.finish(outcome),
            Finish::Root { root } => match outcome {
                Ok(()) => root.finish(),
                Err(error) => Err(root.fail(error)),
            },
        }
    }
}
