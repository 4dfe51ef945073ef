"""The metric reference as Markdown, in English and Chinese, made from the families of the page."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from exporter.collectors.job.metrics import STATUS_CODE_INFO
from exporter.exposed import COLLECTOR_FAMILIES, page_families
from exporter.metrics.family import SCOPE_LABELS, Family
from exporter.telemetry import PROCESS_FAMILIES, SHARING_FAMILIES

Language = Literal["en", "zh"]

TEXTS = {
    "en": {
        "title": "Metrics of blueking-exporter",
        "watched": "Watched on BlueKing",
        "pollers": "The exporter: per collector and scope",
        "process": "The exporter: the process",
        "sharing": "The exporter: one of several replicas, with Redis or Valkey only",
        "none": "none",
        "head": ("metric", "type", "labels", "meaning"),
        "more": "And the usual `process_*` and `python_*` metrics.",
    },
    "zh": {
        "title": "blueking-exporter 指标参考",
        "watched": "蓝鲸平台指标",
        "pollers": "exporter 自身：按采集项与范围",
        "process": "exporter 自身：进程级",
        "sharing": "exporter 自身：多副本之一（仅使用 Redis 或 Valkey 时）",
        "none": "无",
        "head": ("指标", "类型", "标签", "含义"),
        "more": "另有通用的 `process_*` 与 `python_*` 指标。",
    },
}


def reference(language: Language) -> str:
    """One Markdown document that ends with a newline."""
    texts = TEXTS[language]
    unscoped = {STATUS_CODE_INFO.name}
    watched = [family for family in page_families() if family not in COLLECTOR_FAMILIES]
    parts = [
        f"# {texts['title']}",
        f"## {texts['watched']}",
        _table(((family, () if family.name in unscoped else SCOPE_LABELS) for family in watched), language),
        f"## {texts['pollers']}",
        _table(((family, ("collector", *SCOPE_LABELS)) for family in COLLECTOR_FAMILIES), language),
        f"## {texts['process']}",
        _table(((family, ()) for family in PROCESS_FAMILIES), language),
        f"## {texts['sharing']}",
        _table(((family, ()) for family in SHARING_FAMILIES), language),
        str(texts["more"]),
    ]
    return "\n\n".join(parts) + "\n"


def _table(families: Iterable[tuple[Family, tuple[str, ...]]], language: Language) -> str:
    texts = TEXTS[language]
    lines = ["| " + " | ".join(texts["head"]) + " |", "|---|---|---|---|"]
    for family, owner in families:
        labels = ", ".join(f"`{label}`" for label in (*owner, *family.labels)) or str(texts["none"])
        meaning = family.help if language == "en" else family.help_zh
        lines.append(f"| `{family.name}` | {family.kind} | {labels} | {meaning} |")
    return "\n".join(lines)
