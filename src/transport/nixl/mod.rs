//! Bytes and notes to peers whose memory nobody here can address, on this host or another: what NIXL_ELASTIC stands on.
//!
//! A *courier* carries pieces of this rank's registered memory to registered memory of a peer, and behind them a note that the peer
//! hears once they are there. `agent` is NIXL's; in tests `shared` does the same within a process. Whoever uses one brings all of its
//! own: which memory, what notes say, how long to wait. Nothing here waits, and nothing happens but inside of calls: what is under
//! way goes on while `poll` is called, on both sides.
//!
//! Nothing takes back a peer's way to memory that it once had: a peer that is forgotten can still write there. So memory is registered for as
//! long as the courier lives and longer, and what it holds is looked at only on a note's word.

mod agent;
mod mesh;
#[cfg(test)]
mod shared;

use std::any::Any;
use std::sync::Arc;

pub use agent::{Agent, probe};
pub use mesh::{Memory, Mesh, Party, decline};

use crate::error::{Error, Result};

/// A peer, by a number that is never used twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Peer(usize);

/// Bytes that are carried: from here to there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    pub from: u64,
    pub to: u64,
    pub bytes: u64,
}

/// What became of the last that was posted on a channel.
#[derive(Clone, Debug)]
pub enum Delivery {
    /// Nothing, or it has been delivered.
    Done,
    UnderWay,
    /// The peer may have some of it.
    Failed(Error),
}

impl Delivery {
    pub fn is_under_way(&self) -> bool {
        matches!(self, Delivery::UnderWay)
    }
}

/// One rank's end, in one of its incarnations.
pub trait Courier: Send {
    /// From now on peers can write there, those that have this courier's card from afterwards.
    ///
    /// # Safety
    /// So many bytes are readable and writable there, and whatever peers write there is nobody's undoing, as long as `keep` lives.
    unsafe fn register(&mut self, at: u64, bytes: u64, keep: Arc<dyn Any + Send + Sync>) -> Result<()>;

    /// What a peer needs to write here.
    fn card(&mut self) -> Result<Vec<u8>>;

    /// Connects to a peer by its card. A card of one that has been met is refused.
    fn meet(&mut self, card: &[u8]) -> Result<Peer>;

    /// Nothing is carried to it from now on, and none of its notes is heard.
    fn forget(&mut self, peer: Peer);

    /// Starts to carry the pieces, and behind them the note, which may go alone. A peer's channel carries one thing at a time.
    ///
    /// # Safety
    /// The pieces are registered here, and nobody writes them before `delivery` says that they are no longer under way; `to` is what
    /// the peer expects to be written.
    unsafe fn post(&mut self, peer: Peer, channel: usize, pieces: &[Piece], note: &[u8]) -> Result<()>;

    /// Drives what is under way, and hands over what has been heard.
    fn poll(&mut self, heard: &mut dyn FnMut(Peer, &[u8])) -> Result<()>;

    fn delivery(&self, peer: Peer, channel: usize) -> Delivery;
}

fn stranger(peer: Peer) -> Error {
    Error::internal(format!("peer {} was forgotten", peer.0))
}

fn busy(peer: Peer, channel: usize) -> Error {
    Error::internal(format!("channel {channel} to peer {} carries something", peer.0))
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::shared::Shared;
    use super::*;
    use crate::error::Status;

    const BYTES: usize = 1 << 16;

    /// A courier with memory: the first half is what it sends, the second what peers write.
    struct End {
        courier: Box<dyn Courier>,
        memory: Arc<Vec<std::sync::atomic::AtomicU8>>,
        heard: Vec<(Peer, Vec<u8>)>,
    }

    impl End {
        fn new(mut courier: Box<dyn Courier>) -> End {
            let memory: Arc<Vec<_>> = Arc::new((0..BYTES).map(|_| Default::default()).collect());
            let at = memory.as_ptr() as u64;
            // SAFETY: the vector's bytes, which are atomics.
            unsafe { courier.register(at, BYTES as u64, memory.clone()) }.unwrap();
            End { courier, memory, heard: Vec::new() }
        }
        fn at(&self, offset: usize) -> u64 {
            self.memory.as_ptr() as u64 + offset as u64
        }
        fn fill(&self, offset: usize, bytes: usize, seed: u8) {
            for (i, byte) in self.memory[offset..offset + bytes].iter().enumerate() {
                byte.store((i as u8).wrapping_mul(31) ^ seed, std::sync::atomic::Ordering::Relaxed);
            }
        }
        fn bytes(&self, offset: usize, bytes: usize) -> Vec<u8> {
            let part = &self.memory[offset..offset + bytes];
            part.iter().map(|byte| byte.load(std::sync::atomic::Ordering::Relaxed)).collect()
        }
        fn poll(&mut self) {
            let heard = &mut self.heard;
            self.courier.poll(&mut |peer, note| heard.push((peer, note.to_vec()))).unwrap();
        }
        fn post(&mut self, peer: Peer, channel: usize, pieces: &[Piece], note: &[u8]) -> Result<()> {
            // SAFETY: pieces of both ends' memory, which `settle` waits for.
            unsafe { self.courier.post(peer, channel, pieces, note) }
        }
    }

    /// Polls all ends until it is so.
    fn until(ends: &mut [&mut End], mut is_so: impl FnMut(&[&mut End]) -> bool) {
        let begun = Instant::now();
        while !is_so(ends) {
            assert!(begun.elapsed() < Duration::from_secs(30), "it does not come to that");
            ends.iter_mut().for_each(|end| end.poll());
            std::thread::yield_now();
        }
    }

    type Make<'a> = &'a dyn Fn(&str) -> Box<dyn Courier>;

    fn pair(make: Make, name: &str) -> (End, End, Peer, Peer) {
        let mut a = End::new(make(&format!("{name}.a")));
        let mut b = End::new(make(&format!("{name}.b")));
        let (card_a, card_b) = (a.courier.card().unwrap(), b.courier.card().unwrap());
        let (to_b, to_a) = (a.courier.meet(&card_b).unwrap(), b.courier.meet(&card_a).unwrap());
        (a, b, to_b, to_a)
    }

    /// Pieces arrive whole and where they belong, and before their note; the same and other pieces follow on the same channel.
    fn pieces_arrive_before_their_notes(make: Make) {
        let (mut a, mut b, to_b, to_a) = pair(make, "pieces");
        for (round, sizes) in
            [&[4096usize][..], &[4096], &[100, 7168, 1], &[100, 7168, 1], &[16384]].iter().enumerate()
        {
            let (mut from, mut to, mut pieces) = (0, BYTES / 2, Vec::new());
            for bytes in *sizes {
                pieces.push(Piece { from: a.at(from), to: b.at(to), bytes: *bytes as u64 });
                a.fill(from, *bytes, round as u8);
                (from, to) = (from + bytes, to + bytes);
            }
            let note = format!("note {round} \0\u{fffd}");
            a.post(to_b, 0, &pieces, note.as_bytes()).unwrap();
            until(&mut [&mut a, &mut b], |ends| !ends[1].heard.is_empty());
            // Heard is heard: the bytes are there, though the other side may not know it yet.
            assert_eq!(a.bytes(0, from), b.bytes(BYTES / 2, from), "round {round}");
            assert_eq!(std::mem::take(&mut b.heard), [(to_a, note.into_bytes())]);
            until(&mut [&mut a, &mut b], |ends| !ends[0].courier.delivery(to_b, 0).is_under_way());
            assert!(matches!(a.courier.delivery(to_b, 0), Delivery::Done));
        }
        assert!(a.heard.is_empty());
    }

    /// Notes go alone, both ways, on channels of their own; all are heard, once.
    fn notes_go_alone(make: Make) {
        let (mut a, mut b, to_b, to_a) = pair(make, "notes");
        let long = vec![7; 1500];
        for note in 0..20u8 {
            a.post(to_b, 1, &[], &[note]).unwrap();
            b.post(to_a, note as usize % 3, &[], &[note, note]).unwrap();
        }
        a.post(to_b, 0, &[], &long).unwrap();
        until(&mut [&mut a, &mut b], |ends| ends[0].heard.len() >= 20 && ends[1].heard.len() >= 21);
        let mut numbers: Vec<u8> = a.heard.iter().map(|(_, note)| note[0]).collect();
        numbers.sort();
        assert_eq!(numbers, (0..20).collect::<Vec<u8>>());
        assert!(a.heard.iter().all(|(peer, note)| *peer == to_b && note.len() == 2));
        assert_eq!(b.heard.iter().filter(|(peer, note)| *peer == to_a && *note == long).count(), 1);
        assert_eq!(b.heard.len(), 21);
    }

    /// Peers are kept apart, a forgotten one is no longer heard or written to, and comes back by a card of another incarnation alone.
    fn peers_come_and_go(make: Make) {
        let (mut a, mut b, to_b, _) = pair(make, "peers");
        let mut c = End::new(make("peers.c"));
        let (card_a, card_c) = (a.courier.card().unwrap(), c.courier.card().unwrap());
        let (to_c, from_c) = (a.courier.meet(&card_c).unwrap(), c.courier.meet(&card_a).unwrap());
        assert_ne!(to_b, to_c);
        c.post(from_c, 0, &[], b"from c").unwrap();
        until(&mut [&mut a, &mut b, &mut c], |ends| !ends[0].heard.is_empty());
        assert_eq!(std::mem::take(&mut a.heard), [(to_c, b"from c".to_vec())]);

        let again = a.courier.meet(&card_c).unwrap_err();
        assert_eq!(again.status, Status::InvalidArgument, "{again}");
        a.courier.forget(to_c);
        a.courier.forget(to_c);
        assert_eq!(a.post(to_c, 0, &[], b"to c").unwrap_err().status, Status::Internal);
        c.post(from_c, 0, &[], b"who hears this?").unwrap();
        b.post(Peer(0), 0, &[], b"from b").unwrap();
        until(&mut [&mut a, &mut b, &mut c], |ends| !ends[0].heard.is_empty());
        (0..100).for_each(|_| [&mut a, &mut b, &mut c].into_iter().for_each(|end| end.poll()));
        assert_eq!(a.heard, [(to_b, b"from b".to_vec())]);

        // c once more, as itself and as its next incarnation.
        let back = a.courier.meet(&card_c).unwrap();
        let mut next = End::new(make("peers.c.2"));
        let newer = a.courier.meet(&next.courier.card().unwrap()).unwrap();
        assert!(back > to_c && newer > back);
        next.courier.meet(&card_a).unwrap();
        a.fill(0, 512, 9);
        let piece = Piece { from: a.at(0), to: next.at(BYTES / 2), bytes: 512 };
        a.post(newer, 0, &[piece], b"welcome").unwrap();
        until(&mut [&mut a, &mut next, &mut c], |ends| !ends[1].heard.is_empty());
        assert_eq!(a.bytes(0, 512), next.bytes(BYTES / 2, 512));
        assert!(c.heard.is_empty());
    }

    fn what_is_no_card_is_refused(make: Make) {
        let mut a = End::new(make("cards.a"));
        for card in [&b""[..], b"?", &[0; 300]] {
            let error = a.courier.meet(card).unwrap_err();
            assert!(matches!(error.status, Status::InvalidArgument | Status::Nixl), "{error}");
        }
        let own = a.courier.card().unwrap();
        assert!(a.courier.meet(&own).is_err());
    }

    fn shared(name: &str) -> Box<dyn Courier> {
        Box::new(Shared::new(name).unwrap())
    }
    fn nixl(name: &str) -> Box<dyn Courier> {
        Box::new(Agent::new(name, "TLS=tcp,NET_DEVICES=lo").unwrap_or_else(|error| panic!("{error}")))
    }

    macro_rules! both {
        ($($test:ident),+ $(,)?) => {
            mod in_shared_memory {
                $(#[test]
                fn $test() {
                    super::$test(&super::shared);
                })+
            }
            mod over_nixl {
                $(#[test]
                #[ignore = "needs a real NIXL, which A2A_NIXL_LIB names: make test-rust"]
                fn $test() {
                    super::$test(&super::nixl);
                })+
            }
        };
    }
    both!(pieces_arrive_before_their_notes, notes_go_alone, peers_come_and_go, what_is_no_card_is_refused);

    /// A peer that is dead is found out by what is posted to it.
    #[test]
    fn what_is_posted_to_the_dead_fails() {
        let (mut a, b, to_b, _) = pair(&shared, "dead");
        let to = b.at(0);
        drop(b);
        let piece = Piece { from: a.at(0), to, bytes: 8 };
        let posted = a.post(to_b, 0, &[piece], b"?");
        a.poll();
        match a.courier.delivery(to_b, 0) {
            Delivery::Failed(error) => assert!(error.message.contains("dead.b is gone"), "{error}"),
            other => panic!("{posted:?}, {other:?}"),
        }
    }
}
