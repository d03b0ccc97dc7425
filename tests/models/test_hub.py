"""Models of the Hugging Face hub, from a server of this machine that answers as the hub does."""

from __future__ import annotations

import http.server
import json
import os
import subprocess
import sys
import threading

import pytest
from flax import nnx

from fastvim_jax import save_pretrained
from fastvim_jax.models import VisionMambaConfig, build_model
from tests.support import ROOT

pytest.importorskip("huggingface_hub")

COMMIT = "0123456789abcdef0123456789abcdef01234567"
SIZES = {"image_size": 8, "patch_size": 4, "embed_dim": 8, "depth": 1, "num_classes": 2}
SCRIPT = """
import huggingface_hub.constants as constants
import numpy as np
from fastvim_jax import UserError, from_pretrained, load_pretrained

found = load_pretrained("owner/name", revision="v1")
assert found.class_names == ("a", "b") and found.model.config.depth == 1

def refused(name, **options):
    try:
        from_pretrained(name, **options)
    except UserError as error:
        return str(error)
    raise AssertionError(name)

assert "cannot be loaded from the hub" in refused("owner/other")
assert "owner/other: it is not in the cache" in refused("owner/other", offline=True)
again = from_pretrained("owner/name", revision="v1", offline=True)
np.testing.assert_array_equal(again.norm.scale[...], found.model.norm.scale[...])

from fastvim_jax.inference import Classifier

from fastvim_jax.inference.channel_model import has_channels

assert not has_channels("hf://owner/name")  # `fastvim embed` takes it for photographs

classifier = Classifier.load("hf://owner/name", revision="v1", offline=True, batch_size=1)
assert classifier.class_names == ("a", "b")
"""
OUT_OF_REACH = """
from fastvim_jax import UserError, from_pretrained

assert from_pretrained("owner/name", revision="v1").config.depth == 1  # of the cache
try:
    from_pretrained("owner/another")
except UserError as error:
    assert "owner/another: the hub cannot be reached" in str(error), error
    assert "offline=True" in str(error)
else:
    raise AssertionError
"""


@pytest.fixture
def hub(tmp_path):
    """Yield a server that holds the one repository owner/name, with a tag v1, and the paths that it was asked for."""
    folder = tmp_path / "model"
    model = build_model(VisionMambaConfig(**SIZES), rngs=nnx.Rngs(3))
    save_pretrained(model, folder, class_names=("a", "b"))
    (folder / "pytorch_model.bin").write_bytes(b"a pickle that nobody asks for")
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.answer(body=False)

        def do_GET(self):
            self.answer(body=True)

        def answer(self, body):
            asked.append(self.path)
            path = self.path.split("?")[0]
            *_, name = path.split("/")
            headers = {"X-Repo-Commit": COMMIT}
            if path.startswith("/api/models/owner/name/revision/"):
                siblings = [{"rfilename": file.name} for file in folder.iterdir()]
                about = {"id": "owner/name", "sha": COMMIT, "siblings": siblings, "tags": []}
                content = json.dumps(about | {"private": False, "downloads": 0, "likes": 0})
                status, content = 200, content.encode()
                headers["Content-Type"] = "application/json"
            elif path.startswith("/api/models/owner/name/tree/"):
                files = [
                    {"type": "file", "path": f.name, "size": f.stat().st_size, "oid": "0" * 40}
                    for f in folder.iterdir()
                ]
                status, content = 200, json.dumps(files).encode()
                headers["Content-Type"] = "application/json"
            elif path.startswith("/owner/name/resolve/") and (folder / name).is_file():
                status, content = 200, (folder / name).read_bytes()
                headers["ETag"] = f'"{hash(content):x}"'
            else:
                status, content = 404, b"{}"
                headers["X-Error-Code"] = "RepoNotFound"
            self.send_response(status)
            for key, value in headers.items():
                self.send_header(key, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if body:
                self.wfile.write(content)

        def log_message(self, *arguments):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server, asked
    server.shutdown()
    server.server_close()
    thread.join()


def run(script, tmp_path, endpoint):
    proxies = {"NO_PROXY": "*", "no_proxy": "*"}
    settings = {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "cache"), "JAX_PLATFORMS": "cpu"}
    env = {k: v for k, v in os.environ.items() if not k.startswith("HF_")} | settings | proxies
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.drawn("commands", one_in=6)
def test_a_revision_is_loaded_kept_and_found_again_without_network(hub, tmp_path):
    server, asked = hub
    run(SCRIPT, tmp_path, f"http://127.0.0.1:{server.server_port}")
    assert any("/v1" in path for path in asked)
    assert not any("pytorch_model.bin" in path for path in asked)
    before = len(asked)
    run(OUT_OF_REACH, tmp_path, "http://127.0.0.1:9")
    assert len(asked) == before
