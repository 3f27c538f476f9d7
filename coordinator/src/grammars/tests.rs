use std::path::Path;

use phalanx_proto::v1::SamplingParams;

use super::*;
use crate::request::StopConditions;

fn tokenizer() -> Arc<Tokenizer> {
    let folder = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/golden/arch-tokenizer"));
    Arc::new(Tokenizer::from_folder(folder).expect("a good tokenizer"))
}

fn request(regex: &str) -> Request {
    let grammar = Some(to_wire(Grammar::Regex(regex.to_owned()), "guided_regex".to_owned(), false));
    Request {
        id: "r".to_owned(),
        prompt: vec![1],
        n: 1,
        sampling: SamplingParams { grammar, ..SamplingParams::default() },
        max_tokens: 1,
        is_open_ended: false,
        stop: StopConditions::default(),
        deadline: None,
        priority: 0,
        cache_root: phalanx_cluster::seal::Seal::EMPTY,
        resume: Vec::new(),
    }
}

#[tokio::test]
async fn good_grammars_are_marked_with_their_vocabulary() {
    let grammars = Grammars::here(tokenizer());
    let mut requests = vec![request("a+"), Request { sampling: SamplingParams::default(), ..request("") }];
    grammars.admit(&mut requests).await.expect("a good grammar");
    let marked = requests[0].sampling.grammar.as_ref().expect("it is still there");
    assert_eq!(marked.vocabulary, fingerprint(&tokenizer()));
    assert_ne!(marked.vocabulary, 0);
    assert!(requests[1].sampling.grammar.is_none());
}

#[tokio::test]
async fn bad_ones_are_refused_and_remembered() {
    let grammars = Grammars::here(tokenizer());
    for _ in 0..2 {
        let (field, refusal) = grammars.admit(&mut [request("a+"), request("(a")]).await.expect_err("a bad grammar");
        assert_eq!(field, "guided_regex");
        assert!(matches!(refusal, Refusal::OfGrammar(_)), "{refusal}");
    }
    let none = Grammars::none(tokenizer(), "not here");
    let (_, refusal) = none.admit(&mut [request("a+")]).await.expect_err("none is possible");
    assert_eq!(refusal.to_string(), "not here");
}
