"""Which packages an installation has. The rest is in pyproject.toml, which cannot say where configs/ goes."""

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

OBSERVABILITY = "serve_app.observability"
# `wan-serve manifests` takes alert rules and dashboards from there.
FOLDERS = {"serve_app.configs": "configs", OBSERVABILITY: "cluster/observability"}


class Build(build_py):
    """Takes the rules and dashboards, and not the Python that wrote them."""

    def find_package_modules(self, package: str, package_dir: str) -> list[tuple[str, str, str]]:
        """Return the modules of a package."""
        return [] if package == OBSERVABILITY else super().find_package_modules(package, package_dir)


setup(
    packages=[*find_packages(include=["serve_app*"]), *FOLDERS],
    package_dir=FOLDERS,
    package_data={
        "serve_app": ["py.typed", "gateway/page/*", "db/migrations/*.mako", "tiny/*", "tiny/checkpoint/**/*"],
        "serve_app.configs": ["*.yaml"],
        OBSERVABILITY: ["rules.yml", "dashboards/*.json"],
    },
    cmdclass={"build_py": Build},
)
