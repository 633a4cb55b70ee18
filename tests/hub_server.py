"""A server on loopback that speaks the Hub's routes for uploads and downloads, with tokens, owners and failures.

with HubServer() as hub: ...        # HF_ENDPOINT=hub.url, HF_HUB_DISABLE_XET=1
"""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

TOKEN = "hf_loopback0123456789abcdefghijklmnopq"
LFS = (".safetensors", ".parquet", ".png", ".bin")
ROUTES = [
    ("POST", r"/api/repos/create", "create"),
    ("GET", r"/api/whoami-v2", "whoami"),
    ("POST", r"/api/validate-yaml", "validate"),
    ("POST", r"/api/(models|datasets)/(.+)/preupload/([^/]+)", "preupload"),
    ("POST", r"/api/(models|datasets)/(.+)/commit/([^/]+)", "commit"),
    ("POST", r"/api/(models|datasets)/(.+)/branch/(.+)", "branch"),
    ("GET", r"/api/(models|datasets)/(.+)/tree/([^/]+)(?:/(.*))?", "tree"),
    ("GET", r"/api/(models|datasets)/([^/]+/[^/]+)(?:/revision/(.+))?", "info"),
    ("POST", r"/(datasets/)?(.+)\.git/info/lfs/objects/batch", "lfs_batch"),
    ("PUT", r"/lfs/([0-9a-f]{64})", "lfs_upload"),
    ("POST", r"/lfs/verify", "validate"),
    ("GET", r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", "resolve"),
]


class HubServer:
    """Repositories in memory.

    Attributes:
        repos: by id: {"private": bool, "branches": {name: {path: bytes}}}.
        created: the bodies of requests to make a repository.
        commits: of each commit its message and the paths that it deleted.
        refusals: by the name of a route: the status and the message to answer with.
        requests: method and path of every request.
        extra_siblings: file names that every listing has beside the true ones.
    """

    def __init__(self, owners=("me",)):
        self.owners, self.token = owners, TOKEN
        self.repos, self.objects, self.created, self.commits, self.requests = {}, {}, [], [], []
        self.refusals, self.extra_siblings = {}, []
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_port}"

    def __enter__(self):
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.http.shutdown()
        self.http.server_close()

    def files(self, repo="me/mine", branch="main"):
        """What a branch holds."""
        return self.repos[repo]["branches"][branch]

    def environment(self):
        """Variables that point the Hub's client here."""
        return {"HF_ENDPOINT": self.url, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}

    def _handler(server):
        class Handler(_Handler):
            hub = server

        return Handler


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_GET(self):
        self.route("GET")

    def do_HEAD(self):
        self.route("GET")

    def do_POST(self):
        self.route("POST")

    def do_PUT(self):
        self.route("PUT")

    def route(self, method):
        length = int(self.headers.get("Content-Length") or 0)
        self.body = self.rfile.read(length)
        address = urlsplit(self.path)
        self.query, path = parse_qs(address.query), unquote(address.path)
        self.hub.requests.append((self.command, path))
        for verb, pattern, name in ROUTES:
            found = re.fullmatch(pattern, path)
            if found and verb == method:
                if name in self.hub.refusals:
                    status, message = self.hub.refusals[name]
                    return self.reply({"error": message}, status)
                if not self.may_come(name, found):
                    return self.reply({"error": "Invalid credentials in Authorization header"}, 401)
                return getattr(self, name)(*found.groups())
        return self.reply({"error": f"no route {method} {path}"}, 404)

    def may_come(self, name, found):
        if name == "lfs_upload" or self.headers.get("Authorization") == f"Bearer {self.hub.token}":
            return True
        is_read = name in ("tree", "info", "resolve")
        return is_read and not self.hub.repos.get(found.group(2), {}).get("private")

    def json(self):
        return json.loads(self.body)

    def reply(self, content, status=200, headers=(), kind="application/json"):
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        for key, value in dict(headers).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def branch_of(self, repo, revision):
        """The files of a branch or commit; None, and an answer, where there is none."""
        if repo not in self.hub.repos:
            self.reply({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
            return None
        branches = self.hub.repos[repo]["branches"]
        found = branches.get(revision or "main")
        by_commit = [files for files in branches.values() if sha_of(files) == revision]
        if found is None and not by_commit:
            self.reply({"error": "Invalid rev"}, 404, {"X-Error-Code": "RevisionNotFound"})
            return None
        return found if found is not None else by_commit[0]

    def whoami(self):
        self.reply({"name": "me", "orgs": [], "auth": {"accessToken": {"role": "write"}}})

    def validate(self):
        self.reply({"errors": [], "warnings": []})

    def create(self):
        body = self.json()
        self.hub.created.append(body)
        owner = body.get("organization") or "me"
        repo, kind = f"{owner}/{body['name']}", body.get("type", "model")
        url = f"{self.hub.url}/{'datasets/' if kind == 'dataset' else ''}{repo}"
        if owner not in self.hub.owners:
            return self.reply({"error": f"You don't have the rights to create a model under {owner}"}, 403)
        if repo in self.hub.repos:
            return self.reply({"error": "You already created this model repo", "url": url}, 409)
        private = body.get("visibility") == "private" or bool(body.get("private"))
        self.hub.repos[repo] = {"private": private, "branches": {"main": {".gitattributes": b"*.bin filter=lfs\n"}}}
        return self.reply({"url": url, "name": repo})

    def info(self, kind, repo, revision=None):
        files = self.branch_of(repo, revision)
        if files is None:
            return
        card = files.get("README.md", b"").decode()
        header = (yaml.safe_load(card.split("---")[1]) or {}) if card.startswith("---") else {}
        names = [*files, *self.hub.extra_siblings]
        self.reply(
            {
                "id": repo,
                "sha": sha_of(files),
                "private": self.hub.repos[repo]["private"],
                "tags": header.get("tags", []),
                "siblings": [{"rfilename": name} for name in names],
            }
        )

    def tree(self, kind, repo, revision, folder=None):
        files = self.branch_of(repo, revision)
        if files is None:
            return
        prefix = f"{folder}/" if folder else ""
        entries = [tree_entry(name, content) for name, content in files.items() if name.startswith(prefix)]
        entries += [tree_entry(name, b"evil") for name in self.hub.extra_siblings]
        if folder and not entries:
            return self.reply({"error": "Entry not found"}, 404, {"X-Error-Code": "EntryNotFound"})
        return self.reply(entries)

    def branch(self, kind, repo, name):
        branches = self.hub.repos[repo]["branches"]
        if name in branches:
            return self.reply({"error": "Reference already exists"}, 409)
        branches[name] = dict(branches["main"])
        return self.reply({})

    def preupload(self, kind, repo, revision):
        files = [
            {"path": file["path"], "uploadMode": "lfs" if file["path"].endswith(LFS) else "regular"}
            for file in self.json()["files"]
        ]
        self.reply({"files": [{**file, "shouldIgnore": False} for file in files]})

    def lfs_batch(self, kind, repo):
        answers = []
        for wanted in self.json()["objects"]:
            answer = dict(wanted)
            if wanted["oid"] not in self.hub.objects:
                answer["actions"] = {
                    "upload": {"href": f"{self.hub.url}/lfs/{wanted['oid']}"},
                    "verify": {"href": f"{self.hub.url}/lfs/verify"},
                }
            answers.append(answer)
        self.reply({"transfer": "basic", "objects": answers}, kind="application/vnd.git-lfs+json")

    def lfs_upload(self, oid):
        if hashlib.sha256(self.body).hexdigest() != oid:
            return self.reply({"error": "other content than announced"}, 400)
        self.hub.objects[oid] = self.body
        return self.reply({})

    def commit(self, kind, repo, revision):
        files = self.branch_of(repo, unquote(revision))
        if files is None:
            return
        record = {"message": "", "deleted": [], "branch": unquote(revision)}
        for line in map(json.loads, self.body.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                record["message"] = value["summary"]
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
                record["deleted"].append(value["path"])
        self.hub.commits.append(record)
        prefix = "datasets/" if kind == "datasets" else ""
        sha = sha_of(files)
        self.reply({"commitUrl": f"{self.hub.url}/{prefix}{repo}/commit/{sha}", "commitOid": sha})

    def resolve(self, kind, repo, revision, name):
        files = self.branch_of(repo, revision)
        if files is None:
            return
        if name not in files:
            return self.reply({"error": "Entry not found"}, 404, {"X-Error-Code": "EntryNotFound"})
        headers = {"ETag": f'"{etag_of(name, files[name])}"', "X-Repo-Commit": sha_of(files)}
        return self.reply(files[name], 200, headers, "application/octet-stream")


def etag_of(name, content):
    """As git and LFS name contents."""
    if name.endswith(LFS):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def tree_entry(name, content):
    """An entry of a listing."""
    entry = {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
    if name.endswith(LFS):
        entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
    return entry


def sha_of(files):
    """A commit's hash: of what it holds."""
    return hashlib.sha1(repr(sorted((n, hashlib.sha1(c).hexdigest()) for n, c in files.items())).encode()).hexdigest()
