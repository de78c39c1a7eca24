"""Write the table of metrics into docs/metrics.md.

Run `python -m docs.generate_metrics`; a test sees to it that doing so changes nothing.
"""

from collections.abc import Sequence
from pathlib import Path

from creatify_exporter.metrics import METRICS, Metric
from creatify_exporter.schema import BUCKETS

REFERENCE = Path(__file__).parent / "metrics.md"


def groups() -> dict[str, list[Metric]]:
    """Return the metrics of the table by where their values come from."""
    found: dict[str, list[Metric]] = {"listing": [], "ledger": [], "exporter": []}
    for metric in METRICS:
        if metric.name.startswith("creatify_exporter_"):
            found["exporter"].append(metric)
        else:
            is_listed = metric.type == "gauge" and not metric.name.endswith("_info")
            found["listing" if is_listed else "ledger"].append(metric)
    return found


def table(metrics: Sequence[Metric]) -> str:
    """Return a Markdown table of metrics."""
    lines = ["| metric | type | labels | meaning |", "| --- | --- | --- | --- |"]
    for metric in metrics:
        labels = ", ".join(f"`{label}`" for label in metric.labels)
        if metric.type == "histogram":
            labels += f", `le` ({', '.join(f'{bound:g}' for bound in BUCKETS)})"
        lines.append(f"| `{metric.name}` | {metric.type} | {labels} | {metric.help} |")
    return "\n".join(lines)


def reference(text: str) -> str:
    """Return the reference with its generated parts, those between comments, made anew."""
    for name, metrics in groups().items():
        start, end = f"<!-- generated: {name} -->\n", "<!-- end -->"
        before, _, rest = text.partition(start)
        text = f"{before}{start}{table(metrics)}\n{end}{rest.partition(end)[2]}"
    return text


if __name__ == "__main__":
    REFERENCE.write_text(reference(REFERENCE.read_text("utf-8")), "utf-8")
