//! Names the shared object for the loader: programs bind to `liba2a.so.0` for as long as the ABI stays compatible.

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rustc-cdylib-link-arg=-Wl,-soname,liba2a.so.0");
}
