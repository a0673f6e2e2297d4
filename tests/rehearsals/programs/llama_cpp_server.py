"""llama.cpp's own server, out of the wheel `xllamacpp`: ``python llama_cpp_server.py FILE.gguf PORT``."""

from __future__ import annotations

import sys
import threading

import xllamacpp


def main() -> None:
    settings = xllamacpp.CommonParams()
    settings.model.path, settings.port, settings.hostnames = sys.argv[1], int(sys.argv[2]), ["127.0.0.1"]
    settings.n_ctx, settings.n_parallel = 4096, 2
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = 1
    server = xllamacpp.Server(settings)
    print(server.listening_address, flush=True)
    threading.Event().wait()


if __name__ == "__main__":
    main()
