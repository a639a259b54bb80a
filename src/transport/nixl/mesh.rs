//! A rank's couriers to all others: the group meets on its board, and what `device` sends by rank goes its way.
//!
//! ```text
//! rank/R      who rank R is: its incarnation, what it was configured to, or why it does not come
//! way/R/P     for rank P: how to write into R's inbox for it, {P's incarnation, address, card}
//! met/R       R has met everybody: it hears what is sent to it
//! ```

#![forbid(unsafe_op_in_unsafe_fn)]

use std::any::Any;
use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::{Courier, Delivery, Peer, Piece};
use crate::config::{Bootstrap, Meeting, UniqueId};
use crate::device::{Heard, Post};
use crate::error::{Error, Result, Status};
use crate::log::{Level, log};
use crate::transport::bootstrap::{Board, random};

/// A rank whose entries are missing for so long is gone: a board that ends is replaced much sooner.
const ABSENT: Duration = Duration::from_secs(2);
/// Between two looks at that.
const LOOK: Duration = Duration::from_millis(100);
/// The helper's, between two polls, at first and at last.
const PAUSE: Duration = Duration::from_micros(50);
const LONGEST_PAUSE: Duration = Duration::from_millis(1);
/// What a comm has sent before it was destroyed is delivered within this, or not at all.
const LINGER: Duration = Duration::from_secs(2);
/// How long a rank that does not come says so, at most.
const DECLINE: Duration = Duration::from_secs(1);

/// Memory that a rank's peers write to and read from, by rank.
pub struct Memory {
    pub inboxes: Vec<u64>,
    pub outboxes: Vec<u64>,
    pub box_bytes: u64,
    pub keep: Arc<dyn Any + Send + Sync>,
}

/// What a rank brings to the others.
pub struct Party<'a> {
    pub meeting: &'a Meeting,
    /// What every rank must share, by name.
    pub fields: Vec<(String, u64)>,
    pub deadline: Instant,
}

/// One incarnation of a rank, as others see it.
struct Presence {
    incarnation: u64,
    fields: Vec<(String, u64)>,
}

pub struct Mesh {
    shared: Arc<Shared>,
    /// Goes on with what is under way while the rank is elsewhere. `None` for a rank alone.
    helper: Option<JoinHandle<()>>,
}

struct Shared {
    rank: u32,
    office: Mutex<Office>,
    /// Wakes the helper.
    work: Condvar,
    /// `None` for a rank alone.
    board: Option<Board>,
}

struct Office {
    courier: Box<dyn Courier>,
    /// By rank; `None` for this one.
    ways: Vec<Option<Way>>,
    /// What may still be under way: rank and lane.
    active: Vec<(u32, u32)>,
    /// Notes that are to be the last.
    last: Vec<(u32, Vec<u8>)>,
    /// What the helper has heard.
    heard: VecDeque<(u32, Vec<u8>)>,
    looked: Instant,
    /// The rank is elsewhere.
    rests: bool,
    /// The comm is destroyed: what is under way may go on until then.
    over: Option<Instant>,
}

/// How a peer is written to.
struct Way {
    peer: Peer,
    /// Where its inbox for this rank lies over there; the outbox for it.
    inbox: u64,
    outbox: u64,
    is_lost: bool,
    /// `poll` has said so.
    is_told: bool,
}

fn name_of(rank: u32) -> String {
    format!("rank/{rank}")
}

fn id_of(meeting: &Meeting) -> Result<UniqueId> {
    match &meeting.bootstrap {
        Bootstrap::UniqueId(id) => Ok(id.clone()),
        Bootstrap::Allgather(_) => Err(Error::unsupported(format!(
            "rank {}: allgather is set, ranks of transport nixl (3) meet by unique_id",
            meeting.rank
        ))),
        Bootstrap::Nothing => Err(Error::invalid(format!(
            "rank {}: unique_id is not set and num_ranks is {}",
            meeting.rank, meeting.num_ranks
        ))),
    }
}

/// A rank that is refused by itself tells the others why, if they can be found soon.
pub fn decline(meeting: &Meeting, error: &Error) {
    if meeting.num_ranks == 1 {
        return;
    }
    let tell = || -> Result<()> {
        let board = Board::open(meeting, id_of(meeting)?, 0)?;
        let refusal = json!({ "status": error.status as i32, "error": error.message });
        board.put(&name_of(meeting.rank), refusal.to_string().as_bytes())?;
        let until = Instant::now() + DECLINE.min(Duration::from_millis(meeting.timeout_ms));
        for rank in (0..meeting.num_ranks).filter(|rank| *rank != meeting.rank) {
            let left = until.saturating_duration_since(Instant::now());
            board.wait_for(&format!("heard/{rank}"), left, || Ok(()))?;
        }
        Ok(())
    };
    // Who cannot be told finds out at the deadline.
    let _ = tell();
}

/// What a rank says of itself; an error if it does not come.
fn presence(me: u32, rank: u32, said: &[u8]) -> Result<Presence> {
    let no_sense = || Error::internal(format!("rank {me}: what rank {rank} says of itself makes no sense"));
    let said: Value = serde_json::from_slice(said).map_err(|_| no_sense())?;
    if let (Some(status), Some(why)) = (said["status"].as_i64(), said["error"].as_str()) {
        let status = Status::from_code(status as i32).unwrap_or(Status::PeerLost);
        return Err(Error::new(status, format!("rank {me}: rank {rank} cannot take part: {why}")));
    }
    let version = said["version"].as_str().unwrap_or_default();
    if version != env!("CARGO_PKG_VERSION") {
        let mine = env!("CARGO_PKG_VERSION");
        let text = format!("rank {me}: rank {rank} has version {version} of the library, this one {mine}");
        return Err(Error::new(Status::Mismatch, text));
    }
    let field = |field: &Value| Some((field[0].as_str()?.to_owned(), field[1].as_u64()?));
    let fields = said["fields"].as_array().and_then(|fields| fields.iter().map(field).collect());
    let (incarnation, fields) =
        said["incarnation"].as_u64().zip(fields).filter(|(i, _)| *i != 0).ok_or_else(no_sense)?;
    Ok(Presence { incarnation, fields })
}

fn compare(me: u32, mine: &[(String, u64)], rank: u32, theirs: &[(String, u64)]) -> Result<()> {
    for (name, value) in mine {
        let other = theirs.iter().find(|(other, _)| other == name).map(|(_, value)| *value);
        if other != Some(*value) {
            let other = other.map_or("unknown".into(), |other| other.to_string());
            return Err(Error::new(
                Status::Mismatch,
                format!("rank {me}: {name} is {value} on rank {me} and {other} on rank {rank}"),
            ));
        }
    }
    Ok(())
}

impl Mesh {
    /// Meets all other ranks. `courier` makes this incarnation's.
    pub fn gather(
        party: Party,
        memory: Memory,
        courier: impl FnOnce(u64) -> Result<Box<dyn Courier>>,
    ) -> Result<Mesh> {
        let Meeting { rank, num_ranks, .. } = *party.meeting;
        let incarnation = u64::from_le_bytes(random()?) | 1;
        let mut office = Office {
            courier: courier(incarnation)?,
            ways: (0..num_ranks).map(|_| None).collect(),
            active: Vec::new(),
            last: Vec::new(),
            heard: VecDeque::new(),
            looked: Instant::now(),
            rests: false,
            over: None,
        };
        let mut board = None;
        if num_ranks > 1 {
            let opened = Board::open(party.meeting, id_of(party.meeting)?, incarnation)?;
            office.meet_all(&opened, &party, &memory, incarnation)?;
            board = Some(opened);
        }
        let shared = Arc::new(Shared { rank, office: Mutex::new(office), work: Condvar::new(), board });
        let help = || {
            let shared = shared.clone();
            let name = format!("a2a-courier-{rank}");
            let thread = std::thread::Builder::new().name(name).spawn(move || shared.help());
            thread.map_err(|e| Error::system(format!("rank {rank}: the courier's thread"), e))
        };
        let helper = if num_ranks > 1 { Some(help()?) } else { None };
        Ok(Mesh { shared, helper })
    }
}

impl Drop for Mesh {
    fn drop(&mut self) {
        let mut office = self.shared.lock();
        office.over = Some(Instant::now() + LINGER);
        let is_soon = !office.has_work();
        drop(office);
        self.shared.work.notify_all();
        // What is still under way goes on without the comm.
        if let Some(helper) = self.helper.take().filter(|_| is_soon) {
            let _ = helper.join();
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Office> {
        self.office.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Peers wait for what this rank has sent, and what they send comes no further where nobody polls: between the halves of
    /// a step this thread does.
    fn help(&self) {
        let mut office = self.lock();
        let mut pause = PAUSE;
        loop {
            match office.over {
                Some(until) if !office.has_work() || Instant::now() >= until => return,
                None if !office.rests => {
                    pause = PAUSE;
                    office = self.work.wait(office).unwrap_or_else(|e| e.into_inner());
                    continue;
                }
                _ => {}
            }
            if let Err(error) = office.drive(self.rank) {
                log(Level::Debug, || format!("rank {}: {error}", self.rank));
            }
            let waited = self.work.wait_timeout(office, pause);
            office = waited.unwrap_or_else(|e| e.into_inner()).0;
            pause = (pause + pause / 16).min(LONGEST_PAUSE);
        }
    }
}

impl Office {
    fn meet_all(&mut self, board: &Board, party: &Party, memory: &Memory, incarnation: u64) -> Result<()> {
        let Meeting { rank: me, num_ranks, .. } = *party.meeting;
        let peers = || (0..num_ranks).filter(move |rank| *rank != me);
        let left = || party.deadline.saturating_duration_since(Instant::now());
        let said = json!({
            "version": env!("CARGO_PKG_VERSION"),
            "incarnation": incarnation,
            "fields": party.fields,
        });
        board.put(&name_of(me), said.to_string().as_bytes())?;
        peers().for_each(|rank| board.read(&name_of(rank)));
        let mut incarnations = vec![0; num_ranks as usize];
        for rank in peers() {
            // Whoever is there is heard while others are waited for: a refusal ends it at once.
            let refusals = || {
                peers().try_for_each(|rank| {
                    let said = board.value(&name_of(rank));
                    said.map_or(Ok(()), |said| presence(me, rank, &said).map(|_| ()))
                })
            };
            let told = board.wait_for(&name_of(rank), left(), refusals).and_then(|said| {
                let presence = presence(me, rank, &said)?;
                compare(me, &party.fields, rank, &presence.fields)?;
                Ok(presence.incarnation)
            });
            incarnations[rank as usize] = told.inspect_err(|_| {
                let _ = board.put(&format!("heard/{me}"), &[]);
            })?;
        }

        for rank in peers() {
            for at in [memory.inboxes[rank as usize], memory.outboxes[rank as usize]] {
                // SAFETY: boxes that `keep` keeps; what peers write into an inbox is looked at after its note alone.
                unsafe { self.courier.register(at, memory.box_bytes, memory.keep.clone())? };
            }
        }
        let card = self.courier.card()?;
        for rank in peers() {
            let to = incarnations[rank as usize].to_le_bytes();
            let at = memory.inboxes[rank as usize].to_le_bytes();
            board.put(&format!("way/{me}/{rank}"), &[&to, &at, &card[..]].concat())?;
        }
        for rank in peers() {
            let way = board.wait_for(&format!("way/{rank}/{me}"), left(), || Ok(()))?;
            let (to, at, card) = parse_way(&way)
                .ok_or_else(|| Error::internal(format!("rank {me}: rank {rank}'s way makes no sense")))?;
            if to != incarnation {
                let text =
                    format!("rank {me}: rank {rank} has met another process that says it is rank {me}");
                return Err(Error::new(Status::Mismatch, text));
            }
            let met = self.courier.meet(card);
            let peer = met.map_err(|e| e.context(format!("rank {me}: the way to rank {rank}")))?;
            let outbox = memory.outboxes[rank as usize];
            self.ways[rank as usize] = Some(Way { peer, inbox: at, outbox, is_lost: false, is_told: false });
        }
        board.put(&format!("met/{me}"), &incarnation.to_le_bytes())?;
        for rank in peers() {
            board.wait_for(&format!("met/{rank}"), left(), || Ok(()))?;
        }
        Ok(())
    }

    /// Drives what is under way, and keeps what is heard.
    fn drive(&mut self, me: u32) -> Result<()> {
        let Office { courier, ways, active, heard, .. } = self;
        let polled = courier.poll(&mut |peer, note| {
            if let Some(rank) = Office::rank_of(ways, peer) {
                heard.push_back((rank, note.to_vec()));
            }
        });
        let mut failed = Vec::new();
        active.retain(|(rank, lane)| {
            let Some(way) = ways[*rank as usize].as_ref() else { return false };
            match courier.delivery(way.peer, *lane as usize) {
                Delivery::UnderWay => true,
                Delivery::Done => false,
                Delivery::Failed(error) => {
                    failed.push((*rank, error.message));
                    false
                }
            }
        });
        failed.into_iter().for_each(|(rank, why)| self.lose(me, rank, &why));
        let Office { courier, ways, active, last, .. } = self;
        last.retain(|(rank, note)| {
            let Some(way) = ways[*rank as usize].as_ref().filter(|way| !way.is_lost) else { return false };
            if active.iter().any(|(other, _)| other == rank) {
                return true;
            }
            // SAFETY: no pieces.
            let _ = unsafe { courier.post(way.peer, 0, &[], note) };
            false
        });
        polled
    }

    fn has_work(&self) -> bool {
        !(self.active.is_empty() && self.last.is_empty())
    }

    fn rank_of(ways: &[Option<Way>], peer: Peer) -> Option<u32> {
        ways.iter().position(|way| way.as_ref().is_some_and(|way| way.peer == peer)).map(|rank| rank as u32)
    }

    fn lose(&mut self, me: u32, rank: u32, why: &str) {
        if let Some(way) = self.ways[rank as usize].as_mut().filter(|way| !way.is_lost) {
            way.is_lost = true;
            log(Level::Info, || format!("rank {me}: rank {rank} cannot be reached any more: {why}"));
        }
    }
}

fn parse_way(way: &[u8]) -> Option<(u64, u64, &[u8])> {
    let (to, rest) = way.split_first_chunk::<8>()?;
    let (at, card) = rest.split_first_chunk::<8>()?;
    Some((u64::from_le_bytes(*to), u64::from_le_bytes(*at), card))
}

impl Post for Mesh {
    fn send(&self, rank: u32, lane: u32, (offset, bytes): (u64, u64), note: &[u8]) -> Result<()> {
        let me = self.shared.rank;
        let mut office = self.shared.lock();
        let office = &mut *office;
        let Some(way) = office.ways[rank as usize].as_ref().filter(|way| !way.is_lost) else {
            return Ok(());
        };
        let piece = Piece { from: way.outbox + offset, to: way.inbox + offset, bytes };
        let pieces: &[Piece] = if bytes > 0 { &[piece] } else { &[] };
        // SAFETY: a part of the outbox, which is registered and not written to before it is delivered, and of the peer's inbox.
        let posted = unsafe { office.courier.post(way.peer, lane as usize, pieces, note) };
        match posted {
            Ok(()) => {
                if bytes > 0 {
                    office.active.push((rank, lane));
                }
                Ok(())
            }
            Err(error) if error.status == Status::Nixl => {
                office.lose(me, rank, &error.message);
                Ok(())
            }
            Err(error) => Err(error.context(format!("rank {me}: the way to rank {rank}"))),
        }
    }

    fn poll(&self, hear: &mut dyn FnMut(Heard)) -> Result<()> {
        let me = self.shared.rank;
        let mut office = self.shared.lock();
        office.rests = false;
        office.drive(me).map_err(|e| e.context(format!("rank {me}")))?;
        office.heard.drain(..).for_each(|(rank, note)| hear(Heard::Note(rank, &note)));
        if office.looked.elapsed() >= LOOK {
            office.looked = Instant::now();
            for rank in 0..office.ways.len() as u32 {
                let absent = self.shared.board.as_ref().and_then(|board| board.absent_since(&name_of(rank)));
                if absent.is_some_and(|since| since.elapsed() >= ABSENT) {
                    office.lose(me, rank, "it is not on the board");
                }
            }
        }
        for (rank, way) in (0..).zip(&mut office.ways) {
            if let Some(way) = way
                && way.is_lost
                && !std::mem::replace(&mut way.is_told, true)
            {
                hear(Heard::Lost(rank));
            }
        }
        Ok(())
    }

    fn send_last(&self, rank: u32, note: &[u8]) {
        let mut office = self.shared.lock();
        office.last.push((rank, note.to_vec()));
        office.rests = self.helper.is_some();
        self.shared.work.notify_all();
    }

    fn is_under_way(&self, rank: u32, lane: u32) -> bool {
        self.shared.lock().active.contains(&(rank, lane))
    }

    fn rest(&self) {
        self.shared.lock().rests = self.helper.is_some();
        self.shared.work.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

    use super::super::shared::Shared as InMemory;
    use super::*;
    use crate::transport::bootstrap::new_unique_id;

    const BOX: u64 = 4096;

    /// A rank's boxes: in and out, by rank.
    struct Boxes(Vec<[AtomicU64; BOX as usize / 8]>);

    fn memory(ranks: usize) -> (Memory, Arc<Boxes>) {
        let boxes = Arc::new(Boxes(
            (0..2 * ranks).map(|_| [const { AtomicU64::new(0) }; BOX as usize / 8]).collect(),
        ));
        let at = |i: usize| boxes.0[i].as_ptr() as u64;
        let memory = Memory {
            inboxes: (0..ranks).map(at).collect(),
            outboxes: (ranks..2 * ranks).map(at).collect(),
            box_bytes: BOX,
            keep: boxes.clone(),
        };
        (memory, boxes)
    }

    const PATIENCE_MS: u64 = 5000;

    /// Rank `rank` of so many, with a field whose value is `field`.
    fn gather(id: &UniqueId, rank: u32, ranks: u32, field: u64) -> Result<(Mesh, Arc<Boxes>)> {
        gather_within(id, rank, ranks, field, PATIENCE_MS)
    }

    fn gather_within(
        id: &UniqueId,
        rank: u32,
        ranks: u32,
        field: u64,
        timeout_ms: u64,
    ) -> Result<(Mesh, Arc<Boxes>)> {
        let bootstrap = Bootstrap::UniqueId(id.clone());
        let meeting = Meeting { rank, num_ranks: ranks, bootstrap, remote: false, timeout_ms };
        let deadline = Instant::now() + Duration::from_millis(meeting.timeout_ms);
        let party = Party { meeting: &meeting, fields: vec![("max_topk".into(), field)], deadline };
        let (memory, boxes) = memory(ranks as usize);
        let mesh =
            Mesh::gather(party, memory, |name| Ok(Box::new(InMemory::new(&format!("mesh.{name:x}"))?)))?;
        Ok((mesh, boxes))
    }

    fn of_all<T: Send>(ranks: u32, part: impl Fn(u32) -> T + Sync) -> Vec<T> {
        std::thread::scope(|scope| {
            let all: Vec<_> = (0..ranks)
                .map(|rank| {
                    scope.spawn({
                        let part = &part;
                        move || part(rank)
                    })
                })
                .collect();
            all.into_iter().map(|one| one.join().expect("a rank")).collect()
        })
    }

    #[test]
    fn what_is_sent_to_a_rank_lies_in_its_inbox_for_the_sender() {
        let id = new_unique_id().unwrap();
        of_all(3, |rank| {
            let (mesh, boxes) = gather(&id, rank, 3, 8).unwrap();
            for peer in (0..3).filter(|peer| *peer != rank) {
                boxes.0[3 + peer as usize][1].store(100 * rank as u64 + peer as u64, Relaxed);
                mesh.send(peer, 0, (8, 8), &[rank as u8]).unwrap();
                mesh.send_last(peer, b"goodbye");
            }
            let mut heard = Vec::new();
            let begun = Instant::now();
            while heard.len() < 4 {
                assert!(begun.elapsed() < Duration::from_secs(10), "rank {rank} has heard {heard:?}");
                let mut hear = |said: Heard| match said {
                    Heard::Note(source, b"goodbye") => heard.push((source, true)),
                    Heard::Note(source, note) => {
                        assert_eq!(
                            (note, boxes.0[source as usize][1].load(Relaxed)),
                            (&[source as u8][..], 100 * source as u64 + rank as u64)
                        );
                        heard.push((source, false));
                    }
                    Heard::Lost(_) => {}
                };
                mesh.poll(&mut hear).unwrap();
            }
            // Of each source, the last note is the last.
            for source in (0..3).filter(|source| *source != rank) {
                let theirs: Vec<bool> =
                    heard.iter().filter(|(by, _)| *by == source).map(|(_, last)| *last).collect();
                assert_eq!(theirs, [false, true]);
                assert!(!mesh.is_under_way(source, 0));
            }
        });
    }

    #[test]
    fn ranks_that_differ_are_told_in_what() {
        let id = new_unique_id().unwrap();
        for (rank, met) in
            of_all(2, |rank| gather(&id, rank, 2, 8 + rank as u64).map(drop)).into_iter().enumerate()
        {
            let error = met.unwrap_err();
            assert_eq!(error.status, Status::Mismatch, "{error}");
            let (mine, other) = (rank, 1 - rank);
            let text = format!(
                "rank {mine}: max_topk is {} on rank {mine} and {} on rank {other}",
                8 + mine,
                8 + other
            );
            assert_eq!(error.message, text);
        }
    }

    #[test]
    fn who_does_not_come_says_why() {
        let id = new_unique_id().unwrap();
        let begun = Instant::now();
        let outcomes = of_all(3, |rank| {
            if rank == 1 {
                let bootstrap = Bootstrap::UniqueId(id.clone());
                let meeting = Meeting { rank, num_ranks: 3, bootstrap, remote: false, timeout_ms: 5000 };
                decline(&meeting, &Error::unsupported("no such hidden size"));
                return Err(Error::invalid(""));
            }
            gather(&id, rank, 3, 8).map(drop)
        });
        for rank in [0, 2] {
            let error = outcomes[rank].as_ref().unwrap_err();
            assert_eq!(error.status, Status::Unsupported);
            assert_eq!(error.message, format!("rank {rank}: rank 1 cannot take part: no such hidden size"));
        }
        assert!(begun.elapsed() < Duration::from_secs(4), "{:?}", begun.elapsed());
    }

    #[test]
    fn who_never_comes_is_named_at_the_deadline() {
        let id = new_unique_id().unwrap();
        let error = gather_within(&id, 0, 2, 8, 200).map(drop).unwrap_err();
        assert_eq!(error.status, Status::Timeout, "{error}");
        assert!(error.message.contains("rank 0: there was no rank/1 within"), "{error}");
    }
}
