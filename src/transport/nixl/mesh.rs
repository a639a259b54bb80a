//! A rank's couriers to all others: the group meets on its board, and what `device` sends by rank goes its way.
//!
//! ```text
//! rank/R      who rank R is: its incarnation, what it was configured to, or why it does not come
//! way/R/P     how rank P writes into R's inbox for it: {R's incarnation, P's, the way's number, address, card}
//! met/R/P     R hears what P sends: {the number of R's way, of P's}
//! plan/R      which ranks R is to take part with: {a number that grows, its generation, ranks}
//! seen/R/D    R has seen the plans of all of them; D is a digest of their numbers and generations
//! ```

#![forbid(unsafe_op_in_unsafe_fn)]

use std::any::Any;
use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use super::{Courier, Delivery, Peer, Piece};
use crate::config::{Bootstrap, Meeting, UniqueId};
use crate::device::{Heard, Parcel, Post, Taken, list};
use crate::error::{Error, Result, Status};
use crate::log::{Level, log};
use crate::transport::bootstrap::{Board, random};

/// A rank whose entries are missing for so long is gone: a board that ends is replaced much sooner.
const ABSENT: Duration = Duration::from_millis(1500);
/// Between two looks at that.
const LOOK: Duration = Duration::from_millis(100);
/// The helper's, between two polls, at first and at last; the last is that of who connects, too.
const PAUSE: Duration = Duration::from_micros(50);
const LONGEST_PAUSE: Duration = Duration::from_millis(1);
/// What a comm has sent before it was destroyed is delivered within this, or not at all.
const LINGER: Duration = Duration::from_secs(2);
/// A rank that has seen old plans looks again.
const AGAIN: Duration = Duration::from_millis(50);
/// Of what a rank has seen, so much stays said.
const SAID: usize = 16;
/// What has arrived of a peer is heard within so many polls.
const LAST_LOOKS: u32 = 8;
/// How long a rank that does not come says so, at most.
const DECLINE: Duration = Duration::from_secs(1);
/// The last note of an incarnation: it writes nothing more.
const GOODBYE: &[u8] = b"goodbye";

/// Boxes of a peer: where what it sends comes to lie, where what is sent to it lies, and what keeps them.
pub type Boxes = (u64, u64, Arc<dyn Any + Send + Sync>);

/// Memory that a rank's peers write to and read from.
pub struct Memory {
    /// What is sent may lie there too: address and bytes.
    pub window: (u64, u64, Arc<dyn Any + Send + Sync>),
    pub box_bytes: u64,
    /// Of a peer; memory of their own if another incarnation of it may still write into the former ones.
    pub boxes: Box<dyn Fn(u32, bool) -> Result<Boxes> + Send + Sync>,
}

/// What a rank brings to the others.
pub struct Party {
    pub meeting: Meeting,
    /// As many as there may be.
    pub ranks: u32,
    /// What every rank must share, by name.
    pub fields: Vec<(String, u64)>,
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
    party: Party,
    memory: Memory,
    incarnation: u64,
    /// Held by who changes ways, or agrees on them.
    changing: Mutex<Past>,
    office: Mutex<Office>,
    /// Wakes the helper.
    work: Condvar,
    /// `None` for a rank alone.
    board: Option<Board>,
}

struct Office {
    courier: Box<dyn Courier>,
    /// By rank; `None` for this one, and for those that are not connected.
    ways: Vec<Option<Way>>,
    /// By rank: who had its boxes.
    used: Vec<Used>,
    /// What may still be under way: rank and lane.
    active: Vec<(u32, u32)>,
    /// Scratch.
    pieces: Vec<Piece>,
    /// Notes that are to be the last.
    last: Vec<(u32, Vec<u8>)>,
    /// What nobody has taken yet.
    heard: VecDeque<(u32, Vec<u8>)>,
    looked: Instant,
    /// The rank is elsewhere.
    rests: bool,
    /// The comm is destroyed: what is under way may go on until then.
    over: Option<Instant>,
}

/// Who had a rank's boxes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Used {
    Never,
    /// One that has said goodbye: nobody writes there.
    Left,
    Perhaps,
}

/// What was agreed on before.
struct Past {
    /// This rank's last plan, and by rank the last that was agreed on.
    last: u64,
    used: Vec<u64>,
    /// Entries that say what this rank has seen.
    said: VecDeque<String>,
}

/// How a peer is written to.
struct Way {
    peer: Peer,
    incarnation: u64,
    /// Of the peer's way: it has another number when it connects anew.
    number: u64,
    /// Where its inbox for this rank lies over there.
    inbox: u64,
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
            "rank {}: unique_id is not set, and ranks of transport nixl (3) meet by it",
            meeting.rank
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
            board.wait_for(&format!("heard/{rank}"), left(until), || Ok(()))?;
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

fn is_absent(board: &Board, rank: u32) -> bool {
    board.absent_since(&name_of(rank)).is_some_and(|since| since.elapsed() >= ABSENT)
}

fn left(deadline: Instant) -> Duration {
    deadline.saturating_duration_since(Instant::now())
}

/// Numbers at the front of an entry, and what follows them.
fn words<const N: usize>(bytes: &[u8]) -> Option<([u64; N], &[u8])> {
    let (front, rest) = bytes.split_at_checked(8 * N)?;
    let mut all = [0; N];
    for (word, bytes) in all.iter_mut().zip(front.chunks_exact(8)) {
        *word = u64::from_le_bytes(bytes.try_into().ok()?);
    }
    Some((all, rest))
}

fn bytes_of(words: &[u64]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

/// Asked now and then while ranks are waited for.
type Check<'a> = &'a dyn Fn() -> Result<()>;

impl Mesh {
    /// This rank's end, before it has met anybody. `courier` makes its incarnation's.
    pub fn open(
        party: Party,
        memory: Memory,
        courier: impl FnOnce(u64) -> Result<Box<dyn Courier>>,
    ) -> Result<Mesh> {
        let (rank, ranks) = (party.meeting.rank, party.ranks);
        let incarnation = u64::from_le_bytes(random()?) | 1;
        let mut board = None;
        if ranks > 1 {
            let opened = Board::open(&party.meeting, id_of(&party.meeting)?, incarnation)?;
            let said = json!({
                "version": env!("CARGO_PKG_VERSION"),
                "incarnation": incarnation,
                "fields": party.fields,
            });
            opened.put(&name_of(rank), said.to_string().as_bytes())?;
            board = Some(opened);
        }
        let mut courier = courier(incarnation)?;
        let (window, bytes, keep) = memory.window.clone();
        if bytes > 0 {
            // SAFETY: what `keep` keeps; nobody is told to write there.
            unsafe { courier.register(window, bytes, keep)? };
        }
        let office = Mutex::new(Office {
            courier,
            ways: (0..ranks).map(|_| None).collect(),
            used: vec![Used::Never; ranks as usize],
            active: Vec::new(),
            pieces: Vec::new(),
            last: Vec::new(),
            heard: VecDeque::new(),
            looked: Instant::now(),
            rests: false,
            over: None,
        });
        let past = Past { last: 0, used: vec![0; ranks as usize], said: VecDeque::new() };
        let (changing, work) = (Mutex::new(past), Condvar::new());
        let shared = Arc::new(Shared { rank, party, memory, incarnation, changing, office, work, board });
        let help = || {
            let shared = shared.clone();
            let name = format!("a2a-courier-{rank}");
            let thread = std::thread::Builder::new().name(name).spawn(move || shared.help());
            thread.map_err(|e| Error::system(format!("rank {rank}: the courier's thread"), e))
        };
        let helper = if ranks > 1 { Some(help()?) } else { None };
        Ok(Mesh { shared, helper })
    }

    /// Connects to ranks, each of which connects to this one. Those that are connected already stay so. Returns the others.
    pub fn connect(&self, ranks: &[u32], deadline: Instant, check: Check) -> Result<Vec<u32>> {
        self.shared.connect(ranks, deadline, check)
    }

    /// Forgets ranks: nothing is sent to them or heard of them any more.
    pub fn disconnect(&self, ranks: &[u32]) {
        self.shared.disconnect(ranks)
    }

    pub fn is_connected(&self, rank: u32) -> bool {
        self.shared.lock().ways[rank as usize].as_ref().is_some_and(|way| !way.is_lost)
    }

    /// Agrees with all of the ranks, ascending and this one among them, that they are to take part. Returns the generation: one
    /// more than the highest that any of them has had.
    pub fn agree(&self, ranks: &[u32], generation: u64, deadline: Instant, check: Check) -> Result<u64> {
        self.shared.agree(ranks, generation, deadline, check)
    }
}

impl Drop for Mesh {
    fn drop(&mut self) {
        let mut office = self.shared.lock();
        let ways = 0..office.ways.len() as u32;
        ways.for_each(|rank| office.last.push((rank, GOODBYE.to_vec())));
        let _ = office.drive(self.shared.rank);
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

    fn board(&self) -> Result<&Board> {
        let alone = || Error::invalid(format!("rank {}: max_ranks is 1, there is nobody to meet", self.rank));
        self.board.as_ref().ok_or_else(alone)
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

    /// An error if a rank is by now another incarnation than it was.
    fn still(&self, board: &Board, rank: u32, incarnation: u64) -> Result<()> {
        let Some(said) = board.value(&name_of(rank)) else { return Ok(()) };
        if presence(self.rank, rank, &said)?.incarnation == incarnation {
            return Ok(());
        }
        let text = format!("rank {}: rank {rank} was replaced meanwhile", self.rank);
        Err(Error::new(Status::PeerLost, text))
    }

    /// Which incarnation of a rank is connected.
    fn known(&self, rank: u32) -> Option<u64> {
        self.lock().ways[rank as usize].as_ref().map(|way| way.incarnation)
    }

    fn connect(&self, ranks: &[u32], deadline: Instant, check: Check) -> Result<Vec<u32>> {
        let mut past = self.changing.lock().unwrap_or_else(|e| e.into_inner());
        loop {
            match self.try_to_connect(&mut past, ranks, deadline, check) {
                // What the board said was of its former incarnation: anew, with the one that is there now.
                Err(error) if error.status == Status::PeerLost && !left(deadline).is_zero() => {
                    log(Level::Info, || error.to_string());
                    std::thread::sleep(PAUSE);
                }
                outcome => return outcome,
            }
        }
    }

    /// PEER_LOST if one is replaced meanwhile.
    fn try_to_connect(
        &self,
        past: &mut Past,
        ranks: &[u32],
        deadline: Instant,
        check: Check,
    ) -> Result<Vec<u32>> {
        let me = self.rank;
        let mut new: Vec<u32> = ranks.iter().copied().filter(|rank| *rank != me).collect();
        if new.is_empty() {
            return Ok(new);
        }
        let board = self.board()?;
        new.iter().for_each(|rank| board.read(&name_of(*rank)));
        let mut incarnations = vec![0; self.party.ranks as usize];
        for rank in &new {
            // Whoever is there is heard while others are waited for: a refusal ends it at once.
            let refusals = || {
                check()?;
                new.iter().try_for_each(|rank| {
                    let said = board.value(&name_of(*rank));
                    said.map_or(Ok(()), |said| presence(me, *rank, &said).map(|_| ()))
                })
            };
            let told = board.wait_for(&name_of(*rank), left(deadline), refusals).and_then(|said| {
                let presence = presence(me, *rank, &said)?;
                compare(me, &self.party.fields, *rank, &presence.fields)?;
                Ok(presence.incarnation)
            });
            incarnations[*rank as usize] = told.inspect_err(|_| {
                let _ = board.put(&format!("heard/{me}"), &[]);
            })?;
        }
        for rank in &new {
            if self.known(*rank).is_some_and(|known| known != incarnations[*rank as usize]) {
                return Err(Error::invalid(format!(
                    "rank {me}: rank {rank} is connected in another incarnation: disconnect it first"
                )));
            }
        }
        // One that has disconnected meanwhile, or connects anew, is not connected any more.
        new.iter().for_each(|rank| board.read(&format!("way/{rank}/{me}")));
        let same = |rank: &u32| {
            let way = board.value(&format!("way/{rank}/{me}"));
            let number = way.as_ref().and_then(|way| words::<4>(way)).map(|(way, _)| way[2]);
            self.lock().ways[*rank as usize]
                .as_ref()
                .is_some_and(|way| number == Some(way.number) && !way.is_lost)
        };
        new.retain(|rank| !same(rank));
        self.forget(&new);
        new.iter().for_each(|rank| past.used[*rank as usize] = 0);
        let met = self.meet(board, &new, &incarnations, deadline, check);
        // Who failed to connect begins anew.
        met.inspect_err(|_| self.forget(&new))?;
        Ok(new)
    }

    fn meet(
        &self,
        board: &Board,
        new: &[u32],
        incarnations: &[u64],
        deadline: Instant,
        check: Check,
    ) -> Result<()> {
        let me = self.rank;
        let mut numbers = vec![0; self.party.ranks as usize];
        for rank in new {
            let at = *rank as usize;
            let used = std::mem::replace(&mut self.lock().used[at], Used::Perhaps);
            let (inbox, outbox, keep) = (self.memory.boxes)(*rank, used == Used::Perhaps)?;
            numbers[at] = u64::from_le_bytes(random()?);
            let mut office = self.lock();
            for at in [inbox, outbox].into_iter().filter(|_| used == Used::Perhaps) {
                // SAFETY: boxes that `keep` keeps; what peers write into an inbox is looked at after its note alone.
                unsafe { office.courier.register(at, self.memory.box_bytes, keep.clone())? };
            }
            let card = office.courier.card()?;
            let head = bytes_of(&[self.incarnation, incarnations[at], numbers[at], inbox]);
            board.put(&format!("way/{me}/{rank}"), &[&head[..], &card].concat())?;
        }
        new.iter().for_each(|rank| board.read(&format!("met/{rank}/{me}")));
        for rank in new {
            let (incarnation, mine) = (incarnations[*rank as usize], numbers[*rank as usize]);
            loop {
                check()?;
                self.still(board, *rank, incarnation)?;
                // It may have another way than a moment ago.
                let way = board.value(&format!("way/{rank}/{me}"));
                if let Some(([by, to, number, inbox], card)) = way.as_ref().and_then(|way| words::<4>(way))
                    && [by, to] == [incarnation, self.incarnation]
                    && self.take_way(*rank, incarnation, (number, inbox), card)?
                {
                    board.put(&format!("met/{me}/{rank}"), &bytes_of(&[mine, number]))?;
                }
                if self.is_met(board, *rank, mine) {
                    break;
                }
                if left(deadline).is_zero() {
                    let text = format!("rank {me}: rank {rank} did not connect to this rank in time");
                    return Err(Error::new(Status::Timeout, text));
                }
                std::thread::sleep(LONGEST_PAUSE);
            }
        }
        Ok(())
    }

    /// Takes over how a rank is written to. Whether that was news.
    fn take_way(
        &self,
        rank: u32,
        incarnation: u64,
        (number, inbox): (u64, u64),
        card: &[u8],
    ) -> Result<bool> {
        let mut office = self.lock();
        let former = office.ways[rank as usize].as_ref().map(|way| (way.peer, way.number));
        if former.is_some_and(|(_, former)| former == number) {
            return Ok(false);
        }
        former.iter().for_each(|(peer, _)| office.courier.forget(*peer));
        let met = office.courier.meet(card);
        let peer = met.map_err(|e| e.context(format!("rank {}: the way to rank {rank}", self.rank)))?;
        let way = Way { peer, incarnation, number, inbox, is_lost: false, is_told: false };
        office.ways[rank as usize] = Some(way);
        Ok(true)
    }

    /// A rank whose way is known has met this one, by its way `mine`: it says so, or it has left, which it does not before. Its
    /// entry and its goodbye may both be lost then, and the next step names it.
    fn is_met(&self, board: &Board, rank: u32, mine: u64) -> bool {
        let mut office = self.lock();
        office.settle(self.rank, &[]);
        let Some(way) = &office.ways[rank as usize] else { return false };
        let met = bytes_of(&[way.number, mine]);
        if board.last_value(&format!("met/{rank}/{}", self.rank)) == Some(met)
            || office.used[rank as usize] == Used::Left
        {
            return true;
        }
        let is_gone = is_absent(board, rank);
        if is_gone {
            office.lose(self.rank, rank, "it is not on the board");
        }
        is_gone
    }

    fn disconnect(&self, ranks: &[u32]) {
        let _changing = self.changing.lock().unwrap_or_else(|e| e.into_inner());
        // Who has said goodbye leaves its boxes to the next.
        for _ in 0..LAST_LOOKS {
            if let Err(error) = self.lock().drive(self.rank) {
                log(Level::Debug, || format!("rank {}: {error}", self.rank));
            }
        }
        self.forget(ranks);
    }

    fn forget(&self, ranks: &[u32]) {
        for rank in ranks.iter().filter(|rank| **rank != self.rank) {
            let mut office = self.lock();
            if let Some(way) = office.ways[*rank as usize].take() {
                office.courier.forget(way.peer);
            }
            office.active.retain(|(other, _)| other != rank);
            office.last.retain(|(other, _)| other != rank);
            office.heard.retain(|(other, _)| other != rank);
            drop(office);
            if let Some(board) = &self.board {
                board.take_back(&format!("way/{}/{rank}", self.rank));
                board.take_back(&format!("met/{}/{rank}", self.rank));
            }
        }
    }

    fn agree(&self, ranks: &[u32], generation: u64, deadline: Instant, check: Check) -> Result<u64> {
        let mut past = self.changing.lock().unwrap_or_else(|e| e.into_inner());
        let me = self.rank;
        if *ranks == [me] {
            self.lock().abandon_others(me, ranks);
            return Ok(generation + 1);
        }
        let board = self.board()?;
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_micros() as u64;
        past.last = now.max(past.last + 1);
        let mine = (past.last, generation);
        let set = bytes_of(&ranks.iter().map(|rank| *rank as u64).collect::<Vec<_>>());
        // What a step that was given up on has sent is delivered before another begins: all poll until all have said so.
        loop {
            let busy = self.lock().settle(me, ranks);
            if busy.is_empty() {
                break;
            }
            check()?;
            if left(deadline).is_zero() {
                let busy = list(&busy);
                let text = format!("rank {me}: {busy} did not take in time what a step before has sent");
                return Err(Error::new(Status::Timeout, text));
            }
            std::thread::sleep(PAUSE);
        }
        board.put(&format!("plan/{me}"), &[&bytes_of(&[mine.0, mine.1])[..], &set].concat())?;
        let peers = || ranks.iter().copied().filter(|rank| *rank != me);
        peers().for_each(|rank| board.read(&format!("plan/{rank}")));
        // One that has been agreed on is an old one.
        let planned = |rank: u32, used: &[u64]| {
            let plan = board.value(&format!("plan/{rank}"))?;
            let ([number, generation], rest) = words::<2>(&plan)?;
            (rest == set && number > used[rank as usize]).then_some((number, generation))
        };
        // What was seen last, and before: an old plan may have been among it.
        let mut seen: Vec<Vec<(u64, u64)>> = Vec::new();
        let mut since = Instant::now();
        loop {
            check()?;
            if seen.is_empty() || since.elapsed() >= AGAIN {
                since = Instant::now();
                let of = |rank: &u32| if *rank == me { Some(mine) } else { planned(*rank, &past.used) };
                let all = ranks.iter().map(of).collect::<Option<Vec<(u64, u64)>>>();
                if let Some(all) = all.filter(|all| seen.last() != Some(all)) {
                    let name = seen_by(me, &all);
                    board.put(&name, &[])?;
                    peers().for_each(|rank| board.read(&seen_by(rank, &all)));
                    past.said.push_back(name);
                    // Who has not read the first of so many takes no part any more.
                    if past.said.len() > SAID {
                        past.said.pop_front().iter().for_each(|name| board.take_back(name));
                    }
                    seen.push(all);
                }
            }
            // Others wait for what they have sent to this rank.
            self.lock().settle(me, ranks);
            let is_seen =
                |all: &&Vec<(u64, u64)>| peers().all(|rank| board.last_value(&seen_by(rank, all)).is_some());
            if let Some(all) = seen.iter().find(is_seen) {
                self.lock().abandon_others(me, ranks);
                for (rank, plan) in ranks.iter().zip(all) {
                    past.used[*rank as usize] = plan.0;
                }
                return Ok(all.iter().map(|plan| plan.1).max().unwrap_or(generation) + 1);
            }
            // Who has agreed may have left since, and its word would have come by now.
            if let Some(rank) = peers().find(|rank| is_absent(board, *rank)) {
                let text =
                    format!("rank {me}: rank {rank} has gone before ranks {ranks:?} agreed to take part");
                return Err(Error::new(Status::PeerLost, text));
            }
            if left(deadline).is_zero() {
                let is_missing = |rank: &u32| match seen.last() {
                    None => planned(*rank, &past.used).is_none(),
                    Some(all) => board.value(&seen_by(*rank, all)).is_none(),
                };
                let missing: Vec<u32> = peers().filter(is_missing).collect();
                let text = format!(
                    "rank {me}: {} did not agree in time that ranks {ranks:?} are to take part",
                    list(&missing)
                );
                return Err(Error::new(Status::Timeout, text));
            }
            std::thread::sleep(PAUSE);
        }
    }
}

/// The name of the entry by which a rank says that it has seen these plans.
fn seen_by(rank: u32, plans: &[(u64, u64)]) -> String {
    let words: Vec<u64> = plans.iter().flat_map(|plan| [plan.0, plan.1]).collect();
    let digest = Sha256::digest(bytes_of(&words));
    let short: String = digest.iter().take(16).map(|byte| format!("{byte:02x}")).collect();
    format!("seen/{rank}/{short}")
}

impl Office {
    /// Drives what is under way, and keeps what is heard.
    fn drive(&mut self, me: u32) -> Result<()> {
        let Office { courier, ways, used, active, heard, .. } = self;
        let mut gone = Vec::new();
        let polled = courier.poll(&mut |peer, note| {
            if let Some(rank) = Office::rank_of(ways, peer) {
                match note {
                    GOODBYE => {
                        used[rank as usize] = Used::Left;
                        gone.push(rank);
                    }
                    _ => heard.push_back((rank, note.to_vec())),
                }
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
        gone.into_iter().for_each(|rank| self.lose(me, rank, "it has said goodbye"));
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

    /// Nothing more is told to a rank, not even of what is under way.
    fn abandon(&mut self, me: u32, rank: u32) {
        self.lose(me, rank, "this one goes on without it");
        self.active.retain(|(other, _)| *other != rank);
        self.last.retain(|(other, _)| *other != rank);
        if let Some(way) = &self.ways[rank as usize] {
            self.courier.forget(way.peer);
        }
    }

    /// What is under way to ranks that take no part reads what the next steps write.
    fn abandon_others(&mut self, me: u32, ranks: &[u32]) {
        let busy: Vec<u32> = self.active.iter().map(|(rank, _)| *rank).collect();
        busy.iter().filter(|rank| !ranks.contains(rank)).for_each(|rank| self.abandon(me, *rank));
    }

    /// The ranks to which something is under way.
    fn settle(&mut self, me: u32, ranks: &[u32]) -> Vec<u32> {
        if let Err(error) = self.drive(me) {
            log(Level::Debug, || format!("rank {me}: {error}"));
        }
        self.active.iter().map(|(rank, _)| *rank).filter(|rank| ranks.contains(rank)).collect()
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

impl Post for Mesh {
    fn send(&self, rank: u32, lane: u32, parcels: &[Parcel], note: &[u8]) -> Result<()> {
        let me = self.shared.rank;
        let mut office = self.shared.lock();
        let Office { courier, ways, active, pieces, .. } = &mut *office;
        let Some(way) = ways[rank as usize].as_ref().filter(|way| !way.is_lost) else { return Ok(()) };
        pieces.clear();
        pieces.extend(parcels.iter().map(|parcel| Piece {
            from: parcel.from,
            to: way.inbox + parcel.within,
            bytes: parcel.bytes,
        }));
        // SAFETY: this rank's memory, which is registered and not written to before it is delivered, and the peer's inbox.
        match unsafe { courier.post(way.peer, lane as usize, pieces, note) } {
            Ok(()) => {
                if !pieces.is_empty() {
                    active.push((rank, lane));
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

    fn abandon(&self, rank: u32) {
        self.shared.lock().abandon(self.shared.rank, rank);
    }

    fn poll(&self, hear: &mut dyn FnMut(Heard) -> Taken) -> Result<()> {
        let me = self.shared.rank;
        let mut office = self.shared.lock();
        office.rests = false;
        office.drive(me).map_err(|e| e.context(format!("rank {me}")))?;
        office.heard.retain(|(rank, note)| hear(Heard::Note(*rank, note)) == Taken::Later);
        if office.looked.elapsed() >= LOOK {
            office.looked = Instant::now();
            for rank in 0..office.ways.len() as u32 {
                if self.shared.board.as_ref().is_some_and(|board| is_absent(board, rank)) {
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
    const PATIENCE: Duration = Duration::from_secs(5);

    /// A rank's boxes: in and out, by rank.
    struct Memories(Vec<[AtomicU64; BOX as usize / 8]>);

    fn open(id: &UniqueId, rank: u32, ranks: u32, field: u64) -> (Mesh, Arc<Memories>) {
        let bootstrap = Bootstrap::UniqueId(id.clone());
        let meeting = Meeting { rank, num_ranks: ranks, bootstrap, remote: false, timeout_ms: 5000 };
        let boxes = || [const { AtomicU64::new(0) }; BOX as usize / 8];
        let boxes = Arc::new(Memories((0..2 * ranks).map(|_| boxes()).collect()));
        let all = boxes.clone();
        let of = move |peer: u32, _: bool| -> Result<Boxes> {
            let at = |i: u32| all.0[i as usize].as_ptr() as u64;
            Ok((at(peer), at(ranks + peer), all.clone()))
        };
        let bytes = 2 * ranks as u64 * BOX;
        let window = (boxes.0.as_ptr() as u64, bytes, boxes.clone() as Arc<dyn Any + Send + Sync>);
        let memory = Memory { window, box_bytes: BOX, boxes: Box::new(of) };
        let party = Party { meeting, ranks, fields: vec![("max_topk".into(), field)] };
        let courier =
            |name| -> Result<Box<dyn Courier>> { Ok(Box::new(InMemory::new(&format!("mesh.{name:x}"))?)) };
        (Mesh::open(party, memory, courier).unwrap(), boxes)
    }

    fn connect(mesh: &Mesh, ranks: &[u32]) -> Result<Vec<u32>> {
        mesh.connect(ranks, Instant::now() + PATIENCE, &|| Ok(()))
    }

    fn agree(mesh: &Mesh, ranks: &[u32], generation: u64) -> Result<u64> {
        mesh.agree(ranks, generation, Instant::now() + PATIENCE, &|| Ok(()))
    }

    fn of_all<T: Send>(ranks: &[u32], part: impl Fn(u32) -> T + Sync) -> Vec<T> {
        std::thread::scope(|scope| {
            let part = &part;
            let all: Vec<_> = ranks.iter().map(|rank| scope.spawn(move || part(*rank))).collect();
            all.into_iter().map(|one| one.join().expect("a rank")).collect()
        })
    }

    /// Polls until so many notes have come; each source's, in order.
    fn hear(mesh: &Mesh, count: usize, mut note: impl FnMut(u32, &[u8])) {
        let (mut heard, begun) = (0, Instant::now());
        while heard < count {
            assert!(begun.elapsed() < PATIENCE, "{heard} of {count} notes");
            let mut each = |said: Heard| {
                if let Heard::Note(source, bytes) = said {
                    note(source, bytes);
                    heard += 1;
                }
                Taken::Now
            };
            mesh.poll(&mut each).unwrap();
        }
    }

    #[test]
    fn what_is_sent_to_a_rank_lies_in_its_inbox_for_the_sender() {
        let id = new_unique_id().unwrap();
        of_all(&[0, 1, 2], |rank| {
            let (mesh, boxes) = open(&id, rank, 3, 8);
            let others: Vec<u32> = (0..3).filter(|peer| *peer != rank).collect();
            assert_eq!(connect(&mesh, &[0, 1, 2]).unwrap(), others);
            assert!(connect(&mesh, &[0, 1, 2]).unwrap().is_empty());
            for peer in &others {
                boxes.0[3 + *peer as usize][1].store(100 * rank as u64 + *peer as u64, Relaxed);
                let from = boxes.0[3 + *peer as usize][1].as_ptr() as u64;
                let word = Parcel { from, within: 8, bytes: 8 };
                mesh.send(*peer, 0, &[word], &[rank as u8]).unwrap();
                mesh.send_last(*peer, b"the end");
            }
            let mut heard = Vec::new();
            hear(&mesh, 4, |source, note| {
                let is_last = note == b"the end";
                if !is_last {
                    let word = boxes.0[source as usize][1].load(Relaxed);
                    assert_eq!((note, word), (&[source as u8][..], 100 * source as u64 + rank as u64));
                }
                heard.push((source, is_last));
            });
            for source in others {
                let theirs = heard.iter().filter(|(by, _)| *by == source).map(|(_, last)| *last);
                assert_eq!(theirs.collect::<Vec<_>>(), [false, true]);
                assert!(!mesh.is_under_way(source, 0));
            }
        });
    }

    /// A note that is not taken comes again, and behind it those that are.
    #[test]
    fn what_is_too_early_is_kept() {
        let id = new_unique_id().unwrap();
        of_all(&[0, 1], |rank| {
            let (mesh, _boxes) = open(&id, rank, 2, 8);
            connect(&mesh, &[0, 1]).unwrap();
            if rank == 0 {
                mesh.send(1, 0, &[], b"later").unwrap();
                mesh.send(1, 0, &[], b"now").unwrap();
                return hear(&mesh, 1, |_, note| assert_eq!(note, b"thanks"));
            }
            let mut taken = Vec::new();
            let begun = Instant::now();
            while taken.len() < 2 {
                assert!(begun.elapsed() < PATIENCE, "{taken:?}");
                let mut each = |said: Heard| match said {
                    Heard::Note(_, b"later") if taken.is_empty() => Taken::Later,
                    Heard::Note(_, note) => {
                        taken.push(note.to_vec());
                        Taken::Now
                    }
                    Heard::Lost(_) => Taken::Now,
                };
                mesh.poll(&mut each).unwrap();
            }
            assert_eq!(taken, [b"now".to_vec(), b"later".to_vec()]);
            mesh.send(0, 0, &[], b"thanks").unwrap();
            // Until the other has heard it.
            hear(&mesh, 0, |_, _| {});
        });
    }

    #[test]
    fn ranks_that_differ_are_told_in_what() {
        let id = new_unique_id().unwrap();
        let turn = std::sync::Barrier::new(2);
        let met = of_all(&[0, 1], |rank| {
            let (mesh, _boxes) = open(&id, rank, 2, 8 + rank as u64);
            let met = connect(&mesh, &[0, 1]);
            // Who leaves at once may not be compared with.
            turn.wait();
            met.map(drop)
        });
        for (rank, met) in met.into_iter().enumerate() {
            let (error, other) = (met.unwrap_err(), 1 - rank);
            assert_eq!(error.status, Status::Mismatch, "{error}");
            let text = format!(
                "rank {rank}: max_topk is {} on rank {rank} and {} on rank {other}",
                8 + rank,
                8 + other
            );
            assert_eq!(error.message, text);
        }
    }

    #[test]
    fn who_does_not_come_says_why() {
        let id = new_unique_id().unwrap();
        let begun = Instant::now();
        let outcomes = of_all(&[0, 1, 2], |rank| {
            if rank == 1 {
                let bootstrap = Bootstrap::UniqueId(id.clone());
                let meeting = Meeting { rank, num_ranks: 3, bootstrap, remote: false, timeout_ms: 5000 };
                decline(&meeting, &Error::unsupported("no such hidden size"));
                return Err(Error::invalid(""));
            }
            connect(&open(&id, rank, 3, 8).0, &[0, 1, 2]).map(drop)
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
        let (mesh, _boxes) = open(&id, 0, 3, 8);
        let soon = || Instant::now() + Duration::from_millis(200);
        let error = mesh.connect(&[0, 1], soon(), &|| Ok(())).unwrap_err();
        assert_eq!(error.status, Status::Timeout, "{error}");
        assert!(error.message.contains("rank 0: there was no rank/1 within"), "{error}");
        let error = mesh.agree(&[0, 2], 1, soon(), &|| Ok(())).unwrap_err();
        let text = "rank 0: rank 2 did not agree in time that ranks [0, 2] are to take part";
        assert_eq!((error.status, &error.message[..]), (Status::Timeout, text));
    }

    /// The others may be told that they are met by nobody's entry any more.
    #[test]
    fn who_has_met_all_may_leave_at_once() {
        for _ in 0..20 {
            let id = new_unique_id().unwrap();
            let begun = Instant::now();
            of_all(&[0, 1, 2, 3], |rank| {
                // Rank 0 comes when another serves the board.
                std::thread::sleep(Duration::from_millis(if rank == 0 { 320 } else { 0 }));
                let (mesh, _boxes) = open(&id, rank, 4, 8);
                connect(&mesh, &[0, 1, 2, 3]).unwrap();
            });
            assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
        }
    }

    /// Its entry says to the other that it is met, but not for long enough to be seen; nor does its goodbye arrive.
    #[test]
    fn who_has_met_all_may_leave_without_a_trace() {
        let id = new_unique_id().unwrap();
        let bootstrap = Bootstrap::UniqueId(id.clone());
        let meeting = Meeting { rank: 0, num_ranks: 2, bootstrap, remote: false, timeout_ms: 5000 };
        let board = Board::open(&meeting, id.clone(), 7).unwrap();
        let said = json!({
            "version": env!("CARGO_PKG_VERSION"), "incarnation": 7, "fields": [["max_topk", 8]],
        });
        board.put(&name_of(0), said.to_string().as_bytes()).unwrap();
        std::thread::scope(|scope| {
            let (mesh, _boxes) = open(&id, 1, 2, 8);
            let way = board.wait_for("rank/1", PATIENCE, || Ok(())).unwrap();
            let theirs = presence(0, 1, &way).unwrap().incarnation;
            let connecting =
                scope.spawn(move || connect(&mesh, &[0, 1]).map(|new| (new, mesh.is_connected(0))));
            let card = InMemory::new("mesh.7").unwrap().card().unwrap();
            let head = bytes_of(&[7, theirs, 1, 0]);
            board.put("way/0/1", &[&head[..], &card].concat()).unwrap();
            board.wait_for("met/1/0", PATIENCE, || Ok(())).unwrap();
            drop(board);
            assert_eq!(connecting.join().unwrap().unwrap(), (vec![0], false));
        });
    }

    /// Plans are agreed on, one after the other, the same ranks again among them; by ranks that have had none too.
    #[test]
    fn plans_are_agreed_on_by_all_of_them() {
        let id = new_unique_id().unwrap();
        let phases: [&[u32]; 5] = [&[0, 1], &[0, 1, 2], &[0, 1], &[0, 1], &[0, 2]];
        let generations = of_all(&[0, 1, 2], |rank| {
            let (mesh, _boxes) = open(&id, rank, 3, 8);
            connect(&mesh, &[0, 1, 2]).unwrap();
            let mut generation = 0;
            let mut all = Vec::new();
            for ranks in phases.iter().filter(|ranks| ranks.contains(&rank)) {
                generation = agree(&mesh, ranks, generation).unwrap();
                all.push(generation);
            }
            // Nobody leaves before all have done.
            connect(&mesh, &[0, 1, 2]).unwrap();
            std::thread::sleep(Duration::from_millis(50));
            all
        });
        assert_eq!(generations, [vec![1, 2, 3, 4, 5], vec![1, 2, 3, 4], vec![2, 5]]);
    }

    /// Not only at the deadline.
    #[test]
    fn who_leaves_before_it_agrees_is_named() {
        let id = new_unique_id().unwrap();
        of_all(&[0, 1], |rank| {
            let (mesh, _boxes) = open(&id, rank, 2, 8);
            connect(&mesh, &[0, 1]).unwrap();
            if rank == 0 {
                let begun = Instant::now();
                let error = agree(&mesh, &[0, 1], 1).unwrap_err();
                let text = "rank 0: rank 1 has gone before ranks [0, 1] agreed to take part";
                assert_eq!((error.status, &error.message[..]), (Status::PeerLost, text));
                assert!(begun.elapsed() < PATIENCE, "{:?}", begun.elapsed());
            }
        });
    }

    /// A rank is replaced by another process that says it is the same: the others disconnect the former and connect to the new one.
    #[test]
    fn a_rank_comes_back_as_another() {
        let id = new_unique_id().unwrap();
        let turn = std::sync::Barrier::new(2);
        of_all(&[0, 1], |rank| {
            let (mut mesh, mut boxes) = open(&id, rank, 2, 8);
            connect(&mesh, &[0, 1]).unwrap();
            for round in 0..5u8 {
                turn.wait();
                if rank == 1 {
                    drop(mesh);
                    (mesh, boxes) = open(&id, 1, 2, 8);
                } else {
                    mesh.disconnect(&[1]);
                    assert!(!mesh.is_connected(1));
                }
                turn.wait();
                connect(&mesh, &[0, 1]).unwrap();
                boxes.0[2 + (1 - rank as usize)][0].store(round as u64, Relaxed);
                let from = boxes.0[2 + (1 - rank as usize)].as_ptr() as u64;
                let word = Parcel { from, within: 0, bytes: 8 };
                mesh.send(1 - rank, 0, &[word], &[round]).unwrap();
                hear(&mesh, 1, |source, note| {
                    assert_eq!((source, note), (1 - rank, &[round][..]));
                    assert_eq!(boxes.0[source as usize][0].load(Relaxed), round as u64);
                });
            }
            turn.wait();
        });
    }
}
