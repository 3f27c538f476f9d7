//! A request as the scheduler takes it: parsed, tokenized and checked. Frontends make it; nothing after them validates again.

use std::time::{Duration, Instant};

use phalanx_cluster::{id::TokenId, seal::Seal};
use phalanx_proto::v1::{SamplingParams, TokenScore};

/// Work for the scheduler. Every limit has been checked against the served model.
#[derive(Debug, Clone)]
pub struct Request {
    /// Name of the request in logs and answers; unique.
    pub id: String,
    /// Prompt tokens, at least one, fewer than the model's context.
    pub prompt: Vec<TokenId>,
    /// Independent choices, at least 1. Choice i draws with [`Request::seed_of`].
    pub n: u32,
    /// How tokens are chosen. `seed` is choice 0's; `suppressed_token_ids` is filled in by the scheduler from the stop ids.
    pub sampling: SamplingParams,
    /// Most tokens per choice, at least 1 unless `prompt_logprobs` alone is asked for; prompt and output fit the context.
    pub max_tokens: u32,
    /// Whether `max_tokens` is only the rest of the context because the client asked for no number: fewer will do where
    /// KV memory is smaller than the context.
    pub is_open_ended: bool,
    /// What ends a choice before `max_tokens`.
    pub stop: StopConditions,
    /// When to give up; `None` is never.
    pub deadline: Option<Instant>,
    /// Lower goes first, equal ones in order of arrival.
    pub priority: i32,
    /// With what its tokens begin for the prefix cache: it shares with requests that begin with the same, which a salt changes.
    pub cache_root: Seal,
    /// What an earlier life of the request has emitted, per choice from the first on; choices without an entry, or with an
    /// empty one, begin afresh. These tokens are told again, as if they had just been sampled, and the choice goes on
    /// behind them.
    pub resume: Vec<ResumedChoice>,
}

/// Output of a choice in an earlier life of its request.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct ResumedChoice {
    /// In order from the first.
    pub tokens: Vec<TokenId>,
    /// Of each token, if the request asks for scores; else empty.
    pub scores: Vec<TokenScore>,
}

impl Request {
    /// Seed of choice `index`: choice 0 has the request's own, so that `n` does not change the first choice.
    pub fn seed_of(&self, index: u32) -> u64 {
        // Odd multiplier of SplitMix64 (Steele et al., 2014): distinct for distinct indices.
        self.sampling.seed.wrapping_add(u64::from(index).wrapping_mul(0x9e37_79b9_7f4a_7c15))
    }
}

/// What ends a choice.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct StopConditions {
    /// Strings that end the output wherever they appear in its text, across token borders too.
    pub strings: Vec<String>,
    /// Token ids that end the output.
    pub token_ids: Vec<TokenId>,
    /// Whether the model's end-of-sequence ids are ordinary tokens.
    pub ignore_eos: bool,
    /// Whether the matched stop string stays in the text.
    pub include_in_output: bool,
    /// Whether special tokens are left out of the text.
    pub skip_special_tokens: bool,
    /// Special tokens that stay in it all the same.
    pub shown_tokens: Vec<TokenId>,
}

/// What a request's stream carries, in order: `PromptScored` (if asked for), then `Output`s of all choices as they come,
/// then exactly one of `Finished` and `Failed`.
#[derive(Debug, Clone, PartialEq)]
pub enum RequestEvent {
    /// Scores of the prompt's tokens from the second on.
    PromptScored(Vec<TokenScore>),
    /// New tokens and text of a choice.
    Output(Output),
    /// All choices are finished.
    Finished(Usage),
    /// The request ended without an answer.
    Failed(RequestError),
}

/// New tokens and text of one choice.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Output {
    /// Which choice.
    pub index: u32,
    /// New text: whole UTF-8, never the beginning of a stop string. May lag behind the tokens.
    pub text: String,
    /// New tokens.
    pub token_ids: Vec<TokenId>,
    /// Scores of the new tokens, if asked for.
    pub scores: Vec<TokenScore>,
    /// Set on the choice's last output.
    pub finish: Option<Finish>,
}

/// Why a choice ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Finish {
    /// End of sequence.
    EndOfSequence,
    /// A stop token of the request.
    StopToken(TokenId),
    /// A stop string of the request.
    StopString(String),
    /// `max_tokens`, the context or (of open-ended requests) KV memory is reached.
    Length,
    /// The server's guard or moderation lets no more of it through. Schedulers know nothing of it.
    ContentFilter,
}

/// Tokens that a request cost.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Usage {
    /// Prompt tokens, counted once whatever `n`.
    pub prompt_tokens: u32,
    /// Tokens generated in all choices.
    pub completion_tokens: u32,
    /// Prompt tokens of choice 0 whose KV rows came from the prefix cache.
    pub cached_tokens: u32,
}

/// Why a request ended without an answer.
#[derive(Debug, Clone, thiserror::Error, PartialEq, Eq)]
pub enum RequestError {
    /// The queue is full.
    #[error("the server is busy: {waiting} {of} wait, the limit is {limit}: retry in {} s", retry_after.as_secs())]
    Overloaded {
        /// How much waits.
        waiting: usize,
        /// Most that may wait.
        limit: usize,
        /// What is counted.
        of: Queued,
        /// When it is worth to try again, in whole seconds, at least one.
        retry_after: Duration,
    },
    /// The deadline passed.
    #[error("the request's deadline passed")]
    DeadlineExceeded,
    /// The request can never run.
    #[error("the request needs {need} KV blocks, the server has {have}: shorten the prompt or raise --kv-cache-memory")]
    TooLarge {
        /// Blocks of prompt and output.
        need: usize,
        /// Blocks there are.
        have: usize,
    },
    /// The cluster can't serve and won't soon.
    #[error("no shards are serving: {0}")]
    Unavailable(String),
    /// Shards were lost again and again while they computed this request.
    #[error("shards were lost {losses} times in a row while they computed this request: it is not tried again")]
    Poison {
        /// Losses without a token between them.
        losses: u32,
    },
    /// The key under which it ran was revoked.
    #[error("the API key of this request was revoked")]
    Revoked,
    /// The client does not read its answer.
    #[error("more than {limit} bytes of the answer were left unread")]
    Unread {
        /// Most bytes that may be left unread.
        limit: usize,
    },
    /// The output can't follow the request's grammar any further.
    #[error("'{field}': {reason}")]
    Grammar {
        /// The field that the grammar came in.
        field: String,
        /// Why not.
        reason: String,
    },
    /// The moderation webhook has not said whether it may be told.
    #[error("the moderation of this server does not answer: try again later")]
    Unmoderated,
    /// A fault of ours.
    #[error("internal error: {0}")]
    Internal(String),
}

/// What a bound of the queue counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Queued {
    /// Requests.
    Requests,
    /// Prompt tokens.
    PromptTokens,
}

impl std::fmt::Display for Queued {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Requests => "requests",
            Self::PromptTokens => "prompt tokens",
        })
    }
}
