//! What is said of libraries that are no NCCL, or an old one: libraries made on the spot by the C compiler. And of a real
//! one, where `A2A_NCCL_LIB` names it.

use std::ffi::{CStr, c_int};
use std::path::PathBuf;
use std::process::Command;

use nccl_sys::{LoadError, Nccl, OLDEST, ncclSuccess, ncclUniqueId};

const FUNCTIONS: [&str; 19] = [
    "ncclGetErrorString",
    "ncclGetLastError",
    "ncclGetUniqueId",
    "ncclCommInitRankConfig",
    "ncclCommSplit",
    "ncclCommFinalize",
    "ncclCommDestroy",
    "ncclCommAbort",
    "ncclCommGetAsyncError",
    "ncclCommCount",
    "ncclCommUserRank",
    "ncclCommCuDevice",
    "ncclGroupStart",
    "ncclGroupEnd",
    "ncclAllGather",
    "ncclReduceScatter",
    "ncclBroadcast",
    "ncclReduce",
    "ncclSend",
];

/// A library with these functions beside ncclGetVersion, which says `version` and returns `result`.
fn library(name: &str, functions: &[&str], version: c_int, result: c_int) -> String {
    let dir = PathBuf::from(env!("CARGO_TARGET_TMPDIR"));
    let (source, path) = (dir.join(format!("{name}.c")), dir.join(format!("lib{name}.so")));
    let mut text = format!("int ncclGetVersion(int *v) {{ *v = {version}; return {result}; }}\n");
    for function in functions {
        text += &format!("int {function}(void) {{ return 0; }}\n");
    }
    std::fs::write(&source, text).unwrap();
    let compiler = std::env::var("CC").unwrap_or_else(|_| "cc".into());
    let status = Command::new(compiler)
        .args(["-w", "-fno-builtin", "-shared", "-fPIC", "-o"])
        .args([&path, &source])
        .status()
        .expect("a C compiler");
    assert!(status.success());
    path.to_str().unwrap().into()
}

fn all() -> Vec<&'static str> {
    FUNCTIONS.into_iter().chain(["ncclRecv"]).collect()
}

fn refused(path: &str, named: bool) -> LoadError {
    match Nccl::open(path, named) {
        Ok(nccl) => panic!("{path} is taken for NCCL {}", nccl.version()),
        Err(error) => error,
    }
}

#[test]
fn a_library_with_everything_is_taken() {
    let path = library("nccl_whole", &all(), 23007, ncclSuccess);
    let nccl = Nccl::open(&path, true).unwrap_or_else(|e| panic!("{e}"));
    assert_eq!((nccl.version(), nccl.path()), (23007, &*path));
    let oldest = library("nccl_oldest", &all(), OLDEST, ncclSuccess);
    assert!(Nccl::open(&oldest, false).is_ok());
}

#[test]
fn every_function_is_looked_for() {
    let all = all();
    for missing in &all {
        let others: Vec<&str> = all.iter().copied().filter(|name| name != missing).collect();
        let path = library(&format!("nccl_without_{missing}"), &others, 23007, ncclSuccess);
        let said = refused(&path, true).to_string();
        assert_eq!(said, format!("{path} is no NCCL from 2.19.0 on: it has no function {missing}"));
    }
}

#[test]
fn old_ones_are_named() {
    for (version, text) in [(OLDEST - 1, "2.18.99"), (21805, "2.18.5"), (2708, "2.7.8")] {
        let path = library(&format!("nccl_{version}"), &all(), version, ncclSuccess);
        let said = refused(&path, true).to_string();
        assert_eq!(said, format!("{path} is NCCL {text}, 2.19.0 or later is needed"));
    }
    let path = library("nccl_broken", &all(), 0, 3);
    let said = refused(&path, true).to_string();
    assert_eq!(said, format!("{path} is no working NCCL: ncclGetVersion returned 3"));
}

#[test]
fn a_missing_one_says_what_to_install() {
    let said = refused("libnccl_that_nobody_has.so.2", false).to_string();
    for part in
        ["not installed", "libnccl_that_nobody_has.so.2", "pip install nvidia-nccl-cu13", "A2A_NCCL_LIB"]
    {
        assert!(said.contains(part), "{said:?} does not say {part:?}");
    }
    let said = refused("/no/such/libnccl.so", true).to_string();
    let begins = "NCCL cannot be opened: A2A_NCCL_LIB is /no/such/libnccl.so (";
    assert!(said.starts_with(begins) && said.contains("No such file"), "{said:?}");
    let said = refused(file!(), true).to_string();
    assert!(said.contains("A2A_NCCL_LIB is"), "{said:?}");
}

/// Without a GPU a real NCCL tells its version, makes ids and explains its results.
#[test]
#[ignore = "needs a real NCCL, which A2A_NCCL_LIB names: make test-rust"]
fn a_real_one_answers() {
    let nccl = Nccl::get().unwrap_or_else(|e| panic!("{e}"));
    let mut ids = [ncclUniqueId { internal: [0; 128] }; 2];
    // SAFETY: valid out-pointers, and a result of the library's.
    unsafe {
        for id in &mut ids {
            assert_eq!((nccl.ncclGetUniqueId)(id), ncclSuccess);
        }
        let said = CStr::from_ptr((nccl.ncclGetErrorString)(4)).to_str().unwrap();
        assert!(said.starts_with("invalid argument"), "{said:?}");
    }
    assert_ne!(ids[0].internal, ids[1].internal);
}
