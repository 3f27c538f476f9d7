//! What fuzzers call: each takes bytes, does what strangers' bytes lead to, and panics where something is wrong. The tests
//! beside them drive the same functions, so that they are exercised without a fuzzer too: `fuzz/README.md`.

use std::{
    path::Path,
    sync::{Arc, OnceLock},
};

use axum::{
    Router,
    body::{Body, to_bytes},
    response::{IntoResponse, Sse, sse},
};
use http::Request as HttpRequest;
use phalanx_cluster::{
    chat_template::ChatTemplate,
    grammar::{Compiler, Grammar, Limits, STACK_BYTES, WhiteSpace},
    tokenizer::Tokenizer,
};
use serde_json::{Value, json};
use tokio::runtime::Runtime;
use tower::ServiceExt;

use crate::{
    frontend::{
        FrontendState,
        family::FAMILIES,
        forward, http_router, prometheus,
        sse::Payload,
        tools::{
            FORMATS, Names,
            reader::{Reading, Told},
            thoughts::{Start, THOUGHTS},
            toolbox::Tool,
        },
    },
    grammars::Grammars,
    guard::{Action, DENIED, Guard, denylist, pii, rules::Rules, transducer::Transducer},
    model_facts::ModelFacts,
    request::{Request, RequestError},
    scheduler::handle::{Readiness, RequestStream, Submit},
    security::Security,
    served_model::ServedModel,
};

/// Longest answer to a request that is refused, in bytes.
const LONGEST_REFUSAL: usize = 1 << 20;
/// Longest schema: longer ones only take longer.
const LONGEST_SCHEMA: usize = 4 << 10;

/// Refuses whatever is asked: what comes before is looked at.
struct Busy;

impl Submit for Busy {
    fn submit(&self, _: Request) -> Result<RequestStream, RequestError> {
        Err(RequestError::Unavailable("this is a test".to_owned()))
    }

    fn readiness(&self) -> Readiness {
        Readiness::Serving
    }
}

fn tokenizer() -> (&'static Path, Tokenizer) {
    let folder = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/golden/arch-tokenizer"));
    (folder, Tokenizer::from_folder(folder).expect("a good tokenizer"))
}

fn rules() -> Rules {
    let denied = denylist::parse(b"black bird\n/a{2,4}b/\nstra\xc3\x9fe\n").expect("good lines");
    let personal = pii::KINDS.iter().map(|kind| (kind.name, kind.mark, Action::Redact, (kind.patterns)()));
    Rules::new([(DENIED, "[REDACTED]", Action::Redact, denied)].into_iter().chain(personal)).expect("good rules")
}

struct Surface {
    runtime: Runtime,
    router: Router,
    /// Where something is posted to.
    paths: Vec<&'static str>,
}

fn surface() -> &'static Surface {
    static SURFACE: OnceLock<Surface> = OnceLock::new();
    SURFACE.get_or_init(|| {
        let (folder, tokenizer) = tokenizer();
        let template = ChatTemplate::from_folder(folder, tokenizer.special_tokens()).expect("a good template");
        let facts = ModelFacts {
            architecture: "llama".to_owned(),
            format: "gguf",
            identity: "ab".repeat(32),
            bytes: 1 << 20,
            n_weights: 1_500_000,
            weight_type: "Q4_0".to_owned(),
        };
        let tokenizer = Arc::new(tokenizer);
        let model = ServedModel {
            names: vec!["tiny".to_owned()],
            max_model_len: 512,
            vocab: tokenizer.vocab_size(),
            tokenizer: Arc::clone(&tokenizer),
            chat_template: Some(Arc::new(template)),
            eos: tokenizer.eos_ids().to_vec(),
            created: 1_700_000_000,
            facts,
            fingerprint: "0.1.0-abababababab".to_owned(),
            defaults: phalanx_cluster::checkpoint::generation::GenerationDefaults::default(),
        };
        let metrics = prometheus::recorder().expect("a good recorder").build_recorder().handle();
        // Grammars have a function of their own.
        let grammars = Arc::new(Grammars::none(tokenizer, "this is a test"));
        let security = Security::with_watch(Some(Arc::new(Guard::new(rules()))), None);
        let state = FrontendState::new(Arc::new(Busy), model, crate::frontend::Limits::default(), metrics)
            .with_grammars(grammars)
            .with_security(security);
        let generations = FAMILIES.iter().flat_map(|family| family.generations).copied();
        let others = ["/tokenize", "/detokenize", "/apply-template", "/v1/messages/count_tokens", "/api/show"];
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        Surface { runtime, router: http_router(state), paths: generations.chain(others).collect() }
    })
}

/// A body of any endpoint, which the first byte chooses: it is refused with a status and an object that say so, or it would
/// run. It never fails for reasons of ours.
pub fn request(bytes: &[u8]) {
    let Some((choice, body)) = bytes.split_first() else { return };
    let Surface { runtime, router, paths } = surface();
    let path = paths[usize::from(*choice) % paths.len()];
    let request = HttpRequest::post(path).header("content-type", "application/json").body(Body::from(body.to_vec()));
    let answering = router.clone().oneshot(request.expect("a good request"));
    let (status, text) = runtime.block_on(async {
        let answer = answering.await.expect("routers do not fail");
        let status = answer.status();
        (status, to_bytes(answer.into_body(), LONGEST_REFUSAL).await.expect("a short answer"))
    });
    let shown = || format!("{path} {:?}: {status} {text:?}", String::from_utf8_lossy(body));
    assert!(matches!(status.as_u16(), 200 | 400 | 404 | 422 | 503), "{}", shown());
    let answer: Value = serde_json::from_slice(&text).unwrap_or_else(|_| panic!("{}", shown()));
    assert!(status.is_success() || !answer["error"].is_null(), "{}", shown());
}

/// What is written as events can be read as the same events, however it is cut. Bytes: how it is cut, then texts with a zero
/// between them.
pub fn events(bytes: &[u8]) {
    let Some((cut, bytes)) = bytes.split_first() else { return };
    const NAMES: [Option<&str>; 4] = [None, Some("message_delta"), Some("response.output_text.delta"), Some("error")];
    let payloads: Vec<(Payload, Option<String>)> = bytes
        .split(|byte| *byte == 0)
        .take(64)
        .enumerate()
        .map(|(index, text)| {
            let text = match String::from_utf8_lossy(text) {
                done if done == "[DONE]" => done.into_owned(),
                text => Value::from(text).to_string(),
            };
            let id = (index % 3 != 0).then(|| format!("{index}.{},7;1", text.len()));
            (Payload { name: NAMES[index % NAMES.len()], text }, id)
        })
        .collect();
    let written = payloads.iter().cloned().map(|(payload, id)| {
        let event = id.into_iter().fold(sse::Event::default(), sse::Event::id);
        Ok::<_, std::convert::Infallible>(payload.add_to(event))
    });
    let answer = Sse::new(futures::stream::iter(written.collect::<Vec<_>>())).into_response();
    let body = surface().runtime.block_on(to_bytes(answer.into_body(), usize::MAX)).expect("it is all there");
    let mut cutter = forward::Cutter::default();
    let mut read = Vec::new();
    for piece in body.chunks(usize::from(*cut).max(1)) {
        cutter.push(piece);
        while let Some(event) = cutter.next() {
            read.push(event);
        }
    }
    assert_eq!(read.len(), payloads.len(), "{:?}", String::from_utf8_lossy(&body));
    for (event, (payload, id)) in read.iter().zip(&payloads) {
        let raw = std::str::from_utf8(&event.raw).expect("UTF-8");
        let field = |name: &str| raw.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(": "));
        assert_eq!((field("data"), field("event")), (Some(payload.text.as_str()), payload.name), "{raw:?}");
        assert_eq!(&event.id, id, "{raw:?}");
        let is_done = event.kind == forward::Kind::Done;
        assert_eq!(is_done, payload.text == "[DONE]", "{raw:?}");
    }
}

/// A text is guarded alike however it is cut. Bytes: how it is cut, then the text.
pub fn guarded(bytes: &[u8]) {
    static RULES: OnceLock<Arc<Rules>> = OnceLock::new();
    let Some((cut, text)) = bytes.split_first() else { return };
    let text = String::from_utf8_lossy(text);
    let rules = RULES.get_or_init(|| Arc::new(rules()));
    let whole = Transducer::whole(rules, &text);
    let mut transducer = Transducer::new(Arc::clone(rules));
    let (mut said, mut found) = (String::new(), Vec::new());
    let letters: Vec<char> = text.chars().collect();
    for piece in letters.chunks(usize::from(*cut).max(1)) {
        let piece = transducer.push(&piece.iter().collect::<String>());
        said.push_str(&piece.text);
        found.extend(piece.found);
        assert!(whole.text.starts_with(&said), "{said:?} is no beginning of {:?}", whole.text);
        assert!(transducer.n_held() <= 2048 + 4 * 255, "{} bytes are held", transducer.n_held());
    }
    let rest = transducer.finish();
    assert_eq!((said + &rest.text, [found, rest.found].concat()), (whole.text, whole.found));
}

/// What a model has written is read alike however it is cut: text, thoughts and calls. Bytes: the format of calls, that of
/// thoughts, how it is cut, then the text.
pub fn calls(bytes: &[u8]) {
    static TOOLS: OnceLock<Names> = OnceLock::new();
    let tools = || {
        let schema = |kind: &str| json!({"type": "object", "properties": {"a": {"type": kind}}});
        let tool = |(name, kind): (&str, &str)| {
            let places = [String::new(), String::new()];
            Tool::new(&places, name.to_owned(), None, Some(schema(kind)), false).expect("a good tool")
        };
        Names::of_tools([("f", "string"), ("get_weather", "integer")].map(tool).iter())
    };
    let [format, thoughts, cut, text @ ..] = bytes else { return };
    let start = [Start::Open, Start::Inside, Start::Behind][usize::from(thoughts / 64) % 3];
    let reading = Reading {
        format: FORMATS.get(usize::from(*format) % (FORMATS.len() + 1)).copied(),
        names: TOOLS.get_or_init(tools).clone(),
        thoughts: THOUGHTS.get(usize::from(thoughts % 64) % (THOUGHTS.len() + 1)).map(|form| (*form, start)),
        ..Reading::plain()
    };
    let letters: Vec<char> = String::from_utf8_lossy(text).chars().collect();
    let read = |n_letters: usize| {
        let mut reader = reading.reader(0);
        let mut told = Told::default();
        for piece in letters.chunks(n_letters) {
            told.add(reader.push(&piece.iter().collect::<String>(), 0));
        }
        told.add(reader.finish());
        told
    };
    let whole = read(letters.len().max(1));
    assert_eq!(read(usize::from(*cut).max(1)), whole);
    for call in &whole.calls {
        assert!(["f", "get_weather"].contains(&call.name.as_str()), "{call:?}");
    }
}

/// A schema is compiled or refused, within bounds.
pub fn schema(bytes: &[u8]) {
    static COMPILER: OnceLock<Compiler> = OnceLock::new();
    let Some(schema) = serde_json::from_slice::<Value>(bytes).ok().filter(|_| bytes.len() <= LONGEST_SCHEMA) else {
        return;
    };
    let Ok(grammar) = Grammar::of_schema(schema, &WhiteSpace::Some) else { return };
    let compiler =
        COMPILER.get_or_init(|| Compiler::new(&tokenizer().1, Limits::default()).expect("a good vocabulary"));
    let compile = move || {
        if let Ok(mut automaton) = compiler.compile(&grammar) {
            // What may come first is known, or a reason why not.
            let _known = automaton.mask();
        }
    };
    let thread = std::thread::Builder::new().stack_size(STACK_BYTES).spawn(compile).expect("a thread");
    thread.join().expect("compilers do not panic");
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::frontend::tools::scraps::scraps;

    /// Names that some endpoint knows, and one that none does.
    const NAMES: &[&str] = &[
        "model",
        "messages",
        "prompt",
        "input",
        "inputs",
        "parameters",
        "options",
        "stream",
        "stream_options",
        "max_tokens",
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "n",
        "seed",
        "stop",
        "stop_token_ids",
        "logit_bias",
        "logprobs",
        "top_logprobs",
        "prompt_logprobs",
        "echo",
        "best_of",
        "response_format",
        "structured_outputs",
        "guided_json",
        "guided_regex",
        "tools",
        "tool_choice",
        "metadata",
        "user",
        "system",
        "max_new_tokens",
        "details",
        "grammar",
        "format",
        "context",
        "raw",
        "keep_alive",
        "think",
        "thinking_token_budget",
        "text",
        "reasoning",
        "instructions",
        "tokens",
        "bad_words",
        "allowed_token_ids",
        "role",
        "content",
        "type",
        "name",
        "value",
        "schema",
        "json_schema",
        "add_generation_prompt",
        "continue_final_message",
        "chat_template",
        "chat_template_kwargs",
        "priority",
        "truncate_prompt_tokens",
        "x",
    ];

    fn value() -> impl Strategy<Value = Value> {
        let text = prop_oneof![
            Just("tiny".to_owned()),
            Just("user".to_owned()),
            Just("assistant".to_owned()),
            Just("text".to_owned()),
            Just("json_schema".to_owned()),
            Just("a@b.io".to_owned()),
            "\\PC{0,6}",
        ];
        let number = prop_oneof![
            Just(json!(0)),
            Just(json!(1)),
            Just(json!(-1)),
            Just(json!(u64::MAX)),
            Just(json!(i64::MIN)),
            Just(json!(1e300)),
            any::<i32>().prop_map(|n| json!(n)),
            (0.0..2.0_f64).prop_map(|n| json!(n)),
        ];
        let leaf =
            prop_oneof![Just(Value::Null), any::<bool>().prop_map(Value::from), number, text.prop_map(Value::from),];
        leaf.prop_recursive(4, 24, 4, |inner| {
            let fields = prop::collection::vec((prop::sample::select(NAMES), inner.clone()), 0..5);
            let object = |fields: Vec<(&str, Value)>| {
                Value::Object(fields.into_iter().map(|(name, value)| (name.to_owned(), value)).collect())
            };
            prop_oneof![prop::collection::vec(inner, 0..4).prop_map(Value::from), fields.prop_map(object)]
        })
    }

    proptest! {
        #[test]
        fn bodies_of_known_names_never_fail_for_reasons_of_ours(
            path: u8, fields in prop::collection::vec((prop::sample::select(NAMES), value()), 0..8), needed: bool,
        ) {
            let mut body = json!({});
            if needed {
                let messages = json!([{"role": "user", "content": "hi"}]);
                body = json!({"model": "tiny", "messages": messages, "prompt": "hi", "max_tokens": 4});
            }
            for (name, value) in fields {
                body[name] = value;
            }
            let mut bytes = vec![path];
            bytes.extend(body.to_string().into_bytes());
            request(&bytes);
        }

        #[test]
        fn bodies_of_any_bytes_never_fail_for_reasons_of_ours(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            request(&bytes);
        }

        #[test]
        fn events_can_be_read_again(bytes in prop::collection::vec(any::<u8>(), 0..200), text in "(\\PC|[\r\n\0:]){0,40}") {
            events(&bytes);
            events(text.as_bytes());
            events(b"\x05a\0[DONE]");
        }

        #[test]
        fn texts_are_guarded_alike(bytes in prop::collection::vec(any::<u8>(), 0..100), text in "[a-z0-9@.:+ -]{0,80}") {
            guarded(&bytes);
            guarded(text.as_bytes());
        }

        #[test]
        fn outputs_are_read_alike(
            format: u8, thoughts: u8, cut in 0..9_u8,
            parts in prop::collection::vec(prop::sample::select(scraps()), 0..12), noise in "[{}a\"<>|:, \\[\\]]{0,12}",
        ) {
            calls(&[&[format, thoughts, cut], parts.concat().as_bytes(), noise.as_bytes()].concat());
        }

        #[test]
        fn schemas_are_compiled_or_refused(schema in value()) {
            super::schema(schema.to_string().as_bytes());
        }
    }

    /// What a fuzzer found once, and what it begins with.
    #[test]
    fn seeds_do_no_harm() {
        let folder = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../fuzz/seeds"));
        type Target = fn(&[u8]);
        let targets: [(&str, Target); 5] = [
            ("request", request),
            ("events", events),
            ("guarded", guarded),
            ("calls", calls),
            ("schema", super::schema),
        ];
        for (name, target) in targets {
            let files = std::fs::read_dir(folder.join(name)).unwrap_or_else(|e| panic!("{name}: {e}"));
            let mut n_seeds = 0;
            for file in files {
                target(&std::fs::read(file.expect("it is readable").path()).expect("it is readable"));
                n_seeds += 1;
            }
            assert!(n_seeds > 0, "{name}");
        }
    }
}
