//! Opening the library: by the name that `A2A_NIXL_LIB` gives, else `libnixl_capi.so` wherever the loader finds it. The library
//! finds its plugins and UCX beside itself, and so a path into an unpacked wheel is enough.

use std::fmt;
use std::sync::OnceLock;

use libloading::os::unix::{Library, RTLD_LOCAL, RTLD_NOW};

use crate::Nixl;

/// The variable that names the library.
const VARIABLE: &str = "A2A_NIXL_LIB";
const NAME: &str = "libnixl_capi.so";
/// The wheel whose functions these are.
const WHEEL: &str = "nixl-cu13==1.5.1";

/// Why there is no NIXL. `Display` is a sentence for users.
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
    /// It has all functions, which do nothing.
    Stub {
        /// The library.
        path: String,
    },
}

impl fmt::Display for LoadError {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            LoadError::Missing { path, named: true, why } => {
                write!(f, "NIXL cannot be opened: {VARIABLE} is {path} ({why})")
            }
            LoadError::Missing { path, named: false, why } => write!(
                f,
                "NIXL is not installed: the loader does not find {path} ({why}); install it (pip install --no-deps {WHEEL}), and \
                 name its .nixl_cu13.mesonpy.libs/{NAME} in {VARIABLE}"
            ),
            LoadError::Symbol { path, name } => {
                write!(f, "{path} is not the NIXL of {WHEEL}: it has no function {name}")
            }
            LoadError::Stub { path } => {
                write!(
                    f,
                    "{path} is a stub, which stands for NIXL where programs are built: name that of {WHEEL} in {VARIABLE}"
                )
            }
        }
    }
}

impl std::error::Error for LoadError {}

/// A function of the library.
pub(crate) fn symbol<T: Copy>(library: &Library, path: &str, name: &str) -> Result<T, LoadError> {
    // SAFETY: T is the function's type, as NIXL's wrapper.h declares it.
    match unsafe { library.get::<T>(name) } {
        Ok(function) => Ok(*function),
        Err(_) => Err(LoadError::Symbol { path: path.into(), name: name.into() }),
    }
}

impl Nixl {
    /// The process's NIXL. Opened at the first call; later ones say the same.
    ///
    /// Threads: any.
    pub fn get() -> Result<&'static Nixl, &'static LoadError> {
        static NIXL: OnceLock<Result<Nixl, LoadError>> = OnceLock::new();
        NIXL.get_or_init(|| match std::env::var(VARIABLE) {
            Ok(path) if !path.is_empty() => Nixl::open(&path, true),
            _ => Nixl::open(NAME, false),
        })
        .as_ref()
    }

    /// Opens a library and looks everything up. `named`: by the user, which the sentence says.
    pub fn open(path: &str, named: bool) -> Result<Nixl, LoadError> {
        // SAFETY: the library's initialisers run; whoever names a library trusts it with that.
        let library = unsafe { Library::open(Some(path), RTLD_NOW | RTLD_LOCAL) }.map_err(|error| {
            // What the loader says stands behind libloading's own words.
            let why =
                std::error::Error::source(&error).map_or_else(|| error.to_string(), |why| why.to_string());
            LoadError::Missing { path: path.into(), named, why }
        })?;
        let nixl = Nixl::of(library, path.into())?;
        // SAFETY: no arguments; a stub's other functions end the process.
        if unsafe { (nixl.nixl_capi_is_stub)() } {
            return Err(LoadError::Stub { path: path.into() });
        }
        Ok(nixl)
    }
}
