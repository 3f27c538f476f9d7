"""Talks to a cluster with the stock ollama client. Usage: ollama_client.py http://HOST:PORT MODEL. Prints one JSON object."""

import json
import sys

import ollama

client = ollama.Client(host=sys.argv[1])
model = client.list().models[0].model
messages = [{"role": "system", "content": "You are terse."}, {"role": "user", "content": "Why is the sky blue?"}]
options = {"temperature": 0, "num_predict": 24}

whole = client.chat(model=model, messages=messages, options=options)
parts = list(client.chat(model=model, messages=messages, options=options, stream=True))
text = client.generate(model=model, prompt="The capital of France is", raw=True, options={"temperature": 0, "num_predict": 5})
pieces = list(client.generate(model=model, prompt="The capital of France is", raw=True,
                              options={"temperature": 0, "num_predict": 5}, stream=True))
shown = client.show(model)
running = client.ps().models
try:
    client.chat(model="no-such-model", messages=messages)
    wrong = "no error"
except ollama.ResponseError as error:
    wrong = error.status_code
try:
    client.chat(model=model, messages=messages, options={"temperature": 99})
    bad = "no error"
except ollama.ResponseError as error:
    bad = error.error

schema = {"type": "object", "properties": {"sunny": {"type": "boolean"}}, "required": ["sunny"], "additionalProperties": False}
formed = client.chat(model=model, messages=messages, options={"temperature": 0, "num_predict": 60}, format=schema)

def get_weather(city: str) -> str:
    """The weather.

    Args:
        city: The city.
    """
    return "sunny"


# As the model likes: it may call or not, but the same streamed.
asked = messages[:1] + [{"role": "user", "content": "What is the weather in Paris? Call get_weather."}]
called = client.chat(model=model, messages=asked, tools=[get_weather], options=options).message
call_parts = [part.message for part in client.chat(model=model, messages=asked, tools=[get_weather], options=options, stream=True)]
history = asked + [
    {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "get_weather", "arguments": {"city": "Paris"}}}]},
    {"role": "tool", "tool_name": "get_weather", "content": "sunny"},
]
after_call = client.chat(model=model, messages=history, tools=[get_weather], options=options).message


def calls(messages):
    return [[call.function.name, dict(call.function.arguments)] for message in messages for call in message.tool_calls or []]

print(json.dumps({
    "formed": json.loads(formed.message.content),
    "called": [called.content, calls([called])],
    "called_streamed": ["".join(part.content or "" for part in call_parts), calls(call_parts)],
    "after_call": [after_call.content or "", calls([after_call])],
    "capabilities": shown.capabilities,
    "model": model,
    "whole": whole.message.content,
    "streamed": "".join(part.message.content for part in parts),
    "parts": len(parts),
    "done": [part.done for part in parts],
    "eval_count": [whole.eval_count, parts[-1].eval_count],
    "durations": [parts[-1].total_duration, parts[-1].prompt_eval_duration + parts[-1].eval_duration],
    "done_reason": whole.done_reason,
    "text": text.response,
    "text_streamed": "".join(piece.response for piece in pieces),
    "context_length": [value for name, value in shown.modelinfo.items() if name.endswith(".context_length")],
    "running": running[0].model,
    "wrong_model": wrong,
    "bad_parameter": bad,
}))
