"""Package metadata. The settings of the tools are in pyproject.toml."""

import runpy
from pathlib import Path

from setuptools import find_namespace_packages, setup

ROOT = Path(__file__).parent

setup(
    name="fdpp",
    version=runpy.run_path(str(ROOT / "fdpp" / "version.py"))["__version__"],
    description="Fast inference for masked-diffusion language models: Fréchet profile decoding in one fused kernel",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license_expression="Apache-2.0",
    license_files=["LICENSE"],
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    python_requires=">=3.10",
    # Namespace packages: kernels/ must not hold an __init__.py (it would shadow Hugging Face's package of that name),
    # and comes in as fdpp.kernels through the symbolic link fdpp/kernels.
    packages=find_namespace_packages(include=["fdpp", "fdpp.*"], exclude=["*.__pycache__"]),
    package_data={
        "fdpp": ["py.typed"],
        "fdpp.integrations": ["tasks/*.yaml"],
        "fdpp.tiny": ["checkpoints/*/*"],
        "fdpp.trace": ["page.*"],
    },
    entry_points={
        "console_scripts": ["fdpp = fdpp.cli:main"],
        "sglang.srt.plugins": ["fdpp = fdpp.integrations.sglang:register"],
    },
    install_requires=[
        "torch>=2.11",
        'triton>=3.6; platform_system == "Linux"',
        "transformers>=5.17",
        "tokenizers",
        "safetensors",
        "tqdm",
    ],
    extras_require={
        "adapters": ["peft>=0.20"],
        "diffusers": ["diffusers>=0.42.1"],
        "eval": ["lm_eval[math]>=0.4.13", "datasets", "evaluate", "accelerate"],
        "parallel": ["accelerate"],
        "png": ["matplotlib"],
        "quantize": ["torchao>=0.18"],
        "sglang": ['sglang>=0.5.23; python_version >= "3.11"'],
        "test": [
            *("pytest", "pytest-cov", "pytest-xdist", "hypothesis", "numpy"),
            *("accelerate", "bitsandbytes", "torchao", "packaging", "peft>=0.20", "setuptools>=77", "wheel"),
        ],
        "lint": ["ruff", "mypy"],
        "bench": ["matplotlib"],
    },
)
