"""What pyproject.toml cannot say: the folder configs/ is installed as the data of a package, bags.configs."""

from setuptools import find_packages, setup

CONFIGS = ["bags.configs", "bags.configs.datasets", "bags.configs.methods"]

setup(
    packages=[*find_packages(include=["bags", "bags.*"]), *CONFIGS],
    package_dir={"bags.configs": "configs"},
    package_data={"bags": ["py.typed"], **{name: ["*.yaml"] for name in CONFIGS}},
)
