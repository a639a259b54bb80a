//! Which ranks of a group take part.

/// A set of ranks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Members([u64; Members::WORDS]);

impl Members {
    /// Room for as many ranks as a group may have.
    pub const WORDS: usize = 16;

    pub fn none() -> Members {
        Members::default()
    }
    pub fn all(ranks: u32) -> Members {
        (0..ranks).collect()
    }
    pub const fn from_words(words: [u64; Members::WORDS]) -> Members {
        Members(words)
    }
    pub fn words(&self) -> &[u64; Members::WORDS] {
        &self.0
    }
    #[inline]
    pub fn contains(&self, rank: u32) -> bool {
        self.0[rank as usize / 64] >> (rank % 64) & 1 == 1
    }
    pub fn insert(&mut self, rank: u32) {
        self.0[rank as usize / 64] |= 1 << (rank % 64);
    }
    pub fn len(&self) -> u32 {
        self.0.iter().map(|word| word.count_ones()).sum()
    }
    /// Of these, those that are not in the other set.
    pub fn without(&self, other: &Members) -> Members {
        self.iter().filter(|rank| !other.contains(*rank)).collect()
    }
    /// Ascending.
    #[inline]
    pub fn iter(&self) -> impl Iterator<Item = u32> + use<> {
        let words = self.0;
        (0..Members::WORDS as u32).flat_map(move |at| {
            let mut left = words[at as usize];
            std::iter::from_fn(move || {
                let bit = (left != 0).then(|| left.trailing_zeros())?;
                left &= left - 1;
                Some(at * 64 + bit)
            })
        })
    }
}

impl FromIterator<u32> for Members {
    fn from_iter<I: IntoIterator<Item = u32>>(ranks: I) -> Members {
        let mut members = Members::none();
        ranks.into_iter().for_each(|rank| members.insert(rank));
        members
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranks_come_back_ascending() {
        let ranks = [0, 5, 63, 64, 127, 1023];
        let members: Members = ranks.into_iter().rev().collect();
        assert_eq!(members.iter().collect::<Vec<_>>(), ranks);
        assert_eq!((members.len(), members.contains(64), members.contains(65)), (6, true, false));
        assert_eq!(Members::all(130).without(&members).len(), 130 - 5);
        assert_eq!(Members::all(65).words()[..2], [u64::MAX, 1]);
    }
}
