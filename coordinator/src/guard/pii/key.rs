//! Secrets: keys of well-known services, tokens, private keys. What they begin with is found; all that belongs to them goes
//! with it, however long it is.

use super::Kind;
use crate::guard::rules::{Absorb, Pattern};

pub(super) const KIND: Kind = Kind { name: "key", mark: "[KEY]", patterns };

/// Beginnings that no other text has.
static BEGINNINGS: &[&str] = &[
    // Keys of this server.
    r"phx_[A-Za-z0-9_-]{20}",
    // OpenAI, Anthropic and others; Stripe.
    r"sk-[A-Za-z]{0,8}-?[A-Za-z0-9_-]{0,32}[0-9][A-Za-z0-9_-]{7}",
    r"[rsp]k_(?:live|test)_[A-Za-z0-9]{16}",
    // GitHub, GitLab, npm, Hugging Face, Slack.
    r"gh[opsur]_[A-Za-z0-9]{20}",
    r"github_pat_[A-Za-z0-9_]{20}",
    r"glpat-[A-Za-z0-9_-]{16}",
    r"npm_[A-Za-z0-9]{20}",
    r"hf_[A-Za-z0-9]{20}",
    r"xox[abeoprs]-[A-Za-z0-9-]{10}",
    // Amazon, Google.
    r"A[KS]IA[A-Z0-9]{16}",
    r"AIza[A-Za-z0-9_-]{35}",
    // A token of JSON (RFC 7519): its head is an object's.
    r"eyJ[A-Za-z0-9_-]{5,512}\.[A-Za-z0-9_-]{5}",
];

fn patterns() -> Vec<Pattern> {
    let mut all: Vec<Pattern> = BEGINNINGS.iter().map(|regex| Pattern::absorbing(*regex, Absorb::Word)).collect();
    all.push(Pattern::absorbing(r"-----BEGIN [A-Z0-9 ]{0,32}PRIVATE KEY(?: BLOCK)?-----", Absorb::Block));
    all
}
