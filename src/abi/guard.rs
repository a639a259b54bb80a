//! The plumbing every exported function shares: the panic boundary, the per-thread error text, versioned structs
//! and live handles.
//!
//! A handle that C holds is a number that is never used twice, looked up in a table: a destroyed or invented
//! handle is a status, not undefined behaviour, and a2a_abort may race with a2a_destroy.

use std::any::Any;
use std::cell::RefCell;
use std::collections::HashMap;
use std::ffi::CString;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, LazyLock, RwLock};

use super::types::a2a_status_t;
use crate::error::{Error, Result, Status};
use crate::log;

thread_local! {
    static LAST_ERROR: RefCell<CString> = RefCell::new(CString::default());
}

/// The text of the last failure on this thread; the pointer is valid until the thread's next call.
pub fn last_error() -> *const std::ffi::c_char {
    LAST_ERROR.with(|e| e.borrow().as_ptr())
}

fn set_last_error(message: &str) {
    let text = CString::new(message.replace('\0', "?")).unwrap_or_default();
    LAST_ERROR.with(|e| *e.borrow_mut() = text);
}

fn panic_text(payload: Box<dyn Any + Send>) -> String {
    let text = payload
        .downcast_ref::<&str>()
        .map(|s| s.to_string())
        .or_else(|| payload.downcast_ref::<String>().cloned())
        .unwrap_or_else(|| "no message".into());
    format!("a defect of liba2a was caught: {text}")
}

/// Runs the body of the exported function `name`. A panic becomes A2A_INTERNAL, and `on_panic` is told.
pub fn guard_with(
    name: &str,
    body: impl FnOnce() -> Result<()>,
    on_panic: impl FnOnce(&Error),
) -> a2a_status_t {
    let outcome = catch_unwind(AssertUnwindSafe(body)).unwrap_or_else(|payload| {
        let error = Error::internal(panic_text(payload));
        on_panic(&error);
        Err(error)
    });
    match outcome {
        Ok(()) => Status::Success as a2a_status_t,
        Err(error) => {
            let text = format!("{name}: {error}");
            set_last_error(&text);
            log::log(log::Level::Error, || text);
            error.status as a2a_status_t
        }
    }
}

/// `guard_with` where no comm is concerned.
pub fn guard(name: &str, body: impl FnOnce() -> Result<()>) -> a2a_status_t {
    guard_with(name, body, |_| {})
}

/// A struct that starts with `size_t struct_size` and is append-only.
///
/// # Safety
/// The type is `#[repr(C)]`, starts with a `usize` size, has no padding before its end, and all-zero bytes are a
/// valid value.
pub unsafe trait Versioned: Sized {
    const NAME: &'static str;
    /// The size of its first published version.
    const V1_SIZE: usize;
}

fn check_size<T: Versioned>(ptr: *const T, size: usize) -> Result<()> {
    if size < T::V1_SIZE {
        return Err(Error::invalid(format!(
            "{}.struct_size is {size}, the first version has {} bytes (set it to sizeof({}))",
            T::NAME,
            T::V1_SIZE,
            T::NAME
        )));
    }
    // A garbage size must not make us walk the address space.
    if size > 64 * 1024 {
        return Err(Error::invalid(format!("{}.struct_size is {size}, the limit is 65536", T::NAME)));
    }
    let known = size_of::<T>();
    for offset in known..size {
        // SAFETY: the caller vouches for struct_size bytes behind its pointer.
        let byte = unsafe { *(ptr as *const u8).add(offset) };
        if byte != 0 {
            return Err(Error::invalid(format!(
                "{} has {size} bytes, this library knows {known}, and byte {offset} is not zero: a field newer \
                 than the library is set",
                T::NAME
            )));
        }
    }
    Ok(())
}

fn read_size<T: Versioned>(ptr: *const T) -> Result<usize> {
    if ptr.is_null() {
        return Err(Error::invalid(format!("the {} pointer is NULL", T::NAME)));
    }
    if !ptr.is_aligned() {
        return Err(Error::invalid(format!("the {} pointer {ptr:p} is not aligned", T::NAME)));
    }
    // SAFETY: not NULL and aligned; the ABI asks for at least struct_size behind it.
    Ok(unsafe { *(ptr as *const usize) })
}

/// Copies a caller's struct: missing fields become zero, an unknown tail must be zero.
///
/// # Safety
/// `ptr` is NULL or points at a struct whose first word is its size in bytes.
pub unsafe fn read_struct<T: Versioned>(ptr: *const T) -> Result<T> {
    let size = read_size(ptr)?;
    check_size(ptr, size)?;
    let mut value = std::mem::MaybeUninit::<T>::zeroed();
    // SAFETY: both sides hold the smaller of the two sizes; zero bytes are valid for T.
    unsafe {
        std::ptr::copy_nonoverlapping(
            ptr as *const u8,
            value.as_mut_ptr() as *mut u8,
            size.min(size_of::<T>()),
        );
        Ok(value.assume_init())
    }
}

/// What `write_struct` would refuse.
///
/// # Safety
/// As for `read_struct`.
pub unsafe fn check_struct<T: Versioned>(ptr: *const T) -> Result<()> {
    check_size(ptr, read_size(ptr)?)
}

/// Writes a result struct: at most the caller's struct_size bytes, the size itself kept.
///
/// # Safety
/// As for `read_struct`, and the struct is writable.
pub unsafe fn write_struct<T: Versioned>(ptr: *mut T, value: &T) -> Result<()> {
    let size = read_size(ptr)?;
    check_size(ptr, size)?;
    let head = size_of::<usize>();
    // SAFETY: both sides hold the smaller of the two sizes, and at least the size word.
    unsafe {
        std::ptr::copy_nonoverlapping(
            (value as *const T as *const u8).add(head),
            (ptr as *mut u8).add(head),
            size.min(size_of::<T>()) - head,
        );
    }
    Ok(())
}

/// Live handles of one kind.
pub struct Table<T> {
    live: LazyLock<RwLock<HashMap<usize, Arc<T>>>>,
    kind: &'static str,
}

/// One counter for all kinds, so that a routing passed as a comm is found out. Steps of 16 look like pointers to
/// debuggers and never look like NULL.
static NEXT: AtomicUsize = AtomicUsize::new(0xa2a0);

impl<T> Table<T> {
    pub const fn new(kind: &'static str) -> Table<T> {
        Table { live: LazyLock::new(|| RwLock::new(HashMap::new())), kind }
    }
    pub fn insert(&self, value: Arc<T>) -> usize {
        let handle = NEXT.fetch_add(16, Ordering::Relaxed);
        self.live.write().unwrap_or_else(|e| e.into_inner()).insert(handle, value);
        handle
    }
    pub fn get(&self, handle: usize) -> Result<Arc<T>> {
        let live = self.live.read().unwrap_or_else(|e| e.into_inner());
        live.get(&handle).cloned().ok_or_else(|| self.unknown(handle))
    }
    pub fn remove(&self, handle: usize) -> Result<Arc<T>> {
        let mut live = self.live.write().unwrap_or_else(|e| e.into_inner());
        live.remove(&handle).ok_or_else(|| self.unknown(handle))
    }
    fn unknown(&self, handle: usize) -> Error {
        if handle == 0 {
            Error::invalid(format!("the {} is NULL", self.kind))
        } else {
            Error::invalid(format!(
                "{handle:#x} is not a live {}: it was destroyed, or never was one",
                self.kind
            ))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A struct as a library two versions on would know it.
    #[repr(C)]
    #[derive(Debug, PartialEq)]
    struct Grown {
        struct_size: usize,
        first: u64,
        second: u64,
    }
    // SAFETY: repr(C), three words, no padding.
    unsafe impl Versioned for Grown {
        const NAME: &'static str = "grown_t";
        const V1_SIZE: usize = 16;
    }

    #[test]
    fn an_old_callers_missing_field_reads_as_zero() {
        let words = [16usize, 7, 0xdead];
        // SAFETY: three words are behind the pointer.
        let value = unsafe { read_struct(words.as_ptr() as *const Grown) }.unwrap();
        assert_eq!(value, Grown { struct_size: 16, first: 7, second: 0 });
    }

    #[test]
    fn an_old_callers_struct_is_not_written_past_its_end() {
        let mut words = [16usize, 0, 0xdead];
        let value = Grown { struct_size: 24, first: 5, second: 6 };
        // SAFETY: three words are behind the pointer.
        unsafe { write_struct(words.as_mut_ptr() as *mut Grown, &value) }.unwrap();
        assert_eq!(words, [16, 5, 0xdead]);
    }

    #[test]
    fn a_newer_callers_tail_must_be_zero() {
        let mut words = [32usize, 1, 2, 0];
        // SAFETY: four words are behind the pointer.
        assert!(unsafe { read_struct(words.as_ptr() as *const Grown) }.is_ok());
        words[3] = 1 << 40;
        // SAFETY: as above.
        let error = unsafe { read_struct(words.as_ptr() as *const Grown) }.unwrap_err();
        assert_eq!(error.status, Status::InvalidArgument);
        assert!(error.message.contains("byte 29 is not zero"), "{error}");
    }

    #[test]
    fn hostile_sizes_are_refused() {
        for size in [0usize, 8, 15, 65537, usize::MAX] {
            let words = [size, 0, 0];
            // SAFETY: refused before anything but the first word is read.
            let error = unsafe { read_struct(words.as_ptr() as *const Grown) }.unwrap_err();
            assert!(error.message.contains("struct_size"), "{error}");
        }
        // SAFETY: NULL is refused.
        assert!(unsafe { read_struct(std::ptr::null::<Grown>()) }.is_err());
        // SAFETY: a misaligned pointer is refused before it is read.
        assert!(unsafe { read_struct(std::ptr::without_provenance::<Grown>(3)) }.is_err());
    }

    #[test]
    fn a_panic_becomes_a_status_and_a_sentence() {
        let mut told = false;
        let status = guard_with("a2a_test", || panic!("boom {}", 1), |_| told = true);
        assert_eq!(status, Status::Internal as i32);
        assert!(told);
        // SAFETY: last_error is a NUL-terminated string owned by this thread.
        let text = unsafe { std::ffi::CStr::from_ptr(last_error()) };
        assert!(text.to_str().unwrap().contains("boom 1"));
    }

    #[test]
    fn handles_are_never_used_twice() {
        let table = Table::<u32>::new("thing");
        let a = table.insert(Arc::new(1));
        table.remove(a).unwrap();
        let b = table.insert(Arc::new(2));
        assert_ne!(a, b);
        assert!(table.get(a).unwrap_err().message.contains("not a live thing"));
        assert!(table.remove(a).is_err());
        assert!(table.get(0).unwrap_err().message.contains("NULL"));
    }
}
