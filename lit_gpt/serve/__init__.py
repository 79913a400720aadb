"""A checkpoint behind an OpenAI-compatible API and a web page.

A request's way: `middleware` (who, how large) → `app` (routes) → `protocol` (is it well formed) → `completions`, `chat`
or `coin` (what was asked) → `worker` (the one thread that owns the decoding engine) → `streaming` (JSON, or
server-sent events, for as long as somebody listens).
"""
