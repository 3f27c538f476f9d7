//! Bounds of thoughts through every API that has them: what shards are told.

use phalanx_proto::v1::{ThoughtLimit, thought_limit::Place};
use serde_json::{Value, json};

use super::fake::Server;

const CHAT: &str = "/v1/chat/completions";
const RESPONSES: &str = "/v1/responses";
const MESSAGES: &str = "/v1/messages";

const OPEN: &str = "{# </think> #}{% for m in messages %}<turn>{{ m.content }}\n{% endfor %}";
const BEGUN: &str = "{% for m in messages %}<turn>{{ m.content.split('</think>')[-1] }}\n{% endfor %}<think>\n";
const HARMONY: &str = "{% for m in messages %}<turn>{{ m.content }}\n{% endfor %}{# <|channel|> #}";
const THOUGHT: &str = "<think>\nHm, so.\n</think>\n\nYes.";

fn merged(mut body: Value, more: &Value) -> Value {
    body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    body
}

fn chat(more: &Value) -> Value {
    merged(json!({"messages": [{"role": "user", "content": "hi"}], "max_tokens": 20}), more)
}

/// The bound of the last request, if it has one.
fn bound(server: &Server) -> Option<ThoughtLimit> {
    server.last_request().sampling.grammar.and_then(|grammar| grammar.thoughts)
}

#[tokio::test]
async fn every_name_bounds_thoughts() {
    let server = Server::saying(THOUGHT).with_template(OPEN);
    let messages = json!([{"role": "user", "content": "hi"}]);
    for (path, body, tokens) in [
        (CHAT, chat(&json!({"thinking_token_budget": 7})), Some(7)),
        (CHAT, chat(&json!({"thinking_budget_tokens": 7, "thinking_budget": 7})), Some(7)),
        (CHAT, chat(&json!({"reasoning_budget_tokens": 0})), Some(0)),
        (CHAT, chat(&json!({"thinking_token_budget": -1})), None),
        (CHAT, chat(&json!({})), None),
        (RESPONSES, json!({"input": "hi", "thinking_token_budget": 3}), Some(3)),
        (
            MESSAGES,
            json!({"model": "tiny", "max_tokens": 20, "messages": messages,
                   "thinking": {"type": "enabled", "budget_tokens": 2048}}),
            Some(2048),
        ),
        (
            MESSAGES,
            json!({"model": "tiny", "max_tokens": 20, "messages": messages, "thinking": {"type": "enabled"}}),
            None,
        ),
    ] {
        let answer = server.post(path, &body).await;
        assert_eq!(answer.status, 200, "{body}: {}", answer.body);
        let limit = bound(&server);
        assert_eq!(limit.as_ref().map(|limit| limit.tokens), tokens, "{body}");
        let Some(limit) = limit else {
            assert!(server.last_request().sampling.grammar.is_none(), "{body}");
            continue;
        };
        assert_eq!((limit.place(), &limit.opens[..]), (Place::First, &["<think>".to_owned()][..]));
        assert_eq!(server.tokenizer.decode(&limit.end, false), "</think>");
        let grammar = server.last_request().sampling.grammar.unwrap();
        assert!(grammar.text.is_none() && grammar.vocabulary != 0, "nothing else binds");
    }
}

#[tokio::test]
async fn where_the_thought_begins_is_known() {
    let begun = Server::saying("Hm.</think>Yes.").with_template(BEGUN);
    let schema =
        json!({"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "object"}}}});
    let budget = json!({"thinking_token_budget": 7});
    begun.post(CHAT, &chat(&budget)).await;
    assert_eq!(bound(&begun).unwrap().place(), Place::Begun);
    begun.post(CHAT, &merged(chat(&budget), &schema)).await;
    assert_eq!(bound(&begun).unwrap().place(), Place::Begun);
    assert!(begun.last_request().sampling.grammar.unwrap().text.is_some(), "both bind");
    // What follows a grammar from the first token on has no thoughts, so it is within any bound.
    let open = Server::saying("{}").with_template(OPEN);
    let answer = open.post(CHAT, &merged(chat(&budget), &schema)).await;
    assert_eq!((answer.status.as_u16(), bound(&open)), (200, None));
    let harmony = Server::saying("<|channel|>final<|message|>Yes.").with_template(HARMONY);
    harmony.post(CHAT, &chat(&budget)).await;
    let limit = bound(&harmony).unwrap();
    assert_eq!(limit.place(), Place::Anywhere);
    assert_eq!(harmony.tokenizer.decode(&limit.end, false), "<|end|>");
    let again = harmony.tokenizer.decode(&limit.end_again, false);
    assert!(again.starts_with("<|end|>") && again.ends_with("final<|message|>"), "{again}");
}

#[tokio::test]
async fn bounds_that_can_t_be_kept_are_refused() {
    let server = Server::saying(THOUGHT).with_template(OPEN);
    let ids = server.tokenizer.encode("</think>", false).unwrap();
    for (more, param) in [
        (json!({"thinking_token_budget": -2}), "thinking_token_budget"),
        (json!({"thinking_budget": "many"}), "thinking_budget"),
        (json!({"thinking_token_budget": 1, "thinking_budget": 2}), "thinking_budget"),
        (json!({"thinking_token_budget": 1, "allowed_token_ids": [ids[0]]}), "allowed_token_ids"),
        (json!({"thinking_token_budget": 1, "bad_words": ["</think>"]}), "bad_words"),
    ] {
        let answer = server.post(CHAT, &chat(&more)).await;
        assert_eq!((answer.status.as_u16(), &answer.json()["error"]["param"]), (400, &json!(param)), "{more}");
    }
    let allowed = json!({"thinking_token_budget": 1, "allowed_token_ids": ids, "bad_words": ["cat"]});
    assert_eq!(server.post(CHAT, &chat(&allowed)).await.status, 200);
    let n_seen = server.n_seen();

    let thoughtless = Server::saying("x");
    for (path, body) in [
        (CHAT, chat(&json!({"thinking_token_budget": 9}))),
        (RESPONSES, json!({"input": "hi", "reasoning_budget_tokens": 9})),
        ("/v1/completions", json!({"prompt": "hi", "thinking_token_budget": 9})),
    ] {
        let answer = thoughtless.post(path, &body).await;
        assert!(answer.status == 400 && answer.body.contains("_budget"), "{path}: {}", answer.body);
    }
    assert_eq!((server.n_seen(), thoughtless.n_seen()), (n_seen, 0));
}
