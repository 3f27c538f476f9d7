//! From what clients call a prompt to token ids.

use std::borrow::Cow;

use phalanx_cluster::{
    chat_template::{ChatTemplate, TemplateError},
    id::TokenId,
};
use serde_json::{Map, Value};

use super::{
    FrontendState,
    error::ApiError,
    fields::{Fields, FromJson, Integer, kind},
    params::too_long,
};

/// What the model continues.
#[derive(Debug, Clone, PartialEq)]
pub enum Prompt {
    /// A text.
    Text(String),
    /// Token ids, not yet checked.
    Ids(Vec<Integer>),
}

/// `prompt` of a completion: a string, a list of strings, a list of token ids, or a list of such lists.
pub struct Prompts(pub Vec<Prompt>);

impl FromJson for Prompts {
    fn from_json(value: Value, at: &str) -> Result<Self, ApiError> {
        let want = "a string, a list of strings, a list of token ids or a list of such lists";
        match value {
            Value::String(text) => Ok(Self(vec![Prompt::Text(text)])),
            Value::Array(items) => match items.first() {
                None => Err(ApiError::invalid(at, "must not be empty")),
                Some(Value::Number(_)) => Ok(Self(vec![Prompt::Ids(FromJson::from_json(Value::Array(items), at)?)])),
                Some(Value::String(_)) => {
                    let texts = Vec::<String>::from_json(Value::Array(items), at)?;
                    Ok(Self(texts.into_iter().map(Prompt::Text).collect()))
                }
                Some(Value::Array(_)) => {
                    let lists = Vec::<Vec<Integer>>::from_json(Value::Array(items), at)?;
                    Ok(Self(lists.into_iter().map(Prompt::Ids).collect()))
                }
                Some(other) => Err(ApiError::wrong_type(&format!("{at}[0]"), want, kind(other))),
            },
            other => Err(ApiError::wrong_type(at, want, kind(&other))),
        }
    }
}

/// Whether the tokenizer puts around a text what the model wants around every text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SpecialTokens {
    /// Usually a beginning-of-sequence token.
    Add,
    /// Rendered chats have them already.
    Leave,
}

impl FrontendState {
    /// Token ids of a prompt. `field` names it in errors. Takes time in proportion to the text.
    pub(super) fn encode(
        &self,
        prompt: &Prompt,
        special_tokens: SpecialTokens,
        field: &str,
    ) -> Result<Vec<TokenId>, ApiError> {
        match prompt {
            Prompt::Text(text) => self.encode_text(text, special_tokens, field),
            Prompt::Ids(ids) => {
                let n_vocab = self.model.vocab;
                let check = |id: &Integer| {
                    usize::try_from(*id).ok().filter(|id| *id < n_vocab).and_then(|id| TokenId::try_from(id).ok())
                };
                let outside = |id: &Integer| {
                    ApiError::invalid(field, format!("has the token id {id}, but ids are from 0 to {}", n_vocab - 1))
                };
                let ids = ids.iter().map(|id| check(id).ok_or_else(|| outside(id))).collect::<Result<Vec<_>, _>>()?;
                self.guarded_ids(ids, field)
            }
        }
    }

    fn encode_text(&self, text: &str, special_tokens: SpecialTokens, field: &str) -> Result<Vec<TokenId>, ApiError> {
        if text.is_empty() {
            return Err(ApiError::invalid(field, "must not be empty"));
        }
        let context = self.model.max_model_len;
        let least = text.len() / self.longest_token;
        if least > context {
            return Err(too_long(field, context, format!("at least {least}"), "at least 1", "max_tokens"));
        }
        let text = self.guarded_input(text, field)?;
        self.tokens_of(&text, special_tokens, field)
    }

    fn tokens_of(&self, text: &str, special_tokens: SpecialTokens, field: &str) -> Result<Vec<TokenId>, ApiError> {
        let add = special_tokens == SpecialTokens::Add;
        self.model
            .tokenizer
            .encode(text, add)
            .map_err(|error| ApiError::invalid(field, format!("has no tokens: {error}")))
    }

    /// Token ids whose text the model may read. Where something is redacted, those of what is left.
    fn guarded_ids(&self, ids: Vec<TokenId>, field: &str) -> Result<Vec<TokenId>, ApiError> {
        if !self.hides_tokens() {
            return Ok(ids);
        }
        let text = self.model.tokenizer.decode(&ids, false);
        match self.guarded_input(&text, field)? {
            Cow::Borrowed(_) => Ok(ids),
            Cow::Owned(text) => self.tokens_of(&text, SpecialTokens::Leave, field),
        }
    }
}

/// How a chat becomes a text.
#[derive(Debug)]
pub struct Rendering {
    /// In the shape that templates expect.
    pub messages: Vec<Value>,
    /// What the text ends with.
    pub ending: Ending,
    /// Further variables for the template.
    pub variables: Map<String, Value>,
    /// What may be called, in the shape that templates expect.
    pub tools: Option<Value>,
    /// The request's own template; `None` is the model's.
    pub template: Option<String>,
}

/// What a rendered chat ends with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ending {
    /// The beginning of an assistant's message.
    GenerationPrompt,
    /// The end of the last message.
    LastMessage,
    /// The last message's text, without its end: the model goes on writing it.
    OpenMessage,
}

impl Ending {
    /// Takes `add_generation_prompt` and `continue_final_message`.
    pub fn take(fields: &mut Fields) -> Result<Self, ApiError> {
        let adds = fields.take::<bool>("add_generation_prompt")?;
        match (fields.flag("continue_final_message")?, adds) {
            (true, Some(true)) => {
                let reason = "can't be true together with 'add_generation_prompt'";
                Err(ApiError::invalid("continue_final_message", reason))
            }
            (true, _) => Ok(Self::OpenMessage),
            (false, Some(false)) => Ok(Self::LastMessage),
            (false, _) => Ok(Self::GenerationPrompt),
        }
    }
}

impl FrontendState {
    /// A chat as a text. Takes time.
    pub(super) fn render(&self, chat: &Rendering) -> Result<String, ApiError> {
        let own = chat.template.as_ref().map(|source| {
            let special = self.model.tokenizer.special_tokens();
            ChatTemplate::new(source, special)
                .map_err(|error| ApiError::invalid("chat_template", format!("can't be used: {error}")))
        });
        let own = own.transpose()?;
        let Some(template) = own.as_ref().or(self.model.chat_template.as_deref()) else {
            return Err(ApiError::invalid("messages", "can't be used: the model has no chat template"));
        };
        let add_generation_prompt = chat.ending == Ending::GenerationPrompt;
        let messages = match chat.ending {
            Ending::OpenMessage => mark_last_message(&chat.messages)?,
            Ending::GenerationPrompt | Ending::LastMessage => chat.messages.clone(),
        };
        let rendered = template.render(&messages, chat.tools.as_ref(), add_generation_prompt, &chat.variables);
        let rendered = rendered.map_err(|error| match error {
            TemplateError::Refused { .. } | TemplateError::Render { .. } | TemplateError::Exhausted => {
                ApiError::invalid("messages", format!("can't be rendered: {error}"))
            }
            other => ApiError::internal(other),
        })?;
        match chat.ending {
            Ending::OpenMessage => cut_at_mark(rendered),
            Ending::GenerationPrompt | Ending::LastMessage => Ok(rendered),
        }
    }
}

/// Written behind an open last message, to find its end again: the text alone could stand in the template's ending too.
/// A code point that no text uses (Unicode's private use area).
const MARK: char = '\u{e000}';

fn not_open(reason: &str) -> ApiError {
    ApiError::invalid("continue_final_message", reason)
}

/// The messages with [`MARK`] behind the last one's text.
fn mark_last_message(messages: &[Value]) -> Result<Vec<Value>, ApiError> {
    let mut messages = messages.to_vec();
    let last = messages.last_mut().filter(|m| m["role"] == "assistant");
    let content = last.map(|m| &mut m["content"]).filter(|c| c.as_str().is_some_and(|c| !c.trim().is_empty()));
    let content = content.ok_or_else(|| not_open("needs a last message of the role assistant with a text"))?;
    *content = format!("{}{MARK}", content.as_str().unwrap_or_default()).into();
    Ok(messages)
}

/// Cuts off the mark and what the template wrote after it.
fn cut_at_mark(mut rendered: String) -> Result<String, ApiError> {
    let end =
        rendered.rfind(MARK).ok_or_else(|| not_open("is impossible: the chat template changes the last message"))?;
    rendered.truncate(end);
    Ok(rendered)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn prompts_have_four_shapes() {
        let parse = |value| Prompts::from_json(value, "prompt").map(|p| p.0);
        assert_eq!(parse(json!("a")).unwrap(), [Prompt::Text("a".to_owned())]);
        assert_eq!(parse(json!(["a", "b"])).unwrap().len(), 2);
        assert_eq!(parse(json!([1, 2])).unwrap(), [Prompt::Ids(vec![1, 2])]);
        assert_eq!(parse(json!([[1], [2, 3]])).unwrap(), [Prompt::Ids(vec![1]), Prompt::Ids(vec![2, 3])]);
        for wrong in
            [json!(5), json!([]), json!([{}]), json!([1, "a"]), json!(["a", 1]), json!([[1], "a"]), json!([1.5])]
        {
            assert!(parse(wrong.clone()).is_err(), "{wrong}");
        }
    }

    #[test]
    fn the_last_message_stays_open() {
        let open = |last: Value, before: &str, after: &str| {
            let messages = mark_last_message(&[last])?;
            cut_at_mark(format!("{before}{}{after}", messages[0]["content"].as_str().unwrap_or_default()))
        };
        let says = |text: &str| json!({"role": "assistant", "content": text});
        assert_eq!(open(says("one two "), "<a>", "<end>").unwrap(), "<a>one two ");
        // The text stands in the template's ending as well.
        assert_eq!(open(says("<"), "<a>", "<end>").unwrap(), "<a><");
        assert!(cut_at_mark("<a>three<end>".to_owned()).is_err());
        assert!(open(json!({"role": "user", "content": "x"}), "", "").is_err());
        assert!(open(says("  "), "", "").is_err());
    }
}
