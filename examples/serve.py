"""Serve three adapters behind one model, with the standard library alone.

    python examples/serve.py --port 8000
    curl -d '{"adapter": "turned", "image": [0, 0.3, ...]}' localhost:8000

Each request names an adapter, or none for the base. Requests that arrive
together run as one batch, each example through its own adapter. The model
reads scikit-learn's digits: upright ones by itself, and turned, mirrored and
flipped ones by adapters, which are trained when the server starts. Put your
own model in the place of `build`, with `ks.load_adapters` for its files.
Choose the backend by KERAS_BACKEND.
"""

import argparse
import concurrent.futures
import http.server
import json
import queue
import threading

import keras
import numpy as np
import sklearn.datasets

import keras_spectral as ks

CHANGES = {  # adapter: what it does to images (n, 8, 8)
    "turned": lambda images: np.rot90(images, axes=(1, 2)),
    "mirrored": lambda images: images[:, :, ::-1],
    "flipped": lambda images: images[:, ::-1],
}


def build(epochs=8):
    """A model that reads digits, with an adapter for each change."""
    digits = sklearn.datasets.load_digits()
    layers = [keras.layers.Dense(128, activation="relu") for _ in range(2)]
    layers = [keras.Input((64,)), *layers, keras.layers.Dense(10, name="head")]
    model = keras.Sequential(layers)
    for name, change in ((None, np.array), *CHANGES.items()):
        if name:
            options = {"rank": 8, "trainable": "head"}
            ks.wrap_model(model, "lora", "all-linear", adapter=name, **options)
        model.compile(
            keras.optimizers.Adam(5e-3),
            keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        )
        images = change(digits.images / 16).reshape(-1, 64)
        model.fit(images, digits.target, 64, epochs, verbose=0)
    return model


class Batches:
    """Runs the requests that wait, up to `size` of them in one batch."""

    def __init__(self, model, size=16, wait=0.01):
        self.model, self.size, self.wait = model, size, wait
        self.waiting = queue.Queue()
        threading.Thread(target=self.run, daemon=True).start()

    def answer(self, adapter, image):
        future = concurrent.futures.Future()
        self.waiting.put((adapter, image, future))
        return future.result(timeout=60)

    def run(self):
        while True:
            requests = [self.waiting.get()]
            try:
                while len(requests) < self.size:
                    requests.append(self.waiting.get(timeout=self.wait))
            except queue.Empty:
                pass
            names, images, futures = zip(*requests)
            try:
                with ks.mixed_batch(self.model, names):
                    logits = self.model(np.stack(images), training=False)
                for row, future in zip(keras.ops.argmax(logits, -1), futures):
                    future.set_result(int(row))
            except Exception as error:
                for future in futures:
                    future.set_exception(error)


def serve(model, port=0):
    """A server on this machine; `server_port` says where it listens."""
    known, batches = [None, *ks.adapter_names(model)], Batches(model)

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            try:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                asked = json.loads(body)
                adapter = asked.get("adapter")
                image = np.asarray(asked["image"], "float32").reshape(64)
                if adapter not in known:
                    raise ValueError(
                        f"No adapter {adapter!r}; there are {known}"
                    )
            except (KeyError, TypeError, ValueError) as error:
                return self.reply(400, {"error": str(error)})
            self.reply(200, {"digit": batches.answer(adapter, image)})

        def reply(self, status, content):
            body = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    return http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--epochs", type=int, default=8)
    args = parser.parse_args()
    keras.utils.set_random_seed(0)
    server = serve(build(args.epochs), args.port)
    print(f"listening on port {server.server_port}")
    server.serve_forever()
