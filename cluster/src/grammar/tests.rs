use std::path::Path;

use serde_json::{Value, json};

use super::*;
use crate::tokenizer::Tokenizer;

fn tokenizer() -> Tokenizer {
    let folder = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/golden/arch-tokenizer"));
    Tokenizer::from_folder(folder).expect("a good tokenizer")
}

fn compiler() -> Compiler {
    Compiler::new(&tokenizer(), Limits::default()).expect("it has an end-of-sequence token")
}

/// Draws among what is allowed until the end; the tokens and their text.
fn draw(compiler: &Compiler, grammar: &Grammar, mut seed: u64) -> (Vec<u32>, String) {
    let tokenizer = tokenizer();
    let n_tokens = u32::try_from(tokenizer.vocab_size()).expect("a small vocabulary");
    let mut automaton = compiler.compile(grammar).expect("a good grammar");
    let mut tokens = Vec::new();
    while tokens.len() < 500 {
        let mask = automaton.mask().expect("simple enough");
        let allowed: Vec<u32> = (0..n_tokens).filter(|token| mask.allows(*token)).collect();
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let token = allowed[(seed >> 33) as usize % allowed.len()];
        automaton.advance(token).expect("it is allowed");
        if compiler.eos().contains(&token) {
            break;
        }
        tokens.push(token);
    }
    let text = tokenizer.decode(&tokens, true);
    (tokens, text)
}

#[test]
fn what_is_drawn_follows_the_grammar() {
    let compiler = compiler();
    let choices = ["left".to_owned(), "right \"hand\" \u{7f}".to_owned(), "\u{fc}ber".to_owned()];
    let schema = json!({"type": "object", "properties": {"a": {"type": "integer", "minimum": 7, "maximum": 31},
        "b": {"enum": ["x", null]}}, "required": ["a", "b"], "additionalProperties": false});
    let gbnf = "root ::= \"<\" [a-c]{2} \">\" | digit+ \".\"\ndigit ::= [0-1]";
    for seed in 0..30 {
        let (_, text) = draw(&compiler, &Grammar::of_choices(&choices).unwrap(), seed);
        assert!(choices.contains(&text), "{text:?}");
        let schema = Grammar::of_schema(schema.clone(), &WhiteSpace::Some).unwrap();
        let value: Value = serde_json::from_str(&draw(&compiler, &schema, seed).1).expect("JSON");
        assert!((7..=31).contains(&value["a"].as_i64().expect("an integer")), "{value}");
        assert!(value["b"] == "x" || value["b"].is_null(), "{value}");
        let (_, text) = draw(&compiler, &Grammar::of_notation(gbnf.to_owned()).unwrap(), seed);
        let is_tag = text.len() == 4 && text.starts_with('<') && text.ends_with('>');
        let is_number = text.strip_suffix('.').is_some_and(|digits| digits.chars().all(|c| "01".contains(c)));
        assert!(is_tag || is_number || text.len() > 400, "{text:?}");
    }
}

#[test]
fn an_output_that_is_replayed_goes_on_with_the_same_masks() {
    let compiler = compiler();
    let grammar = Grammar::Regex("([a-z]{2,5} ){3,9}!".to_owned());
    let (tokens, _) = draw(&compiler, &grammar, 5);
    let mut first = compiler.compile(&grammar).unwrap();
    for n_known in 0..tokens.len() {
        let mut again = compiler.compile(&grammar).unwrap();
        tokens[..n_known].iter().for_each(|token| again.advance(*token).unwrap());
        let mask = first.mask().unwrap();
        assert_eq!(again.mask().unwrap(), mask);
        assert_eq!(first.copy().mask().unwrap(), mask, "a copy is in the same state");
        first.advance(tokens[n_known]).unwrap();
    }
}

#[test]
fn the_end_is_allowed_where_the_output_is_complete() {
    let compiler = compiler();
    let mut automaton = compiler.compile(&Grammar::Regex("aa?".to_owned())).unwrap();
    let end = compiler.eos()[0];
    assert!(!automaton.mask().unwrap().allows(end));
    let a = tokenizer().encode("a", false).unwrap();
    automaton.advance(a[0]).unwrap();
    let mask = automaton.mask().unwrap();
    assert!(mask.allows(end) && mask.has_other_than(compiler.eos()));
    automaton.advance(a[0]).unwrap();
    let mask = automaton.mask().unwrap();
    assert!(mask.allows(end) && !mask.has_other_than(compiler.eos()));
    automaton.advance(end).unwrap();
    automaton.advance(end).unwrap();
    assert!(!automaton.mask().unwrap().has_other_than(compiler.eos()), "nothing follows the end");
}

#[test]
fn a_token_that_is_not_allowed_is_an_error() {
    let mut automaton = compiler().compile(&Grammar::Regex("b+".to_owned())).unwrap();
    let a = tokenizer().encode("a", false).unwrap();
    assert!(matches!(automaton.advance(a[0]), Err(GrammarError::Stuck(_))));
    assert!(automaton.mask().is_err(), "and the automaton is of no use");
}

#[test]
fn what_is_wrong_is_refused() {
    let compiler = compiler();
    let long = Grammar::Regex("a".repeat(MAX_BYTES + 1));
    assert_eq!(compiler.compile(&long).err(), Some(GrammarError::TooLong { got: MAX_BYTES + 1 }));
    for grammar in [
        Grammar::Regex("(a".to_owned()),
        Grammar::JsonSchema("{".to_owned()),
        Grammar::JsonSchema(r#"{"type": "text"}"#.to_owned()),
        Grammar::JsonSchema(r#"{"$ref": "http://127.0.0.1/x"}"#.to_owned()),
        Grammar::Lark("start: item".to_owned()),
        Grammar::Lark(String::new()),
    ] {
        assert!(matches!(compiler.compile(&grammar), Err(GrammarError::Refused(_))), "{grammar:?}");
    }
    for schema in [json!(false), json!(3), json!({"x-guidance": {}})] {
        assert!(Grammar::of_schema(schema, &WhiteSpace::Some).is_err());
    }
    assert!(Grammar::of_choices(&[]).is_err() && Grammar::of_choices(&[String::new()]).is_err());
}

#[test]
fn another_vocabulary_has_another_fingerprint() {
    let bytes = crate::tokenizer::GgufTokenizer {
        model: "gpt2".into(),
        pre: "gpt-2".into(),
        tokens: vec!["a".into(), "b".into(), "<|endoftext|>".into()],
        token_types: vec![1, 1, 3],
        eos_id: Some(2),
        ..Default::default()
    };
    let other = crate::tokenizer::GgufTokenizer {
        tokens: vec!["a".into(), "c".into(), "<|endoftext|>".into()],
        ..bytes.clone()
    };
    let [one, two] = [bytes, other].map(|gguf| Tokenizer::from_gguf(&gguf).expect("good tokenizers"));
    assert_eq!(fingerprint(&one), fingerprint(&one));
    assert_ne!(fingerprint(&one), fingerprint(&two));
    let endless = crate::tokenizer::GgufTokenizer {
        model: "gpt2".into(),
        pre: "gpt-2".into(),
        tokens: vec!["a".into()],
        ..Default::default()
    };
    let endless = Tokenizer::from_gguf(&endless).expect("a good tokenizer");
    assert_eq!(Compiler::new(&endless, Limits::default()).err(), Some(GrammarError::NoEnd));
}
