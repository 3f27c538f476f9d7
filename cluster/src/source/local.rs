//! Models that are on this machine already.

use std::path::Path;

use super::{Progress, ResolvedModel, Source, SourceError, SourceOptions, alias};

/// A GGUF file or a model folder, used where it is.
pub(super) struct Local;

impl Source for Local {
    fn claims(&self, model: &str) -> bool {
        Path::new(model).exists() || Path::new(model).extension().is_some_and(|extension| extension == "gguf")
    }

    fn resolve(&self, model: &str, _: &SourceOptions, _: &dyn Progress) -> Result<ResolvedModel, SourceError> {
        let path = Path::new(model);
        let metadata = std::fs::metadata(path).map_err(SourceError::file("read", path))?;
        let not_a_model = |reason| SourceError::NotAModel { path: path.to_owned(), reason };
        if metadata.is_dir() && !path.join("config.json").is_file() {
            return Err(not_a_model("a model folder has a config.json"));
        }
        if metadata.is_file() && path.extension().is_none_or(|extension| extension != "gguf") {
            return Err(not_a_model("a model file ends in .gguf; of safetensors files, pass their folder"));
        }
        // "." and "/models/x/.." have names too.
        let absolute = path.canonicalize().map_err(SourceError::file("read", path))?;
        let name = if metadata.is_dir() { absolute.file_name() } else { absolute.file_stem() };
        let display_name = name.map_or_else(|| model.to_owned(), |name| name.to_string_lossy().into_owned());
        Ok(ResolvedModel { path: path.to_owned(), display_name })
    }
}

/// For a name that no source claims.
pub(super) fn unknown(model: &str) -> SourceError {
    let aliases: Vec<&str> = alias::ALIASES.iter().map(|alias| alias.name).collect();
    SourceError::Unknown { model: model.to_owned(), aliases: aliases.join(", ") }
}
