//! Where a request is answered: by this process while it leads, else by the leader.

use axum::{
    Router,
    body::{Body, Bytes},
    response::Response,
};
use http::{HeaderMap, HeaderName, HeaderValue, Method, Request, StatusCode, Uri, header};
use hyper_util::{client::legacy::Client, rt::TokioExecutor};
use phalanx_cluster::error_text::with_causes;
use tower::ServiceExt;

use super::{
    dial::Connector,
    finder::{Finder, Over, Target},
};
use crate::frontend::door::OnBehalf;

/// Set on requests that a coordinator passes on: they are not passed on again.
pub const FORWARDED: &str = "x-phalanx-forwarded";
/// Set on a refusal of such a request: look for the leader elsewhere.
pub const NO_LEADER: &str = "x-phalanx-no-leader";
/// Headers that are about one connection (RFC 9110, 7.6.1), and those that each request gets anew.
static NOT_PASSED_ON: [HeaderName; 10] = [
    header::CONNECTION,
    header::TE,
    header::TRAILER,
    header::TRANSFER_ENCODING,
    header::UPGRADE,
    header::HOST,
    header::CONTENT_LENGTH,
    header::EXPECT,
    HeaderName::from_static("keep-alive"),
    HeaderName::from_static("proxy-connection"),
];

/// A request that can be sent several times.
#[derive(Clone)]
pub struct Ask {
    method: Method,
    path: String,
    /// Sent with it.
    pub headers: HeaderMap,
    body: Bytes,
    /// For whom this process asks itself: another one would not believe it.
    on_behalf: Option<OnBehalf>,
}

impl Ask {
    /// Of a request whose body was read.
    pub fn new(parts: &http::request::Parts, body: Bytes) -> Self {
        let mut headers = parts.headers.clone();
        for name in &NOT_PASSED_ON {
            headers.remove(name);
        }
        let path = parts.uri.path_and_query().map_or("/", |p| p.as_str()).to_owned();
        let on_behalf = parts.extensions.get().cloned();
        Self { method: parts.method.clone(), path, headers, body, on_behalf }
    }

    /// Fails on nothing that an HTTP request had before.
    fn request(&self, at: Option<&str>, body: Body) -> Result<Request<Body>, String> {
        let uri = match at {
            Some(url) => format!("{url}{}", self.path),
            None => self.path.clone(),
        };
        let mut request = Request::new(body);
        *request.method_mut() = self.method.clone();
        *request.uri_mut() = uri.parse::<Uri>().map_err(|e| format!("{uri}: {e}"))?;
        *request.headers_mut() = self.headers.clone();
        request.headers_mut().insert(FORWARDED, HeaderValue::from_static("1"));
        Ok(request)
    }
}

/// An answer, and a future that ends when its server no longer leads.
pub struct Upstream {
    /// What it says.
    pub response: Response,
    /// Whatever the connection looks like, nothing more is to be expected of it then.
    pub over: Over,
}

/// Finds the leader, and asks it.
#[derive(Clone)]
pub struct Upstreams {
    /// Who that is.
    pub finder: Finder<Router>,
    client: Client<Connector, Body>,
}

impl Upstreams {
    /// With connections that are kept.
    pub fn new(finder: Finder<Router>, connector: Connector) -> Self {
        Self { finder, client: Client::builder(TokioExecutor::new()).build(connector) }
    }

    /// Asks whoever leads, once. An error is a reason to ask again: whoever was asked is gone, or leads no more.
    pub async fn ask(&self, ask: &Ask) -> Result<Upstream, String> {
        let (target, over) = self.finder.find().await;
        self.ask_with(target, over, ask, Body::from(ask.body.clone())).await
    }

    /// The same of whoever leads as far as is known, with another body.
    pub async fn ask_with(
        &self,
        target: Target<Router>,
        mut over: Over,
        ask: &Ask,
        body: Body,
    ) -> Result<Upstream, String> {
        let response = tokio::select! {
            biased;
            () = &mut over => return Err("its leadership ended".to_owned()),
            response = self.send(&target, ask, body) => response?,
        };
        if response.status() == StatusCode::SERVICE_UNAVAILABLE && response.headers().contains_key(NO_LEADER) {
            return Err("it does not lead".to_owned());
        }
        Ok(Upstream { response, over })
    }

    async fn send(&self, target: &Target<Router>, ask: &Ask, body: Body) -> Result<Response, String> {
        match target {
            Target::Here(local) => {
                let mut request = ask.request(None, body)?;
                if let Some(on_behalf) = ask.on_behalf.clone() {
                    request.extensions_mut().insert(on_behalf);
                }
                match local.endpoints.clone().oneshot(request).await {
                    Ok(response) => Ok(response),
                    Err(never) => match never {},
                }
            }
            Target::There(leader) => {
                let request = ask.request(Some(&leader.record.http_url()), body)?;
                let response = self.client.request(request).await.map_err(|e| with_causes(&e))?;
                let mut response = response.map(Body::new);
                for name in NOT_PASSED_ON.iter().filter(|n| **n != header::CONTENT_LENGTH) {
                    response.headers_mut().remove(name);
                }
                Ok(response)
            }
        }
    }
}
