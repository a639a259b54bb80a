//! Survivors meet again: who they are, whether their windows must be replaced, and from which step on they go.
//!
//! Any rank may be the one that was lost, so whoever binds the group's name first leads: the kernel gives it to one. JOIN
//! says how a rank stands; WELCOME says what was agreed. Nothing has happened before WELCOME: if the leader goes, the
//! others look for another. After it a failure ends the recovery on all, and all come again.
//!
//! A rank that is left out is told so in its own window before the others can go on without it, and every rank looks
//! there before it leads or follows: so there are never two groups.

use std::io::ErrorKind;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use hmac::{Hmac, KeyInit, Mac};
use sha2::Sha256;

use super::peer::{Peer, ROOT_SPEAKS_FIRST};
use super::root::{Lobby, Proven, Root};
use super::socket::{Deadline, Listener, Stream, check_user, connect_local, listen_local, wait};
use super::wire::{Key, Kind, numbers};
use super::{Check, Finish, Party, Reach};
use crate::config::{Address, UniqueId};
use crate::device::members::Members;
use crate::device::{Device, Membership, Standing};
use crate::error::{Error, Result, Status};
use crate::log::{Level, log};

/// What was agreed, and what it takes to say that this rank has done its part.
pub struct Regathered {
    pub membership: Membership,
    /// By slot: the last step that is whole on every member.
    pub whole: Vec<u64>,
    /// The new windows' descriptors, by rank; `None` if the old ones stay.
    pub fds: Option<Vec<Vec<OwnedFd>>>,
    finish: Finish,
}

impl Regathered {
    /// Ends the recovery: returns when every member has done its part, or with the reason why one could not.
    pub fn finish(mut self, outcome: Result<()>) -> Result<()> {
        self.finish.run(outcome)
    }
}

/// How a rank stands, as it says it to the leader.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Said {
    membership: Membership,
    given_up: Members,
    /// Its windows are those of its generation.
    intact: bool,
    /// By slot: the last whole step, and what the last recovery said of the steps before it.
    whole: Vec<u64>,
    former: Vec<u64>,
}

impl Said {
    fn to_bytes(&self) -> Vec<u8> {
        let words = [
            &[self.membership.generation, u64::from(self.intact)][..],
            self.membership.members.words(),
            self.given_up.words(),
            &self.whole,
            &self.former,
        ];
        words.concat().into_iter().flat_map(u64::to_le_bytes).collect()
    }

    fn parse(bytes: &[u8], slots: usize) -> Option<Said> {
        let words = numbers(bytes);
        let (head, rest) = words.split_at_checked(2)?;
        let (members, rest) = rest.split_first_chunk::<{ Members::WORDS }>()?;
        let (given_up, rest) = rest.split_first_chunk::<{ Members::WORDS }>()?;
        let (whole, former) = rest.split_at_checked(slots)?;
        let membership = Membership { generation: head[0], members: Members::from_words(*members) };
        let given_up = Members::from_words(*given_up);
        (former.len() == slots).then(|| Said {
            membership,
            given_up,
            intact: head[1] == 1,
            whole: whole.to_vec(),
            former: former.to_vec(),
        })
    }
}

/// What was agreed, as the leader says it to one rank.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Agreed {
    membership: Membership,
    replace: bool,
    whole: Vec<u64>,
}

impl Agreed {
    fn to_bytes(&self) -> Vec<u8> {
        let head = [self.membership.generation, u64::from(self.replace)];
        let words = [&head[..], self.membership.members.words(), &self.whole].concat();
        words.into_iter().flat_map(u64::to_le_bytes).collect()
    }

    fn parse(bytes: &[u8], slots: usize) -> Option<Agreed> {
        let words = numbers(bytes);
        let (head, rest) = words.split_at_checked(2)?;
        let (members, whole) = rest.split_first_chunk::<{ Members::WORDS }>()?;
        let membership = Membership { generation: head[0], members: Members::from_words(*members) };
        (whole.len() == slots).then(|| Agreed { membership, replace: head[1] == 1, whole: whole.to_vec() })
    }
}

/// What a rank brings to a recovery.
pub struct Recovery<'a> {
    pub key: Key,
    pub rank: u32,
    pub num_ranks: u32,
    pub device: &'a Arc<dyn Device>,
    pub standing: Standing,
    /// No recovery has failed since the last one.
    pub intact: bool,
    /// What the last recovery said of the steps before it.
    pub former: &'a [u64],
    /// How long ranks that were given up on, but live, are waited for.
    pub patience: Duration,
    pub timeout_ms: u64,
    /// Another thread may end this comm.
    pub is_aborted: Arc<dyn Fn() -> bool + Send + Sync>,
}

/// Meets the other survivors. `own` makes this rank's new window, if windows are replaced. `agreed`: something was, also
/// if it then failed.
pub fn regather(
    recovery: Recovery,
    agreed: &mut bool,
    own: impl FnOnce() -> Result<Vec<OwnedFd>>,
) -> Result<Regathered> {
    let Recovery { rank, num_ranks, device, .. } = recovery;
    let name = name(&recovery.key)?;
    let said = Said {
        membership: device.membership(),
        given_up: recovery.standing.given_up,
        intact: recovery.intact,
        whole: recovery.standing.whole.clone(),
        former: recovery.former.to_vec(),
    };
    let (watched, is_aborted) = (device.clone(), recovery.is_aborted.clone());
    let check: Arc<Check> = Arc::new(move || match watched.left_behind_by() {
        _ if is_aborted() => Err(Error::new(Status::Aborted, format!("rank {rank}: aborted in a2a_recover"))),
        Some(by) => Err(left_behind(rank, by)),
        None => Ok(()),
    });
    let party = Party {
        rank,
        num_ranks,
        id: UniqueId { address: Address::Local(name), key: recovery.key },
        remote: false,
        fields: Vec::new(),
        // Only windows are recovered.
        reach: Reach::OneHost,
        host: 0,
        deadline: Deadline::after_ms(recovery.timeout_ms),
        root: "who leads the recovery",
        check,
    };
    loop {
        (party.check)()?;
        match listen_local(&name)? {
            Ok(listener) => return lead(party, Listener::Unix(listener), recovery, said, agreed, own),
            Err(e) if e.kind() == ErrorKind::AddrInUse => {}
            Err(e) => return Err(Error::system(format!("rank {rank}: listening for survivors"), e)),
        }
        if let Ok(socket) = connect_local(&name)? {
            check_user(&socket)?;
            if let Some((peer, verdict, name)) = follow(Stream::Unix(socket), &party, &said)? {
                *agreed = true;
                return take_part(peer, verdict, &name, own);
            }
        }
        if party.deadline.has_passed() {
            let text = format!("rank {rank}: no recovery was led to its end within {} ms", party.deadline.ms);
            return Err(Error::new(Status::Timeout, text));
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// The address of a group's survivors, which only they can know.
fn name(key: &Key) -> Result<[u8; 16]> {
    let mut mac = Hmac::<Sha256>::new_from_slice(key).map_err(|e| Error::internal(e.to_string()))?;
    mac.update(b"where survivors meet");
    let mut name = [0; 16];
    name.copy_from_slice(&mac.finalize().into_bytes()[..16]);
    Ok(name)
}

fn left_behind(rank: u32, by: u32) -> Error {
    let text =
        format!("rank {rank}: rank {by} and the others recovered without this rank; only a new comm helps");
    Error::new(Status::PeerLost, text)
}

// ------------------------------------------------------------------------------------------------ follower

/// Joins the leader; `None` if it went away before anything was agreed.
fn follow(stream: Stream, party: &Party, said: &Said) -> Result<Option<(Peer, Agreed, [u8; 16])>> {
    let mut party = party.clone();
    // It is there: its deadline decides.
    party.deadline = Deadline::after_ms(party.deadline.ms).later(ROOT_SPEAKS_FIRST);
    let rank = party.rank;
    let mut peer = Peer::on(stream, party)?;
    let welcome = peer.say_hello(Kind::Join, said.to_bytes()).and_then(|()| peer.await_welcome());
    let (name, agreed) = match welcome {
        Ok(welcome) => welcome,
        // Its last words, if it had any, were proven; else it just went.
        Err(error) if error.status == Status::PeerLost && peer.is_closed() => return Ok(None),
        Err(error) => return Err(error),
    };
    let agreed = Agreed::parse(&agreed, said.whole.len());
    let agreed = agreed.filter(|agreed| agreed.membership.members.contains(rank)).ok_or_else(|| {
        Error::new(Status::Mismatch, format!("rank {rank}: who leads the recovery agreed on something else"))
    })?;
    Ok(Some((peer, agreed, name)))
}

fn take_part(
    mut peer: Peer,
    agreed: Agreed,
    name: &[u8; 16],
    own: impl FnOnce() -> Result<Vec<OwnedFd>>,
) -> Result<Regathered> {
    let Agreed { membership, replace, whole } = agreed;
    peer.party.deadline = Deadline::after_ms(peer.party.deadline.ms).later(ROOT_SPEAKS_FIRST);
    let all: Vec<u32> = membership.members.iter().collect();
    let fds = if replace { Some(peer.share(name, &all, own)?) } else { None };
    Ok(Regathered { membership, whole, fds, finish: Finish::Peer { peer } })
}

// -------------------------------------------------------------------------------------------------- leader

fn lead(
    party: Party,
    listener: Listener,
    recovery: Recovery,
    mine: Said,
    is_agreed: &mut bool,
    own: impl FnOnce() -> Result<Vec<OwnedFd>>,
) -> Result<Regathered> {
    let (rank, device) = (party.rank, recovery.device);
    let mut root = Root::new(party.clone());
    let mut lobby = Lobby::at(listener, &party);
    let said = admit(&mut root, &mut lobby, &recovery, mine)?;
    *is_agreed = true;
    // Who comes has come; what is left needs time of its own.
    root.party.deadline = Deadline::after_ms(recovery.timeout_ms);
    await_proof(&said, &**device);
    let (agreed, lost) = agree(rank, &said, |lost| device.cannot_touch(lost));
    log(Level::Info, || {
        let list = |members: &Members| members.iter().map(|r| r.to_string()).collect::<Vec<_>>().join(", ");
        let Membership { generation, members } = &agreed[rank as usize].membership;
        let windows = if agreed[rank as usize].replace { "replaced" } else { "kept" };
        format!(
            "rank {rank} leads a recovery: generation {generation}, members {}, lost {}, windows {windows}",
            list(members),
            list(&lost)
        )
    });
    // Before anybody can go on, and before another could lead.
    lost.iter().for_each(|lost| device.leave_behind(lost));
    drop(lobby);
    let to = |rank: u32| agreed[rank as usize].to_bytes();
    let fds = if agreed[rank as usize].replace {
        Some(root.share(to, own)?)
    } else {
        root.welcome(&[0; 16], to)?;
        None
    };
    let Agreed { membership, whole, .. } = agreed[rank as usize].clone();
    Ok(Regathered { membership, whole, fds, finish: Finish::Root { root } })
}

/// Lets survivors in until all that can come have. Returns what each has said, by rank.
fn admit(
    root: &mut Root,
    lobby: &mut Lobby<'_>,
    recovery: &Recovery,
    mine: Said,
) -> Result<Vec<Option<Said>>> {
    let (me, device) = (recovery.rank, recovery.device);
    let mut said: Vec<Option<Said>> = vec![None; recovery.num_ranks as usize];
    said[me as usize] = Some(mine);
    let mut all_but_lost = None;
    loop {
        (root.party.check)()?;
        let known = || said.iter().flatten();
        let given_up =
            known().fold(Members::none(), |all, said| all.iter().chain(said.given_up.iter()).collect());
        let members = known()
            .fold(Members::none(), |all, said| all.iter().chain(said.membership.members.iter()).collect());
        let missing = members.iter().filter(|rank| said[*rank as usize].is_none() && !device.has_left(*rank));
        let missing: Members = missing.collect();
        if missing.without(&given_up) == Members::none() {
            let since = *all_but_lost.get_or_insert_with(Instant::now);
            if missing == Members::none() || since.elapsed() >= recovery.patience {
                return Ok(said);
            }
        } else {
            all_but_lost = None;
        }
        if root.party.deadline.has_passed() {
            return Ok(said);
        }
        let mut fds = lobby.fds();
        fds.extend(root.seats.iter().flatten().map(|line| line.link.stream.as_fd()));
        // A death is seen by another thread.
        wait(&fds, root.party.deadline, lobby.slice().min(Duration::from_millis(10)))?;
        for rank in root.seated() {
            // Whoever goes now was not counted on yet.
            let Some(line) = &mut root.seats[rank as usize] else { continue };
            if device.has_left(rank) || !matches!(line.link.receive(), Ok(None)) {
                root.seats[rank as usize] = None;
                said[rank as usize] = None;
            }
        }
        lobby.look();
        while let Some(proven) = lobby.proven.pop_front() {
            seat(root, proven, &mut said, me)?;
        }
    }
}

/// A process that ends lets go of its lifeline a little before it is known to have ended.
const PROOF: Duration = Duration::from_millis(100);

/// Waits a little for proof that ranks which are gone touch nothing any more: it saves new windows.
fn await_proof(said: &[Option<Said>], device: &dyn Device) {
    let begun = Instant::now();
    let members = device.membership().members;
    let gone = members.iter().filter(|rank| said[*rank as usize].is_none() && device.has_left(*rank));
    for rank in gone {
        while !device.cannot_touch(rank) && begun.elapsed() < PROOF {
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

fn seat(root: &mut Root, proven: Proven, said: &mut [Option<Said>], me: u32) -> Result<()> {
    let Proven { hello, rest, mut line, .. } = proven;
    let rank = hello.rank;
    let slots = said[me as usize].as_ref().map_or(0, |said| said.whole.len());
    let mine = said[me as usize].as_ref().map(|said| said.membership);
    let (Some(mine), Some(theirs)) = (mine, Said::parse(&rest, slots)) else {
        line.fail(&Error::new(Status::Mismatch, format!("rank {rank} has another number of slots")));
        return Ok(());
    };
    let refusal = if let Some(error) = root.stranger_to(&hello) {
        Some(error)
    } else if rank >= root.party.num_ranks || said[rank as usize].is_some() {
        Some(Error::invalid(format!("rank {rank} has joined already")))
    } else if !theirs.membership.members.contains(me) {
        // It has gone on without this rank, which its window will say.
        return Err(root.fail(left_behind(me, rank)));
    } else if !mine.members.contains(rank) {
        Some(left_behind(rank, me))
    } else {
        None
    };
    match refusal {
        Some(error) => line.fail(&error),
        None => {
            root.seats[rank as usize] = Some(line);
            said[rank as usize] = Some(theirs);
        }
    }
    Ok(())
}

/// What the survivors agree on, as it is said to each, by rank; and who is lost.
fn agree(me: u32, said: &[Option<Said>], cannot_touch: impl Fn(u32) -> bool) -> (Vec<Agreed>, Members) {
    let present: Vec<(u32, &Said)> =
        (0..).zip(said).filter_map(|(rank, said)| Some((rank, said.as_ref()?))).collect();
    let members: Members = present.iter().map(|(rank, _)| *rank).collect();
    let former: Members = present.iter().flat_map(|(_, said)| said.membership.members.iter()).collect();
    let lost = former.without(&members);
    let generations = || present.iter().map(|(_, said)| said.membership.generation);
    let newest = generations().max().unwrap_or(0);
    let uneven = generations().any(|generation| generation != newest);
    let replace = uneven || present.iter().any(|(_, said)| !said.intact) || !lost.iter().all(cannot_touch);
    let membership = Membership { generation: newest + 1, members };
    let slots = said[me as usize].as_ref().map_or(0, |said| said.whole.len());
    let least = |generation: u64, slot: usize| {
        let of = present.iter().filter(|(_, said)| said.membership.generation == generation);
        of.map(|(_, said)| said.whole[slot]).min().unwrap_or(0)
    };
    // A rank that missed the end of the last recovery counts in steps before it: who did not miss it knows.
    let informed = present.iter().find(|(_, said)| said.membership.generation == newest);
    let whole = |said: &Said| match said.membership.generation {
        generation if generation == newest => (0..slots).map(|slot| least(generation, slot)).collect(),
        _ => informed.map(|(_, said)| said.former.clone()).unwrap_or_default(),
    };
    let to = |said: &Option<Said>| Agreed {
        membership,
        replace,
        whole: said.as_ref().map_or_else(|| vec![0; slots], whole),
    };
    (said.iter().map(to).collect(), lost)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn said(generation: u64, members: &[u32], whole: u64) -> Option<Said> {
        let members = members.iter().copied().collect();
        Some(Said {
            membership: Membership { generation, members },
            given_up: Members::none(),
            intact: true,
            whole: vec![whole, 7],
            former: vec![100 + generation, 5],
        })
    }

    #[test]
    fn what_ranks_say_survives_its_bytes() {
        let mut mine = said(3, &[0, 2, 700], 9).unwrap();
        mine.given_up.insert(1);
        assert_eq!(Said::parse(&mine.to_bytes(), 2), Some(mine.clone()));
        assert_eq!(Said::parse(&mine.to_bytes(), 1), None);
        assert_eq!(Said::parse(&mine.to_bytes()[8..], 2), None);
        let agreed = Agreed { membership: mine.membership, replace: true, whole: vec![1, 2] };
        assert_eq!(Agreed::parse(&agreed.to_bytes(), 2), Some(agreed.clone()));
        assert_eq!(Agreed::parse(&agreed.to_bytes(), 3), None);
    }

    #[test]
    fn the_least_whole_step_counts_and_windows_stay_if_the_lost_cannot_touch_them() {
        let all = [0, 1, 2];
        let said = [said(1, &all, 9), None, said(1, &all, 8)];
        let (agreed, lost) = agree(0, &said, |_| true);
        assert_eq!(lost.iter().collect::<Vec<_>>(), [1]);
        assert_eq!((agreed[2].membership.generation, agreed[2].replace), (2, false));
        assert_eq!(agreed[2].membership.members.iter().collect::<Vec<_>>(), [0, 2]);
        assert_eq!((&agreed[0].whole, &agreed[2].whole), (&vec![8, 7], &vec![8, 7]));
        assert!(agree(0, &said, |_| false).0[0].replace);
    }

    #[test]
    fn who_missed_the_end_of_a_recovery_hears_what_it_said() {
        let said = [said(2, &[0, 1], 0), said(1, &[0, 1, 2], 9)];
        let (agreed, lost) = agree(0, &said, |_| true);
        assert_eq!(lost.iter().collect::<Vec<_>>(), [2]);
        assert_eq!((agreed[0].membership.generation, agreed[0].replace), (3, true));
        assert_eq!((&agreed[0].whole, &agreed[1].whole), (&vec![0, 7], &vec![102, 5]));
    }
}
