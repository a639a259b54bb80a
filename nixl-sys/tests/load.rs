//! What is said of libraries that are no NIXL: libraries made on the spot by the C compiler.

use std::path::PathBuf;
use std::process::Command;

use nixl_sys::Nixl;

/// A library with these functions, which says of itself if it is a stub.
fn library(name: &str, functions: &[&str], is_stub: bool) -> String {
    let dir = PathBuf::from(env!("CARGO_TARGET_TMPDIR"));
    let (source, path) = (dir.join(format!("{name}.c")), dir.join(format!("lib{name}.so")));
    let mut text = String::new();
    for function in functions {
        let result = i32::from(is_stub && *function == "nixl_capi_is_stub");
        text += &format!("int {function}(void) {{ return {result}; }}\n");
    }
    std::fs::write(&source, text).unwrap();
    let compiler = std::env::var("CC").unwrap_or_else(|_| "cc".into());
    let status =
        Command::new(compiler).args(["-w", "-shared", "-fPIC", "-o"]).args([&path, &source]).status();
    assert!(status.expect("a C compiler").success());
    path.to_str().unwrap().into()
}

fn refused(path: &str, named: bool) -> String {
    match Nixl::open(path, named) {
        Ok(nixl) => panic!("{} is taken for NIXL", nixl.path()),
        Err(error) => error.to_string(),
    }
}

#[test]
fn a_library_with_everything_is_taken() {
    let path = library("nixl_whole", Nixl::FUNCTIONS, false);
    let nixl = Nixl::open(&path, true).unwrap_or_else(|e| panic!("{e}"));
    assert_eq!(nixl.path(), path);
}

#[test]
fn every_function_is_looked_for() {
    assert_eq!(Nixl::FUNCTIONS.len(), 38);
    for missing in Nixl::FUNCTIONS {
        let others: Vec<&str> = Nixl::FUNCTIONS.iter().copied().filter(|name| name != missing).collect();
        let path = library(&format!("nixl_without_{missing}"), &others, false);
        let said = refused(&path, true);
        assert_eq!(said, format!("{path} is not the NIXL of nixl-cu13==1.5.1: it has no function {missing}"));
    }
}

#[test]
fn a_stub_is_named() {
    let path = library("nixl_stub", Nixl::FUNCTIONS, true);
    let said = refused(&path, false);
    assert!(said.starts_with(&format!("{path} is a stub")) && said.contains("A2A_NIXL_LIB"), "{said:?}");
}

#[test]
fn a_missing_one_says_what_to_install() {
    let said = refused("libnixl_that_nobody_has.so", false);
    for part in [
        "not installed",
        "libnixl_that_nobody_has.so",
        "pip install --no-deps nixl-cu13==1.5.1",
        "A2A_NIXL_LIB",
    ] {
        assert!(said.contains(part), "{said:?} does not say {part:?}");
    }
    let said = refused("/no/such/libnixl_capi.so", true);
    let begins = "NIXL cannot be opened: A2A_NIXL_LIB is /no/such/libnixl_capi.so (";
    assert!(said.starts_with(begins) && said.contains("No such file"), "{said:?}");
    assert!(refused(file!(), true).starts_with("NIXL cannot be opened: A2A_NIXL_LIB is "));
}
