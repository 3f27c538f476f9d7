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

schema = {"type": "object", "properties": {"city": {"type": "string", "maxLength": 20}, "unit": {"enum": ["C", "F"]}},
          "required": ["city", "unit"], "additionalProperties": False}
tool = {"name": "get_weather", "description": "The weather.", "input_schema": schema}
choice = {"type": "any", "disable_parallel_tool_use": True}
calling = {**shared, "max_tokens": 120, "tools": [tool], "tool_choice": choice}
called = client.messages.create(**calling)
with client.messages.stream(**calling) as stream:
    call_pieces = len([event for event in stream if event.type == "input_json"])
    call_streamed = stream.get_final_message()
use = called.content[0]
result = {"type": "tool_result", "tool_use_id": use.id, "content": "sunny"}
history = shared["messages"] + [{"role": "assistant", "content": called.content}, {"role": "user", "content": [result]}]
after_call = client.messages.create(**{**shared, "messages": history, "tools": [tool], "tool_choice": {"type": "none"}})

print(json.dumps({
    "call": [use.type, use.name, use.input, called.stop_reason],
    "call_streamed": [call_streamed.content[0].input, call_streamed.stop_reason],
    "call_pieces": call_pieces,
    "after_call": after_call.content[0].text,
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
