//! C libraries that are found at run time: what nccl-sys and nixl-sys have in common.
//!
//! [`functions!`] declares a struct of a library's functions, which are all looked up when it is opened. It is named by an environment
//! variable, or found by the loader; one that the process has open already under that name is the one that is used. What the
//! sentences say, and which versions do, is for the crate that has the declarations.
#![deny(missing_docs)]

use libloading::os::unix::{RTLD_LOCAL, RTLD_NOW};

#[doc(hidden)]
pub use libloading::os::unix::Library;

/// Why a library could not be opened, or is another.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Problem {
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
}

/// What the variable names (true), or the name that the loader is asked for.
pub fn name_by(variable: &str, name: &str) -> (String, bool) {
    match std::env::var(variable) {
        Ok(path) if !path.is_empty() => (path, true),
        _ => (name.into(), false),
    }
}

/// Opens a library. `named`: by the user.
pub fn open(path: &str, named: bool) -> Result<Library, Problem> {
    // SAFETY: the library's initialisers run; whoever names a library trusts it with that.
    unsafe { Library::open(Some(path), RTLD_NOW | RTLD_LOCAL) }.map_err(|error| {
        // What the loader says stands behind libloading's own words.
        let why = std::error::Error::source(&error).map_or_else(|| error.to_string(), |why| why.to_string());
        Problem::Missing { path: path.into(), named, why }
    })
}

/// A function of the library.
///
/// # Safety
/// T is the function's type, as the library's header declares it.
pub unsafe fn symbol<T: Copy>(library: &Library, path: &str, name: &str) -> Result<T, Problem> {
    // SAFETY: as promised.
    match unsafe { library.get::<T>(name) } {
        Ok(function) => Ok(*function),
        Err(_) => Err(Problem::Symbol { path: path.into(), name: name.into() }),
    }
}

/// Declares the functions of a library: `Name; fn f(x: T) -> R; ...` is a struct with a field for each, their names, and `look_up`.
#[macro_export]
macro_rules! functions {
    ($library:ident; $($(#[$doc:meta])* fn $name:ident($($argument:ident: $type:ty),* $(,)?) -> $result:ty;)+) => {
        /// The functions of a library that is open for good.
        pub struct $library {
            path: String,
            $($(#[$doc])* pub $name: unsafe extern "C" fn($($argument: $type),*) -> $result,)+
            // Never closed: threads, tables and kernels of the library may outlive whoever made them.
            _library: std::mem::ManuallyDrop<$crate::Library>,
        }

        impl $library {
            /// The functions' names.
            pub const FUNCTIONS: &[&str] = &[$(stringify!($name)),+];

            /// Opens a library and looks every function up. `named`: by the user.
            fn look_up(path: &str, named: bool) -> Result<$library, $crate::Problem> {
                let library = $crate::open(path, named)?;
                Ok($library {
                    // SAFETY: the types are those of the header that this declares.
                    $($name: unsafe { $crate::symbol(&library, path, stringify!($name))? },)+
                    path: path.into(),
                    _library: std::mem::ManuallyDrop::new(library),
                })
            }

            /// The name that it was opened by.
            pub fn path(&self) -> &str {
                &self.path
            }
        }
    };
}
