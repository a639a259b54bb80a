//! Where rank processes meet: words of a file that all of them have mapped.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::ptr::null_mut;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use crate::gpu::{Gpu, Stream};

const BYTES: usize = 4096;
/// A line of the cache for each place.
const PLACE: usize = 64;
/// Longer than any call of the library waits for a rank here.
pub const LIMIT: Duration = Duration::from_secs(30);

/// A place of the file. Ranks that meet at one know nothing of the others' places.
pub struct Meeting {
    word: &'static AtomicU32,
    ranks: u32,
    met: std::cell::Cell<u32>,
    limit: Duration,
}

fn path(directory: &str) -> String {
    format!("{directory}/meeting")
}

impl Meeting {
    /// Makes the file, before any rank opens it.
    pub fn place(directory: &str) -> Result<(), String> {
        std::fs::write(path(directory), [0; BYTES]).map_err(|error| error.to_string())
    }

    /// `limit`: how long one waits for the others.
    pub fn open(directory: &str, ranks: usize, place: usize, limit: Duration) -> Result<Meeting, String> {
        assert!(place < BYTES / PLACE);
        let file = File::options().read(true).write(true).open(path(directory));
        let file = file.map_err(|error| error.to_string())?;
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new mapping of a file of as many bytes, which lasts as long as the process.
        let at = unsafe { libc::mmap(null_mut(), BYTES, protection, libc::MAP_SHARED, file.as_raw_fd(), 0) };
        if at == libc::MAP_FAILED {
            return Err(std::io::Error::last_os_error().to_string());
        }
        // SAFETY: mapped for good, inside, aligned, and atomic for all who have it.
        let word = unsafe { &*at.byte_add(place * PLACE).cast::<AtomicU32>() };
        Ok(Meeting { word, ranks: ranks as u32, met: std::cell::Cell::new(0), limit })
    }

    /// Returns when every rank has called it as often as this one.
    pub fn wait(&self) -> Result<(), String> {
        self.met.set(self.met.get() + self.ranks);
        self.word.fetch_add(1, Ordering::AcqRel);
        let begun = Instant::now();
        while self.word.load(Ordering::Acquire) < self.met.get() {
            std::hint::spin_loop();
            if begun.elapsed() > self.limit {
                return Err(format!("a rank did not come to a meeting in {} s", self.limit.as_secs()));
            }
        }
        Ok(())
    }

    /// Microseconds of the device and of the host that what `call` puts on this process's stream takes, behind a gate that opens
    /// once all ranks have put theirs.
    pub fn time(
        &self,
        gpu: &Gpu,
        call: &mut dyn FnMut(Stream) -> Result<(), String>,
    ) -> Result<[f64; 2], String> {
        self.wait()?;
        let mut host = 0.0;
        let device = gpu.time_first(|stream| {
            let begun = Instant::now();
            let called = call(stream);
            host = begun.elapsed().as_secs_f64() * 1e6;
            called.and_then(|()| self.wait())
        })?;
        Ok([device, host])
    }
}
