"""What pyproject.toml has no words for: configs/ and sweeps/, at the top of the repository, are part of the package."""

from setuptools import find_packages, setup

SHIPPED = ("configs", "sweeps")

setup(
    packages=[*find_packages(include=["rlhf_lit*"]), *(f"rlhf_lit.{name}" for name in SHIPPED)],
    package_dir={f"rlhf_lit.{name}": name for name in SHIPPED},
)
