//! Fields that say how a chat is rendered.

use serde_json::{Map, Value};

use super::{
    FrontendState,
    error::ApiError,
    fields::Fields,
    prompt::{Ending, Rendering},
};

/// What `reasoning_effort` may say.
const EFFORTS: &[&str] = &["none", "minimal", "low", "medium", "high", "xhigh"];

impl Rendering {
    /// Of these messages as they are, with the beginning of an answer behind them.
    pub fn plain(messages: Vec<Value>) -> Self {
        Self { messages, ending: Ending::GenerationPrompt, variables: Map::new(), tools: None, template: None }
    }

    /// Takes `add_generation_prompt`, `continue_final_message`, `chat_template`, `chat_template_kwargs`, `documents` and
    /// `reasoning_effort`.
    pub fn take(fields: &mut Fields, messages: Vec<Value>, state: &FrontendState) -> Result<Self, ApiError> {
        let ending = Ending::take(fields)?;
        let variables = fields.take::<Fields>("chat_template_kwargs")?.map(Fields::into_entries).unwrap_or_default();
        let template = fields.take::<String>("chat_template")?;
        let mut rendering = Self { messages, ending, variables, tools: None, template };
        if let Some(documents) = fields.take::<Vec<Value>>("documents")?.filter(|documents| !documents.is_empty()) {
            if !rendering.reads("documents", state) {
                return Err(unread("documents"));
            }
            rendering.variables.insert("documents".to_owned(), documents.into());
        }
        if let Some(effort) = fields.take::<String>("reasoning_effort")? {
            rendering.set_effort("reasoning_effort", &effort, state)?;
        }
        Ok(rendering)
    }

    /// Asks for as much thought as `field` says; an error if the template knows no such thing. Templates that can only be
    /// told whether to think are told that.
    pub fn set_effort(&mut self, field: &str, effort: &str, state: &FrontendState) -> Result<(), ApiError> {
        if !EFFORTS.contains(&effort) {
            return Err(ApiError::invalid(field, format!("must be one of {}", EFFORTS.join(", "))));
        }
        if self.reads("reasoning_effort", state) {
            self.variables.insert("reasoning_effort".to_owned(), effort.into());
        } else if self.reads("enable_thinking", state) {
            self.variables.insert("enable_thinking".to_owned(), (effort != "none").into());
        } else if effort != "none" {
            return Err(unread(field));
        }
        Ok(())
    }

    /// Whether the template has a variable of this name, or at least speaks of it.
    pub fn reads(&self, variable: &str, state: &FrontendState) -> bool {
        match (&self.template, &state.model.chat_template) {
            (Some(template), _) => template.contains(variable),
            (None, Some(template)) => template.source().contains(variable),
            (None, None) => false,
        }
    }
}

fn unread(field: &str) -> ApiError {
    ApiError::invalid(field, "means nothing to the model's chat template: leave it out")
}
