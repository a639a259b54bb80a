//! Every other rank's side: it finds rank 0, proves the key, and takes what rank 0 hands round.

use std::io::{ErrorKind, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use super::root::FDS;
use super::socket::{
    Deadline, SLICE, Stream, check_user, connect, connect_local, receive_fds, send_fds, wait,
};
use super::ties::Ties;
use super::wire::{Hello, Kind, Line, Link, PROTOCOL, Trouble, error_bytes, sign, version_number};
use super::{Finish, Gathered, Party, alone, random};
use crate::error::{Error, Result, Status, is_shortage};
use crate::fault::{self, Point};

/// Only the root knows which ranks are missing: the others give it this much longer to say so.
pub const ROOT_SPEAKS_FIRST: Duration = Duration::from_millis(500);
/// Rank 0 broke off: its reason comes this soon, or not at all.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// A peer's connection to rank 0.
pub struct Peer {
    pub party: Party,
    line: Line,
    /// Rank 0 went without a word.
    closed: bool,
}

/// This rank cannot take part: rank 0 is told, if it is there.
pub fn decline(party: &Party, error: &Error) -> Result<()> {
    let mut peer = Peer::connect(party.clone())?;
    peer.say_hello(Kind::Decline, error_bytes(error))?;
    // Its answer says that it has heard.
    peer.expect(Kind::Fail).map(|_| ())
}

pub fn gather(party: Party, own: impl FnOnce(bool) -> Result<Vec<OwnedFd>>) -> Result<Gathered> {
    let mut peer = Peer::connect(party)?;
    // Rank 0 is there: its deadline, which began before this moment, decides, and its reason is the one to report.
    peer.party.deadline = Deadline::after_ms(peer.party.deadline.ms).later(ROOT_SPEAKS_FIRST);
    let numbers = peer.party.fields.iter().map(|(_, value)| *value).chain([peer.party.host]);
    let body = numbers.flat_map(u64::to_le_bytes).collect();
    peer.say_hello(Kind::Join, body)?;
    fault::at(Point::CreateJoined);
    let (name, said) = peer.await_welcome()?;
    fault::at(Point::CreateWelcomed);
    let (apart, gift) = match said.split_first() {
        Some((apart, gift)) => (*apart != 0, gift.to_vec()),
        None => return Err(peer.error(Status::Mismatch, "rank 0 did not say where the ranks are")),
    };
    let (rank, ranks) = (peer.party.rank, peer.party.num_ranks);
    let fds = if apart {
        own(true).map(|own| alone(own, rank, ranks)).inspect_err(|error| peer.line.fail(error))?
    } else {
        let all: Vec<u32> = (0..ranks).collect();
        peer.share(&name, &all, || own(false))?
    };
    let key = peer.party.id.key;
    Ok(Gathered { fds, apart, key, gift, finish: Finish::Peer { peer } })
}

impl Peer {
    fn connect(party: Party) -> Result<Peer> {
        let me = |e: Error| e.context(format!("rank {}", party.rank));
        let stream = connect(&party.id.address, party.remote, party.deadline).map_err(me)?;
        Peer::on(stream, party)
    }

    pub fn on(stream: Stream, party: Party) -> Result<Peer> {
        let line = Line::new(Link::new(stream)?, party.id.key, random()?, [0; 16]);
        Ok(Peer { party, line, closed: false })
    }

    pub fn into_line(self) -> Line {
        self.line
    }

    /// What is left of it once the group is formed.
    pub fn into_ties(self) -> Ties {
        Ties::new(self.party.rank, vec![(0, self.line)])
    }

    pub fn is_closed(&self) -> bool {
        self.closed
    }

    fn error(&self, status: Status, text: impl std::fmt::Display) -> Error {
        Error::new(status, format!("rank {}: {text}", self.party.rank))
    }

    fn named(&self, error: Error) -> Error {
        error.context(format!("rank {}", self.party.rank))
    }

    /// Answers rank 0's challenge: says who this is, and `rest`.
    pub fn say_hello(&mut self, kind: Kind, rest: Vec<u8>) -> Result<()> {
        let challenge = self.expect(Kind::Challenge)?;
        self.line.theirs = challenge.try_into().map_err(|bytes: Vec<u8>| {
            self.error(
                Status::Mismatch,
                format!("the address of {} sent a challenge of {} bytes", self.party.root, bytes.len()),
            )
        })?;
        let hello = Hello {
            protocol: PROTOCOL,
            rank: self.party.rank,
            num_ranks: self.party.num_ranks,
            nonce: self.line.mine,
            version: version_number(),
        };
        let body = [hello.bytes(), rest].concat();
        self.line.send_signed(kind, body).map_err(|_| self.last_words())
    }

    /// Waits for one kind of message; FAIL and silence are errors.
    fn expect(&mut self, kind: Kind) -> Result<Vec<u8>> {
        loop {
            if let Some(body) = self.hear(kind)? {
                return Ok(body);
            }
            (self.party.check)()?;
            if self.party.deadline.has_passed() {
                let text = format!("the group was not complete within {} ms", self.party.deadline.ms);
                return Err(self.error(Status::Timeout, text));
            }
            wait(&[self.line.link.stream.as_fd()], self.party.deadline, SLICE).map_err(|e| self.named(e))?;
        }
    }

    /// What rank 0 has said, if it is of this kind.
    fn hear(&mut self, kind: Kind) -> Result<Option<Vec<u8>>> {
        match self.line.link.receive() {
            Ok(Some(message)) if message.kind == kind => Ok(Some(message.body)),
            Ok(Some(message)) if message.kind == Kind::Fail => Err(self.failure(&message.body)),
            Ok(Some(message)) => {
                let text = format!("{} sent {:?} where {kind:?} was due", self.party.root, message.kind);
                Err(self.error(Status::Mismatch, text))
            }
            Ok(None) => Ok(None),
            Err(Trouble::Closed) => {
                self.closed = true;
                let text = format!("{} closed the connection before the group was formed", self.party.root);
                Err(self.error(Status::PeerLost, text))
            }
            Err(Trouble::Garbage(what)) => {
                Err(self.error(Status::Mismatch, format!("the address of {} sent {what}", self.party.root)))
            }
        }
    }

    fn failure(&self, body: &[u8]) -> Error {
        self.line.failure(body).context(format!("rank {}: the group was not formed", self.party.rank))
    }

    /// Rank 0 broke off: the reason it gave, if it comes soon.
    fn last_words(&mut self) -> Error {
        self.party.deadline = Deadline::after_ms(LAST_WORDS.as_millis() as u64);
        match self.expect(Kind::Fail) {
            Ok(body) => self.failure(&body),
            Err(error) => error,
        }
    }

    /// All ranks have joined: the name of the descriptor socket, and what else is said.
    pub fn await_welcome(&mut self) -> Result<([u8; 16], Vec<u8>)> {
        let welcome = self.expect(Kind::Welcome)?;
        let proven =
            self.line.verify(Kind::Welcome, &welcome).and_then(|said| said.split_first_chunk::<16>());
        let (name, rest) = proven.ok_or_else(|| {
            let text = format!("who answered as {} does not know the group's key", self.party.root);
            self.error(Status::Mismatch, text)
        })?;
        Ok((*name, rest.to_vec()))
    }

    /// Makes this rank's descriptors and hands them in; takes those of `all` ranks, ascending.
    pub fn share(
        &mut self,
        name: &[u8; 16],
        all: &[u32],
        own: impl FnOnce() -> Result<Vec<OwnedFd>>,
    ) -> Result<Vec<Vec<OwnedFd>>> {
        let shared = own().and_then(|own| self.send_own(name, &own));
        fault::at(Point::CreateSentWindow);
        shared.and_then(|socket| self.take_all(socket, all)).inspect_err(|error| self.line.fail(error))
    }

    /// Hands this rank's descriptors to rank 0.
    fn send_own(&mut self, name: &[u8; 16], own: &[OwnedFd]) -> Result<UnixStream> {
        let socket = match connect_local(name)? {
            Ok(socket) => socket,
            // The root has let the group go, and says why over the first connection.
            Err(e) if e.kind() == ErrorKind::ConnectionRefused => return Err(self.last_words()),
            Err(e) => {
                return Err(Error::system(format!("rank {}: the descriptor socket", self.party.rank), e));
            }
        };
        socket.set_nonblocking(true).map_err(|e| Error::system("a socket's mode", e))?;
        check_user(&socket)?;
        let claim = self.party.rank.to_le_bytes().to_vec();
        let claim = sign(&self.party.id.key, FDS, &self.line.theirs, claim)?;
        let borrowed: Vec<_> = own.iter().map(|fd| fd.as_fd()).collect();
        loop {
            match send_fds(&socket, &claim, &borrowed) {
                Ok(true) => return Ok(socket),
                Ok(false) if self.party.deadline.has_passed() => {
                    let text = format!("its window was not taken within {} ms", self.party.deadline.ms);
                    return Err(self.error(Status::Timeout, text));
                }
                // Too many descriptors are on their way, this user's others among them.
                Ok(false) => std::thread::sleep(Duration::from_millis(1)),
                // The root has let the group go, and says why over the first connection.
                Err(e) if matches!(e.kind(), ErrorKind::BrokenPipe | ErrorKind::ConnectionReset) => {
                    return Err(self.last_words());
                }
                Err(e) => {
                    return Err(Error::system(format!("rank {}: sending descriptors", self.party.rank), e));
                }
            }
        }
    }

    /// Takes the descriptors of `all` ranks and answers each with a byte.
    fn take_all(&mut self, mut socket: UnixStream, all: &[u32]) -> Result<Vec<Vec<OwnedFd>>> {
        let mut fds: Vec<Vec<OwnedFd>> = (0..self.party.num_ranks).map(|_| Vec::new()).collect();
        let mut due = all.iter().copied().peekable();
        while let Some(rank) = due.peek().copied() {
            let mut of = [0; 4];
            match receive_fds(&socket, &mut of) {
                Ok(Some(got)) if u32::from_le_bytes(of) == rank => {
                    fds[rank as usize] = got;
                    due.next();
                    if socket.write_all(&[1]).is_err() {
                        return Err(self.last_words());
                    }
                }
                Ok(None) => {
                    // A FAIL comes over the first connection.
                    if let Some(body) = self.hear(Kind::Fail)? {
                        return Err(self.failure(&body));
                    }
                    (self.party.check)()?;
                    if self.party.deadline.has_passed() {
                        let ms = self.party.deadline.ms;
                        let text = format!("the windows were not exchanged within {ms} ms");
                        return Err(self.error(Status::Timeout, text));
                    }
                    wait(&[self.line.link.stream.as_fd(), socket.as_fd()], self.party.deadline, SLICE)
                        .map_err(|e| self.named(e))?;
                }
                Err(e) if is_shortage(&e) => {
                    let what = format!("rank {}: descriptors of rank {rank}", self.party.rank);
                    return Err(Error::system(what, e));
                }
                // The root says why over the first connection.
                Ok(Some(_)) | Err(_) => return Err(self.last_words()),
            }
        }
        Ok(fds)
    }

    /// Tells rank 0 how it went on this rank, and waits until it has on all.
    pub fn finish(&mut self, outcome: Result<()>) -> Result<()> {
        if let Err(error) = outcome {
            self.line.fail(&error);
            return Err(error);
        }
        // A root that is gone shows when GO does not come.
        let _ = self.line.link.send(Kind::Ready, &[]);
        fault::at(Point::CreateReady);
        self.expect(Kind::Go).map(|_| ())
    }
}
