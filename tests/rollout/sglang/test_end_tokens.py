"""Every end token of a model's folder ends a turn that SGLang samples, seen in what a server is asked."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from mosaic_fast.config.read import parse_train_arguments
from mosaic_fast.setup.build import GroupPlan, build_setup
from mosaic_rollout.engine.sglang.engine import _VERSION
from tools.warmstart.tokenizer import build_tokenizer
from tools.warmstart.training import Recipe, build_model

ENDS = [2, 7, 11]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """An untrained model of the embedded one's shape, with several end tokens."""
    folder, tokenizer = tmp_path / "model", build_tokenizer()
    model = build_model(Recipe(), len(tokenizer), int(tokenizer.pad_token_id), int(tokenizer.eos_token_id))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ENDS}))
    return folder


@pytest.fixture
def server() -> Iterator[tuple[str, list[dict[str, object]]]]:
    """Says what an SGLang server says, samples the last end token; its address and what it was asked for."""
    asked: list[dict[str, object]] = []
    versions: list[object] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            info = {"version": _VERSION, "context_length": 4096, "max_total_num_tokens": 10_000}
            answers = {
                "/server_info": info,
                "/model_info": {"weight_version": versions[-1] if versions else None},
            }
            self._send(json.dumps(answers.get(self.path, {})))

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            if self.path == "/update_weights_from_disk":
                versions.append(body["weight_version"])
            if self.path != "/generate":
                self._send("{}")
                return
            asked.append(body)
            meta = {
                "finish_reason": {"type": "stop"},
                "output_token_logprobs": [[-0.5, ENDS[-1], None]],
                "weight_version": versions[-1],
            }
            self._send(f"data: {json.dumps({'meta_info': meta})}\n\ndata: [DONE]\n\n")

        def _send(self, text: str) -> None:
            self.send_response(200)
            self.send_header("content-length", str(len(text)))
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{http.server_address[1]}", asked
        http.shutdown()


def test_every_end_token_reaches_each_request(
    model: Path, server: tuple[str, list[dict[str, object]]], tmp_path: Path
):
    url, asked = server
    config = parse_train_arguments(
        [
            *("--run-dir", str(tmp_path / "run"), "--model.path", str(model), "--model.threads", "1"),
            *("--engine.kind", "sglang", "--engine.urls", url),
        ]
    )[0]
    setup = build_setup(config, model)
    try:
        tasks = setup.loop.environment.sample("train", 2, 0)
        share = setup.play(setup.loop, tasks, GroupPlan(2, 0), version=3)
    finally:
        setup.engine.close()
    assert len(asked) >= 4
    for body in asked:
        sampling = body["sampling_params"]
        assert isinstance(sampling, dict)
        assert set(sampling["stop_token_ids"]) == set(ENDS)
    rollouts = [rollout for group in share.groups.values() for rollout in group]
    assert {rollout.status for rollout in rollouts} == {
        "malformed"
    }  # the turn ended there, with nothing said
    assert {rollout.policy_version for rollout in rollouts} == {3}
