//! What clients send, as far as the operator wants it watched: texts are guarded before they become tokens, prompts are
//! shown to the moderation webhook before they are submitted.

use std::{borrow::Cow, sync::Arc};

use futures::future::try_join_all;

use super::{
    FrontendState,
    error::ApiError,
    guarded::{Asker, Segments, Watch},
    neutral::Delivery,
    observe::Record,
    streams::Prepared,
};
use crate::{
    guard::{
        Direction,
        moderation::{self, Objection},
        transducer::Transducer,
    },
    request::RequestError,
};

impl FrontendState {
    /// The same, which notes in a request's record what it finds.
    #[must_use]
    pub(super) fn noting_in(&self, record: &Record) -> Self {
        Self { tally: Arc::clone(record.tally()), ..self.clone() }
    }

    /// Whether nothing may be told of output tokens: they would tell what is redacted.
    pub(super) fn hides_tokens(&self) -> bool {
        self.security.guard().is_some()
    }

    /// A text as the model may read it. `field` names it in errors. Takes time in proportion to the text.
    pub(super) fn guarded_input<'a>(&self, text: &'a str, field: &str) -> Result<Cow<'a, str>, ApiError> {
        let Some(guard) = self.security.guard() else { return Ok(text.into()) };
        let piece = Transducer::whole(&guard.rules(), text);
        if piece.found.is_empty() {
            return Ok(text.into());
        }
        self.tally.found(Direction::Input, &piece.found);
        match piece.blocked {
            None => Ok(piece.text.into()),
            Some(kind) => {
                self.tally.blocked(Direction::Input, kind);
                Err(ApiError::blocked(field, "has what this server does not let through"))
            }
        }
    }

    /// A text of the client's as an answer repeats it.
    pub(super) fn repeated(&self, text: String) -> String {
        match self.security.guard() {
            None => text,
            Some(guard) => Transducer::whole(&guard.rules(), &text).text,
        }
    }

    /// Refuses a request for tokens where nothing may be told of them.
    pub(super) fn check_hidden(&self, prepared: &Prepared) -> Result<(), ApiError> {
        let asked = match &prepared.reply {
            Some(reply) => reply.reveals(),
            None => prepared.requests.iter().any(|request| request.sampling.logprobs.is_some()).then_some("logprobs"),
        };
        match asked.filter(|_| self.hides_tokens()) {
            None => Ok(()),
            Some(field) => {
                let reason =
                    "is not possible: this server redacts texts (--guard), and tokens would tell what was there";
                Err(ApiError::invalid(field, reason))
            }
        }
    }

    /// Shows prompts to the webhook, if there is one.
    pub(super) async fn moderate(&self, prepared: &Prepared, record: &Record) -> Result<(), ApiError> {
        let Some(service) = self.security.moderation() else { return Ok(()) };
        let asker = asker(record);
        let asked = prepared.requests.iter().enumerate().map(|(index, request)| {
            let text = self.model.tokenizer.decode(&request.prompt, false);
            Arc::clone(service).ask(asker.question(Direction::Input, index, text))
        });
        match try_join_all(asked).await {
            Ok(_) => Ok(()),
            Err(Objection::Unknown) => Err(RequestError::Unmoderated.into()),
            Err(Objection::Refused(reason)) => {
                record.tally().blocked(Direction::Input, moderation::BY);
                let reason = if reason.is_empty() { String::new() } else { format!(": {reason}") };
                Err(ApiError::blocked("prompt", format!("was refused by the moderation of this server{reason}")))
            }
        }
    }

    /// Who looks at a request's answer.
    pub(super) fn watch(&self, prepared: &Prepared, record: &Record) -> Watch {
        let is_whole = prepared.reply.as_ref().is_some_and(|reply| reply.delivery() == Delivery::Whole);
        Watch {
            guard: self.security.guard().cloned(),
            moderation: self.security.moderation().cloned(),
            tally: Arc::clone(record.tally()),
            asker: asker(record),
            segments: if is_whole { Segments::Whole } else { Segments::Growing },
        }
    }
}

fn asker(record: &Record) -> Asker {
    Asker {
        request_id: record.name().to_owned(),
        key: record.principal().map(|principal| principal.name.clone()),
        route: record.endpoint().to_owned(),
    }
}
