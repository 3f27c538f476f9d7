use phalanx_cluster::checkpoint::generation::GenerationDefaults;

use super::*;
use crate::frontend::tests::fake::{CONTEXT, Server};

fn model() -> ServedModel {
    let server = Server::saying("x");
    ServedModel::clone(&server.state.model)
}

#[test]
fn unset_is_openai_s_default() {
    let model = model();
    let params = Params::check(RawParams::default(), &model).unwrap();
    let request = params.request("r".to_owned(), "prompt", vec![5; 10], &model, None).unwrap();
    let sampling = request.sampling;
    assert_eq!((sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p), (1.0, 1.0, 0, 0.0));
    assert_eq!((sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty), (1.0, 0.0, 0.0));
    assert_eq!((sampling.logprobs, sampling.prompt_logprobs, sampling.min_tokens), (None, None, 0));
    assert_eq!((request.n, request.max_tokens as usize), (1, CONTEXT - 10));
    assert!(request.stop.skip_special_tokens && !request.stop.ignore_eos && request.stop.strings.is_empty());
}

#[test]
fn unset_is_what_the_model_s_makers_say() {
    let mut model = model();
    model.defaults = GenerationDefaults {
        temperature: Some(0.5),
        top_k: Some(7),
        top_p: Some(0.75),
        min_p: Some(0.25),
        repetition_penalty: Some(1.5),
        max_new_tokens: Some(9),
    };
    let request = |raw| {
        let params = Params::check(raw, &model).unwrap();
        params.request("r".to_owned(), "prompt", vec![5; 10], &model, None).unwrap()
    };
    let unset = request(RawParams::default());
    let drawing = |sampling: &SamplingParams| {
        (sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p, sampling.repetition_penalty)
    };
    assert_eq!((drawing(&unset.sampling), unset.max_tokens), ((0.5, 7, 0.75, 0.25, 1.5), 9));
    // What is set counts, "all tokens" too; so does the default of an API.
    let set = request(RawParams {
        temperature: Some(0.0),
        top_k: Some(-1),
        top_p: Some(1.0),
        min_p: Some(0.0),
        repetition_penalty: Some(1.0),
        default_max_tokens: Some(16),
        ..RawParams::default()
    });
    assert_eq!((drawing(&set.sampling), set.max_tokens), ((0.0, 0, 1.0, 0.0, 1.0), 16));
}

#[test]
fn what_is_not_a_number_is_in_no_range() {
    let model = model();
    for number in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let x = Some(number);
        for raw in [
            RawParams { temperature: x, ..RawParams::default() },
            RawParams { top_p: x, ..RawParams::default() },
            RawParams { min_p: x, ..RawParams::default() },
            RawParams { repetition_penalty: x, ..RawParams::default() },
            RawParams { presence_penalty: x, ..RawParams::default() },
            RawParams { frequency_penalty: x, ..RawParams::default() },
            RawParams { logit_bias: vec![(5, number)], ..RawParams::default() },
        ] {
            assert!(Params::check(raw, &model).is_err());
        }
    }
}

#[test]
fn bounds_themselves_are_inside() {
    let model = model();
    let raw = RawParams {
        temperature: Some(2.0),
        top_p: Some(1.0),
        min_p: Some(1.0),
        repetition_penalty: Some(10.0),
        presence_penalty: Some(-2.0),
        frequency_penalty: Some(2.0),
        logit_bias: vec![(Integer::try_from(model.vocab).unwrap() - 1, 100.0)],
        seed: Some(u64::MAX.into()),
        n: Some(MAX_N.into()),
        logprobs: Some(MAX_LOGPROBS.into()),
        stop: vec!["x".repeat(MAX_STOP_BYTES); MAX_STOP_STRINGS],
        ..RawParams::default()
    };
    let params = Params::check(raw, &model).unwrap();
    let request = params.request("r".to_owned(), "prompt", vec![5], &model, None).unwrap();
    assert_eq!(request.sampling.seed, u64::MAX);
}

#[test]
fn prompt_and_output_share_the_context() {
    let model = model();
    let fits = |raw: RawParams, n_prompt: usize| {
        let params = Params::check(raw, &model).unwrap();
        params.request("r".to_owned(), "prompt", vec![5; n_prompt], &model, None).map(|r| r.max_tokens)
    };
    let with = |max_tokens: Integer| RawParams { max_tokens: Some(max_tokens), ..RawParams::default() };
    assert_eq!(fits(with(4), CONTEXT - 4), Ok(4));
    assert!(fits(with(5), CONTEXT - 4).is_err());
    assert_eq!(fits(RawParams::default(), CONTEXT - 1), Ok(1));
    assert!(fits(RawParams::default(), CONTEXT).is_err(), "no room for a token");
    assert!(fits(RawParams::default(), 0).is_err(), "no prompt");
    let scored = || RawParams { prompt_logprobs: Some(0), ..with(0) };
    assert_eq!(fits(scored(), CONTEXT), Ok(0), "a prompt that is only scored may fill the context");
    assert!(fits(scored(), CONTEXT + 1).is_err());
}
