//! How a model's makers want it sampled: `generation_config.json` of a Hugging Face folder, `general.sampling.*` of a GGUF file.

use std::{io::Read as _, path::Path};

use serde_json::Value;

use super::CheckpointError;

/// Name of the file in a Hugging Face folder.
pub const FILE: &str = "generation_config.json";

/// Most of a file that is read; they have some hundred bytes.
const MOST_BYTES: u64 = 1 << 20;

/// What requests that leave a parameter out get. `None`: the makers say nothing.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct GenerationDefaults {
    /// 0 to 2; 0 is greedy.
    pub temperature: Option<f32>,
    /// 0 keeps all tokens.
    pub top_k: Option<u32>,
    /// Above 0, at most 1.
    pub top_p: Option<f32>,
    /// 0 to 1.
    pub min_p: Option<f32>,
    /// Above 0, at most 10.
    pub repetition_penalty: Option<f32>,
    /// At least 1.
    pub max_new_tokens: Option<u32>,
}

impl GenerationDefaults {
    /// Of a file such as Hugging Face's, or of the one in a model's folder. `do_sample` does not count, as in other servers: most files that say it say it because
    /// it is their library's default.
    pub fn from_file(path: &Path) -> Result<Self, CheckpointError> {
        let in_folder = path.is_dir().then(|| path.join(FILE));
        let path = in_folder.as_deref().unwrap_or(path);
        let mut bytes = Vec::new();
        std::fs::File::open(path)
            .and_then(|file| file.take(MOST_BYTES).read_to_end(&mut bytes))
            .map_err(|source| CheckpointError::Io { file: path.to_owned(), source })?;
        let error = |field: &str, reason: String| CheckpointError::Invalid {
            file: path.to_owned(),
            field: field.to_owned(),
            reason,
        };
        let document: Value = serde_json::from_slice(&bytes).map_err(|e| error("JSON", e.to_string()))?;
        if !document.is_object() {
            return Err(error("JSON", "want an object".to_owned()));
        }
        let number = |field: &str| match &document[field] {
            Value::Null => Ok(None),
            value => value.as_f64().map(Some).ok_or_else(|| error(field, format!("want a number, got {value}"))),
        };
        Self {
            temperature: number("temperature")?.map(|x| x as f32),
            top_k: number("top_k")?.map(whole),
            top_p: number("top_p")?.map(|x| x as f32),
            min_p: number("min_p")?.map(|x| x as f32),
            repetition_penalty: number("repetition_penalty")?.map(|x| x as f32),
            max_new_tokens: number("max_new_tokens")?.map(whole),
        }
        .checked(error)
    }

    /// All of them in their ranges.
    pub(super) fn checked(
        self,
        error: impl Fn(&'static str, String) -> CheckpointError,
    ) -> Result<Self, CheckpointError> {
        let within = |field, value: Option<f32>, is_open: bool, most: f32| match value {
            Some(x) if !((if is_open { x > 0.0 } else { x >= 0.0 }) && x <= most) => {
                let least = if is_open { "above 0" } else { "at least 0" };
                Err(error(field, format!("want a number {least} and at most {most}, got {x}")))
            }
            _ => Ok(()),
        };
        within("temperature", self.temperature, false, 2.0)?;
        within("top_p", self.top_p, true, 1.0)?;
        within("min_p", self.min_p, false, 1.0)?;
        within("repetition_penalty", self.repetition_penalty, true, 10.0)?;
        if self.max_new_tokens == Some(0) {
            return Err(error("max_new_tokens", "want at least 1".to_owned()));
        }
        Ok(self)
    }
}

/// As a whole number; -1, which some write for "all", is 0.
fn whole(x: f64) -> u32 {
    x as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<GenerationDefaults, CheckpointError> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(FILE);
        std::fs::write(&path, text).unwrap();
        GenerationDefaults::from_file(&path)
    }

    #[test]
    fn a_file_says_what_it_says() {
        let text = r#"{"do_sample": true, "eos_token_id": [1, 2], "temperature": 0.7, "top_k": 20, "top_p": 0.8,
            "min_p": null, "repetition_penalty": 1.05, "max_new_tokens": 2048}"#;
        let defaults = GenerationDefaults {
            temperature: Some(0.7),
            top_k: Some(20),
            top_p: Some(0.8),
            min_p: None,
            repetition_penalty: Some(1.05),
            max_new_tokens: Some(2048),
        };
        assert_eq!(read(text).unwrap(), defaults);
        assert_eq!(read("{}").unwrap(), GenerationDefaults::default());
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join(FILE), text).unwrap();
        assert_eq!(GenerationDefaults::from_file(folder.path()).unwrap(), defaults);
        assert_eq!(read(r#"{"top_k": -1}"#).unwrap().top_k, Some(0));
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (text, want) in [
            ("[1]", "want an object"),
            ("{", "EOF"),
            (r#"{"temperature": "hot"}"#, "temperature"),
            (r#"{"temperature": -1}"#, "temperature"),
            (r#"{"temperature": 1e300}"#, "temperature"),
            (r#"{"top_p": 0}"#, "top_p"),
            (r#"{"min_p": 1.5}"#, "min_p"),
            (r#"{"repetition_penalty": 0}"#, "repetition_penalty"),
            (r#"{"max_new_tokens": 0}"#, "max_new_tokens"),
        ] {
            let error = read(text).unwrap_err().to_string();
            assert!(error.contains(want) && error.contains(FILE), "{text}: {error}");
        }
    }
}
