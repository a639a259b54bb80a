//! A courier within a process: memory is copied, and notes stand in a list. For tests, where NIXL is not.

use std::any::Any;
use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::{Courier, Delivery, Peer, Piece, busy, stranger};
use crate::error::{Error, Result, Status};

/// By the name of who reads them: who said what.
static POST: Mutex<Option<Post>> = Mutex::new(None);

type Post = HashMap<String, VecDeque<(String, Vec<u8>)>>;

fn post() -> MutexGuard<'static, Option<Post>> {
    POST.lock().unwrap_or_else(PoisonError::into_inner)
}

pub struct Shared {
    name: String,
    regions: Vec<(u64, u64)>,
    keep: Vec<Arc<dyn Any + Send + Sync>>,
    /// `None` once forgotten.
    peers: Vec<Option<Known>>,
}

struct Known {
    name: String,
    regions: Vec<(u64, u64)>,
    failed: HashMap<usize, Error>,
}

fn holds(regions: &[(u64, u64)], at: u64, bytes: u64) -> bool {
    regions.iter().any(|(start, size)| at >= *start && at + bytes <= start + size)
}

impl Shared {
    pub fn new(name: &str) -> Result<Shared> {
        match post().get_or_insert_default().insert(name.into(), VecDeque::new()) {
            None => {
                Ok(Shared { name: name.into(), regions: Vec::new(), keep: Vec::new(), peers: Vec::new() })
            }
            Some(_) => Err(Error::invalid(format!("there is a {name} already"))),
        }
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        post().get_or_insert_default().remove(&self.name);
    }
}

impl Courier for Shared {
    unsafe fn register(&mut self, at: u64, bytes: u64, keep: Arc<dyn Any + Send + Sync>) -> Result<()> {
        self.regions.push((at, bytes));
        self.keep.push(keep);
        Ok(())
    }

    fn card(&mut self) -> Result<Vec<u8>> {
        Ok(serde_json::json!([self.name, self.regions]).to_string().into_bytes())
    }

    fn meet(&mut self, card: &[u8]) -> Result<Peer> {
        let parsed = || -> Option<Known> {
            let card: serde_json::Value = serde_json::from_slice(card).ok()?;
            let regions =
                card[1].as_array()?.iter().map(|region| Some((region[0].as_u64()?, region[1].as_u64()?)));
            let (name, regions) = (card[0].as_str()?.to_owned(), regions.collect::<Option<_>>()?);
            Some(Known { name, regions, failed: HashMap::new() })
        };
        let known = parsed().ok_or_else(|| Error::invalid("what a peer sent is no card"))?;
        if known.name == self.name || self.peers.iter().flatten().any(|peer| peer.name == known.name) {
            return Err(Error::invalid(format!("{} has been met already", known.name)));
        }
        self.peers.push(Some(known));
        Ok(Peer(self.peers.len() - 1))
    }

    fn forget(&mut self, peer: Peer) {
        self.peers[peer.0] = None;
    }

    unsafe fn post(&mut self, peer: Peer, channel: usize, pieces: &[Piece], note: &[u8]) -> Result<()> {
        let known = self.peers[peer.0].as_mut().ok_or_else(|| stranger(peer))?;
        if known.failed.contains_key(&channel) {
            return Err(busy(peer, channel));
        }
        let mut post = post();
        let Some(list) = post.get_or_insert_default().get_mut(&known.name) else {
            known.failed.insert(channel, Error::new(Status::Nixl, format!("{} is gone", known.name)));
            return Ok(());
        };
        for Piece { from, to, bytes } in pieces {
            if !holds(&self.regions, *from, *bytes) || !holds(&known.regions, *to, *bytes) {
                return Err(Error::internal(format!(
                    "{bytes} bytes from {from:#x} to {to:#x} are not registered"
                )));
            }
            // SAFETY: registered on both sides, whose owners live: their lists are there.
            unsafe { std::ptr::copy_nonoverlapping(*from as *const u8, *to as *mut u8, *bytes as usize) };
        }
        list.push_back((self.name.clone(), note.to_vec()));
        Ok(())
    }

    fn poll(&mut self, heard: &mut dyn FnMut(Peer, &[u8])) -> Result<()> {
        let notes =
            post().get_or_insert_default().get_mut(&self.name).map(std::mem::take).unwrap_or_default();
        for (name, note) in notes {
            let is_theirs = |peer: &Option<Known>| peer.as_ref().is_some_and(|known| known.name == name);
            if let Some(peer) = self.peers.iter().position(is_theirs) {
                heard(Peer(peer), &note);
            }
        }
        Ok(())
    }

    fn delivery(&self, peer: Peer, channel: usize) -> Delivery {
        let failed = self.peers[peer.0].as_ref().and_then(|known| known.failed.get(&channel));
        failed.map_or(Delivery::Done, |error| Delivery::Failed(error.clone()))
    }
}
