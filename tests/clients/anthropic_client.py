"""Talks to a cluster with the stock anthropic client. Usage: anthropic_client.py http://HOST:PORT. Prints one JSON object."""

import json
import sys

import anthropic

client = anthropic.Anthropic(base_url=sys.argv[1], api_key="none")
model = "default-model"
shared = {
    "model": model,
    "max_tokens": 24,
    # The package has no argument for it any more, the API does.
    "extra_body": {"temperature": 0},
    "system": "You are terse.",
    "messages": [{"role": "user", "content": "Why is the sky blue?"}],
}

try:
    client.messages.create(**shared)
    wrong = "no error"
except anthropic.NotFoundError as error:
    wrong = error.body["error"]["type"]
shared["model"] = sys.argv[2]
whole = client.messages.create(**shared)
pieces, kinds = [], []
with client.messages.stream(**shared) as stream:
    for event in stream:
        kinds.append(event.type)
        if event.type == "text":
            pieces.append(event.text)
    final = stream.get_final_message()
raw = [event.type for event in client.messages.create(**shared, stream=True)]
stopped = client.messages.create(**{**shared, "system": "Count.", "max_tokens": 60, "stop_sequences": [" "]})
counted = client.messages.count_tokens(model=shared["model"], system=shared["system"], messages=shared["messages"])
try:
    client.messages.create(**{**shared, "extra_body": {"temperature": 99}})
    bad = "no error"
except anthropic.BadRequestError as error:
    bad = error.body["error"]["message"]

print(json.dumps({
    "whole": whole.content[0].text,
    "streamed": "".join(pieces),
    "final": final.content[0].text,
    "pieces": len(pieces),
    "raw": sorted(set(raw)),
    "stop_reason": whole.stop_reason,
    "final_stop_reason": final.stop_reason,
    "output_tokens": [whole.usage.output_tokens, final.usage.output_tokens],
    "input_tokens": whole.usage.input_tokens + whole.usage.cache_read_input_tokens,
    "counted": counted.input_tokens,
    "stopped": [stopped.stop_reason, stopped.stop_sequence],
    "wrong_model": wrong,
    "bad_parameter": bad,
}))
