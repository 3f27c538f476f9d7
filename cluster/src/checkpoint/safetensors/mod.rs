//! Folders as Hugging Face publishes them: `config.json` and `model.safetensors`, whole or in parts.

mod config;
mod header;
mod names;

use std::{
    borrow::Cow,
    collections::{BTreeMap, BTreeSet, HashMap},
    ops::Range,
    path::{Path, PathBuf},
};

use sha2::{Digest, Sha256};

use self::header::Entry;
use super::{
    Checkpoint, CheckpointError, Format, TensorInfo,
    generation::{self, GenerationDefaults},
    map::MappedFile,
    update_with_samples,
};
use crate::{hex::hex, model_config::ModelConfig};

const CONFIG: &str = "config.json";
const WHOLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

/// The longest JSON file that is read; indices of the largest models have a few MB.
const MAX_JSON_BYTES: u64 = 64 << 20;

/// Folders with a `config.json`.
pub struct SafetensorsFormat;

impl Format for SafetensorsFormat {
    fn name(&self) -> &'static str {
        "a folder with config.json and model.safetensors"
    }

    fn recognizes(&self, path: &Path) -> bool {
        path.join(CONFIG).is_file()
    }

    fn open(&self, path: &Path) -> Result<Box<dyn Checkpoint>, CheckpointError> {
        Ok(Box::new(Safetensors::open(path)?))
    }
}

/// An opened folder.
#[derive(Debug)]
pub struct Safetensors {
    folder: PathBuf,
    config: ModelConfig,
    index: Index,
    identity: String,
}

/// Tensors of all files, under canonical names where they have one.
#[derive(Debug, Default)]
struct Index {
    files: Vec<MappedFile>,
    tensors: Vec<TensorInfo>,
    /// File and byte range of each tensor.
    places: Vec<(usize, Range<usize>)>,
    by_name: HashMap<String, usize>,
}

impl Safetensors {
    /// Maps the folder's files, and reads and checks their headers.
    pub fn open(folder: &Path) -> Result<Self, CheckpointError> {
        let config_path = folder.join(CONFIG);
        let config_json = read_json_file(&config_path)?;
        let mut sha = Sha256::new();
        sha.update((config_json.len() as u64).to_le_bytes());
        sha.update(&config_json);

        let mut index = Index::default();
        for part in parts(folder)? {
            let file = MappedFile::open(&folder.join(&part.file))?;
            let (data_start, entries) = header::read(file.path(), file.bytes())?;
            sha.update(&file.bytes()[..data_start]);
            sha.update((file.bytes().len() as u64).to_le_bytes());
            entries.iter().for_each(|entry| update_with_samples(&mut sha, &file.bytes()[entry.range.clone()]));
            index.add(file, entries, part.tensors)?;
        }

        let embedding = index.by_name.get("token_embd.weight").map(|&i| &index.tensors[i]);
        let embedding = embedding.ok_or_else(|| CheckpointError::Tensor {
            file: folder.to_owned(),
            tensor: "model.embed_tokens.weight".to_owned(),
            reason: "missing; every model has it".to_owned(),
        })?;
        let tensors = config::Tensors {
            count: index.tensors.len(),
            embedding: (embedding.rows, embedding.cols),
            has_output: index.by_name.contains_key("output.weight"),
        };
        let name = folder.canonicalize().ok().and_then(|p| Some(p.file_name()?.to_string_lossy().into_owned()));
        let config = config::read(&config_path, &config_json, name.unwrap_or_default(), &tensors)?;
        Ok(Self { folder: folder.to_owned(), config, index, identity: hex(&sha.finalize()) })
    }
}

impl Checkpoint for Safetensors {
    fn path(&self) -> &PathBuf {
        &self.folder
    }

    fn config(&self) -> &ModelConfig {
        &self.config
    }

    fn tensors(&self) -> &[TensorInfo] {
        &self.index.tensors
    }

    fn find(&self, name: &str) -> Option<&TensorInfo> {
        self.index.by_name.get(name).map(|&i| &self.index.tensors[i])
    }

    fn generation_defaults(&self) -> Result<GenerationDefaults, CheckpointError> {
        let path = self.folder.join(generation::FILE);
        if path.exists() { GenerationDefaults::from_file(&path) } else { Ok(GenerationDefaults::default()) }
    }

    fn rows(&self, name: &str, rows: Range<usize>) -> Result<Cow<'_, [u8]>, CheckpointError> {
        let error = |reason| CheckpointError::Tensor { file: self.folder.clone(), tensor: name.to_owned(), reason };
        let &index = self.index.by_name.get(name).ok_or_else(|| error("missing".to_owned()))?;
        let tensor = &self.index.tensors[index];
        if rows.start > rows.end || rows.end > tensor.rows {
            return Err(error(format!("want rows {rows:?}, the file has {}", tensor.rows)));
        }
        let (file, range) = &self.index.places[index];
        let whole = &self.index.files[*file].bytes()[range.clone()];
        Ok(Cow::Borrowed(&whole[rows.start * tensor.row_bytes()..rows.end * tensor.row_bytes()]))
    }

    fn identity(&self) -> &str {
        &self.identity
    }
}

impl Index {
    /// Takes a file's tensors: all of them, or those that the index of a checkpoint in parts places there.
    fn add(
        &mut self,
        file: MappedFile,
        entries: Vec<Entry>,
        wanted: Option<BTreeSet<String>>,
    ) -> Result<(), CheckpointError> {
        let error = |tensor: &str, reason| CheckpointError::Tensor {
            file: file.path().clone(),
            tensor: tensor.to_owned(),
            reason,
        };
        let mut missing = wanted.clone();
        for entry in entries {
            if let Some(missing) = &mut missing
                && !missing.remove(&entry.name)
            {
                continue;
            }
            let canonical = names::canonical(&entry.name);
            let known = canonical.is_some();
            match entry.info(canonical.unwrap_or_else(|| entry.name.clone())) {
                Ok(tensor) => {
                    if self.by_name.insert(tensor.name.clone(), self.tensors.len()).is_some() {
                        return Err(error(&entry.name, format!("another tensor is {} already", tensor.name)));
                    }
                    self.tensors.push(tensor);
                    self.places.push((self.files.len(), entry.range));
                }
                Err(reason) if known => return Err(error(&entry.name, reason)),
                // A leftover that no model reads: a mask, a table of positions.
                Err(_) => {}
            }
        }
        if let Some(name) = missing.iter().flatten().next() {
            return Err(error(name, format!("missing, though {INDEX} places it here")));
        }
        self.files.push(file);
        Ok(())
    }
}

/// A file of the folder.
struct Part {
    file: String,
    /// Names of the tensors that the index places there; `None`: there's no index, all of them.
    tensors: Option<BTreeSet<String>>,
}

/// The folder's weight files. As in Hugging Face's loader a whole file goes before an index.
fn parts(folder: &Path) -> Result<Vec<Part>, CheckpointError> {
    if folder.join(WHOLE).exists() {
        return Ok(vec![Part { file: WHOLE.to_owned(), tensors: None }]);
    }
    let path = folder.join(INDEX);
    if !path.exists() {
        return Err(CheckpointError::UnknownFormat {
            file: folder.to_owned(),
            reason: format!("has neither {WHOLE} nor {INDEX}; other weight files can't be read"),
        });
    }
    #[derive(serde::Deserialize)]
    struct RawIndex {
        weight_map: BTreeMap<String, String>,
    }
    let error = |reason| CheckpointError::Invalid { file: path.clone(), field: "weight_map".to_owned(), reason };
    let raw: RawIndex = serde_json::from_slice(&read_json_file(&path)?).map_err(|e| error(e.to_string()))?;
    let mut files = BTreeMap::<String, BTreeSet<String>>::new();
    for (tensor, file) in raw.weight_map {
        // Nothing outside the folder.
        if Path::new(&file).file_name() != Some(file.as_ref()) {
            return Err(error(format!("{tensor}: {file:?} is not a file name")));
        }
        files.entry(file).or_default().insert(tensor);
    }
    Ok(files.into_iter().map(|(file, tensors)| Part { file, tensors: Some(tensors) }).collect())
}

/// All of a small regular file.
fn read_json_file(path: &Path) -> Result<Vec<u8>, CheckpointError> {
    let file = MappedFile::open(path)?;
    let len = file.bytes().len() as u64;
    if len > MAX_JSON_BYTES {
        return Err(CheckpointError::Invalid {
            file: path.to_owned(),
            field: "size".to_owned(),
            reason: format!("{len} bytes; at most {MAX_JSON_BYTES} are read"),
        });
    }
    Ok(file.bytes().to_vec())
}
