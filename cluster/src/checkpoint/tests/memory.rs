//! Claims of a file don't decide how much memory is taken: its size does.

use std::process::Command;

use rustix::process::{Resource, Rlimit, setrlimit};

use super::exercise;
use crate::checkpoint::testing::{
    ARRAY, BOOL, F32, GgufFile, STRING, U32, safetensors_file, tiny_config, write_folder,
};

/// Set in the process that has little memory.
const CHILD: &str = "PHALANX_TEST_LITTLE_MEMORY";

/// Address space of the child: many times what honest files of this size take, and less than any lie below asks for.
const LIMIT: u64 = 1 << 30;

/// Runs itself again in a process that can't have much memory; there, to ask for it is to be aborted.
#[test]
fn claims_take_no_memory() {
    if std::env::var_os(CHILD).is_some() {
        setrlimit(Resource::As, Rlimit { current: Some(LIMIT), maximum: Some(LIMIT) }).expect("less is always allowed");
        return open_all();
    }
    let this = std::env::current_exe().expect("the test's own file");
    let name = format!("{}::claims_take_no_memory", module_path!().split_once("::").expect("crate::module").1);
    let output = Command::new(this).args(["--exact", &name, "--nocapture"]).env(CHILD, "1").output().expect("starts");
    let stdout = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{stdout}\n{}", String::from_utf8_lossy(&output.stderr));
    assert!(stdout.contains("1 passed"), "{stdout}");
}

fn open_all() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = folder.path().join("tiny.gguf");
    // Zeros, so that counts that fit the rest of the file are believed for longest. A hole takes no disk.
    const PADDING: u64 = 256 << 20;
    for count in [1 << 24, PADDING / 12, PADDING, 1 << 40, u64::MAX / 8, u64::MAX] {
        let mut files = Vec::new();
        for kind in [U32, F32, BOOL, STRING, ARRAY] {
            let mut file = GgufFile::tiny();
            file.set("x", ARRAY, [kind.to_le_bytes().to_vec(), count.to_le_bytes().to_vec()].concat());
            files.push(file);
        }
        files.push(GgufFile { n_tensors: Some(count), ..GgufFile::tiny() });
        files.push(GgufFile { n_values: Some(count), ..GgufFile::tiny() });
        let mut file = GgufFile::tiny();
        file.set("x", STRING, count.to_le_bytes().to_vec());
        files.push(file);
        for file in files {
            let (mut bytes, header_len) = file.bytes();
            bytes.truncate(header_len);
            std::fs::write(&path, &bytes).expect("writable");
            for padding in [0, PADDING] {
                let file = std::fs::File::options().write(true).open(&path).expect("just written");
                file.set_len(header_len as u64 + padding).expect("holes are supported");
                assert!(exercise(&path).is_err(), "{count}");
            }
        }
    }
    // A header of the most bytes, all of it one list of dimensions.
    let header = format!(r#"{{"model.norm.weight":{{"dtype":"F32","shape":[{}"#, "1,".repeat(16 << 20));
    write_folder(folder.path(), tiny_config().to_string().as_bytes(), &safetensors_file(&header, 0));
    assert!(exercise(folder.path()).is_err());
}
