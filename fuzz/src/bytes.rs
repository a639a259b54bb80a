//! Choices made of a byte string. When the bytes are used up every choice is the first: the ordinary one.

/// Bytes, one after the other.
#[derive(Clone)]
pub struct Bytes<'a> {
    left: &'a [u8],
}

impl<'a> Bytes<'a> {
    pub fn new(left: &'a [u8]) -> Bytes<'a> {
        Bytes { left }
    }

    pub fn is_empty(&self) -> bool {
        self.left.is_empty()
    }

    pub fn byte(&mut self) -> u8 {
        let (byte, left) = self.left.split_first().map_or((0, self.left), |(byte, left)| (*byte, left));
        self.left = left;
        byte
    }

    pub fn word(&mut self) -> u32 {
        u32::from_le_bytes(std::array::from_fn(|_| self.byte()))
    }

    /// 0 to n - 1, of one byte.
    pub fn below(&mut self, n: usize) -> usize {
        self.byte() as usize % n
    }

    pub fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len())]
    }

    /// Seldom, and never when the bytes are used up.
    pub fn odd(&mut self) -> bool {
        self.byte() >= 248
    }

    /// One time in two, and never when the bytes are used up.
    pub fn half(&mut self) -> bool {
        self.byte() % 2 == 1
    }

    /// What remains.
    pub fn rest(self) -> &'a [u8] {
        self.left
    }
}
