"""Asking a model that a server has: over HTTP, by the interface of OpenAI, which most servers offer."""
