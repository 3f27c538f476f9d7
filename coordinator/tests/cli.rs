//! The program's options, as a user types them.

use std::{
    fs,
    path::Path,
    process::{Command, Output},
};

fn coordinator(args: &[&str], variables: &[(&str, &str)]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_coordinator"));
    for (name, _) in std::env::vars().filter(|(name, _)| name.starts_with("PHALANX_")) {
        command.env_remove(name);
    }
    command.env("HOME", "/home/nobody").env_remove("XDG_STATE_HOME");
    command.args(args).envs(variables.iter().copied()).output().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// The resolved options as `key = value` lines.
fn printed(args: &[&str], variables: &[(&str, &str)]) -> String {
    let all: Vec<&str> = args.iter().copied().chain(["--print-config"]).collect();
    let output = coordinator(&all, variables);
    assert!(output.status.success(), "{}", text(&output.stderr));
    text(&output.stdout)
}

/// What a start with wrong options says; it never gets to a model.
fn refused(args: &[&str], variables: &[(&str, &str)]) -> String {
    let output = coordinator(args, variables);
    let error = text(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{error}");
    assert_eq!(text(&output.stdout), "");
    assert!(!error.contains("panicked"), "{error}");
    error
}

fn file(folder: &Path, content: &str) -> String {
    let path = folder.join("phalanx.toml");
    fs::write(&path, content).unwrap();
    path.to_str().unwrap().to_owned()
}

#[test]
fn help_explains_every_option() {
    let output = coordinator(&["--help"], &[]);
    assert!(output.status.success());
    let help = text(&output.stdout);
    for option in [
        "[MODEL]",
        "--tensor-parallel-size",
        "--local-shards",
        "--host",
        "--port",
        "--grpc-port",
        "--max-num-seqs",
        "--max-num-batched-tokens",
        "--max-model-len",
        "--block-size",
        "--kv-cache-memory",
        "--served-model-name",
        "--dtype",
        "--store",
        "--threads-per-shard",
        "--chat-template",
        "--tokenizer",
        "--state-dir",
        "--collective",
        "--isa",
        "--config",
        "[default: 50051]",
        "in milliseconds [default: 500]",
        "phalanx ready http://",
    ] {
        assert!(help.contains(option), "{option} is not in:\n{help}");
    }
    let version = coordinator(&["--version"], &[]);
    assert!(text(&version.stdout).contains(env!("CARGO_PKG_VERSION")));
}

#[test]
fn a_shell_completes_what_the_program_knows() {
    // bash asks a script as it does when the tabulator key is hit.
    let candidates = |program: &str, words: &[&str]| {
        let words: Vec<String> = words.iter().map(|word| format!("'{word}'")).collect();
        let script = format!(
            "source <(\"$1\" {program} completions bash)\n\
             spec=$(complete -p {name}) || exit 3\n\
             COMP_WORDS=({words}) COMP_CWORD=$(({n} - 1)) COMP_LINE= COMP_POINT=0\n\
             COMP_TYPE=9 _{name} {name} \"${{COMP_WORDS[COMP_CWORD]}}\" \"${{COMP_WORDS[COMP_CWORD - 1]}}\"\n\
             printf '%s\\n' \"${{COMPREPLY[@]}}\"",
            name = if program.is_empty() { "coordinator" } else { program },
            words = words.join(" "),
            n = words.len(),
        );
        let binary = env!("CARGO_BIN_EXE_coordinator");
        let output = Command::new("bash").args(["--norc", "-c", &script, "bash", binary]).output().unwrap();
        assert!(output.status.success(), "{}", text(&output.stderr));
        text(&output.stdout).lines().map(str::to_owned).collect::<Vec<_>>()
    };
    let has = |found: &[String], word: &str| found.iter().any(|candidate| candidate == word);
    let found = candidates("", &["coordinator", "--tensor"]);
    assert!(has(&found, "--tensor-parallel-size"), "{found:?}");
    let found = candidates("", &["coordinator", "key", "add", "--con"]);
    assert!(has(&found, "--concurrency"), "{found:?}");
    let found = candidates("", &["coordinator", "drain", "--clu"]);
    assert!(has(&found, "--cluster-cert"), "{found:?}");
    let found = candidates("shard", &["shard", "--lea"]);
    assert!(has(&found, "--leave-timeout"), "{found:?}");
    let found = candidates("cluster", &["cluster", "dr"]);
    assert!(has(&found, "drain"), "{found:?}");
    for shell in ["zsh", "fish", "elvish", "powershell"] {
        let output = coordinator(&["completions", shell], &[]);
        assert!(output.status.success() && text(&output.stdout).contains("tensor-parallel-size"), "{shell}");
    }
    assert_eq!(coordinator(&["completions", "dos"], &[]).status.code(), Some(2));
    assert_eq!(coordinator(&["completions"], &[]).status.code(), Some(2));
}

#[test]
fn every_command_has_a_manual_page() {
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path().join("man1");
    for program in [&["man"][..], &["shard", "man"], &["cluster", "man"]] {
        let output = coordinator(&[program, &[folder.to_str().unwrap()]].concat(), &[]);
        assert!(output.status.success(), "{}", text(&output.stderr));
    }
    for (page, words) in [
        ("coordinator.1", "tensor\\-parallel\\-size"),
        ("coordinator-shard.1", "leave\\-timeout"),
        ("coordinator-key-add.1", "concurrency"),
        ("coordinator-certs-init.1", "dir"),
        ("coordinator-bench.1", "rounds"),
        ("coordinator-rollout-restart.1", "timeout"),
        ("shard.1", "leave\\-timeout"),
        ("cluster.1", "PHALANX_COORDINATOR"),
        ("cluster-status.1", "watch"),
    ] {
        let text = fs::read_to_string(folder.join(page)).unwrap_or_else(|e| panic!("{page}: {e}"));
        assert!(text.contains(".TH") && text.contains(words), "{page}: no {words}");
    }
    assert!(!folder.join("coordinator-grammar-trial.1").exists());
}

#[test]
fn the_program_is_a_shard_too() {
    let output = coordinator(&["shard", "--help"], &[]);
    assert!(output.status.success());
    assert!(text(&output.stdout).contains("--coordinator"), "{}", text(&output.stdout));
    let bad = coordinator(&["shard"], &[]);
    assert_eq!(bad.status.code(), Some(2));
}

#[test]
fn the_program_is_the_cluster_program_too() {
    for args in [&["cluster", "--help"][..], &["cluster", "status", "--help"], &["rollout", "restart", "--help"]] {
        let output = coordinator(args, &[]);
        assert!(output.status.success(), "{args:?}: {}", text(&output.stderr));
        assert!(text(&output.stdout).contains("--coordinator"), "{}", text(&output.stdout));
    }
    for args in [&["cluster"][..], &["cluster", "drain"], &["rollout"], &["status", "--no-such-option"]] {
        assert_eq!(coordinator(args, &[]).status.code(), Some(2), "{args:?}");
    }
    // Nobody listens there.
    let output = coordinator(&["status", "--coordinator", "http://127.0.0.1:1"], &[]);
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output.stderr).contains("http://127.0.0.1:1"), "{}", text(&output.stderr));
}

#[test]
fn flags_come_before_variables_before_the_file_before_defaults() {
    let folder = tempfile::tempdir().unwrap();
    let content = "port = 1111\ngrpc_port = 2222\nmax_num_seqs = 3\nserved_model_name = ['one', 'two']\n";
    let config = file(folder.path(), content);
    let variables = [("PHALANX_GRPC_PORT", "3333"), ("PHALANX_MAX_NUM_SEQS", "4"), ("PHALANX_CONFIG", config.as_str())];
    let all = printed(&["--max-num-seqs", "5"], &variables);
    for line in [
        "port = 1111",
        "grpc_port = 3333",
        "max_num_seqs = 5",
        "served_model_name = [\"one\",\"two\"]",
        "block_size = 16",
        "model = \"smollm2-135m-instruct\"",
        "tensor_parallel_size = 2",
        "state_dir = \"/home/nobody/.local/state/phalanx/3333\"",
    ] {
        assert!(all.lines().any(|l| l == line), "{line} is not in:\n{all}");
    }
}

#[test]
fn printed_options_are_a_file() {
    let folder = tempfile::tempdir().unwrap();
    let first = printed(&["other.gguf", "--dtype", "float32", "--kv-cache-memory", "1GiB"], &[]);
    let config = file(folder.path(), &first);
    assert_eq!(printed(&["--config", &config], &[]), first);
}

#[test]
fn unknown_options_are_refused_wherever_they_come_from() {
    let folder = tempfile::tempdir().unwrap();
    let config = file(folder.path(), "tensor_paralel_size = 2\n");
    assert!(refused(&["--config", &config], &[]).contains("tensor_paralel_size"));
    assert!(refused(&[], &[("PHALANX_TENSOR_PARALEL_SIZE", "2")]).contains("PHALANX_TENSOR_PARALEL_SIZE"));
    let similar = refused(&["--tensor-paralel-size", "2"], &[]);
    assert!(similar.contains("--tensor-parallel-size"), "{similar}");
}

#[test]
fn wrong_values_are_refused_and_named() {
    let folder = tempfile::tempdir().unwrap();
    let config = file(folder.path(), "port = 'eighty'\n");
    let error = refused(&["--config", &config], &[]);
    assert!(error.contains("port") && error.contains("phalanx.toml"), "{error}");
    let syntax = file(folder.path(), "port = \n");
    assert!(refused(&["--config", &syntax], &[]).contains("phalanx.toml"));
    assert!(refused(&["--config", "/does/not/exist.toml"], &[]).contains("/does/not/exist.toml"));
    assert!(refused(&["--port", "70000"], &[]).contains("--port"));
    assert!(refused(&["--dtype", "int3"], &[]).contains("float32"));
    assert!(refused(&[], &[("PHALANX_PORT", "eighty")]).contains("eighty"));
    assert!(refused(&["--kv-cache-memory", "lots"], &[]).contains("512MiB"));
}

#[test]
fn contradictions_are_refused() {
    assert!(refused(&["--port", "7", "--grpc-port", "7"], &[]).contains("two different"));
    assert!(refused(&["--store", "etcd://h:2379", "--state-dir", "/tmp/x"], &[]).contains("--state-dir"));
    assert!(refused(&["--store", "consul://h:1"], &[]).contains("etcd://"));
    assert!(refused(&["one.gguf", "--model", "two.gguf"], &[]).contains("--model"));
}

#[test]
fn a_missing_model_is_named() {
    let output = coordinator(&["/does/not/exist.gguf", "--port", "0", "--grpc-port", "0"], &[]);
    assert_eq!(output.status.code(), Some(1));
    let error = text(&output.stderr);
    assert!(error.contains("/does/not/exist.gguf") && !error.contains("panicked"), "{error}");
}
