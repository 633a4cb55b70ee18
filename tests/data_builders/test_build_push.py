"""A built set is uploaded by the Hub's own client to a server on loopback that speaks its protocol."""

import base64
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import yaml

TOKEN = "hf_loopback0123456789abcdefghijklmnopq"


class Hub(BaseHTTPRequestHandler):
    """Takes repositories and commits whose files come within the commit, not as LFS objects."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_GET(self):
        self.reply({"id": "me/mine", "sha": "0" * 40, "siblings": []})

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = self.path.partition("?")[0]
        if path == "/api/repos/create":
            self.server.created.append(json.loads(body))
            self.reply({"url": f"{self.server.url}/datasets/me/mine", "name": "me/mine"})
        elif path.endswith("/preupload/main"):
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]
            ]
            self.reply({"files": files})
        elif path.endswith("/commit/main"):
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.server.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            url = f"{self.server.url}/datasets/me/mine/commit/{'0' * 40}"
            self.reply({"commitUrl": url, "commitOid": "0" * 40})
        else:
            self.reply({"errors": [], "warnings": []})

    def reply(self, content):
        content = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


@pytest.fixture
def hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.url, server.created, server.files = f"http://127.0.0.1:{server.server_port}", [], {}
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_a_set_is_pushed_without_its_caches(tmp_path, hub):
    rows = [{"prompt": f"Who is {n}?", "completion": " Nobody.", "bias_type": "age"} for n in range(12)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = {
        "name": "mine",
        "sources": [{"source": "rows", "path": str(tmp_path / "rows.jsonl"), "licence": "MIT"}],
        "splits": {"forget": {}},
        "output_dir": str(tmp_path / "out"),
    }
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe))
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1"}
    environment.pop("HF_HUB_OFFLINE", None)
    command = [sys.executable, "-m", "biasunlearn_trainer.data_builders.build", str(tmp_path / "r.yaml")]
    done = subprocess.run(
        [*command, "--push_to_hub", "me/mine"], env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert "private" in str(hub.created[0].get("visibility", hub.created[0])), hub.created
    assert set(hub.files) == {"README.md", "build.json", "rejects.jsonl", "data/forget.parquet"}
    assert hub.files["data/forget.parquet"] == Path(tmp_path / "out/data/forget.parquet").read_bytes()
    # What is passed on says nothing about where it was made.
    assert not any(str(tmp_path).encode() in content for content in hub.files.values())
    assert TOKEN not in done.stdout + done.stderr + b"".join(hub.files.values()).decode("latin-1")
