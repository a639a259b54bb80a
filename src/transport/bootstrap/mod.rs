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
//! Where ranks may be on several hosts, JOIN's last number tells which, and WELCOME whether they are: then no descriptors are
//! handed round, and the connections stay (`ties`): who breaks off is gone.
//!
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
mod board;
mod peer;
mod recover;
mod root;
mod socket;
mod ties;
mod wire;

use std::os::fd::OwnedFd;
use std::sync::Arc;

use crate::config::{Address, Allgather, Bootstrap, Config, Meeting, UniqueId};
use crate::error::{Error, Result};
use crate::fault::{self, Point};
use socket::Deadline;

pub use board::Board;
pub use recover::{Recovery, Regathered, regather};
pub use ties::{Tied, Ties};

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

/// Names this host in the place of what the kernel says of it: for containers that cannot share memory all the same.
const HOST_ID: &str = "A2A_HOST_ID";

/// The name, if there is one.
fn named_host() -> Option<Vec<u8>> {
    std::env::var_os(HOST_ID).filter(|name| !name.is_empty()).map(|name| name.into_encoded_bytes())
}

/// If a meeting may bring ranks of other hosts together.
pub fn may_meet_others(meeting: &Meeting) -> bool {
    meeting.remote || matches!(meeting.bootstrap, Bootstrap::Allgather(_)) || named_host().is_some()
}

/// What this host is, as far as sharing memory goes: one kernel, one boot, one network namespace.
fn host_identity() -> u64 {
    use sha2::{Digest, Sha256};
    let short = |bytes: &[u8]| bytes.iter().take(8).fold(0, |n, b| n << 8 | *b as u64);
    if let Some(name) = named_host() {
        return short(&Sha256::digest(name));
    }
    let boot = std::fs::read("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    let net = std::fs::read_link("/proc/self/ns/net").map(|p| p.into_os_string().into_encoded_bytes());
    let digest = Sha256::digest([boot, net.unwrap_or_default()].concat());
    short(&digest)
}

/// Where the ranks of a group may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reach {
    OneHost,
    Hosts,
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
    reach: Reach,
    host: u64,
    deadline: Deadline,
    /// Who the others meet at, as a sentence names it.
    root: &'static str,
    /// Why this rank must not go on, asked now and then while it waits.
    check: Arc<Check>,
}

/// The host, as a sentence names it that tells why ranks on two of them cannot meet.
const HOST: &str = "the host (boot and network namespace, or A2A_HOST_ID; windows reach no other)";

type Check = dyn Fn() -> Result<()> + Send + Sync;

impl Party {
    fn of(meeting: &Meeting, id: UniqueId, timeout_ms: u64) -> Party {
        Party {
            rank: meeting.rank,
            num_ranks: meeting.num_ranks,
            id,
            remote: meeting.remote,
            fields: Vec::new(),
            reach: Reach::OneHost,
            host: host_identity(),
            deadline: Deadline::after_ms(timeout_ms),
            root: "rank 0",
            check: Arc::new(|| Ok(())),
        }
    }
}

/// Descriptors of every rank, rank ascending, this one's own included.
pub struct Gathered {
    /// Of this rank alone, if ranks are `apart`.
    pub fds: Vec<Vec<OwnedFd>>,
    /// Ranks are on several hosts.
    pub apart: bool,
    /// The group's, which its members meet under again.
    pub key: [u8; 16],
    /// What rank 0 made for all.
    pub gift: Vec<u8>,
    /// To tell the others whether this rank could use them.
    finish: Finish,
}

enum Finish {
    Alone,
    Peer {
        peer: peer::Peer,
    },
    Root {
        root: root::Root,
    },
    /// By the caller's all-gather alone.
    Together {
        allgather: Allgather,
        ranks: (u32, u32),
    },
}

/// A rank's own descriptors, where no others are handed to it.
fn alone(own: Vec<OwnedFd>, rank: u32, num_ranks: u32) -> Vec<Vec<OwnedFd>> {
    let mut all: Vec<Vec<OwnedFd>> = (0..num_ranks).map(|_| Vec::new()).collect();
    all[rank as usize] = own;
    all
}

/// Meets the other ranks. `gift` makes, on rank 0, what all get (128 bytes at most); `own` this rank's descriptors, once all
/// have agreed. Both are told if the ranks are on several hosts.
pub fn gather(
    config: &Config,
    reach: Reach,
    gift: impl FnOnce(bool) -> Result<Vec<u8>>,
    own: impl FnOnce(bool) -> Result<Vec<OwnedFd>>,
) -> Result<Gathered> {
    let meeting = &config.meeting;
    if config.num_ranks == 1 {
        let (fds, gift) = (vec![own(false)?], gift(false)?);
        return Ok(Gathered { fds, apart: false, key: random()?, gift, finish: Finish::Alone });
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
    party.reach = reach;
    party.fields.extend(config.agreed().into_iter().map(|(name, value)| (name.to_string(), value)));
    if let Bootstrap::Allgather(allgather) = &meeting.bootstrap {
        let apart;
        (party.id, apart) = allgather::agree(allgather, &party)?;
        if apart {
            return allgather::gather(allgather, &party, gift, own);
        }
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
    /// Ends the rendezvous: returns when every rank could use what it got, or with the reason why one could not. What then
    /// holds ranks together that are on several hosts.
    pub fn finish(mut self, outcome: Result<()>) -> Result<Option<Ties>> {
        self.finish.run(outcome)?;
        Ok(if self.apart { self.finish.ties() } else { None })
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
            Finish::Together { allgather, ranks } => {
                let told = allgather::tell(allgather, *ranks, outcome.as_ref().map(|()| &[][..]));
                outcome.and(told.map(|_| ()))
            }
        }
    }

    fn ties(self) -> Option<Ties> {
        match self {
            Finish::Peer { peer } => Some(peer.into_ties()),
            Finish::Root { root } => Some(root.into_ties()),
            Finish::Alone | Finish::Together { .. } => None,
        }
    }
}
