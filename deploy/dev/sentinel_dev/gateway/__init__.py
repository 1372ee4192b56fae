"""A simulated OpenAI-compatible gateway that says what it charged, and misbehaves when a model's name asks it to.

How long an answer is: `tokens-N` in the model's name, else "say N tokens" at the end of the prompt, else 16; never more
than `max_completion_tokens`, `max_tokens` or `max_output_tokens` per choice (then `finish_reason` is `length`). Words
have one token each. Any model is served; a name `sim/<part>+<part>...` asks for:

| part | behaviour |
|---|---|
| `slow`, `slow-50ms` | that pause before the first byte and between events; `late-50ms`: before the first byte only |
| `tokens-50`, `long` | so many output tokens; 10,000 |
| `status-429` | that error in OpenAI's form; 429 and 503 with `retry-after: 1` |
| `hang` | never answers |
| `cut`, `cut-5` | the connection closes after half of the events, after 5; JSON: after half of the body |
| `error-mid-stream`, `hang-mid-stream`, with `-5` too | the same place: an error event; silence |
| `endless-line` | the same place: a line of 64 MiB without an end, then the connection closes |
| `no-usage`, `usage-null` | usage is left out; null |
| `usage-zero` | explicit zeros, and nothing is charged |
| `usage-with-choices` | unasked, on the last chunk that has choices, and no chunk of its own |
| `usage-running` | unasked, growing on every chunk |
| `crlf`, `comments`, `no-space` | CRLF line ends; comment lines between events; `data:{` |
| `events`, `no-done` | `event:` lines; no `[DONE]` |
| `cjk`, `one-byte` | text of three-byte characters; the same, one byte per write |
| `many-events-per-write` | ten at a time |
| `gzip` | a compressed JSON answer, where the request accepts it |
| `tools`, `reason` (in any model's name) | calls the first tool, unless a tool's result came last; half is reasoning |
| `json`, `refusal` | a JSON text (as do `response_format` and `text.format`, by their schema); a refusal |
| `over-cap` | disregards the caps |

Charged: every 2xx answer but those about models, 1 request and its tokens, to the `user` that the body names, else to
`-`. Of a stream that is cut or left: what had been written, also summed up apart as `unfinished`. What ends before its
first byte is not charged. /admin: GET books, GET requests?last=N, GET and POST and DELETE faults (delay, status,
refuse, hang), POST reset.
"""

from sentinel_dev.gateway.app import Gateway, create_gateway

__all__ = ["Gateway", "create_gateway"]
