"""The OpenAI-compatible server of `pal serve`: an engine that batches requests, and an HTTP application."""
