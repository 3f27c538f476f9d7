//! Answers as text-generation-inference gives them.

use std::sync::Arc;

use axum::{
    Json,
    response::{IntoResponse, Response},
};
use phalanx_cluster::id::TokenId;
use phalanx_proto::v1::TokenScore;
use serde::Serialize;
use serde_json::{Value, json};

use super::FAMILY;
use crate::{
    frontend::{
        family::Family,
        generation::{Collected, Collection},
        logprobs::finite,
        neutral::Delivery,
        reply::Reply,
        sse::{Chunk, Chunks, Payload, json as text_of},
    },
    request::{Finish, Output, Usage},
    served_model::ServedModel,
};

/// How an endpoint answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// With an object.
    Object,
    /// With events.
    Events,
    /// With a list of one object, or with events if the body says so.
    AsAsked,
}

/// What answers contain besides new text.
#[derive(Debug, Clone, Copy)]
pub struct Wants {
    pub delivery: Delivery,
    pub in_list: bool,
    pub details: bool,
    /// The prompt's tokens.
    pub prefill: bool,
    pub n_top: u32,
    /// The text begins with the prompt.
    pub full_text: bool,
}

/// The prompt, as far as the answer repeats it.
pub struct Prompted {
    pub text: String,
    pub ids: Vec<TokenId>,
    pub n_tokens: usize,
}

/// What all parts of an answer share.
pub struct Answer {
    pub model: Arc<ServedModel>,
    pub prompt: Prompted,
    pub wants: Wants,
    /// Whether nothing is told of tokens beside their text: it would tell what is redacted.
    pub hides_tokens: bool,
    /// What its tokens are drawn with, if they are.
    pub seed: Option<u64>,
}

/// Answers to one request.
pub struct TgiReply {
    pub answer: Arc<Answer>,
}

#[derive(Serialize)]
struct Token {
    id: TokenId,
    text: String,
    logprob: Option<f32>,
    special: bool,
}

impl Token {
    /// One of which nothing is told.
    const HIDDEN: Self = Self { id: 0, text: String::new(), logprob: None, special: false };
}

fn finish_reason(finish: Option<&Finish>) -> &'static str {
    match finish {
        Some(Finish::EndOfSequence | Finish::StopToken(_)) => "eos_token",
        Some(Finish::StopString(_)) => "stop_sequence",
        Some(Finish::ContentFilter) => "content_filter",
        Some(Finish::Length) | None => "length",
    }
}

impl Answer {
    fn token(&self, id: TokenId, text: Option<String>, logprob: f32) -> Token {
        let tokenizer = &self.model.tokenizer;
        let special = tokenizer.is_special(id);
        let text = text.unwrap_or_else(|| tokenizer.token_text(id));
        if self.hides_tokens {
            return Token { text, special, ..Token::HIDDEN };
        }
        Token { id, text, logprob: Some(finite(logprob)), special }
    }

    fn scored(&self, score: &TokenScore) -> Token {
        self.token(score.token_id, None, score.logprob)
    }

    fn top(&self, score: &TokenScore) -> Vec<Token> {
        let top = score.top.iter().take(self.wants.n_top as usize);
        top.map(|top| self.token(top.token_id, None, top.logprob)).collect()
    }

    fn full_text(&self, text: &str) -> String {
        format!("{}{text}", self.prompt.text)
    }

    /// Details of a choice. `index` among those that were made of the prompt.
    fn details(&self, choice: &Collection, prompt_scores: &[TokenScore]) -> Value {
        let mut details = json!({
            "finish_reason": finish_reason(choice.finish.as_ref()),
            "generated_tokens": choice.token_ids.len(),
            "seed": self.seed,
            "prefill": self.prefill(prompt_scores),
            "tokens": choice.scores.iter().map(|score| self.scored(score)).collect::<Vec<_>>(),
        });
        if self.wants.n_top > 0 {
            details["top_tokens"] = json!(choice.scores.iter().map(|score| self.top(score)).collect::<Vec<_>>());
        }
        details
    }

    /// The prompt's tokens; the first has no probability.
    fn prefill(&self, scores: &[TokenScore]) -> Vec<Value> {
        let scores = std::iter::once(None).chain(scores.iter().map(Some));
        let token = |(id, score): (&TokenId, Option<&TokenScore>)| {
            let logprob = score.map(|score| finite(score.logprob));
            json!({"id": id, "text": self.model.tokenizer.token_text(*id), "logprob": logprob})
        };
        self.prompt.ids.iter().zip(scores).map(token).collect()
    }
}

impl Reply for TgiReply {
    fn delivery(&self) -> Delivery {
        self.answer.wants.delivery
    }

    fn whole(&self, mut collected: Collected) -> Response {
        let answer = &self.answer;
        let n = collected.choices.len();
        collected.keep_best(n, n);
        let prompt_scores = collected.prompt_scores.into_iter().next().flatten().unwrap_or_default();
        let mut choices = collected.choices.into_iter();
        let best = choices.next().unwrap_or_default();
        let mut object = json!({"generated_text": answer.full_text(&best.text)});
        if answer.wants.details {
            let mut details = answer.details(&best, &prompt_scores);
            if n > 1 {
                let other = |choice: Collection| {
                    let mut sequence = answer.details(&choice, &prompt_scores);
                    sequence["generated_text"] = answer.full_text(&choice.text).into();
                    sequence
                };
                details["best_of_sequences"] = choices.map(other).collect();
            }
            object["details"] = details;
        }
        if answer.wants.in_list { Json(json!([object])).into_response() } else { Json(object).into_response() }
    }

    fn chunks(&self) -> Box<dyn Chunks> {
        Box::new(TokenEvents { answer: Arc::clone(&self.answer), text: String::new(), n_tokens: 0, held: None })
    }

    fn reveals(&self) -> Option<&'static str> {
        let wants = &self.answer.wants;
        let tokens = (wants.details && wants.delivery == Delivery::Whole).then_some("details");
        tokens.or((wants.n_top > 0).then_some("top_n_tokens"))
    }

    fn kept_bytes(&self) -> usize {
        let prompt = &self.answer.prompt;
        size_of::<Answer>() + prompt.text.len() + size_of_val(prompt.ids.as_slice())
    }
}

/// An event per token; the last one has the whole text.
struct TokenEvents {
    answer: Arc<Answer>,
    text: String,
    n_tokens: usize,
    /// The latest token: whether it is the last one is not known before the next output.
    held: Option<(Token, Vec<Token>)>,
}

impl TokenEvents {
    fn event(&self, (token, top): (Token, Vec<Token>), index: usize, finish: Option<&Finish>) -> Chunk {
        let details = finish.filter(|_| self.answer.wants.details).map(|finish| {
            json!({
                "finish_reason": finish_reason(Some(finish)),
                "generated_tokens": self.n_tokens,
                "seed": self.answer.seed,
                "input_length": self.answer.prompt.n_tokens,
            })
        });
        let text = finish.map(|_| self.answer.full_text(&self.text));
        let mut event = json!({"index": index, "token": token});
        if self.answer.wants.n_top > 0 {
            event["top_tokens"] = json!(top);
        }
        event["generated_text"] = json!(text);
        event["details"] = details.unwrap_or_default();
        Chunk::Body(text_of(&event).into())
    }
}

impl Chunks for TokenEvents {
    fn prompt_scored(&mut self, _: usize, _: Vec<TokenScore>) {
        // Not streamed: `decoder_input_details` is refused.
    }

    fn output(&mut self, _: usize, output: Output) -> Vec<Chunk> {
        let mut chunks = Vec::new();
        self.text.push_str(&output.text);
        let n_new = output.scores.len();
        // Text that was waiting for its characters' ends is told with the token that brought it.
        let mut text = Some(output.text);
        for (offset, score) in output.scores.iter().enumerate() {
            if let Some(held) = self.held.take() {
                chunks.push(self.event(held, self.n_tokens, None));
            }
            self.n_tokens += 1;
            let is_last = offset + 1 == n_new;
            let mut token = self.answer.scored(score);
            if !token.special {
                token.text = if is_last { text.take().unwrap_or_default() } else { String::new() };
            }
            self.held = Some((token, self.answer.top(score)));
        }
        if let Some(text) = text.filter(|text| !text.is_empty())
            && let Some((token, _)) = &mut self.held
        {
            if token.special {
                // Special tokens are no part of the text: what is left of it comes before them.
                let rest = Token { id: token.id, text, logprob: token.logprob, special: false };
                chunks.push(self.event((rest, Vec::new()), self.n_tokens, None));
            } else {
                token.text.push_str(&text);
            }
        }
        if let Some(finish) = &output.finish {
            // An answer that is ended here may have no token of its own at its end.
            let held = self.held.take().unwrap_or((Token::HIDDEN, Vec::new()));
            chunks.push(self.event(held, self.n_tokens, Some(finish)));
        }
        chunks
    }

    fn finished(&mut self, _: Usage) -> Option<Payload> {
        None
    }

    fn last(&mut self) -> Option<Payload> {
        None
    }

    fn family(&self) -> &'static Family {
        &FAMILY
    }
}
