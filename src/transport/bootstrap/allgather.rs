//! Rendezvous by the caller's all-gather: one call of it tells every rank what all are, and where rank 0 listens.
//!
//! A block of one size from every rank:
//! ```text
//! JOIN's head (its nonce is unused) | status:i32 text[252] | unique id[128] | field:u64 ... up to 64
//! ```
//! A rank that is refused by itself calls it too, with its sentence, since whoever stays away from a collective holds up
//! all others.

use std::os::fd::OwnedFd;

use super::wire::{HELLO, Hello, PROTOCOL, numbers, parse_error, version_name, version_number};
use super::{Finish, Gathered, HOST, Party, Reach, alone};
use crate::config::{Allgather, UniqueId};
use crate::error::{Error, Result, Status};

const SAID: usize = 256;
const FIELDS: usize = 64;
const BLOCK: usize = HELLO + SAID + 128 + FIELDS * 8;

/// What a rank says: 128 bytes, and numbers.
type Says<'a> = (&'a [u8], &'a [u64]);

/// Tells all ranks about this one; returns their blocks.
fn exchange(
    allgather: &Allgather,
    (rank, num_ranks): (u32, u32),
    said: std::result::Result<Says<'_>, &Error>,
) -> Result<Vec<u8>> {
    let hello = Hello { protocol: PROTOCOL, rank, num_ranks, nonce: [0; 16], version: version_number() };
    let mut block = hello.bytes();
    block.resize(BLOCK, 0);
    match said {
        Ok((bytes, numbers)) => {
            block[HELLO + SAID..][..bytes.len()].copy_from_slice(bytes);
            for (at, number) in block[HELLO + SAID + 128..].chunks_exact_mut(8).zip(numbers) {
                at.copy_from_slice(&number.to_le_bytes());
            }
        }
        Err(error) => {
            let text = &error.message[..error.message.floor_char_boundary(SAID - 4)];
            block[HELLO..][..4].copy_from_slice(&(error.status as i32).to_le_bytes());
            block[HELLO + 4..][..text.len()].copy_from_slice(text.as_bytes());
        }
    }
    let mut blocks = vec![0; BLOCK * num_ranks as usize];
    allgather.call(&block, &mut blocks).map_err(|e| e.context(format!("rank {rank}")))?;
    Ok(blocks)
}

/// What one rank said to another, if it is one of this group, and can take part.
fn heard((me, num_ranks): (u32, u32), rank: usize, block: &[u8]) -> Result<(&[u8], Vec<u64>)> {
    let mismatch = |text: String| Error::new(Status::Mismatch, format!("rank {me}: {text}"));
    let differs = |name: &str, mine: String, theirs: String| {
        mismatch(format!("{name} is {mine} on rank {me} and {theirs} on rank {rank}"))
    };
    let (head, rest) = block.split_at(HELLO);
    let Some(hello) = Hello::read(head) else {
        return Err(mismatch(format!("allgather brought no block of liba2a from rank {rank}")));
    };
    if hello.rank as usize != rank {
        let text = format!("allgather brought rank {}'s block where rank {rank}'s was due", hello.rank);
        return Err(mismatch(text));
    }
    if (hello.protocol, hello.version) != (PROTOCOL, version_number()) {
        let (mine, theirs) = (version_name(version_number()), version_name(hello.version));
        return Err(differs("the library's version", mine, theirs));
    }
    if hello.num_ranks != num_ranks {
        return Err(differs("num_ranks", num_ranks.to_string(), hello.num_ranks.to_string()));
    }
    let (said, rest) = rest.split_at(SAID);
    if said[..4] != [0; 4] {
        let end = 4 + said[4..].iter().position(|b| *b == 0).unwrap_or(SAID - 4);
        let why = parse_error(&said[..end]).message;
        return Err(Error::new(Status::PeerLost, format!("rank {me}: the group was not formed: {why}")));
    }
    let (bytes, fields) = rest.split_at(128);
    Ok((bytes, numbers(fields)))
}

/// This rank cannot take part: everybody is told.
pub fn decline(allgather: &Allgather, ranks: (u32, u32), error: &Error) -> Result<()> {
    exchange(allgather, ranks, Err(error)).map(|_| ())
}

/// Agrees with every rank on version and config; returns the id under which they meet, and if they are on several hosts.
pub fn agree(allgather: &Allgather, party: &Party) -> Result<(UniqueId, bool)> {
    let host = [(HOST.to_string(), party.host)];
    let mine: Vec<(&str, u64)> =
        party.fields.iter().chain(&host).map(|(name, value)| (name.as_str(), *value)).collect();
    if mine.len() > FIELDS {
        return Err(Error::internal(format!("{} fields of a config", mine.len())));
    }
    let ranks = (party.rank, party.num_ranks);
    let numbers: Vec<u64> = mine.iter().map(|(_, value)| *value).collect();
    let blocks = exchange(allgather, ranks, Ok((&party.id.to_bytes(), &numbers)))?;
    let (mut id, mut apart) = (None, false);
    for (rank, block) in blocks.chunks_exact(BLOCK).enumerate() {
        let (bytes, theirs) = heard(ranks, rank, block)?;
        if let Some(((name, mine), theirs)) =
            mine.iter().zip(theirs).find(|((_, mine), theirs)| mine != theirs)
        {
            if *name != HOST || party.reach == Reach::OneHost {
                let text = format!("{name} is {mine} on rank {} and {theirs} on rank {rank}", party.rank);
                return Err(Error::new(Status::Mismatch, format!("rank {}: {text}", party.rank)));
            }
            apart = true;
        }
        if rank == 0 {
            let mut whole = [0; 128];
            whole.copy_from_slice(bytes);
            id = UniqueId::from_bytes(party.rank as i32, &whole)?;
        }
    }
    let text = || format!("rank {}: allgather brought no unique id from rank 0", party.rank);
    let id = id.ok_or_else(|| Error::new(Status::Mismatch, text()))?;
    // One rank's host may be another's: if any two differ, all go by it.
    let hosts =
        || blocks.chunks_exact(BLOCK).map(|block| &block[HELLO + SAID + 128 + 8 * (mine.len() - 1)..][..8]);
    Ok((id, apart || party.reach == Reach::Hosts && hosts().any(|host| Some(host) != hosts().next())))
}

/// Tells all ranks how it went on this one, and what it has for them; returns what rank 0 had, if it went well on all.
pub fn tell(
    allgather: &Allgather,
    ranks: (u32, u32),
    outcome: std::result::Result<&[u8], &Error>,
) -> Result<Vec<u8>> {
    let blocks = exchange(allgather, ranks, outcome.map(|bytes| (bytes, &[][..])))?;
    let mut gift = Vec::new();
    for (rank, block) in blocks.chunks_exact(BLOCK).enumerate() {
        let (bytes, _) = heard(ranks, rank, block)?;
        if rank == 0 {
            gift = bytes.to_vec();
        }
    }
    Ok(gift)
}

/// Meets ranks on other hosts: what all need of rank 0 comes the same way, and there is nothing else between them.
pub fn gather(
    allgather: &Allgather,
    party: &Party,
    gift: impl FnOnce(bool) -> Result<Vec<u8>>,
    own: impl FnOnce(bool) -> Result<Vec<OwnedFd>>,
) -> Result<Gathered> {
    let ranks = (party.rank, party.num_ranks);
    let made = own(true).and_then(|own| Ok((own, if party.rank == 0 { gift(true)? } else { Vec::new() })));
    let told = tell(allgather, ranks, made.as_ref().map(|(_, gift)| &gift[..]));
    let (own, _) = made?;
    let finish = Finish::Together { allgather: allgather.clone(), ranks };
    Ok(Gathered { fds: alone(own, ranks.0, ranks.1), apart: true, key: party.id.key, gift: told?, finish })
}
