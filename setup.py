"""Which packages an installation has. The rest is in pyproject.toml, which cannot say where configs/ goes."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["serve_app*"]), "serve_app.configs"],
    package_dir={"serve_app.configs": "configs"},
    package_data={
        "serve_app": ["py.typed", "gateway/page/*", "db/migrations/*.mako", "tiny/*", "tiny/checkpoint/**/*"],
        "serve_app.configs": ["*.yaml"],
    },
)
