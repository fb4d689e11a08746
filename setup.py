"""What pyproject.toml cannot say: conf/ and experiments/ lie beside the package here, and inside it in a wheel."""

from setuptools import find_packages, setup

INSIDE = {"lightning_glue.conf": "conf", "lightning_glue.experiments": "experiments"}

setup(
    packages=[*find_packages(include=["lightning_glue", "lightning_glue.*"]), *INSIDE],
    package_dir=INSIDE,
    package_data={name: ["*.yaml", "*/*.yaml"] for name in INSIDE},
    exclude_package_data={"lightning_glue.experiments": ["tuned/*"]},  # what searches found on this machine
    include_package_data=False,
)
