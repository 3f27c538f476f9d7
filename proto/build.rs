//! Compiles the .proto files with protox, so that no build needs protoc.

use std::{env, error::Error, fs, path::PathBuf};

use prost::Message;

const FILES: &[&str] =
    &["common.proto", "step.proto", "cluster.proto", "leadership.proto", "admin.proto", "generate.proto"];

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo:rerun-if-changed=proto");
    let descriptors = protox::compile(FILES, ["proto"])?;
    let out = PathBuf::from(env::var("OUT_DIR")?);
    fs::write(out.join("descriptors.bin"), descriptors.encode_to_vec())?;
    tonic_prost_build::configure().compile_fds(descriptors)?;
    Ok(())
}
