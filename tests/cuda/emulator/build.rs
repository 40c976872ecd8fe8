//! Gives the library's functions their versions, or the loader warns that they have none. This
//! needs rust-lld, the default on Linux since Rust 1.90: other linkers take one version script
//! alone, and rustc has its own.

fn main() {
    println!("cargo::rerun-if-changed=links.map");
    let folder = env!("CARGO_MANIFEST_DIR");
    println!("cargo::rustc-cdylib-link-arg=-Wl,--version-script={folder}/links.map");
}
