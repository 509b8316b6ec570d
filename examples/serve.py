"""Serve three adapters behind one model, with the standard library alone.

    python examples/serve.py --port 8000
    curl -d '{"adapter": "left", "image": [0, 0.3, ...]}' localhost:8000

Each request names an adapter, or none for the base. What arrives while a batch
runs is the next batch, each example through its own adapter. The model reads
scikit-learn's digits, its adapters read turned ones. Put your own model in the
place of `build`, with `ks.load_adapters`. Choose the backend by KERAS_BACKEND.
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

TURNS = {None: 0, "left": 1, "over": 2, "right": 3}  # adapter: quarter turns


def build(epochs=8):
    """A model that reads digits, with an adapter for each turn."""
    digits = sklearn.datasets.load_digits()
    layers = [keras.layers.Dense(128, activation="relu") for _ in range(2)]
    layers = [keras.Input((64,)), *layers, keras.layers.Dense(10, name="head")]
    model = keras.Sequential(layers)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    for name, turns in TURNS.items():
        if name:
            options = {"adapter": name, "rank": 8, "trainable": "head"}
            ks.wrap_model(model, "lora", "all-linear", **options)
        model.compile(keras.optimizers.Adam(5e-3), loss)
        images = np.rot90(digits.images / 16, turns, (1, 2)).reshape(-1, 64)
        model.fit(images, digits.target, 64, epochs, verbose=0)
    return model


def answer(model, waiting, size=16):
    """Answers what waits, at most `size` requests in one batch."""
    while True:
        requests = [waiting.get()]
        while len(requests) < size and not waiting.empty():
            requests.append(waiting.get())
        names, images, futures = zip(*requests)
        try:
            with ks.mixed_batch(model, names):
                logits = model(np.stack(images), training=False)
            for future, row in zip(futures, keras.ops.argmax(logits, -1)):
                future.set_result(int(row))
        except Exception as error:
            for future in futures:
                future.set_exception(error)


def serve(model, port=0):
    """A server on this machine; `server_port` says where it listens."""
    known, waiting = [None, *ks.adapter_names(model)], queue.Queue()
    work = threading.Thread(target=answer, args=(model, waiting), daemon=True)
    work.start()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            try:
                asked = json.loads(body)
                name = asked.get("adapter")
                image = np.asarray(asked["image"], "float32").reshape(64)
                if name not in known:
                    raise ValueError(f"No adapter {name!r}; there are {known}")
            except (KeyError, TypeError, ValueError) as error:
                status, content = 400, {"error": str(error)}
            else:
                future = concurrent.futures.Future()
                waiting.put((name, image, future))
                status, content = 200, {"digit": future.result(timeout=60)}
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(json.dumps(content).encode())

    return http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--port", type=int, default=8000)
    args = parser.parse_args()
    keras.utils.set_random_seed(0)
    server = serve(build(), args.port)
    print(f"listening on port {server.server_port}", flush=True)
    server.serve_forever()
