"""Build the package; tool settings are in pyproject.toml, tested versions in constraints.txt."""

from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent

# The version is written once, and read here without importing the package (which needs torch).
VERSION: dict[str, str] = {}
exec((ROOT / "lightning_compress" / "_version.py").read_text(encoding="utf-8"), VERSION)

RECIPES = "lightning_compress.recipes"
# Each Lightning asks under its own name, and gets callbacks of its own classes.
FACTORY = "lightning_compress = lightning_compress.injection:{}"

REQUIRED = [
    "torch>=2.9,<2.15",
    # Lightning is one code base under two names. A wheel cannot ask for "either", and asking for neither would leave a
    # plain `pip install` unable to run, so we ask for the small one. Whoever has only `lightning` gets it beside that:
    # about 1 MB of pure Python, of the same release line, and nothing in `lightning` changes. `pip install --no-deps`
    # leaves it out and works too: `_lightning.py` takes whichever name it finds.
    # 2.6.2 and 2.6.3 were compromised releases: never let them in.
    "pytorch-lightning>=2.6.4,<2.7",
    "lightning-utilities>=0.11,<1",  # Lightning's own helpers, which it needs too
    "numpy>=1.26,<3",
    "Jinja2>=3.1,<4",  # the report's page; torch needs it too
    "torchmetrics>=1.5,<2",
    "wandb>=0.19,<1",
    "PyYAML>=6.0,<7",
    "rich>=13.7,<16",
    "safetensors>=0.7,<1",  # reports count the bytes of packed files; 0.7 is the first with complex64
]

EXTRAS = {
    "cli": ["jsonargparse[signatures]>=4.39,<5"],
    "export": ["ml_dtypes>=0.5,<1", "onnx>=1.19,<2", "onnxruntime>=1.23,<2", "onnxscript>=0.5,<1"],
    "recipes": ["mlxtend>=0.23,<1"],
    "search": ["optuna>=4.2,<5"],
}
EXTRAS["all"] = sorted({requirement for group in EXTRAS.values() for requirement in group})
EXTRAS["dev"] = [
    *EXTRAS["all"],
    "fsspec>=2024.2",  # a test breaks a checkpoint off where Lightning writes it
    "lightning>=2.6.4,<2.7",  # every callback test runs under both names
    "mlflow-skinny>=3,<4",  # tests read back what its logger was sent, as they do for TensorBoard
    "mypy>=2,<3",
    "pytest>=8.3,<10",
    "pytest-xdist>=3.6,<4",
    "ruff>=0.17,<0.18",
    "scipy>=1.11,<2",  # experiments/ compare runs by a paired t-test
    "tensorboard>=2.18,<3",
    "torchao>=0.14,<1",  # what benchmarks/quantization.py measures us beside
    "torch-pruning>=1.6,<2",  # tests compare our groups of channels with its groups
    "setuptools>=77",  # a test builds the wheel, and looks into it
    "types-PyYAML>=6",
]

setup(
    name="lightning-compress",
    version=VERSION["__version__"],
    description="Compression for existing PyTorch Lightning runs, added by callbacks",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    # `recipes/` lies at the top of the tree, where a reader finds it, and ships inside the package.
    packages=[
        *find_packages(include=["lightning_compress", "lightning_compress.*"]),
        RECIPES,
        *(f"{RECIPES}.{name}" for name in find_packages("recipes")),
    ],
    package_dir={"lightning_compress": "lightning_compress", RECIPES: "recipes"},
    package_data={
        "": ["README.md"],
        "lightning_compress": ["py.typed"],
        "lightning_compress.reporting.render": ["templates/*"],
        RECIPES: ["*.yaml", "sweeps/*.yaml"],
    },
    include_package_data=False,
    install_requires=REQUIRED,
    extras_require=EXTRAS,
    entry_points={
        "console_scripts": ["lightning-compress = lightning_compress.cli:main"],
        "lightning.pytorch.callbacks_factory": [FACTORY.format("for_lightning")],
        "pytorch_lightning.callbacks_factory": [FACTORY.format("for_pytorch_lightning")],
    },
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: OS Independent",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)
