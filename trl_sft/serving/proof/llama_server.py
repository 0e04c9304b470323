"""A child process that serves a GGUF file with llama.cpp, so that a crash of native code ends this process alone.

Inputs: as arguments the search path of modules as JSON, the file, the size of the context, the number of threads.
Outputs: one line with the address, then answers over HTTP on the loopback interface until stdin ends. Started by
`llama_reader` as a script; imports nothing of this package.
"""

import json
import sys


def main() -> None:
    """Serve until the parent process closes stdin."""
    sys.path[:] = json.loads(sys.argv[1])
    import xllamacpp  # type: ignore[import-not-found,unused-ignore]  # noqa: PLC0415 (from the parent's search path)

    params = xllamacpp.CommonParams()
    params.model.path = sys.argv[2]
    params.n_ctx = int(sys.argv[3])
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = int(sys.argv[4])
    params.n_parallel = 1
    params.warmup = False
    server = xllamacpp.Server(params)
    print(server.listening_address, flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
