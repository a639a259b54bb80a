//! Rendezvous by the caller's all-gather: one call of it tells every rank what all are, and where rank 0 listens.
//!
//! A block of one size from every rank:
//! ```text
//! JOIN's head (its nonce is unused) | status:i32 text[252] | unique id[128] | field:u64 ... up to 64
//! ```
//! A rank that is refused by itself calls it too, with its sentence, since whoever stays away from a collective holds up
//! all others.

use super::Party;
use super::wire::{HELLO, Hello, PROTOCOL, numbers, parse_error, version_name, version_number};
use crate::config::{Allgather, UniqueId};
use crate::error::{Error, Result, Status};

const SAID: usize = 256;
const FIELDS: usize = 64;
const BLOCK: usize = HELLO + SAID + 128 + FIELDS * 8;

/// Tells all ranks about this one; returns their blocks.
fn exchange(
    allgather: &Allgather,
    (rank, num_ranks): (u32, u32),
    said: std::result::Result<&Party, &Error>,
) -> Result<Vec<u8>> {
    let hello = Hello { protocol: PROTOCOL, rank, num_ranks, nonce: [0; 16], version: version_number() };
    let mut block = hello.bytes();
    block.resize(BLOCK, 0);
    match said {
        Ok(party) => {
            block[HELLO + SAID..][..128].copy_from_slice(&party.id.to_bytes());
            for (i, (_, value)) in party.fields.iter().enumerate() {
                block[HELLO + SAID + 128 + i * 8..][..8].copy_from_slice(&value.to_le_bytes());
            }
        }
        Err(error) => {
            let text = &error.message[..error.message.floor_char_boundary(SAID - 4)];
            block[HELLO..][..4].copy_from_slice(&(error.status as i32).to_le_bytes());
            block[HELLO + 4..][..text.len()].copy_from_slice(text.as_bytes());
        }
    }
    let mut blocks = vec![0; BLOCK * num_ranks as usize];
    match allgather.call(&block, &mut blocks) {
        0 => Ok(blocks),
        code => Err(Error::new(Status::System, format!("rank {rank}: allgather returned {code}"))),
    }
}

/// This rank cannot take part: everybody is told.
pub fn decline(allgather: &Allgather, ranks: (u32, u32), error: &Error) -> Result<()> {
    exchange(allgather, ranks, Err(error)).map(|_| ())
}

/// Agrees with every rank on version and config; returns the id under which they meet.
pub fn agree(allgather: &Allgather, party: &Party) -> Result<UniqueId> {
    if party.fields.len() > FIELDS {
        return Err(Error::internal(format!("{} fields of a config", party.fields.len())));
    }
    let ranks = (party.rank, party.num_ranks);
    let blocks = exchange(allgather, ranks, Ok(party))?;
    let mismatch = |text: String| Error::new(Status::Mismatch, format!("rank {}: {text}", party.rank));
    let mut id = None;
    for (rank, block) in blocks.chunks_exact(BLOCK).enumerate() {
        let (head, rest) = block.split_at(HELLO);
        let Some(hello) = Hello::read(head) else {
            return Err(mismatch(format!("allgather brought no block of liba2a from rank {rank}")));
        };
        if hello.rank as usize != rank {
            let text = format!("allgather brought rank {}'s block where rank {rank}'s was due", hello.rank);
            return Err(mismatch(text));
        }
        let differs = |name: &str, mine: String, theirs: String| {
            mismatch(format!("{name} is {mine} on rank {} and {theirs} on rank {rank}", party.rank))
        };
        if (hello.protocol, hello.version) != (PROTOCOL, version_number()) {
            let (mine, theirs) = (version_name(version_number()), version_name(hello.version));
            return Err(differs("the library's version", mine, theirs));
        }
        if hello.num_ranks != party.num_ranks {
            let (mine, theirs) = (party.num_ranks.to_string(), hello.num_ranks.to_string());
            return Err(differs("num_ranks", mine, theirs));
        }
        let (said, rest) = rest.split_at(SAID);
        if said[..4] != [0; 4] {
            let end = 4 + said[4..].iter().position(|b| *b == 0).unwrap_or(SAID - 4);
            let why = parse_error(&said[..end]).message;
            let text = format!("rank {}: the group was not formed: {why}", party.rank);
            return Err(Error::new(Status::PeerLost, text));
        }
        let (bytes, fields) = rest.split_at(128);
        if let Some(((name, mine), theirs)) =
            party.fields.iter().zip(numbers(fields)).find(|((_, mine), theirs)| mine != theirs)
        {
            return Err(differs(name, mine.to_string(), theirs.to_string()));
        }
        if rank == 0 {
            let mut whole = [0; 128];
            whole.copy_from_slice(bytes);
            id = UniqueId::from_bytes(party.rank as i32, &whole)?;
        }
    }
    id.ok_or_else(|| mismatch("allgather brought no unique id from rank 0".into()))
}
