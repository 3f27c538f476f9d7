//! What an output has to follow, in the words of Ollama, text-generation-inference and the responses API.

use phalanx_cluster::grammar::{Grammar, WhiteSpace};
use phalanx_proto::v1::grammar::Text;
use serde_json::{Value, json};

use super::fake::Server;

fn schema() -> Value {
    json!({"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": false})
}

fn of_schema() -> Text {
    Text::JsonSchema(Grammar::of_schema(schema(), &WhiteSpace::Some).unwrap().text().to_owned())
}

fn any_object() -> Text {
    Text::JsonSchema(Grammar::of_any_object().text().to_owned())
}

fn ollama(path: &str, format: &Value) -> Value {
    let mut body = json!({"model": "tiny", "format": format, "stream": false});
    match path {
        "/api/chat" => body["messages"] = json!([{"role": "user", "content": "hi"}]),
        _ => body["prompt"] = "hi".into(),
    }
    body
}

fn tgi(grammar: &Value) -> Value {
    json!({"inputs": "hi", "parameters": {"grammar": grammar, "max_new_tokens": 9}})
}

fn responses(format: &Value) -> Value {
    json!({"input": "hi", "text": {"format": format}})
}

#[tokio::test]
async fn every_api_has_its_words_for_grammars() {
    let server = Server::saying("{\"a\": 1}");
    let named = json!({"type": "json_schema", "name": "n", "strict": true, "schema": schema()});
    let mut cases = vec![
        ("/generate", tgi(&json!({"type": "json", "value": schema()})), of_schema(), "grammar.value"),
        ("/generate", tgi(&json!({"type": "json", "value": schema().to_string()})), of_schema(), "grammar.value"),
        (
            "/generate",
            tgi(&json!({"type": "json_schema", "value": {"name": "n", "schema": schema()}})),
            of_schema(),
            "grammar.value.schema",
        ),
        ("/generate", tgi(&json!({"type": "regex", "value": "a|b"})), Text::Regex("a|b".to_owned()), "grammar.value"),
        ("/v1/responses", responses(&named), of_schema(), "text.format.schema"),
        ("/v1/responses", responses(&json!({"type": "json_object"})), any_object(), "text.format"),
    ];
    for path in ["/api/chat", "/api/generate"] {
        cases.push((path, ollama(path, &schema()), of_schema(), "format"));
        cases.push((path, ollama(path, &json!("json")), any_object(), "format"));
    }
    for (path, body, want, field) in cases {
        let answer = server.post(path, &body).await;
        assert_eq!(answer.status, 200, "{path} {body}: {}", answer.body);
        let grammar = server.last_request().sampling.grammar.unwrap();
        assert!(grammar.field.ends_with(field), "{path}: {}", grammar.field);
        assert_eq!(grammar.text, Some(want), "{path} {body}");
    }
    for (path, body) in [
        ("/api/chat", ollama("/api/chat", &json!(""))),
        ("/api/generate", ollama("/api/generate", &Value::Null)),
        ("/v1/responses", responses(&json!({"type": "text"}))),
        ("/generate", tgi(&Value::Null)),
    ] {
        assert_eq!(server.post(path, &body).await.status, 200);
        assert_eq!(server.last_request().sampling.grammar, None, "{path} {body}");
    }
}

#[tokio::test]
async fn responses_repeat_what_was_asked() {
    let server = Server::saying("{}");
    let whole = server.post("/v1/responses", &responses(&json!({"type": "json_object"}))).await.json();
    assert_eq!(whole["text"]["format"], json!({"type": "json_object"}));
    let named = json!({"type": "json_schema", "name": "n", "schema": schema()});
    let whole = server.post("/v1/responses", &responses(&named)).await.json();
    let format = &whole["text"]["format"];
    assert_eq!((&format["name"], &format["schema"], &format["strict"]), (&json!("n"), &schema(), &json!(true)));
    let whole = server.post("/v1/responses", &json!({"input": "hi"})).await.json();
    assert_eq!(whole["text"]["format"], json!({"type": "text"}));
}

#[tokio::test]
async fn bad_grammars_are_named() {
    let server = Server::saying("x");
    for (path, body, named) in [
        ("/api/chat", ollama("/api/chat", &json!("xml")), "format"),
        ("/api/chat", ollama("/api/chat", &json!(5)), "format"),
        ("/api/generate", ollama("/api/generate", &json!({"type": "text"})), "format"),
        ("/generate", tgi(&json!({"type": "regex", "value": "(a"})), "grammar.value"),
        ("/generate", tgi(&json!({"type": "regex"})), "grammar.value"),
        ("/generate", tgi(&json!({"type": "json", "value": "{"})), "grammar.value"),
        ("/generate", tgi(&json!({"type": "json", "value": {}, "odd": 1})), "grammar.odd"),
        ("/v1/responses", responses(&json!({"type": "json_schema", "schema": {}})), "text.format.name"),
        ("/v1/responses", responses(&json!({"type": "json_schema", "name": "n"})), "text.format.schema"),
        (
            "/v1/responses",
            responses(&json!({"type": "json_schema", "name": "n", "schema": {"not": {}}})),
            "text.format.schema",
        ),
        ("/v1/responses", responses(&json!({"type": "grammar"})), "text.format.type"),
    ] {
        let answer = server.post(path, &body).await;
        assert_eq!(answer.status, if path == "/generate" { 422 } else { 400 }, "{path} {body}: {}", answer.body);
        assert!(answer.body.contains(&format!("{named}'")), "{path} {body}: {}", answer.body);
    }
    assert_eq!(server.n_seen(), 0);
}
