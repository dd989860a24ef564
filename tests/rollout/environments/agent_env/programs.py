"""Agents as users write them: they know an address and a key, and nothing of training."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx

from mosaic_rollout.endpoint.server import certificates

Row = dict[str, Any]
TOOLS = [
    {"type": "function", "function": {"name": name, "description": name, "parameters": {"type": "object"}}}
    for name in ("read", "fail")
]
ENDED = threading.Event()
"""Set where a program that never ends may end after all."""


class Client:
    """The little of OpenAI's client that is needed here."""

    def __init__(self, base_url: str, api_key: str) -> None:
        headers = {"authorization": f"Bearer {api_key}"}
        self.http = httpx.Client(
            base_url=base_url, headers=headers, trust_env=False, timeout=60, verify=certificates()
        )

    def ask(self, messages: list[Row], **more: Any) -> Row:
        given = {"model": "policy", "messages": messages, "tools": TOOLS, **more}
        answer = self.http.post("/chat/completions", json=given)
        if answer.is_error:
            raise RuntimeError(answer.text)
        return answer.json()["choices"][0]["message"]


def reads(task: Row, base_url: str, api_key: str) -> float:
    """Calls tools until the policy answers; the score is whether the answer has the task's own word."""
    client, messages = Client(base_url, api_key), list(task["messages"])
    while True:
        said = client.ask(messages)
        messages.append(said)
        if not said.get("tool_calls"):
            return float(task["word"] in (said["content"] or ""))
        for call in said["tool_calls"]:
            output = {"role": "tool", "tool_call_id": call["id"], "content": f"the word is {task['word']}"}
            messages.append(output)


def compacts(task: Row, base_url: str, api_key: str) -> dict[str, object]:
    """After its first call it goes on from a summary; and it asks a side question in between."""
    client = Client(base_url, api_key)
    said = client.ask(task["messages"])
    client.ask([{"role": "user", "content": "a side question"}], tools=[])
    summary = {"role": "user", "content": f"so far: {said['tool_calls'][0]['function']['name']} read 1"}
    client.ask([*task["messages"], summary])
    return {"harm": False, "done": True}


def branches(task: Row, base_url: str, api_key: str) -> float:
    """Goes on from the same answer in two ways."""
    client = Client(base_url, api_key)
    said = client.ask(task["messages"])
    for text in ("read 1", "read 1 or not"):
        output = {"role": "tool", "tool_call_id": said["tool_calls"][0]["id"], "content": text}
        client.ask([*task["messages"], said, output])
    return 1.0


def dies(task: Row, base_url: str, api_key: str) -> float:
    Client(base_url, api_key).ask(task["messages"])
    raise OSError("the sandbox is gone")


def never_asks(task: Row, base_url: str, api_key: str) -> float:
    raise KeyError("no such thing")


def never_ends(task: Row, base_url: str, api_key: str) -> float:
    Client(base_url, api_key).ask(task["messages"])
    ENDED.wait(30)
    return 1.0


def asks_at_once(task: Row, base_url: str, api_key: str) -> float:
    """Four times the same, at the same time."""
    client = Client(base_url, api_key)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(client.ask, [task["messages"]] * 4))
    return 1.0


def asks_for_ever(task: Row, base_url: str, api_key: str) -> float:
    client = Client(base_url, api_key)
    while True:
        client.ask(task["messages"])


def no_score(task: Row, base_url: str, api_key: str) -> str:
    Client(base_url, api_key).ask(task["messages"])
    return "well done"


def mixed(task: Row, base_url: str, api_key: str) -> float:
    """By its task: reads, dies in the middle of a request, or never ends."""
    if task["way"] == "hangs up":
        try:
            Client(base_url, api_key).http.post(
                "/chat/completions", json={"model": "policy", "messages": task["messages"]}, timeout=1e-3
            )
        except httpx.TimeoutException:
            time.sleep(0.05)
        return reads(task, base_url, api_key)
    return {"reads": reads, "dies": dies, "never ends": never_ends}[task["way"]](task, base_url, api_key)


async def awaited(task: Row, base_url: str, api_key: str) -> float:
    async with httpx.AsyncClient(
        base_url=base_url, headers={"authorization": f"Bearer {api_key}"}, trust_env=False
    ) as http:
        given = {
            "model": "policy",
            "messages": task["messages"],
            "tools": TOOLS,
            "temperature": 0,
            "top_p": 0.1,
        }
        return float((await http.post("/chat/completions", json=given)).status_code == 200)


def samples_around(task: Row, base_url: str, api_key: str) -> float:
    """Three contexts: two answers, one of them gone on from, and a side question; the score is a draw."""
    client = Client(base_url, api_key)
    given = {"model": "policy", "messages": task["messages"], "tools": TOOLS, "n": 2, "logprobs": True}
    first, second = client.http.post("/chat/completions", json={**given, "max_tokens": 12}).json()["choices"]
    client.ask([*task["messages"], first["message"], {"role": "user", "content": "go on"}], max_tokens=6)
    client.ask([{"role": "user", "content": "sum it up"}], max_tokens=5)
    return min(1.0, sum(row["logprob"] for row in second["logprobs"]["content"]) / -100)
