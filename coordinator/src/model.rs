//! Opening the model that is to be served: files, configuration, tokenizer, chat template.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
    time::{SystemTime, UNIX_EPOCH},
};

use phalanx_cluster::{
    chat_template::{ChatTemplate, TemplateError},
    checkpoint::{self, Checkpoint, CheckpointError, generation::GenerationDefaults},
    model_config::ModelConfig,
    source::{self, SourceError, SourceOptions},
    tokenizer::{Tokenizer, TokenizerError},
};

use crate::{
    config::{Config, Dtype, GenerationConfig},
    grammars::Grammars,
    model_facts::ModelFacts,
    served_model::ServedModel,
};

/// A model that is ready to be served.
pub struct OpenedModel {
    /// For frontends.
    pub served: ServedModel,
    /// The model's shape.
    pub shape: ModelConfig,
    /// Identity of the checkpoint, which every rank checks.
    pub identity: String,
    /// What shards are told to load: a full path, or the name as it was given.
    pub location: String,
    /// Where it is here.
    pub path: PathBuf,
    /// Tries grammars that requests bring.
    pub grammars: Arc<Grammars>,
}

/// Why the model can't be served.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    /// It can't be found or fetched.
    #[error(transparent)]
    Source(#[from] SourceError),
    /// The checkpoint can't be read.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// There is no usable tokenizer.
    #[error("{path}: tokenizer: {source}")]
    Tokenizer {
        /// Of which file or folder.
        path: PathBuf,
        /// What is wrong.
        source: TokenizerError,
    },
    /// The chat template can't be used.
    #[error("{path}: chat template: {source}")]
    Template {
        /// Of which file or folder.
        path: PathBuf,
        /// What is wrong.
        source: TemplateError,
    },
    /// An option does not fit the model.
    #[error("--{option} {value}: {reason}")]
    Option {
        /// Name of the flag.
        option: &'static str,
        /// As given.
        value: String,
        /// Why not, and what would do.
        reason: String,
    },
}

/// Finds, fetches if need be, and opens the model. Blocks.
pub fn open(config: &Config) -> Result<OpenedModel, ModelError> {
    let progress = source::progress_for_stderr();
    let resolved = source::resolve(&config.model, &SourceOptions::from_env()?, &*progress)?;
    let checkpoint = checkpoint::open(&resolved.path)?;
    let shape = checkpoint.config().clone();
    let max_model_len = check_options(config, &shape)?;

    let files = config.tokenizer.as_deref().unwrap_or(&resolved.path);
    let (tokenizer, embedded_template) = match &config.tokenizer {
        Some(path) if path.is_file() => open_tokenizer(path, &*checkpoint::open(path)?)?,
        Some(path) => (tokenizer_of_folder(path)?, None),
        None => open_tokenizer(&resolved.path, &*checkpoint)?,
    };
    if tokenizer.vocab_size() > shape.vocab {
        let reason = format!("it has {} tokens, the model {}", tokenizer.vocab_size(), shape.vocab);
        let value = files.display().to_string();
        return Err(ModelError::Option { option: "tokenizer", value, reason });
    }
    let chat_template = open_template(config, files, embedded_template.as_deref(), &tokenizer)?;

    // A path means the same to every process that has these files; a name is looked up by each shard on its own.
    let is_path = Path::new(&config.model).exists();
    let full_path = || std::path::absolute(&resolved.path).unwrap_or_else(|_| resolved.path.clone());
    let location = if is_path { full_path().display().to_string() } else { config.model.clone() };
    let names = match config.served_model_names.as_slice() {
        [] => vec![resolved.display_name.clone()],
        names => names.to_vec(),
    };
    let created = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
    let served = ServedModel {
        names,
        max_model_len,
        vocab: shape.vocab,
        eos: tokenizer.eos_ids().to_vec(),
        tokenizer: Arc::new(tokenizer),
        chat_template: chat_template.map(Arc::new),
        created,
        facts: ModelFacts::of(&*checkpoint),
        fingerprint: fingerprint(config, &*checkpoint),
        defaults: match &config.generation_config {
            GenerationConfig::Auto => checkpoint.generation_defaults()?,
            GenerationConfig::None => GenerationDefaults::default(),
            GenerationConfig::File(path) => GenerationDefaults::from_file(path)?,
        },
    };
    let tokenizer = Arc::clone(&served.tokenizer);
    let grammars = match &config.tokenizer {
        None => Grammars::apart(tokenizer, resolved.path.clone()),
        // Shards know the model's own.
        Some(_) => Grammars::none(tokenizer, "is not possible while the server runs with --tokenizer"),
    };
    let identity = checkpoint.identity().to_owned();
    Ok(OpenedModel { served, shape, identity, location, path: resolved.path, grammars: Arc::new(grammars) })
}

/// Shards have the coordinator's version, which decides the numerics: nothing of a machine does.
fn fingerprint(config: &Config, checkpoint: &dyn Checkpoint) -> String {
    let precision = match config.dtype {
        Dtype::Auto => "",
        Dtype::Float32 => "-float32",
    };
    format!("{}{precision}-{:.12}", env!("CARGO_PKG_VERSION"), checkpoint.identity())
}

/// Options that only the model can judge. Returns the longest sequence.
fn check_options(config: &Config, shape: &ModelConfig) -> Result<usize, ModelError> {
    let wrong = |option, value: String, reason| Err(ModelError::Option { option, value, reason });
    let ranks = config.tensor_parallel_size as usize;
    if ranks > shape.n_heads {
        let reason = format!("{} has {} query heads: use at most as many ranks", shape.name, shape.n_heads);
        return wrong("tensor-parallel-size", ranks.to_string(), reason);
    }
    match config.max_model_len.map(|n| n as usize) {
        None => Ok(shape.context_length),
        Some(len) if len <= shape.context_length => Ok(len),
        Some(len) => {
            let reason = format!("{} was made for at most {} tokens", shape.name, shape.context_length);
            wrong("max-model-len", len.to_string(), reason)
        }
    }
}

/// The tokenizer of a checkpoint, and the chat template that lies beside it in the same file.
fn open_tokenizer(path: &Path, checkpoint: &dyn Checkpoint) -> Result<(Tokenizer, Option<String>), ModelError> {
    match checkpoint.tokenizer()? {
        Some(gguf) => {
            let tokenizer = Tokenizer::from_gguf(&gguf)
                .map_err(|source| ModelError::Tokenizer { path: path.to_owned(), source })?;
            Ok((tokenizer, gguf.chat_template))
        }
        None => Ok((tokenizer_of_folder(path)?, None)),
    }
}

fn tokenizer_of_folder(path: &Path) -> Result<Tokenizer, ModelError> {
    Tokenizer::from_folder(path).map_err(|source| ModelError::Tokenizer { path: path.to_owned(), source })
}

/// A model without a chat template is served without chats.
fn open_template(
    config: &Config,
    files: &Path,
    embedded: Option<&str>,
    tokenizer: &Tokenizer,
) -> Result<Option<ChatTemplate>, ModelError> {
    let special = tokenizer.special_tokens();
    let (path, template) = match &config.chat_template {
        Some(file) => (file.as_path(), ChatTemplate::from_file(file, special)),
        None if files.is_dir() => (files, ChatTemplate::from_folder(files, special)),
        None => (files, ChatTemplate::from_optional(embedded, special)),
    };
    match template {
        Ok(template) => Ok(Some(template)),
        Err(TemplateError::Missing) => Ok(None),
        Err(source) => Err(ModelError::Template { path: path.to_owned(), source }),
    }
}
