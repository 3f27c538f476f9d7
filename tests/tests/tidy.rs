//! The structure as a test: which crate may import which, where `unsafe` may be, how long a file may grow.

use std::{fs, path::PathBuf};

use phalanx_tests::process::repository;

/// Rust files under a folder.
fn sources(folder: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut folders = vec![repository().join(folder)];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).unwrap_or_else(|e| panic!("{}: {e}", folder.display())).flatten() {
            let path = entry.path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|e| e == "rs") {
                found.push(path);
            }
        }
    }
    found.sort();
    found
}

fn text(path: &PathBuf) -> String {
    fs::read_to_string(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

#[test]
fn crates_import_only_what_the_design_allows() {
    let allowed = [
        ("proto", &[][..]),
        ("kernels", &[][..]),
        ("cluster", &[][..]),
        ("shard", &["proto", "kernels", "cluster"][..]),
        ("coordinator", &["proto", "cluster"][..]),
    ];
    for (folder, may) in allowed {
        for path in sources(&format!("{folder}/src")) {
            // The binary embeds the shard, so that one file serves a model: docs/adr/0002.
            if path.ends_with("coordinator/src/main.rs") {
                continue;
            }
            for (other, _) in allowed {
                let name = format!("phalanx_{other}::");
                let imports = other != folder && !may.contains(&other) && text(&path).contains(&name);
                assert!(!imports, "{} imports {other}", path.display());
            }
        }
    }
}

#[test]
fn unsafe_code_stays_in_its_rooms() {
    for folder in ["proto", "cluster", "shard", "coordinator", "tests"] {
        for path in sources(&format!("{folder}/src")) {
            // A memory map is a promise about a file that no type can make: the one line of it is alone in its file.
            if path.ends_with("cluster/src/checkpoint/map.rs") {
                continue;
            }
            let opens = text(&path).lines().any(|l| l.contains("unsafe {") || l.contains("allow(unsafe_code)"));
            assert!(!opens, "{} has unsafe code", path.display());
        }
    }
    for path in sources("kernels/src") {
        let opens = text(&path).lines().any(|l| l.trim_start().starts_with("#![allow(unsafe_code)]"));
        let room = path.components().any(|c| c.as_os_str() == "cpu")
            || path.ends_with("collective/shm.rs")
            || path.components().any(|c| c.as_os_str() == "shm")
            || path.ends_with("tensor.rs");
        assert!(!opens || room, "{} has unsafe code", path.display());
    }
}

#[test]
fn files_stay_short() {
    for folder in ["proto", "kernels", "cluster", "shard", "coordinator", "tests"] {
        for path in sources(folder) {
            let lines = text(&path).lines().count();
            assert!(lines <= 800, "{} has {lines} lines: it wants a wall", path.display());
        }
    }
}

#[test]
fn the_c_library_computes_nothing() {
    // These are right to about a unit in the last place, in each C library and on each CPU to another one: bits of answers
    // would depend on them. The crate libm has its own. (Square roots, and products with a sum, have one right result.)
    let inexact = [
        "sin", "cos", "tan", "sin_cos", "asin", "acos", "atan", "atan2", "sinh", "cosh", "tanh", "exp", "exp2",
        "exp_m1", "ln", "ln_1p", "log", "log2", "log10", "powf", "cbrt", "hypot", "gamma",
    ];
    let mut n_read = 0;
    for folder in ["kernels", "cluster", "shard"] {
        for path in sources(&format!("{folder}/src")) {
            if path.components().any(|c| c.as_os_str() == "tests") || path.ends_with("tests.rs") {
                continue;
            }
            let text = text(&path);
            let code = text.split("#[cfg(test)]").next().unwrap_or_default();
            n_read += usize::from(code.contains("libm::"));
            for name in inexact {
                let calls = [format!(".{name}("), format!("f32::{name}"), format!("f64::{name}")];
                // A longer name may begin with it.
                let is_called = |call: &String| {
                    code.split(call.as_str())
                        .skip(1)
                        .any(|rest| !rest.starts_with(|c: char| c.is_alphanumeric() || c == '_'))
                };
                assert!(!calls.iter().any(is_called), "{} calls {name}: use libm's", path.display());
            }
        }
    }
    assert!(n_read > 2, "what is looked for is looked for where it would be");
}
