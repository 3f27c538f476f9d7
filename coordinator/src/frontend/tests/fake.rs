//! A scheduler with a script, a small real tokenizer, and a client.

use std::{
    path::Path,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
};

use axum::{
    Router,
    body::{Body, to_bytes},
};
use http::{HeaderMap, Request as HttpRequest, StatusCode};
use phalanx_cluster::{chat_template::ChatTemplate, id::TokenId, tokenizer::Tokenizer};
use phalanx_proto::v1::{TokenScore, TopToken};
use serde_json::Value;
use tokio::sync::Notify;
use tower::ServiceExt;

use crate::{
    admin::{self, http::AdminHttp, testing::FakeControl},
    frontend::{FrontendState, Limits, door, http_router, prometheus},
    request::{Finish, Output, Request, RequestError, RequestEvent, Usage},
    scheduler::{
        handle::{CancelOnDrop, Readiness, RequestStream, Submit},
        outbox::{self, Outbox},
    },
    security::{Security, keys::KeyRecord},
    served_model::ServedModel,
};

/// Context of the served model, in tokens.
pub const CONTEXT: usize = 64;

type Script = dyn Fn(&Request) -> Result<Vec<RequestEvent>, RequestError> + Send + Sync;

/// Answers each request with the script's events. A stream whose events don't end stays open.
pub struct Fake {
    script: Box<Script>,
    pub seen: Mutex<Vec<Request>>,
    pub n_cancelled: Arc<AtomicUsize>,
    pub cancelled: Arc<Notify>,
    pub readiness: Mutex<Readiness>,
    open: Mutex<Vec<Outbox>>,
}

impl Submit for Fake {
    fn submit(&self, request: Request) -> Result<RequestStream, RequestError> {
        let script = (self.script)(&request)?;
        self.seen.lock().unwrap().push(request);
        let (sender, events) = outbox::channel();
        let is_over = matches!(script.last(), Some(RequestEvent::Finished(_) | RequestEvent::Failed(_)));
        for event in script {
            sender.send(event);
        }
        if !is_over {
            self.open.lock().unwrap().push(sender);
        }
        let (n_cancelled, cancelled) = (Arc::clone(&self.n_cancelled), Arc::clone(&self.cancelled));
        let cancel = move || {
            n_cancelled.fetch_add(1, Ordering::SeqCst);
            cancelled.notify_one();
        };
        Ok(RequestStream { events, _cancel: CancelOnDrop(Some(Box::new(cancel))) })
    }

    fn readiness(&self) -> Readiness {
        self.readiness.lock().unwrap().clone()
    }
}

/// The endpoints over a fake.
pub struct Server {
    pub fake: Arc<Fake>,
    pub state: FrontendState,
    pub tokenizer: Tokenizer,
    pub router: Router,
}

/// An HTTP answer.
pub struct Answer {
    pub status: StatusCode,
    pub headers: HeaderMap,
    pub body: String,
}

impl Answer {
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|e| panic!("{e}: {}", self.body))
    }

    /// Events of a stream; the last must be `[DONE]`, which is left out.
    pub fn events(&self) -> Vec<Value> {
        let mut data: Vec<&str> =
            self.body.split_terminator("\n\n").map(|e| e.strip_prefix("data: ").unwrap()).collect();
        assert_eq!(data.pop(), Some("[DONE]"), "{}", self.body);
        data.into_iter().map(|d| serde_json::from_str(d).unwrap()).collect()
    }

    /// Events with their names, which may be missing.
    pub fn named_events(&self) -> Vec<(String, Value)> {
        let event = |event: &str| {
            let mut name = "";
            let mut data = "";
            for line in event.lines() {
                match line.split_once(": ") {
                    Some(("event", value)) => name = value,
                    Some(("data", value)) => data = value,
                    other => panic!("{other:?} in {event}"),
                }
            }
            (name.to_owned(), serde_json::from_str(data).unwrap_or_else(|e| panic!("{e}: {event}")))
        };
        self.body.split_terminator("\n\n").map(event).collect()
    }

    /// A JSON value per line.
    pub fn lines(&self) -> Vec<Value> {
        self.body.lines().map(|line| serde_json::from_str(line).unwrap_or_else(|e| panic!("{e}: {line}"))).collect()
    }
}

pub fn folder() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/golden/arch-tokenizer"))
}

impl Server {
    /// With a script per request.
    pub fn with(script: impl Fn(&Request) -> Result<Vec<RequestEvent>, RequestError> + Send + Sync + 'static) -> Self {
        Self::limited(script, Limits::default())
    }

    pub fn limited(
        script: impl Fn(&Request) -> Result<Vec<RequestEvent>, RequestError> + Send + Sync + 'static,
        limits: Limits,
    ) -> Self {
        let tokenizer = Tokenizer::from_folder(folder()).unwrap();
        let template = ChatTemplate::from_folder(folder(), tokenizer.special_tokens()).unwrap();
        let fake = Arc::new(Fake {
            script: Box::new(script),
            seen: Mutex::default(),
            n_cancelled: Arc::default(),
            cancelled: Arc::default(),
            readiness: Mutex::new(Readiness::Serving),
            open: Mutex::default(),
        });
        let model = ServedModel {
            names: vec!["tiny".to_owned(), "org/tiny".to_owned()],
            max_model_len: CONTEXT,
            vocab: tokenizer.vocab_size(),
            tokenizer: Arc::new(tokenizer.clone()),
            chat_template: Some(Arc::new(template)),
            eos: tokenizer.eos_ids().to_vec(),
            created: 1_700_000_000,
            facts: crate::model_facts::ModelFacts {
                architecture: "llama".to_owned(),
                format: "gguf",
                identity: "ab".repeat(32),
                bytes: 1 << 20,
                n_weights: 1_500_000,
                weight_type: "Q4_0".to_owned(),
            },
            fingerprint: "0.1.0-abababababab".to_owned(),
            defaults: phalanx_cluster::checkpoint::generation::GenerationDefaults::default(),
        };
        let metrics = prometheus::recorder().unwrap().build_recorder().handle();
        let state = FrontendState::new(Arc::clone(&fake) as Arc<dyn Submit>, model, limits, metrics);
        Self { fake, router: http_router(state.clone()), state, tokenizer }
    }

    /// Every choice says `text`, whatever is asked.
    pub fn saying(text: &'static str) -> Self {
        let tokenizer = Tokenizer::from_folder(folder()).unwrap();
        Self::with(move |request| Ok(reply(&tokenizer, request, text, &Finish::EndOfSequence)))
    }

    /// The same with another chat template, and a context that tools fit in.
    pub fn with_template(self, template: &str) -> Self {
        let mut model = ServedModel::clone(&self.state.model);
        let template = ChatTemplate::new(template, self.tokenizer.special_tokens()).unwrap();
        (model.chat_template, model.max_model_len) = (Some(Arc::new(template)), 1 << 16);
        let state = FrontendState { model: Arc::new(model), ..self.state };
        Self { router: http_router(state.clone()), state, ..self }
    }

    /// The same behind a door that these keys open.
    pub fn with_keys(self, records: Vec<KeyRecord>) -> (Self, Arc<Security>) {
        let security = Security::with_keys(records);
        (self.behind(Arc::clone(&security)), security)
    }

    /// The same behind a door, and with endpoints for operators.
    pub fn behind(self, security: Arc<Security>) -> Self {
        let state = self.state.with_security(Arc::clone(&security));
        let router = admin::http::router(Arc::new(FakeControl), AdminHttp::All);
        let router = door::before(router.fallback_service(http_router(state.clone())), security);
        Self { router, state, ..self }
    }

    pub async fn send(&self, request: HttpRequest<Body>) -> Answer {
        let response = self.router.clone().oneshot(request).await.unwrap();
        let (parts, body) = response.into_parts();
        let body = to_bytes(body, usize::MAX).await.unwrap();
        Answer { status: parts.status, headers: parts.headers, body: String::from_utf8(body.to_vec()).unwrap() }
    }

    pub async fn get(&self, path: &str) -> Answer {
        self.send(HttpRequest::get(path).body(Body::empty()).unwrap()).await
    }

    pub async fn post_raw(&self, path: &str, body: impl Into<Body>) -> Answer {
        self.send(post(path, body)).await
    }

    pub async fn post(&self, path: &str, body: &Value) -> Answer {
        self.post_raw(path, body.to_string()).await
    }

    /// The scheduler goes on: all streams that are open get an event.
    pub fn tell(&self, event: &RequestEvent) {
        let open = self.fake.open.lock().unwrap();
        for sender in open.iter() {
            // Who has been cancelled hears nothing.
            let _gone = sender.send(event.clone());
        }
    }

    /// Requests that the scheduler got.
    pub fn n_seen(&self) -> usize {
        self.fake.seen.lock().unwrap().len()
    }

    /// What the scheduler got last.
    pub fn last_request(&self) -> Request {
        self.fake.seen.lock().unwrap().last().unwrap().clone()
    }

    pub fn n_cancelled(&self) -> usize {
        self.fake.n_cancelled.load(Ordering::SeqCst)
    }
}

pub fn post(path: &str, body: impl Into<Body>) -> HttpRequest<Body> {
    HttpRequest::post(path).header("content-type", "application/json").body(body.into()).unwrap()
}

/// A score with as many alternatives as asked for: ids from 10 on.
fn score(token_id: TokenId, n_top: u32) -> TokenScore {
    let top = (0..n_top).map(|i| TopToken { token_id: 10 + i, logprob: -0.5 - i as f32 }).collect();
    TokenScore { token_id, logprob: -1.25, rank: 3, top }
}

/// A scheduler's answer in which each choice says `text`, token by token.
pub fn reply(tokenizer: &Tokenizer, request: &Request, text: &str, finish: &Finish) -> Vec<RequestEvent> {
    let mut events = Vec::new();
    if let Some(n_top) = request.sampling.prompt_logprobs {
        events.push(RequestEvent::PromptScored(request.prompt[1..].iter().map(|id| score(*id, n_top)).collect()));
    }
    let ids = tokenizer.encode(text, false).unwrap();
    let ids = &ids[..ids.len().min(request.max_tokens as usize)];
    for index in 0..request.n {
        let mut decoder = tokenizer.stream(request.stop.skip_special_tokens);
        for id in ids {
            events.push(RequestEvent::Output(Output {
                index,
                text: decoder.push(*id).unwrap_or_default(),
                token_ids: vec![*id],
                scores: request.sampling.logprobs.map(|n_top| score(*id, n_top)).into_iter().collect(),
                finish: None,
            }));
        }
        let finish = Some(finish.clone());
        let text = decoder.finish().unwrap_or_default();
        events.push(RequestEvent::Output(Output { index, text, finish, ..Output::default() }));
    }
    events.push(RequestEvent::Finished(Usage {
        prompt_tokens: request.prompt.len() as u32,
        completion_tokens: ids.len() as u32 * request.n,
        cached_tokens: 2,
    }));
    events
}
