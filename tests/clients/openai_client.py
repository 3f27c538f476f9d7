"""Talks to a cluster with the stock openai client. Usage: openai_client.py http://HOST:PORT. Prints one JSON object."""

import io
import json
import sys
import time
from typing import Literal

import openai
import pydantic

client = openai.OpenAI(base_url=sys.argv[1] + "/v1", api_key="none")
model = client.models.list().data[0].id
messages = [{"role": "system", "content": "You are terse."}, {"role": "user", "content": "Why is the sky blue?"}]
shared = {"model": model, "messages": messages, "temperature": 0, "max_tokens": 24}

whole = client.chat.completions.create(**shared, logprobs=True, top_logprobs=2)
pieces, usage, roles, finish = [], None, [], None
for chunk in client.chat.completions.create(**shared, stream=True, stream_options={"include_usage": True}):
    usage = chunk.usage or usage
    for choice in chunk.choices:
        if choice.delta.role:
            roles.append(choice.delta.role)
        pieces.append(choice.delta.content or "")
        finish = choice.finish_reason or finish

two = client.chat.completions.create(**{**shared, "temperature": 1.0}, n=2, seed=7)
legacy = client.completions.create(model=model, prompt="The capital of France is", max_tokens=5, temperature=0, logprobs=1, echo=True)
stopped = client.completions.create(model=model, prompt="1, 2, 3, 4,", max_tokens=40, temperature=0, stop=[" 9"])
try:
    client.chat.completions.create(model="no-such-model", messages=messages)
    wrong = "no error"
except openai.NotFoundError as error:
    wrong = error.code
try:
    client.chat.completions.create(**{**shared, "temperature": 99})
    bad = "no error"
except openai.BadRequestError as error:
    bad = error.param

asked = {"model": model, "instructions": "You are terse.", "input": "Why is the sky blue?", "temperature": 0, "max_output_tokens": 24}
response = client.responses.create(**asked)
events = list(client.responses.create(**asked, stream=True))
counting = list(client.chat.completions.create(
    **shared, stream=True, stream_options={"include_usage": True, "continuous_usage_stats": True}))
echoed = client.chat.completions.create(**shared, extra_body={"allowed_token_ids": [5, 6], "return_token_ids": True})

# A batch of the question from above, one that can't be answered, and another that asks for something else.
lines = [
    {"custom_id": name, "method": "POST", "url": "/v1/chat/completions", "body": {**shared, **more}}
    for name, more in [("same", {}), ("bad", {"temperature": 99}), ("short", {"max_tokens": 1})]
]
sent = client.files.create(file=io.BytesIO("\n".join(map(json.dumps, lines)).encode()), purpose="batch")
batch = client.batches.create(
    input_file_id=sent.id, endpoint="/v1/chat/completions", completion_window="24h", metadata={"job": "test"})
while batch.status not in ("completed", "failed", "expired", "cancelled"):
    time.sleep(0.05)
    batch = client.batches.retrieve(batch.id)
results = [json.loads(line) for line in client.files.content(batch.output_file_id).text.splitlines()]
errors = [json.loads(line) for line in client.files.content(batch.error_file_id).text.splitlines()]
answered = {line["custom_id"]: line["response"]["body"]["choices"][0]["message"]["content"] for line in results}
listed = [file.id for file in client.files.list()]
try:
    client.batches.cancel(batch.id)
    cancelled = "no error"
except openai.ConflictError as error:
    cancelled = error.code
deleted = client.files.delete(sent.id).deleted
try:
    client.files.retrieve(sent.id)
    gone = "no error"
except openai.NotFoundError as error:
    gone = error.code


class Weather(pydantic.BaseModel):
    sunny: bool
    wind: Literal["none", "some", "strong"]


parsed = client.responses.parse(**{**asked, "max_output_tokens": 80}, text_format=Weather)
formed = client.chat.completions.parse(**{**shared, "max_tokens": 80}, response_format=Weather)
schema = {"type": "object", "properties": {"city": {"type": "string", "maxLength": 20}, "unit": {"enum": ["C", "F"]}},
          "required": ["city", "unit"], "additionalProperties": False}
tool = {"type": "function", "function": {"name": "get_weather", "description": "The weather.", "parameters": schema}}
calling = {**shared, "max_tokens": 120, "tools": [tool], "tool_choice": "required", "parallel_tool_calls": False}
called = client.chat.completions.create(**calling)
with client.chat.completions.stream(**calling) as stream:
    call_events = [event.type for event in stream]
    call_streamed = stream.get_final_completion().choices[0]
call = called.choices[0].message.tool_calls[0]
history = messages + [called.choices[0].message, {"role": "tool", "tool_call_id": call.id, "content": "sunny"}]
after_call = client.chat.completions.create(**{**shared, "messages": history}, tools=[tool], tool_choice="none")
flat = {"type": "function", "name": "get_weather", "parameters": schema, "strict": True}
response_tools = {**asked, "max_output_tokens": 120, "tools": [flat], "tool_choice": {"type": "function", "name": "get_weather"}}
response_called = client.responses.create(**response_tools).output[0]
with client.responses.stream(**response_tools) as stream:
    response_deltas = "".join(e.delta for e in stream if e.type == "response.function_call_arguments.delta")
    response_call_streamed = stream.get_final_response().output[0]

print(json.dumps({
    "batch": [batch.status, batch.request_counts.total, batch.request_counts.completed, batch.request_counts.failed],
    "batch_metadata": batch.metadata,
    "batch_listed": [b.id for b in client.batches.list(limit=1)] == [batch.id],
    "batch_same": answered["same"],
    "batch_names": sorted(answered),
    "batch_errors": [[line["custom_id"], line["response"]["status_code"]] for line in errors],
    "batch_cancelled": cancelled,
    "files_listed": all(id in listed for id in (sent.id, batch.output_file_id, batch.error_file_id)),
    "file_deleted": [deleted, gone],
    "parsed": type(parsed.output_parsed).__name__,
    "parsed_alike": parsed.output_parsed == formed.choices[0].message.parsed,
    "call": [call.function.name, json.loads(call.function.arguments), called.choices[0].finish_reason],
    "call_content": called.choices[0].message.content,
    "call_arguments": call.function.arguments,
    "call_streamed": call_streamed.message.tool_calls[0].function.arguments,
    "call_streamed_reason": call_streamed.finish_reason,
    "call_pieces": call_events.count("tool_calls.function.arguments.delta"),
    "after_call": after_call.choices[0].message.content,
    "response_call": [response_called.type, response_called.arguments],
    "response_call_streamed": [response_call_streamed.arguments, response_deltas],
    "response": response.output_text,
    "response_status": [response.status, response.store],
    "response_streamed": "".join(e.delta for e in events if e.type == "response.output_text.delta"),
    "response_numbers": [e.sequence_number for e in events] == list(range(len(events))),
    "response_last": events[-1].type,
    "response_usage": [response.usage.output_tokens, events[-1].response.usage.output_tokens],
    "counts": [c.usage.completion_tokens for c in counting],
    "allowed": sorted(set(echoed.choices[0].model_extra["token_ids"])),
    "model": model,
    "whole": whole.choices[0].message.content,
    "whole_tokens": len(whole.choices[0].logprobs.content),
    "whole_usage": whole.usage.completion_tokens,
    "streamed": "".join(pieces),
    "streamed_chunks": len([p for p in pieces if p]),
    "streamed_usage": usage.completion_tokens,
    "roles": roles,
    "finish": finish,
    "choices": [c.index for c in two.choices],
    "legacy": legacy.choices[0].text,
    "legacy_first_logprob": legacy.choices[0].logprobs.token_logprobs[0],
    "legacy_logprobs": len(legacy.choices[0].logprobs.token_logprobs),
    "stopped": stopped.choices[0].text,
    "stopped_reason": stopped.choices[0].finish_reason,
    "wrong_model": wrong,
    "bad_parameter": bad,
}))
