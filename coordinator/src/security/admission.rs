//! What a request of a key holds while it runs.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Instant,
};

use super::{
    Security,
    keys::Principal,
    limits::{Need, Refused, Reservation},
    note,
};
use crate::request::Request;

/// A place among the requests that a key may have running, and tokens of its minute. Whoever reads what the scheduler says
/// of the request has a share; with the last one it ends, and what it has not taken is given back.
pub struct Admission {
    security: Arc<Security>,
    principal: Arc<Principal>,
    reservation: Reservation,
    used: AtomicU64,
}

/// Why a request can't run under its key.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NotAdmitted {
    /// It has used what it may.
    #[error(transparent)]
    Limit(#[from] Refused),
    /// One prompt is too long.
    #[error("the prompt has {got} tokens, and this key may send {limit}")]
    Prompt {
        /// Of the prompt.
        got: usize,
        /// Of the key.
        limit: u32,
    },
    /// A choice may become too long.
    #[error("the request asks for {got} tokens, and this key may ask for {limit}")]
    Output {
        /// As asked for.
        got: u32,
        /// Of the key.
        limit: u32,
    },
}

impl Security {
    /// Lets requests run that belong together. Those that name no length are held to the key's.
    ///
    /// # Errors
    /// If a bound of the key is too narrow for them.
    pub fn admit(
        self: &Arc<Self>,
        principal: &Arc<Principal>,
        requests: &mut [Request],
    ) -> Result<Admission, NotAdmitted> {
        let limits = &principal.limits;
        let mut need = Need { prompt: 0, output: 0, choices: 0, is_open_ended: true };
        for request in requests {
            let got = request.prompt.len();
            if let Some(limit) = limits.max_prompt_tokens.filter(|limit| got > *limit as usize) {
                return Err(NotAdmitted::Prompt { got, limit });
            }
            if let Some(limit) = limits.max_output_tokens.filter(|limit| request.max_tokens > *limit) {
                if !request.is_open_ended {
                    return Err(NotAdmitted::Output { got: request.max_tokens, limit });
                }
                request.max_tokens = limit;
                request.sampling.min_tokens = request.sampling.min_tokens.min(limit);
            }
            need.prompt += got as u64;
            need.output += u64::from(request.n) * u64::from(request.max_tokens);
            need.choices += u64::from(request.n);
            need.is_open_ended &= request.is_open_ended;
        }
        let reservation = self.limiter().admit(Instant::now(), &principal.name, limits, need).inspect_err(note)?;
        let (security, principal) = (Arc::clone(self), Arc::clone(principal));
        Ok(Admission { security, principal, reservation, used: AtomicU64::new(0) })
    }
}

impl Admission {
    /// Counts tokens that were taken.
    pub fn take(&self, n_tokens: usize) {
        self.used.fetch_add(n_tokens as u64, Ordering::Relaxed);
    }

    /// Ends when the key is revoked.
    pub fn revoked(&self) -> impl Future<Output = ()> + Send + 'static + use<> {
        self.principal.revoked()
    }
}

impl Drop for Admission {
    fn drop(&mut self) {
        let used = self.used.load(Ordering::Relaxed);
        self.security.limiter().finish(Instant::now(), &self.reservation, used);
    }
}
