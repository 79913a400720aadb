"""A checkpoint behind an OpenAI-compatible API and a web page."""
