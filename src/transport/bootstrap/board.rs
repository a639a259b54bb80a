//! The board of a group whose ranks come and go: entries that ranks put under the group's key, and read.
//!
//! Whoever can bind the unique id's address serves it; all others are its guests. It makes way for rank 0, should that come later:
//! who serves must not stand still. Every rank keeps what it has put and what it reads, and says so again to whoever serves next: a
//! board that ends is replaced by another with the same entries. An entry lasts as long as the connection of who has put it: that
//! a rank's is missing for long means that it is gone.
//!
//! ```text
//! guest -> server  JOIN, of a group of no ranks, with the incarnation          (wire.rs; a group that forms there refuses it alone)
//! server -> guest  WELCOME
//! guest -> server  PUT name value | TAKE name | ASK name                       ASK: now, and whenever it changes
//! server -> guest  PUT name value | TAKE name                                  it is there | it is not
//! ```

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::pipe::PipeFlags;

use super::Party;
use super::peer::Peer;
use super::root::Lobby;
use super::socket::{Deadline, Listener, SLICE, Stream, connect_once};
use super::wire::{Kind, Line, Trouble};
use crate::config::{Meeting, UniqueId};
use crate::error::{Error, Result, Status};
use crate::log::{Level, log};

/// Between two attempts to find a board, or to be one.
const PAUSE: Duration = Duration::from_millis(20);
/// Any other rank than 0 looks for a board so long before it is one.
const PATIENCE: Duration = Duration::from_millis(300);
/// Who serves again so soon after it has made way for rank 0 does so no more: rank 0 cannot serve, on another host for instance.
const TURN: Duration = Duration::from_secs(2);
/// Who serves answers within this.
const ANSWER_MS: u64 = 2000;
/// Of a name and its value: a message has room for more.
const MAX_ENTRY: usize = 6 << 10;

/// What a rank knows of an entry that it reads.
#[derive(Clone, Default)]
struct Seen {
    /// What it says, or said before it was gone.
    said: Option<Vec<u8>>,
    /// Since when there has been none.
    absent: Option<Instant>,
}

impl Seen {
    fn value(&self) -> Option<&Vec<u8>> {
        self.said.as_ref().filter(|_| self.absent.is_none())
    }
}

#[derive(Default)]
struct State {
    /// What this rank has put.
    mine: BTreeMap<String, Vec<u8>>,
    /// What it reads.
    read: BTreeMap<String, Seen>,
    /// What is new of either since the thread has looked: names.
    news: Vec<String>,
    is_over: bool,
    /// How it went to find a board, as long as there is none.
    trouble: Option<String>,
    #[cfg(test)]
    is_served_here: bool,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|e| e.into_inner())
    }
    fn note(&self, name: &str, value: Option<&[u8]>) {
        let mut state = self.lock();
        // What nobody here reads any more may still be on its way.
        let Some(seen) = state.read.get_mut(name) else { return };
        match value {
            Some(value) => *seen = Seen { said: Some(value.to_vec()), absent: None },
            None => drop(seen.absent.get_or_insert_with(Instant::now)),
        }
        self.changed.notify_all();
    }
}

/// One rank's end. Ends on drop, and with it what the rank has put.
pub struct Board {
    rank: u32,
    shared: Arc<Shared>,
    /// A byte wakes the thread.
    wake: Option<OwnedFd>,
    thread: Option<JoinHandle<()>>,
}

impl Board {
    /// Finds the board, or becomes it, in the background.
    pub fn open(meeting: &Meeting, id: UniqueId, incarnation: u64) -> Result<Board> {
        let (rank, shared) = (meeting.rank, Arc::new(Shared::default()));
        let (woken, wake) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK)
            .map_err(|e| Error::system(format!("rank {rank}: the pipe of the board"), e))?;
        let check = {
            let shared = shared.clone();
            let over = move || Error::internal(format!("rank {rank}: the board is over"));
            Arc::new(move || if shared.lock().is_over { Err(over()) } else { Ok(()) })
        };
        // A group of no ranks: one that forms at the same address knows it for no part of its own.
        let party = Party { num_ranks: 0, root: "the board", check, ..Party::of(meeting, id, ANSWER_MS) };
        let run = Run { shared: shared.clone(), party, incarnation, woken };
        let thread = std::thread::Builder::new()
            .name(format!("a2a-board-{rank}"))
            .spawn(move || run.run())
            .map_err(|e| Error::system(format!("rank {rank}: the thread of the board"), e))?;
        Ok(Board { rank, shared, wake: Some(wake), thread: Some(thread) })
    }

    fn change(&self, name: &str, change: impl FnOnce(&mut State)) {
        let mut state = self.shared.lock();
        change(&mut state);
        state.news.push(name.into());
        drop(state);
        if let Some(wake) = &self.wake {
            // A full pipe wakes as well.
            let _ = rustix::io::write(wake, &[1]);
        }
    }

    /// Puts an entry, in the place of the rank's former one of that name.
    pub fn put(&self, name: &str, value: &[u8]) -> Result<()> {
        if name.len() + value.len() > MAX_ENTRY {
            let bytes = name.len() + value.len();
            return Err(Error::internal(format!("an entry of {bytes} bytes, the limit is {MAX_ENTRY}")));
        }
        self.change(name, |state| drop(state.mine.insert(name.into(), value.into())));
        Ok(())
    }

    /// Takes one's own entry back.
    pub fn take_back(&self, name: &str) {
        self.change(name, |state| drop(state.mine.remove(name)));
    }

    /// From now on `value` and `absent_since` know of the entry.
    pub fn read(&self, name: &str) {
        self.change(name, |state| {
            state.read.entry(name.into()).or_default();
        });
    }

    /// As it stands, if it does.
    pub fn value(&self, name: &str) -> Option<Vec<u8>> {
        self.shared.lock().read.get(name).and_then(|seen| seen.value().cloned())
    }

    /// What it said last, whether or not it is still there.
    pub fn last_value(&self, name: &str) -> Option<Vec<u8>> {
        self.shared.lock().read.get(name).and_then(|seen| seen.said.clone())
    }

    #[cfg(test)]
    fn is_served_here(&self) -> bool {
        self.shared.lock().is_served_here
    }

    /// Since when the entry, which is read, has been missing. Others put theirs again within moments where the board is new.
    pub fn absent_since(&self, name: &str) -> Option<Instant> {
        self.shared.lock().read.get(name).and_then(|seen| seen.absent)
    }

    /// Reads an entry, and waits until it is there; asks `check`, which may look at entries, now and then.
    pub fn wait_for(&self, name: &str, timeout: Duration, check: impl Fn() -> Result<()>) -> Result<Vec<u8>> {
        let until = Instant::now() + timeout;
        self.read(name);
        loop {
            check()?;
            let state = self.shared.lock();
            let value = state.read.get(name).and_then(|seen| seen.value());
            if let Some(value) = value {
                return Ok(value.clone());
            }
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                let why = state.trouble.as_ref().map(|why| format!(" ({why})")).unwrap_or_default();
                let text =
                    format!("rank {}: there was no {name} within {} ms{why}", self.rank, timeout.as_millis());
                return Err(Error::new(Status::Timeout, text));
            }
            drop(self.shared.changed.wait_timeout(state, left.min(SLICE)));
        }
    }
}

impl Drop for Board {
    fn drop(&mut self) {
        self.shared.lock().is_over = true;
        // Hangs up the thread's end.
        self.wake = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

// -------------------------------------------------------------------------------------------------- the thread

struct Run {
    shared: Arc<Shared>,
    party: Party,
    incarnation: u64,
    woken: OwnedFd,
}

fn entry(name: &str, value: &[u8]) -> Vec<u8> {
    [&(name.len() as u16).to_le_bytes(), name.as_bytes(), value].concat()
}

fn parse(body: &[u8]) -> Option<(&str, &[u8])> {
    let (length, rest) = body.split_first_chunk::<2>()?;
    let (name, value) = rest.split_at_checked(u16::from_le_bytes(*length) as usize)?;
    Some((std::str::from_utf8(name).ok()?, value))
}

/// Somebody else's connection.
struct Guest {
    rank: u32,
    line: Line,
    reads: BTreeSet<String>,
}

impl Guest {
    /// Who cannot be told has gone, and shows it.
    fn tell(&mut self, name: &str, value: Option<&[u8]>) {
        let kind = if value.is_some() { Kind::Put } else { Kind::Take };
        let _ = self.line.send_signed(kind, entry(name, value.unwrap_or_default()));
    }
}

/// Who serves knows: whose entry it is (`None`: this rank's own), and what it says.
type Entries = BTreeMap<String, (Option<u32>, Vec<u8>)>;

impl Run {
    fn is_over(&self) -> bool {
        self.shared.lock().is_over
    }

    fn run(self) {
        let patience = if self.party.rank == 0 { Duration::ZERO } else { PATIENCE };
        let mut stays = self.party.rank == 0;
        let mut made_way: Option<Instant> = None;
        let mut since = Instant::now();
        while !self.is_over() {
            let soon = Deadline::after_ms(ANSWER_MS);
            let (address, remote) = (&self.party.id.address, self.party.remote);
            let trouble = match connect_once(address, remote, soon).and_then(|stream| self.join(stream)) {
                Ok(line) => {
                    self.shared.lock().trouble = None;
                    self.visit(line);
                    since = Instant::now();
                    continue;
                }
                Err(error) => error,
            };
            if since.elapsed() < patience {
                self.shared.lock().trouble = Some(trouble.to_string());
                std::thread::sleep(PAUSE);
                continue;
            }
            match Listener::open(address, remote, soon, "somebody serves there") {
                Ok(listener) => {
                    stays |= made_way.is_some_and(|at| at.elapsed() < TURN);
                    self.serve(listener, stays);
                    since = Instant::now();
                    made_way = Some(since);
                }
                Err(error) => {
                    self.shared.lock().trouble = Some(format!("{trouble}; {error}"));
                    std::thread::sleep(PAUSE);
                }
            }
        }
    }

    /// Names of all that this rank has put or reads. What it reads it asks for first: who hears of an entry of its knows
    /// that it has asked for theirs.
    fn all(&self) -> Vec<String> {
        let state = self.shared.lock();
        state.read.keys().chain(state.mine.keys()).cloned().collect()
    }

    /// Adds what is new. Whether all is over: what a rank has put last is said before it goes.
    fn take_news(&self, news: &mut Vec<String>) -> bool {
        let mut state = self.shared.lock();
        news.append(&mut state.news);
        state.is_over
    }

    /// Waits for one of them, or for news.
    fn wait(&self, fds: &[BorrowedFd<'_>], slice: Duration) {
        let mut polled = vec![PollFd::new(&self.woken, PollFlags::IN)];
        polled.extend(fds.iter().map(|fd| PollFd::from_borrowed_fd(*fd, PollFlags::IN)));
        let timeout = Timespec { tv_sec: 0, tv_nsec: slice.as_nanos() as i64 };
        // What fails is looked at again in a moment.
        let _ = poll(&mut polled, Some(&timeout));
        let mut bytes = [0; 64];
        while rustix::io::read(&self.woken, &mut bytes).is_ok_and(|read| read == bytes.len()) {}
    }

    // ------------------------------------------------------------------------------------- a guest

    fn join(&self, stream: Stream) -> Result<Line> {
        let party = Party { deadline: Deadline::after_ms(ANSWER_MS), ..self.party.clone() };
        let mut peer = Peer::on(stream, party)?;
        peer.say_hello(Kind::Join, self.incarnation.to_le_bytes().to_vec())?;
        peer.await_welcome()?;
        Ok(peer.into_line())
    }

    /// Until the connection ends, or all is over.
    fn visit(&self, mut line: Line) {
        line.link.stream.keep_alive();
        let mut news = self.all();
        loop {
            let is_over = self.take_news(&mut news);
            for name in std::mem::take(&mut news) {
                let (mine, reads) = {
                    let state = self.shared.lock();
                    (state.mine.get(&name).cloned(), state.read.contains_key(&name))
                };
                let said = match mine {
                    Some(value) => line.send_signed(Kind::Put, entry(&name, &value)),
                    None => line.send_signed(Kind::Take, entry(&name, &[])),
                };
                let asked = said.and_then(|()| {
                    if reads { line.send_signed(Kind::Ask, entry(&name, &[])) } else { Ok(()) }
                });
                if asked.is_err() {
                    return;
                }
            }
            if is_over {
                return;
            }
            loop {
                let message = match line.link.receive() {
                    Ok(Some(message)) => message,
                    Ok(None) => break,
                    Err(_) => return,
                };
                let said = line.verify(message.kind, &message.body).and_then(parse);
                match (message.kind, said) {
                    (Kind::Put, Some((name, value))) => self.shared.note(name, Some(value)),
                    (Kind::Take, Some((name, _))) => self.shared.note(name, None),
                    _ => return,
                }
            }
            self.wait(&[line.link.stream.as_fd()], SLICE);
        }
    }

    // ------------------------------------------------------------------------------------- the server

    /// Until all is over, or, if it does not stay, until rank 0 comes.
    fn serve(&self, listener: Listener, stays: bool) {
        log(Level::Debug, || format!("rank {} serves the board", self.party.rank));
        let mut lobby = Lobby::at(listener, &self.party);
        let (mut guests, mut entries): (Vec<Guest>, Entries) = Default::default();
        {
            let mut state = self.shared.lock();
            state.trouble = None;
            #[cfg(test)]
            {
                state.is_served_here = true;
            }
        }
        let mut news = self.all();
        loop {
            let is_over = self.take_news(&mut news);
            for name in std::mem::take(&mut news) {
                let mine = self.shared.lock().mine.get(&name).cloned();
                match mine {
                    Some(value) => self.change(&mut guests, &mut entries, name.clone(), (None, value)),
                    None if entries.get(&name).is_some_and(|(owner, _)| owner.is_none()) => {
                        self.remove(&mut guests, &mut entries, &name);
                    }
                    None => {}
                }
                // This rank may have begun to read what has been there for long.
                self.shared.note(&name, entries.get(&name).map(|(_, value)| &value[..]));
            }
            lobby.look();
            while let Some(mut proven) = lobby.proven.pop_front() {
                if proven.hello.rank == 0 && proven.hello.num_ranks == 0 && !stays {
                    log(Level::Debug, || format!("rank {} makes way for rank 0", self.party.rank));
                    return;
                }
                if proven.hello.num_ranks != 0 {
                    let text = format!("the group was formed without rank {}", proven.hello.rank);
                    proven.line.fail(&Error::new(Status::Mismatch, text));
                } else if proven.line.send_signed(Kind::Welcome, vec![0; 16]).is_ok() {
                    proven.line.link.stream.keep_alive();
                    let (rank, line) = (proven.hello.rank, proven.line);
                    guests.push(Guest { rank, line, reads: BTreeSet::new() });
                }
            }
            self.hear(&mut guests, &mut entries);
            if is_over {
                return;
            }
            let waited =
                [lobby.fds(), guests.iter().map(|guest| guest.line.link.stream.as_fd()).collect()].concat();
            self.wait(&waited, lobby.slice());
        }
    }

    /// What guests say, and that they have gone.
    fn hear(&self, guests: &mut Vec<Guest>, entries: &mut Entries) {
        let mut said = Vec::new();
        let mut left = Vec::new();
        for (number, guest) in guests.iter_mut().enumerate() {
            loop {
                match guest.line.link.receive() {
                    Ok(Some(message)) => match guest.line.verify(message.kind, &message.body).and_then(parse)
                    {
                        Some((name, value)) => {
                            said.push((number, message.kind, name.to_owned(), value.to_vec()))
                        }
                        None => {
                            left.push(number);
                            break;
                        }
                    },
                    Ok(None) => break,
                    Err(Trouble::Closed | Trouble::Garbage(_)) => {
                        left.push(number);
                        break;
                    }
                }
            }
        }
        for (number, kind, name, value) in said {
            let rank = guests[number].rank;
            match kind {
                Kind::Put => self.change(guests, entries, name, (Some(rank), value)),
                Kind::Take if entries.get(&name).is_some_and(|(owner, _)| *owner == Some(rank)) => {
                    self.remove(guests, entries, &name);
                }
                Kind::Ask => {
                    let value = entries.get(&name).map(|(_, value)| &value[..]);
                    guests[number].tell(&name, value);
                    guests[number].reads.insert(name);
                }
                _ => {}
            }
        }
        for number in left.into_iter().rev() {
            let rank = guests.remove(number).rank;
            // It may have come again before the end of its former connection was seen.
            if guests.iter().any(|guest| guest.rank == rank) {
                continue;
            }
            let theirs = |(name, (owner, _)): (&String, &(Option<u32>, Vec<u8>))| {
                (*owner == Some(rank)).then(|| name.clone())
            };
            for name in entries.iter().filter_map(theirs).collect::<Vec<_>>() {
                self.remove(guests, entries, &name);
            }
        }
    }

    fn change(&self, guests: &mut [Guest], entries: &mut Entries, name: String, to: (Option<u32>, Vec<u8>)) {
        if entries.get(&name) == Some(&to) {
            return;
        }
        for guest in guests.iter_mut().filter(|guest| guest.reads.contains(&name)) {
            guest.tell(&name, Some(&to.1));
        }
        self.shared.note(&name, Some(&to.1));
        entries.insert(name, to);
    }

    fn remove(&self, guests: &mut [Guest], entries: &mut Entries, name: &str) {
        if entries.remove(name).is_some() {
            for guest in guests.iter_mut().filter(|guest| guest.reads.contains(name)) {
                guest.tell(name, None);
            }
            self.shared.note(name, None);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::new_unique_id;
    use super::*;
    use crate::config::{Address, Bootstrap};

    const WAIT: Duration = Duration::from_secs(20);

    fn open(id: &UniqueId, rank: u32) -> Board {
        let bootstrap = Bootstrap::UniqueId(id.clone());
        let meeting = Meeting { rank, num_ranks: 1, bootstrap, remote: false, timeout_ms: 20_000 };
        Board::open(&meeting, id.clone(), rank as u64 + 100).unwrap()
    }

    fn wait(board: &Board, name: &str) -> Vec<u8> {
        board.wait_for(name, WAIT, || Ok(())).unwrap()
    }

    fn until(what: &str, holds: impl Fn() -> bool) {
        let limit = Instant::now() + WAIT;
        while !holds() {
            assert!(Instant::now() < limit, "not within {WAIT:?}: {what}");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// By a Unix name, and by a TCP address that nobody else has.
    fn ids() -> [UniqueId; 2] {
        let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let tcp = UniqueId { address: Address::Tcp(format!("127.0.0.1:{port}")), key: [5; 16] };
        [new_unique_id().unwrap(), tcp]
    }

    #[test]
    fn entries_are_read_by_all_and_change() {
        for id in ids() {
            let boards: Vec<Board> = (0..4).map(|rank| open(&id, rank)).collect();
            for (rank, board) in boards.iter().enumerate() {
                board.put(&format!("card/{rank}"), &[rank as u8; 500]).unwrap();
            }
            for board in &boards {
                for rank in 0..4 {
                    assert_eq!(wait(board, &format!("card/{rank}")), [rank as u8; 500]);
                }
            }
            boards[2].put("card/2", b"another").unwrap();
            for board in &boards {
                until("the change", || board.value("card/2").is_some_and(|value| value == b"another"));
            }
            boards[3].take_back("card/3");
            // What is not one's own cannot be taken back.
            boards[1].take_back("card/2");
            for board in &boards {
                until("the end", || board.absent_since("card/3").is_some());
                assert_eq!(board.value("card/3"), None);
                assert_eq!(board.value("card/2").unwrap(), b"another");
            }
        }
    }

    /// Who serves ends first, and each time another takes its place: what was put by those that live is there again.
    #[test]
    fn a_board_outlasts_who_serves_it() {
        for id in ids() {
            let mut boards: Vec<Option<Board>> = (0..4).map(|rank| Some(open(&id, rank))).collect();
            for (rank, board) in boards.iter().flatten().enumerate() {
                board.put(&format!("live/{rank}"), b"here").unwrap();
                (0..4).for_each(|rank| board.read(&format!("live/{rank}")));
            }
            for ends in 0..3 {
                for board in boards.iter().flatten() {
                    (ends..4).for_each(|rank| drop(wait(board, &format!("live/{rank}"))));
                }
                boards[ends] = None;
                for board in boards.iter().flatten() {
                    until("who ended is missing", || board.absent_since(&format!("live/{ends}")).is_some());
                }
                // News reaches all over the next one.
                let last = boards[3].as_ref().unwrap();
                last.put("news", &[ends as u8]).unwrap();
                for board in boards.iter().flatten() {
                    board.read("news");
                    until("the news", || board.value("news").is_some_and(|value| value == [ends as u8]));
                }
            }
        }
    }

    /// What is put last is said, by whoever serves or is a guest, and what was said is still known when who said it has gone.
    #[test]
    fn last_words_are_heard() {
        for id in ids() {
            for leaver in [1, 0] {
                let boards = [open(&id, 0), open(&id, 1)];
                let reader = 1 - leaver;
                boards[reader].read("last words");
                boards[reader].put("ready", b"").unwrap();
                wait(&boards[leaver], "ready");
                let [first, second] = boards;
                let (leaving, staying) = if leaver == 0 { (first, second) } else { (second, first) };
                leaving.put("last words", b"farewell").unwrap();
                drop(leaving);
                until("the end", || staying.absent_since("last words").is_some());
                assert_eq!(staying.value("last words"), None);
                until("the words", || {
                    staying.last_value("last words").is_some_and(|value| value == b"farewell")
                });
            }
        }
    }

    /// Who serves in rank 0's absence is not who serves in the end: the others may stand still.
    #[test]
    fn a_late_rank_0_serves() {
        for id in ids() {
            let name = |rank: u32| format!("live/{rank}");
            let come = |rank: u32| {
                let board = open(&id, rank);
                board.put(&name(rank), b"here").unwrap();
                (0..3).for_each(|other| board.read(&name(other)));
                board
            };
            let early = [come(1), come(2)];
            early.iter().for_each(|board| drop(wait(board, "live/1")));
            let first = come(0);
            for board in early.iter().chain([&first]) {
                (0..3).for_each(|rank| drop(wait(board, &name(rank))));
            }
            // Whichever of the others was to end, the board stays what it is: nobody has to look for another.
            for ended in early {
                drop(ended);
                first.put("news", b"?").unwrap();
                assert_eq!(wait(&first, "news"), b"?");
                assert!(first.is_served_here());
            }
        }
    }

    #[test]
    fn what_never_comes_ends_at_the_deadline_or_by_its_check() {
        let id = new_unique_id().unwrap();
        let board = open(&id, 7);
        let error = board.wait_for("card/9", Duration::from_millis(50), || Ok(())).unwrap_err();
        assert_eq!(error.status, Status::Timeout);
        assert!(error.message.contains("rank 7: there was no card/9 within 50 ms"), "{error}");
        let error = board.wait_for("card/9", WAIT, || Err(Error::invalid("enough"))).unwrap_err();
        assert_eq!(error.message, "enough");
        assert!(board.put("much", &vec![0; MAX_ENTRY]).is_err());
    }

    #[test]
    fn who_does_not_know_the_key_has_no_part() {
        let id = new_unique_id().unwrap();
        let board = open(&id, 0);
        board.put("secret", b"?").unwrap();
        assert_eq!(wait(&board, "secret"), b"?");
        let stranger = open(&UniqueId { key: [1; 16], ..id }, 1);
        let error = stranger.wait_for("secret", Duration::from_millis(300), || Ok(())).unwrap_err();
        assert!(error.message.contains("does not know the group's key"), "{error}");
    }
}
