//! What couriers carry beside rows: the words of a mailbox that go with one flag, and with no other's, since a note without rows may
//! overtake one whose rows are under way.
//!
//! A note is {kind, 0, slot: u16, generation: u32}, little-endian, and then words.

use super::mail;
use super::map::mask_words;
use crate::config::MAX_RANKS;

/// What a note says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Note {
    Dispatch = 1,
    Combine,
    Read,
    Loss,
    Gone,
}

/// Of a mailbox, as the CPU and as kernels use it: shape, tokens, what the source is at, flags.
const DISPATCH_WORDS: [u64; 12] = {
    let [shape @ .., _] = DISPATCH_WORDS_OF_KERNELS;
    let mut words = shape;
    words[11] = mail::DISPATCH_FLAG;
    words
};
const DISPATCH_WORDS_OF_KERNELS: [u64; 13] = {
    let mut words = [0; 13];
    let mut i = 0;
    while i < 8 {
        words[i] = mail::DISPATCH_SHAPE + i as u64 * 8;
        i += 1;
    }
    [words[8], words[9], words[10]] = [mail::TOKENS, mail::PROGRESS, mail::COUNTS_FLAG];
    [words[11], words[12]] = [mail::DISPATCH_PAIR + 8, mail::DISPATCH_PAIR];
    words
};
const COMBINE_WORDS: [u64; 4] =
    [mail::COMBINE_SHAPE, mail::COMBINE_SHAPE + 8, mail::PROGRESS, mail::COMBINE_FLAG];
const READ_WORDS: [u64; 2] = [mail::PROGRESS, mail::READ_FLAG];
const LOSS_WORDS: [u64; 2] = [mail::LOSS_ORIGIN, mail::LOSS];

const HEADER: usize = 8;
const MOST: usize = HEADER + 8 * (DISPATCH_WORDS_OF_KERNELS.len() + mask_words(MAX_RANKS));

impl Note {
    fn from_byte(byte: u8) -> Option<Note> {
        [Note::Dispatch, Note::Combine, Note::Read, Note::Loss, Note::Gone]
            .into_iter()
            .find(|note| *note as u8 == byte)
    }
    /// Those of the mailbox, in the order in which they are stored, a flag last. `kernels`: as they use it.
    pub fn words(self, kernels: bool) -> &'static [u64] {
        match self {
            Note::Dispatch if kernels => &DISPATCH_WORDS_OF_KERNELS,
            Note::Dispatch => &DISPATCH_WORDS,
            Note::Combine => &COMBINE_WORDS,
            Note::Read => &READ_WORDS,
            Note::Loss => &LOSS_WORDS,
            Note::Gone => &[],
        }
    }
    /// What goes before those: of a loss the ranks that are lost, of an end why.
    pub fn words_before(self, ranks: u32) -> usize {
        match self {
            Note::Loss => mask_words(ranks),
            Note::Gone => 1,
            _ => 0,
        }
    }
}

/// A note on its way.
pub struct Written {
    bytes: [u8; MOST],
    length: usize,
}

impl Written {
    pub fn new(note: Note, slot: u32, generation: u64, words: impl Iterator<Item = u64>) -> Written {
        let mut bytes = [0; MOST];
        bytes[0] = note as u8;
        bytes[2..4].copy_from_slice(&(slot as u16).to_le_bytes());
        bytes[4..8].copy_from_slice(&(generation as u32).to_le_bytes());
        let mut length = HEADER;
        for word in words {
            bytes[length..length + 8].copy_from_slice(&word.to_le_bytes());
            length += 8;
        }
        Written { bytes, length }
    }
    pub fn bytes(&self) -> &[u8] {
        &self.bytes[..self.length]
    }
}

/// A note that was heard.
pub struct Read<'a> {
    pub note: Note,
    pub slot: u32,
    generation: u32,
    words: &'a [u8],
}

impl<'a> Read<'a> {
    /// `None` if it is none, of so many ranks and slots.
    pub fn new(bytes: &'a [u8], (ranks, slots): (u32, u32), kernels: bool) -> Option<Read<'a>> {
        let (header, words) = bytes.split_first_chunk::<HEADER>()?;
        let note = Note::from_byte(header[0])?;
        let slot = u16::from_le_bytes([header[2], header[3]]) as u32;
        let generation = u32::from_le_bytes([header[4], header[5], header[6], header[7]]);
        let all = note.words_before(ranks) + note.words(kernels).len();
        (slot < slots && words.len() == 8 * all).then_some(Read { note, slot, generation, words })
    }
    /// How many generations ahead its sender is.
    pub fn ahead_of(&self, generation: u64) -> i32 {
        self.generation.wrapping_sub(generation as u32) as i32
    }
    pub fn words(&self) -> impl Iterator<Item = u64> + use<'a> {
        self.words.chunks_exact(8).map(|word| u64::from_le_bytes(word.try_into().unwrap_or_default()))
    }
}
