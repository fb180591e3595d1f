"""`hf:org/name` against a small server that speaks the Hub's protocol: cache, token, a download that breaks off, offline, and one line for what cannot be had."""
import hashlib
import http.server
import json
import os
import pathlib
import re
import subprocess
import sys
import threading

import pytest

pytest.importorskip("huggingface_hub")
COMMIT = "a" * 40
SIZE, BROKEN, CHUNK = 12 << 20, 11 << 20, 10 << 20                 # the first download of the weights breaks off at BROKEN; huggingface_hub keeps whole chunks
REPOSITORIES = {
    "org/name": {"config.json": b'{"model_type": "llama"}', "model.safetensors": os.urandom(SIZE), "README.md": b"words", "pytorch_model.bin": b"pickle"},
    "org/pickled": {"config.json": b"{}", "pytorch_model.bin": b"pickle"},
}
ERRORS = {"org/gated": (403, "GatedRepo"), "org/missing": (404, "RepoNotFound"), "nobranch": (404, "RevisionNotFound")}
ASK = """
import json, sys
from llmjax.checkpoint import fetch
found = {}
for name in sys.argv[1:]:
    try:
        found[name] = str(fetch.hub(name))
    except ValueError as error:
        found[name] = f"{type(error).__name__}: {error}"
print("FOUND" + json.dumps(found))
"""


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """-> (ask(*names, **environment) -> {name: folder or error}, the requests so far)."""
    requests: list = []

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_):
            pass

        def answer(self, code, body=b"", **head):
            self.send_response(code)
            for key, value in {"Content-Length": str(len(body)), **head}.items():
                self.send_header(key.replace("_", "-"), value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def do_GET(self):
            requests.append((self.command, self.path, self.headers.get("Range"), self.headers.get("Authorization")))
            wrong = next((value for key, value in ERRORS.items() if key in self.path), None)
            if wrong:
                return self.answer(wrong[0], b"{}", X_Error_Code=wrong[1])
            name = next((name for name in REPOSITORIES if f"/{name}/" in self.path), None)
            if name is None:
                return self.answer(200, b"{}", Content_Type="application/json")
            files = REPOSITORIES[name]
            if "/tree/" in self.path:
                rows = [{"type": "file", "path": k, "size": len(v), "oid": hashlib.sha1(v).hexdigest()} for k, v in files.items()]
                return self.answer(200, json.dumps(rows).encode(), Content_Type="application/json")
            if self.path.startswith("/api/models/"):
                return self.answer(200, json.dumps({"id": name, "sha": COMMIT, "siblings": [{"rfilename": k} for k in files]}).encode(), Content_Type="application/json")
            file = self.path.split("/")[-1]
            body, head = files[file], {"ETag": f'"{hashlib.sha1(files[file]).hexdigest()}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
            asked = self.headers.get("Range")
            if asked:
                start = int(asked.removeprefix("bytes=").split("-")[0])
                return self.answer(206, body[start:], **head, **{"Content-Range": f"bytes {start}-{len(body) - 1}/{len(body)}"})
            if file.endswith(".safetensors") and self.command == "GET":
                self.send_response(200)
                for key, value in {**head, "Content-Length": str(len(body))}.items():
                    self.send_header(key, value)
                self.end_headers()
                self.wfile.write(body[:BROKEN])
                self.wfile.flush()
                self.close_connection = True
                return self.connection.close()
            return self.answer(200, body, **head)
        do_HEAD = do_GET

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    home = tmp_path_factory.mktemp("hub")

    def ask(*names, **more):
        plain = {k: v for k, v in os.environ.items() if not k.startswith("HF_") and k != "TRANSFORMERS_OFFLINE"}
        environment = {**plain, "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": "secret", **more}
        done = subprocess.run([sys.executable, "-c", ASK, *names], env=environment, capture_output=True, text=True, check=False, timeout=120)
        assert "FOUND" in done.stdout, done.stderr[-600:]
        return json.loads(done.stdout.split("FOUND")[1])
    yield ask, requests
    server.shutdown()


def test_what_is_fetched_and_what_is_not(hub):
    """Through the Hub's own cache, with its token, going on where a download broke off; pickles and other files are not asked for."""
    ask, requests = hub
    folder = pathlib.Path(ask("org/name")["org/name"])
    assert folder.parent.parent.name == "models--org--name" and sorted(x.name for x in folder.iterdir()) == ["config.json", "model.safetensors"]
    assert (folder / "model.safetensors").read_bytes() == REPOSITORIES["org/name"]["model.safetensors"]
    assert any(path.endswith("model.safetensors") and asked and asked.startswith(f"bytes={CHUNK}") for _, path, asked, _ in requests)
    assert any(token == "Bearer secret" for *_, token in requests) and not any(path.endswith((".bin", ".md")) for _, path, _, _ in requests)
    before = len(requests)
    assert ask("org/name") == {"org/name": str(folder)} and not any("/resolve/" in path for _, path, _, _ in requests[before:])
    before = len(requests)
    assert ask("org/name", HF_HUB_OFFLINE="1") == {"org/name": str(folder)} and len(requests) == before


@pytest.mark.parametrize(("name", "words"), [
    ("org/gated", "CheckpointError: hf:org/gated: the repository is gated; accept its terms"), ("org/missing", "CheckpointError: hf:org/missing: there is no such repository"),
    ("org/name@nobranch", "the repository has no revision 'nobranch'"), ("org/pickled", r"hf:org/pickled: the repository has no model\*.safetensors; pickled weights"),
    ("alone", "is written hf:organisation/name"),
])
def test_what_cannot_be_had_is_one_line(hub, name, words):
    found = hub[0](name)[name]
    assert re.search(words, found) and "\n" not in found and len(found) < 400


def test_nobody_answers(hub):
    found = hub[0]("org/other", HF_ENDPOINT="http://127.0.0.1:9")["org/other"]
    assert "hf:org/other: it is not in the local cache, and the Hub cannot be reached" in found or "could not be fetched" in found
