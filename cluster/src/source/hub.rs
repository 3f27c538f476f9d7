//! Models on the Hugging Face hub.
//!
//! Names, URLs and the cache's layout are the `hf-hub` crate's, so that its cache and ours look alike. Its client is not
//! used: it can neither be given the system's certificates, nor check a checksum, and it panics at odd answers.

use std::path::{Path, PathBuf};

use hf_hub::{Cache, CacheRepo, Repo, RepoType};
use serde::Deserialize;
use ureq::http::HeaderMap;

use super::download::{Downloader, Remote};
use super::lock::{FetchLock, beside};
use super::{Progress, ResolvedModel, Source, SourceError, SourceOptions};

/// `hf:ORG/REPO[@REVISION][:FILE]`.
pub(super) struct Hub;

#[derive(Deserialize)]
struct Listing {
    sha: String,
    siblings: Vec<Sibling>,
}

#[derive(Deserialize)]
struct Sibling {
    rfilename: String,
}

/// What else than weights belongs to a model folder.
const BESIDE_WEIGHTS: &[&str] = &[
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
    "model.safetensors.index.json",
    "hf_quant_config.json",
    "quantize_config.json",
];

struct Request<'a> {
    id: &'a str,
    revision: &'a str,
    file: Option<&'a str>,
}

fn parse(model: &str) -> Option<Request<'_>> {
    let named = model.strip_prefix("hf:")?;
    let (named, file) = named.split_once(':').map_or((named, None), |(named, file)| (named, Some(file)));
    let (id, revision) = named.split_once('@').unwrap_or((named, "main"));
    let (owner, name) = id.split_once('/')?;
    let plain = |text: &str| is_file_name(text) && text.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c));
    let wanted = plain(owner)
        && plain(name)
        && !revision.is_empty()
        && revision.split('/').all(plain)
        && file.is_none_or(|file| file.ends_with(".gguf") && is_inside(file));
    wanted.then_some(Request { id, revision, file })
}

/// A single component of a path, and not a way out of it.
fn is_file_name(text: &str) -> bool {
    !text.is_empty() && text != "." && text != ".." && !text.contains(['/', '\\', '\0'])
}

fn is_inside(path: &str) -> bool {
    path.split('/').all(is_file_name)
}

impl Source for Hub {
    fn claims(&self, model: &str) -> bool {
        model.starts_with("hf:")
    }

    fn resolve(
        &self,
        model: &str,
        options: &SourceOptions,
        progress: &dyn Progress,
    ) -> Result<ResolvedModel, SourceError> {
        let reason = "write hf:ORG/REPO, hf:ORG/REPO:FILE.gguf or hf:ORG/REPO@REVISION:FILE.gguf";
        let request = parse(model).ok_or_else(|| SourceError::Name { model: model.to_owned(), reason })?;
        let repo = Repo::with_revision(request.id.to_owned(), RepoType::Model, request.revision.to_owned());
        let cached = Cache::new(options.cache.join("hub")).repo(repo.clone());
        let display_name = request.id.rsplit('/').next().unwrap_or(request.id).to_owned();

        // Complete since an earlier run: nothing is asked of the hub.
        let record = options.cache.join("hub").join(format!("{}.resolved", file_safe(model)));
        if let Ok(path) = std::fs::read_to_string(&record).map(PathBuf::from)
            && path.exists()
        {
            return Ok(ResolvedModel { path, display_name });
        }
        let _lock = FetchLock::acquire(&record)?;
        let fetch = Fetch { request, repo, cached, options, progress, downloader: Downloader::new(options) };
        let path = fetch.run()?;
        let draft = beside(&record, "part");
        std::fs::write(&draft, path.to_string_lossy().as_bytes()).map_err(SourceError::file("write", &draft))?;
        std::fs::rename(&draft, &record).map_err(SourceError::file("rename", &draft))?;
        Ok(ResolvedModel { path, display_name })
    }
}

struct Fetch<'a> {
    request: Request<'a>,
    repo: Repo,
    cached: CacheRepo,
    options: &'a SourceOptions,
    progress: &'a dyn Progress,
    downloader: Downloader,
}

impl Fetch<'_> {
    /// Fetches all files of the model; its path.
    fn run(mut self) -> Result<PathBuf, SourceError> {
        let token = self.options.hub_token.as_deref();
        self.downloader = Downloader::new(self.options).with_token(token);
        let Request { id, revision, .. } = self.request;
        let url = format!("{}/api/models/{id}/revision/{}", self.options.hub_endpoint, file_safe(revision));
        let document = self.downloader.document(&url, "application/json")?;
        let listing: Listing = serde_json::from_slice(&document)
            .map_err(|error| SourceError::Answer { url: url.clone(), reason: error.to_string() })?;
        if !is_file_name(&listing.sha) {
            return Err(SourceError::Answer { url, reason: format!("commit {:?}", listing.sha) });
        }
        let names: Vec<&str> = listing.siblings.iter().map(|sibling| sibling.rfilename.as_str()).collect();
        let files = self.wanted(&names)?;
        for file in &files {
            self.file(file, &listing.sha)?;
        }
        self.cached.create_ref(&listing.sha).map_err(SourceError::file("write", &self.options.cache))?;
        let snapshot = self.cached.pointer_path(&listing.sha);
        Ok(match files[..] {
            [file] if file.ends_with(".gguf") => snapshot.join(file),
            _ => snapshot,
        })
    }

    /// Which of the repository's files make the model.
    fn wanted<'n>(&self, names: &[&'n str]) -> Result<Vec<&'n str>, SourceError> {
        let bad = |reason: String| SourceError::Repository { repository: self.request.id.to_owned(), reason };
        let ggufs: Vec<&str> = names.iter().copied().filter(|name| name.ends_with(".gguf")).collect();
        if let Some(file) = self.request.file {
            let found = names.iter().copied().find(|name| *name == file && is_inside(name));
            return Ok(vec![found.ok_or_else(|| bad(format!("no file {file}; it has {}", ggufs.join(", "))))?]);
        }
        if names.contains(&"config.json") && names.iter().any(|name| is_weights(name)) {
            return Ok(names
                .iter()
                .copied()
                .filter(|name| is_weights(name) || BESIDE_WEIGHTS.contains(name))
                .collect());
        }
        match ggufs[..] {
            [one] if is_inside(one) => Ok(vec![one]),
            [] => Err(bad("neither config.json with safetensors files, nor a GGUF file".to_owned())),
            _ => Err(bad(format!("choose one: hf:{}:FILE, FILE is one of {}", self.request.id, ggufs.join(", ")))),
        }
    }

    fn file(&self, name: &str, commit: &str) -> Result<(), SourceError> {
        let pointer = self.cached.pointer_path(commit).join(name);
        if pointer.exists() {
            return Ok(());
        }
        let id = self.request.id;
        let url = format!("{}/{id}/resolve/{commit}/{}", self.options.hub_endpoint, escaped(name));
        let headers = self.downloader.headers(&url)?;
        let etag = etag(&headers).ok_or_else(|| SourceError::Answer { url: url.clone(), reason: "no ETag".into() })?;
        let bytes = header(&headers, "x-linked-size").and_then(|size| size.parse().ok());
        // Large files are named by their SHA-256, small ones by git's hash.
        let sha256 = Some(etag.as_str()).filter(|tag| tag.len() == 64 && tag.bytes().all(|b| b.is_ascii_hexdigit()));

        let blob = self.options.cache.join("hub").join(self.repo.folder_name()).join("blobs").join(&etag);
        if !blob.exists() {
            for folder in [blob.parent(), pointer.parent()].into_iter().flatten() {
                std::fs::create_dir_all(folder).map_err(SourceError::file("create", folder))?;
            }
            let part = beside(&blob, "part");
            self.progress.start(&format!("{}/{name}", self.request.id), bytes);
            let outcome =
                self.downloader.file(&Remote { url: &url, bytes, sha256 }, &part, &|done| self.progress.at(done));
            self.progress.finish();
            outcome?;
            std::fs::rename(&part, &blob).map_err(SourceError::file("rename", &part))?;
        }
        link(&blob, &pointer)
    }
}

fn is_weights(name: &str) -> bool {
    is_file_name(name) && name.ends_with(".safetensors")
}

/// A relative link, so that the cache can be moved.
fn link(blob: &Path, pointer: &Path) -> Result<(), SourceError> {
    if let Some(folder) = pointer.parent() {
        std::fs::create_dir_all(folder).map_err(SourceError::file("create", folder))?;
    }
    // repository/snapshots/COMMIT/a/b -> repository/blobs/ETAG
    let repository = blob.parent().and_then(Path::parent).unwrap_or(Path::new("/"));
    let depth = pointer.strip_prefix(repository).map_or(0, |below| below.components().count().saturating_sub(1));
    let below = blob.strip_prefix(repository).unwrap_or(blob);
    let to: PathBuf = std::iter::repeat_n(Path::new(".."), depth).collect::<PathBuf>().join(below);
    match std::os::unix::fs::symlink(&to, pointer) {
        Err(error) if error.kind() != std::io::ErrorKind::AlreadyExists => {
            Err(SourceError::file("link", pointer)(error))
        }
        _ => Ok(()),
    }
}

fn header<'h>(headers: &'h HeaderMap, name: &str) -> Option<&'h str> {
    headers.get(name)?.to_str().ok()
}

/// The file's identity, usable as a file name.
fn etag(headers: &HeaderMap) -> Option<String> {
    let tag = header(headers, "x-linked-etag").or_else(|| header(headers, "etag"))?;
    let tag = tag.strip_prefix("W/").unwrap_or(tag).trim_matches('"');
    let plain = is_file_name(tag) && tag.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c));
    plain.then(|| tag.to_owned())
}

/// A path in a URL.
fn escaped(path: &str) -> String {
    let mut escaped = String::new();
    for &byte in path.as_bytes() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'_' | b'.' | b'~' | b'/' => escaped.push(byte.into()),
            other => escaped.push_str(&format!("%{other:02X}")),
        }
    }
    escaped
}

/// A name as a file name: what is not plain becomes `%XX`.
fn file_safe(name: &str) -> String {
    escaped(name).replace('/', "%2F")
}

#[cfg(test)]
mod unit {
    use super::*;

    #[test]
    fn names_are_taken_apart() {
        let request = parse("hf:Org/Repo-1.5@refs/pr/3:sub/model.Q4_0.gguf").unwrap();
        assert_eq!(
            (request.id, request.revision, request.file),
            ("Org/Repo-1.5", "refs/pr/3", Some("sub/model.Q4_0.gguf"))
        );
        assert_eq!(parse("hf:a/b").unwrap().revision, "main");
        for bad in
            ["hf:a", "hf:/b", "hf:../b", "hf:a/b/c", "hf:a/b:../x.gguf", "hf:a/b:x.bin", "hf:a/b@", "hf:a/b:/x.gguf"]
        {
            assert!(parse(bad).is_none(), "{bad}");
        }
    }
}
