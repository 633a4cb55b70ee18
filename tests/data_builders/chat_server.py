"""A real OpenAI-compatible server on loopback, with failures on demand; it counts what it was asked.

with ChatServer(answer) as server: ...        # in a thread
python chat_server.py PORT LOG                # in a process of its own, for builds that are killed
"""

import json
import sys
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

KEY = "sk-loopback-0123456789abcdef"


def reword(text):
    """A rephrasing that passes every check: the words stay, and two are put before them."""
    text = text.split("\n\n", 1)[1]
    return f"So tell: {text}"


class ChatServer:
    """Answers chat completions by `answer(text)`; `failures` holds what to do first with each text.

    A failure is a status, ("status", {headers}), "timeout", "garbage", "json", "hang up" or "empty".
    """

    def __init__(self, answer=reword, failures=lambda text: (), key=None, port=0, delay=0.0, log=None):
        self.answer, self.failures, self.key, self.delay = answer, failures, key, delay
        self.asked, self.answered, self.headers, self.times = Counter(), Counter(), [], []
        self.bodies = []
        self.at_once = self.most_at_once = 0
        self.lock, self.log = threading.Lock(), log
        self.http = ThreadingHTTPServer(("127.0.0.1", port), self._handler())
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"

    def __enter__(self):
        self.thread = threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *exc):
        self.http.shutdown()
        self.http.server_close()

    def _handler(self):
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args):
                pass

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                text = body["messages"][-1]["content"]
                with server.lock:
                    number = server.asked[text]
                    server.asked[text] += 1
                    server.bodies.append(body)
                    server.headers.append({name.lower(): value for name, value in self.headers.items()})
                    server.times.append(time.monotonic())
                    server.at_once += 1
                    server.most_at_once = max(server.most_at_once, server.at_once)
                try:
                    self.reply(body, text, number)
                finally:
                    with server.lock:
                        server.at_once -= 1

            def reply(self, body, text, number):
                if self.path != "/v1/chat/completions":
                    return self.send(404, {"error": {"message": "no such path"}})
                if server.key and self.headers.get("Authorization") != f"Bearer {server.key}":
                    sent = self.headers.get("Authorization", "").removeprefix("Bearer ")
                    # Real servers repeat the key that they refuse.
                    return self.send(401, {"error": {"message": f"Incorrect API key provided: {sent}."}})
                failures = list(server.failures(text))
                failure = failures[number] if number < len(failures) else None
                time.sleep(server.delay)
                if failure == "timeout":
                    time.sleep(1.5)
                elif failure == "hang up":
                    self.connection.close()
                    return None
                elif failure == "garbage":
                    return self.send(200, b"<html>not what you think</html>", kind="text/html")
                elif failure == "json":
                    return self.send(200, {"unexpected": True})
                elif isinstance(failure, tuple):
                    return self.send(failure[0], {"error": {"message": "later"}}, **failure[1])
                elif isinstance(failure, int):
                    return self.send(failure, {"error": {"message": "an error"}})
                answer = "" if failure == "empty" else server.answer(text)
                choice = {"index": 0, "message": {"role": "assistant", "content": answer}, "finish_reason": "stop"}
                if server.log:
                    with server.lock, open(server.log, "a") as file:
                        file.write(json.dumps(text) + "\n")
                self.send(200, {"id": "1", "object": "chat.completion", "model": body["model"], "choices": [choice]})
                with server.lock:
                    server.answered[text] += 1
                return None

            def send(self, status, content, kind="application/json", **headers):
                content = content if isinstance(content, bytes) else json.dumps(content).encode()
                try:
                    self.send_response(status)
                    self.send_header("Content-Type", kind)
                    self.send_header("Content-Length", str(len(content)))
                    for name, value in headers.items():
                        self.send_header(name.replace("_", "-"), value)
                    self.end_headers()
                    self.wfile.write(content)
                except (BrokenPipeError, ConnectionResetError):
                    pass

        return Handler


def main(port, log):
    """Serves until it is killed; every fifth text meets a 429 or a 500 first, every fourth is said back as it is."""

    def failures(text):
        number = sum(map(ord, text))
        return [(429, {"Retry_After": "0.02"})] if number % 10 == 0 else [500] if number % 10 == 5 else []

    def answer(text):
        return text.split("\n\n", 1)[1] if sum(map(ord, text)) % 4 == 0 else reword(text)

    server = ChatServer(answer, failures, port=port, delay=0.01, log=log)
    print(server.url, flush=True)
    server.http.serve_forever()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
