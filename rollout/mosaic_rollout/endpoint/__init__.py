"""OpenAI-compatible servers: asked with bounded tries, their answers read, and one of them as a policy.

Nothing is handed out here: a configuration reads `parameters` without the HTTP client that `server`, which is
every server, and `client`, which is one as a policy, bring.
"""
