//! Grammars that mean harm, or are wrong.

use serde_json::{Value, json};

/// Names, the request's fields, and the field that the refusal must name.
pub fn all() -> Vec<(&'static str, Value, &'static str)> {
    let schema =
        |name, schema: Value| (name, json!({"structured_outputs": {"json": schema}}), "structured_outputs.json");
    let regex = |name, regex: &str| (name, json!({"structured_outputs": {"regex": regex}}), "structured_outputs.regex");
    let grammar =
        |name, text: &str| (name, json!({"structured_outputs": {"grammar": text}}), "structured_outputs.grammar");
    let wide: Vec<Value> =
        (0..12).map(|i| json!({"type": "object", "properties": {format!("k{i}"): {"type": "string"}}})).collect();
    let mut doubling = String::from("start: T1\n");
    (1..60).for_each(|i| doubling.push_str(&format!("T{i}: T{} T{}\n", i + 1, i + 1)));
    doubling.push_str("T60: \"b\"\n");
    vec![
        // Too much.
        schema("a multiple that takes for ever", json!({"type": "integer", "multipleOf": 999_999_937})),
        schema("a product of alternatives", json!({"allOf": vec![json!({"anyOf": wide}); 8]})),
        schema("a huge enum", json!({"enum": (0..20_000).map(|i| format!("value number {i}")).collect::<Vec<_>>()})),
        schema("endless recursion", json!({"$ref": "#"})),
        schema(
            "a missing definition",
            json!({"$defs": {"a": {"type": "object", "properties": {"a": {"$ref": "#/$defs/a"}}, "required": ["a"]}}, "allOf": [{"$ref": "#/$defs/nowhere"}]}),
        ),
        regex("deep parentheses", &format!("{}a{}", "(".repeat(30_000), ")".repeat(30_000))),
        regex("a long text", &"a".repeat(70_000)),
        grammar("doubling words", &doubling),
        grammar("deep groups", &format!("start: {}\"a\"{}", "(".repeat(20_000), ")".repeat(20_000))),
        grammar("deep GBNF groups", &format!("root ::= {}\"a\"{}", "(".repeat(20_000), ")".repeat(20_000))),
        // Wrong.
        schema("an unknown type", json!({"type": "text"})),
        schema(
            "an unknown keyword",
            json!({"type": "object", "if": {"properties": {"a": {"const": 1}}}, "then": {"required": ["b"]}}),
        ),
        schema("a file", json!({"$ref": "file:///etc/passwd"})),
        schema("a host", json!({"$ref": "http://127.0.0.1:1/schema.json"})),
        schema("a contradiction", json!({"type": "integer", "minimum": 5, "maximum": 1})),
        schema("nothing at all", json!(false)),
        schema("settings", json!({"type": "object", "x-guidance": {"lenient": true}})),
        regex("an open group", "(a"),
        regex("looking back", "(?<=a)b"),
        grammar("no start", "item: \"a\""),
        grammar("a missing rule", "start: item"),
        grammar("a missing GBNF rule", "root ::= item"),
        ("no choice", json!({"structured_outputs": {"choice": []}}), "structured_outputs.choice"),
        ("a choice of nothing", json!({"guided_choice": ["a", ""]}), "guided_choice"),
        ("two at once", json!({"structured_outputs": {"regex": "a", "choice": ["b"]}}), "structured_outputs.choice"),
        ("old and new", json!({"structured_outputs": {"regex": "a"}, "guided_regex": "b"}), "guided_regex"),
        ("no schema", json!({"response_format": {"type": "json_schema"}}), "response_format.json_schema"),
        ("no type", json!({"response_format": {}}), "response_format.type"),
        ("another type", json!({"response_format": {"type": "yaml"}}), "response_format.type"),
        (
            "a bad OpenAI schema",
            json!({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": 3}}}}),
            "response_format.json_schema.schema",
        ),
        ("an odd field", json!({"structured_outputs": {"json": {"type": "null"}, "odd": 1}}), "structured_outputs.odd"),
        ("tags", json!({"response_format": {"type": "structural_tag"}}), "response_format.type"),
    ]
}
