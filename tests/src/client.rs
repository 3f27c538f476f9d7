//! A client of the cluster's APIs: gRPC through the generated types, HTTP through a plain client.

use std::io::{BufRead, BufReader};

use anyhow::{Context, Result, bail};
use phalanx_proto::v1::{
    FinishReason, GenerateRequest, TokenIds, TokenScore, Usage, generate_request::Prompt,
    inference_client::InferenceClient,
};
use serde_json::Value;
use tonic::transport::{Channel, Endpoint};

/// One choice of an answer, put together.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Choice {
    /// All text.
    pub text: String,
    /// All tokens.
    pub token_ids: Vec<u32>,
    /// Scores of the tokens, if asked for.
    pub scores: Vec<TokenScore>,
    /// Why it ended.
    pub finish: FinishReason,
}

/// A whole answer.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Answer {
    /// In index order.
    pub choices: Vec<Choice>,
    /// Scores of the prompt from its second token on, if asked for.
    pub prompt_scores: Vec<TokenScore>,
    /// What it cost.
    pub usage: Usage,
}

impl Answer {
    /// The same without what may differ between runs that must agree: how much the prefix cache helped.
    pub fn essence(mut self) -> Self {
        self.usage.cached_tokens = 0;
        self
    }
}

/// A greedy request for these prompt tokens.
pub fn greedy(prompt: &[u32], max_tokens: u32) -> GenerateRequest {
    GenerateRequest {
        prompt: Some(Prompt::TokenIds(TokenIds { ids: prompt.to_vec() })),
        temperature: Some(0.0),
        max_tokens: Some(max_tokens),
        ignore_eos: true,
        ..GenerateRequest::default()
    }
}

/// Calls `Generate` and puts the stream together.
pub async fn generate(grpc: &str, request: GenerateRequest) -> Result<Answer> {
    let channel = Endpoint::from_shared(grpc.to_owned())?.connect().await.context("connect")?;
    generate_over(channel, request).await
}

/// The same over a connection that is there.
pub async fn generate_over(channel: Channel, request: GenerateRequest) -> Result<Answer> {
    let n = request.n.unwrap_or(1) as usize;
    let mut client = InferenceClient::new(channel).max_decoding_message_size(64 << 20);
    let mut stream = client.generate(request).await?.into_inner();
    let mut answer = Answer { choices: vec![Choice::default(); n], ..Answer::default() };
    let mut finished = false;
    while let Some(part) = stream.message().await? {
        if finished {
            bail!("a message after the usage: {part:?}");
        }
        let finish = part.finish_reason();
        let choice = answer.choices.get_mut(part.index as usize).context("choice index out of range")?;
        choice.text.push_str(&part.text);
        choice.token_ids.extend(part.token_ids);
        choice.scores.extend(part.scores);
        if finish != FinishReason::Unspecified {
            choice.finish = finish;
        }
        answer.prompt_scores.extend(part.prompt_scores);
        if let Some(usage) = part.usage {
            answer.usage = usage;
            finished = true;
        }
    }
    if !finished {
        bail!("the stream ended without usage");
    }
    Ok(answer)
}

/// Sends requests at once and waits for all answers, in order.
pub async fn generate_all(grpc: &str, requests: Vec<GenerateRequest>) -> Result<Vec<Answer>> {
    futures::future::try_join_all(requests.into_iter().map(|r| generate(grpc, r))).await
}

/// An HTTP answer: status and body.
#[derive(Debug)]
pub struct HttpAnswer {
    /// Status code.
    pub status: u16,
    /// Body as text.
    pub body: String,
}

impl HttpAnswer {
    /// The body as JSON.
    pub fn json(&self) -> Result<Value> {
        serde_json::from_str(&self.body).with_context(|| format!("status {}, body {:?}", self.status, self.body))
    }
}

fn agent() -> ureq::Agent {
    ureq::Agent::config_builder().http_status_as_error(false).build().into()
}

/// GET.
pub fn get(url: &str) -> Result<HttpAnswer> {
    let mut response = agent().get(url).call()?;
    Ok(HttpAnswer { status: response.status().as_u16(), body: response.body_mut().read_to_string()? })
}

/// POST of any bytes as JSON.
pub fn post_raw(url: &str, body: &[u8]) -> Result<HttpAnswer> {
    let mut response = agent().post(url).header("content-type", "application/json").send(body)?;
    Ok(HttpAnswer { status: response.status().as_u16(), body: response.body_mut().read_to_string()? })
}

/// POST of a JSON value.
pub fn post(url: &str, body: &Value) -> Result<HttpAnswer> {
    post_raw(url, &serde_json::to_vec(body)?)
}

/// POST whose answer is a stream of server-sent events.
pub fn post_stream(url: &str, body: &Value) -> Result<SseStream> {
    let response = agent().post(url).header("content-type", "application/json").send(&serde_json::to_vec(body)?)?;
    let status = response.status().as_u16();
    let mut reader: BufReader<Box<dyn std::io::Read + Send>> =
        BufReader::new(Box::new(response.into_body().into_reader()));
    if status != 200 {
        let mut text = String::new();
        std::io::Read::read_to_string(&mut reader, &mut text)?;
        bail!("status {status}: {text}");
    }
    Ok(SseStream { reader })
}

/// Events of a stream; dropping it closes the connection.
pub struct SseStream {
    reader: BufReader<Box<dyn std::io::Read + Send>>,
}

impl Iterator for SseStream {
    type Item = Result<Value>;

    /// The next event; `None` after `[DONE]`. A stream that ends otherwise is an error.
    fn next(&mut self) -> Option<Self::Item> {
        let mut line = String::new();
        loop {
            line.clear();
            match self.reader.read_line(&mut line) {
                Ok(0) => return Some(Err(anyhow::anyhow!("the stream ended without [DONE]"))),
                Ok(_) => {}
                Err(e) => return Some(Err(e.into())),
            }
            let Some(data) = line.trim_end().strip_prefix("data: ") else { continue };
            if data == "[DONE]" {
                return None;
            }
            return Some(serde_json::from_str(data).with_context(|| format!("event {data:?}")));
        }
    }
}

/// Sum of a metric over all its label sets, from `/metrics`; 0 if it is not there yet.
pub fn metric(http: &str, name: &str) -> f64 {
    metric_values(http, name).iter().sum()
}

/// Values of a metric, one for each set of labels, or of those with the label that the name has behind it in braces; none if
/// nobody answers.
pub fn metric_values(http: &str, name: &str) -> Vec<f64> {
    let Ok(answer) = get(&format!("{http}/metrics")) else { return Vec::new() };
    let (name, label) = name.split_once('{').map_or((name, ""), |(name, labels)| (name, labels.trim_end_matches('}')));
    let of_name = |line: &&str| {
        let rest = line.strip_prefix(name).filter(|rest| rest.starts_with(['{', ' ']));
        rest.is_some_and(|rest| rest.contains(label))
    };
    answer.body.lines().filter(of_name).filter_map(|l| l.rsplit(' ').next()?.parse::<f64>().ok()).collect()
}
