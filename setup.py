"""Packaging: `kernels/` and `data/` are installed inside the package, as mlp_fast.kernels and mlp_fast.data."""

import zlib
from pathlib import Path

from setuptools import Extension, setup

CSRC = Path("kernels/csrc")
SOURCES = sorted(CSRC.glob("*.[ch]"))

# The C kernel of the backend `native`: a plain shared library for ctypes, in the guise of an extension module.
# optional: without a compiler the installation goes on, and `native` says why it is unavailable.
# No -march=native: the source compiles itself for several instruction sets and chooses at run time. No -ffast-math: NaN
# and infinity must stay what they are.
NATIVE = Extension(
    "mlp_fast.kernels._train_step",
    sources=[str(CSRC / "train_step.c")],
    depends=[str(path) for path in CSRC.glob("*.h")],
    define_macros=[("SOURCE_CRC", str(zlib.crc32(b"".join(path.read_bytes() for path in SOURCES))))],
    extra_compile_args=[
        "-std=gnu11",
        "-O3",
        "-pthread",
        "-fvisibility=hidden",
        "-fno-math-errno",
        "-fno-trapping-math",
        "-ffp-contract=fast",
    ],
    extra_link_args=["-pthread", "-lm"],
    optional=True,
)

setup(
    name="mlp-fast",
    version="0.1.0",
    description="The character-level n-gram MLP of LLM101n, as fast as the hardware allows, to the same digits",
    license="MIT",
    python_requires=">=3.10",
    packages=[
        "mlp_fast",
        *(f"mlp_fast.{part}" for part in ("model", "ops", "backends", "corpus", "run", "measure", "kernels", "data")),
    ],
    package_dir={"mlp_fast": "mlp_fast", "mlp_fast.kernels": "kernels", "mlp_fast.data": "data"},
    package_data={"mlp_fast.data": ["*.txt", "embedded/*.txt"], "mlp_fast.kernels": ["csrc/*.c", "csrc/*.h"]},
    ext_modules=[NATIVE],
    install_requires=[
        "torch>=2.11",
        "triton>=3.6; sys_platform == 'linux'",
        "numpy>=1.26",
        "safetensors>=0.4",
        "tqdm>=4.66",
        "filelock>=3.12",
    ],
    extras_require={
        "plot": ["matplotlib>=3.8"],
        "dev": [
            "matplotlib>=3.8",
            "pytest>=8",
            "pytest-benchmark>=5",
            "hypothesis>=6.100",
            "ruff>=0.9",
            "mypy>=1.14",
        ],
    },
)
