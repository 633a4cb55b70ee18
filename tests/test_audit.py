"""The dependency audit asks a real pip-audit, and an advisory service on loopback answers."""

import importlib.util
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / ".ci" / "audit.py"


@pytest.fixture
def audit():
    pytest.importorskip("pip_audit", reason="pip-audit is not installed: pip install pip-audit")
    spec = importlib.util.spec_from_file_location("audit_of_dependencies", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.SERVICES = ("osv",)
    return module


@pytest.fixture
def advisories():
    """An advisory service that knows flaws by package."""
    flaws = {}

    class Service(BaseHTTPRequestHandler):
        def log_message(self, *args):
            pass

        def do_POST(self):
            name = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["package"]["name"]
            body = json.dumps({"vulns": flaws.get(name, [])}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Service)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", flaws
    server.shutdown()
    server.server_close()


def test_a_known_flaw_fails_and_none_passes(audit, advisories, capsys):
    url, flaws = advisories
    assert audit.main(["--osv-url", url]) == 0
    assert "packages looked up at osv, 0 known vulnerabilities" in capsys.readouterr().out
    affected = [{"package": {"name": "pyyaml", "ecosystem": "PyPI"}, "versions": ["6.0.3"], "ranges": []}]
    flaws["pyyaml"] = [{"id": "PYSEC-0000-1", "summary": "s", "details": "d", "aliases": [], "affected": affected}]
    assert audit.main(["--osv-url", url]) == 1
    assert "pyyaml 6.0.3: PYSEC-0000-1" in capsys.readouterr().out


def test_a_service_that_is_not_there_neither_fails_nor_passes_for_an_audit(audit, capsys):
    assert audit.main(["--osv-url", "http://127.0.0.1:9"]) == 0
    assert "NOT DONE" in capsys.readouterr().out
