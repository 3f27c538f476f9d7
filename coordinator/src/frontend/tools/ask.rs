//! From what a request offers to its prompt, its grammar, and how its answer is read.

use phalanx_cluster::{grammar::Grammar, id::TokenId};

use super::{
    Format,
    grammar::Bounds,
    parsers::ThoughtForm,
    reader::Reading,
    thoughts::{Start, Thoughts},
    toolbox::{Choice, Toolbox},
};
use crate::frontend::{
    FrontendState,
    error::ApiError,
    params::RawParams,
    prompt::{Ending, Rendering},
    structured::Wanted,
};

impl FrontendState {
    /// The prompt of a chat, and how the answer to it is read. Gives the template the tools, and binds the output where that
    /// is asked for. Takes time. `request` is the request's unique name.
    pub(in crate::frontend) fn prompt_with_tools(
        &self,
        rendering: &mut Rendering,
        toolbox: &Toolbox,
        raw: &mut RawParams,
        request: &str,
    ) -> Result<(String, Reading), ApiError> {
        let mut format = self.offer(rendering, toolbox)?;
        let own = rendering.template.clone();
        let template = self.template_of(own.as_deref());
        let prompt = self.render(rendering)?;
        let mut thoughts = None;
        match self.parsers.thoughts(template) {
            Some(ThoughtForm::Marked(form)) => {
                let start = form.start(&prompt, rendering.ending == Ending::GenerationPrompt);
                thoughts = Some((form, start));
            }
            Some(ThoughtForm::Of(found)) => format = format.or(Some(found)),
            None => {}
        }
        self.bind(toolbox, format.filter(|_| toolbox.is_open()), template, &mut thoughts, raw)?;
        if let Some(budget) = raw.thought_budget.take() {
            let limit = budget.limit(thoughts, format, &self.model.tokenizer)?;
            raw.thought_limit = limit.map(|limit| (budget.field, limit));
        }
        raw.shown_tokens = self.shown_tokens(format, thoughts);
        let names = toolbox.names();
        let reading = Reading { request: request.to_owned(), format, names, thoughts, shows_thoughts: true };
        Ok((prompt, reading))
    }

    /// What the model can do, in Ollama's words.
    pub(in crate::frontend) fn capabilities(&self) -> Vec<&'static str> {
        let template = self.template_of(None);
        let calls =
            template.contains("tools") && self.parsers.format(template, &self.model.facts.architecture).is_some();
        let thinks = self.parsers.thoughts(template).is_some();
        let more = [(calls, "tools"), (thinks, "thinking")].into_iter().filter(|(can, _)| *can).map(|(_, word)| word);
        ["completion"].into_iter().chain(more).collect()
    }

    /// Whether thoughts of the model that answers a chat are told apart.
    pub(in crate::frontend) fn tells_thoughts(&self, rendering: &Rendering) -> bool {
        self.parsers.thoughts(self.template_of(rendering.template.as_deref())).is_some()
    }

    /// Whether the model thinks whatever its chat template is told.
    pub(in crate::frontend) fn always_thinks(&self, rendering: &Rendering) -> bool {
        let can_be_told = ["enable_thinking", "reasoning_effort"].iter().any(|name| rendering.reads(name, self));
        !can_be_told && self.tells_thoughts(rendering)
    }

    /// Gives the template the tools. The format of calls, if there are tools.
    pub(in crate::frontend) fn offer(
        &self,
        rendering: &mut Rendering,
        toolbox: &Toolbox,
    ) -> Result<Option<&'static dyn Format>, ApiError> {
        if !toolbox.is_open() {
            return Ok(None);
        }
        let template = self.template_of(rendering.template.as_deref());
        let impossible = |reason: &str| Err(ApiError::invalid("tools", format!("can't be offered: {reason}")));
        if self.parsers.reads_no_calls() {
            return impossible("the server runs with --tool-call-parser none");
        }
        if !template.contains("tools") {
            return impossible("the model's chat template does not speak of tools");
        }
        let Some(format) = self.parsers.format(template, &self.model.facts.architecture) else {
            return impossible(
                "how the model writes calls is not known here; the server can be told: --tool-call-parser",
            );
        };
        rendering.tools = Some(toolbox.shown());
        Ok(Some(format))
    }

    /// The chat template's text: a request's own, or the model's.
    fn template_of<'a>(&'a self, own: Option<&'a str>) -> &'a str {
        let of_model = || self.model.chat_template.as_ref().map_or("", |template| template.source());
        own.unwrap_or_else(of_model)
    }

    /// Makes the grammar of an answer, if it has to have one that knows of calls or thoughts.
    fn bind(
        &self,
        toolbox: &Toolbox,
        format: Option<&dyn Format>,
        template: &str,
        thoughts: &mut Option<(&'static Thoughts, Start)>,
        raw: &mut RawParams,
    ) -> Result<(), ApiError> {
        let is_call_for_sure = format.is_some() && toolbox.choice != Choice::Auto;
        // An answer that is a call has no text that could follow anything.
        let answer = raw.structured.take().filter(|_| !is_call_for_sure);
        let schema = match &answer {
            None if !toolbox.binds() => return Ok(()),
            None => None,
            Some(Wanted { grammar: Grammar::JsonSchema(text), .. }) => Some(text.as_str()),
            Some(other) if format.is_some() => {
                let reason = "can't stand beside tools that may be called; JSON schemas can";
                return Err(ApiError::invalid(&other.field, reason));
            }
            Some(_) => None,
        };
        let is_begun = matches!(thoughts, Some((_, Start::Inside)));
        if let Some(wanted) = &answer
            && format.is_none()
            && !(is_begun && schema.is_some())
        {
            // As it is, from the first token on: nothing is thought before.
            raw.structured = Some(wanted.clone());
            if let Some((_, start)) = thoughts {
                *start = Start::Behind;
            }
            return Ok(());
        }
        let bounds = Bounds {
            format: format.map(|format| (format, template)),
            toolbox,
            thoughts: *thoughts,
            answer: schema,
            tokenizer: &self.model.tokenizer,
        };
        let field = answer.as_ref().map_or("tools", |wanted| &wanted.field).to_owned();
        let grammar = bounds.grammar().map_err(|error| ApiError::invalid(&field, error))?;
        raw.structured = Some(Wanted { field, grammar });
        Ok(())
    }

    /// Control tokens that stand in the text because they mark something.
    fn shown_tokens(&self, format: Option<&dyn Format>, thoughts: Option<(&'static Thoughts, Start)>) -> Vec<TokenId> {
        let tokenizer = &self.model.tokenizer;
        let of_calls = format.into_iter().flat_map(Format::marks);
        let of_thoughts = thoughts.into_iter().flat_map(|(form, _)| form.open.iter().chain(form.close));
        let tokens = of_calls.chain(of_thoughts).filter_map(|mark| tokenizer.token_id(mark));
        tokens.filter(|id| tokenizer.is_special(*id)).collect()
    }
}
