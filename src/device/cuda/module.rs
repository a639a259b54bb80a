//! The kernels: compiled ahead of time into one fatbin, loaded all at once when a comm is created, because a lazy load
//! waits for the kernels of ranks that wait for us.

use std::ffi::CStr;
use std::sync::Arc;

use super::contiguous::COUNTING_SHARED;
use super::driver::{Context, Kernel, Module};
use super::fifo;
use super::flat::CARRY_SHARED;
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
    /// Of rows as they are, and of bf16, f16, f32 that are quantised.
    pub pairs: [Kernel; 4],
    pub place: Kernel,
    pub count_part: Kernel,
    pub place_experts: Kernel,
    pub place_part: Kernel,
    pub spread: Kernel,
    pub stream_rows: Kernel,
    pub carry: Kernel,
    pub settle: Kernel,
    pub tell: Kernel,
    pub announce: Kernel,
    pub receive: Kernel,
    pub mark: Kernel,
    pub arrive: Kernel,
    pub fetch: Kernel,
    pub order: Kernel,
    pub give_back: Kernel,
    pub bring: Kernel,
    pub land: Kernel,
    pub stage: Kernel,
    pub meet: Kernel,
    pub quantise: Kernel,
    #[cfg(feature = "jitter")]
    pub poison: Kernel,
    /// By the type of the results, then of the sums: bf16, f16, f32. `few`: of blocks that meet by themselves.
    reduce: Sums,
    few: Sums,
    /// The same of weighted results.
    weigh: Sums,
    few_weigh: Sums,
    /// The same of results that come through FIFOs.
    stream: Sums,
}

type Sums = [[Kernel; 3]; 3];

/// The kernels whose names begin alike.
macro_rules! sums {
    ($module:expr, $name:literal) => {{
        let row = |names: [&'static CStr; 3]| -> Result<[Kernel; 3]> {
            Ok([$module.kernel(names[0])?, $module.kernel(names[1])?, $module.kernel(names[2])?])
        };
        macro_rules! name {
            ($types:literal) => {
                const {
                    match CStr::from_bytes_with_nul(concat!($name, $types, "\0").as_bytes()) {
                        Ok(name) => name,
                        Err(_) => panic!("a name without a zero"),
                    }
                }
            };
        }
        [
            row([name!("_bf16_bf16"), name!("_bf16_f16"), name!("_bf16_f32")])?,
            row([name!("_f16_bf16"), name!("_f16_f16"), name!("_f16_f32")])?,
            row([name!("_f32_bf16"), name!("_f32_f16"), name!("_f32_f32")])?,
        ]
    }};
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
            pairs: [
                load(c"a2a_pairs")?,
                load(c"a2a_pairs_bf16")?,
                load(c"a2a_pairs_f16")?,
                load(c"a2a_pairs_f32")?,
            ],
            place: load(c"a2a_place")?,
            count_part: load(c"a2a_count_part")?,
            place_experts: load(c"a2a_place_experts")?,
            place_part: load(c"a2a_place_part")?,
            spread: load(c"a2a_spread")?,
            stream_rows: load(c"a2a_stream")?,
            carry: load(c"a2a_carry")?,
            settle: load(c"a2a_settle")?,
            tell: load(c"a2a_tell")?,
            announce: load(c"a2a_announce")?,
            receive: load(c"a2a_receive")?,
            mark: load(c"a2a_mark")?,
            arrive: load(c"a2a_arrive")?,
            fetch: load(c"a2a_fetch")?,
            order: load(c"a2a_order")?,
            give_back: load(c"a2a_return")?,
            bring: load(c"a2a_bring")?,
            land: load(c"a2a_land")?,
            stage: load(c"a2a_stage")?,
            meet: load(c"a2a_meet")?,
            quantise: load(c"a2a_quantise")?,
            #[cfg(feature = "jitter")]
            poison: load(c"a2a_poison")?,
            reduce: sums!(module, "a2a_reduce"),
            few: sums!(module, "a2a_combine"),
            weigh: sums!(module, "a2a_weigh"),
            few_weigh: sums!(module, "a2a_combine_weigh"),
            stream: sums!(module, "a2a_stream"),
        };
        kernels.carry.allow_shared(CARRY_SHARED)?;
        for kernel in [&kernels.count_part, &kernels.place_experts, &kernels.place_part] {
            kernel.allow_shared(COUNTING_SHARED)?;
        }
        kernels.spread.allow_shared(COUNTING_SHARED)?;
        kernels.stream_rows.allow_shared(fifo::MOST_SHARED)?;
        for kernel in kernels.stream.iter().flatten() {
            kernel.allow_shared(fifo::MOST_SHARED)?;
        }
        Ok(kernels)
    }

    pub fn stream_results(&self, from: Float, to: Float) -> &Kernel {
        &self.stream[from as usize][to as usize]
    }

    /// `weighs`: results are weighted; `few`: blocks meet by themselves.
    pub fn sums(&self, from: Float, to: Float, weighs: bool, few: bool) -> &Kernel {
        let kernels = match (weighs, few) {
            (false, false) => &self.reduce,
            (false, true) => &self.few,
            (true, false) => &self.weigh,
            (true, true) => &self.few_weigh,
        };
        &kernels[from as usize][to as usize]
    }
}
