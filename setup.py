"""Where the installed packages lie in the repository; everything else is in pyproject.toml.

The top level of the repository groups what belongs together, but ``evals`` and ``data_tools`` are names that other
distributions install too, so the packages below them have names of this project. Recipes are data of ``dualenc``.
"""

from setuptools import find_packages, setup

setup(
    packages=[
        *find_packages(include=["dualenc", "dualenc.*"]),
        *find_packages("evals"),
        *find_packages("data_tools"),
        "dualenc.recipes",
    ],
    package_dir={
        "dualenc": "dualenc",
        "dualenc_evals": "evals/dualenc_evals",
        "dualenc_data_tools": "data_tools/dualenc_data_tools",
        "dualenc.recipes": "recipes",
    },
    package_data={
        "dualenc": ["py.typed", "pages/templates/*"],
        "dualenc_evals": ["py.typed", "tasks/**/*", "pages/templates/*"],
        "dualenc_data_tools": ["py.typed", "templates/*"],
        "dualenc.recipes": ["**/*"],
    },
)
