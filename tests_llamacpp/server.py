"""llama.cpp's own server on a free port of loopback, until standard input ends; prints its address.

    python tests_llamacpp/server.py FILE.gguf [SLOTS]

Run as a script: in a process of the package it would meet another build of llama.cpp.
"""

import sys

import xllamacpp


def main(file: str, slots: str = "4") -> None:
    params = xllamacpp.CommonParams()
    params.model.path = file
    params.n_parallel = int(slots)
    params.n_ctx = 512 * params.n_parallel
    params.n_gpu_layers = 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.warmup = False
    params.verbosity = 0
    # Full precision, to compare it with the weights in this process.
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    server = xllamacpp.Server(params)
    sys.stdout.write(f"{server.listening_address}\n")
    sys.stdout.flush()
    sys.stdin.read()


if __name__ == "__main__":
    main(*sys.argv[1:])
