//! CUDA windows: physical memory of one rank's device, mapped into the address space of every process of the group.
//!
//! A window goes to other processes as a file descriptor. A process maps a rank's window once, whichever of its
//! threads are ranks: `WINDOWS` knows those that are mapped by the lifeline of their rank, a pipe that every rank has
//! a descriptor of and that no two ranks share. Mapped once for each thread, the addresses of one byte would be
//! virtual aliases, and the PTX memory model orders accesses through aliases by a `fence.proxy.alias` only.
//!
//! Unmapping need not wait for kernels: whoever drops windows has ended its own work on them. What peers do goes
//! through mappings of their own, or they hold this one too.

use std::collections::BTreeMap;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::sync::{Arc, Mutex, MutexGuard, Weak};

use cudarc::driver::sys::{self, CUdevice, CUresult};

use crate::device::Bases;
use crate::device::cuda::Attic;
use crate::device::cuda::driver::{Context, attempt, check, error_text, failure, location, release};
use crate::error::{Error, Result, Status};
use crate::fault::Point;

/// Windows are whole multiples of this, whatever the device: every rank must come to the same size.
pub const GRANULARITY: u64 = 2 << 20;

/// Bytes of a window that has room for `bytes`.
pub fn rounded(bytes: u64) -> u64 {
    bytes.div_ceil(GRANULARITY).saturating_mul(GRANULARITY)
}

const HANDLE: sys::CUmemAllocationHandleType =
    sys::CUmemAllocationHandleType::CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR;

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Each change of what the locks here guard is one call: a panic leaves it whole.
    mutex.lock().unwrap_or_else(|e| e.into_inner())
}

/// A rank's name within this host: device and inode of its lifeline.
type Key = (u64, u64);

fn key_of(lifeline: BorrowedFd<'_>) -> Result<Key> {
    let stat = rustix::fs::fstat(lifeline).map_err(|e| Error::system("fstat of a lifeline", e))?;
    Ok((stat.st_dev as u64, stat.st_ino as u64))
}

/// What the ranks of this process share, by rank. It keeps nothing alive.
struct Registry<T> {
    entries: Mutex<BTreeMap<Key, Weak<T>>>,
}

impl<T> Registry<T> {
    const fn new() -> Registry<T> {
        Registry { entries: Mutex::new(BTreeMap::new()) }
    }

    /// What is there, or else what `make` makes. Two threads never make the same at once.
    fn find_or(&self, key: Key, make: impl FnOnce() -> Result<T>) -> Result<Arc<T>> {
        let mut entries = lock(&self.entries);
        if let Some(found) = entries.get(&key).and_then(Weak::upgrade) {
            return Ok(found);
        }
        let made = Arc::new(make()?);
        entries.retain(|_, entry| entry.strong_count() > 0);
        entries.insert(key, Arc::downgrade(&made));
        Ok(made)
    }
}

static WINDOWS: Registry<Window> = Registry::new();
static ATTICS: Registry<Attic> = Registry::new();

/// What a group's ranks in this process leave behind; `lifeline`: rank 0's, of the group.
pub fn attic(lifeline: BorrowedFd<'_>) -> Result<Arc<Attic>> {
    ATTICS.find_or(key_of(lifeline)?, || Ok(Attic::default()))
}

fn properties(device: CUdevice) -> sys::CUmemAllocationProp {
    sys::CUmemAllocationProp {
        type_: sys::CUmemAllocationType::CU_MEM_ALLOCATION_TYPE_PINNED,
        requestedHandleTypes: HANDLE,
        location: location(device),
        win32HandleMetaData: std::ptr::null_mut(),
        allocFlags: sys::CUmemAllocationProp_st__bindgen_ty_1 {
            compressionType: 0,
            gpuDirectRDMACapable: 0,
            usage: 0,
            reserved: [0; 4],
        },
    }
}

/// A handle to memory without an address. The memory itself lives until it has neither handle nor mapping.
struct PhysicalAllocation {
    context: Arc<Context>,
    handle: sys::CUmemGenericAllocationHandle,
}

impl PhysicalAllocation {
    fn create(context: &Arc<Context>, bytes: u64) -> Result<PhysicalAllocation> {
        let _entered = context.enter()?;
        let mut handle = 0;
        // SAFETY: properties of this device; released once, on drop.
        let create =
            || unsafe { sys::cuMemCreate(&mut handle, bytes as usize, &properties(context.device()), 0) };
        let created = attempt(Point::CudaWindow, create);
        check("cuMemCreate", created)?;
        Ok(PhysicalAllocation { context: context.clone(), handle })
    }

    /// The descriptor may be closed afterwards.
    fn import(context: &Arc<Context>, fd: &OwnedFd) -> Result<PhysicalAllocation> {
        let _entered = context.enter()?;
        let mut handle = 0;
        // The driver takes the descriptor's number in place of an address.
        let number = std::ptr::without_provenance_mut(fd.as_raw_fd() as usize);
        // SAFETY: an open descriptor, whatever of; released once, on drop.
        let import = || unsafe { sys::cuMemImportFromShareableHandle(&mut handle, number, HANDLE) };
        let imported = attempt(Point::CudaImport, import);
        check("cuMemImportFromShareableHandle", imported)?;
        Ok(PhysicalAllocation { context: context.clone(), handle })
    }

    fn export(&self) -> Result<OwnedFd> {
        let _entered = self.context.enter()?;
        let mut fd: RawFd = -1;
        // SAFETY: a handle that is held; for this type of handle the answer is an int.
        let export =
            || unsafe { sys::cuMemExportToShareableHandle((&raw mut fd).cast(), self.handle, HANDLE, 0) };
        let exported = attempt(Point::CudaExport, export);
        check("cuMemExportToShareableHandle", exported)?;
        // SAFETY: a new descriptor, which is the caller's to close.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        rustix::io::fcntl_setfd(&fd, rustix::io::FdFlags::CLOEXEC)
            .map_err(|e| Error::system("close-on-exec of a window", e))?;
        Ok(fd)
    }

    /// The device that the memory is of, as this process numbers them; `None` if it is no device's.
    fn device(&self) -> Result<Option<CUdevice>> {
        let _entered = self.context.enter()?;
        let mut found = properties(self.context.device());
        // SAFETY: a handle that is held; writes one such struct.
        let asked = unsafe { sys::cuMemGetAllocationPropertiesFromHandle(&mut found, self.handle) };
        check("cuMemGetAllocationPropertiesFromHandle", asked)?;
        let is_devices = found.location.type_ == sys::CUmemLocationType::CU_MEM_LOCATION_TYPE_DEVICE;
        Ok(is_devices.then_some(found.location.id))
    }
}

impl Drop for PhysicalAllocation {
    fn drop(&mut self) {
        // SAFETY: created or imported, released once.
        release(&self.context, "cuMemRelease", || unsafe { sys::cuMemRelease(self.handle) });
    }
}

/// Addresses without memory.
struct VirtualReservation {
    context: Arc<Context>,
    address: u64,
    bytes: u64,
}

impl VirtualReservation {
    fn new(context: &Arc<Context>, bytes: u64) -> Result<VirtualReservation> {
        let _entered = context.enter()?;
        let mut address = 0;
        // SAFETY: fresh addresses of the driver's choice; freed once, on drop.
        let reserve =
            || unsafe { sys::cuMemAddressReserve(&mut address, bytes as usize, GRANULARITY as usize, 0, 0) };
        let reserved = attempt(Point::CudaReserve, reserve);
        check("cuMemAddressReserve", reserved)?;
        Ok(VirtualReservation { context: context.clone(), address, bytes })
    }
}

impl Drop for VirtualReservation {
    fn drop(&mut self) {
        // SAFETY: reserved by `new` with this size, freed once, after what was mapped there.
        release(&self.context, "cuMemAddressFree", || unsafe {
            sys::cuMemAddressFree(self.address, self.bytes as usize)
        });
    }
}

/// Memory at addresses. Both end with it: the memory first, for fields are dropped after this.
struct Mapping {
    at: VirtualReservation,
}

impl Mapping {
    /// The driver's own error: it says when a peer's memory is too small.
    fn new(
        at: VirtualReservation,
        physical: &PhysicalAllocation,
    ) -> Result<std::result::Result<Mapping, CUresult>> {
        let entered = at.context.enter()?;
        // SAFETY: nothing is mapped there yet; unmapped once, on drop.
        let map = || unsafe { sys::cuMemMap(at.address, at.bytes as usize, 0, physical.handle, 0) };
        let mapped = attempt(Point::CudaMap, map);
        drop(entered);
        Ok(match mapped {
            CUresult::CUDA_SUCCESS => Ok(Mapping { at }),
            refused => Err(refused),
        })
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: mapped by `new` as a whole, unmapped once; nobody uses it any more, as the file's comment demands.
        release(&self.at.context, "cuMemUnmap", || unsafe {
            sys::cuMemUnmap(self.at.address, self.at.bytes as usize)
        });
    }
}

fn read_write(device: CUdevice) -> sys::CUmemAccessDesc {
    sys::CUmemAccessDesc {
        location: location(device),
        flags: sys::CUmemAccess_flags::CU_MEM_ACCESS_FLAGS_PROT_READWRITE,
    }
}

/// A rank's window in this process.
struct Window {
    mapping: Mapping,
    /// The device its memory is of.
    owner: CUdevice,
    /// Devices whose kernels may use it.
    granted: Mutex<Vec<CUdevice>>,
    /// Its rank is a thread of this process.
    is_local: bool,
    /// Of the members for whom the memory that it shows was made.
    generation: Mutex<u64>,
}

impl Window {
    fn new(mapping: Mapping, owner: CUdevice, is_local: bool) -> Window {
        Window { mapping, owner, granted: Mutex::default(), is_local, generation: Mutex::new(1) }
    }

    /// Shows other memory at the same addresses, once for all ranks of this process: pieces of `bytes` of it, again and
    /// again. Nobody may be using it: the ranks of this process have ended their work.
    fn show(&self, generation: u64, make: impl FnOnce() -> Result<(PhysicalAllocation, u64)>) -> Result<()> {
        let mut shown = lock(&self.generation);
        if *shown >= generation {
            return Ok(());
        }
        let (physical, piece) = make()?;
        let at = &self.mapping.at;
        let _entered = at.context.enter()?;
        // SAFETY: all that is mapped there, of which nobody uses any; what follows maps it anew.
        check("cuMemUnmap", unsafe { sys::cuMemUnmap(at.address, at.bytes as usize) })?;
        for offset in (0..at.bytes).step_by(piece as usize) {
            let address = at.address + offset;
            // SAFETY: nothing is mapped there.
            let mapped = unsafe { sys::cuMemMap(address, piece as usize, 0, physical.handle, 0) };
            check("cuMemMap", mapped)?;
        }
        let access: Vec<_> = lock(&self.granted).iter().map(|device| read_write(*device)).collect();
        // SAFETY: the whole of what was just mapped.
        let set =
            unsafe { sys::cuMemSetAccess(at.address, at.bytes as usize, access.as_ptr(), access.len()) };
        check("cuMemSetAccess", set)?;
        *shown = generation;
        Ok(())
    }

    /// A peer's, as it came over a socket.
    fn import(context: &Arc<Context>, peer: u32, fd: &OwnedFd, bytes: u64) -> Result<Window> {
        let named = |e: Error| e.context(format!("rank {peer}'s window on {}", context.describe()));
        let mismatch = |text: String| Error::new(Status::Mismatch, format!("rank {peer}'s window {text}"));
        let physical = PhysicalAllocation::import(context, fd).map_err(named)?;
        let Some(owner) = physical.device().map_err(named)? else {
            return Err(mismatch("is no memory of a CUDA device".into()));
        };
        let reserved = VirtualReservation::new(context, bytes).map_err(named)?;
        match Mapping::new(reserved, &physical).map_err(named)? {
            Ok(mapping) => Ok(Window::new(mapping, owner, false)),
            Err(refused @ CUresult::CUDA_ERROR_INVALID_VALUE) => {
                Err(mismatch(format!("does not have the expected {bytes} bytes: {}", error_text(refused))))
            }
            Err(refused) => Err(named(failure("cuMemMap", refused))),
        }
    }

    /// Lets a device's kernels read and write the window.
    fn grant(&self, context: &Context, rank: u32) -> Result<()> {
        let mut granted = lock(&self.granted);
        if granted.contains(&context.device()) {
            return Ok(());
        }
        let who = || format!("rank {rank}'s window on {}", context.describe());
        let access = read_write(context.device());
        let _entered = context.enter()?;
        let at = &self.mapping.at;
        // SAFETY: a whole mapping; what other devices may do stays as it is.
        let set = || unsafe { sys::cuMemSetAccess(at.address, at.bytes as usize, &access, 1) };
        let set = attempt(Point::CudaAccess, set);
        check("cuMemSetAccess", set).map_err(|e| e.context(who()))?;
        granted.push(context.device());
        Ok(())
    }
}

/// This rank's own window, before the others have theirs.
pub struct VmmWindow {
    context: Arc<Context>,
    rank: u32,
    window: Arc<Window>,
    /// To make descriptors of; not needed once everybody has one.
    physical: PhysicalAllocation,
}

impl VmmWindow {
    /// `bytes` is `rounded`. The memory is as the driver gives it, not zeroed.
    pub fn create(
        context: &Arc<Context>,
        rank: u32,
        bytes: u64,
        lifeline: BorrowedFd<'_>,
    ) -> Result<VmmWindow> {
        check_device(context)?;
        let lacking = |free: u64| {
            let text = format!(
                "rank {rank}: its window needs {bytes} bytes, {} has {free} free (lower max_tokens, max_hidden or \
                 num_slots)",
                context.describe()
            );
            Error::new(Status::OutOfMemory, text)
        };
        let free = context.free_memory()?;
        if bytes > free {
            return Err(lacking(free));
        }
        if bytes == 0 || !bytes.is_multiple_of(GRANULARITY) {
            return Err(Error::internal(format!(
                "a window of {bytes} bytes is no multiple of {GRANULARITY}"
            )));
        }
        let named = |e: Error| e.context(format!("rank {rank}: a window of {bytes} bytes"));
        let physical = PhysicalAllocation::create(context, bytes).map_err(|e| match e.status {
            // Somebody was faster.
            Status::OutOfMemory => lacking(context.free_memory().unwrap_or(0)),
            _ => named(e),
        })?;
        let reserved = VirtualReservation::new(context, bytes).map_err(named)?;
        let mapping = Mapping::new(reserved, &physical)
            .and_then(|mapped| mapped.map_err(|refused| failure("cuMemMap", refused)))
            .map_err(named)?;
        let window = Window::new(mapping, context.device(), true);
        window.grant(context, rank)?;
        let window = WINDOWS.find_or(key_of(lifeline)?, || Ok(window))?;
        Ok(VmmWindow { context: context.clone(), rank, window, physical })
    }

    /// A descriptor to hand to the other ranks.
    pub fn export(&self) -> Result<OwnedFd> {
        self.physical.export().map_err(|e| e.context(format!("rank {}: its window", self.rank)))
    }
}

/// What windows need of a device.
fn check_device(context: &Context) -> Result<()> {
    let able = context.abilities();
    for (can, what) in [
        (able.vmm, "virtual memory management (cuMemCreate)"),
        (able.posix_fd, "memory shared as file descriptors"),
        (able.unified_addressing, "unified addressing"),
    ] {
        if !can {
            return Err(Error::unsupported(format!("{} has no {what}", context.describe())));
        }
    }
    let _entered = context.enter()?;
    let option = sys::CUmemAllocationGranularity_flags::CU_MEM_ALLOC_GRANULARITY_MINIMUM;
    let mut granularity = 0;
    // SAFETY: writes one size.
    let asked = unsafe {
        sys::cuMemGetAllocationGranularity(&mut granularity, &properties(context.device()), option)
    };
    check("cuMemGetAllocationGranularity", asked)?;
    if granularity == 0 || !GRANULARITY.is_multiple_of(granularity as u64) {
        return Err(Error::unsupported(format!(
            "{} takes memory in pieces of {granularity} bytes, windows are multiples of {GRANULARITY}",
            context.describe()
        )));
    }
    Ok(())
}

/// Every rank's window, mapped here.
pub struct Windows {
    context: Arc<Context>,
    rank: u32,
    windows: Arc<Vec<Arc<Window>>>,
}

impl Windows {
    /// Maps the windows of all ranks, rank ascending: the window's descriptor, and the lifeline's. This rank's own is
    /// mapped already; the descriptors are not needed afterwards.
    pub fn map(own: VmmWindow, fds: Vec<(OwnedFd, BorrowedFd<'_>)>) -> Result<Windows> {
        let VmmWindow { context, rank, window: own, physical: _physical } = own;
        let bytes = own.mapping.at.bytes;
        let map = |(peer, (fd, lifeline)): (usize, (OwnedFd, BorrowedFd<'_>))| {
            let peer = peer as u32;
            if peer == rank {
                return Ok(own.clone());
            }
            let window = WINDOWS
                .find_or(key_of(lifeline)?, || Window::import(&context, peer, &fd, bytes))
                .map_err(|e| e.context(format!("rank {rank}")))?;
            let has = window.mapping.at.bytes;
            if has != bytes {
                let text = format!("rank {rank}: rank {peer}'s window has {has} bytes, expected {bytes}");
                return Err(Error::new(Status::Mismatch, text));
            }
            check_reach(&context, rank, peer, window.owner)?;
            window.grant(&context, peer).map_err(|e| e.context(format!("rank {rank}")))?;
            Ok(window)
        };
        let windows = fds.into_iter().enumerate().map(map).collect::<Result<Vec<_>>>()?;
        Ok(Windows { context, rank, windows: Arc::new(windows) })
    }

    /// This rank's own in the place of every rank's: nobody addresses another's.
    pub fn alone(own: VmmWindow, ranks: u32) -> Windows {
        let VmmWindow { context, rank, window, physical: _physical } = own;
        Windows { context, rank, windows: Arc::new(vec![window; ranks as usize]) }
    }

    /// New memory for this rank's window, as the others get it.
    pub fn renew(&self) -> Result<OwnedFd> {
        let bytes = self.windows[self.rank as usize].mapping.at.bytes;
        let made = PhysicalAllocation::create(&self.context, bytes).and_then(|physical| physical.export());
        made.map_err(|e| e.context(format!("rank {}: a window of {bytes} bytes", self.rank)))
    }

    /// Shows the memory of a descriptor as a rank's window, at the addresses of its former one.
    pub fn replace(&self, generation: u64, peer: u32, fd: &OwnedFd) -> Result<()> {
        let window = &self.windows[peer as usize];
        let bytes = window.mapping.at.bytes;
        let import = || Ok((PhysicalAllocation::import(&self.context, fd)?, bytes));
        window.show(generation, import).map_err(|e| self.named(e, peer))
    }

    /// Shows memory that nobody reads as the window of a rank that is left behind: its own is no longer written to.
    pub fn dismiss(&self, generation: u64, lost: u32) -> Result<()> {
        let scrap = || Ok((PhysicalAllocation::create(&self.context, GRANULARITY)?, GRANULARITY));
        self.windows[lost as usize].show(generation, scrap).map_err(|e| self.named(e, lost))
    }

    fn named(&self, error: Error, peer: u32) -> Error {
        error.context(format!("rank {}: other memory for rank {peer}'s window", self.rank))
    }

    pub fn bases(&self) -> Bases {
        let base = |window: &Arc<Window>| {
            let at = &window.mapping.at;
            // A number for kernels, never an address for the CPU.
            (std::ptr::without_provenance_mut(at.address as usize), at.bytes)
        };
        // SAFETY: mapped read-write for this rank's device, aligned to the granularity, kept by the Arc.
        let bases = unsafe { Bases::new(self.windows.iter().map(base).collect(), self.windows.clone()) };
        let local = (0..).zip(self.windows.iter()).filter(|(_, window)| window.is_local);
        bases.shared_with(local.map(|(rank, _)| rank).collect())
    }
}

/// Refuses a peer on a device that this rank's cannot address. A device that this process does not see has no number
/// here to ask about: granting access finds out.
fn check_reach(context: &Context, rank: u32, peer: u32, owner: CUdevice) -> Result<()> {
    if owner >= 0 && !context.reaches(owner).unwrap_or(true) {
        return Err(Error::unsupported(format!(
            "rank {rank}: {} cannot address device {owner}, which has rank {peer}'s window (no peer access)",
            context.describe()
        )));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::cuda::driver::context_for_test;
    use std::os::fd::AsFd;

    /// The read end of a lifeline, and what keeps it one.
    fn lifeline() -> (OwnedFd, OwnedFd) {
        rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).unwrap()
    }

    #[test]
    fn windows_are_whole_pieces() {
        assert_eq!(rounded(0), 0);
        assert_eq!(rounded(1), GRANULARITY);
        assert_eq!(rounded(GRANULARITY), GRANULARITY);
        assert_eq!(rounded(GRANULARITY + 1), 2 * GRANULARITY);
        assert_eq!(rounded(u64::MAX), u64::MAX, "more than any device has, not 0");
    }

    #[test]
    fn a_rank_is_known_by_its_lifeline() {
        let (one, two) = (lifeline(), lifeline());
        let copy = one.0.try_clone().unwrap();
        assert_eq!(key_of(one.0.as_fd()).unwrap(), key_of(copy.as_fd()).unwrap());
        assert_ne!(key_of(one.0.as_fd()).unwrap(), key_of(two.0.as_fd()).unwrap());
    }

    #[test]
    fn what_is_registered_is_shared_and_not_kept_alive() {
        let registry = Registry::new();
        let (a, b) = ((1, 1), (1, 2));
        let first = registry.find_or(a, || Ok(10)).unwrap();
        let again = registry.find_or(a, || panic!("made twice")).unwrap();
        assert!(Arc::ptr_eq(&first, &again));
        assert_eq!(*registry.find_or(b, || Ok(20)).unwrap(), 20, "another rank's");

        drop(first);
        assert_eq!(*registry.find_or(a, || Ok(11)).unwrap(), 10, "the other holder keeps it");
        drop(again);
        let refused = registry.find_or(a, || Err(Error::internal("no"))).unwrap_err();
        assert_eq!(refused.message, "no");
        let _anew = registry.find_or(a, || Ok(12)).unwrap();
        assert_eq!(*_anew, 12);
        assert_eq!(lock(&registry.entries).len(), 1, "what has ended is swept out");
    }

    #[test]
    fn one_of_two_threads_makes_it() {
        let registry = Registry::new();
        let made = std::sync::atomic::AtomicU32::new(0);
        let make = || {
            std::thread::sleep(std::time::Duration::from_millis(20));
            Ok(made.fetch_add(1, std::sync::atomic::Ordering::Relaxed))
        };
        std::thread::scope(|s| {
            let all: Vec<_> = (0..4).map(|_| s.spawn(|| registry.find_or((0, 0), make).unwrap())).collect();
            let kept: Vec<_> = all.into_iter().map(|thread| thread.join().unwrap()).collect();
            assert!(kept.iter().all(|one| Arc::ptr_eq(one, &kept[0])));
        });
        assert_eq!(made.into_inner(), 1);
    }

    #[test]
    fn ranks_of_a_process_share_a_mapping() {
        let Some(context) = context_for_test() else { return };
        let bytes = rounded(3 << 20);
        let lifelines = [lifeline(), lifeline()];
        let own = [0, 1].map(|rank| {
            VmmWindow::create(&context, rank, bytes, lifelines[rank as usize].0.as_fd()).unwrap()
        });
        let fds = [0, 1].map(|_| {
            own.iter().zip(&lifelines).map(|(own, l)| (own.export().unwrap(), l.0.as_fd())).collect()
        });
        let mut windows = Vec::new();
        for (own, fds) in own.into_iter().zip::<[Vec<_>; 2]>(fds) {
            windows.push(Windows::map(own, fds).unwrap());
        }
        for rank in [0, 1] {
            assert!(Arc::ptr_eq(&windows[0].windows[rank], &windows[1].windows[rank]));
        }
        let key = key_of(lifelines[0].0.as_fd()).unwrap();
        let bases = windows.pop().unwrap().bases();
        drop(windows);
        assert!(lock(&WINDOWS.entries)[&key].upgrade().is_some(), "kept by the addresses that are in use");
        drop(bases);
        assert!(lock(&WINDOWS.entries).get(&key).is_none_or(|entry| entry.upgrade().is_none()));
    }

    #[test]
    fn an_imported_window_is_the_same_memory() {
        let Some(context) = context_for_test() else { return };
        let bytes = GRANULARITY;
        let ends = [lifeline(), lifeline(), lifeline()];
        let own = VmmWindow::create(&context, 0, bytes, ends[0].0.as_fd()).unwrap();
        let peer = VmmWindow::create(&context, 1, bytes, ends[1].0.as_fd()).unwrap();
        let theirs = peer.window.mapping.at.address;
        // Under a lifeline that this process does not know, it looks like another process's.
        let fds =
            vec![(own.export().unwrap(), ends[0].0.as_fd()), (peer.export().unwrap(), ends[2].0.as_fd())];
        let windows = Windows::map(own, fds).unwrap();
        let ours = windows.windows[1].mapping.at.address;
        assert_ne!(ours, theirs);
        let _entered = context.enter().unwrap();
        let mut back = [0u8; 4];
        // SAFETY: both mapped, and accessible.
        unsafe {
            check("memset", sys::cuMemsetD8_v2(theirs, 7, bytes as usize)).unwrap();
            let from = ours + bytes - 4;
            check("copy", sys::cuMemcpyDtoH_v2(back.as_mut_ptr().cast(), from, 4)).unwrap();
        }
        assert_eq!(back, [7; 4]);
    }

    #[test]
    fn windows_that_cannot_be_are_refused() {
        let Some(context) = context_for_test() else { return };
        let ends = [lifeline(), lifeline(), lifeline()];
        let create = |bytes, end: usize| VmmWindow::create(&context, 0, bytes, ends[end].0.as_fd());
        let much = create(rounded(1 << 50), 0).err().unwrap();
        assert_eq!(much.status, Status::OutOfMemory);
        assert!(much.message.contains("needs 1125899906842624 bytes"), "{much}");
        assert_eq!(create(GRANULARITY + 1, 0).err().unwrap().status, Status::Internal);

        let own = create(2 * GRANULARITY, 0).unwrap();
        let small = create(GRANULARITY, 1).unwrap();
        let fds =
            vec![(own.export().unwrap(), ends[0].0.as_fd()), (small.export().unwrap(), ends[2].0.as_fd())];
        let error = Windows::map(own, fds).err().unwrap();
        assert_eq!(error.status, Status::Mismatch, "{error}");
        assert!(error.message.starts_with("rank 0: rank 1's window does not have the expected"), "{error}");

        let own = create(GRANULARITY, 2).unwrap();
        let other = lifeline();
        let fds = vec![(own.export().unwrap(), ends[2].0.as_fd()), (lifeline().0, other.0.as_fd())];
        let error = Windows::map(own, fds).err().unwrap();
        assert!(error.message.contains("rank 1's window"), "no memory at all: {error}");
    }
}
