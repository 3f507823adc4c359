"""What pyproject.toml cannot say: the configs at the root of the repository ship inside the package."""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithConfigs(build_py):
    """Copies configs/ to lightning_acu/configs, so that a pip user has them too."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:  # an editable installation reads them where they are
            for source in sorted(Path("configs").rglob("*.yaml")):
                target = Path(self.build_lib, "lightning_acu", source)
                self.mkpath(str(target.parent))
                self.copy_file(str(source), str(target))


setup(cmdclass={"build_py": BuildWithConfigs})
