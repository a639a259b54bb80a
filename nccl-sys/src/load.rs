//! Opening the library: by the name that `A2A_NCCL_LIB` gives, else `libnccl.so.2` wherever the loader finds it. One that
//! the process has open already under that name (a framework's own) is the one that is used.

use std::fmt;
use std::sync::OnceLock;

use late_library::{Problem, name_by};

use crate::{Nccl, OLDEST};

/// The variable that names the library.
const VARIABLE: &str = "A2A_NCCL_LIB";
const NAME: &str = "libnccl.so.2";

/// Why there is no NCCL. `Display` is a sentence for users.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LoadError {
    /// It could not be opened, or is another library.
    Library(Problem),
    /// It is older than [`OLDEST`].
    Old {
        /// The library.
        path: String,
        /// Its version, as `ncclGetVersion` says it.
        version: i32,
    },
    /// It does not say its version.
    Version {
        /// The library.
        path: String,
        /// What `ncclGetVersion` returned.
        result: i32,
    },
}

/// "2.30.7".
struct Version(i32);

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        // Up to 2.8 the code had one digit for the minor version.
        let (major, minor) = match self.0 {
            code if code < 10000 => (code / 1000, code / 100 % 10),
            code => (code / 10000, code / 100 % 100),
        };
        write!(f, "{major}.{minor}.{}", self.0 % 100)
    }
}

impl fmt::Display for LoadError {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let oldest = Version(OLDEST);
        match self {
            LoadError::Library(Problem::Missing { path, named: true, why }) => {
                write!(f, "NCCL cannot be opened: {VARIABLE} is {path} ({why})")
            }
            LoadError::Library(Problem::Missing { path, named: false, why }) => write!(
                f,
                "NCCL is not installed: the loader does not find {path} ({why}); install NCCL {oldest} or later (pip install \
                 nvidia-nccl-cu13), or name the library in {VARIABLE}"
            ),
            LoadError::Library(Problem::Symbol { path, name }) => {
                write!(f, "{path} is no NCCL from {oldest} on: it has no function {name}")
            }
            LoadError::Old { path, version } => {
                write!(f, "{path} is NCCL {}, {oldest} or later is needed", Version(*version))
            }
            LoadError::Version { path, result } => {
                write!(f, "{path} is no working NCCL: ncclGetVersion returned {result}")
            }
        }
    }
}

impl std::error::Error for LoadError {}

impl Nccl {
    /// The process's NCCL. Opened at the first call; later ones say the same.
    ///
    /// Threads: any.
    pub fn get() -> Result<&'static Nccl, &'static LoadError> {
        static NCCL: OnceLock<Result<Nccl, LoadError>> = OnceLock::new();
        NCCL.get_or_init(|| {
            let (path, named) = name_by(VARIABLE, NAME);
            Nccl::open(&path, named)
        })
        .as_ref()
    }

    /// Opens a library and looks everything up. `named`: by the user, which the sentence says.
    pub fn open(path: &str, named: bool) -> Result<Nccl, LoadError> {
        let nccl = Nccl::look_up(path, named).map_err(LoadError::Library)?;
        match nccl.ask_version() {
            Ok(version) if version >= OLDEST => Ok(nccl),
            Ok(version) => Err(LoadError::Old { path: path.into(), version }),
            Err(result) => Err(LoadError::Version { path: path.into(), result }),
        }
    }
}
