"""``dualenc export --push``: huggingface_hub's real client against a small Hub on this machine."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from _shared import PYTHONPATH, ROOT
from test_bundle import recipe

from dualenc.errors import ConfigError
from dualenc.model import build_bundle, load_model
from dualenc.model.export.push import check_repository


class Hub(BaseHTTPRequestHandler):
    """The four calls that creating a repository and committing files make; a token decides what is allowed."""

    seen: list[tuple[str, Any]]
    files: dict[str, bytes]

    def do_POST(self) -> None:
        raw = self.rfile.read(int(self.headers["Content-Length"]))
        path = self.path.partition("?")[0]
        if self.headers["Authorization"] != "Bearer hf_right":
            return self.answer(401, {"error": "Invalid credentials"})
        if path == "/api/repos/create":
            said = json.loads(raw)
            self.seen.append((path, said))
            return self.answer(200, {"url": f"http://{self.headers['Host']}/{said['organization']}/{said['name']}"})
        if path == "/api/validate-yaml":
            self.seen.append((path, json.loads(raw)))
            return self.answer(200, {"errors": [], "warnings": []})
        if path.endswith("/preupload/main"):
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(raw)["files"]
            ]
            return self.answer(200, {"files": files})
        if path.endswith("/commit/main"):
            for line in raw.decode().splitlines():
                said = json.loads(line)
                if said["key"] == "file":
                    self.files[said["value"]["path"]] = base64.b64decode(said["value"]["content"])
            at = {"commitUrl": f"http://{self.headers['Host']}/org/model/commit/1", "commitOid": "1", "success": True}
            return self.answer(200, at)
        return self.answer(404, {"error": path})

    def answer(self, status: int, said: Any) -> None:
        body = json.dumps(said).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Silent."""


@pytest.fixture
def hub() -> Iterator[tuple[str, type[Hub]]]:
    class Here(Hub):
        seen: list[tuple[str, Any]] = []  # noqa: RUF012 – one of each test
        files: dict[str, bytes] = {}  # noqa: RUF012

    server = ThreadingHTTPServer(("127.0.0.1", 0), Here)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}", Here
    server.shutdown()


RESULTS = {
    "tasks": {
        "quickstart_val_style": {
            "kind": "retrieval",
            "description": "drawings",
            "metrics": {"image_to_text_R@1": 0.25, "text_to_image_R@1": 0.5},
        }
    }
}


def test_push(tmp_path: Path, hub: tuple[str, type[Hub]]) -> None:
    from huggingface_hub import ModelCard

    url, here = hub
    build_bundle(recipe()).save(tmp_path / "m")
    (tmp_path / "results.json").write_text(json.dumps(RESULTS))

    def run(out: str, *more: str, **env: str) -> Any:
        command = [sys.executable, "-m", "dualenc", "export", str(tmp_path / "m"), "--format", "safetensors"]
        command += ["--out", str(tmp_path / out), "--results", str(tmp_path / "results.json"), *more]
        rest = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
        home = {"PYTHONPATH": PYTHONPATH, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
        return subprocess.run(command, cwd=ROOT, env=rest | home | env, capture_output=True, text=True, check=False)

    done = run("a", "--push", "org/model", "--private", HF_ENDPOINT=url, HF_TOKEN="hf_right")
    assert done.returncode == 0, done.stderr
    assert "uploaded" in done.stdout
    assert "org/model/commit/1" in done.stdout
    created = dict(here.seen)["/api/repos/create"]
    assert (created["name"], created["organization"]) == ("model", "org")
    assert created.get("private") or created.get("visibility") == "private"
    written = {
        p.relative_to(tmp_path / "a").as_posix(): p.read_bytes() for p in (tmp_path / "a").rglob("*") if p.is_file()
    }
    assert here.files == written
    assert load_model(str(tmp_path / "a")).modalities == ["image", "text"]
    data: Any = ModelCard(here.files["README.md"].decode()).data
    assert data.pipeline_tag == "zero-shot-image-classification"
    assert {(r.dataset_type, r.metric_type, r.metric_value) for r in data.eval_results} == {
        ("quickstart_val_style", "image_to_text_R@1", 0.25),
        ("quickstart_val_style", "text_to_image_R@1", 0.5),
    }
    assert data.to_dict()["widget"][0]["candidate_labels"]

    refused = run("b", "--push", "org/model", HF_ENDPOINT=url, HF_TOKEN="hf_wrong")
    assert refused.returncode == 2
    assert "the Hub refuses this token for org/model (HTTP 401)" in " ".join(refused.stderr.split())
    offline = run("c", "--push", "org/model", HF_HUB_OFFLINE="1", HF_TOKEN="hf_right", HF_ENDPOINT=url)
    assert offline.returncode == 0, offline.stderr
    assert "not uploaded, HF_HUB_OFFLINE is set" in " ".join(offline.stdout.split())
    assert [path for path, _ in here.seen].count("/api/repos/create") == 1


@pytest.mark.parametrize("name", ["model", "a/b/c", "org/mo del", "org/.."])
def test_a_name_that_is_no_repository(name: str) -> None:
    with pytest.raises(ConfigError, match=r"--push: .* is not ORG/NAME"):
        check_repository(name)
