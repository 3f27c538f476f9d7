//! Schemas of the kinds that public suites have, several hundred of them: what is drawn under one is valid, what is not
//! valid is not accepted, and what can't be kept to is refused with a reason. Without a model: tokens are drawn at random
//! from those that are allowed, which finds more than a model would write.

mod bases;
mod combined;
mod refused;

use std::{collections::BTreeMap, path::Path};

use phalanx_cluster::{
    grammar::{Automaton, Compiler, Grammar, Limits, STACK_BYTES, WhiteSpace},
    tokenizer::Tokenizer,
};
use serde_json::{Value, json};

/// Tokens after which a text is brought to its end.
const SOFT_END: usize = 48;
/// Tokens of the longest text.
const HARD_END: usize = 1200;
/// Texts that are drawn under each schema.
const DRAWS: u64 = 3;

/// A schema with its name.
type Named = (String, Value);

/// Where a schema may stand in another one.
fn placed(name: &str, schema: &Value) -> Vec<Named> {
    let property = |required: &[&str]| json!({"type": "object", "properties": {"v": schema, "w": {"type": "boolean"}}, "required": required, "additionalProperties": false});
    let list = json!({"type": "array", "items": schema, "minItems": 1, "maxItems": 2});
    let tuple = json!({"type": "array", "prefixItems": [schema, {"const": "end"}], "items": false, "minItems": 2});
    let referred = json!({"$defs": {"d": schema}, "type": "object", "properties": {"a": {"$ref": "#/$defs/d"}, "b": {"$ref": "#/$defs/d"}}, "required": ["a", "b"], "additionalProperties": false});
    let chain = json!({
        "$defs": {"node": {"type": "object", "properties": {"v": schema, "next": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/node"}]}}, "required": ["v", "next"], "additionalProperties": false}},
        "$ref": "#/$defs/node",
    });
    let values = json!({"type": "object", "additionalProperties": schema, "maxProperties": 1});
    let places = [
        ("alone", schema.clone()),
        ("required", property(&["v"])),
        ("optional", property(&[])),
        ("items", list),
        ("tuple", tuple),
        ("referred", referred),
        ("any of", json!({"anyOf": [schema, {"const": "other"}]})),
        ("all of", json!({"allOf": [schema]})),
        ("recursive", chain),
        ("map", values),
    ];
    places.into_iter().map(|(place, schema)| (format!("{name}, {place}"), schema)).collect()
}

fn all() -> Vec<Named> {
    let mut all: Vec<Named> = bases::all().iter().flat_map(|(name, schema)| placed(name, schema)).collect();
    all.extend(combined::all().into_iter().map(|(name, schema)| (name.to_owned(), schema)));
    all
}

struct Bench {
    tokenizer: Tokenizer,
    compiler: Compiler,
    texts: Vec<String>,
}

impl Bench {
    fn new() -> Self {
        let folder = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/golden/arch-tokenizer"));
        let tokenizer = Tokenizer::from_folder(folder).expect("a good tokenizer");
        let compiler = Compiler::new(&tokenizer, Limits::default()).expect("it has an end-of-sequence token");
        let n_tokens = u32::try_from(tokenizer.vocab_size()).expect("a small vocabulary");
        let texts = (0..n_tokens).map(|id| tokenizer.token_text(id)).collect();
        Self { tokenizer, compiler, texts }
    }

    fn compile(&self, schema: &Value) -> Result<Automaton, String> {
        let grammar = Grammar::of_schema(schema.clone(), &WhiteSpace::Some).map_err(|error| error.to_string())?;
        self.compiler.compile(&grammar).map_err(|error| error.to_string())
    }

    /// Draws among what is allowed; a long text is brought to its end where that is possible.
    fn draw(&self, mut automaton: Automaton, mut seed: u64) -> Option<String> {
        let mut tokens = Vec::new();
        while tokens.len() < HARD_END {
            let mask = automaton.mask().expect("simple enough");
            let allowed: Vec<u32> = (0..).take(self.texts.len()).filter(|token| mask.allows(*token)).collect();
            let closes = |token: &u32| {
                self.compiler.eos().contains(token)
                    || ["\"", "]", "}", "n", "u", "l", "b", "c"].contains(&self.text(*token))
            };
            let closing: Vec<u32> = allowed.iter().copied().filter(closes).collect();
            let of = if tokens.len() > SOFT_END && !closing.is_empty() { closing } else { allowed };
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let token = of[(seed >> 33) as usize % of.len()];
            if self.compiler.eos().contains(&token) {
                return Some(self.tokenizer.decode(&tokens, false));
            }
            automaton.advance(token).expect("it is allowed");
            tokens.push(token);
        }
        None
    }

    fn text(&self, token: u32) -> &str {
        &self.texts[token as usize]
    }

    /// Whether a text may be written, and end.
    fn accepts(&self, mut automaton: Automaton, text: &str) -> bool {
        let tokens = self.tokenizer.encode(text, false).expect("it can be encoded");
        let is_written = tokens.into_iter().all(|token| automaton.advance(token).is_ok());
        is_written && automaton.mask().is_ok_and(|mask| self.compiler.eos().iter().any(|end| mask.allows(*end)))
    }
}

/// Values of all kinds, most of which are not valid under most schemas.
fn values() -> Vec<Value> {
    let mut all = vec![json!(null), json!(true), json!(false), json!([]), json!({}), json!("")];
    all.extend([-20, -1, 0, 1, 2, 3, 5, 7, 10, 11, 15, 99, 100, 1000].map(|n| json!(n)));
    all.extend([-0.5, 0.1, 0.25, 1.5, 2.5, 99.9].map(|n| json!(n)));
    let texts = ["a", "ab", "abc", "red", "other", "end", "AB-1234", "Hello, world", "2024-02-29", "2023-02-29"];
    all.extend(texts.map(|text| json!(text)));
    let formats = ["12:30:00Z", "2024-01-31T12:00:00Z", "10.0.0.1", "256.0.0.1", "::1", "a@b.io", "http://a.b/c"];
    all.extend(formats.map(|text| json!(text)));
    all.extend([json!("0f8fad5b-d9cb-469f-a165-70867728950e"), json!("wei\u{df}"), json!("\u{20ac}\"\\\n")]);
    all.extend([
        json!([1]),
        json!([1, 2]),
        json!([1, 1]),
        json!(["a", "b", "c"]),
        json!([true, null]),
        json!([[1], [2]]),
    ]);
    all.extend([json!([1, "a"]), json!(["x", 1, true]), json!([1, 2, 3, 4, 5]), json!([null]), json!(["end", "end"])]);
    all.extend([
        json!({"a": 1}),
        json!({"a": true}),
        json!({"b": 1}),
        json!({"a": 1, "b": 2}),
        json!({"a": "x", "b": null}),
    ]);
    all.extend([json!({"x": 1, "y": 2}), json!({"kind": "a", "n": 1}), json!({"kind": "b"}), json!({"x_ab": 1})]);
    all
}

fn validator(name: &str, schema: &Value) -> jsonschema::Validator {
    jsonschema::options().should_validate_formats(true).build(schema).unwrap_or_else(|e| panic!("{name}: {e}"))
}

/// Runs on a thread with as much stack as compilers want.
fn with_stack<T: Send>(work: impl FnOnce() -> T + Send) -> T {
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().stack_size(STACK_BYTES).spawn_scoped(scope, work);
        thread.expect("a thread").join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

#[test]
fn what_is_drawn_is_valid_and_what_is_not_valid_is_not_accepted() {
    let schemas = all();
    println!("{} schemas", schemas.len());
    assert!(schemas.len() >= 300);
    let wrong: Vec<String> = with_stack(|| {
        let bench = Bench::new();
        let values = values();
        let mut wrong = Vec::new();
        for (seed, (name, schema)) in (0..).zip(&schemas) {
            let validator = validator(name, schema);
            let automaton = match bench.compile(schema) {
                Ok(automaton) => automaton,
                Err(reason) => {
                    wrong.push(format!("{name}: refused: {reason}"));
                    continue;
                }
            };
            let is_of_calendar = bases::CALENDAR.iter().any(|kind| name.starts_with(kind));
            for draw in 0..DRAWS {
                let Some(text) = bench.draw(automaton.copy(), seed * DRAWS + draw) else {
                    wrong.push(format!("{name}: a draw has no end"));
                    continue;
                };
                match serde_json::from_str::<Value>(&text) {
                    Ok(value) if validator.is_valid(&value) => {}
                    // Checks of calendars are not what automata are for.
                    Ok(_) if is_of_calendar && (text.contains("-02-29") || text.contains(":60")) => {}
                    // It is JSON, but larger than numbers are here.
                    Err(error) if error.to_string().contains("number out of range") => {}
                    Ok(_) => wrong.push(format!("{name}: not valid: {text}")),
                    Err(error) => wrong.push(format!("{name}: {error}: {text}")),
                }
            }
            for value in &values {
                let is_excepted = is_of_calendar && *value == "2023-02-29";
                if !is_excepted && !validator.is_valid(value) && bench.accepts(automaton.copy(), &value.to_string()) {
                    wrong.push(format!("{name}: accepts {value}"));
                }
            }
        }
        wrong
    });
    assert!(wrong.is_empty(), "{} of {} schemas:\n{}", wrong.len(), schemas.len(), wrong.join("\n"));
}

#[test]
fn what_is_valid_is_accepted() {
    // Of schemas that stand alone. Elsewhere order and spelling may be narrower than a validator's.
    let (mut n_valid, mut narrower) = (0, BTreeMap::<String, Vec<String>>::new());
    with_stack(|| {
        let bench = Bench::new();
        let values = values();
        for (name, schema) in bases::all() {
            let validator = validator(name, &schema);
            let automaton = bench.compile(&schema).unwrap_or_else(|reason| panic!("{name}: {reason}"));
            for value in values.iter().filter(|value| validator.is_valid(value)) {
                n_valid += 1;
                if !bench.accepts(automaton.copy(), &value.to_string()) {
                    narrower.entry(name.to_owned()).or_default().push(value.to_string());
                }
            }
        }
    });
    println!("{n_valid} values are valid");
    let known = bases::NARROWER;
    for (name, values) in &narrower {
        assert!(known.contains(&name.as_str()), "{name} does not accept {values:?}");
    }
    for name in known {
        assert!(narrower.contains_key(*name), "{name} accepts all that is valid: it need not be listed");
    }
    assert!(n_valid > 100, "{n_valid}");
}

#[test]
fn what_can_not_be_kept_to_is_refused_with_a_reason() {
    let cases = refused::all();
    let wrong: Vec<String> = with_stack(|| {
        let bench = Bench::new();
        let check = |(keyword, schema, want): &(&str, Value, &str)| match bench.compile(schema) {
            Ok(_) => Some(format!("{keyword}: {schema} is taken")),
            Err(reason) if !reason.contains(want) => Some(format!("{keyword}: {reason}")),
            Err(_) => None,
        };
        cases.iter().filter_map(check).collect()
    });
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}
