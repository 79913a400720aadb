"""A checkpoint behind an OpenAI-compatible API and a web page.

The modules that a request passes, in order: `middleware` (access, body size) → `app` (routes) → `protocol` (validation)
→ `completions`, `chat` or `next_token` (the endpoint) → `worker` (the thread that owns the generation engine) →
`streaming` (JSON or server-sent events, until the client disconnects).
"""
