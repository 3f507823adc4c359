"""The paper's tables: which configuration makes each row, and what the poster says of it."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["TABLES", "Row", "find_rows"]


@dataclass(frozen=True)
class Row:
    """A line of a table.

    Args:
        name: as on the command line.
        config: its file in configs/paper, without ".yaml".
        poster: what the poster says, in percent: the error, or for Places365 the top-5 accuracy.
        base: the row that its improvement is counted from; None for such a row itself.
        continues: the row whose trained network it starts from.
        metric: of the test.
        stage: of the test's stages in summary.json.
    """

    name: str
    config: str
    poster: float
    base: str | None = None
    continues: str | None = None
    metric: str = "test/error"
    stage: str = "final"

    @property
    def higher_is_better(self) -> bool:
        """Whether ``metric`` is an accuracy."""
        return self.metric.endswith("accuracy")


def _pair(name: str, config: str, base: float, acu: float, metric: str = "test/error") -> list[Row]:
    return [
        Row(name, config, base, metric=metric),
        Row(f"{name}-acu", f"{config}_acu", acu, base=name, metric=metric),
    ]


#: The poster gives the ablation as improvements over the base's 8.01 %.
TABLES: dict[str, list[Row]] = {
    "cifar10-ablation": [
        Row("base", "cifar10_plain", 8.01),
        Row("base-d2", "cifar10_plain_base_d2", 8.03, base="base"),
        Row("acu-all", "cifar10_plain_acu", 7.33, base="base"),
        Row(
            "acu-round",
            "cifar10_plain_acu_round",
            7.69,
            base="base",
            continues="acu-all",
            stage="after fine-tuning",
        ),
        Row("acu-c23", "cifar10_plain_acu_c23", 7.43, base="base"),
        Row("base-f5", "cifar10_plain_base_f5", 7.29, base="base"),
        Row("acu-f5", "cifar10_plain_acu_f5", 6.89, base="base"),
    ],
    "cifar": [
        *_pair("cifar10-plain", "cifar10_plain", 8.01, 7.33),
        *_pair("cifar10-residual", "cifar10_residual", 7.64, 7.12),
        *_pair("cifar100-plain", "cifar100_plain", 27.85, 27.11),
        *_pair("cifar100-residual", "cifar100_residual", 27.93, 27.47),
    ],
    "places365": [
        *_pair("alexnet", "places365_alexnet", 81.29, 82.08, "test/top5_accuracy"),
        *_pair("resnet26", "places365_resnet26", 85.24, 85.73, "test/top5_accuracy"),
    ],
}


def find_rows(table: str, names: list[str] | None = None) -> list[Row]:
    """The rows of ``table`` in its order: all, or those called ``names`` with the rows that they continue.

    Raises:
        ValueError: an unknown table or row; the message lists the known ones.
    """
    if table not in TABLES:
        raise ValueError(f"--table {table}: unknown table; choose one of {', '.join(TABLES)}")
    rows = {row.name: row for row in TABLES[table]}
    wanted = set(rows if names is None else names)
    if unknown := sorted(wanted - rows.keys()):
        raise ValueError(f"--rows {' '.join(unknown)}: unknown row; those of {table} are {', '.join(rows)}")
    wanted |= {source for name in wanted if (source := rows[name].continues)}
    return [row for row in TABLES[table] if row.name in wanted]
