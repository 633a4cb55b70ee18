"""A built set is uploaded by the Hub's own client to a server on loopback that speaks its protocol."""

import json
import os
import subprocess
import sys
from pathlib import Path

import yaml


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
    environment = {**os.environ, **hub.environment()}
    command = [sys.executable, "-m", "biasunlearn_trainer.data_builders.build", str(tmp_path / "r.yaml")]
    done = subprocess.run(
        [*command, "--push_to_hub", "me/mine"], env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert "private" in str(hub.created[0].get("visibility", hub.created[0])), hub.created
    files = {name: content for name, content in hub.files().items() if name != ".gitattributes"}
    assert set(files) == {"README.md", "build.json", "rejects.jsonl", "data/forget.parquet"}
    assert files["data/forget.parquet"] == Path(tmp_path / "out/data/forget.parquet").read_bytes()
    # What is passed on says nothing about where it was made.
    assert not any(str(tmp_path).encode() in content for content in files.values())
    assert hub.token not in done.stdout + done.stderr + b"".join(files.values()).decode("latin-1")
