"""What `--once` and `--reasons` do: list every workspace once, and print."""

from contextlib import closing

import structlog

from creatify_exporter.api import ApiError, TaskStream
from creatify_exporter.config import Config
from creatify_exporter.ledger import Ledger
from creatify_exporter.reasons import Report
from creatify_exporter.service import Service, classifier, client_of
from creatify_exporter.tasks import TaskReader

_PATIENCE = 60.0  # seconds for the ledger, beyond those of a listing

_log = structlog.get_logger(__name__)


async def exposition(config: Config, ledger: Ledger, *, writes: bool) -> tuple[bytes, bool]:
    """List once; return the exposition, and whether every workspace could be listed."""
    service = Service(config, ledger, writes=writes)
    answer = await service.scrape(None, timeout=config.api.timeout + _PATIENCE, openmetrics=False)
    return answer, all(view.up for view in service.views())


def reasons(config: Config) -> tuple[str, bool]:
    """List once; return the table of the failure reasons, and whether every workspace could be listed."""
    classify = classifier(config)
    report, complete = Report(classify), True
    for one in config.workspaces:
        try:
            with closing(client_of(config, one, lambda _endpoint, _code: None).tasks()) as stream:
                _add_failures(report, stream, TaskReader(classify))
        except ApiError as error:
            complete = False
            _log.error("listing failed", workspace=one.name, cause=error.cause, status=error.status, error=str(error))
    return report.render(), complete


def _add_failures(report: Report, stream: TaskStream, read: TaskReader) -> None:
    seen = set()
    for records in stream:
        for record in records:
            for task in read([record]):
                if record and task.status == "failed" and task.id not in seen:
                    report.add(record.failed_reason)
                seen.add(task.id)
