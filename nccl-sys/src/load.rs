//! Opening the library: by the name that `A2A_NCCL_LIB` gives, else `libnccl.so.2` wherever the loader finds it. One that
//! the process has open already under that name (a framework's own) is the one that is used.

use std::fmt;
use std::sync::OnceLock;

use libloading::os::unix::{Library, RTLD_LOCAL, RTLD_NOW};

use crate::{Nccl, OLDEST, ncclSuccess};

/// The variable that names the library.
const VARIABLE: &str = "A2A_NCCL_LIB";
const NAME: &str = "libnccl.so.2";

/// Why there is no NCCL. `Display` is a sentence for users.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LoadError {
    /// The loader did not open it.
    Missing {
        /// What was looked for.
        path: String,
        /// The user named it.
        named: bool,
        /// What the loader said.
        why: String,
    },
    /// It has not all functions.
    Symbol {
        /// The library.
        path: String,
        /// What it lacks.
        name: String,
    },
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
            LoadError::Missing { path, named: true, why } => {
                write!(f, "NCCL cannot be opened: {VARIABLE} is {path} ({why})")
            }
            LoadError::Missing { path, named: false, why } => write!(
                f,
                "NCCL is not installed: the loader does not find {path} ({why}); install NCCL {oldest} or later (pip install \
                 nvidia-nccl-cu13), or name the library in {VARIABLE}"
            ),
            LoadError::Symbol { path, name } => {
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

/// A function of the library.
pub(crate) fn symbol<T: Copy>(library: &Library, path: &str, name: &str) -> Result<T, LoadError> {
    // SAFETY: T is the function's type, as nccl.h declares it.
    match unsafe { library.get::<T>(name) } {
        Ok(function) => Ok(*function),
        Err(_) => Err(LoadError::Symbol { path: path.into(), name: name.into() }),
    }
}

impl Nccl {
    /// The process's NCCL. Opened at the first call; later ones say the same.
    ///
    /// Threads: any.
    pub fn get() -> Result<&'static Nccl, &'static LoadError> {
        static NCCL: OnceLock<Result<Nccl, LoadError>> = OnceLock::new();
        NCCL.get_or_init(|| match std::env::var(VARIABLE) {
            Ok(path) if !path.is_empty() => Nccl::open(&path, true),
            _ => Nccl::open(NAME, false),
        })
        .as_ref()
    }

    /// Opens a library and looks everything up. `named`: by the user, which the sentence says.
    pub fn open(path: &str, named: bool) -> Result<Nccl, LoadError> {
        // SAFETY: the library's initialisers run; whoever names a library trusts it with that.
        let library = unsafe { Library::open(Some(path), RTLD_NOW | RTLD_LOCAL) }.map_err(|error| {
            // What the loader says stands behind libloading's own words.
            let why =
                std::error::Error::source(&error).map_or_else(|| error.to_string(), |why| why.to_string());
            LoadError::Missing { path: path.into(), named, why }
        })?;
        let mut nccl = Nccl::of(library, path.into())?;
        // SAFETY: a valid out-pointer.
        match unsafe { (nccl.ncclGetVersion)(&mut nccl.version) } {
            ncclSuccess if nccl.version >= OLDEST => Ok(nccl),
            ncclSuccess => Err(LoadError::Old { path: path.into(), version: nccl.version }),
            result => Err(LoadError::Version { path: path.into(), result }),
        }
    }
}
