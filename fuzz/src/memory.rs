//! Memory for what calls point at. Each piece is an allocation of its own and ends where it says, so that the address
//! sanitizer sees the first byte read or written outside.

use std::alloc::{Layout, alloc_zeroed, dealloc};

/// Some bytes, from an address that is a multiple of 16 and, if asked for, a few bytes more.
struct Piece {
    start: *mut u8,
    layout: Layout,
}

impl Drop for Piece {
    fn drop(&mut self) {
        // SAFETY: allocated with this layout, freed once.
        unsafe { dealloc(self.start, self.layout) };
    }
}

/// Pieces that live as long as it does.
#[derive(Default)]
pub struct Memory(Vec<Piece>);

impl Memory {
    /// Zeros, `shift` bytes past an address that is a multiple of 16.
    pub fn zeroed(&mut self, bytes: usize, shift: usize) -> *mut u8 {
        let layout = Layout::from_size_align(bytes.max(1) + shift, 16).expect("a few bytes");
        // SAFETY: not empty.
        let start = unsafe { alloc_zeroed(layout) };
        assert!(!start.is_null(), "out of memory");
        self.0.push(Piece { start, layout });
        // SAFETY: inside the allocation.
        unsafe { start.add(shift) }
    }

    /// Copies of some values, which are plain data.
    pub fn of<T>(&mut self, values: &[T]) -> *mut T {
        const { assert!(align_of::<T>() <= 16 && !std::mem::needs_drop::<T>()) };
        let at = self.zeroed(size_of_val(values), 0).cast::<T>();
        // SAFETY: just allocated with this size; aligned; plain data may be there twice.
        unsafe { at.copy_from_nonoverlapping(values.as_ptr(), values.len()) };
        at
    }
}

/// A struct of C's once more.
pub fn copy<T>(value: &T) -> T {
    const { assert!(!std::mem::needs_drop::<T>()) };
    // SAFETY: plain data, with pointers that nobody owns.
    unsafe { std::ptr::read(value) }
}
