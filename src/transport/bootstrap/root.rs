//! The side of rank 0, or of who leads a recovery: who is let in, and what it does for those who are.

use std::collections::VecDeque;
use std::io::{ErrorKind, Read};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::{Duration, Instant};

use super::socket::{Deadline, Listener, SLICE, check_user, listen_local, receive_fds, send_fds, wait};
use super::ties::Ties;
use super::wire::{
    Hello, Kind, Line, Link, MAC_BYTES, PROTOCOL, Trouble, numbers, parse_error, verify, version_name,
    version_number,
};
use super::{Finish, Gathered, HOST, Party, Reach, alone, random};
use crate::error::{Error, Result, Status, is_shortage};
use crate::fault::{self, Point};
use crate::log::{Level, log};

/// A stranger that says nothing for this long is let go.
const STRANGER_PATIENCE: Duration = Duration::from_secs(10);
/// A rank answers its challenge within this.
const TIME_TO_ANSWER: Duration = Duration::from_millis(250);
/// A group that has failed waits this long for ranks that are on their way: rank 0 hears of it when that is over, within
/// the second in which every rank is to.
const FAREWELL: Duration = Duration::from_millis(500);
/// Where descriptors or memory have run out, the door is looked at this much later.
const SHORT_OF_SOMETHING: Duration = Duration::from_millis(10);
/// More strangers at once than this, beside a group's own ranks, wait at the door.
const STRANGERS: usize = 256;
/// Connections taken at a time, so that a flood of them keeps nothing else from being looked at.
const AT_A_TIME: usize = 64;
/// Messages with descriptors on their way to one rank: those of one that does not take them count against this
/// process's limit of open files.
const UNTAKEN: usize = 4;

// ------------------------------------------------------------------------------------------------ strangers

/// A connection that has not proven anything yet.
struct Stranger {
    line: Line,
    since: Instant,
}

/// A connection that knows the key, and what it wants.
pub struct Proven {
    kind: Kind,
    pub hello: Hello,
    pub rest: Vec<u8>,
    pub line: Line,
}

/// Strangers, up to where they have proven the key.
pub struct Lobby<'a> {
    listener: Listener,
    party: &'a Party,
    strangers: Vec<Stranger>,
    /// Who has proven the key and was not dealt with yet.
    pub proven: VecDeque<Proven>,
    /// The door is not looked at before.
    closed_until: Option<Instant>,
    /// Why somebody was not let in, if it was for want of something.
    shortage: Option<String>,
}

impl Lobby<'_> {
    fn open(party: &Party) -> Result<Lobby<'_>> {
        let in_use = format!(
            "another rank 0 of num_ranks {} was started with this unique_id, or the address is taken",
            party.num_ranks
        );
        let listener = Listener::open(&party.id.address, party.remote, party.deadline, &in_use)
            .map_err(|e| e.context(format!("rank {}", party.rank)))?;
        Ok(Lobby::at(listener, party))
    }

    pub fn at(listener: Listener, party: &Party) -> Lobby<'_> {
        Lobby {
            listener,
            party,
            strangers: Vec::new(),
            proven: VecDeque::new(),
            closed_until: None,
            shortage: None,
        }
    }

    pub fn fds(&self) -> Vec<BorrowedFd<'_>> {
        let door = self.closed_until.is_none().then(|| self.listener.as_fd());
        door.into_iter().chain(self.strangers.iter().map(|s| s.line.link.stream.as_fd())).collect()
    }

    pub fn slice(&self) -> Duration {
        if self.closed_until.is_some() { SHORT_OF_SOMETHING } else { SLICE }
    }

    /// Lets strangers in, as far as there is room, and asks each for a proof.
    fn accept(&mut self) {
        if self.closed_until.is_some_and(|until| Instant::now() < until) {
            return;
        }
        self.closed_until = None;
        for _ in 0..AT_A_TIME {
            if self.strangers.len() >= STRANGERS + self.party.num_ranks as usize {
                self.closed_until = Some(Instant::now() + SHORT_OF_SOMETHING);
                return;
            }
            let stream = match self.listener.accept() {
                Ok(stream) => stream,
                Err(e) if e.kind() == ErrorKind::WouldBlock => return,
                // Who has been silent for long makes room.
                Err(e) if is_shortage(&e) => {
                    self.shortage = Some(format!("accept: {e}"));
                    if self.strangers.first().is_none_or(|first| first.since.elapsed() < TIME_TO_ANSWER) {
                        self.closed_until = Some(Instant::now() + SHORT_OF_SOMETHING);
                        return;
                    }
                    refuse(self.party.rank, self.strangers.remove(0).line, "there is no room for it");
                    continue;
                }
                Err(e) => {
                    log(Level::Warn, || format!("rank {} refused a connection: {e}", self.party.rank));
                    continue;
                }
            };
            let (Ok(link), Ok(challenge)) = (Link::new(stream), random()) else { continue };
            let mut line = Line::new(link, self.party.id.key, challenge, [0; 16]);
            if line.link.send(Kind::Challenge, &challenge).is_ok() {
                self.strangers.push(Stranger { line, since: Instant::now() });
            }
        }
    }

    /// Takes what has come: whoever has proven the key is `proven`, who cannot is refused.
    pub fn look(&mut self) {
        self.accept();
        let (me, mut silent) = (self.party.rank, Vec::new());
        for mut stranger in self.strangers.drain(..) {
            match stranger.line.link.receive() {
                Ok(None) if stranger.since.elapsed() < STRANGER_PATIENCE => silent.push(stranger),
                Ok(None) => refuse(me, stranger.line, "it sent nothing in time"),
                Ok(Some(message)) if matches!(message.kind, Kind::Join | Kind::Decline) => {
                    let mut line = stranger.line;
                    match Hello::parse(message.kind, &message.body, &self.party.id.key, &line.mine) {
                        Ok((hello, rest)) => {
                            line.theirs = hello.nonce;
                            self.proven.push_back(Proven {
                                kind: message.kind,
                                hello,
                                rest: rest.to_vec(),
                                line,
                            });
                        }
                        Err(why) => refuse(me, line, why),
                    }
                }
                Ok(Some(_)) | Err(Trouble::Garbage(_)) => {
                    refuse(me, stranger.line, "it is no rank of liba2a")
                }
                Err(Trouble::Closed) => {}
            }
        }
        self.strangers = silent;
    }

    /// Tells ranks on their way why the group has failed, instead of letting them find nobody: `ranks` at most.
    fn farewell(&mut self, error: &Error, ranks: usize) {
        let until = Deadline::after_ms(FAREWELL.as_millis() as u64);
        let mut told = 0;
        loop {
            while let Some(mut late) = self.proven.pop_front() {
                late.line.fail(error);
                told += 1;
            }
            if told >= ranks || until.has_passed() || wait(&self.fds(), until, self.slice()).is_err() {
                return;
            }
            self.look();
        }
    }
}

fn refuse(me: u32, mut line: Line, why: &str) {
    log(Level::Warn, || format!("rank {me} refused a connection: {why}"));
    line.fail(&Error::new(Status::Mismatch, format!("rank {me} refused the connection: {why}")));
}

// ------------------------------------------------------------------------------------------------ the group

/// Rank 0's side of a group that forms.
pub struct Root {
    pub party: Party,
    /// By rank; empty where nobody is waited for: its own, and of ranks that are left behind.
    pub seats: Vec<Option<Line>>,
    /// Who has said READY.
    ready: Vec<bool>,
    /// Why ranks may be missing: who knew the key and was refused alone all the same.
    remarks: Vec<String>,
    /// A rank that has no seat ended the group, and knows.
    ended_by_a_guest: bool,
    /// Ranks are on several hosts, and may be.
    apart: bool,
}

/// This rank cannot take part: whoever comes soon is told.
pub fn decline(party: &Party, error: &Error) -> Result<()> {
    let theirs = Error::new(Status::PeerLost, error.message.as_str());
    Lobby::open(party)?.farewell(&theirs, party.num_ranks as usize - 1);
    Ok(())
}

pub fn gather(
    party: Party,
    gift: impl FnOnce(bool) -> Result<Vec<u8>>,
    own: impl FnOnce(bool) -> Result<Vec<OwnedFd>>,
) -> Result<Gathered> {
    let mut root = Root::new(party.clone());
    let mut lobby = Lobby::open(&party)?;
    fault::at(Point::CreateListening);
    if let Err(error) = root.admit_all(&mut lobby) {
        // A group that has waited in vain has nobody left to tell. Who is seated knows; and the one whose words ended it,
        // if it was not.
        if error.status != Status::Timeout {
            let told = 1 + root.seats.iter().flatten().count() + usize::from(root.ended_by_a_guest);
            lobby.farewell(&error, (party.num_ranks as usize).saturating_sub(told));
        }
        return Err(error);
    }
    drop(lobby);
    fault::at(Point::CreateComplete);
    let apart = root.apart;
    let gift = gift(apart).map_err(|e| root.fail(e))?;
    let said = |_| [&[u8::from(apart)], &gift[..]].concat();
    let fds = if apart {
        let own = own(true).map_err(|e| root.fail(e))?;
        root.welcome(&[0; 16], said)?;
        alone(own, party.rank, party.num_ranks)
    } else {
        root.share(said, || own(false))?
    };
    Ok(Gathered { fds, apart, key: party.id.key, gift, finish: Finish::Root { root } })
}

impl Root {
    pub fn new(party: Party) -> Root {
        let seats = (0..party.num_ranks).map(|_| None).collect();
        let ready = vec![false; party.num_ranks as usize];
        Root { ready, party, seats, remarks: Vec::new(), ended_by_a_guest: false, apart: false }
    }

    /// What is left of it once the group is formed.
    pub fn into_ties(self) -> Ties {
        let lines = (0..).zip(self.seats).filter_map(|(rank, line)| Some((rank, line?)));
        Ties::new(self.party.rank, lines.collect())
    }

    /// The ranks that have a seat.
    pub fn seated(&self) -> impl Iterator<Item = u32> + use<> {
        let seated: Vec<bool> = self.seats.iter().map(Option::is_some).collect();
        (0..self.party.num_ranks).filter(move |rank| seated[*rank as usize])
    }

    /// Welcomes every seated rank, with what is `said` to it.
    pub fn welcome(&mut self, name: &[u8; 16], said: impl Fn(u32) -> Vec<u8>) -> Result<()> {
        for rank in self.seated() {
            let Some(line) = &mut self.seats[rank as usize] else { continue };
            let body = [&name[..], &said(rank)].concat();
            line.send_signed(Kind::Welcome, body).map_err(|e| self.left(rank, Some(e)))?;
        }
        Ok(())
    }

    /// Welcomes every seated rank, takes its descriptors and hands everybody's to everybody.
    pub fn share(
        &mut self,
        said: impl Fn(u32) -> Vec<u8>,
        own: impl FnOnce() -> Result<Vec<OwnedFd>>,
    ) -> Result<Vec<Vec<OwnedFd>>> {
        // Descriptors need a Unix socket whatever the first connection was.
        let name = random()?;
        let exchange = listen_local(&name)
            .and_then(|l| {
                l.map_err(|e| Error::system(format!("rank {}: the descriptor socket", self.party.rank), e))
            })
            .map_err(|e| self.fail(e))?;
        let own = own().map_err(|e| self.fail(e))?;
        self.welcome(&name, said)?;
        let (sockets, mut fds) = self.collect_fds(&exchange)?;
        drop(exchange);
        fds[self.party.rank as usize] = own;
        fault::at(Point::CreateCollected);
        self.hand_round(sockets, &fds)?;
        Ok(fds)
    }

    /// Tells every seated rank that it is over; gives the reason back.
    pub fn fail(&mut self, error: Error) -> Error {
        for line in self.seats.iter_mut().flatten() {
            line.fail(&error);
        }
        error
    }

    fn cannot_wait(&mut self, error: Error) -> Error {
        let rank = self.party.rank;
        self.fail(error.context(format!("rank {rank}")))
    }

    /// Something to say at the deadline.
    fn remark(&mut self, text: String) {
        if !self.remarks.contains(&text) && self.remarks.len() < 8 {
            self.remarks.push(text);
        }
    }

    fn left(&mut self, rank: u32, why: Option<std::io::Error>) -> Error {
        let why = why.map(|e| format!(" ({e})")).unwrap_or_default();
        let text = format!("rank {rank} left while the group was formed{why}");
        self.fail(Error::new(Status::PeerLost, text))
    }

    /// All is ready on this rank: ends the rendezvous when it is on every other.
    pub fn finish(&mut self) -> Result<()> {
        self.collect_ready()?;
        for rank in self.seated() {
            let Some(line) = &mut self.seats[rank as usize] else { continue };
            if let Err(e) = line.link.send(Kind::Go, &[]) {
                return Err(self.left(rank, Some(e)));
            }
            fault::at(Point::CreateGo);
        }
        Ok(())
    }

    /// Gives up at the deadline; `what` the ranks have not done that are not `done`.
    fn check_deadline(&mut self, done: impl Fn(usize) -> bool, what: &str) -> Result<()> {
        if let Err(error) = (self.party.check)() {
            return Err(self.fail(error));
        }
        if !self.party.deadline.has_passed() {
            return Ok(());
        }
        let me = self.party.rank;
        let late: Vec<String> = (0..self.party.num_ranks)
            .filter(|rank| *rank != me && !done(*rank as usize))
            .map(|rank| rank.to_string())
            .collect();
        let mut text = format!(
            "rank {me}: ranks {} of {} {what} within {} ms",
            late.join(", "),
            self.party.num_ranks,
            self.party.deadline.ms
        );
        for remark in &self.remarks {
            text = format!("{text}; {remark}");
        }
        Err(self.fail(Error::new(Status::Timeout, text)))
    }

    /// Lets ranks in until the group is complete, or tells everybody why it never will be.
    fn admit_all(&mut self, lobby: &mut Lobby<'_>) -> Result<()> {
        loop {
            if self.seats[1..].iter().all(Option::is_some) {
                return Ok(());
            }
            let joined: Vec<bool> = self.seats.iter().map(Option::is_some).collect();
            self.check_deadline(|rank| joined[rank], "did not join")?;
            let mut fds = lobby.fds();
            fds.extend(self.seats.iter().flatten().map(|line| line.link.stream.as_fd()));
            wait(&fds, self.party.deadline, lobby.slice()).map_err(|e| self.cannot_wait(e))?;
            // A rank that joined has nothing to say before WELCOME: what comes is its end.
            for rank in self.seated() {
                self.listen(rank, Kind::Fail)?;
            }
            lobby.look();
            if let Some(shortage) = lobby.shortage.take() {
                self.remark(shortage);
            }
            while let Some(proven) = lobby.proven.pop_front() {
                self.seat(proven)?;
            }
        }
    }

    /// Why a rank that knows the key belongs to no group of this one's, if so.
    pub fn stranger_to(&self, hello: &Hello) -> Option<Error> {
        let (me, rank, ranks) = (self.party.rank, hello.rank, self.party.num_ranks);
        let text = if hello.num_ranks != ranks {
            format!("num_ranks is {ranks} on rank {me} and {} on rank {rank}", hello.num_ranks)
        } else if (hello.protocol, hello.version) != (PROTOCOL, version_number()) {
            format!(
                "the library's version is {} (rendezvous protocol {PROTOCOL}) on rank {me} and {} ({}) on rank {rank}",
                version_name(version_number()),
                version_name(hello.version),
                hello.protocol
            )
        } else {
            return None;
        };
        Some(Error::new(Status::Mismatch, text))
    }

    /// Gives a rank that knows the key its place. Another version or size, and a place that is taken, are refused alone;
    /// a config that differs ends the group.
    fn seat(&mut self, proven: Proven) -> Result<()> {
        let Proven { kind, hello, rest, mut line } = proven;
        let (rank, ranks) = (hello.rank, self.party.num_ranks);
        let alone = if let Some(error) = self.stranger_to(&hello) {
            Some(error)
        } else if rank == 0 || rank >= ranks || self.seats[rank as usize].is_some() {
            Some(Error::invalid(format!("rank {rank} has joined already")))
        } else {
            None
        };
        if let Some(error) = alone {
            log(Level::Warn, || format!("rank 0 refused a rank {rank}: {error}"));
            line.fail(&error);
            self.remark(format!("was refused: {error}"));
            return Ok(());
        }
        if kind == Kind::Decline {
            self.ended_by_a_guest = true;
            return Err(self.fail(Error::new(Status::PeerLost, parse_error(&rest).message)));
        }
        let theirs = numbers(&rest).into_iter().map(Some).chain(std::iter::repeat(None));
        let host = [(HOST.to_string(), self.party.host)];
        let mine = self.party.fields.iter().chain(&host);
        let mut differences = mine.zip(theirs).filter(|((_, mine), theirs)| Some(*mine) != *theirs);
        let differs = differences.next();
        let elsewhere = differs.is_some_and(|((name, _), theirs)| name == HOST && theirs.is_some());
        if elsewhere && self.party.reach == Reach::Hosts {
            self.apart = true;
        } else if let Some(((name, mine), theirs)) = differs {
            let theirs = theirs.map_or("absent".into(), |value| value.to_string());
            let text = format!("{name} is {mine} on rank 0 and {theirs} on rank {rank}");
            let error = Error::new(Status::Mismatch, text);
            line.fail(&error);
            self.ended_by_a_guest = true;
            return Err(self.fail(error));
        }
        log(Level::Debug, || format!("rank {rank} of {ranks} has joined"));
        self.seats[rank as usize] = Some(line);
        fault::at(Point::CreateSeated);
        Ok(())
    }

    /// Looks at what a peer has sent: `true` if it is the message that is due.
    pub fn listen(&mut self, rank: u32, kind: Kind) -> Result<bool> {
        let Some(line) = &mut self.seats[rank as usize] else { return Ok(false) };
        let failed = match line.link.receive() {
            Ok(None) => return Ok(false),
            Ok(Some(message)) if message.kind == Kind::Fail => {
                Error::new(Status::PeerLost, line.failure(&message.body).message)
            }
            Ok(Some(message)) if message.kind == kind => return Ok(true),
            Ok(Some(message)) => Error::new(
                Status::Mismatch,
                format!("rank {rank} sent {:?} where {kind:?} was due", message.kind),
            ),
            Err(_) => return Err(self.left(rank, None)),
        };
        Err(self.fail(failed))
    }

    fn listen_for_ready(&mut self, rank: u32) -> Result<()> {
        if !self.ready[rank as usize] {
            self.ready[rank as usize] = self.listen(rank, Kind::Ready)?;
        }
        Ok(())
    }

    fn collect_ready(&mut self) -> Result<()> {
        loop {
            for rank in self.seated() {
                self.listen_for_ready(rank)?;
            }
            let waiting: Vec<u32> = self.seated().filter(|rank| !self.ready[*rank as usize]).collect();
            if waiting.is_empty() {
                return Ok(());
            }
            self.check_deadline(|rank| !waiting.contains(&(rank as u32)), "were not ready")?;
            let lines = waiting.iter().filter_map(|rank| self.seats[*rank as usize].as_ref());
            let fds: Vec<_> = lines.map(|line| line.link.stream.as_fd()).collect();
            wait(&fds, self.party.deadline, SLICE).map_err(|e| self.cannot_wait(e))?;
        }
    }

    /// Receives every peer's descriptors, and the sockets on which they came.
    fn collect_fds(&mut self, exchange: &UnixListener) -> Result<Exchanged> {
        let ranks = self.seats.len();
        let mut sockets: Vec<Option<UnixStream>> = (0..ranks).map(|_| None).collect();
        let mut fds: Vec<Vec<OwnedFd>> = (0..ranks).map(|_| Vec::new()).collect();
        let mut waiting: Vec<UnixStream> = Vec::new();
        loop {
            let absent: Vec<usize> =
                self.seated().map(|rank| rank as usize).filter(|rank| sockets[*rank].is_none()).collect();
            if absent.is_empty() {
                return Ok((sockets, fds));
            }
            self.check_deadline(|rank| !absent.contains(&rank), "sent no window")?;
            let mut polled = vec![exchange.as_fd()];
            polled.extend(waiting.iter().map(|s| s.as_fd()));
            polled.extend(self.seats.iter().flatten().map(|line| line.link.stream.as_fd()));
            wait(&polled, self.party.deadline, SLICE).map_err(|e| self.cannot_wait(e))?;
            for rank in self.seated() {
                self.listen(rank, Kind::Fail)?;
            }
            for _ in 0..AT_A_TIME {
                let Ok((socket, _)) = fault::call(Point::Accept, || exchange.accept()) else { break };
                let usable = socket.set_nonblocking(true).map_err(|e| Error::system("a socket's mode", e));
                match usable.and_then(|()| check_user(&socket)) {
                    Ok(()) => waiting.push(socket),
                    Err(error) => {
                        log(Level::Warn, || format!("rank {} refused a connection: {error}", self.party.rank))
                    }
                }
            }
            for socket in std::mem::take(&mut waiting) {
                let mut body = [0; CLAIM];
                match receive_fds(&socket, &mut body) {
                    Ok(None) => waiting.push(socket),
                    Ok(Some(got)) => {
                        // A stranger is let go; a rank that left shows on its own connection.
                        let Some(rank) = self.claimant(&body).filter(|rank| sockets[*rank].is_none()) else {
                            continue;
                        };
                        fds[rank] = got;
                        sockets[rank] = Some(socket);
                    }
                    Err(e) if is_shortage(&e) => {
                        let claimed =
                            self.claimant(&body).map_or("a rank".into(), |rank| format!("rank {rank}"));
                        return Err(self.fail(Error::system(
                            format!("rank {}: descriptors of {claimed}", self.party.rank),
                            e,
                        )));
                    }
                    Err(_) => {}
                }
            }
        }
    }

    /// Whose descriptors these are, if that is proven.
    fn claimant(&self, body: &[u8; CLAIM]) -> Option<usize> {
        let rank = u32::from_le_bytes([body[0], body[1], body[2], body[3]]) as usize;
        let line = self.seats.get(rank)?.as_ref()?;
        verify(&self.party.id.key, FDS, &line.mine, body).map(|_| rank)
    }

    /// Sends every seated rank the descriptors of all, rank ascending. Each message is answered by a byte.
    fn hand_round(&mut self, mut sockets: Vec<Option<UnixStream>>, fds: &[Vec<OwnedFd>]) -> Result<()> {
        let others: Vec<usize> = self.seated().map(|rank| rank as usize).collect();
        let mut all = [others.clone(), vec![self.party.rank as usize]].concat();
        all.sort_unstable();
        let (mut sent, mut taken) = (vec![0; fds.len()], vec![0; fds.len()]);
        loop {
            let mut stuck = false;
            for &rank in &others {
                let Some(socket) = sockets[rank].as_mut().filter(|_| taken[rank] < all.len()) else {
                    continue;
                };
                let mut pass = || -> std::io::Result<()> {
                    taken[rank] += answers(socket)?;
                    while sent[rank] < all.len() && sent[rank] < taken[rank] + UNTAKEN {
                        let of = all[sent[rank]];
                        let borrowed: Vec<_> = fds[of].iter().map(|fd| fd.as_fd()).collect();
                        if !send_fds(socket, &(of as u32).to_le_bytes(), &borrowed)? {
                            stuck = true;
                            break;
                        }
                        sent[rank] += 1;
                    }
                    Ok(())
                };
                let passed = pass();
                // Its own connection says more, and may be ahead: READY comes once it has taken all.
                self.listen_for_ready(rank as u32)?;
                passed.map_err(|e| match is_shortage(&e) {
                    true => self.fail(Error::system(
                        format!("rank {}: descriptors for rank {rank}", self.party.rank),
                        e,
                    )),
                    false => self.left(rank as u32, Some(e)),
                })?;
            }
            let unfinished: Vec<usize> =
                others.iter().copied().filter(|rank| taken[*rank] < all.len()).collect();
            if unfinished.is_empty() {
                return Ok(());
            }
            self.check_deadline(|rank| !unfinished.contains(&rank), "did not take the windows")?;
            let socket_fds = unfinished.iter().filter_map(|rank| sockets[*rank].as_ref().map(|s| s.as_fd()));
            let lines = unfinished.iter().filter(|rank| !self.ready[**rank]);
            let lines = lines.filter_map(|rank| self.seats[*rank].as_ref());
            let polled: Vec<_> = socket_fds.chain(lines.map(|line| line.link.stream.as_fd())).collect();
            let slice = if stuck { SHORT_OF_SOMETHING } else { SLICE };
            wait(&polled, self.party.deadline, slice).map_err(|e| self.cannot_wait(e))?;
        }
    }
}

/// How many answers have come.
fn answers(socket: &mut UnixStream) -> std::io::Result<usize> {
    match socket.read(&mut [0; 64]) {
        Ok(0) => Err(std::io::Error::other("the connection ended")),
        Ok(more) => Ok(more),
        Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => Ok(0),
        Err(e) => Err(e),
    }
}

/// By rank: the socket on which its descriptors came, and they.
type Exchanged = (Vec<Option<UnixStream>>, Vec<Vec<OwnedFd>>);

/// What a rank says with its descriptors: its number, and a proof for this purpose.
pub const CLAIM: usize = 4 + MAC_BYTES;
pub const FDS: &str = "descriptors";
