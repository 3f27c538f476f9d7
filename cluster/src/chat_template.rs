//! Chat templates: the Jinja text in a model's files that turns messages into a prompt.
//!
//! Templates are written for the Python library transformers, which renders them with Jinja2 in a sandbox; what they
//! rely on there (`trim_blocks`, Python's string methods, `tojson`, `raise_exception`, `strftime_now`, `break` and
//! `continue`) works here. A template is a stranger's program: fuel bounds its running time and its memory.

mod python_json;

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Serde, Value};
use minijinja::{Environment, Error, ErrorKind, State};
use serde_json::{Map, Value as Json};

/// Instructions, and units of 64 bytes made, that one rendering may spend: a fraction of a second and 64 MiB.
/// A conversation of a thousand messages and a megabyte of text takes a tenth of it.
const FUEL: u64 = 1 << 20;
/// Lists in lists in lists are freed by recursion, and fuel pays for 200 000 levels: a rendering has a stack of its own
/// that bears them. Untouched pages of it cost nothing.
const STACK_BYTES: usize = 256 << 20;
/// Nested macro calls: Rust's stack bears these in a thread of 2 MiB.
const MOST_NESTED: usize = 64;
/// A longer template is refused before it is parsed.
const LONGEST_TEMPLATE_BYTES: usize = 1 << 20;
/// A longer prompt could not be tokenized for any model.
const LONGEST_PROMPT_BYTES: usize = 64 << 20;

/// Why there is no prompt.
#[derive(Debug, thiserror::Error)]
pub enum TemplateError {
    /// The model's files have no chat template.
    #[error("model has no chat template: use /v1/completions or pass --chat-template")]
    Missing,
    /// The model has several, none of them a default.
    #[error("model has the chat templates {names}, but no default: pass --chat-template with one of them in a file")]
    NoDefault {
        /// Their names, comma separated.
        names: String,
    },
    /// A file could not be read.
    #[error("cannot read {path}: {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// A file is not the JSON that it should be.
    #[error("{path}: {reason}")]
    Json {
        /// The file.
        path: PathBuf,
        /// What is wrong in it.
        reason: String,
    },
    /// The template is not one.
    #[error("chat template: {reason}")]
    Syntax {
        /// What is wrong, and where.
        reason: String,
    },
    /// The template refuses these messages, by `raise_exception`. The client can mend it.
    #[error("chat template: {message}")]
    Refused {
        /// The template's own words.
        message: String,
    },
    /// The template failed on these messages.
    #[error("chat template: {reason}")]
    Render {
        /// What is wrong, and where.
        reason: String,
    },
    /// The template works too long or makes too much.
    #[error("chat template: more work or text than a rendering may take")]
    Exhausted,
}

impl TemplateError {
    /// Whether other messages could have been rendered: the client's mistake rather than the model's.
    pub fn is_about_messages(&self) -> bool {
        matches!(self, Self::Refused { .. } | Self::Render { .. } | Self::Exhausted)
    }
}

/// A parsed chat template, ready to render.
#[derive(Debug)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    source: String,
    special_tokens: BTreeMap<String, String>,
}

const NAME: &str = "chat_template";

impl ChatTemplate {
    /// Parses a template. `special_tokens` (`bos_token`, `eos_token`, …) become variables of the same names;
    /// [`Tokenizer::special_tokens`](crate::tokenizer::Tokenizer::special_tokens) has them.
    pub fn new(source: &str, special_tokens: &BTreeMap<String, String>) -> Result<Self, TemplateError> {
        Self::with_clock(source, special_tokens, jiff::ZonedDateTime::now)
    }

    /// As [`ChatTemplate::new`], with another clock than the system's for `strftime_now`.
    pub fn with_clock(
        source: &str,
        special_tokens: &BTreeMap<String, String>,
        now: fn() -> jiff::ZonedDateTime,
    ) -> Result<Self, TemplateError> {
        if source.len() > LONGEST_TEMPLATE_BYTES {
            let reason = format!("{} bytes long, at most {LONGEST_TEMPLATE_BYTES} can be", source.len());
            return Err(TemplateError::Syntax { reason });
        }
        let mut environment = Environment::new();
        environment
            .set_syntax(SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build().map_err(unparsed)?);
        environment.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
        environment.set_fuel(Some(FUEL));
        environment.set_recursion_limit(MOST_NESTED);
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_filter("tojson", to_json);
        // Indents by depth, which no fuel pays for: a nested list would be gigabytes.
        environment.remove_filter("pprint");
        environment.add_function("raise_exception", raise_exception);
        environment.add_function("strftime_now", move |format: &str| strftime(&now(), format));
        environment.add_template_owned(NAME, without_generation_tags(source)).map_err(unparsed)?;
        Ok(Self { environment, source: source.to_owned(), special_tokens: special_tokens.clone() })
    }

    /// The template of a GGUF file or of any other place that may have none.
    pub fn from_optional(
        source: Option<&str>,
        special_tokens: &BTreeMap<String, String>,
    ) -> Result<Self, TemplateError> {
        Self::new(source.ok_or(TemplateError::Missing)?, special_tokens)
    }

    /// The template in a file of its own.
    pub fn from_file(path: &Path, special_tokens: &BTreeMap<String, String>) -> Result<Self, TemplateError> {
        let source =
            std::fs::read_to_string(path).map_err(|source| TemplateError::Read { path: path.to_owned(), source })?;
        Self::new(&source, special_tokens)
    }

    /// The template of a Hugging Face model folder: `chat_template.jinja`, else `chat_template.json`, else
    /// `chat_template` in `tokenizer_config.json`; of several named ones, `default`.
    pub fn from_folder(folder: &Path, special_tokens: &BTreeMap<String, String>) -> Result<Self, TemplateError> {
        let file = folder.join("chat_template.jinja");
        if file.exists() {
            return Self::from_file(&file, special_tokens);
        }
        for name in ["chat_template.json", "tokenizer_config.json"] {
            let path = folder.join(name);
            let bytes = match std::fs::read(&path) {
                Ok(bytes) => bytes,
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                Err(source) => return Err(TemplateError::Read { path, source }),
            };
            let config: Json = serde_json::from_slice(&bytes)
                .map_err(|error| TemplateError::Json { path: path.clone(), reason: error.to_string() })?;
            match &config["chat_template"] {
                Json::Null => {}
                Json::String(source) => return Self::new(source, special_tokens),
                Json::Array(named) => return Self::new(default_of(named)?, special_tokens),
                other => {
                    let reason = format!("chat_template is {other}, want a text or a list of named ones");
                    return Err(TemplateError::Json { path, reason });
                }
            }
        }
        Err(TemplateError::Missing)
    }

    /// The template's text.
    pub fn source(&self) -> &str {
        &self.source
    }

    /// The prompt for `messages`, in the form that templates expect (OpenAI's, `content` a text).
    ///
    /// `tools` is the request's list of tools. `add_generation_prompt` begins the assistant's answer. `extra` are further
    /// variables, such as `enable_thinking`; they cannot replace the others.
    pub fn render(
        &self,
        messages: &[Json],
        tools: Option<&Json>,
        add_generation_prompt: bool,
        extra: &Map<String, Json>,
    ) -> Result<String, TemplateError> {
        let mut variables: BTreeMap<&str, Value> = BTreeMap::new();
        variables.extend(self.special_tokens.iter().map(|(name, text)| (name.as_str(), Value::from(text.as_str()))));
        variables.extend(extra.iter().map(|(name, value)| (name.as_str(), Value::from(Serde(value)))));
        variables.insert("messages", Value::from(Serde(messages)));
        variables.insert("tools", tools.map_or(Value::from(()), |tools| Value::from(Serde(tools))));
        variables.entry("documents").or_insert_with(|| Value::from(()));
        variables.insert("add_generation_prompt", Value::from(add_generation_prompt));

        std::thread::scope(|scope| {
            let thread = std::thread::Builder::new().name("chat template".to_owned()).stack_size(STACK_BYTES);
            let rendering = thread.spawn_scoped(scope, || self.render_here(variables)).map_err(|error| {
                TemplateError::Render { reason: format!("no thread of {STACK_BYTES} bytes of stack: {error}") }
            })?;
            rendering.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    fn render_here(&self, variables: BTreeMap<&str, Value>) -> Result<String, TemplateError> {
        let mut prompt = Bounded::default();
        let template = self.environment.get_template(NAME).map_err(|error| render_error(&error, false))?;
        let outcome = template.render_captured_to(Value::from_pairs(variables), &mut prompt).map(|_| ());
        outcome.map_err(|error| render_error(&error, prompt.full))?;
        String::from_utf8(prompt.bytes).map_err(|error| TemplateError::Render { reason: error.to_string() })
    }
}

fn default_of(named: &[Json]) -> Result<&str, TemplateError> {
    let template = |entry: &&Json| entry["name"] == "default" || named.len() == 1;
    named.iter().find(template).and_then(|entry| entry["template"].as_str()).ok_or_else(|| {
        let names: Vec<&str> = named.iter().filter_map(|entry| entry["name"].as_str()).collect();
        TemplateError::NoDefault { names: names.join(", ") }
    })
}

/// The rendered text, up to [`LONGEST_PROMPT_BYTES`].
#[derive(Default)]
struct Bounded {
    bytes: Vec<u8>,
    full: bool,
}

impl io::Write for Bounded {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.bytes.len() + bytes.len() > LONGEST_PROMPT_BYTES {
            self.full = true;
            return Err(io::Error::other("prompt too long"));
        }
        self.bytes.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// What `raise_exception` threw, found again among an error's sources.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Raised(String);

fn raise_exception(message: String) -> Result<Value, Error> {
    Err(Error::new(ErrorKind::InvalidOperation, message.clone()).with_source(Raised(message)))
}

fn render_error(error: &Error, full: bool) -> TemplateError {
    let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(link) = cause {
        if let Some(Raised(message)) = link.downcast_ref() {
            return TemplateError::Refused { message: message.clone() };
        }
        if full || link.downcast_ref::<Error>().is_some_and(|error| error.kind() == ErrorKind::OutOfFuel) {
            return TemplateError::Exhausted;
        }
        cause = link.source();
    }
    TemplateError::Render { reason: describe(error) }
}

fn unparsed(error: Error) -> TemplateError {
    TemplateError::Syntax { reason: describe(&error) }
}

fn describe(error: &Error) -> String {
    let reason =
        error.detail().map_or_else(|| error.kind().to_string(), |detail| format!("{}: {detail}", error.kind()));
    error.line().map_or(reason.clone(), |line| format!("{reason} (line {line})"))
}

fn strftime(now: &jiff::ZonedDateTime, format: &str) -> Result<String, Error> {
    jiff::fmt::strtime::format(format, now)
        .map_err(|error| Error::new(ErrorKind::InvalidOperation, format!("strftime_now({format:?}): {error}")))
}

/// `tojson` as transformers defines it, `json.dumps` with `ensure_ascii=False`.
fn to_json(state: &State, value: Value, arguments: Kwargs) -> Result<String, Error> {
    let separators: Option<(String, String)> = match arguments.get::<Option<Value>>("separators")? {
        Some(pair) if !pair.is_none() => {
            let part = |index| pair.get_item_by_index(index).map(|part| part.to_string());
            Some((part(0)?, part(1)?))
        }
        _ => None,
    };
    let style = python_json::Style {
        indent: match arguments.get::<Option<Value>>("indent")? {
            Some(indent) if !indent.is_none() => Some(usize::try_from(indent)?),
            _ => None,
        },
        separators,
        sort_keys: arguments.get::<Option<bool>>("sort_keys")?.unwrap_or(false),
        ensure_ascii: arguments.get::<Option<bool>>("ensure_ascii")?.unwrap_or(false),
    };
    arguments.assert_all_used()?;
    python_json::dump(state, &value, &style)
}

/// `{% generation %}` marks what training looks at; it means nothing to a rendering, and Jinja does not know it.
/// Blocks that always run take its place, so that whitespace is handled the same.
fn without_generation_tags(source: &str) -> String {
    let mut result = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(begin) = rest.find("{%") {
        let (before, tag) = rest.split_at(begin + 2);
        result.push_str(before);
        rest = tag;
        let Some(end) = tag.find("%}") else { break };
        let inside = &tag[..end];
        let word = inside.trim_start_matches(['-', '+']).trim_end_matches(['-', '+']).trim();
        let replacement = match word {
            "generation" => "if true",
            "endgeneration" => "endif",
            _ => continue,
        };
        result.push_str(&inside.replacen(word, replacement, 1));
        rest = &tag[end..];
    }
    result.push_str(rest);
    result
}

#[cfg(test)]
mod tests;
