//! What options mean, and which are refused.

use std::{collections::BTreeMap, ffi::OsString};

use clap::CommandFactory;

use super::{gathered::check_variables, *};

fn machine() -> Machine {
    Machine { cores: 8, state_home: Some("/home/me/state".into()), store_credentials: None, otel: BTreeMap::new() }
}

fn resolve(args: &[&str]) -> Result<Config, ConfigError> {
    let typed = std::iter::once("coordinator").chain(args.iter().copied()).map(OsString::from);
    Config::resolve(Flags::gather(typed)?, &machine())
}

fn refused(args: &[&str]) -> String {
    resolve(args).expect_err("the options are wrong").to_string()
}

#[test]
fn the_command_is_consistent() {
    Flags::command().debug_assert();
    // Every option that takes a value can come from the environment, under its own name.
    for arg in Flags::command().get_arguments() {
        let (Some(long), true) = (arg.get_long(), arg.get_action().takes_values()) else { continue };
        let own = format!("PHALANX_{}", long.replace('-', "_").to_uppercase());
        let variable = arg.get_env().map(|e| e.to_string_lossy().into_owned());
        let expected = if long == "log-level" { "PHALANX_LOG".to_owned() } else { own };
        assert_eq!(variable, Some(expected));
        assert!(arg.get_help().is_some(), "--{long} has no help");
    }
}

#[test]
fn defaults_are_filled_in() {
    let config = resolve(&[]).unwrap();
    assert_eq!(config.model, DEFAULT_MODEL);
    assert_eq!((config.tensor_parallel_size, config.local_shards, config.threads_per_shard), (2, 2, 4));
    assert_eq!(config.replicas, 1);
    assert_eq!(config.http_address.to_string(), "127.0.0.1:8000");
    assert_eq!(config.grpc_address.to_string(), "127.0.0.1:50051");
    assert_eq!(config.state_dir, Some("/home/me/state/phalanx/50051".into()));
    assert!(config.enable_prefix_caching);
    assert_eq!((config.resume_window.as_secs(), config.resume_memory), (600, 256 << 20));
    assert_eq!(resolve(&["--grpc-port", "0"]).unwrap().state_dir, None);
}

#[test]
fn flags_are_taken() {
    let args = [
        "m.gguf",
        "-tp",
        "3",
        "--kv-cache-memory",
        "512MiB",
        "--no-enable-prefix-caching",
        "--host",
        "::",
        "--insecure-cluster",
    ];
    let config = resolve(&args).unwrap();
    assert_eq!((config.model.as_str(), config.tensor_parallel_size, config.local_shards), ("m.gguf", 3, 3));
    assert_eq!(config.kv_cache_memory, Some(512 << 20));
    assert!(!config.enable_prefix_caching);
    assert_eq!(config.http_address.to_string(), "[::]:8000");
    assert_eq!(resolve(&["--port", "1", "--port", "2"]).unwrap().http_address.port(), 2, "the last one counts");
    assert!(resolve(&["--enable-prefix-caching", "m.gguf"]).unwrap().enable_prefix_caching);
    let resume = resolve(&["--resume-window", "5", "--resume-memory", "64MiB"]).unwrap();
    assert_eq!((resume.resume_window.as_secs(), resume.resume_memory), (5, 64 << 20));
    let small = resolve(&["--max-num-batched-tokens", "16"]).unwrap();
    assert_eq!((small.max_num_batched_tokens, small.max_num_seqs), (16, 16));
    assert_eq!(resolve(&["--served-model-name", "a", "b"]).unwrap().served_model_names, ["a", "b"]);
}

#[test]
fn contradictions_are_refused() {
    assert!(refused(&["a.gguf", "--model", "b.gguf"]).contains("--model"));
    assert!(refused(&["--enable-prefix-caching", "--no-enable-prefix-caching"]).contains("cannot be used"));
    assert!(refused(&["--port", "50051"]).contains("two different"));
    assert!(refused(&["--max-num-seqs", "64", "--max-num-batched-tokens", "32"]).contains("--max-num-seqs"));
    assert!(refused(&["--store", "etcd://h:1", "--state-dir", "/x"]).contains("embedded only"));
    assert!(refused(&["--tensor-parallel-size", "0"]).contains("1 to 256"));
    assert!(refused(&["--block-size", "24"]).contains("multiple of 16"));
    assert!(refused(&["--resume-window", "0"]).contains("1 to 86400"));
    assert!(refused(&["--resume-memory", "512KiB"]).contains("at least 1MiB"));
    assert!(refused(&["--kv-cache-memory", "much"]).contains("512MiB"));
    assert!(refused(&["--store", "zookeeper://h:1"]).contains("embedded, etcd://"));
    assert!(refused(&["--kv-mirror", "everywhere"]).contains("spare, buddy, off"));
    assert!(refused(&["--host", "nowhere.example"]).contains("IP address"));
    assert!(refused(&["--chat-template", "/does/not/exist"]).contains("/does/not/exist"));
    assert!(refused(&["--log-level", "a=b=c"]).contains("log-level"));
    assert!(refused(&["--cluster-ca", "/does/not/exist"]).contains("--cluster-cert and --cluster-key too"));
    assert!(refused(&["--tensor-paralel-size", "1"]).contains("--tensor-parallel-size"));
}

#[test]
fn the_grpc_port_is_not_open_by_mistake() {
    for host in ["0.0.0.0", "::", "10.0.0.5"] {
        let reason = refused(&["--host", host]);
        assert!(reason.starts_with(&format!("--host {host}: ")) && reason.contains("--insecure-cluster"), "{reason}");
        assert!(resolve(&["--host", host, "--insecure-cluster"]).is_ok());
        let apart = resolve(&["--host", host, "--grpc-host", "127.0.0.1"]).unwrap();
        assert_eq!(apart.grpc_address.to_string(), "127.0.0.1:50051");
        assert_eq!(apart.http_address.ip().to_string(), host);
    }
    assert!(refused(&["--grpc-host", "0.0.0.0"]).starts_with("--grpc-host 0.0.0.0: "));
    assert!(resolve(&["--host", "127.0.0.9"]).is_ok() && resolve(&["--host", "::1"]).is_ok());
    assert!(refused(&["--host", "0.0.0.0", "--insecure-cluster=false"]).contains("certs init"));
}

#[test]
fn keys_and_certificates_are_checked() {
    let config = resolve(&["--api-key", "one", "--api-key", "two", "m.gguf"]).unwrap();
    assert_eq!((config.security.api_keys.keys().len(), config.model.as_str()), (2, "m.gguf"));
    assert!(config.security.is_closed() && !resolve(&[]).unwrap().security.is_closed());
    assert!(!format!("{config:?}").contains("\"one\""), "keys are not logged");
    assert!(refused(&["--api-key", ""]).contains("--api-key (secret)"));
    assert!(refused(&["--api-key", "x", "--api-key", "x"]).contains("distinct"));
    assert!(resolve(&["--api-keys", "keys.json"]).unwrap().security.is_closed());
    assert!(refused(&["--ssl-certfile", "c.pem"]).contains("--ssl-keyfile"));
    assert!(refused(&["--ssl-keyfile", "k.pem"]).contains("--ssl-certfile"));
    assert!(refused(&["--ssl-ca-certs", "ca.pem"]).contains("--ssl-certfile"));
    let both = ["--ssl-certfile", "c.pem", "--ssl-keyfile", "k.pem", "--ssl-ca-certs", "ca.pem"];
    assert!(resolve(&both).is_ok());
    let shared = [&both[..], &["--store", "etcd://h:1"]].concat();
    assert!(refused(&shared).contains("--cluster-ca"));
}

#[test]
fn what_is_watched_is_checked() {
    let given = ["--guard", "pii:mail+card,denylist:words.txt", "--moderation-webhook", "https://m.example/check"];
    let config = resolve(&given).unwrap();
    let guard = config.security.guard.as_ref().unwrap();
    assert_eq!((guard.pii.as_slice(), guard.lists.len(), guard.action), (&["mail", "card"][..], 1, None));
    assert_eq!(config.security.moderation.as_ref().unwrap().limit.as_secs(), 5);
    let again = config.to_flags();
    assert_eq!(Config::resolve(again, &machine()).unwrap(), config);
    assert!(refused(&["--guard", "pii:soul"]).contains("mail, phone, card, iban, ip, key"));
    assert!(refused(&["--guard-action", "block"]).contains("--guard too"));
    assert!(refused(&["--moderation-timeout", "3"]).contains("--moderation-webhook too"));
    assert!(refused(&["--moderation-webhook", "m.example"]).contains("https://host/path"));
}

#[test]
fn variables_with_typing_errors_are_refused() {
    let check = |name: &str| check_variables(std::iter::once(name.to_owned()));
    check("PHALANX_PORT").unwrap();
    check("PHALANX_CACHE").unwrap();
    check("HOME").unwrap();
    let error = check("PHALANX_PORTS").unwrap_err().to_string();
    assert!(error.contains("PHALANX_PORTS") && error.contains("perhaps PHALANX_PORT?"), "{error}");
}

#[test]
fn sizes_have_units() {
    let bytes = |text: &str| text.parse::<ByteSize>().map(|s| s.0);
    assert_eq!(bytes("4096"), Ok(4096));
    assert_eq!(bytes("1.5 GiB"), Ok(3 << 29));
    assert_eq!(bytes("2GB"), Ok(2_000_000_000));
    for bad in ["", "MiB", "-1", "1XB", "0", "9e9", "99999999TiB"] {
        assert!(bytes(bad).is_err(), "{bad}");
    }
    assert_eq!(ByteSize(512 << 20).to_string(), "512MiB");
    assert_eq!(ByteSize(1000).to_string(), "1000B");
}

#[test]
fn what_is_printed_can_be_read_again() {
    let dir = tempfile::tempdir().unwrap();
    let config = resolve(&["m \"x\".gguf", "--kv-cache-memory", "1GiB", "--served-model-name", "a", "b"]).unwrap();
    let file = dir.path().join("c.toml");
    std::fs::write(&file, config.to_flags().to_toml()).unwrap();
    assert_eq!(resolve(&["--config", file.to_str().unwrap()]).unwrap(), config);
}
