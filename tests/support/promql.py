"""PromQL in tests: what an expression selects, and whether it takes replicas for one truth."""

from collections.abc import Iterator
from functools import cache

import promql_parser
from promql_parser import AggregateExpr, BinaryExpr, Call, Expr, MatrixSelector, ParenExpr, SubqueryExpr, VectorSelector

from creatify_exporter.metrics import METRICS


@cache
def nodes(expression: str | Expr) -> list[Expr]:
    """Return the nodes of an expression, depth first."""
    found: list[Expr] = []
    parsed = promql_parser.parse(expression) if isinstance(expression, str) else expression
    promql_parser.walk(parsed, found.append)
    return found


def selectors(expression: str) -> list[VectorSelector]:
    """Return the selectors of an expression, those under a range too."""
    return [node for node in nodes(expression) if isinstance(node, VectorSelector)]


def matched_labels(selector: VectorSelector) -> set[str]:
    """Return the names of the labels that a selector asks for."""
    return {str(matcher.name) for matcher in selector.matchers.matchers}


def known_labels(name: str) -> set[str]:
    """Return the labels that the series of a name have in Prometheus; KeyError: there are no such series."""
    known = {"process_resident_memory_bytes": set[str](), "process_cpu_seconds_total": set[str]()}
    for metric in METRICS:
        if metric.type == "histogram":
            known[f"{metric.name}_bucket"] = {*metric.labels, "le"}
            known[f"{metric.name}_sum"] = known[f"{metric.name}_count"] = set(metric.labels)
        else:
            known[metric.name] = set(metric.labels)
    return known[name] | {"job", "instance"}


def counters() -> set[str]:
    """Return the names of series that only grow."""
    families = {metric.name: metric.type for metric in METRICS}
    return {"process_cpu_seconds_total"} | {
        name
        for family, kind in families.items()
        if kind != "gauge"
        for name in ([family] if kind == "counter" else [f"{family}_{part}" for part in ("bucket", "sum", "count")])
    }


def innermost_aggregations(expression: str | Expr) -> Iterator[tuple[str, str]]:
    """Yield each selected series name with the first aggregation around it; "": none, and "absent" for absent().

    Recorded series (with a colon) are left out: they are aggregated where they are recorded. So is the right side of
    an `and on (...)` inside an aggregation: it only picks series.
    """

    def visit(node: Expr, around: str) -> Iterator[tuple[str, str]]:
        if isinstance(node, AggregateExpr):
            yield from visit(node.expr, str(node.op))
        elif isinstance(node, BinaryExpr):
            yield from visit(node.lhs, around)
            if not (str(node.op) == "and" and around):
                yield from visit(node.rhs, around)
        elif isinstance(node, Call):
            for argument in node.args:
                yield from visit(argument, "absent" if node.func.name == "absent" else around)
        elif isinstance(node, ParenExpr | SubqueryExpr):
            yield from visit(node.expr, around)
        elif isinstance(node, MatrixSelector):
            yield from visit(node.vector_selector, around)
        elif isinstance(node, VectorSelector) and ":" not in str(node.name):
            yield str(node.name), around

    yield from visit(promql_parser.parse(expression) if isinstance(expression, str) else expression, "")
