use super::*;
use std::io::Write as _;

fn config(args: &[&str]) -> Result<Config, ConfigError> {
    Config::from_args(std::iter::once("shard").chain(args.iter().copied()).map(OsString::from))
}

fn refused(args: &[&str]) -> String {
    config(args).expect_err("the options are wrong").to_string()
}

const JOIN: &str = "--coordinator=http://127.0.0.1:50051";

#[test]
fn defaults_are_filled_in() {
    let config = config(&[JOIN, "--threads", "3"]).expect("good options");
    assert_eq!(config.coordinators, ["http://127.0.0.1:50051"]);
    assert_eq!(config.device, DeviceConfig { name: "cpu".into(), threads: 3, isa: None });
    assert_eq!(config.listen.port(), 0);
    assert_eq!(config.collective, None);
}

#[test]
fn flags_win_over_the_file() {
    let mut file = tempfile::NamedTempFile::new().expect("a file");
    write!(file, "coordinator = 'http://a:1,http://b:2'\nthreads = 1\nshard_id = 'file'\n").expect("written");
    let path = file.path().to_str().expect("a path");
    let merged = config(&["--config", path, "--threads", "2"]).expect("good options");
    assert_eq!(merged.coordinators, ["http://a:1", "http://b:2"]);
    assert_eq!(merged.device.threads, 2);
    assert_eq!(merged.shard_id, "file");
}

#[test]
fn unknown_keys_and_files_are_refused() {
    let mut file = tempfile::NamedTempFile::new().expect("a file");
    writeln!(file, "thraeds = 1").expect("written");
    let path = file.path().to_str().expect("a path");
    assert!(refused(&[JOIN, "--config", path]).contains("thraeds"));
    assert!(refused(&[JOIN, "--config", "/does/not/exist.toml"]).contains("exist.toml"));
    assert!(refused(&[JOIN, "--thraeds", "1"]).contains("thraeds"));
}

#[test]
fn coordinators_are_separated_or_repeated() {
    let both = config(&[JOIN, "--coordinator", "http://a:1,http://b:2"]).expect("good options");
    assert_eq!(both.coordinators, ["http://127.0.0.1:50051", "http://a:1", "http://b:2"]);
}

#[test]
fn probes_have_a_port_of_this_machine_unless_told_otherwise() {
    let health = |args: &[&str]| config(&[&[JOIN], args].concat()).expect("good options").health.map(|a| a.to_string());
    assert_eq!(health(&[]), None);
    assert_eq!(health(&["--health-port", "8100"]).as_deref(), Some("127.0.0.1:8100"));
    assert_eq!(health(&["--health-port", "8100", "--health-host", "::"]).as_deref(), Some("[::]:8100"));
    assert!(refused(&[JOIN, "--health-host", "0.0.0.0"]).contains("--health-port"));
    assert!(refused(&[JOIN, "--health-port", "8100", "--health-host", "shard-1"]).contains("an IP address"));
}

#[test]
fn what_is_advertised_is_listened_for() {
    let with = |args: &[&str]| {
        let config = config(&[&[JOIN], args].concat()).expect("good options");
        (config.listen.to_string(), config.advertise.map(|advertised| advertised.address(9)))
    };
    assert_eq!(with(&[]), ("127.0.0.1:0".into(), None));
    assert_eq!(with(&["--advertise", "gpu-1.lan"]), ("0.0.0.0:0".into(), Some("gpu-1.lan:9".into())));
    assert_eq!(with(&["--advertise", "10.0.0.5:7000"]), ("0.0.0.0:7000".into(), Some("10.0.0.5:7000".into())));
    assert_eq!(with(&["--advertise", "127.0.0.1"]), ("127.0.0.1:0".into(), Some("127.0.0.1:9".into())));
    assert_eq!(with(&["--advertise", "[fd00::5]:7000"]), ("[::]:7000".into(), Some("[fd00::5]:7000".into())));
    assert_eq!(with(&["--advertise", "fd00::5"]), ("[::]:0".into(), Some("[fd00::5]:9".into())));
    let both = ["--advertise", "nat:80", "--listen", "10.0.0.5:7000"];
    assert_eq!(with(&both), ("10.0.0.5:7000".into(), Some("nat:80".into())));
    assert_eq!(with(&["--listen", "0.0.0.0:7000"]), ("0.0.0.0:7000".into(), None));
}

#[test]
fn a_join_token_comes_from_one_place() {
    let mut file = tempfile::NamedTempFile::new().expect("a file");
    writeln!(file, " s3cret ").expect("written");
    let path = file.path().to_str().expect("a path");
    assert_eq!(config(&[JOIN, "--join-token-file", path]).expect("good options").join_token, "s3cret");
    assert_eq!(config(&[JOIN, "--join-token", "x"]).expect("good options").join_token, "x");
    assert_eq!(config(&[JOIN]).expect("good options").join_token, "");
    assert!(refused(&[JOIN, "--join-token", "x", "--join-token-file", path]).contains("not both"));
    assert!(refused(&[JOIN, "--join-token-file", "/does/not/exist"]).contains("/does/not/exist"));
    let empty = tempfile::NamedTempFile::new().expect("a file");
    assert!(refused(&[JOIN, "--join-token-file", empty.path().to_str().expect("a path")]).contains("empty"));
}

#[test]
fn mirrors_have_a_size_and_an_address() {
    let with = |args: &[&str]| {
        let config = config(&[&[JOIN], args].concat()).expect("good options");
        (config.mirror_memory, config.mirror_listen.to_string())
    };
    assert_eq!(with(&[]), (None, "127.0.0.1:0".into()));
    assert_eq!(with(&["--mirror-memory", "0"]), (Some(0), "127.0.0.1:0".into()));
    assert_eq!(with(&["--mirror-memory", "2GiB", "--listen", "10.0.0.5:7000"]), (Some(2 << 30), "10.0.0.5:0".into()));
    assert_eq!(with(&["--mirror-listen", "10.0.0.5:7001"]), (None, "10.0.0.5:7001".into()));
    assert!(refused(&[JOIN, "--mirror-memory", "many"]).contains("512MiB"));
    assert!(refused(&[JOIN, "--mirror-listen", "here"]).contains("ADDRESS:PORT"));
}

#[test]
fn bad_values_say_what_would_do() {
    assert!(refused(&[]).contains("--coordinator is missing"));
    assert!(refused(&["--coordinator", "127.0.0.1:1"]).contains("want http://HOST:PORT"));
    assert!(refused(&["--coordinator", "http://host"]).contains("want http://HOST:PORT"));
    assert!(refused(&["--coordinator", "https://host:1"]).contains("needs --cluster-ca"));
    assert!(refused(&[JOIN, "--cluster-ca", "/does/not/exist"]).contains("--cluster-cert and --cluster-key"));
    assert!(refused(&[JOIN, "--threads", "0"]).contains("1 to 1024"));
    assert!(refused(&[JOIN, "--device", "cuda:0"]).contains("no CUDA backend"));
    assert!(refused(&[JOIN, "--isa", "sse"]).contains("sse"));
    assert!(refused(&[JOIN, "--collective", "pigeon"]).contains("shm"));
    assert!(refused(&[JOIN, "--listen", "here"]).contains("ADDRESS:PORT"));
    assert!(refused(&[JOIN, "--shard-id", "a/b"]).contains("slashes"));
    for address in ["0.0.0.0", "a:b:c", "host:", "host:0", "http://host", "[::]:7000"] {
        assert!(refused(&[JOIN, "--advertise", address]).contains("HOST:PORT"), "{address}");
    }
    #[cfg(any(debug_assertions, feature = "failpoints"))]
    assert!(refused(&[JOIN, "--failpoint", "step:1:explode"]).contains("no failpoint"));
}
