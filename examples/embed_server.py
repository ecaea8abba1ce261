"""Serve a bundle from Python, and query it over HTTP: python examples/embed_server.py BUNDLE [PORT]."""

import json
import multiprocessing
import sys
import time
from pathlib import Path
from typing import Any
from urllib.request import urlopen

from unipinrec.runtime.serve import ServeOptions, serve_bundle


def query(url: str, bundle: Path) -> Any:
    """Wait for the server, send it an event of a user, and ask what to recommend next."""
    for _ in range(600):
        try:
            urlopen(f"{url}/health/ready")
            break
        except OSError:  # it does not listen yet, or says 503 while it checks the bundle
            time.sleep(0.1)
    item = json.loads((bundle / "item_ids.json").read_text())[0]
    action = json.loads((bundle / "manifest.json").read_text())["actions"][0]
    event = {"user": "ada", "events": [{"item": item, "actions": [action]}]}
    urlopen(f"{url}/v1/events", json.dumps(event).encode())
    return json.load(urlopen(f"{url}/v1/recommend", json.dumps({"user": "ada", "k": 3}).encode()))


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    bundle, port = Path(sys.argv[1]), int((sys.argv[2:] or ["8000"])[0])
    options = ServeOptions(port=port, cache_mib=64, log_level="warning")  # a field for each option of `unipinrec serve`
    server = multiprocessing.get_context("spawn").Process(target=serve_bundle, args=(bundle, options), daemon=True)
    server.start()
    slate = query(f"http://127.0.0.1:{port}", bundle)
    print(slate["source"], [item["item"] for item in slate["items"]])
    server.terminate()  # SIGTERM: answers what is under way, then ends
    server.join()
