//! IEEE's default floating-point modes, whatever the caller's are.

/// The calling thread's floating-point modes, put aside: no flush-to-zero, round to nearest.
pub(super) struct DefaultModes {
    #[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
    saved: u64,
}

#[cfg(target_arch = "x86_64")]
impl DefaultModes {
    pub(super) fn enter() -> DefaultModes {
        let mut saved = 0u32;
        let modes = 0x1f80u32;
        // SAFETY: reads and writes MXCSR; 0x1f80 masks every exception.
        unsafe {
            std::arch::asm!("stmxcsr [{}]", in(reg) &mut saved, options(nostack));
            std::arch::asm!("ldmxcsr [{}]", in(reg) &modes, options(nostack));
        }
        DefaultModes { saved: saved as u64 }
    }
}
#[cfg(target_arch = "x86_64")]
impl Drop for DefaultModes {
    fn drop(&mut self) {
        let saved = self.saved as u32;
        // SAFETY: restores what was there.
        unsafe { std::arch::asm!("ldmxcsr [{}]", in(reg) &saved, options(nostack)) };
    }
}

#[cfg(target_arch = "aarch64")]
impl DefaultModes {
    pub(super) fn enter() -> DefaultModes {
        let saved: u64;
        // SAFETY: reads and writes FPCR; 0 is the architecture's default.
        unsafe {
            std::arch::asm!("mrs {}, fpcr", out(reg) saved, options(nostack, nomem));
            std::arch::asm!("msr fpcr, {}", in(reg) 0u64, options(nostack));
        }
        DefaultModes { saved }
    }
}
#[cfg(target_arch = "aarch64")]
impl Drop for DefaultModes {
    fn drop(&mut self) {
        // SAFETY: restores what was there.
        unsafe { std::arch::asm!("msr fpcr, {}", in(reg) self.saved, options(nostack)) };
    }
}

#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
impl DefaultModes {
    pub(super) fn enter() -> DefaultModes {
        DefaultModes {}
    }
}
