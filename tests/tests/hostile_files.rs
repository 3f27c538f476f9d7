//! Model files that are truncated, corrupt or hostile: opening one gives a clear error or a consistent model, never a
//! panic, and a coordinator that is given one ends with a message that names the file.

use std::{fs, path::Path, process::Command};

use phalanx_tests::{
    golden,
    model_cache::{SMOLLM2, model},
    process::binary,
    workload::Numbers,
};

/// Opens a checkpoint and reads every tensor that its header lists.
fn read_all(path: &Path) -> Result<usize, String> {
    let checkpoint = phalanx_cluster::checkpoint::open(path).map_err(|e| e.to_string())?;
    let mut bytes = 0;
    for tensor in checkpoint.tensors() {
        bytes += checkpoint.rows(&tensor.name, 0..tensor.rows).map_err(|e| e.to_string())?.len();
    }
    Ok(bytes)
}

#[test]
fn a_hundred_mutated_files_give_errors_and_no_panic() {
    let mut numbers = Numbers(11);
    let folder = tempfile::tempdir().unwrap();

    // The header of a real GGUF file and the beginning of its tensors.
    let whole = fs::read(model(SMOLLM2)).unwrap();
    let gguf = folder.path().join("mutated.gguf");
    let mut refused = 0;
    for round in 0..60 {
        let mut bytes = whole[..4 << 20].to_vec();
        let len = bytes.len() as u64;
        match round % 4 {
            // Cut anywhere.
            0 => bytes.truncate(usize::try_from(numbers.below(len)).unwrap()),
            // Counts, types and lengths at the beginning.
            1 => bytes[usize::try_from(numbers.below(64)).unwrap()] ^= 1 << numbers.below(8),
            // A run of 0xff where lengths are likely.
            2 => {
                let at = usize::try_from(numbers.below(4096)).unwrap();
                bytes[at..at + 8].fill(0xff);
            }
            // Noise all over the header.
            _ => {
                for _ in 0..64 {
                    let at = usize::try_from(numbers.below(1 << 16)).unwrap();
                    bytes[at] = u8::try_from(numbers.below(256)).unwrap();
                }
            }
        }
        fs::write(&gguf, &bytes).unwrap();
        // The tensors' bytes are cut off in any case: nothing here may be accepted as a whole.
        let error = read_all(&gguf).expect_err("the file is not whole");
        assert!(error.contains("mutated.gguf"), "round {round}: the error names the file: {error}");
        refused += 1;
    }

    // A small Hugging Face folder.
    let source = golden::tiny("llama");
    let copy = folder.path().join("llama");
    fs::create_dir(&copy).unwrap();
    for round in 0..60 {
        for file in ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"] {
            fs::copy(source.join(file), copy.join(file)).unwrap();
        }
        let file = copy.join(if round % 3 == 0 { "config.json" } else { "model.safetensors" });
        let mut bytes = fs::read(&file).unwrap();
        let header = bytes.len().min(3000) as u64;
        match round % 4 {
            0 => bytes.truncate(usize::try_from(numbers.below(bytes.len() as u64)).unwrap()),
            1 => bytes[usize::try_from(numbers.below(8)).unwrap()] ^= 1 << numbers.below(8),
            2 => bytes[usize::try_from(numbers.below(header)).unwrap()] = 0xff,
            _ => {
                let at = usize::try_from(numbers.below(header)).unwrap();
                bytes[at] = b'0' + u8::try_from(numbers.below(10)).unwrap();
            }
        }
        fs::write(&file, &bytes).unwrap();
        // A changed digit can leave a valid model; anything else is an error that names the file.
        if let Err(error) = read_all(&copy) {
            assert!(error.contains("llama"), "round {round}: the error names the file: {error}");
            refused += 1;
        }
    }
    assert!(refused >= 90, "most mutations are refused: {refused}");
}

#[test]
fn a_coordinator_refuses_a_bad_file_and_says_why() {
    let folder = tempfile::tempdir().unwrap();
    let whole = fs::read(model(SMOLLM2)).unwrap();
    let cases: [(&str, Vec<u8>); 4] = [
        ("empty.gguf", Vec::new()),
        ("text.gguf", b"this is no model".to_vec()),
        ("header-only.gguf", whole[..1 << 20].to_vec()),
        ("cut.gguf", whole[..whole.len() - 1000].to_vec()),
    ];
    for (name, bytes) in cases {
        let path = folder.path().join(name);
        fs::write(&path, bytes).unwrap();
        let output = Command::new(binary("coordinator"))
            .arg(&path)
            .args(["--port", "0", "--grpc-port", "0", "--state-dir"])
            .arg(folder.path().join("state"))
            .output()
            .unwrap();
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success(), "{name}: {error}");
        assert!(error.contains(name), "{name}: the error names the file: {error}");
        assert!(!error.contains("panicked"), "{name}: {error}");
    }
    let missing = Command::new(binary("coordinator")).arg(folder.path().join("missing.gguf")).output().unwrap();
    assert!(!missing.status.success());
    assert!(String::from_utf8_lossy(&missing.stderr).contains("missing.gguf"));
}
