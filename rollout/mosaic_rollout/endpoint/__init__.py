"""OpenAI-compatible servers: asked with bounded tries, their answers read, and one of them as a policy."""
