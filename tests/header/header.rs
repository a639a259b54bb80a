//! include/a2a.h is what src/abi says: the committed header equals a fresh one, and its version is the library's.
//! `make header` (A2A_BLESS=1) writes it.

use std::path::Path;

/// The library's.
fn version(root: &Path) -> String {
    let manifest = std::fs::read_to_string(root.join("Cargo.toml")).unwrap();
    let mut lines = manifest.lines().filter_map(|line| line.strip_prefix("version = "));
    lines.next().unwrap().trim_matches('"').to_string()
}

fn generate(root: &Path) -> String {
    let mut config = cbindgen::Config::from_root_or_default(root);
    let version = version(root);
    let mut parts = version.split('.');
    let mut part = || parts.next().unwrap().parse::<u32>().unwrap();
    config.after_includes = Some(format!(
        "\n/** The version of this header; a2a_version() is the library's. */\n\
         #define A2A_VERSION \"{version}\"\n#define A2A_VERSION_MAJOR {}\n#define A2A_VERSION_MINOR {}\n\
         #define A2A_VERSION_PATCH {}\n",
        part(),
        part(),
        part()
    ));
    let bindings = cbindgen::Builder::new()
        .with_config(config)
        .with_src(root.join("src/abi/types.rs"))
        .with_src(root.join("src/abi/calls.rs"))
        .generate()
        .expect("cbindgen reads src/abi");
    let mut text = Vec::new();
    bindings.write(&mut text);
    String::from_utf8(text).unwrap()
}

#[test]
fn the_committed_header_is_the_generated_one() {
    let root = &Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let path = root.join("include/a2a.h");
    let fresh = generate(root);
    if std::env::var_os("A2A_BLESS").is_some() {
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, &fresh).unwrap();
    }
    let committed = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(committed == fresh, "include/a2a.h is stale: run `make header` and commit it");
}
