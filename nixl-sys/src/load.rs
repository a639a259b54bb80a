//! Opening the library: by the name that `A2A_NIXL_LIB` gives, else `libnixl_capi.so` wherever the loader finds it. The library
//! finds its plugins and UCX beside itself, and so a path into an unpacked wheel is enough.

use std::fmt;
use std::sync::OnceLock;

use late_library::{Problem, name_by};

use crate::Nixl;

/// The variable that names the library.
const VARIABLE: &str = "A2A_NIXL_LIB";
const NAME: &str = "libnixl_capi.so";
/// The wheel whose functions these are.
const WHEEL: &str = "nixl-cu13==1.5.1";

/// Why there is no NIXL. `Display` is a sentence for users.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LoadError {
    /// It could not be opened, or is another library.
    Library(Problem),
    /// It has all functions, which do nothing.
    Stub {
        /// The library.
        path: String,
    },
}

impl fmt::Display for LoadError {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            LoadError::Library(Problem::Missing { path, named: true, why }) => {
                write!(f, "NIXL cannot be opened: {VARIABLE} is {path} ({why})")
            }
            LoadError::Library(Problem::Missing { path, named: false, why }) => write!(
                f,
                "NIXL is not installed: the loader does not find {path} ({why}); install it (pip install --no-deps {WHEEL}), and \
                 name its .nixl_cu13.mesonpy.libs/{NAME} in {VARIABLE}"
            ),
            LoadError::Library(Problem::Symbol { path, name }) => {
                write!(f, "{path} is not the NIXL of {WHEEL}: it has no function {name}")
            }
            LoadError::Stub { path } => write!(
                f,
                "{path} is a stub, which stands for NIXL where programs are built: name that of {WHEEL} in {VARIABLE}"
            ),
        }
    }
}

impl std::error::Error for LoadError {}

impl Nixl {
    /// The process's NIXL. Opened at the first call; later ones say the same.
    ///
    /// Threads: any.
    pub fn get() -> Result<&'static Nixl, &'static LoadError> {
        static NIXL: OnceLock<Result<Nixl, LoadError>> = OnceLock::new();
        NIXL.get_or_init(|| {
            let (path, named) = name_by(VARIABLE, NAME);
            Nixl::open(&path, named)
        })
        .as_ref()
    }

    /// Opens a library and looks everything up. `named`: by the user, which the sentence says.
    pub fn open(path: &str, named: bool) -> Result<Nixl, LoadError> {
        let nixl = Nixl::look_up(path, named).map_err(LoadError::Library)?;
        // SAFETY: no arguments; a stub's other functions end the process.
        if unsafe { (nixl.nixl_capi_is_stub)() } {
            return Err(LoadError::Stub { path: path.into() });
        }
        Ok(nixl)
    }
}
