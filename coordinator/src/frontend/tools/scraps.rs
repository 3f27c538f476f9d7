//! Pieces of what models write, for tests that put them together at random.

use super::{FORMATS, thoughts::THOUGHTS};

/// What stands between marks, and some that are not whole.
const BETWEEN: &[&str] = &[
    "[THINK]",
    "[/THINK]",
    "<|channel|>analysis<|message|>",
    "<|channel|>commentary to=functions.f<|message|>",
    "<|call|>",
    "<|end|>",
    "<function=f>",
    "<parameter=a>\n",
    "</parameter>",
    "</function>",
    "f<arg_key>a</arg_key>",
    "<|tool_call_begin|>functions.f:0",
    "{\"name\": \"f\", \"arguments\": ",
    "{\"name\": \"get_weather\", \"parameters\": ",
    "{\"a\": [1, \"é\"]}",
    "{}",
    "}",
    "[",
    "]",
    "f(a=1, b='x')",
    "get_weather(",
    ")",
    ", ",
    "; ",
    "\n",
    "Text.",
    "f",
    "<|channel|>",
    "<|message|>",
    "<|start|>",
    "assistant",
    "commentary to=functions.f ",
    "analysis",
    "final",
    "function",
    "<arg_key>a</arg_key>",
    "{\"name\": \"f\", \"parameters\": ",
    "{\"a\": [1, \"é😀\\n\"]}",
    "{",
    "(",
    "f(",
    "a=",
    "'x'",
    "1",
    " ",
    "```json\n",
    "\n```",
    "é",
    "text",
];

/// The marks of every format and of thoughts, and what stands between them.
pub fn scraps() -> Vec<&'static str> {
    let of_calls = FORMATS.iter().flat_map(|format| format.marks());
    let of_thoughts = THOUGHTS.iter().flat_map(|form| form.open.iter().chain(form.close));
    of_calls.chain(of_thoughts).chain(BETWEEN).copied().collect()
}
