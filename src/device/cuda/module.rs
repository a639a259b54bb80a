//! The kernels: compiled ahead of time into one fatbin, loaded all at once when a comm is created, because a lazy load
//! waits for the kernels of ranks that wait for us.

use std::sync::Arc;

use super::driver::{Context, Kernel, Module};
use crate::device::Float;
use crate::error::{Error, Result};

#[cfg(a2a_kernels)]
const FATBIN: &[u8] = include_bytes!(env!("A2A_FATBIN"));
#[cfg(not(a2a_kernels))]
const FATBIN: &[u8] = &[];

/// True if this build has device code.
pub const HAS_KERNELS: bool = cfg!(a2a_kernels);

/// What is said where it has none.
pub fn check_kernels() -> Result<()> {
    if HAS_KERNELS {
        return Ok(());
    }
    Err(Error::unsupported("this build has no device code: it was built without nvcc, and knows cpu (1)"))
}

pub struct Kernels {
    pub open: Kernel,
    pub route: Kernel,
    pub push: Kernel,
    pub finish: Kernel,
    pub dispatch: Kernel,
    pub tell: Kernel,
    pub land: Kernel,
    pub stage: Kernel,
    pub meet: Kernel,
    pub quantise: Kernel,
    #[cfg(feature = "jitter")]
    pub poison: Kernel,
    /// By the type of the results, then of the sums: bf16, f16, f32. `few`: of blocks that meet by themselves.
    reduce: [[Kernel; 3]; 3],
    few: [[Kernel; 3]; 3],
}

impl Kernels {
    pub fn load(context: &Arc<Context>) -> Result<Kernels> {
        check_kernels()?;
        let module = Module::load(context, FATBIN)?;
        let load = |name| module.kernel(name);
        let kernels = Kernels {
            open: load(c"a2a_open")?,
            route: load(c"a2a_route")?,
            push: load(c"a2a_push")?,
            finish: load(c"a2a_finish")?,
            dispatch: load(c"a2a_dispatch")?,
            tell: load(c"a2a_tell")?,
            land: load(c"a2a_land")?,
            stage: load(c"a2a_stage")?,
            meet: load(c"a2a_meet")?,
            quantise: load(c"a2a_quantise")?,
            #[cfg(feature = "jitter")]
            poison: load(c"a2a_poison")?,
            reduce: [
                [
                    load(c"a2a_reduce_bf16_bf16")?,
                    load(c"a2a_reduce_bf16_f16")?,
                    load(c"a2a_reduce_bf16_f32")?,
                ],
                [load(c"a2a_reduce_f16_bf16")?, load(c"a2a_reduce_f16_f16")?, load(c"a2a_reduce_f16_f32")?],
                [load(c"a2a_reduce_f32_bf16")?, load(c"a2a_reduce_f32_f16")?, load(c"a2a_reduce_f32_f32")?],
            ],
            few: [
                [
                    load(c"a2a_combine_bf16_bf16")?,
                    load(c"a2a_combine_bf16_f16")?,
                    load(c"a2a_combine_bf16_f32")?,
                ],
                [
                    load(c"a2a_combine_f16_bf16")?,
                    load(c"a2a_combine_f16_f16")?,
                    load(c"a2a_combine_f16_f32")?,
                ],
                [
                    load(c"a2a_combine_f32_bf16")?,
                    load(c"a2a_combine_f32_f16")?,
                    load(c"a2a_combine_f32_f32")?,
                ],
            ],
        };
        Ok(kernels)
    }

    pub fn sums(&self, from: Float, to: Float, few: bool) -> &Kernel {
        let kernels = if few { &self.few } else { &self.reduce };
        &kernels[from as usize][to as usize]
    }
}
