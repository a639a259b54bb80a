//! What ranks say to each other at the rendezvous, byte for byte.
//!
//! A frame is {length: u32, kind: u8, body}, little-endian. Everything that a rank acts upon carries an HMAC-SHA256 under
//! the group's key over a nonce that its receiver made: CHALLENGE is rank 0's nonce, JOIN brings the peer's.
//!
//! ```text
//! CHALLENGE  nonce[16]
//! JOIN       magic[8] protocol:u32 rank:u32 num_ranks:u32 nonce[16] version:u64 | field:u64 ... host:u64 | mac[32]
//! DECLINE    the same up to version | status:i32 text | mac[32]
//! WELCOME    name[16] apart:u8 gift mac[32]
//! READY, GO  nothing
//! FAIL       status:i32 text mac[32]
//! GONE       rank:u32 mac[32]                      to ranks on several hosts, after GO
//! PUT        length:u16 name value mac[32]         of a board (`board`), and so are the next two
//! TAKE, ASK  length:u16 name mac[32]
//! ```
//! JOIN up to its version never changes, so that any two versions can tell each other what they are.

use std::io::{ErrorKind, Read, Write};

use hmac::{Hmac, KeyInit, Mac};
use sha2::Sha256;

use super::socket::Stream;
use crate::error::{Error, Result, Status};

/// Of the exchange, not of the library: raised when what follows JOIN's version changes.
pub const PROTOCOL: u32 = 3;
const MAGIC: &[u8; 8] = b"a2a.join";
/// A message's body is never longer: JOIN has some 40 numbers, FAIL a sentence.
const MAX_BODY: usize = 8192;
pub const MAC_BYTES: usize = 32;

pub type Key = [u8; 16];
pub type Nonce = [u8; 16];

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    Challenge = 1,
    Join = 2,
    Welcome = 3,
    Ready = 4,
    Go = 5,
    Fail = 6,
    Decline = 7,
    Gone = 8,
    Put = 9,
    Take = 10,
    Ask = 11,
}

impl Kind {
    fn from_byte(byte: u8) -> Option<Kind> {
        use Kind::*;
        [Challenge, Join, Welcome, Ready, Go, Fail, Decline, Gone, Put, Take, Ask]
            .into_iter()
            .find(|kind| *kind as u8 == byte)
    }
}

fn mac(key: &Key, parts: &[&[u8]]) -> Result<Hmac<Sha256>> {
    let mut mac = Hmac::<Sha256>::new_from_slice(key).map_err(|e| Error::internal(e.to_string()))?;
    for part in parts {
        mac.update(part);
    }
    Ok(mac)
}

/// Puts the proof behind a body: `what` keeps one message's proof from being another's.
pub fn sign(key: &Key, what: &str, nonce: &Nonce, mut body: Vec<u8>) -> Result<Vec<u8>> {
    let tag = mac(key, &[what.as_bytes(), nonce, &body])?.finalize().into_bytes();
    body.extend_from_slice(&tag);
    Ok(body)
}

/// The body without its proof, if that is right.
pub fn verify<'a>(key: &Key, what: &str, nonce: &Nonce, body: &'a [u8]) -> Option<&'a [u8]> {
    let (signed, tag) = body.split_at_checked(body.len().checked_sub(MAC_BYTES)?)?;
    mac(key, &[what.as_bytes(), nonce, signed]).ok()?.verify_slice(tag).ok()?;
    Some(signed)
}

/// A message: kind and body.
pub struct Message {
    pub kind: Kind,
    pub body: Vec<u8>,
}

/// A connection that keeps what has arrived of a message, so that no peer can make another wait.
pub struct Link {
    pub stream: Stream,
    inbox: Vec<u8>,
}

/// Why a link gave no message.
#[derive(Debug)]
pub enum Trouble {
    Closed,
    Garbage(String),
}

impl Link {
    pub fn new(stream: Stream) -> Result<Link> {
        stream.set_nonblocking().map_err(|e| Error::system("a socket's mode", e))?;
        Ok(Link { stream, inbox: Vec::new() })
    }

    /// Messages are small and sockets buffer far more: a send that would block means a peer that never reads.
    pub fn send(&mut self, kind: Kind, body: &[u8]) -> std::io::Result<()> {
        let mut frame = (body.len() as u32).to_le_bytes().to_vec();
        frame.push(kind as u8);
        frame.extend_from_slice(body);
        self.stream.write_all(&frame)
    }

    /// Takes what has arrived; a whole message if there is one.
    pub fn receive(&mut self) -> std::result::Result<Option<Message>, Trouble> {
        let mut chunk = [0; 4096];
        loop {
            if let Some(message) = parse(&mut self.inbox)? {
                return Ok(Some(message));
            }
            match self.stream.read(&mut chunk) {
                Ok(0) => return Err(Trouble::Closed),
                Ok(n) => self.inbox.extend_from_slice(&chunk[..n]),
                Err(e) if e.kind() == ErrorKind::WouldBlock => return Ok(None),
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(_) => return Err(Trouble::Closed),
            }
        }
    }
}

/// A link whose two ends have nonces: what goes over it can be proven.
pub struct Line {
    pub link: Link,
    key: Key,
    /// What the other side signs over; and what this one does, all zeros as long as it is not known.
    pub mine: Nonce,
    pub theirs: Nonce,
}

impl Line {
    pub fn new(link: Link, key: Key, mine: Nonce, theirs: Nonce) -> Line {
        Line { link, key, mine, theirs }
    }
    /// Sends a body and its proof.
    pub fn send_signed(&mut self, kind: Kind, body: Vec<u8>) -> std::io::Result<()> {
        let body = sign(&self.key, purpose(kind), &self.theirs, body).map_err(std::io::Error::other)?;
        self.link.send(kind, &body)
    }
    /// The other side's body without its proof, if that is right.
    pub fn verify<'a>(&self, kind: Kind, body: &'a [u8]) -> Option<&'a [u8]> {
        verify(&self.key, purpose(kind), &self.mine, body)
    }
    /// Says why it is over. Who cannot be told has left already.
    pub fn fail(&mut self, error: &Error) {
        let _ = self.send_signed(Kind::Fail, error_bytes(error));
    }
    /// What a FAIL says. Whoever has not proven the key is quoted, not believed.
    pub fn failure(&self, body: &[u8]) -> Error {
        match self.verify(Kind::Fail, body) {
            Some(said) => parse_error(said),
            None => {
                let said = parse_error(&body[..body.len().saturating_sub(MAC_BYTES)]).message;
                let text = format!("{said} (said by who did not prove the group's key)");
                Error::new(Status::Mismatch, text)
            }
        }
    }
}

/// Takes the first message out of what has arrived, if it is whole.
fn parse(inbox: &mut Vec<u8>) -> std::result::Result<Option<Message>, Trouble> {
    let Some(head) = inbox.first_chunk::<5>() else { return Ok(None) };
    let length = u32::from_le_bytes([head[0], head[1], head[2], head[3]]) as usize;
    let Some(kind) = Kind::from_byte(head[4]).filter(|_| length <= MAX_BODY) else {
        return Err(Trouble::Garbage(format!("a message of kind {} with {length} bytes", head[4])));
    };
    if inbox.len() < 5 + length {
        return Ok(None);
    }
    let body = inbox[5..5 + length].to_vec();
    inbox.drain(..5 + length);
    Ok(Some(Message { kind, body }))
}

/// Who says it wants in, and which version it is: the part of JOIN and DECLINE that never changes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hello {
    pub protocol: u32,
    pub rank: u32,
    pub num_ranks: u32,
    pub nonce: Nonce,
    pub version: u64,
}

pub const HELLO: usize = 8 + 3 * 4 + 16 + 8;

impl Hello {
    pub fn bytes(&self) -> Vec<u8> {
        let mut bytes = MAGIC.to_vec();
        for word in [self.protocol, self.rank, self.num_ranks] {
            bytes.extend(word.to_le_bytes());
        }
        bytes.extend(self.nonce);
        bytes.extend(self.version.to_le_bytes());
        bytes
    }

    pub fn read(bytes: &[u8]) -> Option<Hello> {
        if bytes.len() < HELLO || &bytes[..8] != MAGIC {
            return None;
        }
        let word = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        let mut nonce = [0; 16];
        nonce.copy_from_slice(&bytes[20..36]);
        let version = number(&bytes[36..HELLO]);
        Some(Hello { protocol: word(8), rank: word(12), num_ranks: word(16), nonce, version })
    }

    /// A proven JOIN or DECLINE: its head, and what follows it.
    pub fn parse<'a>(
        kind: Kind,
        body: &'a [u8],
        key: &Key,
        challenge: &Nonce,
    ) -> std::result::Result<(Hello, &'a [u8]), &'static str> {
        let hello = Hello::read(body).filter(|_| body.len() >= HELLO + MAC_BYTES);
        let hello = hello.ok_or("it is no rank of liba2a")?;
        let signed = verify(key, purpose(kind), challenge, body).ok_or("it does not know the group's key")?;
        Ok((hello, &signed[HELLO..]))
    }
}

/// What a proof is for, by the message it stands in.
pub fn purpose(kind: Kind) -> &'static str {
    match kind {
        Kind::Join => "join",
        Kind::Decline => "decline",
        Kind::Welcome => "welcome",
        Kind::Gone => "gone",
        Kind::Put => "put",
        Kind::Take => "take",
        Kind::Ask => "ask",
        _ => "fail",
    }
}

/// Numbers of eight bytes each.
pub fn numbers(bytes: &[u8]) -> Vec<u64> {
    bytes.chunks_exact(8).map(number).collect()
}

fn number(bytes: &[u8]) -> u64 {
    bytes.iter().rev().fold(0, |n, b| n << 8 | *b as u64)
}

/// "0.1.0" as one number; and back, for a sentence.
pub fn version_number() -> u64 {
    env!("CARGO_PKG_VERSION").split('.').fold(0, |n, part| n * 1000 + part.parse::<u64>().unwrap_or(0))
}

pub fn version_name(number: u64) -> String {
    format!("{}.{}.{}", number / 1_000_000, number / 1000 % 1000, number % 1000)
}

/// A status and its sentence, as FAIL and DECLINE carry them.
pub fn error_bytes(error: &Error) -> Vec<u8> {
    let mut bytes = (error.status as i32).to_le_bytes().to_vec();
    let text = error.message.as_str();
    bytes.extend(&text.as_bytes()[..text.floor_char_boundary(MAX_BODY - 128)]);
    bytes
}

/// The error they carry. The others' lack of memory is this rank's lost peer.
pub fn parse_error(bytes: &[u8]) -> Error {
    let status = bytes.first_chunk::<4>().and_then(|b| Status::from_code(i32::from_le_bytes(*b)));
    let status = match status {
        Some(status @ (Status::Mismatch | Status::Timeout | Status::InvalidArgument | Status::PeerLost)) => {
            status
        }
        _ => Status::PeerLost,
    };
    Error::new(status, String::from_utf8_lossy(bytes.get(4..).unwrap_or_default()))
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEY: Key = [7; 16];

    fn hello() -> Hello {
        Hello { protocol: PROTOCOL, rank: 3, num_ranks: 8, nonce: [9; 16], version: version_number() }
    }

    #[test]
    fn a_join_is_read_as_it_was_said_by_who_knows_the_key() {
        let mut body = hello().bytes();
        body.extend(42u64.to_le_bytes());
        let body = sign(&KEY, "join", &[1; 16], body).unwrap();
        let (read, rest) = Hello::parse(Kind::Join, &body, &KEY, &[1; 16]).unwrap();
        assert_eq!((read, numbers(rest)), (hello(), vec![42]));
        for (key, nonce) in [([8; 16], [1; 16]), (KEY, [2; 16])] {
            assert_eq!(
                Hello::parse(Kind::Join, &body, &key, &nonce).unwrap_err(),
                "it does not know the group's key"
            );
        }
        // A JOIN is no DECLINE, and no bit of it may turn.
        assert!(Hello::parse(Kind::Decline, &body, &KEY, &[1; 16]).is_err());
        for bit in 0..body.len() * 8 {
            let mut body = body.clone();
            body[bit / 8] ^= 1 << (bit % 8);
            assert!(Hello::parse(Kind::Join, &body, &KEY, &[1; 16]).is_err(), "bit {bit}");
        }
    }

    /// Other versions read these bytes: the test changes only together with every released version.
    #[test]
    fn the_head_of_a_join_never_changes() {
        let hello = Hello { protocol: 0x0a0b0c0d, rank: 1, num_ranks: 2, nonce: [5; 16], version: 3 };
        let expected = [
            &b"a2a.join"[..],
            &[0x0d, 0x0c, 0x0b, 0x0a, 1, 0, 0, 0, 2, 0, 0, 0],
            &[5; 16],
            &[3, 0, 0, 0, 0, 0, 0, 0],
        ];
        assert_eq!(hello.bytes(), expected.concat());
    }

    #[test]
    fn messages_come_out_of_a_stream_whole_or_not_at_all() {
        let mut inbox = vec![3, 0, 0, 0, Kind::Go as u8, 1, 2];
        assert!(parse(&mut inbox).unwrap().is_none());
        inbox.extend([3, 9]);
        let message = parse(&mut inbox).unwrap().unwrap();
        assert_eq!((message.kind, message.body, inbox), (Kind::Go, vec![1, 2, 3], vec![9]));
        for bad in [[0, 0, 0, 0, 0], [0, 0, 0, 0, 12], [1, 32, 0, 0, 2], [255, 255, 255, 255, 2]] {
            assert!(parse(&mut bad.to_vec()).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn a_sentence_survives_its_bytes_and_a_long_one_is_cut_at_a_character() {
        let error = parse_error(&error_bytes(&Error::new(Status::Mismatch, "größer")));
        assert_eq!((error.status, error.message.as_str()), (Status::Mismatch, "größer"));
        let long = parse_error(&error_bytes(&Error::new(Status::OutOfMemory, "ö".repeat(MAX_BODY))));
        assert_eq!(long.status, Status::PeerLost);
        assert!(long.message.len() > MAX_BODY - 140 && long.message.chars().all(|c| c == 'ö'));
        assert_eq!(parse_error(&[]).status, Status::PeerLost);
    }

    #[test]
    fn versions_are_named_as_users_know_them() {
        assert_eq!(version_name(version_number()), env!("CARGO_PKG_VERSION"));
    }
}
