//! What clients of text-generation-inference send.

use std::time::Instant;

use serde_json::Value;

use super::answer::{Form, Prompted, Wants};
use crate::{
    frontend::{
        FrontendState,
        error::ApiError,
        fields::{Fields, Unsupported},
        neutral::{Delivery, StreamedUsage},
        params::{MAX_LOGPROBS, MAX_N, Params, RawParams, in_range},
        prompt::{Prompt, SpecialTokens},
        structured::{self, Wanted},
    },
    request::Request,
};

/// `max_new_tokens` if unset, as there.
const DEFAULT_MAX_TOKENS: u32 = 100;

/// A request, checked but not yet tokenized.
pub struct Ask {
    inputs: String,
    pub params: Params,
    pub wants: Wants,
}

fn is_false(value: &Value) -> bool {
    *value == Value::Bool(false)
}

fn is_one(value: &Value) -> bool {
    value.as_f64() == Some(1.0)
}

fn never(_: &Value) -> bool {
    false
}

/// What has no implementation, with the value that asks for nothing.
static UNSUPPORTED: &[Unsupported] = &[("typical_p", is_one), ("watermark", is_false), ("adapter_id", never)];

impl Ask {
    pub fn parse(mut fields: Fields, state: &FrontendState, form: Form) -> Result<Self, ApiError> {
        let inputs: String = fields.require("inputs")?;
        let parameters = fields.take::<Fields>("parameters")?;
        let is_streamed = match (form, fields.take::<bool>("stream")?) {
            (Form::AsAsked, asked) => asked.unwrap_or(false),
            (Form::Object, Some(true)) => {
                return Err(ApiError::invalid("stream", "is not possible here: use /generate_stream"));
            }
            (Form::Object, _) => false,
            (Form::Events, Some(false)) => {
                return Err(ApiError::invalid("stream", "can't be false here: use /generate"));
            }
            (Form::Events, _) => true,
        };
        fields.finish()?;
        let mut parameters = match parameters {
            Some(parameters) => parameters,
            None => Fields::of_body(b"{}")?,
        };
        let (params, wants) = take(&mut parameters, state, is_streamed, form == Form::AsAsked)?;
        parameters.finish()?;
        Ok(Self { inputs, params, wants })
    }

    /// For the scheduler, and what the answer needs of the prompt.
    pub fn request(
        &self,
        state: &FrontendState,
        id: String,
        deadline: Option<Instant>,
    ) -> Result<(Request, Prompted), ApiError> {
        let ids = state.encode(&Prompt::Text(self.inputs.clone()), SpecialTokens::Add, "inputs")?;
        let request = self.params.request(id, "inputs", ids, &state.model, deadline)?;
        let prompted = Prompted {
            text: if self.wants.full_text { state.repeated(self.inputs.clone()) } else { String::new() },
            ids: if self.wants.prefill { request.prompt.clone() } else { Vec::new() },
            n_tokens: request.prompt.len(),
        };
        Ok((request, prompted))
    }
}

/// Above 0, as there; elsewhere 0 is a value too.
fn positive<T: PartialOrd + From<u8>>(name: &str, value: Option<T>) -> Result<Option<T>, ApiError> {
    match value {
        Some(value) if value <= T::from(0) => Err(ApiError::invalid(name, "must be above 0")),
        value => Ok(value),
    }
}

/// `grammar`: a schema, or a regex.
fn take_grammar(parameters: &mut Fields) -> Result<Option<Wanted>, ApiError> {
    let Some(mut grammar) = parameters.take::<Fields>("grammar")? else { return Ok(None) };
    let field = grammar.path("value");
    let wanted = match grammar.require::<String>("type")?.as_str() {
        "json" | "json_object" => structured::of_schema(&field, grammar.require("value")?)?,
        "regex" => structured::of_regex(&field, grammar.require("value")?),
        "json_schema" => {
            let mut named = grammar.require::<Fields>("value")?;
            // A label.
            named.take::<String>("name")?;
            let field = named.path("schema");
            let wanted = structured::of_schema(&field, named.require("schema")?)?;
            named.finish()?;
            wanted
        }
        _ => return Err(ApiError::invalid(&grammar.path("type"), "must be json, regex or json_schema")),
    };
    grammar.finish()?;
    Ok(Some(wanted))
}

/// Reads `parameters`.
fn take(
    fields: &mut Fields,
    state: &FrontendState,
    is_streamed: bool,
    in_list: bool,
) -> Result<(Params, Wants), ApiError> {
    let mut raw = RawParams {
        temperature: positive("temperature", fields.take("temperature")?)?,
        top_k: positive("top_k", fields.take("top_k")?)?,
        top_p: fields.take("top_p")?,
        repetition_penalty: fields.take("repetition_penalty")?,
        frequency_penalty: fields.take("frequency_penalty")?,
        seed: fields.take("seed")?,
        stop: fields.take("stop")?.unwrap_or_default(),
        max_tokens: fields.take("max_new_tokens")?,
        max_tokens_field: "max_new_tokens",
        default_max_tokens: Some(DEFAULT_MAX_TOKENS),
        truncate_prompt_tokens: positive("truncate", fields.take("truncate")?)?,
        // The text that ended an answer stands in it.
        include_stop_str_in_output: true,
        ..RawParams::default()
    };
    let draws = fields.flag("do_sample")?
        || raw.temperature.is_some_and(|t| t != 1.0)
        || raw.top_k.is_some()
        || raw.top_p.is_some_and(|p| p < 1.0);
    // This API's own defaults, whatever the model's makers say.
    raw.temperature = if draws { raw.temperature.or(Some(1.0)) } else { Some(0.0) };
    raw.top_k = raw.top_k.or(Some(0));
    raw.top_p = raw.top_p.or(Some(1.0));
    raw.repetition_penalty = raw.repetition_penalty.or(Some(1.0));
    let n_top = in_range("top_n_tokens", fields.take("top_n_tokens")?, 0..=MAX_LOGPROBS)?.unwrap_or(0);
    let wants_details = fields.flag("details")?;
    let prefill = fields.flag("decoder_input_details")?;
    if prefill && is_streamed {
        return Err(ApiError::invalid("decoder_input_details", "is not possible in a stream"));
    }
    if prefill && !wants_details {
        return Err(ApiError::invalid("decoder_input_details", "is only possible when 'details' is true"));
    }
    let best_of = in_range("best_of", fields.take("best_of")?, 1..=MAX_N)?.unwrap_or(1);
    if best_of > 1 && (is_streamed || !draws) {
        return Err(ApiError::invalid(
            "best_of",
            "can be more than 1 only without a stream and when 'do_sample' is true",
        ));
    }
    raw.structured = take_grammar(fields)?;
    raw.n = Some(best_of.into());
    let wants_scores = is_streamed || wants_details || best_of > 1;
    raw.logprobs = wants_scores.then(|| n_top.into());
    raw.prompt_logprobs = prefill.then_some(0);
    let wants = Wants {
        delivery: if is_streamed { Delivery::Streamed(StreamedUsage::Omitted) } else { Delivery::Whole },
        in_list: in_list && !is_streamed,
        details: wants_details,
        prefill,
        n_top,
        full_text: fields.take::<bool>("return_full_text")?.unwrap_or(false),
    };
    fields.refuse(UNSUPPORTED)?;
    let params = Params::check(raw, &state.model)?;
    Ok((params, wants))
}
