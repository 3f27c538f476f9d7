//! Which format calls and thoughts have: as the server's owner says, or as the model's files do.

use super::{
    FORMATS, Format,
    thoughts::{THOUGHTS, Thoughts},
};

/// What the options say.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Parsers {
    /// Of calls.
    tools: Named,
    /// Of thoughts.
    thoughts: Named,
}

/// A name as it was given.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
enum Named {
    #[default]
    Auto,
    None,
    Name(String),
}

impl Named {
    fn of(name: Option<String>) -> Self {
        match name.as_deref() {
            None | Some("auto") => Self::Auto,
            Some("none") => Self::None,
            Some(name) => Self::Name(name.to_owned()),
        }
    }

    fn as_str(&self) -> &str {
        match self {
            Self::Auto => "auto",
            Self::None => "none",
            Self::Name(name) => name,
        }
    }
}

/// A name that is none.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("want auto, none or one of {known}")]
pub struct UnknownParser {
    /// The option.
    pub option: &'static str,
    /// As it was given.
    pub value: String,
    known: String,
}

/// How thoughts are told from the rest.
#[derive(Clone, Copy)]
pub enum ThoughtForm {
    /// By marks of their own.
    Marked(&'static Thoughts),
    /// By the format that calls have too.
    Of(&'static dyn Format),
}

fn format_named(name: &str) -> Option<&'static dyn Format> {
    FORMATS.iter().copied().find(|format| format.names().contains(&name))
}

fn thoughts_named(name: &str) -> Option<ThoughtForm> {
    let marked = THOUGHTS.iter().copied().find(|form| form.names.contains(&name)).map(ThoughtForm::Marked);
    let of_format = || {
        // vLLM and SGLang don't agree on a name.
        let name = if name == "openai_gptoss" || name == "gptoss" { "openai" } else { name };
        format_named(name).filter(|format| format.finds_thoughts()).map(ThoughtForm::Of)
    };
    marked.or_else(of_format)
}

impl Parsers {
    /// From the values of `--tool-call-parser` and `--reasoning-parser`.
    ///
    /// # Errors
    /// If one of them is no name.
    pub fn named(tools: Option<String>, thoughts: Option<String>) -> Result<Self, UnknownParser> {
        let parsers = Self { tools: Named::of(tools), thoughts: Named::of(thoughts) };
        let unknown = |option, value: &str, names: Vec<&str>| {
            Err(UnknownParser { option, value: value.to_owned(), known: names.join(", ") })
        };
        if let Named::Name(name) = &parsers.tools
            && format_named(name).is_none()
        {
            let names = FORMATS.iter().flat_map(|format| format.names()).copied().collect();
            return unknown("tool-call-parser", name, names);
        }
        if let Named::Name(name) = &parsers.thoughts
            && thoughts_named(name).is_none()
        {
            let of_formats = FORMATS.iter().filter(|format| format.finds_thoughts()).flat_map(|format| format.names());
            let names = THOUGHTS.iter().flat_map(|form| form.names).chain(of_formats).copied().collect();
            return unknown("reasoning-parser", name, names);
        }
        Ok(parsers)
    }

    /// As options: those that are not the default.
    pub fn to_options(&self) -> (Option<String>, Option<String>) {
        let option = |named: &Named| (*named != Named::Auto).then(|| named.as_str().to_owned());
        (option(&self.tools), option(&self.thoughts))
    }

    /// Whether calls are not to be looked for.
    pub fn reads_no_calls(&self) -> bool {
        self.tools == Named::None
    }

    /// The format of calls of a model with this template, of this family.
    pub fn format(&self, template: &str, family: &str) -> Option<&'static dyn Format> {
        match &self.tools {
            Named::None => None,
            Named::Name(name) => format_named(name),
            Named::Auto => {
                let by_template = FORMATS.iter().find(|format| format.is_that_of(template));
                by_template.or_else(|| FORMATS.iter().find(|format| format.families().contains(&family))).copied()
            }
        }
    }

    /// How a model with this template marks thoughts, if it does.
    pub fn thoughts(&self, template: &str) -> Option<ThoughtForm> {
        match &self.thoughts {
            Named::None => None,
            Named::Name(name) => thoughts_named(name),
            Named::Auto => {
                let of_format = FORMATS.iter().copied().find(|f| f.finds_thoughts() && f.is_that_of(template));
                let marked = || THOUGHTS.iter().copied().find(|form| (form.is_that_of)(template));
                of_format.map(ThoughtForm::Of).or_else(|| marked().map(ThoughtForm::Marked))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_checked_and_repeated() {
        assert_eq!(Parsers::named(None, None).unwrap(), Parsers::default());
        assert_eq!(Parsers::named(Some("auto".to_owned()), None).unwrap().to_options(), (None, None));
        let named = Parsers::named(Some("hermes".to_owned()), Some("gptoss".to_owned())).unwrap();
        assert_eq!(named.to_options(), (Some("hermes".to_owned()), Some("gptoss".to_owned())));
        assert!(Parsers::named(Some("none".to_owned()), None).unwrap().reads_no_calls());
        let error = Parsers::named(Some("herpes".to_owned()), None).unwrap_err();
        assert!(error.option == "tool-call-parser" && error.to_string().contains("hermes"), "{error}");
        let error = Parsers::named(None, Some("hermes".to_owned())).unwrap_err();
        assert!(error.option == "reasoning-parser" && error.to_string().contains("deepseek_r1"), "{error}");
    }

    #[test]
    fn templates_tell_the_format() {
        let parsers = Parsers::default();
        let name = |template: &str, family: &str| parsers.format(template, family).map(|format| format.names()[0]);
        for (template, family, want) in [
            ("{{ tools }} within <tool_call></tool_call> XML tags", "qwen2", Some("hermes")),
            ("<|tool_call|>", "granite", Some("granite")),
            ("[TOOL_CALLS]", "llama", Some("mistral")),
            ("<|python_tag|>", "llama", Some("llama3_json")),
            ("should use the format [func_name1(params_name1=params_value1)]", "llama", Some("pythonic")),
            ("<|channel|>", "gpt-oss", Some("openai")),
            ("<｜tool▁calls▁begin｜>", "deepseek2", Some("deepseek_v3")),
            ("<tool_call>\n<function=example_function_name>", "qwen3", Some("qwen3_coder")),
            ("<tool_call>{name}\n<arg_key>{key}</arg_key>", "glm4_moe", Some("glm45")),
            ("<|tool_calls_section_begin|>", "kimi_k2", Some("kimi_k2")),
            ("{{ tools }}", "qwen2", Some("hermes")),
            ("{{ tools }}", "gemma3", None),
        ] {
            assert_eq!(name(template, family), want, "{template}");
        }
        let form = |template: &str| {
            parsers.thoughts(template).map(|form| match form {
                ThoughtForm::Marked(form) => form.names[0],
                ThoughtForm::Of(format) => format.names()[0],
            })
        };
        assert_eq!(form("plain"), None);
        assert_eq!(form("split('</think>')"), Some("qwen3"));
        assert_eq!(form("<｜Assistant｜> </think>"), Some("deepseek_r1"));
        assert_eq!(form("<|channel|>"), Some("openai"));
    }

    #[test]
    fn no_name_is_two_formats() {
        for names in [
            FORMATS.iter().flat_map(|format| format.names()).collect::<Vec<_>>(),
            THOUGHTS.iter().flat_map(|form| form.names).collect(),
        ] {
            let mut unique = names.clone();
            unique.sort();
            unique.dedup();
            assert_eq!(unique.len(), names.len());
        }
    }
}
