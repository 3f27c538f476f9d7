"""Talks to a cluster with huggingface_hub's InferenceClient. Usage: hugging_face_client.py http://HOST:PORT.
Prints one JSON object."""

import json
import sys

from huggingface_hub import InferenceClient

client = InferenceClient(model=sys.argv[1])
prompt = "The capital of France is"

plain = client.text_generation(prompt, max_new_tokens=8)
whole = client.text_generation(prompt, max_new_tokens=8, details=True, decoder_input_details=True, top_n_tokens=2)
events = list(client.text_generation(prompt, max_new_tokens=8, details=True, stream=True))
texts = list(client.text_generation(prompt, max_new_tokens=8, stream=True))
stopped = client.text_generation("1, 2, 3, 4,", max_new_tokens=40, details=True, stop=[" 9"])
drawn = [client.text_generation(prompt, max_new_tokens=8, do_sample=True, seed=5, temperature=0.9) for _ in range(2)]
try:
    client.text_generation(prompt, max_new_tokens=8, top_k=-1)
    bad = "no error"
except Exception as error:
    bad = type(error).__name__

matched = client.text_generation("Sides:", max_new_tokens=20, grammar={"type": "regex", "value": " (left|right)"})
schema = {"type": "object", "properties": {"sunny": {"type": "boolean"}}, "required": ["sunny"], "additionalProperties": False}
formed = client.text_generation("The weather as JSON: ", max_new_tokens=60, grammar={"type": "json", "value": schema})

print(json.dumps({
    "matched": matched,
    "formed": json.loads(formed),
    "plain": plain,
    "whole": whole.generated_text,
    "finish": str(getattr(whole.details.finish_reason, "value", whole.details.finish_reason)),
    "tokens": "".join(token.text for token in whole.details.tokens),
    "prefill": len(whole.details.prefill),
    "top": len(whole.details.top_tokens[0]) if whole.details.top_tokens else 0,
    "streamed": "".join(event.token.text for event in events if not event.token.special),
    "final": events[-1].generated_text,
    "texts": "".join(texts),
    "generated_tokens": [whole.details.generated_tokens, events[-1].details.generated_tokens],
    "stopped": stopped.generated_text,
    "stopped_reason": str(getattr(stopped.details.finish_reason, "value", stopped.details.finish_reason)),
    "drawn_alike": drawn[0] == drawn[1],
    "bad_parameter": bad,
}))
