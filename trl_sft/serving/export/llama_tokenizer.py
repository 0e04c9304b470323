"""llama.cpp tokenizes texts with a vocabulary that is not in any model's file yet.

Inputs: a `Vocabulary`. Outputs: token ids. A model of a few zeros is written into a temporary folder and opened by
`xllamacpp`, whose server tokenizes, in a child process: native code that crashes or hangs ends with it. Deliberately
not here: which vocabulary is right (`pre_tokenizers`).
"""

from __future__ import annotations

import http.client
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from types import TracebackType
from urllib.parse import urlsplit

import gguf
import numpy as np

from trl_sft.serving.export.gguf_vocabulary import Vocabulary
from trl_sft.serving.proof import llama_server

_SECONDS = 60  # for the tokens of one text
_SIZE = 32  # of the embedding of the model of zeros: a block of q8_0


class LlamaTokenizer:
    """The tokenizer that llama.cpp makes of a vocabulary."""

    def __init__(self, vocabulary: Vocabulary, name: str) -> None:
        """Open the vocabulary. Raises ValueError if llama.cpp does not take it.

        Args:
            vocabulary: The tokens.
            name: `general.name` of the file, by which llama.cpp knows some tokenizers.

        """
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "vocabulary.gguf"
            _write_zeros(path, vocabulary, name)
            command = [sys.executable, "-I", str(llama_server.__file__), json.dumps(sys.path), str(path), "64", "1"]
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
            )
            assert self._process.stdout is not None
            line = self._process.stdout.readline().strip()
        if not line:
            self._end()
            raise ValueError(f"llama.cpp does not take the vocabulary with the rules {vocabulary.pre}")
        address = urlsplit(line)
        self._connection = http.client.HTTPConnection(address.hostname or "127.0.0.1", address.port, timeout=_SECONDS)

    def __enter__(self) -> LlamaTokenizer:
        """Return the tokenizer itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the server."""
        self._connection.close()
        self._end()

    def _end(self) -> None:
        """End the child process."""
        self._process.kill()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                stream.close()
        self._process.wait()

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text: special tokens in it are read as such, and none is added."""
        body = json.dumps({"content": text, "add_special": False, "parse_special": True})
        self._connection.request("POST", "/tokenize", body, {"Content-Type": "application/json"})
        tokens: list[int] = json.loads(self._connection.getresponse().read())["tokens"]
        return tokens


def _write_zeros(path: Path, vocabulary: Vocabulary, name: str) -> None:
    """Write a model of one layer of zeros with a vocabulary."""
    rows = len(vocabulary.tokens)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name(name)
    writer.add_vocab_size(rows)
    writer.add_context_length(64)
    writer.add_embedding_length(_SIZE)
    writer.add_block_count(1)
    writer.add_feed_forward_length(_SIZE)
    writer.add_head_count(1)
    writer.add_layer_norm_rms_eps(1e-6)
    vocabulary.add_to(writer)
    packed = gguf.quants.quantize(np.zeros((rows, _SIZE), np.float32), gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("token_embd.weight", packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    for part in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        writer.add_tensor(f"{part}.weight", np.zeros(_SIZE, np.float32))
    for part in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"):
        writer.add_tensor(f"blk.0.{part}.weight", np.zeros((_SIZE, _SIZE), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
