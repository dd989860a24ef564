"""The policy behind OpenAI's chat-completions protocol: for clients, and for agents that are trained.

`app` brings an HTTP server and is imported where one is started.
"""
