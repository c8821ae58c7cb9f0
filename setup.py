from setuptools import find_packages, setup

setup(
    name="codec",
    version="0.1.0",
    description="Train neural speech codecs: plain PyTorch, a training loop written by hand",
    license="MIT",
    python_requires=">=3.10",
    packages=find_packages(include=["codec", "codec.*"]),
    py_modules=["train_codec_gan", "prepare_speaker_data"],
    install_requires=[
        "torch>=2.11",
        "torchaudio>=2.11",
        "numpy>=1.26",
        "soundfile>=0.12",
        "tensorboard>=2.15",
        "transformers>=5.0",
        "huggingface_hub>=1.0",
        "pyyaml>=6.0",
        "safetensors>=0.4.3",
        "tqdm>=4.66",
    ],
    extras_require={
        "align": ["faster-whisper>=1.2"],
        "eval": ["pesq>=0.0.4", "pystoi>=0.4.1"],
        "dev": ["pytest>=8", "ruff>=0.6"],
    },
    entry_points={"console_scripts": ["codec=codec.cli:main"]},
)
