//! Bodies that nobody should send, to every endpoint, while a stream runs: each is refused in the form of its API, and the
//! stream does not notice.

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

use phalanx_tests::{
    client::{get, post, post_raw, post_stream},
    model_cache::{SMOLLM2, model},
    process::Cluster,
};
use serde_json::{Value, json};

/// Where an API tells what is wrong.
enum Shape {
    OpenAi,
    Anthropic,
    Ollama,
    Tgi,
}

impl Shape {
    fn check(&self, error: &Value, shown: &str) {
        let said = match self {
            Self::OpenAi => {
                let error = error["error"].as_object().unwrap_or_else(|| panic!("{shown}: {error}"));
                assert!(
                    ["message", "type", "param", "code"].iter().all(|f| error.contains_key(*f)),
                    "{shown}: {error:?}"
                );
                &error["message"]
            }
            Self::Anthropic => {
                assert_eq!(error["type"], "error", "{shown}: {error}");
                assert!(error["error"]["type"].is_string(), "{shown}: {error}");
                &error["error"]["message"]
            }
            Self::Ollama => &error["error"],
            Self::Tgi => {
                assert_eq!(error["error_type"], "validation", "{shown}: {error}");
                &error["error"]
            }
        };
        assert!(said.as_str().is_some_and(|said| !said.is_empty()), "{shown}: {error}");
    }
}

/// An endpoint, a body that is right, and fields whose values can be wrong.
struct Target {
    path: &'static str,
    shape: Shape,
    good: Value,
    /// JSON pointers of fields.
    fields: &'static [&'static str],
    /// Field, and values that are wrong there.
    wrong: Vec<(&'static str, Value)>,
    /// Where the prompt stands.
    prompt: &'static str,
}

fn targets(model: &str) -> Vec<Target> {
    let messages = json!([{"role": "user", "content": "Hi"}]);
    let bias: Value = (0..5000).map(|id| (id.to_string(), json!(100))).collect::<serde_json::Map<_, _>>().into();
    let openai = |bias: Value| {
        vec![
            ("/n", json!(1_000_000_000)),
            ("/logit_bias", bias),
            ("/logit_bias", json!({"5": 1e308})),
            ("/allowed_token_ids", json!([])),
            ("/allowed_token_ids", json!(vec![7; 100_000])),
            ("/bad_words", json!(vec!["x"; 10_000])),
            ("/stop", json!(vec!["x"; 100_000])),
            ("/stop_token_ids", json!([u64::MAX])),
            ("/truncate_prompt_tokens", json!(-7)),
            ("/seed", json!(1e300)),
        ]
    };
    vec![
        Target {
            path: "/v1/chat/completions",
            shape: Shape::OpenAi,
            good: json!({"model": model, "messages": messages, "max_tokens": 2}),
            fields: &["/messages", "/temperature", "/max_tokens", "/stream", "/chat_template", "/tools"],
            wrong: [
                openai(bias.clone()),
                vec![
                    ("/chat_template", json!("{% for i in range(1000000000) %}{{ i }}{% endfor %}")),
                    ("/chat_template", json!("{{ ".to_owned() + &"(".repeat(100_000))),
                    ("/chat_template", json!("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}")),
                    ("/messages", json!(vec![json!({"role": "user", "content": "x"}); 70_000])),
                ],
            ]
            .concat(),
            prompt: "/messages/0/content",
        },
        Target {
            path: "/v1/completions",
            shape: Shape::OpenAi,
            good: json!({"model": model, "prompt": "Hi", "max_tokens": 2}),
            fields: &["/temperature", "/max_tokens", "/stream", "/logprobs", "/best_of"],
            wrong: [openai(bias), vec![("/prompt", json!(vec!["x"; 100_000])), ("/best_of", json!(1_000_000_000))]]
                .concat(),
            prompt: "/prompt",
        },
        Target {
            path: "/v1/responses",
            shape: Shape::OpenAi,
            good: json!({"model": model, "input": "Hi", "max_output_tokens": 2}),
            fields: &["/temperature", "/max_output_tokens", "/stream", "/include", "/text", "/metadata", "/reasoning"],
            wrong: vec![("/top_logprobs", json!(1_000_000_000)), ("/input", json!([])), ("/store", json!("x"))],
            prompt: "/input",
        },
        Target {
            path: "/tokenize",
            shape: Shape::OpenAi,
            good: json!({"model": model, "prompt": "Hi"}),
            fields: &["/prompt", "/add_special_tokens", "/return_token_strs"],
            wrong: vec![("/messages", messages.clone()), ("/prompt", json!("word ".repeat(2_000_000)))],
            // A longer prompt than the context has tokens all the same.
            prompt: "",
        },
        Target {
            path: "/detokenize",
            shape: Shape::OpenAi,
            good: json!({"model": model, "tokens": [5]}),
            fields: &["/tokens"],
            wrong: vec![("/tokens", json!([u64::MAX])), ("/tokens", json!([-1]))],
            prompt: "",
        },
        Target {
            path: "/apply-template",
            shape: Shape::OpenAi,
            good: json!({"model": model, "messages": messages}),
            fields: &["/messages"],
            wrong: vec![
                ("/chat_template_kwargs", json!([1])),
                ("/chat_template", json!("{% for i in range(1000000000) %}x{% endfor %}")),
            ],
            prompt: "",
        },
        Target {
            path: "/v1/messages",
            shape: Shape::Anthropic,
            good: json!({"model": model, "messages": messages, "max_tokens": 2}),
            fields: &["/messages", "/system", "/temperature", "/max_tokens", "/stream", "/stop_sequences", "/metadata"],
            wrong: vec![("/max_tokens", json!(1_000_000_000)), ("/stop_sequences", json!(vec!["x"; 100_000]))],
            prompt: "/messages/0/content",
        },
        Target {
            path: "/v1/messages/count_tokens",
            shape: Shape::Anthropic,
            good: json!({"model": model, "messages": messages}),
            fields: &["/messages", "/system"],
            wrong: vec![("/messages", json!([])), ("/messages/0/content", json!("word ".repeat(2_000_000)))],
            prompt: "",
        },
        Target {
            path: "/api/chat",
            shape: Shape::Ollama,
            good: json!({"model": model, "messages": messages, "stream": false, "options": {"num_predict": 2}}),
            fields: &["/messages", "/stream", "/options", "/options/temperature", "/options/num_predict"],
            wrong: vec![("/options/num_ctx", json!(1_000_000_000)), ("/options/stop", json!(vec!["x"; 100_000]))],
            prompt: "/messages/0/content",
        },
        Target {
            path: "/api/generate",
            shape: Shape::Ollama,
            good: json!({"model": model, "prompt": "Hi", "stream": false, "options": {"num_predict": 2}}),
            fields: &["/prompt", "/stream", "/raw", "/options/top_k", "/options/seed"],
            wrong: vec![("/context", json!([u64::MAX])), ("/options/num_predict", json!(1_000_000_000))],
            prompt: "/prompt",
        },
        Target {
            path: "/generate",
            shape: Shape::Tgi,
            good: json!({"inputs": "Hi", "parameters": {"max_new_tokens": 2}}),
            fields: &["/inputs", "/parameters", "/parameters/temperature", "/parameters/stop", "/parameters/details"],
            wrong: vec![("/parameters/best_of", json!(1_000_000_000)), ("/parameters/top_n_tokens", json!(1_000_000))],
            prompt: "/inputs",
        },
        Target {
            path: "/generate_stream",
            shape: Shape::Tgi,
            good: json!({"inputs": "Hi", "parameters": {"max_new_tokens": 2}}),
            fields: &["/inputs", "/parameters/seed", "/parameters/max_new_tokens"],
            wrong: vec![("/parameters/max_new_tokens", json!(1_000_000_000)), ("/stream", json!(false))],
            prompt: "/inputs",
        },
    ]
}

fn with(good: &Value, pointer: &str, value: Value) -> Value {
    let mut body = good.clone();
    let (parent, name) = pointer.rsplit_once('/').expect("a pointer");
    match body.pointer_mut(parent) {
        Some(Value::Array(items)) => items[name.parse::<usize>().expect("an index")] = value,
        Some(parent) => parent[name] = value,
        None => panic!("{pointer} leads nowhere"),
    }
    body
}

fn bodies(target: &Target) -> Vec<Vec<u8>> {
    let good = target.good.to_string();
    let mut all: Vec<Vec<u8>> = vec![
        Vec::new(),
        b"null".to_vec(),
        b"[]".to_vec(),
        b"\xff\xfe\x00".to_vec(),
        good.as_bytes()[..good.len() / 2].to_vec(),
        format!("{good}{good}").into_bytes(),
        "[".repeat(100_000).into_bytes(),
        good.replacen('{', &format!("{{\"deep\":{}1{},", "[".repeat(5000), "]".repeat(5000)), 1).into_bytes(),
        good.replacen('{', "{\"odd\":1,", 1).into_bytes(),
        good.replacen('{', "{\"temperature\":NaN,", 1).into_bytes(),
        good.replacen('{', "{\"temperature\":1e999,", 1).into_bytes(),
        good.replacen('{', "{\"model\":\"a\",\"model\":\"b\",", 1).into_bytes(),
    ];
    let mut bytes = good.clone().into_bytes();
    let at = bytes.iter().rposition(|byte| *byte == b'"').expect("there is a string");
    bytes.insert(at, 0xff);
    all.push(bytes);
    let mut add = |pointer: &str, value: Value| all.push(with(&target.good, pointer, value).to_string().into_bytes());
    for field in target.fields {
        add(field, json!({"a": {"b": []}}));
        add(field, json!([[1], {"x": null}]));
    }
    for (field, value) in &target.wrong {
        add(field, value.clone());
    }
    if !target.prompt.is_empty() {
        for n_words in [3000, 2_000_000] {
            add(target.prompt, json!("word ".repeat(n_words)));
        }
    }
    all
}

fn read_all(url: &str, body: &Value) -> Vec<Value> {
    let stream = post_stream(url, body).expect("the stream begins");
    let part = |event: Value| event["choices"][0]["text"].clone();
    stream.map(|event| part(event.expect("the stream goes on"))).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_running_stream_does_not_notice_them() {
    let mut cluster = Cluster::start(&model(SMOLLM2), &["--kv-cache-memory", "256MiB", "--max-model-len", "2048"]);
    let models = get(&format!("{}/v1/models", cluster.http)).unwrap().json().unwrap();
    let name = models["data"][0]["id"].as_str().unwrap().to_owned();
    let url = format!("{}/v1/completions", cluster.http);
    let story = json!({"model": name, "prompt": "Once upon a time", "max_tokens": 400, "ignore_eos": true, "seed": 7, "stream": true});
    let undisturbed = read_all(&url, &story);
    let shards = cluster.local_shards();

    let targets = targets(&name);
    let mut n_bodies = 0;
    let all_sent = Arc::new(AtomicBool::new(false));
    let stream = std::thread::spawn({
        let (url, story, all_sent) = (url.clone(), story.clone(), Arc::clone(&all_sent));
        move || {
            // As long as bodies are sent.
            let mut rounds = vec![read_all(&url, &story)];
            while !all_sent.load(Ordering::Relaxed) {
                rounds.push(read_all(&url, &story));
            }
            rounds
        }
    });
    for target in &targets {
        let url = format!("{}{}", cluster.http, target.path);
        for body in bodies(target) {
            n_bodies += 1;
            let answer = post_raw(&url, &body).unwrap();
            let shown = format!("{} {}", target.path, String::from_utf8_lossy(&body[..body.len().min(200)]));
            assert!((400..500).contains(&answer.status), "{shown}: {answer:?}");
            target.shape.check(&answer.json().unwrap_or_else(|e| panic!("{shown}: {e}")), &shown);
        }
    }
    all_sent.store(true, Ordering::Relaxed);
    assert!(n_bodies >= 300, "{n_bodies} bodies");
    for disturbed in stream.join().expect("the stream's reader does not panic") {
        assert_eq!(disturbed, undisturbed);
    }
    for target in &targets {
        let answer = post(&format!("{}{}", cluster.http, target.path), &target.good).unwrap();
        assert_eq!(answer.status, 200, "{}: {answer:?}", target.path);
    }
    assert!(cluster.process.ended().is_none(), "the same process");
    assert_eq!(cluster.local_shards(), shards, "the same shards");
    assert!(cluster.interrupt().success());
}
