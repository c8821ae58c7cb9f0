from setuptools import find_packages, setup

setup(
    name="codec",
    version="0.1.0",
    description="Train neural speech codecs: plain PyTorch, a training loop written by hand",
    license="MIT",
    python_requires=">=3.10",
    packages=find_packages(include=["codec", "codec.*"]),
    package_data={"codec": ["page.html", "base/*"]},
    py_modules=["train_codec_gan", "prepare_speaker_data", "evaluate_codec"],
    install_requires=[
        "torch>=2.11",
        "numpy>=1.26",
        "soundfile>=0.12",
        "tensorboard>=2.15",
        "transformers>=5.0",
        "huggingface_hub>=1.0",
        "pyyaml>=6.0",
        "safetensors>=0.4.3",
        "tqdm>=4.66",
        "pillow>=10.0",
    ],
    extras_require={
        "align": ["faster-whisper>=1.2"],
        # Resemblyzer, for speaker similarity, cannot be had this way: see requirements-eval.txt
        "eval": [
            "pesq>=0.0.4",
            "pystoi>=0.4.1",
            "visqol-python[lattice]>=3.8",
            "distillmos>=0.9.1",
            "speechmos>=0.0.1.1",
            "onnxruntime>=1.20",
            "librosa>=0.10",
            "requests>=2.31",
            "hama>=1.7",
            "faster-whisper>=1.2",
        ],
        "dev": ["torchaudio>=2.11", "pytest>=8", "pytest-xdist>=3.6", "ruff>=0.6", "playwright>=1.50"],
    },
    entry_points={"console_scripts": ["codec=codec.cli:main"]},
)
